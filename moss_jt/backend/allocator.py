"""The C library's allocator, told what a process with many threads needs."""

import ctypes

# M_ARENA_MAX of glibc's malloc.h, and a value for it.
ARENA_MAX, ARENAS = -8, 2


def use_few_arenas() -> None:
    """Have threads that start from now on share arenas of memory.

    By default glibc makes eight for each processor, and each keeps what the largest of its threads has once needed: of a server
    on two cores some 150 MiB, after hours. Other C libraries have no arenas, and are left alone.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(ARENA_MAX, ARENAS)
