"""Stands in for CuPy: RawModule compiles the source against emulation.h, and arrays are NumPy's."""

import ctypes
import hashlib
import os
import re
import subprocess
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import Any

import numpy as np

HERE = Path(__file__).resolve().parent
CUDA = HERE.parents[1] / "kernels" / "cuda"
KERNEL = re.compile(r'extern "C" __global__ void (\w+)\s*\(([^)]*(?:\([^)]*\)[^)]*)*)\)\s*\{')
PARAMETER = re.compile(r"(IN|OUT)\(([\w ]+)\) (\w+)|(int|float) (\w+)")
DTYPES = {
    "float": "float32",
    "__half": "float16",
    "int": "int32",
    "unsigned": "uint32",
    "unsigned char": "uint8",
    "signed char": "int8",
}


class EmulationError(AssertionError):
    """What the emulation found wrong with a kernel or its launch."""


def expand_macros(source: str) -> str:
    """The source after the preprocessor, as far as kernels are made by macros: g++ does it."""
    command = [
        "g++",
        "-E",
        "-P",
        "-x",
        "c++",
        "-D__global__=__global__",
        "-DIN(t)=IN(t)",
        "-DOUT(t)=OUT(t)",
        "-D__launch_bounds__(threads, blocks)=",
        "-",
    ]
    text = re.sub(r"^#include.*$", "", source, flags=re.MULTILINE)
    return subprocess.run(command, input=text, capture_output=True, text=True, check=True).stdout


def parameters_of(source: str) -> dict[str, list[tuple[str, str]]]:
    """Kernel -> its parameters as (IN, OUT or scalar; type)."""
    collected = {}
    for name, text in KERNEL.findall(expand_macros(source)):
        parameters = [(m[1] or "scalar", m[2] or m[4]) for m in PARAMETER.finditer(" ".join(text.split()))]
        assert len(parameters) == text.count(",") + 1, (name, text)
        collected[name] = parameters
    return collected


def wrapper(name: str, parameters: list[tuple[str, str]]) -> str:
    """A C function that launches a kernel: every array comes as a pointer and a number of elements."""
    arguments = []
    for index, (kind, type_) in enumerate(parameters):
        if kind == "scalar":
            arguments.append(f"*({type_}*)a[{2 * index}]")
        else:
            const = "const " if kind == "IN" else ""
            arguments.append(
                f"emu::Array<{const}{type_}>{{({const}{type_}*)a[{2 * index}], (long long)a[{2 * index + 1}]}}"
            )
    return (
        f'extern "C" void launch_{name}(unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned seed, void** a, '
        "char* error) {\n"
        f"  auto text = emu::launch({{gx, gy, gz}}, {{bx, 1, 1}}, seed, [&] {{ {name}({', '.join(arguments)}); }});\n"
        '  snprintf(error, 300, "%s", text.c_str());\n}\n'
    )


# Launches a kernel by its handle, as launch_queue.h does; and the worst conflict of shared memory's banks since the last time.
ENTRIES = """
extern "C" int launch_kernel(void* function, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned, unsigned, unsigned,
                             void*, void** parameters, void**) {
    return emu::launch_function(function, gx, gy, gz, bx, parameters);
}
extern "C" int worst_conflict() {
    int worst = emu::worst_conflict;
    emu::worst_conflict = 0;
    return worst;
}
"""


class FunctionHandle(ctypes.Structure):
    """emulation.h's Function."""

    _fields_ = [("launch", ctypes.c_void_p), ("parameters", ctypes.c_int), ("arrays", ctypes.c_char_p)]


@cache
def included() -> str:
    """What the modules include, whose names do not change with it."""
    return "".join(path.read_text() for path in (HERE / "emulation.h", CUDA / "device.cuh"))


def compiled(key: str, text: str, options: Sequence[str]) -> Path:
    """The module as a shared library, kept for other processes: most tests of the simulated card are one, and compiling takes
    longer than what they compute.
    """
    caches = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    library = caches / "moss-jt-emulation" / f"{key[:32]}.so"
    if library.exists():
        return library
    library.parent.mkdir(parents=True, exist_ok=True)
    flags = [
        "-O1",
        "-U_FORTIFY_SOURCE",
        "-std=c++17",
        "-shared",
        "-fPIC",
        "-w",
        "-mf16c",
        f"-I{HERE}",
        *options,
    ]
    with TemporaryDirectory(dir=library.parent) as folder:
        source, fresh = Path(folder, "module.cpp"), Path(folder, "module.so")
        source.write_text(text)
        command = ["g++", *flags, str(source), "-o", str(fresh)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise EmulationError(done.stderr[:3000])
        fresh.replace(library)
    return library


class RawModule:
    """cupy.RawModule over the emulation, which notes for the tests to look at:

    launches   (kernel, grid, block)
    conflicts  by kernel, how often the banks of shared memory were visited for one access of a warp, at most
    """

    built: dict[str, ctypes.CDLL] = {}

    def __init__(self, code: str, options: Sequence[str] = ()) -> None:
        self.parameters = parameters_of(code)
        kept = [option for option in options if option.startswith(("-I", "-D"))]
        wrappers = "".join(wrapper(name, parameters) for name, parameters in self.parameters.items())
        text = f"#define MOSS_EMULATION 1\n{code}\n{wrappers}{ENTRIES}"
        key = hashlib.sha256(f"{text}{kept}{included()}".encode()).hexdigest()
        if key not in self.built:
            self.built[key] = ctypes.CDLL(str(compiled(key, text, kept)))
        self.library = self.built[key]
        self.launches: list[tuple[str, tuple[int, ...], tuple[int, ...]]] = []
        self.conflicts: dict[str, int] = {}

    def get_function(self, name: str) -> Callable[..., None]:
        parameters = self.parameters[name]
        function = getattr(self.library, f"launch_{name}")

        def launch(grid: tuple[int, ...], block: tuple[int, ...], arguments: tuple[Any, ...]) -> None:
            check_launch(name, parameters, grid, block, arguments)
            self.launches.append((name, grid, block))
            pointers, kept = [], []
            for (kind, type_), value in zip(parameters, arguments, strict=True):
                if kind == "scalar":
                    number = np.array([value], np.int32 if type_ == "int" else np.float32)
                    kept.append(number)
                    pointers += [number.ctypes.data, 0]
                elif isinstance(value, np.uintp):
                    pointers += [None, 0]
                else:
                    pointers += [value.ctypes.data, value.size]
            error = ctypes.create_string_buffer(300)
            whole = (*grid, 1, 1)[:3]
            seed = len(self.launches)
            function(*whole, block[0], seed, (ctypes.c_void_p * len(pointers))(*pointers), error)
            self.conflicts[name] = max(self.conflicts.get(name, 0), self.library.worst_conflict())
            if error.value:
                raise EmulationError(f"{name}: {error.value.decode()}")

        address = ctypes.cast(function, ctypes.c_void_p).value
        arrays = bytes(kind != "scalar" for kind, _ in parameters)
        handle = FunctionHandle(address, len(parameters), arrays)
        launch.kernel = SimpleNamespace(ptr=ctypes.addressof(handle), handle=handle)  # type: ignore[attr-defined]
        return launch


def check_launch(
    name: str,
    parameters: list[tuple[str, str]],
    grid: tuple[int, ...],
    block: tuple[int, ...],
    arguments: tuple[Any, ...],
) -> None:
    """What a real launch would get wrong in silence: number and dtypes of arguments, contiguity, sizes of grid and block."""
    if len(arguments) != len(parameters):
        raise EmulationError(f"{name} takes {len(parameters)} arguments, got {len(arguments)}")
    if (
        not 0 < block[0] <= 1024
        or block[0] % 32
        or any(size < 1 for size in grid)
        or any(size > 65535 for size in grid[1:])
    ):
        raise EmulationError(f"{name}: impossible launch {grid} {block}")
    for index, ((kind, type_), value) in enumerate(zip(parameters, arguments, strict=True)):
        if kind == "scalar":
            if not isinstance(value, np.int32 if type_ == "int" else np.float32):
                raise EmulationError(
                    f"{name}: argument {index} is {type(value).__name__}, a {type_} is needed"
                )
        elif isinstance(value, np.uintp) and value == 0:
            continue  # no array, and an access of it is out of bounds
        elif value.dtype != DTYPES[type_] or not value.flags.c_contiguous:
            raise EmulationError(f"{name}: argument {index} is {value.dtype}, {type_} is needed, contiguous")


def aligned(array: np.ndarray) -> np.ndarray:
    """A copy that begins at a multiple of 256 bytes, as every CUDA allocation does."""
    memory = np.empty(array.nbytes + 256, np.uint8)
    start = -memory.ctypes.data % 256
    copy = memory[start : start + array.nbytes].view(array.dtype).reshape(array.shape)
    copy[...] = array
    return copy


class DeviceArray(np.ndarray):
    """NumPy's array with CuPy's way to tell where it lies."""

    @property
    def data(self) -> Any:  # type: ignore[override]
        return SimpleNamespace(ptr=self.ctypes.data)


def matrix_at(pointer: int, dtype: type, rows: int, columns: int, leading: int) -> np.ndarray:
    """A column-major matrix (rows, columns) as cuBLAS is told of it."""
    assert leading >= rows
    size = np.dtype(dtype).itemsize
    n_bytes = ((columns - 1) * leading + rows) * size
    memory = np.frombuffer((ctypes.c_char * n_bytes).from_address(pointer), dtype)
    return np.lib.stride_tricks.as_strided(memory, (rows, columns), (size, leading * size))


CUDA_TYPES = {0: np.float32, 2: np.float16}


class FakeCublas:
    """gemmEx and its batches as cuBLAS defines them, for float16 or float32 in and float32 out."""

    CUBLAS_OP_N, CUBLAS_OP_T = 0, 1
    CUBLAS_COMPUTE_32F, CUBLAS_GEMM_DEFAULT = 68, -1

    @staticmethod
    def getVersion(handle: int) -> int:  # noqa: N802
        return 120900

    @staticmethod
    def gemmEx(
        handle, op_a, op_b, m, n, k, alpha, a, a_type, lda, b, b_type, ldb, beta, c, c_type, ldc, compute, _
    ):  # noqa: ANN001, ANN205, N802
        assert (handle, b_type, c_type, compute) == (FakeCupy.HANDLE, a_type, 0, 68)
        dtype = CUDA_TYPES[a_type]
        left = matrix_at(a, dtype, *((k, m) if op_a else (m, k)), lda)
        right = matrix_at(b, dtype, *((n, k) if op_b else (k, n)), ldb)
        factor, kept = (ctypes.cast(pointer, ctypes.POINTER(ctypes.c_float))[0] for pointer in (alpha, beta))
        wide = [side.astype(np.float32) for side in (left.T if op_a else left, right.T if op_b else right)]
        result, out = np.float32(factor) * (wide[0] @ wide[1]), matrix_at(c, np.float32, m, n, ldc)
        out[...] = result + np.float32(kept) * out if kept else result

    @classmethod
    def gemmStridedBatchedEx(  # noqa: N802
        cls, handle, op_a, op_b, m, n, k, alpha, a, a_type, lda, stride_a, b, b_type, ldb, stride_b, beta, c, c_type,
        ldc, stride_c, count, compute, algorithm,
    ):  # noqa: ANN001, ANN206  # fmt: skip
        for i in range(count):
            at = (
                pointer + i * stride * np.dtype(CUDA_TYPES[kind]).itemsize
                for pointer, stride, kind in (
                    (a, stride_a, a_type),
                    (b, stride_b, b_type),
                    (c, stride_c, c_type),
                )
            )
            own_a, own_b, own_c = at
            cls.gemmEx(
                handle, op_a, op_b, m, n, k, alpha, own_a, a_type, lda, own_b, b_type, ldb, beta, own_c, c_type, ldc, compute,
                algorithm,
            )  # fmt: skip


class FakeCupy:
    """The part of CuPy that moss_jt.kernels.cuda uses, over NumPy."""

    RawModule = RawModule
    HANDLE = 4711
    asnumpy = staticmethod(np.asarray)
    cuda = SimpleNamespace(
        cublas=FakeCublas,
        device=SimpleNamespace(get_cublas_handle=lambda: FakeCupy.HANDLE),
        runtime=SimpleNamespace(
            getDevice=lambda: 0,
            getDeviceProperties=lambda device: {"name": b"emulated", "multiProcessorCount": 2},
        ),
    )

    @staticmethod
    def launch_kernel_address() -> int:
        """What stands for the driver's cuLaunchKernel."""
        library = RawModule('#include "device.cuh"\n', (f"-I{CUDA}",)).library
        return ctypes.cast(library.launch_kernel, ctypes.c_void_p).value or 0

    @staticmethod
    def get_default_memory_pool() -> Any:
        return SimpleNamespace(free_all_blocks=lambda: None, set_limit=lambda size: None)

    @staticmethod
    def empty(shape: Any, dtype: Any) -> np.ndarray:
        """As on a card, what lies in it is anything; here it is what shows."""
        filled = np.full(shape, np.nan if np.dtype(dtype).kind == "f" else 77, dtype)
        return aligned(filled).view(DeviceArray)

    @staticmethod
    def asarray(array: np.ndarray, dtype: Any = None) -> np.ndarray:
        """What already lies on the card as it is wanted, as operations' inputs and results do, is not copied."""
        if isinstance(array, np.ndarray) and array.dtype == np.dtype(dtype or array.dtype):
            return array.view(DeviceArray)
        return aligned(np.asarray(array, dtype)).view(DeviceArray)
