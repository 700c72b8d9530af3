"""What NVIDIA's own compiler says, where there is one of CUDA 12 or 13: Jittor's CUDA sources and our operations compile and link.

The whole of --gpu on it, over the simulated runtime, takes minutes and is marked long. MOSS_JT_TEST_NVIDIA names a folder
``nvidia`` of another environment's site-packages, with pip's wheels of CUDA.
"""

import importlib.util
import os
import subprocess
import sysconfig
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from moss_jt import Moss
from moss_jt.backend import toolkit
from moss_jt.backend.toolkit import (
    CUDA_13_FLAGS,
    LIBRARIES,
    Toolkit,
    composed,
    find_toolkit,
    nvcc_paths,
    nvcc_version,
)
from moss_jt.errors import MossError
from moss_jt.kernels.cuda.launchers import folder
from tests.emulation import sim_gpu
from tests.support.gpu_runs import STREAMED, run_on_gpu
from tests.support.models import tiny_model_folder

# Of Jittor's core what speaks to CUDA, and one of its kernels.
CORE = (
    "src/mem/allocator.cc",
    "src/mem/allocator/cuda_device_allocator.cc",
    "src/mem/allocator/cuda_dual_allocator.cc",
    "src/mem/allocator/cuda_host_allocator.cc",
    "src/mem/allocator/cuda_managed_allocator.cc",
    "src/mem/mem_info.cc",
    "src/misc/cuda_flags.cc",
    "src/event_queue.cc",
    "src/executor.cc",
    "src/init.cc",
    "extern/cuda/src/helper_cuda.cc",
    "src/misc/nan_checker.cu",
)


@dataclass(frozen=True)
class Nvcc:
    """A compiler, with the runtime and the headers that came with it."""

    path: Path
    series: int
    runtime: Path

    @property
    def flags(self) -> list[str]:
        """As moss-jt and Jittor set them, but for the optimisation."""
        jittor = jittor_folder()
        folders = (self.path.parents[1] / "include", jittor / "src", jittor / "extern" / "cuda" / "inc")
        includes = [f"-I{folder}" for folder in (*folders, sysconfig.get_path("include"))]
        return ["-std=c++14", "-O0", "-w", "-DHAS_CUDA", "-DIS_CUDA", *includes]

    def compile(self, source: Path, target: Path, more: Sequence[str]) -> subprocess.CompletedProcess[str]:
        if source.suffix == ".cu":
            command = [
                str(self.path),
                "-x",
                "cu",
                "-arch=compute_90",
                "-code=sm_90",
                "--cudart=shared",
                "-Xcompiler",
                "-fPIC",
            ]
        else:
            command = ["g++", "-fPIC"]
        command += [*self.flags, *more, "-c", str(source), "-o", str(target)]
        return subprocess.run(command, capture_output=True, text=True, check=False)


def jittor_folder() -> Path:
    spec = importlib.util.find_spec("jittor")
    assert spec is not None and spec.origin is not None
    return Path(spec.origin).parent


@pytest.fixture(scope="module", autouse=True)
def other_environment() -> None:
    """Wheels of another environment count, too."""
    if given := os.environ.get("MOSS_JT_TEST_NVIDIA"):
        own = toolkit.wheel_folders()
        actual = [path for part in toolkit.WHEEL_PARTS for path in sorted(Path(given).glob(part))]
        toolkit.wheel_folders = lambda: actual + own


@pytest.fixture(scope="module")
def nvcc() -> Nvcc:
    for path in nvcc_paths():
        try:
            series = nvcc_version(path)[0]
        except MossError:
            continue
        name = f"libcudart.so.{LIBRARIES['cudart'].get(series)}"
        runtime = [path.parents[1] / lib / name for lib in ("lib64", "lib", "targets/x86_64-linux/lib")]
        for library in runtime:
            if series >= 12 and library.exists():
                return Nvcc(path, series, library)
    pytest.skip("no nvcc of CUDA 12 or 13 with its runtime: pip install 'moss-jt[cuda13]' brings one")


def symbols(library: Path, which: str) -> set[str]:
    done = subprocess.run(["nm", "-D", which, str(library)], capture_output=True, text=True, check=True)
    return {line.split()[-1].split("@")[0] for line in done.stdout.splitlines() if line.strip()}


def test_jittor_s_core_and_our_operations_compile_and_link(nvcc: Nvcc, tmp_path: Path) -> None:
    ours = tmp_path / "ours.cu"
    headers = sorted(Path(folder()).glob("*.h"))
    ours.write_text(
        "".join(f'#include "{header}"\n' for header in headers)
        + 'extern "C" void run_copy(char* memory, void* host) { moss_copy::run(0, 0, 0, memory, 0, host, 1); }\n'
    )
    flags = CUDA_13_FLAGS.split() if nvcc.series >= 13 else []
    objects = []
    for source in (*(jittor_folder() / name for name in CORE), ours):
        objects.append(tmp_path / f"{source.name}.o")
        done = nvcc.compile(source, objects[-1], flags)
        assert done.returncode == 0, f"{source}: {done.stderr[-2000:]}"
    linked = tmp_path / "linked.so"
    libraries = [f"-L{nvcc.runtime.parent}", f"-l:{nvcc.runtime.name}"]
    subprocess.run(["g++", "-shared", *map(str, objects), *libraries, "-o", str(linked)], check=True)
    wanted = {name for name in symbols(linked, "--undefined-only") if name.lstrip("_").startswith("cuda")}
    assert {"cudaMalloc", "cudaMemcpyAsync", "cudaHostRegister", "cudaStreamWaitEvent"} <= wanted
    assert wanted <= symbols(nvcc.runtime, "--defined-only")


def test_the_flags_are_what_cuda_13_needs(nvcc: Nvcc, tmp_path: Path) -> None:
    """Without them it would not compile, and with a CUDA that does not need them they are left out."""
    helper = jittor_folder() / "extern" / "cuda" / "src" / "helper_cuda.cc"
    done = nvcc.compile(helper, tmp_path / "helper.o", [])
    assert (done.returncode != 0) == (nvcc.series >= 13)
    assert ("clockRate" in done.stderr) == (nvcc.series >= 13)


@pytest.fixture(scope="module")
def complete() -> Toolkit:
    try:
        actual = find_toolkit(13)
    except MossError as error:
        pytest.skip(f"no complete toolkit: {error}")
    if actual.version[0] < 12:
        pytest.skip(f"the toolkit here is of CUDA {actual.release}")
    return composed(actual)


@pytest.mark.long
def test_the_whole_of_gpu_over_the_simulated_runtime(complete: Toolkit) -> None:
    """Jittor's own build with NVIDIA's compiler and headers: its allocators and copies, our copy operation, every plan."""
    environment = sim_gpu.build(complete)
    prompts = [list(range(3, 28)), [5, 9, 200]]
    runs = run_on_gpu(tiny_model_folder(), STREAMED, prompts, environment, 3000)
    for run in runs:
        assert run.token_ids == runs[0].token_ids, run.case
        np.testing.assert_array_equal(run.logits, runs[0].logits, str(run.case))
    with Moss.load(tiny_model_folder(), memory="4GiB", context=96) as moss:
        for prompt, actual in zip(prompts, runs[0].token_ids, strict=True):
            answer = moss.generate(prompt, max_new_tokens=6, temperature=0)
            assert all(isinstance(piece, str) for piece in answer)
            assert answer.token_ids == actual
