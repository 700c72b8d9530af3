"""Keys and values of all positions so far, allocated once and never copied."""

from collections.abc import Callable
from typing import Protocol

import numpy as np

from moss_jt.backend.jittor import jt
from moss_jt.kernels.interface import PAGE, ByteRows, CacheRows, Var
from moss_jt.plan.residency import ResidencyPlan
from moss_jt.store.config import MossConfig
from moss_jt.weights.page_buffer import page_buffer

Allocate = Callable[[tuple[int, ...], str], Var]


class PageCopier(Protocol):
    """moss_jt.kernels.cuda.operators.CudaOperators."""

    def read_page(self, keys: CacheRows, values: CacheRows, page: int) -> np.ndarray: ...

    def write_page(self, keys: CacheRows, values: CacheRows, page: int, data: np.ndarray) -> None: ...


def host_memory(shape: tuple[int, ...], dtype: str = "float16") -> Var:
    """A Var in host memory that is taken page by page as it is written."""
    n_bytes = int(np.prod(shape)) * np.dtype(dtype).itemsize
    return jt.reuse_np_array(page_buffer(n_bytes)[:n_bytes].view(dtype).reshape(shape))


def device_memory(shape: tuple[int, ...], dtype: str = "float16") -> Var:
    """A Var where Jittor computes; what lies in it is anything."""
    memory = jt.empty(shape, dtype)
    memory.sync()
    return memory


class KVCache:
    """Holds at least ``capacity`` positions of every block, in memory from ``allocate``.

    pages         that it has
    keys, values  (L, PAGE * pages, H, D) float16 Vars, or the same in int8, written in place by the operators

    Args:
        copier: copies pages that lie where the host cannot reach them.
        bits: of a number, 16 or 8.
    """

    def __init__(
        self,
        config: MossConfig,
        capacity: int,
        allocate: Allocate = host_memory,
        copier: PageCopier | None = None,
        bits: int = 16,
    ) -> None:
        self.capacity = capacity
        self.pages = -(-capacity // PAGE)
        shape = (config.n_layer, PAGE * self.pages, config.n_head, config.head_dim)
        scales = (config.n_layer, self.pages, config.n_head, PAGE)

        def rows() -> CacheRows:
            if bits == 16:
                return allocate(shape, "float16")
            return ByteRows(allocate(shape, "int8"), allocate(scales, "float32"))

        self.keys, self.values = rows(), rows()
        self._copier = copier
        self._arrays = () if copier is not None else self._by_page()

    def page_views(self, page: int) -> list[np.ndarray] | None:
        """A page's own memory in chunks: keys of all layers, then values, each (PAGE, H, D); in int8 scales (H, PAGE) after either.
        None where the host has none."""
        if self._copier is not None:
            return None
        return [part[layer, page] for part in self._arrays for layer in range(len(part))]

    def read_page(self, page: int) -> np.ndarray:
        """A copy of a page's keys and values: (2, L, PAGE, H, D) float16, or the bytes of int8 and scales."""
        if self._copier is not None:
            return self._copier.read_page(self.keys, self.values, page)
        if len(self._arrays) == 2:
            return np.stack([part[:, page] for part in self._arrays])
        return np.concatenate([part[:, page].reshape(-1).view(np.uint8) for part in self._arrays])

    def write_page(self, page: int, data: np.ndarray) -> None:
        """Put such a copy into a page."""
        if self._copier is not None:
            self._copier.write_page(self.keys, self.values, page, data)
            return
        left = data.reshape(-1).view(np.uint8)
        for part in self._arrays:
            page_of_part = part[:, page]
            own, left = np.split(left, [page_of_part.nbytes])
            page_of_part[...] = own.view(part.dtype).reshape(page_of_part.shape)

    def _by_page(self) -> tuple[np.ndarray, ...]:
        """The cache's own memory, with layer and page first."""
        arrays: list[np.ndarray] = []
        for rows in (self.keys, self.values):
            parts = [rows.numbers, rows.scales] if isinstance(rows, ByteRows) else [rows]
            numbers, *scales = (part.data for part in parts)
            arrays += [numbers.reshape(len(numbers), self.pages, PAGE, *numbers.shape[2:]), *scales]
        return tuple(arrays)


def cache_positions(plan: ResidencyPlan) -> int:
    """Positions of the plan's cache: each sequence's are rounded up to pages."""
    return -(-plan.context // PAGE) * PAGE * plan.parallel
