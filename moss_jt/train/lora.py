"""Low-rank adapters: which matrices have one, and their parameters, all in one flat array.

``y = x w^T + scale * (x A^T) B^T`` with A (rank, K) and B (N, rank), scale = alpha / rank (Hu et al., arXiv 2106.09685).
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from moss_jt.errors import MossError
from moss_jt.store.architecture import BLOCK
from moss_jt.store.config import MossConfig

Floats = NDArray[np.float32]
# In the order of a block's tensors, as the operators call them.
TARGETS = tuple(tensor.field for tensor in BLOCK if tensor.is_matrix)
MOST_RANK = 1024


@dataclass(frozen=True)
class LoraSettings:
    """
    rank, alpha  of every adapter
    targets      matrices that have one: of qkv, out, fc_in, fc_out
    layers       so many of the last blocks have them; None for all
    """

    rank: int = 8
    alpha: float = 16.0
    targets: Sequence[str] = TARGETS
    layers: int | None = None

    def __post_init__(self) -> None:
        if not 1 <= self.rank <= MOST_RANK:
            raise MossError(
                f"a rank of {self.rank} is not possible. Give --rank a number from 1 to {MOST_RANK}; 8 is usual."
            )
        unknown = [name for name in self.targets if name not in TARGETS]
        if unknown or not self.targets:
            raise MossError(
                f"there are no targets {', '.join(unknown) or '(none given)'}; there are {', '.join(TARGETS)}."
            )

    def first_layer(self, config: MossConfig) -> int:
        """The first block that has adapters.

        Raises:
            MossError: the model has not so many blocks.
        """
        layers = config.n_layer if self.layers is None else self.layers
        if not 1 <= layers <= config.n_layer:
            raise MossError(f"the model has {config.n_layer} blocks; --layers {layers} is not possible.")
        return config.n_layer - layers


class Pair(NamedTuple):
    """A (rank, K) and B (N, rank)."""

    a: Floats
    b: Floats


class Adapter:
    """The adapters of one model.

    settings  what they were made with
    values    (P,) float32: all of them, block after block; ``pairs`` are views of it
    """

    def __init__(self, config: MossConfig, settings: LoraSettings) -> None:
        self.config, self.settings = config, settings
        self._shapes = dict(pair_shapes(config, settings))
        self.values = np.zeros(sum(a[0] * a[1] + b[0] * b[1] for a, b in self._shapes.values()), np.float32)
        self.pairs = self.pairs_of(self.values)

    @classmethod
    def random(cls, config: MossConfig, settings: LoraSettings, seed: int) -> "Adapter":
        """As PEFT begins: A uniform within 1 / sqrt(K), B zero, so that the model says at first what it said before."""
        adapter = cls(config, settings)
        for (layer, target), pair in adapter.pairs.items():
            draw = np.random.default_rng([seed, layer, TARGETS.index(target)])
            bound = pair.a.shape[1] ** -0.5
            pair.a[:] = draw.uniform(-bound, bound, pair.a.shape)
        return adapter

    @property
    def scale(self) -> float:
        return self.settings.alpha / self.settings.rank

    @property
    def first_layer(self) -> int:
        return self.settings.first_layer(self.config)

    def pairs_of(self, flat: Floats) -> dict[tuple[int, str], Pair]:
        """(block, target) -> views of a flat array that is laid out as ``values``: gradients, moments."""
        pairs, at = {}, 0
        for key, (a_shape, b_shape) in self._shapes.items():
            a_end = at + a_shape[0] * a_shape[1]
            b_end = a_end + b_shape[0] * b_shape[1]
            pairs[key] = Pair(flat[at:a_end].reshape(a_shape), flat[a_end:b_end].reshape(b_shape))
            at = b_end
        return pairs


Shape = tuple[int, int]


def pair_shapes(
    config: MossConfig, settings: LoraSettings
) -> Iterator[tuple[tuple[int, str], tuple[Shape, Shape]]]:
    """(block, target) -> the shapes of A and of B."""
    matrices = {tensor.field: tensor.shape(config) for tensor in BLOCK if tensor.is_matrix}
    for layer in range(settings.first_layer(config), config.n_layer):
        for target in TARGETS:
            if target in settings.targets:
                outputs, inputs = matrices[target]
                yield (layer, target), ((settings.rank, inputs), (outputs, settings.rank))
