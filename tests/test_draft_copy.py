"""A copy in fewer bits writes ahead: what the model says is the same to the bit, in fewer passes, whatever the copy is worth."""

import hashlib
import random
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moss_jt import Moss
from moss_jt.backend.threads import compute_threads
from moss_jt.convert.folder_source import folder_recipe
from moss_jt.convert.pipeline import convert
from moss_jt.convert.quantize import QuantSettings, quantized_recipe
from moss_jt.engine.sampling import Sampler, SamplingParams
from moss_jt.errors import MossError
from moss_jt.kernels.needs import CpuNeeds
from moss_jt.plan import placement
from moss_jt.plan.placement import LATER_BYTES
from moss_jt.plan.residency import Copy
from moss_jt.store.files import read_json, write_json
from moss_jt.store.manifest import MANIFEST, sealed
from moss_jt.store.model_folder import open_store
from moss_jt.store.sizes import sizes_of_store
from tests.support.dialogues import dialogues
from tests.support.models import tiny_model_folder
from tests.support.plans import plan

CONTEXT = 320
QUESTIONS = ["What is 37 times 48?", "你好", "Tell me about the sea.", "Solve x + 3 = 5.", "Draw a cat."]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """moss-tiny as float16 and int8, and its int4 copy; and a copy of garbage, whose scales are no numbers."""
    home = tmp_path_factory.mktemp("models")
    shutil.copytree(tiny_model_folder(), home / "tiny")
    source, recipe = folder_recipe(home / "tiny")
    for bits in (8, 4):
        settings = QuantSettings(bits, 96, "rtn")
        out = home / f"tiny-int{bits}"
        convert(source, quantized_recipe(recipe, source.config, settings, out, None), out)
    make_garbage(home / "tiny-int4", home / "garbage")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MOSS_JT_HOME", str(home / "home"))
        yield home


def make_garbage(copy: Path, folder: Path) -> None:
    """The same with scales of the last block that are no numbers, and those of the first that are any: as a manifest vouches."""
    shutil.copytree(copy, folder)
    dice = np.random.default_rng(0)
    fields = read_json(folder / MANIFEST)
    for name in sorted(path.name for path in folder.glob("block-*")):
        file = open_store(copy).blocks[int(name[6:8])]
        data = bytearray((folder / name).read_bytes())
        for local, spec in file.tensors.items():
            if local.endswith(".scales"):
                scales = dice.standard_normal(spec.shape).astype(np.float16)
                scales[: len(scales) // 2] = np.nan if name == "block-03.safetensors" else 1
                data[spec.offset : spec.offset + spec.nbytes] = scales.tobytes()
                full = (
                    spec.name
                    if spec.name in fields["files"][name]["tensors"]
                    else f"transformer.h.{int(name[6:8])}.{local}"
                )
                fields["files"][name]["tensors"][full]["sha256"] = hashlib.sha256(
                    scales.tobytes()
                ).hexdigest()
        (folder / name).unlink()
        (folder / name).write_bytes(data)
    write_json(folder / MANIFEST, sealed(fields))


def load(
    folder: Path, share: float | None = None, copy: Path | None = None, parallel: int = 1, **more: Any
) -> Moss:
    """share: of the blocks that is resident, or None for everything. The process counts as empty, so that its size today decides
    nothing; drafts are as long as they may be, for so small a model that they do not pay."""
    sizes, copied, budget = sizes_of_store(open_store(folder)), None, 4 << 30
    if copy is not None:
        other = open_store(copy)
        copied = Copy(sizes_of_store(other), CpuNeeds(other.config, other.bits))
    if share is not None:
        full = plan(sizes, CONTEXT, 1 << 40, threads=compute_threads(), parallel=parallel, copy=copied)
        budget = full.peak_bytes - full.footprint_bytes + LATER_BYTES + 2 * max(sizes.block_bytes)
        budget -= int((1 - share) * sum(sizes.block_bytes)) + (sizes.head_bytes if copy is None else 0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(placement, "resident_memory_bytes", lambda: 0)
        patch.setattr(placement, "_held", [])  # nor do models of other tests here
        moss = Moss.load(
            folder,
            memory=budget,
            context=CONTEXT,
            parallel=parallel,
            draft_model="off" if copy is None else copy,
            **more,
        )
    assert moss.plan.streams == (share is not None) and (moss.copy is None) == (copy is None)
    if moss.copy is not None:
        moss.copy.adaptive = False
    return moss


class Digests:
    """Of all logits that tokens were chosen from, by the answer's seed."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.digests: dict[int | None, list[str]] = {}
        choose = Sampler.choose

        def noted(sampler: Sampler, logits: np.ndarray) -> int:
            digest = hashlib.sha256(logits.tobytes()).hexdigest()
            self.digests.setdefault(sampler.params.seed, []).append(digest)
            return choose(sampler, logits)

        monkeypatch.setattr(Sampler, "choose", noted)

    def take(self) -> dict[int | None, list[str]]:
        digests, self.digests = self.digests, {}
        return digests


def ask_all(moss: Moss, temperature: float) -> list[tuple[list[int], str | None]]:
    """Each question in a thread of its own, with a seed of its own."""
    answers: list[tuple[list[int], str | None]] = [([], None)] * len(QUESTIONS)

    def ask(number: int) -> None:
        prompt = f"<|Human|>: {QUESTIONS[number]}<eoh>\n<|Inner Thoughts|>: None<eot>\n<|MOSS|>:"
        generation = moss.generate(prompt, max_new_tokens=24, temperature=temperature, seed=number).finish()
        answers[number] = generation.token_ids, generation.stats.stop_reason

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(len(QUESTIONS))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    return answers


@pytest.mark.parametrize("bits", ["", "-int8"])
@pytest.mark.parametrize("temperature", [0.0, 0.9])
def test_the_text_is_the_model_s_own_to_the_bit(
    models: Path, bits: str, temperature: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Many at once, streamed and resident, with the model's copy and one of garbage."""
    digests = Digests(monkeypatch)
    folder = models / f"tiny{bits}"
    with load(folder, draft="off") as moss:
        expected = ask_all(moss, temperature)
        logits = digests.take()
        plain = moss.engine.passes
    for share, copy, parallel in ((None, "tiny-int4", 1), (0.4, "tiny-int4", 3), (0.0, "garbage", 1)):
        with load(folder, share, models / copy, parallel) as moss:
            assert ask_all(moss, temperature) == expected
            assert digests.take() == logits
            if copy != "garbage" and parallel == 3:
                assert moss.engine.passes < plain / 2


@pytest.mark.long
def test_over_a_cache_of_bytes_the_text_is_the_model_s_own(
    models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    digests = Digests(monkeypatch)
    with load(models / "tiny", draft="off", cache_bits=8) as moss:
        expected = ask_all(moss, 0.9)
        logits = digests.take()
    for copy in ("tiny-int4", "garbage"):
        with load(models / "tiny", None, models / copy, parallel=2, cache_bits=8) as moss:
            assert ask_all(moss, 0.9) == expected
            assert digests.take() == logits


def test_conversations_are_the_same_across_turns_cuts_and_stops(models: Path) -> None:
    """After an answer that was left in its midst, a text that was cut, and up to the context's very end."""

    def talk(moss: Moss) -> list[list[int]]:
        said = []
        text = moss.session()
        text.extend(moss.tokenizer.encode("<|Human|>: What is 12 times 12?<eoh>\n<|Inner Thoughts|>:"))
        params = {"temperature": 0.8, "seed": 3}
        for cut, new in ((5, 40), (None, 30), (90, 25)):
            answer = text.decode(make_params(**params), new)
            for number, _ in enumerate(answer, 1):
                if number == cut:
                    break
            answer.close()
            said.append(list(text.token_ids))
            if cut == 90:
                text.truncate(text.position - 31)
            text.extend(moss.tokenizer.encode("\n<|Human|>: 你好 again<eoh>\n"))
        list(text.decode(make_params(temperature=0), 1000))
        assert text.stop_reason == "context" and text.position == moss.model.capacity
        return [*said, list(text.token_ids)]

    with load(models / "tiny", draft="off") as moss:
        expected = talk(moss)
    with load(models / "tiny", 0.4, models / "tiny-int4") as moss:
        assert talk(moss) == expected
        assert moss.engine.pool.free + len(pages_in_use(moss)) == moss.engine.pool.count


def make_params(**options: Any) -> SamplingParams:
    return SamplingParams(**options)


def random_answers(moss: Moss, cases: range) -> list[tuple[list[int], str | None]]:
    """Dialogues that are cut anywhere, continued with any settings."""
    token_ids = moss.tokenizer.encode(dialogues(77, 6))
    answers = []
    for case in cases:
        dice = random.Random(case)
        start = dice.randrange(len(token_ids) - 200)
        text = moss.session()
        text.extend(token_ids[start : start + dice.randint(1, 200)])
        params = SamplingParams(
            temperature=dice.choice([0.0, 0.7, 1.2]),
            top_k=dice.choice([0, 1, 40]),
            top_p=dice.choice([0.5, 0.8, 1.0]),
            repetition_penalty=dice.choice([None, 1.0, 1.3]),
            presence_penalty=dice.choice([0.0, 0.5]),
            frequency_penalty=dice.choice([0.0, 0.3]),
            length_penalty=dice.choice([1.0, 1.05]),
            regulation_start=8,
            seed=case,
        )
        stops = dice.sample(range(2100), 40)
        answers.append((list(text.decode(params, dice.randint(1, 90), stops)), text.stop_reason))
    return answers


@pytest.mark.parametrize("cases", [range(16), pytest.param(range(16, 200), marks=pytest.mark.long)])
def test_random_dialogues_with_any_settings(
    models: Path, cases: range, monkeypatch: pytest.MonkeyPatch
) -> None:
    digests = Digests(monkeypatch)
    with load(models / "tiny", draft="off") as moss:
        expected, logits = random_answers(moss, cases), digests.take()
        assert {reason for _, reason in expected} >= {"eos", "length"}
    for copy, draft in (("tiny-int4", "lookup"), ("garbage", "off")):
        with load(models / "tiny", 0.4, models / copy, draft=draft) as moss:
            assert random_answers(moss, cases) == expected
            assert digests.take() == logits


def pages_in_use(moss: Moss) -> set[int]:
    return {page for page in range(moss.engine.pool.count) if moss.engine.pool.users(page)}


def test_what_was_drafted_and_what_it_cost_is_told(models: Path) -> None:
    prompt = "<|Human|>: Hello<eoh>\n<|Inner Thoughts|>: None<eot>\n<|MOSS|>:"
    with load(models / "tiny", 0.4, models / "tiny-int4") as moss:
        stats = moss.generate(prompt, max_new_tokens=20, temperature=0).finish().stats
    assert 0 < stats.accepted <= stats.drafted
    assert stats.passes <= stats.new_tokens - stats.accepted
    assert stats.seconds["drafting"] > 0 and stats.seconds["computing"] > 0


@pytest.mark.long
@pytest.mark.parametrize(("temperature", "least"), [(0.0, 8), (0.7, 6)])
def test_tokens_per_pass_on_unseen_dialogues(models: Path, temperature: float, least: float) -> None:
    """moss-tiny's answers in 100 conversations, with drafts of 16 by its int4 copy alone."""
    tokens = passes = 0
    with Moss.load(
        models / "tiny", memory="2GiB", context=1024, draft="16", draft_model=models / "tiny-int4"
    ) as moss:
        assert moss.copy is not None
        moss.copy.adaptive = False
        for seed in range(100):
            turns = dialogues(900_000 + seed, 1).split("<|MOSS|>:")
            text = moss.session()
            text.drafter = None
            text.extend(moss.tokenizer.encode("<|MOSS|>:".join([*turns[: 2 + seed % 4], ""])))
            params = SamplingParams(temperature=temperature, seed=seed)
            tokens += len(list(text.decode(params, 100, moss.stop_ids))) - 1
            passes += text.timing.passes
    assert tokens / passes >= least


def test_the_head_is_in_memory_once(models: Path) -> None:
    with load(models / "tiny", 0.4, models / "tiny-int4") as moss:
        heads = [unit for unit in moss.plan.units if unit.kind == "head"]
        assert heads and all(unit.resident for unit in heads)
        assert moss.copy is not None
        ours = [slab.weight.data.ctypes.data for slab in moss.model.weights.head_slabs()]
        theirs = [slab.weight.data.ctypes.data for slab in moss.copy.model.weights.head_slabs()]  # type: ignore[attr-defined]
        assert ours == theirs


def test_a_copy_is_found_where_weights_stream_and_pays(
    models: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def loaded(**options: Any) -> str | None:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(placement, "resident_memory_bytes", lambda: 0)
            patch.setattr(placement, "_held", [])
            with Moss.load(models / "tiny", context=CONTEXT, **options) as moss:
                return None if moss.copy is None else moss.copy.model.weights.store.path.name  # type: ignore[attr-defined]

    assert loaded(memory="2GiB") is None, "everything is resident"
    assert loaded(memory="2GiB", draft_model=models / "tiny-int8") == "tiny-int8"
    with pytest.raises(MossError, match="has 16 bits, and .* has 16"):
        loaded(memory="2GiB", draft_model=models / "tiny")
    with pytest.raises(MossError, match="there is no model called 'nothing'"):
        loaded(memory="2GiB", draft_model="nothing")
