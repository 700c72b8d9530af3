"""A model all of whose weights learn, as a learner of a training. Importing this starts Jittor."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from moss_jt.errors import MossError
from moss_jt.kernels.cpu.training import CpuTrainingOperators
from moss_jt.train.finetune import LearningSettings
from moss_jt.train.full_model import FullModel
from moss_jt.train.fused import OPTIMIZERS, FullSettings
from moss_jt.train.loss import StepResult
from moss_jt.train.masters import Masters
from moss_jt.train.samples import TokenSample


class FullLearner:
    """All weights of a model.

    masters    they learn in place
    tokenizer  the model's tokenizer.json, for the checkpoints that are written
    """

    def __init__(
        self,
        masters: Masters,
        tokenizer: Path,
        settings: FullSettings,
        learning: LearningSettings,
        batch_tokens: int,
        keeps: bool,
    ) -> None:
        optimizer = OPTIMIZERS[settings.optimizer](masters, learning.weight_decay)
        operators = CpuTrainingOperators(masters.config)
        self.masters, self._tokenizer = masters, tokenizer
        self.model = FullModel(masters, operators, optimizer, batch_tokens, keeps, learning.clip)
        self.arrays = {"values": masters.values, **optimizer.arrays}
        self.settings: dict[str, Any] = {"full": dataclasses.asdict(settings)}
        self.updating = False

    def learn(self, samples: Sequence[TokenSample], rate: float, step: int) -> StepResult:
        # The update is in the walk back: what is interrupted there is neither before the step nor after it.
        self.updating = True
        try:
            result = self.model.step(samples, rate, step)
        except MossError:
            self.updating = False
            raise
        self.updating = False
        return result

    def evaluate(self, samples: Sequence[TokenSample]) -> StepResult:
        return self.model.evaluate(samples)

    def write(self, folder: Path) -> None:
        self.masters.write(folder, self._tokenizer)
