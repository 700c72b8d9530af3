"""moss-jt generate."""

import re
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import click

from moss_jt.chat.language import Language
from moss_jt.commands.options import (
    adapter_option,
    loaded,
    loading_options,
    model_argument,
    only_adapter,
    read_text,
    sampling_arguments,
    sampling_options,
)
from moss_jt.engine.causal_model import Watcher
from moss_jt.engine.generate import Generation
from moss_jt.terminal.output import json_text, pass_on
from moss_jt.terminal.screen import Screen
from moss_jt.terminal.turn_view import ReadingProgress

if TYPE_CHECKING:
    from moss_jt.moss import Moss


@click.command()
@model_argument
@click.argument("words", nargs=-1, metavar="")
@click.option(
    "--prompt", metavar="TEXT", help="What to continue; - reads it from standard input, as a pipe does."
)
@click.option(
    "--max-new-tokens",
    type=int,
    default=256,
    show_default=True,
    help="At most this many tokens in the answer.",
)
@click.option(
    "--stop",
    multiple=True,
    metavar="TEXT",
    help="Stop where this text appears; may be given several times. "
    r"\n in it is a newline, \t a tab, \r a carriage return, \\ a backslash.",
)
@click.option(
    "--json", "as_json", is_flag=True, help="Print one JSON object at the end, with tokens and times."
)
@sampling_options
@adapter_option
@loading_options
def command(
    model: str | None,
    words: tuple[str, ...],
    prompt: str | None,
    max_new_tokens: int,
    stop: tuple[str, ...],
    as_json: bool,
    **options: Any,
) -> None:
    """Continue a text with MODEL, by default the one used last. To ask something, use moss-jt ask.

    The prompt is taken as it is: no chat format is added, and <eoh> and the like in it count as special tokens.

    \b
    moss-jt generate moss-tiny --prompt '<|Human|>: Hi<eoh>'
    moss-jt generate --prompt - --greedy --json < prompt.txt
    """
    if words:
        raise click.UsageError(
            "the text to continue is given with --prompt, or piped in. To ask MOSS something: "
            f'moss-jt ask {model} "{" ".join(words)}"'
        )
    text = prompt_text(prompt)
    with loaded(model, options) as moss:
        generation = moss.generate(
            text,
            max_new_tokens=max_new_tokens,
            stop=[unescaped(one) for one in stop],
            adapter=only_adapter(moss),
            **sampling_arguments(options),
        )
        progress = ReadingProgress(screen := Screen(sys.stderr), Asked(moss, generation))
        progress.begin()
        for piece in generation:
            progress.end()
            screen.end_wait()
            if not as_json:
                pass_on(piece)
    pass_on((json_text(summary(generation)) if as_json else "") + "\n")


@dataclass(frozen=True)
class Asked:
    """A text that is continued, as moss_jt.terminal.turn_view.Reading."""

    moss: "Moss"
    generation: Generation
    language: Language = "en"

    @property
    def unread(self) -> int:
        return self.generation.unread

    @property
    def loaded(self) -> float:
        return self.moss.loaded

    def watch(self, watcher: Watcher | None) -> None:
        self.moss.watch(watcher)


def unescaped(text: str) -> str:
    """A stop string as it was meant: shells pass a typed backslash and n on as these two characters."""
    meant = {"n": "\n", "t": "\t", "r": "\r", "\\": "\\"}
    return re.sub(r"\\([ntr\\])", lambda escape: meant[escape[1]], text)


def prompt_text(prompt: str | None) -> str:
    """The option's text, or what standard input holds."""
    if prompt is None and sys.stdin.isatty():
        raise click.UsageError("give --prompt TEXT, or pipe a text in.")
    return read_text(sys.stdin.buffer) if prompt in (None, "-") else str(prompt)


def summary(generation: Generation) -> dict[str, Any]:
    """What --json prints."""
    stats = generation.stats
    return {
        "text": generation.text,
        "token_ids": generation.token_ids,
        "prompt_tokens": stats.prompt_tokens,
        "new_tokens": stats.new_tokens,
        "stop_reason": stats.stop_reason,
        "passes": stats.passes,
        "drafted": stats.drafted,
        "accepted": stats.accepted,
        "seconds": {name: round(seconds, 6) for name, seconds in stats.seconds.items()},
    }
