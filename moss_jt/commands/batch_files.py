"""The files of moss-jt batch: what is to be answered, and the answers, which are never lost and never taken for others."""

import contextlib
import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO, NoReturn

from moss_jt.chat.batch import Defaults, parse_line, standing
from moss_jt.errors import MossError
from moss_jt.store.tokenizer import Tokenizer

MAX_LINE = 16 << 20  # bytes
MARK_BYTES = 20
BEFORE = ".before"


def lines_of(prompts: Path) -> Iterator[tuple[int, str]]:
    """Lines that hold something, with their numbers in the file, from 1.

    Raises:
        MossError: the file cannot be read, or is no text in lines.
    """
    try:
        with prompts.open("rb") as file:
            for number in itertools.count(1):
                raw = file.readline(MAX_LINE + 1)
                if not raw:
                    return
                if len(raw) > MAX_LINE:
                    raise MossError(
                        f"{prompts} has a line of more than {MAX_LINE >> 20} MiB. One prompt is one line."
                    )
                text = raw.decode("utf-8-sig" if number == 1 else "utf-8")
                if text.strip():
                    yield number, text
    except (OSError, ValueError) as error:
        raise MossError(f"{prompts} cannot be read as lines of UTF-8 text: {error}.") from error


@dataclass
class Survey:
    """What a look at all lines finds.

    total    how many there are
    longest  the most tokens that one needs with its answer
    faults   what is wrong with a line, by its number in the file
    """

    total: int = 0
    longest: int = 0
    faults: dict[int, str] = field(default_factory=dict)

    @staticmethod
    def of(prompts: Path, tokenizer: Tokenizer, defaults: Defaults) -> "Survey":
        survey = Survey()
        for number, line in lines_of(prompts):
            survey.total += 1
            try:
                request = parse_line(line, tokenizer, defaults)
            except MossError as error:
                survey.faults[number] = str(error)
                continue
            needed = len(request.token_ids) + max(0, request.max_new_tokens)
            survey.longest = max(survey.longest, needed)
        return survey


@dataclass
class Work:
    """The answers' file. It always holds the answers to the first lines, in order, and nothing else.

    Where lines are to be answered again, what the file held is kept beside it meanwhile, under ``BEFORE``, and good answers are
    taken from there when their turn comes: a kill loses none of them.
    """

    prompts: Path
    answers: Path
    model: str
    survey: Survey
    _file: BinaryIO | None = None

    @property
    def before(self) -> Path:
        return self.answers.with_name(self.answers.name + BEFORE)

    @contextlib.contextmanager
    def resumed(self) -> Iterator[int]:
        """Yields how many lines need nothing more, with the file open behind them.

        Raises:
            MossError: the file holds something else.
        """
        if not self.before.exists() and self._has_old_errors():
            self.answers.replace(self.before)
        with self.answers.open("a+b") as self._file:
            done, _ = self._check(self._file)
            yield done

    def _has_old_errors(self) -> bool:
        """Whether a line that had an error can be answered now."""
        if not self.answers.exists():
            return False
        with self.answers.open("rb") as file:
            return self._check(file)[1]

    def _check(self, file: BinaryIO) -> tuple[int, bool]:
        """How many answers a file holds, and whether one of them is to be made again; what a kill cut off is removed."""
        file.seek(0)
        done, end, again = 0, 0, False
        for (number, line), raw in zip(lines_of(self.prompts), _results(file), strict=False):
            state = standing(raw.decode("utf-8", "replace"), done, self.model, line)
            if state == "foreign":
                self._refuse(done + 1)
            again |= state == "old error" or (state == "error" and number not in self.survey.faults)
            done, end = done + 1, end + len(raw)
        if done == self.survey.total and file.readline(1):
            self._refuse(done + 1)
        if file.writable():
            file.seek(end)
            if not _cut_off(file.read(MARK_BYTES)):
                self._refuse(done + 1)
            file.truncate(end)
            file.seek(end)
        return done, again

    def _refuse(self, number: int) -> NoReturn:
        raise MossError(
            f"{self.answers} does not belong to {self.prompts} and {self.model}: its line {number} differs. Remove it, or give "
            "another name."
        )

    def kept(self, done: int) -> Iterator[bytes | None]:
        """For each line after the first ``done``: its good answer of before, or None."""
        with contextlib.ExitStack() as stack:
            results: Iterator[bytes] = iter(())
            if self.before.exists():
                results = _results(stack.enter_context(self.before.open("rb")))
            for index, (number, line) in enumerate(lines_of(self.prompts)):
                raw = next(results, None)
                if index < done:
                    continue
                text = "" if raw is None else raw.decode("utf-8", "replace")
                state = standing(text, index, self.model, line)
                good = state == "answer" or (state == "error" and number in self.survey.faults)
                yield raw if good else None

    def write(self, line: bytes) -> None:
        assert self._file is not None
        self._file.write(line)
        self._file.flush()

    def finish(self) -> list[int]:
        """Every line has its answer; returns the numbers of those that have an error."""
        self.before.unlink(missing_ok=True)
        with self.answers.open("rb") as file:
            pairs = zip(lines_of(self.prompts), _results(file), strict=False)
            return [
                number
                for index, ((number, line), raw) in enumerate(pairs)
                if standing(raw.decode("utf-8", "replace"), index, self.model, line) != "answer"
            ]


def _cut_off(rest: bytes) -> bool:
    """Whether what stands behind the last complete line can be the beginning of one of ours."""
    return any(
        rest.startswith(mark) or mark.startswith(rest) for mark in (b'{"index": ', b'{"id": "batch_req_')
    )


def _results(file: BinaryIO) -> Iterator[bytes]:
    """Complete lines."""
    while (raw := file.readline(MAX_LINE)).endswith(b"\n"):
        yield raw
