"""A CodeGen checkpoint with random float16 weights in Hugging Face's format, for benchmarks: made with numpy alone."""

import argparse
import json
import shutil
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from moss_jt.store.architecture import block_tensors, embedding_tensors, full_name, head_tensors
from moss_jt.store.config import MossConfig

TOKENIZER = Path(__file__).resolve().parents[1] / "demos" / "moss-tiny"

# Salesforce's sizes: CodeGen-350M and CodeGen-2B (2.7 billion parameters).
GEOMETRIES = {
    "350M": {"n_embd": 1024, "n_layer": 20, "n_head": 16, "rotary_dim": 32},
    "2.7B": {"n_embd": 2560, "n_layer": 32, "n_head": 32, "rotary_dim": 64},
}
VOCABULARY = 51200


def config_of(geometry: str) -> dict[str, object]:
    """config.json of a CodeGen model of that size, 2048 positions."""
    return {
        "model_type": "codegen",
        "architectures": ["CodeGenForCausalLM"],
        "vocab_size": VOCABULARY,
        "n_positions": 2048,
        "n_ctx": 2048,
        "n_inner": None,
        "activation_function": "gelu_new",
        "layer_norm_epsilon": 1e-5,
        "bos_token_id": 1,
        "eos_token_id": VOCABULARY - 1,
        "tie_word_embeddings": False,
        "torch_dtype": "float16",
        **GEOMETRIES[geometry],
    }


def tensors_of(config: MossConfig, layer: int | None) -> dict[str, tuple[int, ...]]:
    """Names and shapes of one block's tensors, or of those outside the blocks."""
    outside = {**embedding_tensors(config), **head_tensors(config)}
    tensors = outside if layer is None else block_tensors(config, 16, 0)
    return {full_name(name, layer): shape for name, (_, shape) in tensors.items()}


def random_tensor(name: str, shape: tuple[int, ...], draw: np.random.Generator) -> np.ndarray:
    """Normal with deviation 0.02 as CodeGen's initialisation; layer norms around one, biases around zero."""
    values = draw.standard_normal(shape, dtype=np.float32) * np.float32(0.02)
    if ".ln_" in name and name.endswith("weight"):
        values += 1
    return values.astype(np.float16)


def write_checkpoint(folder: Path, geometry: str, seed: int = 0) -> None:
    """Write the checkpoint, one shard per block, unless it is complete already."""
    if (folder / "config.json").exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    config, draw, weight_map = config_of(geometry), np.random.default_rng(seed), {}
    shapes = MossConfig.from_json(config)
    layers = [None, *range(shapes.n_layer)]
    for number, layer in enumerate(layers, 1):
        shard = f"model-{number:05d}-of-{len(layers):05d}.safetensors"
        tensors = {
            name: random_tensor(name, shape, draw) for name, shape in tensors_of(shapes, layer).items()
        }
        save_file(tensors, folder / shard, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(tensors, shard))
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    for name in ("vocab.json", "merges.txt", "added_tokens.json", "special_tokens_map.json"):
        shutil.copy(TOKENIZER / name, folder / name)
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "GPT2Tokenizer"}))
    (folder / "config.json").write_text(json.dumps(config, indent=2))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("geometry", choices=GEOMETRIES)
    parser.add_argument("folder", type=Path)
    arguments = parser.parse_args()
    write_checkpoint(arguments.folder, arguments.geometry)


if __name__ == "__main__":
    main()
