"""Published GPTQ checkpoints: the weights after conversion are the reference formula's, act-order or not; damage is refused."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moss_jt.convert.checkpoint import open_local
from moss_jt.convert.gptq_checkpoint import format_notes
from moss_jt.convert.pipeline import convert, recipe_for
from moss_jt.errors import MossError
from moss_jt.store.architecture import matrix_shape
from moss_jt.store.model_folder import MANIFEST, open_store
from moss_jt.store.quant import PackedArrays, dequantize_float16, pack
from tests.support.models import (
    convert_checkpoint,
    random_tensors,
    small_config,
    stored_matrix,
    write_checkpoint,
)
from tests.support.published_gptq import reference_weight, to_published

GEOMETRY = {"n_embd": 64, "n_layer": 2, "n_head": 4, "rotary_dim": 8}


def random_matrix(
    rows: int, columns: int, bits: int, group_size: int, act_order: bool, seed: int
) -> PackedArrays:
    """Every field value and every zero point occurs."""
    draw = np.random.default_rng(seed)
    groups = columns // group_size
    fields = draw.permutation(np.arange(rows * columns) % 2**bits).reshape(rows, columns).astype(np.uint8)
    return PackedArrays(
        packed=pack(fields, bits),
        scales=draw.uniform(0.001, 0.1, (rows, groups)).astype(np.float16),
        zeros=(draw.permutation(rows * groups) % 2**bits).reshape(rows, groups).astype(np.uint8),
        bits=bits,
        group_size=group_size,
        input_order=draw.permutation(columns).astype(np.int32) if act_order else None,
    )


def published(
    bits: int, group_size: int | None, act_order: bool
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """config.json's fields and tensors as a published checkpoint holds them, buffers and all; its wbits is wrong.

    group_size  None: one group per matrix
    """
    fields = small_config(**GEOMETRY, wbits=8 if bits == 4 else 4, groupsize=128)
    tensors: dict[str, np.ndarray] = {}
    for number, (name, values) in enumerate(random_tensors(fields).items()):
        match = re.fullmatch(r"(transformer\.h\.\d+\.(attn\.\w+|mlp\.\w+))\.weight", name)
        if not match:
            tensors[name] = values
            continue
        rows, columns = values.shape
        matrix = random_matrix(rows, columns, bits, group_size or columns, act_order, number)
        tensors.update({f"{match[1]}.{part}": array for part, array in to_published(matrix).items()})
    mask = np.ones((1, 1, 8, 8), np.uint8)
    tensors.update({f"transformer.h.{layer}.attn.causal_mask": mask for layer in range(2)})
    return fields, tensors


@pytest.mark.parametrize(
    ("bits", "group_size", "act_order"),
    [(4, 32, False), (4, 32, True), (8, 32, True), (8, 64, False), (4, None, False)],
)
def test_weights_equal_the_reference_formula_exactly(
    tmp_path: Path, bits: int, group_size: int | None, act_order: bool
) -> None:
    fields, tensors = published(bits, group_size, act_order)
    out = convert_checkpoint(write_checkpoint(tmp_path / "source", fields, [tensors]), tmp_path / "out")
    store = open_store(out)
    assert (store.bits, store.group_size) == (bits, group_size or 64)
    width, quarter = 64, 16
    for layer in range(2):
        for name in ("attn.qkv_proj", "attn.out_proj", "mlp.fc_in", "mlp.fc_out"):
            prefix = f"transformer.h.{layer}.{name}."
            parts = {
                key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)
            }
            expected = reference_weight(
                {key: parts[key] for key in ("qweight", "qzeros", "scales", "g_idx")}, bits
            )
            ours = dequantize_float16(stored_matrix(store, layer, name))
            assert ours.shape == matrix_shape(store.config, name)
            if name == "attn.qkv_proj":  # one head per quarter here: chunks of query, value, key
                for head in range(4):
                    for mine, theirs in ((0, 0), (1, 2), (2, 1)):
                        begin = (3 * head + theirs) * quarter
                        at = mine * width + head * quarter
                        np.testing.assert_array_equal(
                            ours[at : at + quarter], expected[begin : begin + quarter]
                        )
            else:
                np.testing.assert_array_equal(ours, expected)
        assert ("attn.out_proj.input_order" in store.blocks[layer].tensors) == act_order


def test_a_config_that_says_otherwise_is_told(tmp_path: Path) -> None:
    """A published config.json has wbits 4 beside int8 tensors."""
    fields, tensors = published(8, 32, False)
    checkpoint = open_local(write_checkpoint(tmp_path / "source", fields, [tensors]))
    said: list[str] = []
    convert(checkpoint, recipe_for(checkpoint), tmp_path / "out", notice=said.append)
    assert len(said) == 2
    assert "wbits 4, but the tensors have 8" in said[0]
    assert "groupsize 128, but the tensors have 32" in said[1]
    assert not format_notes({"wbits": 4, "groupsize": 32}, 4, 32)
    assert not format_notes({"groupsize": -1}, 4, 64)


@pytest.mark.parametrize("value", [64, -1, 1])
def test_an_input_order_that_kernels_must_not_follow_is_refused(tmp_path: Path, value: int) -> None:
    """Beyond the inputs, before them, or one twice: act-order's numbers are read as addresses."""
    fields, tensors = published(4, 32, True)
    out = convert_checkpoint(write_checkpoint(tmp_path / "source", fields, [tensors]), tmp_path / "out")
    block = open_store(out).blocks[1]
    spec = block.tensors["attn.out_proj.input_order"]
    data = bytearray(block.path.read_bytes())
    order = np.frombuffer(data, np.int32, 64, spec.offset)
    order[np.flatnonzero(order == 0)] = value
    block.path.write_bytes(data)
    with pytest.raises(MossError, match=r"block-01.*attn\.out_proj\.input_order"):
        open_store(out)


def damaged(tmp_path: Path, **changes: Any) -> str:
    fields, tensors = published(4, 32, False)
    for name, change in changes.items():
        key = name.replace("__", ".")
        full = f"transformer.h.1.{key}"
        tensors[full] = change(tensors[full])
    source = write_checkpoint(tmp_path / "source", fields, [tensors])
    with pytest.raises(MossError) as caught:
        convert_checkpoint(source, tmp_path / "out")
    assert not (tmp_path / "out" / MANIFEST).exists()
    return str(caught.value)


def put(index: Any, value: Any) -> Any:
    def change(array: np.ndarray) -> np.ndarray:
        array = array.copy()
        array[index] = value
        return array

    return change


@pytest.mark.parametrize(
    ("name", "change", "words"),
    [
        ("mlp__fc_in__scales", put((1, 3), 0), "zero in float16"),
        ("mlp__fc_in__scales", put((0, 0), np.inf), "NaN or infinity"),
        ("mlp__fc_in__scales", put((0, 5), np.nan), "NaN or infinity"),
        ("mlp__fc_in__g_idx", put(5, 9), "group 9 of 2"),
        ("mlp__fc_in__g_idx", put(5, -1), "group -1 of 2"),
        ("mlp__fc_in__g_idx", put(5, 1), "every group 32 inputs"),
        ("mlp__fc_in__g_idx", lambda array: array[:40], "40 entries"),
        ("mlp__fc_in__qweight", lambda array: np.concatenate([array, array]), "8 bits, the first matrix 4"),
        ("mlp__fc_in__qweight", lambda array: array[:5], "neither 4 nor 8"),
        ("mlp__fc_in__qweight", lambda array: np.ascontiguousarray(array[:, :100]), "(8, 100)"),
        ("mlp__fc_in__qzeros", lambda array: array[:1], "(1, 32)"),
        ("mlp__fc_in__scales", lambda array: np.repeat(array, 2, 0), "multiple of 32"),
        ("mlp__fc_out__scales", lambda array: np.ascontiguousarray(array[::2]), "groups of 64"),
        (
            "mlp__fc_in__qzeros",
            lambda array: (array & 1023).astype(np.float16),
            "no part of a quantised matrix",
        ),
    ],
)
def test_damage_is_refused_and_names_the_tensor(tmp_path: Path, name: str, change: Any, words: str) -> None:
    message = damaged(tmp_path, **{name: change})
    assert words in message
    assert "transformer.h.1.mlp.fc_" in message


def test_a_missing_part_is_named(tmp_path: Path) -> None:
    fields, tensors = published(4, 32, False)
    del tensors["transformer.h.1.attn.out_proj.qzeros"]
    with pytest.raises(MossError, match=r"h\.1\.attn\.out_proj\.qzeros"):
        convert_checkpoint(write_checkpoint(tmp_path / "source", fields, [tensors]), tmp_path / "out")
