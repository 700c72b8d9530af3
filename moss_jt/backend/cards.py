"""The NVIDIA cards of this machine. Starts no CUDA in this process: which cards it will see can still be chosen afterwards."""

import json
import os
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from moss_jt.backend.device import CARDS_SWITCH, cards_given
from moss_jt.errors import MossError

OLDEST_CARD = (6, 0)
PROBE = Path(__file__).with_name("card_probe.py")
PROBE_S = 120.0  # a driver that has been idle wakes up within seconds


@dataclass(frozen=True)
class Card:
    """A card that this process may use.

    free_bytes   as the driver's management library (NVML) tells, or all where that cannot be asked
    compute      compute capability, (8, 6) for sm_86
    driver_cuda  the newest CUDA that the driver knows, (12, 4)
    unified      whether host and card may use managed memory at the same time, as prefetching it needs
    number       as CUDA counts among those that CUDA_VISIBLE_DEVICES shows; PyTorch's cuda:1 is 1
    bus          its slot, by which NVML knows it
    """

    name: str
    total_bytes: int
    free_bytes: int
    compute: tuple[int, int]
    driver_cuda: tuple[int, int]
    unified: bool = True
    number: int = 0
    bus: str = ""

    @property
    def capability(self) -> str:
        return f"{self.compute[0]}.{self.compute[1]}"

    @property
    def is_too_old(self) -> bool:
        return self.compute < OLDEST_CARD


def find_cards() -> list[Card]:
    """All cards that this process was given.

    Raises:
        MossError: there is no driver, or no card that it can use.
    """
    answer = ask_driver()
    if answer["code"] is None:
        raise MossError("there is no NVIDIA driver (libcuda.so.1): install the one for your card.")
    if answer["code"] or not answer["cards"]:
        hidden = cards_given()
        shown = "" if hidden is None else f" {CARDS_SWITCH} is {hidden!r} and may hide cards."
        raise MossError(
            f"there is a driver, but no card that it can use (CUDA error {answer['code']}): nvidia-smi tells more.{shown} "
            "A container must be given its cards."
        )
    known = answer["driver"] // 1000, answer["driver"] % 1000 // 10
    free = free_bytes([card["bus"] for card in answer["cards"]])
    return [
        Card(
            card["name"],
            card["total"],
            min(free.get(card["bus"], card["total"]), card["total"]),
            (card["compute"][0], card["compute"][1]),
            known,
            card["unified"],
            number,
            card["bus"],
        )
        for number, card in enumerate(answer["cards"])
    ]


def find_card(number: int = 0) -> Card:
    """The card with that number.

    Raises:
        MossError: there is none, or it is too old; the message names those that would do.
    """
    cards = find_cards()
    if number >= len(cards):
        count = "is one card" if len(cards) == 1 else f"are {len(cards)} cards"
        raise MossError(f"there is no gpu:{number}: here {count}, {listed(cards)}.")
    card = cards[number]
    if card.is_too_old:
        others = [other for other in cards if not other.is_too_old]
        advice = f" These would do: {listed(others)}." if others else ""
        raise MossError(
            f"{card.name} has compute capability {card.capability}; 6.0 (Pascal) or newer is needed.{advice}"
        )
    return card


def listed(cards: list[Card]) -> str:
    """``gpu:0 (RTX 3060), gpu:1 (H100)``."""
    return ", ".join(f"gpu:{card.number} ({card.name})" for card in cards)


def ask_driver() -> dict[str, Any]:
    """See moss_jt.backend.card_probe, which is run with the cards that the user gave.

    Raises:
        MossError: it does not come to an end; the driver is at fault.
    """
    environment = {name: value for name, value in os.environ.items() if name != CARDS_SWITCH}
    if (given := cards_given()) is not None:
        environment[CARDS_SWITCH] = given
    try:
        done = subprocess.run(
            [sys.executable, "-I", str(PROBE)],
            capture_output=True,
            text=True,
            timeout=PROBE_S,
            env=environment,
            check=True,
        )
        answer: dict[str, Any] = json.loads(done.stdout)
    except (OSError, subprocess.SubprocessError, ValueError) as error:
        raise MossError(
            f"the NVIDIA driver does not answer ({type(error).__name__}): nvidia-smi tells more."
        ) from error
    return answer


def refreshed(card: Card) -> Card:
    """The card with what is free of its memory now."""
    free = free_bytes([card.bus]).get(card.bus, card.total_bytes)
    return replace(card, free_bytes=min(free, card.total_bytes))


def free_bytes(buses: list[str]) -> dict[str, int]:
    """Free memory of the cards in those slots, of which NVML may not know all. CUDA would tell only after starting work on them."""
    try:
        import pynvml
    except ImportError:
        return {}
    free = {}
    try:
        pynvml.nvmlInit()
        try:
            for bus in buses:
                handle = pynvml.nvmlDeviceGetHandleByPciBusId(bus.encode())
                free[bus] = int(pynvml.nvmlDeviceGetMemoryInfo(handle).free)
        finally:
            pynvml.nvmlShutdown()
    except pynvml.NVMLError:
        pass  # a driver without it, as WSL's once was: what is missing counts as free
    return free
