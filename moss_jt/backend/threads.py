"""How many threads compute here. No Jittor, and no OpenMP yet: plans count them before either is loaded."""

import os


def compute_threads() -> int:
    """The threads of a parallel region, by OpenMP's own rule: OMP_NUM_THREADS, or as many as this process has processors,
    and never more than OMP_THREAD_LIMIT.
    """
    threads = _number("OMP_NUM_THREADS") or len(os.sched_getaffinity(0))
    return min(threads, _number("OMP_THREAD_LIMIT") or threads)


def _number(name: str) -> int | None:
    """Of a list, one per level of nesting, the first; None for what OpenMP does not take."""
    text = os.environ.get(name, "").split(",")[0].strip()
    return int(text) or None if text.isascii() and text.isdigit() else None
