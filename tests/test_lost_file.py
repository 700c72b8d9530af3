"""A file that becomes shorter while it is in use: one line that says so, not a bus error, whoever reads it and whenever.

Each case is a command in a process of its own, which finds files cut the moment that a function is called.
"""

import os
import re
import shutil
from pathlib import Path

import numpy as np
import pytest

from moss_jt.backend.build import build_folder, is_built
from moss_jt.backend.device import SWAP_SWITCH
from moss_jt.store.manifest import MANIFEST
from tests.support.cut_files import last_line
from tests.support.models import random_checkpoint, tiny_model_folder
from tests.support.random_models import WIDE, random_folder
from tests.support.torch_files import torch_file


def generate(folder: Path, *options: str) -> list[str]:
    prompt = " ".join(str(number) for number in range(80))
    return ["generate", str(folder), "--prompt", prompt, "--max-new-tokens", "2", "--greedy", *options]


FORWARD = "moss_jt.engine.model.Model.forward_many"


@pytest.mark.parametrize(
    ("where", "files", "size"),
    [
        ("moss_jt.engine.load.warm_up", "head*", 4096),  # the norm and the bias, which NumPy reads
        ("moss_jt.loading.open_host_units", "block-01*", 4096),
        ("moss_jt.engine.load.warm_up", "embedding*", 4096),
        ("moss_jt.loading.open_host_units", "block-00*", 0),
        ("moss_jt.backend.device.begin_meanwhile", "block-01*", 4096),  # mapped, and not read yet
        (FORWARD, "embedding*", 4096),
    ],
)
def test_weights_that_shrink_while_they_are_loaded(tmp_path: Path, where: str, files: str, size: int) -> None:
    folder = shutil.copytree(tiny_model_folder(), tmp_path / "model")
    told = last_line(where, folder, files, *generate(folder), size=size)
    assert str(folder / files.rstrip("*")) in told and "ends early: it became shorter" in told


@pytest.mark.parametrize("files", ["block-*", "head*"])
def test_weights_that_shrink_while_the_model_computes(tmp_path: Path, files: str) -> None:
    folder = shutil.copytree(tiny_model_folder(), tmp_path / "model")
    told = last_line(FORWARD, folder, files, *generate(folder))
    assert told.startswith("moss-jt: error: a file of the model became shorter while it was in use")


@pytest.mark.parametrize(
    ("where", "files", "calls"),
    [("moss_jt.engine.load.warm_up", "block-0[1-9]*", 1), (FORWARD, "block-*", 2)],
)
def test_weights_that_shrink_while_they_stream(tmp_path: Path, where: str, files: str, calls: int) -> None:
    folder = shutil.copytree(random_folder(WIDE), tmp_path / "model")
    shutil.copy(tiny_model_folder() / "tokenizer.json", folder)
    told = last_line(where, folder, files, *generate(folder, "--memory", "300MiB"), calls=calls)
    assert re.search(r"block-\d\d.safetensors ends early", told)


def test_weights_that_shrink_while_jittor_takes_them_over_to_swap(tmp_path: Path) -> None:
    built = build_folder().with_name("moss-jt-swap")
    if not is_built(built) and os.environ.get("MOSS_JT_TEST_SWAP") != "1":
        pytest.skip("Jittor is not built for swapping here; MOSS_JT_TEST_SWAP=1 builds it (1 to 3 minutes)")
    folder = shutil.copytree(tiny_model_folder(), tmp_path / "model")
    options = generate(folder, "--offload", "swap", "--memory", "2GiB")
    environment = {key: value for key, value in os.environ.items() if key != "cache_name"}
    told = last_line(
        "moss_jt.engine.load.SwappedTensors",
        folder,
        "block-02*",
        *options,
        environment={**environment, SWAP_SWITCH: "1"},
    )
    assert "block-02.safetensors ends early" in told


def test_a_folder_that_shrinks_while_it_is_verified(tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_model_folder(), tmp_path / "model")
    told = last_line("moss_jt.commands.verify.verify_store", folder, "block-01*", "verify", folder)
    assert "block-01.safetensors ends early: it became shorter" in told


@pytest.mark.parametrize("form", ["safetensors", "torch", "folder"])
def test_a_source_that_shrinks_while_it_is_converted(tmp_path: Path, form: str) -> None:
    """The header was read, the weights not yet; and a model folder that is quantized."""
    source = random_checkpoint(tmp_path / "source")
    files, options = "*.safetensors", ["--bits", "16"]
    if form == "folder":
        source, files = shutil.copytree(tiny_model_folder(), tmp_path / "model"), "block-01*"
        options = ["--bits", "8"]
    if form == "torch":
        from safetensors.numpy import load_file

        tensors: dict[str, np.ndarray] = load_file(source / "model.safetensors")
        (source / "model.safetensors").unlink()
        (source / "pytorch_model.bin").write_bytes(torch_file(tensors))
        files = "*.bin"
    arguments = ["convert", source, "--out", tmp_path / "out", *options]
    told = last_line("moss_jt.convert.pipeline.write_file", source, files, *arguments)
    assert "ends early, inside" in told
    assert not (tmp_path / "out" / MANIFEST).exists()
