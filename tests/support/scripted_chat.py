"""A MOSS without weights that writes what a test tells it to, over the real session, tokenizer and chat."""

import threading
from collections.abc import Callable, Collection, Iterator, Sequence

import numpy as np

from moss_jt.engine.causal_model import TokenRun, Watcher
from moss_jt.engine.engine import Engine
from moss_jt.engine.sampling import SamplingParams
from moss_jt.engine.sequence import Sequence as Text
from moss_jt.kernels.interface import PAGE
from moss_jt.store.tokenizer import Tokenizer
from tests.support.tokenizers import tiny_tokenizer

VOCABULARY = 2176

# What the model writes into one field: text, whose special tokens count as such; a token; an exception that the pass raises;
# or an event that it waits for, before what follows it.
Written = str | int | type[BaseException] | threading.Event


class ScriptedModel:
    """moss_jt.engine.causal_model.CausalModel; ``fields`` is what it writes, one entry per field, a list for several parts.

    read  tokens of all passes
    """

    def __init__(
        self, tokenizer: Tokenizer, fields: Sequence[Written | list[Written]], capacity: int
    ) -> None:
        self.capacity = capacity
        self.pages = -(-capacity // PAGE)
        self.pass_tokens = PAGE
        self.logit_rows = self.score_rows = 1
        self.link_s = 0.0
        self.watcher: Watcher | None = None
        self.read: list[int] = []
        self._tokenizer = tokenizer
        self.expect(*fields)
        self._cache: list[int] = []
        self._start = 0
        self._writing: list[int | type[BaseException] | threading.Event] = []
        self._wanted: Callable[[int], bool] = lambda index: True
        self._gates: dict[int, threading.Event] = {}  # what is waited for before a place in it

    def begin(self, position: int) -> None:
        """The next field begins at ``position``."""
        assert self._fields, "the model is asked for a field that the test does not know of"
        self._start, self._writing = position, []
        self._gates = {}
        parts = self._fields.pop(0)
        for number, part in enumerate(parts):
            if isinstance(part, threading.Event) and number + 1 < len(parts):
                self._gates[len(self._writing)] = part
            else:
                self._writing += self._tokenizer.encode(part) if isinstance(part, str) else [part]

    def expect(self, *fields: Written | list[Written]) -> None:
        """It writes these from now on, whatever it was to write before."""
        self._fields = [field if isinstance(field, list) else [field] for field in fields]

    @property
    def finished(self) -> bool:
        return not self._fields

    def forward_many(
        self, runs: Sequence[TokenRun], wanted: Callable[[int], bool] = lambda index: True
    ) -> list[np.ndarray]:
        self._wanted = wanted
        tokens = sum(len(run.token_ids) for run in runs)
        if self.watcher is not None and tokens > 1:
            for share in (0.5, 1.0):
                self.watcher(tokens, share)
        return [self._forward(run) for run in runs]

    def _forward(self, run: TokenRun) -> np.ndarray:
        end = run.start + len(run.token_ids)
        assert run.start <= len(self._cache) and end <= self.capacity
        self.read += run.token_ids
        self._cache[run.start :] = run.token_ids
        count = {"none": 0, "last": 1, "all": len(run.token_ids)}[run.rows]
        logits = np.zeros((count, VOCABULARY), np.float32)
        for row in range(count):
            logits[row, self._next(end - count + row + 1)] = 100
        return logits

    def read_page(self, page: int) -> np.ndarray:
        raise AssertionError("one conversation has room")

    def write_page(self, page: int, data: np.ndarray) -> None:
        raise AssertionError("one conversation has room")

    def _next(self, position: int) -> int:
        """The token at ``position``; a field that runs out repeats its last one."""
        if (gate := self._gates.get(position - self._start)) is not None:
            self._wait(gate)
        token = self._writing[min(position - self._start, len(self._writing) - 1)]
        if isinstance(token, threading.Event):
            self._wait(token)
            return 0
        if isinstance(token, int):
            return token
        raise token

    def _wait(self, gate: threading.Event) -> None:
        """Until it is opened, or nobody waits for what follows, as a model looks between its blocks."""
        while not gate.wait(0.01) and self._wanted(0):
            pass


class ScriptedSequence(Text):
    def decode(
        self,
        params: SamplingParams,
        max_new_tokens: int,
        stop_ids: Collection[int] = (),
        max_time: float | None = None,
    ) -> Iterator[int]:
        model = self.engine.model
        assert isinstance(model, ScriptedModel)
        if max_new_tokens > 0:
            model.begin(self.position)
        yield from super().decode(params, max_new_tokens, stop_ids, max_time)


class ScriptedMoss:
    """moss_jt.chat.chat.ChatModel."""

    def __init__(self, *fields: Written | list[Written], capacity: int = 1024) -> None:
        self.tokenizer = tiny_tokenizer()
        self.model = ScriptedModel(self.tokenizer, fields, capacity)
        self.engine = Engine(self.model)

    loaded = 1.0

    def watch(self, watcher: Watcher | None) -> None:
        self.model.watcher = watcher

    def session(self) -> Text:
        return ScriptedSequence(self.engine)
