"""The forms in which conversations are published, told apart by their keys, as conversations in MOSS's own.

MOSS's own (one JSON object with meta_instruction and chat), OpenAI's messages, ShareGPT's conversations, Alpaca's instruction and
output, prompt and completion, and plain text.
"""

import json
import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from moss_jt.chat.finished_turn import FIELDS
from moss_jt.chat.prompt import END_OF, MOSS, Segment
from moss_jt.errors import MossError
from moss_jt.train.learned_turns import (
    TRAINED_PLUGINS,
    Conversation,
    PlainText,
    TrainedTurn,
    instruction_for,
    turn_of,
)

# ShareGPT's speakers, and what OpenAI calls them.
SHAREGPT_ROLES = {
    "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system",
    "function_call": "call", "observation": "tool", "tool": "tool",
}  # fmt: skip
OPENAI_ROLES = ("system", "developer", "user", "assistant", "tool")
CALL = '{}("{}")'


@dataclass
class Losses:
    """What of the data is not learned, and how often: ``turns without an answer`` -> 3."""

    counts: Counter[str] = field(default_factory=Counter)

    def note(self, reason: str) -> None:
        self.counts[reason] += 1


Sample = Conversation | PlainText


def read_sample(fields: Any, losses: Losses) -> Sample:
    """One line of data, whatever its form.

    Raises:
        MossError: its keys are none of the forms', or a value is not what the form says.
    """
    if not isinstance(fields, dict):
        raise MossError("it is not a JSON object.")
    for _, keys, reader in FORMS:
        if all(key in fields for key in keys):
            return reader(fields, losses)
    raise MossError(
        f"its keys ({', '.join(sorted(map(str, fields)))[:200]}) are those of no form of conversations: chat (MOSS), messages "
        "(OpenAI), conversations (ShareGPT), instruction and output (Alpaca), prompt and completion, or text."
    )


def form_of(fields: dict[str, Any]) -> str:
    """The name of a form that was read."""
    return next(name for name, keys, _ in FORMS if all(key in fields for key in keys))


# MOSS's own form.


def _moss(fields: dict[str, Any], losses: Losses) -> Conversation:
    turns = fields["chat"]
    turns = list(turns.values()) if isinstance(turns, dict) else turns
    if not isinstance(turns, list):
        raise MossError("chat must be an object of turns.")
    meta = _text(fields.get("meta_instruction", ""), "meta_instruction")
    read = [_moss_turn(turn) for turn in turns]
    answered = [turn for turn in read if turn.fields[MOSS].strip()]
    for _ in range(len(read) - len(answered)):
        losses.note("turns without an answer")
    return _conversation([Segment(meta, foreign=True)], answered)


def _moss_turn(turn: Any) -> TrainedTurn:
    if not isinstance(turn, dict) or "Human" not in turn or "MOSS" not in turn:
        raise MossError("each turn needs a Human and a MOSS.")
    return TrainedTurn(
        {role: _inside(_text(turn[name], name), role) for name, role in FIELDS.items() if name in turn}
    )


def _inside(text: str, role: str) -> str:
    """What stands between a field's marker and its end."""
    field_form = re.compile(rf"<\|{role}\|>:(?P<inside>.*){END_OF[role]}\n?", re.DOTALL)
    match = field_form.fullmatch(text)
    if match is None:
        raise MossError(f"a {role} field must read <|{role}|>: ... {END_OF[role]}, and it is {text[:60]!r}.")
    return match["inside"]


# OpenAI's messages, and ShareGPT's, which are the same under other names.


def _openai(fields: dict[str, Any], losses: Losses) -> Conversation:
    messages = fields["messages"]
    if not isinstance(messages, list):
        raise MossError("messages must be a list.")
    return _spoken([_openai_message(message) for message in messages], losses)


@dataclass
class _Message:
    """role  system, user, assistant, call (a command as text) or tool"""

    role: str
    text: str
    calls: list[tuple[str, str]] = field(default_factory=list)


def _openai_message(message: Any) -> _Message:
    if not isinstance(message, dict) or message.get("role") not in OPENAI_ROLES:
        raise MossError(f"a message needs a role: one of {', '.join(OPENAI_ROLES)}.")
    content = message.get("content")
    if isinstance(content, list) and all(isinstance(p, dict) and p.get("type") == "text" for p in content):
        content = "".join(_text(part.get("text"), "text") for part in content)
    role = "system" if message["role"] == "developer" else message["role"]
    calls = [_openai_call(call) for call in message.get("tool_calls") or ()]
    return _Message(role, _text(content if content is not None else "", "content"), calls)


def _openai_call(call: Any) -> tuple[str, str]:
    """Function and argument. OpenAI's arguments are an object as JSON; MOSS's functions take one text."""
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict):
        raise MossError("a tool call needs a function.")
    return _call(function.get("name"), function.get("arguments"))


def _call(name: Any, arguments: Any) -> tuple[str, str]:
    if name not in TRAINED_PLUGINS:
        raise MossError(
            f"it calls {str(name)[:60]!r}, and MOSS's functions are {', '.join(TRAINED_PLUGINS)}. Rename the call, or leave "
            "the line out."
        )
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments)
        except (ValueError, RecursionError):
            return str(name), arguments
    if isinstance(arguments, dict) and len(arguments) == 1:
        (arguments,) = arguments.values()
    return str(name), _text(arguments, f"the argument of {name}")


def _sharegpt(fields: dict[str, Any], losses: Losses) -> Conversation:
    spoken = fields["conversations"]
    if not isinstance(spoken, list):
        raise MossError("conversations must be a list.")
    messages = [_sharegpt_message(message) for message in spoken]
    if system := fields.get("system"):
        messages.insert(0, _Message("system", _text(system, "system")))
    return _spoken(messages, losses)


def _sharegpt_message(message: Any) -> _Message:
    role = SHAREGPT_ROLES.get(str(message.get("from"))) if isinstance(message, dict) else None
    if role is None:
        raise MossError(f"each of the conversations needs a from: one of {', '.join(SHAREGPT_ROLES)}.")
    text = _text(message.get("value"), "value")
    if role != "call":
        return _Message(role, text)
    try:
        function = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise MossError(f"a function_call is not JSON: {text[:60]!r}.") from error
    calls = function if isinstance(function, list) else [function]
    if not all(isinstance(call, dict) for call in calls):
        raise MossError("a function_call must be an object with a name and arguments.")
    return _Message("assistant", "", [_call(call.get("name"), call.get("arguments")) for call in calls])


def _spoken(messages: list[_Message], losses: Losses) -> Conversation:
    """Messages as turns: a question, perhaps calls and their results, an answer."""
    functions = {name for message in messages for name, _ in message.calls}
    system = "\n".join(message.text for message in messages if message.role == "system") or None
    turns: list[TrainedTurn] = []
    for group in _groups(message for message in messages if message.role != "system"):
        if turn := _turn_of_group(group, bool(functions), losses):
            turns.append(turn)
    return _conversation(instruction_for(functions, system), turns)


def _groups(messages: Iterator[_Message]) -> Iterator[list[_Message]]:
    """Each user's message with what follows it up to the next one; several of a user in a row are one."""
    group: list[_Message] = []
    for message in messages:
        if message.role == "user" and any(earlier.role != "user" for earlier in group):
            yield group
            group = []
        group.append(message)
    if group:
        yield group


def _turn_of_group(group: list[_Message], plugins: bool, losses: Losses) -> TrainedTurn | None:
    question = _joined(group, "user")
    calls = [call for message in group for call in message.calls]
    thought = _joined([message for message in group if message.calls], "assistant")
    answer = _joined([message for message in group if not message.calls], "assistant")
    results = [message.text for message in group if message.role == "tool"]
    if not question.strip() or not answer.strip():
        losses.note("turns without a question" if not question.strip() else "turns without an answer")
        return None
    if len(results) != len(calls):
        raise MossError(f"a turn has {len(calls)} calls and {len(results)} results.")
    commands = [CALL.format(name, argument) for name, argument in calls]
    lines = [_result(command, text) for command, text in zip(commands, results, strict=True)]
    return turn_of(question, answer, thought, ", ".join(commands), "\n".join(lines), plugins)


def _joined(messages: list[_Message], role: str) -> str:
    return "\n".join(message.text for message in messages if message.role == role and message.text)


def _result(command: str, text: str) -> str:
    """A result as MOSS reads it: values in quotes on the call's line, solutions and search results on lines of their own."""
    if command.startswith("Text2Image"):
        return text
    if text.startswith(command):
        return text
    return f"{command} =>\n{text}" if command.startswith(("Search", "Solve")) else f"{command} => '{text}'"


# Alpaca's, and texts without turns.


def _alpaca(fields: dict[str, Any], losses: Losses) -> Conversation:
    history = fields.get("history") or []
    if not isinstance(history, list) or not all(
        isinstance(pair, list) and len(pair) == 2 for pair in history
    ):
        raise MossError("history must be a list of pairs of question and answer.")
    asked = _text(fields["instruction"], "instruction")
    if given := _text(fields.get("input") or "", "input"):
        asked = f"{asked}\n{given}"
    pairs = [*history, [asked, fields["output"]]]
    messages = [
        _Message(role, _text(text, role))
        for pair in pairs
        for role, text in zip(("user", "assistant"), pair, strict=True)
    ]
    if system := fields.get("system"):
        messages.insert(0, _Message("system", _text(system, "system")))
    return _spoken(messages, losses)


def _completion(fields: dict[str, Any], losses: Losses) -> PlainText:
    return PlainText(_text(fields["prompt"], "prompt"), _text(fields["completion"], "completion"))


def _plain(fields: dict[str, Any], losses: Losses) -> PlainText:
    return PlainText("", _text(fields["text"], "text"))


def _text(value: Any, name: str) -> str:
    if not isinstance(value, str):
        raise MossError(f"{name} must be text, and it is {str(value)[:60]!r}.")
    return value


def _conversation(segments: list[Segment], turns: list[TrainedTurn]) -> Conversation:
    if not turns:
        raise MossError("it has no turn with a question and an answer.")
    return Conversation(segments, turns)


# Name, the keys that tell it, and its reader; the first that fits is taken.
FORMS: tuple[tuple[str, tuple[str, ...], Callable[[dict[str, Any], Losses], Sample]], ...] = (
    ("MOSS", ("chat",), _moss),
    ("OpenAI", ("messages",), _openai),
    ("ShareGPT", ("conversations",), _sharegpt),
    ("Alpaca", ("instruction", "output"), _alpaca),
    ("completion", ("prompt", "completion"), _completion),
    ("text", ("text",), _plain),
)
