"""A conversation to learn from: the instruction, then turns of MOSS's five fields, as segments, each learned or not."""

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from moss_jt.chat.prompt import (
    COMMANDS,
    HUMAN,
    MOSS,
    NONE,
    RESULTS,
    THOUGHTS,
    Segment,
    closing,
    instruction,
    neutral,
    opening,
)
from moss_jt.plugins.calculator import Calculator
from moss_jt.plugins.image import DONE, ImagePlugin
from moss_jt.plugins.search import Search
from moss_jt.plugins.solver import Solver

Mask = Literal["moss", "assistant"]


class Learned(NamedTuple):
    """A segment of text, and whether its tokens are targets of the loss."""

    segment: Segment
    target: bool


@dataclass(frozen=True)
class TrainedTurn:
    """Role -> what stands between ``<|ROLE|>:`` and the role's end token, white space included."""

    fields: Mapping[str, str]


@dataclass(frozen=True)
class Conversation:
    """
    instruction  what stands before the first turn
    turns        at least one
    """

    instruction: Sequence[Segment]
    turns: Sequence[TrainedTurn]


@dataclass(frozen=True)
class PlainText:
    """A text without turns: what is only read, and what is learned up to the end of text."""

    prompt: str
    completion: str


# The four that MOSS was trained with, by the function that its commands call, in the meta instruction's order.
TRAINED_PLUGINS = {plugin.function: plugin for plugin in (Search, Calculator, Solver, ImagePlugin)}


def turn_of(
    question: str,
    answer: str,
    thought: str = "",
    commands: str = "",
    results: str = "",
    plugins: bool = False,
) -> TrainedTurn:
    """A turn of texts that others wrote: nothing in them may read as the start of a field.

    thought, commands  empty for None
    results            the lines of all results; a drawn picture's alone stands on the marker's line, as trained
    plugins            whether any is switched on: then no results stand on a line of their own, as trained
    """
    if results == DONE or not plugins:
        shown = f" {results or NONE}"
    else:
        shown = f"\n{results or NONE}\n"
    return TrainedTurn(
        {
            HUMAN: f" {neutral(question)}",
            THOUGHTS: f" {neutral(thought) or NONE}",
            COMMANDS: f" {neutral(commands) or NONE}",
            RESULTS: shown,
            MOSS: f" {neutral(answer)}",
        }
    )


def instruction_for(functions: Collection[str], system: str | None) -> list[Segment]:
    """The meta instruction with the plugins switched on whose functions are called; a system text says who MOSS is."""
    return instruction([plugin for name, plugin in TRAINED_PLUGINS.items() if name in functions], system)


def turn_segments(turn: TrainedTurn, mask: Mask) -> Iterator[Learned]:
    """A turn's segments.

    ``moss`` is the reference's loss: everything but what results say (finetune_moss.py masks the meta instruction, and in the
    results all but the marker and the end). ``assistant`` learns what MOSS writes only: thoughts, commands and answers, with
    their markers and ends.
    """
    for role, text in turn.fields.items():
        written = role not in (HUMAN, RESULTS)
        yield from (Learned(segment, mask == "moss" or written) for segment in opening(role))
        yield Learned(Segment(text, foreign=True), written or (mask == "moss" and role == HUMAN))
        yield from (Learned(segment, mask == "moss" or written) for segment in closing(role))
