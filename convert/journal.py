"""What a conversion has finished so far, so that the next run goes on from there."""

from pathlib import Path
from typing import Any

from moss_jt.errors import MossError
from moss_jt.store.files import read_json, write_json
from moss_jt.store.manifest import file_entry

JOURNAL = "journal.json"


class Journal:
    """The finished files of a model folder that is being written from the source with this identity."""

    def __init__(self, folder: Path, identity: dict[str, Any]) -> None:
        self.path = folder / JOURNAL
        self.identity = identity
        self.files: dict[str, Any] = {}
        self.restarted = False
        if self.path.exists():
            self._read(folder)

    def _read(self, folder: Path) -> None:
        try:
            fields = read_json(self.path)
        except MossError:
            fields = {}
        if fields.get("identity") != self.identity or not isinstance(fields.get("files"), dict):
            self.restarted = True
            return
        for name, entry in fields["files"].items():
            if _is_there(folder, name, entry):
                self.files[name] = entry

    def add(self, name: str, entry: dict[str, Any]) -> None:
        self.files[name] = entry
        self.write()

    def write(self) -> None:
        write_json(self.path, {"identity": self.identity, "files": self.files})

    def remove(self) -> None:
        self.path.unlink(missing_ok=True)


def _is_there(folder: Path, name: str, entry: Any) -> bool:
    """Whether the file is there with the size that its entry says; a damaged entry says nothing."""
    try:
        return (folder / name).stat().st_size == file_entry(entry, name).n_bytes
    except (OSError, ValueError, MossError):
        return False
