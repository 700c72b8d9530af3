"""A damaged model folder: verify says what is wrong with it, and the command that made it makes that anew, nothing else."""

import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moss_jt.commands.cli import main
from moss_jt.convert.checkpoint import open_local
from moss_jt.convert.pipeline import convert, recipe_for
from moss_jt.errors import MossError
from moss_jt.store.checksums import verify_store
from moss_jt.store.config import LARGEST, MossConfig
from moss_jt.store.manifest import sealed
from moss_jt.store.model_folder import MANIFEST, open_store
from tests.support.models import convert_checkpoint, random_checkpoint, small_config

BLOCK = "block-01.safetensors"
Damage = Callable[[Path], object]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return random_checkpoint(tmp_path_factory.mktemp("repair") / "source", n_layer=3)


@pytest.fixture(scope="module")
def complete(source: Path) -> Path:
    return convert_checkpoint(source, source.parent / "whole")


@pytest.fixture
def folder(complete: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(complete, tmp_path / "model"))


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def change_json(name: str, change: Callable[[dict[str, Any]], object]) -> Damage:
    def damage(folder: Path) -> None:
        fields = json.loads((folder / name).read_text())
        change(fields)
        (folder / name).write_text(json.dumps(fields))

    return damage


def flip(name: str, at: int) -> Damage:
    def damage(folder: Path) -> None:
        data = bytearray((folder / name).read_bytes())
        data[at] ^= 1
        (folder / name).write_bytes(data)

    return damage


def swap_shapes(folder: Path) -> None:
    """Two tensors of one size change names in the header: every number is still there, in the wrong place."""
    path = folder / BLOCK
    data = path.read_bytes()
    one, two = b"transformer.h.1.ln_1.weight", b"transformer.h.1.ln_1.bias"
    text = data[:4096].replace(one, b"?").replace(two, one).replace(b"?", two)
    path.write_bytes(text + data[4096:])


DAMAGES: dict[str, tuple[Damage, set[str]]] = {
    "a flipped bit of a tensor": (flip(BLOCK, 9000), {BLOCK}),
    "a flipped bit of a header": (flip(BLOCK, 4090), {BLOCK}),
    "two names in a header": (swap_shapes, {BLOCK}),
    "a file cut short": (lambda folder: os.truncate(folder / BLOCK, 7000), {BLOCK}),
    "a file of nothing": (lambda folder: os.truncate(folder / BLOCK, 0), {BLOCK}),
    "a missing file": (lambda folder: (folder / BLOCK).unlink(), {BLOCK}),
    "a folder in a file's place": (
        lambda folder: ((folder / "tokenizer.json").unlink(), (folder / "tokenizer.json").symlink_to("/")),
        set(),
    ),
    "no tokenizer": (lambda folder: (folder / "tokenizer.json").unlink(), set()),
    "an empty tokenizer": (lambda folder: (folder / "tokenizer.json").write_text("{}"), set()),
    "no configuration": (lambda folder: (folder / "config.json").unlink(), set()),
    "a layer less": (change_json("config.json", lambda fields: fields.update(n_layer=2)), set()),
    "another epsilon": (
        change_json("config.json", lambda fields: fields.update(layer_norm_epsilon=1e-3)),
        set(),
    ),
    "other heads": (change_json("config.json", lambda fields: fields.update(n_head=8)), set()),
    "another end": (change_json("config.json", lambda fields: fields.update(eos_token_id=7)), set()),
}
BROKEN_MANIFESTS: dict[str, Damage] = {
    "cut short": lambda folder: os.truncate(folder / MANIFEST, 1000),
    "empty": lambda folder: os.truncate(folder / MANIFEST, 0),
    "missing": lambda folder: (folder / MANIFEST).unlink(),
    "a list": lambda folder: (folder / MANIFEST).write_text("[]"),
    "other bits": change_json(MANIFEST, lambda fields: fields.update(bits=8, group_size=32)),
    "another version": change_json(MANIFEST, lambda fields: fields.update(version=2)),
    "another identity": change_json(MANIFEST, lambda fields: fields.update(identity=None)),
    "no seal": change_json(MANIFEST, lambda fields: fields.pop("sha256")),
    "no files": change_json(MANIFEST, lambda fields: fields.pop("files")),
    "no checksum of a tensor": change_json(
        MANIFEST, lambda fields: fields["files"][BLOCK]["tensors"].popitem()[1].pop("sha256")
    ),
    "a number for an entry": change_json(MANIFEST, lambda fields: fields["files"].update({BLOCK: 3})),
    "an unknown key": change_json(MANIFEST, lambda fields: fields.update(files2={})),
}


def verify(folder: Path) -> None:
    verify_store(open_store(folder))


def repaired(source: Path, folder: Path) -> list[str]:
    """Convert into the folder again; what the user is told."""
    said: list[str] = []
    checkpoint = open_local(source)
    assert convert(checkpoint, recipe_for(checkpoint), folder, notice=said.append)
    return said


@pytest.mark.parametrize("name", DAMAGES)
def test_what_is_damaged_is_named_and_made_anew_and_only_that(
    source: Path, complete: Path, folder: Path, name: str
) -> None:
    damage, remade = DAMAGES[name]
    times = {path.name: path.stat().st_mtime_ns for path in folder.glob("*.safetensors")}
    damage(folder)
    with pytest.raises(MossError, match=r"safetensors|json"):
        verify(folder)
    assert "is not complete" in repaired(source, folder)[0]
    assert contents(folder) == contents(complete)
    kept = {name for name, time in times.items() if (folder / name).stat().st_mtime_ns == time}
    assert kept == times.keys() - remade
    verify(folder)


@pytest.mark.parametrize("name", BROKEN_MANIFESTS)
def test_a_damaged_manifest_is_one_line_and_the_folder_is_made_anew(
    source: Path, complete: Path, folder: Path, name: str
) -> None:
    BROKEN_MANIFESTS[name](folder)
    with pytest.raises(MossError, match="manifest.json|version 2"):
        verify(folder)
    repaired(source, folder)
    assert contents(folder) == contents(complete)


def test_damage_that_is_well_formed_is_refused_where_the_manifest_vouches_for_it(folder: Path) -> None:
    """Whoever makes the checksums anew still gets no folder opened whose parts contradict each other."""
    fields = json.loads((folder / MANIFEST).read_text())
    entry = fields["files"][BLOCK]
    cases: list[dict[str, Any]] = [
        {"group_size": 32},
        {"bits": True},
        {"bits": 4, "group_size": 31},
        {"bits": 4, "group_size": 1 << 40},
        {"files": {name: entry for name, entry in fields["files"].items() if name != BLOCK}},
        {"files": {**fields["files"], "block-03.safetensors": entry}},
        {"files": {**fields["files"], BLOCK: {**entry, "header": "0" * 63}}},
        {"files": {**fields["files"], BLOCK: {**entry, "header": ["0"] * 64}}},
        {"files": {**fields["files"], BLOCK: {**entry, "tensors": {}}}},
        {"files": {**fields["files"], BLOCK: {**entry, "tensors": [1, 2]}}},
        {"files": {**fields["files"], BLOCK: {**entry, "bytes": True}}},
        {"texts": {"config.json": "0" * 64}},
        {"texts": 7},
    ]
    for changes in cases:
        (folder / MANIFEST).write_text(json.dumps(sealed({**fields, **changes})))
        with pytest.raises(MossError):
            verify(folder)


def test_a_later_version_is_never_written_over(source: Path, folder: Path) -> None:
    fields = json.loads((folder / MANIFEST).read_text())
    (folder / MANIFEST).write_text(json.dumps(sealed({**fields, "version": 2})))
    before = contents(folder)
    checkpoint = open_local(source)
    with pytest.raises(MossError, match="version 2"):
        convert(checkpoint, recipe_for(checkpoint), folder)
    assert contents(folder) == before


def test_a_kill_while_repairing_is_gone_on_with(source: Path, complete: Path, folder: Path) -> None:
    (folder / BLOCK).unlink()
    checkpoint = open_local(source)

    def stop(count: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert(checkpoint, recipe_for(checkpoint), folder, stop)
    with pytest.raises(MossError, match="not finished"):
        open_store(folder)
    checkpoint = open_local(source)
    convert(checkpoint, recipe_for(checkpoint), folder)
    assert contents(folder) == contents(complete)


def test_the_command_repairs_what_verify_finds(
    source: Path, folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MOSS_JT_HOME", str(folder.parent / "home"))

    def run(*arguments: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as left:
            main(list(arguments))
        said = capsys.readouterr()
        return int(str(left.value.code)), said.out, said.err

    assert "nothing to do" in run("convert", str(source), "--out", str(folder))[1]
    (folder / "tokenizer.json").write_text("{}")
    code, _, error = run("verify", str(folder))
    assert (code, error.count("\n")) == (1, 1)
    assert "tokenizer.json" in error and "moss-jt convert" in error
    code, out, error = run("convert", str(source), "--out", str(folder))
    assert code == 0 and "is ready" in out and "5 of its files are kept" in error
    assert "every checksum is right" in run("verify", str(folder))[1]


def test_a_folder_of_other_things_is_never_taken_for_a_damaged_one(source: Path, tmp_path: Path) -> None:
    """A checkpoint's own folder, or one with a stranger's file beside ours."""
    for number, name in enumerate(("model.safetensors", "letters.txt")):
        out = tmp_path / str(number)
        out.mkdir()
        for mine in ("config.json", "tokenizer.json", "block-00.safetensors", name):
            (out / mine).write_text("mine")
        before = contents(out)
        with pytest.raises(MossError, match="not an unfinished model folder"):
            convert_checkpoint(source, out)
        assert contents(out) == before


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("n_embd", None),
        ("n_embd", "192"),
        ("n_embd", 192.0),
        ("n_embd", True),
        ("n_embd", []),
        ("n_layer", 16777216),
        ("n_layer", LARGEST["n_layer"] + 1),
        ("n_layer", -1),
        ("vocab_size", 1 << 40),
        ("n_positions", {}),
        ("layer_norm_epsilon", "1e-05"),
        ("layer_norm_epsilon", float("nan")),
        ("layer_norm_epsilon", 0),
        ("layer_norm_epsilon", 1e300),
        ("eos_token_id", []),
        ("eos_token_id", [1, "2"]),
        ("eos_token_id", [1, [2]]),
        ("eos_token_id", "2"),
        ("eos_token_id", -1),
        ("eos_token_id", 1 << 70),
        ("bos_token_id", {}),
        ("bos_token_id", False),
    ],
)
def test_values_of_the_wrong_kind_are_refused_by_name(name: str, value: Any) -> None:
    with pytest.raises(MossError, match=name) as caught:
        MossConfig.from_json({**small_config(), name: value})
    assert len(str(caught.value)) < 300


def test_several_ends_are_understood_and_come_back() -> None:
    config = MossConfig.from_json(small_config(eos_token_id=[3, 5]))
    assert config.eos_token_ids == (3, 5)
    assert MossConfig.from_json(json.loads(json.dumps(config.to_json()))) == config
    assert MossConfig.from_json(small_config(eos_token_id=3)).eos_token_ids == (3,)


def no_files() -> dict[str, Callable[[Path], object]]:
    return {
        "a pipe": os.mkfifo,
        "an endless device": lambda path: path.symlink_to("/dev/zero"),
        "a terminal": lambda path: path.symlink_to("/dev/tty"),
        "a folder": lambda path: path.mkdir(),
        "a link to itself": lambda path: path.symlink_to(path),
    }


@pytest.mark.parametrize("kind", no_files())
@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", MANIFEST, "head.safetensors"])
def test_what_is_no_file_is_one_error_in_a_model_folder(folder: Path, name: str, kind: str) -> None:
    (folder / name).unlink()
    no_files()[kind](folder / name)
    with pytest.raises(MossError, match=re.escape(name)):
        verify(folder)


@pytest.mark.parametrize("kind", no_files())
@pytest.mark.parametrize("name", ["config.json", "vocab.json", "merges.txt", "model.safetensors"])
def test_what_is_no_file_is_one_error_in_a_checkpoint(
    source: Path, tmp_path: Path, name: str, kind: str
) -> None:
    checkpoint = Path(shutil.copytree(source, tmp_path / "checkpoint"))
    (checkpoint / name).unlink()
    no_files()[kind](checkpoint / name)
    with pytest.raises(MossError, match=re.escape(name)):
        convert_checkpoint(checkpoint, tmp_path / "out")


def test_names_that_are_not_utf8_are_converted_verified_and_repaired(source: Path, tmp_path: Path) -> None:
    """A GBK name, as an unpacked archive leaves it."""
    name = os.fsdecode("模型".encode("gbk"))
    checkpoint = Path(shutil.copytree(source, tmp_path / name))
    out = convert_checkpoint(checkpoint, tmp_path / f"{name}-out")
    verify(out)
    same = open_local(checkpoint)
    assert not convert(same, recipe_for(same), out)
    (out / BLOCK).unlink()
    same = open_local(checkpoint)
    assert convert(same, recipe_for(same), out)
    verify(out)


def test_numbers_that_are_too_large_in_a_tokenizer_are_refused_at_once(folder: Path) -> None:
    """The package would make a list as long as the largest id says."""
    for number in (2147483648, 1 << 31, 5_000_000):
        fields = json.loads((folder / "tokenizer.json").read_text())
        fields["model"]["vocab"]["zzz"] = number
        (folder / "tokenizer.json").write_text(json.dumps(fields))
        from moss_jt.store.tokenizer import Tokenizer

        with pytest.raises(MossError, match="an id of"):
            Tokenizer.from_file(folder / "tokenizer.json")


def test_a_tokenizer_of_another_model_is_not_called_whole(folder: Path) -> None:
    fields = json.loads((folder / MANIFEST).read_text())
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    tokenizer["model"]["vocab"]["zzz"] = 2176
    text = json.dumps(tokenizer)
    (folder / "tokenizer.json").write_text(text)
    del fields["texts"], fields["sha256"]  # as 0.1.0 wrote it
    (folder / MANIFEST).write_text(json.dumps(fields))
    with pytest.raises(MossError, match="2176"):
        verify(folder)


def test_the_numbers_of_a_whole_folder_are_those_that_were_converted(folder: Path) -> None:
    """The checksum of the manifest covers its fields, not its spaces: what says the same is the same."""
    fields = json.loads((folder / MANIFEST).read_text())
    (folder / MANIFEST).write_text(json.dumps(fields, sort_keys=True))
    verify(folder)
    store = open_store(folder)
    assert np.isfinite(np.fromfile(store.head.path, np.float16, offset=store.head.data_offset)).all()


@pytest.mark.parametrize("name", ["config.json", "vocab.json", "merges.txt", "model.safetensors.index.json"])
def test_files_larger_than_any_models_are_refused_unread(source: Path, tmp_path: Path, name: str) -> None:
    """JSON can take twenty times its size in memory, so that 16 MiB are the most that is read of it."""
    checkpoint = Path(shutil.copytree(source, tmp_path / "checkpoint"))
    with (checkpoint / name).open("ab") as file:
        file.truncate(17 << 20)
    with pytest.raises(MossError, match=f"{re.escape(name)} is larger than 16 MiB"):
        convert_checkpoint(checkpoint, tmp_path / "out")


def test_a_safetensors_header_larger_than_any_models_is_refused_unread(folder: Path) -> None:
    path = folder / BLOCK
    data = path.read_bytes()
    path.write_bytes((17 << 20).to_bytes(8, "little") + data[8:])
    os.truncate(path, 18 << 20)
    with pytest.raises(MossError, match="not a safetensors file"):
        open_store(folder)
