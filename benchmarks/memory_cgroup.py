"""Runs a command in a memory control group of its own, with a cold page cache, and reports what it used.

    python benchmarks/memory_cgroup.py --limit 2.2GB --cold MODEL_FOLDER -- moss-jt generate MODEL_FOLDER ...

Control groups of version 1 and 2; making one usually needs root. The last line is one JSON object; where the command
is moss-jt generate --json, seconds per token are in it.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from moss_jt.plan.machine import parse_memory, process_memory

VERSION_1 = Path("/sys/fs/cgroup/memory")
DISK_VERSION_1 = Path("/sys/fs/cgroup/blkio")
VERSION_2 = Path("/sys/fs/cgroup")


class NoGroup(Exception):
    """Why a control group cannot be made here."""


@dataclass(frozen=True)
class Usage:
    """What one run used. Peaks in bytes: of the largest process, and of the group, which counts page cache too."""

    exit_code: int
    seconds: float
    peak_process: int
    peak_group: int | None
    killed_for_memory: bool
    output: str
    errors: str


@contextmanager
def memory_group(limit_bytes: int) -> Iterator[Path]:
    """A new control group with that limit; removed afterwards, its processes must have ended.

    Raises:
        NoGroup: this system or this user cannot have one.
    """
    version_1 = (VERSION_1 / "memory.limit_in_bytes").exists()
    root = VERSION_1 if version_1 else VERSION_2
    group = root / f"moss-jt-{os.getpid()}-{time.monotonic_ns()}"
    try:
        if not version_1 and "memory" not in (root / "cgroup.subtree_control").read_text().split():
            (root / "cgroup.subtree_control").write_text("+memory")
        group.mkdir()
    except OSError as error:
        raise NoGroup(f"cannot make a memory control group below {root}: {error.strerror}") from error
    try:
        try:
            (group / ("memory.limit_in_bytes" if version_1 else "memory.max")).write_text(str(limit_bytes))
        except OSError as error:
            raise NoGroup(f"cannot limit a control group: {error.strerror}") from error
        yield group
    finally:
        group.rmdir()


@contextmanager
def disk_group(folder: Path, bytes_per_s: int) -> Iterator[Path]:
    """A new control group that reads the disk under ``folder`` no faster than that: a disk that others use, too, holds still so
    far. Of version 1; removed afterwards, its processes must have ended.

    Raises:
        NoGroup: this system or this user cannot have one.
    """
    device = folder.stat().st_dev
    group = DISK_VERSION_1 / f"moss-jt-{os.getpid()}-{time.monotonic_ns()}"
    try:
        group.mkdir()
    except OSError as error:
        raise NoGroup(f"cannot make a disk control group in {DISK_VERSION_1}: {error.strerror}") from error
    try:
        try:
            rule = f"{os.major(device)}:{os.minor(device)} {bytes_per_s}"
            (group / "blkio.throttle.read_bps_device").write_text(rule)
        except OSError as error:
            raise NoGroup(f"cannot hold the disk under {folder}: {error.strerror}") from error
        yield group
    finally:
        group.rmdir()


def run(
    command: Sequence[str], group: Path | None, timeout_s: float | None = None, disk: Path | None = None
) -> Usage:
    """Run a command, in the groups if there are any, and report what it used; killed after ``timeout_s``."""
    for entered in (group, disk):
        if entered is not None:
            enter = 'echo $$ > "$0"/cgroup.procs && exec "$@"'
            command = ["sh", "-c", enter, str(entered), *command]
    begin = time.perf_counter()
    peak = 0
    # Output goes to files in memory, for pipes could fill while nobody reads.
    with open(os.memfd_create("out"), "w+b") as out, open(os.memfd_create("err"), "w+b") as err:
        process = subprocess.Popen(command, stdout=out, stderr=err)
        # VmHWM, not wait4's ru_maxrss: that one counts the parent, whose memory a new process shares until it execs.
        while process.poll() is None:
            peak = max(peak, peak_of(process.pid))
            if timeout_s is not None and time.perf_counter() - begin > timeout_s:
                process.kill()
            time.sleep(0.01)
        seconds = time.perf_counter() - begin
        out.seek(0)
        err.seek(0)
        texts = [file.read().decode(errors="replace") for file in (out, err)]
    peak_group, killed = peak_of_group(group)
    return Usage(process.returncode, seconds, peak, peak_group, killed, *texts)


def peak_of(pid: int) -> int:
    """The most that a running process has held so far (VmHWM); 0 when it is no more."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM")), 0)


def peak_of_group(group: Path | None) -> tuple[int | None, bool]:
    """The group's peak, and whether the kernel killed something in it."""
    if group is None:
        return None, False
    for peak_file, events_file in (
        ("memory.max_usage_in_bytes", "memory.oom_control"),
        ("memory.peak", "memory.events"),
    ):
        if (group / events_file).exists():
            events = dict(line.split() for line in (group / events_file).read_text().splitlines())
            peak = group / peak_file
            return (int(peak.read_text()) if peak.exists() else None), int(events.get("oom_kill", 0)) > 0
    return None, False


def forget_cached(folder: Path) -> None:
    """Drop a folder's files from the page cache."""
    for path in folder.rglob("*"):
        if path.is_file():
            with open(path, "rb") as file:
                os.fdatasync(file.fileno())
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--limit", required=True, help="such as 2.2GB")
    parser.add_argument(
        "--cold", type=Path, action="append", default=[], help="a folder to drop from the cache"
    )
    parser.add_argument("command", nargs="+")
    arguments = parser.parse_args()
    for folder in arguments.cold:
        forget_cached(folder)
    try:
        with memory_group(parse_memory(arguments.limit, process_memory().total_bytes)) as group:
            usage = run(arguments.command, group)
    except NoGroup as reason:
        sys.exit(f"{reason}. Run this as root.")
    sys.stdout.write(usage.output)
    sys.stderr.write(usage.errors)
    result = {key: value for key, value in asdict(usage).items() if key not in ("output", "errors")}
    print(json.dumps(result | seconds_per_token(usage.output)))


def seconds_per_token(output: str) -> dict[str, float]:
    """From what moss-jt generate --json printed; nothing from anything else."""
    try:
        answer = json.loads(output.strip().splitlines()[-1])
        seconds, tokens = answer["seconds"], answer["new_tokens"]
    except (IndexError, ValueError, KeyError, TypeError):
        return {}
    measured = {"prefill_s": seconds["prefill"]}
    return measured | ({"decode_s_per_token": seconds["decode"] / (tokens - 1)} if tokens > 1 else {})


if __name__ == "__main__":
    main()
