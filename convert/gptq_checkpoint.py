"""Published GPTQ checkpoints (qweight, qzeros, scales, g_idx) to our packed layout, repacked once, at conversion.

Packing of the source: word w of a qweight column holds input rows w * (32 / bits) onward, lowest bits first; qzeros pack
along the outputs and hold the zero point minus one, which is masked before one is added and never wraps. Input row k belongs
to group g_idx[k]; where that is not monotonic (act-order) the inputs are permuted so that groups become runs.
"""

import re
from collections.abc import Iterator
from typing import Any

import numpy as np

from moss_jt.convert.checkpoint import Checkpoint
from moss_jt.convert.layout import (
    QKV,
    QUANTISED_PARTS,
    FilePlan,
    Target,
    check_names,
    checked,
    dense_target,
    expected_names,
    head_runs,
)
from moss_jt.convert.tensors import SourceTensor
from moss_jt.errors import MossError
from moss_jt.store.config import MossConfig
from moss_jt.store.model_folder import block_tensors, embedding_tensors, head_tensors, matrix_shape
from moss_jt.store.quant import BITS, pack, row_slabs, working_group_sizes

Runs = list[tuple[int, int]]

DTYPES_OF_PARTS = {"qweight": "I32", "qzeros": "I32", "scales": "F16", "g_idx": "I32"}


def quantised_files(checkpoint: Checkpoint) -> tuple[list[FilePlan], int, int]:
    """(files to write, bits, group size) of a published quantised checkpoint.

    Raises:
        MossError: tensors are missing, extra, or contradict each other about bits or groups; it names the tensor.
    """
    config = checkpoint.config
    files = expected_names(config, quantised=True)
    check_names(checkpoint, files)
    bits, group_size = _first_format(checkpoint)
    plain = {**embedding_tensors(config), **head_tensors(config), **block_tensors(config, 16, 0)}

    def targets(names: list[str]) -> list[Target]:
        found: list[Target] = []
        for name in names:
            stem, part = name.rsplit(".", 1)
            local = re.sub(r"^transformer\.(h\.\d+\.)?", "", stem)
            if part == "qweight":
                found += _matrix_targets(checkpoint, config, stem, local, bits, group_size)
            elif part not in QUANTISED_PARTS:
                source = checked(checkpoint, name, plain[f"{local}.{part}"][1])
                found.append(dense_target(source, name, [(0, source.shape[0])]))
        return found

    def plan(file: str, names: list[str]) -> FilePlan:
        return FilePlan(file, tuple(names), lambda: targets(names))

    return [plan(file, names) for file, names in files.items()], bits, group_size


def format_notes(fields: dict[str, Any], bits: int, group_size: int) -> tuple[str, ...]:
    """What a user should hear where config.json says otherwise than the tensors, which are what counts."""
    found = {"wbits": bits, "groupsize": group_size}
    return tuple(
        f"config.json says {name} {fields[name]!r}, but the tensors have {value}; they are converted as they are."
        for name, value in found.items()
        if fields.get(name, -1) not in (-1, value)  # -1: one group per matrix, or no word on it
    )


def _first_format(checkpoint: Checkpoint) -> tuple[int, int]:
    """Bits and group size of the first block's first matrix, which all others must share."""
    stem = f"transformer.h.0.{QKV}"
    parts = {part: checkpoint.tensor(f"{stem}.{part}") for part in QUANTISED_PARTS}
    return _format_of(stem, parts, checkpoint.config.n_embd)


def _format_of(stem: str, parts: dict[str, SourceTensor], inputs: int) -> tuple[int, int]:
    """Bits and group size from the shapes: a published config is known to be wrong."""
    for part, source in parts.items():
        if source.dtype != DTYPES_OF_PARTS[part] or len(source.shape) != (1 if part == "g_idx" else 2):
            raise MossError(
                f"{stem}.{part} is {source.dtype} {source.shape}: no part of a quantised matrix. Wrong tensor?"
            )
    length = parts["g_idx"].shape[0]
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
    checkpoint: Checkpoint, config: MossConfig, stem: str, local: str, bits: int, group_size: int
) -> list[Target]:
    rows, columns = matrix_shape(config, local)
    parts = {part: checkpoint.tensor(f"{stem}.{part}") for part in QUANTISED_PARTS}
    found = _format_of(stem, parts, columns)
    if found[0] != bits:
        raise MossError(
            f"{stem}.qweight has {found[0]} bits, the first matrix {bits}: a mixture of checkpoints."
        )
    # Where every matrix has one group (groupsize -1), that of fc_out is longer: it is stored as several alike.
    repeat, rest = divmod(found[1], group_size)
    if rest or (repeat > 1 and not (found[1] == columns and group_size == config.n_embd)):
        raise MossError(f"{stem}.scales has groups of {found[1]} inputs, the first matrix of {group_size}.")
    groups = columns // found[1]
    wanted = {
        "qweight": (columns * bits // 32, rows),
        "qzeros": (groups, rows * bits // 32),
        "scales": (groups, rows),
    }
    for part, shape in wanted.items():
        if parts[part].shape != shape:
            raise MossError(f"{stem}.{part} has shape {parts[part].shape}; this model needs {shape}.")
    order = _input_order(f"{stem}.g_idx", parts["g_idx"].whole(), groups, found[1])
    runs = head_runs(config) if local == QKV else [(0, rows)]

    def per_group(values: np.ndarray) -> Iterator[np.ndarray]:  # (G, N) -> (N, G), the outputs in our order
        for first, count in runs:
            yield np.repeat(values[:, first : first + count].T, repeat, axis=1)

    shape = (rows, columns // group_size)
    targets = [
        Target(
            f"{stem}.packed", "U8", (rows, columns * bits // 8), lambda: _packed(parts, bits, runs, order)
        ),
        Target(f"{stem}.scales", "F16", shape, lambda: per_group(_scales(stem, parts))),
        Target(f"{stem}.zeros", "U8", shape, lambda: per_group(_fields(parts["qzeros"].whole(), bits))),
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


def _packed(
    parts: dict[str, SourceTensor], bits: int, runs: Runs, order: np.ndarray | None
) -> Iterator[np.ndarray]:
    """Rows of the packed matrix, a few million weights at a time, so that transposing stays in the cache."""
    words = parts["qweight"].whole()  # (K * bits / 32, N)
    for first, count in runs:
        for slab in row_slabs(count, len(words) * 32 // bits):
            outputs = words[:, first + slab.start : first + slab.stop]
            fields = _fields(np.ascontiguousarray(outputs.T), bits)  # (n, K)
            yield pack(fields if order is None else fields[:, order], bits)


def _scales(stem: str, parts: dict[str, SourceTensor]) -> np.ndarray:
    scales = parts["scales"].whole()
    if not np.isfinite(scales).all() or (scales <= 0).any():
        raise MossError(
            f"{stem}.scales holds a scale that is zero, negative, infinite or NaN: the checkpoint is damaged."
        )
    return scales
