"""Random CodeGen checkpoints, and what transformers computes with them. Runs in a process of its own: torch and Jittor
do not live well together.

    python codegen.py FOLDER TOKENIZER_FOLDER

Writes FOLDER/NAME/ (a checkpoint) and FOLDER/NAME.npz for each geometry: ``token_ids`` (T,), ``logits`` (T, V) float32,
``prompt`` and its 64 ``greedy`` tokens, ``margin``: how far the greedy tokens' logits stood above the next best ones,
as a share of the largest logit. Weights are float16 values; everything is computed in float32.
"""

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from transformers import CodeGenConfig, CodeGenForCausalLM, DynamicCache

VOCABULARY = 2200
POSITIONS = 160

# heads, head size, rotary size, layers, inner size (None: four times the width), file format, shards, and a seed that was
# chosen so that some fifty of the 64 greedy tokens differ and none is a close call
GEOMETRIES: dict[str, tuple[int, int, int, int, int | None, str, int, int]] = {
    "heads-4": (4, 16, 8, 2, None, "torch", 1, 65),
    "heads-8-inner": (8, 32, 32, 3, 320, "torch", 3, 60),
    "heads-16": (16, 12, 4, 2, None, "safetensors", 1, 61),
    "heads-24": (24, 20, 16, 3, None, "safetensors", 3, 69),
}
# Which normal numbers are not used as they are: attention gets sharp enough to matter, no token says itself for ever.
SCALES = {
    "qkv_proj.weight": 1.5,
    "out_proj.weight": 2.0,
    "fc_out.weight": 2.0,
    "fc_in.bias": 0.1,
    "fc_out.bias": 0.1,
    "lm_head.bias": 0.1,
}


def config_of(name: str) -> dict[str, Any]:
    heads, head_dim, rotary_dim, layers, inner, *_ = GEOMETRIES[name]
    return {
        "model_type": "codegen",
        "vocab_size": VOCABULARY,
        "n_positions": POSITIONS,
        "n_ctx": POSITIONS,
        "n_embd": heads * head_dim,
        "n_head": heads,
        "n_layer": layers,
        "n_inner": inner,
        "rotary_dim": rotary_dim,
        "activation_function": "gelu_new",
        "layer_norm_epsilon": 1e-5,
        "bos_token_id": 1,
        "eos_token_id": VOCABULARY - 1,
        "tie_word_embeddings": False,
    }


def random_model(fields: dict[str, Any], seed: int) -> CodeGenForCausalLM:
    """Every weight a float16 value; scales that keep activations near one, as training does."""
    model = CodeGenForCausalLM(CodeGenConfig(**fields)).eval()
    draw = np.random.default_rng(seed)
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            values = draw.standard_normal(tuple(tensor.shape), dtype=np.float32)
            if tensor.ndim == 2 and "wte" not in name:
                values /= np.sqrt(tensor.shape[1])
            elif ".ln_" in name:
                values = values * 0.1 + (1 if name.endswith("weight") else 0)
            values *= next((scale for part, scale in SCALES.items() if name.endswith(part)), 1.0)
            tensor.copy_(torch.from_numpy(values.astype(np.float16)))
    return model


def save(model: CodeGenForCausalLM, fields: dict[str, Any], folder: Path, form: str, shards: int) -> None:
    """The checkpoint in float16, its tensors dealt to the shards in turn."""
    folder.mkdir(parents=True)
    tensors = {name: tensor.detach().half() for name, tensor in model.named_parameters()}
    if form == "torch":  # published shards hold the causal masks, too
        mask = torch.ones(POSITIONS, POSITIONS, dtype=torch.bool).tril()
        tensors |= {
            f"transformer.h.{layer}.attn.causal_mask": mask[None, None].clone()
            for layer in range(fields["n_layer"])
        }
    stem, suffix = ("pytorch_model", "bin") if form == "torch" else ("model", "safetensors")
    weight_map = {}
    for number in range(shards):
        part = dict(list(tensors.items())[number::shards])
        of = f"-{number + 1:05d}-of-{shards:05d}" if shards > 1 else ""
        shard = f"{stem}{of}.{suffix}"
        weight_map.update(dict.fromkeys(part, shard))
        if form == "torch":
            torch.save(part, folder / shard)
        else:
            save_file(part, folder / shard, metadata={"format": "pt"})
    if shards > 1:
        index = {"metadata": {}, "weight_map": weight_map}
        (folder / f"{stem}.{suffix}.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text(json.dumps(fields))


@torch.inference_mode()
def answers(model: CodeGenForCausalLM, seed: int) -> dict[str, np.ndarray]:
    draw = np.random.default_rng(1000 + seed)
    token_ids = draw.integers(0, VOCABULARY, 96)
    logits = model(torch.from_numpy(token_ids)[None]).logits[0]
    prompt = token_ids[:20]
    step, cache = torch.from_numpy(prompt)[None], DynamicCache()
    greedy, margin = [], np.inf
    for _ in range(64):
        last = model(step, past_key_values=cache, use_cache=True).logits[0, -1]
        best = last.topk(2).values
        margin = min(margin, float((best[0] - best[1]) / last.abs().max()))
        greedy.append(int(last.argmax()))
        step = torch.tensor([greedy[-1:]])
    return {
        "token_ids": token_ids,
        "logits": logits.numpy(),
        "prompt": prompt,
        "greedy": np.array(greedy),
        "margin": np.array(margin),
    }


def main() -> None:
    folder, tokenizer = Path(sys.argv[1]), Path(sys.argv[2])
    torch.set_num_threads(2)
    for name, (*_, form, shards, seed) in GEOMETRIES.items():
        fields = config_of(name)
        model = random_model(fields, seed)
        save(model, fields, folder / name, form, shards)
        for file in ("vocab.json", "merges.txt", "added_tokens.json"):
            shutil.copy(tokenizer / file, folder / name / file)
        np.savez(folder / f"{name}.npz", **answers(model, seed))


if __name__ == "__main__":
    main()
