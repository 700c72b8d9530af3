"""A full-text index over the user's own text files: SQLite's FTS5, Chinese and English, with no network.

Chinese has no spaces between words, so every pair of neighbouring Chinese characters is indexed as a word, and single ones
too. The index lives in the user's cache directory; each search first looks for files that have changed.
"""

import hashlib
import os
import re
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from moss_jt.errors import MossError, Reason
from moss_jt.plugins.interface import Item, Source
from moss_jt.plugins.text_files import State, read_text, shown_path, text_files
from moss_jt.user_folders import own_folder

# (files done, files in all)
Progress = Callable[[int, int], None]
Notice = Callable[[str], None]

VERSION = 3  # of the index; another one is made anew
LOCK_S = 5.0  # another program may be writing the same index
REFRESH_S = 8.0  # of a search's own time

PASSAGE_CHARACTERS = 300
MAX_TERMS = 40
CHINESE = "\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
WORD = re.compile(rf"[{CHINESE}]+|[^\W{CHINESE}]+")
CHINESE_RUN = re.compile(f"[{CHINESE}]+")
SINGLE = re.compile(f"[{CHINESE}]")
SENTENCE_END = re.compile(r"(?<=[。！？!?\n])|(?<=\. )")


def terms(text: str) -> list[str]:
    """What a text is indexed and searched by: lower-case words, and pairs of neighbouring Chinese characters."""
    terms: list[str] = []
    for word in WORD.findall(text.lower()):
        if re.match(f"[{CHINESE}]", word):
            terms += [word[i : i + 2] for i in range(len(word) - 1)] or [word]
        else:
            terms.append(word)
    return terms


def indexed(text: str) -> list[str]:
    """The terms of a text, and the last character of every Chinese run, so that single characters are found too."""
    return [*terms(text), *(run[-1] for run in CHINESE_RUN.findall(text) if len(run) > 1)]


def passages(text: str) -> Iterator[str]:
    """A text in passages of about PASSAGE_CHARACTERS, cut between sentences where there are any."""
    passage = ""
    for sentence in SENTENCE_END.split(text):
        for start in range(0, len(sentence), PASSAGE_CHARACTERS):
            part = sentence[start : start + PASSAGE_CHARACTERS]
            if passage and len(passage) + len(part) > PASSAGE_CHARACTERS:
                yield passage.strip()
                passage = ""
            passage += part
    if passage.strip():
        yield passage.strip()


class FolderSearch:
    """Search in the text files below a folder. Symbolic links are not followed; hidden files are passed over.

    Args:
        folder: it is indexed at once, which takes minutes the first time where it is large.
        index_folder: where the index is kept.
        progress: called with (files done, files in all) while it is indexed.
        notice: called with what is left out, in one sentence, where anything is.

    Raises:
        MossError: the folder is not there, or its index cannot be written.
    """

    def __init__(
        self,
        folder: Path,
        index_folder: Path | None = None,
        progress: Progress | None = None,
        notice: Notice | None = None,
    ) -> None:
        if not folder.is_dir():
            raise MossError(Reason("--search-folder {folder} is not a folder.", folder=folder))
        self.folder = folder.resolve()
        self._lock = threading.Lock()
        try:
            self._open(index_folder or cache_folder())
            left_out = self.refresh(progress=progress)
        except (sqlite3.Error, OSError) as error:
            raise MossError(
                Reason("the index of {folder} cannot be written: {error}.", folder=folder, error=error)
            ) from error
        if left_out and notice is not None:
            shown = shown_path(os.fsencode(folder))
            notice(Reason("Not all of {folder} is searched: {left_out}.", folder=shown, left_out=left_out))

    def _open(self, index_folder: Path) -> None:
        index_folder.mkdir(parents=True, exist_ok=True, mode=0o700)  # it holds the text of the user's files
        name = hashlib.sha256(os.fsencode(self.folder)).hexdigest()[:16]
        self.path = index_folder / f"{name}.sqlite3"
        try:
            self._db = self._connected()
        except sqlite3.DatabaseError as error:
            if isinstance(error, sqlite3.OperationalError):  # locked, or not to be written: not damaged
                raise
            self.path.unlink()
            self._db = self._connected()

    def _connected(self) -> sqlite3.Connection:
        """The index, made anew where it is missing or was written by another version."""
        database = sqlite3.connect(self.path, check_same_thread=False, timeout=LOCK_S)
        try:
            if database.execute("PRAGMA user_version").fetchone()[0] != VERSION:
                database.executescript(
                    "DROP TABLE IF EXISTS files; DROP TABLE IF EXISTS passages; DROP TABLE IF EXISTS words;"
                    "CREATE TABLE files (path BLOB PRIMARY KEY, size INTEGER, mtime_ns INTEGER);"
                    "CREATE TABLE passages (id INTEGER PRIMARY KEY, path BLOB, text TEXT);"
                    "CREATE INDEX by_path ON passages (path);"
                    "CREATE VIRTUAL TABLE words USING fts5(terms, tokenize='porter unicode61 remove_diacritics 2');"
                    f"PRAGMA user_version = {VERSION};"
                )
        except sqlite3.Error:
            database.close()
            raise
        return database

    def refresh(self, limit_s: float | None = None, progress: Progress | None = None) -> str:
        """Index what is new or changed, forget what is gone; after ``limit_s`` the rest is left for the next time.

        Returns:
            what the bounds leave out, for the user; empty where they leave out nothing.
        """
        end = None if limit_s is None else time.monotonic() + limit_s
        with self._lock:
            known = {path: (size, at) for path, size, at in self._db.execute("SELECT * FROM files")}
            files = text_files(self.folder)
            seen = files.states
            changed = [path for path in known.keys() - seen.keys()]
            changed += [path for path, state in seen.items() if known.get(path) != state]
            for done, path in enumerate(changed):
                if end is not None and time.monotonic() > end:
                    break
                if progress is not None:
                    progress(done, len(changed))
                with self._db:  # file by file, so that an interruption loses nothing
                    self._forget(path)
                    if path in seen:
                        self._add(path, seen[path])
            else:
                if progress is not None and changed:
                    progress(len(changed), len(changed))
        return files.left_out

    def _forget(self, path: bytes) -> None:
        for (number,) in self._db.execute("SELECT id FROM passages WHERE path = ?", (path,)).fetchall():
            self._db.execute("DELETE FROM words WHERE rowid = ?", (number,))
        self._db.execute("DELETE FROM passages WHERE path = ?", (path,))
        self._db.execute("DELETE FROM files WHERE path = ?", (path,))

    def _add(self, path: bytes, state: State) -> None:
        text = read_text(path)
        stem = Path(shown_path(path)).stem
        for passage in passages(text or ""):
            row = self._db.execute(
                "INSERT INTO passages (path, text) VALUES (?, ?)", (path, passage)
            ).lastrowid
            words = " ".join(indexed(f"{stem} {passage}"))
            self._db.execute("INSERT INTO words (rowid, terms) VALUES (?, ?)", (row, words))
        self._db.execute("INSERT INTO files VALUES (?, ?, ?)", (path, *state))

    def search(self, query: str, wanted: int) -> list[Item]:
        """The passages that share the most and the rarest words with the query (BM25), one per file at first."""
        try:
            self.refresh(REFRESH_S)
        except (
            sqlite3.OperationalError
        ):  # another program is writing the index: what is there can be searched
            self._db.rollback()
        words = list(dict.fromkeys(terms(query)))[:MAX_TERMS]
        if not words:
            return []
        # A single Chinese character stands in the index as the first one of a pair, or alone at a run's end.
        match = " OR ".join(f'"{word}"*' if SINGLE.fullmatch(word) else f'"{word}"' for word in words)
        with self._lock:
            rows = self._db.execute(
                "SELECT p.path, p.text FROM words JOIN passages p ON p.id = words.rowid WHERE words MATCH ? ORDER BY rank LIMIT 50",
                (match,),
            ).fetchall()
        first_of_file = {path: text for path, text in reversed(rows)}
        ordered = [row for row in rows if first_of_file[row[0]] == row[1]]
        ordered += [row for row in rows if first_of_file[row[0]] != row[1]]
        return [Item(text, _source(path)) for path, text in ordered[:wanted]]

    def close(self) -> None:
        self._db.close()


def _source(path: bytes) -> Source:
    shown = shown_path(path)
    return Source(Path(shown).name, shown)


def cache_folder() -> Path:
    """moss-jt/search in the user's cache directory, or in MOSS_JT_HOME."""
    return own_folder("CACHE", ".cache") / "search"
