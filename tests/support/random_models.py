"""Model folders with random weights, written once per test run and shared by the tests that only read them."""

import functools
import tempfile
from dataclasses import replace
from pathlib import Path

from benchmarks.random_model import write_random_model
from moss_jt.store.config import MOSS_MOON_003, MossConfig

# 14 blocks of 14 MB: what streams is a multiple of what a process's size varies by.
WIDE = replace(
    MOSS_MOON_003,
    vocab_size=4096,
    n_positions=256,
    n_embd=768,
    n_layer=14,
    n_head=12,
    rotary_dim=32,
    n_inner=3072,
)
# A head of several slabs, blocks of 0.2 MB.
SMALL = replace(
    MOSS_MOON_003,
    vocab_size=4096,
    n_positions=256,
    n_embd=128,
    n_layer=6,
    n_head=4,
    rotary_dim=16,
    n_inner=512,
)


@functools.cache
def _home() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="moss-jt-random-")


@functools.cache
def random_folder(config: MossConfig, bits: int = 16) -> Path:
    """A finished model folder; do not change it, others read it too."""
    folder = Path(_home().name) / f"{config.n_embd}-{config.vocab_size}-{bits}"
    write_random_model(folder, config, bits)
    return folder
