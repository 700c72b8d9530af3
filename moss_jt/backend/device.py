"""On which device Jittor computes, and how weights that do not fit are kept away: both are decided before Jittor starts.

The choice travels in environment variables, because Jittor reads its own ones there, and because the process that compiles it
must make the same choice.
"""

import os
import sys
from typing import Literal, cast

from moss_jt.errors import MossError

Device = Literal["cpu", "gpu"]
Offload = Literal["stream", "swap", "unified"]

DEVICES = ("cpu", "gpu")
WAYS = {"cpu": ("auto", "stream", "swap"), "gpu": ("auto", "stream", "swap", "unified")}

DEVICE_SWITCH = "MOSS_JT_DEVICE"
SWAP_SWITCH = "JT_SAVE_MEM"  # Jittor reads it when it is compiled and when it starts
MANAGED_SWITCH = "use_cuda_managed_allocator"  # and this one when it starts

_process: int | None = None  # the one that Jittor was started in


def check_choice(device: str, offload: str) -> Offload:
    """The way to offload that ``offload`` means on the device; "auto" streams what does not fit.

    Raises:
        MossError: there is no such device, or no such way on it.
    """
    if device not in DEVICES:
        raise MossError(f"there is no device {device!r}: give 'cpu' or 'gpu'.")
    if offload not in WAYS[device]:
        raise MossError(
            f"there is no offload {offload!r} on the {device.upper()}: give {', '.join(WAYS[device])}."
        )
    return "stream" if offload == "auto" else cast(Offload, offload)


def decide(device: Device, offload: Offload) -> None:
    """Make Jittor start for this device and this way.

    Raises:
        MossError: Jittor already runs in this process, and otherwise.
    """
    check_process()
    wanted = {
        DEVICE_SWITCH: device,
        SWAP_SWITCH: "1" if offload == "swap" else None,
        MANAGED_SWITCH: "1" if offload == "unified" else None,
    }
    if "moss_jt.backend.jittor" in sys.modules:
        if (
            device == chosen_device()
            and (offload != "swap" or swaps())
            and (offload == "unified") == managed()
        ):
            return
        raise MossError(
            f"Jittor runs in this process for the {chosen_device().upper()}"
            f"{' with' if swaps() else ' without'} swapping{' in unified memory' if managed() else ''}, and cannot change that. "
            f"Load with device={device!r} and offload={offload!r} in a new process, before anything else."
        )
    for name, value in wanted.items():
        if value is not None:
            os.environ[name] = value
        else:
            os.environ.pop(name, None)  # of a load that failed, for example


def note_process() -> None:
    """Jittor starts in this process."""
    global _process
    _process = os.getpid()


def check_process() -> None:
    """See that this is the process that Jittor was started in, if it was, and no copy: OpenMP's threads and those that read
    weights stay behind when a process forks, and whatever waits for them waits for ever.

    Raises:
        MossError: it is a copy.
    """
    if _process not in (None, os.getpid()):
        raise MossError(
            f"this process was forked from one that had loaded a model (process {_process}), and cannot compute. Load the "
            "model after the fork, or start processes afresh: multiprocessing.get_context('spawn')."
        )


def chosen_device() -> Device:
    return "gpu" if os.environ.get(DEVICE_SWITCH) == "gpu" else "cpu"


def swaps() -> bool:
    return os.environ.get(SWAP_SWITCH, "0") != "0"


def managed() -> bool:
    return os.environ.get(MANAGED_SWITCH, "0") != "0"
