"""Text that continues a prompt, piece by piece as it comes, with the tokens and the times behind it."""

from collections.abc import Collection, Generator, Iterator, Sequence
from dataclasses import dataclass, field
from numbers import Integral
from typing import Protocol, Self

from moss_jt.engine.job import Queued
from moss_jt.engine.sampling import SamplingParams
from moss_jt.engine.sequence import Answer
from moss_jt.engine.sequence import Sequence as Text
from moss_jt.errors import MossError


class TextDecoder(Protocol):
    """Text of tokens as they come: moss_jt.store.tokenizer.IncrementalDecoder."""

    def push(self, token_id: int) -> str: ...

    def finish(self) -> str: ...


@dataclass
class GenerationStats:
    """What a generation was, complete once it has ended.

    stop_reason  "eos" (an end token), "stop" (a stop string), "length" (max_new_tokens), "context" (it is full), "time"
                 (max_time has passed); None while it goes on
    seconds      load (the model, once), prefill (until the first token's logits, waiting for room included), decode
                 (everything after)
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
        MossError: a stop string is empty, or no text at all.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        if not isinstance(stops, Collection) or not all(isinstance(stop, str) for stop in stops):
            raise MossError(
                f"stop is {stops!r:.80}; it must be a text that ends the answer, or a list of them."
            )
        if "" in stops:
            raise MossError(
                "a stop string is empty. Leave it out, or give the text that shall end the answer."
            )
        self._stops = tuple(stops)
        self._held = ""
        self.stopped = False

    def push(self, text: str) -> str:
        """The text that is safe to show now. ``stopped`` is set once a stop string is complete."""
        held = self._held + text
        starts = [start for start in (held.find(stop) for stop in self._stops) if start >= 0]
        if starts:
            self.stopped, self._held = True, ""
            return held[: min(starts)]
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

    ``begin``: the answer is written from now on, and to its end, whether or not its pieces are asked for.

    token_ids  the new tokens so far, the end token included
    text       the new text so far, without the end token and without a stop string
    stats      see GenerationStats
    """

    def __init__(
        self,
        sequence: Text,
        decoder: TextDecoder,
        params: SamplingParams,
        max_new_tokens: int,
        stop_ids: Collection[int],
        stop_strings: Sequence[str] = (),
        load_s: float = 0.0,
        max_time: float | None = None,
        begin: bool = False,
    ) -> None:
        if max_time is not None and not max_time > 0:
            raise MossError(f"max_time is {max_time}; it must be above 0 seconds, or None for no limit.")
        check_count(max_new_tokens)
        self.token_ids: list[int] = []
        self.text = ""
        self.stats = GenerationStats(sequence.position)
        self.stats.seconds["load"] = load_s
        self._sequence = sequence
        self._decoder = decoder
        self._stop_ids = frozenset(stop_ids)
        self._stops = StopStrings(stop_strings)
        limits = max_new_tokens, self._stop_ids, max_time
        self._tokens: Answer | Generator[int] = (
            sequence.begin(params, *limits, ahead=None) if begin else sequence.decode(params, *limits)
        )
        self._pieces = self._run()

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        return next(self._pieces)

    @property
    def queued(self) -> Queued | None:
        """Where the answer waits for room in the cache, or None where it does not; for other threads to look at."""
        return self._sequence.queued

    def finish(self) -> Self:
        """Wait for the end of the answer."""
        for _ in self:
            pass
        return self

    def close(self) -> None:
        """Have no more of it."""
        self._tokens.close()

    def _run(self) -> Iterator[str]:
        for token in self._tokens:
            self._count(token)
            if token in self._stop_ids:
                break
            piece = self._show(self._stops.push(self._decoder.push(token)))
            if self._stops.stopped:
                self.stats.stop_reason = "stop"
            if piece:
                yield piece
            if self._stops.stopped:
                return
        self.stats.stop_reason = self._sequence.stop_reason
        rest = self._stops.push(self._decoder.finish())
        if self._stops.stopped:
            self.stats.stop_reason = "stop"
        piece = self._show(rest + self._stops.finish())
        if piece:
            yield piece

    def _count(self, token: int) -> None:
        timing = self._sequence.timing
        self.token_ids.append(token)
        self.stats.new_tokens += 1
        self.stats.stop_reason = self._sequence.stop_reason
        self.stats.seconds.update(prefill=timing.prefill_s, decode=timing.decode_s)

    def _show(self, text: str) -> str:
        self.text += text
        return text
