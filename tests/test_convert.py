"""Conversion: every source format to the same model folder, every damaged source refused by name, every kill survived."""

import errno
import fcntl
import importlib.util
import io
import json
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moss_jt.commands.cli import main
from moss_jt.convert import disk_space
from moss_jt.convert.checkpoint import open_local
from moss_jt.convert.disk_space import Download
from moss_jt.convert.pickle_machine import read_pickle
from moss_jt.convert.pipeline import convert, recipe_for
from moss_jt.errors import MossError
from moss_jt.store import files
from moss_jt.store.checksums import verify_store
from moss_jt.store.locations import resolve_model, tiny_checkpoint
from moss_jt.store.manifest import sealed
from moss_jt.store.model_folder import MANIFEST, open_store, read_tensor
from moss_jt.store.safetensors_header import read_header
from tests.support.hub_server import serve_hub
from tests.support.models import (
    convert_checkpoint,
    random_checkpoint,
    random_tensors,
    small_config,
    tiny_model_folder,
    write_checkpoint,
)


def assert_holds(folder: Path, fields: dict[str, Any], tensors: dict[str, np.ndarray]) -> None:
    """Every tensor of the folder is the checkpoint's; qkv by the definition of the published row order."""
    store = open_store(folder)
    width, heads = fields["n_embd"], fields["n_head"]
    dim = width // heads
    for layer, block in enumerate(store.blocks):
        for name in block.tensors:
            source = tensors[f"transformer.h.{layer}.{name}"]
            ours = read_tensor(block, name)
            if name != "attn.qkv_proj.weight":
                np.testing.assert_array_equal(ours, source)
                continue
            for head in range(heads):
                chunk, within = divmod(head, heads // 4)
                for ours_at, theirs_at in ((0, 0), (1, 2), (2, 1)):  # we: q, k, v; they: q, v, k
                    begin = (chunk * 3 + theirs_at) * (width // 4) + within * dim
                    mine = ours_at * width + head * dim
                    np.testing.assert_array_equal(ours[mine : mine + dim], source[begin : begin + dim])
    np.testing.assert_array_equal(
        read_tensor(store.embedding, "wte.weight"), tensors["transformer.wte.weight"]
    )
    for name in store.head.tensors:
        full = name if name.startswith("lm_head") else f"transformer.{name}"
        np.testing.assert_array_equal(read_tensor(store.head, name), tensors[full])


@pytest.mark.parametrize("shards", [1, 3])
def test_every_tensor_arrives_and_qkv_is_sorted_by_head(tmp_path: Path, shards: int) -> None:
    source = random_checkpoint(tmp_path / "source", shards=shards, n_head=8)
    fields = small_config(n_head=8)
    out = convert_checkpoint(source, tmp_path / "out")
    assert_holds(out, fields, random_tensors(fields))
    verify_store(open_store(out))
    names = {path.name for path in out.iterdir()}
    blocks = {"block-00.safetensors", "block-01.safetensors"}
    assert names == blocks | {
        "embedding.safetensors",
        "head.safetensors",
        "config.json",
        "tokenizer.json",
        MANIFEST,
    }


def test_any_safetensors_reader_opens_it_and_data_are_aligned() -> None:
    from safetensors.numpy import load_file

    store = open_store(tiny_model_folder())
    for file in store.files:
        loaded = load_file(file.path)
        assert {spec.name for spec in file.tensors.values()} == loaded.keys()
        assert file.data_offset % 4096 == 0
        for name, spec in file.tensors.items():
            np.testing.assert_array_equal(loaded[spec.name], read_tensor(file, name))


def test_torch_shards_with_an_index_convert() -> None:
    """moss-tiny was written by torch: two zip shards, an index, causal masks; its folder verifies and is complete."""
    store = open_store(tiny_model_folder())
    assert (store.config.n_layer, store.config.n_embd, store.bits) == (4, 192, 16)
    verify_store(store)


@pytest.mark.parametrize("kind", ["float32", "bfloat16"])
def test_other_float_types_are_rounded_to_float16(tmp_path: Path, kind: str) -> None:
    fields = small_config()
    tensors = random_tensors(fields)
    wide = {name: values.astype(np.float32) * np.float32(1.0003) for name, values in tensors.items()}
    source = write_checkpoint(tmp_path / "source", fields, [wide])
    expected = {name: values.astype(np.float16) for name, values in wide.items()}
    if kind == "bfloat16":
        bits = {name: (values.view(np.uint32) >> 16).astype(np.uint16) for name, values in wide.items()}
        write_bfloat16(source / "model.safetensors", bits)
        expected = {
            name: (v.astype(np.uint32) << 16).view(np.float32).astype(np.float16) for name, v in bits.items()
        }
    assert_holds(convert_checkpoint(source, tmp_path / "out"), fields, expected)


def write_bfloat16(path: Path, tensors: dict[str, np.ndarray]) -> None:
    header, offset = {}, 0
    for name, bits in tensors.items():
        header[name] = {"dtype": "BF16", "shape": bits.shape, "data_offsets": [offset, offset + bits.nbytes]}
        offset += bits.nbytes
    text = json.dumps(header).encode()
    path.write_bytes(
        len(text).to_bytes(8, "little") + text + b"".join(bits.tobytes() for bits in tensors.values())
    )


def refused(source: Path, out: Path) -> str:
    """The error that converting gives; nothing that looks finished may be left."""
    with pytest.raises(MossError) as caught:
        convert_checkpoint(source, out)
    assert not (out / MANIFEST).exists()
    assert not list(out.glob("*.part"))
    return str(caught.value)


@pytest.mark.parametrize(
    ("value", "words"),
    [(np.inf, "NaN or infinity"), (np.nan, "NaN or infinity"), (1e6, "float16 (largest 65504) cannot hold")],
)
def test_values_that_float16_cannot_hold_are_refused_by_tensor(
    tmp_path: Path, value: float, words: str
) -> None:
    fields = small_config()
    tensors: dict[str, np.ndarray] = dict(random_tensors(fields))
    name = "transformer.h.1.mlp.fc_out.weight"
    tensors[name] = tensors[name].astype(np.float32)
    tensors[name][3, 5] = value
    message = refused(write_checkpoint(tmp_path / "source", fields, [tensors]), tmp_path / "out")
    assert name in message
    assert words in message


def test_missing_extra_and_misshaped_tensors_are_refused_by_name(tmp_path: Path) -> None:
    fields = small_config()
    complete = random_tensors(fields)
    name = "transformer.h.0.attn.out_proj.weight"
    cases = {
        "lacks the tensor " + name: {key: value for key, value in complete.items() if key != name},
        "transformer.h.0.ln_2.weight": {
            **complete,
            "transformer.h.0.ln_2.weight": complete["transformer.ln_f.weight"],
        },
        "(64, 32)": {**complete, name: np.ascontiguousarray(complete[name][:, :32])},
        "transformer.h.2.ln_1.bias": {
            **complete,
            "transformer.h.2.ln_1.bias": complete["transformer.h.1.ln_1.bias"],
        },
    }
    for number, (words, tensors) in enumerate(cases.items()):
        source = write_checkpoint(tmp_path / f"source{number}", fields, [tensors])
        assert words in refused(source, tmp_path / f"out{number}")


def test_known_buffers_are_left_out(tmp_path: Path) -> None:
    fields = small_config()
    tensors: dict[str, np.ndarray] = dict(random_tensors(fields))
    mask = np.tril(np.ones((1, 1, 128, 128), np.uint8))
    tensors.update({f"transformer.h.{layer}.attn.causal_mask": mask for layer in range(2)})
    out = convert_checkpoint(write_checkpoint(tmp_path / "source", fields, [tensors]), tmp_path / "out")
    assert_holds(out, fields, tensors)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model_type": "llama"}, "'llama'"),
        ({"n_embd": None, "hidden_size": 64}, "hidden_size instead of n_embd"),
        ({"n_embd": "missing", "hidden_size": 64}, "hidden_size instead of n_embd"),
        ({"n_embd": None}, "n_embd is missing"),
        ({"n_head": 6, "n_embd": 66, "rotary_dim": 2}, "multiple of 4"),
        ({"activation_function": "relu"}, "relu"),
        ({"model_type": "codegen", "auto_map": {"AutoModel": "modeling_codegen.CodeGenModel"}}, "CodeGen2"),
        ({"n_layer": "2"}, "n_layer"),
    ],
)
def test_other_architectures_are_refused_with_the_reason(
    tmp_path: Path, changes: dict[str, Any], words: str
) -> None:
    source = random_checkpoint(tmp_path / "source")
    fields = small_config(**changes)
    fields = {name: value for name, value in fields.items() if value != "missing"}
    (source / "config.json").write_text(json.dumps(fields))
    assert words in refused(source, tmp_path / "out")


def tiny_copy(folder: Path) -> Path:
    shutil.copytree(tiny_checkpoint(), folder)
    return folder


def test_a_truncated_torch_shard_is_refused(tmp_path: Path) -> None:
    source = tiny_copy(tmp_path / "source")
    shard = source / "pytorch_model-00002-of-00002.bin"
    shard.write_bytes(shard.read_bytes()[:-70_000])
    assert "cut short" in refused(source, tmp_path / "out")


def test_a_wrong_index_is_refused(tmp_path: Path) -> None:
    source = tiny_copy(tmp_path / "source")
    index = source / "pytorch_model.bin.index.json"
    fields = json.loads(index.read_text())
    swapped = dict(fields["weight_map"], **{"lm_head.weight": "pytorch_model-00001-of-00002.bin"})
    index.write_text(json.dumps({"weight_map": swapped}))
    assert "lm_head.weight, but it does not" in refused(source, tmp_path / "out")
    index.write_text(json.dumps({"weight_map": dict(swapped, x="../../etc/passwd")}))
    assert "no such file beside it" in refused(source, tmp_path / "out2")
    index.unlink()
    assert "index" in refused(source, tmp_path / "out3")


@pytest.mark.parametrize("name", ["vocab.json", "merges.txt"])
def test_a_missing_tokenizer_file_is_named_before_anything_is_written(tmp_path: Path, name: str) -> None:
    source = tiny_copy(tmp_path / "source")
    (source / name).unlink()
    assert name in refused(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


class Hostile:
    """Unpickled by Python, this would create a file."""

    def __init__(self, target: str) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Any, ...]:
        return (os.system, (f"touch {self.target}",))


def test_a_pickle_that_would_run_code_is_refused_and_runs_nothing(tmp_path: Path) -> None:
    source = tiny_copy(tmp_path / "source")
    shard = source / "pytorch_model-00001-of-00002.bin"
    harm = tmp_path / "harm"
    payload = io.BytesIO()
    pickle.dump({"transformer.wte.weight": Hostile(str(harm))}, payload, protocol=2)
    with zipfile.ZipFile(shard, "w") as archive:
        archive.writestr("archive/data.pkl", payload.getvalue())
    message = refused(source, tmp_path / "out")
    assert "system" in message
    assert not harm.exists()


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b".",
        b"\x80\x02",
        b"(" * 5000 + b".",
        b"\x80\x02}q\x00X\xff\xff\xff\x7fa.",
        b"cbuiltins\neval\n.",
        b"h\x05.",
        b"R.",
    ],
)
def test_damaged_pickles_are_one_error(data: bytes) -> None:
    with pytest.raises(MossError, match="somewhere"):
        read_pickle(data, "somewhere")


def doubled(empty: bytes, double: bytes) -> bytes:
    """Pickle of a list or tuple that holds the one before it twice, 60 times over; left on the stack and in the memo at 0."""
    return b"\x80\x02" + empty + b"q\x00" + (double + b"q\x00") * 60


LISTS = doubled(b"]", b"]h\x00ah\x00a")
TUPLES = doubled(b")", b"h\x00h\x00\x86")
HALF = b"ctorch\nHalfStorage\n"
MILLION = b"\x80\x02](" + b"K\x01K\x02\x86" * 300_000 + b"eq\x00"


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("printed as a name", LISTS + b"h\x00\x93."),
        ("printed as a storage", LISTS + b"(X\x07\x00\x00\x00storage" + HALF + b"h\x00NK\x01tQ."),
        ("hashed as a key", TUPLES + b"}h\x00Ns."),
        ("hashed as one of several", TUPLES + b"}(K\x01Nh\x00Nu."),
        (
            "copied into dicts",
            MILLION + b"ccollections\nOrderedDict\nq\x01" + b"h\x01h\x00\x85R" * 200_000 + b".",
        ),
        (
            "taken as a shape",
            MILLION
            + b"ctorch._utils\n_rebuild_tensor_v2\nq\x01"
            + b"h\x01(NK\x00h\x00h\x00tR" * 100_000
            + b".",
        ),
    ],
)
def test_small_pickles_that_are_endless_to_look_at_end_at_once(name: str, data: bytes) -> None:
    with pytest.raises(MossError, match="somewhere"):
        read_pickle(data, "somewhere")


def test_random_damage_to_a_pickle_never_escapes_the_machine() -> None:
    with zipfile.ZipFile(tiny_checkpoint() / "pytorch_model-00002-of-00002.bin") as archive:
        name = next(name for name in archive.namelist() if name.endswith("data.pkl"))
        good = archive.read(name)
    draw = np.random.default_rng(5)
    for _ in range(400):
        bad = bytearray(good)
        for index in draw.integers(0, len(bad), 3):
            bad[index] = draw.integers(0, 256)
        try:
            read_pickle(bytes(bad), "somewhere")
        except MossError:
            pass


def test_hostile_safetensors_headers_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    entry = {"dtype": "F16", "shape": [4], "data_offsets": [0, 8]}
    for header in (
        b"",
        b"{" * 100_000,
        json.dumps({"a": {**entry, "shape": [5]}}).encode(),
        json.dumps({"a": {**entry, "data_offsets": [0, 10**15], "shape": [5 * 10**14]}}).encode(),
        json.dumps({"a": {**entry, "shape": [-4]}}).encode(),
        json.dumps({"a": {**entry, "shape": [1 << 40] * 100_000}}).encode(),
        json.dumps({"a": [1, 2]}).encode(),
        b"[]",
    ):
        path.write_bytes(len(header).to_bytes(8, "little") + header)
        with pytest.raises(MossError, match="x.safetensors"):
            read_header(path)
    path.write_bytes(b"\xff" * 64)
    with pytest.raises(MossError, match="x.safetensors"):
        read_header(path)


def test_too_little_disk_is_said_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=1 << 20)
    monkeypatch.setattr(disk_space.shutil, "disk_usage", lambda path: usage)
    message = refused(random_checkpoint(tmp_path / "source"), tmp_path / "out")
    assert "disk" in message
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("call", [1, 3, 7, 15])
def test_a_disk_that_fills_up_leaves_nothing_half_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: int
) -> None:
    """At the journal, the first file, a later one and the last small files: each file or note is two calls of fsync."""
    source, out = random_checkpoint(tmp_path / "source"), tmp_path / "out"
    real, calls = os.fsync, []

    def full(descriptor: int) -> None:
        calls.append(descriptor)
        if len(calls) == call:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(descriptor)

    monkeypatch.setattr(files.os, "fsync", full)
    assert "disk is full" in refused(source, out)
    monkeypatch.undo()
    assert_holds(convert_checkpoint(source, out), small_config(), random_tensors(small_config()))


def test_downloads_count_where_they_share_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three files of 100 from shards of 50, 60 and 70; the second file straddles two. 30 bytes have come already."""
    folder = tmp_path / "download"
    folder.mkdir()
    (folder / "a").write_bytes(bytes(30))
    sizes = {"a": 50, "b": 60, "c": 70}
    steps = [{"a"}, {"a", "b"}, {"c"}]
    assert Download(folder, sizes, keep=False).growth(steps) == [20, 80, 40]
    assert Download(folder, sizes, keep=True).growth(steps) == [20, 80, 150]
    gib = 1 << 30
    usage = shutil.disk_usage(tmp_path)._replace(free=5 * gib)
    monkeypatch.setattr(disk_space.shutil, "disk_usage", lambda path: usage)
    disk_space.check_disk(tmp_path / "out", [gib, gib, gib], folder, [gib, gib, gib])
    with pytest.raises(MossError, match=r"out needs 5\.2\d GiB of disk and 5\.00 GiB are free"):
        disk_space.check_disk(tmp_path / "out", [gib, gib, gib], folder, [gib, 3 * gib, gib])
    with pytest.raises(MossError, match=r"out needs 6\.2\d GiB"):
        disk_space.check_disk(tmp_path / "out", [3 * gib, 3 * gib])


def test_a_file_may_go_away_while_a_folder_is_summed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """moss-jt list, while another process converts and renames what it has written."""
    for name, content in (("kept", b"12"), ("within/renamed", b"345")):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content)
    stat = Path.stat

    def last_seen(path: Path, **options: Any) -> os.stat_result:
        result = stat(path, **options)
        if path.name == "renamed":
            path.unlink()
        return result

    assert disk_space.folder_bytes(tmp_path) == 5
    (tmp_path / "dangling").symlink_to(tmp_path / "nothing")
    monkeypatch.setattr(Path, "stat", last_seen)
    assert disk_space.folder_bytes(tmp_path) == 5
    assert disk_space.folder_bytes(tmp_path) == 2


def test_a_place_that_cannot_hold_a_folder_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    assert "Not a directory" in refused(random_checkpoint(tmp_path / "source"), tmp_path / "file")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letters.txt").write_text("x")
    assert "not an unfinished model folder" in refused(tmp_path / "source", tmp_path / "mine")


def test_two_conversions_never_write_into_one_folder(tmp_path: Path) -> None:
    source, out = random_checkpoint(tmp_path / "source"), tmp_path / "out"
    out.mkdir()
    descriptor = os.open(out, os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    assert "another moss-jt is writing" in refused(source, out)
    os.close(descriptor)
    convert_checkpoint(source, out)


def test_interrupted_anywhere_it_goes_on_and_ends_the_same(tmp_path: Path) -> None:
    """Stopped after each number of bytes in turn; finished files are not written again."""
    source = random_checkpoint(tmp_path / "source")
    complete = convert_checkpoint(source, tmp_path / "whole")
    out, written = tmp_path / "out", []
    for stop_after in (1, 3, 8, 20):
        counted = 0

        def stop(count: int, stop_after: int = stop_after) -> None:
            nonlocal counted
            counted += 1
            if counted > stop_after:
                raise KeyboardInterrupt

        checkpoint = open_local(source)
        with pytest.raises(KeyboardInterrupt):
            convert(checkpoint, recipe_for(checkpoint), out, stop)
        with pytest.raises(MossError, match="not finished"):
            open_store(out)
        written.append(len(json.loads((out / "journal.json").read_text())["files"]))
    assert written == sorted(written)
    assert written[-1] >= 2
    kept = {path.name: path.stat().st_mtime_ns for path in out.glob("*.safetensors")}
    convert_checkpoint(source, out)
    for name, time_ns in kept.items():
        assert (out / name).stat().st_mtime_ns == time_ns
    for path in complete.glob("*.safetensors"):
        assert path.read_bytes() == (out / path.name).read_bytes()


def test_a_killed_process_is_resumed(tmp_path: Path) -> None:
    source, out = random_checkpoint(tmp_path / "source", n_layer=6, n_embd=256), tmp_path / "out"
    program = (
        "import os, signal, sys; from pathlib import Path; from tests.support.models import *\n"
        "checkpoint = open_local(Path(sys.argv[1])); count = 0\n"
        "def progress(size):\n"
        "    global count; count += 1\n"
        "    if count == 30: os.kill(os.getpid(), signal.SIGKILL)\n"
        "convert(checkpoint, recipe_for(checkpoint), Path(sys.argv[2]), progress)\n"
    )
    root = Path(__file__).resolve().parents[1]
    environment = {**os.environ, "PYTHONPATH": str(root)}
    done = subprocess.run([sys.executable, "-P", "-c", program, source, out], env=environment, check=False)
    assert done.returncode == -signal.SIGKILL
    assert not (out / MANIFEST).exists()
    convert_checkpoint(source, out)
    fields = small_config(n_layer=6, n_embd=256)
    assert_holds(out, fields, random_tensors(fields))
    assert not list(out.glob("*.part"))


def test_a_changed_source_is_converted_anew_and_a_finished_folder_is_never_overwritten(
    tmp_path: Path,
) -> None:
    source, out = random_checkpoint(tmp_path / "source"), tmp_path / "out"
    checkpoint = open_local(source)

    def stop(count: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert(checkpoint, recipe_for(checkpoint), out, stop)
    random_checkpoint(source, seed=1)
    said: list[str] = []
    checkpoint = open_local(source)
    assert convert(checkpoint, recipe_for(checkpoint), out, notice=said.append)
    assert "anew" in said[0]
    assert_holds(out, small_config(), random_tensors(small_config(), seed=1))
    checkpoint = open_local(source)
    assert not convert(checkpoint, recipe_for(checkpoint), out)
    random_checkpoint(source, seed=2)
    checkpoint = open_local(source)
    with pytest.raises(MossError, match="--out"):
        convert(checkpoint, recipe_for(checkpoint), out)


def test_the_same_files_elsewhere_are_the_same_checkpoint(tmp_path: Path) -> None:
    """moss-tiny installed again, or in a second clone, has other times; chat moss-tiny must not call it another model."""
    out = convert_checkpoint(tiny_copy(tmp_path / "one" / "moss-tiny"), tmp_path / "out")
    copy = open_local(tiny_copy(tmp_path / "two" / "moss-tiny"))
    for path in (tmp_path / "two" / "moss-tiny").iterdir():
        os.utime(path, (1, 1))
    assert not convert(copy, recipe_for(copy), out)


def test_a_source_that_changes_meanwhile_is_noticed_and_begun_anew(tmp_path: Path) -> None:
    source, out = random_checkpoint(tmp_path / "source", n_layer=3), tmp_path / "out"
    checkpoint = open_local(source)
    changed = False

    def change(count: int) -> None:
        nonlocal changed
        if not changed:
            random_checkpoint(source, seed=1, n_layer=3)
            changed = True

    with pytest.raises(MossError, match="changed while it was being converted"):
        convert(checkpoint, recipe_for(checkpoint), out, change)
    assert not (out / MANIFEST).exists()
    random_checkpoint(source, seed=2)  # a block less: the third one's file must not stay
    convert_checkpoint(source, out)
    assert_holds(out, small_config(), random_tensors(small_config(), seed=2))
    assert not (out / "block-02.safetensors").exists()


def test_verify_names_the_tensor_with_a_flipped_byte(tmp_path: Path) -> None:
    out = convert_checkpoint(random_checkpoint(tmp_path / "source"), tmp_path / "out")
    spec = open_store(out).blocks[1].tensors["mlp.fc_in.weight"]
    path = out / "block-01.safetensors"
    data = bytearray(path.read_bytes())
    data[spec.offset + 101] ^= 4
    path.write_bytes(data)
    with pytest.raises(MossError, match=r"transformer\.h\.1\.mlp\.fc_in\.weight"):
        verify_store(open_store(out))


def test_a_damaged_model_folder_is_refused_with_the_reason(tmp_path: Path) -> None:
    out = convert_checkpoint(random_checkpoint(tmp_path / "source"), tmp_path / "out")
    manifest = json.loads((out / MANIFEST).read_text())

    def reason(**changes: Any) -> str:
        (out / MANIFEST).write_text(json.dumps(sealed({**manifest, **changes})))
        with pytest.raises(MossError) as caught:
            open_store(out)
        return str(caught.value)

    assert "version 2" in reason(version=2)
    assert "not 'moss-jt'" in reason(format="other")
    assert "bits 3" in reason(bits=3)
    assert "block-01" in reason(
        files={name: entry for name, entry in manifest["files"].items() if name != "block-01.safetensors"}
    )
    (out / MANIFEST).write_text(json.dumps(manifest))
    block = out / "block-00.safetensors"
    block.write_bytes(block.read_bytes()[:-1])
    with pytest.raises(MossError, match="block-00"):
        open_store(out)
    block.unlink()
    with pytest.raises(MossError, match="missing"):
        open_store(out)


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MOSS_JT_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


def run_cli(*arguments: str) -> int:
    with pytest.raises(SystemExit) as left:
        main(list(arguments))
    return int(str(left.value.code))


def test_the_command_converts_by_name_and_remembers(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(MossError, match="moss-jt chat moss-tiny"):
        resolve_model(None)
    assert run_cli("convert", "moss-tiny") == 0
    said = capsys.readouterr().out
    assert "moss-jt chat moss-tiny" in said
    assert re.search(r"is ready \([45]\.\d MiB\)", said)
    assert resolve_model(None) == home / "models" / "moss-tiny"
    assert resolve_model("moss-tiny") == home / "models" / "moss-tiny"
    assert run_cli("verify") == 0
    assert "every checksum is right" in capsys.readouterr().out


@pytest.mark.parametrize("source", ["/nowhere/at/all", "../nowhere", "no-slash"])
def test_a_source_that_is_nothing_is_one_line(
    home: Path, source: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_cli("convert", source) == 1
    error = capsys.readouterr().err
    assert error.startswith("moss-jt: error: ")
    assert error.count("\n") == 1


HUB_PROGRAM = "import sys; from moss_jt.commands.cli import main; main(sys.argv[1:])"


def from_hub(home: Path, address: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """moss-jt in a process of its own: huggingface_hub reads HF_ENDPOINT when it is imported."""
    environment = {
        **os.environ,
        "HF_ENDPOINT": address,
        "HF_HOME": str(home / "hf"),
        "MOSS_JT_HOME": str(home),
    }
    command = [sys.executable, "-P", "-c", HUB_PROGRAM, *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


def test_from_the_hub_shard_by_shard(tmp_path: Path) -> None:
    """Only needed files are fetched, each shard once; nothing of the download is left, or all with --keep-download."""
    source = tiny_copy(tmp_path / "source")
    (source / "README.md").unlink()
    (source / "other.bin").write_bytes(b"not needed")
    with serve_hub(source, "fnlp/moss-small") as (address, requests):
        done = from_hub(tmp_path / "home", address, "convert", "fnlp/moss-small")
        assert done.returncode == 0, done.stderr
        out = tmp_path / "home" / "models" / "moss-small"
        assert open_store(out).config == open_store(tiny_model_folder()).config
        verify_store(open_store(out))
        fetched = [line for line in requests if line.startswith("GET") and line.endswith(".bin")]
        assert sorted(line[-29:] for line in fetched) == [
            f"/pytorch_model-0000{n}-of-00002.bin"[-29:] for n in (1, 2)
        ]
        assert not (tmp_path / "home" / "downloads" / "fnlp--moss-small").exists()
        done = from_hub(tmp_path / "keep", address, "convert", "fnlp/moss-small", "--keep-download")
        assert done.returncode == 0, done.stderr
        assert len(list((tmp_path / "keep" / "downloads" / "fnlp--moss-small").glob("*.bin"))) == 2
        done = from_hub(tmp_path / "home", address, "convert", "fnlp/unknown")
        assert (done.returncode, done.stderr.count("\n")) == (1, 1)
        assert "no model fnlp/unknown" in done.stderr
    done = from_hub(tmp_path / "dead", "http://127.0.0.1:9", "convert", "fnlp/moss-small")
    assert done.returncode == 1
    assert "HF_ENDPOINT" in done.stderr


@pytest.mark.parametrize(
    ("environment", "said"),
    [
        ({"ALL_PROXY": "socks5://127.0.0.1:9"}, "pip install socksio"),
        ({"HTTP_PROXY": "socks5h://127.0.0.1:9"}, "pip install socksio"),
        ({"HTTP_PROXY": "socks4://127.0.0.1:9"}, "Unknown scheme for proxy URL"),
        ({"HF_TOKEN": "hf_t\u00f6k\u00e8n"}, "HF_TOKEN"),
        ({"HF_TOKEN": "\u5bc6\u7801"}, "HF_TOKEN"),
        ({"HF_ENDPOINT": "http://["}, "HF_ENDPOINT"),
        ({"HF_ENDPOINT": "nonsense"}, "HF_ENDPOINT"),
    ],
    ids=str,
)
def test_a_surrounding_in_which_no_hub_is_reached_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], said: str
) -> None:
    if "socksio" in said and importlib.util.find_spec("socksio") is not None:
        pytest.skip("the package for SOCKS proxies is installed")
    for name in ("ALL_PROXY", "HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.lower(), raising=False)
    address = environment.get("HF_ENDPOINT", "http://127.0.0.1:9")
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    done = from_hub(tmp_path, address, "convert", "fnlp/moss-small")
    assert done.returncode == 1 and done.stderr.startswith("moss-jt: error: ")
    assert len(done.stderr.splitlines()) == 1 and said in done.stderr


def gets(requests: list[str], name: str) -> int:
    return sum(line.startswith("GET") and line.endswith(name) for line in requests)


def test_a_hub_that_breaks_off_is_gone_on_with(tmp_path: Path) -> None:
    """A broken transfer is tried again; after an error the next run fetches only what is not converted yet."""
    source = random_checkpoint(tmp_path / "source", n_layer=4)
    tensors = random_tensors(small_config(n_layer=4))
    early = {name: values for name, values in tensors.items() if ".wte." in name or ".h.0." in name}
    late = {name: values for name, values in tensors.items() if name not in early}
    (source / "model.safetensors").unlink()
    write_checkpoint(source, small_config(n_layer=4), [early, late])
    names = [f"model-0000{number}-of-00002.safetensors" for number in (1, 2)]
    forbidden = {names[1]}
    with serve_hub(source, "a/small", forbidden, cut={names[0]}) as (address, requests):
        done = from_hub(tmp_path / "home", address, "convert", "a/small")
        assert done.returncode == 1
        assert "downloading from a/small failed" in done.stderr
        assert "403" in done.stderr
        assert gets(requests, names[0]) == 2
        out = tmp_path / "home" / "models" / "small"
        assert {path.name for path in out.glob("*.safetensors")} == {
            "block-00.safetensors",
            "embedding.safetensors",
        }
        assert not (tmp_path / "home" / "downloads" / "a--small" / names[0]).exists()
        forbidden.clear()
        requests.clear()
        done = from_hub(tmp_path / "home", address, "convert", "a/small")
        assert done.returncode == 0, done.stderr
        assert "Going on after 2 of 6 files" in done.stderr
        assert (gets(requests, names[0]), gets(requests, names[1])) == (0, 1)
    assert_holds(out, small_config(n_layer=4), tensors)


def test_a_checkpoint_of_one_file_is_fetched_once_and_only_if_it_can_be_converted(tmp_path: Path) -> None:
    source = random_checkpoint(tmp_path / "source")
    with serve_hub(source, "a/small") as (address, requests):
        for words in ("is ready", "converted already"):
            done = from_hub(tmp_path / "home", address, "convert", "a/small")
            assert done.returncode == 0, done.stderr
            assert words in done.stdout
            assert not (tmp_path / "home" / "downloads" / "a--small").exists()
        assert gets(requests, "model.safetensors") == 1
        (source / "merges.txt").unlink()
        done = from_hub(tmp_path / "other", address, "convert", "a/small")
        assert (done.returncode, "no file merges.txt" in done.stderr) == (1, True)
        assert gets(requests, "model.safetensors") == 1
