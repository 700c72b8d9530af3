"""Files of conversations as samples: JSON lines, JSON arrays, single objects, or a folder of such files."""

import contextlib
import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from moss_jt.chat.finished_turn import FIELDS
from moss_jt.errors import MossError
from moss_jt.store.files import open_regular, read_small, reading
from moss_jt.train.formats import Losses, form_of, read_sample
from moss_jt.train.masked_samples import SampleEncoder, TokenSample

ENDINGS = (".json", ".jsonl")
# One conversation has at most a few hundred kilobytes; a longer line is no conversation.
MAX_LINE_BYTES = 16 << 20
MAX_ARRAY_BYTES = 512 << 20
NAMED_REFUSALS, NAMED_ORIGINS = 20, 5
# Of a hundred samples, which the hash of their text chooses, so that the choice stays when lines are added.
EVALUATION_PERCENT = 5


@dataclass
class DataReport:
    """What became of the data.

    forms      name of a form -> samples of it
    losses     what was left out of samples
    origins    the first lines of which something was left out, by what that was
    refused    the first lines that gave no sample: where, and why
    refusals   how many gave none
    """

    forms: Counter[str] = field(default_factory=Counter)
    losses: Losses = field(default_factory=Losses)
    origins: dict[str, list[str]] = field(default_factory=dict)
    refused: list[tuple[str, str]] = field(default_factory=list)
    refusals: int = 0

    def refuse(self, where: str, reason: str) -> None:
        self.refusals += 1
        if len(self.refused) < NAMED_REFUSALS:
            self.refused.append((where, reason))

    @contextlib.contextmanager
    def at(self, where: str) -> Iterator[None]:
        """What is left out meanwhile is left out of what stands there."""
        before = self.losses.counts.copy()
        yield
        for reason, count in self.losses.counts.items():
            origins = self.origins.setdefault(reason, [])
            if count > before[reason] and len(origins) < NAMED_ORIGINS:
                origins.append(where)

    def lines(self) -> list[str]:
        """The report as sentences, most important first."""
        told = [f"{count} samples in {name}'s form" for name, count in self.forms.most_common()]
        for what, count in self.losses.counts.most_common():
            origins = self.origins.get(what, ())
            more = ", ..." if len(origins) == NAMED_ORIGINS < count else ""
            told.append(f"left out: {count} {what}" + (f" ({', '.join(origins)}{more})" if origins else ""))
        if self.refusals:
            told.append(f"{self.refusals} lines gave no sample:")
            told += [f"  {where}: {reason}" for where, reason in self.refused]
            if self.refusals > len(self.refused):
                told.append(f"  and {self.refusals - len(self.refused)} more")
        return told


@dataclass(frozen=True)
class Dataset:
    """
    training    samples to learn from, in the files' order
    evaluation  samples to judge by; never learned
    """

    training: list[TokenSample]
    evaluation: list[TokenSample]
    report: DataReport


def read_dataset(
    path: Path,
    encoder: SampleEncoder,
    evaluation: Path | None = None,
    progress: Callable[[int], object] = lambda samples: None,
) -> Dataset:
    """All samples of a file or folder.

    evaluation  a file or folder of its own; without it every twentieth sample is kept for that
    progress    called with the number of samples so far

    Raises:
        MossError: a file cannot be read, or nothing in it can be learned.
    """
    report = DataReport()
    kept = [*_samples(path, encoder, report, progress)]
    if not kept:
        reasons = "\n".join(report.lines())
        raise MossError(f"{path} holds nothing to learn from. {reasons}".strip())
    if evaluation is not None:
        judged = [sample for _, sample in _samples(evaluation, encoder, report, progress)]
        return Dataset([sample for _, sample in kept], judged, report)
    return Dataset(
        [sample for chosen, sample in kept if not chosen] or [sample for _, sample in kept],
        [sample for chosen, sample in kept if chosen],
        report,
    )


def _samples(
    path: Path, encoder: SampleEncoder, report: DataReport, progress: Callable[[int], object]
) -> Iterator[tuple[bool, TokenSample]]:
    """Samples, and whether each is chosen for evaluation."""
    count = 0
    for where, text in _objects(path):
        try:
            fields = json.loads(text)
            with report.at(where):
                sample = encoder.encode(read_sample(fields, report.losses), report.losses)
        except (ValueError, RecursionError) as error:
            report.refuse(where, f"no JSON ({str(error)[:100]})")
        except MossError as error:
            report.refuse(where, str(error)[:300])
        else:
            count += 1
            report.forms[form_of(fields)] += 1
            progress(count)
            yield _chosen(text), sample


def _chosen(text: str) -> bool:
    digest = hashlib.sha256(text.strip().encode(errors="surrogatepass")).digest()
    return int.from_bytes(digest[:4]) % 100 < EVALUATION_PERCENT


def _objects(path: Path) -> Iterator[tuple[str, str]]:
    """Where an object stands (``FILE line 3``), and its JSON."""
    if path.is_dir():
        files = sorted(one for one in path.rglob("*") if one.suffix in ENDINGS and one.is_file())
        if not files:
            raise MossError(f"{path} holds no .json or .jsonl file.")
        for file in files:
            yield from _objects(file)
    elif path.suffix == ".jsonl":
        yield from _conversations(_lines(path))
    else:
        yield from _records_of_file(path)


def _lines(path: Path) -> Iterator[tuple[str, str]]:
    with reading(path), open_regular(path) as file:
        number = 0
        while line := file.readline(MAX_LINE_BYTES + 1):
            number += 1
            if len(line) > MAX_LINE_BYTES:
                raise MossError(f"{path}: line {number} is longer than {MAX_LINE_BYTES >> 20} MiB.")
            if line.strip():
                yield f"{path} line {number}", line.decode("utf-8-sig", "replace")


def _conversations(lines: Iterable[tuple[str, str]]) -> Iterator[tuple[str, str]]:
    """The same, where several lines are one conversation, as moss-jt chat and moss-jt serve keep them, as one object."""
    first, beginning, turns = "", None, list[Any]()
    for where, text in lines:
        fields = _saved_line(text)
        if beginning is not None and fields is not None and "Human" in fields:
            turns.append(fields)
            continue
        if beginning is not None:
            yield first, json.dumps({**beginning, "chat": turns}, ensure_ascii=False)
        if fields is None or "Human" in fields:
            beginning = None
            yield where, text
        else:
            first, beginning, turns = where, fields, []
    if beginning is not None:
        yield first, json.dumps({**beginning, "chat": turns}, ensure_ascii=False)


def _saved_line(text: str) -> dict[str, Any] | None:
    """What a line of a saved conversation says that is learned: how it begins, or a turn. None for any other line."""
    if '"moss_jt"' not in text:
        return None
    try:
        fields = json.loads(text)
    except (ValueError, RecursionError):
        return None
    if not isinstance(fields, dict) or "moss_jt" not in fields:
        return None
    if "meta_instruction" in fields and "chat" not in fields:
        return {"meta_instruction": fields["meta_instruction"]}
    return {name: fields[name] for name in FIELDS if name in fields} if "Human" in fields else None


def _records_of_file(path: Path) -> Iterator[tuple[str, str]]:
    """A file of one object, an array of them, or, under the wrong ending, of lines."""
    data = read_small(path, MAX_ARRAY_BYTES).decode("utf-8-sig", "replace")
    try:
        fields: Any = json.loads(data)
    except (ValueError, RecursionError):
        if "\n" not in data.strip():
            raise MossError(f"{path} is not JSON.") from None
        yield from _conversations(_lines(path))
        return
    if isinstance(fields, list):
        for number, one in enumerate(fields, 1):
            yield f"{path} entry {number}", json.dumps(one, ensure_ascii=False)
    else:
        yield str(path), data
