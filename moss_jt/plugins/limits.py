"""One call of one plugin, which may raise or hang: neither reaches the chat."""

import threading
import time

from moss_jt.errors import MossError
from moss_jt.plugins.interface import CallContext, Outcome, Plugin, PluginFailure

MAX_REASON_CHARACTERS = 200
MAX_STUCK = 4

_stuck: list[threading.Thread] = []


def call_with_limit(plugin: Plugin, argument: str, context: CallContext) -> tuple[Outcome, str]:
    """(answer, "") or (empty answer, reason): the plugin runs in a thread, which is left behind at the deadline.

    A thread cannot be ended from outside. When MAX_STUCK of them still run, a plugin's call is refused at once.
    """
    _stuck[:] = [thread for thread in _stuck if thread.is_alive()]
    if len(_stuck) >= MAX_STUCK:
        return Outcome(), "earlier calls still have not ended"
    if context.deadline <= time.monotonic():
        return Outcome(), "the turn's time is over"
    answers: list[tuple[Outcome, str]] = []
    thread = threading.Thread(
        target=_call, args=(plugin, argument, context, answers), daemon=True, name=f"plugin {plugin.name}"
    )
    thread.start()
    thread.join(max(0.0, context.deadline - time.monotonic()))
    if answers:
        return answers[0]
    if thread.is_alive():
        _stuck.append(thread)
        return Outcome(), "it took too long"
    return Outcome(), "it ended without an answer"


def _call(plugin: Plugin, argument: str, context: CallContext, answers: list[tuple[Outcome, str]]) -> None:
    try:
        outcome = plugin.call(argument, context)
        known = isinstance(outcome, Outcome)
        answers.append(
            (outcome, "")
            if known
            else (Outcome(), f"it answered with a {type(outcome).__name__}, not an Outcome")
        )
    except (PluginFailure, MossError) as error:
        answers.append((Outcome(), _one_line(str(error))))
    except BaseException as error:  # noqa: BLE001  whatever a plugin raises, SystemExit too, the chat goes on
        answers.append((Outcome(), _one_line(f"{type(error).__name__}: {error}")))


def _one_line(text: str) -> str:
    line = " ".join(text.split()) or "it failed"
    return line if len(line) <= MAX_REASON_CHARACTERS else line[: MAX_REASON_CHARACTERS - 4] + " ..."
