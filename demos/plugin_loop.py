"""The plugin loop, spelled out: what the model reads and writes in one turn, field by field.

    python -P -m moss_jt.demos.plugin_loop "What is 37 times 48?"

moss_jt.chat.turn does the same, and also what a program for users needs: streaming, repairs, cancelling, a full context.
"""

import sys

from moss_jt import Moss
from moss_jt.chat.prompt import (
    COMMANDS,
    MOSS,
    THOUGHTS,
    PromptEncoder,
    Segment,
    meta_instruction,
    opening,
    question,
    results,
)
from moss_jt.convert.named import model_folder
from moss_jt.engine.sampling import SamplingParams
from moss_jt.plugins import execute
from moss_jt.plugins.registry import make_plugins
from moss_jt.terminal.output import pass_on

PLUGINS = ["calculator", "solver"]
GREEDY = SamplingParams(temperature=0)


def one_turn(moss: Moss, message: str) -> str:
    """The turn as one text."""
    encoder = PromptEncoder(moss.tokenizer)
    session = moss.session()

    def give(segments: list[Segment]) -> None:
        """Text that the model will read. Only fixed parts may hold special tokens; see moss_jt.chat.prompt."""
        session.extend(encoder.encode(segments))

    def write(role: str) -> str:
        """Let the model write a field, up to its end token."""
        give(opening(role))
        *written, end = session.decode(GREEDY, 200, {encoder.ends[role]})
        give([Segment("\n")])
        return moss.tokenizer.decode(written)

    give([Segment(meta_instruction(make_plugins(PLUGINS)))])
    start = session.position
    give(question(message))

    # Phase 1: the model thinks, and says what it wants to call.
    write(THOUGHTS)
    commands = write(COMMANDS)

    # The program runs the commands, and writes their results as the model was trained to read them.
    give(results(execute(commands, PLUGINS)))

    # Phase 2: the model answers.
    write(MOSS)
    return moss.tokenizer.decode(session.token_ids[start:])


if __name__ == "__main__":
    with Moss.load(model_folder("moss-tiny")) as moss:
        for message in sys.argv[1:] or ["What is 37 times 48?", "解方程3*x+5=20"]:
            pass_on(one_turn(moss, message) + "\n")
