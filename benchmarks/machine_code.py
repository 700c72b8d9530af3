"""What the machine code of our CUDA kernels says about speed: loads in flight, registers, blocks side by side. No card is needed.

    python benchmarks/machine_code.py --nvdisasm PATH [--architecture sm_90]

nvdisasm is in the PyPI package nvidia-cuda-nvdisasm; the compiler is the tests' (nvidia-cuda-nvrtc-cu12). "In flight" is the most
loads of 16 bytes that a thread has asked for and not yet used, along the code as it lies; bytes in flight per multiprocessor are
that times the threads that its registers and shared memory hold. By Little's law 3.35 TB/s at about 0.7 us take 18 KiB on each of
132 multiprocessors.
"""

import argparse
import re
import subprocess
import tempfile
from pathlib import Path

from moss_jt.kernels.cuda.launchers import NORM_THREADS, THREADS, folder, source
from tests.emulation import nvrtc

REGISTERS, THREADS_PER_PROCESSOR, SHARED_BYTES = (
    65536,
    2048,
    227 << 10,
)  # of Hopper; a block takes 1 KiB more than it asks for
LOAD = re.compile(r"LDG\S*\.128\S* R(\d+),")
NAME = re.compile(r"^\.text\.(\w+):")
REGISTER = re.compile(r"\bR(\d+)\b")
LABEL = re.compile(r"^(\.L_x_\d+):")
BRANCH = re.compile(r"BRA\S* .*`\((\.L_x_\d+)\)")


def loads_in_flight(code: list[str]) -> int:
    """The most 16-byte loads whose registers nobody has read or waited for yet."""
    pending: list[int] = []
    most = 0
    for line in code:
        load = LOAD.search(line)
        used = {int(number) for number in REGISTER.findall(line)}
        if load:
            used.discard(int(load[1]))
        for number, first in enumerate(pending):
            if used & set(range(first, first + 4)):
                del pending[: number + 1]  # loads come back in order as far as the code can know
                break
        if load:
            pending.append(int(load[1]))
            most = max(most, len(pending))
    return most


def main_loop(code: list[str]) -> int:
    """Instructions of the longest loop."""
    at, longest, count = {}, 0, 0
    for line in code:
        if label := LABEL.match(line):
            at[label[1]] = count
            continue
        count += 1
        branch = BRANCH.search(line)
        if branch and count - at.get(branch[1], count) > 1:
            longest = max(longest, count - at[branch[1]])
    return longest


def kernels_of(listing: str) -> dict[str, list[str]]:
    symbols: dict[str, list[str]] = {}
    lines: list[str] = []
    for line in listing.splitlines():
        if match := NAME.match(line):
            lines = symbols[match[1]] = []
        elif line.lstrip().startswith("/*") or LABEL.match(line):
            lines.append(line)
    return symbols


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--nvdisasm", required=True)
    parser.add_argument("--architecture", default="sm_90")
    options = parser.parse_args()
    print("kernel              registers  shared  blocks  in flight  KiB in flight  main loop")
    for name in ("linear.cu", "attention.cu", "elementwise.cu", "adapters.cu"):
        cubin, report = nvrtc.compile_cubin(source(name), options.architecture, folder())
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            Path(file.name).write_bytes(cubin)
            command = [options.nvdisasm, "-c", file.name]
            listing = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        for kernel, code in kernels_of(listing).items():
            threads = NORM_THREADS if kernel == "layer_norm" else THREADS
            shared = report[kernel].shared_bytes
            granted = -(-report[kernel].registers // 8) * 8
            blocks = min(
                REGISTERS // (granted * threads),
                THREADS_PER_PROCESSOR // threads,
                SHARED_BYTES // (shared + 1024),
                32,
            )
            loads = loads_in_flight(code)
            kib = loads * 16 * threads * blocks / 1024
            print(
                f"{kernel:20} {report[kernel].registers:8} {shared:7} {blocks:7} {loads:10} {kib:14.0f} {main_loop(code):10}"
            )


if __name__ == "__main__":
    main()
