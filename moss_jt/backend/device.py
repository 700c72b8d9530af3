"""On which device Jittor computes, and how weights that do not fit are kept away: both are decided before Jittor starts.

The choice travels in environment variables, because Jittor reads its own ones there, and because the process that compiles it
must make the same choice.
"""

import os
import re
import sys
from collections.abc import Callable
from functools import cache
from typing import Literal, cast

from moss_jt.errors import MossError

Device = Literal["cpu", "gpu"]
Offload = Literal["stream", "swap", "unified"]

WAYS = {"cpu": ("auto", "stream", "swap"), "gpu": ("auto", "stream", "swap", "unified")}

DEVICE_SWITCH = "MOSS_JT_DEVICE"
SWAP_SWITCH = "JT_SAVE_MEM"  # Jittor reads it when it is compiled and when it starts
MANAGED_SWITCH = "use_cuda_managed_allocator"  # and this one when it starts
CARDS_SWITCH = "CUDA_VISIBLE_DEVICES"  # CUDA reads it when it starts

_process: int | None = None  # the one that Jittor was started in
_meanwhile: list[Callable[[], None]] = []


def parse_device(text: str) -> tuple[Device, int]:
    """The device, and on a GPU the card's number: "gpu" is the first card, "gpu:1" the second; PyTorch's "cuda:1" is understood.

    Raises:
        MossError: there is no such device.
    """
    match = re.fullmatch(r"(cpu)|(?:gpu|cuda)(?::([0-9]{1,3}))?", text)
    if match is None:
        raise MossError(f"there is no device {text!r}: give 'cpu', 'gpu', or 'gpu:1' for the second card.")
    return ("cpu" if match.group(1) else "gpu"), int(match.group(2) or 0)


def check_choice(device: Device, offload: str) -> Offload:
    """The way to offload that ``offload`` means on the device; "auto" streams what does not fit.

    Raises:
        MossError: there is no such way on it.
    """
    if offload not in WAYS[device]:
        raise MossError(
            f"there is no offload {offload!r} on the {device.upper()}: give {', '.join(WAYS[device])}."
        )
    return "stream" if offload == "auto" else cast(Offload, offload)


def decide(device: Device, offload: Offload, card: int = 0) -> None:
    """Make Jittor start for this device, on a GPU with that card alone, and for this way.

    Raises:
        MossError: Jittor already runs in this process, and otherwise; or there is no such card.
    """
    check_process()
    wanted = {
        CARDS_SWITCH: visible(card) if device == "gpu" else cards_given(),
        DEVICE_SWITCH: f"{device}:{card}" if card else device,
        SWAP_SWITCH: "1" if offload == "swap" else None,
        MANAGED_SWITCH: "1" if offload == "unified" else None,
    }
    if "moss_jt.backend.jittor" in sys.modules:
        if (
            (device, card) == (chosen_device(), chosen_card())
            and (offload != "swap" or swaps())
            and (offload == "unified") == managed()
        ):
            return
        running = chosen_device().upper() + (f" {chosen_card()}" if chosen_card() else "")
        raise MossError(
            f"Jittor runs in this process for the {running}"
            f"{' with' if swaps() else ' without'} swapping{' in unified memory' if managed() else ''}, and cannot change that. "
            f"Load with device={wanted[DEVICE_SWITCH]!r} and offload={offload!r} in a new process, before anything else."
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


def while_jittor_starts(begin: Callable[[], None]) -> None:
    """Have something begun that goes on in a thread while Jittor is imported, but not while compilers need the memory; or now,
    where Jittor runs already."""
    if "moss_jt.backend.jittor" in sys.modules:
        begin()
    else:
        _meanwhile[:] = [begin]  # what a load that failed wanted is of no use


def begin_meanwhile() -> None:
    """Jittor is compiled, and will now be imported."""
    while _meanwhile:
        _meanwhile.pop()()


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
    return parse_device(os.environ.get(DEVICE_SWITCH, "cpu"))[0]


def chosen_card() -> int:
    return parse_device(os.environ.get(DEVICE_SWITCH, "cpu"))[1]


@cache
def cards_given() -> str | None:
    """CUDA_VISIBLE_DEVICES as this process was started with, before anything was decided."""
    return os.environ.get(CARDS_SWITCH)


def visible(card: int) -> str:
    """What CUDA_VISIBLE_DEVICES must be for CUDA to see that card alone, of those that were given.

    Raises:
        MossError: fewer were given.
    """
    given = cards_given()
    if given is None:
        return str(card)
    names = [name.strip() for name in given.split(",") if name.strip()]
    if card >= len(names):
        raise MossError(f"there is no gpu:{card}: {CARDS_SWITCH} is {given!r}.")
    return names[card]


def swaps() -> bool:
    return os.environ.get(SWAP_SWITCH, "0") != "0"


def managed() -> bool:
    return os.environ.get(MANAGED_SWITCH, "0") != "0"
