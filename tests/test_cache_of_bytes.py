"""Keys and values in int8: the same words in any company, half the memory, pages that no other cache takes, and what it costs."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from moss_jt import Moss
from moss_jt.commands.cli import main
from moss_jt.engine.cache_identity import FOLDER
from moss_jt.errors import MossError
from moss_jt.kernels.interface import PAGE
from moss_jt.store.config import MOSS_MOON_003
from moss_jt.store.sizes import GIB, sizes_of_geometry
from tests.support.dialogues import dialogues
from tests.support.models import tiny_model_folder
from tests.support.plans import plan, plan_gpu
from tests.support.random_models import SMALL, random_folder
from tests.test_many import PROMPTS, Digests, ask, ask_in_threads
from tests.test_prompt_cache import chat_answer


def test_answers_do_not_depend_on_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    """With drafts and without, alone and in company, with room for all and where pages go to the disk and back."""
    digests = Digests(monkeypatch)
    folder = random_folder(SMALL)
    with Moss.load(folder, memory="2GiB", draft="off", cache_bits=8) as moss:
        alone = [ask(moss, number) for number in range(len(PROMPTS))]
        expected = digests.take()
    for options in ({"parallel": 16}, {"parallel": 1, "draft": "lookup"}):
        with Moss.load(folder, memory="2GiB", cache_bits=8, **options) as moss:  # type: ignore[arg-type]
            assert ask_in_threads(moss) == alone
            actual = digests.take()
            assert {seed: logits[: len(expected[seed])] for seed, logits in actual.items()} == expected
    with Moss.load(folder, memory="2GiB", draft="off") as moss:
        ask(moss, 0)
        assert digests.take()[0] != expected[0], "it was no cache of bytes"


def test_the_memory_is_what_is_planned() -> None:
    with Moss.load(tiny_model_folder(), memory="2GiB", parallel=2, cache_bits=8) as moss:
        pages = [moss.model.page_views(page) for page in range(moss.model.pages)]
        assert sum(view.nbytes for views in pages for view in views or []) == moss.plan.kv_cache_bytes
    whole, half = (sizes_of_geometry(MOSS_MOON_003, cache_bits=bits) for bits in (16, 8))
    assert half.cache_bytes(2048) == 2 * 34 * 2048 * (6144 + 24 * 4)
    plans = [plan(sizes, 2048, 64 * GIB) for sizes in (whole, half)]
    saved, more = whole.cache_bytes(2048) - half.cache_bytes(2048), 512 * 6144 * 4  # of workspace
    assert saved > 0.49 * whole.cache_bytes(2048)
    assert plans[0].peak_bytes - plans[1].peak_bytes == saved - more
    with pytest.raises(MossError, match=r"key/value cache of 2048 tokens in int8"):
        plan(half, 2048, GIB)


def test_a_page_that_is_read_and_written_is_the_same() -> None:
    with Moss.load(tiny_model_folder(), memory="2GiB", context=2 * PAGE, cache_bits=8) as moss:
        moss.logits(range(100, 100 + PAGE))
        views = moss.model.page_views(0)
        assert views is not None
        before, data = [view.copy() for view in views], moss.model.read_page(0)
        assert any(view.any() for view in before) and data.nbytes == sum(view.nbytes for view in before)
        moss.model.write_page(0, np.zeros_like(data))
        assert not any(view.any() for view in views)
        moss.model.write_page(0, data)
        assert all(np.array_equal(view, old) for view, old in zip(views, before, strict=True))


def test_pages_of_another_cache_are_not_taken(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny_model_folder(), folder, ignore=shutil.ignore_patterns(FOLDER))
    question = "What is 12 plus 30?"
    without = chat_answer(folder, "0", question, cache_bits=8)
    chat_answer(folder, "64MiB", question)
    first = chat_answer(folder, "64MiB", question, cache_bits=8)
    again = chat_answer(folder, "64MiB", question, cache_bits=8)
    for events, page, _ in (first, again):
        assert events == without[0] and np.array_equal(page, without[1])
    assert first[2] == without[2] and again[2] < without[2]
    assert len([*(folder / FOLDER).iterdir()]) == 2


def test_what_it_costs_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text, model = tmp_path / "dialogues.txt", str(tiny_model_folder())
    text.write_text(dialogues(5, 2), encoding="utf-8")
    arguments = ["eval", model, str(text), "--against", model, "--cache-bits", "8", "--max-tokens", "600"]
    with pytest.raises(SystemExit) as ended:
        main([*arguments, "--json"])
    assert not ended.value.code
    actual = json.loads(capsys.readouterr().out)
    assert 0 < actual["mean_kl_divergence"] < 1e-3 and actual["greedy_agreement"] > 0.98
    assert actual["model"] != actual["against"]
    with pytest.raises(SystemExit):
        main(arguments)
    assert f"KL({model} || {model}, cache in int8)" in capsys.readouterr().out


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(MossError, match="a cache of 4 bits is not possible"):
        Moss.load(tiny_model_folder(), cache_bits=4)
    odd = replace(MOSS_MOON_003, n_embd=24 * 40, rotary_dim=8)
    with pytest.raises(
        MossError, match="heads of a multiple of 16 dimensions on a GPU, and this model's have 40"
    ):
        plan_gpu(sizes_of_geometry(odd, cache_bits=8), 2048, 64 * GIB, 64 * GIB)


def test_on_a_card_twice_the_context_takes_the_same_memory(capsys: pytest.CaptureFixture[str]) -> None:
    whole, half = (sizes_of_geometry(MOSS_MOON_003, 4, cache_bits=bits) for bits in (16, 8))
    plans = [plan_gpu(sizes, 2048, 64 * GIB, 64 * GIB) for sizes in (whole, half)]
    saved = whole.cache_bytes(2048) - half.cache_bytes(2048)
    assert plans[0].peak_bytes - plans[1].peak_bytes == saved > 0.49 * whole.cache_bytes(2048)
    assert half.cache_bytes(2 * 2048) < 1.02 * whole.cache_bytes(2048)
    for bits, size in ((16, "1.59 GiB  2048 tokens\n"), (8, "829 MiB  2048 tokens in int8\n")):
        card = ["--gpu-memory", "16GiB", "--host-memory", "30GiB", "--disk-speed", "1", "--link-speed", "12"]
        with pytest.raises(SystemExit):
            main(
                ["plan", "moss-moon-003-sft-int4", *card, "--memory-speed", "400", "--cache-bits", str(bits)]
            )
        assert size in capsys.readouterr().out


def test_it_is_planned(capsys: pytest.CaptureFixture[str]) -> None:
    for bits, size in ((16, "1.59 GiB  2048 tokens\n"), (8, "829 MiB  2048 tokens in int8\n")):
        speeds = ["--disk-speed", "1", "--memory-speed", "20", "--compute-speed", "100"]
        with pytest.raises(SystemExit):
            main(["plan", "moss-moon-003-sft", "--memory", "14GiB", "--cache-bits", str(bits), *speeds])
        assert size in capsys.readouterr().out
