"""Whose the pages of the cache are: free, one sequence's, or shared by sequences that begin alike. Pure bookkeeping.

Only whole pages are shared, from the first on: they are computed as a page (see moss_jt.kernels.places), so they hold the same
bits whichever sequence computed them. None is ever written to again, so sequences part without a copy.
"""

import hashlib
from collections import OrderedDict
from collections.abc import Iterable, Sequence

import numpy as np


def beginning_of(before: bytes, token_ids: Sequence[int], whole: bool = True) -> bytes:
    """The name of a text of full pages: of ``before``, the name of all pages but the last, and that one's tokens.

    Before the first page stands nothing, or what names the adapter with which all of the text is computed.

    ``whole``: the last one is computed as a page, and not token by token.
    """
    way = b"" if whole else b"token by token"
    return hashlib.blake2b(before + np.array(token_ids, np.int32).tobytes() + way, digest_size=16).digest()


class PagePool:
    """See the module. Pages are numbered 0 .. count - 1.

    A named page that nobody has any more keeps what it holds until the page is needed, oldest first.
    """

    def __init__(self, count: int) -> None:
        self.count = count
        self._unused = list(range(count - 1, -1, -1))
        self._users = [0] * count
        self._names: dict[int, bytes] = {}
        self._named: dict[bytes, int] = {}
        self._kept: OrderedDict[int, None] = OrderedDict()

    @property
    def free(self) -> int:
        return len(self._unused) + len(self._kept)

    def users(self, page: int) -> int:
        return self._users[page]

    def take(self) -> int:
        """A page for one sequence; there must be a free one."""
        if self._unused:
            page = self._unused.pop()
        else:
            page, _ = self._kept.popitem(last=False)
            self._forget(page)
        self._users[page] = 1
        return page

    def name(self, page: int, beginning: bytes) -> None:
        """Let others have the page for this beginning, unless they have one already."""
        if beginning not in self._named:
            self._named[beginning] = page
            self._names[page] = beginning

    def share(self, beginning: bytes) -> int | None:
        """The page of this beginning, with one more user, or None."""
        page = self._named.get(beginning)
        if page is not None:
            self._users[page] += 1
            self._kept.pop(page, None)
        return page

    def hold(self, page: int) -> None:
        """One more user of a page that somebody has: give it back."""
        self._users[page] += 1

    def give_back(self, pages: Iterable[int]) -> None:
        """One user of each of these pages less."""
        for page in pages:
            self._users[page] -= 1
            if self._users[page] == 0:
                if page in self._names:
                    self._kept[page] = None
                else:
                    self._unused.append(page)

    def unname(self, page: int) -> None:
        """The page does not hold what its name says: it was not computed after all."""
        if page in self._names:
            self._forget(page)
            if page in self._kept:
                del self._kept[page]
                self._unused.append(page)

    def _forget(self, page: int) -> None:
        del self._named[self._names.pop(page)]
