"""A checkpoint's tokens: from vocab.json and merges.txt, or from the tokenizer.json that newer programs write instead."""

from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moss_jt.errors import MissingFileError, MossError
from moss_jt.store.files import read_json, read_small

CLASSIC_FILES, SINGLE_FILE = ("vocab.json", "merges.txt"), "tokenizer.json"


@dataclass(frozen=True)
class Vocabulary:
    """``added``, ``special``: the added tokens that tokenizer.json lists; empty where other files list them."""

    tokens: dict[str, Any]
    merges: list[tuple[str, str]]
    added: dict[str, int]
    special: set[str]


def required_files(names: Collection[str]) -> tuple[str, ...]:
    """The files that a checkpoint with these files is read from."""
    return (SINGLE_FILE,) if SINGLE_FILE in names and CLASSIC_FILES[0] not in names else CLASSIC_FILES


def read_vocabulary(fetch: Callable[[str], Path]) -> Vocabulary:
    """The tokens of a checkpoint whose files ``fetch`` gives by name.

    Raises:
        MossError: a file is missing or damaged, or describes a tokenizer of another kind; it is named.
    """
    single = optional_file(fetch, SINGLE_FILE)
    if single is not None and optional_file(fetch, CLASSIC_FILES[0]) is None:
        return _from_tokenizer_json(single)
    return Vocabulary(read_json(fetch("vocab.json")), _read_merges(fetch("merges.txt")), {}, set())


def optional_file(fetch: Callable[[str], Path], name: str) -> Path | None:
    """The path of a file that a checkpoint may have."""
    try:
        path = fetch(name)
    except MissingFileError:
        return None
    return path if path.exists() else None


def _from_tokenizer_json(path: Path) -> Vocabulary:
    fields = read_json(path)
    model = fields.get("model")
    if not isinstance(model, dict) or model.get("type", "BPE") != "BPE" or not _has_byte_level(fields):
        raise MossError(
            f"{path} describes another kind of tokenizer than MOSS's and CodeGen's byte-level BPE."
        )
    tokens, merges = model.get("vocab"), model.get("merges")
    if not isinstance(tokens, dict) or not isinstance(merges, list):
        raise MossError(f"{path}: the model's vocab or merges are missing.")
    pairs = [tuple(merge.split(" ") if isinstance(merge, str) else _strings(merge)) for merge in merges]
    if not all(len(pair) == 2 for pair in pairs):
        raise MossError(f"{path}: merges holds something that is not a merge of two tokens.")
    added: dict[str, int] = {}
    special: set[str] = set()
    for entry in _objects(fields.get("added_tokens")):
        token, number = entry.get("content"), entry.get("id")
        if not isinstance(token, str) or type(number) is not int or added.setdefault(token, number) != number:
            raise MossError(f"{path}: added_tokens holds something that is not a token with an id.")
        if entry.get("special") is True:
            special.add(token)
    return Vocabulary(tokens, [(first, second) for first, second in pairs], added, special)


def _has_byte_level(fields: dict[str, Any]) -> bool:
    """Whether the text is cut into bytes, as the first step or one of several."""
    step = fields.get("pre_tokenizer")
    steps = [step, *_objects(step.get("pretokenizers"))] if isinstance(step, dict) else []
    return any(step.get("type") == "ByteLevel" for step in steps)


def _objects(values: Any) -> list[dict[str, Any]]:
    return [value for value in values if isinstance(value, dict)] if isinstance(values, list) else []


def _strings(values: Any) -> list[str]:
    return [value for value in values if isinstance(value, str)] if isinstance(values, list) else []


def _read_merges(path: Path) -> list[tuple[str, str]]:
    try:
        text = read_small(path).decode("utf-8-sig")
    except ValueError as error:
        raise MossError(f"{path} cannot be read: {error}") from error
    merges = []
    for line in text.split("\n"):
        parts = line.split(" ")
        if line.startswith("#version") or not line:
            continue
        if len(parts) != 2:
            raise MossError(f"{path}: {line[:60]!r} is not a merge of two tokens.")
        merges.append((parts[0], parts[1]))
    return merges
