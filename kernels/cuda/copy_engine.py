"""Copies from the host that run beside the computation: one custom Jittor operation over the CUDA runtime.

Every command is carried out, which mostly means queued, before its method returns. moss_jt.weights.device_ring
uses it.
"""

import itertools
from enum import IntEnum
from pathlib import Path

import numpy as np

from moss_jt.backend.jittor import jt
from moss_jt.kernels.interface import Queue, Var

FOLDER = Path(__file__).parent
SOURCE = """
moss_copy::run((int)data["command"], (int)data["queue"], (size_t)data["event"], (char*)in0_p, (size_t)data["offset"],
               (void*)(size_t)data["host"], (size_t)data["bytes"]);
"""

_events = itertools.count()  # the numbers are the process's


class Command(IntEnum):
    """As in copy_engine.h."""

    COPY = 0
    RECORD = 1
    WAIT = 2
    SYNCHRONIZE = 3
    PIN = 4
    UNPIN = 5
    READ_MOSTLY = 6
    PREFETCH = 7


class CudaCopyEngine:
    """See :class:`moss_jt.weights.device_ring.CopyEngine`; beside that, pinned and unified memory.

    All methods raise RuntimeError, with CUDA's own words, where CUDA refuses.
    """

    def __init__(self) -> None:
        self._none = device_memory(2)

    def new_event(self) -> int:
        return next(_events)

    def copy(self, memory: Var, offset: int, source: np.ndarray) -> None:
        self._run(Command.COPY, memory, offset=offset, host=source.ctypes.data, bytes=source.nbytes)

    def record(self, event: int, queue: Queue) -> None:
        self._run(Command.RECORD, event=event, queue=queue)

    def wait(self, queue: Queue, event: int) -> None:
        self._run(Command.WAIT, event=event, queue=queue)

    def synchronize(self, event: int) -> None:
        self._run(Command.SYNCHRONIZE, event=event)

    def pin(self, array: np.ndarray) -> None:
        """Page-lock host memory, so that the card reads it at the link's full speed."""
        self._run(Command.PIN, host=array.ctypes.data, bytes=array.nbytes)

    def unpin(self, array: np.ndarray) -> None:
        self._run(Command.UNPIN, host=array.ctypes.data)

    def read_mostly(self, memory: Var) -> None:
        """Tell unified memory that host and card may both keep a copy, since nobody writes."""
        self._run(Command.READ_MOSTLY, memory, bytes=memory.shape[0])

    def prefetch(self, memory: Var) -> None:
        """Queue that unified memory comes to the card."""
        self._run(Command.PREFETCH, memory, bytes=memory.shape[0])

    def _run(self, command: Command, memory: Var | None = None, **data: int) -> None:
        everything = {"queue": Queue.COMPUTE, "event": 0, "offset": 0, "host": 0, "bytes": 0, **data}
        numbers = {name: float(value) for name, value in everything.items()}
        jt.code(
            (1,),
            "int32",
            [self._none if memory is None else memory],
            cuda_header=f'#include "{FOLDER / "copy_engine.h"}"\n',
            cuda_src=SOURCE,
            data={"command": float(command), **numbers},
        ).sync()


def device_memory(n_bytes: int) -> Var:
    """(n_bytes,) uint8 on the device; what lies in it is anything."""
    memory = jt.empty((n_bytes,), "uint8")
    memory.sync()
    return memory
