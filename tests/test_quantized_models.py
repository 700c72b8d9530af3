"""What quantization costs on moss-tiny, through the CPU kernels; and published-style checkpoints compute what they hold."""

import re
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moss_jt.convert.calibration_text import calibration_tokens
from moss_jt.convert.folder_source import folder_recipe
from moss_jt.convert.pipeline import convert
from moss_jt.convert.quantize import QuantSettings, quantized_recipe
from moss_jt.measure.perplexity import EngineTokens, evaluate
from moss_jt.moss import Moss
from moss_jt.store.quant import PackedArrays, dequantize, dequantize_float16, pack
from tests.support.dialogues import dialogues
from tests.support.models import (
    convert_checkpoint,
    random_tensors,
    small_config,
    tiny_model_folder,
    write_checkpoint,
)
from tests.support.published_gptq import to_published

SEEN, UNSEEN = 77, 990  # seeds of the dialogues to calibrate on and to judge by
JUDGED_TOKENS = 3000

Divergence = Callable[..., float]


@pytest.fixture(scope="module")
def divergence(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Divergence]:
    """Mean KL(float16 || quantised) of moss-tiny on unseen dialogues, as a function of how it was quantised."""
    where = tmp_path_factory.mktemp("quantized")
    (where / "dialogues.txt").write_text(dialogues(SEEN, 12), encoding="utf-8")
    with Moss.load(tiny_model_folder(), draft="off") as reference:
        token_ids = reference.tokenizer.encode(dialogues(UNSEEN, 4))[:JUDGED_TOKENS]

        @cache
        def judge(settings: QuantSettings, text: str | None = "dialogues.txt") -> float:
            folder, recipe = folder_recipe(tiny_model_folder())
            chosen = where / text if text else None
            calibration = (
                calibration_tokens(folder.tokenizer_text(), chosen) if settings.method == "gptq" else None
            )
            out = where / re.sub(r"\W+", "-", f"{settings}{text}")
            convert(folder, quantized_recipe(recipe, folder.config, settings, out, calibration), out)
            with Moss.load(out, draft="off") as moss:
                result = evaluate(token_ids, EngineTokens(moss.engine), EngineTokens(reference.engine), 1024)
            assert result.comparison is not None
            print(
                f"{settings} {text}: KL {result.comparison.mean_divergence:.6f}, agreement {result.comparison.agreement:.4f}"
            )
            return result.comparison.mean_divergence

        yield judge


def test_int8_hardly_differs_from_float16(divergence: Divergence) -> None:
    """Seen: 0.00002. The bound is the project's own."""
    assert divergence(QuantSettings(8, 96, "rtn")) < 1e-3


@pytest.mark.parametrize("group_size", [32, 192])
def test_gptq_costs_far_less_than_rounding(divergence: Divergence, group_size: int) -> None:
    """On dialogues that the calibration has not seen. Seen: a fifth to a quarter of rounding's divergence."""
    rounded = divergence(QuantSettings(4, group_size, "rtn"))
    assert divergence(QuantSettings(4, group_size, "gptq")) < 0.5 * rounded < 0.02


def test_act_order_costs_less_again(divergence: Divergence) -> None:
    """Seen: three quarters."""
    plain = divergence(QuantSettings(4, 96, "gptq"))
    assert divergence(QuantSettings(4, 96, "gptq", act_order=True)) < plain


def test_the_text_that_comes_along_helps_too(divergence: Divergence) -> None:
    """It is unlike the dialogues of the tiny model. Seen: about a third of rounding's divergence."""
    rounded = divergence(QuantSettings(4, 96, "rtn"))
    assert divergence(QuantSettings(4, 96, "gptq"), None) < 0.7 * rounded


def exact_matrix(rows: int, columns: int, bits: int, act_order: bool, seed: int) -> PackedArrays:
    """Random fields and zero points whose weights float16 holds exactly: scales have few significant bits."""
    draw = np.random.default_rng(seed)
    groups = columns // 32
    factor = draw.choice([1.0, 3.0, 5.0, 7.0] if bits == 4 else [4.0, 5.0, 6.0, 7.0], (rows, groups))
    return PackedArrays(
        packed=pack(draw.integers(0, 2**bits, (rows, columns)).astype(np.uint8), bits),
        scales=(factor * 2.0 ** (-9 if bits == 4 else -14)).astype(np.float16),
        zeros=draw.integers(0, 2**bits, (rows, groups)).astype(np.uint8),
        bits=bits,
        group_size=32,
        input_order=draw.permutation(columns).astype(np.int32) if act_order else None,
    )


def both_checkpoints(folder: Path, bits: int, act_order: bool) -> tuple[Path, Path]:
    """The same weights as a published-style quantised checkpoint and as a float16 one."""
    fields: dict[str, Any] = small_config(n_positions=64)
    packed, dense = {}, {}
    for number, (name, values) in enumerate(random_tensors(fields).items()):
        match = re.fullmatch(r"(transformer\.h\.\d+\.(?:attn|mlp)\.\w+)\.weight", name)
        if not match:
            packed[name] = dense[name] = values
            continue
        matrix = exact_matrix(*values.shape, bits, act_order, number)
        dense[name] = dequantize_float16(matrix)
        assert (dense[name] == dequantize(matrix)).all()
        packed.update({f"{match[1]}.{part}": array for part, array in to_published(matrix).items()})
    return (
        write_checkpoint(folder / "packed", fields, [packed]),
        write_checkpoint(folder / "dense", fields, [dense]),
    )


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("act_order", [False, True])
def test_a_published_checkpoint_gives_the_logits_of_its_weights(
    tmp_path: Path, bits: int, act_order: bool
) -> None:
    """Through conversion, permutation and kernels, for one token at a time and for a whole prompt."""
    folders = [
        convert_checkpoint(source, tmp_path / f"model-{source.name}")
        for source in both_checkpoints(tmp_path, bits, act_order)
    ]
    token_ids = np.random.default_rng(1).integers(0, 2000, 40).tolist()
    actual = []
    for folder in folders:
        with Moss.load(folder, draft="off") as moss:
            complete = moss.logits(token_ids)
            steps = np.concatenate([moss.model.forward([t], i, "all") for i, t in enumerate(token_ids)])
            actual.append((complete, steps))
    for ours, want in zip(actual[0], actual[1], strict=True):
        # The weights are the same numbers; float32 sums in another order differ, and then some cache entries' rounding.
        assert np.abs(ours - want).max() <= 1e-4 * np.abs(want).max()
