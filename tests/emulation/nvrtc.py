"""NVIDIA's run-time compiler from its PyPI wheels, without a driver: source to machine code for one architecture."""

import ctypes
import importlib.util
import re
from dataclasses import dataclass
from pathlib import Path

ARCHITECTURES = ("sm_61", "sm_70", "sm_75", "sm_80", "sm_86", "sm_89", "sm_90", "sm_120")


@dataclass(frozen=True)
class Compiled:
    """What the compiler says of one kernel."""

    registers: int
    spilled_bytes: int
    shared_bytes: int = 0


def wheel(name: str) -> Path | None:
    spec = importlib.util.find_spec("nvidia")
    for folder in (spec.submodule_search_locations or []) if spec else []:
        if (Path(folder) / name).is_dir():
            return Path(folder) / name
    return None


def available() -> bool:
    return wheel("cuda_nvrtc") is not None and wheel("cuda_runtime") is not None


class CompileError(AssertionError):
    """The source does not compile, or not without a warning."""


def compile_source(code: str, architecture: str, include: str) -> dict[str, Compiled]:
    """Each kernel's registers, spills and shared memory, from the assembler's report; warnings are errors."""
    return compile_cubin(code, architecture, include)[1]


def compile_cubin(code: str, architecture: str, include: str) -> tuple[bytes, dict[str, Compiled]]:
    """The same, with the machine code."""
    nvrtc_folder, runtime = wheel("cuda_nvrtc"), wheel("cuda_runtime")
    assert nvrtc_folder is not None and runtime is not None
    nvrtc = ctypes.CDLL(str(next((nvrtc_folder / "lib").glob("libnvrtc.so.*"))))
    program = ctypes.c_void_p()
    check(nvrtc.nvrtcCreateProgram(ctypes.byref(program), code.encode(), b"kernel.cu", 0, None, None))
    options = [
        f"--gpu-architecture={architecture}",
        "--std=c++17",
        f"-I{include}",
        f"-I{runtime / 'include'}",
        "--ptxas-options=-v",
    ]
    values = (ctypes.c_char_p * len(options))(*[option.encode() for option in options])
    status = nvrtc.nvrtcCompileProgram(program, len(options), values)
    size = ctypes.c_size_t()
    check(nvrtc.nvrtcGetProgramLogSize(program, ctypes.byref(size)))
    log = ctypes.create_string_buffer(size.value)
    check(nvrtc.nvrtcGetProgramLog(program, log))
    text = log.value.decode()
    cubin = ctypes.create_string_buffer(0)
    if status == 0:
        check(nvrtc.nvrtcGetCUBINSize(program, ctypes.byref(size)))
        cubin = ctypes.create_string_buffer(size.value)
        check(nvrtc.nvrtcGetCUBIN(program, cubin))
    check(nvrtc.nvrtcDestroyProgram(ctypes.byref(program)))
    # sm_61 and sm_70 are announced as deprecated in every compilation; that is no warning about the source.
    warnings = [line for line in text.splitlines() if "warning" in line.lower() and "deprecated" not in line]
    if status or warnings:
        raise CompileError(f"{architecture}:\n{text}")
    return cubin.raw, read_report(text)


def check(status: int) -> None:
    if status:
        raise CompileError(f"NVRTC answered {status}")


def read_report(text: str) -> dict[str, Compiled]:
    """ptxas -v: 'Compiling entry function NAME', 'N bytes spill stores, M bytes spill loads', 'Used R registers'."""
    collected: dict[str, Compiled] = {}
    name, spilled = "", 0
    for line in text.splitlines():
        if match := re.search(r"entry function '(\w+)'", line):
            name, spilled = match[1], 0
        if match := re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", line):
            spilled = int(match[1]) + int(match[2])
        if match := re.search(r"Used (\d+) registers", line):
            shared = re.search(r"(\d+) bytes smem", line)
            collected[name] = Compiled(int(match[1]), spilled, int(shared[1]) if shared else 0)
    return collected
