"""Citations in an answer: MOSS writes ``<sup><|1|></sup>`` for what it has from result 1, and people read [1]."""

import re

NUMBER = re.compile(r"<\|(\d{1,3})\|>")
# As written: in a superscript, bare, several in one, or half of it missing.
CITATION = re.compile(rf"(?:<sup>)?(?:{NUMBER.pattern})+(?:</sup>)?")
# What may still become one, or a longer one, when more text comes.
UNFINISHED = re.compile(
    r"<(?:s(?:up?)?)?|(?:<sup>)?(?:<\|\d{1,3}\|>)*(?:<(?:\|(?:\d{1,3}\|?)?|/(?:s(?:up?)?)?)?)?"
)
LONGEST = 200


class CitationReader:
    """Turns citations into [1] in text that comes in pieces, and collects their numbers in ``cited``."""

    def __init__(self) -> None:
        self.cited: list[int] = []
        self._held = ""

    def push(self, text: str) -> str:
        """The text that is safe to show: what may be half of a citation is held back."""
        held = self._held + text
        cut = self._unfinished(held)
        self._held = held[cut:]
        return self._rendered(held[:cut])

    def finish(self) -> str:
        """What was held back, once the text has ended."""
        held, self._held = self._held, ""
        return self._rendered(held)

    def _unfinished(self, text: str) -> int:
        """Where the end of the text that may be an unfinished citation begins."""
        at = text.find("<", max(0, len(text) - LONGEST))
        while at >= 0:
            if UNFINISHED.fullmatch(text, at):
                return at
            at = text.find("<", at + 1)
        return len(text)

    def _rendered(self, text: str) -> str:
        return CITATION.sub(self._render, text)

    def _render(self, citation: re.Match[str]) -> str:
        numbers = [int(number) for number in NUMBER.findall(citation[0])]
        self.cited += [number for number in numbers if number not in self.cited]
        return "".join(f"[{number}]" for number in numbers)
