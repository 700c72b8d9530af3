"""CUDA toolkits on this machine, and one that Jittor can build with, composed where the parts lie in several folders.

A toolkit is looked for where NVIDIA, distributions and Jittor install it, and among pip's wheels; what one lacks, wheels of the
same CUDA complete. Jittor wants nvcc, ``../include`` and ``../lib64`` side by side, and libraries without a number behind ``.so``:
nothing of that is so in wheels.
"""

import ctypes
import importlib.util
import os
import re
import shlex
import shutil
import subprocess
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NoReturn

from moss_jt.backend.home import cache_folder
from moss_jt.errors import MossError

# Where nvcc is looked for beside the variables and the PATH; the pattern is what Jittor's own installer makes.
USUAL_NVCC = ("/usr/local/cuda/bin/nvcc", "/opt/cuda/bin/nvcc", "/usr/bin/nvcc")
JITTORS_CUDA = "jtcuda/*/bin/nvcc"
# Debian and Ubuntu spread their package of the toolkit over the system's folders.
SYSTEM_LIBRARIES = Path("/usr/lib/x86_64-linux-gnu")
SYSTEM_NVCC = Path("/usr/bin/nvcc")
TOOLKITS = (11, 12, 13)  # that Jittor 1.3.11 compiles with, 13 with CUDA_13_FLAGS
# What Jittor compiles and links with when it is told to leave cuDNN out, and what CuPy compiles our kernels with. Of each library
# the number behind .so, by CUDA's series.
LIBRARIES = {
    "cudart": {11: "11.0", 12: "12", 13: "13"},
    "cublas": {11: "11", 12: "12", 13: "13"},
    "curand": {11: "10", 12: "10", 13: "10"},
    "nvrtc": {11: "11.2", 12: "12", 13: "13"},
}
HEADERS = ("cuda_runtime.h", "cublas_v2.h", "curand.h", "cuda_fp16.h")
# Names of pip's folders: one for all of CUDA 13, one for each part before.
WHEEL_PARTS = ("cu1[3-9]", "cuda_runtime", "cublas", "curand", "cuda_nvrtc")
LINKED = re.compile(r"lib(cudart|cudadevrt|culibos|cublas|cublasLt|curand|nvrtc|nvrtc-builtins)[._]")
# Jittor's helper_cuda.h has three functions that nobody calls, with fields of cudaDeviceProp that CUDA 13 no longer has.
CUDA_13_FLAGS = "-DcomputeMode=integrated -DclockRate=multiProcessorCount"

INSTALL = {
    12: (
        "install CUDA Toolkit 12 from NVIDIA, or with python -m jittor_utils.install_cuda, or name its nvcc in nvcc_path "
        "(pip has no nvcc of CUDA 12)"
    ),
    13: "pip install 'moss-jt[cuda13]' brings one, or name its nvcc in nvcc_path",
}


@dataclass(frozen=True)
class Toolkit:
    """A CUDA toolkit that is complete for Jittor and CuPy.

    libraries  by name, the shared library's file
    includes   folders with its headers
    scattered  its parts lie where Jittor does not look: see :func:`composed`
    """

    nvcc: Path
    version: tuple[int, int]
    libraries: dict[str, Path]
    includes: tuple[Path, ...] = ()
    scattered: bool = False

    @property
    def home(self) -> Path:
        return self.nvcc.parent.parent

    @property
    def release(self) -> str:
        return f"{self.version[0]}.{self.version[1]}"

    @property
    def compiler_flags(self) -> str:
        """What Jittor's own sources need to compile with it."""
        return CUDA_13_FLAGS if self.version[0] >= 13 else ""

    def load(self) -> None:
        """Open them, for all that this process opens later.

        Raises:
            MossError: one is damaged, or lacks another one.
        """
        for library in self.to_load():
            try:
                ctypes.CDLL(str(library), ctypes.RTLD_GLOBAL)
            except OSError as error:
                raise MossError(
                    f"cannot open {library} ({error}). Install the CUDA toolkit again, or name another nvcc in nvcc_path."
                ) from error

    def to_load(self) -> list[Path]:
        """Libraries that CuPy, Jittor's modules and NVRTC look for where the system's loader does; each after those that it needs.

        One that is loaded already is known by its name, wherever it lies.
        """
        libraries = []
        for first, name in (("nvrtc-builtins", "nvrtc"), ("cublasLt", "cublas"), (None, "curand")):
            library = self.libraries[name].resolve()
            if first is not None:
                libraries += sorted({path.resolve() for path in library.parent.glob(f"lib{first}.so*")})
            libraries.append(library)
        return libraries


def find_toolkit(preferred: int | None = None, advised: int = 13) -> Toolkit:
    """The first toolkit that is complete and of a version that Jittor knows.

    Args:
        preferred: a series of CUDA that comes before the others: CuPy's.
        advised: the series to install where there is none.

    Raises:
        MossError: there is none; the message is about the first of them.
    """
    toolkits, errors = [], []
    for nvcc in nvcc_paths():
        try:
            toolkits.append(_toolkit_of(nvcc, advised))
        except MossError as error:
            errors.append(error)
    if toolkits:
        return next((toolkit for toolkit in toolkits if toolkit.version[0] == preferred), toolkits[0])
    if errors:
        raise errors[0]
    raise MossError(f"CUDA's compiler, nvcc, is missing: {INSTALL[advised]}.")


def nvcc_paths() -> list[Path]:
    """Every nvcc there is: named by a variable, on the PATH, in one of the usual folders, installed by Jittor or by pip."""
    homes = [os.environ.get(name) for name in ("CUDA_HOME", "CUDA_PATH")]
    candidates = [
        os.environ.get("nvcc_path"),
        *(f"{home}/bin/nvcc" for home in homes if home),
        shutil.which("nvcc"),
    ]
    candidates += [*USUAL_NVCC, *sorted(map(str, cache_folder().glob(JITTORS_CUDA)), reverse=True)]
    candidates += [str(folder / "bin" / "nvcc") for folder in wheel_folders()]
    files = [Path(path) for path in candidates if path and Path(path).is_file()]
    # What else belongs to it lies beside the file itself, not beside a link to it.
    return list(dict.fromkeys(path if path == SYSTEM_NVCC else path.resolve() for path in files))


def wheel_folders() -> list[Path]:
    """Folders that pip's CUDA wheels are unpacked in."""
    try:
        spec = importlib.util.find_spec("nvidia")
    except (ImportError, ValueError):
        return []
    roots = (spec.submodule_search_locations or []) if spec else []
    return [folder for root in roots for part in WHEEL_PARTS for folder in sorted(Path(root).glob(part))]


def _toolkit_of(nvcc: Path, advised: int, may_wrap: bool = True) -> Toolkit:
    """The toolkit that nvcc lies in, or the one of the compiler that it runs, where it is a wrapper beside no toolkit."""
    version = nvcc_version(nvcc, advised)
    if version[0] not in TOOLKITS:
        raise MossError(
            f"{nvcc} is of CUDA {version[0]}.{version[1]}; Jittor 1.3.11 compiles with CUDA 11 to 13: {INSTALL[advised]}."
        )
    home = nvcc.parent.parent
    arch = home / "targets" / "x86_64-linux"
    folders = [home / "lib64", arch / "lib", SYSTEM_LIBRARIES]
    own = {name: _first(folders, f"lib{name}.so") for name in LIBRARIES}
    if nvcc != SYSTEM_NVCC:
        own["cudart"] = _first(folders[:1], "libcudart.so")  # Jittor looks nowhere else
    includes = [home / "include", arch / "include", Path("/usr/include")]
    missing = [header for header in HEADERS if _first(includes, header) is None]
    if not missing and all(own.values()):
        return Toolkit(nvcc, version, {name: path for name, path in own.items() if path}, tuple(includes[:2]))
    wrapped = _wrapped_by(nvcc) if may_wrap and nvcc != SYSTEM_NVCC else None
    if wrapped is not None:
        return _toolkit_of(wrapped, advised, may_wrap=False)
    return _completed(nvcc, version, [*folders[:2], home / "lib"], includes[:2], advised)


def _wrapped_by(nvcc: Path) -> Path | None:
    """The compiler that this one runs: it says where it lies before it would do anything. None where that is itself."""
    command = [str(nvcc), "--dryrun", "-x", "cu", "/dev/null"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    except (OSError, ValueError, subprocess.TimeoutExpired):
        return None
    told = re.search(r"^#\$ _HERE_=(/.*)$", done.stderr, re.MULTILINE)
    wrapped = (Path(told.group(1)) / "nvcc").resolve() if told else nvcc
    return wrapped if wrapped != nvcc and wrapped.is_file() else None


def _completed(
    nvcc: Path, version: tuple[int, int], folders: list[Path], includes: list[Path], advised: int
) -> Toolkit:
    """With what pip's wheels of the same CUDA have.

    Raises:
        MossError: something is in none of them.
    """
    searched = [*folders, *(folder / "lib" for folder in wheel_folders()), SYSTEM_LIBRARIES]
    libraries, missing = {}, []
    for name, numbers in LIBRARIES.items():
        file = f"lib{name}.so.{numbers[version[0]]}"
        if (library := _first(searched, file)) is None:
            missing.append(f"lib{name}.so")
            continue
        libraries[name] = library
        includes = [*includes, library.parent.parent / "include"]
    missing += [header for header in HEADERS if _first(includes, header) is None]
    if missing:
        raise MossError(f"the CUDA toolkit of {nvcc} lacks {', '.join(missing)}: {INSTALL[advised]}.")
    return Toolkit(nvcc, version, libraries, tuple(dict.fromkeys(includes)), scattered=True)


def composed(toolkit: Toolkit) -> Toolkit:
    """The toolkit in one folder, as Jittor expects it: links in Jittor's home, made where they are not there yet.

    Raises:
        OSError: the folder cannot be written.
    """
    if not toolkit.scattered:
        return toolkit
    home = cache_folder() / "moss-jt-cuda" / toolkit.release
    # The file itself, not a link: nvcc and Jittor look for all else beside what a link points to.
    _write_program(home / "bin" / "nvcc", f'#!/bin/sh\nexec {shlex.quote(str(toolkit.nvcc))} "$@"\n')
    _link_all(home / "include", (path for folder in toolkit.includes for path in _entries(folder)))
    libraries = {path.parent for path in toolkit.libraries.values()}
    entries = (path for folder in sorted(libraries) for path in _entries(folder))
    _link_all(home / "lib64", (path for path in entries if LINKED.match(path.name)))
    plain = {name: home / "lib64" / f"lib{name}.so" for name in LIBRARIES}
    for name, path in plain.items():
        _link(path, toolkit.libraries[name])
    return replace(
        toolkit, nvcc=home / "bin" / "nvcc", libraries=plain, includes=(home / "include",), scattered=False
    )


def _entries(folder: Path) -> Iterator[Path]:
    return iter(sorted(folder.iterdir()) if folder.is_dir() else ())


def _link_all(folder: Path, targets: Iterable[Path]) -> None:
    """A link to each target in the folder; of two with one name the first counts."""
    for name, target in {path.name: path for path in reversed(list(targets))}.items():
        _link(folder / name, target)


def _link(path: Path, target: Path) -> None:
    if path.is_symlink() and path.readlink() == target:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_name(f".{path.name}-{os.getpid()}")
    fresh.unlink(missing_ok=True)
    fresh.symlink_to(target)
    fresh.replace(path)  # at once: another process may do the same


def _write_program(path: Path, text: str) -> None:
    if path.is_file() and path.read_text(encoding="utf-8") == text:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_name(f".{path.name}-{os.getpid()}")
    fresh.write_text(text, encoding="utf-8")
    fresh.chmod(0o755)
    fresh.replace(path)


def nvcc_version(nvcc: Path, advised: int = 13) -> tuple[int, int]:
    """Raises MossError where it does not run, or says nothing that can be understood."""
    try:
        done = subprocess.run([nvcc, "--version"], capture_output=True, text=True, timeout=60, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        _no_version(nvcc, advised, error)
    match = re.search(r"release (\d{1,3})\.(\d{1,3})", done.stdout)
    if done.returncode or match is None:
        _no_version(nvcc, advised, None)
    return int(match.group(1)), int(match.group(2))


def _no_version(nvcc: Path, advised: int, cause: Exception | None) -> NoReturn:
    raise MossError(f"{nvcc} --version fails: {INSTALL[advised]}.") from cause


def _first(folders: Iterable[Path], name: str) -> Path | None:
    return next((folder / name for folder in folders if (folder / name).exists()), None)
