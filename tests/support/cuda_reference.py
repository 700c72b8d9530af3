"""What the launchers compute, in NumPy: the oracle of each CUDA kernel, with the launcher's own signature.

The block's formulas are block_oracle's, in float64 where the kernels sum; arrays are as in moss_jt.kernels.cuda.launchers.
"""

import numpy as np

from moss_jt.store.quant import PackedArrays, dequantize, dequantize_float16
from tests.support import block_oracle


def dense(x: np.ndarray, weight: np.ndarray) -> np.ndarray:
    return (x.astype(np.float64) @ weight.astype(np.float64).T).astype(np.float32)


def packed(x: np.ndarray, packed: np.ndarray, scales: np.ndarray, zeros: np.ndarray, bits: int) -> np.ndarray:
    return dense(x, dequantize(_arrays(packed, scales, zeros, bits)))


def dequantize_packed(packed: np.ndarray, scales: np.ndarray, zeros: np.ndarray, bits: int) -> np.ndarray:
    return dequantize_float16(_arrays(packed, scales, zeros, bits))


def _arrays(packed: np.ndarray, scales: np.ndarray, zeros: np.ndarray, bits: int) -> PackedArrays:
    return PackedArrays(packed, scales, zeros, bits, packed.shape[1] * 8 // bits // scales.shape[1])


def rotary_cache(
    qkv: np.ndarray, rotary: np.ndarray, keys: np.ndarray, values: np.ndarray, start_pos: int
) -> np.ndarray:
    tokens, (_, heads, head_dim) = len(qkv), keys.shape
    q, k, v = qkv.reshape(tokens, 3, heads, head_dim).transpose(1, 0, 2, 3)
    place = slice(start_pos, start_pos + tokens)
    keys[place] = saturated(rotated(k, rotary[place]))
    values[place] = saturated(v)
    return rotated(q, rotary[place]).reshape(tokens, -1)


def saturated(x: np.ndarray) -> np.ndarray:
    """Within float16's range: an infinity in the cache would make every later token NaN."""
    most = np.finfo(np.float16).max
    return np.clip(x, -most, most)


def rotated(x: np.ndarray, rotary: np.ndarray) -> np.ndarray:
    """x (T, H, D) with rotary (T, 2, pairs): interleaved pairs of the first 2 * pairs dimensions turn, the rest stays."""
    pairs = rotary.shape[2]
    out = x.astype(np.float32)
    cosines, sines = rotary[:, None, 0], rotary[:, None, 1]
    even, odd = x[..., 0 : 2 * pairs : 2], x[..., 1 : 2 * pairs : 2]
    out[..., 0 : 2 * pairs : 2] = even * cosines - odd * sines
    out[..., 1 : 2 * pairs : 2] = odd * cosines + even * sines
    return out


def attention(q: np.ndarray, keys: np.ndarray, values: np.ndarray, start_pos: int) -> np.ndarray:
    heads = q.reshape(len(q), *keys.shape[1:]).astype(np.float64)
    return block_oracle.attention(heads, keys, values, start_pos).reshape(len(q), -1).astype(np.float32)


def layer_norm(x: np.ndarray, weight: np.ndarray, bias: np.ndarray, epsilon: float) -> np.ndarray:
    return block_oracle.layer_norm(x, weight, bias, epsilon).astype(np.float32)


def bias_gelu(x: np.ndarray, bias: np.ndarray) -> np.ndarray:
    return block_oracle.gelu_new(x.astype(np.float64) + bias.astype(np.float64)).astype(np.float32)
