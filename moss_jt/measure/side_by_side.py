"""How fast many conversations are over one reading of the weights, beside what the machine's links and arithmetic allow."""

import itertools
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from moss_jt.engine.cached_text import pages_of
from moss_jt.engine.engine import Engine
from moss_jt.engine.sampling import SamplingParams
from moss_jt.engine.sequence import Sequence as Text
from moss_jt.errors import MossError
from moss_jt.kernels.interface import PAGE
from moss_jt.measure.bench import cache_bytes, prompt_ids
from moss_jt.measure.cpu_limits import MachineLimits
from moss_jt.plan.residency import ResidencyPlan, seconds_per_pass

# Tokens of each answer between two changes of how many are measured together.
TURN = 4


@dataclass(frozen=True)
class Together:
    """The median time of a pass that gives each of ``count`` conversations of ``context`` tokens its next token."""

    count: int
    context: int
    pass_s: float

    @property
    def tokens_per_s(self) -> float:
        return self.count / self.pass_s


def positions_for(context: int) -> int:
    """What of the cache a conversation of ``context`` tokens takes while it is measured."""
    return context + TURN + 1


def measure_together(
    engine: Engine,
    counts: Sequence[int],
    context: int,
    vocabulary: int,
    steps: int,
    between: Callable[[], None] = lambda: None,
) -> list[Together]:
    """Time passes of one token for each of several conversations, answers that the engine schedules and chooses as for anybody.

    Keys and values of the texts are made up, for reading sixteen of them may take longer than all the rest. All numbers of
    conversations are measured in turns of a few tokens, so that they share what a shared machine does in the meantime.

    Args:
        between: called before each turn and after the last, to measure the machine's limits in the same minutes.

    Raises:
        MossError: so many conversations of that length do not fit into the cache, or a number is impossible.
    """
    model, most = engine.model, max(counts)
    each = pages_of(positions_for(context))
    if positions_for(context) > model.capacity:
        raise MossError(
            f"conversations of {context} tokens are measured in {positions_for(context)} positions, and there are "
            f"{model.capacity}. Give a smaller --contexts, or a larger --context."
        )
    if min(counts) < 1 or context < 1 or steps < 1 or most * each > model.pages or most > model.logit_rows:
        raise MossError(
            f"{most} conversations of {context} tokens do not fit: the cache has {model.pages} pages of {PAGE} tokens, and "
            f"a pass {model.logit_rows} rows of logits. Give --parallel smaller numbers, or a smaller --contexts."
        )
    draw = np.random.default_rng(0)
    page = model.read_page(0)
    # Bytes of int8 and scales are zero: on a card what nobody wrote may be no number.
    page[...] = 0 if page.dtype == np.uint8 else draw.standard_normal(page.shape, np.float32) * 0.5
    texts = []
    for first in range(most):
        text = Text(engine)
        text.extend([(token + first) % vocabulary for token in prompt_ids(context, vocabulary)])
        text.assume_read(page)
        texts.append(text)
    times: dict[int, list[float]] = {count: [] for count in counts}
    for _ in range(-(-steps // TURN)):
        between()
        for count in counts:
            times[count] += _passes(texts[:count], context, min(steps, TURN))
    between()
    return [Together(count, context, statistics.median(times[count])) for count in counts]


def _passes(texts: Sequence[Text], context: int, steps: int) -> list[float]:
    """Seconds of each of ``steps`` passes that give each text a token, after one that warms up."""
    with texts[0].engine.lock:  # or the first would be on its way before the others come
        answers = [text.begin(SamplingParams(temperature=0), steps + 1) for text in texts]
    ends = []
    for _ in range(steps + 1):
        for answer in answers:
            next(answer)
        ends.append(time.perf_counter())
    for text, answer in zip(texts, answers, strict=True):
        answer.close()
        text.truncate(context)
    return [later - earlier for earlier, later in itertools.pairwise(ends)]


def least_seconds(
    count: int, context: int, plan: ResidencyPlan, limits: MachineLimits, disk_speed: float | None
) -> float:
    """The law: a pass takes as long as its slowest part, streaming, reading weights and caches from memory, or arithmetic."""
    config = plan.sizes.config
    matrices = config.n_layer * (4 * config.n_embd**2 + 2 * config.n_embd * config.n_inner)
    operations = 2.0 * count * (matrices + config.vocab_size * config.n_embd)
    weights_s = seconds_per_pass(plan, disk_speed or limits.read, limits.read, limits.link)
    memory_s = (plan.weight_bytes_per_pass + count * cache_bytes(plan, context)) / limits.read
    return max(weights_s, memory_s, operations / limits.sgemm)


def report_together(
    measured: Sequence[Together], plan: ResidencyPlan, limits: MachineLimits, disk_speed: float | None
) -> tuple[str, list[dict[str, Any]]]:
    """The text to print, and the same as numbers."""
    lines = ["conversations  tokens each  tokens/s  of the law  s/token of each"]
    rows = []
    for entry in measured:
        law = entry.count / least_seconds(entry.count, entry.context, plan, limits, disk_speed)
        share = entry.tokens_per_s / law
        lines.append(
            f"{entry.count:13}  {entry.context:11}  {entry.tokens_per_s:8.2f}  {share:10.0%}  {entry.pass_s:15.3f}"
        )
        rows.append(
            {
                "conversations": entry.count,
                "context": entry.context,
                "tok_s": entry.tokens_per_s,
                "law_tok_s": law,
                "law_share": share,
            }
        )
    return "\n".join(lines), rows
