"""Text that continues a prompt, piece by piece as it comes, with the tokens and the times behind it."""

from collections.abc import Callable, Collection, Generator, Iterator, Sequence
from dataclasses import dataclass, field
from numbers import Integral
from typing import Protocol, Self

from moss_jt.engine.job import Queued
from moss_jt.engine.logprobs import Logprob, check_top
from moss_jt.engine.sampling import SamplingParams
from moss_jt.engine.sequence import Answer
from moss_jt.engine.sequence import Sequence as Text
from moss_jt.errors import MossError


class TextDecoder(Protocol):
    """Text of tokens as they come: moss_jt.store.tokenizer.IncrementalDecoder."""

    def push(self, token_id: int) -> str: ...

    def finish(self) -> str: ...


SECONDS = ("load", "prefill", "decode", "drafting", "waiting", "computing")


@dataclass
class GenerationStats:
    """What a generation was, complete once it has ended.

    cached_tokens  of the prompt that did not have to be computed, because another text began alike
    stop_reason  "eos" (an end token), "stop" (a stop string), "length" (max_new_tokens), "context" (it is full), "time"
                 (max_time has passed); None while it goes on
    passes       in which its tokens after the first were computed
    drafted      tokens that were guessed, of which ``accepted`` came true
    seconds      load (the model, once), prefill (until the first token's logits, waiting for room included), decode
                 (everything after); and of decode: drafting (a copy wrote ahead), waiting (for weights that stream),
                 computing (the rest)
    """

    prompt_tokens: int
    new_tokens: int = 0
    cached_tokens: int = 0
    stop_reason: str | None = None
    passes: int = 0
    drafted: int = 0
    accepted: int = 0
    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(SECONDS, 0.0))


class StopStrings:
    """Finds stop strings in text that comes in pieces. No part of one is ever let through.

    Raises:
        MossError: a stop string is empty, or no text at all.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        if not isinstance(stops, Collection) or not all(isinstance(stop, str) for stop in stops):
            raise MossError(
                f"stop is {stops!r:.80}; it must be text that ends the answer, or a list of them."
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


def stops_at(stops: Sequence[str], decoder: TextDecoder | None) -> Callable[[int], bool] | None:
    """Whether a stop string is complete, token after token; None where there is none, or nothing to read tokens with."""
    if not stops or decoder is None:
        return None
    strings = StopStrings(stops)

    def ends(token: int) -> bool:
        strings.push(decoder.push(token))
        return strings.stopped

    return ends


def check_count(max_new_tokens: int) -> None:
    """Raises MossError where it is no number of tokens."""
    if not isinstance(max_new_tokens, Integral) or max_new_tokens < 1:
        raise MossError(f"max_new_tokens is {max_new_tokens!r}; it must be a whole number, 1 or more.")


class Generation:
    """An iterator of pieces of text. Iterate to the end, or drop it at any time.

    ``begin``: the answer is written from now on, and to its end, whether or not its pieces are asked for. Where that is at a stop
    string, it takes a decoder of its own to see that, ``ahead``.

    token_ids  the new tokens so far, the end token included
    text       the new text so far, without the end token and without a stop string
    logprobs   of each new token so far, how likely the model found it; empty where that was not asked for
    stats      see GenerationStats
    ended      nothing more comes
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
        logprobs: int | None = None,
        ahead: TextDecoder | None = None,
    ) -> None:
        if max_time is not None and not max_time > 0:
            raise MossError(f"max_time is {max_time}; it must be above 0 seconds, or None for no limit.")
        check_count(max_new_tokens)
        check_top(logprobs)
        self.token_ids: list[int] = []
        self.text = ""
        self.ended = False
        self.stats = GenerationStats(sequence.position)
        self.stats.seconds["load"] = load_s
        self._sequence = sequence
        self._decoder = decoder
        self._stop_ids = frozenset(stop_ids)
        self._stops = StopStrings(stop_strings)
        limits = max_new_tokens, self._stop_ids, max_time
        self._tokens: Answer | Generator[int] = (
            sequence.begin(params, *limits, ahead=None, logprobs=logprobs, ends=stops_at(stop_strings, ahead))
            if begin
            else sequence.decode(params, *limits, logprobs=logprobs)
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

    @property
    def logprobs(self) -> list[Logprob]:
        return self._sequence.logprobs

    @property
    def unread(self) -> int:
        """Tokens of the prompt that are still to be read before the first new one; for other threads to look at."""
        return 0 if self.token_ids else self._sequence.unread

    def finish(self) -> Self:
        """Wait for the end of the answer."""
        for _ in self:
            pass
        return self

    def close(self) -> None:
        """Have no more of it; it is gone within one block. An answer that was begun may be closed from any thread."""
        self._tokens.close()

    def ready(self) -> Iterator[str]:
        """Of an answer that was begun, the pieces that are there: nothing is waited for. ``ended``: they were the last."""
        assert isinstance(self._tokens, Answer)
        while not self.ended and self._tokens.ready:
            token = next(self._tokens, None)
            if piece := self._finish() if token is None else self._read(token):
                yield piece

    def _run(self) -> Iterator[str]:
        for token in self._tokens:
            if piece := self._read(token):
                yield piece
            if self.ended:
                return
            if token in self._stop_ids:
                break
        if piece := self._finish():
            yield piece

    def _read(self, token: int) -> str:
        """What is to be shown now that this token has come."""
        self.token_ids.append(token)
        self.stats.new_tokens += 1
        self._note()
        if token in self._stop_ids:
            return ""
        piece = self._show(self._stops.push(self._decoder.push(token)))
        if self._stops.stopped:
            self._tokens.close()
            self._end("stop")
        return piece

    def _finish(self) -> str:
        """What is to be shown now that no more tokens come."""
        rest = self._stops.push(self._decoder.finish())
        self._end("stop" if self._stops.stopped else self._sequence.stop_reason)
        return self._show(rest + self._stops.finish())

    def _end(self, reason: str | None) -> None:
        self.ended = True
        self._note()  # the last pass's time may have come after its token
        self.stats.stop_reason = reason

    def _note(self) -> None:
        timing, stats = self._sequence.timing, self.stats
        if stats.new_tokens == 1:
            stats.cached_tokens = max(0, stats.prompt_tokens - timing.prefill_tokens)
        stats.stop_reason = self._sequence.stop_reason
        stats.passes = timing.passes
        stats.drafted, stats.accepted = timing.drafted, timing.accepted
        drafting, waiting = timing.drafting_s, timing.link_s
        stats.seconds.update(
            prefill=timing.prefill_s,
            decode=timing.decode_s,
            drafting=drafting,
            waiting=waiting,
            computing=max(0.0, timing.decode_s - drafting - waiting),
        )

    def _show(self, text: str) -> str:
        self.text += text
        return text
