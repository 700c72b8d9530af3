"""Plugins for tests: nothing of them leaves the process."""

import threading
from collections.abc import Callable
from pathlib import Path

from moss_jt.plugins.interface import Item, Outcome, Source, Style


class Echo:
    """Answers with its argument, or with what ``answer`` makes of it."""

    name, label, function, argument = "echo", "Echo", "Echo", "text"
    style: Style = "value"
    timeout_s = 5.0

    def __init__(self, answer: Callable[[str], str] = str) -> None:
        self.calls: list[str] = []
        self._answer = answer

    def call(self, argument: str, wanted: int) -> Outcome:
        self.calls.append(argument)
        return Outcome(text=self._answer(argument))


class Shelf:
    """Finds the same items for every query."""

    name, label, function, argument = "search", "Web search", "Search", "query"
    style: Style = "items"
    timeout_s = 5.0

    def __init__(self, *texts: str) -> None:
        self._texts = texts

    def call(self, argument: str, wanted: int) -> Outcome:
        actual = [Item(text, Source(f"{argument}, {n}", f"/shelf/{n}")) for n, text in enumerate(self._texts)]
        return Outcome(items=tuple(actual[:wanted]))


class Painter:
    """Names a picture."""

    name, label, function, argument = "image", "Text-to-image", "Text2Image", "description"
    style: Style = "picture"
    timeout_s = 5.0

    def call(self, argument: str, wanted: int) -> Outcome:
        return Outcome(text="Image generated successfully.", picture=Path("/pictures") / f"{argument}.png")


class Stuck:
    """Never answers; its thread ends when the test sets ``done``."""

    name, label, function, argument = "stuck", "Stuck", "Wait", "seconds"
    style: Style = "value"
    timeout_s = 0.05

    def __init__(self) -> None:
        self.done = threading.Event()

    def call(self, argument: str, wanted: int) -> Outcome:
        self.done.wait()
        return Outcome(text="late")
