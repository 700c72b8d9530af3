"""A float16 model folder with something added to matrices of its blocks, tensor by tensor: an adapter made part of the model."""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from moss_jt.convert.layout import FilePlan, Target
from moss_jt.convert.pipeline import Recipe
from moss_jt.store.architecture import MATRICES
from moss_jt.store.config import MossConfig
from moss_jt.store.model_folder import block_file_name, local_name

# Rows first .. last - 1 of what is added to a matrix, float32.
Rows = Callable[[int, int], np.ndarray]
# Of a block, by its number, and a matrix, by its name in files; None where nothing is added.
Addition = Callable[[int, str], Rows | None]


def merged_recipe(recipe: Recipe, config: MossConfig, identity: dict[str, Any], addition: Addition) -> Recipe:
    """The recipe of a float16 model folder, changed to add to matrices, in float32, rounded once.

    identity: what tells this addition from others.
    """
    blocks = {block_file_name(number): number for number in range(config.n_layer)}
    files = [
        _merged_plan(plan, blocks[plan.name], addition) if plan.name in blocks else plan
        for plan in recipe.files
    ]
    return dataclasses.replace(recipe, identity={**recipe.identity, "merged": identity}, files=files)


def _merged_plan(plan: FilePlan, number: int, addition: Addition) -> FilePlan:
    added = {f"{name}.weight": rows for name in MATRICES if (rows := addition(number, name)) is not None}
    if not added:
        return plan

    def build() -> list[Target]:
        return [_merged(target, added.get(local_name(target.name))) for target in plan.build()]

    return FilePlan(plan.name, plan.sources, build)


def _merged(target: Target, rows: Rows | None) -> Target:
    if rows is None:
        return target

    def produce() -> Iterator[np.ndarray]:
        first = 0
        for chunk in target.produce():
            last = first + len(chunk)
            wide = chunk.astype(np.float32) + rows(first, last)
            yield np.clip(wide, -65504, 65504).astype(np.float16)
            first = last

    return dataclasses.replace(target, produce=produce)
