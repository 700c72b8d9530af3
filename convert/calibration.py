"""Quantising a block against the activations that reach it: a CodeGen block in NumPy float32, one sequence at a time.

The activations flow from block to block through the weights as quantised, so that each matrix also makes up for what
the ones before it did. Memory: one block's weights, the hidden states of all calibration tokens, one sequence's inner
layer and one Hessian. Measured for a block of MOSS's 6,144 channels and 3,460 tokens: 3.8 GiB, most of it the Hessian
of fc_out.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from moss_jt.convert.gptq_quantizer import Hessian, quantize_gptq
from moss_jt.kernels.rotary_table import rotary_table
from moss_jt.store.architecture import MATRICES
from moss_jt.store.config import MossConfig
from moss_jt.store.quant import PackedArrays, dequantize_rows, row_slabs

Matrix = np.ndarray | PackedArrays

QKV, OUT, FC_IN, FC_OUT = MATRICES


@dataclass(frozen=True)
class GptqSettings:
    bits: int
    group_size: int
    act_order: bool


class Calibration:
    """Hidden states (T, C) float32 of the calibration tokens, on their way through the blocks.

    The tokens are cut into sequences of ``length``, the last of which may be shorter; none sees another.
    """

    def __init__(self, config: MossConfig, hidden: np.ndarray, length: int) -> None:
        self.config = config
        self.hidden = hidden
        self.sequences = [
            slice(first, min(first + length, len(hidden))) for first in range(0, len(hidden), length)
        ]
        self.cosines, self.sines = rotary_table(length, config.rotary_dim).swapaxes(0, 1)

    def quantize_block(
        self, weights: Mapping[str, np.ndarray], settings: GptqSettings
    ) -> Iterator[tuple[str, PackedArrays]]:
        """Yield the block's four matrices as they are done; with the last, ``hidden`` is what leaves the block.

        weights  local tensor names to float16 arrays, qkv rows as in a model folder: all Q, all K, all V
        Yields ``attn.qkv_proj``, ``mlp.fc_in``, ``attn.out_proj``, ``mlp.fc_out`` with their matrices.
        """
        hessian = Hessian(self.config.n_embd)
        for part in self.sequences:
            hessian.add(self._normed(part, weights))
        qkv, fc_in = _quantize([weights[f"{QKV}.weight"], weights[f"{FC_IN}.weight"]], hessian, settings)
        yield QKV, qkv
        yield FC_IN, fc_in

        attended = self._attended(weights, qkv)
        hessian = Hessian(self.config.n_embd)
        for part in self.sequences:
            hessian.add(attended[part])
        (out,) = _quantize([weights[f"{OUT}.weight"]], hessian, settings)
        yield OUT, out

        hessian = Hessian(self.config.n_inner)
        for part in self.sequences:
            hessian.add(self._inner(part, weights, fc_in))
        (fc_out,) = _quantize([weights[f"{FC_OUT}.weight"]], hessian, settings)
        del hessian
        self._leave(weights, attended, fc_in, out, fc_out)
        yield FC_OUT, fc_out

    def pass_block(self, weights: Mapping[str, np.ndarray], matrices: Mapping[str, PackedArrays]) -> None:
        """``hidden`` through a block that is quantised already: what :meth:`quantize_block` left there, again."""
        attended = self._attended(weights, matrices[QKV])
        self._leave(weights, attended, matrices[FC_IN], matrices[OUT], matrices[FC_OUT])

    def _attended(self, weights: Mapping[str, np.ndarray], qkv: Matrix) -> np.ndarray:
        attended = np.empty_like(self.hidden)
        for part in self.sequences:
            attended[part] = self._attention(linear(self._normed(part, weights), qkv))
        return attended

    def _leave(
        self,
        weights: Mapping[str, np.ndarray],
        attended: np.ndarray,
        fc_in: Matrix,
        out: Matrix,
        fc_out: Matrix,
    ) -> None:
        bias = weights[f"{FC_OUT}.bias"].astype(np.float32)
        # The inner layer is made again: keeping it would take four times the memory of the hidden states.
        for part in self.sequences:
            inner = self._inner(part, weights, fc_in)
            self.hidden[part] += linear(attended[part], out) + (linear(inner, fc_out) + bias)

    def _normed(self, part: slice, weights: Mapping[str, np.ndarray]) -> np.ndarray:
        h = self.hidden[part]
        centred = h - h.mean(axis=-1, keepdims=True)
        variance = np.square(centred).mean(axis=-1, keepdims=True)
        scale = weights["ln_1.weight"].astype(np.float32) / np.sqrt(variance + self.config.layer_norm_epsilon)
        return centred * scale + weights["ln_1.bias"].astype(np.float32)

    def _inner(self, part: slice, weights: Mapping[str, np.ndarray], fc_in: Matrix) -> np.ndarray:
        bias = weights[f"{FC_IN}.bias"].astype(np.float32)
        return gelu_new(linear(self._normed(part, weights), fc_in) + bias)

    def _attention(self, qkv: np.ndarray) -> np.ndarray:
        """Causal self-attention of one sequence: (T, 3C) to (T, C)."""
        tokens, heads, head_dim = len(qkv), self.config.n_head, self.config.head_dim
        q, k, v = (part.reshape(tokens, heads, head_dim) for part in np.split(qkv, 3, axis=1))
        q, k = self._rotate(q), self._rotate(k)
        hidden = np.triu(np.full((tokens, tokens), -np.inf, np.float32), 1)
        result = np.empty_like(q)
        for head in range(heads):
            scores = q[:, head] @ k[:, head].T / np.float32(math.sqrt(head_dim)) + hidden
            scores = np.exp(scores - scores.max(axis=1, keepdims=True))
            result[:, head] = scores @ v[:, head] / scores.sum(axis=1, keepdims=True)
        return result.reshape(tokens, -1)

    def _rotate(self, x: np.ndarray) -> np.ndarray:
        """x (T, H, D) at positions 0 .. T - 1: pairs (2t, 2t + 1) of the first rotary_dim dimensions turn."""
        cosines, sines = self.cosines[: len(x), None], self.sines[: len(x), None]
        even, odd = x[:, :, : self.config.rotary_dim : 2], x[:, :, 1 : self.config.rotary_dim : 2]
        turned = x.copy()
        turned[:, :, : self.config.rotary_dim : 2] = even * cosines - odd * sines
        turned[:, :, 1 : self.config.rotary_dim : 2] = odd * cosines + even * sines
        return turned


def linear(x: np.ndarray, matrix: Matrix) -> np.ndarray:
    """``x @ w.T`` in float32, (T, K) to (T, N), with only some rows of the matrix widened at a time."""
    rows = matrix.scales.shape[0] if isinstance(matrix, PackedArrays) else matrix.shape[0]
    result = np.empty((len(x), rows), np.float32)
    for part in row_slabs(rows, x.shape[1]):
        if isinstance(matrix, PackedArrays):
            widened = dequantize_rows(matrix, part)
        else:
            widened = matrix[part].astype(np.float32)
        result[:, part] = x @ widened.T
    return result


def gelu_new(x: np.ndarray) -> np.ndarray:
    """GELU by its tanh formula."""
    inner = np.tanh(np.float32(math.sqrt(2 / math.pi)) * (x + np.float32(0.044715) * x * x * x))
    return np.float32(0.5) * x * (1 + inner)


def _quantize(weights: list[np.ndarray], hessian: Hessian, settings: GptqSettings) -> list[PackedArrays]:
    """Matrices that share their inputs, against those inputs. The Hessian is used up."""
    order = hessian.by_importance() if settings.act_order else None
    factor = hessian.factor(order)
    return [quantize_gptq(weight, factor, settings.bits, settings.group_size, order) for weight in weights]
