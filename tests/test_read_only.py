"""Jittor compiled in a cache that cannot be written, which a mount shows: root may write against all permissions."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from moss_jt.backend.home import cache_folder
from moss_jt.backend.read_only import is_writable

# Mounted for one process and its children. Without root, a user namespace may allow it.
MOUNT = 'mount --bind "$0" "$0" && mount -o remount,ro,bind "$0" && exec "$@"'
UNSHARE = (["unshare", "-m"], ["unshare", "-r", "-m"])

PROGRAM = """
import json, os, sys
from pathlib import Path
from moss_jt.backend.jittor import jt
from moss_jt.backend.home import log_path
def computed(value):
    source = f"@out(0) = {value};"
    return jt.code([1], "int32", [jt.zeros((1,), "int32")], cpu_header="", cpu_src=source)[0].item()
values = [computed(41), computed(sys.argv[1])]
jit = Path(jt.flags.cache_path, "jit")
own = [path for path in jit.glob("*.so") if not path.is_symlink()]
print(json.dumps({
    "values": values, "compiled": len(own), "cache": str(jt.compiler.cache_path), "aside": str(jt.flags.cache_path),
    "log": str(log_path("import")), "writable": os.access(jt.compiler.cache_path, os.W_OK),
}))
"""


def read_only(folder: Path, *command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    for unshare in UNSHARE:
        mounted = [*unshare, "sh", "-c", MOUNT, str(folder)]
        try:
            tried = subprocess.run([*mounted, "true"], capture_output=True)
        except FileNotFoundError:
            pytest.skip("unshare is not installed")
        if tried.returncode == 0:
            return subprocess.run(
                [*mounted, *command], capture_output=True, text=True, env={**os.environ, **environment}
            )
    pytest.skip("nothing can be mounted here, not even in a namespace of its own")


def test_operators_run_and_compile_with_a_cache_that_cannot_be_written(tmp_path: Path) -> None:
    """What is compiled is taken from there, what is not is compiled aside, and nothing is left when the process ends."""
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    command = [sys.executable, "-P", "-c", PROGRAM]
    subprocess.run([*command, "41"], check=True, capture_output=True)  # compiles the first operator
    fresh = str(os.getpid() + 1_000_000)
    done = read_only(cache_folder(), *command, fresh, TMPDIR=str(temporary))
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["values"] == [41, int(fresh)] and not result["writable"]
    assert result["compiled"] == 1
    assert result["cache"].startswith(str(cache_folder()))
    assert all(result[name].startswith(str(temporary)) for name in ("aside", "log"))
    assert list(temporary.iterdir()) == []


@pytest.mark.parametrize("onednn", ["1", "0"])
def test_nothing_compiled_in_a_cache_that_cannot_be_written_is_one_line(tmp_path: Path, onednn: str) -> None:
    """Without oneDNN nothing is linked, and Jittor is the first who wants to write."""
    home = tmp_path / "home"
    (home / ".cache" / "jittor").mkdir(parents=True)
    command = [sys.executable, "-P", "-m", "moss_jt", "generate", "moss-tiny", "--prompt", "a"]
    environment = {"JITTOR_HOME": str(home), "MOSS_JT_HOME": str(tmp_path / "models"), "use_mkl": onednn}
    done = read_only(home, *command, **environment)
    assert done.returncode == 1
    assert len(done.stderr.splitlines()) == 1 and "set JITTOR_HOME" in done.stderr


def test_a_folder_that_can_be_written_is_used_itself(tmp_path: Path) -> None:
    from moss_jt.backend.jittor import jt

    assert is_writable(tmp_path)
    assert jt.flags.cache_path == jt.compiler.cache_path
