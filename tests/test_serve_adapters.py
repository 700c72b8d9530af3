"""Adapters over HTTP: a request has one by naming it as its model, beside others in the same passes."""

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from moss_jt import Moss
from moss_jt.chat.events import Text, Thought
from moss_jt.store.model_folder import open_store
from moss_jt.train.lora import LoraSettings
from tests.support.adapters import random_adapter
from tests.support.models import tiny_model_folder
from tests.support.serving import NAME, client, served

PROMPT = "<|Human|>: Hello<eoh>\n<|Inner Thoughts|>:"
NAMES = [NAME, "poems", "prose"]


@pytest.fixture(scope="module")
def moss(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Moss]:
    config, home = open_store(tiny_model_folder()).config, tmp_path_factory.mktemp("adapters")
    paths = [
        random_adapter(home / name, config, LoraSettings(rank=rank), rank, 0.15)
        for rank, name in ((2, "poems"), (3, "prose"))
    ]
    with Moss.load(tiny_model_folder(), memory="2GiB", parallel=8, context=1024, adapters=paths) as loaded:
        yield loaded


@pytest.fixture(scope="module")
def http(moss: Moss, tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    with served(moss, tmp_path_factory.mktemp("home"), adapters=[*moss.adapters]) as server:
        yield client(server)


def test_adapters_are_listed_as_models(http: httpx.Client) -> None:
    listed = http.get("/v1/models").json()["data"]
    assert [one["id"] for one in listed] == NAMES
    assert [one.get("parent") for one in listed] == [None, NAME, NAME]
    assert http.get("/v1/models/poems").json() == listed[1]
    missing = http.post("/v1/completions", json={"prompt": "x", "model": "verse"})
    assert missing.status_code == 404 and "'poems'" in missing.json()["error"]["message"]


def test_requests_choose_their_adapter_by_the_model(http: httpx.Client, moss: Moss) -> None:
    """All at once, each answers what it does alone."""
    alone = {
        name: "".join(
            moss.generate(PROMPT, max_new_tokens=12, temperature=0, adapter=None if name == NAME else name)
        )
        for name in NAMES
    }
    assert len({*alone.values()}) == len(NAMES)
    answers: dict[int, Any] = {}

    def ask(number: int) -> None:
        body = {"prompt": PROMPT, "max_tokens": 12, "model": NAMES[number % 3]}
        answers[number] = http.post("/v1/completions", json=body).json()

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(9)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    for number, answer in answers.items():
        name = NAMES[number % 3]
        assert answer["model"] == name and answer["choices"][0]["text"] == alone[name]
    without = http.post("/v1/completions", json={"prompt": PROMPT, "max_tokens": 12}).json()
    assert without["model"] == NAME and without["choices"][0]["text"] == alone[NAME]
    echoed = {
        name: http.post(
            "/v1/completions",
            json={"prompt": PROMPT, "max_tokens": 0, "echo": True, "logprobs": 0, "model": name},
        ).json()["choices"][0]["logprobs"]["token_logprobs"]
        for name in NAMES
    }
    token_ids = moss.tokenizer.encode(PROMPT)
    for name in NAMES:
        exact = moss.logprobs(token_ids, adapter=None if name == NAME else name)
        assert echoed[name][1:] == [one.logprob for one in exact]


def test_chats_have_adapters_with_plugins_and_without(http: httpx.Client, moss: Moss) -> None:
    strict = openai.OpenAI(base_url=f"{http.base_url}/v1", api_key="none", max_retries=0)
    message = "What is 37 times 48?"
    for plugins in ([], ["calculator"]):
        texts = []
        for name in NAMES:
            answer = strict.chat.completions.create(
                model=name,
                messages=[{"role": "user", "content": message}],
                max_tokens=24,
                extra_body={"plugins": plugins},
            )
            assert answer.model == name
            texts.append(answer.model_dump_json(include={"choices"}))
        assert len({*texts}) == len(NAMES)


MESSAGE = "What is 37 times 48?"


def kept_events(http: httpx.Client, conversation: dict[str, Any]) -> list[tuple[str, str]]:
    """What MOSS thought and said last, as the server keeps it."""
    events = http.get(f"/api/conversations/{conversation['id']}").json()["turns"][-1]["events"]
    return [(one["type"], one["text"]) for one in events if one["type"] in ("text", "thought")]


def test_a_conversation_of_the_page_has_an_adapter(http: httpx.Client, moss: Moss) -> None:
    """From its beginning, or in its midst: what the Python interface's chat says; and as whom, when the server has let go of it."""
    assert http.get("/api/server").json()["models"] == NAMES
    sampling = {"temperature": 0, "max_new_tokens": 16}
    said = {}
    for name in NAMES:
        asked = {"sampling": sampling, "plugins": []} | ({} if name == NAME else {"model": name})
        begun = http.post("/api/conversations", json=asked).json()
        assert begun["model"] == name
        http.post(f"/api/conversations/{begun['id']}/turns", json={"message": MESSAGE})
        said[name] = kept_events(http, begun)
        chat = moss.chat(temperature=0, max_new_tokens=16, adapter=None if name == NAME else name)
        exact: dict[str, str] = {}
        for event in chat.send(MESSAGE):
            if isinstance(event, Text | Thought):
                exact[event.kind] = exact.get(event.kind, "") + event.text
        assert said[name] == [*exact.items()]
    assert len({str(events) for events in said.values()}) == len(NAMES)
    path = f"/api/conversations/{begun['id']}"
    for name in reversed(NAMES):
        assert http.patch(path, json={"model": name}).json()["model"] == name
        http.post(f"{path}/retry")
        assert kept_events(http, begun) == said[name]
    missing = http.patch(path, json={"model": "verse"})
    assert missing.status_code == 404 and "'poems'" in missing.json()["error"]["message"]
    assert http.get(path).json()["model"] == NAME
    assert http.post("/api/conversations", json={"model": "verse"}).status_code == 404


def test_a_kept_conversation_goes_on_with_its_adapter(moss: Moss, tmp_path: Path) -> None:
    """In the next server; in one without that adapter, with the model alone."""
    for adapters, expected in (([*moss.adapters], "prose"), ([], NAME)):
        with served(moss, tmp_path, adapters=adapters) as server, client(server) as http:
            if adapters:
                asked = {"model": "poems", "sampling": {"max_new_tokens": 4}}
                path = f"/api/conversations/{http.post('/api/conversations', json=asked).json()['id']}"
                http.post(f"{path}/turns", json={"message": MESSAGE})
                http.patch(path, json={"model": "prose"})
        with served(moss, tmp_path, adapters=adapters) as server, client(server) as http:
            assert http.get(path).json()["model"] == expected


def test_the_reference_s_conversations_have_adapters(http: httpx.Client) -> None:
    def ask(**more: Any) -> dict[str, Any]:
        body = {"prompt": MESSAGE, "max_length": 400, "temperature": 0, **more}
        answer: dict[str, Any] = http.post("/", json=body, timeout=60).json()
        return answer

    first = {name: ask(model=name) for name in NAMES}
    assert ask()["response"] == first[NAME]["response"]
    assert len({one["response"] for one in first.values()}) == len(NAMES)
    second = {name: ask(uid=first[name]["uid"]) for name in NAMES}
    assert len({one["response"] for one in second.values()}) == len(NAMES)
    again = ask(model="poems")
    assert ask(uid=again["uid"], model="poems")["response"] == second["poems"]["response"]
    changed = ask(uid=ask(model="prose")["uid"], model="poems")
    assert changed["history"][0][1] == first["prose"]["response"]
    assert http.post("/", json={"prompt": "x", "model": "verse"}).status_code == 404


def test_vortex_s_requests_have_adapters(http: httpx.Client) -> None:
    def ask(**more: Any) -> str:
        body = {"x": PROMPT, "max_iterations": 12, "temperature": 0, **more}
        return str(http.post("/inference", json=body).json()["new_generations"])

    told = [ask(model=name) for name in NAMES]
    assert len({*told}) == len(NAMES) and ask() == told[0]
    assert http.post("/inference", json={"x": PROMPT, "model": "verse"}).status_code == 404
