"""Jittor's first compilation in units: Jittor's own check finds every file compiled, and everything is linked once."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from moss_jt.backend import build
from moss_jt.backend.joint_compilation import Command, split

SOURCES = {
    "first.cc": '#include "shared.h"\nstatic int helper() { return 1; }\nint first() { return helper(); }\n',
    "second.cc": '#include "shared.h"\n#define add(a, b) ((a) + (b))\nint second() { return add(1, 1); }\n',
    "third.cc": '#include "shared.h"\nstatic int helper() { return 3; }\nint add(int);\nint third() { return helper(); }\n',
    "switched.cc": "#ifdef JT_EXAMPLE\nint switched() { return 5; }\n#else\nint switched() { return 4; }\n#endif\n",
    "clash.cc": "struct Same { int a; };\nint clash() { return Same{5}.a; }\n",
    "again.cc": "struct Same { double b; };\nint again() { return (int)Same{6}.b; }\n",
    "gen/given.cc": "int given() { return 7; }\n",
}

PROGRAM = """
import ctypes, json, subprocess, sys
from pathlib import Path
import jittor_utils
from moss_jt.backend import joint_compilation
jittor_utils.try_import_jit_utils_core()
folder = Path(sys.argv[1])
cache = folder / "cache"
def command(name):
    source = cache / name if name.startswith("gen/") else folder / "src" / name
    target = cache / "obj_files" / f"{source.name}.o"
    return f'"g++" "{source}" -fPIC -O2   -c -o "{target}"'
texts = [command(name) for name in json.loads(sys.argv[2])]
def compile_all():
    joint_compilation.compile_units(jittor_utils, texts, cache, folder)
def stamps():
    return {str(path): path.stat().st_mtime_ns for path in sorted((cache / "obj_files").iterdir())}
compile_all()
objects = [text.rsplit('"', 2)[1] for text in texts]
subprocess.run(["g++", "-shared", "-o", str(folder / "all.so"), *objects], check=True)
library = ctypes.CDLL(str(folder / "all.so"))
before = stamps()
compile_all()
done = {
    "values": [getattr(library, f"_Z{len(name)}{name}v")() for name in sys.argv[3].split()],
    "empty": [Path(path).name for path in objects if subprocess.run(
        ["nm", path], capture_output=True, text=True, check=True).stdout == ""],
    "compiled again": [text for text in texts if jittor_utils.cc.cache_compile(text, str(cache), str(folder))],
    "same": before == stamps(),
    "left": sorted(path.name for path in cache.iterdir()),
}
print(json.dumps(done))
"""

CUDA_PROGRAM = """
import json, sys
import jittor_utils
from moss_jt.backend import joint_compilation
jittor_utils.try_import_jit_utils_core()
joint_compilation.install(jittor_utils)
jittor_utils.run_cmds(json.loads(sys.argv[2]), sys.argv[1] + "/cache", sys.argv[1])
"""


@pytest.fixture
def sources(tmp_path: Path) -> Path:
    for folder in ("src", "cache/gen", "cache/obj_files", "cache/tmp"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "src" / "shared.h").write_text("#pragma once\nint shared();\n")
    for name, text in SOURCES.items():
        (tmp_path / ("cache" if name.startswith("gen/") else "src") / name).write_text(text)
    return tmp_path


def compiled(folder: Path, **environment: str) -> dict[str, object]:
    names = " ".join(Path(name).stem for name in SOURCES)
    command = [sys.executable, "-P", "-c", PROGRAM, str(folder), json.dumps(list(SOURCES)), names]
    build.build_folder()  # sets cache_name, with which the compiling tool is found
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **environment})
    assert done.returncode == 0, done.stderr
    result: dict[str, object] = json.loads(done.stdout)
    return result


def test_units_are_what_jittor_would_have_compiled(sources: Path) -> None:
    """``clash`` and ``again`` do not compile as one, and are compiled by themselves then."""
    from moss_jt.backend.jittor import jt

    assert jt.compiler.cache_path  # Jittor is compiled
    assert compiled(sources) == {
        "values": [1, 2, 3, 4, 5, 6, 7],
        "empty": ["second.cc.o"],
        "compiled again": [],
        "same": True,
        "left": ["gen", "obj_files", "tmp"],
    }


def test_with_cuda_its_compiler_gets_kernels_alone(sources: Path) -> None:
    """Jittor's folder for CUDA is one below that of its tool, where nothing else has made a place for scratch."""
    build.build_folder()
    (sources / "cache" / "tmp").rmdir()
    (sources / "src" / "kernel.cu").write_text("int kernel() { return 8; }\n")
    nvcc = sources / "nvcc"
    nvcc.write_text(f'#!/bin/sh\necho "$1" >> {sources}/asked\nexec g++ -x c++ "$1" -c -o "$5"\n')
    nvcc.chmod(0o755)
    names = {"first.cc": "g++", "kernel.cu": str(nvcc), "second.cc": "g++"}
    texts = [
        f'"{compiler}" "{sources}/src/{name}" -O2 -c -o "{sources}/cache/obj_files/{name}.o"'
        for name, compiler in names.items()
    ]
    command = [sys.executable, "-P", "-c", CUDA_PROGRAM, str(sources), json.dumps(texts)]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "nvcc_path": str(nvcc)})
    assert done.returncode == 0, done.stderr
    symbols = {
        name: subprocess.run(
            ["nm", sources / "cache" / "obj_files" / f"{name}.o"], capture_output=True, text=True, check=True
        ).stdout.split()[2::3]
        for name in names
    }
    assert symbols == {"first.cc": ["_Z5firstv", "_Z6secondv"], "kernel.cu": ["_Z6kernelv"], "second.cc": []}
    assert (sources / "asked").read_text() == f"{sources}/src/kernel.cu\n"


def test_a_switch_of_the_environment_is_obeyed(sources: Path) -> None:
    result = compiled(sources, JT_EXAMPLE="1")
    assert result["values"] == [1, 2, 3, 5, 5, 6, 7] and result["compiled again"] == []


def test_a_unit_ends_where_names_meet_and_where_files_are_of_another_kind(sources: Path) -> None:
    def command(name: str) -> Command:
        path = sources / ("cache" if name.startswith("gen/") else "src") / name
        target = sources / "cache" / "obj_files" / f"{path.name}.o"
        return Command("", "g++", path, " -O2", target, f"command\n# {path}: 1\n".encode())

    units = [[member.source.stem for member in unit] for unit in split([command(name) for name in SOURCES])]
    assert units == [["first", "second"], ["third"], ["switched"], ["clash", "again"], ["given"]]
