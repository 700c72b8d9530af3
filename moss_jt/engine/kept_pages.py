"""Pages that are read from the prompt cache, and a thread that writes others into it while the model goes on."""

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np

from moss_jt.backend.threads import start_with_lock_held
from moss_jt.engine.cached_text import CachedText
from moss_jt.engine.prompt_cache import PromptCache
from moss_jt.kernels.interface import PAGE

# What is still to be written when the model is closed may take so long.
CLOSING_S = 5.0

Finished = Callable[[bool], bool]


class PageMemory(Protocol):
    """What is asked of a model: moss_jt.engine.causal_model.CausalModel."""

    def page_views(self, page: int) -> Sequence[np.ndarray] | None: ...

    def read_page(self, page: int) -> np.ndarray: ...

    def write_page(self, page: int, data: np.ndarray) -> None: ...


class KeptPages:
    """See the module.

    Args:
        lock: held by who changes pages of the model.
        freed: called with it held when a page that was to be written is free for others.
    """

    def __init__(
        self, cache: PromptCache, model: PageMemory, lock: threading.RLock, freed: Callable[[], None]
    ) -> None:
        self._cache = cache
        self._model = model
        self._lock = lock
        self._freed = freed
        self._changed = threading.Condition(lock)
        self._waiting: deque[tuple[bytes, int, Finished]] = deque()
        self._pending: set[bytes] = set()
        self._known: set[bytes] = set()  # names of pages that are there, or were
        self._thread: threading.Thread | None = None
        self._closing = False

    def load_next(self, text: CachedText, token_ids: Sequence[int], most: int) -> bool:
        """Have the next page of a text as it is kept from an earlier process, where it is, and ends within ``most`` tokens."""
        end = text.cached + PAGE
        if text.cached % PAGE or end > most:
            return False
        names = text.full_pages(token_ids, end)
        if PAGE * len(names) < end or not self._cache.has(names[-1]):
            return False
        start = text.compute(token_ids, PAGE)
        if not self._load(names[-1], text.pages[-1]):
            text.back_to(start)
            return False
        self._cache.touch([name for name in names if name in self._known])
        return True

    def keep(self, text: CachedText, token_ids: Sequence[int], length: int) -> None:
        """Have the full pages of the first ``length`` tokens written, as far as they are computed and not kept yet."""
        names = text.full_pages(token_ids, min(length, text.cached))
        for page, name in zip(text.pages, names, strict=False):
            if self._wanted(name):
                text.pool.hold(page)
                self._keep(name, page, self._held(text, page))

    def _held(self, text: CachedText, page: int) -> Finished:
        """Gives a page back that was held to be written, and says whether it was left as it was."""
        state, whole = text.state_of(page), text.is_whole(page)

        def finished(written: bool) -> bool:
            text.pool.give_back([page])
            self._freed()
            return whole or text.state_of(page) == state

        return finished

    def _load(self, name: bytes, page: int) -> bool:
        """Fill a page with what is kept under a name; False where nothing good is, and the page holds anything."""
        views = self._model.page_views(page)
        if views is not None:
            loaded = self._cache.load(name, views)
        else:
            data = np.empty_like(self._model.read_page(page))
            if loaded := self._cache.load(name, [data]):
                self._model.write_page(page, data)
        if loaded:
            self._known.add(name)
        return loaded

    def _wanted(self, name: bytes) -> bool:
        """Whether a page of that name is still to be kept."""
        if name in self._known or name in self._pending or self._closing:
            return False
        if self._cache.has(name):
            self._known.add(name)
        return name not in self._known

    def _keep(self, name: bytes, page: int, finished: Finished) -> None:
        """Have a page written, by and by: at once where the host has no memory of it. By the model's thread, which holds the lock.

        Args:
            finished: called with the lock held when the page was read; given whether it could be written, it says whether the
                page has not changed before.
        """
        if self._model.page_views(page) is None:
            self._end(name, self._cache.save(name, [self._model.read_page(page)]), finished)
            return
        self._pending.add(name)
        self._waiting.append((name, page, finished))
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="moss-jt page writer", daemon=True)
            start_with_lock_held(self._thread)
        self._changed.notify_all()

    def close(self) -> None:
        """Write what is waiting, if that does not take long, and end the thread. The lock must not be held."""
        with self._lock:
            self._closing = True
            self._changed.notify_all()
            thread, end = self._thread, time.monotonic() + CLOSING_S
        if thread is not None:
            thread.join(max(0.0, end - time.monotonic()))
            with self._lock:
                while self._waiting:
                    name, _, finished = self._waiting.popleft()
                    self._pending.discard(name)
                    finished(False)
            thread.join()

    def _run(self) -> None:
        while True:
            with self._lock:
                while not self._waiting and not self._closing:
                    self._changed.wait()
                if not self._waiting:
                    return
                name, page, finished = self._waiting.popleft()
                views = self._model.page_views(page)
            assert views is not None
            fresh = self._cache.save(name, views)
            with self._lock:
                self._end(name, fresh, finished)

    def _end(self, name: bytes, fresh: Path | None, finished: Finished) -> None:
        self._pending.discard(name)
        unchanged = finished(fresh is not None)
        if fresh is None:
            return
        if unchanged:
            self._known.add(name)
            self._cache.publish(name, fresh)
        else:
            self._cache.discard(fresh)
