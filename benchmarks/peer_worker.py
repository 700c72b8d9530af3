"""One peer, one process: loads a random CodeGen checkpoint and times it, where torch, CTranslate2 and llama.cpp are.

Prints one JSON object:
{"load_s": s, "contexts": {"32": {"prefill_s": s, "decode_s": s per token}, ...}, "peak_gib": g}.
"""

import argparse
import json
import resource
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

Timings = dict[str, float]


def prompt_ids(length: int) -> list[int]:
    """The same token ids for every engine, none of them special."""
    return [17 + (7919 * position) % 1900 for position in range(length)]


def time_transformers(
    folder: Path, kind: str, contexts: list[int], steps: int
) -> tuple[float, dict[str, Timings]]:
    """torch's eager CodeGen; int8 is torch's own dynamic quantization of the linear layers."""
    import torch
    from transformers import AutoModelForCausalLM, DynamicCache

    torch.set_num_threads(2)
    begin = time.perf_counter()
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "int8": torch.float32}[
        kind
    ]
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
    if kind == "int8":
        model = torch.ao.quantization.quantize_dynamic(model, {torch.nn.Linear}, dtype=torch.qint8)
    load_s = time.perf_counter() - begin

    @torch.inference_mode()
    def measure(length: int) -> Timings:
        cache = DynamicCache()
        begin = time.perf_counter()
        out = model(
            torch.tensor([prompt_ids(length)]), past_key_values=cache, use_cache=True, logits_to_keep=1
        )
        prefill_s = time.perf_counter() - begin
        token, durations = out.logits[:, -1:].argmax(-1), []
        for _ in range(steps):
            begin = time.perf_counter()
            out = model(token, past_key_values=cache, use_cache=True)
            token = out.logits[:, -1:].argmax(-1)
            durations.append(time.perf_counter() - begin)
        return {"prefill_s": prefill_s, "decode_s": statistics.median(durations)}

    return load_s, measure_all(measure, contexts)


def time_ctranslate2(
    folder: Path, kind: str, contexts: list[int], steps: int
) -> tuple[float, dict[str, Timings]]:
    """CTranslate2's own converted copy beside the checkpoint; a decode step is the slope between two lengths."""
    import ctranslate2

    compute = {"fp32": "float32", "int8": "int8"}[kind]
    converted = folder.with_name(f"{folder.name}-ct2-{compute}")
    if not (converted / "model.bin").exists():
        ctranslate2.converters.TransformersConverter(
            str(folder), load_as_float16=True, low_cpu_mem_usage=True
        ).convert(str(converted), quantization=compute, force=True)
    vocabulary = json.loads((converted / "vocabulary.json").read_text())
    begin = time.perf_counter()
    generator = ctranslate2.Generator(
        str(converted), device="cpu", compute_type=compute, inter_threads=1, intra_threads=2
    )
    load_s = time.perf_counter() - begin

    def run(length: int, new: int) -> float:
        tokens = [vocabulary[index] for index in prompt_ids(length)]
        begin = time.perf_counter()
        generator.generate_batch(
            [tokens], max_length=new, min_length=new, sampling_topk=1, include_prompt_in_result=False
        )
        return time.perf_counter() - begin

    def measure(length: int) -> Timings:
        first = run(length, 1)
        return {"prefill_s": first, "decode_s": (run(length, 1 + steps) - first) / steps}

    return load_s, measure_all(measure, contexts)


def time_llama(folder: Path, kind: str, contexts: list[int], steps: int) -> tuple[float, dict[str, Timings]]:
    """llama.cpp's server, by its own clock, over a random model of the checkpoint's shape, made once."""
    import gguf
    from serving_peer import ask, start, write_model

    shape = json.loads((folder / "config.json").read_text())
    shape["n_inner"] = shape["n_inner"] or 4 * shape["n_embd"]
    model = folder.with_name(f"{folder.name}-{kind}.gguf")
    if not model.exists():
        write_model(model, shape, gguf.GGMLQuantizationType[kind])
    begin = time.perf_counter()
    server = start(model, 1, max(contexts) + steps + 8, 2)
    load_s = time.perf_counter() - begin

    def measure(length: int) -> Timings:
        times = ask(server.listening_address, 0, prompt_ids(length), 1 + steps, cached=False)["timings"]
        # The first token comes with the prompt.
        return {"prefill_s": times["prompt_ms"] / 1e3, "decode_s": times["predicted_ms"] / 1e3 / steps}

    return load_s, measure_all(measure, contexts)


def measure_all(measure: Callable[[int], Timings], contexts: list[int]) -> dict[str, Timings]:
    measure(contexts[0])  # the first pass allocates and warms up
    return {str(length): measure(length) for length in contexts}


ENGINES = {"transformers": time_transformers, "ctranslate2": time_ctranslate2, "llama.cpp": time_llama}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--engine", choices=ENGINES, required=True)
    parser.add_argument("--kind", required=True)
    parser.add_argument("--contexts", default="32,256,1024")
    parser.add_argument("--steps", type=int, default=24)
    arguments = parser.parse_args()
    contexts = [int(text) for text in arguments.contexts.split(",")]
    load_s, timings = ENGINES[arguments.engine](arguments.folder, arguments.kind, contexts, arguments.steps)
    peak_gib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(json.dumps({"load_s": load_s, "contexts": timings, "peak_gib": peak_gib}))


if __name__ == "__main__":
    main()
