"""What the operators check before native code or an index trusts a shape."""

from moss_jt.kernels.adapters import AdapterBank
from moss_jt.kernels.interface import (
    PAGE,
    BlockWeights,
    ByteRows,
    CacheRows,
    DenseMatrix,
    Matrix,
    Places,
    Var,
    numbers_of,
)
from moss_jt.store.architecture import BLOCK
from moss_jt.store.config import MossConfig


def check_shape(name: str, var: Var, shape: tuple[int, ...]) -> None:
    """Raises ValueError unless ``var`` has exactly this shape."""
    if tuple(var.shape) != shape:
        raise ValueError(f"{name} has shape {tuple(var.shape)}; {shape} is needed")


def check_dtype(name: str, var: Var, dtype: str) -> None:
    if str(var.dtype) != dtype:
        raise ValueError(f"{name} is {var.dtype}; {dtype} is needed")


def check_matrix(name: str, matrix: Matrix, outputs: int, inputs: int) -> None:
    """Raises ValueError unless all arrays of a matrix fit together and it is (outputs, inputs)."""
    if isinstance(matrix, DenseMatrix):
        check_shape(name, matrix.weight, (outputs, inputs))
        check_dtype(name, matrix.weight, "float16")
        return
    if matrix.bits not in (4, 8):
        raise ValueError(f"{name} has {matrix.bits} bits; 4 or 8 are needed")
    size = matrix.group_size
    if size < 32 or size % 32 or inputs % size:
        raise ValueError(
            f"{name} has groups of {size}; a multiple of 32 that divides its {inputs} inputs is needed"
        )
    check_shape(f"{name}.packed", matrix.packed, (outputs, inputs * matrix.bits // 8))
    check_shape(f"{name}.scales", matrix.scales, (outputs, inputs // size))
    check_shape(f"{name}.zeros", matrix.zeros, (outputs, inputs // size))
    check_dtype(f"{name}.packed", matrix.packed, "uint8")
    check_dtype(f"{name}.scales", matrix.scales, "float16")
    check_dtype(f"{name}.zeros", matrix.zeros, "uint8")
    if matrix.input_order is not None:
        check_shape(f"{name}.input_order", matrix.input_order, (inputs, 1))
        check_dtype(f"{name}.input_order", matrix.input_order, "int32")


def check_block(weights: BlockWeights, config: MossConfig) -> None:
    """Raises ValueError unless all of a block's weights have the shapes of this geometry."""
    for tensor in BLOCK:
        weight, shape = getattr(weights, tensor.field), tensor.shape(config)
        if tensor.is_matrix:
            check_matrix(tensor.field, weight, *shape)
        else:
            check_shape(tensor.field, weight, shape)
            check_dtype(tensor.field, weight, "float16")


def check_cache(
    keys: CacheRows,
    values: CacheRows,
    config: MossConfig,
    layer: int,
    places: Places,
    last: int | None = None,
) -> None:
    """Raises ValueError unless the pages of ``places`` lie in both arrays of the cache, in layer .. last, and the model has its
    positions."""
    layers, capacity = numbers_of(keys).shape[:2]
    for name, rows in (("keys", keys), ("values", values)):
        check_shape(name, numbers_of(rows), (layers, capacity, config.n_head, config.head_dim))
        check_dtype(name, numbers_of(rows), "int8" if isinstance(keys, ByteRows) else "float16")
        if isinstance(rows, ByteRows):
            check_shape(f"scales of {name}", rows.scales, (layers, capacity // PAGE, config.n_head, PAGE))
            check_dtype(f"scales of {name}", rows.scales, "float32")
    last = layer if last is None else last
    if not 0 <= layer <= last < layers:
        raise ValueError(f"layer {layer if layer < 0 else last} of a cache of {layers} layers")
    pages, last = places.last_page + 1, places.last_position
    if pages * PAGE > capacity or last >= config.n_positions:
        raise ValueError(
            f"{pages} pages of {PAGE} positions do not fit a cache of {capacity} positions, or position {last} a model of "
            f"{config.n_positions}"
        )


def check_adapters(places: Places, bank: AdapterBank | None, layer: int) -> None:
    """Raises ValueError unless the tokens' adapters are among these, and so is the layer."""
    if places.adapters is None:
        return
    if bank is None or not 0 <= layer < len(bank.directory):
        raise ValueError("tokens have adapters, and these operators none for the layer")
    if places.adapters.min() < -1 or places.adapters.max() >= len(bank.shapes):
        raise ValueError(f"adapters {sorted({*places.adapters.tolist()})} of {len(bank.shapes)}")
