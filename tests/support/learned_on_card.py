"""What an adapter learns on a card and, with the same settings, on the processor: a little, for kernels in emulation are slow."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from moss_jt.store.model_folder import open_store
from moss_jt.train.api import start
from moss_jt.train.course import CourseSettings
from moss_jt.train.dataset import DataReport, Dataset
from moss_jt.train.finetune import LearningSettings
from moss_jt.train.lora import LoraSettings
from moss_jt.train.masked_samples import TokenSample
from tests.support.gpu_runs import ROOT, run_python
from tests.support.random_models import SMALL

LEARNER = replace(SMALL, vocab_size=256, n_layer=3, n_inner=128)


def text_to_learn(seed: int, tokens: int) -> TokenSample:
    """All but its first two tokens are learned."""
    draw = np.random.default_rng(seed)
    return TokenSample(draw.integers(0, 256, tokens).astype(np.int32), np.arange(tokens) > 1)


LEARNED = Dataset([text_to_learn(n, 6 + 5 * n) for n in range(4)], [text_to_learn(9, 7)], DataReport())
SETTINGS: dict[str, Any] = {
    "lora": LoraSettings(rank=2, alpha=4.0),
    "course": CourseSettings(steps=3, step_tokens=24),
    "learning": LearningSettings(learning_rate=3e-3, evaluate_every=2),
}

# An adapter learns for three steps, or for the first of them; what it has learned, the losses, and where the weights were.
LEARNING = """
import json, sys
from itertools import islice
from pathlib import Path
import numpy as np
from moss_jt.plan import placement
placement.resident_memory_bytes = lambda: 0
root, folder, out, options = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]), json.loads(sys.argv[4])
sys.path.append(root)
from moss_jt.store.model_folder import open_store
from moss_jt.train.api import start
from tests.support.learned_on_card import LEARNED, SETTINGS
steps = options.pop("steps")
training = start(open_store(folder), LEARNED, out, device="gpu", **SETTINGS, **options)
plan = training._model.plan
losses = [progress.result.loss for progress in islice(training.run(), steps)]
training.keep()
import cupy
free, total = cupy.cuda.runtime.memGetInfo()
np.save(out / "values.npy", training.adapter.values)
host_limit = plan.host_footprint_bytes + 2 * plan.buffer_bytes + 10
limit = plan.peak_bytes + 2 * plan.sizes.block_bytes[0] - plan.bytes_on("device") * 2 // 3
print(json.dumps({"losses": losses, "used": total - free, "budget": plan.budget_bytes, "limit": limit, "host_limit": host_limit,
                  "tiers": sorted({unit.tier for unit in plan.units})}))
"""


def check_learning(
    folder: Path,
    out: Path,
    environment: dict[str, str],
    orders: tuple[dict[str, str], dict[str, str], dict[str, str]],
) -> None:
    """That everything on the card, and then streaming from the host, interrupted after a step and gone on with in another process
    from the disk, give the same bits, within their limits; and about what the processor learns.
    """

    def learned(name: str, order: dict[str, str], **options: Any) -> dict[str, Any]:
        arguments = [str(ROOT), str(folder), str(out / name), json.dumps({"steps": 3, **options})]
        done = run_python(LEARNING, arguments, {**environment, **order}, 900)
        assert done.returncode == 0, done.stderr
        told: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
        assert told["used"] <= told["budget"]
        return told

    expected = learned("resident", orders[0])
    assert expected["tiers"] == ["device"]
    first = learned("streams", orders[1], steps=1, gpu_memory=expected["limit"])
    rest = learned("streams", orders[2], gpu_memory=expected["limit"], host_memory=first["host_limit"])
    assert (first["tiers"], rest["tiers"]) == (["device", "host"], ["device", "disk"])
    assert first["losses"] + rest["losses"] == expected["losses"]
    ours, again = (np.load(out / name / "values.npy") for name in ("resident", "streams"))
    np.testing.assert_array_equal(ours, again)
    processor = start(open_store(folder), LEARNED, out / "processor", **SETTINGS, memory="4GiB")
    begun = processor.adapter.values.copy()
    losses = [progress.result.loss for progress in processor.run()]
    np.testing.assert_allclose(expected["losses"], losses, 1e-3)
    moved = processor.adapter.values - begun
    assert np.linalg.norm(ours - processor.adapter.values) <= 0.1 * np.linalg.norm(moved)
