"""Runs cases of the campaigns of hostile and damaged files, each by its seed, and prints one JSON line per case.

    python -m tests.support.campaign_worker checkpoints FIRST COUNT

A case ends as ``refused`` (one MossError of bounded length) or ``right`` (what an independent reading says). Anything else
is a fault. A case that takes 10 s, or 1 GiB more than the process had, ends the process.
"""

import functools
import json
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import numpy as np

from moss_jt.convert.checkpoint import open_local
from moss_jt.convert.pipeline import convert, recipe_for
from moss_jt.convert.quantize import QuantSettings, quantized_recipe
from moss_jt.errors import MossError
from moss_jt.store.checksums import verify_store
from moss_jt.store.files import read_json
from moss_jt.store.model_folder import MANIFEST, open_store, read_tensor
from moss_jt.store.quant import dequantize
from moss_jt.store.tokenizer import Tokenizer
from tests.support.golden import CONFIG, GOLDEN, golden_checkpoint, golden_gptq
from tests.support.models import stored_matrix
from tests.support.mutations import mutate
from tests.support.torch_files import torch_file

SECONDS = 10
GIB = 1 << 30
LONGEST_MESSAGE = 2000


@functools.cache
def workplace() -> Path:
    """In memory where that is possible: the campaigns wait for no disk."""
    memory = Path("/dev/shm")
    return Path(
        tempfile.mkdtemp(prefix="moss-jt-campaign-", dir=memory if os.access(memory, os.W_OK) else None)
    )


@functools.cache
def checkpoints() -> list[Path]:
    """One small checkpoint of every form that is read."""
    from safetensors.numpy import load_file, save_file

    where = workplace() / "sources"
    forms = []
    for name, write in (("dense", golden_checkpoint), ("gptq", golden_gptq)):
        single = write(where / name)
        tensors = load_file(single / "model.safetensors")
        forms.append(single)
        for kind in ("sharded", "torch", "torch-sharded", "wrapped"):
            folder = Path(shutil.copytree(single, where / f"{name}-{kind}"))
            (folder / "model.safetensors").unlink()
            forms.append(folder)
            if kind == "torch":
                (folder / "pytorch_model.bin").write_bytes(torch_file(tensors))
                continue
            if kind == "wrapped":
                (folder / "weights.pt").write_bytes(torch_file(tensors, ("model",)))
                continue
            ending = ".safetensors" if kind == "sharded" else ".bin"
            stem = "model" if kind == "sharded" else "pytorch_model"
            weight_map = {}
            for number in (0, 1):
                part = dict(list(tensors.items())[number::2])
                shard = f"{stem}-0000{number + 1}-of-00002{ending}"
                weight_map.update(dict.fromkeys(part, shard))
                if kind == "sharded":
                    save_file(part, folder / shard)
                else:
                    (folder / shard).write_bytes(torch_file(part))
            (folder / f"{stem}{ending}.index.json").write_text(json.dumps({"weight_map": weight_map}))
    alone = Path(shutil.copytree(where / "dense", where / "dense-tokenizer"))
    shutil.copy(GOLDEN / "float16" / "tokenizer.json", alone / "tokenizer.json")
    for name in ("vocab.json", "merges.txt", "added_tokens.json"):
        (alone / name).unlink()
    return [*forms, alone]


def converted(source: Path, out: Path) -> Path:
    checkpoint = open_local(source)
    convert(checkpoint, recipe_for(checkpoint), out)
    return out


def checkpoint_case(seed: int) -> tuple[str, str]:
    """A mutated checkpoint is refused, or gives what it holds."""
    draw = np.random.default_rng([1, seed])
    original = checkpoints()[draw.integers(len(checkpoints()))]
    case = workplace() / f"case-{seed}"
    source = Path(shutil.copytree(original, case / "source"))
    done = f"{original.name}: " + "; ".join(mutate(source, draw))
    out = case / "out"
    try:
        converted(source, out)
    except MossError as error:
        return _refused(error, out), done
    check_converted(source, original, out)
    return "right", done


def check_converted(source: Path, original: Path, out: Path) -> None:
    """Raises AssertionError unless the model folder holds what the checkpoint does by an independent reading."""
    from tests.support.independent_reading import expected_tensors

    store = open_store(out)
    verify_store(store)
    told, config = json.loads((source / "config.json").read_bytes()), store.config.to_json()
    for name in CONFIG:
        if told.get(name) is not None:
            assert json.loads(json.dumps(config[name])) == told[name], f"config.json: {name}"
    vocabulary = source / "vocab.json"
    if vocabulary.exists():
        tokenizer = Tokenizer.from_file(store.tokenizer_path)
        for token, number in json.loads(vocabulary.read_bytes()).items():
            assert tokenizer.id(token) == number, f"vocab.json: {token!r}"
    try:
        expected = expected_tensors(source, config)
    except Exception:  # noqa: BLE001  libraries raise of all kinds; what only they refuse must be as it was
        expected = expected_tensors(original, CONFIG)
    ours = {}
    for file in store.files:
        for local, spec in file.tensors.items():
            if local.endswith(".packed"):
                matrix = local.removesuffix(".packed")
                layer = int(spec.name.split(".")[2])
                ours[spec.name.removesuffix("packed") + "weight"] = dequantize(
                    stored_matrix(store, layer, matrix)
                )
            elif not local.endswith((".scales", ".zeros", ".input_order")):
                ours[spec.name] = np.asarray(read_tensor(file, local), np.float32)
    assert ours.keys() <= expected.keys(), sorted(ours.keys() - expected.keys())[:3]
    for name, array in ours.items():
        assert np.array_equal(array, expected[name].reshape(array.shape)), name


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@functools.cache
def folders() -> list[tuple[Path, Path, bool]]:
    """(model folder, its checkpoint, whether 0.1.0 wrote it)."""
    sources = {path.name: path for path in checkpoints()}
    (workplace() / "golden").symlink_to(sources["dense"])
    collected = []
    for name in ("dense", "gptq"):
        collected.append((converted(sources[name], workplace() / "folders" / name), sources[name], False))
    old = workplace() / "old"
    for name, write in (("float16", golden_checkpoint), ("act-order", golden_gptq)):
        source = write(old / ("golden" if name == "float16" else "golden-gptq"))
        collected.append((Path(shutil.copytree(GOLDEN / name, old / name)), source, True))
    return collected


def folder_case(seed: int) -> tuple[str, str]:
    """A mutated model folder is refused by verify unless nothing that it can know of has changed; convert repairs it."""
    draw = np.random.default_rng([2, seed])
    original, source, is_old = folders()[draw.integers(len(folders()))]
    case = workplace() / f"case-{seed}"
    folder = Path(shutil.copytree(original, case / "model"))
    done = f"{original.name}: " + "; ".join(mutate(folder, draw))
    outcome = "right"
    try:
        store = open_store(folder)
        wanted = open_store(original)
        Tokenizer.from_file(store.tokenizer_path)
        assert (store.config, store.bits, store.group_size) == (wanted.config, wanted.bits, wanted.group_size)
        assert [file.tensors for file in store.files] == [file.tensors for file in wanted.files]
        verify_store(store)
        for name, data in contents(original).items():
            if name == MANIFEST:
                same = json.loads((folder / name).read_bytes()) == json.loads(data)
                assert same or is_old, name
            elif not is_old:
                assert (folder / name).read_bytes() == data, name
            elif name.endswith(
                ".safetensors"
            ):  # no checksum covers the spaces of a header; its tensors are compared above
                begin = 8 + int.from_bytes(data[:8], "little")
                assert (folder / name).read_bytes()[begin:] == data[begin:], name
    except MossError as error:
        outcome = _refused(error, None)
    _check_repair(source, original, folder, is_old)
    return outcome, done


def _check_repair(source: Path, original: Path, folder: Path, is_old: bool) -> None:
    blocked = any(path.is_dir() for path in folder.iterdir())
    strange = is_old and _identity(folder) != _identity(original)
    try:
        converted(source, folder)
    except MossError:
        assert blocked or strange, "the folder could not be repaired"
        return
    verify_store(open_store(folder))
    wanted = contents(original)
    for name, data in contents(folder).items():
        if not is_old:
            assert data == wanted[name], f"{name} after the repair"
        elif name.endswith(".safetensors"):
            begin = 8 + int.from_bytes(data[:8], "little")
            assert data[begin:] == wanted[name][begin:], f"{name} after the repair"


def _identity(folder: Path) -> object:
    try:
        return read_json(folder / MANIFEST).get("identity")
    except MossError:
        return None


def kill_case(seed: int) -> tuple[str, str]:
    """A conversion that is killed one to four times ends with the same bytes as one that is not."""
    chance = random.Random(seed)
    kind = chance.choice(("dense", "gptq", "rtn", "calibrated", "repair"))
    complete, seconds = _undisturbed(kind)
    out = workplace() / f"case-{seed}" / "out"
    if kind == "repair":
        shutil.copytree(complete, out)
        os.truncate(out / "block-01.safetensors", 5000)
    kills = 0
    for _ in range(chance.randint(1, 4)):
        child = os.fork()
        if child == 0:
            signal.alarm(0)
            with open(os.devnull, "w") as nothing:
                os.dup2(nothing.fileno(), 2)
            try:
                _convert_kind(kind, out)
            finally:
                os._exit(0)
        time.sleep(chance.uniform(0, 1.1) * seconds)
        os.kill(child, signal.SIGKILL)
        kills += os.waitpid(child, 0)[1] == signal.SIGKILL
    _convert_kind(kind, out)
    assert contents(out) == contents(complete), sorted(
        name
        for name in contents(out).keys() | contents(complete).keys()
        if contents(out).get(name) != contents(complete).get(name)
    )
    return "right", f"{kind}, killed {kills} times"


@functools.cache
def _undisturbed(kind: str) -> tuple[Path, float]:
    """The folder that a conversion gives, and how long it takes."""
    out = workplace() / "whole" / kind
    begin = time.perf_counter()
    _convert_kind(kind, out)
    return out, time.perf_counter() - begin


def _convert_kind(kind: str, out: Path) -> None:
    sources = {path.name: path for path in checkpoints()}
    checkpoint = open_local(sources["gptq" if kind == "gptq" else "dense"])
    recipe = recipe_for(checkpoint)
    if kind == "rtn":
        recipe = quantized_recipe(recipe, checkpoint.config, QuantSettings(8, 32, "rtn"), out, None)
    elif kind == "calibrated":
        tokens = np.random.default_rng(0).integers(0, 256, 200).astype(np.int32)
        settings = QuantSettings(4, 32, "gptq", act_order=True)
        recipe = quantized_recipe(recipe, checkpoint.config, settings, out, tokens)
    convert(checkpoint, recipe, out)


def _refused(error: MossError, out: Path | None) -> str:
    assert len(str(error)) <= LONGEST_MESSAGE, f"a message of {len(str(error))} characters"
    assert out is None or not os.path.lexists(out / MANIFEST), "a refused conversion looks finished"
    return "refused"


CASES: dict[str, Callable[[int], tuple[str, str]]] = {
    "checkpoints": checkpoint_case,
    "folders": folder_case,
    "kills": kill_case,
}


def limit_memory() -> None:
    """What this process may take from here on: 1 GiB more than it has."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * os.sysconf("SC_PAGE_SIZE") + GIB
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    threading.stack_size(
        8 << 20
    )  # Jittor, in the process that runs the tests, raises what is inherited to 512 MiB


def main() -> None:
    kind, first, count = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    checkpoints()
    if kind == "folders":
        folders()
    if kind == "checkpoints":
        import torch  # before memory is counted

        torch.set_num_threads(1)
    limit_memory()
    try:
        for seed in range(first, first + count):
            print(json.dumps({"begun": seed}), flush=True)
            signal.alarm(SECONDS)
            begin = time.perf_counter()
            try:
                outcome, done = CASES[kind](seed)
            except BaseException:  # noqa: BLE001  whatever is not a clean refusal is what is looked for
                outcome, done = "fault", traceback.format_exc()
            seconds = time.perf_counter() - begin
            signal.alarm(0)
            print(
                json.dumps({"seed": seed, "outcome": outcome, "seconds": seconds, "done": done}), flush=True
            )
            shutil.rmtree(workplace() / f"case-{seed}", ignore_errors=True)
    finally:
        shutil.rmtree(workplace(), ignore_errors=True)


if __name__ == "__main__":
    main()
