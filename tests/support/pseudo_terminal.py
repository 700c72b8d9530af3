"""A program on a pseudo-terminal of its own, as a person has it before them."""

import os
import pty
import select
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

PATIENCE_S = 120.0  # for a busy machine; nothing here waits that long where all is well
CTRL_C = b"\x03"


class Program:
    """Its process, and what it has shown."""

    def __init__(self, arguments: Sequence[str], environment: dict[str, str]) -> None:
        self.shown = b""
        self.code: int | None = None
        self.pid, self._terminal = pty.fork()
        if self.pid == 0:
            # A run in the background inherits an ignored Ctrl-C.
            signal.signal(signal.SIGINT, signal.default_int_handler)
            os.execve(sys.executable, [sys.executable, "-P", *arguments], {**os.environ, **environment})

    def type(self, keys: bytes) -> None:
        os.write(self._terminal, keys)

    def wait_for(self, text: str) -> None:
        """Read until this is shown, and forget it and all before it."""
        wanted, end = text.encode(), time.monotonic() + PATIENCE_S
        while wanted not in self.shown:
            assert self._read(), f"ended without {text!r}: {self.shown.decode(errors='replace')}"
            assert time.monotonic() < end, f"never {text!r}: {self.shown.decode(errors='replace')}"
        self.shown = self.shown.partition(wanted)[2]

    def end(self) -> int:
        """The exit code, once it has ended by itself."""
        limit = time.monotonic() + PATIENCE_S
        while self.code is None:
            assert time.monotonic() < limit, f"hangs: {self.shown.decode(errors='replace')}"
            self._read()
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.code = os.waitstatus_to_exitcode(status)
        while self._read():
            pass
        return self.code

    def _read(self) -> bool:
        """What comes within a moment; False at the end."""
        if not select.select([self._terminal], [], [], 0.1)[0]:
            return self.code is None
        try:
            data = os.read(self._terminal, 1 << 16)
        except OSError:  # how the system says that the other side has gone
            return False
        self.shown += data
        return bool(data)

    def close(self) -> None:
        if self.code is None:
            os.killpg(self.pid, signal.SIGKILL)
            os.waitpid(self.pid, 0)
        os.close(self._terminal)


@contextmanager
def program(*arguments: str, **environment: str) -> Iterator[Program]:
    """Python with these arguments."""
    running = Program(arguments, environment)
    try:
        yield running
    finally:
        running.close()


def children_of(pid: int) -> list[int]:
    with open(f"/proc/{pid}/task/{pid}/children", encoding="ascii") as file:
        return [int(child) for child in file.read().split()]
