"""The CPU's operators: each is one jt.code operation over the headers in this folder."""

import itertools
import weakref
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from moss_jt.backend.jittor import jt
from moss_jt.kernels.adapters import AdapterBank
from moss_jt.kernels.checks import check_adapters, check_block, check_cache, check_dtype, check_shape
from moss_jt.kernels.cpu.block_table import arrays_of, bits_of, table_of
from moss_jt.kernels.cpu.simd import available_simd, chosen_simd
from moss_jt.kernels.cpu.source import onednn_folder, run
from moss_jt.kernels.interface import (
    BlockWeights,
    ByteRows,
    CacheRows,
    Operators,
    Places,
    Var,
    numbers_of,
)
from moss_jt.kernels.needs import CpuNeeds
from moss_jt.kernels.rotary_table import rotary_table
from moss_jt.store.architecture import BLOCK
from moss_jt.store.config import MossConfig
from moss_jt.store.sizes import CACHE_BITS

HEAD = """
moss::Head head{};
head.h = (const float*)in0_p;
head.norm_weight = (const uint16_t*)in1_p;
head.norm_bias = (const uint16_t*)in2_p;
head.weight = moss::Dense{(const uint16_t*)in3_p, in3_shape0, in3_shape1};
head.bias = (const uint16_t*)in4_p;
head.logits = (float*)out0_p;
head.workspace = (float*)out1_p;
head.rows = in0_shape0;
head.whole = (int64_t)data["whole"];
head.epsilon = (float)data["epsilon"];
const moss::Unlocked unlocked(data["others_run"] != 0);
moss::run_head(head);
"""

BLOCKS = """
moss::Block<moss::MATRIX, moss::ROWS> block{};
block.h = (const float*)in0_p;
block.rotary = (const float*)in1_p;
block.places = (const int32_t*)in2_p;
block.pages = (const int32_t*)in3_p;
block.pages_per_slot = in3_shape1;
block.keys = KEYS;
block.values = VALUES;
block.result = (float*)out0_p;
block.workspace = (float*)out1_p;
block.adapters = moss::Adapters{(const float*)in6_p, (const int32_t*)in7_p, (const int32_t*)in8_p, (int64_t)data["rank"]};
block.tokens = in0_shape0;
block.whole = (int64_t)data["whole"];
block.heads = in4_shape2;
block.head_dim = in4_shape3;
block.pairs = in1_shape2;
block.epsilon = (float)data["epsilon"];
const moss::Unlocked unlocked(data["others_run"] != 0);
const int64_t directory = (int64_t)data["directory"];
block.skip((int64_t)data["layer"], in4_shape1, directory);
moss::run_blocks(block, TABLE, in4_shape1, directory);
"""

# Blocks one after another, whose weights lie where the table says.
OF_TABLE = "(const int64_t*)in11_p, in11_shape0, in11_shape1"

# One block whose weights are inputs, wherever Jittor has them by now.
OF_INPUTS = "std::array<int64_t, {count}>{{{row}}}.data(), 1, 0"

# Keys or values, by the bits of a number: the type, and what it is made of.
CACHE_ROWS = {
    16: ("HalfRows", "moss::HalfRows{{(uint16_t*)in{numbers}_p}}"),
    8: ("ByteRows", "moss::ByteRows{{(int8_t*)in{numbers}_p, (float*)in{scales}_p}}"),
}
FIRST_WEIGHT = 11  # the first input that is a weight, or the table


def block_source(bits: int, cache_bits: int, of_inputs: bool) -> str:
    """Of blocks whose matrices and cache have so many bits."""
    name, rows = CACHE_ROWS[cache_bits]
    row = input_row(bits)
    table = OF_INPUTS.format(count=len(row), row=", ".join(row)) if of_inputs else OF_TABLE
    source = BLOCKS
    for place, text in (
        ("TABLE", table),
        ("MATRIX", "Dense" if bits == 16 else f"Int{bits}"),
        ("ROWS", name),
        ("KEYS", rows.format(numbers=4, scales=9)),
        ("VALUES", rows.format(numbers=5, scales=10)),
    ):
        source = source.replace(place, text)
    return source


def input_row(bits: int) -> list[str]:
    """What a row of moss_jt.kernels.cpu.block_table has, of inputs as its arrays_of() lists them."""
    row: list[str] = []
    number = FIRST_WEIGHT
    for tensor in BLOCK:
        parts = [f"in{i}" for i in range(number, number + (4 if tensor.is_matrix and bits < 16 else 1))]
        number += len(parts)
        row += [f"(int64_t){part}_p" for part in parts]
        if tensor.is_matrix:
            columns = f"{parts[0]}_shape1" if bits == 16 else f"{parts[0]}_shape1 * {8 // bits}"
            row += [f"{parts[0]}_shape0", columns]
        if len(parts) == 4:
            row[-3] = f"{parts[3]}_shape0 == {columns} ? {row[-3]} : 0"
            row.append(f"{parts[1]}_shape1")
    return row


BLOCK_SOURCES = {key: block_source(*key) for key in itertools.product((16, 8, 4), CACHE_BITS, (False, True))}


@dataclass(frozen=True)
class CheckedBlocks:
    """Blocks whose weights fit together: bits of their matrices, and the operation's inputs that stand for them."""

    blocks: list[weakref.ref[BlockWeights]]
    bits: int
    inputs: list[Var]

    def is_of(self, blocks: Sequence[BlockWeights]) -> bool:
        return all(own() is block for own, block in zip(self.blocks, blocks, strict=True))


@dataclass(frozen=True)
class CheckedPass:
    """What all blocks of a pass have alike: the cache, which has its pages; the operation's inputs, and the numbers beside them."""

    keys: CacheRows
    values: CacheRows
    cache_bits: int
    inputs: list[Var]
    data: dict[str, float]
    shapes: dict[int, list[tuple[int, ...]]]  # of the results, by bits of the block's matrices

    def is_of(self, keys: CacheRows, values: CacheRows, first: int, last: int) -> bool:
        return keys is self.keys and values is self.values and 0 <= first <= last < numbers_of(keys).shape[0]


class CpuOperators:
    """See :class:`moss_jt.kernels.interface.Operators`.

    A token's result is the same, bit for bit, whoever shares the pass; whole pages' are other bits than few tokens'.

    Args:
        config: the model's geometry.
        simd: one of kernels/cpu/simd.py's levels, from "512-vnni" (AVX-512 VNNI) to "0" (plain C++); by default the fastest,
            or what MOSS_JT_SIMD says.
        adapters: that tokens may have.
        weights_move: Jittor may put weights elsewhere from one pass to another, as it does where it swaps: one block at a time.

    others_run  other threads may run Python while an operation computes, as a server's must; to be set where one thread alone
                uses Jittor

    Raises:
        ValueError: head_dim is odd, or this machine does not have ``simd``.
    """

    def __init__(
        self,
        config: MossConfig,
        simd: str | None = None,
        adapters: AdapterBank | None = None,
        weights_move: bool = False,
    ) -> None:
        if config.head_dim % 2:
            raise ValueError(f"head_dim is {config.head_dim}; an even number is needed")
        self.config = config
        self.others_run = False
        self.simd = chosen_simd() if simd is None else simd
        if self.simd not in available_simd():
            raise ValueError(f"simd {simd!r} is not among {available_simd()}")
        self.rotary = jt.array(rotary_table(config.n_positions, config.rotary_dim))
        self.weights_move = weights_move
        # For an input that is not wanted; also for input_order, which never has two numbers.
        self.nothing = jt.array(np.zeros((2, 1), np.int32))
        self.adapters = adapters
        self.bank = self.nothing if adapters is None else jt.reuse_np_array(adapters.values)
        self.directory = self.nothing if adapters is None else jt.array(adapters.directory)
        # By the first of the blocks and how many they are.
        self._checked = weakref.WeakKeyDictionary[BlockWeights, dict[int, CheckedBlocks]]()
        self._passes: weakref.WeakKeyDictionary[Places, CheckedPass] = weakref.WeakKeyDictionary()

    @property
    def level(self) -> str:
        """What decides the last bits of a result, beside this package's sources and the processor."""
        folder = onednn_folder()
        library = None if folder is None else folder / "lib" / "libmkldnn.so"
        size = library.stat().st_size if library is not None and library.exists() else 0
        return f"cpu {self.simd} oneDNN {size}"

    def head(self, h: Var, norm_weight: Var, norm_bias: Var, weight: Var, bias: Var, whole: int = 0) -> Var:
        rows, width, vocab = h.shape[0], self.config.n_embd, weight.shape[0]
        check_shape("h", h, (rows, width))
        for name, var, shape in (
            ("norm_weight", norm_weight, (width,)),
            ("norm_bias", norm_bias, (width,)),
            ("weight", weight, (vocab, width)),
            ("bias", bias, (vocab,)),
        ):
            check_shape(name, var, shape)
            check_dtype(name, var, "float16")
        inputs = [h, norm_weight, norm_bias, weight, bias]
        data = {
            "epsilon": self.config.layer_norm_epsilon, "whole": whole, "others_run": int(self.others_run)
        }  # fmt: skip
        shapes = [(rows, vocab), (CpuNeeds(self.config, 16).head_floats(rows),)]
        return run(self.simd, "head.h", HEAD, shapes, inputs, data)[0]

    def block(
        self, h: Var, weights: BlockWeights, keys: CacheRows, values: CacheRows, layer: int, places: Places
    ) -> Var:
        return self.blocks(h, [weights], keys, values, layer, places)

    def blocks(
        self,
        h: Var,
        blocks: Sequence[BlockWeights],
        keys: CacheRows,
        values: CacheRows,
        layer: int,
        places: Places,
    ) -> Var:
        check_shape("h", h, (places.count, self.config.n_embd))
        last = layer + len(blocks) - 1
        check_adapters(places, self.adapters, last)
        of_pass = self._passes.get(places)
        if of_pass is None or not of_pass.is_of(keys, values, layer, last):
            of_pass = self._passes[places] = self._check_pass(keys, values, layer, last, places)
        beginning_so = self._checked.setdefault(blocks[0], {})
        checked = beginning_so.get(len(blocks))
        if checked is None or not checked.is_of(blocks):
            checked = beginning_so[len(blocks)] = self._check(blocks)
        shapes = of_pass.shapes.get(checked.bits)
        if shapes is None:
            shapes = of_pass.shapes[checked.bits] = self._shapes(checked.bits, of_pass, places)
        inputs = [h, *of_pass.inputs, *checked.inputs]
        data = {"layer": layer, "others_run": int(self.others_run), **of_pass.data}
        source = BLOCK_SOURCES[checked.bits, of_pass.cache_bits, self.weights_move]
        return run(self.simd, "block.h", source, shapes, inputs, data)[0]

    def _check_pass(
        self, keys: CacheRows, values: CacheRows, first: int, last: int, places: Places
    ) -> CheckedPass:
        check_cache(keys, values, self.config, first, places, last)
        cache_bits, scales = 16, [self.nothing] * 2
        if isinstance(keys, ByteRows):
            cache_bits, scales = 8, [keys.scales, values.scales]
        rank, stride, adapters = 0, 0, [self.nothing] * 3
        if self.adapters is not None and places.adapters is not None:
            rank, stride = self.adapters.most_rank, int(np.prod(self.adapters.directory.shape[1:]))
            adapters = [self.bank, self.directory, places.adapter_tokens]
        cache = [numbers_of(keys), numbers_of(values)]
        inputs = [self.rotary, places.tokens, places.table, *cache, *adapters, *scales]
        data = {"whole": places.whole, "epsilon": self.config.layer_norm_epsilon}
        data |= {"rank": rank, "directory": stride}
        return CheckedPass(keys, values, cache_bits, inputs, data, {})

    def _shapes(self, bits: int, of_pass: CheckedPass, places: Places) -> list[tuple[int, ...]]:
        """Of a block's result and of its workspace."""
        rank = 0 if self.adapters is None else self.adapters.most_rank
        positions = min(numbers_of(of_pass.keys).shape[1], self.config.n_positions)
        few, onednn = places.count - places.whole, onednn_folder() is not None
        needs = CpuNeeds(self.config, bits, rank, of_pass.cache_bits)
        floats = needs.block_floats(places.count, positions, few=few, onednn=onednn)
        return [(places.count, self.config.n_embd), (floats,)]

    def _check(self, blocks: Sequence[BlockWeights]) -> CheckedBlocks:
        if self.weights_move and len(blocks) > 1:
            raise ValueError(f"{len(blocks)} blocks at once; of weights that move one is computed at a time")
        for weights in blocks:
            check_block(weights, self.config)
        bits = {bits_of(weights) for weights in blocks}
        if len(bits) > 1:
            raise ValueError(f"blocks have matrices of {sorted(bits)} bits; all must have the same")
        table = arrays_of(blocks[0], self.nothing) if self.weights_move else [table_of(blocks)]
        return CheckedBlocks([weakref.ref(weights) for weights in blocks], bits.pop(), table)


def let_others_run(operators: Operators) -> None:
    """See ``others_run``; without effect where another processor computes."""
    if isinstance(operators, CpuOperators):
        operators.others_run = True
