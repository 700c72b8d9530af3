"""moss-jt batch."""

import itertools
import sys
from collections import deque
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from moss_jt.chat.batch import (
    Defaults,
    Done,
    Request,
    answer_line,
    error_line,
    parse_line,
)
from moss_jt.commands.batch_files import Survey, Work, lines_of
from moss_jt.commands.options import (
    adapters_option,
    loaded,
    loading_options,
    max_new_tokens_option,
    sampling_arguments,
    sampling_options,
)
from moss_jt.commands.progress import token_bar
from moss_jt.convert.named import model_folder
from moss_jt.engine.sampling import SamplingParams
from moss_jt.errors import MossError
from moss_jt.plan.machine import memory_budget
from moss_jt.store.model_folder import Store, open_store
from moss_jt.store.sizes import sizes_of_store
from moss_jt.store.tokenizer import Tokenizer
from moss_jt.terminal.output import bounded
from moss_jt.terminal.screen import Screen
from moss_jt.train.adapter_bank import named_folders

if TYPE_CHECKING:
    from moss_jt.engine.generate import Generation
    from moss_jt.moss import Moss

    # A line that is being answered, or what is to be written as it is.
    Begun = tuple[int, str, Request, Generation] | bytes

MOST_TOLD = 5  # faults
# Room in the cache, where the user does not say for how many answers: a quarter of the memory, sixteen at most.
MOST_PARALLEL, CACHE_SHARE = 16, 4


@click.command()
@click.argument("model")
@click.argument("prompts", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.argument("answers", type=click.Path(dir_okay=False, path_type=Path))
@max_new_tokens_option(256, "At most this many tokens in an answer.")
@click.option(
    "--parallel",
    type=click.IntRange(min=1),
    metavar="N",
    help="Room for N answers at once. [default: up to 16, as a quarter of the memory has room for]",
)
@sampling_options
@adapters_option
@loading_options
def command(
    model: str, prompts: Path, answers: Path, max_new_tokens: int, parallel: int | None, **options: Any
) -> None:
    """Answer all PROMPTS with MODEL, many at once: each reading of the model serves a token of every answer.

    PROMPTS has one JSON object a line: {"messages": [..]} as in OpenAI's API, a line of its batch files, or {"prompt": TEXT}, a
    text that is continued as it is. Options such as "temperature", "seed", "max_new_tokens" and "adapter" may stand beside them.
    ANSWERS gets a line for each, in the same order.

    Run it again after it was stopped, or after correcting lines that had errors: it does what is left. Exit code 1 when lines
    had errors.

    \b
    moss-jt batch moss-moon-003-sft-plugin-int4 prompts.jsonl answers.jsonl --memory 14GiB
    """
    store = open_store(model_folder(model))
    tokenizer = Tokenizer.from_file(store.tokenizer_path)
    params, adapters = SamplingParams(**sampling_arguments(options)), named_folders(options["adapters"])
    defaults = Defaults(params, max_new_tokens, adapters.keys())
    survey = Survey.of(prompts, tokenizer, defaults)
    report(prompts, survey.faults)
    options["context"] = options["context"] or max(2, min(survey.longest, store.config.n_positions))
    options["parallel"] = parallel or _parallel(store, options)
    work = Work(prompts, answers, store.path.name, survey)
    with work.resumed() as done:
        if done < survey.total:
            bar = token_bar(answers.name, survey.total, "answers", done)
            all_faulty = len(survey.faults) == survey.total
            with nullcontext() if all_faulty else loaded(model, options) as moss, bar:
                for line in _answer_all(moss, tokenizer, work, done, defaults):
                    work.write(line)
                    bar.update(1)
    errors = work.finish()
    Screen().line(f"{count(survey.total - len(errors), 'answer')} in {answers}.")
    if errors:
        raise MossError(errors_told(errors, prompts, answers))


def errors_told(errors: list[int], prompts: Path, answers: Path) -> str:
    """Which lines had errors, and what to do."""
    numbers = ", ".join(map(str, errors[:MOST_TOLD])) + (", ..." if len(errors) > MOST_TOLD else "")
    lines, them = (f"line {numbers}", "it") if len(errors) == 1 else (f"lines {numbers}", "them")
    return (
        f"{lines} of {prompts} had an error; {answers} says which. Correct {them} and run the same command again: it does what "
        "is left."
    )


def count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def report(prompts: Path, faults: dict[int, str]) -> None:
    """What is wrong with lines, before time is spent on the others."""
    screen = Screen(sys.stderr)
    for number, fault in list(faults.items())[:MOST_TOLD]:
        screen.line(f"{prompts}, line {number}: {bounded(fault)}")
    if len(faults) > MOST_TOLD:
        screen.line(f"... and {len(faults) - MOST_TOLD} more.")


def _parallel(store: Store, options: dict[str, Any]) -> int:
    if options["gpu"]:
        return 1
    one = sizes_of_store(store, options["cache_bits"]).cache_bytes(options["context"])
    return max(1, min(MOST_PARALLEL, memory_budget(options["memory"]) // CACHE_SHARE // one))


def _answer_all(
    moss: "Moss | None", tokenizer: Tokenizer, work: Work, done: int, defaults: Defaults
) -> Iterator[bytes]:
    """Answers of all lines after the first ``done``, in order; without a model where every line has a fault."""
    from moss_jt.moss import MANY

    pending: deque[Begun] = deque()
    lines = itertools.islice(lines_of(work.prompts), done, None)
    for index, ((_, line), kept) in enumerate(zip(lines, work.kept(done), strict=True), done):
        pending.append(_begun(moss, tokenizer, work.model, index, line, defaults) if kept is None else kept)
        while len(pending) >= MANY:
            yield _finished(work.model, pending.popleft())
    while pending:
        yield _finished(work.model, pending.popleft())


def _begun(
    moss: "Moss | None", tokenizer: Tokenizer, name: str, index: int, line: str, defaults: Defaults
) -> "Begun":
    try:
        request = parse_line(line, tokenizer, defaults)
        assert moss is not None
        limits = request.max_new_tokens, request.stop
        answer = moss.begin(request.token_ids, request.params, *limits, adapter=request.adapter)
    except MossError as error:
        return encoded(error_line(index, name, line, str(error)))
    return index, line, request, answer


def _finished(name: str, answer: "Begun") -> bytes:
    if isinstance(answer, bytes):
        return answer
    index, line, request, generation = answer
    generation.finish()
    stats = generation.stats
    finished = Done(generation.text, stats.prompt_tokens, stats.new_tokens, stats.stop_reason)
    return encoded(answer_line(index, name, line, request, finished))


def encoded(line: str) -> bytes:
    """With half of a surrogate pair, if there is one, as JSON writes it."""
    return line.encode(errors="backslashreplace") + b"\n"
