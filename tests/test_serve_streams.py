"""Answers that are left, taken up again, asked for at once, or cut off: what happens to them, and to the others."""

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from moss_jt import Moss
from moss_jt.serve import answering
from moss_jt.serve.errors import ApiError
from moss_jt.serve.server import Server
from moss_jt.serve.settings import Limits
from tests.support.models import tiny_model_folder
from tests.support.serving import client, served, shared_moss, shared_server, slowed, wait_until

# Many tokens of an answer that would go on: one that is none of the ends is all but certain.
LONG: dict[str, Any] = {"prompt": "a", "max_tokens": 900, "logit_bias": {"300": 100}, "temperature": 0}
HEAD = "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: {}\r\n\r\n"
CHAT: dict[str, Any] = {"messages": [{"role": "user", "content": "Hello"}], "plugins": []}


@pytest.fixture
def http() -> Iterator[httpx.Client]:
    with client(shared_server()) as one:
        yield one


def idle(server: Server, moss: Moss) -> bool:
    return server.service.answers.running == 0 and moss.engine.plan() is None


@pytest.mark.parametrize("stream", [True, False])
def test_who_leaves_ends_the_answer(stream: bool) -> None:
    server, moss = shared_server(), shared_moss()
    with slowed(moss, 0.02) as passes:
        body = json.dumps({**LONG, "stream": stream}).encode()
        connection = socket.create_connection(("127.0.0.1", server.ports[0]), timeout=20)
        head = HEAD.format(len(body))
        connection.sendall(head.encode() + body)
        assert wait_until(lambda: len(passes) > 5)
        connection.close()
        assert wait_until(lambda: server.service.answers.running == 0, 5)
        count = len(passes)
        time.sleep(0.2)
        assert len(passes) == count < 100, "nothing more is computed"


def test_who_leaves_the_queue_is_gone_and_the_place_in_it_is_told(tmp_path: Path) -> None:
    with Moss.load(tiny_model_folder(), memory="2GiB", context=512, parallel=1) as moss:
        with served(moss, tmp_path) as server, client(server) as http, slowed(moss, 0.03):
            asked = {**LONG, "prompt": [5] * 440, "max_tokens": 70, "stream": True}
            events: list[Any] = []
            with http.stream("POST", "/v1/completions", json=asked) as first:
                lines = first.iter_lines()
                next(lines)
                other = {**asked, "prompt": [6] * 440, "return_progress": True}
                with http.stream("POST", "/v1/completions", json=other) as waiting:
                    for line in waiting.iter_lines():
                        events += [json.loads(line[6:])] if line.startswith("data: {") else []
                        if events and "moss" in events[-1]:
                            break
                assert events[-1]["moss"]["type"] == "queue" and events[-1]["moss"]["place"] == 1
                # The one that waited is gone, and the other comes to its end.
                assert [line for line in lines if line][-1] == "data: [DONE]"
            assert wait_until(lambda: idle(server, moss))


def test_twenty_at_once_say_what_they_say_one_by_one(http: httpx.Client) -> None:
    server = shared_server()
    questions = ["Hello", "你好", "What is 37 times 48?", "Calculate 3+4", "你是谁？"]
    asked = [
        {
            "messages": [{"role": "user", "content": questions[number % 5]}],
            "seed": number,
            "temperature": 1.2,
            "top_p": 1.0,
            "max_tokens": 30,
            "plugins": ["calculator"] if number % 3 == 0 else [],
        }
        for number in range(20)
    ]

    def ask(body: dict[str, Any], one: httpx.Client) -> Any:
        answer = one.post("/v1/chat/completions", json=body)
        assert answer.status_code == 200
        return [choice["message"] for choice in answer.json()["choices"]]

    alone = [ask(body, http) for body in asked]
    together: list[Any] = [None] * 20

    def run(number: int) -> None:
        with client(server) as one:
            together[number] = ask(asked[number], one)

    threads = [threading.Thread(target=run, args=(number,)) for number in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert together == alone


def test_a_stream_is_taken_up_by_its_name(http: httpx.Client) -> None:
    body = {**CHAT, "stream": True, "stream_options": {"include_usage": True}}
    complete = http.post("/v1/chat/completions", json=body, headers={"X-Conversation-Id": "first"}).text
    events = [event for event in complete.split("\n\n") if event]
    assert events[-1] == "data: [DONE]"
    for start in (0, 1, 5, len(events) - 1, len(events), 1000):
        rest = http.get("/v1/stream", params={"conv_id": "first", "from": start}).text
        assert [event for event in rest.split("\n\n") if event] == events[start:]
    assert http.delete("/v1/stream", params={"conv_id": "first"}).status_code == 204
    assert http.get("/v1/stream", params={"conv_id": "first"}).status_code == 404
    assert http.get("/v1/stream").status_code == 400
    bad = http.post("/v1/chat/completions", json=body, headers={"X-Conversation-Id": "a/b"})
    assert bad.status_code == 400


def test_an_answer_with_a_name_survives_its_connection(http: httpx.Client) -> None:
    moss = shared_moss()
    name = {"X-Conversation-Id": "lost"}
    expected = http.post("/v1/completions", json={**LONG, "max_tokens": 40}).json()["choices"][0]["text"]
    with slowed(moss, 0.01):
        with http.stream(
            "POST", "/v1/completions", json={**LONG, "max_tokens": 40, "stream": True}, headers=name
        ) as answer:
            lines = answer.iter_lines()
            received = [next(lines) for _ in range(6)]
        again = http.post("/v1/completions", json={**LONG, "stream": True}, headers=name)
        assert again.status_code == 409, "one of that name is being written"
        count = sum(line.startswith("data: ") for line in received)
        rest = http.get("/v1/stream", params={"conv_id": "lost", "from": count}).text.splitlines()
    data = [json.loads(line[6:]) for line in [*received, *rest] if line.startswith("data: {")]
    assert "".join(chunk["choices"][0]["text"] for chunk in data) == expected
    with slowed(moss, 0.02) as passes:
        with http.stream("POST", "/v1/completions", json={**LONG, "stream": True}, headers=name) as answer:
            next(answer.iter_lines())
        assert http.delete("/v1/stream", params={"conv_id": "lost"}).status_code == 204
        assert wait_until(lambda: shared_server().service.answers.running == 0, 5)
        assert len(passes) < 200


ASKED: dict[str, tuple[str, dict[str, Any]]] = {
    "completion": ("/v1/completions", {**LONG, "n": 3}),
    "echo": ("/v1/completions", {**LONG, "prompt": "a " * 300, "n": 3, "echo": True, "logprobs": 1}),
    "chat": ("/v1/chat/completions", {**CHAT, "n": 3, "max_tokens": 900, "logit_bias": {"300": 100}}),
    "turn": ("/v1/chat/completions", {**CHAT, "n": 3, "plugins": ["calculator"], "logit_bias": {"300": 100}}),
}


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("kind", ASKED)
@pytest.mark.parametrize("cause", ["stopping", "model_failed"])
def test_an_answer_that_is_broken_off_has_an_error_and_no_reason(
    tmp_path: Path, cause: str, kind: str, stream: bool
) -> None:
    """It once ended like one that was as long as allowed, with "length", before the error came."""
    moss, (path, body) = shared_moss(), ASKED[kind]
    answered: list[httpx.Response] = []
    with served(moss, tmp_path) as server, client(server) as http, slowed(moss, 0.02) as passes:
        slow = moss.model.forward_many

        def broken(runs: Any, *more: Any) -> Any:
            if len(passes) > 2 and cause == "model_failed":
                raise RuntimeError("a pass that fails")
            return slow(runs, *more)

        moss.model.forward_many = broken  # type: ignore[method-assign]
        asked = threading.Thread(
            target=lambda: answered.append(http.post(path, json={**body, "stream": stream}))
        )
        asked.start()
        assert wait_until(lambda: len(passes) > 2)
        if cause == "stopping":
            assert server._loop is not None
            server._loop.call_soon_threadsafe(server.service.answers.stop)
        asked.join(20)
        assert wait_until(lambda: 'outcome="failed"' in server.service.metrics.text().decode())
        assert 'outcome="done"' not in server.service.metrics.text().decode()
    if not stream:
        assert answered[0].status_code in (500, 503) and answered[0].json()["error"]["code"] == cause
        return
    *chunks, failure = [
        json.loads(line[6:]) for line in answered[0].text.splitlines() if line.startswith("data: {")
    ]
    assert failure["error"]["code"] == cause
    assert {choice["finish_reason"] for chunk in chunks for choice in chunk["choices"]} == {None}


def test_an_answer_that_was_ended_by_its_name_says_so(http: httpx.Client) -> None:
    with slowed(shared_moss(), 0.02), client(shared_server()) as other:
        with http.stream(
            "POST", "/v1/completions", json={**LONG, "stream": True}, headers={"X-Conversation-Id": "ended"}
        ) as answer:
            lines = answer.iter_lines()
            next(lines)
            assert other.delete("/v1/stream", params={"conv_id": "ended"}).status_code == 204
            data = [line for line in lines if line]
    assert json.loads(data[-2][6:])["error"]["code"] == "cancelled" and data[-1] == "data: [DONE]"
    assert not any('"finish_reason":"' in line for line in data)


def test_who_reads_nothing_holds_up_nobody(tmp_path: Path) -> None:
    moss = shared_moss()
    with served(moss, tmp_path, limits=Limits(slow_reader_s=0.3)) as server, client(server) as http:
        body = json.dumps({**LONG, "n": 100, "max_tokens": 300, "logprobs": 5, "stream": True}).encode()
        with socket.socket() as lazy:
            lazy.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            lazy.connect(("127.0.0.1", server.ports[0]))
            head = HEAD.format(len(body))
            lazy.sendall(head.encode() + body)
            assert wait_until(lambda: server.service.answers.running == 1)
            assert http.post("/v1/chat/completions", json=CHAT).status_code == 200
            assert wait_until(lambda: server.service.answers.running == 0, 60), "it is given up"


def test_a_long_silence_is_broken_by_comments(tmp_path: Path) -> None:
    moss = shared_moss()
    with (
        served(moss, tmp_path, limits=Limits(ping_s=1.0)) as server,
        client(server) as http,
        slowed(moss, 2.5),
    ):
        begin = time.monotonic()
        with http.stream(
            "POST", "/v1/chat/completions", json={**CHAT, "stream": True, "max_tokens": 1}
        ) as answer:
            lines = answer.iter_lines()
            first = next(lines)
            assert time.monotonic() - begin < 1.0, "the first byte comes at once"
            rest = [*lines]
        assert json.loads(first[6:])["choices"][0]["delta"]["role"] == "assistant"
        assert ": still here" in rest and rest[-2] == "data: [DONE]"


def test_kept_answers_and_threads_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    async def play() -> None:
        monkeypatch.setattr(answering, "MOST_PARTS", 4)
        monkeypatch.setattr(answering, "MOST_EVENTS", 25)
        gate = threading.Event()
        answers = answering.Answers(most=10, kept=3, kept_s=600)
        waiting = answers.start([lambda one: bool(gate.wait(20)) and None] * 3)
        with pytest.raises(ApiError, match="busy with 1 answers") as refused:
            answers.start([lambda one: None] * 2)
        assert refused.value.status == 429
        gate.set()
        assert [part async for part in waiting.follow(5)] == [] and await answers.ended(5)
        for number in range(6):
            one = answers.start([lambda one: [one.put(event) for event in range(10)] and None], str(number))
            assert sum([len(part) async for part in one.follow(5)]) == 10
        assert [answers.find(str(number)) is not None for number in range(6)] == [False] * 3 + [True] * 3

    asyncio.run(play())


def test_a_pass_of_many_answers_wakes_the_loop_once_and_needs_no_threads(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Every answer's thread woke up for each of its tokens, and the loop for each of them: half of a small model's time."""
    wakes: list[int] = []
    answer = answering.Bell._answer

    def count(bell: answering.Bell) -> None:
        wakes.append(sum(thread.name == "moss-jt answer" for thread in threading.enumerate()))
        answer(bell)

    monkeypatch.setattr(answering.Bell, "_answer", count)
    server, moss = shared_server(), shared_moss()
    asked = {**LONG, "prompt": "once and no threads", "max_tokens": 60, "n": 12, "stream": True}
    with slowed(moss, 0.01) as passes, client(server) as http:
        answered = http.post("/v1/completions", json=asked)
    events = [json.loads(line[6:]) for line in answered.text.splitlines() if line.startswith("data: {")]
    assert sum(len(event["choices"]) for event in events) >= 12 * 60, "an event for each token"
    assert len(passes) >= 60 and len(wakes) < 2 * len(passes) + 30
    assert wakes[-20:] == [0] * 20


def test_a_bell_that_is_rung_at_any_moment_is_answered() -> None:
    async def play() -> None:
        bell, heard, all_heard = answering.Bell(asyncio.get_running_loop()), [], asyncio.Event()

        def hear() -> None:
            heard.append(1)
            if len(heard) == 4000:
                all_heard.set()

        def ring() -> None:
            for _ in range(1000):
                bell.ring(hear)

        for _ in range(4):
            threading.Thread(target=ring).start()
        async with asyncio.timeout(20):
            await all_heard.wait()

    asyncio.run(play())


# The reference's interface, and MOSS Vortex's.


def test_the_reference_s_clients_are_answered(http: httpx.Client) -> None:
    first = http.post("/", json={"prompt": "你好", "temperature": 0.01}).json()
    assert set(first) == {"response", "history", "status", "time", "uid"} and first["status"] == 200
    assert first["response"].startswith("\n<|MOSS|>: 您好") and first["history"] == [
        ["你好", first["response"]]
    ]
    time.strptime(first["time"], "%Y-%m-%d %H:%M:%S")
    second = http.post("/", json={"prompt": "Hello", "uid": first["uid"], "temperature": 0.01}).json()
    assert second["uid"] == first["uid"]
    assert second["history"] == [*first["history"], ["Hello", second["response"]]]
    other = http.post("/", json={"prompt": "Hello", "uid": "nobody knows this one"}).json()
    assert other["uid"] not in (first["uid"], "nobody knows this one") and len(other["history"]) == 1
    assert http.post("/", json={"uid": "x"}).status_code == 400
    page = http.get("/api/conversations").json()["conversations"]
    assert first["uid"] not in [one["id"] for one in page], "nobody else finds it"
    assert http.get(f"/api/conversations/{first['uid']}").status_code == 404


def test_a_uid_outlives_the_server_and_asks_once_at_a_time(tmp_path: Path) -> None:
    moss = shared_moss()
    with served(moss, tmp_path) as server, client(server) as http:
        uid = http.post("/", json={"prompt": "你好", "temperature": 0.01}).json()["uid"]
    with served(moss, tmp_path) as server, client(server) as http:
        again = http.post("/", json={"prompt": "Hello", "uid": uid, "temperature": 0.01}).json()
        assert again["uid"] == uid and [pair[0] for pair in again["history"]] == ["你好", "Hello"]
        answers: list[int] = []

        def ask() -> None:
            with client(server) as one:
                answers.append(one.post("/", json={"prompt": "Hello", "uid": uid}).status_code)

        with slowed(moss, 0.02):
            threads = [threading.Thread(target=ask) for _ in range(3)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join(60)
        assert sorted(answers) == [200, 409, 409]


FIRST_PHASE = "<|Human|>: What is 37 times 48?<eoh>\n<|Inner Thoughts|>:"


def test_vortex_s_clients_are_answered_and_nothing_stays_of_what_they_set(http: httpx.Client) -> None:
    body = {
        "x": FIRST_PHASE,
        "temperature": 0.01,
        "max_iterations": 512.0,
        "Calculator": True,
        "session_id": 5,
    }
    first = http.post("/inference", json=body).json()
    assert set(first) == {"pred", "input_token_num", "new_generations_token_num", "new_generations"}
    written = ' This is arithmetic, so I need the calculator.<eot>\n<|Commands|>: Calculate("37*48")<eoc>'
    assert first["new_generations"] == written and first["pred"] == FIRST_PHASE + written
    second = FIRST_PHASE + written + "\n<|Results|>:\nCalculate(\"37*48\") => '1776'\n<eor>\n<|MOSS|>:"
    answer = http.post("/inference", json={**body, "x": second}).json()
    assert answer["new_generations"] == " 37 times 48 equals 1776<sup><|1|></sup>.<eom>"
    off = http.post("/inference", json={"x": "a", "max_iterations": 3}).json()
    assert off["new_generations_token_num"] == 3
    assert (
        off["input_token_num"]
        == http.post("/inference", json={"x": "a", "max_iterations": 1}).json()["input_token_num"]
    )
    long = "<|Human|>: old<eoh>\n" * 200 + "<|Human|>: new<eoh>\n<|MOSS|>:"
    cut = http.post("/inference", json={"x": long, "max_iterations": 2}).json()
    assert cut["pred"].startswith("<|Human|>: old") and len(cut["pred"]) < len(long)
    assert http.post("/inference", json={"x": "word " * 3000}).status_code == 400


def test_vortex_streams_to_its_client_and_to_nobody_else(http: httpx.Client) -> None:
    from websockets.sync.server import ServerConnection, serve

    frames: list[Any] = []

    def listen(connection: ServerConnection) -> None:
        frames.extend(json.loads(message) for message in connection)

    with serve(listen, "127.0.0.1", 0) as listener:
        thread = threading.Thread(target=listener.serve_forever)
        thread.start()
        port = listener.socket.getsockname()[1]
        body = {
            "x": FIRST_PHASE,
            "temperature": 0.01,
            "Calculator": True,
            "url": f"ws://127.0.0.1:{port}/ws?uuid=1",
        }
        answer = http.post("/inference", json=body).json()
        assert wait_until(lambda: bool(frames) and frames[-1]["status"] == 0)
        whole = [*frames]
        with slowed(shared_moss(), 0.02) as passes:
            left = json.dumps(body).encode()
            with socket.create_connection(("127.0.0.1", shared_server().ports[0]), timeout=20) as connection:
                connection.sendall(
                    HEAD.replace("v1/completions", "inference").format(len(left)).encode() + left
                )
                assert wait_until(lambda: len(passes) > 2)
            assert wait_until(lambda: frames[-1]["status"] == -1), "it is not taken for a whole answer"
        listener.shutdown()
        thread.join()
    assert [frame["status"] for frame in whole] == [1] * (len(whole) - 1) + [0]
    assert whole[-2] == {"status": 1, "offset": 0, "output": answer["new_generations"]}
    for address in (
        "ws://192.0.2.1/x",
        "http://127.0.0.1/x",
        "ws://",
        "ws://user@127.0.0.1/",
        "ws://[::1",
        "file:///etc/passwd",
    ):
        refused = http.post("/inference", json={**body, "url": address})
        assert refused.status_code == 400 and refused.json()["error"]["param"] == "url"
    nobody = http.post("/inference", json={**body, "url": "ws://127.0.0.1:9/x"})
    assert nobody.json()["new_generations"] == answer["new_generations"], "who does not listen misses it"


# The program.


def start(home: Path, *options: str) -> tuple[subprocess.Popen[str], str]:
    """moss-jt serve moss-tiny in a process of its own, once it answers."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [
        sys.executable,
        "-P",
        "-m",
        "moss_jt",
        "serve",
        str(tiny_model_folder()),
        "--port",
        str(port),
        "--memory",
        "2GiB",
    ]
    environment = {**os.environ, "MOSS_JT_HOME": str(home)}
    process = subprocess.Popen([*command, *options], env=environment, stderr=subprocess.PIPE, text=True)
    address = f"http://127.0.0.1:{port}"

    def ready() -> bool:
        assert process.poll() is None, process.stderr.read() if process.stderr else ""
        try:
            return httpx.get(f"{address}/health", timeout=5).status_code == 200
        except httpx.TransportError:
            return False

    assert wait_until(ready, 120)
    return process, address


def test_the_program_ends_cleanly_and_goes_on_after_a_kill(tmp_path: Path) -> None:
    process, address = start(tmp_path, "--greedy")
    try:
        with httpx.Client(base_url=address, timeout=60) as http:
            name = http.post("/api/conversations", json={}).json()["id"]
            http.post(f"/api/conversations/{name}/turns", json={"message": "What is 37 times 48?"})
            with http.stream("POST", "/v1/completions", json={**LONG, "n": 50, "stream": True}) as answer:
                lines = answer.iter_lines()
                next(lines)
                process.kill()
                with pytest.raises(httpx.TransportError):
                    list(lines)
        process.wait(20)
        process, address = start(tmp_path, "--greedy")
        with httpx.Client(base_url=address, timeout=60) as http:
            turns = http.get(f"/api/conversations/{name}").json()["turns"]
            assert [turn["events"][-1]["text"] for turn in turns] == ["37 times 48 equals 1776[1]."]
            with http.stream("POST", "/v1/completions", json={**LONG, "n": 50, "stream": True}) as answer:
                lines = answer.iter_lines()
                next(lines)
                process.send_signal(signal.SIGTERM)
                rest = [line for line in lines if line]
            assert rest[-1] == "data: [DONE]" and json.loads(rest[-2][6:])["error"]["code"] == "stopping"
        assert process.wait(20) == 0
        assert process.stderr is not None
        said = process.stderr.read()
        assert "moss-tiny is ready." in said and "Traceback" not in said
    finally:
        process.kill()
        process.wait()
