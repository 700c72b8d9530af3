"""A checkpoint as other programs leave it: other names, other wrappings, tied heads, newer tokenizers, look-alikes."""

import json
import pickle
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from moss_jt.commands.convert import open_source
from moss_jt.convert.checkpoint import choose_index, open_local
from moss_jt.convert.tokenizer import build_tokenizer
from moss_jt.errors import MossError
from moss_jt.store.locations import tiny_checkpoint
from moss_jt.store.model_folder import open_store
from moss_jt.store.tokenizer import Tokenizer
from tests.support.models import (
    TOKENIZER_FILES,
    convert_checkpoint,
    random_checkpoint,
    random_tensors,
    small_config,
    tiny_model_folder,
    write_checkpoint,
)
from tests.support.torch_files import torch_file

Tensors = dict[str, np.ndarray]


def weights_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("*.safetensors")}


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The weights of the model folder that every form of this checkpoint must give."""
    where = tmp_path_factory.mktemp("plain")
    return weights_of(convert_checkpoint(random_checkpoint(where / "source"), where / "out"))


@pytest.mark.parametrize(
    "prefix", ["module.", "_orig_mod.", "model.", "module._orig_mod.", "_orig_mod.module.model."]
)
@pytest.mark.parametrize("shards", [1, 2])
def test_what_other_programs_put_before_the_names_is_left_out(
    tmp_path: Path, plain: dict[str, bytes], prefix: str, shards: int
) -> None:
    tensors = {prefix + name: values for name, values in random_tensors(small_config()).items()}
    items = list(tensors.items())
    source = write_checkpoint(
        tmp_path / "source", small_config(), [dict(items[n::shards]) for n in range(shards)]
    )
    assert weights_of(convert_checkpoint(source, tmp_path / "out")) == plain


def test_a_name_that_comes_twice_is_refused(tmp_path: Path) -> None:
    tensors = random_tensors(small_config())
    tensors["module.lm_head.bias"] = tensors["lm_head.bias"] + 1
    with pytest.raises(MossError, match=r"lm_head\.bias.* twice"):
        convert_checkpoint(write_checkpoint(tmp_path / "source", small_config(), [tensors]), tmp_path / "out")


@pytest.mark.parametrize("wrapper", [(), ("model",), ("state_dict",), ("module",), ("model", "state_dict")])
@pytest.mark.parametrize("name", ["pytorch_model.bin", "gptq_model-4bit-128g.pt", "weights.pth"])
def test_wrapped_torch_files_are_read(
    tmp_path: Path, plain: dict[str, bytes], wrapper: tuple[str, ...], name: str
) -> None:
    source = random_checkpoint(tmp_path / "source")
    tensors = load_file(source / "model.safetensors")
    (source / "model.safetensors").unlink()
    (source / "training_args.bin").write_bytes(b"never read")
    (source / "optimizer.pt").write_bytes(b"never read")
    (source / name).write_bytes(torch_file(tensors, wrapper))
    assert weights_of(convert_checkpoint(source, tmp_path / "out")) == plain


@pytest.mark.parametrize("kind", ["safetensors", "torch"])
def test_a_tied_head_is_the_embedding(tmp_path: Path, kind: str) -> None:
    fields = small_config(tie_word_embeddings=True)
    tensors = random_tensors(fields)
    head = tensors.pop("lm_head.weight")
    source = write_checkpoint(tmp_path / "source", fields, [tensors])
    if kind == "torch":
        (source / "model.safetensors").unlink()
        (source / "pytorch_model.bin").write_bytes(torch_file(tensors))
    out = convert_checkpoint(source, tmp_path / "out")
    untied = {**tensors, "lm_head.weight": tensors["transformer.wte.weight"]}
    again = convert_checkpoint(
        write_checkpoint(tmp_path / "untied", small_config(), [untied]), tmp_path / "out2"
    )
    assert weights_of(out) == weights_of(again)
    # Two different tables that the configuration calls tied: what is stored counts.
    both = write_checkpoint(tmp_path / "both", fields, [{**tensors, "lm_head.weight": head}])
    assert (convert_checkpoint(both, tmp_path / "out3") / "head.safetensors").read_bytes() != (
        out / "head.safetensors"
    ).read_bytes()
    (source / "config.json").write_text(json.dumps(small_config()))
    with pytest.raises(MossError, match=r"lacks the tensor lm_head\.weight"):
        convert_checkpoint(source, tmp_path / "out4")


def test_biases_of_zeros_that_the_model_does_not_have_are_left_out(
    tmp_path: Path, plain: dict[str, bytes]
) -> None:
    tensors = random_tensors(small_config())
    for layer in range(2):
        tensors[f"transformer.h.{layer}.attn.qkv_proj.bias"] = np.zeros(192, np.float32)
        tensors[f"transformer.h.{layer}.attn.out_proj.bias"] = np.zeros(64, np.float16)
    source = write_checkpoint(tmp_path / "source", small_config(), [tensors])
    assert weights_of(convert_checkpoint(source, tmp_path / "out")) == plain
    tensors["transformer.h.1.attn.out_proj.bias"][7] = 1e-4
    save_file(tensors, source / "model.safetensors")
    with pytest.raises(MossError, match=r"h\.1\.attn\.out_proj\.bias.*not all zeros"):
        convert_checkpoint(source, tmp_path / "out2")


def test_files_of_other_names_are_chosen_where_they_are_the_only_ones() -> None:
    assert choose_index(["a.safetensors", "config.json"]) == (None, "a.safetensors")
    assert choose_index(["a.pt", "scheduler.pt", "rng_state_0.pth", "training_args.bin"]) == (None, "a.pt")
    assert choose_index(["a.safetensors", "a.pt"]) == (None, "a.safetensors")
    shards = [f"gptq_model-4bit-128g-0000{n}-of-00002.safetensors" for n in (1, 2)]
    index = "gptq_model-4bit-128g.safetensors.index.json"
    assert choose_index([*shards, index]) == (index, None)
    with pytest.raises(MossError, match="one of several shards"):
        choose_index(shards)
    with pytest.raises(MossError, match=r"a\.pt and b\.pt both"):
        choose_index(["a.pt", "b.pt"])
    with pytest.raises(MossError, match="no weights"):
        choose_index(["config.json", "optimizer.pt"])


def tokenizer_json(folder: Path, merges_as_text: bool = False) -> Path:
    """moss-tiny's tokenizer as transformers 5 saves it: one tokenizer.json; written by the library, not by us."""
    rust = build_tokenizer(lambda name: tiny_checkpoint() / name, {"vocab_size": 2176})
    fields = json.loads(rust)
    if merges_as_text:
        fields["model"]["merges"] = [" ".join(merge) for merge in fields["model"]["merges"]]
    (folder / "tokenizer.json").write_text(json.dumps(fields))
    for name in TOKENIZER_FILES:
        (folder / name).unlink(missing_ok=True)
    return folder


TEXTS = (
    "Hello,  world!\n\n  你好，世界 \t\t<eoh>\n<|MOSS|>: x <|endoftext|>",
    "a" * 40 + " " * 31 + "\r\n é",
)


@pytest.mark.parametrize("merges_as_text", [False, True])
def test_a_checkpoint_with_tokenizer_json_alone_converts(tmp_path: Path, merges_as_text: bool) -> None:
    source = tokenizer_json(random_checkpoint(tmp_path / "source"), merges_as_text)
    (source / "tokenizer_config.json").write_text('{"tokenizer_class": "CodeGenTokenizer"}')
    out = convert_checkpoint(source, tmp_path / "out")
    ours = Tokenizer.from_file(open_store(out).tokenizer_path)
    tiny = Tokenizer.from_file(tiny_model_folder() / "tokenizer.json")
    for text in TEXTS:
        assert ours.encode(text) == tiny.encode(text)
        assert ours.encode_plain(text) == tiny.encode_plain(text)


def test_a_folder_that_transformers_saved_converts(tmp_path: Path) -> None:
    """transformers itself writes the tokenizer, in a process of its own."""
    source = random_checkpoint(tmp_path / "source")
    program = (
        "import sys; from transformers import CodeGenTokenizer\n"
        "CodeGenTokenizer.from_pretrained(sys.argv[1]).save_pretrained(sys.argv[2])"
    )
    subprocess.run(
        [sys.executable, "-P", "-c", program, tiny_checkpoint(), tmp_path / "saved"],
        check=True,
        capture_output=True,
    )
    for name in TOKENIZER_FILES:
        (source / name).unlink()
    for path in (tmp_path / "saved").iterdir():
        shutil.copy(path, source / path.name)
    assert not (source / "vocab.json").exists()
    ours = Tokenizer.from_file(open_store(convert_checkpoint(source, tmp_path / "out")).tokenizer_path)
    tiny = Tokenizer.from_file(tiny_model_folder() / "tokenizer.json")
    for text in TEXTS:
        assert ours.encode(text) == tiny.encode(text)


@pytest.mark.parametrize(
    ("words", "change"),
    [
        ("another kind", lambda fields: fields["model"].update(type="Unigram")),
        ("another kind", lambda fields: fields.update(pre_tokenizer={"type": "Metaspace"})),
        ("another kind", lambda fields: fields.update(pre_tokenizer=None)),
        ("another kind", lambda fields: fields.update(model=[])),
        ("missing", lambda fields: fields["model"].update(vocab=[])),
        ("not a merge", lambda fields: fields["model"].update(merges=["a b c"])),
        ("not a merge", lambda fields: fields["model"].update(merges=[["a", 1]])),
        ("not a merge", lambda fields: fields["model"].update(merges=[7])),
        ("not a token", lambda fields: fields["added_tokens"].append({"content": "x"})),
        ("not a token", lambda fields: fields["added_tokens"].append({"id": "9", "content": "x"})),
        ("no row", lambda fields: fields["model"]["vocab"].update(zz=2147483648)),
        ("no row", lambda fields: fields["added_tokens"].append({"id": 2147483648, "content": "x"})),
        ("belong together", lambda fields: fields["model"]["merges"].append(["nowhere", "there"])),
    ],
)
def test_a_damaged_tokenizer_json_is_one_error(tmp_path: Path, words: str, change: Any) -> None:
    source = tokenizer_json(random_checkpoint(tmp_path / "source"))
    fields = json.loads((source / "tokenizer.json").read_text())
    change(fields)
    (source / "tokenizer.json").write_text(json.dumps(fields))
    with pytest.raises(MossError, match=words):
        convert_checkpoint(source, tmp_path / "out")


def test_look_alikes_are_named_for_what_they_are(tmp_path: Path) -> None:
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text("{}")
    (adapter / "adapter_model.safetensors").write_bytes(b"")
    with pytest.raises(MossError, match=r"adapter \(LoRA\).*merge_and_unload"):
        open_local(adapter)
    snapshot = tmp_path / "cache" / "models--fnlp--moss" / "snapshots" / "0123"
    random_checkpoint(snapshot)
    for folder in (tmp_path / "cache", tmp_path / "cache" / "models--fnlp--moss"):
        with pytest.raises(MossError, match=f"hub's cache.*{snapshot}"):
            open_local(folder)
    assert open_local(snapshot)
    weights = snapshot / "model.safetensors"
    with pytest.raises(MossError, match="is a file. Name the folder"):
        open_source(str(weights), False, tmp_path / "out")


class _LongKeys:
    """4,000 settings of one key of 4 MB, and another like it: each is compared with it to its end."""

    @staticmethod
    def pickle() -> bytes:
        key = b"X" + (4 << 20).to_bytes(4, "little") + b"k" * (4 << 20)
        begin = b"\x80\x02}" + key + b"q\x00N" + b"s" + key + b"q\x01Ns"
        return begin + (b"h\x00Ns" + b"h\x01Ns") * 2000 + b"."


def test_long_keys_are_refused_before_they_are_compared() -> None:
    from moss_jt.convert.pickle_machine import read_pickle

    with pytest.raises(MossError, match="key that is not a name"):
        read_pickle(_LongKeys.pickle(), "somewhere")


def zip_damages() -> dict[str, Any]:
    """Changes of a good torch file's bytes: (file) -> file."""

    def put(mark: bytes, at: int, value: bytes, last: bool = False) -> Any:
        def change(data: bytes) -> bytes:
            begin = data.rfind(mark) if last else data.find(mark)
            return data[: begin + at] + value + data[begin + at + len(value) :]

        return change

    return {
        "the directory's offset": put(b"PK\x05\x06", 16, b"\xf0\xff\xff\x00"),
        "the directory's size": put(b"PK\x05\x06", 12, b"\xf0\xff\xff\x00"),
        "the number of entries": put(b"PK\x05\x06", 10, b"\xff\x00"),
        "a comment that is not there": put(b"PK\x05\x06", 20, b"\x09\x00"),
        "an entry's offset": put(b"PK\x01\x02", 42, b"\x77\x00\x00\x10"),
        "an entry's sizes": put(b"PK\x01\x02", 20, b"\xff\xff\xff\x7f\xff\xff\xff\x7f"),
        "a lie about the size": put(b"PK\x01\x02", 24, b"\x10\x00\x00\x00"),
        "zip64 without its extra field": put(b"PK\x01\x02", 20, b"\xff" * 8),
        "deflate": put(b"PK\x01\x02", 10, b"\x08\x00"),
        "bz2": put(b"PK\x01\x02", 10, b"\x0c\x00"),
        "an unknown method": put(b"PK\x01\x02", 10, b"\x63\x00"),
        "encryption": put(b"PK\x01\x02", 8, b"\x01\x00"),
        "a name that is not text": put(b"PK\x01\x02", 46, b"\xff\xfe\x00"),
        "a name longer than the file": put(b"PK\x01\x02", 28, b"\xff\xff"),
        "a local header": put(b"PK\x03\x04", 0, b"PK\x03\x05"),
        "a local name": put(b"PK\x03\x04", 30, b"b"),
        "the pickle's own bytes": put(b"ctorch._utils", 7, b"Z"),
        "the last directory entry": put(b"PK\x01\x02", 0, b"PK\x01\x03", last=True),
    }


@pytest.mark.parametrize("name", zip_damages())
def test_damaged_zip_directories_are_one_error(tmp_path: Path, name: str) -> None:
    source = random_checkpoint(tmp_path / "source")
    good = torch_file(load_file(source / "model.safetensors"))
    (source / "model.safetensors").unlink()
    bad = zip_damages()[name](good)
    assert bad != good
    (source / "pytorch_model.bin").write_bytes(bad)
    with pytest.raises(MossError, match=r"pytorch_model\.bin"):
        convert_checkpoint(source, tmp_path / "out")


@pytest.mark.parametrize("method", [zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_zip_bombs_are_refused_unopened(tmp_path: Path, method: int) -> None:
    """A megabyte of zeros packs to nothing; a directory that lies about the size would make it gigabytes."""
    source = random_checkpoint(tmp_path / "source")
    (source / "model.safetensors").unlink()
    with zipfile.ZipFile(source / "pytorch_model.bin", "w", method) as archive:
        archive.writestr("archive/data.pkl", pickle.dumps({}, protocol=2) + bytes(1 << 20))
    with pytest.raises(MossError, match="compressed"):
        convert_checkpoint(source, tmp_path / "out")
