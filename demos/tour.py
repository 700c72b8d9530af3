"""``make demo``: the small MOSS that comes with the program is converted, then talks, calculates, searches and draws.

Nothing is downloaded, and nothing leaves this machine: search reads a folder of text files that is made here, and the
pictures come from a drawing server of our own. Ends in a chat where there is a terminal.
"""

import sys
import tempfile
import time
from collections.abc import Generator
from pathlib import Path

from moss_jt import Moss
from moss_jt.chat.chat import Chat
from moss_jt.chat.events import Event, Text
from moss_jt.chat.language import user_language
from moss_jt.convert.named import model_folder
from moss_jt.demos.drawing_server import drawing_server
from moss_jt.plugins.registry import PluginSettings
from moss_jt.store.locations import TINY, model_home
from moss_jt.terminal.ending import open_closed_streams, told_on_one_line
from moss_jt.terminal.line_input import make_reader
from moss_jt.terminal.loop import PROMPT, Terminal
from moss_jt.terminal.pictures import make_shower
from moss_jt.terminal.screen import Screen
from moss_jt.terminal.texts import say
from moss_jt.terminal.turn_view import TurnView

PLUGINS = ("calculator", "solver", "search", "image")

# What is asked, and what the answer must contain: the first two come from plugins, to the letter.
SCRIPT = (
    ("What is 37 times 48?", "1776"),
    ("解方程3*x+5=20", "x = 5"),
    ("你好", ""),
    ("请介绍一下长城", ""),
    ("Draw a robot drinking tea", ""),
    ("Thank you", ""),
)

TEXTS = {
    "great-wall.txt": "长城北方，山脉，古老，历史。",
    "moon.txt": "the Moon old quiet bright stone.",
    "tea.txt": "茶古老，历史，文化。\ntea ancient famous mountain garden.",
}


def ask(screen: Screen, chat: Chat, message: str) -> str:
    """Send a message, show what comes, and what it cost; returns the answer."""
    pieces: list[str] = []

    def noted(events: Generator[Event]) -> Generator[Event]:
        for event in events:
            if isinstance(event, Text):
                pieces.append(event.text)
            yield event

    screen.line(f"{PROMPT}{message}", "bold")
    TurnView(screen, chat, make_shower()).show(noted(chat.send(message)))
    screen.line()
    return "".join(pieces)


def run_script(screen: Screen, chat: Chat) -> list[str]:
    """The scripted conversation; returns what its answers lack."""
    missing = []
    for message, wanted in SCRIPT:
        answer = ask(screen, chat, message)
        if wanted not in answer:
            missing.append(f"{message}: {wanted!r} is not in {answer!r}")
    return missing


def main() -> int:
    """Exit code 1 where an answer lacks its plugin's result."""
    screen, language = Screen(), user_language()
    with tempfile.TemporaryDirectory(prefix="moss-jt-demo-") as scratch, drawing_server() as address:
        texts = Path(scratch, "texts")
        texts.mkdir()
        for name, text in TEXTS.items():
            (texts / name).write_text(text, encoding="utf-8")
        settings = PluginSettings(
            search_folder=texts, image_url=address, picture_folder=model_home() / "pictures"
        )
        begin = time.monotonic()
        folder = model_folder(TINY)
        seconds = f"{time.monotonic() - begin:.1f}"
        screen.line(say("converted", language, path=str(folder), seconds=seconds), "dim")
        with Moss.load(folder) as moss:
            screen.line(say("loaded", language, seconds=f"{moss.load_s:.1f}") + "\n", "dim")
            chat = moss.chat(plugins=PLUGINS, settings=settings, temperature=0)
            missing = run_script(screen, chat)
            if missing:
                screen.line("\n".join([say("failed", language), *missing]), "warning")
                return 1
            screen.line(say("page", language), "dim")
            if sys.stdin.isatty() and sys.stdout.isatty():
                screen.line(say("your_turn", language) + "\n", "dim")
                chat.language = language
                Terminal(chat, TINY, screen, make_reader(PROMPT), make_shower()).run()
    return 0


if __name__ == "__main__":
    open_closed_streams()
    with told_on_one_line():
        sys.exit(main())
