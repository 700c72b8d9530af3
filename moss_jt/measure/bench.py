"""How fast a loaded model is, pass by pass, beside what the machine's memory, arithmetic and disk allow."""

import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol

from moss_jt.engine.causal_model import Rows
from moss_jt.engine.generate import GenerationStats
from moss_jt.engine.sampling import Sampler, SamplingParams
from moss_jt.errors import MossError
from moss_jt.measure.cpu_limits import MachineLimits
from moss_jt.plan.report import BITS_NAMES
from moss_jt.plan.residency import ResidencyPlan, gib, seconds_per_pass

GB = 10**9
GIB = 1 << 30


class Passes(Protocol):
    """moss_jt.engine.model.Model, all of whose cache one sequence has."""

    @property
    def capacity(self) -> int: ...

    @property
    def pass_tokens(self) -> int: ...

    def forward(self, token_ids: Sequence[int], start_pos: int, rows: Rows) -> Any: ...


@dataclass(frozen=True)
class Times:
    """Medians in seconds: reading ``context`` tokens, the same and choosing a token, and one later token."""

    context: int
    prefill_s: float
    ttft_s: float
    decode_s: float


def prompt_ids(length: int, vocabulary: int) -> list[int]:
    """Different token ids, the same ones at every call; none is special in any of the models."""
    return [17 + (7919 * position) % min(1900, vocabulary - 17) for position in range(length)]


def measure(model: Passes, contexts: Sequence[int], vocabulary: int, steps: int, repeats: int) -> list[Times]:
    """Time the model at each context: one pass that warms up, then ``repeats`` times prefill and ``steps`` tokens.

    Raises:
        MossError: a context and its steps do not fit.
    """
    longest = max(contexts) + steps
    if min(contexts) < 1 or steps < 1 or repeats < 1 or longest > model.capacity:
        raise MossError(
            f"a context of {max(contexts)} and {steps} more tokens do not fit into {model.capacity} positions, or a "
            "number is below 1. Give smaller --contexts, or a larger --context."
        )
    read(model, prompt_ids(min(contexts), vocabulary))
    return [time_context(model, context, vocabulary, steps, repeats) for context in contexts]


def time_context(model: Passes, context: int, vocabulary: int, steps: int, repeats: int) -> Times:
    token_ids = prompt_ids(context, vocabulary)
    sampler = Sampler(SamplingParams(), token_ids)
    prefills, firsts, tokens = [], [], []
    for _ in range(repeats):
        begin = time.perf_counter()
        logits = read(model, token_ids)
        prefills.append(time.perf_counter() - begin)
        sampler.choose(logits)
        firsts.append(time.perf_counter() - begin)
        for position in range(context, context + steps):
            begin = time.perf_counter()
            model.forward(token_ids[:1], position, "last")
            tokens.append(time.perf_counter() - begin)
    return Times(context, *(statistics.median(seconds) for seconds in (prefills, firsts, tokens)))


def read(model: Passes, token_ids: Sequence[int]) -> Any:
    """A prompt in passes as a session makes them: logits (V,) after it."""
    step = model.pass_tokens
    last = (len(token_ids) - 1) // step * step
    for start in range(0, last, step):
        model.forward(token_ids[start : start + step], start, "none")
    return model.forward(token_ids[last:], last, "last")[0]


def draft_fields(stats: GenerationStats) -> dict[str, Any]:
    """Where the time of an answer went that a copy drafted for, and what its drafts came to."""
    tokens = max(1, stats.new_tokens - 1)  # the first is the prompt's
    parts = {f"{name}_s": stats.seconds[name] / tokens for name in ("drafting", "waiting", "computing")}
    return {
        "tokens": tokens,
        "passes": stats.passes,
        "drafted": stats.drafted,
        "accepted": stats.accepted,
        "tokens_per_pass": tokens / max(1, stats.passes),
        "s_per_token": stats.seconds["decode"] / tokens,
        **parts,
    }


def draft_line(copy: str, fields: dict[str, Any]) -> str:
    parts = ", ".join(f"{name} {fields[f'{name}_s']:.3f}" for name in ("drafting", "waiting", "computing"))
    return (
        f"With {copy} writing ahead: {fields['s_per_token']:.3f} s per token ({parts}), "
        f"{fields['tokens_per_pass']:.1f} tokens per pass; {fields['accepted']} of {fields['drafted']} drafted tokens came true"
    )


@dataclass(frozen=True)
class Shares:
    """What one context's times are of the machine's limits: 1 would be the limit itself."""

    prefill: float
    decode: float


def shares(times: Times, plan: ResidencyPlan, limits: MachineLimits, disk_speed: float | None) -> Shares:
    """Prefill against products. A token against reading weights and cache, and against disk and link where weights stream."""
    operations = prefill_operations(plan, times.context)
    cache_s = cache_bytes(plan, times.context) / limits.read
    token_s = seconds_per_pass(plan, disk_speed or limits.read, limits.read, limits.link) + cache_s
    return Shares(operations / limits.sgemm / times.prefill_s, token_s / times.decode_s)


def cache_bytes(plan: ResidencyPlan, context: int) -> int:
    """Bytes of keys and values that a token after ``context`` others reads."""
    return plan.sizes.kv_cache_bytes(context)


def prefill_operations(plan: ResidencyPlan, tokens: int) -> float:
    """Multiplications and additions of reading ``tokens``: all blocks' matrices, attention, and one row of logits."""
    config = plan.sizes.config
    matrices = config.n_layer * (4 * config.n_embd**2 + 2 * config.n_embd * config.n_inner)
    attention = config.n_layer * 2 * config.n_embd * (tokens + 1) / 2
    return 2.0 * (tokens * (matrices + attention) + config.vocab_size * config.n_embd)


def report(
    name: str,
    plan: ResidencyPlan,
    times: Sequence[Times],
    limits: MachineLimits,
    disk_speed: float | None,
    peak_bytes: int,
) -> tuple[str, dict[str, Any]]:
    """The text to print and the object of its last line."""
    sizes = plan.sizes
    on_gpu = limits.link is not None
    disk = "" if disk_speed is None else f", disk {disk_speed / GB:.2f} GB/s"
    link = f", link {limits.link / GB:.2f} GB/s" if limits.link is not None else ""
    over = f", {plan.link_bytes_per_pass / GB:.3f} GB of them over the link" if on_gpu else ""
    products = "gemm" if on_gpu else "sgemm"
    lines = [
        f"{name}, {BITS_NAMES[sizes.bits]}: {plan.weight_bytes_per_pass / GB:.3f} GB of weights per token{over}, "
        f"{plan.disk_bytes_per_pass / GB:.3f} GB of them from disk",
        f"This {'card' if on_gpu else 'machine'}: memory {limits.read / GB:.1f} GB/s, {products} {limits.sgemm / 1e9:.0f} "
        f"GFLOP/s{link}{disk}",
        "",
        f"context  first token   prefill tokens/s  of {products:5}   decode tokens/s  of the limit",
    ]
    rows = []
    for entry in times:
        share = shares(entry, plan, limits, disk_speed)
        prefill, decode = entry.context / entry.prefill_s, 1 / entry.decode_s
        lines.append(
            f"{entry.context:7}  {entry.ttft_s:9.3f} s  {prefill:17.1f}  {share.prefill:7.0%}  {decode:16.2f}  "
            f"{share.decode:11.0%}"
        )
        speeds = {"prefill_tok_s": prefill, "decode_tok_s": decode}
        rows.append({**asdict(entry), **speeds, "prefill_share": share.prefill, "decode_share": share.decode})
    lines += ["", f"Peak memory{' on the host' if on_gpu else ''}: {gib(peak_bytes)}"]
    summary = {
        "model": name,
        "bits": sizes.bits,
        "read_gb_s": limits.read / GB,
        "sgemm_gflop_s": limits.sgemm / 1e9,
        "disk_gb_s": None if disk_speed is None else disk_speed / GB,
        "link_gb_s": None if limits.link is None else limits.link / GB,
        "peak_gib": peak_bytes / GIB,
        "contexts": rows,
    }
    return "\n".join(lines), summary
