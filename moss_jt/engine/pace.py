"""What passes cost here, from those that were made: how many tokens of prompts may ride along with others' answers."""

from moss_jt.kernels.interface import PAGE

# By how much prompts may lengthen a pass that others wait for.
STRETCH = 0.4
LEARNING = 0.2


class Pace:
    """Seconds of a pass of answers, and what a prompt's token adds to it."""

    def __init__(self) -> None:
        self.pass_s: float | None = None
        self._token_s: float | None = None

    def note(self, prompt_tokens: int, seconds: float) -> None:
        """A pass with so many tokens of prompts took so long."""
        if prompt_tokens < PAGE:
            self.pass_s = _blend(self.pass_s, seconds)
        elif self.pass_s is not None:
            self._token_s = _blend(self._token_s, max(0.0, seconds - self.pass_s) / prompt_tokens)

    def prompt_tokens(self, most: int) -> int:
        """Tokens of prompts for a pass that others' answers are in: a page at least, or no prompt would ever be read."""
        if self.pass_s is None or not self._token_s:
            return most
        return min(most, max(PAGE, int(STRETCH * self.pass_s / self._token_s)))


def _blend(old: float | None, new: float) -> float:
    return new if old is None else old + LEARNING * (new - old)
