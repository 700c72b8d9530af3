"""The chat on a terminal: it shows what moss_jt.chat.chat yields, and reads what the user types."""

import contextlib
import re
from collections.abc import Generator

from moss_jt.chat.chat import Chat
from moss_jt.chat.events import Command, Event, Notice, Result, Text, Thought
from moss_jt.chat.turn import TooLongError
from moss_jt.errors import MossError
from moss_jt.plugins.registry import plugin_names
from moss_jt.terminal.line_input import LineReader
from moss_jt.terminal.pictures import Shower
from moss_jt.terminal.screen import Screen, shortened
from moss_jt.terminal.texts import notice_text, say

NAME = "MOSS"
PROMPT = "› "
MOST_RESULT_LINES = 6
MOST_LOCATION_CHARACTERS = 500  # of an address, which is of no use when it is cut


class TurnView:
    """Shows the events of one turn."""

    def __init__(self, screen: Screen, chat: Chat, thoughts: bool, show_picture: Shower) -> None:
        self._screen = screen
        self._chat = chat
        self._thoughts = thoughts
        self._show_picture = show_picture
        self._kind = ""

    def show(self, events: Generator[Event]) -> None:
        """All events, as they come; Ctrl-C ends the answer.

        Raises:
            MossError: the message is too long, or the model failed.
        """
        with contextlib.closing(events):
            try:
                self._wait()
                for event in events:
                    self._show(event)
            except KeyboardInterrupt:
                # Not the model but this loop was interrupted; closing the events ends the answer.
                self._notice(say("stopped", self._chat.language))
        self._screen.fresh_line()
        self._show_sources()

    def _show(self, event: Event) -> None:
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
                self._screen.write(f"{NAME} ", "name")
            self._screen.write(event.text)
        else:
            self._notice(notice_text(event, self._chat.language))
        self._kind = event.kind

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
            lines = [f"{lines[0]}: {event.failure}"]
        for number, line in enumerate(lines[:MOST_RESULT_LINES]):
            arrow = "→" if number == 0 else " "
            self._screen.line(f"  {arrow} {shortened(line, self._screen.columns - 5)}", "dim")
        if len(lines) > MOST_RESULT_LINES:
            self._screen.line("    …", "dim")

    def _show_sources(self) -> None:
        if not self._chat.sources:
            return
        for number, source in sorted(self._chat.sources.items()):
            title = shortened(source.title, self._screen.columns)
            location = " ".join(source.location.split())[:MOST_LOCATION_CHARACTERS]
            self._screen.line(f"  [{number}] {title}  {location}".rstrip(), "dim")

    def _notice(self, text: str) -> None:
        self._screen.line(f"({text})", "warning")

    def _wait(self) -> None:
        self._screen.wait("  …")


def shown_lines(event: Result) -> list[str]:
    """A result as people read it: items as "[1] text", without the marks that are for the model."""
    return [re.sub(r"^<\|(\d+)\|>: ", r"[\1] ", line) for line in event.text.split("\n")]


class Terminal:
    """The loop: read a line, do what it says or send it, show what comes."""

    def __init__(
        self,
        chat: Chat,
        model: str,
        screen: Screen,
        reader: LineReader,
        show_picture: Shower,
        thoughts: bool = True,
    ) -> None:
        self._chat = chat
        self._model = model
        self._screen = screen
        self._reader = reader
        self._show_picture = show_picture
        self._thoughts = thoughts

    def run(self) -> None:
        """Until the user leaves."""
        self._greet()
        while True:
            try:
                line = self._reader.read().strip()
            except KeyboardInterrupt:
                self._say("leave")
                continue
            except EOFError:
                break
            if line in ("stop", "/stop"):
                break
            if line:
                try:
                    self._do(line)
                except KeyboardInterrupt:  # while a plugin was being switched on, which may take its time
                    self._say("stopped")
        self._say("bye")

    def answer(self, text: str) -> None:
        """Send a message, and show what comes."""
        view = TurnView(self._screen, self._chat, self._thoughts, self._show_picture)
        view.show(self._chat.send(text))

    def _do(self, line: str) -> None:
        word, *names = line.replace(",", " ").split()
        commands = {
            "/clear": self._clear,
            "/help": lambda: self._say("help"),
            "/thoughts": self._toggle_thoughts,
        }
        if line == "clear":
            self._clear()
        elif word == "/plugins":
            self._plugins(names)
        elif word in commands and not names:
            commands[word]()
        elif word.startswith("/") and not names and "/" not in word[1:]:
            self._say("unknown", word=word)
        else:
            try:
                self.answer(line)
            except TooLongError as error:
                too_long = say("too_long", self._chat.language, tokens=error.tokens, room=error.room)
                self._screen.line(too_long, "warning")
            except MossError as error:
                self._screen.error(error)
        self._screen.line()

    def _greet(self) -> None:
        self._say("greeting", model=self._model)
        if self._chat.plugins:
            self._say("plugins_on", names=", ".join(plugin.name for plugin in self._chat.plugins))
        else:
            self._say("plugins_hint")
        self._screen.line()

    def _clear(self) -> None:
        self._chat.clear()
        if self._screen.terminal:
            self._screen.raw("\x1b[2J\x1b[H")
        self._say("cleared")

    def _toggle_thoughts(self) -> None:
        self._thoughts = not self._thoughts
        self._say("thoughts_on" if self._thoughts else "thoughts_off")

    def _plugins(self, names: list[str]) -> None:
        """Switch plugins on or off by name, then list all."""
        on = {plugin.name: plugin for plugin in self._chat.plugins}
        wanted = [plugin for name, plugin in on.items() if name not in names]
        try:
            if names:
                turns = self._chat.switch([*wanted, *(name for name in names if name not in on)])
                if turns:
                    text = notice_text(Notice("dropped", {"turns": turns}), self._chat.language)
                    self._screen.line(text, "warning")
        except MossError as error:
            self._screen.error(error)
            return
        on_now = {plugin.name for plugin in self._chat.plugins}
        known = [*plugin_names(), *sorted(on_now - set(plugin_names()))]
        marks = "\n".join(f"  {'●' if name in on_now else '○'} {name}" for name in known)
        self._say("plugins_list", marks=marks)

    def _say(self, code: str, **values: str) -> None:
        self._screen.line(say(code, self._chat.language, **values), "dim")
