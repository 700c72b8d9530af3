"""The CPU's operators: each is one jt.code operation over the headers in this folder."""

import weakref
from dataclasses import dataclass

import numpy as np

from moss_jt.backend.jittor import jt
from moss_jt.kernels.adapters import AdapterBank
from moss_jt.kernels.checks import check_adapters, check_block, check_cache, check_dtype, check_shape
from moss_jt.kernels.cpu.simd import available_simd, chosen_simd
from moss_jt.kernels.cpu.source import onednn_folder, run
from moss_jt.kernels.interface import (
    BlockWeights,
    DenseMatrix,
    Matrix,
    Operators,
    PackedMatrix,
    Places,
    Var,
)
from moss_jt.kernels.needs import CpuNeeds
from moss_jt.kernels.rotary_table import rotary_table
from moss_jt.store.architecture import BLOCK as BLOCK_TENSORS
from moss_jt.store.config import MossConfig

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

BLOCK = """
moss::Block<moss::MATRIX> block{};
block.h = (const float*)in0_p;
block.norm_weight = (const uint16_t*)in1_p;
block.norm_bias = (const uint16_t*)in2_p;
block.fc_in_bias = (const uint16_t*)in3_p;
block.fc_out_bias = (const uint16_t*)in4_p;
block.rotary = (const float*)in5_p;
block.places = (const int32_t*)in6_p;
block.pages = (const int32_t*)in7_p;
block.pages_per_slot = in7_shape1;
const int64_t layer = (int64_t)data["layer"] * in8_shape1 * in8_shape2 * in8_shape3;
block.keys = (uint16_t*)in8_p + layer;
block.values = (uint16_t*)in9_p + layer;
block.result = (float*)out0_p;
block.workspace = (float*)out1_p;
block.adapters = moss::Adapters{(const float*)in10_p, (const int32_t*)in11_p, (const int32_t*)in12_p, (int64_t)data["rank"]};
block.tokens = in0_shape0;
block.whole = (int64_t)data["whole"];
block.heads = in8_shape2;
block.head_dim = in8_shape3;
block.pairs = in5_shape2;
block.epsilon = (float)data["epsilon"];
MATRICES
const moss::Unlocked unlocked(data["others_run"] != 0);
moss::run_block(block);
"""

MATRIX_NAMES = (
    "qkv",
    "out_proj",
    "fc_in",
    "fc_out",
)  # as block.h calls them: Jittor defines a macro named out
FIRST_MATRIX = 13  # the first input that belongs to a matrix


def dense_source() -> str:
    lines = [
        f"block.{name} = moss::Dense{{(const uint16_t*)in{i}_p, in{i}_shape0, in{i}_shape1}};"
        for i, name in enumerate(MATRIX_NAMES, start=FIRST_MATRIX)
    ]
    return BLOCK.replace("MATRICES", "\n".join(lines)).replace("MATRIX", "Dense")


def packed_source(bits: int) -> str:
    kind = f"Int{bits}"
    lines = []
    for index, name in enumerate(MATRIX_NAMES):
        packed, scales, zeros, order = (FIRST_MATRIX + 4 * index + i for i in range(4))
        inputs = f"in{packed}_shape1 * {8 // bits}"
        lines.append(
            f"block.{name} = moss::{kind}{{(const uint8_t*)in{packed}_p, (const uint16_t*)in{scales}_p, "
            f"(const uint8_t*)in{zeros}_p, in{order}_shape0 == {inputs} ? (const int32_t*)in{order}_p : nullptr, "
            f"in{packed}_shape0, {inputs}, in{scales}_shape1}};"
        )
    return BLOCK.replace("MATRICES", "\n".join(lines)).replace("MATRIX", kind)


BLOCK_SOURCES = {16: dense_source(), 8: packed_source(8), 4: packed_source(4)}


@dataclass(frozen=True)
class CheckedBlock:
    """A block's weights, which fit together: bits of the matrices, norm and biases, and the matrices' arrays."""

    bits: int
    vectors: list[Var]
    matrices: list[Var]


@dataclass(frozen=True)
class CheckedPass:
    """What all blocks of a pass have alike: the cache, which has its pages; the operation's inputs, and the numbers beside them."""

    keys: Var
    values: Var
    inputs: list[Var]
    data: dict[str, float]
    shapes: dict[int, list[tuple[int, ...]]]  # of the results, by bits of the block's matrices

    def is_of(self, keys: Var, values: Var, layer: int) -> bool:
        return keys is self.keys and values is self.values and 0 <= layer < keys.shape[0]


class CpuOperators:
    """See :class:`moss_jt.kernels.interface.Operators`.

    A token's result is the same, bit for bit, whoever shares the pass; whole pages' are other bits than few tokens'.

    Args:
        config: the model's geometry.
        simd: one of kernels/cpu/simd.py's levels, from "512-vnni" (AVX-512 VNNI) to "0" (plain C++); by default the fastest,
            or what MOSS_JT_SIMD says.
        adapters: that tokens may have.

    others_run  other threads may run Python while an operation computes, as a server's must; to be set where one thread alone
                uses Jittor

    Raises:
        ValueError: head_dim is odd, or this machine does not have ``simd``.
    """

    def __init__(
        self, config: MossConfig, simd: str | None = None, adapters: AdapterBank | None = None
    ) -> None:
        if config.head_dim % 2:
            raise ValueError(f"head_dim is {config.head_dim}; an even number is needed")
        self.config = config
        self.others_run = False
        self.simd = chosen_simd() if simd is None else simd
        if self.simd not in available_simd():
            raise ValueError(f"simd {simd!r} is not among {available_simd()}")
        self.rotary = jt.array(rotary_table(config.n_positions, config.rotary_dim))
        self.no_order = jt.array(np.zeros((2, 1), np.int32))  # for a matrix without input_order: no K is 2
        self.adapters = adapters
        self.bank = self.no_order if adapters is None else jt.reuse_np_array(adapters.values)
        self.directories = [] if adapters is None else [jt.array(layer) for layer in adapters.directory]
        self._checked: weakref.WeakKeyDictionary[BlockWeights, CheckedBlock] = weakref.WeakKeyDictionary()
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

    def block(self, h: Var, weights: BlockWeights, keys: Var, values: Var, layer: int, places: Places) -> Var:
        check_shape("h", h, (places.count, self.config.n_embd))
        check_adapters(places, self.adapters, layer)
        of_pass = self._passes.get(places)
        if of_pass is None or not of_pass.is_of(keys, values, layer):
            of_pass = self._passes[places] = self._check_pass(keys, values, layer, places)
        checked = self._checked.get(weights)
        if checked is None:
            checked = self._checked[weights] = self._check(weights)
        shapes = of_pass.shapes.get(checked.bits)
        if shapes is None:
            shapes = of_pass.shapes[checked.bits] = self._shapes(checked.bits, keys, places)
        rank, adapters = 0, [self.no_order] * 3
        if self.adapters is not None and places.adapters is not None:
            rank, adapters = (
                self.adapters.most_rank,
                [self.bank, self.directories[layer], places.adapter_tokens],
            )
        inputs = [h, *checked.vectors, *of_pass.inputs, *adapters, *checked.matrices]
        data = {"layer": layer, "rank": rank, "others_run": int(self.others_run), **of_pass.data}
        return run(self.simd, "block.h", BLOCK_SOURCES[checked.bits], shapes, inputs, data)[0]

    def _check_pass(self, keys: Var, values: Var, layer: int, places: Places) -> CheckedPass:
        check_cache(keys, values, self.config, layer, places)
        inputs = [self.rotary, places.tokens, places.table, keys, values]
        data = {"whole": places.whole, "epsilon": self.config.layer_norm_epsilon}
        return CheckedPass(keys, values, inputs, data, {})

    def _shapes(self, bits: int, keys: Var, places: Places) -> list[tuple[int, ...]]:
        """Of a block's result and of its workspace."""
        rank = 0 if self.adapters is None else self.adapters.most_rank
        positions = min(keys.shape[1], self.config.n_positions)
        few, onednn = places.count - places.whole, onednn_folder() is not None
        needs = CpuNeeds(self.config, bits, rank)
        floats = needs.block_floats(places.count, positions, few=few, onednn=onednn)
        return [(places.count, self.config.n_embd), (floats,)]

    def _check(self, weights: BlockWeights) -> CheckedBlock:
        check_block(weights, self.config)
        fields = [getattr(weights, tensor.field) for tensor in BLOCK_TENSORS]
        matrices = [field for field in fields if isinstance(field, (DenseMatrix, PackedMatrix))]
        packed = [matrix for matrix in matrices if isinstance(matrix, PackedMatrix)]
        bits = {matrix.bits for matrix in packed} | ({16} if len(packed) < len(matrices) else set())
        if len(bits) > 1:
            raise ValueError(f"one block has matrices of {sorted(bits)} bits; all four must have the same")
        vectors = [field for field in fields if not isinstance(field, (DenseMatrix, PackedMatrix))]
        arrays = [array for matrix in matrices for array in self._arrays(matrix)]
        return CheckedBlock(bits.pop(), vectors, arrays)

    def _arrays(self, matrix: Matrix) -> list[Var]:
        if isinstance(matrix, DenseMatrix):
            return [matrix.weight]
        order = self.no_order if matrix.input_order is None else matrix.input_order
        return [matrix.packed, matrix.scales, matrix.zeros, order]


def let_others_run(operators: Operators) -> None:
    """See ``others_run``; without effect where another processor computes."""
    if isinstance(operators, CpuOperators):
        operators.others_run = True
