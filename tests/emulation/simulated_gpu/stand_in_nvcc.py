"""Stands in for nvcc: compiles a .cu file, or one of Jittor's generated sources, as C++ for this machine.

Host code only. Kernels are left out: none of Jittor's own runs in moss-jt, and a launch of one ends the program.
"""

import re
import subprocess
import sys
import tempfile
from pathlib import Path

NVCC_ONLY = ("-ccbin", "-arch", "-code", "--cudart", "--use_fast_math")
# What a source may name that only nvcc knows.
PRELUDE = """
#include <cuda_runtime.h>
#include <cstdlib>
template <typename... A> void sim_gpu_no_kernels(A&&...) { abort(); }
inline dim3 threadIdx, blockIdx, blockDim, gridDim;
template <typename T> T atomicAdd(T* place, T value) { T before = *place; *place += value; return before; }
#line 1
"""
LAUNCH = re.compile(r"\b[\w:]+(?:<[^<>;]*>)?\s*<<<[^;]*?>>>\s*\(")


def main(arguments: list[str]) -> int:
    if "--version" in arguments:
        print("Cuda compilation tools, release 12.4, V12.4.131")
        return 0
    source, flags = split(arguments)
    text = LAUNCH.sub("sim_gpu_no_kernels(", without_kernels(source.read_text()))
    with tempfile.NamedTemporaryFile("w", suffix=".cpp") as file:
        file.write(PRELUDE + text)
        file.flush()
        command = [
            "g++",
            "-std=c++17",
            "-fPIC",
            "-w",
            "-fpermissive",
            f"-I{source.parent}",
            file.name,
            *flags,
        ]
        return subprocess.run(command, check=False).returncode


def split(arguments: list[str]) -> tuple[Path, list[str]]:
    """The source, and the flags that g++ knows."""
    source, flags = Path(), []
    left = iter(arguments)
    for argument in left:
        if argument == "-Xcompiler":
            flags.append(next(left))
        elif argument == "-x":
            next(left)
        elif argument.endswith((".cu", ".cc")) and not argument.startswith("-"):
            source = Path(argument)
        elif not argument.startswith(NVCC_ONLY):
            flags.append(argument)
    return source, flags


def without_kernels(text: str) -> str:
    """The source without the definitions of its kernels."""
    while (begin := text.find("__global__")) >= 0:
        depth, end = 0, text.index("{", begin)
        while True:
            depth += {"{": 1, "}": -1}.get(text[end], 0)
            end += 1
            if depth == 0:
                break
        text = text[:begin] + text[end:]
    return text


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
