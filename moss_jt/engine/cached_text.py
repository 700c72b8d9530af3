"""What the cache has of one sequence: its pages, how far they are computed, and which of them are whole ones.

Which pages are whole is settled when the text is given, and by the text alone: those that it fills, but for the one with the
last token. What is written later comes token by token. So a sequence's keys and values never depend on when it was computed,
with whom, how often it was interrupted, or whether its pages were on disk in the meantime.
"""

import itertools
from collections.abc import Callable, Sequence

from moss_jt.engine.causal_model import LoadedAdapter
from moss_jt.engine.idle_page_file import PageFile
from moss_jt.engine.pages import PagePool, beginning_of
from moss_jt.kernels.interface import PAGE

WRITTEN = itertools.count(1)


class CachedText:
    """See the module. Only the engine's thread, or who holds its lock, changes it.

    pages     in order, as far as the text is cached; empty while they are stored
    cached    positions that they hold
    stored    where the pages lie on disk, in order, while they are there
    keep      so many of its first tokens begin other texts, too, in this process or a later one
    """

    def __init__(
        self,
        pool: PagePool,
        file: PageFile | None = None,
        whole_pages: bool = True,
        adapter: LoadedAdapter | None = None,
    ) -> None:
        """
        Args:
            file: where its pages may be stored.
            whole_pages: a pass can hold one; otherwise all comes token by token.
            adapter: with which all of it is computed. Pages are only shared with texts that have the same one.
        """
        self.pool = pool
        self._file = file
        self.adapter = None if adapter is None else adapter.number
        self._origin = b"" if adapter is None else adapter.digest
        self._whole_pages = whole_pages
        self.pages: list[int] = []
        self.cached = 0
        self.stored: list[int] = []
        self.keep = 0
        self._written: list[int] = []  # of each page, a number that changes when it may be written to again
        self._whole: list[bool] = []  # of each page that the text has
        self._names: list[bytes] = []  # of the whole pages that it begins with, as far as they are cached

    def settle(self, length: int, continued: bool = True) -> None:
        """The text has ``length`` tokens.

        Args:
            continued: it is to be answered, so the last token is computed in any case, and in a page that is not whole: its
                logits must not depend on who computed that page.
        """
        for page in range(len(self._whole), pages_of(length)):
            self._whole.append(self._whole_pages and (page + 1) * PAGE <= length - continued)
        if not continued:
            return
        last = pages_of(length) - 1
        end = last * PAGE if self._whole[last] else length - 1
        self._whole[last] = False
        self.back_to(min(self.cached, end))

    def grown(self, length: int) -> None:
        """The model has written the last of ``length`` tokens: what its page gets comes token by token."""
        if len(self._whole) < pages_of(length):
            self._whole.append(False)

    def cut(self, length: int) -> None:
        """Forget what is beyond ``length`` tokens."""
        del self._whole[pages_of(length) :]
        self.cached = min(self.cached, length)
        if length % PAGE and len(self._whole) == pages_of(length) and self._whole[-1]:
            del self._whole[-1]  # a whole page that is cut is one no longer, and is computed anew
            self.cached = min(self.cached, length // PAGE * PAGE)
        self._trim()

    def back_to(self, cached: int) -> None:
        """The pass that computed what is beyond did not come to its end."""
        for page in self.pages[cached // PAGE :]:
            if self.pool.users(page) == 1:
                self.pool.unname(page)
        self.cached = cached
        self._trim()

    def ways(self) -> list[bool]:
        """Of each page that the text has, whether it is whole: what other text begins in the same way is computed alike."""
        return [*self._whole]

    def state_of(self, page: int) -> int:
        """A number that is another one once what the page held may be gone; 0 for a page that the text does not have.

        A whole page is never written to, so who holds it need not ask.
        """
        return self._written[self.pages.index(page)] if page in self.pages else 0

    def is_whole(self, page: int) -> bool:
        return self._whole[self.pages.index(page)]

    def begin_as(self, ways: Sequence[bool], length: int) -> None:
        """The text has ``length`` tokens that were given and written in these ways before; what is computed of it is forgotten."""
        self.release()
        full = length // PAGE
        self._whole = [whole and self._whole_pages and page < full for page, whole in enumerate(ways)]
        del self._whole[pages_of(length) :]

    def full_pages(self, token_ids: Sequence[int], length: int) -> list[bytes]:
        """The names of the pages that the first ``length`` tokens fill, in order."""
        names: list[bytes] = []
        for page in range(min(length // PAGE, len(self._whole))):
            tokens = token_ids[page * PAGE : (page + 1) * PAGE]
            names.append(beginning_of(names[-1] if names else self._origin, tokens, self._whole[page]))
        return names

    def _trim(self) -> None:
        count = pages_of(self.cached)
        self.pool.give_back(self.pages[count:])
        del self.pages[count:]
        del self._written[count:]
        if self.cached % PAGE and self._written:
            self._written[-1] = next(WRITTEN)
        del self._names[self.cached // PAGE :]
        self._free(self.stored[count:])
        del self.stored[count:]

    def _free(self, records: list[int]) -> None:
        if self._file is not None:
            self._file.free(records)

    def next_run(self, length: int) -> tuple[int, bool]:
        """Tokens that can be computed next in one way, of a text of ``length``, and whether they are a whole page."""
        page = self.cached // PAGE
        if self._whole[page]:
            return PAGE, True
        end = self.cached
        while end < length and not self._whole[end // PAGE]:
            end = (end // PAGE + 1) * PAGE
        return min(end, length) - self.cached, False

    def adopt(self, token_ids: Sequence[int]) -> bool:
        """Share the next page with another sequence that has it, if there is one."""
        name = self._name_of_next(token_ids)
        page = None if name is None else self.pool.share(name)
        if name is None or page is None:
            return False
        self.pages.append(page)
        self._written.append(next(WRITTEN))
        self._names.append(name)
        self.cached += PAGE
        return True

    def compute(self, token_ids: Sequence[int], count: int) -> int:
        """The next ``count`` tokens are computed in the coming pass; returns at which position they begin.

        There must be as many free pages as :meth:`pages_for` says.
        """
        start = self.cached
        name = self._name_of_next(token_ids) if count == PAGE else None
        for _ in range(self.pages_for(count)):
            self.pages.append(self.pool.take())
            self._written.append(next(WRITTEN))
        self.cached += count
        if name is not None:
            self.pool.name(self.pages[-1], name)
            self._names.append(name)
        return start

    def pages_for(self, count: int) -> int:
        """Pages that the next ``count`` tokens need beside those that the text has."""
        return pages_of(self.cached + count) - len(self.pages)

    def _name_of_next(self, token_ids: Sequence[int]) -> bytes | None:
        """The name of the beginning up to the end of the next page, where all of it is whole pages."""
        page = self.cached // PAGE
        if (
            self.cached % PAGE
            or page >= len(self._whole)
            or not self._whole[page]
            or len(self._names) != page
        ):
            return None
        before = self._names[-1] if self._names else self._origin
        return beginning_of(before, token_ids[page * PAGE : (page + 1) * PAGE])

    def store(self, records: list[int]) -> None:
        """What the pages hold lies on disk now, in these records of the file; give them back."""
        cached = self.cached
        self.release()
        self.stored, self.cached = records, cached

    def restore(self, token_ids: Sequence[int], read: Callable[[int, int], bool]) -> None:
        """Have what was stored in pages again.

        Args:
            read: fills a page from a record, and says whether it could: what cannot be read is computed anew.
        """
        records, cached = self.stored, self.cached
        self.stored, self.cached = [], 0
        for record in records:
            if self.adopt(token_ids):
                continue
            count = min(PAGE, cached - self.cached)
            self.compute(token_ids, count)
            if not read(record, self.pages[-1]):
                self.back_to(self.cached - count)
                break
        self._free(records)

    def release(self) -> None:
        """Give back all pages; what was cached is stored nowhere, and is computed anew in the same way when it is needed."""
        self.cached = 0
        self._trim()


def pages_of(length: int) -> int:
    """Pages of a text of so many tokens."""
    return -(-length // PAGE)
