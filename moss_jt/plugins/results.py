"""Runs the calls of one turn and writes their answers in the trained form."""

import re
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from moss_jt.plugins.commands import Call, parse_commands
from moss_jt.plugins.interface import NO_RESULT, CallContext, Item, Outcome, Plugin, Source
from moss_jt.plugins.limits import call_with_limit

# The most calls in a recorded turn.
MAX_CALLS = 10
# A search result is cut here, quotation marks and escapes included, as in the recorded dialogues.
MAX_ITEM_CHARACTERS = 400
MAX_LINES_CHARACTERS = 2_000
# Calls that start later than this after the first one are not run any more.
TURN_S = 120.0

# The trained services answered in this order, whatever the order of the commands.
SERVICE_ORDER = {"Search": 0, "Calculate": 1, "Solve": 2, "Text2Image": 3}
# What opens or closes a field, and what numbers a result: foreign text must not spell either.
FIELD_MARKERS = re.compile(
    r"<(?=\|(?:Human|Inner Thoughts|Commands|Results|MOSS|endoftext)\||eo[a-z]>)", re.IGNORECASE
)
NUMBER_MARKERS = re.compile(r"<(?=\|\d+\|)")


@dataclass(frozen=True)
class CallResult:
    """One call and its answer.

    command  the call as the model wrote it
    plugin   the name of the plugin that answered; empty when none is called so
    text     its part of the Results field, as trained; empty when the call was passed over
    found    there is an answer
    failure  why there is none, for the user
    numbers  the citation numbers of its items; they run on through the turn
    sources  where these items come from, in the same order
    picture  the file that was drawn
    """

    command: str
    plugin: str = ""
    text: str = ""
    found: bool = False
    failure: str = ""
    numbers: tuple[int, ...] = ()
    sources: tuple[Source, ...] = ()
    picture: Path | None = None


def run(commands: str, plugins: Sequence[Plugin], *, turn_s: float = TURN_S) -> list[CallResult]:
    """The results of every call in a Commands field, in the order of the Results field; never raises."""
    return list(iterate_results(commands, plugins, turn_s=turn_s))


def iterate_results(
    commands: str, plugins: Sequence[Plugin], *, turn_s: float = TURN_S
) -> Iterator[CallResult]:
    """Run the calls of a Commands field one after the other, each within its plugin's time limit.

    Beside calls that can be run, calls of invented or switched-off functions are passed over, as recorded; alone they have no
    result. Calls beyond MAX_CALLS are passed over.
    """
    by_function = {plugin.function: plugin for plugin in plugins}
    calls = parse_commands(commands, by_function.keys())
    known = [call for call in calls if call.function in by_function]
    known.sort(key=lambda call: SERVICE_ORDER.get(call.function, len(SERVICE_ORDER)))
    wanted = items_per_search(
        sum(1 for call in known[:MAX_CALLS] if by_function[call.function].style == "items")
    )
    number, end = 1, time.monotonic() + turn_s
    for place, call in enumerate(known):
        plugin = by_function[call.function]
        if place >= MAX_CALLS:
            yield CallResult(call.text, plugin.name, failure=f"only {MAX_CALLS} commands are run in a turn")
            continue
        deadline = min(end, time.monotonic() + plugin.timeout_s)
        outcome, failure = call_with_limit(plugin, call.argument, CallContext(wanted, deadline))
        result = written(call, plugin, outcome, failure, number)
        number += len(result.numbers)
        yield result
    for call in calls:
        if call.function not in by_function:
            text = "" if known else f"{call.text} =>\n{NO_RESULT}"
            yield CallResult(
                call.text, text=text, failure=f"there is no function {call.function}, or it is switched off"
            )


def items_per_search(searches: int) -> int:
    """As in the recorded dialogues: three items for one query, two each for two, one each for more."""
    return {0: 3, 1: 3, 2: 2}.get(searches, 1)


def written(call: Call, plugin: Plugin, outcome: Outcome, failure: str, number: int) -> CallResult:
    """An answer as it stands in the Results field; items are numbered from ``number``."""
    head = head_of(call)
    if plugin.style == "items" and outcome.items:
        numbers = tuple(range(number, number + len(outcome.items)))
        lines = [f"<|{n}|>: {item_text(item)}" for n, item in zip(numbers, outcome.items, strict=True)]
        sources = tuple(item.source for item in outcome.items)
        return CallResult(
            call.text, plugin.name, "\n".join([head, *lines]), True, numbers=numbers, sources=sources
        )
    text = unmarked(outcome.text)[:MAX_LINES_CHARACTERS].strip() if plugin.style != "items" else ""
    found = bool(text)
    failure = "" if found else failure or "nothing was found"
    if plugin.style == "picture" and found:
        return CallResult(call.text, plugin.name, " ".join(text.split()), found, picture=outcome.picture)
    if plugin.style == "value":
        value = " ".join(text.split()) or NO_RESULT
        return CallResult(call.text, plugin.name, f"{head} '{value}'", found, failure)
    return CallResult(call.text, plugin.name, f"{head}\n{text or NO_RESULT}", found, failure)


def head_of(call: Call) -> str:
    """The call as repeated before its answer: on one line, with no field marker in it."""
    return " ".join(FIELD_MARKERS.sub("< ", call.text).splitlines()) + " =>"


def item_text(item: Item) -> str:
    """A search result as trained: Python's form of the string, cut after MAX_ITEM_CHARACTERS without a closing quotation mark."""
    label = " ".join(unmarked(item.label).split())
    quoted = repr(unmarked(item.text))
    return (f"{label}: {quoted}" if label else quoted)[:MAX_ITEM_CHARACTERS]


def unmarked(text: str) -> str:
    """Foreign text whose field markers, ends of fields and citation numbers are broken by a space: ``< |MOSS|>``."""
    return NUMBER_MARKERS.sub("< ", FIELD_MARKERS.sub("< ", text))


def body_of(results: Sequence[CallResult]) -> str:
    """The body of the Results field: the answers one below the other, or ``None`` where nothing was called."""
    return "\n".join(result.text for result in results if result.text) or "None"


def field_of(results: Sequence[CallResult]) -> str:
    """What stands between ``<|Results|>:`` and ``<eor>`` in a turn with plugins; a picture's answer has no line of its own."""
    if len(results) == 1 and results[0].picture is not None:
        return f" {results[0].text}"
    return f"\n{body_of(results)}\n"
