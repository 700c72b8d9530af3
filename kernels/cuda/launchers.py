"""Launches the CUDA kernels of this folder: chooses grid and block, checks shapes, allocates results. Arrays are CuPy's.

Letters as in moss_jt.kernels.interface. ``cupy`` is handed in, so that this module imports nowhere without a GPU's packages
and the tests can launch the same code on the CPU.
"""

import hashlib
from functools import cache
from importlib.resources import files
from typing import Any

import numpy as np

from moss_jt.kernels.cuda.cublas import Array, multiply
from moss_jt.kernels.needs import FEW_TOKENS

WARP = 32
WARPS_PER_BLOCK = 4
THREADS = WARP * WARPS_PER_BLOCK
ROWS_PER_WARP = 2  # kRows in linear.cu
TOKEN_VARIANTS = (1, 4, 16)  # of the kernels for few tokens
# Blocks that fill a card: K is split until a product has as many. Consumer cards have 10 to 170 multiprocessors.
ENOUGH_BLOCKS = 256
MAX_HEAD_DIM = 256


def folder() -> str:
    return str(files("moss_jt.kernels.cuda"))


def source(name: str) -> str:
    return (files("moss_jt.kernels.cuda") / name).read_text(encoding="utf-8")


@cache
def fingerprint() -> str:
    """Of all sources in this folder, 8 hexadecimal digits."""
    names = sorted(
        entry.name
        for entry in files("moss_jt.kernels.cuda").iterdir()
        if entry.name.endswith((".cu", ".cuh"))
    )
    return hashlib.sha256("".join(map(source, names)).encode()).hexdigest()[:8]


class Launchers:
    """The kernels of one device.

    Args:
        cupy: the module, or what stands in for it.
    """

    def __init__(self, cupy: Any) -> None:
        self.cupy = cupy
        self._modules: dict[str, Any] = {}
        self._functions: dict[tuple[str, str], Any] = {}

    def launch(self, module: str, kernel: str, grid: tuple[int, ...], *arguments: Any) -> None:
        """Launch with THREADS threads a block; Python numbers become int32 or float32, as the kernels declare them."""
        key = (module, kernel)
        if key not in self._functions:
            if module not in self._modules:
                # CuPy keeps what it compiled by source and options; what the source includes must be among them.
                options = ("--std=c++17", f"-I{folder()}", f"-DMOSS_SOURCES=0x{fingerprint()}")
                self._modules[module] = self.cupy.RawModule(code=source(module), options=options)
            self._functions[key] = self._modules[module].get_function(kernel)
        typed = tuple(_typed(argument) for argument in arguments)
        self._functions[key](grid, (THREADS,), typed)

    def each(self, module: str, kernel: str, count: int, *arguments: Any) -> None:
        """One thread for each of ``count`` elements."""
        self.launch(module, kernel, (-(-count // THREADS),), *arguments)

    def layer_norm(self, x: Array, weight: Array, bias: Array, epsilon: float) -> Array:
        """x (T, C) float32, weight and bias (C,) float16 -> (T, C) float32."""
        out = self.cupy.empty(x.shape, np.float32)
        self.launch(
            "elementwise.cu", "layer_norm", (x.shape[0],), x, weight, bias, out, x.shape[1], float(epsilon)
        )
        return out

    def bias_gelu(self, x: Array, bias: Array) -> Array:
        """gelu_new(x + bias); x (T, I) float32, bias (I,) float16."""
        out = self.cupy.empty(x.shape, np.float32)
        self.each("elementwise.cu", "bias_gelu", x.size, x, bias, out, x.shape[0], x.shape[1])
        return out

    def add_bias(self, x: Array, bias: Array, out: Array) -> None:
        """out = x + bias; x, out (T, N) float32, bias (N,) float16."""
        self.each("elementwise.cu", "add_bias", x.size, x, bias, out, x.shape[0], x.shape[1])

    def add_block(self, h: Array, attention: Array, mlp: Array, bias: Array, out: Array) -> None:
        """out = h + attention + mlp + bias; all (T, C) float32, bias (C,) float16."""
        self.each("elementwise.cu", "add_block", h.size, h, attention, mlp, bias, out, h.shape[0], h.shape[1])

    def rotary_cache(self, qkv: Array, rotary: Array, keys: Array, values: Array, start_pos: int) -> Array:
        """Rotate queries and keys and write keys and values into one layer's cache.

        qkv           (T, 3 * H * D) float32
        rotary        (P', 2, pairs) float32: cosines and sines of each position
        keys, values  (P, H, D) float16, written at start_pos .. start_pos + T - 1
        Returns the queries (T, H * D) float32.
        """
        tokens, (positions, heads, head_dim) = qkv.shape[0], keys.shape
        if start_pos < 0 or start_pos + tokens > min(positions, rotary.shape[0]) or head_dim % 2:
            raise ValueError(
                f"{tokens} tokens at {start_pos} do not fit into a cache of {positions} positions"
            )
        q = self.cupy.empty((tokens, heads * head_dim), np.float32)
        count = tokens * heads * head_dim // 2
        sizes = (tokens, heads, head_dim, rotary.shape[2], start_pos)
        self.each("attention.cu", "rotary_cache", count, qkv, rotary, q, keys, values, *sizes)
        return q

    def attention(self, q: Array, keys: Array, values: Array, start_pos: int) -> Array:
        """Attention of T queries (T, H * D) float32 over one layer's cache (P, H, D) float16; token t sees 0 .. start_pos + t."""
        tokens, (positions, heads, head_dim) = q.shape[0], keys.shape
        if head_dim % 8 or head_dim > MAX_HEAD_DIM or start_pos + tokens > positions:
            raise ValueError(
                f"attention needs heads of 8 to {MAX_HEAD_DIM} dimensions, a multiple of 8; this has {head_dim}"
            )
        out = self.cupy.empty(q.shape, np.float32)
        self.launch(
            "attention.cu", "attention", (heads, tokens), q, keys, values, out, heads, head_dim, start_pos
        )
        return out

    def dense(self, x: Array, weight: Array) -> Array:
        """x (T, K) float32 times weight (N, K) float16 -> (T, N) float32; K is a multiple of 8."""
        if x.shape[0] > FEW_TOKENS:
            return self._by_cublas(x, weight)
        return self._rows(x, "dense", weight.shape[0], 8, (weight,), ())

    def packed(self, x: Array, packed: Array, scales: Array, zeros: Array, bits: int) -> Array:
        """x (T, K) float32 times a packed matrix (see moss_jt.store.quant) -> (T, N) float32; groups of a multiple of 32 inputs."""
        outputs, groups = scales.shape
        inputs = packed.shape[1] * 8 // bits
        if x.shape[1] != inputs or inputs % groups or inputs // groups % 32:
            raise ValueError(
                f"activations of {x.shape[1]} do not fit a matrix of {inputs} inputs in {groups} groups"
            )
        if x.shape[0] > FEW_TOKENS:
            return self._by_cublas(x, self.dequantize(packed, scales, zeros, bits))
        return self._rows(x, f"int{bits}", outputs, 128 // bits, (packed, scales, zeros), (groups,))

    def dequantize(self, packed: Array, scales: Array, zeros: Array, bits: int) -> Array:
        """The packed matrix's weights (N, K) float16."""
        outputs, groups = scales.shape
        inputs = packed.shape[1] * 8 // bits
        out = self.cupy.empty((outputs, inputs), np.float16)
        count = packed.size // 16
        self.each(
            "linear.cu", f"dequantize_int{bits}", count, packed, scales, zeros, out, outputs, inputs, groups
        )
        return out

    def gather_inputs(self, x: Array, order: Array) -> Array:
        """x (T, K) float32 with its columns in the order (K,) int32."""
        out = self.cupy.empty(x.shape, np.float32)
        self.each("linear.cu", "gather_inputs", x.size, x, order, out, x.shape[0], x.shape[1])
        return out

    def _by_cublas(self, x: Array, weight: Array) -> Array:
        out = self.cupy.empty((x.shape[0], weight.shape[0]), np.float32)
        multiply(self.cupy, x, weight, out)
        return out

    def _rows(
        self,
        x: Array,
        kernel: str,
        outputs: int,
        lane_weights: int,
        matrix: tuple[Array, ...],
        more: tuple[int, ...],
    ) -> Array:
        """A decode product: each warp does ROWS_PER_WARP rows, K in as many parts as fill the card."""
        tokens, inputs = x.shape
        blocks = -(-outputs // (ROWS_PER_WARP * WARPS_PER_BLOCK))
        parts = split_parts(blocks, inputs, lane_weights)
        out = self.cupy.empty((tokens, outputs), np.float32)
        most = max(TOKEN_VARIANTS)
        for first in range(0, tokens, most):
            some, result = x[first : first + most], out[first : first + most]
            count = some.shape[0]
            variant = next(size for size in TOKEN_VARIANTS if size >= count)
            sums = result if parts == 1 else self.cupy.empty((parts, count, outputs), np.float32)
            sizes = (count, outputs, inputs, *more)
            self.launch("linear.cu", f"{kernel}_{variant}", (blocks, parts), *matrix, some, sums, *sizes)
            if parts > 1:
                self.each("linear.cu", "add_parts", result.size, sums, result, parts, result.size)
        return out


def split_parts(blocks: int, inputs: int, lane_weights: int) -> int:
    """In how many parts K is summed: until the card is full, but never parts without a whole step of a warp."""
    steps = -(-inputs // (lane_weights * WARP))
    wanted = min(-(-ENOUGH_BLOCKS // blocks), steps)
    each = -(-steps // wanted)
    return -(-steps // each)


def _typed(argument: Any) -> Any:
    if isinstance(argument, float):
        return np.float32(argument)
    return np.int32(argument) if isinstance(argument, int) else argument
