"""What passes cost here, from those that were made: what may ride along with answers that somebody waits for."""

from moss_jt.kernels.interface import PAGE

# By how much prompts, or answers in the background, may lengthen a pass that others wait for.
STRETCH = 0.4
# Where they lengthen it by more, answers in the background have one of so many passes; and where not, one of so many goes without
# them, to see whether that is still so.
BACKGROUND_SELDOM, BACKGROUND_OFTEN = 4, 16
LEARNING = 0.2


class Pace:
    """Seconds of a pass of answers, and what a prompt's token and answers in the background add to it."""

    def __init__(self) -> None:
        self.pass_s: float | None = None
        self._token_s: float | None = None
        self._mixed_s: dict[
            bool, float
        ] = {}  # of passes with answers in the background beside others, and without
        self._mixed = 0  # passes that both kinds waited for

    def note(self, prompt_tokens: int, seconds: float, background: bool | None = None) -> None:
        """A pass with so many tokens of prompts took so long.

        Args:
            background: whether answers in the background took part, where there were others, too.
        """
        if prompt_tokens < PAGE:
            self.pass_s = _blend(self.pass_s, seconds)
            if background is not None:
                self._mixed_s[background] = _blend(self._mixed_s.get(background), seconds)
        elif self.pass_s is not None:
            self._token_s = _blend(self._token_s, max(0.0, seconds - self.pass_s) / prompt_tokens)

    def prompt_tokens(self, most: int) -> int:
        """Tokens of prompts for a pass that others' answers are in: a page at least, or no prompt would ever be read."""
        if self.pass_s is None or not self._token_s:
            return most
        return min(most, max(PAGE, int(STRETCH * self.pass_s / self._token_s)))

    def takes_background(self) -> bool:
        """Whether answers in the background take part in the next pass, which others wait for."""
        self._mixed += 1
        if len(self._mixed_s) < 2:
            return self._mixed % 2 == 0
        if self._mixed_s[True] <= (1 + STRETCH) * self._mixed_s[False]:
            return self._mixed % BACKGROUND_OFTEN != 0
        return self._mixed % BACKGROUND_SELDOM == 0


def _blend(old: float | None, new: float) -> float:
    return new if old is None else old + LEARNING * (new - old)
