"""A MOSS without weights that writes what a test tells it to, over the real session, tokenizer and chat."""

import threading
from collections.abc import Collection, Iterator, Sequence

import numpy as np

from moss_jt.engine.causal_model import Rows, Watcher
from moss_jt.engine.sampling import SamplingParams
from moss_jt.engine.session import Session
from moss_jt.store.tokenizer import Tokenizer
from tests.support.tokenizers import tiny_tokenizer

VOCABULARY = 2176

# What the model writes into one field: text, whose special tokens count as such; a token; an exception that the pass raises;
# or an event that it waits for.
Written = str | int | type[BaseException] | threading.Event


class ScriptedModel:
    """moss_jt.engine.causal_model.CausalModel; ``fields`` is what it writes, one entry per field, a list for several parts.

    read  tokens of all passes
    """

    def __init__(
        self, tokenizer: Tokenizer, fields: Sequence[Written | list[Written]], capacity: int
    ) -> None:
        self.capacity = capacity
        self.pass_tokens = 64
        self.cache_owner: object = None
        self.watcher: Watcher | None = None
        self.read: list[int] = []
        self._tokenizer = tokenizer
        self.expect(*fields)
        self._cache: list[int] = []
        self._start = 0
        self._writing: list[int | type[BaseException] | threading.Event] = []

    def begin(self, position: int) -> None:
        """The next field begins at ``position``."""
        assert self._fields, "the model is asked for a field that the test does not know of"
        self._start, self._writing = position, []
        for part in self._fields.pop(0):
            self._writing += self._tokenizer.encode(part) if isinstance(part, str) else [part]

    def expect(self, *fields: Written | list[Written]) -> None:
        """It writes these from now on, whatever it was to write before."""
        self._fields = [field if isinstance(field, list) else [field] for field in fields]

    @property
    def finished(self) -> bool:
        return not self._fields

    def forward(self, token_ids: Sequence[int], start_pos: int, rows: Rows) -> np.ndarray:
        assert start_pos <= len(self._cache) and start_pos + len(token_ids) <= self.capacity
        self.read += token_ids
        if self.watcher is not None and len(token_ids) > 1:
            for share in (0.5, 1.0):
                self.watcher(len(token_ids), share)
        self._cache[start_pos:] = token_ids
        count = {"none": 0, "last": 1, "all": len(token_ids)}[rows]
        logits = np.zeros((count, VOCABULARY), np.float32)
        for row in range(count):
            logits[row, self._next(start_pos + len(token_ids) - count + row + 1)] = 100
        return logits

    def _next(self, position: int) -> int:
        """The token at ``position``; a field that runs out repeats its last one."""
        token = self._writing[min(position - self._start, len(self._writing) - 1)]
        if isinstance(token, threading.Event):
            while not token.wait(0.05):  # in short waits: a signal just before a long one would not end it
                pass
            return self._writing[-1] if isinstance(self._writing[-1], int) else 0
        if isinstance(token, int):
            return token
        raise token


class ScriptedSession(Session):
    def decode(
        self, params: SamplingParams, max_new_tokens: int, stop_ids: Collection[int] = ()
    ) -> Iterator[int]:
        assert isinstance(self.model, ScriptedModel)
        if max_new_tokens > 0:
            self.model.begin(self.position)
        yield from super().decode(params, max_new_tokens, stop_ids)


class ScriptedMoss:
    """moss_jt.chat.chat.ChatModel."""

    def __init__(self, *fields: Written | list[Written], capacity: int = 1024) -> None:
        self.tokenizer = tiny_tokenizer()
        self.model = ScriptedModel(self.tokenizer, fields, capacity)

    def watch(self, watcher: Watcher | None) -> None:
        self.model.watcher = watcher

    def session(self) -> Session:
        return ScriptedSession(self.model)
