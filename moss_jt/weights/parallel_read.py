"""Several large reads at once by the C library's own threads: one call, for all of which Python's lock is free.

One thread of plain reads does not use a disk of 5 to 14 GB/s, nor a RAM disk: each request waits for the one before, and the copy
out of the page cache is one processor's. Threads of Python's would have to wait for its lock, which Jittor holds while it
computes. POSIX's asynchronous reads (aio.h) need neither. The library reads requests to one descriptor one after another, so each
has its own.
"""

import ctypes
import errno
import os
import platform
import sys
from collections.abc import Sequence
from functools import cache
from typing import Any

from moss_jt.store.sizes import MEMORY_PAGE

LIO_WAIT, LIO_READ, SIGEV_NONE = 0, 0, 1


class Request(ctypes.Structure):
    """struct aiocb of glibc on 64-bit machines."""

    _fields_ = (
        ("fildes", ctypes.c_int),
        ("opcode", ctypes.c_int),
        ("priority", ctypes.c_int),
        ("buffer", ctypes.c_void_p),
        ("n_bytes", ctypes.c_size_t),
        ("signal_value", ctypes.c_void_p),
        ("signal_number", ctypes.c_int),
        ("signal_notify", ctypes.c_int),
        ("signal_rest", ctypes.c_char * 48),
        ("own", ctypes.c_char * 32),  # the library's
        ("offset", ctypes.c_int64),
        ("reserved", ctypes.c_char * 32),
    )


@cache
def library() -> Any:
    """The C library, or None where it has no such reads, or is not the one whose structures are known here."""
    if platform.libc_ver()[0] != "glibc" or sys.maxsize < 1 << 32:
        return None
    for name in (None, "librt.so.1"):  # before glibc 2.34 they were in a library of their own
        try:
            opened = ctypes.CDLL(name, use_errno=True)
            opened.aio_return.restype = ctypes.c_ssize_t
            opened.lio_listio  # noqa: B018
        except (OSError, AttributeError):
            continue
        return opened
    return None


def read_side_by_side(files: Sequence[int], memory: memoryview, offset: int) -> int:
    """Fill ``memory`` from ``offset`` of a file on, of which each descriptor reads an equal share at once.

    Args:
        files: descriptors of one file; there must be a :func:`library`.
        memory: writable, aligned to pages of memory where the file is read past the page cache.

    Returns:
        so many bytes from the start were read: fewer than wanted where the file ends.

    Raises:
        OSError: the file cannot be read.
    """
    share = -(-len(memory) // len(files) // MEMORY_PAGE) * MEMORY_PAGE
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    starts = range(0, len(memory), share)
    requests = (Request * len(starts))()
    for request, file, start in zip(requests, files, starts, strict=False):
        request.fildes, request.opcode, request.signal_notify = file, LIO_READ, SIGEV_NONE
        request.buffer, request.n_bytes = address + start, min(share, len(memory) - start)
        request.offset = offset + start
    return _finish(requests)


def _finish(requests: Any) -> int:
    """Have the requests done; the bytes before the first gap."""
    functions = library()
    pointers = (ctypes.POINTER(Request) * len(requests))(*map(ctypes.pointer, requests))
    started = functions.lio_listio(LIO_WAIT, pointers, len(requests), None) == 0
    reason = 0 if started else ctypes.get_errno()
    done, gapless = 0, True
    for request in requests:
        one = (ctypes.POINTER(Request) * 1)(ctypes.pointer(request))
        # A signal ends the waiting, not the reading, and the memory must not go while it goes on.
        while functions.aio_error(ctypes.byref(request)) == errno.EINPROGRESS:
            functions.aio_suspend(one, 1, None)
        failure = functions.aio_error(ctypes.byref(request))
        count = functions.aio_return(ctypes.byref(request))
        if failure:
            reason = failure
        done += count if gapless and not failure else 0
        gapless = gapless and count == request.n_bytes
    if reason not in (0, errno.EINTR):
        raise OSError(reason, os.strerror(reason))
    return int(done)
