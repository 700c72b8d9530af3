"""A CUDA toolkit is found wherever it is installed, and composed of pip's wheels where there is none."""

import os
import subprocess
from pathlib import Path

import pytest

from moss_jt.backend import toolkit
from moss_jt.backend.toolkit import CUDA_13_FLAGS, HEADERS, LIBRARIES, composed, find_toolkit
from moss_jt.errors import MossError


def write_nvcc(path: Path, release: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\necho 'Cuda compilation tools, release {release}, V{release}.88'\n")
    path.chmod(0o755)
    return path


def touch(*paths: Path) -> None:
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine on which nothing of CUDA is installed, neither by pip."""
    for name in ("nvcc_path", "CUDA_HOME", "CUDA_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("JITTOR_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    monkeypatch.setattr(toolkit, "USUAL_NVCC", ())
    monkeypatch.setattr(toolkit, "SYSTEM_LIBRARIES", tmp_path / "nowhere")
    monkeypatch.setattr(toolkit, "wheel_folders", lambda: [])
    return tmp_path


@pytest.fixture
def complete(machine: Path) -> Path:
    """A folder that looks like a toolkit, in none of the places."""
    home = machine / "cuda"
    write_nvcc(home / "bin" / "nvcc", "12.4")
    touch(*(home / "lib64" / f"lib{name}.so" for name in LIBRARIES))
    touch(*(home / "include" / name for name in HEADERS))
    return home


@pytest.mark.parametrize("how", ["nvcc_path", "CUDA_HOME", "CUDA_PATH", "PATH", "jtcuda"])
def test_the_toolkit_is_found(
    machine: Path, complete: Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    compiler = complete / "bin" / "nvcc"
    if how == "jtcuda":
        folder = machine / "home" / ".cache" / "jittor" / "jtcuda"
        folder.mkdir(parents=True)
        (folder / "cuda12.2").symlink_to(complete)
    else:
        value = {"nvcc_path": compiler, "PATH": f"{complete}/bin:/usr/bin:/bin"}.get(how, complete)
        monkeypatch.setenv(how, str(value))
    actual = find_toolkit()
    assert (actual.nvcc, actual.version, actual.scattered) == (compiler, (12, 4), False)
    assert actual.libraries["nvrtc"] == actual.home / "lib64" / "libnvrtc.so"
    assert composed(actual) == actual and actual.compiler_flags == ""


def test_an_incomplete_or_wrong_toolkit_is_told(complete: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(MossError, match=r"nvcc, is missing: pip install 'moss-jt\[cuda13\]' brings one"):
        find_toolkit()
    monkeypatch.setenv("CUDA_HOME", str(complete))
    (complete / "lib64" / "libcublas.so").unlink()
    (complete / "include" / "curand.h").unlink()
    with pytest.raises(MossError, match=r"lacks .*libcublas.so.*curand.h: install CUDA Toolkit 12"):
        find_toolkit(advised=12)
    write_nvcc(complete / "bin" / "nvcc", "10.2")
    with pytest.raises(MossError, match=r"is of CUDA 10.2; Jittor 1.3.11 compiles with CUDA 11 to 13"):
        find_toolkit()
    (complete / "bin" / "nvcc").write_text("#!/bin/sh\nexit 1\n")
    with pytest.raises(MossError, match="--version fails"):
        find_toolkit()


def lay_out_13(folder: Path, nvcc: bool = True) -> Path:
    """As pip's wheels of CUDA 13 lie: one folder, libraries with their numbers only."""
    if nvcc:
        write_nvcc(folder / "bin" / "nvcc", "13.0")
    touch(*(folder / "lib" / f"lib{name}.so.{numbers[13]}" for name, numbers in LIBRARIES.items()))
    touch(folder / "lib" / "libcublasLt.so.13", folder / "lib" / "libnvrtc-builtins.so.13.0")
    touch(folder / "lib" / "libcudadevrt.a", folder / "lib" / "libnvblas.so.13")
    touch(*(folder / "include" / name for name in HEADERS), folder / "include" / "crt" / "host_config.h")
    return folder


def test_a_toolkit_of_wheels_alone_is_composed(machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wheels = lay_out_13(machine / "a venv's" / "nvidia" / "cu13")
    monkeypatch.setattr(toolkit, "wheel_folders", lambda: [wheels])
    actual = find_toolkit()
    assert (actual.nvcc, actual.version, actual.scattered) == (wheels / "bin" / "nvcc", (13, 0), True)
    made = composed(actual)
    assert (
        made.home == machine / "home" / ".cache" / "jittor" / "moss-jt-cuda" / "13.0" and not made.scattered
    )
    assert made.compiler_flags == CUDA_13_FLAGS
    for name in LIBRARIES:
        assert (made.home / "lib64" / f"lib{name}.so").resolve().parent == wheels / "lib"
    # What the linker and the loader look for by its number, and what nvcc links with.
    for name in ("libcudart.so.13", "libcublas.so.13", "libcublasLt.so.13", "libcudadevrt.a"):
        assert (made.home / "lib64" / name).exists()
    assert not (made.home / "lib64" / "libnvblas.so.13").exists()
    assert (made.home / "include" / "crt" / "host_config.h").exists()
    assert not made.nvcc.is_symlink(), "Jittor would look beside what it points to"
    done = subprocess.run([made.nvcc, "--version"], capture_output=True, text=True, check=True)
    assert "release 13.0" in done.stdout
    names = [path.name for path in made.to_load()]
    assert names == [
        "libnvrtc-builtins.so.13.0",
        "libnvrtc.so.13",
        "libcublasLt.so.13",
        "libcublas.so.13",
        "libcurand.so.10",
    ]
    with pytest.raises(MossError, match=r"cannot open .*libnvrtc-builtins.so.13.0 .*nvcc_path"):
        made.load()  # of these files none is a library
    # Another start finds it as it is, and what is made of it is itself.
    monkeypatch.setenv("nvcc_path", str(made.nvcc))
    assert composed(find_toolkit()).home == made.home


def test_the_composed_folder_follows_the_wheels(machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("one", "two"):
        wheels = lay_out_13(machine / name / "nvidia" / "cu13")
        monkeypatch.setattr(toolkit, "wheel_folders", lambda wheels=wheels: [wheels])
        before = os.environ.copy()
        made = composed(find_toolkit())
        assert os.environ == before
        assert made.libraries["cublas"].resolve() == wheels / "lib" / "libcublas.so.13"
        assert str(wheels / "bin" / "nvcc") in made.nvcc.read_text()


def test_wheels_complete_what_a_toolkit_lacks(machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As where only the compiler is installed: its own headers and runtime come first."""
    own = machine / "cuda-13.0"
    write_nvcc(own / "bin" / "nvcc", "13.0")
    touch(
        own / "lib64" / "libcudart.so.13", own / "include" / "cuda_runtime.h", own / "include" / "cuda_fp16.h"
    )
    monkeypatch.setenv("CUDA_HOME", str(own))
    wheels = lay_out_13(machine / "nvidia" / "cu13", nvcc=False)
    monkeypatch.setattr(toolkit, "wheel_folders", lambda: [wheels])
    made = composed(find_toolkit())
    assert made.libraries["cudart"].resolve().parent == own / "lib64"
    assert made.libraries["cublas"].resolve().parent == wheels / "lib"
    assert (made.home / "include" / "cuda_runtime.h").resolve().parent == own / "include"
    assert (made.home / "include" / "curand.h").resolve().parent == wheels / "include"


@pytest.mark.parametrize("lacking", [False, True])
def test_behind_a_wrapper_lies_the_toolkit(
    machine: Path, complete: Path, monkeypatch: pytest.MonkeyPatch, lacking: bool
) -> None:
    """Of a wrapper on the PATH nothing else is there; what is missing is missing of the compiler that it runs."""
    real = complete / "bin" / "nvcc"
    real.write_text(f"{real.read_text()}echo '#$ _HERE_={real.parent}' >&2\n")
    wrapper = machine / "bin" / "nvcc"
    wrapper.parent.mkdir()
    wrapper.write_text(f'#!/bin/sh\nexec {real} "$@"\n')
    wrapper.chmod(0o755)
    monkeypatch.setenv("PATH", f"{wrapper.parent}:/usr/bin:/bin")
    if not lacking:
        assert find_toolkit().nvcc == real
    else:
        (complete / "lib64" / "libcurand.so").unlink()
        with pytest.raises(MossError) as told:
            find_toolkit()
        assert f"the CUDA toolkit of {real} lacks" in str(told.value) and "cuda_runtime.h" not in str(
            told.value
        )


def test_wrappers_of_each_other_end(machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, other in (("one", "two"), ("two", "one")):
        path = write_nvcc(machine / name / "nvcc", "13.0")
        path.write_text(f"{path.read_text()}echo '#$ _HERE_={machine / other}' >&2\n")
    monkeypatch.setenv("PATH", f"{machine / 'one'}:/usr/bin:/bin")
    with pytest.raises(MossError, match=r"the CUDA toolkit of .*two/nvcc lacks"):
        find_toolkit()


def test_wheels_of_another_cuda_complete_nothing(machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_nvcc(machine / "cuda" / "bin" / "nvcc", "12.4")
    monkeypatch.setenv("CUDA_HOME", str(machine / "cuda"))
    wheels = lay_out_13(machine / "nvidia" / "cu13", nvcc=False)
    monkeypatch.setattr(toolkit, "wheel_folders", lambda: [wheels])
    with pytest.raises(MossError, match="lacks libcudart.so, libcublas.so, libnvrtc.so"):
        find_toolkit()


def test_the_toolkit_of_cupy_s_series_comes_first(
    machine: Path, complete: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wheels = lay_out_13(machine / "nvidia" / "cu13")
    monkeypatch.setattr(toolkit, "wheel_folders", lambda: [wheels])
    monkeypatch.setenv("CUDA_HOME", str(complete))
    assert [find_toolkit(series).version[0] for series in (None, 12, 13)] == [12, 12, 13]


def test_pip_s_folders_are_found_where_python_imports_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    touch(
        tmp_path / "nvidia" / "cu13" / "bin" / "nvcc", tmp_path / "nvidia" / "cudnn" / "lib" / "libcudnn.so.9"
    )
    spec = toolkit.importlib.util.spec_from_loader("nvidia", None, is_package=True)
    assert spec is not None and spec.submodule_search_locations is not None
    spec.submodule_search_locations.append(str(tmp_path / "nvidia"))
    monkeypatch.setattr(toolkit.importlib.util, "find_spec", lambda name: spec)
    assert toolkit.wheel_folders() == [tmp_path / "nvidia" / "cu13"]
    monkeypatch.setattr(toolkit.importlib.util, "find_spec", lambda name: None)
    assert toolkit.wheel_folders() == []
