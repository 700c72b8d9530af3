"""Several adapters over one model: each text is what it is alone, and what a model has into which its adapter was merged."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from moss_jt import Moss
from moss_jt.engine.draft_copy import DraftCopy
from moss_jt.engine.draft_length import DraftPace
from moss_jt.engine.sampling import SamplingParams
from moss_jt.errors import MossError
from moss_jt.store.config import MossConfig
from moss_jt.store.model_folder import open_store
from moss_jt.store.tensor_file import read_tensors, write_tensors
from moss_jt.train.adapter_bank import MOST_NAME, AdapterFiles, named_folders
from moss_jt.train.lora import TARGETS, LoraSettings
from moss_jt.train.peft_files import CONFIG, WEIGHTS
from tests.support.adapters import random_adapter
from tests.support.random_models import SMALL, random_folder
from tests.test_many import PROMPTS, Digests, ask, ask_in_threads

GREEDY = SamplingParams(0.0)
NAMES = [None, "all", "last", "qkv"]
SETTINGS = {
    "all": LoraSettings(rank=3, alpha=5.0),
    "last": LoraSettings(rank=8, alpha=16.0, layers=2, targets=("fc_out", "out")),
    "qkv": LoraSettings(rank=1, alpha=1.0, targets=("qkv",)),
}


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    home = tmp_path_factory.mktemp("adapters")
    return {
        name: random_adapter(home / name, SMALL, settings, seed)
        for seed, (name, settings) in enumerate(SETTINGS.items())
    }


@pytest.mark.parametrize("bits", [16, pytest.param(4, marks=pytest.mark.long)])
def test_answers_with_adapters_do_not_depend_on_each_other(
    bits: int, adapters: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Alone, among others that begin alike and have other adapters, with drafts by lookup, and with a copy that writes ahead:
    the same logits, bit for bit. Some PROMPTS share whole pages."""
    digests = Digests(monkeypatch)
    folder = random_folder(SMALL, bits)
    with Moss.load(folder, memory="2GiB", draft="off", adapters=adapters, prompt_cache=0) as moss:
        alone = [ask(moss, number, NAMES) for number in range(len(PROMPTS))]
        expected = digests.take()
    with Moss.load(folder, memory="2GiB", draft="off") as moss:
        for number in range(0, len(PROMPTS), len(NAMES)):
            assert ask(moss, number, NAMES) == alone[number], "the model alone"
        plain = digests.take()
        assert all(plain[number] == expected[number] for number in plain)
    for options in ({"parallel": 16}, {"parallel": 2, "draft": "lookup"}, {"parallel": 4, "copy": True}):
        writes_ahead = options.pop("copy", False)
        with Moss.load(folder, memory="2GiB", adapters=adapters, **options) as moss:  # type: ignore[arg-type]
            if writes_ahead:
                moss.engine._copy = DraftCopy(moss.model, DraftPace(), 5, adaptive=False)
            assert ask_in_threads(moss, NAMES) == alone
            actual = digests.take()
            assert {seed: logits[: len(expected[seed])] for seed, logits in actual.items()} == expected


def test_a_copy_drafts_with_the_text_s_adapter(adapters: dict[str, Path]) -> None:
    """The model as its own copy: all that it writes ahead with the adapter comes true."""
    with Moss.load(random_folder(SMALL), memory="2GiB", draft="off", adapters=adapters) as moss:
        moss.engine._copy = DraftCopy(moss.model, DraftPace(), 5, adaptive=False)
        generation = moss.generate(PROMPTS[5], max_new_tokens=12, temperature=0, adapter="all")
        list(generation)
        assert generation.stats.drafted == generation.stats.accepted > 0


def test_what_was_read_with_one_adapter_is_no_other_s(adapters: dict[str, Path]) -> None:
    """Pages in the cache, and those that outlive the process: after the same text with each adapter, its logits are still those
    of a model that has read nothing else."""
    folder, text = random_folder(SMALL), [7 * number % 1900 for number in range(200)]

    def last_logits(moss: Moss, name: str | None) -> np.ndarray:
        session = moss.session(adapter=name)
        session.extend(text)
        session.keep_beginning(192)
        logits: list[np.ndarray] = []
        choose = moss.engine._deliver

        def noted(part, rows, flight):  # type: ignore[no-untyped-def]
            logits.extend(rows[-1:])
            choose(part, rows, flight)

        moss.engine._deliver = noted  # type: ignore[method-assign]
        generation = moss._answer(session, [5], GREEDY, 1, None, None, begin=False)
        list(generation)
        moss.engine._deliver = choose  # type: ignore[method-assign]
        return logits[-1][-1]

    expected = {}
    for name in NAMES:
        with Moss.load(folder, memory="2GiB", adapters=adapters, prompt_cache=0) as moss:
            expected[name] = last_logits(moss, name)
    assert len({logits.tobytes() for logits in expected.values()}) == len(NAMES)
    for turn in range(2):  # the second one finds what the first has kept
        with Moss.load(folder, memory="2GiB", adapters=adapters, prompt_cache="64MiB") as moss:
            for name in NAMES:
                assert np.array_equal(last_logits(moss, name), expected[name]), (turn, name)
                assert np.array_equal(last_logits(moss, name), expected[name])
    # Another adapter of the same name and shape has pages of its own.
    other = random_adapter(adapters["all"].parent / "other", SMALL, SETTINGS["all"], 99)
    with Moss.load(folder, memory="2GiB", adapters={"all": other}, prompt_cache=0) as moss:
        fresh = last_logits(moss, "all")
    with Moss.load(folder, memory="2GiB", adapters={"all": other}, prompt_cache="64MiB") as moss:
        assert np.array_equal(last_logits(moss, "all"), fresh)
    assert not np.array_equal(fresh, expected["all"])


@pytest.mark.parametrize(
    "name", ["all", *(pytest.param(name, marks=pytest.mark.long) for name in ("last", "qkv"))]
)
def test_running_with_an_adapter_is_running_what_it_was_merged_into(
    name: str, adapters: dict[str, Path], tmp_path: Path
) -> None:
    """Merged weights are rounded to float16 once: a weight moves by 2^-11 of itself at most, and what is rounded apart adds up as
    noise does. Logits differ by a few thousandths of their spread, and by far less than without the adapter."""
    folder = random_folder(SMALL)
    command = [sys.executable, "-P", "-m", "moss_jt", "merge", str(folder), str(adapters[name]), "--out"]
    subprocess.run([*command, str(tmp_path / "merged")], check=True, capture_output=True)
    text = [7 * number % 1900 for number in range(100)]
    with Moss.load(folder, memory="2GiB", adapters=adapters) as moss:
        own, base = moss.logits(text, adapter=name), moss.logits(text)
    with Moss.load(tmp_path / "merged", memory="2GiB") as moss:
        merged = moss.logits(text)
    spread = merged.std()
    assert np.sqrt(((own - merged) ** 2).mean()) <= 2e-3 * spread
    assert np.abs(own - merged).max() <= 1e-2 * spread
    assert np.abs(base - merged).max() >= 0.1 * spread


def test_the_plan_counts_adapters(adapters: dict[str, Path]) -> None:
    folder = random_folder(SMALL)
    files = AdapterFiles(SMALL, adapters)
    parameters = {
        name: sum(array.size for array in read_tensors(path / WEIGHTS).values())
        for name, path in adapters.items()
    }
    assert 0 <= files.n_bytes - 4 * sum(parameters.values()) <= 64 * 2 * SMALL.n_layer * len(TARGETS) * 3
    with Moss.load(folder, memory="2GiB") as moss:
        without = moss.plan
    with Moss.load(folder, memory="2GiB", adapters=adapters) as moss:
        assert moss.plan.adapter_bytes == files.n_bytes
        assert moss.plan.workspace_bytes - without.workspace_bytes == 4 * 2 * 8 * moss.plan.pass_tokens
        fixed = without.peak_bytes - without.footprint_bytes
        grown = moss.plan.peak_bytes - moss.plan.footprint_bytes - fixed
        assert grown == files.n_bytes + moss.plan.workspace_bytes - without.workspace_bytes
    with pytest.raises(MossError, match="for adapters"):
        Moss.load(folder, memory=without.footprint_bytes, adapters=adapters)


def test_names_of_adapters(adapters: dict[str, Path], tmp_path: Path) -> None:
    path = adapters["all"]
    assert named_folders(path) == {"all": path} == named_folders([str(path)])
    assert named_folders([f"mine={path}", path]) == {"mine": path, "all": path}
    (tmp_path / "a=b").mkdir()
    assert named_folders(str(tmp_path / "a=b")) == {"a=b": tmp_path / "a=b"}
    for given in ([path, path], {"": path}, {"a:b": path}, {"x" * (MOST_NAME + 1): path}, {"a b": path}):
        with pytest.raises(MossError, match="called"):
            named_folders(given)  # type: ignore[arg-type]
    with pytest.raises(MossError, match="is no adapter"):
        Moss.load(random_folder(SMALL), adapters=[tmp_path])
    with Moss.load(random_folder(SMALL), memory="2GiB", adapters=path) as moss:
        for call in (moss.generate, moss.logits, moss.begin):
            with pytest.raises(MossError, match=r"no adapter 'x'.*all"):
                call([1], *([GREEDY, 1] if call == moss.begin else []), adapter="x")


Change = dict[str, np.ndarray]


def damaged(good: Path, folder: Path, name: str) -> Path:
    """A copy with something wrong: see the test."""
    folder.mkdir()
    fields, tensors = json.loads((good / CONFIG).read_text()), read_tensors(good / WEIGHTS)
    first = next(iter(tensors))
    if name == "huge rank":
        fields["r"] = 1 << 20
    elif name == "other rank":
        fields["r"] = 1024
    elif name == "NaN":
        tensors[first] = np.full_like(tensors[first], np.nan)
    elif name == "integers":
        tensors[first] = tensors[first].astype(np.int32)
    elif name == "missing":
        del tensors[first]
    elif name == "foreign":
        tensors["base_model.model.lm_head.weight"] = tensors[first]
    elif name == "magnitudes":
        tensors[first.replace("lora_A.weight", "lora_magnitude_vector")] = tensors[first]
    elif name == "layer beyond":
        tensors[first.replace("h.0.", "h.9999.")] = tensors.pop(first)
    elif name == "alpha":
        fields["lora_alpha"] = float("inf")
    elif name == "activated":
        fields["alora_invocation_tokens"] = [1]
    elif name == "residual":
        fields["init_lora_weights"] = "pissa_niter_4"
    (folder / CONFIG).write_text(json.dumps(fields))
    write_tensors(folder / WEIGHTS, tensors, {})
    if name == "cut":
        (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:-5])
    elif name == "pickle":
        (folder / WEIGHTS).rename(folder / "adapter_model.bin")
    elif name == "no json":
        (folder / CONFIG).write_text("[")
    return folder


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("huge rank", "rank of 1048576"),
        ("other rank", "this model needs floats of shape"),
        ("NaN", "no numbers"),
        ("integers", "I32 of shape"),
        ("missing", "is missing"),
        ("foreign", "lm_head"),
        ("magnitudes", "lora_magnitude_vector"),
        ("layer beyond", "blocks"),
        ("alpha", "lora_alpha"),
        ("activated", "alora_invocation_tokens"),
        ("residual", "init_lora_weights"),
        ("cut", "cut short"),
        ("pickle", "pickle"),
        ("no json", "JSON"),
    ],
)
def test_hostile_files_end_in_one_clear_line(
    name: str, reason: str, adapters: dict[str, Path], tmp_path: Path
) -> None:
    folder = damaged(adapters["all"], tmp_path / "bad", name)
    with pytest.raises(MossError, match=reason) as caught:
        AdapterFiles(SMALL, folder).load()
    assert "\n" not in str(caught.value)


def test_an_adapter_of_another_model_is_refused(adapters: dict[str, Path]) -> None:
    config: MossConfig = open_store(random_folder(SMALL)).config
    other = config.__class__(**{**vars(config), "n_embd": 256, "n_inner": 1024})
    with pytest.raises(MossError, match="belongs to another model"):
        AdapterFiles(other, adapters["qkv"])
    shallow = config.__class__(**{**vars(config), "n_layer": 3})
    with pytest.raises(MossError, match="blocks"):
        AdapterFiles(shallow, adapters["qkv"])
