"""A whole model as the GPU runs it, on the CPU: emulated kernels, weights through the device's ring, pinned memory and disk.

Copies are done as late as CUDA's rules allow, so that a wait that is missing gives other logits. What only a real card or the
simulated CUDA runtime (test_sim_gpu.py) can show is not shown here: Jittor's own CUDA code.
"""

import ctypes
import itertools
import random
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moss_jt import Moss
from moss_jt.backend.jittor import jt
from moss_jt.engine.draft_copy import DraftCopy
from moss_jt.engine.draft_length import DraftPace
from moss_jt.engine.engine import Engine
from moss_jt.engine.gpu_model import GpuModel
from moss_jt.engine.kv_cache import KVCache
from moss_jt.engine.model import Model
from moss_jt.engine.sampling import SamplingParams
from moss_jt.engine.sequence import Sequence as Text
from moss_jt.errors import MossError
from moss_jt.kernels.cuda.launchers import Launchers
from moss_jt.kernels.cuda.operators import CudaOperators
from moss_jt.kernels.cuda.training import CudaTrainingOperators
from moss_jt.kernels.interface import Queue, Var
from moss_jt.kernels.needs import CudaNeeds
from moss_jt.plan.placement import plan_here
from moss_jt.plan.residency import GPU_FOOTPRINT_BYTES, Copy, ResidencyPlan, in_slabs, residents_from
from moss_jt.store.config import MossConfig
from moss_jt.store.model_folder import Store, open_store
from moss_jt.store.sizes import sizes_of_store
from moss_jt.train.card import CardTrainingModel
from moss_jt.train.kept_activations import Waiting
from moss_jt.train.load import load_training
from moss_jt.train.lora import Adapter, LoraSettings
from moss_jt.train.masked_samples import TokenSample
from moss_jt.train.step_memory import Keeping, TrainingNeeds
from moss_jt.weights import gpu_units
from moss_jt.weights.file_reader import FileReader
from moss_jt.weights.gpu_units import StreamedUnits, UnifiedUnits
from moss_jt.weights.page_buffer import page_buffer
from moss_jt.weights.shared_head import copy_weights
from moss_jt.weights.unit_tensors import extent_of
from moss_jt.weights.weights import Weights
from tests.emulation.emulator import FakeCupy
from tests.support.plans import plan_gpu
from tests.support.random_models import SMALL, random_folder

TINY: MossConfig = replace(
    SMALL, vocab_size=800, n_positions=64, n_embd=128, n_layer=4, n_head=2, rotary_dim=8, n_inner=128
)
PROMPT = [5, 9, 200]
LONG = list(range(26))  # more tokens than go without cuBLAS
HOST = 4000
memories: dict[int, np.ndarray] = {}


class LateEngine:
    """Does a copy only when something waits for it, or for what was queued behind it."""

    def __init__(self) -> None:
        self.queue: deque[Callable[[], None]] = deque()
        self.recorded: dict[int, int] = {}
        self.done: dict[int, int] = {}
        self.pinned: set[int] = set()
        self.prefetched: list[int] = []

    def new_event(self) -> int:
        self.recorded[len(self.recorded)] = 0
        return len(self.recorded) - 1

    def copy(self, memory: Var, offset: int, source: np.ndarray) -> None:
        assert any(source.ctypes.data - start in range(1 << 28) for start in self.pinned), (
            "a copy from unpinned memory"
        )
        target = memories[id(memory)][offset : offset + source.nbytes]
        self.queue.append(lambda: target.__setitem__(slice(None), source))

    def record(self, event: int, queue: Queue) -> None:
        if queue is Queue.COPIES:
            self.recorded[event] += 1
            recording = self.recorded[event]
            self.queue.append(lambda: self.done.__setitem__(event, recording))

    def wait(self, queue: Queue, event: int) -> None:
        if queue is Queue.COMPUTE:
            self.synchronize(event)

    def synchronize(self, event: int) -> None:
        while self.done.get(event, 0) < self.recorded[event]:
            self.queue.popleft()()

    def pin(self, array: np.ndarray) -> None:
        self.pinned.add(array.ctypes.data)

    def unpin(self, array: np.ndarray) -> None:
        self.pinned.remove(array.ctypes.data)

    def read_mostly(self, memory: Var) -> None:
        pass

    def prefetch(self, memory: Var) -> None:
        self.prefetched.append(memory.shape[0])


engines: list[LateEngine] = []


def late_engine() -> LateEngine:
    engines.append(LateEngine())
    return engines[-1]


def host_memory(n_bytes: int) -> Var:
    """Stands for memory on the card; full of what no weight is."""
    array = page_buffer(n_bytes)[:n_bytes]
    array[:] = 0x7F
    var = jt.reuse_np_array(array)
    memories[id(var)] = array
    return var


@pytest.fixture(autouse=True)
def simulated(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(gpu_units, "CudaCopyEngine", late_engine)
    monkeypatch.setattr(gpu_units, "device_memory", host_memory)
    yield
    assert all(not engine.pinned for engine in engines), "pinned memory was left behind"
    memories.clear()
    engines.clear()


def plan_for(
    store: Store, resident: float, on_host: float, copy: Copy | None = None, cache_bits: int = 16
) -> ResidencyPlan:
    """A plan with about that share of the units on the card, and of the rest on the host."""
    sizes = sizes_of_store(store, cache_bits)
    everything = plan_gpu(sizes, 48, 1 << 40, 1 << 40, pass_tokens=32, copy=copy)
    fixed = GPU_FOOTPRINT_BYTES + everything.workspace_bytes + everything.kv_cache_bytes + sizes.small_bytes
    total = sum(unit.n_bytes for unit in everything.units)
    buffers = 0 if resident == 1 else 2 * max(sizes.block_bytes)
    budget = fixed + buffers + int(resident * total)
    if copy is not None:  # the head is on the card in any case
        budget = (
            fixed
            + buffers
            + int(resident * sum(sizes.block_bytes))
            + everything.copy_bytes
            + sizes.head_bytes
        )
    placed = plan_gpu(sizes, 48, budget, 1 << 40, pass_tokens=32, copy=copy)
    host = HOST + 2 * placed.buffer_bytes + int(on_host * placed.bytes_on("host"))
    return plan_gpu(sizes, 48, budget, host, pass_tokens=32, host_footprint_bytes=HOST, copy=copy)


def gpu_model(store: Store, plan: ResidencyPlan, unified: bool = False) -> Model:
    reader = FileReader(False, 1e9)
    units = UnifiedUnits(store, plan, reader) if unified else StreamedUnits(store, plan, reader)
    cache = KVCache(store.config, plan.context, bits=plan.sizes.cache_bits)
    operators = CudaOperators(store.config, FakeCupy())
    return GpuModel(store.config, operators, Weights(store, plan, units), cache, plan)


def answers(model: Model) -> list[np.ndarray]:
    """A prompt without logits, and some tokens after it."""
    model.forward(PROMPT, 0, "none")
    return [model.forward([7], len(PROMPT)), model.forward([11, 3], len(PROMPT) + 1, "all")]


@pytest.mark.parametrize(("bits", "cache_bits"), [(16, 16), (8, 16), (4, 16), (16, 8)])
def test_any_plan_gives_the_resident_model_s_bits(bits: int, cache_bits: int) -> None:
    store = open_store(random_folder(TINY, bits))
    resident = gpu_model(store, plan_for(store, 1, 1, cache_bits=cache_bits))
    assert not resident.weights.streams
    long = resident.forward(LONG, 0)[0]
    with Moss.load(store.path, memory="2GiB", context=48, cache_bits=cache_bits) as moss:
        reference = moss.logits(LONG)[-1]
    assert np.abs(long - reference).max() < 2e-2 * np.abs(reference).max(), "the CPU's kernels say otherwise"
    expected = answers(resident)
    resident.close()
    for on_card, on_host in ((0.5, 1.0), (0.0, 1.0), (0.3, 0.2), (0.0, 0.0)):
        plan = plan_for(store, on_card, on_host, cache_bits=cache_bits)
        tiers = {unit.tier for unit in plan.units}
        assert ("device" in tiers) == (on_card > 0) and ("disk" in tiers) == (on_host < 1)
        model = gpu_model(store, plan)
        for actual, wanted in zip(answers(model), expected, strict=True):
            np.testing.assert_array_equal(actual, wanted)
        model.close()
        model.close()


def copy_for(model: Model, copied: Store, plan: ResidencyPlan) -> DraftCopy:
    """All of it on the card, with the model's own head, over the model's cache."""
    assert isinstance(model.weights, Weights)
    weights = copy_weights(
        copied, plan, model.weights, lambda blocks: StreamedUnits(copied, blocks, FileReader(False, 1e9))
    )
    return DraftCopy(model.with_weights(weights), DraftPace(), 5, adaptive=False)


def test_a_copy_that_drafts_changes_nothing() -> None:
    """All of it on the card, with the model's own head, over the model's cache; the model streams, from the host or from disk."""
    store, copied = open_store(random_folder(TINY)), open_store(random_folder(TINY, 4))

    def answer(model: Model, copy: DraftCopy | None) -> list[int]:
        engine = Engine(model, copy=copy)
        text = Text(engine)
        text.extend(PROMPT)
        token_ids = list(text.decode(SamplingParams(temperature=1.0, seed=3), 12))
        engine.close()
        assert (text.timing.drafted > 12) == (copy is not None)
        return token_ids

    resident = gpu_model(store, plan_for(store, 1, 1))
    expected = answer(resident, None)
    resident.close()
    own = Copy(sizes_of_store(copied), CudaNeeds(copied.config, copied.bits))
    for on_card, on_host in ((0.4, 1.0), (0.0, 0.0)):
        plan = plan_for(store, on_card, on_host, own)
        assert plan.streams and plan.copy is own.sizes
        model = gpu_model(store, plan)
        copy = copy_for(model, copied, plan)
        assert answer(model, copy) == expected
        copy.close()
        model.close()


def talk(model: Model, copy: DraftCopy | None, seed: int) -> list[list[int]]:
    """Turns greedy and sampled, answers left in their midst, a text that is cut, and one more up to the context's end."""
    dice, engine = random.Random(seed), Engine(model, copy=copy)
    text, said = Text(engine), []
    text.extend(PROMPT)
    for _ in range(2):
        params = SamplingParams(
            temperature=dice.choice([0.0, 0.7, 1.0]),
            repetition_penalty=dice.choice([1.0, 1.2]),
            seed=dice.randrange(99),
        )
        taken, answer = dice.randint(1, 7), text.decode(params, 8)
        said.append([token for _, token in zip(range(taken), answer, strict=False)])
        answer.close()
        text.truncate(text.position - dice.randrange(len(said[-1]) + 1))
        text.extend([dice.randrange(TINY.vocab_size) for _ in range(dice.randint(1, 9))])
    said.append(list(text.decode(SamplingParams(temperature=dice.choice([0.0, 1.0]), seed=seed), 99)))
    assert text.stop_reason == "context" and (text.timing.drafted > 12) == (copy is not None)
    engine.close()
    return said


@pytest.mark.long
@pytest.mark.parametrize("seed", range(4))
def test_dialogues_are_the_same_with_a_copy_that_drafts(seed: int) -> None:
    """The model is resident, or streams from the host or from disk."""
    store, copied = open_store(random_folder(TINY)), open_store(random_folder(TINY, 4))
    resident = gpu_model(store, plan_for(store, 1, 1))
    expected = talk(resident, None, seed)
    resident.close()
    own = Copy(sizes_of_store(copied), CudaNeeds(copied.config, copied.bits))
    for on_card, on_host in ((1.0, 1.0), (0.4, 1.0), (0.0, 0.0)):
        plan = plan_for(store, on_card, on_host, own)
        assert plan.streams == (on_card < 1)
        model = gpu_model(store, plan)
        copy = copy_for(model, copied, plan)
        assert talk(model, copy, seed) == expected
        copy.close()
        model.close()


def test_unified_memory_gives_them_too_and_fetches_what_comes_next() -> None:
    store = open_store(random_folder(TINY))
    resident = gpu_model(store, plan_for(store, 1, 1))
    expected = answers(resident)
    resident.close()
    plan = plan_for(store, 0.4, 1)
    model = gpu_model(store, plan, unified=True)
    for actual, wanted in zip(answers(model), expected, strict=True):
        np.testing.assert_array_equal(actual, wanted)
    moving = [number for number, unit in enumerate(plan.units) if not unit.resident]
    following = [next((m for m in moving if m > number), moving[0]) for number in range(len(plan.units))]
    one_pass = [extent_of(store, plan.units[number]).n_bytes for number in following]
    assert engines[-1].prefetched[-len(one_pass) :] == one_pass
    model.close()


@pytest.mark.parametrize("forgotten", ["wait", "copy"])
def test_a_missing_wait_changes_the_logits(monkeypatch: pytest.MonkeyPatch, forgotten: str) -> None:
    store = open_store(random_folder(TINY))
    resident = gpu_model(store, plan_for(store, 1, 1))
    expected = answers(resident)
    resident.close()
    monkeypatch.setattr(LateEngine, forgotten, lambda *_: None)
    model = gpu_model(store, plan_for(store, 0, 1))
    actual = answers(model)
    assert any((a != b).any() for a, b in zip(actual, expected, strict=True))
    model.close()


@pytest.mark.parametrize("unified", [False, True])
def test_a_tensor_that_the_kernels_cannot_load_is_told(unified: bool) -> None:
    store = open_store(random_folder(TINY))
    block = store.blocks[2]
    name, spec = next(iter(block.tensors.items()))
    moved = replace(block, tensors={**block.tensors, name: replace(spec, offset=spec.offset + 2)})
    odd = replace(store, blocks=[*store.blocks[:2], moved, *store.blocks[3:]])
    with pytest.raises(MossError, match="does not begin at a multiple of 16 bytes, .* runs on the CPU only"):
        gpu_model(odd, plan_for(store, 0.4, 1), unified)


def test_a_file_that_vanishes_or_a_system_that_does_not_pin_is_told(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    store = open_store(random_folder(TINY))

    def refuse(self: LateEngine, array: np.ndarray) -> None:
        if len(self.pinned) > 2:
            raise RuntimeError("pages of Jittor's words\nmoss-jt: cudaHostRegister: out of memory")
        self.pinned.add(array.ctypes.data)

    with monkeypatch.context() as patch:
        patch.setattr(LateEngine, "pin", refuse)
        with pytest.raises(
            MossError, match=r"does not pin more than .*cudaHostRegister: out of memory.*--host-memory"
        ):
            gpu_model(store, plan_for(store, 0.4, 1))
    block = store.blocks[1]
    broken = replace(
        store, blocks=[*store.blocks[:1], replace(block, path=tmp_path / "gone"), *store.blocks[2:]]
    )
    with pytest.raises(MossError, match="gone"):
        gpu_model(broken, plan_for(store, 0.4, 1))
    model = gpu_model(broken, plan_for(store, 0, 0))
    for _ in range(2):  # an error each time, and never a hang
        with pytest.raises(MossError, match="gone"):
            answers(model)
    model.close()
    with pytest.raises(MossError, match="closed"):
        model.forward(PROMPT, 0)


@pytest.mark.parametrize(
    ("raised", "expected", "message"),
    [
        (KeyboardInterrupt("Ctrl-C"), KeyboardInterrupt, "Ctrl-C"),
        (
            MemoryError("cupy.cuda.memory.OutOfMemoryError: Out of memory allocating 5 bytes"),
            MossError,
            "GPU's memory is full",
        ),
        (ZeroDivisionError("a fault of ours"), ZeroDivisionError, "a fault of ours"),
    ],
)
def test_what_comes_in_the_midst_of_a_pass_is_what_it_was(
    monkeypatch: pytest.MonkeyPatch, raised: BaseException, expected: type[BaseException], message: str
) -> None:
    """A long pass is Python that Jittor calls: what it raises comes through, a full card is told, and the next pass works."""
    store = open_store(random_folder(TINY))
    model = gpu_model(store, plan_for(store, 0.3, 1))
    wanted = answers(model)
    attention, calls = Launchers.attention, iter(range(100))

    def fail_at_the_third(self: Launchers, *arguments: Any) -> Any:
        if next(calls) == 2:
            raise raised
        return attention(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(Launchers, "attention", fail_at_the_third)
        with pytest.raises(expected, match=message):
            model.forward(LONG, 0)
    for actual, before in zip(answers(model), wanted, strict=True):
        np.testing.assert_array_equal(actual, before)
    model.close()


@pytest.mark.parametrize(
    ("code", "expected", "message"),
    [(2, MossError, "GPU's memory is full"), (719, RuntimeError, "error 719")],
)
def test_a_launch_that_fails_is_told(
    monkeypatch: pytest.MonkeyPatch, code: int, expected: type[Exception], message: str
) -> None:
    """A short pass is queued by native code: the driver's answer comes through, and the next pass works."""
    store = open_store(random_folder(TINY))
    model = gpu_model(store, plan_for(store, 0.3, 1))
    wanted = answers(model)
    calls = itertools.count()

    @ctypes.CFUNCTYPE(ctypes.c_int, *[ctypes.c_void_p] * 11)
    def refuse(*_: Any) -> int:
        return code if next(calls) == 2 else 0

    with monkeypatch.context() as patch:
        patch.setattr(model.operators, "_launch", float(ctypes.cast(refuse, ctypes.c_void_p).value or 0))
        with pytest.raises(expected, match=message):
            model.forward(PROMPT, 0)
    assert next(calls) == 3
    for actual, before in zip(answers(model), wanted, strict=True):
        np.testing.assert_array_equal(actual, before)
    model.close()


def text_of(first: int, tokens: int) -> TokenSample:
    """Two of three tokens are learned."""
    return TokenSample(5 * np.arange(first, first + tokens, dtype=np.int32), np.arange(tokens) % 3 > 0)


# Every element of a result is a thread of the emulation: a model of few.
LEARNERS = {
    16: replace(TINY, vocab_size=64, n_embd=32, n_inner=64),
    4: replace(TINY, vocab_size=64),
}
LEARNED = [text_of(1, 5), text_of(2, 7), text_of(4, 3)]


def learning_adapter(store: Store) -> Adapter:
    """In the last three blocks of four, and already unlike nothing."""
    adapter = Adapter.random(store.config, LoraSettings(rank=3, alpha=6.0, layers=3), 1)
    adapter.values[:] += 0.05 * np.random.default_rng(2).standard_normal(adapter.values.size)
    return adapter


def learned_on_card(store: Store, plan: ResidencyPlan, folder: Path) -> list[Any]:
    """What two steps and an evaluation come to: results and gradients."""
    weights = Weights(store, plan, StreamedUnits(store, plan, FileReader(False, 1e9)))
    waiting = Waiting(Keeping(), store.config.n_layer, folder)
    operators = CudaTrainingOperators(store.config, FakeCupy())
    model = CardTrainingModel(operators, weights, learning_adapter(store), 8, waiting, None, plan)
    came_to = [*model.step(LEARNED[:1]), *model.step(LEARNED), model.evaluate(LEARNED)]
    model.close()
    return came_to


@pytest.mark.parametrize("bits", [16, pytest.param(4, marks=pytest.mark.long)])
def test_an_adapter_learns_the_same_by_any_plan_and_what_it_learns_on_the_processor(
    bits: int, tmp_path: Path
) -> None:
    store = open_store(random_folder(LEARNERS[bits], bits))
    expected = learned_on_card(store, in_slabs(plan_for(store, 1, 1)), tmp_path)
    needs = TrainingNeeds(store.config, 16, 8, 0)
    adapter = learning_adapter(store)
    processor = load_training(store, plan_here(store, needs, None, 1), tmp_path, adapter, needs, tmp_path)
    result, gradient = processor.step(LEARNED)
    processor.close()
    assert expected[2].loss == pytest.approx(result.loss, rel=1e-3)
    assert expected[4].loss == expected[2].loss
    for key, pair in adapter.pairs_of(gradient).items():
        for own, wanted in zip(adapter.pairs_of(expected[3])[key], pair, strict=True):
            assert np.linalg.norm(own - wanted) <= 2e-3 * np.linalg.norm(wanted), key
    plan = residents_from(in_slabs(plan_for(store, 0.3, 0.2)), 1)
    assert {"device", "disk"} <= {unit.tier for unit in plan.units}
    for actual, wanted in zip(learned_on_card(store, plan, tmp_path), expected, strict=True):
        np.testing.assert_array_equal(actual, wanted)
