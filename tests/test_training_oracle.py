"""Adapters learn as with torch and peft in float32: loss, every gradient, twenty steps, and files in both directions."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moss_jt import Moss
from moss_jt.errors import MossError
from moss_jt.plan.placement import plan_here
from moss_jt.store.architecture import BLOCK
from moss_jt.store.config import MossConfig
from moss_jt.store.locations import tiny_checkpoint
from moss_jt.store.model_folder import Store, open_store
from moss_jt.store.qkv_order import head_runs
from moss_jt.train.load import load_training
from moss_jt.train.lora import Adapter
from moss_jt.train.masked_samples import TokenSample
from moss_jt.train.model import TrainingModel
from moss_jt.train.optimizer import AdamW, clip
from moss_jt.train.peft_files import NAMES, read_adapter, write_adapter
from moss_jt.train.step_memory import Keeping, TrainingNeeds
from tests.support.models import convert_checkpoint
from tests.support.oracles import run_oracle

ORACLE = Path(__file__).parent / "oracle" / "lora.py"
CASES = ("all", "qkv", "last")
TOLERANCE = 1e-3


class Case:
    """What the oracle computed, and our model with the adapter that it began with."""

    def __init__(self, folder: Path, name: str) -> None:
        self.folder, self.name = folder, name
        self.expected = np.load(folder / f"{name}.npz")
        self.settings = json.loads((folder / "settings.json").read_text())
        self.store = open_store(convert_checkpoint(folder / name, folder / f"{name}-store"))
        ends = np.cumsum(self.expected["lengths"])
        ids, targets = (
            np.split(self.expected["ids"], ends[:-1]),
            np.split(self.expected["targets"], ends[:-1]),
        )
        self.samples = [TokenSample(*both) for both in zip(ids, targets, strict=True)]

    def adapter(self, which: str) -> Adapter:
        return read_adapter(self.folder / f"{self.name}-{which}", self.store.config)

    def gradient(self, adapter: Adapter) -> dict[tuple[int, str, str], np.ndarray]:
        """torch's, by block, target and A or B, in our order of rows."""
        order = np.concatenate([np.arange(a, a + n) for a, n in head_runs(self.store.config)])
        gradients = {}
        for layer, target in adapter.pairs:
            for part in "AB":
                key = f"gradient base_model.model.transformer.h.{layer}.{NAMES[target]}.lora_{part}.weight"
                value = self.expected[key]
                gradients[layer, target, part] = value[order] if target == "qkv" and part == "B" else value
        return gradients


def model_of(
    store: Store, adapter: Adapter, tmp_path: Path, batch_tokens: int = 64, keeps: bool = False, **limits: Any
) -> TrainingModel:
    keeping = Keeping(in_memory=store.config.n_layer if keeps else 0)
    needs = TrainingNeeds(store.config, 256, batch_tokens, len(adapter.values), keeping)
    plan = plan_here(store, needs, limits.get("memory"), 1)
    return load_training(store, plan, tmp_path, adapter, needs, tmp_path)


@pytest.fixture(scope="module")
def oracle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("peft")
    folder = tmp_path_factory.mktemp("lora")
    run_oracle(ORACLE, folder, tiny_checkpoint())
    return folder


@pytest.fixture(scope="module", params=CASES)
def case(request: pytest.FixtureRequest, oracle: Path) -> Case:
    return Case(oracle, request.param)


@pytest.mark.parametrize("keeps", [False, True])
def test_loss_and_every_gradient_are_torch_s(case: Case, keeps: bool, tmp_path: Path) -> None:
    adapter = case.adapter("first")
    model = model_of(case.store, adapter, tmp_path, keeps=keeps)
    result, gradient = model.step(case.samples)
    assert result.targets == case.expected["targets"].sum()
    assert abs(result.loss - case.expected["losses"][0]) <= TOLERANCE * case.expected["losses"][0]
    assert model.evaluate(case.samples) == result
    views = adapter.pairs_of(gradient)
    for (layer, target, part), expected in case.gradient(adapter).items():
        own = views[layer, target]["AB".index(part)]
        error = np.abs(own - expected).max() / np.abs(expected).max()
        assert error <= TOLERANCE, (layer, target, part, error)


def test_twenty_steps_are_torch_s(case: Case, tmp_path: Path) -> None:
    adapter = case.adapter("first")
    model = model_of(case.store, adapter, tmp_path)
    optimizer = AdamW(len(adapter.values), case.settings["decay"])
    for expected in case.expected["losses"]:
        result, gradient = model.step(case.samples)
        assert abs(result.loss - expected) <= TOLERANCE * expected
        clip(gradient, case.settings["clip"])
        optimizer.step(adapter.values, gradient, case.settings["lr"])
    # Adam moves a value whose gradient is nearly nothing by its sign: what all of them did is compared.
    last = case.adapter("last").values
    moved, apart = last - case.adapter("first").values, adapter.values - last
    assert np.sqrt((apart**2).mean()) <= 1e-3 * np.sqrt((moved**2).mean())


def test_batches_of_any_size_give_the_same_gradient(case: Case, tmp_path: Path) -> None:
    results = []
    for batch_tokens in (1, 64, 10_000):
        adapter = case.adapter("first")
        results.append(model_of(case.store, adapter, tmp_path, batch_tokens).step(case.samples)[1])
    scale = np.abs(results[0]).max()
    assert all(np.abs(other - results[0]).max() <= 1e-5 * scale for other in results[1:])


def test_an_adapter_that_we_write_is_the_one_that_peft_wrote(case: Case, tmp_path: Path) -> None:
    adapter = case.adapter("last")
    write_adapter(tmp_path / "again", adapter, "a model")
    again = read_adapter(tmp_path / "again", case.store.config)
    assert np.array_equal(again.values, adapter.values)
    assert again.settings == adapter.settings
    ours, theirs = (
        json.loads((folder / "adapter_config.json").read_text())
        for folder in (tmp_path / "again", case.folder / f"{case.name}-last")
    )
    assert set(ours["target_modules"]) == set(theirs["target_modules"])
    assert (ours["r"], ours["lora_alpha"]) == (theirs["r"], theirs["lora_alpha"])
    files = [
        folder / "adapter_model.safetensors"
        for folder in (tmp_path / "again", case.folder / f"{case.name}-last")
    ]
    from safetensors.numpy import load_file

    mine, peft = map(load_file, files)
    assert mine.keys() == peft.keys() and all(np.array_equal(mine[key], peft[key]) for key in mine)


def test_kept_or_computed_again_is_the_same_to_the_bit(case: Case, tmp_path: Path) -> None:
    gradients = [
        model_of(case.store, case.adapter("first"), tmp_path, keeps=keeps).step(case.samples)[1]
        for keeps in (False, True)
    ]
    assert np.array_equal(*gradients)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"use_dora": True}, "use_dora"),
        ({"bias": "all"}, "bias"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"rank_pattern": {"qkv": 3}}, "rank_pattern"),
        ({"peft_type": "IA3"}, "only LORA"),
        ({"r": "4"}, "r is 4"),
        ({"r": 5}, "this model needs"),
    ],
)
def test_what_is_not_done_is_refused_by_name(
    oracle: Path, change: dict[str, Any], reason: str, tmp_path: Path
) -> None:
    config = MossConfig.from_json(json.loads((oracle / "qkv" / "config.json").read_text()))
    folder = tmp_path / "adapter"
    folder.mkdir()
    fields = json.loads((oracle / "qkv-first" / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(fields | change))
    (folder / "adapter_model.safetensors").write_bytes(
        (oracle / "qkv-first" / "adapter_model.safetensors").read_bytes()
    )
    with pytest.raises(MossError, match=reason):
        read_adapter(folder, config)


def test_every_target_is_a_matrix_of_a_block() -> None:
    assert set(NAMES) == {tensor.field for tensor in BLOCK if tensor.is_matrix}


def size_of(logits: np.ndarray) -> float:
    return float(np.sqrt(np.mean(np.square(logits, dtype=np.float64))))


def test_what_peft_learned_runs_here_with_the_same_logits(case: Case) -> None:
    """Without being merged: torch's logits in float32 over the same float16 base. Ours have keys and values in float16."""
    adapter = case.folder / f"{case.name}-last"
    first = case.samples[0].token_ids.tolist()
    with Moss.load(case.store.path, memory="2GiB", adapters=adapter) as moss:
        actual, base = moss.logits(first, adapter=adapter.name), moss.logits(first)
    expected = case.expected["logits"]
    assert size_of(actual - expected) <= TOLERANCE * size_of(expected)
    assert np.abs(actual - expected).max() <= 2 * TOLERANCE * np.abs(expected).max()
    assert size_of(base - expected) >= 10 * TOLERANCE * size_of(expected)


@pytest.mark.long
def test_what_is_learned_here_has_the_same_logits_in_peft(oracle: Path, tmp_path: Path) -> None:
    """Twenty steps of ours, as files; peft loads them over the same checkpoint, in a process of its own."""
    asked = []
    for name in CASES:
        case = Case(oracle, name) if not (oracle / f"{name}-store").exists() else None
        store = open_store(oracle / f"{name}-store") if case is None else case.store
        adapter = read_adapter(oracle / f"{name}-first", store.config)
        model = model_of(store, adapter, tmp_path)
        expected = np.load(oracle / f"{name}.npz")
        length = int(expected["lengths"][0])
        sample = TokenSample(expected["ids"][:length], expected["targets"][:length])
        optimizer = AdamW(len(adapter.values), 0.1)
        for _ in range(5):
            optimizer.step(adapter.values, model.step([sample])[1], 1e-2)
        write_adapter(tmp_path / name, adapter, "a model")
        with Moss.load(store.path, memory="2GiB", adapters=tmp_path / name) as moss:
            ours = moss.logits(sample.token_ids.tolist(), adapter=name)
        np.savez(tmp_path / f"{name}.npz", ids=sample.token_ids, logits=ours)
        asked.append(name)
    printed = run_oracle(ORACLE.with_name("lora_logits.py"), oracle, tmp_path, *asked)
    errors = json.loads(printed.splitlines()[-1])
    assert set(errors) == {*CASES} and all(error <= TOLERANCE for error in errors.values()), errors
