"""What HTTP costs: many streams beside the same answers asked of the engine directly, in turns; and how soon a first byte comes.

    python benchmarks/http_load.py MODEL --clients 16 --tokens 48 --rounds 3

The clients are a process of their own, on the same machine: what they compute is in the number.
"""

import argparse
import asyncio
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

PROBE_S = 1.0


def prompts(count: int, length: int, vocabulary: int) -> list[list[int]]:
    return [
        [(31 * number + 7 * position) % vocabulary for position in range(length)] for number in range(count)
    ]


async def clients(address: str, count: int, length: int, tokens: int, vocabulary: int) -> dict[str, Any]:
    """All of them at once; and beside them somebody who asks whether the server lives, and comes late with a question."""
    import httpx

    first: list[float] = []
    received: list[int] = []
    probes: list[float] = []
    late: list[float] = []
    async with httpx.AsyncClient(
        base_url=address, timeout=600, limits=httpx.Limits(max_connections=None)
    ) as http:

        async def ask(prompt: list[int]) -> None:
            body = {
                "prompt": prompt,
                "max_tokens": tokens,
                "temperature": 1.0,
                "seed": 1,
                "stream": True,
                "stream_options": {"include_usage": True},
            }
            begin, last = time.perf_counter(), ""
            async with http.stream("POST", "/v1/completions", json=body) as answer:
                async for line in answer.aiter_lines():
                    if line.startswith("data: {"):
                        if not last:
                            first.append(time.perf_counter() - begin)
                        last = line
            received.append(json.loads(last[6:])["usage"]["completion_tokens"])

        async def probe() -> None:
            while True:
                await asyncio.sleep(PROBE_S)
                begin = time.perf_counter()
                await http.get("/health")
                probes.append(time.perf_counter() - begin)
                begin, body = time.perf_counter(), {"prompt": [1, 2], "max_tokens": 1, "stream": True}
                async with http.stream("POST", "/v1/completions", json=body) as answer:
                    async for _ in answer.aiter_raw():
                        late.append(time.perf_counter() - begin)
                        break

        probing = asyncio.create_task(probe())
        begin = time.perf_counter()
        await asyncio.gather(*(ask(prompt) for prompt in prompts(count, length, vocabulary)))
        seconds = time.perf_counter() - begin
        probing.cancel()
    return {
        "tokens_per_s": sum(received) / seconds,
        "tokens": sum(received),
        "first_byte_s": max(first),
        "late_first_byte_s": max(late, default=0.0),
        "health_s": max(probes, default=0.0),
    }


def measure(arguments: argparse.Namespace) -> None:
    from moss_jt import Moss
    from moss_jt.engine.sampling import SamplingParams
    from moss_jt.serve.server import Server
    from moss_jt.serve.settings import Settings

    with (
        tempfile.TemporaryDirectory() as home,
        Moss.load(
            arguments.model, memory=arguments.memory, parallel=arguments.clients, context=arguments.context
        ) as moss,
    ):
        server = Server(Settings(home=Path(home), ports=[0]), "model")
        server.start()
        server.ready(moss)
        params = SamplingParams(temperature=1.0, seed=1)
        size = moss.config.vocab_size
        command = [
            sys.executable,
            __file__,
            "--address",
            f"http://127.0.0.1:{server.ports[0]}",
            "--vocabulary",
            str(size),
        ]
        command += ["--clients", str(arguments.clients), "--tokens", str(arguments.tokens)]
        command += ["--prompt-tokens", str(arguments.prompt_tokens)]
        rows = []
        for number in range(arguments.rounds + 1):
            begin = time.perf_counter()
            answers = [
                moss.begin(prompt, params, arguments.tokens, background=False)
                for prompt in prompts(arguments.clients, arguments.prompt_tokens, size)
            ]
            count = sum(len(answer.finish().token_ids) for answer in answers)
            direct = count / (time.perf_counter() - begin)
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            row = {"engine_tokens_per_s": direct, "engine_tokens": count, **json.loads(done.stdout)}
            row["share"] = row["tokens_per_s"] / direct
            if number:  # the first warms up
                rows.append(row)
                print(json.dumps({name: round(value, 4) for name, value in row.items()}), flush=True)
        print(json.dumps({"share": round(statistics.median(row["share"] for row in rows), 4)}))
        server.stop()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", nargs="?")
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--prompt-tokens", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--context", type=int, default=256)
    parser.add_argument("--memory", default="8GiB")
    parser.add_argument("--address")
    parser.add_argument("--vocabulary", type=int)
    arguments = parser.parse_args()
    if arguments.address:
        sizes = arguments.clients, arguments.prompt_tokens, arguments.tokens, arguments.vocabulary
        loading = clients(arguments.address, *sizes)
        print(json.dumps(asyncio.run(loading)))
    else:
        measure(arguments)


if __name__ == "__main__":
    main()
