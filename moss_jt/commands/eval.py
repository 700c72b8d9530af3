"""moss-jt eval."""

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import click

from moss_jt.backend.threads import compute_threads
from moss_jt.commands.options import adapter_option, cache_bits_option
from moss_jt.commands.progress import token_bar
from moss_jt.convert.named import model_folder
from moss_jt.engine.cached_text import pages_of
from moss_jt.errors import MossError
from moss_jt.kernels.needs import CpuNeeds
from moss_jt.measure.perplexity import (
    DRAFTS,
    EngineTokens,
    Evaluation,
    Score,
    evaluate,
    rows_at_once,
    workspace_bytes,
)
from moss_jt.moss import Moss
from moss_jt.plan.machine import memory_budget
from moss_jt.plan.placement import footprint_here
from moss_jt.plan.residency import gib, gib_up, smallest_bytes
from moss_jt.store.model_folder import Store, open_store
from moss_jt.store.sizes import MIB, sizes_of_store
from moss_jt.store.tokenizer import Tokenizer
from moss_jt.terminal.output import json_text
from moss_jt.terminal.screen import Screen

DEFAULT_CONTEXT = 1024
MAX_CHARACTERS = 64 << 20
LONGEST_TOKEN = 256  # characters
TOKENIZER_BYTES = 32 * MIB  # that loading a second model's takes


@click.command()
@click.argument("model")
@click.argument("file", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--against", metavar="OTHER", help="Compare with this model, such as the float16 one.")
@click.option(
    "--context", type=int, help="Tokens of a window of text.  [default: 1024, or what the model has]"
)
@click.option("--max-tokens", type=int, help="Read at most this many tokens of FILE.")
@click.option(
    "--memory", metavar="AMOUNT", help="RAM for the whole process: 8GiB, 80%.  [default: what is free]"
)
@cache_bits_option
@adapter_option
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def command(
    model: str,
    file: Path,
    against: str | None,
    context: int | None,
    max_tokens: int | None,
    memory: str | None,
    cache_bits: int,
    adapters: tuple[str, ...],
    as_json: bool,
) -> None:
    """Perplexity of MODEL on a text; with --against, also how far its predictions are from another model's.

    FILE is UTF-8 text; <eoh>, <eom> and the like in it count as the special tokens. It is read in windows of --context
    tokens, each from an empty cache. Perplexity is per token, so only models with the same tokenizer compare. Tokens per pass
    are what drafts of 4 to 22 tokens by the one would bring the other on this text: see --draft-model of moss-jt chat.
    --cache-bits and --adapter are MODEL's; OTHER has a cache of 16 bits and no adapter.

    \b
    moss-jt eval moss-moon-003-sft-int4 dialogues.txt --against moss-moon-003-sft
    moss-jt eval moss-tiny dialogues.txt --cache-bits 8 --against moss-tiny      what a cache in int8 costs
    """
    names = [model] if against is None else [model, against]
    stores = [open_store(model_folder(name)) for name in names]
    context = _window(stores, names, context)
    token_ids = _token_ids(stores, names, file, max_tokens)
    with ExitStack() as stack:
        loaded = [stack.enter_context(moss) for moss in _load(stores, context, memory, cache_bits, adapters)]
        predicted = len(token_ids) - -(-len(token_ids) // context)  # all but the first of each window
        with token_bar(file.name, predicted) as bar:
            models = [EngineTokens(moss.engine, next(iter(moss.adapters.values()), None)) for moss in loaded]
            together = min(moss.model.pages for moss in loaded) // pages_of(context)
            other = None if against is None else models[1]
            result = evaluate(token_ids, models[0], other, context, together, bar.update)
    name = model if cache_bits == 16 else f"{model}, cache in int8"
    Screen().line(json_text(_fields(result, context)) if as_json else _table(result, name, against, context))


def _window(stores: list[Store], names: list[str], context: int | None) -> int:
    """Tokens of a window that fit into all models' contexts."""
    for name, store in zip(names, stores, strict=True):
        if context is not None and not 2 <= context <= store.config.n_positions:
            raise MossError(
                f"--context {context} is not possible: {name} takes 2 to {store.config.n_positions} tokens."
            )
    return context or min(DEFAULT_CONTEXT, *(store.config.n_positions for store in stores))


def _token_ids(stores: list[Store], names: list[str], file: Path, max_tokens: int | None) -> list[int]:
    """The text's tokens, which must be the same for all models."""
    text = _read(file, max_tokens)
    texts = [Tokenizer.from_file(store.tokenizer_path).encode(text)[:max_tokens] for store in stores]
    if texts[0] != texts[-1]:
        raise MossError(
            f"{names[0]} and {names[-1]} have different tokenizers: their predictions cannot be compared."
        )
    return texts[0]


def _read(file: Path, max_tokens: int | None) -> str:
    """The text, or as much of it as certainly holds ``max_tokens`` tokens."""
    limit = MAX_CHARACTERS if max_tokens is None else min(MAX_CHARACTERS, max_tokens * LONGEST_TOKEN)
    try:
        with file.open(encoding="utf-8-sig") as lines:
            text = lines.read(limit + 1)
    except (OSError, ValueError) as error:
        raise MossError(f"{file} cannot be read as a UTF-8 text: {error}.") from error
    if len(text) > MAX_CHARACTERS and max_tokens is None:
        raise MossError(
            f"{file} is longer than {MAX_CHARACTERS} characters. Say how much to read with --max-tokens."
        )
    return text


def _load(
    stores: list[Store], context: int, memory: str | None, cache_bits: int, adapters: tuple[str, ...]
) -> Iterator[Moss]:
    """The models, one after the other, the first one with the adapters and with the cache's bits, with room for as many windows as
    one pass scores where that costs little.

    Nothing is drafted: there is nothing to generate.
    """
    vocabulary = max(store.config.vocab_size for store in stores)
    budget = memory_budget(memory)
    rows = rows_at_once(vocabulary, len(stores), budget)
    budget -= workspace_bytes(vocabulary, len(stores), rows)
    all_bits = [cache_bits, 16][: len(stores)]
    shares = _shares(stores, all_bits, context, budget)
    for store, bits, share in zip(stores, all_bits, shares, strict=True):
        windows = share // 20 // sizes_of_store(store, bits).cache_bytes(context)
        parallel = max(1, min(rows // context, windows))
        moss = Moss.load(
            store.path,
            memory=share,
            context=context,
            draft="off",
            parallel=parallel,
            cache_bits=bits,
            adapters=adapters,
        )
        adapters = ()
        moss.model.score_rows = rows
        yield moss


def _shares(stores: list[Store], all_bits: list[int], context: int, budget: int) -> list[int]:
    """What the process may hold once each of the models is there.

    The first of two gets half of what there is for models, or what it needs at least; the other one the rest.

    Raises:
        MossError: it is too little for both.
    """
    if len(stores) == 1:
        return [budget]
    each = zip(stores, all_bits, strict=True)
    first, second = (_smallest_bytes(store, bits, context) for store, bits in each)
    footprint = footprint_here()
    if budget < footprint + first + second:
        lacking = footprint + first + second - budget
        raise MossError(
            f"{gib(budget)} is too little for two models at once: {gib_up(lacking)} more is needed. Raise --memory by as "
            "much, or lower --context."
        )
    half = (budget - footprint) // 2
    return [footprint + min(max(half, first), budget - footprint - second), budget]


def _smallest_bytes(store: Store, cache_bits: int, context: int) -> int:
    needs, sizes = (
        CpuNeeds(store.config, store.bits, cache_bits=cache_bits),
        sizes_of_store(store, cache_bits),
    )
    return smallest_bytes(sizes, needs, context, compute_threads()) + TOKENIZER_BYTES


def _fields(result: Evaluation, context: int) -> dict[str, Any]:
    fields: dict[str, Any] = {"context": context, "model": _score_fields(result.model)}
    if result.reference is not None and result.comparison is not None:
        fields["against"] = _score_fields(result.reference)
        fields["mean_kl_divergence"] = result.comparison.mean_divergence
        fields["greedy_agreement"] = result.comparison.agreement
        tokens = result.comparison.tokens_per_pass
        fields["tokens_per_pass"] = {str(drafted): tokens(drafted) for drafted in DRAFTS}
    return fields


def _score_fields(score: Score) -> dict[str, Any]:
    return {"tokens": score.tokens, "nats_per_token": score.nats_per_token, "perplexity": score.perplexity}


def _table(result: Evaluation, model: str, against: str | None, context: int) -> str:
    width = max(len(model), len(against or ""), len("same greedy token"))
    lines = [
        f"{result.model.tokens} tokens scored, in windows of {context}",
        _score_line(model, result.model, width),
    ]
    if against is not None and result.reference is not None and result.comparison is not None:
        lines.append(_score_line(against, result.reference, width))
        lines.append(
            f"{'mean divergence':{width}}  {result.comparison.mean_divergence:.6f} nats, KL({against} || {model})"
        )
        lines.append(f"{'same greedy token':{width}}  {100 * result.comparison.agreement:.2f} %")
        tokens = ", ".join(
            f"{drafted}: {result.comparison.tokens_per_pass(drafted):.1f}" for drafted in DRAFTS
        )
        lines.append(
            f"{'tokens per pass':{width}}  if one drafts for the other, by the tokens of a draft: {tokens}"
        )
    return "\n".join(lines)


def _score_line(name: str, score: Score, width: int) -> str:
    return f"{name:{width}}  perplexity {score.perplexity:.4f} ({score.nats_per_token:.4f} nats per token)"
