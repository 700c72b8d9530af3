"""What memory this process may use: the machine's, or less where a control group limits it."""

import re
from pathlib import Path
from typing import NamedTuple

from moss_jt.errors import MossError
from moss_jt.plan.residency import gib
from moss_jt.store.sizes import GIB, MIB

# Left free by default: what other programs take while a long answer is written. A twentieth of what is free, for the
# file system's own needs grow with the machine, and half a GiB on top, but never more than an eighth of what is free.
MARGIN_SHARE = 20
MARGIN_BYTES = 512 * MIB

# A plain number below this is no number of bytes that anybody means.
FEWEST_BYTES = MIB

UNITS = {
    "": 1,
    "b": 1,
    "kb": 10**3,
    "mb": 10**6,
    "gb": 10**9,
    "tb": 10**12,
    "kib": 1 << 10,
    "mib": MIB,
    "gib": GIB,
    "tib": 1 << 40,
    "ki": 1 << 10,  # as Kubernetes writes them
    "mi": MIB,
    "gi": GIB,
    "ti": 1 << 40,
    "k": 1 << 10,
    "m": MIB,
    "g": GIB,
    "t": 1 << 40,
}


class Memory(NamedTuple):
    """Bytes that this process could use in all, and of these what is free now (page cache counts as free)."""

    total_bytes: int
    free_bytes: int


def process_memory(root: Path = Path("/")) -> Memory:
    """This process's memory: the machine's, narrowed by every control group above it (versions 1 and 2).

    Args:
        root: the file system to read /proc and /sys in, for tests.

    Raises:
        MossError: /proc/meminfo is unreadable: this is no Linux.
    """
    try:
        fields = _fields((root / "proc/meminfo").read_text())
    except OSError as error:
        raise MossError(
            f"cannot read /proc/meminfo ({error.strerror}): Linux is needed. Give --memory to go without."
        ) from error
    total, free = fields["MemTotal"] * 1024, fields["MemAvailable"] * 1024
    for limit, used in _groups(root):
        total = min(total, limit)
        free = min(free, max(0, limit - used))
    return Memory(total, free)


def default_budget(memory: Memory) -> int:
    """What is free, less a margin for everything else that runs."""
    margin = min(memory.free_bytes // MARGIN_SHARE + MARGIN_BYTES, memory.free_bytes // 8)
    return memory.free_bytes - margin


def parse_memory(text: str | int, total_bytes: int) -> int:
    """Bytes of an amount as users write it: ``8GiB``, ``8G``, ``8GB``, ``80%`` of ``total_bytes``, a number of bytes.

    Raises:
        MossError: it is none of these, or a number of bytes in which nothing would fit.
    """
    match = re.fullmatch(r"\s*(\d{1,16}(?:\.\d{1,6})?)\s*([a-zA-Z]{0,3}|%)\s*", str(text))
    unit = match.group(2).lower() if match else "?"
    if match is None or unit not in (*UNITS, "%"):
        raise MossError(f"{text!r} is not an amount of memory. Write it like 8GiB, 8000MB or 80%.")
    number = float(match.group(1))
    if unit in ("", "b") and number < FEWEST_BYTES:
        example = match.group(1) if number < 1024 else "8"
        raise MossError(
            f"{text} would be a number of bytes. Say which unit is meant: {example}GiB, for example."
        )
    return int(number * total_bytes / 100) if unit == "%" else int(number * UNITS[unit])


def memory_budget(text: str | int | None) -> int:
    """The limit that ``--memory`` sets for this process; by default what is free less a margin.

    Raises:
        MossError: it is not an amount of memory, or more than there is.
    """
    memory = process_memory()
    if text is None:
        return default_budget(memory)
    n_bytes = parse_memory(text, memory.total_bytes)
    if n_bytes > memory.total_bytes:
        raise MossError(
            f"{text} is more than this process may use, {gib(memory.total_bytes)}. "
            "Give a smaller amount; moss-jt plan shows what each amount brings."
        )
    return n_bytes


def _fields(text: str) -> dict[str, int]:
    """``Name: 12 kB`` or ``name 12`` lines as a dict."""
    return {name: int(value) for name, value in re.findall(r"^([\w()]+):?\s+(\d+)", text, re.MULTILINE)}


def _groups(root: Path) -> list[tuple[int, int]]:
    """(limit, bytes used that cannot be reclaimed) of each memory control group that this process is in."""
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return []  # no control groups in this kernel
    groups = []
    files: tuple[str, ...]
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            mount, files = root / "sys/fs/cgroup", ("memory.max", "memory.high", "memory.current")
            if not (mount / "cgroup.controllers").exists():
                continue  # version 2 beside version 1: it has no memory controller
        elif "memory" in controllers.split(","):
            mount = root / "sys/fs/cgroup/memory"
            # What it says of a soft limit binds only while the machine is short of memory.
            files = ("memory.limit_in_bytes", "memory.usage_in_bytes")
        else:
            continue
        folder = mount / path.lstrip("/")
        while folder != mount.parent:
            group = _group(folder, *files)
            if group is not None:
                groups.append(group)
            folder = folder.parent
    return groups


def _group(folder: Path, *files: str) -> tuple[int, int] | None:
    """None where the folder is out of sight (a container sees only its own part) or has no limit.

    ``files``: those of the limits, then that of what is used. Above memory.high the kernel makes a process wait for memory
    to be given back, which weights never are: it computes hundreds of times slower.
    """
    *limit_files, used_file = files
    limits = [limit for name in limit_files if (limit := _number(folder / name)) is not None]
    used = _number(folder / used_file)
    try:
        statistics = _fields((folder / "memory.stat").read_text())
    except OSError:
        return None
    if not limits or used is None:
        return None
    names = ("total_inactive_file", "total_active_file")
    if not any(name in statistics for name in names):
        names = ("inactive_file", "active_file")
    return min(limits), used - sum(statistics.get(name, 0) for name in names)


def _number(path: Path) -> int | None:
    """None where the file is not there, or holds "max"."""
    try:
        text = path.read_text().strip()
    except OSError:
        return None
    return None if text == "max" else int(text)


def peak_memory_bytes() -> int:
    """The most that this process has held at once so far (VmHWM)."""
    return _fields(Path("/proc/self/status").read_text())["VmHWM"] * 1024


def resident_memory_bytes() -> int:
    """What this process holds now (VmRSS)."""
    return _fields(Path("/proc/self/status").read_text())["VmRSS"] * 1024
