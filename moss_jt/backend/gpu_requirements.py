"""What computing on a GPU needs, and what of it this machine has. Starts neither Jittor nor CuPy, and no work on the card."""

import ctypes
import importlib.util
from collections.abc import Callable, Iterator
from importlib.metadata import PackageNotFoundError, version
from typing import TypeVar

from moss_jt.backend.cards import Card, find_card
from moss_jt.backend.device import CARDS_SWITCH
from moss_jt.backend.toolkit import INSTALL, Toolkit, find_toolkit
from moss_jt.errors import MossError

CUPY_WHEELS = {"cupy-cuda13x": 13, "cupy-cuda12x": 12, "cupy-cuda11x": 11, "cupy": None}
# The first CUDA that compiles for cards up to this generation (Ampere, Hopper, Blackwell), and the oldest card of each series.
FIRST_TOOLKITS = (((11, 1), 8), ((11, 8), 9), ((12, 8), 12))
OLDEST_CARDS = {13: (7, 5)}
NEWEST_SERIES, SERIES_BEFORE = 13, 12

# What Jittor, CUDA and CuPy say where memory on the card ran out.
HOST_CALLS = ("cudahostregister", "cudamallochost", "cuda_host_allocator")
OUT_OF_MEMORY = ("unable to alloc cuda", "cudaerrormemoryallocation", "out of memory", "outofmemory")

Part = TypeVar("Part")


def require_gpu(number: int = 0) -> tuple[Card, Toolkit]:
    """All that ``--gpu`` needs, with the card of that number.

    Raises:
        MossError: with everything that is missing, and what to do about each.
    """
    missing: dict[str, str] = {}

    def probed(what: str, probe: Callable[[], Part]) -> Part | None:
        try:
            return probe()
        except MossError as error:
            missing[what] = str(error)
            return None

    card = probed("card", lambda: find_card(number))
    series = series_for(card)
    cupy = probed("cupy", lambda: find_cupy(series))
    toolkit = probed("toolkit", lambda: find_toolkit(cupy, series))
    told = [missing[what] for what in ("card", "toolkit", "cupy") if what in missing]
    if card is not None and toolkit is not None and not told:
        told += _mismatches(card, toolkit, cupy)
    if card is None or toolkit is None or told:
        lines = "".join(f"\n  - {line}" for line in told)
        raise MossError(f"a GPU cannot be used here:{lines}\nWithout --gpu, MOSS runs on the CPU.")
    return card, toolkit


def series_for(card: Card | None) -> int:
    """The series of CUDA to install for a card: the newest that it and its driver do."""
    if card is None:
        return NEWEST_SERIES
    fits = card.compute >= OLDEST_CARDS[NEWEST_SERIES] and card.driver_cuda[0] >= NEWEST_SERIES
    return NEWEST_SERIES if fits else SERIES_BEFORE


def says_full(error: BaseException) -> bool:
    """Whether an error from Jittor or CuPy says that the card's memory is full (and not that the host's is)."""
    text = f"{type(error).__name__}: {error}".lower()
    return any(words in text for words in OUT_OF_MEMORY) and not any(words in text for words in HOST_CALLS)


def find_cupy(series: int = NEWEST_SERIES) -> int | None:
    """The CUDA series that the installed CuPy is for; None where its package does not say.

    Args:
        series: the one to install where there is none.

    Raises:
        MossError: it is not installed.
    """
    if importlib.util.find_spec("cupy") is None:
        raise MossError(f"CuPy is missing: pip install 'moss-jt[cuda{series}]'.")
    return next((CUPY_WHEELS[name] for name in installed_cupy()), None)


def installed_cupy() -> Iterator[str]:
    """Names of the packages of CuPy that are installed."""
    for name in CUPY_WHEELS:
        try:
            version(name)
        except PackageNotFoundError:
            continue
        yield name


def check_cuda_has_not_started() -> None:
    """See that CUDA will start with the cards that were chosen.

    Raises:
        MossError: something in this process has started it before, with others.
    """
    count = ctypes.c_int()
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return
    if driver.cuDeviceGetCount(ctypes.byref(count)) == 0 and count.value != 1:
        raise MossError(
            f"something in this process (PyTorch, perhaps) uses CUDA already, with {count.value} cards, so that none can be "
            f"chosen any more. Load the model first, or start with {CARDS_SWITCH} set to one card."
        )


def _mismatches(card: Card, toolkit: Toolkit, cupy: int | None) -> Iterator[str]:
    """What does not fit together although each is there."""
    release, series = toolkit.version[0], series_for(card)
    if card.compute < OLDEST_CARDS.get(release, card.compute):
        yield (
            f"{card.name} (compute capability {card.capability}) is too old for CUDA {release}, which {toolkit.nvcc} is of; "
            f"CUDA 12 is the last that knows it: {INSTALL[12]}, and pip install 'moss-jt[cuda12]'."
        )
    elif cupy is not None and cupy != release:
        yield (
            f"CuPy is for CUDA {cupy} and {toolkit.nvcc} for CUDA {release}: pip uninstall cupy-cuda{cupy}x, and "
            f"pip install 'cupy-cuda{release}x>=13,<14'."
        )
    oldest = next((first for first, newest in FIRST_TOOLKITS if card.compute[0] <= newest), None)
    if oldest is not None and toolkit.version < oldest:
        yield (
            f"{card.name} (compute capability {card.capability}) needs CUDA {oldest[0]}.{oldest[1]} or newer, "
            f"and {toolkit.nvcc} is of CUDA {toolkit.release}: {INSTALL[series]}."
        )
    if card.driver_cuda[0] < release:
        known = f"{card.driver_cuda[0]}.{card.driver_cuda[1]}"
        yield (
            f"the driver knows CUDA up to {known} and {toolkit.nvcc} is of CUDA {release}: update the driver, "
            f"or use CUDA {card.driver_cuda[0]}."
        )
