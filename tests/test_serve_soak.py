"""Many clients of all kinds for a long time: nothing grows, no answer is another than it is alone, and none is lost.

MOSS_JT_SOAK_S says how long the long one takes, by default ten minutes, and MOSS_JT_SOAK_CPU how much of a core it may use: 0.3.
With that it can run beside other work for hours, and it stands that it is stopped meanwhile (SIGSTOP).
"""

import gc
import json
import os
import random
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
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
from tests.support.serving import served, url, wait_until

SOAK_S = float(os.environ.get("MOSS_JT_SOAK_S", "600"))
SOAK_CPU = float(os.environ.get("MOSS_JT_SOAK_CPU", "inf"))
CLIENTS = 8
PATIENCE_S = 1800.0  # whoever has the machine to himself meanwhile may stop this
LOOK_S = 0.25
STOPPED_S = 2.0
QUESTIONS = ("Hello", "你好", "What is 37 times 48?", "Calculate 3+4", "你是谁？", "Tell me about the Moon")
SUM, ANSWER = "What is 37 times 48?", "37 times 48 equals 1776[1]."
SPOKEN = "<|Human|>: What is 37 times 48?<eoh>\n<|Inner Thoughts|>:"
HEAD = "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: {}\r\n\r\n"


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
        time.sleep(random.choice((0.0, 0.1, 0.2, 2.0)))
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


def data_of(text: str) -> list[dict[str, Any]]:
    """What the events of a stream, or of a part of one, say."""
    return [json.loads(line[6:]) for line in text.splitlines() if line.startswith("data: {")]


class Share:
    """Lets nobody go on while this process has used more of a core than its share."""

    def __init__(self, of_a_core: float) -> None:
        self._share, self._left = of_a_core, 0.0
        self._lock = threading.Lock()
        self._seen = time.monotonic(), time.process_time()

    def wait(self) -> None:
        while self._spent():
            time.sleep(LOOK_S)

    def _spent(self) -> bool:
        with self._lock:
            before, self._seen = self._seen, (time.monotonic(), time.process_time())
            given = self._share * (self._seen[0] - before[0])
            self._left = min(1.0, self._left + given - (self._seen[1] - before[1]))
            return self._left < 0


class Load:
    """One client after another, of any kind. ``faults`` is what went wrong, ``counts`` what was done."""

    def __init__(self, server: Server, expected: dict[int, list[str]], of_a_core: float) -> None:
        self.faults: list[str] = []
        self.counts: Counter[str] = Counter()
        self.kinds = (
            self.chat, self.chat, self.stream, self.named, self.leave, self.broken, self.bad, self.hang, self.page, self.uid,
            self.vortex, self.asked,
        )  # fmt: skip
        self._server, self._expected, self._bodies = server, expected, bodies()
        self._share = Share(of_a_core)
        self._stopped_at = 0.0
        self._tally = threading.Lock()

    def run(self, seconds: float, seed: int) -> None:
        """All clients for so long, and until what they have asked is answered."""
        end = time.monotonic() + seconds
        threads = [
            threading.Thread(target=self._run, args=(end, random.Random(seed * CLIENTS + number)))
            for number in range(CLIENTS)
        ]
        for thread in threads:
            thread.start()
        seen = time.monotonic()
        while any(thread.is_alive() for thread in threads):
            time.sleep(LOOK_S)
            now = time.monotonic()
            if now > seen + STOPPED_S:
                self._stopped_at = now
            seen = now

    def _run(self, end: float, draw: random.Random) -> None:
        with httpx.Client(base_url=url(self._server), timeout=PATIENCE_S) as http:
            while time.monotonic() < end and not self.faults:
                self._do(draw.choice(self.kinds), http, draw)
                self._share.wait()

    def _do(self, kind: Callable[..., None], http: httpx.Client, draw: random.Random) -> None:
        begun, name = time.monotonic(), kind.__name__
        try:
            kind(http, draw)
        except (httpx.HTTPError, OSError, AssertionError, ValueError, KeyError) as error:
            time.sleep(2 * LOOK_S)
            if self._stopped_at < begun:
                self.faults.append(f"{name}: {error!r}")
            name = "stopped meanwhile"  # a plugin's time was over when all of this went on
        with self._tally:
            self.counts[name] += 1

    def chat(self, http: httpx.Client, draw: random.Random) -> None:
        number = draw.randrange(len(self._bodies))
        answer = http.post("/v1/chat/completions", json=self._bodies[number])
        assert answer.status_code == 200, answer.text
        assert contents(answer.json()) == self._expected[number]

    def stream(self, http: httpx.Client, draw: random.Random) -> None:
        number = draw.randrange(len(self._bodies))
        answer = http.post("/v1/chat/completions", json={**self._bodies[number], "stream": True})
        self._check_stream(number, answer.text)

    def _check_stream(self, number: int, text: str) -> None:
        texts = [""] * self._bodies[number]["n"]
        for chunk in data_of(text):
            choice = chunk["choices"][0]
            texts[choice["index"]] += choice["delta"].get("content") or ""
        assert texts == self._expected[number]
        assert text.endswith("data: [DONE]\n\n")

    def named(self, http: httpx.Client, draw: random.Random) -> None:
        """A stream whose connection is lost, and taken up."""
        number, name = draw.randrange(len(self._bodies)), f"{draw.getrandbits(64):x}"
        body, most = {**self._bodies[number], "stream": True}, draw.randrange(1, 30)
        received: list[str] = []
        with http.stream(
            "POST", "/v1/chat/completions", json=body, headers={"X-Conversation-Id": name}
        ) as answer:
            for line in answer.iter_lines():
                received += [line] if line.startswith("data: ") else []
                if len(received) >= most:
                    break
        rest = http.get("/v1/stream", params={"conv_id": name, "from": len(received)}).text
        self._check_stream(number, "\n\n".join([*received, rest]))
        if draw.random() < 0.5:
            assert http.delete("/v1/stream", params={"conv_id": name}).status_code == 204

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
        """A connection that ends anywhere in the request, or right after it."""
        body = json.dumps({"prompt": "a", "max_tokens": 300, "stream": draw.random() < 0.5})
        request = (HEAD.format(len(body)) + body).encode()
        with socket.create_connection(("127.0.0.1", self._server.ports[0]), PATIENCE_S) as connection:
            connection.sendall(request[: draw.randrange(1, len(request) + 20)])

    def bad(self, http: httpx.Client, draw: random.Random) -> None:
        wrong: Any = draw.choice(
            ({}, [], {"messages": 5}, {"messages": [], "n": -1}, {"model": "x" * 200}, None)
        )
        assert http.post("/v1/chat/completions", json=wrong).status_code == 400
        assert http.post("/v1/completions", content=b"x" * (3 << 20)).status_code == 413

    def hang(self, http: httpx.Client, draw: random.Random) -> None:
        body = {
            "messages": [{"role": "user", "content": "Tell me about the Moon"}],
            "plugins": ["search"],
            "max_tokens": 20,
        }
        assert http.post("/v1/chat/completions", json=body).status_code == 200

    def page(self, http: httpx.Client, draw: random.Random) -> None:
        """A conversation that the server keeps: a turn whose stream may be lost, another answer to it, and no more of it."""
        path = f"/api/conversations/{http.post('/api/conversations', json={}).json()['id']}"
        events: list[dict[str, Any]] = []
        most = draw.randrange(1, 60)
        with http.stream("POST", f"{path}/turns", json={"message": SUM}) as answer:
            for line in answer.iter_lines():
                events += data_of(line)
                if len(events) >= most:
                    break
        seen = max((event["n"] for event in events if "n" in event), default=-1)
        events += data_of(http.get(f"{path}/answer", params={"from": seen + 1}).text)
        assert "".join(event["text"] for event in events if event["type"] == "text") == ANSWER
        assert events[-1]["type"] == "end" and events[-1]["kept"]
        if draw.random() < 0.5:
            assert "event: end" in http.post(f"{path}/retry").text
        assert len(http.get(path).json()["turns"]) == 1
        if draw.random() < 0.7:
            assert http.delete(path).status_code == 204

    def uid(self, http: httpx.Client, draw: random.Random) -> None:
        first = http.post("/", json={"prompt": "Hello", "max_length": 400}).json()
        second = http.post("/", json={"prompt": "你好", "uid": first["uid"], "max_length": 400}).json()
        assert second["uid"] == first["uid"]
        assert second["history"] == [*first["history"], ["你好", second["response"]]]

    def vortex(self, http: httpx.Client, draw: random.Random) -> None:
        written = http.post(
            "/inference", json={"x": SPOKEN, "temperature": 0.01, "Calculator": True, "max_iterations": 64}
        ).json()
        assert written["new_generations"].endswith('Calculate("37*48")<eoc>')

    def asked(self, http: httpx.Client, draw: random.Random) -> None:
        """What costs the model nothing."""
        for path in (
            "/health",
            "/v1/models",
            "/metrics",
            "/slots",
            "/props",
            "/api/server",
            "/api/conversations",
            "/",
        ):
            assert http.get(path).status_code == 200, path
        tokens = http.post("/tokenize", json={"content": "你好 world"}).json()
        assert http.post("/detokenize", json=tokens).json() == {"content": "你好 world"}


@dataclass(frozen=True)
class Held:
    """What the process holds while nobody asks for anything."""

    mib: float
    files: int
    threads: int


def held(server: Server, moss: Moss) -> Held:
    assert wait_until(lambda: server.service.answers.running == 0, PATIENCE_S)
    assert wait_until(lambda: moss.engine.plan() is None and not moss.engine.waiting, PATIENCE_S)
    assert wait_until(lambda: not any(t.name.startswith("plugin") for t in threading.enumerate()), PATIENCE_S)
    time.sleep(4 * LOOK_S)  # the server closes the connections of clients that are gone
    gc.collect()
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    mib = pages * os.sysconf("SC_PAGE_SIZE") / (1 << 20)
    return Held(mib, len(os.listdir("/proc/self/fd")), threading.active_count())


def soak(folder: Path, seconds: float, rounds: int, of_a_core: float) -> tuple[Load, list[Held]]:
    """The load, and what was held after each round of it."""
    options: dict[str, Any] = {
        "plugins": [*make_plugins(["calculator", "solver"]), Hanging()],
        "limits": Limits(
            conversations=50, live=8, kept_answers=16, body_s=PATIENCE_S, slow_reader_s=PATIENCE_S
        ),
    }
    with (
        Moss.load(tiny_model_folder(), memory="2GiB", context=768, parallel=4) as moss,
        served(moss, folder, **options) as server,
        httpx.Client(base_url=url(server), timeout=PATIENCE_S) as http,
    ):
        alone = [http.post("/v1/chat/completions", json=body).json() for body in bodies()]
        load = Load(server, {number: contents(answer) for number, answer in enumerate(alone)}, of_a_core)
        series = []
        for number in range(rounds):
            load.run(seconds / rounds, number)
            assert not load.faults, load.faults[:5]
            series.append(held(server, moss))
            print(f"{number + 1} of {rounds}: {series[-1]}, {dict(load.counts)}", flush=True)
        assert http.get("/health").status_code == 200
        assert 'outcome="failed"' not in http.get("/metrics").text
        for kind in ("page", "uid"):
            assert len(list((folder / kind).glob("*.jsonl"))) <= 50 + 8
        assert not [*folder.rglob(".*")], "nothing half written is left"
    return load, series


def test_a_short_mixed_load_changes_nothing(tmp_path: Path) -> None:
    load, _ = soak(tmp_path, 3.0, 1, float("inf"))
    assert sum(load.counts.values()) > CLIENTS


@pytest.mark.long
def test_a_long_mixed_load_changes_nothing(tmp_path: Path) -> None:
    rounds = 12
    load, series = soak(tmp_path, SOAK_S, rounds, SOAK_CPU)
    assert {kind.__name__ for kind in load.kinds} <= {*load.counts}
    # What grows with the first of everything has grown in the first third.
    before, after = series[: rounds // 3], series[-1]
    assert after.mib < max(one.mib for one in before) + 16, series
    assert after.files <= max(one.files for one in before), series
    assert after.threads <= max(one.threads for one in before), series
