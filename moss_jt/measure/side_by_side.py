"""How fast many conversations are over one reading of the weights, beside what the machine's links and arithmetic allow."""

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from moss_jt.engine.cached_text import pages_of
from moss_jt.engine.causal_model import CausalModel, TokenRun
from moss_jt.errors import MossError
from moss_jt.kernels.interface import PAGE
from moss_jt.measure.bench import cache_bytes, prompt_ids
from moss_jt.measure.cpu_limits import MachineLimits
from moss_jt.plan.residency import ResidencyPlan, seconds_per_pass


@dataclass(frozen=True)
class Together:
    """The median time of a pass that gives each of ``count`` conversations of ``context`` tokens its next token."""

    count: int
    context: int
    pass_s: float

    @property
    def tokens_per_s(self) -> float:
        return self.count / self.pass_s


def measure_together(
    model: CausalModel, counts: Sequence[int], context: int, vocabulary: int, steps: int
) -> list[Together]:
    """Time passes of one token for each of several conversations.

    Their texts are read once, for the largest number of them; all numbers are then measured in turns, so that they share
    what a shared machine does in the meantime.

    Raises:
        MossError: so many conversations of that length do not fit into the cache, or a number is impossible.
    """
    each = pages_of(context + steps * len(counts) + 1)
    most = max(counts)
    if min(counts) < 1 or context < 1 or steps < 1 or most * each > model.pages or most > model.logit_rows:
        raise MossError(
            f"{most} conversations of {context} tokens do not fit: the cache has {model.pages} pages of {PAGE} tokens, and "
            f"a pass {model.logit_rows} rows of logits. Give --parallel smaller numbers, or a smaller --contexts."
        )
    pages = [range(first * each, (first + 1) * each) for first in range(most)]
    for first, mine in enumerate(pages):
        _read(model, mine, [(token + first) % vocabulary for token in prompt_ids(context, vocabulary)])
    times: dict[int, list[float]] = {count: [] for count in counts}
    position = context
    for count in counts:  # warm
        _pass(model, pages[:count], position)
    for _ in range(steps):
        for count in counts:
            begin = time.perf_counter()
            _pass(model, pages[:count], position)
            times[count].append(time.perf_counter() - begin)
            position += 1
    return [Together(count, context, statistics.median(times[count])) for count in counts]


def _read(model: CausalModel, pages: Sequence[int], token_ids: list[int]) -> None:
    for start in range(0, len(token_ids), PAGE):
        some = token_ids[start : start + PAGE]
        whole = len(some) == PAGE <= model.pass_tokens
        step = PAGE if whole else min(PAGE, model.pass_tokens)
        for first in range(0, len(some), step):
            model.forward_many([TokenRun(pages, start + first, some[first : first + step], whole)])


def _pass(model: CausalModel, pages: Sequence[Sequence[int]], position: int) -> None:
    model.forward_many([TokenRun(mine, position, [17], rows="last") for mine in pages])


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
