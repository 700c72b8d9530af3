"""How far to draft: what drafted tokens and passes cost here, and how likely drafts come true, both from what was seen.

A draft of n tokens that come true one after the other with chances a, b, c .. brings 1 + a + ab + abc .. tokens, and costs
n passes of the copy and one of the model that verifies n + 1 tokens. The best length by what is known beforehand gives a rate,
tokens per second; while a draft is written, a further token is worth it as long as what it promises is above its cost at
that rate. So an uncertain draft ends early, and a sure one goes on.
"""

from bisect import bisect
from collections.abc import Sequence
from dataclasses import dataclass

from moss_jt.kernels.needs import FEW_TOKENS

# The draft, and the token before it, must be one pass in which a token gets the same bits as alone.
LONGEST_DRAFT = FEW_TOKENS - 1

# How likely a copy's token is the model's: at first, and what is slowly returned to while nothing is drafted.
FIRST_CHANCE = 0.9
FORGETTING = 0.01
SLOWEST = 0.02  # at least so much the latest outcome counts
FIRST_WEIGHT = 2  # so many outcomes the first guess counts for
SURE_WEIGHT = 0.5  # and so many the guess of what being so sure means, which is another in every model
DOUBT = 8  # and so many of one length the outcomes of all

# How sure the copy is: of a greedy token its probability; of a drawn one how far the draw was from another token's.
GREEDY = (0.4, 0.6, 0.8, 0.9, 0.97, 0.995), (0.4, 0.55, 0.7, 0.82, 0.91, 0.97, 0.995)
DRAWN = (0.01, 0.03, 0.1, 0.2, 0.4), (0.5, 0.6, 0.75, 0.88, 0.95, 0.98)

# Of passes: how much the ones before count, and how much the first guess of what one more token adds, in tokens squared.
DECAY, TRUST = 0.9, 10.0


class Learned:
    """A mean that follows what it is told, quickly at first."""

    def __init__(self, first: float, weight: float = FIRST_WEIGHT) -> None:
        self.value = self._first = first
        self._weight = weight
        self.count = 0.0  # of outcomes, as far as they still count

    def note(self, outcome: float) -> None:
        self.count = min(self.count + 1, 1 / SLOWEST)
        self.value += max(SLOWEST, 1 / (self.count + self._weight)) * (outcome - self.value)

    def forget(self) -> None:
        self.count *= 1 - FORGETTING
        self.value += FORGETTING * (self._first - self.value)

    @property
    def odds(self) -> float:
        return odds_of(self.value)


def odds_of(chance: float) -> float:
    chance = min(max(chance, 0.002), 0.998)
    return chance / (1 - chance)


class PassCost:
    """Seconds of a pass as a line over its tokens.

    Args:
        seconds: of a pass of one token, as far as is known beforehand.
        share: what one more token adds to that, as a share of it.
    """

    def __init__(self, seconds: float, share: float) -> None:
        self._share = share
        self._weight = 0.0
        self._tokens, self._seconds, self._square, self._product = 0.0, seconds, 0.0, 0.0

    def note(self, tokens: int, seconds: float) -> None:
        """A pass of so many tokens took so long."""
        self._weight = DECAY * self._weight + 1
        part = 1 / self._weight
        tokens_off, seconds_off = tokens - self._tokens, seconds - self._seconds
        self._tokens += part * tokens_off
        self._seconds += part * seconds_off
        self._square += part * ((1 - part) * tokens_off**2 - self._square)
        self._product += part * ((1 - part) * tokens_off * seconds_off - self._product)

    @property
    def per_token(self) -> float:
        """What one more token adds."""
        mean = max(1.0, self._tokens)
        guess = self._share * self._seconds / (1 + self._share * (mean - 1))
        product, square = self._weight * self._product, self._weight * self._square
        return max(0.0, (product + TRUST * guess) / (square + TRUST))

    def of(self, tokens: float) -> float:
        mean = max(1.0, self._tokens)
        return max(self._seconds + (tokens - mean) * self.per_token, self._seconds / 16)


@dataclass(frozen=True)
class Sure:
    """How sure the copy was of a token that it drafted: ``margin`` as :meth:`moss_jt.engine.sampling.Sampler.guess` tells."""

    margin: float
    greedy: bool


class DraftPace:
    """See the module.

    Args:
        pass_s, token_share: a pass of the model, and what one more token adds to it, until they have been measured.
        step_s, step_share: the same of the copy.
    """

    def __init__(
        self, pass_s: float = 1.0, token_share: float = 0.02, step_s: float = 0.04, step_share: float = 0.1
    ) -> None:
        self.passes = PassCost(pass_s, token_share)
        self.steps = PassCost(step_s, step_share)
        self._all = Learned(FIRST_CHANCE)
        self._by_depth = [Learned(FIRST_CHANCE) for _ in range(LONGEST_DRAFT)]
        self._by_margin = {
            greedy: [Learned(first, SURE_WEIGHT) for first in firsts]
            for greedy, (_, firsts) in ((True, GREEDY), (False, DRAWN))
        }

    def chance(self, depth: int) -> float:
        """That the draft's token after so many others is right if those before are: as for any, until enough were seen there."""
        own = self._by_depth[depth]
        return (own.count * own.value + DOUBT * self._all.value) / (own.count + DOUBT)

    def chance_of(self, depth: int, sure: Sure) -> float:
        """The same of a token of which it is known how sure the copy is."""
        odds = self._learned(sure).odds * odds_of(self.chance(depth)) / self._all.odds
        return odds / (1 + odds)

    def best(self, sequences: int, longest: int = LONGEST_DRAFT) -> tuple[int, float]:
        """The length of drafts that is best for so many sequences by what is known beforehand, and its tokens per second."""
        step = self.steps.of(sequences)
        length, rate, tokens, right = 0, sequences / self.passes.of(sequences), 1.0, 1.0
        for drafted in range(1, longest + 1):
            right *= self.chance(drafted - 1)
            tokens += right
            seconds = drafted * step + self.passes.of(sequences * (drafted + 1))
            if sequences * tokens / seconds > rate:
                length, rate = drafted, sequences * tokens / seconds
        return length, rate

    def learn(self, draft: Sequence[int], sure: Sequence[Sure], text: Sequence[int]) -> None:
        """What became of a draft: the text as the model wrote it instead, which ends with the first token that differs."""
        if not sure:
            for learned in (self._all, *self._by_depth, *self._by_margin[True], *self._by_margin[False]):
                learned.forget()
        for depth, (token, margin, written) in enumerate(zip(draft, sure, text, strict=False)):
            right = float(token == written)
            for learned in (self._all, self._by_depth[depth], self._learned(margin)):
                learned.note(right)

    def _learned(self, sure: Sure) -> Learned:
        edges = (GREEDY if sure.greedy else DRAWN)[0]
        return self._by_margin[sure.greedy][bisect(edges, sure.margin)]
