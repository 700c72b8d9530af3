"""A model all of whose weights learn, as a learner of a training. Importing this starts Jittor."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from moss_jt.kernels.cpu.training import CpuTrainingOperators
from moss_jt.train.finetune import LearningSettings
from moss_jt.train.full_step import FullModel
from moss_jt.train.fused_optimizers import OPTIMIZERS, FullSettings
from moss_jt.train.loss import StepResult
from moss_jt.train.masked_samples import TokenSample
from moss_jt.train.master_weights import Masters
from moss_jt.train.step_memory import FullNeeds


class FullLearner:
    """All weights of a model.

    masters    they learn in place
    tokenizer  the model's tokenizer.json, for the checkpoints that are written
    needs      what of a step is held in memory
    """

    def __init__(
        self,
        masters: Masters,
        tokenizer: Path,
        settings: FullSettings,
        learning: LearningSettings,
        needs: FullNeeds,
    ) -> None:
        optimizer = OPTIMIZERS[settings.optimizer](masters, learning.weight_decay)
        operators = CpuTrainingOperators(masters.config)
        self.masters, self._tokenizer = masters, tokenizer
        self.model = FullModel(
            masters, operators, optimizer, needs.batch_tokens, needs.keeps, needs.gathers, learning.clip
        )
        self.arrays = {"values": masters.values, **optimizer.arrays}
        self.settings: dict[str, Any] = {"full": dataclasses.asdict(settings)}
        self.updating = False

    def learn(self, samples: Sequence[TokenSample], rate: float, step: int) -> StepResult:
        return self.model.step(samples, rate, step, before_update=self._begin)

    def evaluate(self, samples: Sequence[TokenSample]) -> StepResult:
        return self.model.evaluate(samples)

    def _begin(self) -> None:
        self.updating = True

    def write(self, folder: Path) -> None:
        self.masters.write(folder, self._tokenizer)
