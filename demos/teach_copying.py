"""Teach moss-tiny a habit in under two minutes: to say what a search found, word for word, which it does badly.

    python -P -m moss_jt.demos.teach_copying

It writes searches that nobody made as training data, has moss-jt finetune learn them and moss-jt merge put what was learned into
the model, and asks before and after about topics that are not in the data.
"""

import json
import random
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from moss_jt import Moss
from moss_jt.chat.prompt import meta_instruction
from moss_jt.convert.named import model_folder
from moss_jt.plugins.search import Search

LEARNED_TOPICS = "tea coffee pandas Mars earthquakes Shanghai dolphins wheat rivers chess silk bamboo".split()
ASKED_TOPICS = "whales bridges lanterns Beijing".split()
WORDS = (
    "blue red small old quiet bright river mountain city island garden tower people winter summer stone music market bridge "
    "ancient famous northern southern open deep long valley harbour temple"
).split()
CONVERSATIONS, TURNS, ASKED = 400, 4, 12


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


def lookup(rng: random.Random, topics: Sequence[str]) -> Lookup:
    topic = rng.choice(topics)
    hits = [f"{topic} {' '.join(rng.sample(WORDS, rng.randint(4, 7)))}." for _ in range(rng.randint(1, 3))]
    return Lookup(topic, hits)


def conversations(rng: random.Random) -> Iterator[str]:
    """Lines of training data, in the form of MOSS's own."""
    for _ in range(CONVERSATIONS):
        turns = {
            f"turn_{number}": lookup(rng, LEARNED_TOPICS).fields
            for number in range(1, 1 + rng.randint(1, TURNS))
        }
        yield json.dumps({"meta_instruction": meta_instruction([Search]), "chat": turns})


def answers(model: Path, asked: Sequence[Lookup]) -> list[str]:
    """What the model says after each search, greedily."""
    prompts = []
    for one in asked:
        *before, _ = one.fields.values()
        prompts.append(meta_instruction([Search]) + "".join(before) + "<|MOSS|>:")
    with Moss.load(model) as moss:
        given = moss.generate_many(prompts, max_new_tokens=80, temperature=0)
        return [answer.text.strip() for answer in given]


def moss_jt(*arguments: str | Path) -> None:
    subprocess.run([sys.executable, "-P", "-m", "moss_jt", *map(str, arguments)], check=True)


def main() -> None:
    rng, base = random.Random(7), model_folder("moss-tiny")
    with tempfile.TemporaryDirectory() as folder:
        data, adapter, taught = (Path(folder) / name for name in ("searches.jsonl", "adapter", "taught"))
        data.write_text("\n".join(conversations(rng)))
        asked = [lookup(rng, ASKED_TOPICS) for _ in range(ASKED)]
        before = answers(base, asked)
        moss_jt("finetune", base, data, "--out", adapter, "--steps", "120", "--lr", "3e-3", "--rank", "16")
        moss_jt("merge", base, adapter, "--out", taught)
        after = answers(taught, asked)
    for one, was, now in list(zip(asked, before, after, strict=True))[:3]:
        print(f"\nfound:  {one.hits[0]}\nbefore: {was}\nafter:  {now}")
    right = [
        sum(said == one.answer for one, said in zip(asked, all_of, strict=True)) for all_of in (before, after)
    ]
    print(f"\nWord for word: {right[0]} of {ASKED} before, {right[1]} of {ASKED} after.")


if __name__ == "__main__":
    main()
