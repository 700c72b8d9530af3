"""A terminal chat over a scripted model, for a test's own process: python -P -m, with a pseudo-terminal as its terminal."""

import fcntl
import sys
import termios
import threading

from moss_jt.chat.chat import Chat
from moss_jt.terminal.line_input import make_reader
from moss_jt.terminal.loop import PROMPT, Terminal
from moss_jt.terminal.screen import Screen
from tests.support.scripted_chat import ScriptedMoss


def main() -> None:
    fcntl.ioctl(sys.stdin.fileno(), termios.TIOCSCTTY, 0)  # so that Ctrl-C becomes a signal to this process
    moss = ScriptedMoss(
        " evil \x1b[2Jtext\x9b31m<eom>",
        [" begun", threading.Event()],  # and never goes on
        " still here<eom>",
    )
    chat = Chat(moss, temperature=0)
    Terminal(chat, "scripted", Screen(), make_reader(PROMPT), lambda path: None).run()


if __name__ == "__main__":
    main()
