"""Jittor tamed: found or built in the right place, quiet, with clear words when something is missing."""

import ctypes
import json
import os
import signal
import subprocess
import sys
import sysconfig
import threading
from pathlib import Path

import pytest

from moss_jt.backend import build as jittor_build
from moss_jt.backend import home as jittor_home
from moss_jt.backend.kept_signals import keep_signals
from moss_jt.errors import MossError
from moss_jt.plugins.folder_search import cache_folder as search_index_folder
from moss_jt.store.locations import model_home
from moss_jt.terminal.line_input import history_path
from tests.support.models import tiny_model_folder


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty home directory, without JITTOR_HOME."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("JITTOR_HOME", raising=False)
    return tmp_path


@pytest.mark.parametrize(
    "code",
    [
        "import moss_jt.commands.cli",
        "from moss_jt.commands.cli import main\ntry: main(['--help'])\nexcept SystemExit as stop: assert not stop.code",
    ],
)
def test_the_command_line_starts_without_jittor(code: str) -> None:
    check = "; import sys; heavy = {'jittor', 'jittor_utils', 'numpy'} & set(sys.modules); assert not heavy, heavy"
    command = [sys.executable, "-P", "-c", f"{code}\nNone{check}"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_jittors_home_follows_jittors_own_rule(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert jittor_home.jittor_home() == home
    note = home / ".cache" / "jittor" / "config.json"
    note.parent.mkdir(parents=True)
    note.write_text(json.dumps({"JITTOR_HOME": str(home / "remembered")}))
    assert jittor_home.jittor_home() == home / "remembered"
    monkeypatch.setenv("JITTOR_HOME", str(home / "given"))
    assert jittor_home.jittor_home() == home / "given"


@pytest.mark.parametrize("text", ["{", "[]", "null"])
def test_a_damaged_note_of_jittors_home_is_named(home: Path, text: str) -> None:
    note = home / ".cache" / "jittor" / "config.json"
    note.parent.mkdir(parents=True)
    note.write_text(text)
    with pytest.raises(MossError, match=r"config.json is damaged.*Remove it"):
        jittor_home.jittor_home()


def test_onednn_is_linked_where_jittor_looks_and_a_stale_link_is_renewed(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wheels = {}
    for part, (wheel, needed) in jittor_home.ONEDNN_WHEELS.items():
        folder = home / "site" / part
        folder.mkdir(parents=True)
        (folder / needed).touch()
        wheels[wheel] = folder
    monkeypatch.setattr(jittor_home, "wheel_folder", lambda wheel, needed: wheels[wheel])
    stale = jittor_home.onednn_folder() / "lib"
    stale.parent.mkdir(parents=True)
    stale.symlink_to(home / "an environment that was removed")
    assert not jittor_home.onednn_is_linked()
    jittor_home.link_onednn()
    assert jittor_home.onednn_is_linked()
    names = sorted(path.name for path in jittor_home.onednn_folder().iterdir())
    assert names == ["include", "lib"]


def test_a_missing_onednn_says_what_to_install(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wheels = {"include": ("no-such-wheel-of-moss-jt", "dnnl.h")}
    monkeypatch.setattr(jittor_home, "ONEDNN_WHEELS", wheels)
    with pytest.raises(MossError, match=r"pip install no-such-wheel-of-moss-jt==2021\.4\.0"):
        jittor_home.link_onednn()


def test_the_installed_onednn_is_found_through_its_own_list_of_files() -> None:
    if not jittor_home.has_onednn_wheels():
        pytest.skip("oneDNN has wheels for Linux on x86-64 only")
    for wheel, needed in jittor_home.ONEDNN_WHEELS.values():
        assert (jittor_home.wheel_folder(wheel, needed) / needed).exists()


def test_a_missing_compiler_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("cc_path", raising=False)
    with pytest.raises(MossError, match=r"g\+\+ is missing.*apt install g\+\+"):
        jittor_build.check_compiler()


def test_missing_python_headers_say_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jittor_build, "python_config", lambda: None)
    monkeypatch.setenv("cc_path", sys.executable)
    with pytest.raises(MossError, match=r"python3\.\d+-config is missing.*-dev"):
        jittor_build.check_compiler()


def test_jittor_keeps_to_its_home_and_remembers_none(home: Path) -> None:
    """It noted a JITTOR_HOME for all later runs of the user, which then compiled it anew elsewhere."""
    code = """
import os, subprocess, sys
from moss_jt.backend.build import build_folder
from moss_jt.backend.home import home_kept
print(build_folder())
with home_kept():  # the operators' compilers
    subprocess.run([sys.executable, "-P", "-c", "import jittor_utils; print(jittor_utils.cache_path)"], check=True)
assert os.environ["HOME"] == sys.argv[1] and os.environ["JITTOR_HOME"] == sys.argv[2]
assert "DISABLE_MULTIPROCESSING" not in os.environ and "use_parallel_op_compiler" not in os.environ
"""
    given = home / "given"
    command = [sys.executable, "-P", "-c", code, str(home), str(given)]
    environment = {**os.environ, "HOME": str(home), "JITTOR_HOME": str(given), "log_silent": "1"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    assert all(line.startswith(f"{given}/.cache/jittor/") for line in done.stdout.splitlines())
    assert len(done.stdout.splitlines()) == 2
    assert not (home / ".cache").exists()
    assert jittor_home.jittor_home() == home


@pytest.mark.parametrize("home", ["/dev/null/x", "/proc/none"])
def test_a_home_that_cannot_be_made_is_one_line(home: str, tmp_path: Path) -> None:
    command = [sys.executable, "-P", "-m", "moss_jt", "generate", str(tiny_model_folder()), "--prompt", "a"]
    environment = {name: value for name, value in os.environ.items() if name != "JITTOR_HOME"}
    environment |= {"HOME": home, "MOSS_JT_HOME": str(tmp_path)}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 1
    assert done.stderr.startswith(f"moss-jt: error: cannot write to {home}/.cache/jittor")
    assert len(done.stderr.splitlines()) == 1 and "set JITTOR_HOME" in done.stderr


def test_a_user_without_a_home_reads_what_to_set(monkeypatch: pytest.MonkeyPatch) -> None:
    def nobody(uid: int) -> None:
        raise KeyError(uid)

    for name in ("HOME", "JITTOR_HOME", "MOSS_JT_HOME", "XDG_DATA_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("pwd.getpwuid", nobody)
    for asked in (jittor_home.jittor_home, model_home, search_index_folder, lambda: history_path({})):
        with pytest.raises(MossError, match="no home folder: set HOME"):
            asked()
    monkeypatch.setenv("MOSS_JT_HOME", "~no-such-user/models")
    with pytest.raises(MossError, match="MOSS_JT_HOME is ~no-such-user/models"):
        model_home()


class Build:
    """A first start in a folder of its own, where a script stands in for Jittor."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder = folder / "build"
        (self.folder / "obj_files").mkdir(parents=True)
        monkeypatch.setenv("JITTOR_HOME", str(folder))
        jittor_home.cache_folder().mkdir(parents=True)
        monkeypatch.setattr(jittor_build, "build_folder", lambda: self.folder)
        monkeypatch.setattr(jittor_build, "PATIENCE_S", 0.0)
        self._monkeypatch = monkeypatch

    def run(self, script: str) -> None:
        self._monkeypatch.setattr(jittor_build, "SCRIPT", f"import pathlib, sys\n{script}")
        jittor_build.ensure_built(("cupy",))


@pytest.fixture
def build(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Build:
    return Build(tmp_path, monkeypatch)


MARK = "pathlib.Path(sys.argv[1]).touch()"


def test_the_first_start_is_announced_and_its_output_goes_to_the_log(
    build: Build, capfd: pytest.CaptureFixture[str]
) -> None:
    build.run(f"print('compiler noise'); {MARK}")
    out, err = capfd.readouterr()
    assert out == ""
    assert "Jittor compiles itself" in err and "1 to 3 minutes" in err and "noise" not in err
    assert "compiler noise" in jittor_home.log_path("build").read_text()
    assert jittor_build.marker(build.folder).exists()


def test_jittor_is_started_again_when_it_asks_for_that(build: Build) -> None:
    once = "once = pathlib.Path(sys.argv[1]).with_name('once')"
    build.run(f"{once}\nif once.exists(): {MARK}\nelse: once.touch()")
    assert jittor_build.marker(build.folder).exists()


def test_what_goes_wrong_in_units_is_compiled_file_by_file_from_the_start(build: Build) -> None:
    left = build.folder / "obj_files" / "unit.o"
    left.touch()
    build.run(
        f"if sys.argv[2] == 'units': sys.exit(1)\nassert not pathlib.Path({str(left)!r}).exists()\n{MARK}"
    )
    assert jittor_build.marker(build.folder).exists()


def test_first_starts_wait_for_each_other(build: Build, capfd: pytest.CaptureFixture[str]) -> None:
    """The second finds what the first has compiled, and compiles nothing."""
    calls = build.folder / "calls"
    script = f"with open({str(calls)!r}, 'a') as file: file.write('x')\nimport time; time.sleep(0.5)\n"
    script += "pathlib.Path(sys.argv[1]).write_text('core')"
    core = build.folder / "core" / f"jittor_core{sysconfig.get_config_var('EXT_SUFFIX')}"
    core.parent.mkdir()
    core.touch()
    starts = [threading.Thread(target=build.run, args=(script,)) for _ in range(3)]
    for start in starts:
        start.start()
    for start in starts:
        start.join()
    assert calls.read_text() == "x"
    assert capfd.readouterr().err.count("another start is compiling Jittor") == 2


def test_a_failed_compilation_names_its_log(build: Build) -> None:
    with pytest.raises(MossError, match=r"could not be compiled: fatal: no space left\n.*moss-jt-build.log"):
        build.run("print('fatal: no space left', file=sys.stderr); sys.exit(1)")
    assert not jittor_build.marker(build.folder).exists()


def test_an_import_that_never_gets_through_is_no_success(build: Build) -> None:
    with pytest.raises(MossError, match="it said nothing"):
        build.run("")


def test_signal_handlers_outlive_a_library_that_replaces_them() -> None:
    libc = ctypes.CDLL(None)
    with keep_signals():
        libc.signal(signal.SIGINT, ctypes.c_void_p(1))  # ignored from here on
        os.kill(os.getpid(), signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGINT)


def test_ctrl_c_stays_pythons_after_jittor_has_come() -> None:
    from moss_jt.backend.jittor import jt

    assert float(jt.ones((2,)).sum().item()) == 2
    with pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGINT)


def test_jittors_words_go_to_a_log_and_not_to_the_terminal(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """A source that does not compile makes Jittor write the compiler's whole output to stderr."""
    from moss_jt.backend.jittor import jt

    assert jt.flags.log_file == str(jittor_home.log_path("operators"))
    jt.flags.log_file = str(tmp_path / "log")  # the usual one belongs to every process of this user
    try:
        broken = jt.code([(2, 2)], ["float32"], [jt.zeros((2, 2))], cpu_src="this_is_no_name = 1;")[0]
        with pytest.raises(RuntimeError):
            broken.sync()
    finally:
        jt.flags.log_file = str(jittor_home.log_path("operators"))
    assert capfd.readouterr() == ("", "")
    assert "this_is_no_name" in (tmp_path / "log").read_text(errors="replace")
