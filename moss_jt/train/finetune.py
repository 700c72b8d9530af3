"""A training from data to an adapter: steps, evaluations, the best and the last adapter kept, and what a user sees of it."""

import dataclasses
import hashlib
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moss_jt.train.course import Course, CourseSettings
from moss_jt.train.dataset import Dataset
from moss_jt.train.lora import Adapter
from moss_jt.train.loss import StepResult
from moss_jt.train.optimizer import AdamW, Schedule, clip
from moss_jt.train.peft_files import write_adapter
from moss_jt.train.samples import TokenSample
from moss_jt.train.state import StateFolder

if TYPE_CHECKING:
    from moss_jt.train.model import TrainingModel

# A state is written after so many seconds, for what came after it is done again when the training goes on.
SAVE_SECONDS = 120.0
# Samples that an evaluation takes at most.
EVALUATED = 64


@dataclass(frozen=True)
class LearningSettings:
    """
    learning_rate, warm_up  of Schedule
    weight_decay            of AdamW
    clip                    the longest gradient
    evaluate_every          steps between evaluations; None for once an epoch's tenth, and at the end
    """

    learning_rate: float = 1e-4
    warm_up: float = 0.05
    weight_decay: float = 0.0
    clip: float = 1.0
    evaluate_every: int | None = None


@dataclass(frozen=True)
class Progress:
    """What is told after a step.

    step, total   this one's number from 1, and how many there are
    result        of the step
    tokens        that were read for it
    seconds       that it took
    evaluation    where there was one after it
    """

    step: int
    total: int
    result: StepResult
    learning_rate: float
    tokens: int
    seconds: float
    evaluation: StepResult | None = None


class Finetuning:
    """One training.

    model    with the adapter that learns
    data     samples to learn from, and to judge by
    out      the adapter's folder: the best adapter stands in it, the last one in ``last/``
    base     the name of the model
    about    what else makes this training this one, for going on: the model's checksum, options
    """

    def __init__(
        self,
        model: "TrainingModel",
        data: Dataset,
        course: CourseSettings,
        learning: LearningSettings,
        out: Path,
        base: str,
        about: dict[str, Any],
    ) -> None:
        self.adapter: Adapter = model.adapter
        self._model, self._data, self._out, self._base = model, data, out, base
        self._learning = learning
        self._course = Course([len(sample) for sample in data.training], course)
        self.total = self._course.total
        self._schedule = Schedule(learning.learning_rate, self.total, learning.warm_up)
        self._optimizer = AdamW(len(self.adapter.values), learning.weight_decay)
        identity = {
            **about,
            "course": dataclasses.asdict(course),
            "learning": dataclasses.asdict(learning),
            "lora": dataclasses.asdict(self.adapter.settings),
            "data": digest_of([*data.training, *data.evaluation]),
        }
        self._folder = StateFolder(out / "state", identity)
        self.state = self._folder.load(self.adapter.values, self._optimizer)
        self._updating = False
        self._every = learning.evaluate_every or max(1, self.total // 10)

    def run(self) -> Iterator[Progress]:
        """All steps that are left; after each what it came to.

        Raises:
            MossError: a weight or the disk fails, or the loss is no number any more. What was kept stays, and the same
                training goes on from there.
        """
        saved = time.monotonic()
        for chosen in self._course.steps_from(self.state.step):
            progress = self._step([self._data.training[number] for number in chosen])
            last = self.state.step == self.total
            if last or self.state.step % self._every == 0:
                progress = dataclasses.replace(progress, evaluation=self._evaluate())
            if last or progress.evaluation or time.monotonic() - saved > SAVE_SECONDS:
                self._save()
                saved = time.monotonic()
            yield progress

    def keep(self) -> None:
        """Write where it is, after an interruption. One in the middle of an update leaves the state that was written last.

        Raises:
            MossError: the disk is full, or it fails.
        """
        if not self._updating and self.state.step:
            self._save()

    def _step(self, samples: Sequence[TokenSample]) -> Progress:
        begin = time.perf_counter()
        rate = self._schedule.at(self.state.step)
        result, gradient = self._model.step(samples)
        clip(gradient, self._learning.clip)
        self._updating = True
        self._optimizer.step(self.adapter.values, gradient, rate)
        self.state.step += 1
        self._updating = False
        tokens = sum(map(len, samples))
        seconds = time.perf_counter() - begin
        self.state.log.append(_record(self.state.step, result, lr=rate, tokens=tokens))
        return Progress(self.state.step, self.total, result, rate, tokens, seconds)

    def _evaluate(self) -> StepResult | None:
        """The adapter as it is on the samples kept for that; the best one yet is written."""
        if not self._data.evaluation:
            write_adapter(self._out, self.adapter, self._base)
            return None
        result = self._model.evaluate(self._data.evaluation[:EVALUATED])
        self.state.log.append(_record(self.state.step, result, evaluation=True))
        if self.state.best is None or result.loss < self.state.best:
            self.state.best = result.loss
            write_adapter(self._out, self.adapter, self._base)
        return result

    def _save(self) -> None:
        write_adapter(self._out / "last", self.adapter, self._base)
        self._folder.save(self.state, self.adapter.values, self._optimizer)


def _record(step: int, result: StepResult, **more: Any) -> dict[str, Any]:
    return {"step": step, "loss": round(result.loss, 6), "accuracy": round(result.accuracy, 6), **more}


def digest_of(samples: Sequence[TokenSample]) -> str:
    """What tells one set of samples from another."""
    digest = hashlib.sha256()
    for sample in samples:
        digest.update(
            len(sample).to_bytes(8, "little") + sample.token_ids.tobytes() + sample.targets.tobytes()
        )
    return digest.hexdigest()
