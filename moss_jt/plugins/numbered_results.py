"""Answers of calls in the trained form: their part of the Results field, where search results are numbered through the turn."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from moss_jt.errors import Reason
from moss_jt.plugins.calls import Call
from moss_jt.plugins.interface import NO_RESULT, Item, Outcome, Plugin, Source

# A search result is cut here, quotation mark and escapes included, as in the recorded dialogues.
MAX_ITEM_CHARACTERS = 400
MAX_LINES_CHARACTERS = 2_000


@dataclass(frozen=True)
class CallResult:
    """One call and its answer.

    text     its part of the Results field, as trained
    numbers  the citation numbers of its items; they run on through the turn
    sources  where these items come from, in the same order
    picture  the file that was drawn
    failure  why there is no answer, for the user
    """

    call: Call
    plugin: str
    text: str
    found: bool
    numbers: tuple[int, ...] = ()
    sources: tuple[Source, ...] = ()
    picture: Path | None = None
    failure: str = ""


def written(call: Call, plugin: Plugin, outcome: Outcome, number: int) -> CallResult:
    """An answer as it stands in the Results field; items are numbered from ``number``."""
    if plugin.style == "items" and outcome.items:
        numbers = tuple(range(number, number + len(outcome.items)))
        lines = [f"<|{n}|>: {item_text(item)}" for n, item in zip(numbers, outcome.items, strict=True)]
        sources = tuple(item.source for item in outcome.items)
        return CallResult(call, plugin.name, "\n".join([f"{call.text} =>", *lines]), True, numbers, sources)
    if plugin.style == "picture" and outcome.picture is not None:
        return CallResult(call, plugin.name, outcome.text, True, picture=outcome.picture)
    text = outcome.text[:MAX_LINES_CHARACTERS]
    has_result = bool(text) and plugin.style in ("value", "lines")
    failure = "" if has_result else outcome.failure or Reason("nothing was found")
    if plugin.style == "value":
        return CallResult(
            call, plugin.name, f"{call.text} => '{text or NO_RESULT}'", has_result, failure=failure
        )
    answer = text if has_result else NO_RESULT
    return CallResult(call, plugin.name, f"{call.text} =>\n{answer}", has_result, failure=failure)


def item_text(item: Item) -> str:
    """A search result as Python prints the string, cut after MAX_ITEM_CHARACTERS: a long one loses its closing mark."""
    quoted = repr(item.text)
    label = " ".join(item.label.split())
    return (f"{label}: {quoted}" if label else quoted)[:MAX_ITEM_CHARACTERS]


def body_of(results: Sequence[CallResult]) -> str:
    """The body of the Results field: the answers in the order of the calls, or ``None`` where nothing was called."""
    return "\n".join(result.text for result in results) or "None"
