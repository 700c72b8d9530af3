"""Reads the pickles that torch.save writes, and runs nothing: a machine with just the opcodes that such files need.

Python's pickle can call any function that a file names. This one builds tuples, lists, dicts, strings and numbers, and
knows a handful of names, each standing for a plain record. Anything else is refused by its name. No step looks into what
was built before it: a list that holds a list twice, forty times over, is small until something walks, hashes or prints it.
Opcodes: the pickle protocol's own documentation (pickletools), protocols 2 to 4.
"""

import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from moss_jt.errors import MossError

MAX_BYTES = 16 << 20
MAX_ITEMS = 2_000_000
MAX_AXES = 16
MAX_KEY = (
    1000  # characters: two long keys that are alike are compared to their ends, each time that one is set
)

# torch's storage classes and the safetensors name of what they hold.
STORAGES = {
    "HalfStorage": "F16",
    "BFloat16Storage": "BF16",
    "FloatStorage": "F32",
    "DoubleStorage": "F64",
    "ByteStorage": "U8",
    "BoolStorage": "BOOL",
    "CharStorage": "I8",
    "ShortStorage": "I16",
    "IntStorage": "I32",
    "LongStorage": "I64",
}


@dataclass(frozen=True)
class Storage:
    """A file of raw numbers beside the pickle: their dtype and its name."""

    dtype: str
    key: str


@dataclass(frozen=True)
class TensorRecord:
    """What torch._utils._rebuild_tensor_v2 was given: a view of a storage, counted in elements."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]


@dataclass(frozen=True)
class _Name:
    """A global that the pickle may mention."""

    text: str


_MARK = object()


class _Refused(ValueError):
    pass


def _tensor(arguments: tuple[Any, ...]) -> TensorRecord:
    storage, offset, shape, stride = arguments[:4]
    if not isinstance(storage, Storage) or not isinstance(shape, tuple) or not isinstance(stride, tuple):
        raise _Refused("a tensor without a storage")
    if not len(shape) == len(stride) <= MAX_AXES:
        raise _Refused("a tensor with an impossible number of axes")
    numbers = (offset, *shape, *stride)
    if not all(isinstance(number, int) and 0 <= number < 1 << 48 for number in numbers):
        raise _Refused("a tensor with impossible sizes")
    return TensorRecord(storage, offset, shape, stride)


def _dict(arguments: tuple[Any, ...]) -> dict[Any, Any]:
    """Empty: the items follow as opcodes. One that is made from items could copy the same million again and again."""
    if arguments:
        raise _Refused("a dict made from items")
    return {}


_CALLS: dict[str, Callable[[tuple[Any, ...]], Any]] = {
    "collections.OrderedDict": _dict,
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_parameter": lambda arguments: arguments[0],
}


class _Machine:
    """A stack, a memo and one method per opcode."""

    def __init__(self, data: bytes) -> None:
        self.data = data
        self.at = 0
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}

    def take(self, count: int) -> bytes:
        if count < 0 or self.at + count > len(self.data):
            raise _Refused("it ends early")
        taken = self.data[self.at : self.at + count]
        self.at += count
        return taken

    def number(self, code: str) -> int:
        value: int = struct.unpack("<" + code, self.take(struct.calcsize("<" + code)))[0]
        return value

    def line(self) -> str:
        end = self.data.find(b"\n", self.at)
        if not 0 <= end - self.at <= 300:
            raise _Refused("a name without an end")
        text = self.data[self.at : end].decode("ascii", "replace")
        self.at = end + 1
        return text

    def items(self) -> list[Any]:
        """What was pushed since the last mark."""
        for index in range(len(self.stack) - 1, -1, -1):
            if self.stack[index] is _MARK:
                items = self.stack[index + 1 :]
                del self.stack[index:]
                return items
        raise _Refused("a mark is missing")

    def name(self, module: Any, attribute: Any) -> _Name:
        if not isinstance(module, str) or not isinstance(attribute, str):
            raise _Refused("a name that is not text")
        full = f"{module}.{attribute}"
        if full in _CALLS or (module in ("torch", "torch.storage") and attribute in STORAGES):
            return _Name(full)
        raise MossError(
            f"mentions {full[:200]!r}, which is not a tensor. A checkpoint that wants to run code is not read: "
            "get the model from a source you trust."
        )

    def run(self) -> Any:
        for _ in range(MAX_ITEMS):
            opcode = self.take(1)
            if opcode == b".":
                return self.result()
            action = _OPCODES.get(opcode)
            if action is None:
                raise _Refused(f"opcode {opcode!r} is not one that tensors need")
            action(self)
        raise _Refused("it is endless")

    def result(self) -> Any:
        if len(self.stack) != 1 or self.stack[0] is _MARK:
            raise _Refused("it does not end with one object")
        return self.stack[0]

    def long(self, size: int) -> int:
        if size > 8:
            raise _Refused("a number is too large")
        return int.from_bytes(self.take(size), "little", signed=True)

    def text(self, size: int) -> str:
        return self.take(size).decode("utf-8")

    def get(self, index: int) -> None:
        self.stack.append(self.memo[index])

    def persistent(self) -> None:
        kind, storage, key, _location, _elements = self.stack.pop()
        if kind != "storage" or not isinstance(storage, _Name) or not isinstance(key, str):
            raise _Refused("a reference that is not a storage")
        self.stack.append(Storage(STORAGES[storage.text.rsplit(".", 1)[1]], key))

    def reduce(self) -> None:
        arguments, function = self.stack.pop(), self.stack.pop()
        call = _CALLS.get(function.text) if isinstance(function, _Name) else None
        if call is None or not isinstance(arguments, tuple):
            raise _Refused("a call of something that is not a tensor")
        self.stack.append(call(arguments))

    def set_items(self, pairs: list[Any]) -> None:
        target = self.stack[-1]
        if not isinstance(target, dict):
            raise _Refused("an item for something that is not a dict")
        if not all(isinstance(key, str | int) for key in pairs[::2]):
            raise _Refused("a key that is neither text nor number")
        if any(isinstance(key, str) and len(key) > MAX_KEY for key in pairs[::2]):
            raise _Refused("a key that is not a name")
        target.update(zip(pairs[::2], pairs[1::2], strict=True))

    def extend(self, values: list[Any]) -> None:
        if not isinstance(self.stack[-1], list):
            raise _Refused("an element for something that is not a list")
        self.stack[-1].extend(values)

    def pop_items(self, count: int) -> list[Any]:
        if len(self.stack) < count:
            raise _Refused("the stack is empty")
        items = self.stack[len(self.stack) - count :]
        del self.stack[len(self.stack) - count :]
        return items


_OPCODES: dict[bytes, Callable[[_Machine], Any]] = {
    b"\x80": lambda m: m.take(1),  # PROTO
    b"\x95": lambda m: m.take(8),  # FRAME
    b"(": lambda m: m.stack.append(_MARK),
    b"}": lambda m: m.stack.append({}),
    b"]": lambda m: m.stack.append([]),
    b")": lambda m: m.stack.append(()),
    b"N": lambda m: m.stack.append(None),
    b"\x88": lambda m: m.stack.append(True),
    b"\x89": lambda m: m.stack.append(False),
    b"K": lambda m: m.stack.append(m.number("B")),
    b"M": lambda m: m.stack.append(m.number("H")),
    b"J": lambda m: m.stack.append(m.number("i")),
    b"\x8a": lambda m: m.stack.append(m.long(m.number("B"))),
    b"G": lambda m: m.stack.append(struct.unpack(">d", m.take(8))[0]),
    b"X": lambda m: m.stack.append(m.text(m.number("I"))),
    b"\x8c": lambda m: m.stack.append(m.text(m.number("B"))),
    b"t": lambda m: m.stack.append(tuple(m.items())),
    b"\x85": lambda m: m.stack.append(tuple(m.pop_items(1))),
    b"\x86": lambda m: m.stack.append(tuple(m.pop_items(2))),
    b"\x87": lambda m: m.stack.append(tuple(m.pop_items(3))),
    b"q": lambda m: m.memo.__setitem__(m.number("B"), m.stack[-1]),
    b"r": lambda m: m.memo.__setitem__(m.number("I"), m.stack[-1]),
    b"\x94": lambda m: m.memo.__setitem__(len(m.memo), m.stack[-1]),
    b"h": lambda m: m.get(m.number("B")),
    b"j": lambda m: m.get(m.number("I")),
    b"c": lambda m: m.stack.append(m.name(m.line(), m.line())),
    b"\x93": lambda m: m.stack.append(m.name(*m.pop_items(2))),
    b"Q": lambda m: m.persistent(),
    b"R": lambda m: m.reduce(),
    b"s": lambda m: m.set_items(m.pop_items(2)),
    b"u": lambda m: m.set_items(m.items()),
    b"a": lambda m: m.extend(m.pop_items(1)),
    b"e": lambda m: m.extend(m.items()),
    b"b": lambda m: m.pop_items(1),  # BUILD: a state dict's _metadata, which says nothing about tensors
}


def read_pickle(data: bytes, where: str) -> Any:
    """The object that a torch pickle describes, with TensorRecord for each tensor.

    Raises:
        MossError: a forbidden name, an opcode that tensors do not need, or damage; the message begins with ``where``.
    """
    if len(data) > MAX_BYTES:
        raise MossError(f"{where}: the pickle has {len(data)} bytes; no checkpoint needs that many.")
    try:
        return _Machine(data).run()
    except MossError as error:
        raise MossError(f"{where} {error}") from error
    except (_Refused, LookupError, ValueError, TypeError, AttributeError, struct.error) as error:
        raise MossError(
            f"{where} is not a checkpoint of tensors, or it is damaged ({error}). Download it again."
        ) from error
