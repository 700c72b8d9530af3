"""The CPU's products with the four matrices of a block, at several levels of vectors, beside sgemm and the read bandwidth.

    python benchmarks/cpu_products.py --levels 512-vnni,256 --tokens 1,32,64,256,1024

For one token, the share of the read bandwidth that was measured just before and after; for more, operations per second, and
how many times as fast as widening tiles to float32 for oneDNN's sgemm (which oneDNN does with all that the machine has,
whatever our level), and as sgemm alone over weights that are float32 already. Sums over the four matrices, and in brackets the
least and most of one. Without --width it is MOSS's block.
"""

import argparse
import subprocess
import tempfile
from collections import defaultdict
from pathlib import Path

from moss_jt.backend.home import onednn_folder
from moss_jt.kernels.cpu.simd import chosen_simd, definitions
from moss_jt.kernels.needs import DEFINITIONS

ROOT = Path(__file__).resolve().parents[1]


def compiled(folder: Path, level: str) -> Path:
    program = folder / f"products-{level}"
    library = onednn_folder().resolve() / "lib"
    macros = {**DEFINITIONS, **definitions(level), "MOSS_ONEDNN": 1}
    command = [
        "g++", "-std=c++17", "-march=native", "-fopenmp", "-Ofast", "-fno-fast-math", "-ffp-contract=off", "-w",
        *(f"-D{name}={value}" for name, value in macros.items()), f"-I{ROOT / 'kernels' / 'cpu'}",
        str(ROOT / "benchmarks" / "cpu_products.cc"), "-o", str(program),
        f"-L{library}", "-lmkldnn", f"-Wl,-rpath,{library}",
    ]  # fmt: skip
    subprocess.run(command, check=True)
    return program


def rows_of(level: str, lines: list[list[float]]) -> list[str]:
    """One row for each number of bits and tokens, over the matrices."""
    by_case = defaultdict(list)
    for bits, tokens, *rest in lines:
        by_case[int(tokens), int(bits)].append(rest)
    rows = []
    for (tokens, bits), cases in sorted(by_case.items()):
        name = f"| {level} | {'float16' if bits == 16 else f'int{bits}'} | {tokens} |"
        work = [n * k for n, k, *_ in cases]

        def total(column: int, work: list[float] = work, cases: list[list[float]] = cases) -> float:
            return sum(work) / sum(w / case[column] for w, case in zip(work, cases, strict=True))

        if tokens == 1:
            shares = [100 * case[2] / case[3] for case in cases]
            share = 100 * total(2) / total(3)
            rows.append(
                f"{name} {total(2):.1f} of {total(3):.1f} GB/s: {share:.0f} % ({min(shares):.0f}-{max(shares):.0f}) |"
            )
            continue
        ratios = [case[2] / case[3] for case in cases]
        rows.append(
            f"{name} {total(2):.0f} GFLOP/s: {total(2) / total(3):.2f} ({min(ratios):.2f}-{max(ratios):.2f}) of tiles + sgemm, "
            f"{total(2) / total(4):.2f} of sgemm |"
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--levels", default=chosen_simd())
    parser.add_argument("--tokens", default="1,32,64,256,1024")
    parser.add_argument("--width", type=int, default=6144)
    parser.add_argument("--inner", type=int, default=24576)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        programs = {level: compiled(Path(folder), level) for level in options.levels.split(",")}
        for level, program in programs.items():
            command = [program, *map(str, (options.width, options.inner)), *options.tokens.split(",")]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            lines = [[float(word) for word in line.split()] for line in done.stdout.splitlines()]
            print("\n".join(rows_of(level, lines)), flush=True)


if __name__ == "__main__":
    main()
