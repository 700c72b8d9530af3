"""Jittor's first start on a machine: it compiles itself, for minutes. Here this is announced, watched and logged.

The compiling runs in a process of its own, so that its output, its signal handlers and its failures stay out of ours.
"""

import atexit
import contextlib
import fcntl
import importlib
import os
import shutil
import signal
import subprocess
import sys
import sysconfig
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from moss_jt.backend.home import cache_folder, environment, home_kept, log_path
from moss_jt.backend.joint_compilation import files_done, start_anew
from moss_jt.backend.read_only import REFUSALS, is_writable, writes_led_aside
from moss_jt.errors import MossError

OBJECTS = 157  # files that Jittor 1.3.11 compiles, so that progress means something
PATIENCE_S = 3.0  # a start that is quicker than this is not worth a word
ATTEMPTS = 3  # Jittor leaves, asking to be started again, when it has renewed its own compiling tool

# Marks, by its last line, that the import went through (leaving early is no failure for Jittor), and where its core is.
# A toolkit that Jittor installed itself would make it look for another one, download that, or start this program anew: which
# toolkit it uses is decided by nvcc_path, so that it is told that there is none.
SCRIPT = """
import ctypes, pathlib, sys
import jittor_utils.install_cuda
jittor_utils.install_cuda.has_installation = bool
if sys.argv[2] == "units":
    import moss_jt.backend.joint_compilation
    moss_jt.backend.joint_compilation.install(jittor_utils)
for name in sys.argv[3].split(","):
    sys.modules[name] = None
for library in sys.argv[4:]:
    ctypes.CDLL(library, ctypes.RTLD_GLOBAL)
import jittor
pathlib.Path(sys.argv[1]).write_text(jittor.compiler.cache_path)
"""

ANNOUNCEMENT = """\
moss-jt: Jittor compiles itself for this machine. That is done once and takes 1 to 3 minutes on two cores, with CUDA 2 to 5.
         Ctrl-C stops it; the next start goes on from there. Its output goes to {log}
"""


def check_compiler() -> None:
    """See that there is what Jittor compiles with.

    Raises:
        MossError: there is no C++ compiler, or Python's own headers are missing.
    """
    compiler = os.environ.get("cc_path") or "g++"
    if shutil.which(compiler) is None:
        raise MossError(
            f"{compiler} is missing: Jittor compiles its operators for this machine. Install it, for example with: "
            "sudo apt install g++ (Debian, Ubuntu) or sudo dnf install gcc-c++ (Fedora)."
        )
    config = python_config()
    if config is None:
        version = f"{sys.version_info.major}.{sys.version_info.minor}"
        raise MossError(
            f"python{version}-config is missing: Jittor compiles with Python's headers. Install them, for example "
            f"with: sudo apt install python{version}-dev (Debian, Ubuntu)."
        )
    if config.parent == Path(sys.base_prefix) / "bin":
        os.environ.setdefault("python_config_path", str(config))


def python_config() -> Path | None:
    """The script that tells how to compile for this Python: where Jittor looks, or else beside the base Python."""
    name = f"python{sys.version_info.major}.{sys.version_info.minor}-config"
    beside = Path(sys.executable).parent
    candidates = [
        beside / name,
        Path(f"{sys.executable}-config"),
        Path("/usr/bin", name),
        Path("/usr/local/bin", name),
        beside / "python3-config",
        Path(sys.base_prefix) / "bin" / name,
    ]
    if given := os.environ.get("python_config_path"):
        candidates.insert(0, Path(given))
    return next((path for path in candidates if path.is_file()), None)


def front_part() -> Any:
    """Jittor's small front part (0.1 s), told to compile in no processes of its own.

    Its pool of them would be hit by the terminal's Ctrl-C as much as this process: one that dies with the pool's lock
    makes Jittor wait for ever at exit. What is much to compile is compiled by :func:`ensure_built`.
    """
    if "jittor_utils" not in sys.modules:
        os.environ.setdefault("cache_name", "default")  # or Jittor asks git, which knows some branch
        # The second is set by Jittor because of the first, and would be left to the processes that we start.
        alone = environment(DISABLE_MULTIPROCESSING="1", use_parallel_op_compiler=None)
        with home_kept(), alone, writes_led_aside(cache_folder()):
            lock: Any = importlib.import_module("jittor_utils").lock
        lock.lock_path = lock.jittor_lock.handle.name  # it may be aside
    return sys.modules["jittor_utils"]


def end_pool() -> None:
    """End the pool of a Jittor that was imported before moss_jt was; it is made anew when Jittor needs it."""
    utilities = front_part()
    if utilities.pool_size:
        atexit.unregister(utilities.pool_cleanup)
        utilities.pool_cleanup()
        utilities.pool_size = 0


def build_folder() -> Path:
    """Jittor's folder for this machine, compiler and Python."""
    return Path(front_part().cache_path)


def is_built(folder: Path) -> bool:
    """Whether an import of Jittor went through before, and what it compiled is still there: for CUDA in a folder below."""
    try:
        built = folder / marker(folder).read_text(encoding="utf-8")
    except OSError:
        return False
    return (built / f"jittor_core{sysconfig.get_config_var('EXT_SUFFIX')}").exists()


def marker(folder: Path) -> Path:
    return folder / "moss-jt-built"


def ensure_built(hidden: Sequence[str], libraries: Sequence[Path] = ()) -> None:
    """Compile Jittor unless that is done.

    Args:
        hidden: modules that it shall not find.
        libraries: shared libraries that what it compiles needs, and might not find by itself.

    Raises:
        MossError: the compiling failed, and the message names the log; or its folder cannot be written.
    """
    try:
        folder = build_folder()
    except OSError as error:  # Jittor makes its folder when it is first asked for it
        if error.errno not in REFUSALS:
            raise
        raise not_writable(cache_folder()) from error
    if is_built(folder):
        return
    if not is_writable(folder):
        raise not_writable(folder)
    with one_at_a_time():
        if not is_built(folder):  # by now, by the start that was waited for
            compile_jittor(folder, hidden, libraries)


def not_writable(folder: Path) -> MossError:
    return MossError(
        f"Jittor is not compiled in {folder}, and that cannot be written. Start moss-jt once as a user who can write "
        "there, or set JITTOR_HOME to a folder that can be written."
    )


@contextlib.contextmanager
def one_at_a_time() -> Iterator[None]:
    """Wait until no other process of this user compiles Jittor."""
    with open(log_path("build").with_suffix(".lock"), "wb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            sys.stderr.write("moss-jt: another start is compiling Jittor for this machine; waiting for it.\n")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def compile_jittor(folder: Path, hidden: Sequence[str], libraries: Sequence[Path]) -> None:
    """Raises MossError where that fails; the message names the log."""
    marker(folder).unlink(missing_ok=True)
    if compiles(folder, "units", hidden, libraries):
        return
    start_anew(folder)
    if not compiles(folder, "files", hidden, libraries):
        log = log_path("build")
        raise MossError(
            f"Jittor could not be compiled: {last_line(log)}\n"
            f"  All output is in {log}. moss-jt doctor checks what is needed; free disk space is one cause."
        )


def compiles(folder: Path, way: str, hidden: Sequence[str], libraries: Sequence[Path]) -> bool:
    """Whether Jittor gets compiled, in units or, which is its own way, file by file."""
    log = log_path("build")
    command = [sys.executable, "-P", "-c", SCRIPT, str(marker(folder)), way, ",".join(hidden)]
    command += map(str, libraries)
    for _ in range(ATTEMPTS):
        with open(log, "ab") as output, home_kept():
            code = watch(command, folder, output.fileno(), log)
        if code != 0 or marker(folder).exists():
            break
    return marker(folder).exists()


def watch(command: list[str], folder: Path, output: int, log: Path) -> int:
    """Run the compiling to its end, with an announcement once it takes its time, and progress on a terminal."""
    begin = time.monotonic()
    process = subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True
    )
    announced = False
    try:
        while True:
            try:
                code = process.wait(1.0 if announced else PATIENCE_S)
                break
            except subprocess.TimeoutExpired:
                if not announced:
                    sys.stderr.write(ANNOUNCEMENT.format(log=log))
                    announced = True
                show_progress(folder, time.monotonic() - begin)
    except BaseException:
        os.killpg(process.pid, signal.SIGKILL)  # the compilers that it started, too
        process.wait()
        raise
    if announced:
        end = "\r" if sys.stderr.isatty() else ""
        how = "is compiled; that took" if code == 0 else "could not be compiled; that took"
        sys.stderr.write(f"{end}moss-jt: Jittor {how} {time.monotonic() - begin:.0f} s.{' ' * 20}\n")
    return code


def show_progress(folder: Path, elapsed_s: float) -> None:
    if sys.stderr.isatty():
        sys.stderr.write(
            f"\rmoss-jt: {min(files_done(folder), OBJECTS)} of {OBJECTS} files, {elapsed_s:.0f} s "
        )
        sys.stderr.flush()


def last_line(log: Path) -> str:
    """The last line of a log that says something, at most 200 characters."""
    with open(log, "rb") as file:
        file.seek(max(0, log.stat().st_size - 4096))
        lines = [line.strip() for line in file.read().decode(errors="replace").splitlines()]
    return next((line[:200] for line in reversed(lines) if line), "it said nothing")


@contextlib.contextmanager
def quiet_output(log: Path) -> Iterator[None]:
    """Send what this process and its children write to stdout and stderr into a file, below Python's own streams."""
    _flush()
    saved = {stream: os.dup(stream) for stream in (1, 2) if _is_open(stream)}
    target = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o644)
    try:
        for stream in saved:
            os.dup2(target, stream)
        yield
    finally:
        _flush()
        for stream, copy in saved.items():
            os.dup2(copy, stream)
            os.close(copy)
        os.close(target)


def _is_open(descriptor: int) -> bool:
    try:
        os.fstat(descriptor)
    except OSError:
        return False
    return True


def _flush() -> None:
    for stream in (sys.stdout, sys.stderr):
        if stream is not None:  # a program may be started without
            stream.flush()
