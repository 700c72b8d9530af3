"""How far loading weights has come, on a terminal, once it takes its time."""

import sys
import time

from moss_jt.store.sizes import GIB

PATIENCE_S = 2.0  # loading that is quicker is not worth a line
EACH_S = 0.2


class LoadingProgress:
    """One line on stderr that counts ``total_bytes``; nothing where nobody watches."""

    def __init__(self, total_bytes: int) -> None:
        self._total = total_bytes
        self._done = 0
        self._next = time.monotonic() + PATIENCE_S
        self._shown = False

    def advance(self, n_bytes: int) -> None:
        self._done += n_bytes
        now = time.monotonic()
        if now >= self._next and sys.stderr.isatty():
            done, total = self._done / GIB, self._total / GIB
            sys.stderr.write(f"\rmoss-jt: reading weights into memory, {done:.1f} of {total:.1f} GiB ")
            sys.stderr.flush()
            self._next = now + EACH_S
            self._shown = True

    def close(self) -> None:
        """Clear the line: what follows is the program's own."""
        if self._shown:
            sys.stderr.write("\r\x1b[K")
            sys.stderr.flush()
            self._shown = False
