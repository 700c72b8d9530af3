"""What HTTP costs: many streams beside the same answers asked of the engine directly, in turns; and how soon a first byte comes.

    python benchmarks/http_load.py MODEL --clients 16 --tokens 48 --rounds 3

The clients are a process of their own, on the same machine: what they compute is in the number.
"""

import argparse
import asyncio
import json
import re
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

PROBE_S = 1.0
LATE = [1, 2]


def prompts(count: int, length: int, vocabulary: int) -> list[list[int]]:
    return [
        [(31 * number + 7 * position) % vocabulary for position in range(length)] for number in range(count)
    ]


class Reader(asyncio.Protocol):
    """One request and the bytes of its answer, at next to no cost: it runs on the cores that the server computes on.

    first_s  until the first event
    ended    when the connection has
    """

    def __init__(self, path: str, body: dict[str, Any] | None) -> None:
        content = b"" if body is None else json.dumps(body).encode()
        head = (
            f"{'GET' if body is None else 'POST'} {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n"
        )
        head += f"Content-Type: application/json\r\nContent-Length: {len(content)}\r\n\r\n"
        self._request = head.encode() + content
        self.received = bytearray()
        self.first_s = self.seconds = 0.0
        self.ended = asyncio.Event()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._begin = time.perf_counter()
        transport.write(self._request)

    def data_received(self, data: bytes) -> None:
        self.received += data
        if not self.first_s and b"data: {" in self.received:
            self.first_s = time.perf_counter() - self._begin

    def connection_lost(self, exc: Exception | None) -> None:
        self.seconds = time.perf_counter() - self._begin
        self.ended.set()

    @property
    def tokens(self) -> int:
        """What a stream's last events say."""
        found = re.search(rb'"completion_tokens":(\d+)', self.received)
        assert found is not None and self.received.count(b"data: [DONE]") == 1, bytes(self.received[-1000:])
        return int(found[1])


async def ask(port: int, path: str, body: dict[str, Any] | None = None) -> Reader:
    _, reader = await asyncio.get_running_loop().create_connection(
        lambda: Reader(path, body), "127.0.0.1", port
    )
    await reader.ended.wait()
    assert reader.received.startswith(b"HTTP/1.1 200 "), bytes(reader.received[:300])
    return reader


async def clients(port: int, count: int, length: int, tokens: int, vocabulary: int) -> dict[str, Any]:
    """All of them at once; and beside them somebody who asks whether the server lives, and comes late with a question."""
    probes: list[float] = []
    late: list[float] = []

    def body(prompt: list[int], most: int) -> dict[str, Any]:
        options = {"temperature": 1.0, "seed": 1, "stream": True, "stream_options": {"include_usage": True}}
        return {"prompt": prompt, "max_tokens": most, **options}

    async def probe() -> None:
        while True:
            await asyncio.sleep(PROBE_S)
            probes.append((await ask(port, "/health")).seconds)
            late.append((await ask(port, "/v1/completions", body(LATE, 1))).first_s)

    probing = asyncio.create_task(probe())
    begin = time.perf_counter()
    asking = [
        ask(port, "/v1/completions", body(prompt, tokens)) for prompt in prompts(count, length, vocabulary)
    ]
    readers = await asyncio.gather(*asking)
    seconds = time.perf_counter() - begin
    probing.cancel()
    received = sum(reader.tokens for reader in readers)
    return {
        "tokens_per_s": received / seconds,
        "tokens": received,
        "first_byte_s": max(reader.first_s for reader in readers),
        "late_first_byte_s": max(late, default=0.0),
        "health_s": max(probes, default=0.0),
    }


def direct(moss: Any, prompts: list[list[int]], tokens: int) -> tuple[int, float]:
    """The same asked of the engine: tokens, and in how many seconds."""
    from moss_jt.engine.sampling import SamplingParams

    params, ended = SamplingParams(temperature=1.0, seed=1), threading.Event()

    def come_late() -> None:
        while not ended.wait(PROBE_S):
            moss.begin(LATE, params, 1, background=False).finish()

    coming = threading.Thread(target=come_late)
    coming.start()
    begin = time.perf_counter()
    answers = [moss.begin(prompt, params, tokens, background=False) for prompt in prompts]
    count = sum(len(answer.finish().token_ids) for answer in answers)
    seconds = time.perf_counter() - begin
    ended.set()
    coming.join()
    return count, seconds


def measure(arguments: argparse.Namespace) -> None:
    from moss_jt import Moss
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
        size = moss.config.vocab_size
        command = [sys.executable, __file__, "--port", str(server.ports[0]), "--vocabulary", str(size)]
        command += ["--clients", str(arguments.clients)]
        command += ["--prompt-tokens", str(arguments.prompt_tokens)]
        texts = prompts(arguments.clients, arguments.prompt_tokens, size)
        rows = []
        for number in range(arguments.rounds + 1):
            tokens = arguments.tokens if number else 2  # the first warms up
            count, seconds = direct(moss, texts, tokens)
            done = subprocess.run(
                [*command, "--tokens", str(tokens)], stdout=subprocess.PIPE, text=True, check=True
            )
            row = {"engine_tokens_per_s": count / seconds, "engine_tokens": count, **json.loads(done.stdout)}
            row["share"] = row["tokens_per_s"] / row["engine_tokens_per_s"]
            if number:
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
    parser.add_argument("--port", type=int)
    parser.add_argument("--vocabulary", type=int)
    arguments = parser.parse_args()
    if arguments.port:
        sizes = arguments.clients, arguments.prompt_tokens, arguments.tokens, arguments.vocabulary
        loading = clients(arguments.port, *sizes)
        print(json.dumps(asyncio.run(loading)))
    else:
        measure(arguments)


if __name__ == "__main__":
    main()
