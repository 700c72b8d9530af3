"""Many answers at once from a real model are, bit for bit, what each is alone: logits are compared, not only tokens."""

import hashlib
import threading
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from moss_jt import Moss
from moss_jt.backend.threads import compute_threads
from moss_jt.engine.sampling import Sampler, SamplingParams
from moss_jt.errors import MossError
from moss_jt.loading import Loaded, load_on_cpu
from moss_jt.store.model_folder import open_store
from moss_jt.store.sizes import MIB, sizes_of_store
from moss_jt.store.tokenizer import Tokenizer
from moss_jt.weights.host_units import open_host_units
from tests.support.models import tiny_model_folder
from tests.support.plans import plan
from tests.support.random_models import SMALL, random_folder

BEGINNING = [7 * number % 1900 + 17 for number in range(80)]
PROMPTS = [
    (BEGINNING if number % 3 == 0 else [])
    + [(31 * number + 7 * index) % 4000 for index in range(1 + 17 * number)]
    for number in range(9)
]


class Digests:
    """Of all logits that each answer's tokens were chosen from, by the answer's seed."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.digests: dict[int, list[str]] = {}
        choose = Sampler.choose

        def noted(sampler: Sampler, logits: np.ndarray) -> int:
            seed = sampler.params.seed
            assert seed is not None
            self.digests.setdefault(seed, []).append(hashlib.sha256(logits.tobytes()).hexdigest())
            return choose(sampler, logits)

        monkeypatch.setattr(Sampler, "choose", noted)

    def take(self) -> dict[int, list[str]]:
        actual, self.digests = self.digests, {}
        return actual


def ask(moss: Moss, number: int, names: Sequence[str | None] = (None,)) -> list[int]:
    """A prompt's answer, with a seed and one of these adapters of its own."""
    generation = moss.generate(
        PROMPTS[number],
        max_new_tokens=9,
        temperature=1.5,
        seed=number,
        adapter=names[number % len(names)],
    )
    list(generation)
    return generation.token_ids


def ask_in_threads(moss: Moss, names: Sequence[str | None] = (None,)) -> list[list[int]]:
    """Each prompt in a thread of its own."""
    answers: list[list[int]] = [[] for _ in PROMPTS]

    def keep(number: int) -> None:
        answers[number] = ask(moss, number, names)

    threads = [threading.Thread(target=keep, args=(number,)) for number in range(len(PROMPTS))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    return answers


@pytest.mark.parametrize("simd", ["", "256"])
@pytest.mark.parametrize("bits", [16, 8, 4])
def test_answers_do_not_depend_on_each_other(bits: int, simd: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Under every kind of plan: all resident, and streaming with a cache for two, whose pages go to the disk and back."""
    if simd:
        monkeypatch.setenv("MOSS_JT_SIMD", simd)
    digests = Digests(monkeypatch)
    folder = random_folder(SMALL, bits)
    alone: list[list[int]] = []
    with Moss.load(folder, memory="2GiB", draft="off") as moss:
        for number, prompt in enumerate(PROMPTS):
            generation = moss.generate(prompt, max_new_tokens=9, temperature=1.5, seed=number)
            list(generation)
            alone.append(generation.token_ids)
        expected = digests.take()
        assert len(expected) == len(PROMPTS) and all(map(len, expected.values()))
    for options in ({"parallel": 16}, {"parallel": 1, "draft": "lookup"}):
        with Moss.load(folder, memory="2GiB", **options) as moss:  # type: ignore[arg-type]
            assert ask_in_threads(moss) == alone
            actual = digests.take()
            assert {seed: logits[: len(expected[seed])] for seed, logits in actual.items()} == expected


def test_streamed_weights_serve_all_of_them(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    digests = Digests(monkeypatch)
    folder = random_folder(SMALL)
    with Moss.load(folder, memory="2GiB", draft="off") as moss:
        alone = ask_in_threads(moss)
        expected = digests.take()
    sizes = sizes_of_store(open_store(folder))
    with Moss.load(folder, memory="2GiB", draft="off", parallel=2) as moss:
        resident = moss.plan
    # The plan is made by hand: no budget that a process could keep to leaves so small a model streaming.
    fixed = {"threads": compute_threads(), "footprint_bytes": resident.footprint_bytes, "parallel": 2}
    smallest = plan(sizes, 256, resident.peak_bytes - 2 * MIB, **fixed)
    assert smallest.streams
    store = open_store(folder)
    model = load_on_cpu(store, smallest, open_host_units(store, smallest, tmp_path))
    with Moss(Loaded(model, Tokenizer.from_file(store.tokenizer_path), smallest, "off")) as moss:
        assert ask_in_threads(moss) == alone
        assert digests.take() == expected


def test_generate_many_gives_what_generate_gives() -> None:
    prompts = ["<|Human|>: Hello<eoh>\n<|Inner Thoughts|>:", [5] * 100, "你好", "Calculate 37*48"]
    options = {"max_new_tokens": 12, "temperature": 0.9, "seed": 5}
    with Moss.load(tiny_model_folder(), memory="2GiB") as moss:
        alone = []
        for prompt in prompts:
            generation = moss.generate(prompt, **options)  # type: ignore[arg-type]
            list(generation)
            alone.append((generation.text, generation.token_ids, generation.stats.stop_reason))
        many = [(g.text, g.token_ids, g.stats.stop_reason) for g in moss.generate_many(prompts, **options)]
        assert many == alone
        assert list(moss.generate_many([])) == []
        with pytest.raises(MossError, match="the prompt is empty"):
            list(moss.generate_many(["a", ""]))
        with pytest.raises(MossError, match="temperature is -1"):
            list(moss.generate_many(["a"], temperature=-1))
        assert moss.engine.plan() is None, "what was not taken is gone"


def test_chats_in_threads_say_what_they_say_alone() -> None:
    messages = ["Hello", "What is 37 times 48?", "你是谁？"]

    def talk(moss: Moss, plugins: list[str]) -> str:
        chat = moss.chat(plugins=plugins, temperature=0)
        for message in messages:
            list(chat.send(message))
        return moss.tokenizer.decode(chat.token_ids)

    with Moss.load(tiny_model_folder(), memory="2GiB", parallel=4) as moss:
        kinds = [["calculator"], [], ["solver"], ["calculator", "solver"]]
        alone = [talk(moss, plugins) for plugins in kinds]
        actual = [""] * len(kinds)

        def run(number: int) -> None:
            actual[number] = talk(moss, kinds[number])

        threads = [threading.Thread(target=run, args=(number,)) for number in range(len(kinds))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(120)
        assert actual == alone


def test_a_text_s_logits_do_not_depend_on_answers_beside_them() -> None:
    with Moss.load(tiny_model_folder(), memory="2GiB", parallel=3) as moss:
        token_ids = [(7 * number) % 1900 for number in range(200)]
        alone = moss.logits(token_ids)
        answer = moss.begin([5] * 90, SamplingParams(seed=1), 60)
        assert np.array_equal(moss.logits(token_ids), alone)
        list(answer)
        assert 0 < answer.stats.new_tokens <= 60


def test_the_cache_s_folder_is_the_model_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOSS_JT_HOME", str(tmp_path))
    with Moss.load(tiny_model_folder(), memory="2GiB", context=64, draft="off") as moss:
        first, second = moss.session(), moss.session()
        for text in (first, second):
            text.extend([5] * 40)
            text.prefill()
        assert (tmp_path / "cache").is_dir() and not list((tmp_path / "cache").iterdir())
