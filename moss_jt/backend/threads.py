"""How many threads compute here. No Jittor, and no OpenMP yet: plans count them before either is loaded."""

import gc
import os
import threading


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


def start_with_lock_held(thread: threading.Thread) -> None:
    """Start a thread while this one holds a lock. Whoever starts one waits until it runs; what is collected there meanwhile
    may want the same lock in order to end, and then both would wait for ever."""
    collects = gc.isenabled()
    gc.disable()
    try:
        thread.start()
    finally:
        if collects:
            gc.enable()
