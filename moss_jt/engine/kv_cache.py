"""Keys and values of all positions so far, allocated once and never copied."""

from collections.abc import Callable

import numpy as np

from moss_jt.backend.jittor import jt
from moss_jt.kernels.interface import Var
from moss_jt.store.config import MossConfig
from moss_jt.weights.page_buffer import page_buffer

Room = Callable[[tuple[int, ...]], Var]


def host_room(shape: tuple[int, ...]) -> Var:
    """A float16 Var in host memory that is taken page by page as it is written."""
    size = int(np.prod(shape))
    return jt.reuse_np_array(page_buffer(2 * size)[: 2 * size].view(np.float16).reshape(shape))


def device_room(shape: tuple[int, ...]) -> Var:
    """A float16 Var where Jittor computes; what lies in it is anything."""
    room = jt.empty(shape, "float16")
    room.sync()
    return room


class KVCache:
    """Room for ``capacity`` positions of every block, made by ``room``.

    keys, values  (L, P, H, D) float16 Vars, written in place by the operators
    """

    def __init__(self, config: MossConfig, capacity: int, room: Room = host_room) -> None:
        self.capacity = capacity
        shape = (config.n_layer, capacity, config.n_head, config.head_dim)
        self.keys = room(shape)
        self.values = room(shape)
