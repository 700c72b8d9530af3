"""Launches the CUDA kernels of this folder: chooses grid and block, checks shapes, allocates results. Arrays are CuPy's.

Letters as in moss_jt.kernels.interface. ``cupy`` is handed in, so that this module imports nowhere without a GPU's packages
and the tests can launch the same code on the CPU.
"""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from importlib.resources import files
from typing import Any

import numpy as np

from moss_jt.kernels.adapters import TARGETS
from moss_jt.kernels.cuda.cublas import Array, PageProducts, multiply
from moss_jt.kernels.interface import PAGE, ByteRows, CacheRows, numbers_of

WARP = 32
WARPS_PER_BLOCK = 4
THREADS = WARP * WARPS_PER_BLOCK
NORM_THREADS = 512  # kNormThreads in elementwise.cu
RANK_THREADS = 256  # kRankThreads in adapters.cu
# Blocks that fill a card: K is split until a product has as many, but no part is shorter than LEAST_CHUNKS of a warp's loads. 132
# multiprocessors with four to six blocks each are the most that these kernels meet.
ENOUGH_BLOCKS = 800
LEAST_CHUNKS = 2
MAX_HEAD_DIM = 256  # kMostDims in attention.cu
# kNumbers, kHalfPage and kPageThreads in attention.cu
NUMBERS, HALF_PAGE, PAGE_THREADS = 4, 32, 256


@dataclass(frozen=True)
class Kind:
    """A family of product kernels in linear.cu.

    rows      of a warp, by the most tokens of a kernel: its last template arguments
    chunk     inputs that a warp asks for before it multiplies
    """

    name: str
    rows: dict[int, int]
    chunk: int

    def variant(self, tokens: int) -> int:
        """The kernel for so many tokens, named by the most that it does at once."""
        return next((most for most in self.rows if most >= tokens), max(self.rows))

    def split(self, outputs: int, inputs: int) -> tuple[int, int]:
        """In how many parts K is summed and how many inputs each has, whatever the number of tokens."""
        rows = max(self.rows.values()) * WARPS_PER_BLOCK
        chunks = -(-inputs // self.chunk)
        wanted = -(-ENOUGH_BLOCKS // -(-outputs // rows))
        each = max(-(-chunks // wanted), LEAST_CHUNKS)
        return -(-chunks // each), each * self.chunk


KINDS = {
    16: Kind("dense", {1: 4, 4: 4, 16: 4}, 512),
    8: Kind("int8", {1: 8, 4: 4, 8: 4}, 512),
    4: Kind("int4", {1: 8, 4: 4}, 1024),
}


@dataclass(frozen=True)
class Product:
    """A matrix with the activations that it multiplies.

    x       (T, K) float32
    weight  (N, K) float16, or where ``bits`` is not 16 the packed bytes (N, K * bits // 8) uint8
    scales, zeros, order  of a packed matrix, as in moss_jt.kernels.interface.PackedMatrix; order (K,) int32
    """

    x: Array
    weight: Array
    bits: int = 16
    scales: Array = None
    zeros: Array = None
    order: Array = None

    @property
    def outputs(self) -> int:
        return int(self.weight.shape[0])

    @property
    def inputs(self) -> int:
        return (
            int(self.weight.shape[1]) * (1 if self.bits == 16 else 8) // (1 if self.bits == 16 else self.bits)
        )

    def check(self) -> None:
        groups = 1 if self.bits == 16 else self.scales.shape[1]
        if self.x.shape[1] != self.inputs or self.inputs % (8 if self.bits == 16 else 32 * groups):
            raise ValueError(
                f"activations of {self.x.shape[1]} do not fit a matrix of {self.inputs} inputs in {groups} groups"
            )


@dataclass(frozen=True)
class TokenAdapters:
    """Which adapter each of some tokens has, in one block of the model: see moss_jt.kernels.adapters.

    bank       (n,) float32
    directory  (adapters, len(TARGETS), 3) int32, of the block
    of_token   (T,) int32: an adapter's number, or -1
    most_rank  of all adapters
    """

    bank: Array
    directory: Array
    of_token: Array
    most_rank: int

    def __getitem__(self, rows: slice) -> "TokenAdapters":
        return replace(self, of_token=self.of_token[rows])


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
        self.pages = PageProducts(cupy)
        self._modules: dict[str, Any] = {}
        self._functions: dict[tuple[str, str], Any] = {}

    def function(self, module: str, kernel: str) -> Any:
        """CuPy's function, compiled when it is first asked for."""
        key = (module, kernel)
        if key not in self._functions:
            self._functions[key] = self.module(module).get_function(kernel)
        return self._functions[key]

    def module(self, name: str) -> Any:
        """CuPy's module of a source file."""
        if name not in self._modules:
            # CuPy keeps what it compiled by source and options; what the source includes must be among them.
            options = ("--std=c++17", f"-I{folder()}", f"-DMOSS_SOURCES=0x{fingerprint()}")
            self._modules[name] = self.cupy.RawModule(code=source(name), options=options)
        return self._modules[name]

    def launch(
        self, module: str, kernel: str, grid: tuple[int, ...], *arguments: Any, threads: int = THREADS
    ) -> None:
        """Python numbers become int32 or float32, as the kernels declare them; None is the null pointer."""
        self.function(module, kernel)(grid, (threads,), tuple(_typed(argument) for argument in arguments))

    def each(self, module: str, kernel: str, count: int, *arguments: Any) -> None:
        """One thread for each of ``count`` elements."""
        self.launch(module, kernel, (-(-count // THREADS),), *arguments)

    def layer_norm(self, x: Array, weight: Array, bias: Array, epsilon: float) -> Array:
        """x (T, C) float32, weight and bias (C,) float16 -> (T, C) float32."""
        out = self.cupy.empty(x.shape, np.float32)
        arguments = (x, weight, bias, out, x.shape[1], float(epsilon))
        self.launch("elementwise.cu", "layer_norm", (x.shape[0],), *arguments, threads=NORM_THREADS)
        return out

    def bias_gelu(self, x: Array, bias: Array) -> Array:
        """gelu_new(x + bias); x (T, I) or (parts, T, I) float32, bias (I,) float16."""
        parts, tokens, width = _parts(x)
        out = self.cupy.empty((tokens, width), np.float32)
        self.each("elementwise.cu", "bias_gelu", out.size, x, bias, out, parts, tokens, width)
        return out

    def add_bias(self, x: Array, bias: Array, out: Array) -> None:
        """out = x + bias; x (T, N) or (parts, T, N), out (T, N) float32, bias (N,) float16."""
        self.each("elementwise.cu", "add_bias", out.size, x, bias, out, *_parts(x))

    def add_block(self, h: Array, x: Array, bias: Array, out: Array) -> None:
        """out = h + x + bias; h, out (T, C), x (T, C) or (parts, T, C) float32, bias (C,) float16."""
        self.each("elementwise.cu", "add_block", out.size, h, x, bias, out, *_parts(x))

    def rotary_cache(
        self, qkv: Array, rotary: Array, keys: CacheRows, values: CacheRows, places: Array, pages: Array
    ) -> Array:
        """Rotate queries and keys and write keys and values into one layer's cache.

        qkv           (T, 3 * H * D) or (parts, T, 3 * H * D) float32
        rotary        (P', 2, pairs) float32: cosines and sines of each position
        keys, values  (P, H, D) float16, or ByteRows of (P, H, D) int8 and (P // PAGE, H, PAGE), written where the tokens belong
        places        (T, 2) int32: slot and position of each token, checked by moss_jt.kernels.checks
        pages         (S, G) int32: each slot's pages
        Returns the queries (T, H * D) float32.
        """
        (parts, tokens, _), (_, heads, head_dim) = _parts(qkv), numbers_of(keys).shape
        if head_dim % 2 or tuple(places.shape) != (tokens, 2):
            raise ValueError(f"{tokens} tokens of heads of {head_dim} dimensions have places {places.shape}")
        q = self.cupy.empty((tokens, heads * head_dim), np.float32)
        kind, cache = _cache(keys, values)
        sizes = (parts, head_dim, rotary.shape[2], pages.shape[1])
        arguments = (qkv, rotary, q, *cache, places, pages, *sizes)
        threads = -(-head_dim // 2 // WARP) * WARP
        self.launch("attention.cu", f"rotary_cache{kind}", (heads, tokens), *arguments, threads=threads)
        return q

    def attention(
        self, q: Array, keys: CacheRows, values: CacheRows, places: Array, pages: Array, whole: bool = False
    ) -> Array:
        """Attention of T queries (T, H * D) float32 over one layer's cache; keys, values, places, pages as above.

        Args:
            whole: the tokens are whole pages, each of one sequence, from its first position to its last.
        """
        tokens, (_, heads, head_dim), (kind, cache) = q.shape[0], numbers_of(keys).shape, _cache(keys, values)
        unit = 16 // numbers_of(keys).dtype.itemsize
        if head_dim % unit or head_dim > MAX_HEAD_DIM:
            raise ValueError(
                f"attention needs heads of {unit} to {MAX_HEAD_DIM} dimensions, a multiple of {unit}; this has {head_dim}"
            )
        splits, arrays = pages.shape[1], (q, *cache)
        sizes = (heads, head_dim, splits)
        out = self.cupy.empty(q.shape, np.float32)
        if whole:
            if tokens % PAGE:
                raise ValueError(f"{tokens} tokens are no whole pages of {PAGE}")
            halves = (heads, tokens // HALF_PAGE)
            arguments = (*arrays, out, places, pages, *sizes)
            self.launch("attention.cu", f"attention_of_pages{kind}", halves, *arguments, threads=PAGE_THREADS)
            return out
        partial = self.cupy.empty((tokens, heads, splits, head_dim + NUMBERS), np.float32)
        grid = (heads, tokens, splits)
        self.launch("attention.cu", f"attention{kind}", grid, *arrays, partial, places, pages, *sizes)
        self.launch("attention.cu", "combine_attention", (heads, tokens), partial, out, places, *sizes)
        return out

    def add_adapters(
        self, adapters: TokenAdapters, first: tuple[str, Array, Array], second: tuple[str, Array, Array]
    ) -> None:
        """Add to two products what the tokens' adapters do.

        Args:
            first, second: a target, its product's activations (T, K), and what the product gave: (parts, T, N) float32, of whose
                first part the adapters' becomes a part.
        """
        tables = adapters.bank, adapters.directory, adapters.of_token
        pairs = [(TARGETS.index(target), x, y) for target, x, y in (first, second)]
        tokens, rank = first[1].shape[0], adapters.most_rank
        low = self.cupy.empty((2, tokens, rank), np.float32)
        inputs = [value for target, x, _ in pairs for value in (x, target, x.shape[1])]
        grid = (rank, tokens, 2)
        self.launch(
            "adapters.cu", "to_low_rank", grid, *tables, *inputs, low, tokens, rank, threads=RANK_THREADS
        )
        outputs = [value for target, _, y in pairs for value in (y[:1], target, y.shape[2])]
        grid = (-(-max(y.shape[2] for _, _, y in pairs) // THREADS), tokens, 2)
        self.launch("adapters.cu", "add_low_rank", grid, *tables, low, *outputs, tokens, rank)

    def products(self, products: Sequence[Product], whole: bool = False) -> list[Array]:
        """One or two products of the same bits, of few tokens in one launch; each (parts, T, N) float32, to be summed.

        Args:
            whole: the tokens are whole pages, and go through cuBLAS; otherwise our own kernels. Either way a token gets the same
                bits among any others.
        """
        return self._multiply(
            products,
            whole,
            lambda product, parts: self.cupy.empty((parts, product.x.shape[0], product.outputs), np.float32),
        )

    def page_by_page(self, x: Array, weight: Array) -> Array:
        """x (T, K) of whole pages times weight (N, K) float16 -> (T, N). Each alone: N is large, and rows of nothing would cost."""
        out = self.cupy.empty((x.shape[0], weight.shape[0]), np.float32)
        for first in range(0, x.shape[0], PAGE):
            multiply(self.cupy, x[first : first + PAGE], weight, out[first : first + PAGE])
        return out

    def sum_of_products(self, products: Sequence[Product], whole: bool = False) -> Array:
        """The same for two whose results are added: (parts, T, N) float32, with the parts of both."""
        kind, tokens = KINDS[products[0].bits], products[0].x.shape[0]
        splits = [kind.split(p.outputs, p.inputs)[0] if not whole else 1 for p in products]
        out = self.cupy.empty((sum(splits), tokens, products[0].outputs), np.float32)
        parts = [out[: splits[0]], out[splits[0] :]]
        self._multiply(products, whole, lambda product, _: parts.pop(0))
        return out

    def _multiply(
        self, products: Sequence[Product], whole: bool, result_for: Callable[[Product, int], Array]
    ) -> list[Array]:
        for product in products:
            product.check()
        if whole:
            return [self._by_cublas(product, result_for(product, 1)) for product in products]
        return self._by_rows(products, result_for)

    def _by_cublas(self, product: Product, out: Array) -> Array:
        """out: (1, T, N)."""
        x, weight = product.x, product.weight
        if product.bits != 16:
            weight = self.dequantize(weight, product.scales, product.zeros, product.bits)
        if product.order is not None:
            x = self.gather_inputs(x, product.order)
        self.pages.multiply(x, weight, out[0])
        return out

    def _by_rows(
        self, products: Sequence[Product], result_for: Callable[[Product, int], Array]
    ) -> list[Array]:
        """Few tokens: our own kernels, one launch."""
        kind, tokens = KINDS[products[0].bits], products[0].x.shape[0]
        inputs = [product.x for product in products] if kind.name == "dense" else self._digits(products)
        variant = kind.variant(tokens)
        rows = kind.rows[variant]
        arguments: list[Any] = []
        results, blocks = [], []
        for product, x in zip(products, inputs, strict=True):
            parts, each = kind.split(product.outputs, product.inputs)
            rows_here = rows if product.outputs >= rows else 1  # as find_part in linear.cu
            row_blocks = -(-product.outputs // (rows_here * WARPS_PER_BLOCK))
            out = result_for(product, parts)
            matrix = (
                (product.weight,) if kind.name == "dense" else (product.weight, product.scales, product.zeros)
            )
            groups = () if kind.name == "dense" else (product.scales.shape[1],)
            arguments += [*matrix, x, out, row_blocks, product.outputs, product.inputs, each, *groups]
            results.append(out)
            blocks.append(row_blocks * parts)
        if len(products) == 1:
            arguments += arguments  # for a second product that has no blocks
        grid = (sum(blocks), 1, -(-tokens // variant))
        self.launch("linear.cu", f"{kind.name}_{variant}", grid, *arguments, blocks[0], tokens)
        return results

    def _digits(self, products: Sequence[Product]) -> list[Array]:
        """What the packed kernels take instead of activations; two products of the same ones share them."""
        tokens, kind = products[0].x.shape[0], KINDS[products[0].bits]
        span = kind.chunk // WARP
        vectors = 3 * span // 16 + 1  # kVectors in linear.cu
        shared = (
            len(products) == 2 and products[0].x is products[1].x and products[0].order is products[1].order
        )
        distinct = products[:1] if shared else products
        arguments: list[Any] = []
        made, spans = [], 0
        for product in distinct:
            chunks = -(-product.inputs // kind.chunk)
            made.append(self.cupy.empty((tokens, chunks, vectors, WARP, 4), np.uint32))
            ordered = int(product.order is not None)
            arguments += [product.x, product.order, made[-1], ordered, product.inputs]
            spans += chunks * WARP
        if len(distinct) == 1:
            arguments += [*arguments[:-1], 0]
        grid = (-(-spans // THREADS), tokens)
        self.launch("linear.cu", f"digits_{kind.name}", grid, *arguments, tokens)
        return made * 2 if shared else made

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


def _parts(x: Array) -> tuple[int, int, int]:
    """(parts, T, width) of what a product gave, in parts or added up."""
    return tuple(x.shape) if len(x.shape) == 3 else (1, *x.shape)


def _cache(keys: CacheRows, values: CacheRows) -> tuple[str, tuple[Array, ...]]:
    """How the names of the kernels for such a cache end, and its arrays in the order of their arguments."""
    if isinstance(keys, ByteRows):
        return "_int8", (keys.numbers, values.numbers, keys.scales, values.scales)
    return "", (keys, values, None, None)


def _typed(argument: Any) -> Any:
    if argument is None:
        return np.uintp(0)
    if isinstance(argument, float):
        return np.float32(argument)
    return np.int32(argument) if isinstance(argument, int) else argument
