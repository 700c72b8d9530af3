"""What is told while a folder of text files is indexed: how far it is, and what is left out."""

import sys

from tqdm import tqdm

from moss_jt.chat.language import user_language
from moss_jt.terminal.reasons import in_language
from moss_jt.terminal.screen import Screen


class IndexingBar:
    """To be called with (files done, files in all); a bar on stderr, quiet where nobody watches."""

    def __init__(self) -> None:
        self._bar: tqdm | None = None

    def __call__(self, done: int, files: int) -> None:
        if self._bar is None:
            self._bar = tqdm(
                total=files,
                desc="建立索引" if user_language() == "zh" else "Indexing",
                unit="file",
                mininterval=0.5,
                disable=None,
            )
        self._bar.update(done - self._bar.n)
        if done == files:
            self._bar.close()
            self._bar = None


def say(text: str) -> None:
    """A sentence on stderr, in the user's language."""
    Screen(sys.stderr).line(in_language(text, user_language()))
