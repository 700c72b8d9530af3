"""The one list of a CodeGen model's tensors: their names, what the operators call them, and their shapes.

Model folders, sizes, conversion, weights, operators' checks and benchmarks derive from it. Letters as in
moss_jt.kernels.interface: C n_embd, I n_inner.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod

from moss_jt.store.config import MossConfig

Wanted = dict[str, tuple[str, tuple[int, ...]]]  # local name -> (safetensors dtype, shape)
DTYPE_BYTES = {"F16": 2, "U8": 1, "I32": 4}


@dataclass(frozen=True)
class BlockTensor:
    """A tensor of every block.

    field  in moss_jt.kernels.interface.BlockWeights
    name   in files, without ``transformer.h.N.``; of a matrix without what comes after it (``.weight``, ``.packed`` ..)
    axes   in multiples of C and of I; two of a matrix (N out, K in)
    """

    field: str
    name: str
    axes: tuple[tuple[int, int], ...]

    @property
    def is_matrix(self) -> bool:
        return len(self.axes) == 2

    def shape(self, config: MossConfig) -> tuple[int, ...]:
        return tuple(c * config.n_embd + i * config.n_inner for c, i in self.axes)


_C, _3C, _I = (1, 0), (3, 0), (0, 1)
BLOCK = (
    BlockTensor("ln_1_weight", "ln_1.weight", (_C,)),
    BlockTensor("ln_1_bias", "ln_1.bias", (_C,)),
    BlockTensor("qkv", "attn.qkv_proj", (_3C, _C)),
    BlockTensor("out", "attn.out_proj", (_C, _C)),
    BlockTensor("fc_in", "mlp.fc_in", (_I, _C)),
    BlockTensor("fc_in_bias", "mlp.fc_in.bias", (_I,)),
    BlockTensor("fc_out", "mlp.fc_out", (_C, _I)),
    BlockTensor("fc_out_bias", "mlp.fc_out.bias", (_C,)),
)
MATRICES = tuple(tensor.name for tensor in BLOCK if tensor.is_matrix)


def matrix_shape(config: MossConfig, name: str) -> tuple[int, ...]:
    """(N out, K in) of a block's matrix."""
    return next(tensor for tensor in BLOCK if tensor.name == name).shape(config)


def block_tensors(config: MossConfig, bits: int, group_size: int) -> Wanted:
    """What every block has, with matrices of ``bits`` bits: float16, or packed as moss_jt.store.quant says."""
    tensors: Wanted = {}
    # Matrices first: in this order they lie in files, see docs/model-folder.md.
    for tensor in sorted(BLOCK, key=lambda tensor: not tensor.is_matrix):
        shape = tensor.shape(config)
        if not tensor.is_matrix:
            tensors[tensor.name] = ("F16", shape)
        elif bits == 16:
            tensors[f"{tensor.name}.weight"] = ("F16", shape)
        else:
            rows, columns = shape
            tensors[f"{tensor.name}.packed"] = ("U8", (rows, columns * bits // 8))
            tensors[f"{tensor.name}.scales"] = ("F16", (rows, columns // group_size))
            tensors[f"{tensor.name}.zeros"] = ("U8", (rows, columns // group_size))
    return tensors


def order_tensors(config: MossConfig, bits: int) -> Wanted:
    """What a quantised block may have, too: where act-order permuted a matrix's inputs."""
    if bits == 16:
        return {}
    return {f"{name}.input_order": ("I32", (matrix_shape(config, name)[1],)) for name in MATRICES}


HEAD_WEIGHT = "lm_head.weight"


def embedding_tensors(config: MossConfig) -> Wanted:
    return {"wte.weight": ("F16", (config.vocab_size, config.n_embd))}


def head_tensors(config: MossConfig) -> Wanted:
    width, vocabulary = config.n_embd, config.vocab_size
    return {
        HEAD_WEIGHT: ("F16", (vocabulary, width)),
        "lm_head.bias": ("F16", (vocabulary,)),
        "ln_f.weight": ("F16", (width,)),
        "ln_f.bias": ("F16", (width,)),
    }


def full_name(name: str, layer: int | None = None) -> str:
    """``ln_1.weight`` of block 3 -> ``transformer.h.3.ln_1.weight``; without a block what stands outside them."""
    if name.startswith("lm_head."):
        return name
    return f"transformer.{name}" if layer is None else f"transformer.h.{layer}.{name}"


def bytes_of(tensors: Mapping[str, tuple[str, tuple[int, ...]]]) -> int:
    return sum(DTYPE_BYTES[dtype] * prod(shape) for dtype, shape in tensors.values())
