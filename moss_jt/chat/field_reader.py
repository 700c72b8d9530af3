"""Reads one field of a turn from the model as it writes, and puts right how models end fields.

A field ends with its own end token. Models also end it with another's, go on into the next field's marker, or never end:
whatever they did, ``close`` leaves the session with the field's text and its own end token, as in training.
"""

import time
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Literal, Protocol

from moss_jt.chat.prompt import END_OF, PromptEncoder
from moss_jt.engine.generate import StopStrings
from moss_jt.engine.sampling import SamplingParams
from moss_jt.store.tokenizer import IncrementalDecoder

# Where the model has gone on into another field without an end token.
MARKERS = tuple(f"{line}<|{role}|>" for role in END_OF for line in ("\n", ""))

Ending = Literal["end", "other", "marker", "length", "cancelled"]


class ChatSession(Protocol):
    """moss_jt.engine.sequence.Sequence: a text of tokens that the model reads and continues."""

    @property
    def token_ids(self) -> list[int]: ...

    @property
    def position(self) -> int: ...

    @property
    def capacity(self) -> int: ...

    @property
    def unread(self) -> int: ...

    def extend(self, token_ids: Sequence[int]) -> None: ...

    def truncate(self, position: int) -> None: ...

    def keep_beginning(self, length: int) -> None: ...

    def keep(self) -> None: ...

    @property
    def ways(self) -> list[bool]: ...

    def begin_as(self, ways: Sequence[bool]) -> None: ...

    def decode(
        self, params: SamplingParams, max_new_tokens: int, stop_ids: Collection[int]
    ) -> Iterator[int]: ...


class Conversation(Protocol):
    """moss_jt.chat.context.ConversationContext: old turns may be dropped from before the turn that a field stands in."""

    @property
    def session(self) -> ChatSession: ...

    @property
    def turn_start(self) -> int: ...


class FieldReader:
    """One field. Read it, as often as it may go on, then take the rest and close it.

    What comes out has none of the white space that the field begins with: that belongs to the format.

    text    all text so far, as the model wrote it, without the end token
    later_tokens, later_s  tokens of the last reading after its first one, and the seconds that the model took for them
    ending  "end" (its own end token), "other" (another special token), "marker" (the next field's), "length", "cancelled"
    """

    def __init__(
        self,
        conversation: Conversation,
        encoder: PromptEncoder,
        role: str,
        cancelled: Callable[[], bool],
    ) -> None:
        self.text = ""
        self.ending: Ending = "length"
        self.later_tokens, self.later_s = 0, 0.0
        self._conversation = conversation
        self._session = conversation.session
        self._tokenizer = encoder.tokenizer
        self._end = encoder.ends[role]
        self._special = encoder.special
        self._cancelled = cancelled
        self._offset = conversation.session.position - conversation.turn_start
        self._decoder, self._stops = IncrementalDecoder(self._tokenizer), StopStrings(MARKERS)
        self._begun = False

    @property
    def _start(self) -> int:
        return self._conversation.turn_start + self._offset

    def read(self, params: SamplingParams, most: int) -> Iterator[str]:
        """The text as it comes, of at most so many more tokens. After "length" it may be called again: it goes on."""
        self.later_tokens, self.later_s = 0, 0.0
        begin = None
        for token in self._session.decode(params, most, self._special):
            if begin is not None:
                self.later_tokens += 1
                self.later_s += time.perf_counter() - begin
            if token in self._special:
                self.ending = "end" if token == self._end else "other"
                return
            yield from self._take(self._stops.push(self._decoder.push(token)))
            if self._stops.stopped:
                self.ending = "marker"
                return
            if self._cancelled():
                self.ending = "cancelled"
                return
            begin = time.perf_counter()

    def rest(self) -> Iterator[str]:
        """What was held back as the possible start of a marker, once nothing more is read.

        Half a character is shown only where the model itself ended it, and not where the field was cut.
        """
        if self.ending in ("end", "other"):
            yield from self._take(self._stops.push(self._decoder.finish()))
        if not self._stops.stopped:
            yield from self._take(self._stops.finish())

    def _take(self, piece: str) -> Iterator[str]:
        self.text += piece
        if shown := piece if self._begun else piece.lstrip():
            self._begun = True
            yield shown

    def close(self) -> None:
        """Make the session end with this field's text and its end token."""
        last = self._session.token_ids[-1] if self._session.position > self._start else None
        if last == self._end:
            return
        if last in self._special:
            self._session.truncate(self._session.position - 1)
        else:
            self.replace(self.text)
        self._session.extend([self._end])

    def cut(self) -> None:
        """After an interruption: the field ends with what was given out of it."""
        self.replace(self.text)

    def replace(self, text: str) -> None:
        """Make the session's copy of the field read ``text``, keeping the tokens that stay the same."""
        written = self._session.token_ids[self._start :]
        count = len(written)
        while not text.startswith(known := self._tokenizer.decode(written[:count])):
            count -= 1
        self._session.truncate(self._start + count)
        self._session.extend(self._tokenizer.encode_plain(text[len(known) :]))
        self.text, self.ending = text, "length"
