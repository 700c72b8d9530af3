"""Who may ask a server, how much, and what they are told: keys, sites, sizes, numbers, faults."""

import json
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from moss_jt.errors import MossError
from moss_jt.serve.server import Server, listening
from moss_jt.serve.settings import Limits
from tests.support.serving import WaitingPlugin, client, served, shared_moss, shared_server

BODY = {"messages": [{"role": "user", "content": "Hello"}], "plugins": [], "max_tokens": 4}
KEYS = ["first-key", "second-key"]


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    options: dict[str, Any] = {"keys": KEYS, "origins": ["https://friend.example"]}
    with served(shared_moss(), tmp_path_factory.mktemp("guarded"), **options) as server:
        yield server


@pytest.mark.parametrize(
    "path", ["/health", "/v1/health", "/v1/models", "/v1/models/moss-tiny", "/openapi.json"]
)
def test_what_is_open_needs_no_key(guarded: Server, path: str) -> None:
    assert client(guarded).get(path).status_code == 200


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"Authorization": "Bearer wrong"},
        {"Authorization": "first-key"},
        {"Authorization": "Basic first-key"},
        {"X-Api-Key": ""},
        {"X-Api-Key": "first-ke"},
        {"Authorization": "Bearer"},
    ],
)
@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("POST", "/v1/chat/completions"), ("POST", "/v1/completions"), ("GET", "/metrics"), ("GET", "/props"),
        ("GET", "/slots"), ("POST", "/tokenize"), ("GET", "/api/conversations"), ("POST", "/api/conversations"), ("POST", "/"),
        ("POST", "/inference"), ("GET", "/v1/stream?conv_id=a"), ("GET", "/api/server"), ("GET", "/nothing"),
    ],
)  # fmt: skip
def test_everything_else_needs_one(guarded: Server, headers: dict[str, str], method: str, path: str) -> None:
    answer = client(guarded).request(method, path, headers=headers)
    assert answer.status_code == 401
    assert answer.json()["error"]["type"] == "authentication_error"
    assert not any(key in answer.text for key in KEYS)


@pytest.mark.parametrize("key", KEYS)
@pytest.mark.parametrize("header", ["Authorization", "X-Api-Key", "apikey"])
def test_each_key_opens(guarded: Server, key: str, header: str) -> None:
    value = f"Bearer {key}" if header == "Authorization" else key
    assert client(guarded).post("/v1/chat/completions", json=BODY, headers={header: value}).status_code == 200


def test_pages_of_other_sites_may_not_ask(guarded: Server) -> None:
    with client(guarded, headers={"X-Api-Key": KEYS[0]}) as http:
        own = f"http://127.0.0.1:{guarded.ports[0]}"
        for origin, status in (
            (own, 200),
            ("https://friend.example", 200),
            ("https://evil.example", 403),
            ("null", 403),
        ):
            answer = http.post("/tokenize", json={"content": "a"}, headers={"Origin": origin})
            assert answer.status_code == status
            shared = answer.headers.get("access-control-allow-origin")
            assert shared == ("https://friend.example" if origin == "https://friend.example" else None)
        asking = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "x-api-key"}
        before = http.options("/v1/chat/completions", headers={"Origin": "https://friend.example", **asking})
        assert before.status_code == 200 and "POST" in before.headers["access-control-allow-methods"]
        assert (
            http.options(
                "/v1/chat/completions", headers={"Origin": "https://evil.example", **asking}
            ).status_code
            == 400
        )
    plain = client(shared_server())
    answer = plain.post("/tokenize", json={"content": "a"}, headers={"Origin": own})
    assert answer.status_code == 403, "another server on this machine is another site"
    assert not [name for name in plain.get("/health").headers if name.startswith("access-control")]


@pytest.mark.parametrize("host", ["evil.example", "127.0.0.1.evil.example", "", "[::1", "169.254.169.254"])
def test_names_that_lead_here_by_a_trick_are_refused(host: str) -> None:
    answer = client(shared_server()).get("/health", headers={"Host": host})
    assert answer.status_code in (400, 403)
    for good in ("localhost", "127.0.0.1:1", "[::1]:80", "LOCALHOST"):
        assert client(shared_server()).get("/health", headers={"Host": good}).status_code == 200


def test_large_bodies_are_refused_however_they_come(tmp_path: Path) -> None:
    with served(shared_moss(), tmp_path, limits=Limits(body_bytes=1000)) as server, client(server) as http:
        for content in (b"x" * 2000, (b"x" * 100 for _ in range(20))):
            answer = http.post("/v1/chat/completions", content=content)
            assert answer.status_code == 413 and answer.json()["error"]["code"] == "request_too_large"
        assert http.post("/v1/chat/completions", json=BODY).status_code == 200
        assert http.post("/v1/completions", json={"prompt": "[" * 900}).status_code == 200
    deep = client(shared_server()).post("/v1/chat/completions", content=b"[" * 100_000)
    assert deep.status_code == 400


def raw(server: Server) -> socket.socket:
    return socket.create_connection(("127.0.0.1", server.ports[0]), timeout=20)


def test_a_request_must_arrive_in_time(tmp_path: Path) -> None:
    with served(shared_moss(), tmp_path, limits=Limits(body_s=0.3)) as server:
        with raw(server) as connection:
            connection.sendall(b"POST /tokenize HTTP/1.1\r\nHost: localhost\r\nContent-Length: 50\r\n\r\n{")
            assert connection.recv(100).startswith(b"HTTP/1.1 408 ")
        with raw(server) as connection:  # a head that never ends
            connection.sendall(b"GET /health HTTP/1.1\r\nHost: local")
            begin = time.monotonic()
            assert connection.recv(100) == b"" and time.monotonic() - begin < 15
        assert client(server).get("/health").status_code == 200


@pytest.mark.parametrize(
    "data",
    [
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(100),
        b"GET / HTTP/9.9\r\n\r\n",
        b"POST /tokenize HTTP/1.1\r\nHost: localhost\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\n{}",
        b"POST /tokenize HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\nContent-Length: 5\r\n\r\n0\r\n\r\n",
        b"GET /" + b"a" * 100_000 + b" HTTP/1.1\r\n\r\n",
        b"\x00" * 1000,
    ],
)
def test_what_is_no_http_ends_its_own_connection_alone(data: bytes) -> None:
    server = shared_server()
    with raw(server) as connection:
        connection.sendall(data)
        connection.shutdown(socket.SHUT_WR)
        answer = connection.recv(1000)
        assert answer == b"" or answer.startswith(b"HTTP/1.1 4")
    assert client(server).get("/health").status_code == 200


def test_too_many_answers_are_refused_with_a_time_to_come_again(tmp_path: Path) -> None:
    plugin = WaitingPlugin()
    options: dict[str, Any] = {"plugins": [plugin], "limits": Limits(answers=1)}
    sums = {
        "messages": [{"role": "user", "content": "What is 37 times 48?"}],
        "plugins": ["waiting"],
        "stream": True,
    }
    with served(shared_moss(), tmp_path, **options) as server, client(server) as http:
        with http.stream("POST", "/v1/chat/completions", json=sums) as stream:
            assert plugin.asked.wait(20)
            refused = http.post("/v1/chat/completions", json=BODY)
            assert refused.status_code == 429 and 1 <= int(refused.headers["retry-after"]) <= 120
            assert refused.json()["error"]["type"] == "rate_limit_error"
            assert http.get("/health").status_code == 200
            plugin.gate.set()
            assert "1776" in "".join(stream.iter_text())
        assert http.post("/v1/chat/completions", json=BODY).status_code == 200


def test_while_the_model_is_loaded_that_is_said(tmp_path: Path) -> None:
    with served(None, tmp_path) as server, client(server) as http:
        asked = [
            http.get("/health"),
            http.post("/v1/chat/completions", json=BODY),
            http.post("/v1/completions", json={"prompt": "a"}),
            http.post("/tokenize", json={"content": "a"}),
            http.post("/", json={"prompt": "a"}),
            http.post("/inference", json={"x": "a"}),
            http.get("/v1/stream?conv_id=a"),
        ]
        for answer in asked:
            assert answer.status_code == 503 and int(answer.headers["retry-after"]) > 0
            assert answer.json()["error"]["message"] == "Loading model"
        assert http.get("/v1/models").status_code == 200 and http.get("/metrics").status_code == 200


def test_a_model_that_fails_is_told_without_its_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    moss = shared_moss()
    with served(moss, tmp_path) as server, client(server) as http:
        name = http.post("/api/conversations", json={}).json()["id"]

        def fail(*arguments: Any) -> list[np.ndarray]:
            raise MossError("/home/somebody/secret.safetensors cannot be read")

        with monkeypatch.context() as patched:
            patched.setattr(moss.model, "forward_many", fail)
            answers = [
                http.post("/v1/chat/completions", json=BODY),
                http.post("/v1/completions", json={"prompt": "a"}),
                http.post("/", json={"prompt": "a"}),
                http.post("/inference", json={"x": "a"}),
            ]
            streams = [
                http.post("/v1/chat/completions", json={**BODY, "stream": True}),
                http.post(f"/api/conversations/{name}/turns", json={"message": "a"}),
            ]
        for answer in answers:
            assert answer.status_code == 500 and answer.json()["error"]["code"] == "model_failed"
        for answer in streams:
            assert answer.status_code == 200 and '"code":"model_failed"' in answer.text
        assert streams[0].text.endswith("data: [DONE]\n\n") and "event: error" in streams[1].text
        assert not [one for one in [*answers, *streams] if "secret" in one.text or "Traceback" in one.text]
        assert http.post("/v1/chat/completions", json=BODY).status_code == 200, "the next one is answered"
        assert http.get(f"/api/conversations/{name}").json()["turns"] == []


def test_a_full_disk_is_told_and_the_conversation_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from moss_jt.chat import saved

    def full(*arguments: Any) -> int:
        raise OSError(28, "No space left on device", "/home/somebody/secret")

    with served(shared_moss(), tmp_path) as server, client(server) as http:
        name = http.post("/api/conversations", json={}).json()["id"]
        with monkeypatch.context() as patched:
            patched.setattr(saved.os, "pwrite", full)
            told = http.post(f"/api/conversations/{name}/turns", json={"message": "Hello"})
            refused = http.post("/api/conversations", json={})
        events = [json.loads(line[6:]) for line in told.text.splitlines() if line.startswith("data: ")]
        assert {"type": "notice", "code": "not_kept"}.items() <= events[-3].items() and events[-1][
            "type"
        ] == "end"
        assert refused.status_code == 507 and "secret" not in refused.text + told.text
        assert http.post(f"/api/conversations/{name}/turns", json={"message": "你好"}).status_code == 200
    with served(shared_moss(), tmp_path) as server, client(server) as http:
        turns = http.get(f"/api/conversations/{name}").json()["turns"]
        assert [turn["message"] for turn in turns] == ["Hello", "你好"], "kept once there was space again"


def test_a_port_that_is_taken_is_said(tmp_path: Path) -> None:
    with pytest.raises(MossError, match="cannot listen at 127.0.0.1, port"):
        listening("127.0.0.1", shared_server().ports[0])
    with pytest.raises(MossError, match="Give another --host"):
        listening("203.0.113.7", 0)


def test_several_ports_answer_alike(tmp_path: Path) -> None:
    with served(shared_moss(), tmp_path, ports=[0, 0]) as server:
        for port in server.ports:
            assert httpx.get(f"http://127.0.0.1:{port}/health").status_code == 200
