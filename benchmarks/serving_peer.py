"""llama.cpp's server over a random phi2 model of a given shape, in an environment with xllamacpp and gguf.

phi2 is the architecture there that has CodeGen's shape: attention and MLP side by side, partial rotary embedding. Prints one JSON
object: {"4": tokens per second of 4 conversations together, ...}. The prompts are read once and stay in their slots; what a
token takes is the difference between answers of ``steps`` more tokens and of one.
"""

import argparse
import json
import threading
import time
import urllib.request
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import xllamacpp

DRAWN = 1 << 20  # random weights, which repeat


def write_model(path: Path, shape: dict[str, int], kind: gguf.GGMLQuantizationType) -> None:
    """A random phi2 GGUF with matrices of that kind."""
    writer = gguf.GGUFWriter(path, "phi2")
    width, layers, inner, vocabulary = (
        shape[name] for name in ("n_embd", "n_layer", "n_inner", "vocab_size")
    )
    writer.add_context_length(shape["n_positions"])
    writer.add_embedding_length(width)
    writer.add_feed_forward_length(inner)
    writer.add_block_count(layers)
    writer.add_head_count(shape["n_head"])
    writer.add_head_count_kv(shape["n_head"])
    writer.add_layer_norm_eps(1e-5)
    writer.add_rope_dimension_count(shape["rotary_dim"])
    writer.add_add_bos_token(False)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list([f"t{number}" for number in range(vocabulary)])
    writer.add_token_types([gguf.TokenType.NORMAL] * vocabulary)
    writer.add_token_merges(["t 1"])
    writer.add_eos_token_id(0)
    drawn = (np.random.default_rng(0).standard_normal(DRAWN) * 0.02).astype(np.float32)
    packed = gguf.quants.quantize(drawn.reshape(1, -1), kind).view(np.uint8).reshape(-1)

    def matrix(name: str, rows: int, columns: int) -> None:
        row_bytes = columns * packed.size // DRAWN
        writer.add_tensor(name, np.resize(packed, (rows, row_bytes)), raw_dtype=kind)

    def vector(name: str, length: int, value: float = 0.0) -> None:
        writer.add_tensor(name, np.full(length, value, np.float32))

    matrix("token_embd.weight", vocabulary, width)
    matrix("output.weight", vocabulary, width)
    vector("output.bias", vocabulary)
    vector("output_norm.weight", width, 1.0)
    vector("output_norm.bias", width)
    for layer in range(layers):
        block = f"blk.{layer}"
        vector(f"{block}.attn_norm.weight", width, 1.0)
        vector(f"{block}.attn_norm.bias", width)
        for part, rows, columns in (
            ("attn_qkv", 3 * width, width),
            ("attn_output", width, width),
            ("ffn_up", inner, width),
            ("ffn_down", width, inner),
        ):
            matrix(f"{block}.{part}.weight", rows, columns)
            vector(f"{block}.{part}.bias", rows)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def start(model: Path, parallel: int, context: int, threads: int) -> Any:
    params = xllamacpp.CommonParams()
    params.model.path = str(model)
    params.n_parallel = parallel
    params.n_ctx = parallel * context
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads
    params.hostnames = ["127.0.0.1"]
    params.port = 0
    params.n_gpu_layers = 0
    params.warmup = True
    return xllamacpp.Server(params)


def ask(address: str, slot: int, prompt: list[int], tokens: int, cached: bool = True) -> dict[str, Any]:
    """An answer of so many tokens; ``cached``: what the slot has of the prompt is not read again."""
    body = {
        "prompt": prompt,
        "id_slot": slot,
        "n_predict": tokens,
        "ignore_eos": True,
        "cache_prompt": cached,
        "temperature": 0,
    }
    request = urllib.request.Request(
        f"{address}/completion", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=3600) as answer:
        answered: dict[str, Any] = json.load(answer)
    if answered["tokens_predicted"] != tokens:
        raise SystemExit(f"{answered['tokens_predicted']} tokens instead of {tokens}")
    return answered


def seconds(address: str, prompts: list[list[int]], tokens: int) -> float:
    """Of answers of so many tokens to all prompts at once."""
    threads = [
        threading.Thread(target=ask, args=(address, slot, prompt, tokens))
        for slot, prompt in enumerate(prompts)
    ]
    begin = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return time.perf_counter() - begin


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path, help="GGUF file; written if it is not there")
    parser.add_argument("--shape", required=True, help="JSON object of the configuration's numbers")
    parser.add_argument("--float16", action="store_true")
    parser.add_argument("--parallel", default="1,4,16")
    parser.add_argument("--context", type=int, default=128)
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    shape = json.loads(arguments.shape)
    if not arguments.model.exists():
        kinds = gguf.GGMLQuantizationType
        write_model(arguments.model, shape, kinds.F16 if arguments.float16 else kinds.Q4_0)
    counts = [int(count) for count in arguments.parallel.split(",")]
    server = start(arguments.model, max(counts), arguments.context + arguments.steps + 8, arguments.threads)
    address = server.listening_address
    prompts = [
        [
            17 + (7919 * position + first) % min(1900, shape["vocab_size"] - 17)
            for position in range(arguments.context)
        ]
        for first in range(max(counts))
    ]
    rates = {}
    for count in counts:
        some = prompts[:count]
        seconds(address, some, 2)
        longer, shorter = (seconds(address, some, tokens) for tokens in (1 + arguments.steps, 1))
        rates[str(count)] = count * arguments.steps / (longer - shorter)
    print(json.dumps(rates))


if __name__ == "__main__":
    main()
