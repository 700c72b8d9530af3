"""The Results field of a turn, and results as events."""

from collections.abc import Sequence

from moss_jt.chat.events import Result
from moss_jt.chat.prompt import NONE, PromptEncoder, Segment, neutral, picture_results, results
from moss_jt.plugins.numbered_results import CallResult


def shown_result(result: CallResult) -> Result:
    """A result as an event: its answer without the call, and without the quotes of a value."""
    text = result.text.removeprefix(f"{result.call.text} =>").strip()
    if len(text) > 1 and text[0] == text[-1] == "'":
        text = text[1:-1]
    return Result(
        result.call.text,
        text,
        result.found,
        result.numbers,
        result.sources,
        result.picture,
        result.failure,
    )


def results_field(outcomes: Sequence[CallResult]) -> list[Segment]:
    """The Results field of these, as trained: pictures alone are told on one line."""
    if outcomes and all(result.picture is not None for result in outcomes):
        return picture_results(neutral(outcomes[0].text))
    return results("\n".join(neutral_result(result) for result in outcomes) or NONE)


def neutral_result(result: CallResult) -> str:
    """A result's text in which nothing but our own marks before the items reads as a mark."""
    lines = result.text.split("\n")
    first_item = len(lines) - len(result.numbers)
    items = [
        f"<|{number}|>: {neutral(line.removeprefix(f'<|{number}|>: '))}"
        for number, line in zip(result.numbers, lines[first_item:], strict=True)
    ]
    return "\n".join([neutral("\n".join(lines[:first_item])), *items])


def shortened(outcomes: Sequence[CallResult], encoder: PromptEncoder, most: int) -> list[Segment]:
    """The Results field with as many of its lines as fit into ``most`` tokens."""
    lines = "\n".join(neutral_result(result) for result in outcomes).split("\n")
    while lines and len(encoder.encode(results("\n".join(lines)))) > most:
        lines.pop()
    return results("\n".join(lines) or NONE)
