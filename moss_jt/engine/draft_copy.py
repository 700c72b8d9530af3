"""A copy of the model in fewer bits writes ahead, over the same cache; the model verifies what it wrote in one pass.

There is no second cache, and no prompt is read twice: the copy reads the keys and values that the model has computed, and
writes provisional ones for its own tokens behind them, where the verifying pass puts the model's. It chooses with the same
random numbers, penalties and cut-offs with which the model's tokens will be chosen there. So its tokens come true
where its logits are near enough, and where they do not, nothing is left of them.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from moss_jt.engine.causal_model import TokenRun
from moss_jt.engine.draft_length import LONGEST_DRAFT, DraftPace, Sure
from moss_jt.engine.sampling import Sampler
from moss_jt.errors import MossError


class CopyModel(Protocol):
    """A moss_jt.engine.model.Model over the copy's weights and the model's own cache, or a scripted one.

    link_s  seconds for which weights were waited for: all of a copy's stay, so it waits for those that have not come yet
    """

    @property
    def link_s(self) -> float: ...

    def forward_many(
        self, runs: Sequence[TokenRun], wanted: Callable[[int], bool] = ...
    ) -> list[np.ndarray]: ...

    def close(self) -> None: ...


@dataclass(eq=False)
class Ahead:
    """What is written ahead of one text.

    pages, start  the text's pages, and the position of its last token, which is computed in this pass
    last          that token
    sampler       chooses as the model's will; a fork of its own
    most          tokens that the draft may have
    end_ids       tokens after which nothing follows
    front         what prompt lookup proposes, and how likely each of its tokens is right
    adapter       with which all of it is computed; the copy has the same ones as the model
    draft, sure   what was written, and how sure the copy was of each; nothing where the front is taken as it is
    """

    pages: Sequence[int]
    start: int
    last: int
    sampler: Sampler
    most: int
    end_ids: frozenset[int] = frozenset()
    front: Sequence[int] = ()
    front_chance: float = 0.0
    adapter: int | None = None
    draft: list[int] = field(default_factory=list)
    sure: list[Sure] = field(default_factory=list)
    right: float = 1.0  # how likely all of the draft is right
    ended: bool = False

    @property
    def next_ids(self) -> list[int]:
        """What the copy computes next: its own last token, or the text's, and what lookup proposes after it."""
        return [self.draft[-1]] if self.draft else [self.last, *self.front]


class DraftCopy:
    """See the module. One thread's at a time.

    Args:
        longest: tokens that a draft may have, 1 .. LONGEST_DRAFT.
        adaptive: how far to draft is decided pass by pass; otherwise every draft is as long as it may be.
    """

    def __init__(
        self, model: CopyModel, pace: DraftPace, longest: int = LONGEST_DRAFT, adaptive: bool = True
    ) -> None:
        self.model = model
        self.pace = pace
        self.longest = longest
        self.adaptive = adaptive

    def write(self, texts: Sequence[Ahead], wanted: Callable[[int], bool] = lambda index: True) -> None:
        """Write drafts ahead of these texts, side by side.

        Args:
            wanted: asked from time to time whether a text, by its index, still is.

        Raises:
            MossError: the copy's weights cannot be read.
        """
        rate = self.pace.best(len(texts), self.longest)[1] if self.adaptive else 0.0
        writing = []
        for index, text in enumerate(texts):
            if self._front_suffices(text, len(texts), rate):
                text.draft = list(text.front)
            else:
                writing.append(index)
        while writing := [
            index for index in writing if wanted(index) and self._is_worth_going_on(texts[index], rate)
        ]:
            rows = sum(len(texts[index].next_ids) for index in writing)
            promised = sum(self._promise(texts[index]) for index in writing)
            if promised < rate * (self.pace.steps.of(rows) + len(writing) * self.pace.passes.per_token):
                break
            self._step(texts, writing, wanted)

    def _step(self, texts: Sequence[Ahead], writing: Sequence[int], wanted: Callable[[int], bool]) -> None:
        """One pass of the copy, and what it chooses."""
        runs = []
        for index in writing:
            text = texts[index]
            start, token_ids = text.start + len(text.draft), text.next_ids
            runs.append(TokenRun(text.pages, start, token_ids, False, "all", text.adapter))
        begin, waited = time.monotonic(), self.model.link_s
        logits = self.model.forward_many(runs, lambda number: wanted(writing[number]))
        seconds = time.monotonic() - begin - (self.model.link_s - waited)
        self.pace.steps.note(sum(len(run.token_ids) for run in runs), seconds)
        for index, rows in zip(writing, logits, strict=True):
            self._choose(texts[index], rows)

    def _choose(self, text: Ahead, logits: np.ndarray) -> None:
        """The copy's tokens for rows of logits, up to the first that is not what lookup proposed."""
        front = () if text.draft else text.front
        text.ended = not len(logits)
        for number, row in enumerate(logits):
            try:
                token, margin = text.sampler.guess(row)
            except MossError:  # a copy of garbage, whose logits are no numbers
                text.ended = True
                return
            text.sampler.add(token)
            sure = Sure(margin, text.sampler.params.greedy)
            text.right *= self.pace.chance_of(len(text.draft), sure)
            text.draft.append(token)
            text.sure.append(sure)
            text.ended = token in text.end_ids or len(text.draft) >= text.most
            if text.ended or number >= len(front) or token != front[number]:
                return

    def _promise(self, text: Ahead) -> float:
        """How likely the draft's next token comes to be the text's."""
        return text.right * self.pace.chance(len(text.draft))

    def _is_worth_going_on(self, text: Ahead, rate: float) -> bool:
        most = min(text.most, self.longest)
        if text.ended or len(text.draft) >= most:
            return False
        return self._promise(text) >= rate * self.pace.passes.per_token

    def _front_suffices(self, text: Ahead, texts: int, rate: float) -> bool:
        """Whether what lookup proposes for nothing promises more than what the copy would write."""
        if not text.front or not self.adaptive:
            return False
        tokens, right = 1.0, 1.0
        for _ in text.front:
            right *= text.front_chance
            tokens += right
        return texts * tokens / self.pace.passes.of(texts * (1 + len(text.front))) > rate

    def close(self) -> None:
        self.model.close()
