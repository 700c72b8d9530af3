"""What computing on a GPU needs, and what of it this machine has. Starts neither Jittor nor CuPy, and no work on the card."""

import ctypes
import importlib.util
import os
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NoReturn

from moss_jt.backend.home import cache_folder
from moss_jt.errors import MossError

# Where nvcc is looked for beside the variables and the PATH; the pattern is what Jittor's own installer makes.
NVCC_PLACES = ("/usr/local/cuda/bin/nvcc", "/opt/cuda/bin/nvcc", "/usr/bin/nvcc")
JITTORS_CUDA = "jtcuda/*/bin/nvcc"
# Debian and Ubuntu spread their package of the toolkit over the system's folders.
SYSTEM_LIBRARIES = Path("/usr/lib/x86_64-linux-gnu")
SYSTEM_NVCC = Path("/usr/bin/nvcc")
TOOLKITS = (11, 12)  # that Jittor 1.3.11 compiles with
# What Jittor compiles and links with when it is told to leave cuDNN out, and what CuPy compiles our kernels with.
LIBRARIES = ("cudart", "cublas", "curand", "nvrtc")
HEADERS = ("cuda_runtime.h", "cublas_v2.h", "curand.h", "cuda_fp16.h")
CUPY_WHEELS = {"cupy-cuda12x": 12, "cupy-cuda11x": 11, "cupy": None}
OLDEST_CARD = (6, 0)
# The first CUDA that compiles for cards up to this generation: Ampere, Hopper, Blackwell.
FIRST_TOOLKITS = (((11, 1), 8), ((11, 8), 9), ((12, 8), 12))

# CUDA's numbers of three attributes of a device.
COMPUTE_MAJOR, COMPUTE_MINOR, CONCURRENT_MANAGED = 75, 76, 89

# What Jittor, CUDA and CuPy say where memory on the card ran out.
HOST_CALLS = ("cudahostregister", "cudamallochost", "cuda_host_allocator")
OUT_OF_MEMORY = ("unable to alloc cuda", "cudaerrormemoryallocation", "out of memory", "outofmemory")

INSTALL_TOOLKIT = "install CUDA Toolkit 12, from NVIDIA or with python -m jittor_utils.install_cuda, or name its nvcc in nvcc_path"


@dataclass(frozen=True)
class Card:
    """The first card that this process may use.

    free_bytes   as the driver's management library (NVML) tells, or all where there is none
    compute      compute capability, (8, 6) for sm_86
    driver_cuda  the newest CUDA that the driver knows, (12, 4)
    unified      whether host and card may use managed memory at the same time, as prefetching it needs
    """

    name: str
    total_bytes: int
    free_bytes: int
    compute: tuple[int, int]
    driver_cuda: tuple[int, int]
    unified: bool = True


@dataclass(frozen=True)
class Toolkit:
    """A CUDA toolkit that is complete for Jittor and CuPy; libraries: by name, the shared library's file."""

    nvcc: Path
    version: tuple[int, int]
    libraries: dict[str, Path]

    @property
    def home(self) -> Path:
        return self.nvcc.parent.parent


def require_gpu() -> tuple[Card, Toolkit]:
    """All that ``--gpu`` needs.

    Raises:
        MossError: with everything that is missing, and what to do about each.
    """
    found: list[Any] = []
    missing: list[str] = []
    probes: tuple[Callable[[], Any], ...] = (find_card, find_toolkit, find_cupy)
    for probe in probes:
        try:
            found.append(probe())
        except MossError as error:
            missing.append(str(error))
    if not missing:
        card, toolkit, cupy = found
        missing += _mismatches(card, toolkit, cupy)
    if missing:
        lines = "".join(f"\n  - {line}" for line in missing)
        raise MossError(f"a GPU cannot be used here:{lines}\nWithout --gpu, MOSS runs on the CPU.")
    return card, toolkit


def find_card() -> Card:
    """Raises MossError where there is no driver, or no card that it can use."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        raise MossError("there is no NVIDIA driver (libcuda.so.1): install the one for your card.") from None
    count, device = ctypes.c_int(), ctypes.c_int()
    code = driver.cuInit(0) or driver.cuDeviceGetCount(ctypes.byref(count))
    if code or not count.value or driver.cuDeviceGet(ctypes.byref(device), 0):
        raise MossError(
            f"there is a driver, but no card that it can use (CUDA error {code}): nvidia-smi tells more. "
            "CUDA_VISIBLE_DEVICES may hide cards, and a container must be given them."
        )
    name, bus = ctypes.create_string_buffer(100), ctypes.create_string_buffer(64)
    total, known = ctypes.c_size_t(), ctypes.c_int()
    driver.cuDeviceGetName(name, len(name), device)
    driver.cuDeviceTotalMem_v2(ctypes.byref(total), device)
    driver.cuDriverGetVersion(ctypes.byref(known))
    driver.cuDeviceGetPCIBusId(bus, len(bus), device)
    compute = _attribute(driver, COMPUTE_MAJOR, device), _attribute(driver, COMPUTE_MINOR, device)
    text = name.value.decode(errors="replace")
    if compute < OLDEST_CARD:
        raise MossError(
            f"{text} has compute capability {compute[0]}.{compute[1]}; 6.0 (Pascal) or newer is needed."
        )
    free = _free_bytes(bus.value)
    driver_cuda = (known.value // 1000, known.value % 1000 // 10)
    free = total.value if free is None else min(free, total.value)
    unified = _attribute(driver, CONCURRENT_MANAGED, device) != 0
    return Card(text, total.value, free, compute, driver_cuda, unified)


def _attribute(driver: ctypes.CDLL, number: int, device: ctypes.c_int) -> int:
    value = ctypes.c_int()
    driver.cuDeviceGetAttribute(ctypes.byref(value), number, device)
    return value.value


class _NvmlMemory(ctypes.Structure):
    """nvmlMemory_t."""

    _fields_ = [("total", ctypes.c_uint64), ("free", ctypes.c_uint64), ("used", ctypes.c_uint64)]


def _free_bytes(bus: bytes) -> int | None:
    """Free memory of the card in that slot. The driver itself would tell only after starting work on the card."""
    try:
        nvml = ctypes.CDLL("libnvidia-ml.so.1")
    except OSError:
        return None
    if nvml.nvmlInit_v2():
        return None
    try:
        handle, memory = ctypes.c_void_p(), _NvmlMemory()
        code = nvml.nvmlDeviceGetHandleByPciBusId_v2(bus, ctypes.byref(handle))
        if code or nvml.nvmlDeviceGetMemoryInfo(handle, ctypes.byref(memory)):
            return None
        return int(memory.free)
    finally:
        nvml.nvmlShutdown()


def says_full(error: BaseException) -> bool:
    """Whether an error from Jittor or CuPy says that the card's memory is full (and not that the host's is)."""
    text = f"{type(error).__name__}: {error}".lower()
    return any(words in text for words in OUT_OF_MEMORY) and not any(words in text for words in HOST_CALLS)


def nvcc_places() -> list[Path]:
    """Every nvcc there is: named by a variable, on the PATH, in one of the usual places, installed by Jittor."""
    homes = [os.environ.get(name) for name in ("CUDA_HOME", "CUDA_PATH")]
    places = [
        os.environ.get("nvcc_path"),
        *(f"{home}/bin/nvcc" for home in homes if home),
        shutil.which("nvcc"),
    ]
    places += [*NVCC_PLACES, *sorted(map(str, cache_folder().glob(JITTORS_CUDA)), reverse=True)]
    found = [Path(place) for place in places if place and Path(place).is_file()]
    # What else belongs to it lies beside the file itself, not beside a link to it.
    return list(dict.fromkeys(path if path == SYSTEM_NVCC else path.resolve() for path in found))


def find_toolkit() -> Toolkit:
    """The first toolkit that is complete and of a version that Jittor knows.

    Raises:
        MossError: there is none; the message is about the one that was found first.
    """
    errors = []
    for nvcc in nvcc_places():
        try:
            return _toolkit_of(nvcc)
        except MossError as error:
            errors.append(error)
    if errors:
        raise errors[0]
    raise MossError(f"CUDA's compiler, nvcc, is missing: {INSTALL_TOOLKIT}.")


def _toolkit_of(nvcc: Path) -> Toolkit:
    release = nvcc_version(nvcc)
    if release[0] not in TOOLKITS:
        raise MossError(
            f"{nvcc} is of CUDA {release[0]}.{release[1]}; Jittor 1.3.11 compiles with CUDA 11 and 12: {INSTALL_TOOLKIT}."
        )
    home = nvcc.parent.parent
    arch = home / "targets" / "x86_64-linux"
    folders = [home / "lib64", arch / "lib", SYSTEM_LIBRARIES]
    libraries = {name: _first(folders, f"lib{name}.so") for name in LIBRARIES}
    if nvcc != SYSTEM_NVCC:
        libraries["cudart"] = _first(folders[:1], "libcudart.so")  # Jittor looks nowhere else
    missing = [f"lib{name}.so" for name, path in libraries.items() if path is None]
    headers = [home / "include", arch / "include", Path("/usr/include")]
    missing += [name for name in HEADERS if _first(headers, name) is None]
    if missing:
        raise MossError(f"the CUDA toolkit of {nvcc} lacks {', '.join(missing)}: {INSTALL_TOOLKIT}.")
    return Toolkit(nvcc, release, {name: path for name, path in libraries.items() if path})


def nvcc_version(nvcc: Path) -> tuple[int, int]:
    """Raises MossError where it does not run, or says nothing that can be understood."""
    try:
        done = subprocess.run([nvcc, "--version"], capture_output=True, text=True, timeout=60, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        _no_version(nvcc, error)
    found = re.search(r"release (\d{1,3})\.(\d{1,3})", done.stdout)
    if done.returncode or found is None:
        _no_version(nvcc, None)
    return int(found.group(1)), int(found.group(2))


def _no_version(nvcc: Path, cause: Exception | None) -> NoReturn:
    raise MossError(f"{nvcc} --version fails: {INSTALL_TOOLKIT}.") from cause


def _first(folders: Sequence[Path], name: str) -> Path | None:
    return next((folder / name for folder in folders if (folder / name).exists()), None)


def find_cupy() -> int | None:
    """The CUDA series that the installed CuPy is for; None where its package does not say.

    Raises:
        MossError: it is not installed.
    """
    if importlib.util.find_spec("cupy") is None:
        raise MossError("CuPy is missing: pip install 'cupy-cuda12x>=13,<14' (cupy-cuda11x for CUDA 11).")
    return next((CUPY_WHEELS[name] for name in installed_cupy()), None)


def installed_cupy() -> Iterator[str]:
    """Names of the packages of CuPy that are installed."""
    for name in CUPY_WHEELS:
        try:
            version(name)
        except PackageNotFoundError:
            continue
        yield name


def _mismatches(card: Card, toolkit: Toolkit, cupy: int | None) -> Iterator[str]:
    """What does not fit together although each is there."""
    release = toolkit.version[0]
    if cupy is not None and cupy != release:
        yield f"CuPy is for CUDA {cupy} and {toolkit.nvcc} for CUDA {release}: pip install 'cupy-cuda{release}x>=13,<14'."
    oldest = next((first for first, newest in FIRST_TOOLKITS if card.compute[0] <= newest), None)
    if oldest is not None and toolkit.version < oldest:
        yield (
            f"{card.name} (compute capability {card.compute[0]}.{card.compute[1]}) needs CUDA {oldest[0]}.{oldest[1]} or newer, "
            f"and {toolkit.nvcc} is of CUDA {toolkit.version[0]}.{toolkit.version[1]}: install a newer 12."
        )
    if card.driver_cuda[0] < release:
        known = f"{card.driver_cuda[0]}.{card.driver_cuda[1]}"
        yield f"the driver knows CUDA up to {known} and {toolkit.nvcc} is of CUDA {release}: update the driver."
