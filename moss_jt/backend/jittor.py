"""The one module that imports Jittor, after deciding everything that Jittor decides at import.

Importing this module takes a second, and minutes on the first time that a machine runs Jittor: moss_jt.backend.build
does the compiling and says so. Jittor's own output goes into logs, see moss_jt.backend.home.log_path.
"""

import importlib
import os
import sys
from typing import Any

from moss_jt.backend.build import check_compiler, end_pool, ensure_built, quiet_output
from moss_jt.backend.cards import Card, refreshed
from moss_jt.backend.device import begin_meanwhile, chosen_card, chosen_device, note_process, swaps
from moss_jt.backend.gpu_requirements import check_cuda_has_not_started, require_gpu
from moss_jt.backend.home import cache_folder, has_onednn_wheels, home_kept, link_onednn, log_path
from moss_jt.backend.kept_signals import keep_signals
from moss_jt.backend.read_only import lead_operators_aside, writes_led_aside
from moss_jt.backend.toolkit import CUDA_13_FLAGS, Toolkit, composed
from moss_jt.errors import MossError

# Jittor imports these where they are installed: cupy without a driver makes that fail, torch takes 180 MB.
HIDDEN = {"cpu": ("cupy", "torch"), "gpu": ("torch",)}


def decide_environment() -> tuple[Card, Toolkit] | None:
    """Set what Jittor reads from the environment. What the user has set stays, except what would break it.

    Returns:
        On a GPU the card, and the toolkit with which all is compiled.
    """
    cuda = None
    if chosen_device() == "gpu":
        cuda = _decide_cuda()
        cache = f"moss-jt-cuda{cuda[1].release}-sm{cuda[0].capability}"
    else:
        _set_compiler_flags("")  # a load for a GPU that failed may have set some
        # No nvcc: one without its runtime library would make the import crash.
        os.environ["nvcc_path"] = ""
        cache = "default"
    if swaps():
        cache = "moss-jt-swap" if cache == "default" else f"{cache}-swap"
    os.environ.setdefault("use_mpi", "0")
    os.environ.setdefault("gdb_path", "")
    os.environ.setdefault("log_silent", "1")
    # Or else Jittor names its cache after the git branch that its own folder happens to be under. Builds with other
    # switches have caches of their own: in one cache they would compile each other's files anew.
    given = os.environ.get("cache_name", "default")
    # A name of ours may be that of a load that failed, or of a parent process.
    if given == "default" or given.startswith("moss-jt-"):
        os.environ["cache_name"] = cache
    # Threads that have nothing to do wait for microseconds, not for milliseconds: other programs run here, too.
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")
    if not has_onednn_wheels():
        os.environ.setdefault("use_mkl", "0")
    if os.environ.get("use_mkl") != "0":
        link_onednn()
    return cuda


def _decide_cuda() -> tuple[Card, Toolkit]:
    """Jittor compiles with the chosen toolkit, and so does CuPy.

    Raises:
        MossError: something that a GPU needs is missing.
    """
    card, toolkit = require_gpu(chosen_card())
    check_cuda_has_not_started()
    toolkit = composed(toolkit)
    os.environ["nvcc_path"] = str(toolkit.nvcc)
    os.environ["CUDA_PATH"] = str(toolkit.home)
    # Without cuDNN, and without what Jittor would download from elsewhere: no operation of ours is theirs.
    os.environ.setdefault("conv_opt", "1")
    for library in ("cutt", "cutlass", "nccl"):
        os.environ.setdefault(f"use_{library}", "0")
    _set_compiler_flags(toolkit.compiler_flags)
    os.environ.setdefault("CUDA_MODULE_LOADING", "LAZY")  # only what is used takes the card's memory
    return card, toolkit


def _set_compiler_flags(wanted: str) -> None:
    """Beside the user's own, and without those of another toolkit."""
    given = os.environ.get("cc_flags", "").replace(f" {CUDA_13_FLAGS}", "")
    flags = f"{given} {wanted}" if wanted else given
    if flags:
        os.environ["cc_flags"] = flags
    else:
        os.environ.pop("cc_flags", None)


def prepare() -> int:
    """Everything before the import: environment, folders, libraries, and Jittor itself compiled.

    Returns:
        On a GPU the bytes that are free on the card, before anything of this process is there.

    Raises:
        MossError: something is missing; the message says what, and how to get it.
    """
    check_compiler()
    try:
        cache_folder().mkdir(parents=True, exist_ok=True)
        cuda = decide_environment()
    except OSError as error:
        raise MossError(
            f"cannot write to {cache_folder()} ({error.strerror}), where Jittor keeps what it compiles. "
            "Make it writable, or set JITTOR_HOME to a folder that is."
        ) from error
    if cuda is None:
        ensure_built(HIDDEN["cpu"])
        return 0
    card, toolkit = cuda
    toolkit.load()
    ensure_built(HIDDEN["gpu"], toolkit.to_load())
    return refreshed(card).free_bytes


def _start() -> tuple[Any, int]:
    """Jittor, and what :func:`prepare` returns."""
    card_free_bytes = prepare()
    begin_meanwhile()
    hidden = [name for name in HIDDEN[chosen_device()] if name not in sys.modules]
    for name in hidden:
        sys.modules[name] = None  # type: ignore[assignment]
    try:
        aside = writes_led_aside(cache_folder())
        with home_kept(), keep_signals(), quiet_output(log_path("import")), aside:
            installer: Any = importlib.import_module("jittor_utils.install_cuda")
            # No toolkit but the one that was decided on: see jittor_build.SCRIPT.
            installer.has_installation = bool
            jittor = importlib.import_module("jittor")
    except SystemExit as stop:
        # Jittor found that a part of itself had to be compiled anew, and did so.
        raise MossError("Jittor has compiled a part of itself anew. Run the same command again.") from stop
    finally:
        for name in hidden:
            del sys.modules[name]
    end_pool()
    # Its compiling threads would wait until the end, and in a forked process for each other, for ever.
    jittor.flags.use_parallel_op_compiler = 0
    lead_operators_aside(jittor.flags)
    jittor.flags.log_file = str(log_path("operators"))
    jittor.flags.no_grad = 1  # or every block's workspace would be kept for a backward pass
    if chosen_device() == "gpu":
        jittor.flags.use_cuda = 1
    note_process()
    return jittor, card_free_bytes


jt, card_free_bytes = _start()
