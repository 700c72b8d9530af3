"""What the launchers compute, in NumPy: the oracle of each CUDA kernel, with the launcher's own signature.

The block's formulas are block_oracle's, in float64 where the kernels sum; arrays are as in moss_jt.kernels.cuda.launchers.
"""

import numpy as np

from moss_jt.kernels.interface import PAGE, ByteRows, CacheRows
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
    qkv: np.ndarray,
    rotary: np.ndarray,
    keys: np.ndarray,
    values: np.ndarray,
    places: np.ndarray,
    pages: np.ndarray,
) -> np.ndarray:
    tokens, (_, heads, head_dim) = len(qkv), keys.shape
    q, k, v = qkv.reshape(tokens, 3, heads, head_dim).transpose(1, 0, 2, 3)
    slots, positions = places.T
    lies = pages[slots, positions // PAGE] * PAGE + positions % PAGE
    keys[lies] = saturated(rotated(k, rotary[positions]))
    values[lies] = saturated(v)
    return rotated(q, rotary[positions]).reshape(tokens, -1)


def quantized(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Vectors (.., D) as the cache has them in int8: numbers, and scales (..), a 127th of the largest. In float32, as the CPU."""
    x = saturated(x.astype(np.float32))
    largest = np.abs(x).max(axis=-1)
    small = largest < np.float32(1e-30)
    reciprocal = np.where(small, np.float32(0), np.float32(127) / np.where(small, np.float32(1), largest))
    numbers = np.rint(x * reciprocal[..., None]).astype(np.int8)
    return numbers, np.where(small, np.float32(0), largest / np.float32(127))


def meant(rows: CacheRows) -> np.ndarray:
    """One layer's keys or values (P, H, D), in float16, or of int8 what it stands for, in float64."""
    if not isinstance(rows, ByteRows):
        return np.asarray(rows)
    positions, heads, _ = rows.numbers.shape
    return rows.numbers * rows.scales.astype(np.float64).transpose(0, 2, 1).reshape(positions, heads, 1)


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


def attention(
    q: np.ndarray, keys: CacheRows, values: CacheRows, places: np.ndarray, pages: np.ndarray
) -> np.ndarray:
    keys, values = meant(keys), meant(values)
    tokens, (_, heads, head_dim) = len(q), keys.shape
    out = np.empty((tokens, heads, head_dim))
    for t, (slot, position) in enumerate(places):
        past = np.arange(position + 1)
        seen = pages[slot, past // PAGE] * PAGE + past % PAGE
        query = q[t].reshape(heads, head_dim).astype(np.float64)
        scores = np.einsum("hd,phd->hp", query, keys[seen].astype(np.float64)) / np.sqrt(head_dim)
        weights = np.exp(scores - scores.max(axis=1, keepdims=True))
        weights /= weights.sum(axis=1, keepdims=True)
        out[t] = np.einsum("hp,phd->hd", weights, values[seen].astype(np.float64))
    return out.reshape(tokens, -1).astype(np.float32)


def layer_norm(x: np.ndarray, weight: np.ndarray, bias: np.ndarray, epsilon: float) -> np.ndarray:
    return block_oracle.layer_norm(x, weight, bias, epsilon).astype(np.float32)


def bias_gelu(x: np.ndarray, bias: np.ndarray) -> np.ndarray:
    return block_oracle.gelu_new(x.astype(np.float64) + bias.astype(np.float64)).astype(np.float32)
