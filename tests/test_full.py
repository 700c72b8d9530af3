"""All of a model learns: the same from the same seed, whatever interrupts it and however many threads; and what becomes of it."""

import json
import signal
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moss_jt import Moss
from moss_jt.errors import MossError
from moss_jt.kernels.cpu.training import CpuTrainingOperators
from moss_jt.store.model_folder import open_store
from moss_jt.train.api import full_needs, start_full
from moss_jt.train.course import Course, CourseSettings
from moss_jt.train.curve import MOST_POINTS, loss_curve
from moss_jt.train.dataset import DataReport, Dataset
from moss_jt.train.finetune import LearningSettings, Training
from moss_jt.train.full_step import FullModel, sums_by_row
from moss_jt.train.fused_optimizers import OPTIMIZERS, FullSettings, OptimizerName
from moss_jt.train.master_weights import EMBEDDING, Masters, parameters_of
from moss_jt.train.tensorboard_log import EventFile
from tests.support.models import tiny_model_folder
from tests.support.random_models import SMALL, random_folder
from tests.test_finetune import samples

TINY = replace(SMALL, n_embd=64, n_inner=256, n_layer=2, vocab_size=512)
RATES: dict[OptimizerName, float] = {"adalomo": 2e-2, "adamw": 2e-3, "lomo": 0.3}


def training(out: Path, optimizer: OptimizerName = "adalomo", steps: int = 6, **more: Any) -> Training:
    data = Dataset(samples(12, 512), samples(3, 512, seed=1), DataReport())
    return start_full(
        open_store(random_folder(TINY)),
        data,
        out,
        full=FullSettings(optimizer),
        course=CourseSettings(steps=steps, step_tokens=100),
        learning=LearningSettings(RATES[optimizer], evaluate_every=2, **more),
        memory="4GiB",
    )


def values(run: Training) -> np.ndarray:
    return run._learner.arrays["values"]


@pytest.mark.parametrize(
    "optimizer",
    ["adalomo", *(pytest.param(name, marks=pytest.mark.long) for name in OPTIMIZERS if name != "adalomo")],
)
def test_a_training_goes_on_with_the_same_bits(optimizer: OptimizerName, tmp_path: Path) -> None:
    straight = training(tmp_path / "straight", optimizer)
    list(straight.run())
    for end in (1, 3, 6):  # the first two end in the middle of what comes after a state
        run = training(tmp_path / "cut", optimizer)
        list(islice(run.run(), end))
    for name, array in straight._learner.arrays.items():
        assert np.array_equal(run._learner.arrays[name], array), name
    assert run.state == straight.state
    for each in ("last", "best"):
        ours, theirs = (tmp_path / side / each / "model.safetensors" for side in ("cut", "straight"))
        assert ours.read_bytes() == theirs.read_bytes()
    with pytest.raises(MossError, match="course differ"):
        training(tmp_path / "cut", optimizer, steps=7)


@pytest.mark.parametrize(
    ("interrupted", "kept"),
    [("evaluate", 4), ("gradient", 3), ("update", 2)],
)
def test_an_interruption_loses_no_step_that_is_whole(
    interrupted: str, kept: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Step 2 is written; then comes the interruption, in step 4 or in what follows it."""
    run = training(tmp_path / "out")
    seen = [values(run).copy()]
    for _ in islice(run.run(), 3):
        seen.append(values(run).copy())

    def interrupt(*_: object) -> None:
        values(run)[0] = 1e3 if interrupted == "update" else values(run)[0]
        raise KeyboardInterrupt

    model = run._learner.model
    place = {
        "evaluate": (run, "_evaluate"),
        "gradient": (model._block, "back"),
        "update": (model.optimizer, "update"),
    }
    monkeypatch.setattr(*place[interrupted], interrupt)
    with pytest.raises(KeyboardInterrupt):
        list(run.run())
    seen.append(values(run).copy())
    run.keep()
    again = training(tmp_path / "out")
    assert again.state.step == kept and np.array_equal(values(again), seen[kept])


@pytest.mark.long
def test_one_thread_and_two_learn_the_same_bits(tmp_path: Path) -> None:
    script = (
        "import hashlib, sys; from pathlib import Path; from tests.test_full import training, values\n"
        "run = training(Path(sys.argv[1])); list(run.run())\n"
        "print(hashlib.sha256(values(run).tobytes()).hexdigest())"
    )
    digests = set()
    for threads in ("1", "2"):
        command = [
            "env",
            f"OMP_NUM_THREADS={threads}",
            f"OPENBLAS_NUM_THREADS={threads}",
            sys.executable,
            "-c",
        ]
        command += [script, str(tmp_path / threads)]
        root = Path(__file__).resolve().parents[1]
        done = subprocess.run(command, capture_output=True, text=True, cwd=root, check=False)
        assert done.returncode == 0, done.stderr
        digests.add(done.stdout.strip())
    assert len(digests) == 1


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_it_learns(optimizer: OptimizerName, tmp_path: Path) -> None:
    losses = [progress.result.loss for progress in training(tmp_path, optimizer, steps=15).run()]
    assert np.mean(losses[-5:]) < 0.98 * np.mean(losses[:5])


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_gathered_gradients_make_the_same_bits(optimizer: OptimizerName) -> None:
    learned = []
    for gathers in (False, True):
        masters = Masters.random(TINY, 1)
        rule = OPTIMIZERS[optimizer](masters, 0.05)
        model = FullModel(masters, CpuTrainingOperators(TINY), rule, 64, True, gathers, 0.1)  # it does clip
        for number in (1, 2, 3):
            model.step(samples(4, 512, seed=number), RATES[optimizer], number)
        learned.append(masters.values)
    assert np.array_equal(*learned)


def test_gradients_are_gathered_where_there_is_memory_for_them() -> None:
    whole = full_needs(SMALL, 64, FullSettings(), CourseSettings())
    assert whole.within(whole.bytes(2), 2) == whole
    lean = whole.within(whole.bytes(2) - 1, 2)
    assert lean == replace(whole, gathers=False) and whole.bytes(2) - lean.bytes(2) == 4 * whole.parameters
    assert not lean.within(lean.bytes(2) - 1, 2).keeps


def test_a_loss_that_is_no_number_changes_nothing(tmp_path: Path) -> None:
    run = training(tmp_path / "out")
    list(islice(run.run(), 2))
    values(run)[-1] = np.nan  # of the final norm
    before = values(run).copy()
    with pytest.raises(MossError, match="blown up"):
        list(run.run())
    assert np.array_equal(values(run), before, equal_nan=True)
    assert np.isfinite(values(training(tmp_path / "out"))).all()


def test_a_random_model_is_the_same_from_the_same_seed() -> None:
    one, same, other = (
        Masters.random(TINY, seed, tied) for seed, tied in ((1, False), (1, False), (2, False))
    )
    assert np.array_equal(one.values, same.values) and not np.array_equal(one.values, other.values)
    assert 0.019 < one.tensors[EMBEDDING].std() < 0.021 and parameters_of(TINY) == len(one.values)
    tied = Masters.random(TINY, 1, tied=True)
    assert tied.head == EMBEDDING and len(tied.values) == len(one.values) - TINY.vocab_size * TINY.n_embd


def test_what_cannot_learn_as_a_whole_is_refused(tmp_path: Path) -> None:
    with pytest.raises(MossError, match=r"int4.*leave out --full"):
        Masters.of_store(open_store(random_folder(SMALL, 4)))
    with pytest.raises(MossError, match="cannot be tied"):
        Masters.of_store(open_store(random_folder(TINY)), tied=True)
    course, data = CourseSettings(), Dataset(samples(2, 512), [], DataReport())
    with pytest.raises(MossError, match="learning all weights of this model takes"):
        start_full(
            open_store(random_folder(TINY)),
            data,
            tmp_path,
            full=FullSettings(),
            course=course,
            learning=LearningSettings(),
            memory="100MiB",
        )


def test_adamw_needs_three_times_the_weights_and_adalomo_one() -> None:
    needs = {
        name: full_needs(SMALL, 64, FullSettings(name), CourseSettings()).bytes(2) for name in OPTIMIZERS
    }
    assert needs["adamw"] - needs["adalomo"] == 2 * 4 * parameters_of(SMALL)
    assert needs["lomo"] == needs["adalomo"] > 1.5 * 4 * parameters_of(SMALL)


def test_rows_are_added_up_where_they_belong() -> None:
    rows = np.array([3, 0, 3, 5, 0, 3], np.int32)
    values = np.arange(12, dtype=np.float32).reshape(6, 2)
    expected = np.zeros((7, 2), np.float32)
    np.add.at(expected, rows, values)
    assert np.array_equal(sums_by_row(rows, values, 7), expected)


def test_samples_can_come_in_their_order() -> None:
    course = Course([60, 60, 30], CourseSettings(epochs=2, step_tokens=100, in_order=True))
    assert list(course.steps_from(0)) == [[0], [1, 2], [0], [1, 2]]


def test_the_curve_is_a_picture_of_the_log() -> None:
    log: list[dict[str, Any]] = [{"step": step, "loss": 8 / step} for step in range(1, 3001)]
    log += [
        {"step": 1000, "loss": 3.25, "evaluation": True},
        {"step": "x"},
        {"step": 5, "loss": float("nan")},
    ]
    root = ElementTree.fromstring(loss_curve(log))
    name = "{http://www.w3.org/2000/svg}"
    learned, judged = root.findall(f"{name}polyline")
    assert MOST_POINTS / 2 < len(learned.attrib["points"].split()) <= MOST_POINTS
    assert len(judged.attrib["points"].split()) == len(root.findall(f"{name}circle")) == 1
    x, y = map(float, judged.attrib["points"].split(","))
    assert 60 < x < 700 and 20 < y < 360
    assert {"0", "1500", "3000", "step"} <= {text.text for text in root.findall(f"{name}text")}
    odd = ElementTree.fromstring(loss_curve([{"step": 425, "loss": 1.0}]))
    assert {"0", "212", "425"} <= {text.text for text in odd.findall(f"{name}text")}
    assert ElementTree.fromstring(loss_curve([])).tag == f"{name}svg"


def test_tensorboard_reads_the_log(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    file = EventFile(tmp_path)
    log: list[dict[str, Any]] = [{"step": 1, "loss": 2.5, "accuracy": 0.25, "lr": 1e-3, "tokens": 7}]
    file.write(log)
    log += [{"step": 2, "loss": 2.0}, {"step": 2, "loss": 3.0, "evaluation": True}]
    file.write(log)
    events = EventAccumulator(str(tmp_path)).Reload()
    assert [(event.step, event.value) for event in events.Scalars("training/loss")] == [(1, 2.5), (2, 2.0)]
    assert [(event.step, event.value) for event in events.Scalars("evaluation/loss")] == [(2, 3.0)]
    EventFile(tmp_path).write(log[:1])
    assert len(list(tmp_path.iterdir())) == 1


def command_for(folder: Path, out: Path) -> list[str]:
    lines = [
        json.dumps({"instruction": f"What is {n} plus {n}?", "output": f"It is {2 * n}."}) for n in range(40)
    ]
    (folder / "data.jsonl").write_text("\n".join(lines))
    command = [
        sys.executable,
        "-P",
        "-m",
        "moss_jt",
        "finetune",
        str(tiny_model_folder()),
        str(folder / "data.jsonl"),
    ]
    return [
        *command,
        "--full",
        "--steps",
        "12",
        "--evaluate-every",
        "4",
        "--step-tokens",
        "600",
        "--out",
        str(out),
    ]


def test_the_command_makes_a_model_that_has_learned(tmp_path: Path) -> None:
    done = subprocess.run(
        [*command_for(tmp_path, tmp_path / "out"), "--lr", "0.02"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "says:" in done.stdout and f"moss-jt chat {tmp_path / 'out' / 'model'}" in done.stdout
    losses = [json.loads(line)["loss"] for line in (tmp_path / "out" / "state" / "log.jsonl").open()]
    assert losses[-1] < losses[0]
    assert (tmp_path / "out" / "loss.svg").read_text().startswith("<svg")
    with Moss.load(tmp_path / "out" / "model") as moss:
        assert np.isfinite(moss.logits([1, 2, 3])).all()


@pytest.mark.parametrize(
    ("options", "reason"),
    [(["--full", "--rank", "4"], "--rank is of adapters"), (["--optimizer", "lomo"], "goes with --full")],
)
def test_options_of_the_other_way_are_refused(options: list[str], reason: str, tmp_path: Path) -> None:
    (tmp_path / "data.jsonl").write_text("{}")
    command = [sys.executable, "-P", "-m", "moss_jt", "finetune", "moss-tiny", str(tmp_path / "data.jsonl")]
    done = subprocess.run([*command, *options], capture_output=True, text=True, check=False)
    assert done.returncode == 2 and reason in done.stderr


@pytest.mark.long
def test_kills_at_any_moment_change_no_bit(tmp_path: Path) -> None:
    begin = time.monotonic()
    subprocess.run(command_for(tmp_path, tmp_path / "straight"), check=True, capture_output=True)
    took, draw = time.monotonic() - begin, np.random.default_rng(3)
    for _ in range(6):
        child = subprocess.Popen(
            command_for(tmp_path, tmp_path / "killed"), stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
        time.sleep(took * draw.uniform(0.3, 1.0))
        child.send_signal(signal.SIGKILL)
        child.wait()
    subprocess.run(command_for(tmp_path, tmp_path / "killed"), check=True, capture_output=True)
    for name in ("best/model.safetensors", "last/model.safetensors", "state/training.safetensors"):
        assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "straight" / name).read_bytes()
