"""One step of LoRA by transformers, peft and accelerate's disk offload, over the files of one of our float16 model folders.

    python benchmarks/memory_cgroup.py --limit 3GB --cold MODEL -- PEER/bin/python benchmarks/training_peer.py MODEL --tokens 512

PEER is an environment with torch, transformers, peft and accelerate. Every block's matrices are read from the folder whenever a
hook of accelerate's wants them, without a copy of the model on the disk. Our folders have the rows of qkv in another order than
transformers: the work is the same, the loss is not. accelerate widens what it reads to float32, in which torch's products are
quicker on a processor than in float16. --checkpointing: a block is computed again on the way back, which is what lets
accelerate let go of its weights in between. The last line is one JSON object.
"""

import argparse
import json
import resource
import time
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from accelerate.utils import OffloadedWeightsLoader, PrefixedDataset
from peft import LoraConfig, get_peft_model
from safetensors import safe_open
from transformers import CodeGenConfig, CodeGenForCausalLM

TARGETS = ["qkv_proj", "out_proj", "fc_in", "fc_out"]


def offload_index(folder: Path) -> dict[str, dict[str, str]]:
    """Every tensor of the folder, and which file has it, as accelerate asks for it."""
    index = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118  it is no mapping
                index[name] = {"safetensors_file": str(path), "weight_name": name, "dtype": "float16"}
    return index


def offloaded(folder: Path, rank: int, checkpointing: bool) -> Any:
    """The model with adapters: their matrices are in memory, all else is read when it is used."""
    fields = json.loads((folder / "config.json").read_text()) | {"model_type": "codegen", "use_cache": False}
    fields |= {"tie_word_embeddings": False, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    config = CodeGenConfig(**fields)
    with init_empty_weights(include_buffers=False):
        model = CodeGenForCausalLM(config)
    weights = OffloadedWeightsLoader(index=offload_index(folder))
    for name, module in model.named_modules():
        if next(module.parameters(recurse=False), None) is not None:
            hook = AlignDevicesHook(
                execution_device=torch.device("cpu"),
                offload=True,
                weights_map=PrefixedDataset(weights, f"{name}."),
            )
            add_hook_to_module(module, hook)
    lora = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=TARGETS, task_type="CAUSAL_LM")
    model = get_peft_model(model, lora)
    for module in model.modules():
        for adapters in (getattr(module, "lora_A", {}), getattr(module, "lora_B", {})):
            for matrix in adapters.values():
                matrix.to_empty(device="cpu").float()
                torch.nn.init.normal_(matrix.weight, std=0.01)
    model.train()
    if checkpointing:
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return model


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--tokens", type=int, required=True)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--steps", type=int, default=1)
    parser.add_argument("--checkpointing", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(2)
    torch.manual_seed(0)
    model = offloaded(arguments.folder, arguments.rank, arguments.checkpointing)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4)
    token_ids = torch.randint(0, model.config.vocab_size, (1, arguments.tokens))
    labels = token_ids.clone()
    labels[:, : arguments.tokens // 2] = -100
    steps = []
    for _ in range(arguments.steps):
        begin = time.perf_counter()
        loss = model(input_ids=token_ids, labels=labels).loss
        there = time.perf_counter() - begin
        print(json.dumps({"loss": round(loss.item(), 4), "forward_s": round(there, 2)}), flush=True)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        steps.append({"forward_s": round(there, 2), "seconds": round(time.perf_counter() - begin, 2)})
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10
    print(
        json.dumps(
            {"trained": sum(p.numel() for p in trained), "peak_gb": round(peak / 1e9, 2), "steps": steps}
        )
    )


if __name__ == "__main__":
    main()
