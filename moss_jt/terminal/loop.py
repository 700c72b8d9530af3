"""The chat on a terminal: it reads what the user types, and does it."""

import re
from collections.abc import Callable, Generator
from difflib import get_close_matches
from pathlib import Path

from moss_jt.chat.chat import Chat
from moss_jt.chat.events import Event, Notice
from moss_jt.chat.kept_chat import Keeping
from moss_jt.chat.saved import NameTakenError, name_fault
from moss_jt.chat.turn import TooLongError
from moss_jt.engine.sampling import REPETITION_PENALTY
from moss_jt.errors import MossError
from moss_jt.plugins.registry import plugin_names
from moss_jt.terminal.line_input import LineReader
from moss_jt.terminal.pictures import Shower
from moss_jt.terminal.reasons import in_language
from moss_jt.terminal.saved_chats import chat_lines
from moss_jt.terminal.screen import Screen, shortened
from moss_jt.terminal.settings import (
    MAX_FILE_KIB,
    UnreadableError,
    change_setting,
    read_text_file,
    settings_of,
)
from moss_jt.terminal.texts import notice_text, say
from moss_jt.terminal.turn_view import NAME, TurnView

PROMPT = "› "
MOST_CHATS = 20  # that /chats shows
LEAVING = ("stop", "/stop", "/exit", "/quit")
COMMANDS = (
    "/chats",
    "/clear",
    "/exit",
    "/help",
    "/plugins",
    "/quit",
    "/retry",
    "/save",
    "/set",
    "/stop",
    "/system",
    "/thoughts",
)


class Terminal:
    """The loop: read a line, do what it says or send it, show what comes.

    thoughts  what MOSS thinks is shown
    cost      after each answer, what it cost
    keeping   keeps the conversation on disk; None keeps none
    dropped   of a conversation that goes on, how many turns the model does not have before it
    """

    def __init__(
        self,
        chat: Chat,
        model: str,
        screen: Screen,
        reader: LineReader,
        show_picture: Shower,
        thoughts: bool = True,
        cost: bool = True,
        keeping: Keeping | None = None,
        dropped: int = 0,
    ) -> None:
        self._chat = chat
        self._keeping = keeping
        self._dropped_turns = dropped
        self._model = model
        self._screen = screen
        self._reader = reader
        self._show_picture = show_picture
        self._thoughts = thoughts
        self._cost = cost

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
            if line in LEAVING:
                break
            if line:
                try:
                    self._do(line)
                except KeyboardInterrupt:  # while a plugin was being switched on, which may take its time
                    self._say("stopped")
        self._say("bye")

    def _do(self, line: str) -> None:
        word, *names = line.split()
        commands = {
            "clear": self._clear,
            "/clear": self._clear,
            "/help": lambda: self._say("help"),
            "/retry": self._retry,
            "/chats": self._list_chats,
        }
        if word in commands and not names:
            commands[word]()
        elif word == "/thoughts" and names in ([], ["on"], ["off"]):
            self._show_thoughts(names == ["on"] if names else not self._thoughts)
        elif word == "/plugins":
            self._plugins([name for part in names for name in part.split(",") if name])
        elif word == "/set" and len(names) in (0, 2):
            self._set(*names)
        elif word == "/save":
            self._save(line.removeprefix(word).strip())
        elif word == "/system":
            self._system(line.removeprefix(word).strip())
        elif word == "/set":
            self._warn("set_usage")
        elif word in COMMANDS:
            self._warn("takes_nothing", word=word)
        elif re.fullmatch(r"/\w+", word):
            self._unknown(word)
        else:
            self._answer(lambda: self._chat.send(line))
        self._screen.line()

    def _unknown(self, word: str) -> None:
        if meant := get_close_matches(word.lower(), COMMANDS, 1):
            self._warn("unknown_meant", word=word, meant=meant[0])
        else:
            self._warn("unknown", word=word)

    def _answer(self, begin: Callable[[], Generator[Event]]) -> None:
        """Have an answer written, and show what comes."""
        view = TurnView(
            self._screen, self._chat, self._show_picture, thoughts=self._thoughts, cost=self._cost
        )
        try:
            view.show(begin())
        except TooLongError as error:
            too_long = say("too_long", self._chat.language, tokens=error.tokens, room=error.room)
            self._screen.line(too_long, "warning")
        except MossError as error:
            self._fail(error)

    def _retry(self) -> None:
        if self._chat.message is None:
            self._warn("nothing_to_retry")
            return
        if self._chat.params.temperature == 0:
            self._say("retry_greedy")
        self._answer(self._chat.retry)

    def _save(self, name: str) -> None:
        """Keep the conversation under a name."""
        if self._keeping is None:
            self._warn("keeps_none")
        elif name_fault(name):
            self._warn("no_name" if name else "save_what", name=name)
        else:
            try:
                self._keeping.save_as(self._chat, name)
            except NameTakenError:
                self._warn("name_taken", name=name)
            except MossError as error:
                self._fail(error)
            else:
                self._say("saved", name=name)

    def _list_chats(self) -> None:
        if self._keeping is None:
            self._warn("keeps_none")
            return
        summaries = self._keeping.conversations.list(MOST_CHATS)
        lines = chat_lines(summaries, self._chat.language, self._keeping.name, self._screen.columns)
        if lines:
            self._say("chats", lines="\n".join(lines))
        else:
            self._say("no_chats")

    def _resumed(self) -> None:
        """Where the conversation stands that goes on."""
        turns = self._chat.history
        self._say("resumed_one" if len(turns) == 1 else "resumed", turns=str(len(turns)))
        if self._dropped_turns:
            one = self._dropped_turns == 1
            self._warn("chat_dropped_one" if one else "chat_dropped", turns=str(self._dropped_turns))
        self._screen.line(f"{PROMPT}{shortened(turns[-1].message, self._screen.columns - 2)}", "dim")
        self._screen.line(f"{NAME} {shortened(turns[-1].answer, self._screen.columns - 5)}", "dim")

    def _greet(self) -> None:
        self._say("greeting", model=self._model)
        if self._chat.history:
            self._resumed()
        if self._chat.plugins:
            self._say(
                "plugins_on",
                names=say("comma", self._chat.language).join(plugin.name for plugin in self._chat.plugins),
            )
        else:
            self._say("plugins_hint")
        self._screen.line()

    def _clear(self) -> None:
        self._chat.clear()
        if self._screen.terminal:
            self._screen.raw("\x1b[2J\x1b[H")
        self._say("cleared")

    def _show_thoughts(self, shown: bool) -> None:
        self._thoughts = shown
        self._say("thoughts_on" if shown else "thoughts_off")

    def _set(self, name: str = "", value: str = "") -> None:
        """Change a setting of the answers to come, or list them all."""
        settings = settings_of(self._chat)
        if not name:
            lines = "\n".join(f"  {key} {shown}" for key, shown in settings.items())
            self._say("settings", lines=lines, penalty=str(REPETITION_PENALTY))
        elif name not in settings:
            meant = get_close_matches(name.lower(), settings, 1)
            self._warn("no_setting_meant" if meant else "no_setting", name=name, meant="".join(meant))
        elif change_setting(self._chat, name, value):
            self._say("set", name=name, value=settings_of(self._chat)[name])
        else:
            self._warn("not_set", name=name, value=value, wanted=say(f"wanted_{name}", self._chat.language))

    def _system(self, path: str) -> None:
        """A meta instruction from a file, or MOSS's own again."""
        try:
            text = read_text_file(Path(path).expanduser()) if path else None
        except UnreadableError as error:
            reason = say(error.code, self._chat.language, limit=MAX_FILE_KIB)
            self._warn("system_failed", path=path, reason=reason)
            return
        try:
            self._dropped(self._chat.instruct(text))
        except MossError as error:
            self._fail(error)
        else:
            self._say("system_set" if path else "system_own", path=path)

    def _plugins(self, names: list[str]) -> None:
        """Switch plugins on or off by name, then list all."""
        on = {plugin.name: plugin for plugin in self._chat.plugins}
        wanted = [plugin for name, plugin in on.items() if name not in names]
        try:
            if names:
                self._dropped(self._chat.switch([*wanted, *(name for name in names if name not in on)]))
        except MossError as error:
            self._fail(error)
            return
        on_now = {plugin.name for plugin in self._chat.plugins}
        known = [*plugin_names(), *sorted(on_now - set(plugin_names()))]
        marks = "\n".join(f"  {'●' if name in on_now else '○'} {name}" for name in known)
        self._say("plugins_list", marks=marks)

    def _dropped(self, turns: int) -> None:
        """Say how many turns had to go for a longer meta instruction."""
        if turns:
            notice = Notice("dropped", {"turns": turns})
            self._screen.line(notice_text(notice, self._chat.language), "warning")

    def _fail(self, error: MossError) -> None:
        self._screen.error(MossError(sentence(in_language(error, self._chat.language))))

    def _say(self, code: str, **values: str) -> None:
        self._screen.line(say(code, self._chat.language, **values), "dim")

    def _warn(self, code: str, **values: str) -> None:
        self._screen.line(say(code, self._chat.language, **values), "warning")


def sentence(text: str) -> str:
    """What an error says after ``moss-jt: error:``, as a sentence of its own; a name at its beginning stays as it is."""
    return text[:1].upper() + text[1:] if text.split(" ")[0].isalpha() else text
