"""Adapters of random values, as folders of peft's files."""

from pathlib import Path

import numpy as np

from moss_jt.store.config import MossConfig
from moss_jt.train.lora import Adapter, LoraSettings
from moss_jt.train.peft_files import write_adapter


def random_adapter(
    folder: Path, config: MossConfig, settings: LoraSettings, seed: int, spread: float = 0.1
) -> Path:
    """Writes one whose B is not nothing; returns its folder."""
    adapter = Adapter(config, settings)
    adapter.values[:] = spread * np.random.default_rng(seed).standard_normal(len(adapter.values))
    write_adapter(folder, adapter, "random")
    return folder
