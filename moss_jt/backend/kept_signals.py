"""Signal handlers that survive a library which installs its own.

Jittor's handlers end the program on Ctrl-C, and on any child that a signal ended, without letting Python say a word.
"""

import contextlib
import ctypes
import signal
from collections.abc import Iterator

KEPT = ("SIGINT", "SIGQUIT", "SIGCHLD", "SIGSEGV", "SIGBUS", "SIGFPE", "SIGILL")
ACTION_BYTES = 512  # more than struct sigaction takes on any system (152 with glibc on x86-64)


@contextlib.contextmanager
def keep_signals() -> Iterator[None]:
    """Put back, on leaving, the handlers that were there on entering.

    Through the C library and not through Python's signal module: that one works in the main thread only, and does
    not know handlers that it did not install itself (faulthandler's).
    """
    libc = ctypes.CDLL(None)
    numbers = [int(getattr(signal, name)) for name in KEPT]
    actions = {number: ctypes.create_string_buffer(ACTION_BYTES) for number in numbers}
    for number, action in actions.items():
        libc.sigaction(number, None, action)
    try:
        yield
    finally:
        for number, action in actions.items():
            libc.sigaction(number, action, None)
