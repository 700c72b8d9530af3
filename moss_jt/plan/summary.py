"""A plan in one sentence: whether the model runs, and how long an answer of 100 tokens takes."""

from collections.abc import Sequence

from moss_jt.plan.residency import BITS_NAMES

ANSWER_TOKENS = 100  # a paragraph


def duration(seconds: float) -> str:
    """As people say it: 0.4 s, 47 s, 36 minutes, 2.5 hours."""
    if seconds < 10:
        return f"{max(seconds, 0.1):.1f} s"
    if seconds < 100:
        return f"{seconds:.0f} s"
    if seconds < 5400:
        return f"{seconds / 60:.0f} minutes"
    return f"{seconds / 3600:.1f} hours"


def per_token(seconds: float) -> str:
    return f"{seconds:.1f} s each" if seconds >= 1 else f"{1 / seconds:.1f} tokens/s"


def summary(seconds: float, here: bool, others: Sequence[tuple[int, float]]) -> str:
    """The sentence.

    Args:
        seconds: a token takes at least.
        here: the plan is for this machine as it is.
        others: bits and seconds per token of the same model in fewer bits.
    """
    quicker = ", ".join(
        f"as {BITS_NAMES[bits]} {duration(ANSWER_TOKENS * other)}"
        for bits, other in others
        if other < seconds
    )
    runs = f"Runs{' here' if here else ''}."
    if ANSWER_TOKENS * seconds < 1:
        return f"{runs} {ANSWER_TOKENS} tokens take less than a second at best."
    return (
        f"{runs} {ANSWER_TOKENS} tokens take about {duration(ANSWER_TOKENS * seconds)} at best "
        f"({per_token(seconds)}){f'; {quicker}' if quicker else ''}."
    )
