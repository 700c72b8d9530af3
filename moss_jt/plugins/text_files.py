"""The text of the user's own files: which files are read, in which encodings, and pages without their markup."""

import html
import os
import re
import stat
from dataclasses import dataclass, field
from pathlib import Path

from moss_jt.errors import Reason

SUFFIXES = frozenset(
    ".txt .md .markdown .rst .org .tex .html .htm .xml .csv .tsv .json .jsonl .yaml .yml .toml .ini .log .srt "
    ".py .js .ts .c .h .cc .cpp .java .go .rs .sh .sql".split()
)
PAGES = (b".html", b".htm", b".xml")
MAX_FILES = 20_000
MAX_FILE_BYTES = 8 << 20
MAX_TOTAL_BYTES = 512 << 20
# After UTF-8; two bytes each in texts from Windows. Its four-byte form covers all of Unicode, so it is strict enough to fail.
FALLBACK = "gb18030"
# Of file names. GB2312 has no letters in its second bytes, so that it fails on most names in Latin-1.
NAME_ENCODINGS = ("utf-8", "gb2312")

TAG_NAME = re.compile(r"[/!?]?([A-Za-z0-9-]*)(?<=[A-Za-z0-9!?-])")
SKIPPED = frozenset(("script", "style", "template"))
BREAKING = frozenset("p div br li tr td th title h1 h2 h3 h4 h5 h6 section article pre blockquote".split())


State = tuple[int, int]  # size, time of the last change in ns


@dataclass
class TextFiles:
    """The text files below a folder, within the bounds above.

    states     path -> state, in order. Paths are the system's bytes: not every name is UTF-8
    too_large  how many have more than MAX_FILE_BYTES
    more       MAX_FILES or MAX_TOTAL_BYTES are reached, and there are more
    """

    states: dict[bytes, State] = field(default_factory=dict)
    too_large: int = 0
    more: bool = False

    @property
    def left_out(self) -> str:
        """What is not searched, for the user; empty where all is."""
        reasons = []
        if self.too_large:
            limit = MAX_FILE_BYTES >> 20
            reasons.append(
                Reason("files of more than {limit} MiB: {count}", limit=limit, count=self.too_large)
            )
        if self.more:
            limit = MAX_TOTAL_BYTES >> 20
            reasons.append(
                Reason("nothing beyond {count:,} files or {limit} MiB", count=len(self.states), limit=limit)
            )
        if len(reasons) > 1:
            return Reason("{first}; {second}", first=reasons[0], second=reasons[1])
        return reasons[0] if reasons else ""


def text_files(folder: Path) -> TextFiles:
    """The text files below a folder.

    Symbolic links are not followed; hidden files, and what is no regular file (reading a pipe would wait for ever), are passed
    over, and so is what vanishes or cannot be read meanwhile.
    """
    files = TextFiles()
    total = 0
    for root, folders, names in os.walk(os.fsencode(folder)):
        folders[:] = sorted(name for name in folders if not name.startswith(b"."))
        for name in sorted(names):
            suffix = os.path.splitext(name)[1].lower().decode("ascii", "replace")
            if name.startswith(b".") or suffix not in SUFFIXES:
                continue
            path = os.path.join(root, name)
            try:
                state = os.lstat(path)
            except OSError:
                continue
            if not stat.S_ISREG(state.st_mode):
                continue
            if state.st_size > MAX_FILE_BYTES:
                files.too_large += 1
                continue
            total += state.st_size
            if len(files.states) == MAX_FILES or total > MAX_TOTAL_BYTES:
                files.more = True
                return files
            files.states[path] = (state.st_size, state.st_mtime_ns)
    return files


def shown_path(path: bytes) -> str:
    """A path as people read it, whatever encoding its names have; what has none is spelled out: ``caf\\xe9.txt``."""
    return os.sep.join(_shown_name(name) for name in path.split(os.fsencode(os.sep)))


def _shown_name(name: bytes) -> str:
    for encoding in NAME_ENCODINGS:
        try:
            return "".join(map(_spelled, name.decode(encoding)))
        except UnicodeDecodeError:
            continue
    return "".join(map(_spelled, name.decode("ascii", "backslashreplace")))


def _spelled(character: str) -> str:
    return character if character.isprintable() else character.encode("unicode_escape").decode()


def read_text(path: bytes) -> str | None:
    """A file's text; None for a binary file, or one that cannot be read."""
    try:
        # Not through a link, and without waiting for a pipe, which may be there instead of the file meanwhile.
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
        with open(descriptor, "rb") as file:
            data = file.read(MAX_FILE_BYTES) or b""
    except OSError:
        return None
    text = decoded(data)
    is_page = path.lower().endswith(PAGES)
    return page_text(text) if text is not None and is_page else text


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
    shown, skipping = [first], ""
    for part in parts:
        tag, end, text = part.partition(">")
        name = TAG_NAME.match(tag)
        if not end or name is None:
            shown.append("" if skipping else f"<{part}")
            continue
        if skipping and name[0].lower() != f"/{skipping}":
            continue
        skipping = name[0].lower() if name[0].lower() in SKIPPED else ""
        shown.append("\n" if name[1].lower() in BREAKING else "")
        shown.append("" if skipping else text)
    return html.unescape("".join(shown))
