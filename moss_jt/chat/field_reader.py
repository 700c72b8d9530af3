"""Reads one field of a turn from the model as it writes, and puts right how models end fields.

A field ends with its own end token. Models also end it with another's, go on into the next field's marker, or never end:
whatever they did, ``close`` leaves the session with the field's text and its own end token, as in training.
"""

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
    """moss_jt.engine.session.Session: a text of tokens that the model reads and continues."""

    @property
    def token_ids(self) -> list[int]: ...

    @property
    def position(self) -> int: ...

    @property
    def capacity(self) -> int: ...

    def extend(self, token_ids: Sequence[int]) -> None: ...

    def truncate(self, position: int) -> None: ...

    def decode(
        self, params: SamplingParams, max_new_tokens: int, stop_ids: Collection[int]
    ) -> Iterator[int]: ...


class FieldReader:
    """One field. Iterate over it for the text as it comes, then close it.

    text    all text so far, without the end token
    ending  "end" (its own end token), "other" (another special token), "marker" (the next field's), "length", "cancelled"
    """

    def __init__(
        self,
        session: ChatSession,
        encoder: PromptEncoder,
        role: str,
        params: SamplingParams,
        max_new_tokens: int,
        cancelled: Callable[[], bool],
    ) -> None:
        self.text = ""
        self.ending: Ending = "length"
        self._session = session
        self._tokenizer = encoder.tokenizer
        self._end = encoder.ends[role]
        self._special = encoder.special
        self._params = params
        self._max_new_tokens = max_new_tokens
        self._cancelled = cancelled
        self._start = session.position

    def __iter__(self) -> Iterator[str]:
        decoder, stops = IncrementalDecoder(self._tokenizer), StopStrings(MARKERS)
        for token in self._session.decode(self._params, self._max_new_tokens, self._special):
            if token in self._special:
                self.ending = "end" if token == self._end else "other"
                break
            yield from self._take(stops.push(decoder.push(token)))
            if stops.found or self._cancelled():
                break
        if not stops.found:
            yield from self._take(stops.push(decoder.finish()))
        if stops.found:
            self.ending = "marker"
            return
        if self.ending == "length" and self._cancelled():
            self.ending = "cancelled"
        yield from self._take(stops.finish())

    def _take(self, piece: str) -> Iterator[str]:
        if piece:
            self.text += piece
            yield piece

    def close(self) -> None:
        """Make the session end with this field's text and its end token."""
        last = self._session.token_ids[-1] if self._session.position > self._start else None
        if last == self._end:
            return
        if last in self._special:
            self._session.truncate(self._session.position - 1)
        elif self.ending == "marker":
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
