"""Which vector instructions this machine has for the kernels."""

import os
import platform
from pathlib import Path

from moss_jt.errors import MossError

# What simd.h and digits.h need for each of its widths, in the words of /proc/cpuinfo; 0 is plain C++.
NEEDED = {
    512: {"avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512_vnni", "avx2", "fma", "f16c"},
    256: {"avx2", "fma", "f16c"},
    0: set(),
}


def cpu_flags() -> set[str]:
    """Instruction sets of this processor, or none where the system does not tell."""
    info = Path("/proc/cpuinfo")
    if platform.machine() not in ("x86_64", "AMD64") or not info.exists():
        return set()
    for line in info.read_text(encoding="utf-8", errors="replace").splitlines():
        if line.startswith("flags"):
            return set(line.split(":", 1)[1].split())
    return set()


def available_simd() -> list[int]:
    """Widths that can run here, widest first; always ends with 0."""
    flags = cpu_flags()
    return [width for width, needed in NEEDED.items() if needed <= flags]


def chosen_simd() -> int:
    """The widest width, or what MOSS_JT_SIMD asks for.

    Raises:
        MossError: MOSS_JT_SIMD names a width that this machine does not have.
    """
    widths = available_simd()
    wanted = os.environ.get("MOSS_JT_SIMD")
    if wanted is None:
        return widths[0]
    if wanted not in [str(width) for width in widths]:
        names = ", ".join(map(str, widths))
        raise MossError(
            f"MOSS_JT_SIMD is {wanted!r}; this machine can run {names}. Unset it for the fastest."
        )
    return int(wanted)
