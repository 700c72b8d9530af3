"""The operators take what they say that they need, and not a byte more: their C++ is compiled, run and counted.

Also without oneDNN, as on any machine that is not x86-64, and there under AddressSanitizer: every array has its exact size.
"""

import os
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from moss_jt.backend.home import onednn_folder
from moss_jt.backend.threads import compute_threads
from moss_jt.kernels import needs
from moss_jt.kernels.cpu.simd import available_simd, chosen_simd
from moss_jt.kernels.cpu.simd import definitions as simd_definitions
from moss_jt.kernels.interface import PAGE
from moss_jt.kernels.needs import DEFINITIONS, FEW_TOKENS, HEAD_ROWS, CpuNeeds
from moss_jt.store.config import MOSS_MOON_003, MossConfig
from moss_jt.store.sizes import MIB, sizes_of_geometry
from tests.support.block_oracle import geometry
from tests.support.native_flags import FLAGS

ROOT = Path(__file__).resolve().parents[1]
BITS = (16, 8, 4)
THREADS = 3
TOKENS = (1, FEW_TOKENS, FEW_TOKENS + 1, PAGE - 1, PAGE, 2 * PAGE)  # multiples of a page are whole

SMALL = geometry(256, 2, 32, n_positions=192, n_inner=384)
MOSS_HEADS = replace(
    MOSS_MOON_003, n_embd=512, n_head=2, n_inner=512, vocab_size=2048
)  # heads of 256, 2048 positions
NARROW = geometry(64, 4, 8, n_positions=512, n_inner=2048)  # rows of few bytes: many are taken at once


def compiled(folder: Path, simd: str, onednn: bool, *flags: str, source: str = "needs.cc") -> Path:
    """A program of tests/native over the kernels' headers, as source.py compiles them, or with a sanitizer."""
    program = folder / f"needs-{simd}-{onednn}-{len(flags)}"
    definitions = {
        **DEFINITIONS,
        **simd_definitions(simd),
        "MOSS_HEAD_ROWS": HEAD_ROWS,
        "MOSS_ALIGNMENT": needs.ALIGNMENT,
        **({"MOSS_ONEDNN": 1} if onednn else {}),
    }
    library = onednn_folder().resolve() / "lib"
    link = [f"-L{library}", "-lmkldnn", f"-Wl,-rpath,{library.resolve()}"] if onednn else []
    command = [
        "g++", "-std=c++17", "-fopenmp", "-fno-fast-math", "-ffp-contract=off", "-w", *FLAGS[simd], *flags,
        *(f"-D{name}={value}" for name, value in definitions.items()),
        f"-I{ROOT / 'kernels' / 'cpu'}", str(ROOT / "tests" / "native" / source), "-o", str(program), *link,
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    if "cannot find" in done.stderr and "asan" in done.stderr:
        pytest.skip("this compiler has no AddressSanitizer")
    assert done.returncode == 0, done.stderr[-3000:]
    return program


def run(program: Path, config: MossConfig, passes: list[tuple[int, ...]]) -> list[tuple[int, int, int]]:
    """(floats of the workspace, bytes of keys and values of a layer, bytes of the threads) after each pass: (bits, tokens,
    group_size, ordered, workspace, rank, cache_bits)."""
    lines = []
    for bits, tokens, group_size, ordered, floats, rank, cache_bits in passes:
        start = config.n_positions - tokens  # the whole cache is seen
        shape = (config.n_positions, config.n_head, config.head_dim, config.rotary_dim // 2, config.n_inner)
        lines.append(
            (bits, tokens, start, *shape, config.vocab_size, group_size, ordered, floats, rank, cache_bits)
        )
    text = "\n".join(" ".join(map(str, line)) for line in (lines[0], *lines))  # the first is not counted
    done = subprocess.run(
        [str(program)],
        input=text,
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": str(THREADS), "ASAN_OPTIONS": "detect_leaks=0"},
    )
    assert done.returncode == 0, done.stderr[:3000]
    actual = [tuple(map(int, line.split())) for line in done.stdout.splitlines()[1:]]
    assert len(actual) == len(passes)
    return [(taken, cache, held) for taken, cache, held in actual]


@pytest.mark.parametrize("simd", sorted({chosen_simd(), "256", "0"} & set(available_simd())))
def test_without_onednn_nothing_is_written_beyond_its_end(simd: str, tmp_path: Path) -> None:
    """int4 and int8 wrote a second set of inputs past the workspace, from 64 tokens on."""
    program = compiled(tmp_path, simd, False, "-O0", "-fsanitize=address")
    passes = [
        (
            bits,
            tokens,
            group_size,
            ordered,
            CpuNeeds(SMALL, bits, rank, cache_bits).block_floats(tokens, SMALL.n_positions, onednn=False),
            rank,
            cache_bits,
        )
        for bits, group_size, ordered, rank, cache_bits in (
            (16, 0, 0, 0, 16),
            (16, 0, 0, 5, 8),
            (8, 128, 0, 0, 16),
            (8, 32, 1, 5, 16),
            (4, 128, 0, 5, 8),
            (4, 32, 1, 0, 8),
        )
        for tokens in (1, FEW_TOKENS + 1, PAGE, 2 * PAGE)
    ]
    actual = run(program, SMALL, passes)
    for (*line, ordered, promised, _, _), (taken, _, _) in zip(passes, actual, strict=True):
        assert taken <= promised
        if ordered or line[0] == 16:
            assert promised - taken <= 2 * needs.ALIGNMENT, "the count is of something else"


@pytest.mark.parametrize("onednn", [True, False])
def test_blocks_and_threads_take_what_is_planned(onednn: bool, tmp_path: Path) -> None:
    if onednn and not (onednn_folder() / "lib").exists():
        pytest.skip("there is no oneDNN here")
    program = compiled(tmp_path, chosen_simd(), onednn, "-O1")
    for config in (SMALL, MOSS_HEADS, NARROW):
        for bits in BITS:
            group_size, rank, cache_bits = (
                min(128, config.n_embd),
                8 if bits == 8 else 0,
                16 if bits == 8 else 8,
            )
            own = CpuNeeds(config, bits, rank, cache_bits)
            passes = [
                (
                    bits,
                    tokens,
                    group_size,
                    0,
                    own.block_floats(
                        tokens,
                        config.n_positions,
                        onednn=onednn,
                        few=0 if tokens % PAGE == 0 else tokens,
                    ),
                    rank,
                    cache_bits,
                )
                for tokens in TOKENS
            ]
            sizes = sizes_of_geometry(replace(config, n_layer=1), bits, group_size, cache_bits)
            for line, (taken, cache, held) in zip(passes, run(program, config, passes), strict=True):
                assert taken <= line[-3]
                assert cache == sizes.cache_bytes(config.n_positions)
                planned = THREADS * 4 * own.thread_floats(line[1], config.n_positions)
                assert held <= planned, (config, line)
            if onednn and config is MOSS_HEADS:
                assert held > planned // 2, "the count is of something else"


def test_training_s_threads_take_what_is_planned(tmp_path: Path) -> None:
    if not (onednn_folder() / "lib").exists():
        pytest.skip("there is no oneDNN here")
    program = compiled(tmp_path, chosen_simd(), True, "-O1", source="training_needs.cc")
    shapes = [(64, SMALL), (700, SMALL), (96, MOSS_HEADS), (2048, MOSS_HEADS)]
    lines = [f"{tokens} {c.n_head} {c.head_dim} {c.n_inner}" for tokens, c in (shapes[0], *shapes)]
    done = subprocess.run(
        [str(program)],
        input="\n".join(lines),
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": str(THREADS)},
    )
    assert done.returncode == 0, done.stderr[:3000]
    planned = 0
    for (tokens, config), held in zip(shapes, map(int, done.stdout.split()[1:]), strict=True):
        planned = max(planned, THREADS * 4 * needs.training_thread_floats(config, tokens))
        assert held <= planned, (tokens, config)
    # One thread may have been quick enough to do it all.
    assert held > planned // THREADS // 2, "the count is of something else"


def test_the_plan_counts_each_thread() -> None:
    moss = CpuNeeds(MOSS_MOON_003, 16)
    assert moss.workspace_bytes(1, 2048, 2) < 64 * MIB < moss.workspace_bytes(512, 2048, 2)
    each = (moss.workspace_bytes(512, 2048, 64) - moss.workspace_bytes(512, 2048, 2)) / 62
    assert each == 4 * moss.thread_floats(512, 2048)
    assert 2 * MIB < each < 5 * MIB


@pytest.mark.parametrize(
    ("variables", "threads"),
    [
        ({"OMP_NUM_THREADS": "16"}, 16),
        ({"OMP_NUM_THREADS": "5,2"}, 5),
        ({"OMP_NUM_THREADS": "16", "OMP_THREAD_LIMIT": "6"}, 6),
        ({"OMP_NUM_THREADS": "none"}, len(os.sched_getaffinity(0))),
        ({"OMP_NUM_THREADS": "0"}, len(os.sched_getaffinity(0))),
        ({}, len(os.sched_getaffinity(0))),
    ],
)
def test_threads_are_counted_as_openmp_starts_them(
    variables: dict[str, str], threads: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name in ("OMP_NUM_THREADS", "OMP_THREAD_LIMIT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert compute_threads() == threads
    asked = "import ctypes; print(ctypes.CDLL('libgomp.so.1').omp_get_max_threads())"
    done = subprocess.run(["python3", "-c", asked], capture_output=True, text=True, env=dict(os.environ))
    limit = int(os.environ.get("OMP_THREAD_LIMIT", "0")) or threads
    assert min(int(done.stdout), limit) == threads


def test_every_width_that_runs_here_has_flags() -> None:
    assert set(available_simd()) <= FLAGS.keys()
