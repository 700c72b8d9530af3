"""How fast this machine reads its memory, multiplies matrices, and reads the disk under the models where there is no model yet:
probed, and the best that was seen is remembered: what else runs at the moment makes a probe slower, nothing makes it faster.

Neither needs Jittor: moss-jt plan answers before anything is installed for computing.
"""

import contextlib
import os
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from moss_jt.errors import MossError
from moss_jt.store.files import read_json, write_json
from moss_jt.store.sizes import MIB
from moss_jt.weights.disk_speed import disk_speed

MEMORY_BYTES = 256 * MIB  # more than caches hold
TRIES = 4
DISK_BYTES = 64 * MIB
NOTE, PRODUCTS_NOTE = "memory-speed.json", "product-speed.json"
PRODUCT_ROWS, PRODUCT_WIDTH = 256, 2048


def memory_speed(home: Path) -> float:
    """Bytes per second that all processors together read from memory: the best seen so far, remembered in the folder ``home``."""
    return _best_seen(home, NOTE, "bytes_per_s", _probe_memory)


def product_speed(home: Path) -> float:
    """Floating-point operations per second of a float32 matrix product on all processors, likewise."""
    return _best_seen(home, PRODUCTS_NOTE, "flop_per_s", _probe_products)


def _best_seen(home: Path, note: str, unit: str, probe: Callable[[], float]) -> float:
    key = _key()
    known = _remembered(home / note, unit)
    speed = probe()
    if speed > known.get(key, 0.0):
        known[key] = speed
        with contextlib.suppress(OSError, MossError):
            home.mkdir(parents=True, exist_ok=True)
            write_json(home / note, {unit: known}, f".{os.getpid()}")
    return known[key]


def known_memory_speed(home: Path) -> float | None:
    """The same where it was measured before; None where it was not: measuring takes memory."""
    return _remembered(home / NOTE, "bytes_per_s").get(_key())


def home_disk_speed(home: Path) -> float | None:
    """Bytes per second of the disk that models come to lie on; None where nothing can be written there."""
    try:
        models = home / "models"
        models.mkdir(parents=True, exist_ok=True)
        # In a folder of a name that stays the same: speeds are remembered by folder.
        with tempfile.NamedTemporaryFile(dir=models, prefix=".probe-") as scratch:
            if not _is_known(home, models):
                chunk = os.urandom(MIB)  # a file system must not make less of it
                for _ in range(DISK_BYTES // MIB):
                    scratch.write(chunk)
                scratch.flush()
                os.fsync(scratch.fileno())
            return disk_speed(Path(scratch.name), home / "disk-speed.json").best
    except (OSError, MossError):
        return None


def _is_known(home: Path, folder: Path) -> bool:
    """Whether :func:`disk_speed` has seen files in this folder."""
    try:
        known = read_json(home / "disk-speed.json")
    except MossError:
        return False
    return any(key.startswith(f"{folder.resolve()} on device ") for key in known)


def _probe_memory() -> float:
    """The best of a few tries: every processor looks for the largest number of its part."""
    data = np.ones(MEMORY_BYTES // 4, np.float32)
    processors = len(os.sched_getaffinity(0))
    parts = np.array_split(data, processors)
    times = []
    with ThreadPoolExecutor(processors) as pool:
        for _ in range(TRIES):
            begin = time.perf_counter()
            list(pool.map(np.max, parts))
            times.append(time.perf_counter() - begin)
    return data.nbytes / min(times)


def _probe_products() -> float:
    """The best of a few tries of a prompt's shape."""
    tokens, weights = (
        np.ones((PRODUCT_ROWS, PRODUCT_WIDTH), np.float32),
        np.ones((PRODUCT_WIDTH, PRODUCT_WIDTH), np.float32),
    )
    times = []
    for _ in range(TRIES):
        begin = time.perf_counter()
        tokens @ weights
        times.append(time.perf_counter() - begin)
    return 2 * PRODUCT_ROWS * PRODUCT_WIDTH**2 / min(times)


def _remembered(path: Path, unit: str) -> dict[str, float]:
    try:
        speeds = {str(key): float(value) for key, value in read_json(path)[unit].items()}
    except (MossError, KeyError, TypeError, ValueError, AttributeError):
        return {}
    return {key: speed for key, speed in speeds.items() if 0 < speed < float("inf")}


def _key() -> str:
    return f"{_processor()}, {len(os.sched_getaffinity(0))} of them"


def _processor() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return "unknown processor"
