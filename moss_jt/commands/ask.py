"""moss-jt ask."""

import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import click

from moss_jt.chat.chat import Chat
from moss_jt.chat.events import Command, Event, Notice, Result, Text, Thought
from moss_jt.chat.turn import MAX_ANSWER_TOKENS
from moss_jt.commands.options import (
    adapter_option,
    loaded,
    loading_options,
    max_new_tokens_option,
    model_folder,
    only_adapter,
    read_text,
    sampling_arguments,
    sampling_options,
)
from moss_jt.commands.plugin_options import chat_arguments, plugin_options
from moss_jt.engine.sampling import SamplingParams
from moss_jt.errors import MossError
from moss_jt.plugins.interface import Source
from moss_jt.store.locations import TINY, model_names
from moss_jt.store.manifest import MANIFEST
from moss_jt.terminal.output import json_text, pass_on
from moss_jt.terminal.pictures import make_shower
from moss_jt.terminal.screen import Screen
from moss_jt.terminal.turn_view import TurnView


@click.command()
@click.argument("words", nargs=-1, metavar="[MODEL] QUESTION")
@click.option(
    "--json", "as_json", is_flag=True, help="Print one JSON object at the end, with everything that happened."
)
@click.option("--quiet", is_flag=True, help="Show nothing but the answer.")
@plugin_options
@max_new_tokens_option(MAX_ANSWER_TOKENS, "At most this many tokens in the answer.")
@sampling_options
@adapter_option
@loading_options
def command(words: tuple[str, ...], as_json: bool, quiet: bool, max_new_tokens: int, **options: Any) -> None:
    """Ask MODEL, by default the one used last, one question.

    Standard output gets the answer and nothing else; thoughts, commands, results and sources go to standard error. What is
    piped in, or - for QUESTION, is one message, however many lines it has.

    \b
    moss-jt ask "What is 37 times 48?"
    moss-jt ask moss-tiny 你好
    moss-jt ask --json --greedy - < letter.txt
    """
    model, question = question_of(words)
    sampling = sampling_arguments(options)
    SamplingParams(**sampling)
    folder = model_folder(model)
    arguments = chat_arguments(options, folder)
    with loaded(str(folder), options) as moss:
        adapter = only_adapter(moss)
        chat = moss.chat(**arguments, max_new_tokens=max_new_tokens, adapter=adapter, **sampling)
        if as_json:
            begin = time.monotonic()
            events = list(chat.send(question))
            pass_on(json_text(summary(chat, events, time.monotonic() - begin)) + "\n")
        else:
            view = AnswerView(chat, quiet)
            view.show(chat.send(question))
            if view.stopped:
                raise click.Abort


def question_of(words: tuple[str, ...]) -> tuple[str | None, str]:
    """MODEL and QUESTION; one word alone is the question, unless it names a model and a question is piped in.

    Raises:
        UsageError: there are more words, or no question and nothing is piped in.
        MossError: the question is empty, or no text.
    """
    piped = not sys.stdin.isatty()
    if len(words) > 2:
        raise click.UsageError(
            'write the question as one argument, in quotation marks: moss-jt ask "How are you?"'
        )
    if len(words) == 2:
        model, question = words[0], words[1]
    elif len(words) == 1 and not names_a_model(words[0]):
        model, question = None, words[0]
    elif piped:
        model, question = (words[0] if words else None), "-"
    else:
        name = f"{words[0]} " if words else ""
        raise click.UsageError(f'the question is missing: moss-jt ask {name}"What is 37 times 48?"')
    if question == "-":
        question = read_text(sys.stdin.buffer)
    question = question.strip()
    if not question:
        raise MossError("the question is empty.")
    return model, question


def names_a_model(word: str) -> bool:
    return word == TINY or word in model_names() or (Path(word) / MANIFEST).exists()


class AnswerView(TurnView):
    """The answer on standard output, everything else on standard error."""

    def __init__(self, chat: Chat, quiet: bool) -> None:
        self._quiet, self._wrote = quiet, False
        super().__init__(Screen(sys.stderr), chat, make_shower(), thoughts=not quiet, cost=not quiet)

    def begin_answer(self) -> None:
        pass

    def write_answer(self, text: str) -> None:
        self._screen.end_wait()
        pass_on(text)
        self._wrote = True

    def end_answer(self) -> None:
        super().end_answer()
        if self._wrote:
            pass_on("\n")

    def show_event(self, event: Event) -> None:
        if not self._quiet or isinstance(event, Text):
            super().show_event(event)

    def show_sources(self) -> None:
        if not self._quiet:
            super().show_sources()


def summary(chat: Chat, events: Iterable[Event], seconds: float) -> dict[str, Any]:
    """What --json prints."""
    told: dict[str, Any] = {"answer": "", "thoughts": "", "commands": [], "results": [], "notices": []}
    for event in events:
        if isinstance(event, Text):
            told["answer"] += event.text
        elif isinstance(event, Thought):
            told["thoughts"] += event.text
        elif isinstance(event, Command):
            told["commands"].append(event.text)
        elif isinstance(event, Result):
            told["results"].append(result_fields(event))
        elif isinstance(event, Notice):
            told["notices"].append({"code": event.code, **event.values})
    told["sources"] = {str(number): source_fields(source) for number, source in sorted(chat.sources.items())}
    stats = chat.stats
    return {
        **told,
        "read_tokens": stats.read_tokens,
        "new_tokens": stats.new_tokens,
        "seconds": round(seconds, 3),
    }


def result_fields(result: Result) -> dict[str, Any]:
    return {
        "command": result.command,
        "text": result.text,
        "found": result.found,
        "numbers": list(result.numbers),
        "picture": None if result.picture is None else str(result.picture),
        "failure": result.failure,
    }


def source_fields(source: Source) -> dict[str, str]:
    return {"title": source.title, "location": source.location}
