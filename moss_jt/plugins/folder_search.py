"""A full-text index over the user's own text files: SQLite's FTS5, Chinese and English, with no network.

Chinese has no spaces between words, so every pair of neighbouring Chinese characters is indexed as a word, and single ones
too. The index lives in the user's cache directory; each search first looks for files that have changed.
"""

import hashlib
import os
import re
import sqlite3
import threading
from collections.abc import Iterator
from pathlib import Path

from moss_jt.errors import MossError
from moss_jt.plugins.interface import Item, Source

SUFFIXES = {
    ".txt",
    ".md",
    ".rst",
    ".csv",
    ".tsv",
    ".json",
    ".html",
    ".htm",
    ".py",
    ".c",
    ".cpp",
    ".h",
    ".java",
    ".log",
    ".tex",
}
MAX_FILES = 20_000
MAX_FILE_BYTES = 8 << 20
PASSAGE_CHARACTERS = 300
MAX_TERMS = 40
ENCODINGS = ("utf-8-sig", "gb18030")
CHINESE = "\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
WORD = re.compile(rf"[{CHINESE}]+|[^\W{CHINESE}]+")
SENTENCE_END = re.compile(r"(?<=[。！？!?\n])|(?<=\. )")


def terms(text: str) -> list[str]:
    """What a text is indexed and searched by: lower-case words, and pairs of neighbouring Chinese characters."""
    found: list[str] = []
    for word in WORD.findall(text.lower()):
        if re.match(f"[{CHINESE}]", word):
            found += [word[i : i + 2] for i in range(len(word) - 1)] or [word]
        else:
            found.append(word)
    return found


def passages(text: str) -> Iterator[str]:
    """A text in pieces of about PASSAGE_CHARACTERS, cut between sentences where there are any."""
    piece = ""
    for sentence in SENTENCE_END.split(text):
        for start in range(0, len(sentence), PASSAGE_CHARACTERS):
            part = sentence[start : start + PASSAGE_CHARACTERS]
            if piece and len(piece) + len(part) > PASSAGE_CHARACTERS:
                yield piece.strip()
                piece = ""
            piece += part
    if piece.strip():
        yield piece.strip()


def read_text(path: Path) -> str | None:
    """A file's text in one of ENCODINGS; None for a binary file, or one that cannot be read."""
    try:
        data = path.read_bytes()
    except OSError:
        return None
    if b"\0" in data[:4096]:
        return None
    for encoding in ENCODINGS:
        try:
            return data.decode(encoding)
        except UnicodeDecodeError:
            continue
    return None


class FolderSearch:
    """Search in the text files below a folder. Symbolic links are not followed; hidden files are passed over.

    Raises:
        MossError: the folder is not there, or its index cannot be written.
    """

    def __init__(self, folder: Path, index_folder: Path | None = None) -> None:
        if not folder.is_dir():
            raise MossError(f"--search-folder {folder} is no folder.")
        self.folder = folder.resolve()
        self._lock = threading.Lock()
        try:
            self._open(index_folder or cache_folder())
            self.refresh()
        except (sqlite3.Error, OSError) as error:
            raise MossError(f"the index of {folder} cannot be written: {error}.") from error

    def _open(self, index_folder: Path) -> None:
        index_folder.mkdir(parents=True, exist_ok=True)
        name = hashlib.sha256(str(self.folder).encode()).hexdigest()[:16]
        self.path = index_folder / f"{name}.sqlite3"
        self._db = sqlite3.connect(self.path, check_same_thread=False, timeout=30)
        self._db.executescript(
            "CREATE TABLE IF NOT EXISTS files (path TEXT PRIMARY KEY, size INTEGER, mtime_ns INTEGER);"
            "CREATE TABLE IF NOT EXISTS passages (id INTEGER PRIMARY KEY, path TEXT, text TEXT);"
            "CREATE INDEX IF NOT EXISTS by_path ON passages (path);"
            "CREATE VIRTUAL TABLE IF NOT EXISTS words USING fts5(terms);"
        )

    def refresh(self) -> None:
        """Index what is new or changed, forget what is gone."""
        with self._lock, self._db:
            known = {path: (size, mtime) for path, size, mtime in self._db.execute("SELECT * FROM files")}
            seen = dict(self._files())
            for path in known.keys() - seen.keys():
                self._forget(path)
            for path, state in seen.items():
                if known.get(path) != state:
                    self._forget(path)
                    self._add(path, state)

    def _files(self) -> Iterator[tuple[str, tuple[int, int]]]:
        """(path, (size, time)) of every text file, at most MAX_FILES."""
        count = 0
        for root, folders, files in os.walk(self.folder):
            folders[:] = sorted(name for name in folders if not name.startswith("."))
            for name in sorted(files):
                path = Path(root) / name
                if name.startswith(".") or path.suffix.lower() not in SUFFIXES or path.is_symlink():
                    continue
                state = path.stat()
                if state.st_size <= MAX_FILE_BYTES and count < MAX_FILES:
                    count += 1
                    yield str(path), (state.st_size, state.st_mtime_ns)

    def _forget(self, path: str) -> None:
        for (number,) in self._db.execute("SELECT id FROM passages WHERE path = ?", (path,)).fetchall():
            self._db.execute("DELETE FROM words WHERE rowid = ?", (number,))
        self._db.execute("DELETE FROM passages WHERE path = ?", (path,))
        self._db.execute("DELETE FROM files WHERE path = ?", (path,))

    def _add(self, path: str, state: tuple[int, int]) -> None:
        text = read_text(Path(path))
        for passage in passages(text or ""):
            row = self._db.execute(
                "INSERT INTO passages (path, text) VALUES (?, ?)", (path, passage)
            ).lastrowid
            words = " ".join(terms(f"{Path(path).stem} {passage}"))
            self._db.execute("INSERT INTO words (rowid, terms) VALUES (?, ?)", (row, words))
        self._db.execute("INSERT INTO files VALUES (?, ?, ?)", (path, *state))

    def search(self, query: str, wanted: int) -> list[Item]:
        """The passages that share the most and the rarest words with the query (BM25), one per file at first."""
        self.refresh()
        words = list(dict.fromkeys(terms(query)))[:MAX_TERMS]
        if not words:
            return []
        match = " OR ".join(f'"{word}"' for word in words)
        with self._lock:
            rows = self._db.execute(
                "SELECT p.path, p.text FROM words JOIN passages p ON p.id = words.rowid WHERE words MATCH ? ORDER BY rank LIMIT 50",
                (match,),
            ).fetchall()
        first_of_file = {path: text for path, text in reversed(rows)}
        ordered = [row for row in rows if first_of_file[row[0]] == row[1]]
        ordered += [row for row in rows if first_of_file[row[0]] != row[1]]
        return [Item(text, Source(Path(path).name, path)) for path, text in ordered[:wanted]]

    def close(self) -> None:
        self._db.close()


def cache_folder() -> Path:
    """moss-jt/search in the user's cache directory, or in MOSS_JT_HOME."""
    if home := os.environ.get("MOSS_JT_HOME"):
        return Path(home).expanduser() / "search"
    cache = os.environ.get("XDG_CACHE_HOME")
    return (Path(cache) if cache else Path.home() / ".cache") / "moss-jt" / "search"
