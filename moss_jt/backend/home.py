"""Where Jittor keeps its compiled files, and where oneDNN is in there. Knows Jittor's rules, imports none of it."""

import contextlib
import json
import os
import platform
import sys
import tempfile
from collections.abc import Iterator
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from pathlib import Path

from moss_jt.backend.read_only import is_writable, side_folder
from moss_jt.errors import MossError
from moss_jt.user_folders import user_home

# The folder that Jittor would download its own oneDNN into; what is there already, it takes.
ONEDNN_FOLDER = "dnnl_lnx_2.2.0_cpu_gomp"
# Part of the folder that Jittor looks for, the wheel that brings it, and a file in it that is needed.
ONEDNN_WHEELS = {
    "include": ("onednn-devel-cpu-gomp", "dnnl.h"),
    "lib": ("onednn-cpu-gomp", "libmkldnn.so"),
}


def jittor_home() -> Path:
    """Jittor's home by its own rule: JITTOR_HOME, or the one that it remembers, or the user's home.

    Raises:
        MossError: the file in which Jittor remembers it is damaged.
    """
    if home := os.environ.get("JITTOR_HOME"):
        return Path(home).absolute()
    user = user_home()
    note = user / ".cache" / "jittor" / "config.json"
    try:
        remembered = json.loads(note.read_text(encoding="utf-8")).get("JITTOR_HOME", str(user))
    except OSError:  # there is none, or none that can be read
        return user
    except (ValueError, AttributeError) as error:
        raise MossError(f"{note} is damaged, and Jittor would not start. Remove it.") from error
    return Path(remembered).absolute()


def cache_folder() -> Path:
    """The folder of all that Jittor compiles, for any version, and of our logs about it."""
    return jittor_home() / ".cache" / "jittor"


def log_path(name: str) -> Path:
    folder = cache_folder()
    return (folder if is_writable(folder) else side_folder()) / f"moss-jt-{name}.log"


@contextlib.contextmanager
def environment(**wanted: str | None) -> Iterator[None]:
    """These variables for a while (None: not set); afterwards they are as they were, whoever changed them meanwhile."""
    before = {name: os.environ.get(name) for name in wanted}
    try:
        _set_all(wanted)
        yield
    finally:
        _set_all(before)


def _set_all(values: dict[str, str | None]) -> None:
    for name, value in values.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value


@contextlib.contextmanager
def home_kept() -> Iterator[None]:
    """While Jittor starts or compiles, the processes that it starts included: it keeps to :func:`jittor_home`, and notes nothing.

    Jittor makes folders under the user's home whether or not that can be written, and remembers a JITTOR_HOME there
    for all later runs. So it is given an empty home, and its own folder by name.
    """
    cupy_cache = os.environ.get("CUPY_CACHE_DIR") or os.path.expanduser("~/.cupy/kernel_cache")
    folder = str(jittor_home())
    with tempfile.TemporaryDirectory(prefix="moss-jt-") as empty:
        with environment(HOME=empty, JITTOR_HOME=folder, CUPY_CACHE_DIR=cupy_cache):
            yield


def has_onednn_wheels() -> bool:
    """Whether oneDNN comes as wheels for this machine; elsewhere Jittor multiplies without it."""
    return sys.platform == "linux" and platform.machine() == "x86_64"


def onednn_folder() -> Path:
    """The folder with oneDNN's include and lib, whether or not it is there."""
    return cache_folder() / "mkl" / ONEDNN_FOLDER


def onednn_is_linked() -> bool:
    return all((onednn_folder() / part / needed).exists() for part, (_, needed) in ONEDNN_WHEELS.items())


def link_onednn() -> None:
    """Put the wheels' oneDNN where Jittor looks before it would download its own. What works already stays.

    Raises:
        MossError: the wheels are not installed.
    """
    if onednn_is_linked():
        return
    folder = onednn_folder()
    folder.mkdir(parents=True, exist_ok=True)
    for part, (wheel, needed) in ONEDNN_WHEELS.items():
        if (folder / part / needed).exists():
            continue
        fresh = folder / f".{part}-{os.getpid()}"
        fresh.unlink(missing_ok=True)
        fresh.symlink_to(wheel_folder(wheel, needed))
        fresh.replace(folder / part)  # at once: another process may do the same


def wheel_folder(wheel: str, needed: str) -> Path:
    """The folder in which an installed wheel put a file: it differs between venv, user and system installations.

    Raises:
        MossError: the wheel is not installed, or the file is gone.
    """
    try:
        library = _file_of(distribution(wheel), needed)
    except PackageNotFoundError:
        library = None
    if library is None:
        names = " ".join(f"{name}==2021.4.0" for name, _ in ONEDNN_WHEELS.values())
        raise MossError(f"oneDNN is missing: {wheel} is not installed. Install it with: pip install {names}")
    return library.parent


def _file_of(wheel: Distribution, name: str) -> Path | None:
    for entry in wheel.files or []:
        if entry.name == name:
            path = Path(str(wheel.locate_file(entry))).resolve()
            if path.exists():
                return path
    return None
