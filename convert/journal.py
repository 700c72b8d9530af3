"""What a conversion has finished so far, so that the next run goes on from there."""

import json
from pathlib import Path
from typing import Any

from moss_jt.convert.disk import write_text
from moss_jt.errors import MossError
from moss_jt.store.model_folder import read_json

JOURNAL = "journal.json"


def write_json(path: Path, fields: dict[str, Any]) -> None:
    write_text(path, json.dumps(fields, indent=1, ensure_ascii=False) + "\n")


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
            path = folder / name
            if path.exists() and isinstance(entry, dict) and path.stat().st_size == entry.get("bytes"):
                self.files[name] = entry

    def add(self, name: str, entry: dict[str, Any]) -> None:
        self.files[name] = entry
        write_json(self.path, {"identity": self.identity, "files": self.files})

    def remove(self) -> None:
        self.path.unlink(missing_ok=True)
