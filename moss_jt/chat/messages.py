"""Conversations as OpenAI's interface sends them, all of them with every question: messages with roles."""

from collections.abc import Sequence
from dataclasses import dataclass

from moss_jt.chat.prompt import (
    MOSS,
    Segment,
    Switch,
    field,
    instruction,
    neutral,
    no_plugins,
    opening,
    question,
)
from moss_jt.errors import MossError

SYSTEM_ROLES = ("system", "developer")
ROLES = (*SYSTEM_ROLES, "user", "assistant")


@dataclass(frozen=True)
class Message:
    role: str
    text: str


@dataclass(frozen=True)
class Conversation:
    """
    system   what stands after the meta instruction
    turns    questions and their answers
    message  what is to be answered
    """

    system: str
    turns: Sequence[tuple[str, str]]
    message: str

    def instruction(self, plugins: Sequence[Switch] = (), system: str | None = None) -> list[Segment]:
        """What the conversation begins with; ``system`` in the place of what MOSS is told about itself."""
        own = [Segment(f"{neutral(self.system)}\n", foreign=True)] if self.system else []
        return [*instruction(plugins, system), *own]

    def segments(self, plugins: Sequence[Switch] = (), system: str | None = None) -> list[Segment]:
        """The conversation up to where MOSS begins to answer without plugins."""
        turns = [segment for turn in self.turns for segment in turn_segments(*turn)]
        return [
            *self.instruction(plugins, system), *turns, *question(self.message), *no_plugins(), *opening(MOSS)
        ]  # fmt: skip


def turn_segments(message: str, answer: str) -> list[Segment]:
    """A turn that is over, of which nothing but question and answer is known."""
    return [*question(message), *no_plugins(), *field(MOSS, neutral(answer))]


def conversation_of(messages: Sequence[Message]) -> Conversation:
    """What several messages in a row of one role say is one; what the system says counts wherever it stands.

    Raises:
        MossError: the user has not the last word.
    """
    system = "\n".join(message.text for message in messages if message.role in SYSTEM_ROLES)
    spoken: list[Message] = []
    for message in messages:
        if message.role in SYSTEM_ROLES:
            continue
        if spoken and spoken[-1].role == message.role:
            message = Message(message.role, f"{spoken.pop().text}\n{message.text}")
        spoken.append(message)
    if not spoken or spoken[-1].role != "user":
        raise MossError("the last message must be the user's.")
    if spoken[0].role != "user":
        spoken.insert(0, Message("user", ""))  # a greeting that stands before the first question
    pairs = [(spoken[at].text, spoken[at + 1].text) for at in range(0, len(spoken) - 1, 2)]
    return Conversation(system, pairs, spoken[-1].text)
