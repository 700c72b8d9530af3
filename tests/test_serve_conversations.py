"""Conversations that the server keeps, as the page asks for them."""

import contextlib
import itertools
import json
import os
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from moss_jt.chat.chat import Chat
from moss_jt.plugins.registry import PluginSettings, make_plugins
from moss_jt.serve.server import Server
from moss_jt.serve.settings import Limits
from tests.support.serving import WaitingPlugin, client, served, shared_moss, shared_server

SUM = "What is 37 times 48?"
ANSWER = "37 times 48 equals 1776[1]."


@pytest.fixture(scope="module")
def server() -> Server:
    return shared_server()


@pytest.fixture
def http(server: Server) -> Iterator[httpx.Client]:
    with client(server) as found:
        yield found


def begin(http: httpx.Client, **members: Any) -> str:
    answer = http.post("/api/conversations", json=members)
    assert answer.status_code == 201, answer.text
    return str(answer.json()["id"])


def events_of(answer: httpx.Response) -> list[dict[str, Any]]:
    assert answer.status_code == 200, answer.text
    assert answer.headers["content-type"].startswith("text/event-stream")
    found = []
    for text in answer.text.removesuffix("\n\n").split("\n\n"):
        if not text.startswith(":"):
            name, data = text.split("\n")
            fields = json.loads(data.removeprefix("data: "))
            assert name == f"event: {fields['type']}"
            found.append(fields)
    return found


def say(http: httpx.Client, name: str, message: str) -> list[dict[str, Any]]:
    return events_of(http.post(f"/api/conversations/{name}/turns", json={"message": message}))


def text_of(events: list[dict[str, Any]], kind: str = "text") -> str:
    return "".join(event["text"] for event in events if event["type"] == kind)


def test_a_turn_tells_what_happens_as_it_happens(http: httpx.Client) -> None:
    name = begin(http)
    events = say(http, name, SUM)
    assert [event["n"] for event in events] == [*range(len(events))]
    assert events[0] == {"n": 0, "type": "start", "turn": 0, "message": SUM}
    assert text_of(events) == ANSWER
    assert text_of(events, "thought") == "This is arithmetic, so I need the calculator."
    assert text_of(events, "command") == 'Calculate("37*48")'
    result = next(event for event in events if event["type"] == "result")
    assert result["text"] == "1776" and result["found"] and result["picture"] is None
    sources, timing, end = events[-3:]
    assert sources["sources"][0]["number"] == 1 and timing["new_tokens"] > 20
    assert end["kept"] and end["turns"] == 1 and end["title"] == SUM


def test_what_was_said_is_kept_and_goes_on(http: httpx.Client, server: Server) -> None:
    name = begin(http, plugins=["calculator"])
    for message in (SUM, "你好"):
        say(http, name, message)
    held = http.get(f"/api/conversations/{name}").json()
    assert [turn["message"] for turn in held["turns"]] == [SUM, "你好"] and held["plugins"] == ["calculator"]
    first = held["turns"][0]
    assert [event["type"] for event in first["events"]] == ["thought", "command", "result", "text"]
    assert first["events"][-1]["text"] == ANSWER and first["stats"]["new_tokens"] > 20
    listed = http.get("/api/conversations").json()["conversations"]
    assert listed[0]["id"] == name and listed[0]["turns"] == 2 and listed[0]["title"] == SUM


def test_retry_and_edit_replace_what_was_said(http: httpx.Client) -> None:
    name = begin(http)
    for message in ("Hello", SUM, "你好"):
        say(http, name, message)
    again = events_of(http.post(f"/api/conversations/{name}/retry"))
    assert again[0]["turn"] == 2 and again[0]["message"] == "你好" and again[-1]["turns"] == 3
    edited = events_of(http.put(f"/api/conversations/{name}/turns/1", json={"message": "Calculate 3+4"}))
    assert edited[0]["turn"] == 1 and edited[-1]["turns"] == 2
    turns = http.get(f"/api/conversations/{name}").json()["turns"]
    assert [turn["message"] for turn in turns] == ["Hello", "Calculate 3+4"]
    # It is what a conversation says that was never anything else.
    other = begin(http)
    say(http, other, "Hello")
    assert text_of(say(http, other, "Calculate 3+4")) == text_of(edited)
    assert http.put(f"/api/conversations/{name}/turns/7", json={"message": "x"}).status_code == 404
    empty = begin(http)
    assert http.post(f"/api/conversations/{empty}/retry").status_code == 400


@contextlib.contextmanager
def slow_change(http: httpx.Client, monkeypatch: pytest.MonkeyPatch, name: str) -> Iterator[None]:
    """Another client is changing that conversation, which takes it a while, and it succeeds."""
    inside, begin_with = threading.Event(), Chat.begin_with

    def slowly(*arguments: Any) -> int:
        inside.set()
        time.sleep(0.3)
        return begin_with(*arguments)

    monkeypatch.setattr(Chat, "begin_with", slowly)
    change = {"system": "Be brief.", "sampling": {"max_new_tokens": 1}}
    with ThreadPoolExecutor() as pool:
        changed = pool.submit(http.patch, f"/api/conversations/{name}", json=change)
        assert inside.wait(10)
        yield
    assert changed.result().status_code == 200


def test_a_question_waits_for_a_change_that_came_before_it(
    http: httpx.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where somebody saves settings and asks at once: the answer is the changed conversation's, and neither fails."""
    name = begin(http)
    with slow_change(http, monkeypatch, name):
        events = say(http, name, "Hello")
    cuts = [event for event in events if event["type"] == "notice" and event["code"] == "cut"]
    assert [cut["tokens"] for cut in cuts] == [1]


def test_a_conversation_that_is_being_changed_is_neither_closed_nor_removed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with served(shared_moss(), tmp_path, limits=Limits(live=1)) as server, client(server) as http:
        name = begin(http)
        with slow_change(http, monkeypatch, name):
            begin(http)  # for which it would have to go
        assert http.get(f"/api/conversations/{name}").json()["system"] == "Be brief."
        with slow_change(http, monkeypatch, name):
            assert http.delete(f"/api/conversations/{name}").status_code == 204
        assert http.get(f"/api/conversations/{name}").status_code == 404


def test_settings_change_and_are_kept(http: httpx.Client) -> None:
    name = begin(http, title="Sums", sampling={"temperature": 0.5, "seed": 3, "max_new_tokens": 1})
    say(http, name, "Hello")
    changed = http.patch(
        f"/api/conversations/{name}",
        json={
            "title": "Other",
            "plugins": [],
            "system": "Be brief.",
            "sampling": {"temperature": None, "top_p": 0.9},
        },
    ).json()
    assert changed["title"] == "Other" and changed["plugins"] == [] and changed["system"] == "Be brief."
    assert changed["sampling"] == {
        "temperature": 0, "top_k": 40, "top_p": 0.9, "repetition_penalty": None, "seed": 3, "max_new_tokens": 1,
    }  # fmt: skip
    assert http.get(f"/api/conversations/{name}").json() == {**changed}
    events = say(http, name, SUM)
    notices = [event for event in events if event["type"] == "notice"]
    assert not text_of(events, "command")
    assert notices[0]["code"] == "cut" and notices[0]["tokens"] == 1
    own = http.patch(f"/api/conversations/{name}", json={"system": ""}).json()
    assert own["system"] is None
    for wrong in (
        {"plugins": ["search"]},
        {"sampling": {"top_p": 0}},
        {"sampling": {"seed": -1}},
        {"title": 5},
    ):
        assert http.patch(f"/api/conversations/{name}", json=wrong).status_code == 400
    assert http.post(f"/api/conversations/{name}/turns", json={"message": " \n "}).status_code == 400


def test_a_lost_stream_is_taken_up_where_it_was_lost(http: httpx.Client) -> None:
    name = begin(http)
    whole = say(http, name, SUM)
    other = begin(http)
    received = []
    with http.stream("POST", f"/api/conversations/{other}/turns", json={"message": SUM}) as answer:
        for line in answer.iter_lines():
            if line.startswith("data: "):
                received.append(json.loads(line.removeprefix("data: ")))
            if len(received) == 5:
                break  # and the connection is closed
    rest = events_of(http.get(f"/api/conversations/{other}/answer", params={"from": received[-1]["n"] + 1}))

    def same(events: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return [event for event in events if event["type"] not in ("timing", "queue", "progress")]

    assert same([*received, *rest]) == same(whole)
    assert len(http.get(f"/api/conversations/{other}").json()["turns"]) == 1
    assert http.get(f"/api/conversations/{begin(http)}/answer").status_code == 404


def test_while_an_answer_is_written_it_can_be_stopped_and_nothing_else_changes(tmp_path: Path) -> None:
    plugin = WaitingPlugin()
    options: dict[str, Any] = {"plugins": [plugin], "default_plugins": ["waiting"]}
    with served(shared_moss(), tmp_path, **options) as server, client(server) as http:
        name = begin(http)
        found: list[dict[str, Any]] = []
        asking = threading.Thread(target=lambda: found.extend(say(http, name, SUM)))
        asking.start()
        assert plugin.asked.wait(20)
        for refused in (
            http.post(f"/api/conversations/{name}/turns", json={"message": "x"}),
            http.post(f"/api/conversations/{name}/retry"),
            http.patch(f"/api/conversations/{name}", json={"title": "x"}),
        ):
            assert refused.status_code == 409
        assert http.get(f"/api/conversations/{name}").json()["answering"]
        assert http.get("/api/conversations").json()["conversations"][0]["answering"]
        assert http.post(f"/api/conversations/{name}/stop").status_code == 204
        plugin.gate.set()
        asking.join(20)
        codes = [event["code"] for event in found if event["type"] == "notice"]
        assert codes == ["stopped"] and not found[-1]["kept"], "there was no answer yet"
        assert http.get(f"/api/conversations/{name}").json()["turns"] == []
        plugin.gate.set()
        assert text_of(say(http, name, SUM)) == ANSWER


def test_conversations_outlive_the_server(tmp_path: Path) -> None:
    with served(shared_moss(), tmp_path) as server, client(server) as http:
        name = begin(http, title="Kept")
        say(http, name, SUM)
        before = http.get(f"/api/conversations/{name}").json()
    with served(shared_moss(), tmp_path) as server, client(server) as http:
        after = http.get(f"/api/conversations/{name}").json()
        assert {**after, "updated": 0} == {**before, "updated": 0}
        assert events_of(http.post(f"/api/conversations/{name}/retry"))[-1]["turns"] == 1
        assert http.delete(f"/api/conversations/{name}").status_code == 204
        assert http.get(f"/api/conversations/{name}").status_code == 404
    assert not list(tmp_path.glob("page/*.jsonl"))


def test_damage_costs_the_damaged_turn_alone(tmp_path: Path) -> None:
    with served(shared_moss(), tmp_path) as server, client(server) as http:
        names = [begin(http) for _ in range(3)]
        for name in names:
            say(http, name, "Hello")
            say(http, name, SUM)
    files = {name: tmp_path / "page" / f"{name}.jsonl" for name in names}
    lines = files[names[0]].read_bytes().splitlines(keepends=True)
    files[names[0]].write_bytes(b"".join([lines[0], b"{garbage\n", lines[2]]))
    files[names[1]].write_bytes(b"\xff" * 100)
    with served(shared_moss(), tmp_path) as server, client(server) as http:
        held = http.get(f"/api/conversations/{names[0]}").json()
        assert held["damaged"] == 1 and [turn["message"] for turn in held["turns"]] == [SUM]
        assert http.get(f"/api/conversations/{names[1]}").json()["turns"] == []
        assert len(http.get(f"/api/conversations/{names[2]}").json()["turns"]) == 2
        assert text_of(say(http, names[0], SUM)) == ANSWER
        assert len(http.get("/api/conversations").json()["conversations"]) == 3


@pytest.mark.parametrize("name", ["..%2f..%2fetc%2fpasswd", "nothing", "%00", "a" * 500, ".hidden"])
def test_no_name_leads_out_of_the_folder(http: httpx.Client, name: str) -> None:
    for answer in (
        http.get(f"/api/conversations/{name}"),
        http.delete(f"/api/conversations/{name}"),
        http.get(f"/api/pictures/{name}"),
    ):
        assert answer.status_code == 404 and "/" not in answer.json()["error"]["message"].replace(
            answer.url.path, ""
        )


def test_pictures_are_those_of_the_folder_alone(tmp_path: Path) -> None:
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    (pictures / "a-rock.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    (tmp_path / "secret.png").write_text("secret")
    (pictures / "link.png").symlink_to(tmp_path / "secret.png")
    (pictures / "page.html").write_text("<script>")
    settings = PluginSettings(picture_folder=pictures)
    with served(None, tmp_path, plugin_settings=settings) as server, client(server) as http:
        found = http.get("/api/pictures/a-rock.png")
        assert found.status_code == 200 and found.headers["content-type"] == "image/png"
        assert (
            found.headers["x-content-type-options"] == "nosniff"
            and "sandbox" in found.headers["content-security-policy"]
        )
        for name in ("link.png", "page.html", "..%2fsecret.png", "none.png"):
            assert http.get(f"/api/pictures/{name}").status_code == 404


def test_few_conversations_are_in_the_cache_and_all_go_on(tmp_path: Path) -> None:
    with served(shared_moss(), tmp_path, limits=Limits(live=2)) as server, client(server) as http:
        names = [begin(http) for _ in range(5)]
        for _ in range(2):
            for name in names:
                assert text_of(say(http, name, SUM)) == ANSWER
        assert len(server.stores.page._live) == 2
        assert [len(http.get(f"/api/conversations/{name}").json()["turns"]) for name in names] == [2] * 5


def test_the_number_of_conversations_is_bounded(tmp_path: Path) -> None:
    with (
        served(shared_moss(), tmp_path, limits=Limits(conversations=3, live=1)) as server,
        client(server) as http,
    ):
        names = []
        for _ in range(6):
            names.append(begin(http))
            time.sleep(0.01)
        kept = [one["id"] for one in http.get("/api/conversations").json()["conversations"]]
        assert len(kept) <= 4 and names[-1] in kept and names[0] not in kept


def test_a_clock_that_is_set_back_makes_no_conversation_an_old_one(tmp_path: Path) -> None:
    limits = Limits(conversations=3, live=1)
    with served(shared_moss(), tmp_path, limits=limits) as server, client(server) as http:
        names = [begin(http) for _ in range(3)]
        files = [tmp_path / "page" / f"{name}.jsonl" for name in names]
        for steps, file in enumerate(files, start=1):
            os.utime(file, ns=(time.time_ns() + steps * 10**16,) * 2)  # they were made while it was ahead
        say(http, names[0], "Hello")
        names += [begin(http) for _ in range(2)]
        kept = [one["id"] for one in http.get("/api/conversations").json()["conversations"]]
        assert kept[:3] == [names[4], names[3], names[0]] and names[1] not in kept


def test_a_clock_that_jumps_changes_no_answer(
    http: httpx.Client, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    now, jumps = time.time(), itertools.cycle((1e6, -1e6, 3e8, 0.0))
    body = {"messages": [{"role": "user", "content": SUM}], "stream": True}
    name = begin(http)
    monkeypatch.setattr(time, "time", lambda: now + next(jumps))
    events = say(http, name, SUM)
    assert text_of(events) == ANSWER and 0 <= events[-2]["seconds"] < 600
    answer = http.post("/v1/chat/completions", json=body, headers={"X-Conversation-Id": "jumps"}).text
    assert http.get("/v1/stream", params={"conv_id": "jumps"}).text == answer
    assert text_of(events_of(http.get(f"/api/conversations/{name}/answer"))) == ANSWER


def test_what_a_page_must_know(http: httpx.Client, tmp_path: Path) -> None:
    found = http.get("/api/server").json()
    assert found["ready"] and found["context"] == 1024
    assert [plugin["name"] for plugin in found["plugins"]] == ["calculator", "solver"]
    with served(None, tmp_path, plugins=make_plugins(["solver"])) as server, client(server) as loading:
        assert not loading.get("/api/server").json()["ready"]
        assert loading.get("/api/conversations").json() == {"conversations": []}
        waiting = loading.post("/api/conversations", json={})
        assert waiting.status_code == 503 and int(waiting.headers["retry-after"]) > 0
