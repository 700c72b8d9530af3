"""Runs the calls of one turn and writes their answers in the trained form."""

import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from moss_jt.plugins.commands import Call, parse_commands
from moss_jt.plugins.interface import NO_RESULT, Outcome, Plugin, Source

# The most calls in a recorded turn.
MAX_CALLS = 10
# A search result longer than this is cut, as in the recorded dialogues.
MAX_ITEM_CHARACTERS = 400
MAX_LINES_CHARACTERS = 2_000


@dataclass(frozen=True)
class CallResult:
    """One call and its answer.

    text     its part of the Results field, as trained
    numbers  the citation numbers of its items; they run on through the turn
    sources  where these items come from, in the same order
    picture  the file that was drawn
    """

    call: Call
    plugin: str
    text: str
    found: bool
    numbers: tuple[int, ...] = ()
    sources: tuple[Source, ...] = ()
    picture: Path | None = None


def run_commands(commands: str, plugins: Sequence[Plugin]) -> list[CallResult]:
    """The results of every call; see :func:`iterate_results`."""
    return list(iterate_results(parse_commands(commands), plugins))


def iterate_results(calls: Sequence[Call], plugins: Sequence[Plugin]) -> Iterator[CallResult]:
    """Run calls one after the other. Calls of what is not there or switched off, and calls beyond MAX_CALLS, have no result."""
    by_function = {plugin.function: plugin for plugin in plugins}
    searches = sum(
        1 for call in calls if call.function in by_function and by_function[call.function].style == "items"
    )
    number = 1
    for call in calls[:MAX_CALLS]:
        plugin = by_function.get(call.function)
        if plugin is None:
            yield CallResult(call, "", f"{call.text} =>\n{NO_RESULT}", found=False)
            continue
        outcome = call_with_limit(plugin, call.argument, items_per_search(searches))
        result = written(call, plugin, outcome, number)
        number += len(result.numbers)
        yield result


def items_per_search(searches: int) -> int:
    """As in the recorded dialogues: three items for one query, two each for two, one each for more."""
    return {0: 3, 1: 3, 2: 2}.get(searches, 1)


def call_with_limit(plugin: Plugin, argument: str, wanted: int) -> Outcome:
    """The plugin's answer, or an empty one when it fails or takes too long (its thread is then left behind)."""
    found: list[Outcome] = []

    def work() -> None:
        try:
            found.append(plugin.call(argument, wanted))
        except Exception:  # noqa: BLE001  whatever a plugin does, the chat goes on: the model knows "No result."
            found.append(Outcome())

    thread = threading.Thread(target=work, daemon=True, name=f"plugin {plugin.name}")
    thread.start()
    thread.join(plugin.timeout_s)
    return found[0] if found and isinstance(found[0], Outcome) else Outcome()


def written(call: Call, plugin: Plugin, outcome: Outcome, number: int) -> CallResult:
    """An answer as it stands in the Results field; items are numbered from ``number``."""
    if plugin.style == "items" and outcome.items:
        numbers = tuple(range(number, number + len(outcome.items)))
        lines = [f"<|{n}|>: {quoted(item.text)}" for n, item in zip(numbers, outcome.items, strict=True)]
        sources = tuple(item.source for item in outcome.items)
        return CallResult(call, plugin.name, "\n".join([f"{call.text} =>", *lines]), True, numbers, sources)
    if plugin.style == "picture" and outcome.picture is not None:
        return CallResult(call, plugin.name, outcome.text, True, picture=outcome.picture)
    text = outcome.text[:MAX_LINES_CHARACTERS]
    if plugin.style == "value":
        return CallResult(call, plugin.name, f"{call.text} => '{text or NO_RESULT}'", bool(text))
    return CallResult(
        call, plugin.name, f"{call.text} =>\n{text or NO_RESULT}", bool(text) and plugin.style == "lines"
    )


def quoted(text: str) -> str:
    """A search result as Python would print the string, cut to MAX_ITEM_CHARACTERS."""
    return repr(text if len(text) <= MAX_ITEM_CHARACTERS else text[:MAX_ITEM_CHARACTERS])


def body_of(results: Sequence[CallResult]) -> str:
    """The body of the Results field: the answers in the order of the calls, or ``None`` where nothing was called."""
    return "\n".join(result.text for result in results) or "None"
