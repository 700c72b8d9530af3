"""GPTQ against its textbook form, and what it is for: less error in what a layer gives out."""

import numpy as np
import pytest

from moss_jt.convert import gptq_quantizer
from moss_jt.convert.gptq_quantizer import DAMPING, Hessian, quantize_gptq
from moss_jt.errors import MossError
from moss_jt.store.quant import PackedArrays, dequantize, fit_groups, nearest_fields, quantize_rtn, unpack


def correlated_inputs(tokens: int, inputs: int, seed: int) -> np.ndarray:
    """Activations as transformers have them: few strong directions, channels of very different size."""
    rng = np.random.default_rng(seed)
    mixed = rng.standard_normal((tokens, inputs // 4)) @ rng.standard_normal((inputs // 4, inputs))
    sizes = np.exp(rng.standard_normal(inputs))
    return ((mixed + 0.3 * rng.standard_normal((tokens, inputs))) * sizes).astype(np.float32)


def hessian_of(x: np.ndarray) -> Hessian:
    hessian = Hessian(x.shape[1])
    for part in np.array_split(x, 3):
        hessian.add(part)
    return hessian


def textbook_gptq(
    weight: np.ndarray, x: np.ndarray, bits: int, group_size: int
) -> tuple[np.ndarray, np.ndarray]:
    """Fields and weights by the published algorithm: the inverse's Cholesky factor, one column at a time, float64."""
    hessian = x.astype(np.float64).T @ x.astype(np.float64)
    hessian += DAMPING * np.diag(hessian).mean() * np.eye(len(hessian))
    upper = np.linalg.cholesky(np.linalg.inv(hessian)).T
    left = weight.astype(np.float64)
    fields, result = np.empty_like(left), np.empty_like(left)
    for k in range(left.shape[1]):
        if k % group_size == 0:
            scales, zeros = fit_groups(left[:, k : k + group_size].astype(np.float32), bits)
        fields[:, k] = nearest_fields(left[:, k].astype(np.float32), scales, zeros, bits)
        result[:, k] = scales.astype(np.float64) * (fields[:, k] - zeros)
        left[:, k:] -= np.outer((left[:, k] - result[:, k]) / upper[k, k], upper[k, k:])
    return fields, result


def layer_error(matrix: PackedArrays, weight: np.ndarray, x: np.ndarray) -> float:
    difference = dequantize(matrix).astype(np.float64) - weight.astype(np.float64)
    return float(np.square(x.astype(np.float64) @ difference.T).mean())


@pytest.fixture
def small_panels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several panels and slabs even for small matrices."""
    monkeypatch.setattr(gptq_quantizer, "_PANEL", 40)
    monkeypatch.setattr(gptq_quantizer, "_SLAB_WEIGHTS", 128 * 70)


@pytest.mark.usefixtures("small_panels")
def test_the_factor_times_itself_is_the_damped_hessian() -> None:
    x = correlated_inputs(300, 128, 0)
    factor = hessian_of(x).factor().astype(np.float64)
    hessian = x.astype(np.float64).T @ x.astype(np.float64)
    hessian += DAMPING * np.diag(hessian).mean() * np.eye(128)
    assert (np.tril(factor, -1) == 0).all()
    # Float32 sums of up to 300 products, then of up to 128.
    assert np.abs(factor @ factor.T - hessian).max() <= 300 * 2**-24 * np.abs(hessian).max()


@pytest.mark.usefixtures("small_panels")
def test_an_order_of_inputs_permutes_the_hessian() -> None:
    x = correlated_inputs(300, 128, 1)
    order = hessian_of(x).by_importance()
    energy = np.square(x.astype(np.float64)).sum(axis=0)[order]
    assert sorted(order) == list(range(128)) and (np.diff(energy) <= 1e-5 * energy[:-1]).all()
    permuted, direct = hessian_of(x).factor(order), hessian_of(x[:, order]).factor()
    assert (
        np.abs(permuted - direct).max() <= 1e-3 * np.abs(direct).max()
    )  # float32 factorisations of equal matrices


@pytest.mark.usefixtures("small_panels")
@pytest.mark.parametrize("bits", [4, 8])
def test_fields_are_those_of_the_textbook_algorithm(bits: int) -> None:
    x = correlated_inputs(600, 128, 2)
    weight = np.random.default_rng(3).standard_normal((200, 128)).astype(np.float16)
    ours = quantize_gptq(weight, hessian_of(x).factor(), bits, 32)
    fields, result = textbook_gptq(weight, x, bits, 32)
    # A value half way between two levels may fall either way in float32, and later columns follow it.
    assert (unpack(ours.packed, bits) == fields).mean() > (0.99 if bits == 4 else 0.9)
    want = np.square(x @ (result - weight).T).mean()
    assert layer_error(ours, weight, x) == pytest.approx(want, rel=0.02)


@pytest.mark.parametrize("act_order", [False, True])
def test_a_layer_gives_out_less_error_than_after_rounding(act_order: bool) -> None:
    """On tokens that were not in the calibration too; the strong channels are unlike each other, so act-order helps."""
    x = correlated_inputs(1200, 128, 4)
    seen, unseen = x[:800], x[800:]
    weight = np.random.default_rng(5).standard_normal((96, 128)).astype(np.float16)
    hessian = hessian_of(seen)
    order = hessian.by_importance() if act_order else None
    gptq = quantize_gptq(weight, hessian.factor(order), 4, 32, order)
    rtn = quantize_rtn(weight, 4, 32)
    for tokens in (seen, unseen):
        assert layer_error(gptq, weight, tokens) < 0.5 * layer_error(rtn, weight, tokens)


def test_inputs_that_never_carried_anything_are_rounded_to_nearest() -> None:
    x = correlated_inputs(400, 64, 6)
    x[:, 32:] = 0
    weight = np.random.default_rng(7).standard_normal((20, 64)).astype(np.float16)
    gptq = quantize_gptq(weight, hessian_of(x).factor(), 4, 32)
    assert (dequantize(gptq)[:, 32:] == dequantize(quantize_rtn(weight, 4, 32))[:, 32:]).all()


def test_without_any_energy_gptq_is_rounding_to_nearest() -> None:
    weight = np.random.default_rng(8).standard_normal((20, 64)).astype(np.float16)
    gptq = quantize_gptq(weight, Hessian(64).factor(), 8, 32)
    assert (dequantize(gptq) == dequantize(quantize_rtn(weight, 8, 32))).all()


def test_fewer_tokens_than_inputs_still_give_a_factor() -> None:
    """The Hessian has rank 1; damping and float64 corners keep it positive definite."""
    x = 1e3 * correlated_inputs(1, 128, 9)
    factor = hessian_of(np.repeat(x, 3, axis=0)).factor()
    assert np.isfinite(factor).all() and (factor.diagonal() > 0).all()


def test_activations_that_are_not_finite_are_refused() -> None:
    x = np.ones((2, 32), np.float32)
    x[1, 3] = 1e30  # its square is infinite in float32
    hessian = Hessian(32)
    with np.errstate(over="ignore"):
        hessian.add(x)
    with pytest.raises(MossError, match="not finite.*--method rtn"):
        hessian.factor()
