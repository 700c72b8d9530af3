"""moss-jt eval through the CPU kernels: what it prints, and what it refuses."""

import json
from pathlib import Path

import pytest

from moss_jt import loading
from moss_jt.backend.threads import compute_threads
from moss_jt.commands.cli import main
from moss_jt.commands.eval import TOKENIZER_BYTES, _read
from moss_jt.kernels.needs import CpuNeeds
from moss_jt.measure import perplexity
from moss_jt.measure.perplexity import workspace_bytes
from moss_jt.plan import placement
from moss_jt.plan.placement import LATER_BYTES
from moss_jt.plan.residency import ResidencyPlan, gib_up, smallest_bytes
from moss_jt.store.model_folder import open_store
from moss_jt.store.sizes import MIB, sizes_of_store
from tests.support.dialogues import dialogues
from tests.support.models import convert_checkpoint, random_checkpoint, tiny_model_folder
from tests.support.random_models import WIDE, random_folder


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
    actual = json.loads(capsys.readouterr().out)
    # Windows of 200, 200 and 101 tokens, of which the first is given.
    assert actual["context"] == 200 and actual["model"]["tokens"] == 498
    assert actual["model"] == actual["against"]
    assert actual["mean_kl_divergence"] == 0 and actual["greedy_agreement"] == 1
    # 199, 199 and 100 tokens in drafts of 4 and one more: 40, 40 and 20 passes.
    assert actual["tokens_per_pass"]["4"] == 498 / 100
    assert list(actual["tokens_per_pass"]) == ["4", "8", "16", "22"]
    assert run_cli(*arguments) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "498 tokens scored, in windows of 200"
    assert f"perplexity {actual['model']['perplexity']:.4f}" in lines[1]
    assert lines[3].split()[:4] == ["mean", "divergence", "0.000000", "nats,"]
    assert lines[4].split()[-2:] == ["100.00", "%"]
    assert "tokens per pass" in lines[5] and " 4: 5.0, 8: " in lines[5]


def test_a_model_against_another(text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A random one: its predictions are far from the trained one's, and its windows are shorter."""
    guess = convert_checkpoint(random_checkpoint(tmp_path / "checkpoint"), tmp_path / "model")
    assert (
        run_cli("eval", tiny_model_folder(), text, "--against", guess, "--max-tokens", "300", "--json") == 0
    )
    actual = json.loads(capsys.readouterr().out)
    assert actual["context"] == 128
    assert actual["model"]["tokens"] == actual["against"]["tokens"] == 297
    assert actual["mean_kl_divergence"] > 1 and actual["greedy_agreement"] < 0.2
    assert 1 <= actual["tokens_per_pass"]["4"] <= actual["tokens_per_pass"]["22"] < 1.5


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


def test_two_models_under_a_limit_that_neither_fits_into(
    text: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The way to judge quantization where the float16 model streams: it was refused, what is resident of the first
    model counted as what the process holds itself, against a second half of the limit."""
    models = [random_folder(WIDE, bits) for bits in (4, 16)]
    sizes = [sizes_of_store(open_store(model)) for model in models]
    here = 200 * MIB
    monkeypatch.setattr(placement, "resident_memory_bytes", lambda: here)
    monkeypatch.setattr(placement, "_held", [])  # nor do models of other tests here
    plans: list[ResidencyPlan] = []
    monkeypatch.setattr(loading, "hold", lambda plan: (plans.append(plan), placement.hold(plan)))

    needed = sum(
        smallest_bytes(one, CpuNeeds(one.config, one.bits), 64, compute_threads()) + TOKENIZER_BYTES
        for one in sizes
    )
    monkeypatch.setattr(perplexity, "MOST_ROWS", 64)  # however much memory there is
    scoring = workspace_bytes(WIDE.vocab_size, 2, 64)
    limit = here + LATER_BYTES + needed + scoring + 60 * MIB
    arguments = ("eval", models[0], text, "--against", models[1], "--context", "64", "--max-tokens", "200")
    assert run_cli(*arguments, "--memory", str(limit), "--json") == 0
    assert json.loads(capsys.readouterr().out)["against"]["tokens"] == 196
    assert plans[1].streams and plans[1].bytes_on("device") > 0
    # The second plan counts all that the first may come to hold, and both stay below the limit.
    assert plans[1].footprint_bytes == plans[0].peak_bytes
    assert plans[1].peak_bytes + scoring <= limit

    assert run_cli(*arguments, "--memory", str(limit - 61 * MIB)) == 1
    lacking = gib_up(MIB)
    assert f"too little for two models at once: {lacking} more is needed" in capsys.readouterr().err
