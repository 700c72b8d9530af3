"""The model folder's format: what docs/model-folder.md says, held to bytes that 0.1.0 wrote and every version must open."""

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moss_jt.convert.checkpoint import open_local
from moss_jt.convert.pipeline import convert, recipe_for
from moss_jt.convert.quantize import QuantSettings, quantized_recipe
from moss_jt.errors import MossError
from moss_jt.store.checksums import verify_store
from moss_jt.store.files import read_json
from moss_jt.store.manifest import sealed
from moss_jt.store.model_folder import MANIFEST, open_store, read_tensor
from moss_jt.store.tokenizer import Tokenizer
from tests.support.golden import ADDED, GOLDEN, golden_checkpoint, golden_gptq

FOLDERS = ("float16", "int4", "act-order")


def written_now(name: str, folder: Path, out: Path) -> Path:
    """The golden folder of this name as today's program writes it."""
    if name == "act-order":
        checkpoint = open_local(golden_gptq(folder / "golden-gptq"))
    else:
        checkpoint = open_local(golden_checkpoint(folder / "golden"))
    recipe = recipe_for(checkpoint)
    if name == "int4":
        recipe = quantized_recipe(recipe, checkpoint.config, QuantSettings(4, 32, "rtn"), out, None)
    convert(checkpoint, recipe, out)
    return out


@pytest.mark.parametrize("name", FOLDERS)
def test_a_folder_of_the_first_version_opens_and_verifies(name: str) -> None:
    store = open_store(GOLDEN / name)
    verify_store(store)
    assert (store.bits, store.group_size) == ((16, 0) if name == "float16" else (4, 32))
    assert (store.config.n_layer, store.config.n_inner, store.config.eos_token_ids) == (2, 64, (258,))
    assert ("mlp.fc_out.input_order" in store.blocks[1].tensors) == (name == "act-order")
    tokenizer = Tokenizer.from_file(store.tokenizer_path)
    assert tokenizer.encode("<eoh>  é") == [257, 262, *(tokenizer.encode("é"))]
    assert [tokenizer.id(token) for token in ADDED] == list(range(256, 263))


def test_the_golden_numbers_are_those_of_the_formula() -> None:
    """Written with nothing of the program: qkv rows of head h come from chunk h, which holds query, value, key."""
    store = open_store(GOLDEN / "float16")
    rows = (np.arange(96 * 32) * 7919 + (10 + len("attn.qkv_proj")) * 104729) % 1024 - 512
    published = (rows.reshape(96, 32) / 1024).astype(np.float16)
    ours = read_tensor(store.blocks[1], "attn.qkv_proj.weight")
    for head in range(4):
        for mine, theirs in ((0, 0), (1, 2), (2, 1)):
            at, source = mine * 32 + head * 8, (3 * head + theirs) * 8
            np.testing.assert_array_equal(ours[at : at + 8], published[source : source + 8])


@pytest.mark.parametrize("name", FOLDERS)
def test_todays_program_writes_the_same_bytes(tmp_path: Path, name: str) -> None:
    out = written_now(name, tmp_path, tmp_path / "out")
    for path in sorted((GOLDEN / name).iterdir()):
        if path.suffix == ".safetensors" or path.name == "config.json":
            assert (out / path.name).read_bytes() == path.read_bytes(), path.name


@pytest.mark.parametrize("name", FOLDERS)
def test_the_manifest_adds_to_the_first_versions_and_changes_nothing_in_it(tmp_path: Path, name: str) -> None:
    out = written_now(name, tmp_path, tmp_path / "out")
    fields = json.loads((out / MANIFEST).read_text())
    old = json.loads((GOLDEN / name / MANIFEST).read_text())
    assert fields.keys() - old.keys() == {"texts", "sha256"}
    for file, entry in fields["files"].items():
        data = (out / file).read_bytes()
        end = 8 + int.from_bytes(data[:8], "little")
        assert entry.pop("header") == hashlib.sha256(data[:end]).hexdigest()
    for key in old.keys() - {"source"}:
        assert fields[key] == old[key], key
    for text, checksum in fields["texts"].items():
        assert hashlib.sha256((out / text).read_bytes()).hexdigest() == checksum
    written = json.loads((out / MANIFEST).read_text())
    checksum = written.pop("sha256")
    canonical = json.dumps(written, sort_keys=True, separators=(",", ":"))
    assert hashlib.sha256(canonical.encode()).hexdigest() == checksum


@pytest.mark.parametrize("name", FOLDERS)
def test_converting_again_gives_an_old_folder_the_new_checksums_and_keeps_its_weights(
    tmp_path: Path, name: str
) -> None:
    out = Path(shutil.copytree(GOLDEN / name, tmp_path / "out"))
    times = {path.name: path.stat().st_mtime_ns for path in out.glob("*.safetensors")}
    written_now(name, tmp_path, out)
    assert times == {path.name: path.stat().st_mtime_ns for path in out.glob("*.safetensors")}
    fields = json.loads((out / MANIFEST).read_text())
    assert sealed(fields) == fields
    verify_store(open_store(out))
    names = {path.name for path in (GOLDEN / name).iterdir()}
    assert {path.name for path in out.iterdir()} == names


def repacked(path: Path, change: Any) -> None:
    """The file with a header that ``change`` has changed, its data where they were."""
    data = path.read_bytes()
    end = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:end])
    change(header)
    text = json.dumps(header, separators=(",", ":")).encode().ljust(end - 8)
    path.write_bytes(data[:8] + text + data[end:])


@pytest.mark.parametrize(
    ("words", "change"),
    [
        ("hole", lambda header: header.pop("transformer.h.0.ln_1.bias")),
        ("does not belong", lambda header: header.update({"h.3": header.pop("transformer.h.0.ln_1.bias")})),
        (
            "does not belong",
            lambda header: header.update(
                {"transformer.h.1.ln_1.bias": header.pop("transformer.h.0.ln_1.bias")}
            ),
        ),
        ("is needed", lambda header: header["transformer.h.0.ln_1.bias"].update(dtype="I16")),
        ("contradict", lambda header: header["transformer.h.0.ln_1.bias"].update(shape=[32, 2])),
        ("contradict", lambda header: header["transformer.h.0.ln_1.bias"].update(shape=[True, 32])),
        ("not understood", lambda header: header["transformer.h.0.ln_1.bias"].update(dtype=["F16"])),
        ("not understood", lambda header: header["transformer.h.0.ln_1.bias"].update(data_offsets=[1])),
        (
            "overlap",
            lambda header: header["transformer.h.0.ln_1.bias"].update(
                data_offsets=header["transformer.h.0.ln_1.weight"]["data_offsets"]
            ),
        ),
    ],
)
def test_a_header_that_breaks_a_rule_is_refused_without_any_checksum(
    tmp_path: Path, words: str, change: Any
) -> None:
    """0.1.0 wrote none of headers: the rules alone must do."""
    folder = Path(shutil.copytree(GOLDEN / "float16", tmp_path / "model"))
    repacked(folder / "block-00.safetensors", change)
    with pytest.raises(MossError, match=words):
        open_store(folder)


def test_a_byte_order_mark_before_json_is_no_fault(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text('\ufeff{"n_layer": 2}', encoding="utf-8")
    assert read_json(path) == {"n_layer": 2}


def test_bytes_behind_the_last_tensor_and_data_off_the_page_are_refused(tmp_path: Path) -> None:
    folder = Path(shutil.copytree(GOLDEN / "float16", tmp_path / "model"))
    path = folder / "block-00.safetensors"
    data = path.read_bytes()
    path.write_bytes(data + b"x")
    with pytest.raises(MossError, match="behind its last tensor"):
        open_store(folder)
    length = int.from_bytes(data[:8], "little")
    path.write_bytes((length - 8).to_bytes(8, "little") + data[8:length] + data[8 + length :])
    fields = json.loads((folder / MANIFEST).read_text())
    fields["files"][path.name]["bytes"] -= 8
    (folder / MANIFEST).write_text(json.dumps(fields))
    with pytest.raises(MossError, match="multiple of 4096"):
        open_store(folder)
