"""Threads that share arenas of the C library's memory, in a process of its own."""

import gc
import subprocess
import sys
import threading

from moss_jt.backend.threads import start_with_lock_held

PROGRAM = """
import ctypes, sys, threading
from moss_jt.backend.allocator import use_few_arenas

if sys.argv[1] == "few":
    use_few_arenas()
libc = ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p
libc.free.argtypes = [ctypes.c_void_p]
all_there = threading.Barrier(12)

def work():
    all_there.wait()
    libc.free(libc.malloc(70_000))
    all_there.wait()

threads = [threading.Thread(target=work) for _ in range(12)]
for thread in threads: thread.start()
for thread in threads: thread.join()
libc.fdopen.restype = ctypes.c_void_p
out = ctypes.c_void_p(libc.fdopen(1, b"w"))
libc.malloc_info(0, out)
libc.fflush(out)
"""


def arenas(how: str) -> int:
    done = subprocess.run([sys.executable, "-c", PROGRAM, how], capture_output=True, text=True, check=True)
    return done.stdout.count("<heap nr=")


def test_many_threads_share_few_arenas() -> None:
    assert arenas("few") <= 2 < arenas("as it is")


def test_nothing_is_collected_while_a_thread_starts_under_a_lock() -> None:
    """An answer that nobody had any more was collected in the thread that began, and waited there for the engine's lock, which
    was held by who waited for that thread to begin."""
    seen: list[bool] = []

    class Observed(threading.Thread):
        def start(self) -> None:
            seen.append(gc.isenabled())
            super().start()

    thread = Observed()
    start_with_lock_held(thread)
    thread.join()
    assert seen == [False] and gc.isenabled()
