"""What decides, beside the text, which bits a page of the cache holds: the model's weights, and how this machine computes."""

import hashlib
import os
import platform
from pathlib import Path

from moss_jt import kernels
from moss_jt.backend.read_only import is_writable
from moss_jt.backend.threads import compute_threads
from moss_jt.engine.prompt_cache import PromptCache
from moss_jt.errors import MossError
from moss_jt.kernels.cpu.simd import cpu_flags
from moss_jt.plan.machine import parse_memory
from moss_jt.store.files import read_small
from moss_jt.store.manifest import MANIFEST
from moss_jt.store.model_folder import Store
from moss_jt.user_folders import own_folder

FOLDER = "prompt-cache"
SUFFIXES = (".py", ".h", ".cu", ".cuh")


def prompt_cache(store: Store, level: str, limit_bytes: int, cache_bits: int = 16) -> PromptCache | None:
    """Where pages of this model are kept: beside it, or in the user's cache where its folder cannot be written; None where nothing
    is to be kept, or nowhere.

    Args:
        level: of the operators, as they name it.
        cache_bits: of keys and values: pages of others are none of this model's.
    """
    if limit_bytes <= 0:
        return None
    folder = store.path / FOLDER
    if not is_writable(folder if folder.exists() else store.path):
        try:
            name = hashlib.blake2b(os.fsencode(store.path.resolve()), digest_size=8).hexdigest()
            folder = own_folder("CACHE", ".cache") / FOLDER / name
        except MossError:
            return None
    return PromptCache(folder, key_of(store, level, cache_bits), limit_bytes)


def prompt_cache_bytes(amount: str | int) -> int:
    """Bytes of an amount as users write it; 0 is none.

    Raises:
        MossError: it is no amount.
    """
    if str(amount).strip() == "0":
        return 0
    if str(amount).strip().endswith("%"):
        raise MossError(
            f"a prompt cache of {amount} is a share of nothing. Write it like 2GiB, or 0 for none."
        )
    return parse_memory(amount, 0)


def key_of(store: Store, level: str, cache_bits: int = 16) -> str:
    """The checksums of the model's weights, which its manifest has, the operators' sources and level, the processor, how many
    threads compute, and the cache's bits."""
    digest = hashlib.blake2b(digest_size=16)
    machine = [platform.machine(), *sorted(cpu_flags()), str(compute_threads())]
    for part in (level, " ".join(machine), f"cache {cache_bits}"):
        digest.update(part.encode() + b"\0")
    digest.update(read_small(store.path / MANIFEST))
    for path in sorted(_sources()):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def _sources() -> list[Path]:
    """All code that computes what a page holds."""
    here = Path(__file__).parent
    operators = [path for path in Path(kernels.__path__[0]).rglob("*") if path.suffix in SUFFIXES]
    return [*operators, here / "model.py", here / "kv_cache.py"]
