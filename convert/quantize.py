"""Int4 and int8 model folders from float16 ones: the same files, with each block's four matrices packed.

One block is in memory at a time. GPTQ needs the hidden states that enter a block; they lie beside the block files as
``calibration-NN.scratch`` until all is done, so that an interrupted conversion goes on at its block.
"""

import dataclasses
import hashlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

from moss_jt.convert.calibration import FC_OUT, Calibration, GptqSettings
from moss_jt.convert.layout import FilePlan, Target
from moss_jt.convert.pipeline import SCRATCH, Recipe, weight_bytes
from moss_jt.convert.tensors import SourceTensor
from moss_jt.errors import MossError
from moss_jt.store.architecture import MATRICES
from moss_jt.store.config import MossConfig
from moss_jt.store.files import replacing, writing
from moss_jt.store.model_folder import EMBEDDING, block_file_name, local_name
from moss_jt.store.quant import PackedArrays, check_group_size, quantize_rtn, working_group_sizes
from moss_jt.store.safetensors_header import DTYPES, read_header

DEFAULT_GROUP_SIZE = 128
SEQUENCE_TOKENS = 1024  # calibration tokens that see each other, at most

Matrices = Iterator[tuple[str, PackedArrays]]
Report = Callable[[str], None]


@dataclass(frozen=True)
class QuantSettings:
    """bits 4 or 8; method rtn or gptq; act_order with gptq only."""

    bits: int
    group_size: int
    method: str
    act_order: bool = False


class Quantizer(Protocol):
    def block(self, number: int, targets: Mapping[str, Target]) -> Matrices:
        """Yield the four matrices of a block by local name, from its float16 targets by local name."""
        ...


def default_group_size(config: MossConfig) -> int:
    """128 where it divides the model's rows, else the largest below it that does."""
    sizes = [n for n in working_group_sizes(config.n_embd, config.n_inner) if n <= DEFAULT_GROUP_SIZE]
    return max(sizes, default=DEFAULT_GROUP_SIZE)


def quantized_recipe(
    recipe: Recipe,
    config: MossConfig,
    settings: QuantSettings,
    out: Path,
    token_ids: np.ndarray | None,
    report: Report = lambda text: None,
) -> Recipe:
    """The recipe of a float16 model folder, changed to quantise its blocks.

    token_ids  calibration tokens (T,) integers for gptq, None for rtn
    report     is told what is being worked on

    Raises:
        MossError: the recipe's source is quantised already, or the group size does not fit the model.
    """
    if recipe.bits != 16:
        raise MossError(
            f"{recipe.source} is quantised already, to int{recipe.bits}. Convert it without --bits, "
            "or quantize the float16 model that it was made from."
        )
    check_group_size(settings.group_size, config.n_embd, config.n_inner)
    made = dataclasses.asdict(settings)
    quantizer: Quantizer = RtnQuantizer(settings)
    if token_ids is not None:
        made["calibration"] = hashlib.sha256(token_ids.astype("<i4").tobytes()).hexdigest()
        quantizer = GptqQuantizer(config, settings, out, token_ids)
    blocks = {block_file_name(number): number for number in range(config.n_layer)}
    files = [
        _quantized_plan(plan, blocks[plan.name], config, quantizer, report) if plan.name in blocks else plan
        for plan in recipe.files
    ]
    return dataclasses.replace(
        recipe,
        identity={**recipe.identity, "quantized": made},
        bits=settings.bits,
        group_size=settings.group_size,
        files=files,
        total_bytes=weight_bytes(config, settings.bits, settings.group_size),
    )


def _quantized_plan(
    plan: FilePlan, number: int, config: MossConfig, quantizer: Quantizer, report: Report
) -> FilePlan:
    """The work is done where the plan is built, not where its targets are read: there Ctrl-C is heard at once."""

    def build() -> list[Target]:
        dense = {local_name(target.name): target for target in plan.build()}
        where = f"block {number + 1} of {config.n_layer}"
        report(where)
        targets = [target for name, target in dense.items() if name.removesuffix(".weight") not in MATRICES]
        for done, (name, matrix) in enumerate(quantizer.block(number, dense), 1):
            targets += _packed_targets(dense[f"{name}.weight"].name.removesuffix(".weight"), matrix)
            report(f"{where}, {done} of {len(MATRICES)} matrices")
        return targets

    return FilePlan(plan.name, plan.sources, build)


def _packed_targets(stem: str, matrix: PackedArrays) -> list[Target]:
    parts = [("packed", "U8", matrix.packed), ("scales", "F16", matrix.scales), ("zeros", "U8", matrix.zeros)]
    if matrix.input_order is not None:
        parts.append(("input_order", "I32", matrix.input_order))

    def target(part: str, dtype: str, array: np.ndarray) -> Target:
        return Target(f"{stem}.{part}", dtype, array.shape, lambda: iter([array]))

    return [target(*part) for part in parts]


def _read(target: Target) -> np.ndarray:
    """A target's tensor in memory, as it would be written."""
    array = np.empty(target.shape, DTYPES[target.dtype])
    flat, done = array.reshape(-1), 0
    for chunk in target.produce():
        flat[done : done + chunk.size] = chunk.reshape(-1)
        done += chunk.size
    return array


class RtnQuantizer:
    """Round to nearest: needs nothing but the weights."""

    def __init__(self, settings: QuantSettings) -> None:
        self._settings = settings

    def block(self, number: int, targets: Mapping[str, Target]) -> Matrices:
        for name in MATRICES:
            weight = _read(targets[f"{name}.weight"])
            yield name, quantize_rtn(weight, self._settings.bits, self._settings.group_size)


class GptqQuantizer:
    """GPTQ: blocks must come in order, after the embedding has been written to ``out``."""

    def __init__(self, config: MossConfig, settings: QuantSettings, out: Path, token_ids: np.ndarray) -> None:
        self._config = config
        self._settings = GptqSettings(settings.bits, settings.group_size, settings.act_order)
        self._out = out
        self._token_ids = token_ids

    def block(self, number: int, targets: Mapping[str, Target]) -> Matrices:
        if number > 0:
            self._state(number - 1).unlink(missing_ok=True)  # the block before is done: see the journal
        calibration = self._entering(number)
        weights = {name: _read(target) for name, target in targets.items()}
        for name, matrix in calibration.quantize_block(weights, self._settings):
            if name == FC_OUT:  # the last one: the hidden states have left the block
                self._save(number + 1, calibration.hidden)
            yield name, matrix

    def _state(self, number: int) -> Path:
        return self._out / f"calibration-{number:02d}{SCRATCH}"

    def _entering(self, number: int) -> Calibration:
        """The hidden states (T, C) float32 that enter a block.

        Where those that were saved are lost, they are sent through the finished blocks again.
        """
        length = min(self._config.n_positions, SEQUENCE_TOKENS)
        saved = self._saved(number)
        if saved is not None:
            return Calibration(self._config, saved, length)
        table = _stored(self._out / EMBEDDING)["wte.weight"]
        calibration = Calibration(self._config, table[self._token_ids].astype(np.float32), length)
        for before in range(number):
            block = _stored(self._out / block_file_name(before))
            calibration.pass_block(block, {name: self._matrix(block, name) for name in MATRICES})
        return calibration

    def _matrix(self, block: Mapping[str, np.ndarray], name: str) -> PackedArrays:
        return PackedArrays(
            packed=block[f"{name}.packed"],
            scales=block[f"{name}.scales"],
            zeros=block[f"{name}.zeros"],
            bits=self._settings.bits,
            group_size=self._settings.group_size,
            input_order=block.get(f"{name}.input_order"),
        )

    def _saved(self, number: int) -> np.ndarray | None:
        if number == 0:
            return None
        try:
            hidden: np.ndarray = np.load(self._state(number), allow_pickle=False)
        except (OSError, ValueError, EOFError):
            return None
        wanted = (len(self._token_ids), self._config.n_embd)
        return hidden if hidden.shape == wanted and hidden.dtype == np.float32 else None

    def _save(self, number: int, hidden: np.ndarray) -> None:
        path = self._state(number)
        with writing(path), replacing(path) as file:
            np.save(file, hidden)


def _stored(path: Path) -> dict[str, np.ndarray]:
    """Every tensor of a finished file by local name."""
    return {
        local_name(name): SourceTensor(name, spec.dtype_name, spec.shape, path, spec.offset).read()
        for name, spec in read_header(path).tensors.items()
    }
