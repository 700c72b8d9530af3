"""Answers that continue a text, token by token: completions, and chats without plugins."""

import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

from moss_jt.engine.generate import Generation
from moss_jt.engine.logprobs import Logprob, logprobs_of
from moss_jt.engine.sampling import SamplingParams
from moss_jt.engine.sequence import Sequence as Text
from moss_jt.serve.answer_events import Finished, Token, Usage, Words
from moss_jt.serve.answering import Answering, Step
from moss_jt.store.tokenizer import IncrementalDecoder, Tokenizer

if TYPE_CHECKING:
    from moss_jt.moss import Moss

# OpenAI's word for why an answer ended; one that was cancelled has none.
REASONS = {
    "eos": "stop",
    "stop": "stop",
    "length": "length",
    "context": "length",
    "time": "length",
    None: None,
}


@dataclass(frozen=True)
class Wanted:
    """A text, and how it shall go on.

    max_new_tokens  0: it shall not, and is only to be echoed
    logprobs   so many of the likeliest tokens beside each; None for nothing of that
    echo       the text itself comes first
    lead       white space at the answer's beginning belongs to the format, and is none of it
    adapter    with which it is read and continued; None for the model alone
    """

    token_ids: Sequence[int]
    params: SamplingParams
    max_new_tokens: int
    stop_ids: Collection[int]
    stops: Sequence[str] = ()
    max_time: float | None = None
    logprobs: int | None = None
    echo: bool = False
    lead: bool = False
    adapter: str | None = None


def write_plain(moss: "Moss", wanted: Wanted, choice: int, answering: Answering) -> Step | None:
    """Begin one choice of an answer; the next ones have random numbers of their own, with a seed, too."""
    if wanted.echo:
        _echo(moss, wanted, choice, answering)
    if wanted.max_new_tokens == 0:
        reason = None if answering.cancelled.is_set() else "length"
        answering.put(Finished(choice, reason, Usage(len(wanted.token_ids))))
        return None
    params = wanted.params
    if params.seed is not None:
        params = replace(params, seed=params.seed + choice)
    text = moss.session(adapter=wanted.adapter)
    text.extend(wanted.token_ids)
    answering.when_cancelled(text.cancel)
    if choice == 0:
        answering.status = Waiting(text).status
    limits = wanted.max_new_tokens, frozenset(wanted.stop_ids), wanted.stops, 0.0, wanted.max_time
    decoder = IncrementalDecoder(moss.tokenizer)
    generation = Generation(text, decoder, params, *limits, begin=True, logprobs=wanted.logprobs)
    if answering.cancelled.is_set():
        generation.close()
    return partial(
        _go_on, generation, AnswerPieces(moss.tokenizer, wanted), len(wanted.token_ids), choice, answering
    )


def _go_on(
    generation: Generation, pieces: "AnswerPieces", prompt: int, choice: int, answering: Answering
) -> bool:
    """Write what is there of the answer, and whether that was its end."""
    for _ in generation.ready():
        if (piece := pieces.next(generation, False)) is not None:
            answering.put(replace(piece, choice=choice))
    if not generation.ended:
        return False
    if (piece := pieces.next(generation, True)) is not None:
        answering.put(replace(piece, choice=choice))
    stats = generation.stats
    usage = Usage(prompt, stats.new_tokens, stats.cached_tokens)
    answering.put(
        Finished(
            choice, REASONS[stats.stop_reason], usage, (stats.seconds["prefill"], stats.seconds["decode"])
        )
    )
    return True


class Waiting:
    """What an answer waits for: its number in the queue, or how far its prompt is read; and for how long, where that is known."""

    def __init__(self, text: Text) -> None:
        self._text = text
        # When the prompt was first looked at, and how much of it was unread then.
        self._begun, self._unread = 0.0, -1

    def status(self) -> dict[str, Any] | None:
        """As it is told in a stream; None where it waits for nothing but its next token."""
        queued = self._text.queued
        if queued is not None:
            return {"type": "queue", "place": queued.number, "expected_s": _rounded(queued.expected_s)}
        unread, total = self._text.unread, self._text.position
        if unread <= 1:
            self._unread = -1
            return None
        now = time.monotonic()
        if unread > self._unread:
            self._begun, self._unread = now, unread
        read = self._unread - unread
        expected_s = (now - self._begun) / read * unread if read else None
        return {
            "type": "progress",
            "total": total,
            "processed": total - unread,
            "expected_s": _rounded(expected_s),
        }


def _rounded(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds, 3)


class AnswerPieces:
    """Cuts a generation's text into pieces with their tokens: together these are the text, character for character."""

    def __init__(self, tokenizer: Tokenizer, wanted: Wanted) -> None:
        self._tokenizer = tokenizer
        self._decoder = IncrementalDecoder(tokenizer)
        self._wanted = wanted
        self._shown = 0  # characters that were given out, and those left out before them
        self._lead = 0  # the latter
        self._begun = not wanted.lead
        self._ends: list[int] = []  # of each token's text in the whole
        self._given = 0  # tokens that were given out
        self._echoed = (
            len(tokenizer.decode([*wanted.token_ids])) if wanted.echo else 0
        )  # characters before it

    def next(self, generation: Generation, last: bool) -> Words | None:
        """What is new of the generation."""
        text = generation.text
        if not self._begun:
            self._shown = self._lead = len(text) - len(text.lstrip())
            self._begun = self._lead < len(text)
        tokens = [] if self._wanted.logprobs is None else self._new_tokens(generation, last)
        piece, self._shown = text[self._shown :], len(text)
        return Words(0, piece, tokens) if piece or tokens else None

    def _new_tokens(self, generation: Generation, last: bool) -> list[Token]:
        text, logprobs = generation.text, generation.logprobs
        for logprob in logprobs[len(self._ends) :]:
            before = self._ends[-1] if self._ends else 0
            self._ends.append(before + len(self._decoder.push(logprob.token_id)))
        tokens: list[Token] = []
        while self._given < len(self._ends):
            logprob, end = logprobs[self._given], self._ends[self._given]
            begin = self._ends[self._given - 1] if self._given else 0
            if logprob.token_id in self._wanted.stop_ids or (last and begin >= len(text)):
                break
            if end > len(text) and not last:
                break  # held back: it may be part of a stop string
            self._given += 1
            if last and self._given == len(self._ends):
                end = len(text)  # with what stands for a character that never became whole
            shown = text[max(begin, self._lead) : end]
            uncut = begin >= self._lead and end == self._ends[self._given - 1]
            raw = self._tokenizer.token_bytes(logprob.token_id) if uncut else shown.encode()
            tokens.append(Token(shown, raw, logprob, self._echoed + max(begin, self._lead) - self._lead))
        return tokens


def _echo(moss: "Moss", wanted: Wanted, choice: int, answering: Answering) -> None:
    """The prompt as the answer's first piece."""
    tokens: list[Token] = []
    if wanted.logprobs is not None:
        logprobs = _prompt_logprobs(moss, wanted, answering)
        if answering.cancelled.is_set():  # they may be those of its beginning alone
            return
        decoder, offset = IncrementalDecoder(moss.tokenizer), 0
        for token, logprob in zip(wanted.token_ids, [None, *logprobs], strict=True):
            text = decoder.push(token)
            tokens.append(Token(text, moss.tokenizer.token_bytes(token), logprob, offset))
            offset += len(text)
    answering.put(Words(choice, moss.tokenizer.decode([*wanted.token_ids]), tokens))


def _prompt_logprobs(moss: "Moss", wanted: Wanted, answering: Answering) -> list[Logprob]:
    assert wanted.logprobs is not None
    text = moss.session(adapter=wanted.adapter)
    text.extend(wanted.token_ids)
    answering.when_cancelled(text.cancel)
    answering.status = Waiting(text).status
    logprobs: list[Logprob] = []
    for first, rows in text.logits():
        following = wanted.token_ids[first + 1 : first + 1 + len(rows)]
        logprobs += logprobs_of(rows[: len(following)], following, wanted.logprobs)
    return logprobs
