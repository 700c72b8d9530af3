"""Keys and values of all positions so far, allocated once and never copied."""

from collections.abc import Callable
from typing import Protocol

import numpy as np

from moss_jt.backend.jittor import jt
from moss_jt.kernels.interface import PAGE, Var
from moss_jt.plan.residency import ResidencyPlan
from moss_jt.store.config import MossConfig
from moss_jt.weights.page_buffer import page_buffer

Allocate = Callable[[tuple[int, ...]], Var]


class PageCopier(Protocol):
    """moss_jt.kernels.cuda.operators.CudaOperators."""

    def read_page(self, keys: Var, values: Var, page: int) -> np.ndarray: ...

    def write_page(self, keys: Var, values: Var, page: int, data: np.ndarray) -> None: ...


def host_memory(shape: tuple[int, ...]) -> Var:
    """A float16 Var in host memory that is taken page by page as it is written."""
    size = int(np.prod(shape))
    return jt.reuse_np_array(page_buffer(2 * size)[: 2 * size].view(np.float16).reshape(shape))


def device_memory(shape: tuple[int, ...]) -> Var:
    """A float16 Var where Jittor computes; what lies in it is anything."""
    memory = jt.empty(shape, "float16")
    memory.sync()
    return memory


class KVCache:
    """Holds at least ``capacity`` positions of every block, in memory from ``allocate``.

    pages         that it has
    keys, values  (L, PAGE * pages, H, D) float16 Vars, written in place by the operators

    Args:
        copier: copies pages that lie where the host cannot reach them.
    """

    def __init__(
        self,
        config: MossConfig,
        capacity: int,
        allocate: Allocate = host_memory,
        copier: PageCopier | None = None,
    ) -> None:
        self.capacity = capacity
        self.pages = -(-capacity // PAGE)
        shape = (config.n_layer, PAGE * self.pages, config.n_head, config.head_dim)
        self.keys = allocate(shape)
        self.values = allocate(shape)
        self._copier = copier
        self._arrays = () if copier is not None else (self.keys.data, self.values.data)  # their own memory

    def page_views(self, page: int) -> list[np.ndarray] | None:
        """A page's own memory in chunks, each (PAGE, H, D): keys of all layers, then values. None where the host has none."""
        if self._copier is not None:
            return None
        rows = slice(page * PAGE, (page + 1) * PAGE)
        return [part[layer, rows] for part in self._arrays for layer in range(len(part))]

    def read_page(self, page: int) -> np.ndarray:
        """A copy of a page's keys and values: (2, L, PAGE, H, D) float16."""
        if self._copier is not None:
            return self._copier.read_page(self.keys, self.values, page)
        rows = slice(page * PAGE, (page + 1) * PAGE)
        return np.stack([self.keys.data[:, rows], self.values.data[:, rows]])

    def write_page(self, page: int, data: np.ndarray) -> None:
        """Put such a copy into a page."""
        if self._copier is not None:
            self._copier.write_page(self.keys, self.values, page, data)
            return
        rows = slice(page * PAGE, (page + 1) * PAGE)
        self.keys.data[:, rows], self.values.data[:, rows] = data


def cache_positions(plan: ResidencyPlan) -> int:
    """Positions of the plan's cache: each sequence's are rounded up to pages."""
    return -(-plan.context // PAGE) * PAGE * plan.parallel
