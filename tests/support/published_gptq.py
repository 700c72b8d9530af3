"""Quantised matrices in the published checkpoints' layout, written from its description and not with the converter."""

import numpy as np

from moss_jt.store.quant import PackedArrays, unpack


def to_published(matrix: PackedArrays) -> dict[str, np.ndarray]:
    """The tensors qweight, qzeros, scales and g_idx that hold the same weights.

    qweight  (K * bits / 32, N) int32: input rows in words, lowest bits first
    qzeros   (G, N * bits / 32) int32: outputs in words, zero point minus one
    scales   (G, N) float16
    g_idx    (K,) int32: group of each input row; not monotonic where the matrix has an input order
    """
    stored = unpack(matrix.packed, matrix.bits)
    columns = stored.shape[1]
    order = np.arange(columns) if matrix.input_order is None else matrix.input_order
    fields, g_idx = np.empty_like(stored), np.empty(columns, np.int32)
    fields[:, order] = stored
    g_idx[order] = np.arange(columns) // matrix.group_size
    return {
        "qweight": _words(fields.T, matrix.bits),
        "qzeros": np.ascontiguousarray(_words(matrix.zeros, matrix.bits).T),
        "scales": np.ascontiguousarray(matrix.scales.T),
        "g_idx": g_idx,
    }


def _words(fields: np.ndarray, bits: int) -> np.ndarray:
    """Fields (R, S) to words (R * bits / 32, S) int32, consecutive rows in one word, the first in the lowest bits."""
    per_word = 32 // bits
    words = np.zeros((fields.shape[0] // per_word, fields.shape[1]), np.uint32)
    for index in range(per_word):
        words |= fields[index::per_word].astype(np.uint32) << np.uint32(bits * index)
    return words.view(np.int32)


def reference_weight(tensors: dict[str, np.ndarray], bits: int) -> np.ndarray:
    """The weights (N, K) float16 by the reference's formula, one word at a time."""
    per_word, mask = 32 // bits, 2**bits - 1
    inputs, outputs = len(tensors["g_idx"]), tensors["qweight"].shape[1]
    weight = np.empty((outputs, inputs), np.float16)
    for k in range(inputs):
        group = int(tensors["g_idx"][k])
        for n in range(outputs):
            word = int(tensors["qweight"][k // per_word, n]) & 0xFFFFFFFF
            q = word >> bits * (k % per_word) & mask
            zero_word = int(tensors["qzeros"][group, n // per_word]) & 0xFFFFFFFF
            z = (zero_word >> bits * (n % per_word) & mask) + 1
            weight[n, k] = np.float16(q - z) * tensors["scales"][group, n]
    return weight
