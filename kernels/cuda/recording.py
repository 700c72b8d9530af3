"""What a block launches, noted once: every later pass of as many tokens queues it from C++, without Python between the launches.

:class:`Recorder` is a :class:`moss_jt.kernels.cuda.launchers.Launchers` that launches nothing. Its arrays are :class:`DeviceArray`,
so many bytes on in one of an operation's memories, and what it notes holds wherever those lie. launch_queue.h reads the table.
"""

import ctypes
from dataclasses import dataclass, replace
from enum import IntEnum
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from moss_jt.backend.jittor import jt
from moss_jt.kernels.cuda.launchers import THREADS, Array, Launchers
from moss_jt.kernels.interface import Var

HEADER = f'#include "{Path(__file__).parent / "launch_queue.h"}"\n'
ALIGNMENT = 256  # bytes, as of every allocation on a card
MOST_ARGUMENTS = 32  # kMostArguments in launch_queue.h


class Kind(IntEnum):
    """As in launch_queue.h."""

    NUMBER = 0
    ARRAY = 1


@dataclass(frozen=True)
class DeviceArray:
    """An array that begins ``offset`` bytes into memory number ``memory`` of an operation: its inputs, its result, its workspace.

    layer_bytes  by which it moves on with each layer
    """

    memory: int
    offset: int
    shape: tuple[int, ...]
    dtype: np.dtype
    layer_bytes: int = 0

    @property
    def size(self) -> int:
        return int(np.prod(self.shape))

    def reshape(self, *shape: Any) -> "DeviceArray":
        """As NumPy's, with one -1 at most."""
        wanted = shape[0] if isinstance(shape[0], tuple) else shape
        filled = tuple(self.size // -int(np.prod(wanted)) if n == -1 else n for n in wanted)
        return replace(self, shape=filled)

    def __getitem__(self, rows: slice) -> "DeviceArray":
        """Some of the first axis."""
        first, end, _ = rows.indices(self.shape[0])
        row_bytes = self.size // self.shape[0] * self.dtype.itemsize
        shape = (end - first, *self.shape[1:])
        return replace(self, offset=self.offset + first * row_bytes, shape=shape)


class Recorder(Launchers):
    """Notes launches.

    Args:
        launchers: where the kernels come from.
        workspace: the number of the memory for results in between.
    """

    def __init__(self, launchers: Launchers, workspace: int) -> None:
        super().__init__(self)
        self._launchers = launchers
        self._workspace = workspace
        self._entries: list[int] = []
        self._launches = 0
        self._bytes = 0

    def empty(self, shape: tuple[int, ...], dtype: Any) -> DeviceArray:
        """As CuPy's: the next part of the workspace."""
        array = DeviceArray(self._workspace, self._bytes, tuple(shape), np.dtype(dtype))
        self._bytes += -(-array.size * array.dtype.itemsize // ALIGNMENT) * ALIGNMENT
        return array

    def launch(
        self, module: str, kernel: str, grid: tuple[int, ...], *arguments: Any, threads: int = THREADS
    ) -> None:
        assert len(arguments) <= MOST_ARGUMENTS
        function = self._launchers.function(module, kernel).kernel.ptr
        self._launches += 1
        self._entries += [function, *(*grid, 1, 1)[:3], threads, len(arguments)]
        for argument in arguments:
            self._entries += _entry(argument)

    def recording(self) -> "Recording":
        return Recording(np.array([self._launches, *self._entries], np.int64), self._bytes)


def _entry(argument: Any) -> tuple[int, int, int, int, int]:
    if isinstance(argument, DeviceArray):
        return Kind.ARRAY, argument.memory, argument.offset, argument.size, argument.layer_bytes
    if argument is None:
        return Kind.NUMBER, 0, 0, 0, 0
    if isinstance(argument, float):
        return Kind.NUMBER, 0, int(np.float32(argument).view(np.uint32)), 0, 0
    return Kind.NUMBER, 0, int(argument), 0, 0


@dataclass(frozen=True, eq=False)
class Recording:
    """Keep it until what was queued with it is done: native code reads the table."""

    table: np.ndarray
    workspace_bytes: int

    @cached_property
    def address(self) -> float:
        return float(self.table.ctypes.data)


def launch_address(cupy: Array) -> float:
    """Of the driver's cuLaunchKernel. What stands in for CuPy has its own."""
    own = getattr(cupy, "launch_kernel_address", None)
    if own is not None:
        return float(own())
    return float(ctypes.cast(ctypes.CDLL("libcuda.so.1").cuLaunchKernel, ctypes.c_void_p).value or 0)


def queue(
    recording: Recording,
    launch: float,
    shape: tuple[int, ...],
    inputs: list[Var],
    layer: int = 0,
) -> Var:
    """One Jittor operation that launches it all; memories are the inputs, the result (float32) and the workspace."""
    source = _source(len(inputs))
    result, _ = jt.code(
        [shape, (max(recording.workspace_bytes, 4),)],
        ["float32", "uint8"],
        inputs,
        cpu_header=HEADER,
        cpu_src=source,
        cuda_header=HEADER,
        cuda_src=source,
        data={
            "table": recording.address,
            "launch": launch,
            "layer": float(layer),
        },
    )
    return result


def _source(inputs: int) -> str:
    memories = ", ".join([*(f"(char*)in{i}_p" for i in range(inputs)), "(char*)out0_p", "(char*)out1_p"])
    return f"""
char* const memories[] = {{{memories}}};
moss_launch::run((const int64_t*)(size_t)data["table"], (moss_launch::Launch)(size_t)data["launch"], memories,
                 (int64_t)data["layer"]);
"""
