"""A training as a whole: the same adapter from the same seed whatever interrupts it and wherever the weights are."""

import ctypes
import errno
import json
import math
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moss_jt import Moss
from moss_jt.backend.cards import Card
from moss_jt.commands.cli import main
from moss_jt.errors import MossError
from moss_jt.plan import placement, residency
from moss_jt.plan.residency import ResidencyPlan
from moss_jt.store.config import MOSS_MOON_003
from moss_jt.store.model_folder import open_store
from moss_jt.store.sizes import sizes_of_geometry, sizes_of_store
from moss_jt.train.api import planned_on_card, start
from moss_jt.train.course import Course, CourseSettings
from moss_jt.train.dataset import DataReport, Dataset
from moss_jt.train.finetune import Finetuning, LearningSettings
from moss_jt.train.frozen_front import ROWS, FrontRows, key_of
from moss_jt.train.load import load_training
from moss_jt.train.lora import Adapter, LoraSettings
from moss_jt.train.loss import StepResult
from moss_jt.train.masked_samples import TokenSample
from moss_jt.train.optimizer import AdamW, Schedule, clip
from moss_jt.train.peft_files import read_adapter
from moss_jt.train.step_estimate import card_outlook
from moss_jt.train.step_memory import CardNeeds, Keeping, TrainingNeeds
from moss_jt.train.step_time import Speeds
from tests.support.models import tiny_model_folder
from tests.support.random_models import SMALL, random_folder

LORA = LoraSettings(rank=2, alpha=4.0)
NOWHERE = Keeping()


def samples(count: int, vocabulary: int, seed: int = 0) -> list[TokenSample]:
    draw = np.random.default_rng(seed)
    made = []
    for length in draw.integers(5, 60, count):
        targets = draw.random(length) < 0.5
        targets[:2] = False, True
        made.append(TokenSample(draw.integers(0, vocabulary, length).astype(np.int32), targets))
    return made


def plan_of(folder: Path, share: float | None = None) -> ResidencyPlan:
    """A plan of this model for training: all resident, or no more than a share of the weights, buffers included."""
    store = open_store(folder)
    sizes, needs = sizes_of_store(store), TrainingNeeds(store.config, 512, 128, 10_000)
    budget = 1 << 40
    if share is not None:
        whole = residency.plan(sizes, needs, 1, budget, threads=2)
        budget = whole.peak_bytes - int((1 - share) * sum(unit.n_bytes for unit in whole.units))
    return residency.in_slabs(residency.plan(sizes, needs, 1, budget, threads=2))


def training(
    out: Path,
    folder: Path | None = None,
    share: float | None = None,
    lora: LoraSettings = LORA,
    learning: LearningSettings | None = None,
    keeping: Keeping = NOWHERE,
    front: FrontRows | None = None,
    **course: Any,
) -> Finetuning:
    folder = random_folder(SMALL) if folder is None else folder
    store = open_store(folder)
    data = Dataset(samples(12, 1000), samples(3, 1000, seed=1), DataReport())
    settings = CourseSettings(**({"steps": 6, "step_tokens": 100} | course))
    adapter = Adapter.random(store.config, lora, settings.seed)
    needs = TrainingNeeds(store.config, 512, 128, len(adapter.values), keeping)
    model = load_training(store, plan_of(folder, share), out.parent, adapter, needs, out / "state", front)
    learning = LearningSettings(learning_rate=3e-3, evaluate_every=2) if learning is None else learning
    return Finetuning(model, data, settings, learning, out, "random", {"model": "x"})


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Finetuning:
    run = training(tmp_path_factory.mktemp("whole") / "out")
    losses = [progress.result.loss for progress in run.run()]
    assert len(losses) == 6 and run.state.step == 6
    return run


def test_a_training_goes_on_with_the_same_bits(uninterrupted: Finetuning, tmp_path: Path) -> None:
    for end in (1, 2, 6):  # the first two end in the middle of what comes after a state
        run = training(tmp_path / "out")
        for _ in islice(run.run(), end):
            pass
    assert np.array_equal(run.adapter.values, uninterrupted.adapter.values)
    assert run.state == uninterrupted.state


def test_an_interruption_keeps_where_it_is(uninterrupted: Finetuning, tmp_path: Path) -> None:
    run = training(tmp_path / "out")
    list(islice(run.run(), 3))
    run.keep()
    again = training(tmp_path / "out")
    assert again.state.step == 3
    list(again.run())
    assert np.array_equal(again.adapter.values, uninterrupted.adapter.values)
    run.adapter.values[:] = 0  # as an update that was interrupted may leave them
    run._learner.updating = True
    run.keep()
    assert np.array_equal(training(tmp_path / "out").adapter.values, uninterrupted.adapter.values)


def test_streamed_weights_give_the_same_bits(uninterrupted: Finetuning, tmp_path: Path) -> None:
    for share in (0.4, 0.7):
        assert plan_of(random_folder(SMALL), share).streams
        run = training(tmp_path / f"{share}", share=share)
        list(run.run())
        assert np.array_equal(run.adapter.values, uninterrupted.adapter.values)


WAYS = [
    Keeping(in_memory=SMALL.n_layer),
    Keeping(in_memory=1, on_disk=1),
    Keeping(on_disk=SMALL.n_layer, inputs_on_disk=True),
    Keeping(inputs_on_disk=True),
]


@pytest.mark.parametrize("direct", [True, False])
def test_where_values_wait_changes_no_bit(
    uninterrupted: Finetuning, tmp_path: Path, direct: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not direct:  # as on file systems that know neither reads past the cache nor files without names
        opened = os.open

        def refusing(path: Any, flags: int, *more: Any, **options: Any) -> int:
            if flags & os.O_TMPFILE == os.O_TMPFILE:
                raise OSError(errno.EOPNOTSUPP, "no such file system")
            return opened(path, flags, *more, **options)

        monkeypatch.setattr(os, "open", refusing)
    for number, keeping in enumerate(WAYS):
        run = training(tmp_path / f"{number}", keeping=keeping, share=0.5)
        list(run.run())
        run._model.close()
        assert np.array_equal(run.adapter.values, uninterrupted.adapter.values), keeping
        assert not [
            path
            for path in (tmp_path / f"{number}" / "state").iterdir()
            if path.suffix not in (".safetensors", ".jsonl")
        ]


def test_one_thread_gives_the_bits_of_two(tmp_path: Path) -> None:
    openmp = ctypes.CDLL("libgomp.so.1")
    before, adapters = openmp.omp_get_max_threads(), []
    try:
        for threads in (2, 1):
            openmp.omp_set_num_threads(threads)
            run = training(tmp_path / f"{threads}", steps=3)
            list(run.run())
            adapters.append(run.adapter.values)
    finally:
        openmp.omp_set_num_threads(before)
    assert np.array_equal(*adapters)


def test_a_full_disk_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = training(tmp_path / "out", keeping=WAYS[2])

    def full(*_: Any) -> int:
        raise OSError(errno.ENOSPC, "no space")

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(MossError, match="disk is full"):
        list(run.run())


LAST = LoraSettings(rank=2, layers=1)


def front_of(folder: Path, tokens: int = 10_000, model: str = "x") -> FrontRows:
    return FrontRows(folder, {"model": model}, SMALL.n_embd, tokens * SMALL.n_embd * 4)


def count_blocks(run: Finetuning, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The blocks that are computed forwards from now on."""
    seen: list[int] = []
    weights = run._model._weights
    walk = weights.walk

    def counting(*given: Any) -> Any:
        for unit, value in walk(*given):
            if unit.kind == "block":
                seen.append(unit.index)
            yield unit, value

    monkeypatch.setattr(weights, "walk", counting)
    return seen


def test_the_frozen_front_is_computed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    without = training(tmp_path / "without", lora=LAST, epochs=3.0, steps=None)
    plain = [progress.result.loss for progress in without.run()]
    run = training(tmp_path / "out", lora=LAST, front=front_of(tmp_path / "front"), epochs=3.0, steps=None)
    first = len(run._course._epoch(0))
    seen = count_blocks(run, monkeypatch)
    losses, fronts = [], []
    for progress in run.run():
        losses.append(progress.result.loss)
        fronts.append(seen.count(0))
        seen.clear()
    assert losses[:first] == plain[:first]  # the same computation
    assert np.allclose(losses, plain, rtol=1e-5)
    assert all(fronts[:first]) and not any(fronts[first:])
    assert not (tmp_path / "front").exists()  # the training is over


def test_a_training_with_its_front_kept_goes_on_with_the_same_bits(tmp_path: Path) -> None:
    whole = training(tmp_path / "whole", lora=LAST, front=front_of(tmp_path / "f1"), steps=9)
    list(whole.run())
    for end in (1, 3, 2, 9):  # each begins where the last state was, whose later rows are there
        run = training(tmp_path / "out", lora=LAST, front=front_of(tmp_path / "f2"), steps=9)
        list(islice(run.run(), end))
        run._model.close()
    assert run.state.step == 9
    assert np.array_equal(run.adapter.values, whole.adapter.values)


def test_another_training_s_front_stays_when_this_one_is_refused(tmp_path: Path) -> None:
    data = Dataset(samples(12, 1000), samples(3, 1000, seed=1), DataReport())

    def started(lora: LoraSettings, width: int = SMALL.n_embd) -> Finetuning:
        store = open_store(random_folder(replace(SMALL, n_embd=width)))
        course, learning = CourseSettings(steps=6, step_tokens=100), LearningSettings(evaluate_every=2)
        return start(store, data, tmp_path, lora=lora, course=course, learning=learning, memory="4GiB")

    run = started(LAST)
    list(islice(run.run(), 3))
    run._model.close()
    rows = (tmp_path / "state" / "front" / ROWS).read_bytes()
    for lora, width in ((LAST, 64), (LoraSettings(rank=2, layers=2), SMALL.n_embd)):
        with pytest.raises(MossError, match="holds another training"):
            started(lora, width)
        assert (tmp_path / "state" / "front" / ROWS).read_bytes() == rows
    list(started(LAST).run())
    assert not (tmp_path / "state" / "front").exists()


def test_kept_rows_that_are_damaged_or_another_model_s_are_computed_again(tmp_path: Path) -> None:
    chosen = samples(3, 1000)
    draw = np.random.default_rng(1)
    rows = {key_of(one): draw.standard_normal((len(one), SMALL.n_embd)).astype(np.float32) for one in chosen}
    front = front_of(tmp_path / "front")
    front.keep(dict(list(rows.items())[:2]))
    front.keep(dict(list(rows.items())[2:]))
    front.close()
    again = front_of(tmp_path / "front")
    found = again.find(chosen)
    assert found.keys() == rows.keys() and all(np.array_equal(found[key], rows[key]) for key in rows)
    again.close()
    path, index = tmp_path / "front" / ROWS, tmp_path / "front" / "index.jsonl"
    data = bytearray(path.read_bytes())
    data[5] ^= 1
    path.write_bytes(bytes(data))
    assert front_of(tmp_path / "front").find(chosen).keys() == set(list(rows)[1:])
    whole = index.read_bytes()
    index.write_bytes(whole[:-9])  # a kill in the midst of the last line: its group is not there
    assert front_of(tmp_path / "front").find(chosen).keys() == {list(rows)[1]}
    for number in (1 << 40, 1 << 70):  # of tokens, and where they begin
        group = [[key, number, number, 0] for key in rows]
        index.write_bytes(whole.split(b"\n")[0] + b"\n" + json.dumps(group).encode() + b"\n")
        assert not front_of(tmp_path / "front").find(chosen)
    index.write_bytes(b"[" * 100_000 + whole)
    assert not front_of(tmp_path / "front").find(chosen)
    front_of(tmp_path / "front").keep(rows)
    assert not front_of(tmp_path / "front", model="y").find(chosen)


def test_rows_without_room_are_not_kept(tmp_path: Path) -> None:
    one, other = samples(2, 1000)
    front = front_of(tmp_path / "front", tokens=len(one) + len(other) - 1)
    for sample in (one, other):
        front.keep({key_of(sample): np.zeros((len(sample), SMALL.n_embd), np.float32)})
    assert front.find([one, other]).keys() == {key_of(one)}
    assert front_of(tmp_path / "front", tokens=10_000)._limit == front._limit  # as it was decided first


def test_the_best_and_the_last_adapter_are_kept(uninterrupted: Finetuning) -> None:
    out = uninterrupted._out
    log = [json.loads(line) for line in (out / "state" / "log.jsonl").read_text().splitlines()]
    judged = {record["step"]: record["loss"] for record in log if record.get("evaluation")}
    assert set(judged) == {2, 4, 6} and len(log) == 9
    last = read_adapter(out / "last", uninterrupted.adapter.config)
    assert np.array_equal(last.values, uninterrupted.adapter.values)
    best = read_adapter(out, uninterrupted.adapter.config)
    assert np.array_equal(best.values, last.values) == (min(judged, key=judged.__getitem__) == 6)


def test_another_training_s_folder_is_refused(uninterrupted: Finetuning) -> None:
    out = uninterrupted._out
    with pytest.raises(MossError, match="course differ"):
        training(out, steps=7)
    with pytest.raises(MossError, match="lora differ"):
        training(out, lora=LoraSettings(rank=3))


def test_a_loss_that_is_no_number_ends_the_training_and_what_was_good_stays(tmp_path: Path) -> None:
    run = training(tmp_path / "out")
    list(islice(run.run(), 2))
    good = read_adapter(tmp_path / "out" / "last", run.adapter.config).values
    run.adapter.values[:] = np.nan
    with pytest.raises(MossError, match=r"blown up.*--lr"):
        list(run.run())
    assert np.array_equal(read_adapter(tmp_path / "out" / "last", run.adapter.config).values, good)


def test_an_evaluation_that_is_no_number_is_no_best_adapter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first one, too, before which there is no best; and nothing that was kept is replaced."""
    run = training(tmp_path / "out")
    monkeypatch.setattr(
        run._learner, "evaluate", lambda samples: StepResult(math.nan, 0.0, 1, np.zeros(1, np.int64))
    )
    with pytest.raises(MossError, match=r"evaluation is no number any more.*--lr"):
        list(run.run())
    assert not (tmp_path / "out").exists() and training(tmp_path / "out").state.step == 0


@pytest.mark.parametrize("full", ["adapter_model.safetensors", "log.jsonl", "training.safetensors"])
def test_a_full_disk_ends_with_what_to_do_and_the_last_good_adapter_stays(
    uninterrupted: Finetuning, full: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whichever file has no room any more: what stood there stays, and the same training goes on with the same bits."""
    run = training(tmp_path / "out")
    list(islice(run.run(), 2))
    kept = {path: path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.name == full}
    sync = os.fsync

    def none_left(file: int) -> None:
        if Path(f"/proc/self/fd/{file}").readlink().name == f"{full}.new":
            raise OSError(errno.ENOSPC, "No space left on device")
        sync(file)

    monkeypatch.setattr(os, "fsync", none_left)
    with pytest.raises(MossError, match=rf"the disk is full: .*{full}.* run it again to go on"):
        list(run.run())
    assert kept and all(path.read_bytes() == data for path, data in kept.items())
    assert not [*(tmp_path / "out").rglob("*.new")]
    monkeypatch.setattr(os, "fsync", sync)
    again = training(tmp_path / "out")
    list(again.run())
    assert np.array_equal(again.adapter.values, uninterrupted.adapter.values)


def test_damaged_states_are_refused(tmp_path: Path) -> None:
    run = training(tmp_path / "out")
    list(islice(run.run(), 2))
    path = tmp_path / "out" / "state" / "training.safetensors"
    whole = path.read_bytes()
    for damaged in (whole[:100], whole[: len(whole) // 2], b"", whole.replace(b'"training"', b'"draining"')):
        path.write_bytes(damaged)
        with pytest.raises(MossError):
            training(tmp_path / "out")


def test_it_learns(tmp_path: Path) -> None:
    run = training(tmp_path / "out", steps=40, learning=LearningSettings(1e-2, evaluate_every=100))
    losses = [progress.result.loss for progress in run.run()]
    assert np.mean(losses[-5:]) < 0.9 * np.mean(losses[:5])


def test_the_last_blocks_alone_learn_the_same_way(tmp_path: Path) -> None:
    run = training(tmp_path / "out", lora=LoraSettings(rank=2, layers=2, targets=("qkv", "fc_out")))
    before = run.adapter.values.copy()
    list(run.run())
    layers = {layer for layer, _ in run.adapter.pairs}
    assert layers == {SMALL.n_layer - 2, SMALL.n_layer - 1} and (run.adapter.values != before).any()


def test_merged_is_the_model_with_the_adapter(tmp_path: Path) -> None:
    """The logits of the merged folder are those that training's forward has with the adapter."""
    folder, out = tiny_model_folder(), tmp_path / "adapter"
    run = training(out, folder, learning=LearningSettings(2e-2))
    list(run.run())
    command = [sys.executable, "-P", "-m", "moss_jt", "merge", str(folder), str(out / "last"), "--out"]
    subprocess.run([*command, str(tmp_path / "merged")], check=True, capture_output=True)
    chosen = samples(1, 1000, seed=9)
    with Moss.load(tmp_path / "merged") as moss:
        logits = moss.logits(chosen[0].token_ids.tolist())
    rows = np.flatnonzero(chosen[0].targets)
    wide = logits[rows - 1].astype(np.float64)
    losses = np.log(np.exp(wide).sum(axis=1)) - wide[np.arange(len(rows)), chosen[0].token_ids[rows]]
    assert abs(run._model.evaluate(chosen).loss - losses.mean()) <= 2e-3 * losses.mean()


def test_the_course_takes_every_sample_once_an_epoch() -> None:
    lengths = [int(n) for n in np.random.default_rng(1).integers(1, 90, 50)]
    course = Course(lengths, CourseSettings(epochs=2, step_tokens=100))
    steps = list(course.steps_from(0))
    assert len(steps) == course.total
    assert sorted(number for step in steps for number in step) == sorted([*range(50), *range(50)])
    assert all(sum(lengths[number] for number in step) <= 100 for step in steps)
    assert list(course.steps_from(7)) == steps[7:]
    assert len(list(Course(lengths, CourseSettings(steps=100)).steps_from(95))) == 5


def test_the_learning_rate_rises_and_falls() -> None:
    schedule = Schedule(1e-3, 100, 0.1)
    rates = [schedule.at(step) for step in range(100)]
    assert rates[9] < rates[10] == max(rates) == 1e-3 and rates[0] < rates[5] and 0 < rates[-1] < 1e-6
    assert rates == sorted(rates[:11]) + sorted(rates[11:], reverse=True)


def test_clipping_and_adamw_as_written_down() -> None:
    draw = np.random.default_rng(0)
    gradient = draw.standard_normal(200_000).astype(np.float32)
    length = float(np.linalg.norm(gradient.astype(np.float64)))
    assert abs(clip(gradient, 1.0) - length) < 1e-6 * length
    assert abs(np.linalg.norm(gradient.astype(np.float64)) - 1) < 1e-5
    values, exact = (np.ones(3, np.float32), np.ones(3))
    optimizer, first, second = AdamW(3, 0.1), np.zeros(3), np.zeros(3)
    for step in range(1, 6):
        g = np.array([1.0, -2.0, 0.0])
        first, second = 0.9 * first + 0.1 * g, 0.999 * second + 0.001 * g * g
        exact *= 1 - 0.01 * 0.1
        exact -= 0.01 * (first / (1 - 0.9**step)) / (np.sqrt(second / (1 - 0.999**step)) + 1e-8)
        optimizer.step(values, g.astype(np.float32), 0.01)
    assert np.allclose(values, exact, rtol=1e-5)


@pytest.mark.parametrize(
    "make",
    [
        lambda: LoraSettings(rank=0),
        lambda: LoraSettings(targets=("qvk",)),
        lambda: LoraSettings(targets=()),
        lambda: LoraSettings(layers=9).first_layer(SMALL),
        lambda: CourseSettings(epochs=0),
        lambda: CourseSettings(steps=0),
        lambda: CourseSettings(step_tokens=0),
        lambda: Schedule(0.0, 5),
        lambda: Schedule(1e-3, 0),
    ],
)
def test_impossible_settings_are_refused(make: Any) -> None:
    with pytest.raises(MossError):
        make()


@pytest.mark.parametrize(
    ("options", "code", "said"),
    [
        (["--gpu", "--full"], 1, "(--full) learn on the processor only, in its memory. Leave --gpu away"),
        (["--gpu", "--memory", "4GiB"], 2, "with --gpu give --gpu-memory and --host-memory"),
        (["--gpu-memory", "4GiB"], 2, "--gpu-memory needs --gpu"),
    ],
)
def test_what_a_card_does_not_do_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], code: int, said: str
) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["finetune", "moss-tiny", str(tmp_path), *options])
    assert stop.value.code == code
    assert said in " ".join(capsys.readouterr().err.split())


def on_card_of(n_bytes: int) -> Card:
    return Card("simulated", n_bytes, n_bytes, (8, 6), (12, 9), unified=True)


def test_a_plan_for_a_card_holds_both_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    """What streams is on the host; blocks' inputs go to the disk before weights have no room; and too little is said in a line."""
    monkeypatch.setattr(placement, "resident_memory_bytes", lambda: 0)
    monkeypatch.setattr(placement, "_held", [])
    store, course = open_store(random_folder(SMALL)), CourseSettings(steps=6, step_tokens=20_000)
    data = Dataset(samples(12, 1000), samples(3, 1000, seed=1), DataReport())
    card = on_card_of(1 << 33)

    def planned(gpu: int, host: int) -> tuple[ResidencyPlan, CardNeeds]:
        planner, needs = planned_on_card(store, data, LORA, course, card, gpu, host)
        return planner.plan(), needs

    roomy, needs = planned(1 << 33, 1 << 33)
    assert not roomy.streams and len([unit for unit in roomy.units if unit.kind == "head"]) > 1
    assert not needs.training.keeping.inputs_on_disk and roomy.host_footprint_bytes > needs.host_bytes
    tight, needs = planned(roomy.peak_bytes - 10_000, roomy.host_footprint_bytes - 1000)
    assert tight.streams and tight.peak_bytes <= tight.budget_bytes and needs.training.keeping.inputs_on_disk
    assert {unit.tier for unit in tight.units} == {"device", "host"}
    assert tight.host_budget_bytes is not None and tight.host_peak_bytes <= tight.host_budget_bytes
    with pytest.raises(MossError, match="Raise --gpu-memory to .* takes less where samples are shorter"):
        planned(40 << 20, 1 << 33)
    with pytest.raises(MossError, match="host memory is too little"):
        planned(tight.peak_bytes - 10_000, 1 << 28)


def test_moss_in_float16_learns_within_four_gibibytes_of_a_card() -> None:
    """With steps of 512 tokens; the arithmetic alone."""
    sizes = sizes_of_geometry(MOSS_MOON_003, 16)
    limits = 4 << 30, 64 << 30, Speeds(1e13, 1e9), 12e9
    outlook = card_outlook(sizes, LoraSettings(), CourseSettings(step_tokens=512), *limits)
    assert 3 << 30 < outlook.peak_bytes <= 4 << 30
    with pytest.raises(MossError, match="too little"):
        card_outlook(sizes, LoraSettings(), CourseSettings(step_tokens=512), 2 << 30, *limits[1:])


@pytest.mark.long
@pytest.mark.parametrize(("count", "more"), [(40, []), (7, ["--layers", "1"])], ids=["all", "front kept"])
def test_kills_at_any_moment_change_no_bit(tmp_path: Path, count: int, more: list[str]) -> None:
    lines = [
        json.dumps({"instruction": f"What is {n} plus {n}?", "output": f"It is {2 * n}."})
        for n in range(count)
    ]
    (tmp_path / "data.jsonl").write_text("\n".join(lines))
    command = [
        sys.executable,
        "-P",
        "-m",
        "moss_jt",
        "finetune",
        str(tiny_model_folder()),
        str(tmp_path / "data.jsonl"),
    ]
    command += ["--steps", "12", "--evaluate-every", "2", "--step-tokens", "300", *more, "--out"]
    begin = time.monotonic()
    subprocess.run([*command, str(tmp_path / "whole")], check=True, capture_output=True)
    took, draw = time.monotonic() - begin, np.random.default_rng(3)
    for _ in range(10):
        child = subprocess.Popen(
            [*command, str(tmp_path / "killed")], stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
        time.sleep(took * draw.uniform(0.3, 1.0))
        child.send_signal(signal.SIGKILL)
        child.wait()
    subprocess.run([*command, str(tmp_path / "killed")], check=True, capture_output=True)
    for name in ("adapter_model.safetensors", "last/adapter_model.safetensors", "state/training.safetensors"):
        assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
