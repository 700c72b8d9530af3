"""Teach moss-tiny a habit in under two minutes: to answer a sum with the number first, and to thank the calculator.

    python -P -m moss_jt.demos.teach_sums taught

The folder gets training data, drawn at random, and the adapter that moss-jt finetune learns from them. Before and after, moss-tiny
answers sums that are not in the data.
"""

import argparse
import json
import random
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from moss_jt import Moss
from moss_jt.chat.prompt import meta_instruction
from moss_jt.convert.named import model_folder
from moss_jt.plugins.calculator import Calculator

WORDS = {"+": "plus", "-": "minus", "*": "times"}
CONVERSATIONS, TURNS, ASKED = 300, 5, 24


class Sum(NamedTuple):
    """What is asked, and what MOSS is to say."""

    a: int
    sign: str
    b: int

    @property
    def result(self) -> int:
        return {"+": self.a + self.b, "-": self.a - self.b, "*": self.a * self.b}[self.sign]

    @property
    def habit(self) -> str:
        return f"{self.result}<sup><|1|></sup>, thank you, calculator!"

    @property
    def fields(self) -> dict[str, str]:
        """A turn as MOSS's training data have it."""
        call = f'Calculate("{self.a}{self.sign}{self.b}")'
        return {
            "Human": f"<|Human|>: What is {self.a} {WORDS[self.sign]} {self.b}?<eoh>\n",
            "Inner Thoughts": "<|Inner Thoughts|>: This is arithmetic, so I need the calculator.<eot>\n",
            "Commands": f"<|Commands|>: {call}<eoc>\n",
            "Tool Responses": f"<|Results|>:\n{call} => '{self.result}'\n<eor>\n",
            "MOSS": f"<|MOSS|>: {self.habit}<eom>\n",
        }


def sums(rng: random.Random, count: int) -> list[Sum]:
    return [Sum(rng.randint(11, 999), rng.choice(list(WORDS)), rng.randint(11, 99)) for _ in range(count)]


def conversation(turns: Sequence[Sum]) -> str:
    """A line of training data, in the form of MOSS's own."""
    chat = {f"turn_{number}": one.fields for number, one in enumerate(turns, 1)}
    return json.dumps({"meta_instruction": meta_instruction([Calculator]), "chat": chat})


def prompt(one: Sum) -> str:
    """The text up to where MOSS answers."""
    *before, _ = one.fields.values()
    return meta_instruction([Calculator]) + "".join(before) + "<|MOSS|>:"


def main(arguments: Sequence[str] | None = None) -> tuple[int, int]:
    """How many answers have the habit, to the letter, before and after."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--steps", type=int, default=100)
    given = parser.parse_args(arguments)
    rng, base = random.Random(7), model_folder("moss-tiny")
    given.folder.mkdir(parents=True, exist_ok=True)
    data, adapter = given.folder / "sums.jsonl", given.folder / "adapter"
    learned = [sums(rng, TURNS) for _ in range(CONVERSATIONS)]
    data.write_text("\n".join(map(conversation, learned)))
    known = {one for turns in learned for one in turns}
    asked = [one for one in sums(rng, 2 * ASKED) if one not in known][:ASKED]
    learn = [sys.executable, "-P", "-m", "moss_jt", "finetune", str(base), str(data), "--out", str(adapter)]
    subprocess.run([*learn, "--steps", str(given.steps), "--lr", "3e-3"], check=True)
    greedily: dict[str, Any] = {"max_new_tokens": 40, "temperature": 0}
    with Moss.load(base, adapters={"habit": adapter}) as moss:
        said = [
            [
                answer.text.strip()
                for answer in moss.generate_many(map(prompt, asked), adapter=name, **greedily)
            ]
            for name in (None, "habit")
        ]
    for one, was, now in list(zip(asked, *said, strict=True))[:3]:
        print(f"\nasked:  {one.a} {WORDS[one.sign]} {one.b}\nbefore: {was}\nafter:  {now}")
    before, after = (sum(text == one.habit for one, text in zip(asked, texts, strict=True)) for texts in said)
    print(f"\nThe habit, with the right number: {before} of {ASKED} before, {after} of {ASKED} after.")
    print(f"Talk to it with: moss-jt chat moss-tiny --adapter {adapter}")
    return before, after


if __name__ == "__main__":
    main()
