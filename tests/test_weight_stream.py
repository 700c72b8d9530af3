"""The stream gives every block's and slab's own values under any plan, and ends cleanly after faults."""

import os
import re
import shutil
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from moss_jt.errors import MossError
from moss_jt.kernels.interface import BlockWeights, DenseMatrix, Matrix
from moss_jt.kernels.needs import CpuNeeds
from moss_jt.plan.placement import plan_here
from moss_jt.plan.residency import ResidencyPlan
from moss_jt.store.model_folder import Store, StoreFile, open_store, read_tensor
from moss_jt.store.sizes import GIB, sizes_of_store
from moss_jt.weights import host_units
from moss_jt.weights.cpu_units import CpuUnits, open_weights
from moss_jt.weights.disk_ring import Reader
from moss_jt.weights.file_reader import Extent, FileReader
from moss_jt.weights.host_units import HostUnits
from moss_jt.weights.ram_disk import is_in_ram
from moss_jt.weights.weights import Weights
from tests.support.plans import plan
from tests.support.random_models import SMALL, random_folder


def plans(store: Store) -> list[ResidencyPlan]:
    """All resident, about half, none."""
    sizes = sizes_of_store(store)
    none = plan(sizes, 64, smallest(store))
    half = plan(sizes, 64, smallest(store) + sum(sizes.block_bytes) // 2)
    assert none.streams and not any(unit.resident for unit in none.units)
    assert half.streams and any(unit.resident for unit in half.units)
    return [plan(sizes, 64, GIB), half, none]


def smallest(store: Store) -> int:
    """The first budget that is not refused, by bisection."""
    low, high = 0, GIB
    while high - low > 1:
        middle = (low + high) // 2
        try:
            plan(sizes_of_store(store), 64, middle)
            high = middle
        except MossError:
            low = middle
    return high


def weights_of(store: Store, plan: ResidencyPlan, reader: Reader | None = None) -> Weights:
    if not plan.streams:
        return Weights(store, plan, CpuUnits(HostUnits(store, plan)))
    return Weights(store, plan, CpuUnits(HostUnits(store, plan, reader or FileReader(False, 1e9))))


def never() -> bool:
    return False


def file_arrays(file: StoreFile) -> dict[str, np.ndarray]:
    return {name: np.array(read_tensor(file, name)) for name in file.tensors}


def matrix_arrays(name: str, matrix: Matrix) -> dict[str, np.ndarray]:
    if isinstance(matrix, DenseMatrix):
        return {f"{name}.weight": matrix.weight.numpy()}
    parts = ("packed", "scales", "zeros")
    return {f"{name}.{part}": getattr(matrix, part).numpy() for part in parts}


def block_arrays(weights: BlockWeights) -> dict[str, np.ndarray]:
    """By the names in the file."""
    return {
        "ln_1.weight": weights.ln_1_weight.numpy(),
        "ln_1.bias": weights.ln_1_bias.numpy(),
        "mlp.fc_in.bias": weights.fc_in_bias.numpy(),
        "mlp.fc_out.bias": weights.fc_out_bias.numpy(),
        **matrix_arrays("attn.qkv_proj", weights.qkv),
        **matrix_arrays("attn.out_proj", weights.out),
        **matrix_arrays("mlp.fc_in", weights.fc_in),
        **matrix_arrays("mlp.fc_out", weights.fc_out),
    }


def assert_pass_is_right(stream: Weights, store: Store, then_head: bool = True) -> None:
    for index, (number, weights) in enumerate(stream.blocks(then_head)):
        assert number == index
        wanted = file_arrays(store.blocks[number])
        given = block_arrays(weights)
        assert given.keys() == wanted.keys()
        for name in wanted:
            assert np.array_equal(given[name], wanted[name]), f"block {number}: {name}"
    assert index == store.config.n_layer - 1
    if then_head:
        wanted = file_arrays(store.head)
        slabs = [(slab.first_row, slab.weight.numpy(), slab.bias.numpy()) for slab in stream.head_slabs()]
        assert np.array_equal(np.concatenate([weight for _, weight, _ in slabs]), wanted["lm_head.weight"])
        assert np.array_equal(np.concatenate([bias for _, _, bias in slabs]), wanted["lm_head.bias"])
        assert np.array_equal(stream.norm_weight.numpy(), wanted["ln_f.weight"])


def reader_threads() -> list[threading.Thread]:
    """The rings'; those of units that stay end by themselves, or with the stream."""
    return [thread for thread in threading.enumerate() if thread.name == "moss-jt reader"]


@pytest.mark.parametrize("bits", [16, 8, 4])
def test_every_plan_gives_the_file_s_values(bits: int) -> None:
    store = open_store(random_folder(SMALL, bits))
    for placed in plans(store):
        stream = weights_of(store, placed)
        assert_pass_is_right(stream, store)
        assert_pass_is_right(stream, store, then_head=False)
        assert_pass_is_right(stream, store)
        assert len(reader_threads()) == (1 if placed.streams else 0)
        stream.close()
        assert not reader_threads()


class WatchedReader(FileReader):
    """Notes what the ring begins to read."""

    def __init__(self) -> None:
        super().__init__(False, 1e9)
        self.begun: list[Extent] = []
        self.waited_for = threading.Condition()

    def read(self, extent: Extent, target: np.ndarray, stopped: Callable[[], bool] = never) -> bool:
        if threading.current_thread().name == "moss-jt reader":
            with self.waited_for:
                self.begun.append(extent)
                self.waited_for.notify_all()
        return super().read(extent, target, stopped)


def test_while_a_resident_unit_is_computed_with_the_buffer_before_it_is_filled() -> None:
    store = open_store(random_folder(SMALL))
    placed = plans(store)[1]
    residents = [unit.resident for unit in placed.units]
    after = next(i for i in range(1, len(residents)) if residents[i] and not residents[i - 1])
    reader = WatchedReader()
    host = HostUnits(store, placed, reader)
    host.begin()
    host.walk(range(len(residents)))
    for number in range(after + 1):
        host.take(number)
    wanted = residents[:after].count(False) + placed.ring_buffers
    with reader.waited_for:
        there = reader.waited_for.wait_for(lambda: len(reader.begun) == wanted, 10)
    host.close()
    assert there


@pytest.mark.parametrize("bits", [16, 4])
def test_a_walk_has_an_order(bits: int) -> None:
    """Forwards, backwards, and parts of it: each unit's own values, whatever was read ahead."""
    store = open_store(random_folder(SMALL, bits))
    for placed in plans(store):
        stream = weights_of(store, placed)
        count = len(placed.units)
        for order in (range(count), range(count - 1, -1, -1), range(count - 1, -1, -1), range(0, count, 2)):
            for number, (unit, weights) in zip(order, stream.walk(order), strict=True):
                assert unit == placed.units[number]
                if unit.kind == "block":
                    wanted = file_arrays(store.blocks[unit.index])
                    assert all(
                        np.array_equal(given, wanted[name]) for name, given in block_arrays(weights).items()
                    )
                else:
                    rows = file_arrays(store.head)["lm_head.weight"][unit.first_row : unit.last_row]
                    assert np.array_equal(weights.numpy(), rows)
        stream.close()


def mapped_files(folder: Path) -> set[str]:
    """Names of the folder's files of which this process has pages mapped."""
    name, names = "", set()
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if re.match(r"[0-9a-f]+-[0-9a-f]+ ", line):
            name = line.split(maxsplit=5)[-1]
        elif line.startswith("Rss:") and name.startswith(str(folder)) and line.split()[1] != "0":
            names.add(Path(name).name)
    return names


def test_in_a_ram_disk_units_are_mapped_and_let_go_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(host_units, "is_in_ram", lambda store: True)
    store = open_store(random_folder(SMALL))
    for placed in plans(store)[1:]:
        stream = open_weights(store, placed, tmp_path)
        assert_pass_is_right(stream, store)
        assert not reader_threads(), "nothing is copied"
        stay = {
            file.path.name for file, unit in zip(store.blocks, placed.units, strict=False) if unit.resident
        }
        blocks = {file.path.name for file in store.blocks}
        for index, weights in stream.blocks():
            block_arrays(weights)
            own = store.blocks[index].path.name
            assert mapped_files(store.path) & blocks == stay | {own}
        assert mapped_files(store.path) & blocks == stay
        stream.close()


def test_a_ram_disk_is_known_by_its_mount(tmp_path: Path) -> None:
    store = open_store(random_folder(SMALL))
    device = os.stat(store.head.path).st_dev
    number = f"{os.major(device)}:{os.minor(device)}"
    mounts = tmp_path / "mountinfo"
    for kind, expected in (("tmpfs", True), ("ramfs", True), ("ext4", False)):
        mounts.write_text(
            f"1 1 250:77 / / rw - xfs /dev/vdb rw\n"
            f"30 1 {number} / /data rw,nosuid shared:2 - {kind} {kind} rw,size=1k\n"
        )
        assert is_in_ram(store, mounts) is expected
    mounts.write_text("1 1 250:77 / / rw - tmpfs tmpfs rw\nx - \n")
    assert not is_in_ram(store, mounts) and not is_in_ram(store, tmp_path / "none")


def test_vars_over_buffers_are_made_once() -> None:
    """Making a Var costs more than a small block's read, and a Var per pass would grow without end."""
    store = open_store(random_folder(SMALL))
    stream = weights_of(store, plans(store)[2])
    seen = [{id(weights) for _, weights in stream.blocks()} for _ in range(3)]
    assert len(seen[0] | seen[1] | seen[2]) == 2, "two buffers, one layout"
    stream.close()


def test_an_abandoned_pass_is_followed_by_a_right_one() -> None:
    store = open_store(random_folder(SMALL))
    for placed in plans(store):
        stream = weights_of(store, placed)
        for number, _ in stream.blocks():
            if number == 3:
                break
        assert_pass_is_right(stream, store)
        stream.close()


def test_two_models_at_once_do_not_disturb_each_other() -> None:
    store = open_store(random_folder(SMALL))
    streams = [weights_of(store, placed) for placed in plans(store)]
    for _ in range(2):
        for stream in streams:
            assert_pass_is_right(stream, store)
    for stream in streams:
        stream.close()


def test_rows_of_the_embedding() -> None:
    store = open_store(random_folder(SMALL))
    table = file_arrays(store.embedding)["wte.weight"]
    stream = weights_of(store, plans(store)[0])
    ids = [0, 5, 5, SMALL.vocab_size - 1]
    assert np.array_equal(stream.embedding_rows(ids), table[ids])
    for wrong in (-1, SMALL.vocab_size):
        with pytest.raises(MossError, match=f"from 0 to {SMALL.vocab_size - 1}"):
            stream.embedding_rows([1, wrong])
    stream.close()


class FailingReader(FileReader):
    """Fails at one block's file, as often as told."""

    def __init__(self, block: str, failures: int) -> None:
        super().__init__(False, 1e9)
        self.block, self.failures = block, failures

    def read(self, extent: Extent, target: np.ndarray, stopped: Callable[[], bool] = never) -> bool:
        if extent.path.name == self.block and self.failures:
            self.failures -= 1
            raise MossError(f"cannot read {extent.path}: Input/output error.")
        return super().read(extent, target, stopped)


def test_a_read_error_stops_the_pass_and_the_next_one_works() -> None:
    store = open_store(random_folder(SMALL))
    stream = weights_of(store, plans(store)[2], FailingReader("block-04.safetensors", 1))
    with pytest.raises(MossError, match=r"block-04.safetensors: Input/output error"):
        assert_pass_is_right(stream, store)
    assert_pass_is_right(stream, store)
    stream.close()
    assert not reader_threads()


def test_an_error_of_resident_weights_comes_with_the_pass_and_leaves_nothing_open() -> None:
    store = open_store(random_folder(SMALL))
    half = plans(store)[1]
    first = next(unit.index for unit in half.units if unit.resident)
    before = set(os.listdir("/proc/self/fd"))
    stream = weights_of(store, half, FailingReader(f"block-{first:02d}.safetensors", 1))
    with pytest.raises(MossError, match="Input/output error"):
        assert_pass_is_right(stream, store)
    assert_pass_is_right(stream, store)
    stream.close()
    assert set(os.listdir("/proc/self/fd")) == before and not reader_threads()


def test_a_file_that_shrinks_or_goes_while_streaming(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(random_folder(SMALL), folder)
    store = open_store(folder)
    stream = weights_of(store, plans(store)[2])
    assert_pass_is_right(stream, store)
    store.blocks[5].path.unlink()
    assert sum(1 for _ in stream.blocks()) == SMALL.n_layer, "files stay open: what is deleted is still read"
    os.truncate(store.blocks[3].path, store.blocks[3].data_offset + 100)
    with pytest.raises(MossError, match=r"block-03.safetensors ends early"):
        for _ in range(2):  # the first buffers may hold block 3 from before
            list(stream.blocks())
    stream.close()
    assert not reader_threads()


def test_a_closed_stream_says_so_and_closing_twice_is_fine() -> None:
    store = open_store(random_folder(SMALL))
    for placed in plans(store):
        stream = weights_of(store, placed)
        next(iter(stream.blocks()))
        stream.close()
        stream.close()
        with pytest.raises(MossError, match="closed"):
            next(iter(stream.blocks()))


def test_a_stream_that_is_closed_within_a_pass_says_so() -> None:
    """Within a first pass, and within a later one, which what stays in memory is not taken for once more."""
    store = open_store(random_folder(SMALL))
    for placed in plans(store):
        for passes in (0, 1):
            stream = weights_of(store, placed)
            for _ in range(passes):
                assert len(list(stream.blocks())) == SMALL.n_layer
            walk = stream.blocks()
            next(walk)
            stream.close()
            with pytest.raises(MossError, match="closed"):
                next(walk)


def test_a_forgotten_stream_takes_its_thread_with_it() -> None:
    store = open_store(random_folder(SMALL))
    stream = weights_of(store, plans(store)[2])
    assert_pass_is_right(stream, store)
    assert reader_threads()
    del stream
    assert not reader_threads()


def test_opened_for_this_machine(tmp_path: Path) -> None:
    store = open_store(random_folder(SMALL))
    for placed in plans(store):
        stream = open_weights(store, placed, tmp_path)
        assert_pass_is_right(stream, store)
        stream.close()
    assert [path.name for path in tmp_path.iterdir()] == ["disk-speed.json"]


def test_a_plan_for_this_process_counts_what_it_holds() -> None:
    store = open_store(random_folder(SMALL))
    needs = CpuNeeds(store.config, store.bits)
    placed = plan_here(store, needs, "2GiB", None)
    assert placed.budget_bytes == 2 * GIB and placed.context == SMALL.n_positions and not placed.streams
    ballast = np.ones(300 << 20, np.uint8)
    assert plan_here(store, needs, "2GiB", 64).footprint_bytes - placed.footprint_bytes > 250 << 20
    assert ballast[0] == 1
    with pytest.raises(MossError, match="too little for this model"):
        plan_here(store, needs, "50MiB", None)
