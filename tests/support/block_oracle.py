"""A CodeGen block in NumPy float64, written from the paper's formulas and apart from the operators.

Also random weights for it, at sizes that a test chooses.
"""

import math
from dataclasses import dataclass

import numpy as np

from moss_jt.store.config import MossConfig


def geometry(
    n_embd: int,
    n_head: int,
    rotary_dim: int,
    n_inner: int | None = None,
    n_positions: int = 512,
    n_layer: int = 2,
) -> MossConfig:
    return MossConfig(
        model_type="moss",
        vocab_size=257,
        n_positions=n_positions,
        n_embd=n_embd,
        n_layer=n_layer,
        n_head=n_head,
        rotary_dim=rotary_dim,
        n_inner=4 * n_embd if n_inner is None else n_inner,
        layer_norm_epsilon=1e-5,
        bos_token_id=0,
        eos_token_id=0,
    )


@dataclass
class BlockArrays:
    """One block's weights in (out, in) orientation; what the oracle and the operators both read.

    float16, or float32 where they stand for a packed matrix.
    """

    config: MossConfig
    arrays: dict[str, np.ndarray]

    def wide(self) -> dict[str, np.ndarray]:
        return {name: array.astype(np.float64) for name, array in self.arrays.items()}

    @classmethod
    def random(cls, config: MossConfig, seed: int) -> "BlockArrays":
        rng = np.random.default_rng(seed)
        width, inner = config.n_embd, config.n_inner

        def normal(*shape: int, mean: float = 0.0, spread: float) -> np.ndarray:
            return (mean + spread * rng.standard_normal(shape)).astype(np.float16)

        arrays = {
            "ln_1_weight": normal(width, mean=1.0, spread=0.2),
            "ln_1_bias": normal(width, spread=0.1),
            "qkv": normal(3 * width, width, spread=width**-0.5),
            "out": normal(width, width, spread=width**-0.5),
            "fc_in": normal(inner, width, spread=width**-0.5),
            "fc_in_bias": normal(inner, spread=0.1),
            "fc_out": normal(width, inner, spread=inner**-0.5),
            "fc_out_bias": normal(width, spread=0.1),
        }
        return cls(config, arrays)


def layer_norm(h: np.ndarray, weight: np.ndarray, bias: np.ndarray, epsilon: float) -> np.ndarray:
    h = h.astype(np.float64)
    mean = h.mean(axis=-1, keepdims=True)
    variance = ((h - mean) ** 2).mean(axis=-1, keepdims=True)
    return (h - mean) / np.sqrt(variance + epsilon) * weight.astype(np.float64) + bias.astype(np.float64)


def gelu_new(x: np.ndarray) -> np.ndarray:
    return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def rotate(x: np.ndarray, positions: np.ndarray, rotary_dim: int) -> np.ndarray:
    """x (T, H, D): the pairs (2t, 2t + 1) below rotary_dim turn by position * 10000^(-2t / rotary_dim)."""
    turned = x.copy()
    for pair in range(rotary_dim // 2):
        # float32 angles, as the reference has them
        frequency = np.float32(10000.0 ** (-2 * pair / rotary_dim))
        angle = (positions.astype(np.float32) * frequency).astype(np.float64)[:, None]
        even, odd = x[:, :, 2 * pair], x[:, :, 2 * pair + 1]
        turned[:, :, 2 * pair] = even * np.cos(angle) - odd * np.sin(angle)
        turned[:, :, 2 * pair + 1] = odd * np.cos(angle) + even * np.sin(angle)
    return turned


def new_keys_values(h: np.ndarray, weights: BlockArrays, start_pos: int) -> tuple[np.ndarray, np.ndarray]:
    """What the block adds to the cache for h (T, C), before rounding to float16: two (T, H, D) float64."""
    _, _, k, v = _queries_keys_values(h, weights, start_pos)
    return k, v


def queries(h: np.ndarray, weights: BlockArrays, start_pos: int) -> np.ndarray:
    """(T, H, D) float64, rotated."""
    return _queries_keys_values(h, weights, start_pos)[1]


def block(
    h: np.ndarray, weights: BlockArrays, keys: np.ndarray, values: np.ndarray, start_pos: int
) -> np.ndarray:
    """The block's result (T, C) float64, after writing the new positions to keys, values (P, H, D) float16."""
    new = slice(start_pos, start_pos + h.shape[0])
    keys[new], values[new] = new_keys_values(h, weights, start_pos)
    return block_over_cache(h, weights, keys, values, start_pos)


def block_over_cache(
    h: np.ndarray, weights: BlockArrays, keys: np.ndarray, values: np.ndarray, start_pos: int
) -> np.ndarray:
    """The same over a cache that already has the new positions."""
    w = weights.wide()
    normed, q, _, _ = _queries_keys_values(h, weights, start_pos)
    attended = attention(q, keys, values, start_pos)
    inner = gelu_new(normed @ w["fc_in"].T + w["fc_in_bias"])
    mlp = inner @ w["fc_out"].T + w["fc_out_bias"]
    return h.astype(np.float64) + attended.reshape(h.shape[0], -1) @ w["out"].T + mlp


def _queries_keys_values(h: np.ndarray, weights: BlockArrays, start_pos: int) -> tuple[np.ndarray, ...]:
    config, w = weights.config, weights.wide()
    normed = layer_norm(h, w["ln_1_weight"], w["ln_1_bias"], config.layer_norm_epsilon)
    parts = np.split(normed @ w["qkv"].T, 3, axis=1)
    q, k, v = (part.reshape(h.shape[0], config.n_head, config.head_dim) for part in parts)
    positions = np.arange(start_pos, start_pos + h.shape[0])
    return normed, rotate(q, positions, config.rotary_dim), rotate(k, positions, config.rotary_dim), v


def attention(q: np.ndarray, keys: np.ndarray, values: np.ndarray, start_pos: int) -> np.ndarray:
    """q (T, H, D) -> (T, H, D): token t sees the cache's positions 0 .. start_pos + t."""
    result = np.zeros_like(q)
    for t in range(q.shape[0]):
        seen = start_pos + t + 1
        past_k, past_v = keys[:seen].astype(np.float64), values[:seen].astype(np.float64)
        scores = np.einsum("hd,shd->hs", q[t], past_k) / math.sqrt(q.shape[2])
        weights = np.exp(scores - scores.max(axis=1, keepdims=True))
        weights /= weights.sum(axis=1, keepdims=True)
        result[t] = np.einsum("hs,shd->hd", weights, past_v)
    return result
