"""How many bytes each part of a model takes, from a model folder's headers or from a geometry. No I/O, no Jittor."""

from dataclasses import dataclass
from math import gcd
from typing import NamedTuple

from moss_jt.store.architecture import (
    HEAD_WEIGHT,
    block_tensors,
    bytes_of,
    embedding_tensors,
    head_tensors,
)
from moss_jt.store.config import MOSS_MOON_003, MossConfig
from moss_jt.store.model_folder import Store
from moss_jt.store.published import bits_of_name

MEMORY_PAGE = 4096
GIB = 1 << 30
MIB = 1 << 20
FLOAT16 = 2
FLOAT32 = 4

# What a process holds besides weights, cache and workspace, for MOSS: Python, NumPy and the tokenizer (155 MiB measured),
# and what moss_jt.plan.placement adds for Jittor and all that comes later. A running model counts what it really holds.
FOOTPRINT_BYTES = 300 * MIB

# Positions of a page of the cache, which share one of attention's partial results.
CACHE_PAGE = 64

# Bits of a number in the cache. Of 8, a head's vector at a position has a scale beside its numbers.
CACHE_BITS = (16, 8)

# New tokens of one pass while a prompt is read. A streamed model is read once per pass, so the more the better;
# beyond this the workspace would cost more than the passes that it saves.
PASS_TOKENS = 512


class Slab(NamedTuple):
    """A range of rows of the head's weight that is moved at once: full pages of memory, except at the end."""

    first_row: int
    last_row: int
    n_bytes: int


@dataclass(frozen=True)
class ModelSizes:
    """Bytes of a model's parts.

    block_bytes       one number per block, full pages of memory
    head_bytes        the head's weight
    small_bytes       the head's bias and the final layer norm, always in memory
    embedding_bytes   on disk only: a pass reads the few rows that it needs
    cache_bits        of keys and values, 16 or 8
    """

    config: MossConfig
    bits: int
    block_bytes: tuple[int, ...]
    head_bytes: int
    small_bytes: int
    embedding_bytes: int
    cache_bits: int = 16

    @property
    def weight_bytes(self) -> int:
        """All weights, the embedding included: about what the model folder takes on disk."""
        return sum(self.block_bytes) + self.head_bytes + self.small_bytes + self.embedding_bytes

    def kv_cache_bytes(self, context: int) -> int:
        """Keys and values of ``context`` positions in all blocks: float16, or int8 with a float32 scale for each head's."""
        c = self.config
        position = c.n_embd * FLOAT16 if self.cache_bits == 16 else c.n_embd + c.n_head * FLOAT32
        return 2 * c.n_layer * context * position

    def cache_bytes(self, context: int) -> int:
        """The pages that hold so many positions."""
        return self.kv_cache_bytes(-(-context // CACHE_PAGE) * CACHE_PAGE)

    def head_slabs(self) -> tuple[Slab, ...]:
        """The head in equal slabs of about the largest block's size, so that one ring of buffers serves both."""
        rows = self.config.vocab_size
        row_bytes = self.head_bytes // rows
        aligned = MEMORY_PAGE // gcd(
            MEMORY_PAGE, row_bytes
        )  # rows that end where a page ends: reads stay aligned
        slabs = -(-self.head_bytes // max(self.block_bytes))
        step = -(-rows // (slabs * aligned)) * aligned
        ranges = [(first, min(rows, first + step)) for first in range(0, rows, step)]
        return tuple(Slab(first, last, (last - first) * row_bytes) for first, last in ranges)


def page_aligned(n_bytes: int) -> int:
    return -(-n_bytes // MEMORY_PAGE) * MEMORY_PAGE


def sizes_of_store(store: Store, cache_bits: int = 16) -> ModelSizes:
    """Sizes of a model folder, from its files' headers."""
    blocks = tuple(page_aligned(file.nbytes - file.data_offset) for file in store.blocks)
    return _sizes(store.config, store.bits, blocks, cache_bits)


def sizes_of_geometry(
    config: MossConfig, bits: int = 16, group_size: int = 128, cache_bits: int = 16
) -> ModelSizes:
    """Sizes of a model that is not there: what its model folder would hold, without act-order."""
    block = page_aligned(bytes_of(block_tensors(config, bits, group_size)))
    return _sizes(config, bits, (block,) * config.n_layer, cache_bits)


def _sizes(config: MossConfig, bits: int, blocks: tuple[int, ...], cache_bits: int = 16) -> ModelSizes:
    head = head_tensors(config)
    weight = {HEAD_WEIGHT: head.pop(HEAD_WEIGHT)}
    return ModelSizes(
        config=config,
        bits=bits,
        block_bytes=blocks,
        head_bytes=bytes_of(weight),
        small_bytes=bytes_of(head),
        embedding_bytes=bytes_of(embedding_tensors(config)),
        cache_bits=cache_bits,
    )


def geometry_of_name(name: str) -> ModelSizes | None:
    """Sizes of a model of MOSS's by its name or hub id, with nothing downloaded; None for any other name.

    ``moss-moon-003``, ``fnlp/moss-moon-003-sft``, ``fnlp/moss-moon-003-sft-plugin-int4`` and so on.

    Raises:
        MossError: the family has no such model.
    """
    bits = bits_of_name(name)
    return None if bits is None else sizes_of_geometry(MOSS_MOON_003, bits)
