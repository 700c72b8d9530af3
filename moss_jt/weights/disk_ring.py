"""A ring of page-aligned buffers that one thread fills ahead of a consumer which takes pieces in a cycle.

The thread reads the pieces in order, around and around, as long as a buffer is free; the consumer takes them in the
same order and hands each buffer back when it asks for the next. A consumer that starts over (after an interruption)
or leaves pieces out makes the ring begin again at the piece it asks for. Knows files and memory, not models.
"""

import threading
from collections import deque
from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np

from moss_jt.errors import MossError
from moss_jt.weights.file_reader import Piece
from moss_jt.weights.page_buffer import page_buffer


class Reader(Protocol):
    """What fills the buffers: moss_jt.weights.file_reader.FileReader, or a test's."""

    def read(self, piece: Piece, target: np.ndarray, stopped: Callable[[], bool]) -> bool: ...

    def close(self) -> None: ...


class Ring:
    """``buffers`` buffers of ``buffer_bytes``, filled ahead with ``pieces``. Close it, or its thread stays."""

    def __init__(self, pieces: Sequence[Piece], buffers: int, buffer_bytes: int, reader: Reader) -> None:
        if buffers < 2 or not pieces:
            raise ValueError("a ring needs two buffers at least, and something to read")
        self.buffers = [page_buffer(buffer_bytes) for _ in range(buffers)]
        self._pieces = pieces
        self._reader = reader
        self._changed = threading.Condition()
        # All of these change only while self._changed is held.
        self._free = list(range(buffers))
        self._ready: deque[tuple[int, int]] = deque()  # (piece, buffer), in reading order
        self._filling: tuple[int, int] | None = None
        self._taken: int | None = None
        self._next = 0
        self._last = len(pieces) - 1  # the piece after which the cycle starts over
        self._discard = False  # what is being filled is no longer wanted
        self._error: MossError | None = None
        self._closing = False
        self._ended = False
        self._thread = threading.Thread(target=self._fill, name="moss-jt reader", daemon=True)
        self._thread.start()

    def end_cycle_after(self, piece: int) -> None:
        """Passes that leave out the last pieces say so, so that they are not read in vain."""
        with self._changed:
            self._last = piece

    def take(self, piece: int) -> int:
        """The number of the buffer that holds ``piece``, waited for. The buffer taken before is handed back.

        Raises:
            MossError: it could not be read. Taking again tries again.
        """
        with self._changed:
            self._hand_back()
            self._aim(piece)
            while not self._ready:
                if self._error is not None:
                    error, self._error = self._error, None
                    raise error
                if self._ended:
                    raise MossError("the weight stream is closed.")
                self._changed.wait()
            taken, buffer = self._ready.popleft()
            assert taken == piece, f"the ring holds piece {taken}, not {piece}"
            self._taken = buffer
            return buffer

    def is_ready(self, piece: int) -> bool:
        """Whether taking ``piece`` next would not wait, and would not fail."""
        with self._changed:
            return bool(self._ready) and self._ready[0][0] == piece

    def hand_back(self) -> None:
        """Free the buffer taken last for the pieces to come."""
        with self._changed:
            self._hand_back()

    def close(self) -> None:
        """Stop and join the thread (it finishes the request that it is in), and close the files."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        self._thread.join()
        self._reader.close()

    def _hand_back(self) -> None:
        if self._taken is not None:
            self._free.append(self._taken)
            self._taken = None
            self._changed.notify_all()

    def _aim(self, piece: int) -> None:
        """Drop what was read ahead before ``piece``, and begin again there if nothing read ahead is it."""
        while self._ready and self._ready[0][0] != piece:
            self._free.append(self._ready.popleft()[1])
        if not self._ready and not (self._filling and self._filling[0] == piece and not self._discard):
            self._discard = self._filling is not None
            if self._next != piece:
                self._next = piece
                self._error = None  # it was about another piece
        self._changed.notify_all()

    def _fill(self) -> None:
        try:
            while self._start_next():
                self._fill_one()
        finally:
            with self._changed:
                self._ended = True
                self._changed.notify_all()

    def _start_next(self) -> bool:
        """Wait for a free buffer and choose the next piece; False when closing."""
        with self._changed:
            while not self._closing and (not self._free or self._error is not None):
                self._changed.wait()
            if self._closing:
                return False
            self._filling = (self._next, self._free.pop())
            self._discard = False
            self._next = 0 if self._next >= self._last else self._next + 1
            return True

    def _fill_one(self) -> None:
        assert self._filling is not None
        piece, buffer = self._filling
        error = None
        complete = False
        try:
            complete = self._reader.read(self._pieces[piece], self.buffers[buffer], self._unwanted)
        except MossError as raised:
            error = raised
        with self._changed:
            self._filling = None
            if complete and not self._discard:
                self._ready.append((piece, buffer))
            else:
                self._free.append(buffer)
                if error is not None and not self._discard:
                    self._error = error
                    self._next = piece
            self._changed.notify_all()

    def _unwanted(self) -> bool:
        return self._discard or self._closing
