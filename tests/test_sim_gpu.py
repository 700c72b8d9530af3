"""``--gpu`` from end to end on a simulated CUDA runtime: Jittor's own CUDA build, without a GPU. See tests/emulation/sim_gpu.py.

The first run compiles Jittor for it (three minutes on two cores); MOSS_JT_TEST_SIM_GPU=0 leaves all of that out. Swapping needs yet
another build and runs with MOSS_JT_TEST_SWAP=1.
"""

import ctypes
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks.random_model import write_random_model
from moss_jt import Moss
from moss_jt.backend.device import DEVICE_SWITCH, MANAGED_SWITCH, SWAP_SWITCH
from moss_jt.convert.folder_source import folder_recipe
from moss_jt.convert.pipeline import convert
from moss_jt.convert.quantize import QuantSettings, quantized_recipe
from moss_jt.kernels.needs import CudaNeeds
from moss_jt.store.model_folder import open_store
from moss_jt.store.sizes import MIB, sizes_of_store
from moss_jt.train.lora import LoraSettings
from moss_jt.train.peft_files import read_adapter
from tests.emulation import sim_gpu
from tests.support.adapters import random_adapter
from tests.support.cut_files import last_line
from tests.support.gpu_runs import (
    IN_INT8,
    ROOT,
    STREAMED,
    SWAPPED,
    UNIFIED,
    Run,
    environment_with,
    run_on_gpu,
    run_python,
)
from tests.support.learned_on_card import LEARNER, check_learning
from tests.support.models import tiny_model_folder
from tests.support.plans import plan_gpu
from tests.support.random_models import SMALL, random_folder

FREE = sim_gpu.MEMORY - sim_gpu.CONTEXT  # of the card, for this and other programs
PROMPTS = [list(range(3, 28)), [5, 9, 200]]
ORDERS = [
    {"SIM_GPU_SEED": "0", "SIM_GPU_EAGER": "0", "SIM_GPU_FAVOUR": "default"},
    {"SIM_GPU_SEED": "1", "SIM_GPU_EAGER": "0.3"},
    {"SIM_GPU_SEED": "2", "SIM_GPU_EAGER": "0.5", "SIM_GPU_FAVOUR": "others"},
]
# Each takes half a minute with a model: `make test` takes the last one, `make test-all` all of them.
IN_TURN = [
    pytest.param(ORDERS[0], id="computation first", marks=pytest.mark.long),
    pytest.param(ORDERS[1], id="either", marks=pytest.mark.long),
    pytest.param(ORDERS[2], id="copies first"),
]
with_jittor = pytest.mark.skipif(
    os.environ.get("MOSS_JT_TEST_SIM_GPU") == "0", reason="MOSS_JT_TEST_SIM_GPU=0: no second build of Jittor"
)


@pytest.fixture(scope="module")
def environment() -> dict[str, str]:
    return sim_gpu.build()


# What the runtime itself allows, in a process each, for it is configured when it is first called.
RULES = """
import ctypes, os, sys
cuda = ctypes.CDLL(os.environ["SIM_GPU_CUDART"])
def made(function, *arguments):
    handle = ctypes.c_void_p()
    assert getattr(cuda, function)(ctypes.byref(handle), *arguments) == 0
    return handle
size = ctypes.c_size_t(64)
device, host, other = made("cudaMalloc", size), made("cudaMallocHost", size), ctypes.create_string_buffer(64)
stream, event = made("cudaStreamCreateWithFlags", 1), made("cudaEventCreateWithFlags", 2)
IN, OUT = 1, 2
def fill(value):
    ctypes.memset(host, value, 64)
def copy_in():
    assert cuda.cudaMemcpyAsync(device, host, size, IN, stream) == 0
def copy_out():
    "To memory that is not pinned: this waits for the default stream, and for nothing else."
    assert cuda.cudaMemcpyAsync(other, device, size, OUT, None) == 0
    return set(other.raw)
"""


def rules(program: str, environment: dict[str, str], **more: str) -> str:
    done = run_python(RULES + program, [], {**environment, "SIM_GPU_EAGER": "0", **more}, 60)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_fresh_memory_is_no_number_and_limited(environment: dict[str, str]) -> None:
    program = """
print(copy_out() == {255}, cuda.cudaMalloc(ctypes.byref(ctypes.c_void_p()), ctypes.c_size_t(int(os.environ["SIM_GPU_MEMORY"]))),
      cuda.cudaStreamCreateWithFlags(ctypes.byref(ctypes.c_void_p()), 0), cuda.cudaHostRegister(host, size, 0))
"""
    assert rules(program, environment) == "True 2 801 712"


def test_wrong_memory_ends_the_program(environment: dict[str, str]) -> None:
    for program, message in (
        ("cuda.cudaMemcpy(host, other, size, IN)", "none of its memory"),
        ("cuda.cudaMemcpy(device, other, ctypes.c_size_t(65), IN)", "none of its memory"),
        (
            "cuda.cudaHostRegister(other, size, 0)\ncuda.cudaMemcpyAsync(device, other, size, IN, stream)\n"
            "cuda.cudaHostUnregister(other)",
            "while a copy reads it",
        ),
        (
            "cuda.cudaStreamWaitEvent(stream, event, 0)\ncuda.cudaEventRecord(event, stream)\n"
            "cuda.cudaDeviceSynchronize()\nprint('fine', file=sys.stderr)\nsys.exit(70)",
            "fine",
        ),
    ):
        done = run_python(RULES + program, [], {**environment, "SIM_GPU_EAGER": "0"}, 60)
        assert done.returncode == 70 and message in done.stderr, (program, done)


def test_a_copy_reads_its_source_when_it_runs_and_streams_wait_only_for_events(
    environment: dict[str, str],
) -> None:
    program = """
fill(1); copy_in(); fill(2)
early = copy_out()
cuda.cudaEventRecord(event, stream); cuda.cudaStreamWaitEvent(None, event, 0)
fill(3)
print([sorted(early), sorted(copy_out())])
"""
    seen = [json.loads(rules(program, environment, SIM_GPU_SEED=str(seed))) for seed in range(12)]
    early, late = (set().union(*(pair[index] for pair in seen)) for index in (0, 1))
    assert early == {255, 2}, "nobody has waited for the copy: it is done or not, or in part"
    assert late == {2, 3}, (
        "all of it is done, early or late, and never with what the memory held when it was queued"
    )
    late = set(json.loads(rules(program, environment, SIM_GPU_FORGET="copy"))[1])
    assert late == {255}


@pytest.fixture(scope="module")
def resident(environment: dict[str, str]) -> Run:
    return run_on_gpu(
        tiny_model_folder(), STREAMED[:1], PROMPTS, {**environment, "SIM_GPU_EAGER": "1"}, 1200
    )[0]


@with_jittor
def test_the_cpu_s_tokens_and_logits(resident: Run) -> None:
    with Moss.load(tiny_model_folder(), memory="4GiB", context=96) as moss:
        for prompt, actual in zip(PROMPTS, resident.token_ids, strict=True):
            answer = moss.generate(prompt, max_new_tokens=6, temperature=0)
            assert all(isinstance(piece, str) for piece in answer)
            assert answer.token_ids == actual
        logits = moss.logits(PROMPTS[0])
    # A prompt of 25 tokens goes through cuBLAS, which takes its inputs rounded to float16.
    assert np.abs(resident.logits - logits).max() < 1e-3 * np.abs(logits).max()


@with_jittor
@pytest.mark.parametrize("order", IN_TURN)
def test_every_plan_gives_the_resident_model_s_bits_in_any_order(
    resident: Run, environment: dict[str, str], order: dict[str, str]
) -> None:
    for run in run_on_gpu(tiny_model_folder(), STREAMED, PROMPTS, {**environment, **order}):
        assert run.token_ids == resident.token_ids, run.case
        np.testing.assert_array_equal(run.logits, resident.logits, str(run.case))
        assert run.used <= run.budget, run.case


@with_jittor
@pytest.mark.long
def test_a_cache_in_int8_gives_the_same_bits_for_every_plan(environment: dict[str, str]) -> None:
    """A prompt of a whole page and a few tokens: resident, streamed with drafts, and all of it from disk."""
    folder, text = random_folder(SMALL), list(range(3, 80))  # whose heads have 32 dimensions
    with Moss.load(folder, memory="4GiB", context=96, cache_bits=8) as moss:
        expected = moss.logits(text)
    runs = run_on_gpu(folder, IN_INT8, [text, *PROMPTS], {**environment, **ORDERS[2]}, text=text)
    for run in runs:
        assert run.token_ids == runs[0].token_ids, run.case
        np.testing.assert_array_equal(run.logits, runs[0].logits, str(run.case))
        assert run.used <= run.budget, run.case
    # A number that lies between two may be either; a page of the prompt goes through cuBLAS, with inputs in float16.
    assert np.abs(runs[0].logits - expected).max() < 2e-2 * np.abs(expected).max()


@with_jittor
def test_the_first_weights_wait_for_what_still_runs_in_their_memory(
    resident: Run, environment: dict[str, str]
) -> None:
    """The operators were tried out before, in memory that Jittor then gives to the weights; here that work is still queued."""
    folder = tiny_model_folder()
    options = ["--prompt", "1 + 1 =", "--greedy", "--max-new-tokens", "6", "--json", "--gpu"]
    late = {**environment, "SIM_GPU_EAGER": "0", "SIM_GPU_FAVOUR": "others"}
    out, error = command(["generate", str(folder), *options], late).communicate(timeout=200)
    with Moss.load(folder, memory="4GiB") as moss:
        answer = moss.generate("1 + 1 =", max_new_tokens=6, temperature=0)
        assert all(isinstance(piece, str) for piece in answer)
    assert json.loads(out)["token_ids"] == answer.token_ids, error


# Two texts that fill the cache each take turns in it, so that each is written out and read back.
PAGES = """
import json, sys
import numpy as np
from moss_jt import Moss
from moss_jt.engine.sampling import SamplingParams
from moss_jt.engine.sequence import Sequence
from moss_jt.kernels.cuda.operators import CudaOperators
moved = {"read_page": 0, "write_page": 0}
def counted(name):
    real = getattr(CudaOperators, name)
    def call(*arguments):
        moved[name] += 1
        return real(*arguments)
    setattr(CudaOperators, name, call)
for name in moved:
    counted(name)
options = {"device": "gpu", "context": 128, "draft": "off", "parallel": int(sys.argv[2]), "prompt_cache": 0}
with Moss.load(sys.argv[1], cache_bits=int(sys.argv[3]), **options) as moss:
    model, answers = moss.engine.model, []
    like = model.read_page(0)
    shape, dtype = like.shape, like.dtype
    pages = [np.random.default_rng(page).integers(0, 200, shape).astype(dtype) for page in range(model.pages)]
    for page, data in enumerate(pages):
        model.write_page(page, data)
    same = [bool((model.read_page(page) == data).all()) for page, data in enumerate(pages)]
    moved = dict.fromkeys(moved, 0)
    texts = [Sequence(moss.engine), Sequence(moss.engine)]
    for turn in range(2):
        for number, text in enumerate(texts):
            text.extend(range(3 + 40 * number, 80 + 40 * number) if turn == 0 else [7 + number, 9])
            answers.append(list(text.decode(SamplingParams(temperature=0), 6)))
print(json.dumps({"answers": answers, "same": same, "moved": moved}))
"""


@with_jittor
@pytest.mark.parametrize("order", IN_TURN[::2])
@pytest.mark.parametrize("cache_bits", [16, pytest.param(8, marks=pytest.mark.long)])
def test_pages_of_the_cache_go_to_the_host_and_back(
    resident: Run, environment: dict[str, str], cache_bits: int, order: dict[str, str]
) -> None:
    found = []
    for parallel in ("2", "1"):
        decided = {**environment, **order, DEVICE_SWITCH: "gpu"}  # the program imports operators first
        folder = tiny_model_folder() if cache_bits == 16 else random_folder(SMALL)
        done = run_python(PAGES, [str(folder), parallel, str(cache_bits)], decided, 300)
        assert done.returncode == 0, done.stderr
        found.append(json.loads(done.stdout.splitlines()[-1]))
    roomy, crowded = found
    assert all(roomy["same"] + crowded["same"])
    assert roomy["moved"] == {"read_page": 0, "write_page": 0}
    assert min(crowded["moved"].values()) >= 2
    assert crowded["answers"] == roomy["answers"]


# The copy on the card, the model resident, from the host and from disk; as much of the card as the plan for that needs.
DRAFTS = """
import json, sys
from pathlib import Path
from moss_jt import Moss
from moss_jt.engine.sampling import SamplingParams
from moss_jt.kernels.needs import CudaNeeds
from moss_jt.plan import placement
from moss_jt.plan.residency import Copy
from moss_jt.store.model_folder import open_store
from moss_jt.store.sizes import sizes_of_store
placement.resident_memory_bytes = lambda: 0
folder, copied = Path(sys.argv[1]), Path(sys.argv[2])
sys.path.append(sys.argv[3])
from tests.support.plans import plan_gpu
def answers(footprint, **options):
    with Moss.load(folder, device="gpu", context=96, prompt_cache=0, **options) as moss:
        if moss.copy is not None:
            moss.copy.adaptive, moss.copy.longest = False, 6
        said, drafted, accepted = [], 0, 0
        for seed, temperature in enumerate((0.0, 0.9)):
            text = moss.session()
            text.drafter = None
            text.extend(range(3, 28))
            said.append(list(text.decode(SamplingParams(temperature=temperature, seed=seed), 20)))
            drafted, accepted = drafted + text.timing.drafted, accepted + text.timing.accepted
        return {"said": said, "drafted": drafted, "accepted": accepted, "streams": moss.plan.streams,
                "tiers": sorted({unit.tier for unit in moss.plan.units}), "footprint": moss.plan.footprint_bytes}
told = [answers(0, draft_model="off")]
sizes, other = sizes_of_store(open_store(folder)), open_store(copied)
copy = Copy(sizes_of_store(other), CudaNeeds(other.config, other.bits))
limits = {"footprint_bytes": told[0]["footprint"], "copy": copy}
everything = plan_gpu(sizes, 96, 1 << 40, 1 << 40, **limits)
for share, on_host in ((1, 1), (0.25, 1), (0, 0)):
    budget = everything.peak_bytes
    if share < 1:
        budget += 2 * max(sizes.block_bytes) - int((1 - share) * sum(sizes.block_bytes))
    placed = plan_gpu(sizes, 96, budget, 1 << 40, **limits)
    host = placement.GPU_LATER_BYTES + 2 * placed.buffer_bytes + on_host * sum(sizes.block_bytes)
    told.append(answers(told[0]["footprint"], draft_model=copied, gpu_memory=budget, host_memory=host))
print(json.dumps(told))
"""


@with_jittor
@pytest.mark.long
@pytest.mark.parametrize("order", IN_TURN)
def test_a_copy_that_drafts_changes_nothing(
    resident: Run, environment: dict[str, str], order: dict[str, str], tmp_path: Path
) -> None:
    """Greedy and sampled, the copy on the card, the model there or streaming from the host or from disk."""
    source, recipe = folder_recipe(tiny_model_folder())
    settings = QuantSettings(4, 96, "rtn")
    copied = tmp_path / "int4"
    convert(source, quantized_recipe(recipe, source.config, settings, copied, None), copied)
    decided = {**environment, **order, DEVICE_SWITCH: "gpu"}
    done = run_python(DRAFTS, [str(tiny_model_folder()), str(copied), str(ROOT)], decided, 300)
    assert done.returncode == 0, done.stderr
    expected, *drafting = json.loads(done.stdout.splitlines()[-1])
    assert [one["tiers"] for one in drafting] == [["device"], ["device", "host"], ["device", "disk"]]
    for one in drafting:
        assert one["said"] == expected["said"] and one["drafted"] > one["accepted"] > 10


@with_jittor
def test_unified_memory_gives_them_too(resident: Run, environment: dict[str, str]) -> None:
    run = run_on_gpu(tiny_model_folder(), [UNIFIED], PROMPTS, {**environment, **ORDERS[0]})[0]
    np.testing.assert_array_equal(run.logits, resident.logits)


@with_jittor
@pytest.mark.skipif(
    os.environ.get("MOSS_JT_TEST_SWAP") != "1", reason="MOSS_JT_TEST_SWAP=1 builds Jittor for swapping"
)
def test_jittor_s_swapping_gives_them_too(resident: Run, environment: dict[str, str]) -> None:
    run = run_on_gpu(tiny_model_folder(), [SWAPPED], PROMPTS, {**environment, **ORDERS[1]}, 1200)[0]
    np.testing.assert_array_equal(run.logits, resident.logits)


@with_jittor
@pytest.mark.parametrize("forgotten", ["wait", "copy", "record", "default wait", "default record"])
def test_what_our_copies_forget_is_seen(resident: Run, environment: dict[str, str], forgotten: str) -> None:
    """A planted fault in the runtime gives another answer, or none, in some order."""
    for order, case in itertools.product(ORDERS, (STREAMED[5], STREAMED[2])):
        try:
            faulty = {**environment, **order, "SIM_GPU_FORGET": forgotten}
            run = run_on_gpu(tiny_model_folder(), [case], PROMPTS, faulty)[0]
        except AssertionError as error:
            assert "is not a number" in str(error) or "simulated GPU: " in str(error)
            return
        if (run.logits != resident.logits).any():
            return
    pytest.fail("nobody noticed")


@with_jittor
@pytest.mark.parametrize("bits", [8, 4])
def test_quantised_models_stream_to_the_same_bits(
    resident: Run, environment: dict[str, str], bits: int
) -> None:
    runs = run_on_gpu(random_folder(SMALL, bits), [STREAMED[0], STREAMED[4]], [list(range(26))], environment)
    np.testing.assert_array_equal(runs[0].logits, runs[1].logits)
    assert runs[0].token_ids == runs[1].token_ids


# The model alone and with each of two adapters: everything on the card, then streaming. A prompt of a whole page and a few tokens.
ADAPTERS = """
import sys
import numpy as np
from moss_jt import Moss
folder, out, *adapters = sys.argv[1:]
options = {"device": "gpu", "context": 128, "draft": "off", "parallel": 2, "prompt_cache": 0, "adapters": adapters}
text, limit, told = list(range(3, 80)), None, {}
for place in ("resident", "streams"):
    with Moss.load(folder, gpu_memory=limit, **options) as moss:
        assert moss.plan.streams == (place == "streams")
        for name in (None, *moss.adapters):
            told[f"{place} {name}"] = moss.logits(text, adapter=name)
        sizes = moss.plan.sizes
        limit = moss.plan.peak_bytes + 2 * max(sizes.block_bytes) - moss.plan.bytes_on("device") * 2 // 3
        assert moss.plan.adapter_bytes > 0
np.savez(out, **told)
"""


@with_jittor
@pytest.mark.long
def test_adapters_on_the_card_say_what_they_say_on_the_processor(
    resident: Run, environment: dict[str, str], tmp_path: Path
) -> None:
    folder = tiny_model_folder()
    config = open_store(folder).config
    for name, settings in (
        ("one", LoraSettings(3)),
        ("two", LoraSettings(4, layers=2, targets=("out", "fc_in"))),
    ):
        random_adapter(tmp_path / name, config, settings, 1, 0.15)
    names, out = [None, "one", "two"], tmp_path / "logits.npz"
    paths = [str(tmp_path / name) for name in names if name]
    done = run_python(ADAPTERS, [str(folder), str(out), *paths], {**environment, **ORDERS[1]}, 300)
    assert done.returncode == 0, done.stderr
    actual = np.load(out)
    with Moss.load(folder, memory="4GiB", context=128, draft="off", adapters=paths) as moss:
        expected = {name: moss.logits(list(range(3, 80)), adapter=name) for name in names}
    base = expected[None]
    for name in names:
        own, exact = actual[f"resident {name}"], expected[name]
        np.testing.assert_array_equal(own, actual[f"streams {name}"], str(name))
        assert np.abs(own - exact).max() < 2e-3 * np.abs(exact).max(), name
        assert name is None or np.abs(exact - base).max() > 0.1 * np.abs(base).max()


@with_jittor
@pytest.mark.long
@pytest.mark.parametrize("bits", [16, 4])
def test_an_adapter_learns_on_the_card_what_it_learns_on_the_processor(
    resident: Run, environment: dict[str, str], bits: int, tmp_path: Path
) -> None:
    """Everything on the card; then streaming, interrupted after a step and gone on with in another process: the same bits."""
    check_learning(
        random_folder(LEARNER, bits), tmp_path, environment, ({"SIM_GPU_EAGER": "1"}, ORDERS[2], ORDERS[0])
    )


@with_jittor
@pytest.mark.long
def test_the_command_line_teaches_on_the_card(
    resident: Run, environment: dict[str, str], tmp_path: Path
) -> None:
    lines = [json.dumps({"text": f"{n} and {n} are {2 * n}."}) for n in range(4)]
    (tmp_path / "data.jsonl").write_text("\n".join(lines))
    options = ["--gpu", "--steps", "2", "--step-tokens", "16", "--layers", "1", "--rank", "2"]
    out = ["--out", str(tmp_path / "adapter")]
    process = command(
        ["finetune", str(tiny_model_folder()), str(tmp_path / "data.jsonl"), *out, *options], environment
    )
    _, error = process.communicate(timeout=600)
    assert process.returncode == 0, error
    learned = read_adapter(tmp_path / "adapter", open_store(tiny_model_folder()).config)
    assert all(np.isfinite(learned.values)) and any(pair.b.any() for pair in learned.pairs.values())


# What forwards and backwards through a block and the loss take of the card: memory comes and goes, and nothing is computed.
MEMORY = """
import ctypes, json, os, sys
import numpy as np
from moss_jt.backend.jittor import jt
import cupy
sys.path.append(sys.argv[1])
from moss_jt.kernels.cuda.training import CudaTrainingOperators
from moss_jt.kernels.interface import BlockWeights, DenseMatrix, PackedMatrix, Region
from moss_jt.store.architecture import BLOCK
from moss_jt.train.block import BlockTrainer, on_device
from moss_jt.train.lora import Adapter, LoraSettings
from moss_jt.train.step_memory import LOSS_ROWS, CardNeeds, TrainingNeeds
from tests.support.block_oracle import geometry
class Nothing:
    def __init__(self, code, options=()):
        pass
    def get_function(self, name):
        return lambda *arguments: None
cupy.RawModule = Nothing
cupy.cuda.cublas.gemmEx = cupy.cuda.cublas.gemmStridedBatchedEx = lambda *arguments: None
most = ctypes.CDLL(os.environ["SIM_GPU_CUDART"]).sim_gpu_most
most.restype = ctypes.c_size_t
width, heads, bits, batches = json.loads(sys.argv[2])
config = geometry(width, heads, 64, n_positions=2048)
memory, slab_rows = jt.empty((1 << 27,), "uint8"), 4096
memory.sync()
def region(shape, dtype="float16"):
    return Region(memory, 0, shape, dtype)
def matrix(n, k):
    if bits == 16:
        return DenseMatrix(region((n, k)))
    scales, zeros = region((n, k // 128)), region((n, k // 128), "uint8")
    return PackedMatrix(region((n, k * bits // 8), "uint8"), scales, zeros, bits, 128, region((k, 1), "int32"))
weights = BlockWeights(**{t.field: matrix(*t.shape(config)) if t.is_matrix else region(t.shape(config)) for t in BLOCK})
adapter = Adapter(config, LoraSettings())
pairs = {target: pair for (layer, target), pair in adapter.pairs.items() if layer == 0}
operators, bias = CudaTrainingOperators(config, cupy), jt.array(np.zeros(slab_rows, np.float16))
block, head = BlockTrainer(operators, 2.0), DenseMatrix(region((slab_rows, width)))
bias.sync()
operators.begin()
most()
before, taken = most(), []
for tokens in batches:
    rows, spans = np.zeros((tokens, width), np.float32), np.array([[0, tokens]], np.int32)
    adapters = on_device(pairs)
    block.forward(jt.array(rows), weights, adapters, spans)[0].numpy()
    block.backward(jt.array(rows), jt.array(rows), weights, adapters, spans, pairs).numpy()
    some, columns = jt.array(rows[:LOSS_ROWS]), np.zeros(min(tokens, LOSS_ROWS), np.int64)
    logits = operators.product(some, head)
    with np.errstate(invalid="ignore"):
        operators.logit_summary(logits, bias, columns)
    slope = operators.logit_slope(logits, bias, columns, np.zeros(len(columns), np.float32), 1.0)
    operators.product_back(slope, head).numpy()
    del logits, slope
    taken.append(most() - before)
needs = TrainingNeeds(config, max(batches), max(batches), len(adapter.values))
print(json.dumps([taken, CardNeeds(needs, bits, slab_rows).workspace_bytes(1)]))
"""


@with_jittor
@pytest.mark.long
@pytest.mark.parametrize("bits", [16, 4])
def test_a_step_takes_no_more_of_the_card_than_is_planned(
    resident: Run, environment: dict[str, str], bits: int
) -> None:
    """Batches that grow, shrink and grow again; by the most that Jittor's allocator and the pool had at once."""
    decided = {**environment, DEVICE_SWITCH: "gpu", "SIM_GPU_EAGER": "1"}
    done = run_python(
        MEMORY, [str(ROOT), json.dumps([1536, 6, bits, [200, 512, 300, 430, 512]])], decided, 300
    )
    assert done.returncode == 0, done.stderr
    taken, planned = json.loads(done.stdout.splitlines()[-1])
    assert planned / 2 < max(taken) <= planned, taken


def command(arguments: list[str], environment: dict[str, str], **more: Any) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-P", "-m", "moss_jt", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment_with(environment),
        **more,
    )


@with_jittor
def test_the_command_line_generates_and_measures(resident: Run, environment: dict[str, str]) -> None:
    folder, environment = str(tiny_model_folder()), {**environment, "SIM_GPU_CARDS": "2"}
    options = ["--gpu", "--device", "1", "--gpu-memory", "689MiB", "--host-memory", "4GiB", "--context", "64"]
    process = command(
        ["generate", folder, "--prompt", "1 + 1 =", "--max-new-tokens", "4", "--json", *options], environment
    )
    out, error = process.communicate(timeout=200)
    assert process.returncode == 0, error
    assert json.loads(out)["new_tokens"] == 4
    process = command(
        ["bench", folder, "--contexts", "8", "--new-tokens", "2", "--repeats", "1", *options], environment
    )
    out, error = process.communicate(timeout=200)
    assert process.returncode == 0, error
    assert "This card: memory" in out and json.loads(out.splitlines()[-1])["link_gb_s"] > 0


def taken(environment: dict[str, str], n_bytes: int, after: int = 0) -> dict[str, str]:
    """With another program that takes as much of what CUDA leaves of the card, once this one has had ``after`` bytes of it."""
    return {**environment, "SIM_GPU_TAKEN": str(n_bytes), "SIM_GPU_TAKEN_AFTER": str(after)}


@with_jittor
@pytest.mark.parametrize(
    ("after", "message"),
    [
        (0, "the GPU's memory is full: another program"),  # nothing can be started at all
        (4 * MIB, "is too little for this model"),  # nothing can be loaded, not even less of it
    ],
)
def test_a_full_card_is_told(resident: Run, environment: dict[str, str], after: int, message: str) -> None:
    """Another program has taken what was free when the plan was made."""
    full = taken(environment, FREE, after)
    process = command(["generate", str(tiny_model_folder()), "--prompt", "a", "--gpu"], full)
    _, error = process.communicate(timeout=200)
    assert process.returncode == 1
    assert message in error and "nvidia-smi" in error and "Traceback" not in error


LOAD = """
import sys
from moss_jt import Moss
with Moss.load(sys.argv[1], device="gpu", context=64) as moss:
    print(moss.plan.streams)
"""


@with_jittor
def test_a_plan_that_turns_out_too_large_shrinks_once(
    resident: Run, environment: dict[str, str], tmp_path: Path
) -> None:
    """Another program comes while the weights are loaded: what has no room any longer streams."""
    # Of which the weights are more than what a plan allows for all else; nothing is computed with them.
    write_random_model(tmp_path / "large", replace(SMALL, n_embd=1024, n_inner=4096, n_layer=12))
    sizes = sizes_of_store(open_store(tmp_path / "large"))
    complete = plan_gpu(sizes, 64, 1 << 40, 1 << 40)
    card = complete.peak_bytes * 11 // 10
    left = (
        complete.bytes_on("device")
        + CudaNeeds(sizes.config, sizes.bits).workspace_bytes(complete.pass_tokens) // 2
    )
    late = taken(environment, card - sim_gpu.CONTEXT - left, 4 * MIB)
    for options, streams in ((environment, False), (late, True)):
        done = run_python(LOAD, [str(tmp_path / "large")], {**options, "SIM_GPU_MEMORY": str(card)}, 200)
        assert done.returncode == 0, done.stderr
        assert ("the card has no room for" in done.stderr) == streams, done.stderr
        assert done.stdout.split() == [str(streams)]


@with_jittor
def test_what_cuda_takes_is_measured(resident: Run, environment: dict[str, str]) -> None:
    """Twice as much as is allowed where no card is asked: the plan counts it, and the limit holds."""
    greedy = {
        **environment,
        "SIM_GPU_CONTEXT": str(2 * sim_gpu.CONTEXT),
        "SIM_GPU_MEMORY": str(2 * sim_gpu.MEMORY),
    }
    for run in run_on_gpu(tiny_model_folder(), STREAMED[:2], PROMPTS, greedy):
        assert run.used > 2 * sim_gpu.CONTEXT
        assert run.used <= run.budget and run.token_ids == resident.token_ids


@with_jittor
@pytest.mark.parametrize(
    ("offload", "switches"),
    [
        ("stream", {}),
        ("unified", {MANAGED_SWITCH: "1"}),
        pytest.param(
            "swap",
            {SWAP_SWITCH: "1"},
            marks=pytest.mark.skipif(
                os.environ.get("MOSS_JT_TEST_SWAP") != "1",
                reason="MOSS_JT_TEST_SWAP=1 builds Jittor for swapping",
            ),
        ),
    ],
)
def test_weights_that_shrink_while_the_card_takes_them_are_told(
    resident: Run, environment: dict[str, str], offload: str, switches: dict[str, str], tmp_path: Path
) -> None:
    """No operator of the CPU's is there to catch a bus error."""
    folder = shutil.copytree(tiny_model_folder(), tmp_path / "model")
    options = ["--prompt", "a", "--max-new-tokens", "2", "--gpu", "--offload", offload]
    told = last_line(
        "moss_jt.engine.gpu_load._units",
        folder,
        "block-01*",
        "generate",
        folder,
        *options,
        environment={**environment_with(environment), DEVICE_SWITCH: "gpu", **switches},
    )
    assert "block-01.safetensors ends early" in told


@with_jittor
def test_a_card_that_is_not_there_is_told(environment: dict[str, str]) -> None:
    cards = {**environment, "SIM_GPU_CARDS": "2"}
    process = command(
        ["generate", str(tiny_model_folder()), "--prompt", "a", "--gpu", "--device", "2"], cards
    )
    _, error = process.communicate(timeout=200)
    assert process.returncode == 1
    assert "there is no gpu:2: here are 2 cards, gpu:0 (simulated GPU 0), gpu:1 (simulated GPU 1)" in error


@with_jittor
def test_ctrl_c_ends_a_streamed_answer_at_once(resident: Run, environment: dict[str, str]) -> None:
    options = ["--gpu", "--gpu-memory", "689.5MiB", "--context", "512", "--draft", "off", "--greedy"]
    prompt = "<|Human|>: Hello<eoh>"
    process = command(
        ["generate", str(tiny_model_folder()), "--prompt", prompt, "--max-new-tokens", "400", *options],
        environment,
    )
    assert process.stdout is not None
    assert process.stdout.read(1)
    time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    begin = time.monotonic()
    _, error = process.communicate(timeout=60)
    assert time.monotonic() - begin < 20
    assert process.returncode == 130 and "Traceback" not in error, error


def test_the_stand_in_compiler_leaves_out_kernels(tmp_path: Path, environment: dict[str, str]) -> None:
    source = tmp_path / "a.cu"
    source.write_text(
        "__global__ void k(int* p) { if (p) { p[threadIdx.x] = warp_of_nobody(); } }\n"
        'extern "C" int f(int x) { if (x < 0) k<<<1, 2>>>(nullptr); return x + 1; }\n'
    )
    target = tmp_path / "a.so"
    flags = ["-Xcompiler", "-fPIC", "-x", "cu", "-arch=compute_86", "--use_fast_math", "-shared"]
    include = f"-I{Path(environment['nvcc_path']).parents[1]}/include"
    subprocess.run([environment["nvcc_path"], str(source), *flags, include, "-o", str(target)], check=True)
    assert ctypes.CDLL(str(target)).f(41) == 42
