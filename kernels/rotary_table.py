"""The angles of the rotary embedding, as tables made once per model."""

import numpy as np


def rotary_table(n_positions: int, rotary_dim: int) -> np.ndarray:
    """Cosines and sines for every position.

    Frequencies and angles are float32, as in the reference's single-GPU path; under a half default type it rounds
    the frequencies to float16, which bends the angles by up to 0.8 rad at position 2047.

    Returns (n_positions, 2, rotary_dim // 2) float32: cosines, then sines; pair t holds the dimensions 2t, 2t + 1.
    """
    exponents = np.arange(0, rotary_dim, 2) / rotary_dim
    frequencies = (10000.0**-exponents).astype(np.float32)
    angles = np.outer(np.arange(n_positions, dtype=np.float32), frequencies).astype(np.float32)
    angles = angles.astype(np.float64)
    return np.stack([np.cos(angles), np.sin(angles)], axis=1).astype(np.float32)


def spread_rotary_table(n_positions: int, head_dim: int, rotary_dim: int) -> tuple[np.ndarray, np.ndarray]:
    """The same for all of a head, so that ``x * cosines + x[swapped pairs] * sines`` rotates a head.

    Returns cosines and sines, each (n_positions, head_dim) float32. Past ``rotary_dim`` they are 1 and 0; the
    sines of the even dimensions carry the minus sign.
    """
    table = rotary_table(n_positions, rotary_dim)
    cosines = np.ones((n_positions, head_dim), np.float32)
    sines = np.zeros((n_positions, head_dim), np.float32)
    cosines[:, :rotary_dim] = np.repeat(table[:, 0], 2, axis=1)
    sines[:, 0:rotary_dim:2] = -table[:, 1]
    sines[:, 1:rotary_dim:2] = table[:, 1]
    return cosines, sines
