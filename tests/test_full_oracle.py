"""All weights learn as with torch in float32: the loss, every gradient, twenty steps of each optimizer, and the checkpoint."""

import json
from pathlib import Path

import numpy as np
import pytest

from moss_jt.kernels.cpu.training import CpuTrainingOperators
from moss_jt.store.architecture import HEAD_WEIGHT
from moss_jt.store.locations import tiny_checkpoint
from moss_jt.store.model_folder import open_store, read_tensor
from moss_jt.store.qkv_order import head_runs
from moss_jt.train.full_step import FullModel
from moss_jt.train.fused_optimizers import OPTIMIZERS, OptimizerName
from moss_jt.train.masked_samples import TokenSample
from moss_jt.train.master_weights import EMBEDDING, Masters
from tests.support.models import convert_checkpoint
from tests.support.oracles import run_oracle

ORACLE = Path(__file__).parent / "oracle" / "full.py"
CASES: dict[str, OptimizerName] = {"adamw": "adamw", "lomo": "lomo", "adalomo": "adalomo", "tied": "adamw"}
TOLERANCE = 1e-3


class Case:
    """What the oracle computed, and our model as it began."""

    def __init__(self, folder: Path, name: str) -> None:
        self.expected = np.load(folder / f"{name}.npz")
        self.optimizer = CASES[name]
        self.settings = json.loads((folder / "settings.json").read_text())[name]
        self.store = open_store(convert_checkpoint(folder / name, folder / f"{name}-store"))
        cuts = np.cumsum(self.expected["lengths"])[:-1]
        parts = zip(*(np.split(self.expected[each], cuts) for each in ("ids", "targets")), strict=True)
        self.samples = [TokenSample(*both) for both in parts]

    def model(self, batch_tokens: int = 64, keeps: bool = True) -> FullModel:
        masters = Masters.of_store(self.store, self.settings["tied"])
        optimizer = OPTIMIZERS[self.optimizer](masters, self.settings["decay"])
        operators = CpuTrainingOperators(masters.config)
        return FullModel(masters, operators, optimizer, batch_tokens, keeps, False, 1.0)

    def theirs(self, kind: str, name: str) -> np.ndarray:
        """torch's ``gradient`` or ``last`` of a tensor, in our order of rows."""
        value = self.expected[f"{kind} {name}"]
        order = np.concatenate([np.arange(a, a + n) for a, n in head_runs(self.store.config)])
        return value[order] if name.endswith("qkv_proj.weight") else value


@pytest.fixture(scope="module")
def oracle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("peft")  # and with it torch and transformers
    folder = tmp_path_factory.mktemp("full")
    run_oracle(ORACLE, folder, tiny_checkpoint())
    return folder


@pytest.fixture(scope="module", params=CASES)
def case(request: pytest.FixtureRequest, oracle: Path) -> Case:
    return Case(oracle, request.param)


def test_loss_and_every_gradient_are_torch_s(case: Case) -> None:
    model = case.model()
    result, gradients = model.gradients(case.samples)
    assert abs(result.loss - case.expected["losses"][0]) <= TOLERANCE * case.expected["losses"][0]
    assert gradients.keys() == model.masters.tensors.keys()
    for name, gradient in gradients.items():
        theirs = case.theirs("gradient", name)
        assert np.abs(gradient - theirs).max() <= TOLERANCE * np.abs(theirs).max(), name


def test_twenty_steps_are_torch_s(case: Case) -> None:
    model = case.model()
    before = {name: tensor.copy() for name, tensor in model.masters.tensors.items()}
    for number, expected in enumerate(case.expected["losses"], 1):
        result = model.step(case.samples, case.settings["rate"], number)
        assert abs(result.loss - expected) <= TOLERANCE * expected, number
    apart = moved = 0.0
    for name, tensor in model.masters.tensors.items():
        last = case.theirs("last", name).astype(np.float64)
        apart += np.square(tensor - last).sum()
        moved += np.square(last - before[name]).sum()
    assert np.sqrt(apart) <= 2e-3 * np.sqrt(moved)


@pytest.mark.long
def test_batches_of_any_size_and_computing_again_give_the_same_gradients(case: Case) -> None:
    one = case.model(10_000).gradients(case.samples)[1]
    for batch_tokens, keeps in ((1, True), (64, False)):
        other = case.model(batch_tokens, keeps).gradients(case.samples)[1]
        for name, gradient in one.items():
            assert np.abs(other[name] - gradient).max() <= 1e-5 * np.abs(gradient).max(), name


def test_a_checkpoint_is_the_model(case: Case, tmp_path: Path) -> None:
    model = case.model()
    model.step(case.samples, case.settings["rate"], 1)
    model.masters.write(tmp_path / "checkpoint", case.store.tokenizer_path)
    again = open_store(convert_checkpoint(tmp_path / "checkpoint", tmp_path / "store"))
    assert again.config == case.store.config
    masters = Masters.of_store(again, case.settings["tied"])
    assert np.array_equal(masters.values, model.masters.values.astype(np.float16).astype(np.float32))
    head = read_tensor(again.head, HEAD_WEIGHT)
    tied = np.array_equal(head, masters.tensors[EMBEDDING].astype(np.float16))
    assert tied == case.settings["tied"]
