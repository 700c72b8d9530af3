"""What a step's way there leaves for its way back: blocks' inputs, and what blocks computed, in memory or on the disk."""

from pathlib import Path

from moss_jt.backend.jittor import jt
from moss_jt.train.block import Kept
from moss_jt.train.disk_arrays import Shelf
from moss_jt.train.lora import Floats
from moss_jt.train.step_memory import Keeping


class Waiting:
    """Of a model of ``layers`` blocks.

    Args:
        folder: where a file may be, if ``keeping`` wants one.
    """

    def __init__(self, keeping: Keeping, layers: int, folder: Path) -> None:
        self._keeping, self._layers, self._folder = keeping, layers, folder
        self._inputs: dict[tuple[int, int], Floats] = {}
        self._kept: dict[tuple[int, int], Kept] = {}
        self._shelf: Shelf | None = None

    def put(self, layer: int, batch: int, h: Floats, kept: Kept) -> None:
        """A batch's input h (T, C) of a block, and what the block computed.

        Raises:
            MossError: the disk is full, or fails.
        """
        key = layer, batch
        if self._keeping.inputs_on_disk:
            self._on_shelf().put(("h", *key), [h])
        else:
            self._inputs[key] = h
        where = self._keeping.where(layer, self._layers)
        if where == "memory":
            self._kept[key] = kept
        elif where == "disk":
            self._on_shelf().put(key, [kept.qkv.numpy(), kept.y.numpy()])

    def take(self, layer: int, batch: int) -> tuple[Floats, Kept | None]:
        """The same again, once; without what was kept nowhere.

        Raises:
            MossError: the disk fails.
        """
        key = layer, batch
        h = self._on_shelf().take(("h", *key))[0] if self._keeping.inputs_on_disk else self._inputs.pop(key)
        if self._keeping.where(layer, self._layers) == "disk":
            return h, Kept(*map(jt.array, self._on_shelf().take(key)))
        return h, self._kept.pop(key, None)

    def clear(self) -> None:
        """A step that was interrupted left something."""
        self._inputs.clear()
        self._kept.clear()
        if self._shelf is not None:
            self._shelf.clear()

    def close(self) -> None:
        self.clear()
        if self._shelf is not None:
            self._shelf.close()
            self._shelf = None

    def _on_shelf(self) -> Shelf:
        if self._shelf is None:
            self._shelf = Shelf(self._folder)
        return self._shelf
