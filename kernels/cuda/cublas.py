"""cuBLAS for long prompts: float16 in, float32 sums and results, on tensor cores where the card has them."""

from typing import Any

import numpy as np

Array = Any  # cupy.ndarray

FLOAT32, FLOAT16 = 0, 2  # cudaDataType
ONE, ZERO = np.ones(1, np.float32), np.zeros(1, np.float32)


def multiply(cupy: Any, x: Array, weight: Array, out: Array) -> None:
    """out = x @ weight.T; x (T, K) float32 (rounded here), weight (N, K) float16, out (T, N) float32, all contiguous.

    CuPy's own matmul would round the result to float16, too. cuBLAS counts columns first: what lies here as (rows, columns)
    is (columns, rows) to it, so it is asked for out.T = weight @ x.T.
    """
    blas = cupy.cuda.cublas
    x, weight = cupy.asarray(x, np.float16), cupy.asarray(weight)
    (tokens, inputs), outputs = x.shape, weight.shape[0]
    blas.gemmEx(
        cupy.cuda.device.get_cublas_handle(),
        blas.CUBLAS_OP_T,
        blas.CUBLAS_OP_N,
        outputs,
        tokens,
        inputs,
        ONE.ctypes.data,
        weight.data.ptr,
        FLOAT16,
        inputs,
        x.data.ptr,
        FLOAT16,
        inputs,
        ZERO.ctypes.data,
        out.data.ptr,
        FLOAT32,
        outputs,
        blas.CUBLAS_COMPUTE_32F,
        blas.CUBLAS_GEMM_DEFAULT,
    )
