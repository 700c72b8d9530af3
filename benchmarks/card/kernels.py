"""moss-jt's CUDA kernels on a card, through their own launch code: against float64, and timed. Needs CuPy, not Jittor.

python3 -P benchmarks/card/kernels.py check            every kernel against the tests' oracle
python3 -P benchmarks/card/kernels.py time OUT.json    bytes per second of the products at MOSS's width, attention, the rest, cuBLAS
python3 -P benchmarks/card/kernels.py once             one launch each, for a profiler
python3 -P benchmarks/card/kernels.py check --fake     the same checks in the tests' emulation, small shapes only: no card

Letters: T tokens, N outputs, K inputs, H heads, D dimensions of a head.
"""

import json
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from moss_jt.backend.gpu_requirements import require_gpu
from moss_jt.backend.toolkit import composed
from moss_jt.kernels.cuda.cublas import multiply
from moss_jt.kernels.cuda.launchers import Launchers, Product
from moss_jt.kernels.cuda.training_launchers import CardMatrix, TrainingLaunchers
from moss_jt.kernels.interface import PAGE, ByteRows
from moss_jt.kernels.needs import FEW_TOKENS
from moss_jt.kernels.rotary_table import rotary_table
from moss_jt.store.quant import PackedArrays, dequantize, dequantize_float16, pack

sys.path.append(str(Path(__file__).resolve().parents[2]))
from tests.support import block_oracle as oracle  # noqa: E402
from tests.support import cuda_products as products  # noqa: E402
from tests.support import cuda_reference as reference  # noqa: E402

STEP = 2.0**-23  # float32's
GROUP = 128
WIDTH, INNER, HEADS, DIM, ROTARY, VOCABULARY, POSITIONS = 6144, 24576, 24, 256, 64, 107008, 2304
MATRICES = {
    "qkv": (3 * WIDTH, WIDTH),
    "out": (WIDTH, WIDTH),
    "fc_in": (INNER, WIDTH),
    "fc_out": (WIDTH, INNER),
}
TOKENS = (1, 4, 16)
PROMPTS = ((64, 0), (512, 0), (512, 512))  # whole pages: tokens, and those before them
DEVICE_TO_DEVICE = 3  # cudaMemcpyKind
MIB, GIB = 1 << 20, 1 << 30


def card() -> SimpleNamespace:
    """CuPy, with the toolkit that moss-jt would compute with, and how arrays come to the card and back."""
    toolkit = composed(require_gpu()[1])
    os.environ["CUDA_PATH"] = str(toolkit.home)
    toolkit.load()
    import cupy

    return SimpleNamespace(cupy=cupy, dev=cupy.asarray, host=cupy.asnumpy, small=False)


def emulated() -> SimpleNamespace:
    """The same without a card."""
    from tests.emulation.emulator import FakeCupy, aligned

    return SimpleNamespace(cupy=FakeCupy, dev=aligned, host=np.asarray, small=True)


# Inputs


def normal(shape: tuple[int, ...], seed: int = 0, scale: float = 1.0) -> np.ndarray:
    """float32"""
    return np.random.default_rng(seed).standard_normal(shape, np.float32) * np.float32(scale)


def half(shape: tuple[int, ...], seed: int = 0, scale: float = 0.1) -> np.ndarray:
    """float16"""
    return normal(shape, seed, scale).astype(np.float16)


def packed_matrix(outputs: int, inputs: int, bits: int, group: int) -> PackedArrays:
    draw, groups = np.random.default_rng(0), inputs // group
    fields = draw.integers(0, 2**bits, (outputs, inputs)).astype(np.uint8)
    zeros = draw.integers(0, 2**bits, (outputs, groups)).astype(np.uint8)
    scales = draw.uniform(0.001, 0.05, (outputs, groups)).astype(np.float16)
    return PackedArrays(pack(fields, bits), scales, zeros, bits, group)


# Check


class Report:
    """A line per comparison; a failure of any kind is one of them, and the next one is tried."""

    def __init__(self) -> None:
        self.bad: list[str] = []
        self.count = 0

    def compare(self, name: str, work: Callable[..., tuple[bool, str]], *arguments: Any) -> None:
        try:
            good, text = work(*arguments)
        except Exception as error:  # noqa: BLE001  whatever a card says, the others are compared too
            good, text = False, f"{type(error).__name__}: {str(error)[:300]}"
            traceback.print_exc()
        self.count += 1
        if not good:
            self.bad.append(name)
        print(f"{'ok  ' if good else 'BAD '} {name:46} {text}", flush=True)

    def end(self) -> bool:
        print(f"{self.count - len(self.bad)} ok, {len(self.bad)} bad: {self.bad}")
        return not self.bad


def of_bound(ours: np.ndarray, x: np.ndarray, weight: np.ndarray) -> tuple[bool, str]:
    """Within float32's rounding of K terms, as tests/test_cuda_kernels.py has it; x (T, K), weight (N, K)."""
    exact = x.astype(np.float64) @ weight.astype(np.float64).T
    size = np.abs(x).astype(np.float64) @ np.abs(weight).astype(np.float64).T
    share = float(np.max(np.abs(ours - exact) / (4 * STEP * np.sqrt(x.shape[1]) * size + 1e-12)))
    return share <= 1, f"{share:.3f} of the bound"


def close(ours: np.ndarray, wanted: np.ndarray, most: float) -> tuple[bool, str]:
    """Off by at most that share of the largest."""
    off = float(np.abs(ours - wanted).max() / np.abs(wanted).max())
    return off < most, f"off by {off:.1e} of the largest"


def check(on: SimpleNamespace) -> bool:
    kernels, report = Launchers(on.cupy), Report()
    check_products(on, kernels, report)
    check_attention(on, kernels, report)
    check_elementwise(on, kernels, report)
    check_training(on, TrainingLaunchers(on.cupy), report)
    return report.end()


def check_products(on: SimpleNamespace, kernels: Launchers, report: Report) -> None:
    shapes = [(1, 24, 64), (2, 8, 264), (5, 33, 512), (16, 40, 1032), (17, 40, 1032), (FEW_TOKENS, 24, 512)]
    packed_shapes = [(1, 24, 64, 32), (3, 9, 384, 192), (16, 16, 1056, 32), (1, 40, 4096, GROUP)]
    many = [(24, 24, 64)]
    if not on.small:
        shapes += [(1, 6144, 6144), (4, 18432, 6144), (16, 6144, 24576), (1, VOCABULARY // 8, 6144)]
        packed_shapes += [
            (t, n, k, GROUP) for t, n, k in ((1, 6144, 6144), (4, 18432, 6144), (16, 6144, 24576))
        ]
        many += [(24, 6144, 6144), (256, 18432, 6144)]
    for t, n, k in shapes:
        report.compare(f"float16 {t}x{n}x{k}", dense, on, kernels, t, n, k)
    for bits in (8, 4):
        for t, n, k, group in packed_shapes:
            report.compare(f"int{bits} {t}x{n}x{k}", packed, on, kernels, t, packed_matrix(n, k, bits, group))
        report.compare(f"dequantize int{bits}", widened, on, kernels, packed_matrix(256, 96, bits, 32))
    for bits in (16, 8, 4):
        report.compare(f"{bits} bits: a token's bits in any short pass", same_bits, on, kernels, bits)
    for t, n, k in many:
        report.compare(f"cuBLAS {t}x{n}x{k}", by_cublas, on, kernels, t, n, k)
    report.compare("gather_inputs", gathered, on, kernels)


def dense(on: SimpleNamespace, kernels: Launchers, t: int, n: int, k: int) -> tuple[bool, str]:
    x, weight = normal((t, k)), half((n, k), 1)
    return of_bound(on.host(products.dense(kernels, on.dev(x), on.dev(weight))), x, weight)


def packed(on: SimpleNamespace, kernels: Launchers, t: int, matrix: PackedArrays) -> tuple[bool, str]:
    weight = dequantize(matrix)
    x = normal((t, weight.shape[1]))
    return of_bound(on.host(by_packed(on, kernels, x, matrix)), x, weight)


def by_cublas(on: SimpleNamespace, kernels: Launchers, t: int, n: int, k: int) -> tuple[bool, str]:
    x, weight = normal((t, k)), half((n, k), 1)
    rounded = x.astype(np.float16).astype(np.float64) @ weight.astype(np.float64).T
    return close(on.host(products.dense(kernels, on.dev(x), on.dev(weight), whole=True)), rounded, 1e-4)


def gathered(on: SimpleNamespace, kernels: Launchers) -> tuple[bool, str]:
    x, order = normal((3, 40)), np.random.default_rng(2).permutation(40).astype(np.int32)
    return np.array_equal(on.host(kernels.gather_inputs(on.dev(x), on.dev(order))), x[:, order]), ""


def by_packed(on: SimpleNamespace, kernels: Launchers, x: np.ndarray, matrix: PackedArrays) -> Any:
    parts = (on.dev(part) for part in (matrix.packed, matrix.scales, matrix.zeros))
    return products.packed(kernels, on.dev(x), *parts, matrix.bits)


def widened(on: SimpleNamespace, kernels: Launchers, matrix: PackedArrays) -> tuple[bool, str]:
    parts = (on.dev(part) for part in (matrix.packed, matrix.scales, matrix.zeros))
    return np.array_equal(
        on.host(kernels.dequantize(*parts, matrix.bits)), dequantize_float16(matrix)
    ), "exact"


def same_bits(on: SimpleNamespace, kernels: Launchers, bits: int) -> tuple[bool, str]:
    """A token's result must not depend on how many others are in the pass: drafts are verified so."""
    x, weight = normal((FEW_TOKENS, 1056)), half((20, 1056))
    matrix = None if bits == 16 else packed_matrix(20, 1056, bits, 32)

    def product(some: np.ndarray) -> np.ndarray:
        some = np.ascontiguousarray(some)
        result = (
            products.dense(kernels, on.dev(some), on.dev(weight))
            if matrix is None
            else by_packed(on, kernels, some, matrix)
        )
        return np.asarray(on.host(result))

    alone = np.concatenate([product(x[i : i + 1]) for i in range(FEW_TOKENS)])
    return all(np.array_equal(product(x[:t]), alone[:t]) for t in (3, 16, 17, FEW_TOKENS)), ""


def check_attention(on: SimpleNamespace, kernels: Launchers, report: Report) -> None:
    cases = [
        (1, 2, 16, 8, 0),
        (3, 4, 24, 16, 5),
        (1, 1, 256, 64, 30),
        (5, 2, 64, 64, 0),
        (PAGE, 2, 24, 16, PAGE),
        (PAGE, 2, 32, 16, PAGE),
    ]
    if not on.small:
        cases += [(1, HEADS, DIM, ROTARY, 2047), (16, HEADS, DIM, ROTARY, 1000), (256, HEADS, DIM, ROTARY, 0)]
    for t, heads, dim, rotary, start in cases:
        name = f"rotary and attention {t}x{heads}x{dim} at {start}"
        report.compare(name, attend, on, kernels, t, heads, dim, rotary, start)
        if dim % 16 == 0:
            report.compare(f"{name}, int8", attend_over_bytes, on, kernels, t, heads, dim, rotary, start)


def in_order(on: SimpleNamespace, start: int, tokens: int) -> tuple[Any, Any]:
    """Places (T, 2) and pages (1, pages) of one sequence whose pages lie in order, on the device."""
    places = np.stack([np.zeros(tokens, np.int32), np.arange(start, start + tokens, dtype=np.int32)], axis=1)
    pages = np.arange(-(-(start + tokens) // PAGE), dtype=np.int32)
    return on.dev(np.ascontiguousarray(places)), on.dev(pages[None])


def attend(
    on: SimpleNamespace, kernels: Launchers, t: int, heads: int, dim: int, rotary: int, start: int
) -> tuple[bool, str]:
    positions, at = -(-(start + t) // PAGE) * PAGE, np.arange(start, start + t)
    table, qkv = rotary_table(positions, rotary), normal((t, 3 * heads * dim), 5)
    keys, values = half((positions, heads, dim), 3), half((positions, heads, dim), 4)
    device_keys, device_values = on.dev(keys.copy()), on.dev(values.copy())
    where = in_order(on, start, t)
    q = kernels.rotary_cache(on.dev(qkv), on.dev(table), device_keys, device_values, *where)
    parts = qkv.astype(np.float64).reshape(t, 3, heads, dim).transpose(1, 0, 2, 3)
    keys[at], values[at] = oracle.rotate(parts[1], at, rotary), parts[2]
    ours, our_keys, our_values = (
        on.host(q).reshape(t, heads, dim),
        on.host(device_keys),
        on.host(device_values),
    )
    off = float(np.abs(ours - oracle.rotate(parts[0], at, rotary)).max())
    # A rounding to float16 may go the other way.
    same = np.allclose(our_keys.astype(np.float32), keys.astype(np.float32), rtol=2**-9, atol=1e-5)
    if off > 1e-5 or not same or not np.array_equal(our_values, values):
        return False, f"queries off by {off:.1e}"
    exact = oracle.attention(ours.astype(np.float64), our_keys, our_values, start)
    attended = on.host(kernels.attention(q, device_keys, device_values, *where, whole=t > FEW_TOKENS))
    return close(attended.reshape(t, heads, dim), exact, 1e-4)


def attend_over_bytes(
    on: SimpleNamespace, kernels: Launchers, t: int, heads: int, dim: int, rotary: int, start: int
) -> tuple[bool, str]:
    positions, at = -(-(start + t) // PAGE) * PAGE, np.arange(start, start + t)
    table, qkv = rotary_table(positions, rotary), normal((t, 3 * heads * dim), 5)
    rows = []
    for seed in (3, 4):
        numbers, scales = reference.quantized(normal((positions, heads, dim), seed))
        by_page = np.ascontiguousarray(scales.reshape(-1, PAGE, heads).transpose(0, 2, 1))
        rows.append(ByteRows(on.dev(numbers), on.dev(by_page)))
    places, pages = in_order(on, start, t)
    q = kernels.rotary_cache(on.dev(qkv), on.dev(table), *rows, places, pages)
    ours = [ByteRows(on.host(one.numbers), on.host(one.scales)) for one in rows]
    parts = qkv.astype(np.float64).reshape(t, 3, heads, dim).transpose(1, 0, 2, 3)
    for one, exact in zip(ours, (oracle.rotate(parts[1], at, rotary), parts[2]), strict=True):
        steps = one.scales.transpose(0, 2, 1).reshape(positions, heads, 1)[at]
        if (np.abs(reference.meant(one)[at] - exact) > 0.501 * steps).any():
            return False, "the cache is off by more than half a step"
    expected = reference.attention(on.host(q), *ours, on.host(places), on.host(pages))
    attended = on.host(kernels.attention(q, *rows, places, pages, whole=t > FEW_TOKENS))
    return close(attended, expected, 1e-4)


def check_elementwise(on: SimpleNamespace, kernels: Launchers, report: Report) -> None:
    for t, k in ((3, 200),) if on.small else ((3, 200), (1, WIDTH), (16, INNER)):
        report.compare(f"layer_norm {t}x{k}", layer_norm, on, kernels, t, k)
        report.compare(f"bias_gelu {t}x{k}", bias_gelu, on, kernels, t, k)


def layer_norm(on: SimpleNamespace, kernels: Launchers, t: int, k: int) -> tuple[bool, str]:
    x, weight, bias = normal((t, k), 1, 3.0), half((k,), 2), half((k,), 3)
    ours = on.host(kernels.layer_norm(on.dev(x), on.dev(weight), on.dev(bias), 1e-5))
    return close(ours, oracle.layer_norm(x, weight.astype(np.float64), bias.astype(np.float64), 1e-5), 1e-5)


def bias_gelu(on: SimpleNamespace, kernels: Launchers, t: int, k: int) -> tuple[bool, str]:
    x, bias = normal((t, k), 1, 3.0), half((k,), 3)
    return close(
        on.host(kernels.bias_gelu(on.dev(x), on.dev(bias))),
        oracle.gelu_new(x.astype(np.float64) + bias.astype(np.float64)),
        1e-5,
    )


def check_training(on: SimpleNamespace, kernels: TrainingLaunchers, report: Report) -> None:
    shapes, attentions = [(37, 24, 64)], [(70, 2, 16, 8)]
    if not on.small:
        shapes += [(512, 18432, 6144), (300, 6144, 24576)]
        attentions += [(200, 4, DIM, ROTARY)]
    for t, n, k in shapes:
        report.compare(f"training: products both ways {t}x{n}x{k}", both_ways, on, kernels, t, n, k)
    for t, heads, dim, rotary in attentions:
        name = f"training: attention both ways {t}x{heads}x{dim}"
        report.compare(name, attention_both_ways, on, kernels, t, heads, dim, rotary)
    for t, k in ((3, 200),) if on.small else ((3, 200), (16, WIDTH)):
        report.compare(f"training: layer norm back {t}x{k}", norm_back, on, kernels, t, k)


def both_ways(on: SimpleNamespace, kernels: TrainingLaunchers, t: int, n: int, k: int) -> tuple[bool, str]:
    """Gradients are tiny: float16 alone would lose them."""
    x, g, weight = normal((t, k)), normal((t, n), 2, 1e-9), half((n, k), 1)
    matrix = CardMatrix(on.dev(weight))
    out, back = on.dev(np.zeros((t, n), np.float32)), on.dev(np.zeros((t, k), np.float32))
    kernels.product(on.dev(x), matrix, out)
    kernels.product_back(on.dev(g), matrix, back)
    there = close(on.host(out), x @ weight.astype(np.float32).T, 1e-3)
    again = close(on.host(back), g @ weight.astype(np.float32), 1e-3)
    return there[0] and again[0], f"{there[1]}; back {again[1]}"


def slope_along(
    function: Callable[[np.ndarray], np.ndarray], x: np.ndarray, g: np.ndarray, back: np.ndarray
) -> tuple[bool, str]:
    """Whether back . v is the change of g . f(x) along a random v, by a central difference in float64."""
    direction, step, wide = np.random.default_rng(7).standard_normal(x.shape), 1e-5, x.astype(np.float64)
    change = (function(wide + step * direction) - function(wide - step * direction)) / (2 * step)
    scale = float(np.sqrt((g.astype(np.float64) ** 2).sum() * (change**2).sum()))
    off = abs(float((back * direction).sum()) - float((g * change).sum())) / scale
    return off < 1e-5, f"off by {off:.1e} of the change along a direction"


def attention_both_ways(
    on: SimpleNamespace, kernels: TrainingLaunchers, t: int, heads: int, dim: int, rotary: int
) -> tuple[bool, str]:
    """Two samples, the first as long as all but five tokens."""
    width, at = heads * dim, np.arange(t)
    qkv, g, table = normal((t, 3 * width), 5), normal((t, width), 6), rotary_table(t, rotary)
    spans = np.array([[0, t - 5], [t - 5, 5]], np.int32)

    def attended(x: np.ndarray) -> np.ndarray:
        parts = []
        for first, count in spans:
            q, k, v = x[first : first + count].reshape(count, 3, heads, dim).transpose(1, 0, 2, 3)
            q, k = (oracle.rotate(part, at[:count], rotary) for part in (q, k))
            parts.append(oracle.attention(q, k, v, 0).reshape(count, width))
        return np.concatenate(parts)

    given = on.dev(qkv), on.dev(table), spans, heads
    out, back = on.dev(np.zeros((t, width), np.float32)), on.dev(np.zeros((t, 3 * width), np.float32))
    kernels.attention(*given, out)
    kernels.attention_back(on.dev(g), *given, back)
    there = close(on.host(out), attended(qkv.astype(np.float64)), 1e-4)
    again = slope_along(attended, qkv, g, on.host(back))
    return there[0] and again[0], f"{there[1]}; back {again[1]}"


def norm_back(on: SimpleNamespace, kernels: TrainingLaunchers, t: int, k: int) -> tuple[bool, str]:
    h, g, weight = normal((t, k), 1, 3.0), normal((t, k), 2), half((k,), 3)
    back, normed = on.dev(np.zeros((t, k), np.float32)), on.dev(np.zeros((t, k), np.float32))
    kernels.norm_back(on.dev(g), on.dev(h), on.dev(weight), 1e-5, back, normed)
    wide = weight.astype(np.float64)
    return slope_along(lambda x: oracle.layer_norm(x, wide, np.zeros(k), 1e-5), h, g, on.host(back))


# Time


class Times:
    """Rows of what was timed, printed as they come; ``copy`` is the card's own speed, in bytes read and written per second."""

    def __init__(self, cupy: Any) -> None:
        self.cupy = cupy
        self.rows: list[dict[str, Any]] = []
        self.facts: dict[str, float] = {}
        self.copy = 1.0

    def median(self, call: Callable[[int], Any], count: int, rounds: int = 5, graph: bool = True) -> float:
        """Seconds of one of ``count`` calls that run one after the other; call gets its number.

        As a CUDA graph where that works, so that the host's time for queueing stays out; else queued one by one.
        """
        runtime = self.cupy.cuda
        stream = runtime.Stream(non_blocking=True) if graph else runtime.Stream.null
        with stream:
            launch = self._captured(stream, call, count) if graph else None
            if graph and launch is None:
                return self.median(call, count, rounds, graph=False)
            times = []
            for _ in range(rounds):
                start, end = runtime.Event(), runtime.Event()
                start.record(stream)
                if launch is not None:
                    launch(stream)
                else:
                    repeat(call, count)
                end.record(stream)
                end.synchronize()
                times.append(runtime.get_elapsed_time(start, end) / 1e3 / count)
        return float(np.median(times))

    def _captured(self, stream: Any, call: Callable[[int], Any], count: int) -> Callable[[Any], None] | None:
        repeat(call, count)
        stream.synchronize()
        try:
            stream.begin_capture()
            repeat(call, count)
            made = stream.end_capture()
            made.launch(stream)
            stream.synchronize()
        except Exception as error:  # noqa: BLE001  cuBLAS and CuPy's pool may refuse it, with errors of their own
            print(f"(no graph: {type(error).__name__}: {str(error)[:120]})", flush=True)
            return None
        return made.launch  # type: ignore[no-any-return]

    def row(self, name: str, seconds: float, n_bytes: int) -> None:
        speed = n_bytes / seconds
        self.rows.append({"name": name, "us": seconds * 1e6, "gb_s": speed / 1e9})
        print(
            f"{name:30} {seconds * 1e6:9.1f} us {speed / 1e9:8.0f} GB/s {speed / self.copy:6.0%} of the copy",
            flush=True,
        )

    def rate(self, name: str, seconds: float, operations: float) -> None:
        self.rows.append({"name": name, "us": seconds * 1e6, "tflop_s": operations / seconds / 1e12})
        print(f"{name:30} {seconds * 1e6:9.1f} us {operations / seconds / 1e12:8.0f} TFLOP/s", flush=True)

    def fact(self, name: str, value: float, unit: str) -> None:
        self.facts[name] = value
        print(f"{name}: {value:.0f} {unit}", flush=True)


def repeat(call: Callable[[int], Any], count: int) -> None:
    for number in range(count):
        call(number)


def pool(cupy: Any, n_bytes: int, kind: str) -> Any:
    """(n_bytes,) uint8 on the card: "weights" and "scales" are finite float16, "any" is anything."""
    draw, size = np.random.default_rng(7), 32 * MIB
    seeds = {
        "weights": lambda: (
            (draw.standard_normal(size // 2, np.float32) * 0.02).astype(np.float16).view(np.uint8)
        ),
        "scales": lambda: draw.uniform(0.001, 0.01, size // 2).astype(np.float16).view(np.uint8),
        "any": lambda: draw.integers(0, 256, size, dtype=np.uint8),
    }
    source, target = cupy.asarray(seeds[kind]()), cupy.empty((n_bytes,), np.uint8)
    for at in range(0, n_bytes, size):
        count = min(size, n_bytes - at)
        cupy.cuda.runtime.memcpyAsync(target.data.ptr + at, source.data.ptr, count, DEVICE_TO_DEVICE, 0)
    cupy.cuda.runtime.deviceSynchronize()
    return target


def taken_mib(cupy: Any) -> float:
    free, total = cupy.cuda.runtime.memGetInfo()
    return (total - free) / MIB


def time_all(on: SimpleNamespace, path: str | None) -> bool:
    cupy, times = on.cupy, Times(on.cupy)
    cupy.cuda.runtime.memGetInfo()
    times.fact("memory taken by the context", taken_mib(cupy), "MiB")
    cupy.cuda.device.get_cublas_handle()
    times.fact("memory taken with cuBLAS", taken_mib(cupy), "MiB")
    kernels = Launchers(cupy)
    products.dense(kernels, on.dev(normal((PAGE, 64))), on.dev(half((24, 64))), whole=True)
    cupy.cuda.runtime.deviceSynchronize()
    times.fact("memory taken after a product", taken_mib(cupy), "MiB")
    time_copy(cupy, times)
    for step in (time_products, time_attention, time_elementwise, time_cublas):
        step(on, kernels, times)
        cupy.get_default_memory_pool().free_all_blocks()
    if path is not None:
        Path(path).write_text(json.dumps({"rows": times.rows, **times.facts}, indent=1), encoding="utf-8")
    return True


def time_copy(cupy: Any, times: Times) -> None:
    ends = [cupy.empty((GIB,), np.uint8) for _ in range(2)]

    def copy(number: int) -> None:
        target, source = ends[number % 2], ends[1 - number % 2]
        cupy.cuda.runtime.memcpyAsync(target.data.ptr, source.data.ptr, GIB, DEVICE_TO_DEVICE, 0)

    times.copy = 2 * GIB / times.median(copy, 8, graph=False)
    times.fact("device copy, read and written", times.copy / 1e9, "GB/s")


def time_products(on: SimpleNamespace, kernels: Launchers, times: Times) -> None:
    for bits in (16, 8, 4):
        matrices = [time_matrix(on, kernels, times, bits, name, n, k) for name, (n, k) in MATRICES.items()]
        for t in TOKENS:
            seconds = sum(matrix[t] for matrix in matrices)
            print(
                f"{bits} bits T={t}: a block's products {seconds * 1e6:.0f} us, 34 blocks {34e3 * seconds:.2f} ms"
            )
    time_matrix(on, kernels, times, 16, "head", VOCABULARY, WIDTH)


def time_matrix(
    on: SimpleNamespace, kernels: Launchers, times: Times, bits: int, name: str, n: int, k: int
) -> dict[int, float]:
    """Seconds by tokens; the matrix in several copies, more than the card's cache holds."""
    n_bytes = n * k * bits // 8
    copies = max(2, -(-400 * MIB // n_bytes))
    weights = [pool(on.cupy, n_bytes, "weights" if bits == 16 else "any") for _ in range(copies)]
    scales, zeros = quantization(on, n, k)
    medians = {}
    for t in TOKENS:
        x = on.dev(normal((t, k)))

        def product(number: int, x: Any = x) -> None:
            weight = weights[number % copies]
            if bits == 16:
                kernels.products([Product(x, weight.view(np.float16).reshape(n, k))])
            else:
                kernels.products([Product(x, weight.reshape(n, k * bits // 8), bits, scales, zeros)])

        medians[t] = times.median(product, max(8, copies))
        times.row(
            f"{bits} bits {name} T={t}", medians[t], n_bytes + (0 if bits == 16 else 3 * n * (k // GROUP))
        )
    return medians


def quantization(on: SimpleNamespace, n: int, k: int) -> tuple[Any, Any]:
    """Scales and zero points (N, groups)."""
    scales = pool(on.cupy, n * (k // GROUP) * 2, "scales").view(np.float16).reshape(n, k // GROUP)
    return scales, pool(on.cupy, n * (k // GROUP), "any").reshape(n, k // GROUP)


def cache_of(on: SimpleNamespace) -> tuple[Any, Any]:
    """Keys and values (P, H, D) of one layer."""
    n_bytes = 2 * POSITIONS * WIDTH
    keys, values = (
        pool(on.cupy, n_bytes, "weights").view(np.float16).reshape(POSITIONS, HEADS, DIM) for _ in range(2)
    )
    return keys, values


def time_attention(on: SimpleNamespace, kernels: Launchers, times: Times) -> None:
    keys, values = cache_of(on)
    scales = on.dev(np.full((POSITIONS // PAGE, HEADS, PAGE), 0.01, np.float32))
    in_bytes = [
        ByteRows(one.view(np.int8).reshape(-1, HEADS, DIM)[:POSITIONS], scales) for one in (keys, values)
    ]
    for t, context in ((1, 32), (1, 256), (1, 1024), (1, 2047), (16, 1024)):
        q, where = on.dev(normal((t, WIDTH))), in_order(on, context, t)
        seconds = times.median(lambda _, q=q, where=where: kernels.attention(q, keys, values, *where), 10)
        times.row(f"attention T={t} after {context}", seconds, 4 * (context + t) * WIDTH)
        seconds = times.median(lambda _, q=q, where=where: kernels.attention(q, *in_bytes, *where), 10)
        n_bytes = 2 * (context + t) * (WIDTH + 4 * HEADS)
        times.row(f"attention over int8 T={t} after {context}", seconds, n_bytes)
    for t, context in PROMPTS:
        q, where = on.dev(normal((t, WIDTH))), in_order(on, context, t)
        seconds = times.median(
            lambda _, q=q, where=where: kernels.attention(q, keys, values, *where, whole=True), 10
        )
        pairs = sum(PAGE * (position + PAGE) for position in range(context, context + t, PAGE))
        times.rate(f"attention of whole pages T={t} after {context}", seconds, 4.0 * pairs * WIDTH)


def time_elementwise(on: SimpleNamespace, kernels: Launchers, times: Times) -> None:
    b, inner = on.dev(half((WIDTH,))), on.dev(half((INNER,)))
    for t in (1, 16):
        x, y = on.dev(normal((t, WIDTH))), on.dev(normal((t, INNER)))
        times.row(
            f"layer_norm T={t}",
            times.median(lambda _, x=x: kernels.layer_norm(x, b, b, 1e-5), 50),
            8 * t * WIDTH,
        )
        times.row(
            f"bias_gelu T={t}", times.median(lambda _, y=y: kernels.bias_gelu(y, inner), 50), 8 * t * INNER
        )


def time_cublas(on: SimpleNamespace, kernels: Launchers, times: Times) -> None:
    for name, (n, k) in MATRICES.items():
        weight = pool(on.cupy, 2 * n * k, "weights").view(np.float16).reshape(n, k)
        for t in (64, 512, 1024):
            x, narrow, out = on.dev(normal((t, k))), on.dev(half((t, k))), on.cupy.empty((t, n), np.float32)
            seconds = times.median(lambda _, a=(narrow, weight, out): multiply(on.cupy, *a), 10)
            times.rate(f"cuBLAS {name} T={t}", seconds, 2.0 * t * n * k)
            pages = [Product(x, weight)]
            seconds = times.median(lambda _, pages=pages: kernels.products(pages, whole=True), 10)
            times.rate(f"whole pages {name} T={t}", seconds, 2.0 * t * n * k)
        print(f"{name}: a page's bits are the same among {kernels.pages.sizes[n, k]} rows")
    n, k = MATRICES["fc_in"]
    scales, zeros = quantization(on, n, k)
    for bits in (8, 4):
        matrix = pool(on.cupy, n * k * bits // 8, "any").reshape(n, k * bits // 8)
        seconds = times.median(lambda _, m=matrix, b=bits: kernels.dequantize(m, scales, zeros, b), 10)
        times.row(f"dequantize int{bits} fc_in", seconds, n * k * (16 + bits) // 8)


def once(on: SimpleNamespace) -> bool:
    """One launch of each kind that decoding needs most, for a profiler."""
    kernels = Launchers(on.cupy)
    for name in ("qkv", "out"):
        n, k = MATRICES[name]
        x = on.dev(normal((1, k)))
        kernels.products([Product(x, pool(on.cupy, 2 * n * k, "weights").view(np.float16).reshape(n, k))])
        scales, zeros = quantization(on, n, k)
        for bits in (8, 4):
            matrix = pool(on.cupy, n * k * bits // 8, "any").reshape(n, k * bits // 8)
            kernels.products([Product(x, matrix, bits, scales, zeros)])
    keys, values = cache_of(on)
    for context in (32, 2047):
        kernels.attention(on.dev(normal((1, WIDTH))), keys, values, *in_order(on, context, 1))
    on.cupy.cuda.runtime.deviceSynchronize()
    return True


def main(arguments: Sequence[str]) -> int:
    words = [word for word in arguments if not word.startswith("--")]
    on = emulated() if "--fake" in arguments else card()
    on.small = on.small or "--small" in arguments
    works: dict[str, Callable[[], bool]] = {
        "check": lambda: check(on),
        "time": lambda: time_all(on, words[1] if len(words) > 1 else None),
        "once": lambda: once(on),
    }
    if not words or words[0] not in works:
        print(__doc__)
        return 2
    return 0 if works[words[0]]() else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
