"""A finished turn as text, in the five fields of MOSS's training data, and back as the tokens that the model has read."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from moss_jt.chat.prompt import (
    COMMANDS,
    END_OF,
    HUMAN,
    MOSS,
    RESULTS,
    THOUGHTS,
    PromptEncoder,
    Segment,
    closing,
    opening,
)
from moss_jt.plugins.interface import Source

# The training data's names of the fields, in their order, and the marker that each begins with.
FIELDS = {
    "Human": HUMAN,
    "Inner Thoughts": THOUGHTS,
    "Commands": COMMANDS,
    "Tool Responses": RESULTS,
    "MOSS": MOSS,
}
ROLE_MARK = re.compile(rf"<\|(?=\s*(?:{'|'.join(END_OF)})\s*\|>)", re.IGNORECASE)


@dataclass(frozen=True, eq=False)
class FinishedTurn:
    """A turn that is over.

    fields     the training data's five, each with its marker, its end token and a newline
    token_ids  as the model has them, where it wrote its text in other tokens than the text alone would be read in
    sources    citation number -> source
    asked      how many messages there were up to this one: random numbers go by it
    dropped    how many of the oldest turns the model had no longer before it then
    ways       of each page of the whole text then, whether it was read as a page: read alike, it has the same bits again
    extra      what a front end keeps with it, as JSON has it
    """

    fields: Mapping[str, str]
    token_ids: tuple[int, ...] | None = None
    sources: Mapping[int, Source] = field(default_factory=dict)
    asked: int = 0
    dropped: int = 0
    ways: tuple[bool, ...] = ()
    extra: Mapping[str, Any] = field(default_factory=dict)

    @property
    def message(self) -> str:
        """What the user wrote."""
        return self._inside("Human")

    @property
    def answer(self) -> str:
        return self._inside("MOSS")

    def _inside(self, name: str) -> str:
        return body_of(name, self.fields[name]).strip()


def body_of(name: str, text: str) -> str:
    """A field's text without marker and end."""
    role = FIELDS[name]
    return text.removeprefix(f"<|{role}|>:").removesuffix(f"{END_OF[role]}\n")


def is_field(name: str, text: object) -> bool:
    """Whether this is a whole field of that name."""
    role = FIELDS[name]
    return (
        isinstance(text, str)
        and text.startswith(f"<|{role}|>:")
        and text.endswith(f"{END_OF[role]}\n")
        and len(text) >= len(f"<|{role}|>:{END_OF[role]}\n")
    )


def finished_turn(
    encoder: PromptEncoder,
    token_ids: Sequence[int],
    sources: Mapping[int, Source] | None = None,
    asked: int = 0,
    dropped: int = 0,
    ways: Sequence[bool] = (),
) -> FinishedTurn:
    """The turn of these tokens, which end every field as :class:`moss_jt.chat.turn.Turn` leaves them."""
    tokenizer, fields, start = encoder.tokenizer, {}, 0
    newline = len(tokenizer.encode("\n"))
    for name, role in FIELDS.items():
        end = token_ids.index(encoder.ends[role], start) + 1 + newline
        fields[name] = tokenizer.decode([*token_ids[start:end]])
        start = end
    turn = FinishedTurn(fields, None, dict(sources or {}), asked, dropped, tuple(ways))
    if turn_tokens(encoder, turn) == [*token_ids]:
        return turn
    return replace(turn, token_ids=tuple(token_ids))


def turn_tokens(encoder: PromptEncoder, turn: FinishedTurn) -> list[int]:
    """The turn as the model reads it. Nothing inside a field becomes a special token or a role's marker.

    Its own tokens count only where they say what the text says: the text may have been edited since.
    """
    if turn.token_ids is not None and _says(encoder, turn):
        return [*turn.token_ids]
    segments: list[Segment] = []
    for name, role in FIELDS.items():
        body = ROLE_MARK.sub("< |", body_of(name, turn.fields[name]))
        segments += [*opening(role), Segment(body, foreign=True), *closing(role)]
    return encoder.encode(segments)


def _says(encoder: PromptEncoder, turn: FinishedTurn) -> bool:
    """Whether the turn's tokens are its text, with special tokens at the fields' ends alone."""
    token_ids = turn.token_ids or ()
    ends = [encoder.ends[role] for role in FIELDS.values()]
    if [token for token in token_ids if token in encoder.special] != ends:
        return False
    return encoder.tokenizer.decode([*token_ids]) == "".join(turn.fields[name] for name in FIELDS)
