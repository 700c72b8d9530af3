"""GPTQ as its writers vary it, each beside a float16 checkpoint made from the same numbers: nothing may differ.

Scales are powers of two, so that every weight is exact in float16 and both checkpoints hold the same numbers.
"""

import json
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from moss_jt.convert.checkpoint import open_local
from moss_jt.convert.pipeline import convert, recipe_for
from moss_jt.errors import MossError
from moss_jt.measure.perplexity import EngineTokens, evaluate
from moss_jt.moss import Moss
from moss_jt.store.architecture import MATRICES
from moss_jt.store.model_folder import open_store, read_tensor
from moss_jt.store.quant import dequantize
from tests.support.models import (
    convert_checkpoint,
    random_tensors,
    small_config,
    stored_matrix,
    write_checkpoint,
)
from tests.support.torch_files import torch_file

GROUP = 64
GEOMETRY = {"n_embd": 128, "n_layer": 2, "n_head": 4, "rotary_dim": 8, "n_inner": 256}


@dataclass(frozen=True)
class Variant:
    """How a checkpoint is written. ``zero``: its zero points, drawn from this range (first, last)."""

    bits: int = 4
    group: int = GROUP
    offset: int = 1
    zero: tuple[int, int] = (1, 16)
    negative: bool = False
    scale_type: str = "F16"
    g_idx: str | None = "I32"
    act_order: bool = False
    zero_biases: bool = False
    told: str | None = None
    told_in: str = "quantize_config.json"
    file: str = "model.safetensors"


V1, V2 = Variant(), Variant(offset=0, zero=(0, 15), told="gptq_v2")
VARIANTS = {
    "minus one, as published": V1,
    "minus one, said": replace(V1, told="gptq"),
    "gptq_v2": V2,
    "gptq_v2 in config.json": replace(V2, told_in="config.json"),
    "gptq_v2, 8 bits": replace(V2, bits=8, zero=(0, 255)),
    "gptq_v2, act-order": replace(V2, act_order=True),
    "gptq_v2, groups of 128": replace(V2, group=128),
    "symmetric, minus one": Variant(zero=(8, 8)),
    "symmetric, as it is, not said": Variant(offset=0, zero=(8, 8)),
    "symmetric, as it is, 8 bits, not said": Variant(bits=8, offset=0, zero=(128, 128)),
    "negative scales": Variant(zero=(8, 8), negative=True),
    "negative scales, groups of 128": Variant(zero=(8, 8), negative=True, group=128),
    "negative scales, 8 bits, groups of 128": Variant(bits=8, zero=(1, 256), negative=True, group=128),
    "negative scales, gptq_v2": replace(V2, negative=True),
    "float32 scales": Variant(scale_type="F32"),
    "bfloat16 scales": Variant(scale_type="BF16"),
    "g_idx in int64": Variant(g_idx="I64", act_order=True),
    "no g_idx": Variant(g_idx=None),
    "biases of zeros": Variant(zero_biases=True),
    "AutoGPTQ's file name": Variant(file="gptq_model-4bit-128g.safetensors"),
    "a torch file": Variant(file="model-4bit.pt"),
}

Written = tuple[Path, Path]  # the quantised checkpoint, the float16 one


def words(fields: np.ndarray, bits: int) -> np.ndarray:
    """Fields (R, S) to (R * bits / 32, S) int32, consecutive rows in a word, the first in the lowest bits."""
    parts = fields.reshape(-1, 32 // bits, fields.shape[1]).astype(np.uint64)
    shifts = (np.arange(32 // bits, dtype=np.uint64) * np.uint64(bits))[None, :, None]
    packed = (parts << shifts).sum(axis=1, dtype=np.uint64).astype(np.uint32).view(np.int32)
    return np.ascontiguousarray(packed)  # safetensors writes the memory of an array, whatever its order


def write_variant(folder: Path, variant: Variant) -> Written:
    """Both checkpoints."""
    fields: dict[str, Any] = small_config(**GEOMETRY)
    told = {} if variant.told is None else {"quant_method": "gptq", "checkpoint_format": variant.told}
    dense, packed = random_tensors(fields), {}
    draw = np.random.default_rng(7)
    for name, values in list(dense.items()):
        match = re.fullmatch(r"(transformer\.h\.\d+\.(?:attn|mlp)\.\w+)\.weight", name)
        if not match:
            packed[name] = values
            continue
        rows, columns = values.shape
        groups, stem = columns // variant.group, match[1]
        q = draw.integers(0, 1 << variant.bits, (rows, columns))
        zero = draw.integers(variant.zero[0], variant.zero[1] + 1, (rows, groups))
        scale = 2.0 ** draw.integers(-11 - variant.bits // 2, -8 - variant.bits // 2, (rows, groups))
        if variant.negative:
            scale *= draw.choice([-1, 1], scale.shape)
        g_idx = np.arange(columns) // variant.group
        if variant.act_order:
            g_idx = draw.permutation(g_idx)
        weight = scale[:, g_idx] * (q - zero[:, g_idx])
        dense[name] = np.ascontiguousarray(weight.astype(np.float16))
        assert (dense[name] == weight).all()
        packed[f"{stem}.qweight"] = words(q.T, variant.bits)
        packed[f"{stem}.qzeros"] = np.ascontiguousarray(words(zero - variant.offset, variant.bits).T)
        packed[f"{stem}.scales"] = np.ascontiguousarray(scale.T).astype(
            np.float16 if variant.scale_type == "F16" else np.float32
        )
        if variant.g_idx is not None:
            packed[f"{stem}.g_idx"] = g_idx.astype(np.int32 if variant.g_idx == "I32" else np.int64)
        if variant.zero_biases and ".attn." in stem:
            packed[f"{stem}.bias"] = np.zeros(rows, np.float16)
    if told and variant.told_in == "config.json":
        fields["quantization_config"] = {**told, "bits": variant.bits}
    source = write_checkpoint(folder / "packed", fields, [dense])
    (source / "model.safetensors").unlink()
    if told and variant.told_in != "config.json":
        (source / variant.told_in).write_text(json.dumps(told))
    if variant.file.endswith(".pt"):
        (source / variant.file).write_bytes(torch_file(packed))
    else:
        save_file(packed, source / variant.file)
    if variant.scale_type == "BF16":
        narrow_scales(source / variant.file)
    return source, write_checkpoint(folder / "dense", small_config(**GEOMETRY), [dense])


def narrow_scales(path: Path) -> None:
    """The file's float32 scales as bfloat16, which NumPy has no type for."""
    data = path.read_bytes()
    end = 8 + int.from_bytes(data[:8], "little")
    header, chunks, at = json.loads(data[8:end]), [], 0
    for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        first, last = entry["data_offsets"]
        chunk = data[end + first : end + last]
        if name.endswith(".scales"):
            chunk = (np.frombuffer(chunk, np.uint32) >> 16).astype(np.uint16).tobytes()
            entry["dtype"] = "BF16"
        entry["data_offsets"] = [at, at + len(chunk)]
        chunks.append(chunk)
        at += len(chunk)
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + b"".join(chunks))


@pytest.mark.parametrize("name", VARIANTS)
def test_every_variant_is_the_float_model_of_the_same_numbers(tmp_path: Path, name: str) -> None:
    """Weight by weight without a tolerance, and through the kernels: short passes, and prompts of 64 tokens and more."""
    packed, dense = write_variant(tmp_path, VARIANTS[name])
    ours = open_store(convert_checkpoint(packed, tmp_path / "packed-out"))
    wanted = open_store(convert_checkpoint(dense, tmp_path / "dense-out"))
    assert (ours.bits, ours.group_size) == (VARIANTS[name].bits, VARIANTS[name].group)
    for layer, block in enumerate(wanted.blocks):
        for matrix in MATRICES:
            np.testing.assert_array_equal(
                dequantize(stored_matrix(ours, layer, matrix)), read_tensor(block, f"{matrix}.weight")
            )
    token_ids = np.random.default_rng(3).integers(0, 2000, 120).tolist()
    with Moss.load(wanted.path, draft="off") as reference, Moss.load(ours.path, draft="off") as moss:
        for length in (100, 20):
            result = evaluate(token_ids, EngineTokens(moss.engine), EngineTokens(reference.engine), length)
            assert result.comparison is not None
            assert 0 <= abs(result.comparison.mean_divergence) < 1e-9
            assert result.comparison.agreement == 1


def said_of(source: Path, out: Path) -> list[str]:
    said: list[str] = []
    checkpoint = open_local(source)
    convert(checkpoint, recipe_for(checkpoint), out, notice=said.append)
    return said


def test_a_guess_is_told_and_nothing_else(tmp_path: Path) -> None:
    guessed, _ = write_variant(tmp_path / "a", VARIANTS["symmetric, as it is, not said"])
    said = said_of(guessed, tmp_path / "a-out")
    assert len(said) == 1 and "All are 8" in said[0] and "gptq_v2" in said[0]
    for number, name in enumerate(("symmetric, minus one", "gptq_v2", "minus one, as published")):
        source, _ = write_variant(tmp_path / str(number), VARIANTS[name])
        assert said_of(source, tmp_path / f"{number}-out") == []


def change_packed(source: Path, name: str, change: Callable[[np.ndarray], np.ndarray]) -> None:
    from safetensors.numpy import load_file

    tensors = load_file(source / "model.safetensors")
    tensors[name] = change(tensors[name])
    save_file(tensors, source / "model.safetensors")


def test_a_guess_that_a_later_matrix_contradicts_is_refused(tmp_path: Path) -> None:
    source, _ = write_variant(tmp_path, VARIANTS["symmetric, as it is, not said"])
    name = "transformer.h.1.mlp.fc_in.qzeros"
    change_packed(source, name, lambda words: words ^ 1)
    with pytest.raises(MossError, match=r"h\.1\.mlp\.fc_in\.qzeros.*checkpoint_format"):
        convert_checkpoint(source, tmp_path / "out")
    (source / "quantize_config.json").write_text('{"checkpoint_format": "gptq_v2"}')
    convert_checkpoint(source, tmp_path / "out")


def test_one_matrix_without_the_order_that_the_others_have_is_refused(tmp_path: Path) -> None:
    from safetensors.numpy import load_file

    source, _ = write_variant(tmp_path, VARIANTS["gptq_v2, act-order"])
    tensors = load_file(source / "model.safetensors")
    del tensors["transformer.h.1.mlp.fc_in.g_idx"]
    save_file(tensors, source / "model.safetensors")
    with pytest.raises(MossError, match=r"lacks the tensor transformer\.h\.1\.mlp\.fc_in\.g_idx"):
        convert_checkpoint(source, tmp_path / "out")


@pytest.mark.parametrize(
    ("told", "words"),
    [
        ({"quant_method": "awq"}, "quantised by 'awq'"),
        ({"checkpoint_format": "marlin"}, "'marlin'"),
        ({"checkpoint_format": ["gptq"]}, "checkpoint_format"),
    ],
)
def test_other_formats_are_named(tmp_path: Path, told: dict[str, Any], words: str) -> None:
    source, _ = write_variant(tmp_path, V1)
    (source / "quantize_config.json").write_text(json.dumps(told))
    with pytest.raises(MossError, match=words):
        convert_checkpoint(source, tmp_path / "out")


@pytest.mark.parametrize("value", [1e6, 1e-12, np.nan])
def test_wide_scales_that_float16_cannot_hold_are_refused(tmp_path: Path, value: float) -> None:
    source, _ = write_variant(tmp_path, VARIANTS["float32 scales"])
    name = "transformer.h.1.attn.out_proj.scales"

    def put(scales: np.ndarray) -> np.ndarray:
        scales = scales.copy()
        scales[0, 3] = value
        return scales

    change_packed(source, name, put)
    with pytest.raises(MossError, match=re.escape(name)):
        convert_checkpoint(source, tmp_path / "out")
