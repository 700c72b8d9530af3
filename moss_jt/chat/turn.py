"""One turn of a conversation, in two phases.

The model writes its thoughts and its commands; the commands are run; then it reads their results and writes the answer.
Without plugins the fields between question and answer say None, as trained, and nothing is thought or run.
"""

import dataclasses
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass

from moss_jt.chat.citation_reader import CitationReader
from moss_jt.chat.context import ConversationContext
from moss_jt.chat.events import Command, Event, Notice, Text, Thought
from moss_jt.chat.field_reader import FieldReader
from moss_jt.chat.prompt import (
    COMMANDS,
    MOSS,
    NONE,
    THOUGHTS,
    PromptEncoder,
    Segment,
    no_plugins,
    opening,
    question,
)
from moss_jt.chat.results_field import results_field, shortened, shown_result
from moss_jt.engine.sampling import SamplingParams
from moss_jt.errors import MossError
from moss_jt.plugins.calls import Call, parse_commands
from moss_jt.plugins.interface import Plugin, Source
from moss_jt.plugins.numbered_results import CallResult
from moss_jt.plugins.run import MAX_CALLS, iterate_results
from moss_jt.store.tokenizer import BYTE_ORDER_MARK

MAX_ANSWER_TOKENS = 1024
# About twice the longest of the recorded dialogues (172 and 218 tokens).
MAX_THOUGHT_TOKENS = 400
MAX_COMMAND_TOKENS = 400
# An answer without at least this much room is not begun.
LEAST_ANSWER_TOKENS = 32
# A rate over less time than this says nothing about the machine.
LEAST_RATE_S = 0.5
# Kept free so that a field can always be closed.
CLOSING_TOKENS = 8


@dataclass
class TurnStats:
    """What a turn cost.

    read_tokens  question, results and what is fixed
    new_tokens   written by the model
    later_tokens, later_s  of the new ones those that came after a field's first, and how long the model took for them: what
                 reading costs is not in it
    """

    read_tokens: int = 0
    new_tokens: int = 0
    later_tokens: int = 0
    later_s: float = 0.0

    @property
    def tokens_per_s(self) -> float | None:
        """How fast the model wrote; None where too little came to tell."""
        return (
            self.later_tokens / self.later_s if self.later_tokens and self.later_s >= LEAST_RATE_S else None
        )


class CancelledError(Exception):
    """The user wants no more of this answer."""


class TooLongError(MossError):
    """A message has more tokens than the context has room for, the instruction and a short answer beside it."""

    def __init__(self, tokens: int, room: int) -> None:
        super().__init__(
            f"the message has {tokens} tokens, and the context has room for {room}. Shorten it, or load the model with "
            "a larger context where the model and the memory allow it."
        )
        self.tokens, self.room = tokens, room


def fixed_tokens(encoder: PromptEncoder) -> int:
    """What a turn takes beside the question and what the model writes."""
    return len(encoder.encode([*no_plugins(), *opening(MOSS)])) + CLOSING_TOKENS


def least_tokens(encoder: PromptEncoder) -> int:
    """The shortest turn that is any use."""
    return len(encoder.encode(question("?"))) + fixed_tokens(encoder) + LEAST_ANSWER_TOKENS


class Turn:
    """Iterate over ``events`` once.

    sources  citation number -> source
    stats    what it cost
    """

    def __init__(
        self,
        context: ConversationContext,
        encoder: PromptEncoder,
        plugins: Sequence[Plugin],
        params: SamplingParams,
        max_new_tokens: int,
        cancelled: Callable[[], bool],
    ) -> None:
        self.sources: dict[int, Source] = {}
        self.stats = TurnStats()
        self._context = context
        self._encoder = encoder
        self._plugins = plugins
        self._params = params
        self._max_new_tokens = max_new_tokens
        self._cancelled = cancelled
        self._results: list[CallResult] = []
        self._answer: FieldReader | None = None
        self._answered = False  # something of the answer was shown
        self._fixed = fixed_tokens(encoder)

    def events(self, text: str) -> Generator[Event]:
        """The turn, from the question on. However it ends, the context then holds all of it, or nothing.

        Raises:
            TooLongError: the text is longer than the context.
            MossError: the model failed.
        """
        asked = self._encoder.encode(question(text.removeprefix(BYTE_ORDER_MARK)))
        self._check_length(len(asked))
        self._context.abandon_turn()  # what a turn may have left that was interrupted while it settled
        try:
            yield from self._make_room(len(asked) + self._fixed)
            self._append_ids(asked)
            if self._plugins:
                yield from self._think()
                yield from self._run((yield from self._command()))
            else:
                self._append(no_plugins())
            yield from self._reply()
        except (KeyboardInterrupt, CancelledError):
            self._settle()
            yield Notice("stopped")
        finally:
            self._settle()

    def _think(self) -> Iterator[Event]:
        self._append(opening(THOUGHTS))
        reader = self._field(THOUGHTS)
        shown = ""
        for piece in self._all(reader, MAX_THOUGHT_TOKENS):
            shown += piece
            if not NONE.startswith(shown):  # a thought that says None is none
                yield Thought(shown)
                shown = ""
        self._close(reader)

    def _command(self) -> Generator[Event, None, list[Call]]:
        """The calls that the model writes; each is announced once it is written."""
        self._append(opening(COMMANDS))
        reader = self._field(COMMANDS)
        announced = 0
        for _ in self._all(reader, MAX_COMMAND_TOKENS):
            for call in parse_commands(reader.text)[announced:MAX_CALLS]:
                announced += 1
                yield Command(call.text)
        self._close(reader)
        calls = parse_commands(reader.text)
        if len(calls) > MAX_CALLS:
            yield Notice("commands_cut", {"commands": len(calls), "limit": MAX_CALLS})
        return calls[:MAX_CALLS]

    def _run(self, calls: list[Call]) -> Iterator[Event]:
        """Run the calls, and write their results into the turn."""
        for result in iterate_results(calls, self._plugins):
            self._results.append(result)
            self.sources.update(zip(result.numbers, result.sources, strict=True))
            yield shown_result(result)
            if self._cancelled():
                raise CancelledError
        token_ids = self._encoder.encode(results_field(self._results))
        keep = len(self._encoder.encode(opening(MOSS))) + CLOSING_TOKENS
        yield from self._make_room(len(token_ids) + keep)
        most = self._context.room - keep - LEAST_ANSWER_TOKENS
        if len(token_ids) > most:
            yield Notice("results_cut")
            token_ids = self._encoder.encode(shortened(self._results, self._encoder, most))
        self._append_ids(token_ids)

    def _reply(self) -> Iterator[Event]:
        self._append(opening(MOSS))
        self._answer = self._field(MOSS)
        citations, end, left = CitationReader(), "", self._max_new_tokens
        while True:
            before = self.stats.new_tokens
            for piece in self._pieces(self._answer, left, CLOSING_TOKENS):
                yield from self._show(citations.push(piece))
            left -= self.stats.new_tokens - before
            if self._answer.ending != "length":
                break
            if left <= 0:
                end = "cut"
                break
            gone = list(self._make_room(left))
            if not gone:
                end = "full"
                break
            yield from gone
        for piece in self._answer.rest():
            yield from self._show(citations.push(piece))
        yield from self._show(citations.finish())
        self._cite(citations.cited)
        if not self._answered:
            end = "empty"
        self._finish()
        if end:
            yield Notice(end, {"tokens": self._max_new_tokens} if end == "cut" else {})

    def _show(self, text: str) -> Iterator[Event]:
        if text:
            self._answered = True
            yield Text(text)

    def _cite(self, numbers: Iterable[int]) -> None:
        """MOSS also cites results that have no number, by counting them."""
        for number in numbers:
            if number not in self.sources and 0 < number <= len(self._results):
                result = shown_result(self._results[number - 1])
                if result.found and not result.sources:
                    self.sources[number] = Source(f"{result.command} → {result.text}", "")

    # What is common to the fields.

    def _check_length(self, message: int) -> None:
        room = self._context.most_room - self._fixed - LEAST_ANSWER_TOKENS
        if message > room:
            raise TooLongError(message, max(0, room))

    def _make_room(self, tokens: int) -> Iterator[Event]:
        """Room for tokens and a good part of an answer, if need be by dropping the oldest turns."""
        spare = max(LEAST_ANSWER_TOKENS, self._context.session.capacity // 8)
        gone = self._context.make_room(tokens + spare)
        if gone:
            yield Notice("dropped", {"turns": gone})

    def _append(self, segments: Iterable[Segment]) -> None:
        self._append_ids(self._encoder.encode(segments))

    def _append_ids(self, token_ids: Sequence[int]) -> None:
        self._context.append(token_ids)
        self.stats.read_tokens += len(token_ids)

    def _field(self, role: str) -> FieldReader:
        """A reader of the field that the model writes now."""
        return FieldReader(self._context, self._encoder, role, self._cancelled)

    def _pieces(self, reader: FieldReader, most: int, keep: int) -> Iterator[str]:
        """Text as the model writes it, of at most so many tokens, with ``keep`` left for what comes after the field."""
        before = self._context.session.position
        # Every token took a random number; each part of the turn goes on with the next one.
        params = dataclasses.replace(self._params, drawn=self.stats.new_tokens)
        yield from reader.read(params, min(most, self._context.room - keep))
        self.stats.later_tokens += reader.later_tokens
        self.stats.later_s += reader.later_s
        self.stats.new_tokens += self._context.session.position - before
        if reader.ending == "cancelled":
            raise CancelledError

    def _all(self, reader: FieldReader, most: int) -> Iterator[str]:
        """All text of a field of the first phase."""
        yield from self._pieces(reader, most, self._fixed + LEAST_ANSWER_TOKENS)
        yield from reader.rest()

    def _close(self, reader: FieldReader) -> None:
        """End a field of the first phase; a model that wrote nothing meant none."""
        if not reader.text.strip():
            reader.replace(f" {NONE}")
        reader.close()
        self._append([Segment("\n")])

    def _finish(self) -> None:
        """The turn is complete: end its answer."""
        if self._answer is not None:
            self._answer.close()
        self._append([Segment("\n")])
        self._context.finish_turn(self)

    def _settle(self) -> None:
        """After an interruption: keep what was shown of the answer, or forget the turn."""
        if self._context.has(self):
            return
        if self._answered and self._answer is not None:
            self._answer.cut()
            self._finish()
        else:
            self._context.abandon_turn()
