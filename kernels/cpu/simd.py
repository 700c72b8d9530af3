"""Which vector instructions this machine has for the kernels."""

import os
import platform
from pathlib import Path

from moss_jt.errors import MossError

# What simd.h needs for each of its levels, fastest first, in the words of /proc/cpuinfo; 0 is plain C++.
AVX2 = {"avx2", "fma", "f16c"}
AVX512 = AVX2 | {"avx512f", "avx512bw", "avx512dq", "avx512vl"}
NEEDED = {
    "512-vnni": AVX512 | {"avx512_vnni"},
    "256-vnni": AVX2 | {"avx_vnni"},
    "512": AVX512,
    "256": AVX2,
    "0": set[str](),
}


def definitions(simd: str) -> dict[str, int]:
    """A level as simd.h takes it."""
    width, _, instructions = simd.partition("-")
    return {"MOSS_SIMD": int(width), "MOSS_VNNI": int(instructions == "vnni")}


def cpu_flags() -> set[str]:
    """Instruction sets of this processor, or none where the system does not tell."""
    info = Path("/proc/cpuinfo")
    if platform.machine() not in ("x86_64", "AMD64") or not info.exists():
        return set()
    for line in info.read_text(encoding="utf-8", errors="replace").splitlines():
        if line.startswith("flags"):
            return set(line.split(":", 1)[1].split())
    return set()


def available_simd() -> list[str]:
    """Levels that can run here, fastest first; always ends with 0."""
    flags = cpu_flags()
    if {
        "avx512_vnni",
        "avx512vl",
    } <= flags:  # the same instructions on half of the width, in another encoding
        flags.add("avx_vnni")
    return [level for level, needed in NEEDED.items() if needed <= flags]


def chosen_simd() -> str:
    """The fastest level, or what MOSS_JT_SIMD asks for.

    Raises:
        MossError: MOSS_JT_SIMD names a level that this machine does not have.
    """
    levels = available_simd()
    wanted = os.environ.get("MOSS_JT_SIMD")
    if wanted is None:
        return levels[0]
    if wanted not in levels:
        names = ", ".join(levels)
        raise MossError(
            f"MOSS_JT_SIMD is {wanted!r}; this machine can run {names}. Unset it for the fastest."
        )
    return wanted
