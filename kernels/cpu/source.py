"""Sources of the jt.code operations: a few lines that call the headers beside this file."""

import functools
from pathlib import Path
from typing import Any

from moss_jt.backend.home import cache_folder
from moss_jt.backend.jittor import jt
from moss_jt.kernels.cpu.simd import definitions
from moss_jt.kernels.interface import Var
from moss_jt.kernels.needs import DEFINITIONS

FOLDER = Path(__file__).parent


@functools.cache
def onednn_folder() -> Path | None:
    """Where Jittor has oneDNN's include and lib folders, or None where it runs without."""
    folders = sorted((cache_folder() / "mkl").glob("dnnl*"))
    if not jt.compile_extern.mkl_ops or not folders:
        return None
    return folders[-1]


@functools.cache
def cpu_header(simd: str, include: str, source: str) -> str:
    """Jittor watches included files, but finds them by an absolute path or in a folder given by -I only.

    The source is a macro here: Jittor looks at each character of an operation's source, each time that it runs.
    """
    macros: dict[str, Any] = {**definitions(simd), **DEFINITIONS}
    if onednn_folder() is not None:
        macros["MOSS_ONEDNN"] = 1
    macros["MOSS_SOURCE"] = source.strip().replace("\n", " \\\n")
    lines = [f"#define {name} {value}" for name, value in macros.items()]
    return "\n".join([*lines, f'#include "{FOLDER / include}"', ""])


@functools.cache
def compile_options() -> dict[str, int]:
    """Extra flags: one defined rounding for every operation (see simd.h), and oneDNN where Jittor has it."""
    flags = [
        f'-I"{FOLDER}"',
        "-std=c++17",
        "-Wno-strict-aliasing",
        "-Wno-psabi",
        "-fno-fast-math",
        "-ffp-contract=off",
    ]
    folder = onednn_folder()
    if folder is not None:
        flags += [f'-L"{folder / "lib"}"', "-lmkldnn"]
    return {"FLAGS: " + " ".join(flags) + " ": 1}


def run(
    simd: str,
    include: str,
    source: str,
    shapes: list[tuple[int, ...]],
    inputs: list[Var],
    data: dict[str, Any] | None = None,
) -> list[Var]:
    """Float32 results of ``source``, which sees in0_p, out0_p, in0_shape0 and so on, and ``data`` as doubles."""
    dtypes = ["float32"] * len(shapes)
    header = cpu_header(simd, include, source)
    results = jt.code(shapes, dtypes, inputs, cpu_header=header, cpu_src="MOSS_SOURCE", data=data or {})
    results[0].compile_options = compile_options()
    return results
