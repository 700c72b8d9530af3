"""What Python users import and print."""

import inspect
import subprocess
import sys
from pathlib import Path

import pytest

import moss_jt
from moss_jt.chat.chat import Chat
from moss_jt.engine.sampling import SamplingParams
from moss_jt.moss import Moss
from tests.support.models import tiny_model_folder


def test_every_public_name_is_there_and_importing_them_starts_nothing() -> None:
    code = (
        "import sys, moss_jt; shown = [getattr(moss_jt, name) for name in moss_jt.__all__]; "
        "print(len(shown), sorted({name for name in sys.modules if name.split('.')[0] == 'jittor'}))"
    )
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == f"{len(moss_jt.__all__)} []\n"
    assert set(moss_jt.__all__) == set(dir(moss_jt))


def test_a_chats_options_are_the_same_everywhere() -> None:
    """moss.chat says what it takes, beside the adapter that makes the model another; and each default stands in one place."""
    ours, theirs = inspect.signature(Moss.chat), inspect.signature(Chat.__init__)
    expected = [parameter for name, parameter in theirs.parameters.items() if name not in ("self", "moss")]
    assert [
        parameter for name, parameter in ours.parameters.items() if name not in ("self", "adapter")
    ] == expected
    for function in (Moss.chat, Moss.generate):
        parameters = inspect.signature(function).parameters
        for name in ("temperature", "top_k", "top_p"):
            assert parameters[name].default == getattr(SamplingParams, name)


def test_a_model_and_its_plan_are_worth_printing() -> None:
    with Moss.load(tiny_model_folder(), memory="2GiB", context=256) as moss:
        assert str(moss.plan).startswith("float16, 4 blocks, 256 tokens; weights: 4.2 MiB in RAM; at most ")
        assert str(moss.plan).endswith(" of 2.00 GiB RAM") and repr(moss) == f"<Moss moss-tiny: {moss.plan}>"


def test_the_small_model_needs_no_converting_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOSS_JT_HOME", str(tmp_path))
    with Moss.load("moss-tiny", context=64) as moss:
        assert moss.name == "moss-tiny" and (tmp_path / "models" / "moss-tiny").is_dir()
