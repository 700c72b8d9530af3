"""Many clients of all kinds for a long time: nothing grows, no answer is another than it is alone, and none is lost.

MOSS_JT_SOAK_S says how long; by default it is ten minutes.
"""

import gc
import json
import os
import random
import socket
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import httpx
import pytest

from moss_jt import Moss
from moss_jt.plugins.interface import Outcome
from moss_jt.plugins.registry import make_plugins
from moss_jt.serve.server import Server
from moss_jt.serve.settings import Limits
from tests.support.models import tiny_model_folder
from tests.support.serving import client, served, url, wait_until

SOAK_S = float(os.environ.get("MOSS_JT_SOAK_S", "600"))
CLIENTS = 8
QUESTIONS = ("Hello", "你好", "What is 37 times 48?", "Calculate 3+4", "你是谁？", "Tell me about the Moon")


class Hanging:
    """A search that mostly hangs, longer than it may."""

    name, label, function, argument, style, timeout_s = (
        "search",
        "Web search",
        "Search",
        "query",
        "lines",
        0.05,
    )

    def call(self, argument: str, wanted: int) -> Outcome:
        time.sleep(random.choice((0.0, 0.1, 0.2)))
        return Outcome("nothing")


def bodies() -> list[dict[str, Any]]:
    """What is asked for again and again, each with a seed, so that its answer is known."""
    plugins = ([], ["calculator"], ["calculator", "solver"])
    return [
        {
            "messages": [{"role": "user", "content": question}],
            "plugins": plugins[number % 3],
            "seed": number,
            "temperature": 1.0,
            "max_tokens": 40,
            "n": 1 + number % 2,
        }
        for number, question in enumerate(QUESTIONS * 3)
    ]


def contents(answer: dict[str, Any]) -> list[str]:
    return [choice["message"]["content"] for choice in answer["choices"]]


class Load:
    """One client after another, of any kind. ``faults`` is what went wrong, ``counts`` what was done."""

    def __init__(self, server: Server, expected: dict[int, list[str]]) -> None:
        self.faults: list[str] = []
        self.counts: Counter[str] = Counter()
        self._server, self._expected, self._bodies = server, expected, bodies()
        self._end = time.monotonic() + SOAK_S

    def run(self, seed: int) -> None:
        draw = random.Random(seed)
        kinds = (self.chat, self.chat, self.stream, self.leave, self.broken, self.bad, self.hang, self.page)
        with client(self._server) as http:
            while time.monotonic() < self._end and not self.faults:
                kind = draw.choice(kinds)
                try:
                    kind(http, draw)
                    self.counts[kind.__name__] += 1
                except (httpx.HTTPError, OSError, AssertionError, ValueError, KeyError) as error:
                    self.faults.append(f"{kind.__name__}: {error!r}")

    def chat(self, http: httpx.Client, draw: random.Random) -> None:
        number = draw.randrange(len(self._bodies))
        answer = http.post("/v1/chat/completions", json=self._bodies[number])
        assert answer.status_code == 200, answer.text
        assert contents(answer.json()) == self._expected[number]

    def stream(self, http: httpx.Client, draw: random.Random) -> None:
        number = draw.randrange(len(self._bodies))
        texts = [""] * self._bodies[number]["n"]
        with http.stream(
            "POST", "/v1/chat/completions", json={**self._bodies[number], "stream": True}
        ) as answer:
            for line in answer.iter_lines():
                if line.startswith("data: {"):
                    choice = json.loads(line[6:])["choices"][0]
                    texts[choice["index"]] += choice["delta"].get("content") or ""
        assert texts == self._expected[number]

    def leave(self, http: httpx.Client, draw: random.Random) -> None:
        body = {
            "prompt": [draw.randrange(2000) for _ in range(draw.randrange(1, 200))],
            "max_tokens": 300,
            "stream": True,
        }
        with http.stream("POST", "/v1/completions", json=body) as answer:
            lines = answer.iter_lines()
            for _ in range(draw.randrange(1, 20)):
                next(lines, None)

    def broken(self, http: httpx.Client, draw: random.Random) -> None:
        with socket.create_connection(("127.0.0.1", self._server.ports[0]), timeout=20) as connection:
            head = "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: 99\r\n\r\n"  # noqa: E501
            connection.sendall(head.encode()[: draw.randrange(1, 150)])

    def bad(self, http: httpx.Client, draw: random.Random) -> None:
        wrong: Any = draw.choice(
            ({}, [], {"messages": 5}, {"messages": [], "n": -1}, {"model": "x" * 200}, None)
        )
        assert http.post("/v1/chat/completions", json=wrong).status_code == 400

    def hang(self, http: httpx.Client, draw: random.Random) -> None:
        body = {
            "messages": [{"role": "user", "content": "Tell me about the Moon"}],
            "plugins": ["search"],
            "max_tokens": 20,
        }
        assert http.post("/v1/chat/completions", json=body).status_code == 200

    def page(self, http: httpx.Client, draw: random.Random) -> None:
        name = http.post("/api/conversations", json={}).json()["id"]
        answer = http.post(f"/api/conversations/{name}/turns", json={"message": "What is 37 times 48?"})
        assert "event: end" in answer.text
        if draw.random() < 0.7:
            assert http.delete(f"/api/conversations/{name}").status_code == 204


def resident_mib() -> float:
    gc.collect()
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / (1 << 20)


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


@pytest.mark.long
def test_a_long_mixed_load_changes_nothing(tmp_path: Path) -> None:
    options: dict[str, Any] = {
        "plugins": [*make_plugins(["calculator", "solver"]), Hanging()],
        "limits": Limits(conversations=50, live=8),
    }
    with Moss.load(tiny_model_folder(), memory="2GiB", context=768, parallel=4) as moss:
        with served(moss, tmp_path, **options) as server:
            with client(server) as http:
                expected = {
                    number: contents(http.post("/v1/chat/completions", json=body).json())
                    for number, body in enumerate(bodies())
                }
            load = Load(server, expected)
            threads = [threading.Thread(target=load.run, args=(seed,)) for seed in range(CLIENTS)]
            for thread in threads:
                thread.start()
            time.sleep(SOAK_S / 3)  # what grows with the first of everything has grown
            before, files_before = resident_mib(), descriptors()
            for thread in threads:
                thread.join()
            assert not load.faults, load.faults[:5]
            assert wait_until(lambda: server.service.answers.running == 0)
            assert wait_until(lambda: moss.engine.plan() is None and not moss.engine.waiting)
            after, files_after = resident_mib(), descriptors()
            print(
                f"{dict(load.counts)}; {before:.0f} MiB, then {after:.0f}; {files_before} files, then {files_after}"
            )
            assert min(load.counts.values()) > 0 and len(load.counts) == 7
            assert after < before + 32, f"{before:.0f} MiB, then {after:.0f}"
            assert files_after <= files_before
            assert httpx.get(f"{url(server)}/health").status_code == 200
            assert len(list((tmp_path / "page").glob("*.jsonl"))) <= 50 + 8
