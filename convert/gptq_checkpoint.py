"""Published GPTQ checkpoints (qweight, qzeros, scales, g_idx) to our packed layout, repacked once, at conversion.

Packing of the source: word w of a qweight column holds input rows w * (32 / bits) onward, lowest bits first; qzeros pack
along the outputs and hold the zero point minus one, which is masked before one is added and never wraps (format gptq), or the
zero point itself (gptq_v2). Input row k belongs to group g_idx[k], or without g_idx to group k // group size; where that is
not monotonic (act-order) the inputs are permuted so that groups become runs. Scales may be negative.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from moss_jt.convert.checkpoint import Checkpoint
from moss_jt.convert.layout import (
    QKV,
    QUANTISED_PARTS,
    FilePlan,
    Target,
    check_names,
    check_zeros,
    checked,
    dense_target,
    expected_names,
    zero_biases,
)
from moss_jt.convert.tensors import FLOATS, SourceTensor, to_float16
from moss_jt.errors import MossError
from moss_jt.store.architecture import block_tensors, embedding_tensors, head_tensors, matrix_shape
from moss_jt.store.config import MossConfig
from moss_jt.store.qkv_order import head_runs
from moss_jt.store.quant import BITS, pack, row_slabs, working_group_sizes

Runs = list[tuple[int, int]]

DTYPES_OF_PARTS = {
    "qweight": ("I32", "U32"),
    "qzeros": ("I32", "U32"),
    "scales": FLOATS,
    "g_idx": ("I32", "I64"),
}
GROUP_INDEX = ".g_idx"


@dataclass(frozen=True)
class PackedFormat:
    """What all of a checkpoint's matrices share. ``zero_offset`` is added to a stored zero point: 1, or 0 in gptq_v2.

    ``guessed``: the checkpoint does not say which, but all its zero points lie where only the second makes sense.
    """

    bits: int
    group_size: int
    zero_offset: int
    guessed: bool

    @property
    def notes(self) -> tuple[str, ...]:
        if not self.guessed:
            return ()
        return (
            f"The checkpoint does not say how it stores zero points. All are {_middle(self.bits)}, the middle of "
            f"{self.bits} bits, so they are read as they stand (checkpoint_format gptq_v2), not as minus one (gptq).",
        )


def quantised_files(checkpoint: Checkpoint) -> tuple[list[FilePlan], PackedFormat]:
    """(files to write, format) of a published quantised checkpoint.

    Raises:
        MossError: tensors are missing, extra, or contradict each other about bits or groups; it names the tensor.
    """
    config = checkpoint.config
    files = expected_names(config, quantised=True)
    if not any(name.endswith(GROUP_INDEX) for name in checkpoint.weight_map):
        files = {
            file: [name for name in names if not name.endswith(GROUP_INDEX)] for file, names in files.items()
        }
    check_names(checkpoint, files)
    packed = _first_format(checkpoint)
    plain = {**embedding_tensors(config), **head_tensors(config), **block_tensors(config, 16, 0)}

    def targets(names: list[str]) -> list[Target]:
        made: list[Target] = []
        for name in names:
            stem, part = name.rsplit(".", 1)
            local = re.sub(r"^transformer\.(h\.\d+\.)?", "", stem)
            if part == "qweight":
                made += _matrix_targets(checkpoint, config, stem, local, packed)
            elif part not in QUANTISED_PARTS:
                source = checked(checkpoint, name, plain[f"{local}.{part}"][1])
                made.append(dense_target(source, name, [(0, source.shape[0])]))
        return made

    def plan(file: str, names: list[str]) -> FilePlan:
        zeros = zero_biases(checkpoint, names)

        def build() -> list[Target]:
            check_zeros(checkpoint, zeros)
            return targets(names)

        return FilePlan(file, (*names, *zeros), build)

    return [plan(file, names) for file, names in files.items()], packed


def format_notes(fields: dict[str, Any], bits: int, group_size: int) -> tuple[str, ...]:
    """What a user should hear where config.json says otherwise than the tensors, which are what counts."""
    read = {"wbits": bits, "groupsize": group_size}
    return tuple(
        f"config.json says {name} {fields[name]!r}, but the tensors have {value}; they are converted as they are."
        for name, value in read.items()
        if fields.get(name, -1) not in (-1, value)  # -1: one group per matrix, or no word on it
    )


def _first_format(checkpoint: Checkpoint) -> PackedFormat:
    """The format of the first block's first matrix, which all others must share."""
    stem = f"transformer.h.0.{QKV}"
    parts = _parts(checkpoint, stem)
    bits, group_size = _format_of(stem, parts, checkpoint.config.n_embd)
    told = _told_format(checkpoint)
    if told is not None:
        return PackedFormat(bits, group_size, 0 if told == "gptq_v2" else 1, guessed=False)
    guessed = bool((_fields(_words(parts["qzeros"]), bits) == _middle(bits)).all())
    return PackedFormat(bits, group_size, 0 if guessed else 1, guessed)


def _told_format(checkpoint: Checkpoint) -> str | None:
    """checkpoint_format of config.json's quantization_config or of quantize_config.json; None where neither says."""
    told = checkpoint.fields.get("quantization_config")
    if not isinstance(told, dict):
        told = checkpoint.optional_json("quantize_config.json")
    method = told.get("quant_method", "gptq")
    if method != "gptq":
        raise MossError(
            f"{checkpoint.source} is quantised by {str(method)[:60]!r}. moss-jt reads GPTQ checkpoints; others convert from "
            "float16, with --bits 4 or --bits 8."
        )
    form = told.get("checkpoint_format")
    if form not in (None, "gptq", "gptq_v2"):
        raise MossError(
            f"{checkpoint.source} has checkpoint_format {str(form)[:60]!r}; only gptq and gptq_v2 are known."
        )
    return form


def _middle(bits: int) -> int:
    return 1 << (bits - 1)


def _parts(checkpoint: Checkpoint, stem: str) -> dict[str, SourceTensor]:
    """A matrix's tensors by their last name; g_idx may be absent."""
    names = [part for part in QUANTISED_PARTS if f"{stem}.{part}" in checkpoint.weight_map]
    return {part: checkpoint.tensor(f"{stem}.{part}") for part in names}


def _format_of(stem: str, parts: dict[str, SourceTensor], inputs: int) -> tuple[int, int]:
    """Bits and group size from the shapes: a published config is known to be wrong."""
    for part, source in parts.items():
        if source.dtype not in DTYPES_OF_PARTS[part] or len(source.shape) != (1 if part == "g_idx" else 2):
            raise MossError(
                f"{stem}.{part} is {source.dtype} {source.shape}: no part of a quantised matrix. Wrong tensor?"
            )
    length = parts["g_idx"].shape[0] if "g_idx" in parts else inputs
    if length != inputs:
        raise MossError(f"{stem}.g_idx has {length} entries; the matrix has {inputs} inputs.")
    bits, rest = divmod(32 * parts["qweight"].shape[0], length)
    if rest or bits not in BITS:
        raise MossError(
            f"{stem}.qweight has {parts['qweight'].shape[0]} rows for {length} inputs: neither 4 nor 8 bits."
        )
    groups = parts["scales"].shape[0]
    if not groups or length % groups or length // groups not in working_group_sizes(length):
        raise MossError(
            f"{stem}.scales has {groups} groups for {length} inputs; groups must be equal and of a multiple of 32 inputs."
        )
    return bits, length // groups


def _matrix_targets(
    checkpoint: Checkpoint, config: MossConfig, stem: str, local: str, packed: PackedFormat
) -> list[Target]:
    rows, columns = matrix_shape(config, local)
    bits, group_size = packed.bits, packed.group_size
    parts = _parts(checkpoint, stem)
    own_bits, own_group = _format_of(stem, parts, columns)
    if own_bits != bits:
        raise MossError(
            f"{stem}.qweight has {own_bits} bits, the first matrix {bits}: a mixture of checkpoints."
        )
    # Where every matrix has one group (groupsize -1), that of fc_out is longer: it is stored as several alike.
    repeat, rest = divmod(own_group, group_size)
    if rest or (repeat > 1 and not (own_group == columns and group_size == config.n_embd)):
        raise MossError(f"{stem}.scales has groups of {own_group} inputs, the first matrix of {group_size}.")
    groups = columns // own_group
    wanted = {
        "qweight": (columns * bits // 32, rows),
        "qzeros": (groups, rows * bits // 32),
        "scales": (groups, rows),
    }
    for part, shape in wanted.items():
        if parts[part].shape != shape:
            raise MossError(f"{stem}.{part} has shape {parts[part].shape}; this model needs {shape}.")
    order = None
    if "g_idx" in parts:
        order = _input_order(f"{stem}.g_idx", parts["g_idx"].read(), groups, own_group)
    runs = head_runs(config) if local == QKV else [(0, rows)]
    zeros, scales = _zeros_and_scales(stem, parts, packed)
    # A zero point of 0 cannot be stored as itself minus one. scale * q is -scale * ((M - q) - M) with M the largest q.
    turned = zeros == 0
    scales = np.where(turned, -scales, scales)
    zeros = np.where(turned, (1 << bits) - 1, zeros)

    def per_group(values: np.ndarray) -> Iterator[np.ndarray]:  # (G, N) -> (N, G), the outputs in our order
        for first, count in runs:
            yield np.repeat(values[:, first : first + count].T, repeat, axis=1)

    shape = (rows, columns // group_size)
    targets = [
        Target(
            f"{stem}.packed",
            "U8",
            (rows, columns * bits // 8),
            lambda: _packed(parts, bits, runs, order, turned if turned.any() else None),
        ),
        Target(f"{stem}.scales", "F16", shape, lambda: per_group(scales)),
        Target(f"{stem}.zeros", "U8", shape, lambda: per_group((zeros - 1).astype(np.uint8))),
    ]
    if order is not None:
        targets.append(Target(f"{stem}.input_order", "I32", (columns,), lambda: iter([order])))
    return targets


def _input_order(name: str, g_idx: np.ndarray, groups: int, group_size: int) -> np.ndarray | None:
    """Input of each stored column, or None where columns are stored in the inputs' own order."""
    beyond = g_idx[(g_idx < 0) | (g_idx >= groups)]
    if len(beyond):
        raise MossError(
            f"{name} names group {beyond[0]} of {groups}: the tensor is damaged or of another matrix."
        )
    if (np.bincount(g_idx, minlength=groups) != group_size).any():
        raise MossError(f"{name} does not give every group {group_size} inputs: the tensor is damaged.")
    order = np.argsort(g_idx, kind="stable").astype(np.int32)
    return None if (order == np.arange(len(order))).all() else order


def _fields(words: np.ndarray, bits: int) -> np.ndarray:
    """Words (R, S) int32 to fields (R, S * 32 / bits) uint8, the lowest bits of a word first."""
    octets = words.view(np.uint8)  # little-endian, as stored
    if bits == 8:
        return octets
    out = np.empty((octets.shape[0], 2 * octets.shape[1]), np.uint8)
    out[:, 0::2] = octets & 15
    out[:, 1::2] = octets >> 4
    return out


def _words(part: SourceTensor) -> np.ndarray:
    """Packed words as int32, whatever sign their type has."""
    return part.read().view(np.int32)


def _packed(
    parts: dict[str, SourceTensor], bits: int, runs: Runs, order: np.ndarray | None, turned: np.ndarray | None
) -> Iterator[np.ndarray]:
    """Rows of the packed matrix, a few million weights at a time, so that transposing stays in the cache.

    turned  (G, N) where q stands for the largest field minus q; None where that is nowhere
    """
    words = _words(parts["qweight"])  # (K * bits / 32, N)
    for first, count in runs:
        for slab in row_slabs(count, len(words) * 32 // bits):
            these = slice(first + slab.start, first + slab.stop)
            fields = _fields(np.ascontiguousarray(words[:, these].T), bits)  # (n, K)
            if order is not None:
                fields = fields[:, order]
            if turned is not None:
                mask = np.repeat(turned[:, these].T, fields.shape[1] // len(turned), axis=1)
                fields = np.where(mask, np.uint8((1 << bits) - 1) - fields, fields)
            yield pack(fields, bits)


def _zeros_and_scales(
    stem: str, parts: dict[str, SourceTensor], packed: PackedFormat
) -> tuple[np.ndarray, np.ndarray]:
    """(zero points 0 to 2**bits as int16, scales as float16), each (G, N)."""
    fields = _fields(_words(parts["qzeros"]), packed.bits)
    if packed.guessed and (fields != _middle(packed.bits)).any():
        raise MossError(
            f"{stem}.qzeros: the first matrix has the zero points of checkpoint_format gptq_v2, this one has not. Write "
            'which it is, gptq or gptq_v2, into a quantize_config.json beside the weights: {"checkpoint_format": "gptq"}'
        )
    scales = to_float16(parts["scales"].read(), parts["scales"].dtype, f"{stem}.scales")
    if (scales == 0).any():
        raise MossError(f"{stem}.scales holds a scale that is zero in float16: the checkpoint is damaged.")
    return fields.astype(np.int16) + packed.zero_offset, scales
