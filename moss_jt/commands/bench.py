"""moss-jt bench."""

from typing import TYPE_CHECKING, Any

import click

from moss_jt.commands.options import (
    adapter_option,
    draft_model_option,
    loaded,
    memory_options,
    model_argument,
    model_folder,
    only_adapter,
)
from moss_jt.engine.engine import Engine
from moss_jt.errors import MossError
from moss_jt.plan.machine import peak_memory_bytes
from moss_jt.plan.residency import BITS_NAMES
from moss_jt.store.locations import model_home
from moss_jt.store.model_folder import open_store
from moss_jt.terminal.output import json_text
from moss_jt.terminal.screen import Screen
from moss_jt.weights.disk_speed import disk_under

if TYPE_CHECKING:
    from moss_jt.measure.cpu_limits import MachineLimits


@click.command()
@model_argument
@click.option(
    "--contexts", default="32,256", show_default=True, help="Lengths of the text that is read first."
)
@click.option(
    "--new-tokens", type=int, default=24, show_default=True, help="Tokens to write after each of them."
)
@click.option(
    "--repeats", type=int, default=3, show_default=True, help="How many runs the medians are taken over."
)
@click.option(
    "--parallel",
    metavar="NUMBERS",
    help="Also measure so many conversations at once, each as long as the longest of --contexts: 1,4,16.",
)
@click.option(
    "--turns",
    is_flag=True,
    help="Also measure the wait for the first word of a first turn, a second one, and one with three search results.",
)
@memory_options
@draft_model_option
@adapter_option
def command(
    model: str | None,
    contexts: str,
    new_tokens: int,
    repeats: int,
    parallel: str | None,
    turns: bool,
    **options: Any,
) -> None:
    """Measure MODEL's speed beside what this machine allows: reading memory, multiplying matrices, reading the disk.

    Time to the first token, tokens per second while the prompt is read and afterwards, without drafts; and where a copy drafts
    (--draft-model), a greedy answer with it. The last line is one JSON object.
    """
    lengths = parse_contexts(contexts)
    counts = [] if parallel is None else parse_contexts(parallel, "--parallel")
    if counts:
        if min(counts) < 1:
            raise MossError("--parallel needs numbers from 1 up.")
        options["parallel"] = max(counts)
        options["context"] = options["context"] or max(lengths) + max(new_tokens, 8)
    store = open_store(model_folder(model))
    with loaded(model, options) as moss:
        from moss_jt.measure.bench import draft_fields, draft_line, measure, prompt_ids, report
        from moss_jt.measure.first_words import first_words, line_of
        from moss_jt.measure.side_by_side import measure_together, report_together

        adapter = only_adapter(moss)
        moss.model.adapter = None if adapter is None else moss.adapters[adapter].number
        times = measure(moss.model, lengths, moss.config.vocab_size, new_tokens, repeats)
        together = []
        if counts:
            engine = Engine(moss.model)  # one of its own: what is compared is passes, without drafts
            together = measure_together(engine, counts, max(lengths), moss.config.vocab_size, new_tokens)
            engine.close()
        drafts = None
        if moss.copy is not None:
            prompt = prompt_ids(max(lengths), moss.config.vocab_size)
            answer = moss.generate(prompt, max_new_tokens=new_tokens, temperature=0, adapter=adapter).finish()
            drafts = draft_fields(answer.stats)
        words = list(first_words(moss.session(), moss.config.vocab_size)) if turns else []
        peak = peak_memory_bytes()
        plan = moss.plan
    tokens = min(max(lengths), plan.pass_tokens)
    limits = limits_of(options["gpu"], tokens, plan.sizes.config.n_embd)
    speed = None
    if plan.disk_bytes_per_pass:
        speed = disk_under(store, model_home()).best
    text, summary = report(store.path.name, plan, times, limits, speed, peak)
    screen = Screen()
    screen.line(text)
    if drafts is not None and plan.copy is not None:
        screen.line(f"\n{draft_line(f'an {BITS_NAMES[plan.copy.bits]} copy', drafts)}")
        summary["drafts"] = drafts
    if words:
        screen.line("\n" + "\n".join(line_of(word) for word in words))
        summary["first_words"] = [word._asdict() for word in words]
    if together:
        table, summary["parallel"] = report_together(together, plan, limits, speed)
        screen.line(f"\n{table}")
    screen.line(json_text(summary))


def limits_of(gpu: bool, tokens: int, width: int) -> "MachineLimits":
    """The limits of the device that was measured, now that the model is closed."""
    if gpu:
        from moss_jt.measure.gpu_limits import gpu_limits

        return gpu_limits(tokens, width)
    from moss_jt.measure.cpu_limits import machine_limits

    return machine_limits(tokens, width)


def parse_contexts(text: str, option: str = "--contexts") -> list[int]:
    """``32,256`` as numbers.

    Raises:
        MossError: it is no list of whole numbers.
    """
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isascii() and part.isdigit() and len(part) < 8 for part in parts):
        raise MossError(f"{option} {text!r} is not a list of numbers. Write it like 32,256.")
    return [int(part) for part in parts]
