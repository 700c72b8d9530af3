"""cuBLAS for long prompts: float16 in, float32 sums and results, on tensor cores where the card has them."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moss_jt.kernels.interface import PAGE
from moss_jt.kernels.needs import PRODUCT_ROWS

Array = Any  # cupy.ndarray

FLOAT32, FLOAT16 = 0, 2  # cudaDataType
# Rows and columns of a result that a multiprocessor works on at once, in cuBLAS's usual kernels.
TILE = 128
SIZES = range(PAGE, PRODUCT_ROWS + 1, PAGE)


@dataclass(frozen=True)
class Matrices:
    """One matrix for each head, all of them within one array of float32.

    first   element at which the first one begins
    row     elements from one row to the next
    each    and from one matrix to the next
    """

    array: Array
    first: int
    row: int
    each: int


def multiply(cupy: Any, x: Array, weight: Array, out: Array) -> None:
    """out = x @ weight.T; x (T, K) float32 (rounded here), weight (N, K) float16, out (T, N) float32, all contiguous.

    CuPy's own matmul would round the result to float16, too.
    """
    gemm(cupy, cupy.asarray(x, np.float16), weight, out, transpose_b=True)


def gemm(
    cupy: Any,
    a: Array,
    b: Array,
    out: Array,
    transpose_a: bool = False,
    transpose_b: bool = False,
    alpha: float = 1.0,
    beta: float = 0.0,
) -> None:
    """out = alpha * a @ b + beta * out, a and b each perhaps transposed; both float16 or both float32, out float32, all contiguous.

    cuBLAS counts columns first: what lies here as (rows, columns) is (columns, rows) to it, so it is asked for out.T = b.T @ a.T.
    """
    blas = cupy.cuda.cublas
    a, b, out = (cupy.asarray(array) for array in (a, b, out))
    kind = FLOAT16 if a.dtype == np.float16 else FLOAT32
    (rows, columns), inner = out.shape, a.shape[0] if transpose_a else a.shape[1]
    blas.gemmEx(
        cupy.cuda.device.get_cublas_handle(),
        blas.CUBLAS_OP_T if transpose_b else blas.CUBLAS_OP_N,
        blas.CUBLAS_OP_T if transpose_a else blas.CUBLAS_OP_N,
        columns,
        rows,
        inner,
        _number(alpha),
        b.data.ptr,
        kind,
        b.shape[1],
        a.data.ptr,
        kind,
        a.shape[1],
        _number(beta),
        out.data.ptr,
        FLOAT32,
        columns,
        blas.CUBLAS_COMPUTE_32F,
        blas.CUBLAS_GEMM_DEFAULT,
    )


def gemm_of_heads(
    cupy: Any,
    a: Matrices,
    b: Matrices,
    out: Matrices,
    shape: tuple[int, int, int, int],
    transpose_a: bool = False,
    transpose_b: bool = False,
    alpha: float = 1.0,
    beta: float = 0.0,
) -> None:
    """As :func:`gemm`, for each head, in float32; shape: heads, rows and columns of a result, and what is summed over."""
    blas = cupy.cuda.cublas
    heads, rows, columns, inner = shape

    def lies(matrices: Matrices) -> tuple[int, int, int, int]:
        pointer = cupy.asarray(matrices.array).data.ptr + matrices.first * 4
        return pointer, FLOAT32, matrices.row, matrices.each

    blas.gemmStridedBatchedEx(
        cupy.cuda.device.get_cublas_handle(),
        blas.CUBLAS_OP_T if transpose_b else blas.CUBLAS_OP_N,
        blas.CUBLAS_OP_T if transpose_a else blas.CUBLAS_OP_N,
        columns,
        rows,
        inner,
        _number(alpha),
        *lies(b),
        *lies(a),
        _number(beta),
        *lies(out),
        heads,
        blas.CUBLAS_COMPUTE_32F,
        blas.CUBLAS_GEMM_DEFAULT,
    )


@cache
def _constant(value: float) -> NDArray[np.float32]:
    return np.full(1, value, np.float32)


def _number(value: float) -> int:
    """Where it lies on the host, for good."""
    return _constant(value).ctypes.data


class PageProducts:
    """Products with whole pages of tokens, many in a call: a page's rows get the same bits alone and among any others.

    cuBLAS adds in another order where it chooses another kernel, by the number of rows, so the bits of one number are the
    reference: of as many rows as give every multiprocessor of the card a tile of the narrowest product. Which other numbers give
    them too, at every page, is tried on each card, once for each shape. What is left of a pass goes into the smallest of these
    that holds it, with rows of nothing. Where not even the reference gives all its pages the same, a page is multiplied alone.

    sizes  the numbers of rows that are alike, by the weight's shape
    """

    def __init__(self, cupy: Any) -> None:
        self._cupy = cupy
        self.sizes: dict[tuple[int, ...], list[int]] = {}

    def multiply(self, x: Array, weight: Array, out: Array) -> None:
        """As :func:`multiply`; x of whole pages."""
        if weight.shape not in self.sizes:
            self.sizes[weight.shape] = self._alike(weight)
        first = 0
        for size in _dealt(x.shape[0], self.sizes[weight.shape]):
            some, result = x[first : first + size], out[first : first + size]
            if some.shape[0] == size:
                multiply(self._cupy, some, weight, result)
            else:
                padded = self._cupy.empty((size, x.shape[1]), np.float16)
                padded[: some.shape[0]] = some
                larger = self._cupy.empty((size, weight.shape[0]), np.float32)
                multiply(self._cupy, padded, weight, larger)
                result[...] = larger[: some.shape[0]]
            first += size

    def _alike(self, weight: Array) -> list[int]:
        """Numbers of rows whose products give a page, wherever it lies among them, the reference's bits."""
        page = np.random.default_rng(0).standard_normal((PAGE, weight.shape[1])).astype(np.float16)
        x = self._cupy.asarray(np.tile(page, (PRODUCT_ROWS // PAGE, 1)))
        out = self._cupy.empty((PRODUCT_ROWS, weight.shape[0]), np.float32)
        bits = {}
        for size in SIZES:
            multiply(self._cupy, x[:size], weight, out[:size])
            pages = self._cupy.asnumpy(out[:size]).view(np.uint32).reshape(size // PAGE, -1)
            if (pages == pages[0]).all():
                bits[size] = pages[0].copy()
        runtime = self._cupy.cuda.runtime
        processors = runtime.getDeviceProperties(runtime.getDevice())["multiProcessorCount"]
        most = rows_that_fill(processors, min(weight.shape))
        reference = bits[max(size for size in bits if size <= most)]
        return [size for size, page_bits in bits.items() if np.array_equal(page_bits, reference)]


def rows_that_fill(processors: int, outputs: int) -> int:
    """The fewest rows, of those that cuBLAS has kernels for, with a tile for each multiprocessor."""
    tiles = -(-outputs // TILE)
    return next((rows for rows in (TILE, 2 * TILE) if rows // TILE * tiles >= processors), PRODUCT_ROWS)


def _dealt(rows: int, sizes: list[int]) -> Iterator[int]:
    """So many rows in products of such sizes, ascending; the last may be larger than what is left."""
    while rows > 0:
        size = next((size for size in sizes if size >= rows), sizes[-1])
        yield size
        rows -= size
