"""Conversations that are kept, as people see them in a list."""

import time
from collections.abc import Iterable

from moss_jt.chat.language import Language
from moss_jt.chat.saved import Summary
from moss_jt.terminal.screen import shortened
from moss_jt.terminal.texts import say

LEAST_MESSAGE_COLUMNS = 20


def when(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(seconds))


def chat_lines(
    summaries: Iterable[Summary], language: Language, current: str | None, columns: int
) -> list[str]:
    """A line for each, the newest first; the one that is running has a mark."""
    lines = []
    for one in summaries:
        mark = "●" if one.name == current else " "
        turns = say("chat_turn" if one.turns == 1 else "chat_turns", language, turns=one.turns)
        line = f"{mark} {one.name}  {when(one.used)}  {turns}  "
        lines.append(line + shortened(one.last, max(LEAST_MESSAGE_COLUMNS, columns - len(line) - 2)))
    return lines
