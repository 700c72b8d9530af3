"""Pictures in terminals: each protocol is read back as a terminal would, and damaged or huge files show nothing."""

import base64
import os
import pty
import re
import struct
import sys
import zlib
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from moss_jt.demos.drawing_server import draw
from moss_jt.terminal import pictures
from moss_jt.terminal.pictures import (
    ask_terminal,
    escape_sequence,
    has_sixel,
    kitty,
    make_shower,
    named_protocol,
    sixel,
)


@pytest.fixture
def drawn(tmp_path: Path) -> Path:
    path = tmp_path / "disks.png"
    path.write_bytes(draw("a robot drinking tea"))
    return path


@pytest.mark.parametrize(
    ("environment", "protocol"),
    [
        ({"TERM": "xterm-kitty"}, "kitty"),
        ({"TERM": "xterm-256color", "KITTY_WINDOW_ID": "1"}, "kitty"),
        ({"TERM_PROGRAM": "iTerm.app"}, "iterm2"),
        ({"LC_TERMINAL": "iTerm2"}, "iterm2"),
        ({"TERM_PROGRAM": "WezTerm"}, "iterm2"),
        ({"TERM": "tmux-256color", "KITTY_WINDOW_ID": "1"}, None),
        ({"TERM": "xterm-kitty", "TMUX": "/tmp/x"}, None),
        ({"TERM": "xterm"}, None),
        ({}, None),
    ],
)
def test_terminals_are_known_by_their_environment(environment: dict[str, str], protocol: str | None) -> None:
    assert named_protocol(environment) == protocol


def test_sixel_terminals_say_so() -> None:
    assert has_sixel("\x1b[?62;4;22c") and has_sixel("\x1b[?63;1;2;4c")
    assert not has_sixel("\x1b[?4;1c") and not has_sixel("\x1b[?62;14;22c") and not has_sixel("")


def test_the_terminal_is_asked_and_left_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    import termios

    master, slave = pty.openpty()
    before = termios.tcgetattr(slave)
    with open(slave, closefd=False) as inp, open(slave, "w", closefd=False) as out:
        monkeypatch.setattr(sys, "stdin", inp)
        monkeypatch.setattr(sys, "stdout", out)
        os.write(master, b"\x1b[?62;4c")
        assert has_sixel(ask_terminal("\x1b[c", "c"))
        monkeypatch.setattr(pictures, "ANSWER_S", 0.01)
        assert ask_terminal("\x1b[c", "c") == ""
    assert termios.tcgetattr(slave) == before
    os.close(slave)
    os.close(master)


def test_kitty_gets_the_whole_file_in_chunks() -> None:
    data = os.urandom(10_000)
    commands = re.findall(r"\x1b_G([^;]*);([^\x1b]*)\x1b\\", kitty(data))
    assert base64.b64decode("".join(chunk for _, chunk in commands)) == data
    assert [keys for keys, _ in commands] == ["f=100,a=T,q=2,m=1", "m=1", "m=1", "m=0"]
    assert all(len(chunk) <= 4096 for _, chunk in commands)


def test_iterm2_gets_the_file_as_it_is(drawn: Path) -> None:
    sequence = escape_sequence(drawn, "iterm2")
    assert (
        sequence is not None and sequence.startswith("\x1b]1337;File=inline=1;") and sequence.endswith("\x07")
    )
    assert base64.b64decode(sequence.partition(":")[2][:-1]) == drawn.read_bytes()


def read_sixel(text: str) -> list[list[tuple[int, int, int]]]:
    """What a terminal paints, in percent of red, green, blue."""
    match = re.fullmatch(r'\x1bPq"1;1;(\d+);(\d+)(.*)\x1b\\', text)
    assert match
    width, height = int(match[1]), int(match[2])
    painted = [[(-1, -1, -1)] * width for _ in range(height)]
    palette: dict[int, tuple[int, int, int]] = {}
    color = x = top = 0
    for define, select, run, end in re.findall(r"#(\d+;2;\d+;\d+;\d+)|#(\d+)|(!\d+[?-~])|([$-])", match[3]):
        if define:
            number, _, *values = map(int, define.split(";"))
            palette[number] = (values[0], values[1], values[2])
        elif select:
            color = int(select)
        elif run:
            count, bits = int(run[1:-1]), ord(run[-1]) - 63
            for column in range(x, x + count):
                for bit in range(6):
                    if bits >> bit & 1:
                        painted[top + bit][column] = palette[color]
            x += count
        else:
            x, top = 0, top + (6 if end == "-" else 0)
    return painted


def test_sixel_paints_every_pixel_in_its_color() -> None:
    """Height 8 is not a multiple of the band's 6 rows. Colours come back within a percent, and the palette holds them all."""
    picture = Image.new("RGB", (5, 8), (255, 0, 0))
    for y in range(8):
        picture.putpixel((y % 5, y), (0, 255, 51))
    painted = read_sixel(sixel(picture))
    for y in range(8):
        for x in range(5):
            assert painted[y][x] == ((0, 100, 20) if x == y % 5 else (100, 0, 0))


def test_large_pictures_are_made_small_and_other_formats_become_png(tmp_path: Path) -> None:
    path = tmp_path / "large.jpg"
    Image.new("L", (1000, 500), 7).save(path)
    sequence = escape_sequence(path, "kitty")
    assert sequence is not None
    data = base64.b64decode("".join(re.findall(r";([^\x1b]*)\x1b\\", sequence)))
    with Image.open(BytesIO(data)) as shown:
        assert (shown.format, shown.size) == ("PNG", (480, 240))


def bomb() -> bytes:
    """A small file that says it has 10 billion pixels."""
    header = struct.pack(">IIBBBBB", 100_000, 100_000, 8, 2, 0, 0, 0)
    chunk = struct.pack(">I", 13) + b"IHDR" + header + struct.pack(">I", zlib.crc32(b"IHDR" + header))
    return b"\x89PNG\r\n\x1a\n" + chunk


@pytest.mark.parametrize("data", [b"", b"no picture", draw("x")[:100], bomb(), b"GIF89a" + bytes(50)])
@pytest.mark.parametrize("protocol", ["kitty", "sixel"])
def test_damaged_and_huge_files_show_nothing(tmp_path: Path, data: bytes, protocol: Any) -> None:
    path = tmp_path / "bad.png"
    path.write_bytes(data)
    assert escape_sequence(path, protocol) is None
    assert escape_sequence(tmp_path / "missing.png", protocol) is None


def test_the_terminal_is_asked_once(monkeypatch: pytest.MonkeyPatch, drawn: Path) -> None:
    asked = []
    monkeypatch.setattr(pictures, "find_protocol", lambda environment: asked.append(1))
    show = make_shower({})
    assert show(drawn) is None and show(drawn) is None and asked == [1]


def test_the_drawing_server_draws_the_same_picture_again() -> None:
    assert draw("tea") == draw("tea") != draw("coffee")
    with Image.open(BytesIO(draw("tea"))) as picture:
        picture.load()
        assert picture.size == (192, 192)
