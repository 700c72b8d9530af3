"""The kit for a machine with a card (benchmarks/card) is kept working without one: what it carries, its steps, its budget."""

import ctypes
import json
import os
import re
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.emulation import sim_gpu
from tests.support.gpu_runs import GPU_HOME

ROOT = Path(__file__).resolve().parents[1]
CARD = ROOT / "benchmarks" / "card"


def run(script: Path, folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", str(script)],
        cwd=folder,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=3000,
        check=False,
    )


def write_wheels(folder: Path) -> None:
    """A tiny wheel for each that prepare.sh downloads, which it then need not."""
    text = (CARD / "prepare.sh").read_text()
    match = re.search(r'WHEELS="([^"]+)"', text)
    assert match is not None
    folder.mkdir()
    for name in match.group(1).split():
        package = name.split("-")[0]
        with zipfile.ZipFile(folder / f"{name}-py3-none-any.whl", "w") as wheel:
            wheel.writestr(f"{package}_carried/__init__.py", "")
            if package == "cupy_cuda13x":
                wheel.writestr("cupy/cuda/thrust.cpython-312-x86_64-linux-gnu.so", "large")


@pytest.fixture(scope="module")
def carried(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that prepare.sh makes in a checkout, which here is only what it looks for."""
    checkout = tmp_path_factory.mktemp("checkout")
    (checkout / "moss_jt").mkdir()
    (checkout / "pyproject.toml").touch()
    write_wheels(checkout / "wheels")
    wheels = {"KEEP": str(checkout / "wheels"), "PYTHON": sys.executable}
    done = run(CARD / "prepare.sh", checkout, **wheels, LIMIT_MIB="0")
    assert done.returncode == 1 and "too much" in done.stdout
    done = run(CARD / "prepare.sh", checkout, **wheels)
    assert done.returncode == 0, done.stdout + done.stderr
    return checkout / ".gpu"


def test_all_that_is_carried_lies_in_one_folder(carried: Path) -> None:
    assert {path.name for path in carried.iterdir()} == {"site.tar.xz", "on_card.sh"}
    with tarfile.open(carried / "site.tar.xz") as archive:
        names = {name.removeprefix("./") for name in archive.getnames()}
    for package in ("numpy", "cupy_cuda13x", "jittor", "nvidia_ml_py"):
        assert f"{package}_carried/__init__.py" in names
    assert "moss_jt-0.1.0.dist-info/METADATA" in names
    assert not any("thrust" in name for name in names)


def test_it_is_prepared_in_a_checkout_only(tmp_path: Path) -> None:
    done = run(CARD / "prepare.sh", tmp_path)
    assert done.returncode == 1 and "root of the moss-jt checkout" in done.stdout


def rehearse(carried: Path, out: Path, **environment: str) -> tuple[int, dict[str, tuple[str, str]]]:
    """The exit code, and the verdict and the remark of each step."""
    given = {
        "SMALL": "1",
        "JOBS": "2",
        "PARALLEL": "0",
        "BUDGET_S": "3000",
        "PY": sys.executable,
        "OUT": str(out),
        "WORK": str(out / "work"),
        "CARRIED": str(carried),
    }
    done = run(carried / "on_card.sh", ROOT, **{**given, **environment})
    table = (out / "table.txt").read_text()
    assert table in done.stdout
    rows = re.findall(r"^(PASS|FAIL|TIME|SKIP) +(\S+) +\d+ s *(.*)$", table, re.MULTILINE)
    assert rows, done.stdout + done.stderr
    return done.returncode, {name: (verdict, remark) for verdict, name, remark in rows}


def test_a_step_that_fails_is_noted_and_the_next_ones_run(carried: Path, tmp_path: Path) -> None:
    """The fault is that there is no Python where the kernels are checked, and no profiler."""
    broken = tmp_path / "python"
    broken.write_text(
        f'#!/bin/sh\ncase "$*" in *kernels.py*) echo "Error: planted"; exit 3;; esac\nexec {sys.executable} "$@"\n'
    )
    broken.chmod(0o755)
    code, steps = rehearse(carried, tmp_path, ONLY="unpack|kernels-check|counters|write-.*", PY=str(broken))
    assert code == 1
    assert steps["kernels-check"] == ("FAIL", "rc 3: Error: planted")
    assert steps["counters"][0] == "FAIL"
    assert steps["unpack"][0] == steps["write-4-blocks-16"][0] == steps["write-4-blocks-4"][0] == "PASS"
    assert "jittor" not in " ".join(steps) and "doctor" not in steps
    assert "Error: planted" in (tmp_path / "log.txt").read_text()
    assert (tmp_path / "work" / "site" / "numpy_carried").is_dir()


def test_nothing_begins_that_the_budget_has_no_time_for(carried: Path, tmp_path: Path) -> None:
    _, steps = rehearse(carried, tmp_path, BUDGET_S="1")
    assert {
        "kernels-check",
        "jittor",
        "tests-stream",
        "tests-quantised",
        "tests-training",
        "write-4-blocks-16",
        "memcheck",
    } <= steps.keys()
    for name in steps.keys() - {"facts", "unpack", "doctor"}:
        assert steps[name][0] == "SKIP" and "s left" in steps[name][1]


def test_a_step_ends_with_the_budget(carried: Path, tmp_path: Path) -> None:
    slow = tmp_path / "python"
    slow.write_text(f'#!/bin/sh\ncase "$*" in *doctor*) exec sleep 600;; esac\nexec {sys.executable} "$@"\n')
    slow.chmod(0o755)
    code, steps = rehearse(carried, tmp_path, ONLY="doctor|memcheck", BUDGET_S="10", PY=str(slow))
    assert code == 1
    assert steps["doctor"][0] == "TIME" and steps["doctor"][1].startswith("stopped at")
    assert steps["memcheck"][0] == "SKIP"


@pytest.mark.long
def test_all_steps_run_on_the_simulated_card(carried: Path, tmp_path: Path) -> None:
    """All but what only a real card's tools and full-size models can do."""
    simulated = sim_gpu.build()
    simulated[GPU_HOME] = simulated.pop("HOME")
    simulated["CUDA_HOME"] = str(Path(simulated.pop("nvcc_path")).parents[1])  # which runs of a test inherit
    code, steps = rehearse(carried, tmp_path, **simulated)
    failed = {name: steps[name] for name in steps if steps[name][0] != "PASS"}
    assert failed.keys() == {"counters", "memcheck"} and code == 1, failed  # their programs are not here
    for name in ("doctor", "kernels-check", "jittor-gpu", "jittor-cpu", "tests-stream", "tests-quantised"):
        assert steps[name][0] == "PASS"
    for bits in (16, 8, 4):
        assert steps[f"bench-4-blocks-{bits}"][0] == "PASS"
    assert "This card: memory" in (tmp_path / "bench.txt").read_text()


def test_every_timing_calls_the_kernels_as_they_are(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """At tiny sizes and in the emulation, each once: what it times is no card."""
    from benchmarks.card import kernels

    tiny = {
        "WIDTH": 128,
        "INNER": 256,
        "HEADS": 2,
        "DIM": 64,
        "ROTARY": 16,
        "VOCABULARY": 64,
        "TOKENS": (1, 4),
        "PROMPTS": ((64, 64),),
    }
    matrices = {"qkv": (384, 128), "out": (128, 128), "fc_in": (256, 128), "fc_out": (128, 256)}
    for name, value in {**tiny, "MATRICES": matrices, "MIB": 1 << 10, "GIB": 1 << 12}.items():
        monkeypatch.setattr(kernels, name, value)

    def once(times: Any, call: Callable[[int], Any], *_: Any, **__: Any) -> float:
        call(0)
        return 1e-3

    def copy(target: int, source: int, count: int, kind: int, stream: int) -> None:
        ctypes.memmove(target, source, count)

    monkeypatch.setattr(kernels.Times, "median", once)
    on = kernels.emulated()
    runtime = SimpleNamespace(
        **vars(on.cupy.cuda.runtime),
        memcpyAsync=copy,
        deviceSynchronize=lambda: None,
        memGetInfo=lambda: (0, 1 << 30),
    )
    cuda = SimpleNamespace(**{**vars(on.cupy.cuda), "runtime": runtime})
    on.cupy = type("Cupy", (on.cupy,), {"cuda": cuda})
    assert kernels.time_all(on, str(tmp_path / "times.json"))
    rows = json.loads((tmp_path / "times.json").read_text())["rows"]
    names = {row["name"] for row in rows}
    assert {"16 bits head T=1", "8 bits fc_out T=4", "4 bits qkv T=1", "attention T=16 after 1024"} <= names
    assert "attention of whole pages T=64 after 64" in names
    assert {"layer_norm T=1", "bias_gelu T=16", "cuBLAS qkv T=1024", "whole pages out T=64"} <= names
    assert "dequantize int4 fc_in" in names
    assert kernels.once(on)
