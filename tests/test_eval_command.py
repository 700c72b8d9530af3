"""moss-jt eval through the CPU kernels: what it prints, and what it refuses."""

import json
from pathlib import Path

import pytest

from moss_jt.commands.cli import main
from moss_jt.commands.eval import _read
from tests.support.dialogues import dialogues
from tests.support.models import convert_checkpoint, random_checkpoint, tiny_model_folder


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "dialogues.txt"
    path.write_text(dialogues(5, 2), encoding="utf-8")
    return path


def run_cli(*arguments: str | Path) -> int:
    with pytest.raises(SystemExit) as ended:
        main([str(argument) for argument in arguments])
    return int(ended.value.code or 0)


def test_a_model_against_itself(text: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = tiny_model_folder()
    arguments = ("eval", model, text, "--against", model, "--context", "200", "--max-tokens", "501")
    assert run_cli(*arguments, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    # Windows of 200, 200 and 101 tokens, of which the first is given.
    assert found["context"] == 200 and found["model"]["tokens"] == 498
    assert found["model"] == found["against"]
    assert found["mean_kl_divergence"] == 0 and found["greedy_agreement"] == 1
    assert run_cli(*arguments) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "498 tokens scored, in windows of 200"
    assert f"perplexity {found['model']['perplexity']:.4f}" in lines[1]
    assert lines[3].split()[:4] == ["mean", "divergence", "0.000000", "nats,"]
    assert lines[4].split()[-2:] == ["100.00", "%"]


def test_a_model_against_another(text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A random one: its predictions are far from the trained one's, and its windows are shorter."""
    guess = convert_checkpoint(random_checkpoint(tmp_path / "checkpoint"), tmp_path / "model")
    assert (
        run_cli("eval", tiny_model_folder(), text, "--against", guess, "--max-tokens", "300", "--json") == 0
    )
    found = json.loads(capsys.readouterr().out)
    assert found["context"] == 128
    assert found["model"]["tokens"] == found["against"]["tokens"] == 297
    assert found["mean_kl_divergence"] > 1 and found["greedy_agreement"] < 0.2


def test_a_byte_order_mark_is_no_text(tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_text("\ufeff你好\ufeff", encoding="utf-8")
    assert _read(path, None) == "你好\ufeff"


def test_what_cannot_be_evaluated_is_refused(
    text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = tiny_model_folder()
    assert run_cli("eval", model, text, "--context", "5000") == 1
    assert "--context 5000 is not possible" in capsys.readouterr().err
    assert run_cli("eval", model, text, "--max-tokens", "1") == 1
    assert "1 tokens in windows" in capsys.readouterr().err
    assert run_cli("eval", model, tmp_path / "missing.txt") == 2
    broken = tmp_path / "broken.txt"
    broken.write_bytes(b"\xff\xfe\xfd")
    assert run_cli("eval", model, broken) == 1
    assert "cannot be read as a UTF-8 text" in capsys.readouterr().err
