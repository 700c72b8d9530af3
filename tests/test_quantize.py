"""Quantising: the right bytes from either source, the same bytes after a kill, and refusals that say what to do."""

import errno
import io
import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from moss_jt.commands.cli import main
from moss_jt.convert.calibration_text import calibration_tokens
from moss_jt.convert.checkpoint import open_local
from moss_jt.convert.folder_source import folder_recipe
from moss_jt.convert.pipeline import convert, recipe_for
from moss_jt.convert.quantize import QuantSettings, default_group_size, quantized_recipe
from moss_jt.errors import MossError
from moss_jt.store.architecture import MATRICES
from moss_jt.store.checksums import verify_store
from moss_jt.store.copies import check_copy, copies_of
from moss_jt.store.model_folder import MANIFEST, open_store, read_tensor
from moss_jt.store.quant import quantize_rtn
from tests.support.models import convert_checkpoint, random_checkpoint, stored_matrix, tiny_model_folder

RTN = QuantSettings(4, 32, "rtn")
GPTQ = QuantSettings(4, 32, "gptq", act_order=True)


def quantize(
    source: Path,
    out: Path,
    settings: QuantSettings,
    tokens: int = 300,
    progress: Callable[[int], None] = lambda count: None,
) -> Path:
    """A model folder quantised, GPTQ on the built-in text's first tokens."""
    folder, recipe = folder_recipe(source)
    token_ids = None
    if settings.method == "gptq":
        token_ids = calibration_tokens(folder.tokenizer_text(), None)[:tokens]
    convert(folder, quantized_recipe(recipe, folder.config, settings, out, token_ids), out, progress)
    return out


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model of three blocks as a float16 model folder."""
    where = tmp_path_factory.mktemp("small")
    checkpoint = open_local(random_checkpoint(where / "checkpoint", n_layer=3))
    convert(checkpoint, recipe_for(checkpoint), where / "model")
    return where / "model"


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("settings", [RTN, QuantSettings(8, 64, "rtn")])
def test_rounding_packs_the_matrices_and_leaves_the_rest(
    small: Path, tmp_path: Path, settings: QuantSettings
) -> None:
    before = open_store(small)
    store = open_store(quantize(small, tmp_path / "out", settings))
    assert (store.bits, store.group_size) == (settings.bits, settings.group_size)
    verify_store(store)
    for layer, block in enumerate(store.blocks):
        for name in MATRICES:
            weight = read_tensor(before.blocks[layer], f"{name}.weight")
            want = quantize_rtn(weight, settings.bits, settings.group_size)
            ours = stored_matrix(store, layer, name)
            for part in ("packed", "scales", "zeros"):
                np.testing.assert_array_equal(getattr(ours, part), getattr(want, part))
        for name in ("ln_1.weight", "ln_1.bias", "mlp.fc_in.bias", "mlp.fc_out.bias"):
            np.testing.assert_array_equal(read_tensor(block, name), read_tensor(before.blocks[layer], name))
        sizes = [spec.nbytes for spec in sorted(block.tensors.values(), key=lambda spec: spec.offset)]
        assert sizes == sorted(sizes, reverse=True) and block.data_offset % 4096 == 0
    for name in ("embedding.safetensors", "head.safetensors", "tokenizer.json", "config.json"):
        assert (store.path / name).read_bytes() == (small / name).read_bytes()


@pytest.mark.parametrize("settings", [RTN, GPTQ])
def test_a_checkpoint_and_the_folder_made_of_it_give_the_same(
    tmp_path: Path, settings: QuantSettings
) -> None:
    checkpoint = open_local(random_checkpoint(tmp_path / "checkpoint", shards=3))
    convert(checkpoint, recipe_for(checkpoint), tmp_path / "float16")
    quantize(tmp_path / "float16", tmp_path / "a", settings)
    checkpoint = open_local(tmp_path / "checkpoint")
    token_ids = calibration_tokens(checkpoint.tokenizer_text(), None)[:300] if settings is GPTQ else None
    recipe = quantized_recipe(recipe_for(checkpoint), checkpoint.config, settings, tmp_path / "b", token_ids)
    convert(checkpoint, recipe, tmp_path / "b")
    one, other = contents(tmp_path / "a"), contents(tmp_path / "b")
    assert one.keys() == other.keys()
    assert [name for name in one if one[name] != other[name]] == [MANIFEST]  # it names the source


class Killed(BaseException):
    """Stands for whatever ends a process."""


def test_gptq_goes_on_at_the_block_where_it_was_killed(small: Path, tmp_path: Path) -> None:
    """At every file's beginning and inside one; no hidden states are left behind, and all bytes are the same."""
    complete = contents(quantize(small, tmp_path / "whole", GPTQ))
    assert not [name for name in complete if "calibration" in name or "journal" in name]
    total = sum(len(data) for data in complete.values())
    for share in (0.35, 0.5, 0.6, 0.7):
        seen = 0

        def stop(count: int, limit: float = share * total) -> None:
            nonlocal seen
            seen += count
            if seen > limit:
                raise Killed

        out = tmp_path / f"killed-{share}"
        with pytest.raises(Killed):
            quantize(small, out, GPTQ, progress=stop)
        assert not (out / MANIFEST).exists()
        assert contents(quantize(small, out, GPTQ)) == complete


def saved(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


def stop_in_the_last_block(small: Path, out: Path) -> None:
    """Leaves a folder of which block 2 is not written yet, and the hidden states that enter it."""

    def stop(count: int) -> None:
        if (out / "block-01.safetensors").exists():
            raise Killed

    with pytest.raises(Killed):
        quantize(small, out, GPTQ, progress=stop)
    assert (out / "calibration-02.scratch").exists()


@pytest.mark.parametrize("damage", ["missing", "cut short", "another shape", "a pickle"])
def test_damaged_hidden_states_are_computed_again(small: Path, tmp_path: Path, damage: str) -> None:
    """From the finished blocks, to the same bytes: a lost scratch file must not make a folder a dead end."""
    out = tmp_path / "out"
    stop_in_the_last_block(small, out)
    state = out / "calibration-02.scratch"
    if damage == "missing":
        state.unlink()
    elif damage == "cut short":
        state.write_bytes(state.read_bytes()[:-100])
    elif damage == "another shape":
        state.write_bytes(saved(np.zeros((3, 64), np.float32)))
    else:
        state.write_bytes(saved(np.array([{}], object)))
    assert contents(quantize(small, out, GPTQ)) == contents(quantize(small, tmp_path / "whole", GPTQ))


@pytest.mark.parametrize("settings", [RTN, GPTQ])
def test_a_damaged_block_is_quantised_again_and_only_that(
    small: Path, tmp_path: Path, settings: QuantSettings
) -> None:
    out = quantize(small, tmp_path / "out", settings)
    complete = contents(out)
    times = {path.name: path.stat().st_mtime_ns for path in out.glob("*.safetensors")}
    block = out / "block-01.safetensors"
    data = bytearray(block.read_bytes())
    data[-9] ^= 1
    block.write_bytes(data)
    assert contents(quantize(small, out, settings)) == complete
    for name, time_ns in times.items():
        assert ((out / name).stat().st_mtime_ns == time_ns) == (name != block.name)


def test_damage_in_the_float16_folder_is_not_quantised(small: Path, tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(small, source)
    block = source / "block-01.safetensors"
    data = bytearray(block.read_bytes())
    data[5000] ^= 1
    block.write_bytes(data)
    with pytest.raises(MossError, match="block-01.* is not what was written"):
        quantize(source, tmp_path / "out", RTN)
    assert not (tmp_path / "out" / MANIFEST).exists()


def test_other_settings_start_anew(small: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    stop_in_the_last_block(small, out)
    quantize(small, out, RTN)
    assert contents(out) == contents(quantize(small, tmp_path / "fresh", RTN))
    with pytest.raises(MossError, match="already holds a model made from something else"):
        quantize(small, out, GPTQ)


def test_what_is_quantised_already_is_refused(small: Path, tmp_path: Path) -> None:
    out = quantize(small, tmp_path / "out", RTN)
    with pytest.raises(MossError, match="is quantised already, to int4. Quantize the float16 model"):
        quantize(out, tmp_path / "again", RTN)


def test_group_sizes(small: Path, tmp_path: Path) -> None:
    with pytest.raises(MossError, match="Sizes that work: 32, 64"):
        quantize(small, tmp_path / "out", QuantSettings(4, 128, "rtn"))
    assert default_group_size(open_store(small).config) == 64
    assert default_group_size(open_store(tiny_model_folder()).config) == 96


def special_id(tokenizer: str, token: str) -> int:
    return next(
        int(entry["id"]) for entry in json.loads(tokenizer)["added_tokens"] if entry["content"] == token
    )


def test_calibration_texts(tmp_path: Path) -> None:
    tokenizer = (tiny_model_folder() / "tokenizer.json").read_text(encoding="utf-8")
    built_in = calibration_tokens(tokenizer, None)
    assert len(built_in) > 3000
    text = tmp_path / "text.txt"
    text.write_text("Hello<eoh>\n" * 200, encoding="utf-8")
    tokens = list(calibration_tokens(tokenizer, text))
    assert tokens.count(special_id(tokenizer, "<eoh>")) == 200
    text.write_bytes(b"\xef\xbb\xbf" + text.read_bytes())
    assert list(calibration_tokens(tokenizer, text)) == tokens, "a byte order mark is no text"
    text.write_text("Hello", encoding="utf-8")
    with pytest.raises(MossError, match="GPTQ needs 256 or more"):
        calibration_tokens(tokenizer, text)
    text.write_bytes(b"\xff\xfe\x00" * 500)
    with pytest.raises(MossError, match="cannot be read as a UTF-8 text"):
        calibration_tokens(tokenizer, text)


def run_cli(*arguments: str) -> int:
    with pytest.raises(SystemExit) as ended:
        main(list(arguments))
    return int(ended.value.code or 0)


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MOSS_JT_HOME", str(tmp_path / "home"))
    return tmp_path / "home" / "models"


def test_the_command_quantizes_checkpoints_and_folders(
    home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_cli("convert", "moss-tiny", "--bits", "8") == 0
    assert run_cli("convert", "moss-tiny") == 0
    assert run_cli("convert", "moss-tiny", "--bits", "4", "--act-order") == 0
    assert (
        run_cli(
            "convert",
            str(home / "moss-tiny"),
            "--bits",
            "4",
            "--method",
            "rtn",
            "--group-size",
            "64",
            "--out",
            str(home / "rtn"),
        )
        == 0
    )
    assert "moss-tiny-int8 is ready" in capsys.readouterr().out
    settings = {
        path.name: json.loads((path / MANIFEST).read_text())["identity"].get("quantized")
        for path in home.iterdir()
    }
    assert settings["moss-tiny"] is None
    assert settings["moss-tiny-int8"] == {"bits": 8, "group_size": 96, "method": "rtn", "act_order": False}
    assert settings["moss-tiny-int4"]["method"] == "gptq" and settings["moss-tiny-int4"]["act_order"]
    assert settings["rtn"] == {"bits": 4, "group_size": 64, "method": "rtn", "act_order": False}
    assert run_cli("convert", "moss-tiny", "--bits", "4", "--act-order") == 0
    assert "was converted already" in capsys.readouterr().out


def test_several_bits_come_from_one_reading_and_share_what_they_have_alike(
    home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The disk holds head and embedding once, and the copy is known as one."""
    assert run_cli("convert", "moss-tiny", "--bits", "16,4", "--method", "rtn") == 0
    assert "moss-jt chat moss-tiny\n" in capsys.readouterr().out
    dense, copy = home / "moss-tiny", home / "moss-tiny-int4"
    for name in ("embedding.safetensors", "head.safetensors"):
        assert (dense / name).samefile(copy / name)
    assert not (dense / "block-00.safetensors").samefile(copy / "block-00.safetensors")
    assert copies_of(open_store(dense)) == [copy]
    for folder in (dense, copy):
        verify_store(open_store(folder))
        assert not [path.name for path in folder.iterdir() if path.suffix not in (".json", ".safetensors")]
    assert run_cli("convert", str(dense), "--bits", "4,16,8", "--method", "rtn") == 0
    assert copies_of(open_store(dense)) == [copy, home / "moss-tiny-int8"]
    assert copies_of(open_store(home / "moss-tiny-int8")) == [copy]
    assert copies_of(open_store(copy)) == []
    assert run_cli("convert", "moss-tiny", "--bits", "8,4") == 1
    assert "needs the float16 model, too: --bits 16,4" in capsys.readouterr().err
    assert run_cli("convert", "moss-tiny", "--bits", "4,4") == 2
    assert run_cli("convert", str(dense), "--bits", "16,4", "--out", str(home / "other")) == 1


def test_a_shared_file_is_written_where_the_disk_cannot_share_it(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*paths: object) -> None:
        raise OSError(errno.EPERM, "not here")

    monkeypatch.setattr(os, "link", refuse)
    quantize(small, tmp_path / "out", RTN)
    assert not (small / "head.safetensors").samefile(tmp_path / "out" / "head.safetensors")
    verify_store(open_store(tmp_path / "out"))
    assert copies_of(open_store(small)) == [], "it lies elsewhere"
    check_copy(open_store(small), open_store(tmp_path / "out"))


def test_a_damaged_shared_file_is_not_vouched_for(small: Path, tmp_path: Path) -> None:
    damaged = Path(shutil.copytree(small, tmp_path / "damaged"))
    data = bytearray((damaged / "head.safetensors").read_bytes())
    data[-40] ^= 1
    (damaged / "head.safetensors").write_bytes(data)
    with pytest.raises(MossError, match="is not what was converted"):
        quantize(damaged, tmp_path / "out", RTN)
    assert not (tmp_path / "out" / "head.safetensors").exists()


def test_another_models_folder_is_no_copy(small: Path, tmp_path: Path) -> None:
    """It is refused by name, and so is one that has no fewer bits."""
    store = open_store(small)
    convert_checkpoint(random_checkpoint(tmp_path / "checkpoint", 7, n_layer=3), tmp_path / "other")
    quantize(tmp_path / "other", tmp_path / "copy", RTN)
    with pytest.raises(MossError, match=r"copy was not made from the same checkpoint as .*: .* differs\."):
        check_copy(store, open_store(tmp_path / "copy"))
    with pytest.raises(MossError, match="has 16 bits, and .* has 4: a model that drafts has fewer"):
        check_copy(open_store(tmp_path / "copy"), open_store(tmp_path / "other"))


def test_the_command_leaves_signal_handlers_as_they_were(home: Path) -> None:
    """It once left its own for SIGTERM: Jittor's compilers, forked later, ignored it, and tests never ended."""
    before = signal.getsignal(signal.SIGTERM)
    assert run_cli("convert", "moss-tiny", "--bits", "8") == 0
    assert signal.getsignal(signal.SIGTERM) is before
    assert run_cli("convert", "moss-tiny", "--bits", "4", "--group-size", "5") == 1
    assert signal.getsignal(signal.SIGTERM) is before


def test_the_command_refuses_what_makes_no_sense(
    home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_cli("convert", "moss-tiny", "--group-size", "32") == 2
    assert run_cli("convert", "moss-tiny", "--bits", "8", "--act-order") == 2
    assert run_cli("convert", "moss-tiny", "--bits", "5") == 2
    capsys.readouterr()
    assert run_cli("convert", "moss-tiny", "--bits", "4", "--group-size", "128") == 1
    assert "Sizes that work: 32, 64, 96, 192." in capsys.readouterr().err
    assert not home.exists()
    assert run_cli("convert", "moss-tiny", "--bits", "8") == 0
    assert run_cli("convert", str(home / "moss-tiny-int8"), "--bits", "4") == 1
    assert "is quantised already, to int8" in capsys.readouterr().err
    assert run_cli("convert", str(home / "moss-tiny-int8")) == 1
    assert "is a model folder already" in capsys.readouterr().err
