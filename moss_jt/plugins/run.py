"""Runs the calls of one turn and writes their answers in the trained form."""

import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from moss_jt.errors import Reason
from moss_jt.plugins.calls import Call, parse_commands
from moss_jt.plugins.failures import failure_of
from moss_jt.plugins.interface import (
    NO_RESULT,
    Item,
    Outcome,
    Plugin,
    Source,
    Style,
    outcome_fault,
    plugin_fault,
)

# The most calls in a recorded turn.
MAX_CALLS = 10
# A search result is cut here, quotation mark and escapes included, as in the recorded dialogues.
MAX_ITEM_CHARACTERS = 400
MAX_LINES_CHARACTERS = 2_000
# No call is begun later than this after the first.
TURN_S = 600.0
# The recorded services answered in this order, whatever the order of the commands.
SERVICE_ORDER = {"Search": 0, "Calculate": 1, "Solve": 2, "Text2Image": 3}
# A thread cannot be ended from outside. While so many of them have not come back, nothing more is called.
MAX_LEFT_BEHIND = 8

_left_behind: list[threading.Thread] = []


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


class _Unusable:
    """Stands for a plugin of others that cannot be called: its calls have no result, and the user reads why."""

    label = argument = ""
    timeout_s = 1.0
    style: Style = "lines"

    def __init__(self, plugin: object, fault: Reason) -> None:
        self.name, self.function = (_text_of(plugin, name) for name in ("name", "function"))
        self.failure = Reason("the plugin cannot be called: {fault}", fault=fault)

    def call(self, argument: str, wanted: int) -> Outcome:
        return Outcome(failure=self.failure)


def _text_of(plugin: object, name: str) -> str:
    try:
        return str(getattr(plugin, name, ""))
    except Exception:  # noqa: BLE001  a property may do anything
        return ""


def _callable(plugin: Plugin) -> Plugin:
    fault = plugin_fault(plugin)
    return _Unusable(plugin, fault) if fault else plugin


def run_commands(commands: str, plugins: Sequence[Plugin]) -> list[CallResult]:
    """The results of every call; see :func:`iterate_results`."""
    return list(iterate_results(parse_commands(commands), plugins))


def iterate_results(calls: Sequence[Call], plugins: Sequence[Plugin]) -> Iterator[CallResult]:
    """Run calls one after the other, at most MAX_CALLS, in the order of the recorded services.

    Beside calls that can be run, those of invented or switched-off functions are passed over, as recorded; alone they have no
    result.
    """
    by_function = {plugin.function: plugin for plugin in map(_callable, plugins)}
    calls = calls[:MAX_CALLS]
    known = [call for call in calls if call.function in by_function]
    known.sort(key=lambda call: SERVICE_ORDER.get(call.function, len(SERVICE_ORDER)))
    searches = sum(1 for call in known if by_function[call.function].style == "items")
    number, end = 1, time.monotonic() + TURN_S
    for call in known:
        plugin = by_function[call.function]
        if time.monotonic() < end:
            outcome = call_with_limit(plugin, call.argument, items_per_search(searches))
        else:
            outcome = Outcome(failure=Reason("the time for this turn is over"))
        result = written(call, plugin, outcome, number)
        number += len(result.numbers)
        yield result
    for call in calls if not known else ():
        reason = Reason("there is no function {name}, or it is switched off", name=call.function)
        yield CallResult(call, "", f"{call.text} =>\n{NO_RESULT}", found=False, failure=reason)


def items_per_search(searches: int) -> int:
    """As in the recorded dialogues: three items for one query, two each for two, one each for more."""
    return {0: 3, 1: 3, 2: 2}.get(searches, 1)


def call_with_limit(plugin: Plugin, argument: str, wanted: int) -> Outcome:
    """The plugin's answer, or an empty one when it fails or takes too long (its thread is then left behind)."""
    _left_behind[:] = [thread for thread in _left_behind if thread.is_alive()]
    if len(_left_behind) >= MAX_LEFT_BEHIND:
        return Outcome(failure=Reason("too many earlier calls have not ended yet"))
    outcomes: list[Outcome] = []

    def work() -> None:
        try:
            outcome = plugin.call(argument, wanted)
            fault = outcome_fault(outcome)
            outcomes.append(Outcome(failure=fault) if fault else outcome)
        except BaseException as error:  # noqa: BLE001  whatever a plugin does, SystemExit too, the chat goes on
            outcomes.append(Outcome(failure=failure_of(error)))

    thread = threading.Thread(target=work, daemon=True, name=f"plugin {plugin.name}")
    thread.start()
    thread.join(plugin.timeout_s)
    if outcomes:
        return outcomes[0]
    _left_behind.append(thread)
    return Outcome(failure=Reason("it took longer than {seconds:g} s", seconds=plugin.timeout_s))


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
