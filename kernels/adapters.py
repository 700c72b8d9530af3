"""Low-rank adapters as the operators take them: all of a model's in one array, and a directory of where each matrix lies.

``y = x w^T + (x A^T) B^T`` for the tokens that have the adapter. No Jittor here: a plan counts the bytes before it starts.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from moss_jt.kernels.needs import BANK_UNIT, FLOAT32
from moss_jt.store.architecture import BLOCK
from moss_jt.store.config import MossConfig

Floats = NDArray[np.float32]
# In the order in which the operators number them: kernels/cpu/adapters.h.
TARGETS = tuple(tensor.field for tensor in BLOCK if tensor.is_matrix)
# The most floats of all adapters together: offsets are int32.
MOST_FLOATS = BANK_UNIT << 31


@dataclass(frozen=True)
class AdapterShape:
    """
    rank     of every pair
    targets  matrices that have a pair, of TARGETS
    layers   blocks whose matrices do
    """

    rank: int
    targets: Sequence[str]
    layers: Sequence[int]

    def bytes_in_bank(self, config: MossConfig) -> int:
        """What the pairs take, each matrix from a multiple of BANK_UNIT floats on."""
        floats = sum(_aligned(self.rank * size) for target in self.targets for size in _sizes(config, target))
        return floats * len(self.layers) * FLOAT32


class AdapterBank:
    """
    shapes     of the adapters, by their numbers
    values     (n,) float32: A (rank, K) and B transposed (rank, N), B scaled, pair after pair
    directory  (L, adapters, len(TARGETS), 3) int32: where A and B begin, in units of BANK_UNIT floats, and the rank; 0 for no pair
    """

    def __init__(self, config: MossConfig, shapes: Sequence[AdapterShape]) -> None:
        self.config, self.shapes = config, tuple(shapes)
        self.directory = np.zeros((config.n_layer, len(shapes), len(TARGETS), 3), np.int32)
        floats, begins = 0, []
        for number, shape in enumerate(shapes):
            begins.append(floats)
            for layer in shape.layers:
                for target in shape.targets:
                    outputs, inputs = _sizes(config, target)
                    a, b = floats, floats + _aligned(shape.rank * inputs)
                    entry = a // BANK_UNIT, b // BANK_UNIT, shape.rank
                    self.directory[layer, number, TARGETS.index(target)] = entry
                    floats = b + _aligned(shape.rank * outputs)
        if floats >= MOST_FLOATS:
            raise ValueError(f"{floats} floats of adapters are more than offsets reach")
        self._begins = [*begins, floats]
        self.values: Floats = np.zeros(floats, np.float32)

    @cached_property
    def most_rank(self) -> int:
        return max((shape.rank for shape in self.shapes), default=0)

    def of(self, number: int) -> Floats:
        """All values of one adapter."""
        return self.values[self._begins[number] : self._begins[number + 1]]

    def pair(self, number: int, layer: int, target: str) -> tuple[Floats, Floats] | None:
        """Views of A (rank, K), and of B transposed and scaled (rank, N)."""
        a, b, rank = (int(one) for one in self.directory[layer, number, TARGETS.index(target)])
        if not rank:
            return None
        outputs, inputs = _sizes(self.config, target)
        return self._view(a, rank, inputs), self._view(b, rank, outputs)

    def _view(self, unit: int, rank: int, columns: int) -> Floats:
        begin = unit * BANK_UNIT
        return self.values[begin : begin + rank * columns].reshape(rank, columns)


def _sizes(config: MossConfig, target: str) -> tuple[int, int]:
    """(N, K)"""
    outputs, inputs = next(tensor for tensor in BLOCK if tensor.field == target).shape(config)
    return outputs, inputs


def _aligned(floats: int) -> int:
    return -(-floats // BANK_UNIT) * BANK_UNIT
