"""Every CUDA kernel compiles for every architecture from Pascal to Blackwell, without a warning and without spills."""

import re
from functools import cache

import pytest

from moss_jt.kernels.cuda.launchers import THREADS, folder, source
from tests.emulation import nvrtc
from tests.emulation.emulator import parameters_of

SOURCES = ("linear.cu", "attention.cu", "elementwise.cu", "adapters.cu", "training.cu")
REGISTERS = 65536  # of a multiprocessor, on every one of these architectures


@cache
def compiled(name: str, architecture: str) -> dict[str, nvrtc.Compiled]:
    if not nvrtc.available():
        pytest.skip("NVRTC's wheels are not installed (nvidia-cuda-nvrtc-cu12, nvidia-cuda-runtime-cu12)")
    return nvrtc.compile_source(source(name), architecture, folder())


@pytest.mark.parametrize("architecture", nvrtc.ARCHITECTURES)
@pytest.mark.parametrize("name", SOURCES)
def test_kernels_compile_without_warnings_and_spills(name: str, architecture: str) -> None:
    report = compiled(name, architecture)
    assert report.keys() == parameters_of(source(name)).keys()
    for kernel, actual in report.items():
        assert actual.spilled_bytes == 0, f"{kernel} spills {actual.spilled_bytes} bytes on {architecture}"
        # At least four blocks side by side on a multiprocessor, or the loads of one could not hide another's.
        assert actual.registers * THREADS * 4 <= REGISTERS, (
            f"{kernel} takes {actual.registers} registers on {architecture}"
        )


def test_a_warning_fails() -> None:
    if not nvrtc.available():
        pytest.skip("NVRTC's wheels are not installed")
    with pytest.raises(nvrtc.CompileError, match="unused"):
        nvrtc.compile_source(
            'extern "C" __global__ void k(float* x) { int unused; x[0] = 1; }', "sm_80", folder()
        )


def test_the_first_pascal_s_kernels_compile_too() -> None:
    """Compute capability 6.0 lacks the dot product of bytes; what stands in for it takes more registers than there are."""
    assert compiled("linear.cu", "sm_60").keys() == parameters_of(source("linear.cu")).keys()


def test_no_half_arithmetic() -> None:
    """Pascal's sm_61 does it at 1/64 of float's speed: float16 is only widened and narrowed, on every card alike."""
    for name in SOURCES:
        assert not re.search(r"__h(add|sub|mul|fma|neg|max|min|eq|lt|gt)", source(name)), name


def test_a_pragma_stands_in_braces() -> None:
    """NVRTC takes a pragma for the only statement of an `if` without braces, and leaves the loop after it to everybody."""
    for name in SOURCES:
        assert not re.search(r"(if (constexpr )?\(.*\)|else)\n *#pragma", source(name)), name


def table() -> str:
    """Registers per kernel and architecture, as docs/cuda.md shows them."""
    lines = [
        "| kernel | " + " | ".join(nvrtc.ARCHITECTURES) + " |",
        "|---" * (len(nvrtc.ARCHITECTURES) + 1) + "|",
    ]
    for name in SOURCES:
        for kernel in compiled(name, nvrtc.ARCHITECTURES[0]):
            cells = [
                str(compiled(name, architecture)[kernel].registers) for architecture in nvrtc.ARCHITECTURES
            ]
            lines.append(f"| `{kernel}` | " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())
