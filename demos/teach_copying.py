"""Teach moss-tiny a habit in under two minutes: to say what a search found, word for word, which it does badly.

    python -P -m moss_jt.demos.teach_copying taught

The folder gets training data, drawn at random, and the adapter that moss-jt finetune learns from them. Before and after, moss-tiny
answers questions on topics that are not in the data: places that do not exist.
"""

import argparse
import json
import random
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from moss_jt import Moss
from moss_jt.chat.prompt import meta_instruction
from moss_jt.convert.named import model_folder
from moss_jt.plugins.search import Search

SYLLABLES = "ka lo mi ru ta ven sol bar nim po dra eth".split()
WORDS = (
    "blue red small old quiet bright river mountain city island garden tower people winter summer stone music market bridge "
    "ancient famous northern southern open deep long valley harbour temple"
).split()
CONVERSATIONS, TURNS, ASKED = 400, 4, 24


class Lookup(NamedTuple):
    """A question, what the search answers, and what MOSS is to say."""

    topic: str
    hits: list[str]

    @property
    def answer(self) -> str:
        return f"{self.hits[0][:-1]}<sup><|1|></sup>."

    @property
    def fields(self) -> dict[str, str]:
        """A turn as MOSS's training data have it."""
        lines = "\n".join(f'<|{number}|>: "{hit}"' for number, hit in enumerate(self.hits, 1))
        return {
            "Human": f"<|Human|>: Tell me about {self.topic}<eoh>\n",
            "Inner Thoughts": f"<|Inner Thoughts|>: I need to search for {self.topic}.<eot>\n",
            "Commands": f'<|Commands|>: Search("{self.topic}")<eoc>\n',
            "Tool Responses": f'<|Results|>:\nSearch("{self.topic}") =>\n{lines}\n<eor>\n',
            "MOSS": f"<|MOSS|>: {self.answer}<eom>\n",
        }


def lookup(rng: random.Random) -> Lookup:
    topic = "".join(rng.sample(SYLLABLES, 3)).capitalize()
    hits = [f"{topic} {' '.join(rng.sample(WORDS, rng.randint(4, 7)))}." for _ in range(rng.randint(1, 3))]
    return Lookup(topic, hits)


def conversations(rng: random.Random) -> Iterator[str]:
    """Lines of training data, in the form of MOSS's own."""
    for _ in range(CONVERSATIONS):
        turns = {f"turn_{number}": lookup(rng).fields for number in range(1, 1 + rng.randint(1, TURNS))}
        yield json.dumps({"meta_instruction": meta_instruction([Search]), "chat": turns})


def asked(rng: random.Random) -> tuple[list[Lookup], list[str]]:
    """Questions, and the texts up to where MOSS answers them."""
    lookups = [lookup(rng) for _ in range(ASKED)]
    prompts = []
    for one in lookups:
        *before, _ = one.fields.values()
        prompts.append(meta_instruction([Search]) + "".join(before) + "<|MOSS|>:")
    return lookups, prompts


def main(arguments: Sequence[str] | None = None) -> tuple[int, int]:
    """How many answers are right to the letter, before and after."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--steps", type=int, default=400)
    given = parser.parse_args(arguments)
    rng, base = random.Random(7), model_folder("moss-tiny")
    given.folder.mkdir(parents=True, exist_ok=True)
    data, adapter = given.folder / "searches.jsonl", given.folder / "adapter"
    data.write_text("\n".join(conversations(rng)))
    lookups, prompts = asked(rng)
    learn = [sys.executable, "-P", "-m", "moss_jt", "finetune", str(base), str(data), "--out", str(adapter)]
    subprocess.run([*learn, "--steps", str(given.steps), "--lr", "5e-3", "--rank", "16"], check=True)
    greedily: dict[str, Any] = {"max_new_tokens": 80, "temperature": 0}
    with Moss.load(base, adapters={"copying": adapter}) as moss:
        said = [
            [answer.text.strip() for answer in moss.generate_many(prompts, adapter=name, **greedily)]
            for name in (None, "copying")
        ]
    for one, before, after in list(zip(lookups, *said, strict=True))[:3]:
        print(f"\nfound:  {one.hits[0]}\nbefore: {before}\nafter:  {after}")
    before, after = (
        sum(text == one.answer for one, text in zip(lookups, texts, strict=True)) for texts in said
    )
    print(f"\nWord for word: {before} of {ASKED} before, {after} of {ASKED} after.")
    print(f"Talk to it with: moss-jt chat moss-tiny --search-folder NOTES --adapter {adapter}")
    return before, after


if __name__ == "__main__":
    main()
