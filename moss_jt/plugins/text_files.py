"""The text of the user's own files: which files are read, in which encodings, and pages without their markup."""

import html
import os
import re
import stat
from collections.abc import Iterator
from pathlib import Path

SUFFIXES = frozenset(
    ".txt .md .markdown .rst .org .tex .html .htm .xml .csv .tsv .json .jsonl .yaml .yml .toml .ini .log .srt "
    ".py .js .ts .c .h .cc .cpp .java .go .rs .sh .sql".split()
)
PAGES = (".html", ".htm", ".xml")
MAX_FILES = 20_000
MAX_FILE_BYTES = 8 << 20
MAX_TOTAL_BYTES = 512 << 20
# After UTF-8; two bytes each in texts from Windows. Its four-byte form covers all of Unicode, so it is strict enough to fail.
FALLBACK = "gb18030"

TAG_NAME = re.compile(r"[/!?]?([A-Za-z0-9-]*)(?<=[A-Za-z0-9!?-])")
SKIPPED = frozenset(("script", "style", "template"))
BREAKING = frozenset("p div br li tr td th title h1 h2 h3 h4 h5 h6 section article pre blockquote".split())


def text_files(folder: Path) -> Iterator[tuple[str, tuple[int, int]]]:
    """(path, (size, time in ns)) of the text files below a folder, in order, within the bounds above.

    Symbolic links are not followed; hidden files, and what is no regular file (reading a pipe would wait for ever), are passed
    over, and so is what vanishes or cannot be read meanwhile.
    """
    count = total = 0
    for root, folders, files in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(files):
            path = os.path.join(root, name)
            if name.startswith(".") or os.path.splitext(name)[1].lower() not in SUFFIXES:
                continue
            try:
                state = os.lstat(path)
            except OSError:
                continue
            if not stat.S_ISREG(state.st_mode) or state.st_size > MAX_FILE_BYTES:
                continue
            count, total = count + 1, total + state.st_size
            if count > MAX_FILES or total > MAX_TOTAL_BYTES:
                return
            yield path, (state.st_size, state.st_mtime_ns)


def read_text(path: Path) -> str | None:
    """A file's text; None for a binary file, or one that cannot be read."""
    try:
        # Not through a link, and without waiting for a pipe, which may have taken the file's place meanwhile.
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
        with open(descriptor, "rb") as file:
            data = file.read(MAX_FILE_BYTES) or b""
    except OSError:
        return None
    text = decoded(data)
    return page_text(text) if text is not None and path.suffix.lower() in PAGES else text


def decoded(data: bytes) -> str | None:
    """Text in UTF-8, in UTF-16 with its mark, or in GB18030; None where it is none of these."""
    if data[:2] in (b"\xff\xfe", b"\xfe\xff"):
        return data.decode("utf-16", "replace")
    if b"\0" in data[:4096]:
        return None
    for encoding in ("utf-8-sig", FALLBACK):
        try:
            return data.decode(encoding)
        except UnicodeDecodeError:
            continue
    return None


def page_text(page: str) -> str:
    """The text of a page of HTML or XML, without scripts and styles; in one pass, whatever the page holds."""
    first, *parts = page.split("<")
    pieces, skipping = [first], ""
    for part in parts:
        tag, end, text = part.partition(">")
        name = TAG_NAME.match(tag)
        if not end or name is None:
            pieces.append("" if skipping else f"<{part}")
            continue
        if skipping and name[0].lower() != f"/{skipping}":
            continue
        skipping = name[0].lower() if name[0].lower() in SKIPPED else ""
        pieces.append("\n" if name[1].lower() in BREAKING else "")
        pieces.append("" if skipping else text)
    return html.unescape("".join(pieces))
