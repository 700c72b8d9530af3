"""What an adapter learns on a card and, with the same settings, on the processor: a little, for kernels in emulation are slow."""

from dataclasses import replace
from typing import Any

import numpy as np

from moss_jt.train.course import CourseSettings
from moss_jt.train.dataset import DataReport, Dataset
from moss_jt.train.finetune import LearningSettings
from moss_jt.train.lora import LoraSettings
from moss_jt.train.samples import TokenSample
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
