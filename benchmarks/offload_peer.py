"""A peer's way to run a checkpoint in less memory than it takes, one process; prints one JSON object.

accelerate  what fits into --memory on the CPU, the rest offloaded to disk by accelerate's hooks
mmap        transformers over memory maps of the checkpoint's files
"""

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights, load_checkpoint_and_dispatch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache

PROMPT = [17 + (7919 * position) % 1900 for position in range(16)]


def empty_model(folder: Path) -> Any:
    config = AutoConfig.from_pretrained(folder)
    with init_empty_weights(include_buffers=False):
        return AutoModelForCausalLM.from_config(config, dtype=torch.float16).eval()


def accelerated(folder: Path, memory: int, offload: str) -> Any:
    """Blocks in order while they fit, embedding and head too, then disk; nothing is split within a block."""
    model = empty_model(folder)
    block = sum(p.numel() * 2 for p in model.transformer.h[0].parameters())
    count = min(len(model.transformer.h), max(0, memory - 2 * block) // block)
    device_map: dict[str, str] = {
        "transformer.wte": "disk",
        "transformer.drop": "cpu",
        "transformer.ln_f": "cpu",
        "lm_head": "disk",
    }
    for layer in range(len(model.transformer.h)):
        device_map[f"transformer.h.{layer}"] = "cpu" if layer < count else "disk"
    return load_checkpoint_and_dispatch(
        model, str(folder), device_map=device_map, offload_folder=offload, dtype=torch.float16
    )


def mapped(folder: Path) -> Any:
    model = empty_model(folder)
    for shard in sorted(folder.glob("*.safetensors")):
        model.load_state_dict(load_file(shard), strict=False, assign=True)
    return model


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--way", choices=("accelerate", "mmap"), required=True)
    parser.add_argument("--memory", type=int, required=True, help="for weights")
    parser.add_argument("--tokens", type=int, required=True)
    parser.add_argument("--work", type=Path, required=True, help="where offloaded weights are written")
    arguments = parser.parse_args()
    torch.set_num_threads(2)
    begin = time.perf_counter()
    with tempfile.TemporaryDirectory(dir=arguments.work) as offload, torch.inference_mode():
        if arguments.way == "accelerate":
            model = accelerated(arguments.folder, arguments.memory, offload)
        else:
            model = mapped(arguments.folder)
        load_s = time.perf_counter() - begin
        cache, token, times = DynamicCache(), torch.tensor([PROMPT]), []
        token_ids = list(PROMPT)
        for _ in range(arguments.tokens):
            begin = time.perf_counter()
            out = model(token, past_key_values=cache, use_cache=True, logits_to_keep=1)
            token = out.logits[:, -1:].argmax(-1)
            times.append(time.perf_counter() - begin)
            token_ids.append(int(token))
    print(json.dumps({"load_s": load_s, "times": times, "token_ids": token_ids}))


if __name__ == "__main__":
    main()
