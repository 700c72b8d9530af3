"""One turn of a conversation, in two phases.

The model writes its thoughts and its commands; the commands are run; then it reads their results and writes the answer.
Without plugins the fields between question and answer say None, as trained, and nothing is thought or run.
"""

from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass

from moss_jt.chat.citations import CitationReader
from moss_jt.chat.context import ConversationContext
from moss_jt.chat.events import Command, Event, Text, Thought
from moss_jt.chat.field_reader import FieldReader
from moss_jt.chat.language import Language
from moss_jt.chat.notices import notice
from moss_jt.chat.prompt import (
    COMMANDS,
    MOSS,
    NONE,
    THOUGHTS,
    Piece,
    PromptEncoder,
    no_plugins,
    opening,
    question,
)
from moss_jt.chat.results_field import results_field, shortened, shown_result
from moss_jt.engine.sampling import SamplingParams
from moss_jt.errors import MossError
from moss_jt.plugins.calls import Call, parse_commands
from moss_jt.plugins.interface import Plugin, Source
from moss_jt.plugins.run import MAX_CALLS, CallResult, iterate_results

MAX_ANSWER_TOKENS = 1024
# About twice the longest of the recorded dialogues (172 and 218 tokens).
MAX_THOUGHT_TOKENS = 400
MAX_COMMAND_TOKENS = 400
# An answer without at least this much room is not begun.
LEAST_ANSWER_TOKENS = 32
# Kept free so that a field can always be closed.
CLOSING_TOKENS = 8


@dataclass
class TurnStats:
    """Tokens of a turn: read (question, results and what is fixed), and new (written by the model)."""

    read_tokens: int = 0
    new_tokens: int = 0


class CancelledError(Exception):
    """The user wants no more of this answer."""


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
        language: Language,
        cancelled: Callable[[], bool],
    ) -> None:
        self.sources: dict[int, Source] = {}
        self.stats = TurnStats()
        self._context = context
        self._encoder = encoder
        self._plugins = plugins
        self._params = params
        self._max_new_tokens = max_new_tokens
        self._language = language
        self._cancelled = cancelled
        self._results: list[CallResult] = []
        self._answer: FieldReader | None = None
        self._answered = False  # something of the answer was shown
        self._settled = False
        # What a turn has beside the question and what the model writes.
        self._fixed = len(encoder.encode([*no_plugins(), *opening(MOSS)])) + CLOSING_TOKENS

    def events(self, text: str) -> Generator[Event]:
        """The whole turn. However it ends, the context then holds it whole, or not at all.

        Raises:
            MossError: the text is longer than the context, or the model failed.
        """
        asked = self._encoder.encode(question(text))
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
            yield notice("stopped", self._language)
        finally:
            self._settle()

    def _think(self) -> Iterator[Event]:
        self._append(opening(THOUGHTS))
        reader = self._field(THOUGHTS, MAX_THOUGHT_TOKENS, self._fixed + LEAST_ANSWER_TOKENS)
        shown = ""
        for piece in self._pieces(reader):
            shown += piece
            if not NONE.startswith(shown):  # a thought that says None is none
                yield Thought(shown)
                shown = ""
        self._close(reader)

    def _command(self) -> Generator[Event, None, list[Call]]:
        """The calls that the model writes; each is announced once it is written."""
        self._append(opening(COMMANDS))
        reader = self._field(COMMANDS, MAX_COMMAND_TOKENS, self._fixed + LEAST_ANSWER_TOKENS)
        announced = 0
        for _ in self._pieces(reader):
            for call in parse_commands(reader.text)[announced:MAX_CALLS]:
                announced += 1
                yield Command(call.text)
        self._close(reader)
        calls = parse_commands(reader.text)
        if len(calls) > MAX_CALLS:
            yield notice("commands_cut", self._language, commands=len(calls), limit=MAX_CALLS)
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
            yield notice("results_cut", self._language)
            token_ids = self._encoder.encode(shortened(self._results, self._encoder, most))
        self._append_ids(token_ids)

    def _reply(self) -> Iterator[Event]:
        self._append(opening(MOSS))
        citations, end, left = CitationReader(), "", self._max_new_tokens
        while True:
            before = self.stats.new_tokens
            self._answer = self._field(MOSS, left, CLOSING_TOKENS)
            for piece in self._pieces(self._answer):
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
        yield from self._show(citations.finish())
        self._cite(citations.cited)
        if not self._answered:
            end = "empty"
        self._finish()
        if end:
            yield notice(end, self._language, tokens=self._max_new_tokens)

    def _show(self, text: str) -> Iterator[Event]:
        if text:
            self._answered = True
            yield Text(text)

    def _cite(self, numbers: Iterable[int]) -> None:
        """MOSS also cites results that have no number, by their place."""
        for number in numbers:
            if number not in self.sources and 0 < number <= len(self._results):
                result = shown_result(self._results[number - 1])
                if result.found and not result.sources:
                    self.sources[number] = Source(f"{result.command} → {result.text}", "")

    # What is common to the fields.

    def _check_length(self, message: int) -> None:
        room = self._context.most_room - self._fixed - LEAST_ANSWER_TOKENS
        if message > room:
            raise MossError(notice("too_long", self._language, tokens=message, room=max(0, room)).text)

    def _make_room(self, tokens: int) -> Iterator[Event]:
        """Room for tokens and a good part of an answer, if need be by dropping the oldest turns."""
        spare = max(LEAST_ANSWER_TOKENS, self._context.session.capacity // 8)
        gone = self._context.make_room(tokens + spare)
        if gone:
            yield notice("dropped" if gone > 1 else "dropped_one", self._language, turns=gone)

    def _append(self, pieces: Iterable[Piece]) -> None:
        self._append_ids(self._encoder.encode(pieces))

    def _append_ids(self, token_ids: Sequence[int]) -> None:
        self._context.append(token_ids)
        self.stats.read_tokens += len(token_ids)

    def _field(self, role: str, most: int, keep: int) -> FieldReader:
        """A reader of the field that the model writes now, with ``keep`` tokens left for what comes after it."""
        return FieldReader(
            self._context.session,
            self._encoder,
            role,
            self._params,
            min(most, self._context.room - keep),
            self._cancelled,
        )

    def _pieces(self, reader: FieldReader) -> Iterator[str]:
        """The field's text as it comes, without the space that it begins with."""
        before, begun = self._context.session.position, False
        for piece in reader:
            text = piece if begun else piece.lstrip()
            if text:
                begun = True
                yield text
        self.stats.new_tokens += self._context.session.position - before
        if reader.ending == "cancelled":
            raise CancelledError

    def _close(self, reader: FieldReader) -> None:
        """End a field of the first phase; a model that wrote nothing meant none."""
        if not reader.text.strip():
            reader.replace(f" {NONE}")
        reader.close()
        self._append([Piece("\n")])

    def _finish(self) -> None:
        """The turn is whole: end its answer."""
        if self._answer is not None:
            self._answer.close()
        self._append([Piece("\n")])
        self._context.finish_turn()
        self._settled = True

    def _settle(self) -> None:
        """After an interruption: keep what was shown of the answer, or forget the turn."""
        if self._settled:
            return
        if self._answered and self._answer is not None:
            self._answer.cut()
            self._finish()
        else:
            self._context.abandon_turn()
            self._settled = True
