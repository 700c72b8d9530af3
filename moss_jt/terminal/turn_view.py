"""One turn on a terminal: what moss_jt.chat.chat yields, as people see it, and what it cost."""

import contextlib
import re
import threading
import time
from collections.abc import Callable, Generator
from typing import Protocol

from moss_jt.chat.chat import Chat
from moss_jt.chat.events import Command, Event, Result, Text, Thought
from moss_jt.chat.language import Language
from moss_jt.engine.causal_model import Watcher
from moss_jt.terminal.pictures import Shower
from moss_jt.terminal.reasons import in_language
from moss_jt.terminal.screen import Screen, shortened
from moss_jt.terminal.texts import notice_text, say

NAME = "MOSS"
MOST_RESULT_LINES = 6
MOST_LOCATION_CHARACTERS = 500  # of an address, which is of no use when it is cut
# Reading that is quicker than this is not worth a line; and how often the line changes.
PATIENCE_S, EACH_S = 2.0, 0.5

Clock = Callable[[], float]


class Reading(Protocol):
    """Whose text is read: moss_jt.chat.chat.Chat, or moss_jt.commands.generate.Asked.

    unread  tokens that are still to be read after the pass that goes on
    loaded  the share of the weights that stay in memory that is there
    """

    @property
    def unread(self) -> int: ...

    @property
    def loaded(self) -> float: ...

    @property
    def language(self) -> Language: ...

    def watch(self, watcher: Watcher | None) -> None: ...


class ReadingProgress:
    """How far the model is with reading a text, and how long the rest will take: a line that the next output replaces.

    It is called by whatever thread the model computes in.
    """

    def __init__(self, screen: Screen, chat: Reading, clock: Clock = time.monotonic) -> None:
        self._screen, self._chat, self._clock = screen, chat, clock
        self._lock = threading.Lock()
        self._began = self._shown = 0.0
        self._total = 0
        self._active = False

    def begin(self) -> None:
        with self._lock:
            self._began = self._shown = self._clock()
            self._total, self._active = 0, True
        self._chat.watch(self)

    def end(self) -> None:
        self._chat.watch(None)
        with self._lock:
            self._active = False

    def __call__(self, tokens: int, share: float) -> None:
        """``share`` of a pass of so many tokens is done."""
        with self._lock:
            left_over = self._chat.unread + tokens * (1 - share)
            self._total = self._total or self._chat.unread + tokens
            done, now = self._total - left_over, self._clock()
            elapsed = now - self._began
            if not self._active or elapsed < PATIENCE_S or now - self._shown < EACH_S or done <= 0:
                return
            self._shown = now
            left = elapsed * left_over / done
            values: dict[str, str | int] = {
                "tokens": self._total,
                "percent": round(100 * done / self._total),
                "left": f"{left:.0f}",
            }
            text = "reading"
            if self._chat.loaded < 1:
                text, values["loaded"] = "reading_and_loading", int(100 * self._chat.loaded)
            self._screen.wait(f"  … {say(text, self._chat.language, **values)}")


class TurnView:
    """Shows the events of one turn.

    thoughts  what MOSS thinks is shown
    cost      in the end, what the turn cost
    stopped   the user has ended it
    """

    def __init__(
        self,
        screen: Screen,
        chat: Chat,
        show_picture: Shower,
        *,
        thoughts: bool = True,
        cost: bool = True,
        clock: Clock = time.monotonic,
    ) -> None:
        self._screen = screen
        self._chat = chat
        self._thoughts = thoughts
        self._cost = cost
        self._show_picture = show_picture
        self._clock = clock
        self._progress = ReadingProgress(screen, chat, clock)
        self._kind = ""
        self.stopped = False

    def show(self, events: Generator[Event]) -> None:
        """All events, as they come; Ctrl-C ends the answer.

        Raises:
            MossError: the message is too long, or the model failed.
        """
        begin = self._clock()
        with contextlib.closing(events):
            try:
                self._wait()
                for event in events:
                    self._progress.end()
                    self.show_event(event)
            except KeyboardInterrupt:
                # Not the model but this loop was interrupted; closing the events ends the answer.
                self._progress.end()
                self.stopped = True
                self._notice(say("stopped", self._chat.language))
            finally:
                self._progress.end()
                self.end_answer()
        self.show_sources()
        if self._cost:
            self._show_cost(self._clock() - begin)

    def show_event(self, event: Event) -> None:
        if isinstance(event, Thought):
            self._show_thought(event)
        elif isinstance(event, Command):
            self._screen.line(f"  ▸ {event.text}", "command")
            self._wait()
        elif isinstance(event, Result):
            self._show_result(event)
            self._wait()
        elif isinstance(event, Text):
            if self._kind != event.kind:
                self._screen.fresh_line()
                self.begin_answer()
            self.write_answer(event.text)
        else:
            self.stopped |= event.code == "stopped"
            self._notice(notice_text(event, self._chat.language))
        self._kind = event.kind

    def begin_answer(self) -> None:
        self._screen.write(f"{NAME} ", "name")

    def write_answer(self, text: str) -> None:
        self._screen.write(text)

    def end_answer(self) -> None:
        self._screen.fresh_line()

    def _show_thought(self, event: Thought) -> None:
        if not self._thoughts:
            return
        if self._kind != event.kind:
            self._screen.fresh_line()
            self._screen.write("  ", "dim")
        self._screen.write(event.text, "dim")

    def _show_result(self, event: Result) -> None:
        language = self._chat.language
        if event.picture is not None:
            sequence = self._show_picture(event.picture)
            if sequence is not None:
                self._screen.fresh_line()
                self._screen.raw(sequence + "\n")
            self._screen.line(f"  → {say('picture', language, path=str(event.picture))}", "dim")
            return
        lines = shown_lines(event) if event.found else [say("no_result", language)]
        if event.failure:
            lines = [f"{lines[0]}{say('colon', language)}{in_language(event.failure, language)}"]
        for number, line in enumerate(lines[:MOST_RESULT_LINES]):
            arrow = "→" if number == 0 else " "
            self._screen.line(f"  {arrow} {shortened(line, self._screen.columns - 5)}", "dim")
        if len(lines) > MOST_RESULT_LINES:
            self._screen.line("    …", "dim")

    def show_sources(self) -> None:
        if not self._chat.sources:
            return
        for number, source in sorted(self._chat.sources.items()):
            title = shortened(source.title, self._screen.columns)
            location = " ".join(source.location.split())[:MOST_LOCATION_CHARACTERS]
            self._screen.line(f"  [{number}] {title}  {location}".rstrip(), "dim")

    def _show_cost(self, seconds: float) -> None:
        stats, language = self._chat.stats, self._chat.language
        if not stats.new_tokens:
            return
        values: dict[str, str | int] = {
            "read": stats.read_tokens,
            "new": stats.new_tokens,
            "seconds": f"{seconds:.1f}",
        }
        text = say("cost", language, **values)
        if speed := stats.tokens_per_s:
            text += say("speed", language, speed=f"{speed:.1f}" if speed >= 1 else f"{speed:.2g}")
        self._screen.line(f"  {text}", "dim")

    def _notice(self, text: str) -> None:
        self._screen.line(f"({text})", "warning")

    def _wait(self) -> None:
        self._screen.wait("  …")
        self._progress.begin()


def shown_lines(event: Result) -> list[str]:
    """A result as people read it: items as "[1] text", without the marks that are for the model."""
    return [re.sub(r"^<\|(\d+)\|>: ", r"[\1] ", line) for line in event.text.split("\n")]
