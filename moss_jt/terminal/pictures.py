"""Pictures in the terminal, where it can show them: kitty's protocol, iTerm2's, or sixel."""

import base64
import os
import re
import select
import sys
import time
from collections.abc import Callable, Mapping
from io import BytesIO
from pathlib import Path
from typing import Any, Literal

Protocol = Literal["kitty", "iterm2", "sixel"]

MAX_BYTES = 32 << 20
MAX_PIXELS = 64_000_000
LARGEST_SIDE = 480  # pixels, as shown
CHUNK = 4096  # of base64 that kitty takes at once
ANSWER_S = 0.3  # terminals answer in milliseconds


def named_protocol(environment: Mapping[str, str] = os.environ) -> Protocol | None:
    """The protocol of terminals that say by their environment who they are. tmux lets neither protocol through."""
    if environment.get("TMUX") or environment.get("TERM", "").startswith(("tmux", "screen")):
        return None
    program = environment.get("TERM_PROGRAM", "") or environment.get("LC_TERMINAL", "")
    if environment.get("KITTY_WINDOW_ID") or environment.get("TERM") in ("xterm-kitty", "xterm-ghostty"):
        return "kitty"
    if program in ("iTerm.app", "iTerm2", "WezTerm", "vscode"):
        return "iterm2"
    return None


def find_protocol(environment: Mapping[str, str] = os.environ) -> Protocol | None:
    """How this terminal shows pictures; None if it does not. Asks the terminal where its name says nothing."""
    named = named_protocol(environment)
    if named is not None or not (sys.stdin.isatty() and sys.stdout.isatty()):
        return named
    return "sixel" if has_sixel(ask_terminal("\x1b[c", "c")) else None


def has_sixel(answer: str) -> bool:
    """Whether an answer to "what are you?" (DA1) names attribute 4."""
    match = re.search(r"\x1b\[\?([\d;]*)c", answer)
    return match is not None and "4" in match[1].split(";")[1:]


def ask_terminal(question: str, end: str) -> str:
    """What the terminal answers to a control sequence; empty when it does not."""
    import termios
    import tty

    descriptor = sys.stdin.fileno()
    before = termios.tcgetattr(descriptor)
    answer, deadline = "", time.monotonic() + ANSWER_S
    try:
        tty.setcbreak(descriptor, termios.TCSANOW)
        sys.stdout.write(question)
        sys.stdout.flush()
        while not answer.endswith(end) and len(answer) < 200:
            ready, _, _ = select.select([descriptor], [], [], max(0.0, deadline - time.monotonic()))
            if not ready:
                break
            answer += os.read(descriptor, 100).decode("latin-1")
    finally:
        termios.tcsetattr(descriptor, termios.TCSANOW, before)
    return answer


def escape_sequence(path: Path, protocol: Protocol) -> str | None:
    """What makes the terminal show the picture; None where it cannot be shown (damaged, huge, or Pillow is missing)."""
    try:
        data = path.read_bytes() if path.stat().st_size <= MAX_BYTES else b""
    except OSError:
        return None
    if protocol == "iterm2":
        return iterm2(data) if data else None
    picture = opened(data)
    if picture is None:
        return None
    return sixel(picture) if protocol == "sixel" else kitty(as_png(picture))


def opened(data: bytes) -> Any:
    """A Pillow image in RGB, small enough to show; None where that cannot be had."""
    try:
        from PIL import Image
    except ImportError:
        return None
    try:
        with Image.open(BytesIO(data), formats=("PNG", "JPEG")) as picture:
            if picture.width * picture.height > MAX_PIXELS:
                return None
            picture.thumbnail((LARGEST_SIDE, LARGEST_SIDE))
            return picture.convert("RGB")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return None


def as_png(picture: Any) -> bytes:
    buffer = BytesIO()
    picture.save(buffer, "PNG")
    return buffer.getvalue()


def kitty(png: bytes) -> str:
    """https://sw.kovidgoyal.net/kitty/graphics-protocol: base64 in chunks, all but the last marked m=1."""
    text = base64.b64encode(png).decode()
    chunks = [text[at : at + CHUNK] for at in range(0, len(text), CHUNK)]
    parts = []
    for number, chunk in enumerate(chunks):
        first = "f=100,a=T,q=2," if number == 0 else ""
        parts.append(f"\x1b_G{first}m={int(number < len(chunks) - 1)};{chunk}\x1b\\")
    return "".join(parts)


def iterm2(data: bytes) -> str:
    """https://iterm2.com/documentation-images.html: any format that the terminal knows."""
    text = base64.b64encode(data).decode()
    return f"\x1b]1337;File=inline=1;size={len(data)};width={LARGEST_SIDE}px:{text}\x07"


def sixel(picture: Any) -> str:
    """DEC's format: bands of six rows; in each, every colour of a palette paints its pixels."""
    indexed = picture.quantize(64)
    width, height = indexed.size
    palette, pixels = indexed.getpalette(), indexed.tobytes()
    parts = [f'\x1bPq"1;1;{width};{height}']
    for color in sorted(set(pixels)):
        red, green, blue = (round(value * 100 / 255) for value in palette[3 * color : 3 * color + 3])
        parts.append(f"#{color};2;{red};{green};{blue}")
    for top in range(0, height, 6):
        rows = [pixels[y * width : (y + 1) * width] for y in range(top, min(top + 6, height))]
        bands = [f"#{color}{painted(rows, color, width)}" for color in sorted(set(b"".join(rows)))]
        parts.append("$".join(bands) + "-")
    return "".join(parts) + "\x1b\\"


def painted(rows: list[bytes], color: int, width: int) -> str:
    """One colour's pixels in a band, runs shortened: each character holds a column of six."""
    columns = [sum((row[x] == color) << bit for bit, row in enumerate(rows)) for x in range(width)]
    parts, at = [], 0
    while at < width:
        run = at
        while run < width and columns[run] == columns[at]:
            run += 1
        parts.append(f"!{run - at}{chr(63 + columns[at])}")
        at = run
    return "".join(parts)


Shower = Callable[[Path], str | None]


def make_shower(environment: Mapping[str, str] = os.environ) -> Shower:
    """A function from a picture's path to the escape sequence that shows it, or None. The terminal is asked once."""
    known: list[Protocol | None] = []

    def show(path: Path) -> str | None:
        if not known:
            known.append(find_protocol(environment))
        return escape_sequence(path, known[0]) if known[0] is not None else None

    return show
