"""Keys and values of all positions so far, allocated once and never copied."""

import numpy as np

from moss_jt.backend import jt
from moss_jt.config import MossConfig
from moss_jt.kernels.interface import Var
from moss_jt.page_buffer import page_buffer


class KVCache:
    """Room for ``capacity`` positions of every block, in host memory that is taken page by page as it is written.

    keys, values  (L, P, H, D) float16 Vars, written in place by the operators
    """

    def __init__(self, config: MossConfig, capacity: int) -> None:
        self.capacity = capacity
        shape = (config.n_layer, capacity, config.n_head, config.head_dim)
        self.keys = _room(shape)
        self.values = _room(shape)


def _room(shape: tuple[int, ...]) -> Var:
    size = int(np.prod(shape))
    return jt.reuse_np_array(page_buffer(2 * size)[: 2 * size].view(np.float16).reshape(shape))
