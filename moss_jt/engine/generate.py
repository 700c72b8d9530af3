"""Text that continues a prompt, piece by piece as it comes, with the tokens and the times behind it."""

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from numbers import Integral
from typing import Protocol

from moss_jt.engine.sampling import SamplingParams
from moss_jt.engine.session import Session
from moss_jt.errors import MossError


class TextDecoder(Protocol):
    """Text of tokens as they come: moss_jt.store.tokenizer.IncrementalDecoder."""

    def push(self, token_id: int) -> str: ...

    def finish(self) -> str: ...


@dataclass
class GenerationStats:
    """What a generation was, complete once it has ended.

    stop_reason  "eos" (an end token), "stop" (a stop string), "length" (max_new_tokens), "context" (it is full);
                 None while it goes on
    seconds      load (the model, once), prefill (until the first token's logits), decode (everything after)
    """

    prompt_tokens: int
    new_tokens: int = 0
    stop_reason: str | None = None
    seconds: dict[str, float] = field(
        default_factory=lambda: dict.fromkeys(("load", "prefill", "decode"), 0.0)
    )


class StopStrings:
    """Finds stop strings in text that comes in pieces. No part of one is ever let through.

    Raises:
        MossError: a stop string is empty.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        if "" in stops:
            raise MossError(
                "a stop string is empty. Leave it out, or give the text that shall end the answer."
            )
        self._stops = tuple(stops)
        self._held = ""
        self.found = False

    def push(self, text: str) -> str:
        """The text that is safe to show now. ``found`` is set once a stop string is complete."""
        held = self._held + text
        places = [place for place in (held.find(stop) for stop in self._stops) if place >= 0]
        if places:
            self.found, self._held = True, ""
            return held[: min(places)]
        keep = self._possible_start(held)
        self._held = held[len(held) - keep :]
        return held[: len(held) - keep]

    def finish(self) -> str:
        """What was held back, once no more text comes: it was no stop string."""
        held, self._held = self._held, ""
        return held

    def _possible_start(self, text: str) -> int:
        """Length of the longest end of the text that a stop string begins with."""
        longest = max((len(stop) - 1 for stop in self._stops), default=0)
        for count in range(min(longest, len(text)), 0, -1):
            if any(stop.startswith(text[-count:]) for stop in self._stops):
                return count
        return 0


def check_count(max_new_tokens: int) -> None:
    """Raises MossError where it is no number of tokens."""
    if not isinstance(max_new_tokens, Integral) or max_new_tokens < 1:
        raise MossError(f"max_new_tokens is {max_new_tokens!r}; it must be a whole number, 1 or more.")


class Generation:
    """An iterator of pieces of text. Iterate to the end, or drop it at any time.

    token_ids  the new tokens so far, the end token included
    text       the new text so far, without the end token and without a stop string
    stats      see GenerationStats
    """

    def __init__(
        self,
        session: Session,
        decoder: TextDecoder,
        params: SamplingParams,
        max_new_tokens: int,
        stop_ids: Collection[int],
        stop_strings: Sequence[str] = (),
        load_s: float = 0.0,
    ) -> None:
        check_count(max_new_tokens)
        self.token_ids: list[int] = []
        self.text = ""
        self.stats = GenerationStats(session.position)
        self.stats.seconds["load"] = load_s
        self._session = session
        self._decoder = decoder
        self._stop_ids = frozenset(stop_ids)
        self._stops = StopStrings(stop_strings)
        self._pieces = self._run(params, max_new_tokens)

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        return next(self._pieces)

    def _run(self, params: SamplingParams, max_new_tokens: int) -> Iterator[str]:
        for token in self._session.decode(params, max_new_tokens, self._stop_ids):
            self._count(token)
            if token in self._stop_ids:
                break
            piece = self._show(self._stops.push(self._decoder.push(token)))
            if self._stops.found:
                self.stats.stop_reason = "stop"
            if piece:
                yield piece
            if self._stops.found:
                return
        self.stats.stop_reason = self._session.stop_reason
        rest = self._stops.push(self._decoder.finish())
        if self._stops.found:
            self.stats.stop_reason = "stop"
        piece = self._show(rest + self._stops.finish())
        if piece:
            yield piece

    def _count(self, token: int) -> None:
        timing = self._session.timing
        self.token_ids.append(token)
        self.stats.new_tokens += 1
        self.stats.stop_reason = self._session.stop_reason
        self.stats.seconds.update(prefill=timing.prefill_s, decode=timing.decode_s)

    def _show(self, text: str) -> str:
        self.text += text
        return text
