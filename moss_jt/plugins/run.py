"""Runs the calls of one turn, each within its time."""

import threading
import time
from collections.abc import Iterator, Sequence

from moss_jt.errors import Reason
from moss_jt.plugins.calls import Call, parse_commands
from moss_jt.plugins.failures import failure_of
from moss_jt.plugins.interface import NO_RESULT, Outcome, Plugin, Style, outcome_fault, plugin_fault
from moss_jt.plugins.numbered_results import CallResult, written

# The most calls in a recorded turn.
MAX_CALLS = 10
# No call is begun later than this after the first.
TURN_S = 600.0
# The recorded services answered in this order, whatever the order of the commands.
SERVICE_ORDER = {"Search": 0, "Calculate": 1, "Solve": 2, "Text2Image": 3}
# A thread cannot be ended from outside. While so many of them have not come back, nothing more is called.
MAX_LEFT_BEHIND = 8

_left_behind: list[threading.Thread] = []


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
