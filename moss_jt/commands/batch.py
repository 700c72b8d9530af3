"""moss-jt batch."""

from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import click

from moss_jt.chat.batch import (
    Defaults,
    Done,
    Request,
    answer_line,
    answers_line,
    error_line,
    parse_line,
)
from moss_jt.commands.options import loaded, loading_options, sampling_arguments, sampling_options
from moss_jt.commands.progress import token_bar
from moss_jt.convert.named import model_folder
from moss_jt.engine.sampling import SamplingParams
from moss_jt.errors import MossError
from moss_jt.plan.machine import memory_budget
from moss_jt.store.model_folder import Store, open_store
from moss_jt.store.sizes import sizes_of_store
from moss_jt.store.tokenizer import Tokenizer
from moss_jt.terminal.screen import Screen

if TYPE_CHECKING:
    from moss_jt.engine.generate import Generation
    from moss_jt.moss import Moss

MAX_LINE = 16 << 20  # bytes
# Room in the cache, where the user does not say for how many answers: a quarter of the memory, sixteen at most.
MOST_PARALLEL, CACHE_SHARE = 16, 4


@click.command()
@click.argument("model")
@click.argument("prompts", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.argument("answers", type=click.Path(dir_okay=False, path_type=Path))
@click.option(
    "--max-new-tokens", type=int, default=256, show_default=True, help="The most tokens of an answer."
)
@click.option(
    "--parallel",
    type=int,
    metavar="N",
    help="Room for N answers at once. [default: up to 16, as a quarter of the memory has room for]",
)
@sampling_options
@loading_options
def command(
    model: str, prompts: Path, answers: Path, max_new_tokens: int, parallel: int | None, **options: Any
) -> None:
    """Answer all PROMPTS with MODEL, many at once: each reading of the model serves a token of every answer.

    PROMPTS has one JSON object a line: {"prompt": TEXT}, {"messages": [..]} as in OpenAI's API, or a line of its batch files.
    Options such as "temperature", "seed" and "max_new_tokens" may stand beside them. ANSWERS gets a line for each, in the same
    order. Stopped or killed, it goes on where it was when it is run again.

    \b
    moss-jt batch moss-moon-003-sft prompts.jsonl answers.jsonl --memory 16GiB
    """
    store = open_store(model_folder(model))
    tokenizer = Tokenizer.from_file(store.tokenizer_path)
    defaults = Defaults(SamplingParams(**sampling_arguments(options)), max_new_tokens)
    total, longest = _survey(prompts, tokenizer, defaults)
    options["context"] = options["context"] or max(2, min(longest, store.config.n_positions))
    options["parallel"] = parallel or _parallel(store, options)
    name = store.path.name
    with answers.open("a+b") as results:
        done = _answered(results, prompts, answers, name)
        if done < total:
            with loaded(model, options) as moss, token_bar(answers.name, total, "answers", done) as bar:
                for line in _answer_all(moss, name, prompts, done, defaults):
                    # Half of a surrogate pair, as JSON writes it.
                    results.write(line.encode(errors="backslashreplace") + b"\n")
                    results.flush()
                    bar.update(1)
    Screen().line(f"{total} answers in {answers}.")


def _lines(prompts: Path) -> Iterator[str]:
    """Lines that hold something.

    Raises:
        MossError: the file cannot be read, or is no text in lines.
    """
    try:
        with prompts.open("rb") as file:
            while raw := file.readline(MAX_LINE + 1):
                if len(raw) > MAX_LINE:
                    raise MossError(
                        f"{prompts} has a line of more than {MAX_LINE >> 20} MiB. One prompt is one line."
                    )
                text = raw.decode("utf-8")
                if text.strip():
                    yield text
    except (OSError, ValueError) as error:
        raise MossError(f"{prompts} cannot be read as lines of UTF-8 text: {error}.") from error


def _survey(prompts: Path, tokenizer: Tokenizer, defaults: Defaults) -> tuple[int, int]:
    """How many lines there are, and the most tokens that one needs with its answer."""
    total, longest = 0, 0
    for line in _lines(prompts):
        total += 1
        try:
            request = parse_line(line, tokenizer, defaults)
        except MossError:
            continue  # it is told in its turn among the answers
        longest = max(longest, len(request.token_ids) + max(0, request.max_new_tokens))
    return total, longest


def _parallel(store: Store, options: dict[str, Any]) -> int:
    if options["gpu"]:
        return 1
    one = sizes_of_store(store).cache_bytes(options["context"])
    return max(1, min(MOST_PARALLEL, memory_budget(options["memory"]) // CACHE_SHARE // one))


def _answered(results: BinaryIO, prompts: Path, answers: Path, model: str) -> int:
    """How many lines were answered before; a line that a kill cut off is removed.

    Raises:
        MossError: the file holds something else.
    """
    results.seek(0)
    count, end = 0, 0
    lines = _lines(prompts)
    while (raw := results.readline(MAX_LINE)).endswith(b"\n"):
        line = next(lines, None)
        if line is None or not answers_line(raw.decode("utf-8", "replace"), count, model, line):
            raise MossError(
                f"{answers} is no beginning of the answers of {model} to {prompts}: line {count + 1} differs. "
                "Remove it, or give another name."
            )
        count, end = count + 1, end + len(raw)
    results.truncate(end)
    results.seek(end)
    return count


def _answer_all(moss: "Moss", name: str, prompts: Path, done: int, defaults: Defaults) -> Iterator[str]:
    """Answers of all lines after the first ``done``, in order."""
    from moss_jt.moss import MANY

    pending: deque[tuple[int, str, Request, Generation] | str] = deque()
    for number, line in enumerate(_lines(prompts)):
        if number < done:
            continue
        try:
            request = parse_line(line, moss.tokenizer, defaults)
            limits = request.max_new_tokens, request.stop
            pending.append((number, line, request, moss.begin(request.token_ids, request.params, *limits)))
        except MossError as error:
            pending.append(error_line(number, name, line, str(error)))
        while len(pending) >= MANY:
            yield _finished(name, pending.popleft())
    while pending:
        yield _finished(name, pending.popleft())


def _finished(name: str, answer: "tuple[int, str, Request, Generation] | str") -> str:
    if isinstance(answer, str):
        return answer
    number, line, request, generation = answer
    generation.finish()
    stats = generation.stats
    done = Done(generation.text, stats.prompt_tokens, stats.new_tokens, stats.stop_reason)
    return answer_line(number, name, line, request, done)
