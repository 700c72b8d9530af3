"""Answers with plugins: a turn of a conversation, with thoughts, commands and results beside its text."""

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from moss_jt.chat.context import ConversationContext
from moss_jt.chat.events import Command, Event, Notice, Result, Text, Thought
from moss_jt.chat.messages import Conversation, turn_segments
from moss_jt.chat.prompt import PromptEncoder
from moss_jt.chat.turn import CancelledError, Turn
from moss_jt.engine.generate import StopStrings
from moss_jt.engine.sampling import SamplingParams
from moss_jt.engine.sequence import Sequence as Tokens
from moss_jt.plugins.interface import Plugin, Source
from moss_jt.serve.answer_events import Extra, Finished, Thinking, Usage, Words
from moss_jt.serve.answering import Answering
from moss_jt.serve.text_answers import Waiting

if TYPE_CHECKING:
    from moss_jt.moss import Moss


class ServedSession:
    """moss_jt.chat.field_reader.ChatSession over a sequence whose answer somebody elsewhere may want no more of.

    cached  tokens of its text that had not to be computed
    later, later_s  tokens that were written after the first of their field, and what the engine took for them
    """

    def __init__(self, sequence: Tokens) -> None:
        self.cached = 0
        self.later, self.later_s = 0, 0.0
        self.answering: Answering | None = None
        self._sequence = sequence

    @property
    def token_ids(self) -> list[int]:
        return self._sequence.token_ids

    @property
    def position(self) -> int:
        return self._sequence.position

    @property
    def capacity(self) -> int:
        return self._sequence.capacity

    @property
    def unread(self) -> int:
        return self._sequence.unread

    def extend(self, token_ids: Sequence[int]) -> None:
        self._sequence.extend(token_ids)

    def truncate(self, position: int) -> None:
        self._sequence.truncate(position)

    @property
    def ways(self) -> list[bool]:
        return self._sequence.ways

    def begin_as(self, ways: Sequence[bool]) -> None:
        self._sequence.begin_as(ways)

    def keep_beginning(self, length: int) -> None:
        self._sequence.keep_beginning(length)

    def keep(self) -> None:
        self._sequence.keep()

    def serve(self, answering: Answering) -> None:
        """What is decoded from now on is of this answer, and ends when nobody wants it any more."""
        self.answering = answering
        self.cached, self.later, self.later_s = 0, 0, 0.0
        answering.when_cancelled(self._sequence.cancel)
        answering.status = Waiting(self._sequence).status

    def decode(self, params: SamplingParams, max_new_tokens: int, stop_ids: Collection[int]) -> Iterator[int]:
        unread = self._sequence.unread
        self._check()
        before = self.position
        try:
            yield from self._sequence.decode(params, max_new_tokens, stop_ids)
        finally:
            timing = self._sequence.timing
            if (written := self.position - before) > 0:
                self.cached += max(0, unread - timing.prefill_tokens)
                self.later, self.later_s = self.later + written - 1, self.later_s + timing.decode_s
        self._check()

    def _check(self) -> None:
        if self.answering is not None and self.answering.cancelled.is_set():
            raise CancelledError


@dataclass(frozen=True)
class WantedTurn:
    """A conversation whose last message is to be answered."""

    conversation: Conversation
    plugins: Sequence[Plugin]
    params: SamplingParams
    max_new_tokens: int
    stops: Sequence[str] = ()
    system: str | None = None
    adapter: str | None = None


def write_turn(moss: "Moss", wanted: WantedTurn, choice: int, answering: Answering) -> None:
    """Write one choice of an answer to the last message."""
    encoder = PromptEncoder(moss.tokenizer)
    session = ServedSession(moss.session(adapter=wanted.adapter))
    conversation, params = wanted.conversation, wanted.params
    context = ConversationContext(
        session, encoder.encode(conversation.instruction(wanted.plugins, wanted.system))
    )
    for message, answer in conversation.turns:
        context.append(encoder.encode(turn_segments(message, answer)))
        context.finish_turn(object())
    before = session.position
    if params.seed is not None:
        params = replace(params, seed=params.seed + choice)
    stops = StopStrings(wanted.stops)
    session.serve(answering)
    turn = Turn(
        context, encoder, wanted.plugins, params, wanted.max_new_tokens,
        lambda: stops.stopped or answering.cancelled.is_set(),
    )  # fmt: skip
    reason: str | None = "stop"
    for event in turn.events(conversation.message):
        if isinstance(event, Text):
            if not stops.stopped and (shown := stops.push(event.text)):
                answering.put(Words(choice, shown))
        elif isinstance(event, Thought):
            answering.put(Thinking(choice, event.text))
        elif isinstance(event, Notice) and event.code in ("cut", "full"):
            reason = "length"
        elif isinstance(event, Notice) and event.code == "stopped":
            reason = "stop" if stops.stopped else None
        elif not (isinstance(event, Notice) and event.code == "empty"):
            answering.put(Extra(choice, event_fields(event)))
    if not stops.stopped and (rest := stops.finish()):
        answering.put(Words(choice, rest))
    if turn.sources:
        answering.put(Extra(choice, {"type": "sources", "sources": sources_fields(turn.sources)}))
    stats = turn.stats
    usage = Usage(before + stats.read_tokens, stats.new_tokens, session.cached)
    answering.put(Finished(choice, reason, usage, (0.0, session.later_s)))


def event_fields(event: Event) -> dict[str, Any]:
    """An event of a chat as JSON."""
    if isinstance(event, Result):
        return {
            "type": "result",
            "command": event.command,
            "text": event.text,
            "found": event.found,
            "numbers": [*event.numbers],
            "sources": [{"title": one.title, "location": one.location} for one in event.sources],
            "picture": None if event.picture is None else event.picture.name,
            "failure": event.failure,
        }
    if isinstance(event, Notice):
        return {"type": "notice", "code": event.code, **event.values}
    assert isinstance(event, Text | Thought | Command)
    return {"type": event.kind, "text": event.text}


def sources_fields(sources: dict[int, Source]) -> list[dict[str, Any]]:
    return [
        {"number": number, "title": source.title, "location": source.location}
        for number, source in sorted(sources.items())
    ]
