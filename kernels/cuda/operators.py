"""The GPU's operators: our kernels, compiled by CuPy, over Jittor's own memory.

Each operator is one operation for Jittor. Passes of few tokens are launched from C++ by a table that was recorded once
(recording.py), for Python between the launches would take the host longer than the card takes to compute. Longer passes go
through jt.numpy_code, which hands arrays over without a copy. A block's weights are regions of one Var: an operation takes few
inputs.
"""

import weakref
from collections.abc import Callable, Container, Hashable, Iterator, Sequence
from dataclasses import fields, is_dataclass
from typing import Any

import numpy as np

from moss_jt.backend.jittor import jt
from moss_jt.kernels.adapters import AdapterBank
from moss_jt.kernels.checks import check_adapters, check_block, check_cache, check_shape
from moss_jt.kernels.cuda.launchers import Array, Launchers, Product, TokenAdapters
from moss_jt.kernels.cuda.recording import DeviceArray, Recorder, Recording, launch_address, queue
from moss_jt.kernels.interface import (
    PAGE,
    BlockByBlock,
    BlockWeights,
    ByteRows,
    CacheRows,
    DenseMatrix,
    Matrix,
    Places,
    Region,
    Var,
    numbers_of,
)
from moss_jt.kernels.needs import FEW_TOKENS
from moss_jt.kernels.rotary_table import rotary_table
from moss_jt.store.config import MossConfig

Work = Callable[[Sequence[Array], Array], None]
At = Callable[[Region], Array]


class CudaOperators(BlockByBlock):
    """See :class:`moss_jt.kernels.interface.Operators`. Weights of blocks and head are Regions.

    Args:
        config: the model's geometry; head_dim a multiple of 8 and at most 256.
        cupy: the module, or what stands in for it in tests.
        adapters: that tokens may have; they are copied to the card.
    """

    def __init__(self, config: MossConfig, cupy: Any, adapters: AdapterBank | None = None) -> None:
        self.config = config
        self.adapters = adapters
        self.kernels = Launchers(cupy)
        self.rotary = jt.array(rotary_table(config.n_positions, config.rotary_dim))
        self._bank = None if adapters is None else jt.array(adapters.values)
        self._directories = [] if adapters is None else [jt.array(layer) for layer in adapters.directory]
        self._launch = launch_address(cupy)
        self._layouts: dict[Hashable, dict[tuple[int, ...], Recording]] = {}
        self._blocks = weakref.WeakKeyDictionary[BlockWeights, dict[tuple[int, ...], Recording]]()
        self._heads: dict[tuple[int, int, int], Recording] = {}

    @property
    def level(self) -> str:
        """What decides the last bits of a result, beside this package's sources."""
        cupy, cuda = self.kernels.cupy, self.kernels.cupy.cuda
        card = cuda.runtime.getDeviceProperties(cuda.runtime.getDevice())["name"]
        cublas = cuda.cublas.getVersion(cuda.device.get_cublas_handle())
        return f"cuda {card!r} {cuda.runtime.runtimeGetVersion()} {cublas} {cupy.__version__}"

    def free(self) -> None:
        """Give back to the card what CuPy keeps of the memory of intermediate results."""
        pool = self.kernels.cupy.get_default_memory_pool()
        pool.free_all_blocks()
        pool.set_limit(size=0)  # none

    def read_page(self, keys: CacheRows, values: CacheRows, page: int) -> np.ndarray:
        """A copy of a page of the cache on the host, as of moss_jt.engine.kv_cache.KVCache.read_page."""
        arrays = _arrays(keys, values)
        layers, positions, heads, head_dim = numbers_of(keys).shape
        n_bytes = sum(int(np.prod(a.shape)) * np.dtype(str(a.dtype)).itemsize for a in arrays)

        def work(a: Sequence[Array], out: Array) -> None:
            for part, copy in _of_page(a, out, page):
                copy[...] = part

        copy: np.ndarray = operation((n_bytes * PAGE // positions,), arrays, work, np.uint8).numpy()
        return (
            copy
            if isinstance(keys, ByteRows)
            else copy.view(np.float16).reshape(2, layers, PAGE, heads, head_dim)
        )

    def write_page(self, keys: CacheRows, values: CacheRows, page: int, data: np.ndarray) -> None:
        """Put such a copy into the cache."""
        arrays, content = _arrays(keys, values), data.reshape(-1).view(np.uint8)

        def work(a: Sequence[Array], out: Array) -> None:
            for part, copy in _of_page(a[:-1], a[-1], page):
                part[...] = copy
            out[...] = 0

        operation((1, 1), [*arrays, jt.array(content)], work).sync()

    def head(
        self, h: Var, norm_weight: Var, norm_bias: Var, weight: Region, bias: Var, whole: int = 0
    ) -> Var:
        check_shape("h", h, (h.shape[0], self.config.n_embd))
        check_shape("weight", weight, (bias.shape[0], self.config.n_embd))
        tokens, rows = h.shape[0], weight.shape[0]

        def work(kernels: Launchers, a: Sequence[Array], out: Array) -> None:
            for some, pages in _ways(tokens, whole):
                normed = kernels.layer_norm(a[0][some], a[1], a[2], self.config.layer_norm_epsilon)
                matrix = array_at(a[3], weight)
                if pages:
                    product = kernels.page_by_page(normed, matrix)
                else:
                    (product,) = kernels.products([Product(normed, matrix)])
                kernels.add_bias(product, a[4], out[some])

        inputs = [h, norm_weight, norm_bias, weight.memory, bias]
        if whole or tokens > FEW_TOKENS:
            return operation((tokens, rows), inputs, lambda a, out: work(self.kernels, a, out))
        key = weight.offset, rows, tokens
        if key not in self._heads:
            self._heads[key] = self._record(work, inputs, (tokens, rows))
        return queue(self._heads[key], self._launch, (tokens, rows), inputs)

    def block(
        self, h: Var, weights: BlockWeights, keys: CacheRows, values: CacheRows, layer: int, places: Places
    ) -> Var:
        tokens, cache = places.count, _arrays(keys, values)
        check_shape("h", h, (tokens, self.config.n_embd))
        check_cache(keys, values, self.config, layer, places)
        check_adapters(places, self.adapters, layer)
        recordings = self._blocks.get(weights)
        if recordings is None:
            recordings = self._blocks[weights] = self._checked(weights)

        def work(kernels: Launchers, a: Sequence[Array], out: Array) -> None:
            def at(region: Region) -> Array:
                return array_at(a[1], region)

            tables, rest = (*a[2:5], *_rows(a[5 : 5 + len(cache)])), a[5 + len(cache) :]
            adapters = TokenAdapters(rest[0], rest[1], rest[2], rank) if rank else None
            self._block(kernels, a[0], weights, at, tables, places.whole, out, adapters)

        inputs = [h, weights.ln_1_weight.memory, self.rotary, places.tokens, places.table, *cache]
        layered = range(5, len(inputs))
        rank = 0
        if self.adapters is not None and places.adapters is not None:
            rank = self.adapters.most_rank
            inputs += [self._bank, self._directories[layer], places.adapter_tokens]
        if places.whole or tokens > FEW_TOKENS:

            def long(a: Sequence[Array], out: Array) -> None:
                if layer == 0:
                    # CuPy's limit counts what it keeps of passes of other lengths, and CuPy gives none of that back for new ones.
                    self.kernels.cupy.get_default_memory_pool().free_all_blocks()
                own = [array[layer] if number in layered else array for number, array in enumerate(a)]
                work(self.kernels, own, out)

            return operation(h.shape, inputs, long)
        key = tokens, rank, len(cache), cache[0].shape[1], *places.table.shape
        if key not in recordings:
            recordings[key] = self._record(work, inputs, h.shape, layered)
        return queue(recordings[key], self._launch, h.shape, inputs, layer)

    def launches_per_block(self, weights: BlockWeights) -> int:
        """Of a block that was queued with these weights, whatever its tokens."""
        return next(int(recording.table[0]) for recording in self._blocks[weights].values())

    def _record(
        self,
        work: Callable[[Launchers, Sequence[Array], Array], None],
        inputs: list[Var],
        shape: tuple[int, ...],
        layered: Container[int] = (),
    ) -> Recording:
        """What ``work`` launches over arrays that lie in the inputs, of which ``layered`` have a layer on their first axis."""
        arrays = []
        for number, var in enumerate(inputs):
            shape_here, dtype, layer_bytes = tuple(var.shape), np.dtype(str(var.dtype)), 0
            if number in layered:
                shape_here = shape_here[1:]
                layer_bytes = int(np.prod(shape_here)) * dtype.itemsize
            arrays.append(DeviceArray(number, 0, shape_here, dtype, layer_bytes))
        recorder = Recorder(self.kernels, len(inputs) + 1)
        work(recorder, arrays, DeviceArray(len(inputs), 0, tuple(shape), np.dtype(np.float32)))
        return recorder.recording()

    def _block(
        self,
        kernels: Launchers,
        h: Array,
        weights: BlockWeights,
        at: At,
        tables: Sequence[Any],
        whole: int,
        out: Array,
        adapters: TokenAdapters | None = None,
    ) -> None:
        """The block over arrays on the device; tables: rotary, places and pages of the tokens, the layer's keys and values.

        All keys and values are there before anyone attends to them.
        """
        rotary, places, pages, keys, values = tables
        norm = at(weights.ln_1_weight), at(weights.ln_1_bias)
        inputs = []
        for some, by_page in _ways(h.shape[0], whole):
            normed = kernels.layer_norm(h[some], *norm, self.config.layer_norm_epsilon)
            products = [_product(weights.qkv, at, normed), _product(weights.fc_in, at, normed)]
            qkv, inner = kernels.products(products, by_page)
            if adapters is not None:
                kernels.add_adapters(adapters[some], ("qkv", normed, qkv), ("fc_in", normed, inner))
            q = kernels.rotary_cache(qkv, rotary, keys, values, places[some], pages)
            inputs.append((some, by_page, q, kernels.bias_gelu(inner, at(weights.fc_in_bias))))
        for some, by_page, q, inner in inputs:
            context = kernels.attention(q, keys, values, places[some], pages, by_page)
            # The larger matrix first: its blocks are the longer ones.
            products = [_product(weights.fc_out, at, inner), _product(weights.out, at, context)]
            added = kernels.sum_of_products(products, by_page)
            if adapters is not None:  # the last part is the second product's
                kernels.add_adapters(adapters[some], ("fc_out", inner, added), ("out", context, added[-1:]))
            kernels.add_block(h[some], added, at(weights.fc_out_bias), out[some])

    def _checked(self, weights: BlockWeights) -> dict[tuple[int, ...], Recording]:
        """The recordings for such weights, by tokens and positions of the cache.

        Once for each object, for it goes with memory that native code will trust. Where in a unit's memory its tensors
        lie is all that recordings know of them, and most units are alike.
        """
        check_block(weights, self.config)
        return self._layouts.setdefault(_layout(weights), {})


def _ways(tokens: int, whole: int) -> list[tuple[slice, bool]]:
    """The rows of a pass that are whole pages, and the others; with whether they are."""
    ways = [(slice(0, whole), True), (slice(whole, tokens), False)]
    return [(some, by_page) for some, by_page in ways if some.start < some.stop]


def _arrays(keys: CacheRows, values: CacheRows) -> list[Var]:
    """The cache's own, in the order in which a page's copy has them."""
    return [
        array
        for rows in (keys, values)
        for array in ((rows.numbers, rows.scales) if isinstance(rows, ByteRows) else (rows,))
    ]


def _rows(arrays: Sequence[Array]) -> tuple[CacheRows, CacheRows]:
    """Keys and values of such arrays."""
    if len(arrays) == 2:
        return arrays[0], arrays[1]
    return ByteRows(arrays[0], arrays[1]), ByteRows(arrays[2], arrays[3])


def _of_page(arrays: Sequence[Array], copy: Array, page: int) -> Iterator[tuple[Array, Array]]:
    """What a page has in each array, all layers, and where that lies in the page's copy (n,) uint8."""
    pages, begin = arrays[0].shape[1] // PAGE, 0
    for array in arrays:
        each = array.shape[1] // pages
        part = array[:, page * each : (page + 1) * each]
        own = copy[begin : begin + part.nbytes]
        yield part, own.view(part.dtype).reshape(part.shape)
        begin += part.nbytes


def _layout(value: Any) -> Hashable:
    """Where the tensors of weights lie in their memory, and how they are packed."""
    if isinstance(value, Region):
        return value.offset, value.shape, value.dtype
    if is_dataclass(value):
        return tuple(_layout(getattr(value, field.name)) for field in fields(value))
    return value  # bits and the like


def array_at(memory: Array, region: Region) -> Array:
    """The region of a unit's memory, as an array over it."""
    if isinstance(memory, DeviceArray):
        return DeviceArray(memory.memory, region.offset, region.shape, np.dtype(region.dtype))
    n_bytes = int(np.prod(region.shape)) * np.dtype(region.dtype).itemsize
    content = memory[region.offset : region.offset + n_bytes]
    return content.view(np.dtype(region.dtype)).reshape(region.shape)


def _product(matrix: Matrix, at: At, x: Array) -> Product:
    """x with the matrix's arrays."""
    if isinstance(matrix, DenseMatrix):
        return Product(x, at(matrix.weight))
    order = None if matrix.input_order is None else at(matrix.input_order).reshape(-1)
    return Product(x, at(matrix.packed), matrix.bits, at(matrix.scales), at(matrix.zeros), order)


def operation(shape: tuple[int, ...], inputs: list[Var], work: Work, dtype: type = np.float32) -> Var:
    """One Jittor operation that calls ``work`` with its inputs' arrays and the array for its result."""

    def run(_: Any, data: dict[str, list[Array]]) -> None:
        work(data["inputs"], data["outputs"][0])

    return jt.numpy_code(shape, dtype, inputs, run)
