"""One step of fine-tuning on random tokens, beside what this machine's products and disk allow.

    python benchmarks/training.py MODEL --memory 8GiB --tokens 512
    python benchmarks/memory_cgroup.py --limit 3GB --cold MODEL -- python benchmarks/training.py MODEL --memory 2.8GB

In one process: the speed of float32 products (the best of NumPy's and of the operators' own), the disk's while it reads one
block after another as the ring does, then the step. The limit is the step's products at that speed, or its bytes from the
disk, whichever takes longer. The last line is one JSON object.

--layers N, --epochs 2: as moss-jt finetune; the second epoch finds the frozen front kept.
--again: the plan is told that products take no time, so that what blocks computed is computed again.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from moss_jt.backend.device import decide
from moss_jt.plan.machine import peak_memory_bytes
from moss_jt.plan.residency import ResidencyPlan, gib
from moss_jt.store.locations import model_home
from moss_jt.store.model_folder import Store, open_store
from moss_jt.train.api import planned, start
from moss_jt.train.course import CourseSettings
from moss_jt.train.dataset import DataReport, Dataset
from moss_jt.train.finetune import LearningSettings
from moss_jt.train.lora import LoraSettings
from moss_jt.train.masked_samples import TokenSample
from moss_jt.train.step_memory import TrainingNeeds
from moss_jt.train.step_time import Speeds, step_pace
from moss_jt.weights.disk_speed import disk_under, reader_for
from moss_jt.weights.page_buffer import page_buffer
from moss_jt.weights.unit_tensors import extent_of

TRIES = 4
READ_BYTES = 2 << 30


def product_rate(tokens: int, width: int) -> float:
    """Operations per second of x (tokens, width) times a matrix (width, width), the best that is at hand."""
    from moss_jt.backend.jittor import jt
    from moss_jt.kernels.cpu.training import CpuTrainingOperators
    from moss_jt.store.config import MOSS_MOON_003

    draw = np.random.default_rng(0)
    x, w = draw.random((tokens, width), np.float32), draw.random((width, width), np.float32)
    operators, x_var, w_var = CpuTrainingOperators(MOSS_MOON_003), jt.array(x), jt.array(w)
    times = []
    for _ in range(TRIES):
        for product in (lambda: x @ w, lambda: operators.multiply(x_var, w_var).sync()):
            begin = time.perf_counter()
            product()
            times.append(time.perf_counter() - begin)
    return 2 * tokens * width * width / min(times)


def disk_rate(store: Store, plan: ResidencyPlan) -> float:
    """Bytes per second of reading streamed blocks as the ring reads them; none where nothing streams."""
    streamed = [unit for unit in plan.units if not unit.resident and unit.kind == "block"]
    if not streamed:
        return float("inf")
    reader, buffer, done = reader_for(store, model_home()), page_buffer(plan.buffer_bytes), 0
    begin = time.perf_counter()
    for unit in streamed:
        reader.read(extent_of(store, unit), buffer)
        done += unit.n_bytes
        if done > READ_BYTES:
            break
    reader.close()
    return done / (time.perf_counter() - begin)


def samples(count: int, tokens: int, vocabulary: int) -> list[TokenSample]:
    """Of random tokens; the second half of each counts in the loss, as where MOSS answers."""
    draw = np.random.default_rng(1)
    targets = np.arange(tokens) >= tokens // 2
    return [TokenSample(draw.integers(0, vocabulary, tokens).astype(np.int32), targets) for _ in range(count)]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path)
    parser.add_argument("--memory", default=None)
    parser.add_argument("--tokens", type=int, default=512, help="of a step")
    parser.add_argument("--sample-tokens", type=int, default=512)
    parser.add_argument("--layers", type=int, default=None)
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--steps", type=int, default=1, help="of an epoch")
    parser.add_argument("--again", action="store_true")
    parser.add_argument("--scratch", type=Path, default=None, help="a folder on the disk that is measured")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.scratch) as out:
        print(json.dumps(measure(arguments, Path(out))))


def measure(arguments: argparse.Namespace, out: Path) -> dict[str, Any]:
    decide("cpu", "stream", 0)
    store = open_store(arguments.model)
    each = min(arguments.sample_tokens, arguments.tokens)
    count = arguments.steps * arguments.tokens // each
    data = Dataset(samples(count, each, store.config.vocab_size), [], DataReport())
    lora = LoraSettings(layers=arguments.layers)
    course = CourseSettings(steps=arguments.epochs * arguments.steps, step_tokens=arguments.tokens)
    told = Speeds(float("inf"), disk_under(store, model_home()).best) if arguments.again else None
    plan, needs = planned(store, data, lora, course, arguments.memory, told)
    speeds = Speeds(product_rate(512, min(store.config.n_embd, 4096)), disk_rate(store, plan))
    print(f"{plan}\n{needs.keeping}", flush=True)
    begin = time.perf_counter()
    training = start(
        store,
        data,
        out,
        lora=lora,
        course=course,
        learning=LearningSettings(),
        memory=arguments.memory,
        speeds=told,
    )
    loaded, steps, worked = time.perf_counter() - begin, [], time.process_time()
    for progress in training.run():
        steps.append(
            described(progress.step, progress.seconds, plan, needs, speeds, arguments, progress.result.loss)
        )
        steps[-1]["processor_s"], worked = round(time.process_time() - worked, 1), time.process_time()
        print(json.dumps(steps[-1]), flush=True)
    return {
        "model": store.path.name,
        "memory": arguments.memory,
        "gflop_per_s": round(speeds.flop_per_s / 1e9, 1),
        "disk_gb_per_s": round(speeds.disk_bytes_per_s / 1e9, 2),
        "loaded_s": round(loaded, 1),
        "planned_peak": gib(plan.peak_bytes),
        "peak": gib(peak_memory_bytes()),
        "steps": steps,
    }


def described(
    number: int,
    seconds: float,
    plan: ResidencyPlan,
    needs: TrainingNeeds,
    speeds: Speeds,
    arguments: argparse.Namespace,
    loss: float,
) -> dict[str, Any]:
    pace = step_pace(plan, needs, speeds, arguments.tokens // 2, front=number <= arguments.steps)
    return {
        "step": number,
        "seconds": round(seconds, 2),
        "tokens_per_s": round(arguments.tokens / seconds, 2),
        "limit_s": round(pace.seconds, 2),
        "products_s": round(pace.flop / speeds.flop_per_s, 2),
        "disk_s": round(pace.disk_bytes / speeds.disk_bytes_per_s, 2),
        "share": round(pace.seconds / seconds, 3),
        "loss": round(loss, 4),
    }


if __name__ == "__main__":
    main()
