"""Conversations on disk: one file each of JSON lines, which people can read, and which are training data.

The first line says what the conversation began with and how tokens were chosen; every other line is a finished turn, with the
five fields of MOSS's training data under their names there. What only programs need stands under ``moss_jt``.

A turn is appended in one step and is on the disk when that returns; whatever else changes replaces the file. So a kill at any
moment leaves all turns that had been kept. A file that is open for writing is locked: two processes never write one.
"""

import contextlib
import errno
import fcntl
import json
import os
import re
import secrets
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from moss_jt.chat.finished_turn import FIELDS, FinishedTurn, is_field
from moss_jt.errors import MissingFileError, MossError
from moss_jt.plugins.interface import Source
from moss_jt.store.files import read_small, reading, rename, writing
from moss_jt.store.locations import model_home

ENDING = ".jsonl"
MAX_FILE_BYTES = 64 << 20
MAX_NAME_BYTES = 100
MAX_SOURCE_CHARACTERS = 2000
MAX_PAGES = 1 << 14
# Names that conversations get which nobody named: these make room for newer ones, oldest first.
UNNAMED = re.compile(r"\d{8}-\d{6}-[0-9a-f]{16}")
MOST_UNNAMED, MOST_UNNAMED_BYTES = 100, 256 << 20
PLUGIN_SETTINGS = ("search_folder", "search_url", "image_url", "picture_folder")


class NoConversationError(MossError):
    """No conversation has that name."""


class NameTakenError(MossError):
    """Another conversation has that name."""


@dataclass(frozen=True)
class About:
    """What a conversation begins with, and how it goes on.

    meta_instruction  the whole text before the first turn
    system            the user's own part of it; None is MOSS's
    plugins           names of those that are on
    sampling          temperature and so on, and max_new_tokens
    plugin_settings   where plugins find what they need, by their names in moss_jt.plugins.registry.PluginSettings
    model             the path of its folder, or any other name
    title             what a front end calls the conversation, where somebody gave it a title
    """

    meta_instruction: str = ""
    system: str | None = None
    plugins: tuple[str, ...] = ()
    sampling: Mapping[str, int | float | None] = field(default_factory=dict)
    plugin_settings: Mapping[str, str] = field(default_factory=dict)
    model: str = ""
    title: str = ""


@dataclass(frozen=True)
class Conversation:
    """What a file holds.

    damaged  how many of its lines cannot be read; the turns are those of the others
    """

    name: str
    about: About
    turns: tuple[FinishedTurn, ...]
    damaged: int = 0


@dataclass(frozen=True)
class Summary:
    """A conversation in a list.

    first, last  what the user wrote first and last
    used         when it was written to, in seconds since 1970
    size         bytes
    """

    name: str
    model: str
    turns: int
    first: str
    last: str
    used: float
    size: int

    @property
    def named(self) -> bool:
        """Whether somebody named it."""
        return not UNNAMED.fullmatch(self.name)


def name_fault(name: str) -> bool:
    """Whether no conversation can have that name."""
    if not name or not name.isprintable() or name != name.strip():
        return True
    return bool(set(name) & set('/\\:*?"<>|')) or name[0] in ".-" or len(os.fsencode(name)) > MAX_NAME_BYTES


def check_name(name: str) -> str:
    """The name, where a conversation can have it.

    Raises:
        MossError: it cannot.
    """
    if name_fault(name):
        raise MossError(
            f'a conversation cannot be called {name!r}: a name begins with no dot, dash or space, has none of / \\ : * ? " < > |, '
            f"and at most {MAX_NAME_BYTES} bytes."
        )
    return name


class Conversations:
    """All conversations of a folder. Its methods may be called from any thread and any process.

    Args:
        folder: where the files are; by default chats under MOSS_JT_HOME.
        most, most_bytes: of conversations that nobody named. When one more comes, those used longest ago go.
    """

    def __init__(
        self, folder: Path | None = None, most: int = MOST_UNNAMED, most_bytes: int = MOST_UNNAMED_BYTES
    ) -> None:
        self.folder = model_home() / "chats" if folder is None else folder
        self._most, self._most_bytes = most, most_bytes

    def create(self, about: About, turns: Sequence[FinishedTurn] = (), name: str = "") -> "OpenConversation":
        """A new conversation, by default one that nobody named.

        Raises:
            NameTakenError: there is one of that name.
            MossError: the name is impossible, or the file cannot be written.
        """
        path = self._path(check_name(name or new_name()))
        with writing(path):
            self._make_folder()
            with self._locked():
                if path.exists():
                    raise NameTakenError(
                        f"there is a conversation called {name} already. Choose another name."
                    )
                opened = OpenConversation(path, _create(path, about, turns), about, turns)
                self._make_room(path)
        return opened

    def open(self, name: str) -> tuple["OpenConversation", Conversation]:
        """A conversation to go on with, and what it holds. Close it.

        Raises:
            NoConversationError: there is none of that name.
            MossError: it is open elsewhere, or cannot be read.
        """
        path = self._path(name)
        descriptor = _open_locked(path)
        try:
            held = _read(path)
        except BaseException:
            os.close(descriptor)
            raise
        # After damage the file is written anew with the next turn.
        turns = held.turns if not held.damaged else None
        return OpenConversation(path, descriptor, held.about, turns), held

    def load(self, name: str) -> Conversation:
        """What a conversation holds now, whether or not somebody writes it.

        Raises:
            NoConversationError: there is none of that name.
            MossError: it cannot be read.
        """
        return _read(self._path(name))

    def append(self, name: str, turn: FinishedTurn) -> None:
        """Keep one more turn of a conversation that is not open.

        Raises:
            NoConversationError: there is none of that name.
            MossError: it is open elsewhere, or cannot be read or written.
        """
        opened, held = self.open(name)
        with contextlib.closing(opened):
            opened.keep(held.about, [*held.turns, turn])

    def names(self) -> list[str]:
        """All names, those used last first."""
        dated = []
        for path in self.folder.glob(f"[!.]*{ENDING}"):
            with contextlib.suppress(OSError):  # it may have gone meanwhile
                dated.append((path.stat().st_mtime_ns, path.stem))
        return [name for _, name in sorted(dated, reverse=True)]

    def list(self, most: int | None = None) -> "list[Summary]":
        """Summaries, of the conversations used last first, at most so many. What cannot be read is left out."""
        summaries = []
        for name in self.names()[:most]:
            with contextlib.suppress(MossError, OSError):
                held, state = self.load(name), self._path(name).stat()
                messages = [turn.message for turn in (held.turns[:1] + held.turns[-1:])] or ["", ""]
                sizes = state.st_mtime, state.st_size
                summaries.append(
                    Summary(name, held.about.model, len(held.turns), messages[0], messages[-1], *sizes)
                )
        return summaries

    def rename(self, opened: "OpenConversation", name: str) -> None:
        """Give a conversation that is open another name.

        Raises:
            NameTakenError: there is one of that name.
            MossError: the name is impossible, or the disk fails.
        """
        path = self._path(check_name(name))
        with writing(path), self._locked():
            if path.exists():
                raise NameTakenError(f"there is a conversation called {name} already. Choose another name.")
            opened.path.rename(path)
            opened.path = path

    def remove(self, name: str) -> None:
        """Delete a conversation.

        Raises:
            NoConversationError: there is none of that name.
            MossError: it is open elsewhere, or cannot be deleted.
        """
        path = self._path(name)
        descriptor = _open_locked(path)
        try:
            path.unlink()
        except OSError as error:
            raise MossError(f"{path} cannot be removed ({error.strerror}). Check who owns it.") from error
        finally:
            os.close(descriptor)

    def _path(self, name: str) -> Path:
        """Where the conversation of that name would be.

        Raises:
            NoConversationError: no conversation can have that name.
        """
        if name_fault(name):
            raise NoConversationError(f"there is no conversation called {name!r}.")
        return self.folder / f"{name}{ENDING}"

    def _make_folder(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        """No other process makes, names or clears away conversations meanwhile."""
        descriptor = os.open(self.folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield
        finally:
            os.close(descriptor)

    def _make_room(self, newest: Path) -> None:
        """Delete unnamed conversations beyond the bounds, but for those that are open."""
        count, size = 0, 0
        for name in self.names():
            path = self._path(name)
            if path == newest or not UNNAMED.fullmatch(name):
                continue
            with contextlib.suppress(OSError, MossError):
                count, size = count + 1, size + path.stat().st_size
                if count >= self._most or size > self._most_bytes:
                    self.remove(name)


class OpenConversation:
    """A conversation that this process writes. Not thread-safe."""

    def __init__(
        self, path: Path, descriptor: int, about: About, turns: Sequence[FinishedTurn] | None
    ) -> None:
        self.path = path
        self._descriptor = descriptor
        self._about = about
        self._turns = None if turns is None else [*turns]
        self._size = os.fstat(descriptor).st_size

    @property
    def name(self) -> str:
        return self.path.stem

    @property
    def unnamed(self) -> bool:
        return UNNAMED.fullmatch(self.name) is not None

    def keep(self, about: About, turns: Sequence[FinishedTurn]) -> None:
        """Have the file hold these turns: what is new is appended, what has changed is replaced.

        Raises:
            MossError: the file cannot be written; it holds what it held.
        """
        with writing(self.path):
            if self._grows(about, turns):
                assert self._turns is not None
                self._append(turns[len(self._turns) :])
            else:
                self._replace(about, turns)
        self._about, self._turns = about, [*turns]

    def _grows(self, about: About, turns: Sequence[FinishedTurn]) -> bool:
        known = self._turns
        if (
            known is None
            or about != self._about
            or len(turns) < len(known)
            or self._size > MAX_FILE_BYTES // 2
        ):
            return False
        same = all(one is other for one, other in zip(known, turns, strict=False))
        return same and os.fstat(self._descriptor).st_size == self._size

    def _append(self, turns: Sequence[FinishedTurn]) -> None:
        data = b"".join(map(turn_line, turns))
        if not data:
            return
        try:
            _write_all(self._descriptor, data, self._size)
        except BaseException:
            with contextlib.suppress(OSError):
                os.ftruncate(self._descriptor, self._size)
            raise
        self._size += len(data)
        _make_newest(self._descriptor, self.path.parent)

    def _replace(self, about: About, turns: Sequence[FinishedTurn]) -> None:
        descriptor = _create(self.path, about, turns)
        os.close(self._descriptor)
        self._descriptor = descriptor
        self._size = os.fstat(descriptor).st_size

    def remove(self) -> None:
        """Delete the file, and close it."""
        with contextlib.suppress(OSError):
            self.path.unlink()
        self.close()

    def close(self) -> None:
        """Let others write it. Closing twice is no fault."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1


def new_name() -> str:
    """A name that no other conversation has, and nobody can guess."""
    return f"{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(8)}"


def _create(path: Path, about: About, turns: Sequence[FinishedTurn]) -> int:
    """Replace ``path`` by a file of these lines in one step; returns its descriptor, which is locked.

    Where that would be too long to be read again, the oldest turns are left out.
    """
    lines, left = [], MAX_FILE_BYTES // 4
    for line in map(turn_line, reversed(turns)):
        left -= len(line)
        if left < 0:
            break
        lines.append(line)
    fresh = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    descriptor = os.open(fresh, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        _write_all(descriptor, b"".join([about_line(path.stem, about), *reversed(lines)]), 0)
        _make_newest(descriptor, path.parent)
        rename(fresh, path)
    except BaseException:
        os.close(descriptor)
        fresh.unlink(missing_ok=True)
        raise
    return descriptor


def _make_newest(descriptor: int, folder: Path) -> None:
    """Date a file after all others of its folder: which were used last is known by that, also where a clock was set back."""
    own, latest = os.fstat(descriptor), 0
    for entry in os.scandir(folder):
        with contextlib.suppress(OSError):  # it may have gone meanwhile
            if entry.inode() != own.st_ino:
                latest = max(latest, entry.stat(follow_symlinks=False).st_mtime_ns)
    if latest >= own.st_mtime_ns:
        os.utime(descriptor, ns=(latest + 1, latest + 1))


def _write_all(descriptor: int, data: bytes, offset: int) -> None:
    view = memoryview(data)
    while view:
        count = os.pwrite(descriptor, view, offset)
        view, offset = view[count:], offset + count
    os.fsync(descriptor)


def _open_locked(path: Path) -> int:
    """A descriptor of the file that has this name when it is locked: another process may just have replaced it."""
    while True:
        with _existing(path), reading(path):
            descriptor = os.open(path, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            with _existing(path), reading(path):
                if os.path.samestat(os.fstat(descriptor), path.stat()):
                    return descriptor
        except BlockingIOError as error:
            os.close(descriptor)
            raise MossError(
                f"the conversation {path.stem} is open in another moss-jt. End that one first."
            ) from error
        except OSError as error:
            os.close(descriptor)
            if error.errno not in (errno.ENOLCK, errno.ENOTSUP):
                raise MossError(f"{path} cannot be locked: {error.strerror}.") from error
            raise MossError(
                f"{path} lies where files cannot be locked. Set MOSS_JT_HOME elsewhere."
            ) from error
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)


@contextlib.contextmanager
def _existing(path: Path) -> Iterator[None]:
    try:
        yield
    except MissingFileError as error:
        raise NoConversationError(f"there is no conversation called {path.stem!r}.") from error


def about_line(name: str, about: About) -> bytes:
    own: dict[str, Any] = {
        "version": 1,
        "model": about.model,
        "system": about.system,
        "plugins": [*about.plugins],
        "sampling": dict(about.sampling),
        "plugin_settings": dict(about.plugin_settings),
    }
    if about.title:
        own["title"] = about.title
    return _line({"conversation_id": name, "meta_instruction": about.meta_instruction, "moss_jt": own})


def turn_line(turn: FinishedTurn) -> bytes:
    ways = "".join("1" if as_page else "0" for as_page in turn.ways)
    own: dict[str, Any] = {"asked": turn.asked, "dropped": turn.dropped, "ways": ways}
    if turn.sources:
        own["sources"] = {
            str(number): [source.title[:MAX_SOURCE_CHARACTERS], source.location[:MAX_SOURCE_CHARACTERS]]
            for number, source in turn.sources.items()
        }
    if turn.token_ids is not None:
        own["token_ids"] = [*turn.token_ids]
    if turn.extra:
        own["extra"] = dict(turn.extra)
    return _line({**turn.fields, "moss_jt": own})


def _line(fields: dict[str, Any]) -> bytes:
    return (json.dumps(fields, ensure_ascii=False) + "\n").encode("utf-8", "replace")


def _read(path: Path) -> Conversation:
    with _existing(path):
        data = read_small(path, MAX_FILE_BYTES)
    about: About | None = None
    turns, damaged = [], 0
    for number, line in enumerate(data.removesuffix(b"\n").split(b"\n")):
        fields = _object(line)
        if number == 0 and about_of(fields) is not None:
            about = about_of(fields)
        elif (turn := turn_of(fields)) is not None:
            turns.append(turn)
        else:
            damaged += 1
    return Conversation(path.stem, about or About(), tuple(turns), damaged)


def _object(line: bytes) -> dict[str, Any]:
    try:
        fields = json.loads(line.decode("utf-8"))
    except (ValueError, RecursionError):
        return {}
    return fields if isinstance(fields, dict) else {}


def about_of(fields: Mapping[str, Any]) -> About | None:
    """The first line; what is not as it should be is as if it were not there. None where it is none at all."""
    meta = fields.get("meta_instruction")
    if not isinstance(meta, str):
        return None
    own = _mapping(fields.get("moss_jt"))
    system, plugins = own.get("system"), own.get("plugins")
    sampling = {
        name: value
        for name, value in _mapping(own.get("sampling")).items()
        if value is None or isinstance(value, int | float) and not isinstance(value, bool)
    }
    settings = {
        name: value
        for name, value in _mapping(own.get("plugin_settings")).items()
        if name in PLUGIN_SETTINGS and isinstance(value, str)
    }
    return About(
        meta,
        system if isinstance(system, str) else None,
        tuple(name for name in plugins if isinstance(name, str)) if isinstance(plugins, list) else (),
        sampling,
        settings,
        str(own.get("model") or ""),
        str(own.get("title") or ""),
    )


def turn_of(fields: Mapping[str, Any]) -> FinishedTurn | None:
    """A turn's line, or None where it is none."""
    if not all(is_field(name, fields.get(name)) for name in FIELDS):
        return None
    own = _mapping(fields.get("moss_jt"))
    tokens = own.get("token_ids")
    sources = {
        int(number): Source(*source)
        for number, source in _mapping(own.get("sources")).items()
        if number.isdecimal() and len(number) < 5 and _is_source(source)
    }
    return FinishedTurn(
        {name: fields[name] for name in FIELDS},
        tuple(tokens) if isinstance(tokens, list) and all(map(_is_count, tokens)) else None,
        sources,
        _count(own.get("asked")),
        _count(own.get("dropped")),
        tuple(way == "1" for way in str(own.get("ways", ""))[:MAX_PAGES]),
        _mapping(own.get("extra")),
    )


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, dict) else {}


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 31


def _count(value: Any) -> int:
    return value if _is_count(value) else 0


def _is_source(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(isinstance(one, str) for one in value)
