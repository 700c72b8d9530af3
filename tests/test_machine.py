"""Amounts of memory as users write them, and control groups of both versions, from made-up /proc and /sys trees."""

from pathlib import Path

import pytest

from moss_jt.errors import MossError
from moss_jt.plan.machine import (
    Memory,
    default_budget,
    memory_budget,
    parse_memory,
    peak_memory_bytes,
    process_memory,
)
from moss_jt.store.sizes import GIB, MIB


@pytest.mark.parametrize(
    ("text", "n_bytes"),
    [
        ("8GiB", 8 * GIB),
        ("8 gib", 8 * GIB),
        ("1.5G", GIB + GIB // 2),
        ("8GB", 8 * 10**9),
        ("300m", 300 * MIB),
        ("80%", 80 * GIB),
        ("8Gi", 8 * GIB),
        ("512Mi", 512 * MIB),
        ("1048576Ki", GIB),
        ("0.5Ti", 512 * GIB),
        ("8589934592", 8 * GIB),
        (456 * MIB, 456 * MIB),
    ],
)
def test_amounts(text: str | int, n_bytes: int) -> None:
    assert parse_memory(text, 100 * GIB) == n_bytes


@pytest.mark.parametrize("text", ["", "much", "-1GiB", "8 light years", "1e9", "%", "8GiBs", "9" * 40, "nan"])
def test_what_is_no_amount_is_refused(text: str) -> None:
    with pytest.raises(MossError, match="is not an amount of memory. Write it like 8GiB"):
        parse_memory(text, 100 * GIB)


@pytest.mark.parametrize("amount", ["16", 16, "8.5", "0", "16b", "1000000"])
def test_a_number_without_its_unit_is_asked_about(amount: str | int) -> None:
    """16 was taken as 16 bytes, and the answer was that the model needs more."""
    with pytest.raises(MossError, match=r"would be a number of bytes. Say which unit is meant: [\d.]+GiB"):
        parse_memory(amount, 100 * GIB)


def test_more_than_there_is_is_refused() -> None:
    with pytest.raises(MossError, match="999TiB is more than this process may use"):
        memory_budget("999TiB")
    assert memory_budget("1GiB") == GIB


def test_the_default_leaves_a_margin() -> None:
    for free in (0, MIB, GIB, 8 * GIB, 512 * GIB):
        budget = default_budget(Memory(free * 2, free))
        assert free * 7 // 8 - 1 <= budget <= free
    assert default_budget(Memory(64 * GIB, 32 * GIB)) == pytest.approx(32 * GIB * 0.95 - 512 * MIB, abs=64)


def tree(root: Path, files: dict[str, str]) -> Path:
    meminfo = "MemTotal:       16777216 kB\nMemFree:  1 kB\nMemAvailable:   12582912 kB\n"
    for name, text in {"proc/meminfo": meminfo, **files}.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def test_without_a_limit_it_is_the_machine(tmp_path: Path) -> None:
    assert process_memory(tree(tmp_path, {})) == Memory(16 * GIB, 12 * GIB)


def test_version_1_groups_narrow_it(tmp_path: Path) -> None:
    """Page cache in the group is free: the kernel gives it back."""
    outer, inner = "sys/fs/cgroup/memory/outer", "sys/fs/cgroup/memory/outer/inner"
    files = {
        "proc/self/cgroup": "5:devices:/x\n4:cpu,memory:/outer/inner\n0::/\n",
        f"{outer}/memory.limit_in_bytes": f"{4 * GIB}\n",
        f"{outer}/memory.usage_in_bytes": f"{3 * GIB}\n",
        f"{outer}/memory.stat": f"cache 1\ninactive_file 0\ntotal_inactive_file {GIB}\ntotal_active_file {GIB}\n",
        f"{inner}/memory.limit_in_bytes": "9223372036854771712\n",
        f"{inner}/memory.usage_in_bytes": "4096\n",
        f"{inner}/memory.stat": "cache 0\n",
    }
    assert process_memory(tree(tmp_path, files)) == Memory(4 * GIB, 3 * GIB)


def test_version_2_groups_narrow_it(tmp_path: Path) -> None:
    group = "sys/fs/cgroup/job"
    files = {
        "proc/self/cgroup": "0::/job\n",
        "sys/fs/cgroup/cgroup.controllers": "cpu memory\n",
        f"{group}/memory.max": f"{2 * GIB}\n",
        f"{group}/memory.current": f"{GIB}\n",
        f"{group}/memory.stat": f"anon 5\ninactive_file {MIB}\nactive_file {MIB}\n",
    }
    assert process_memory(tree(tmp_path, files)) == Memory(2 * GIB, GIB + 2 * MIB)
    (tmp_path / group / "memory.max").write_text("max\n")
    assert process_memory(tmp_path) == Memory(16 * GIB, 12 * GIB)


@pytest.mark.parametrize(
    ("most", "high", "total"),
    [("max", 3, 3), (4, 3, 3), (2, 3, 2), (4, "max", 4), ("max", "max", 16)],
    ids=str,
)
def test_the_level_at_which_a_version_2_group_is_slowed_down_narrows_it(
    tmp_path: Path, most: int | str, high: int | str, total: int
) -> None:
    """systemd's MemoryHigh= and Kubernetes set memory.high, often without memory.max."""

    def text(amount: int | str) -> str:
        return f"{amount if amount == 'max' else int(amount) * GIB}\n"

    group = "sys/fs/cgroup/job/inner"
    files = {
        "proc/self/cgroup": "0::/job/inner\n",
        "sys/fs/cgroup/cgroup.controllers": "cpu memory\n",
        "sys/fs/cgroup/job/memory.max": text(most),
        "sys/fs/cgroup/job/memory.high": text(high),
        "sys/fs/cgroup/job/memory.current": f"{GIB}\n",
        "sys/fs/cgroup/job/memory.stat": "inactive_file 0\nactive_file 0\n",
        f"{group}/memory.max": "max\n",
        f"{group}/memory.high": "max\n",
        f"{group}/memory.current": "4096\n",
        f"{group}/memory.stat": "inactive_file 0\n",
    }
    free = 12 if total == 16 else total - 1
    assert process_memory(tree(tmp_path, files)) == Memory(total * GIB, free * GIB)


def test_a_group_whose_path_is_out_of_sight_counts_by_its_root(tmp_path: Path) -> None:
    """In a container /proc/self/cgroup may give the host's path, while only the container's own part is mounted."""
    files = {
        "proc/self/cgroup": "4:memory:/docker/0123\n",
        "sys/fs/cgroup/memory/memory.limit_in_bytes": f"{GIB}\n",
        "sys/fs/cgroup/memory/memory.usage_in_bytes": "0\n",
        "sys/fs/cgroup/memory/memory.stat": "cache 0\n",
    }
    assert process_memory(tree(tmp_path, files)).total_bytes == GIB


def test_no_linux_is_said(tmp_path: Path) -> None:
    with pytest.raises(MossError, match="Linux is needed"):
        process_memory(tmp_path)


def test_this_process_has_a_peak() -> None:
    assert 5 * MIB < peak_memory_bytes() < 1 << 42
