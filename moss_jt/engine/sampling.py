"""One token from one row of logits, by the reference's rules and in its order, in NumPy.

Repetition penalty over all tokens so far (the prompt's, too; once per distinct id), temperature, top-k, top-p, regulation of
the length, one random draw. Temperature 0 is greedy: the largest logit, and no draw. What only OpenAI's interface has comes in
between: its penalties and biases before the temperature, min_p after top-p.
"""

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from copy import copy, deepcopy
from dataclasses import dataclass, fields
from numbers import Integral, Real
from typing import Any

import numpy as np

from moss_jt.errors import MossError

REPETITION_PENALTY = 1.02
REGULATION_START = 512
MOST_REGULATION = 300.0  # of a natural logarithm: nothing else is likely then
MOST_PENALTY, MOST_BIAS = 2.0, 100.0  # OpenAI's bounds


@dataclass(frozen=True)
class SamplingParams:
    """How tokens are chosen.

    temperature         0 or more; 0 is greedy
    top_k               only the k likeliest; 0 for all
    top_p               only the likeliest whose probabilities reach p together, at least one; 1 for all
    repetition_penalty  1 for none; None is the reference's 1.02, and none when greedy
    seed                the same seed gives the same tokens; None for another one each time
    drawn               how many of the seed's random numbers are used up: by earlier parts of the same answer
    length_penalty      what the end's probability is multiplied with at every token after regulation_start of them: above 1
                        ends long answers sooner; 1 for no regulation
    presence_penalty    taken from the logits of tokens that the answer has already, -2 .. 2
    frequency_penalty   the same, once for every time that it has them
    logit_bias          token id -> what is added to its logit, -100 (as good as never) .. 100 (as good as always)
    min_p               only tokens at least so likely, times the likeliest; 0 for all

    Raises:
        MossError: a value is impossible.
    """

    temperature: float = 0.7
    top_k: int = 40
    top_p: float = 0.8
    repetition_penalty: float | None = None
    seed: int | None = None
    drawn: int = 0
    length_penalty: float = 1.0
    regulation_start: int = REGULATION_START
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] | tuple[tuple[int, float], ...] = ()
    min_p: float = 0.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "logit_bias", _checked_biases(self.logit_bias))
        for field in fields(self):
            value = getattr(self, field.name)
            integral = field.name in ("top_k", "seed")
            if field.name == "logit_bias":
                continue
            if not (value is None or isinstance(value, Integral if integral else Real)):
                raise MossError(
                    f"{field.name} is {value!r}; it must be a {'whole ' if integral else ''}number."
                )
        penalty = self.repetition_penalty
        checks = (
            ("temperature", self.temperature, 0 <= self.temperature < np.inf, "0 (greedy) or more"),
            ("top_k", self.top_k, self.top_k >= 0, "0 (all tokens) or more"),
            ("top_p", self.top_p, 0 < self.top_p <= 1, "above 0 and at most 1"),
            ("repetition_penalty", penalty, penalty is None or 0 < penalty < np.inf, "above 0 (1 for none)"),
            ("seed", self.seed, self.seed is None or self.seed >= 0, "a whole number, 0 or more"),
            ("length_penalty", self.length_penalty, 0 < self.length_penalty < np.inf, "above 0 (1 for none)"),
            ("regulation_start", self.regulation_start, self.regulation_start >= 0, "0 tokens or more"),
            (
                "presence_penalty",
                self.presence_penalty,
                abs(self.presence_penalty) <= MOST_PENALTY,
                "from -2 to 2",
            ),
            (
                "frequency_penalty",
                self.frequency_penalty,
                abs(self.frequency_penalty) <= MOST_PENALTY,
                "from -2 to 2",
            ),
            ("min_p", self.min_p, 0 <= self.min_p <= 1, "from 0 to 1"),
        )
        for name, value, good, wanted in checks:
            if not good:
                raise MossError(f"{name} is {value}; it must be {wanted}.")

    @property
    def greedy(self) -> bool:
        return self.temperature == 0

    @property
    def biases(self) -> dict[int, float]:
        return {int(token): float(bias) for token, bias in dict(self.logit_bias).items()}

    @property
    def penalty(self) -> float:
        if self.repetition_penalty is not None:
            return self.repetition_penalty
        return 1.0 if self.greedy else REPETITION_PENALTY


def _checked_biases(
    given: Mapping[int, float] | Iterable[tuple[int, float]],
) -> tuple[tuple[int, float], ...]:
    """Pairs of a token id and its bias."""
    pairs: tuple[tuple[Any, Any], ...] = tuple(given.items() if isinstance(given, Mapping) else given)
    for token, bias in pairs:
        numbers = isinstance(token, Integral), isinstance(bias, Real)
        if not numbers[0] or token < 0:
            raise MossError(
                f"logit_bias has {token!r:.40} for a token; ids of tokens are whole numbers, 0 or more."
            )
        if not numbers[1] or not abs(bias) <= MOST_BIAS:
            raise MossError(
                f"logit_bias of token {token} is {bias!r:.40}; it must be a number from -100 to 100."
            )
    return pairs


class Sampler:
    """Chooses token after token. Made for one answer, or a part of one: its random numbers start where the params say.

    Every chosen token costs one random number whatever the logits are, so drafts that verify several positions in one
    pass choose the same tokens as single steps.

    Args:
        token_ids: the text so far.
        end_ids: tokens that end the answer, for the regulation of its length.
    """

    def __init__(self, params: SamplingParams, token_ids: Iterable[int], end_ids: Iterable[int] = ()) -> None:
        self.params = params
        numbers = np.random.PCG64(params.seed)
        numbers.advance(params.drawn)
        self._random = np.random.Generator(numbers)
        self._end_ids = np.array(sorted(end_ids), np.int64)
        self._steps = params.drawn
        self._seen = set(token_ids)
        self._written: Counter[int] = Counter()
        self._biases = params.biases

    def add(self, token_id: int) -> None:
        """The text goes on with this token."""
        self._seen.add(token_id)
        self._written[token_id] += 1
        self._steps += 1

    def fork(self) -> "Sampler":
        """One that goes on from here as this one will, without it."""
        other = copy(self)
        other._random, other._seen, other._written = (
            deepcopy(self._random),
            set(self._seen),
            self._written.copy(),
        )
        return other

    def choose(self, logits: np.ndarray) -> int:
        """The next token for logits (V,) float32, which stay as they are.

        Raises:
            MossError: they are no numbers.
        """
        return self._choose(logits)[0]

    def guess(self, logits: np.ndarray) -> tuple[int, float]:
        """The same token, and how sure it is, 0 .. 1, if the logits are only nearly right: where it is greedy its probability;
        where it is drawn, how far the draw was from what gives another token.

        Raises:
            MossError: they are no numbers.
        """
        token, margin = self._choose(logits)
        if self.params.greedy:
            margin = 1 / float(np.exp(logits - logits[token]).sum(dtype=np.float64))
        return token, margin

    def _choose(self, logits: np.ndarray) -> tuple[int, float]:
        scores = self._biased(penalized(logits, self._seen, self.params.penalty))
        # As logarithms: the power itself may be more than a number can be.
        regulation = math.log(self.params.length_penalty) * max(0, self._steps - self.params.regulation_start)
        if regulation and self.params.greedy:
            scores = scores.copy()
            scores[self._end_ids] += np.float32(regulation)
        best = int(scores.argmax())
        if not np.isfinite(scores[best]):
            raise MossError(
                "the model computed something that is not a number (infinity or NaN). Check its folder with moss-jt verify."
            )
        if self.params.greedy:
            return best, 1.0
        draw = self._random.random()
        token_ids, probabilities = candidates(scores, self.params)
        if regulation:
            probabilities[np.isin(token_ids, self._end_ids)] *= math.exp(min(regulation, MOST_REGULATION))
        total = probabilities.sum()
        ends = np.cumsum(probabilities)
        index = min(int(np.searchsorted(ends, draw * total, side="right")), len(token_ids) - 1)
        above = ends[index] / total - draw if index + 1 < len(ends) else 1.0
        below = draw - ends[index - 1] / total if index else 1.0
        return int(token_ids[index]), float(min(max(min(above, below), 0.0), 1.0))

    def _biased(self, scores: np.ndarray) -> np.ndarray:
        """Scores with OpenAI's penalties for what the answer has, and its biases."""
        presence, frequency = self.params.presence_penalty, self.params.frequency_penalty
        added = dict(self._biases)
        if presence or frequency:
            for token, count in self._written.items():
                added[token] = added.get(token, 0.0) - presence - frequency * count
        if not added:
            return scores
        scores = scores.copy()
        scores[np.fromiter(added, np.int64, len(added))] += np.fromiter(
            added.values(), np.float32, len(added)
        )
        return scores


def penalized(logits: np.ndarray, seen: set[int], penalty: float) -> np.ndarray:
    """Scores of tokens that occurred already, made less likely: divided where positive, multiplied where negative."""
    if penalty == 1 or not seen:
        return logits
    scores = logits.copy()
    token_ids = np.fromiter(seen, np.int64, len(seen))
    values = scores[token_ids]
    scores[token_ids] = np.where(values < 0, values * np.float32(penalty), values / np.float32(penalty))
    return scores


def candidates(scores: np.ndarray, params: SamplingParams) -> tuple[np.ndarray, np.ndarray]:
    """Tokens that temperature, top-k, top-p and min_p leave, likeliest first, with probabilities (float64, sum below 1).

    Tokens that tie with the k-th likeliest stay, as in the reference.
    """
    token_ids = np.arange(len(scores))
    if 0 < params.top_k < len(scores):
        threshold = np.partition(scores, -params.top_k)[-params.top_k]
        token_ids = np.flatnonzero(scores >= threshold)
    token_ids = token_ids[np.argsort(-scores[token_ids], kind="stable")]
    values = scores[token_ids].astype(np.float64)
    with np.errstate(over="ignore"):  # a tiny temperature makes everything but the best minus infinity
        probabilities = np.exp((values - values[0]) / params.temperature)
    probabilities /= probabilities.sum()
    if params.top_p < 1:
        before = np.cumsum(probabilities) - probabilities
        kept = max(1, int(np.count_nonzero(before < params.top_p)))
        token_ids, probabilities = token_ids[:kept], probabilities[:kept]
    if params.min_p:
        kept = int(np.count_nonzero(probabilities >= params.min_p * probabilities[0]))
        token_ids, probabilities = token_ids[:kept], probabilities[:kept]
    return token_ids, probabilities
