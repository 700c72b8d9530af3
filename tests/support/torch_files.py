"""Files as torch.save writes them, made without torch: a zip of a pickle and one stored entry per tensor."""

import io
import pickle
import zipfile
from collections import OrderedDict
from typing import Any

import numpy as np

STORAGES = {
    "float16": "HalfStorage",
    "float32": "FloatStorage",
    "int32": "IntStorage",
    "uint8": "ByteStorage",
}


class _Global:
    """Pickled as a name that torch's own unpickler looks up."""

    def __init__(self, module: str, name: str) -> None:
        self.module, self.name = module, name


class _Tensor:
    def __init__(self, key: int, array: np.ndarray) -> None:
        self.key, self.array = key, array


class _Pickler(pickle._Pickler):  # type: ignore[name-defined]  # the one in Python, whose save can be overridden
    def save(self, value: Any, save_persistent_id: bool = True) -> None:
        if isinstance(value, _Global):
            self.write(b"c" + value.module.encode() + b"\n" + value.name.encode() + b"\n")
        elif isinstance(value, _Tensor):
            self._save_tensor(value)
        else:
            super().save(value, save_persistent_id)

    def _save_tensor(self, tensor: _Tensor) -> None:
        array = tensor.array
        strides = tuple(step // array.itemsize for step in array.strides)
        self.save(_Global("torch._utils", "_rebuild_tensor_v2"))
        self.write(b"(")
        storage = _Global("torch", STORAGES[array.dtype.name])
        self.write(b"(")
        for part in ("storage", storage, str(tensor.key), "cpu", array.size):
            self.save(part)
        self.write(b"tQ")
        for argument in (0, array.shape, strides, False):
            self.save(argument)
        self.save(_Global("collections", "OrderedDict"))
        self.write(b")R")
        self.write(b"tR")


def torch_file(tensors: dict[str, np.ndarray], wrapper: tuple[str, ...] = ()) -> bytes:
    """The bytes of torch.save(state); the state lies in dicts of these names, the outermost first."""
    state: Any = OrderedDict((name, _Tensor(key, array)) for key, (name, array) in enumerate(tensors.items()))
    state = dict(state)
    for name in reversed(wrapper):
        state = {name: state, "epoch": 3}
    buffer = io.BytesIO()
    _Pickler(buffer, protocol=2).dump(state)
    complete = io.BytesIO()
    with zipfile.ZipFile(complete, "w", zipfile.ZIP_STORED) as archive:
        archive.writestr("archive/data.pkl", buffer.getvalue())
        archive.writestr("archive/byteorder", b"little")
        archive.writestr("archive/version", b"3\n")
        for key, array in enumerate(tensors.values()):
            archive.writestr(f"archive/data/{key}", np.ascontiguousarray(array).tobytes())
    return complete.getvalue()
