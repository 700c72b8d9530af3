"""A training from data to what it learned: steps, evaluations, the best and the last kept, and what a user sees of it."""

import dataclasses
import hashlib
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from moss_jt.store.files import write_text
from moss_jt.train.course import Course, CourseSettings
from moss_jt.train.curve import loss_curve
from moss_jt.train.dataset import Dataset
from moss_jt.train.lora import Adapter, Floats
from moss_jt.train.loss import StepResult
from moss_jt.train.masked_samples import TokenSample
from moss_jt.train.optimizer import AdamW, Schedule, check_finite, clip
from moss_jt.train.peft_files import write_adapter
from moss_jt.train.state import StateFolder
from moss_jt.train.tensorboard_log import EventFile

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


class Learner(Protocol):
    """What learns: an adapter over a frozen model, or all of a model.

    arrays    everything that a step changes: what a training's state keeps
    settings  of it, as JSON values: what makes a training this one
    updating  it has begun to change, and the step is not counted yet: an interruption now leaves nothing to be kept
    """

    arrays: dict[str, Floats]
    settings: dict[str, Any]
    updating: bool

    def learn(self, samples: Sequence[TokenSample], rate: float, step: int) -> StepResult:
        """One step, counted from 1; the result is from before it.

        Raises:
            MossError: the loss is no number any more, and nothing has learned from it.
        """
        ...

    def evaluate(self, samples: Sequence[TokenSample]) -> StepResult: ...

    def write(self, folder: Path) -> None:
        """What has been learned, for use.

        Raises:
            MossError: the disk is full, or it fails.
        """
        ...


class AdapterLearner:
    """An adapter, by AdamW. ``base`` is the name of its model."""

    def __init__(self, model: "TrainingModel", learning: LearningSettings, base: str) -> None:
        self.adapter: Adapter = model.adapter
        self._model, self._clip, self._base = model, learning.clip, base
        self._optimizer = AdamW(len(self.adapter.values), learning.weight_decay)
        first, second = self._optimizer.first, self._optimizer.second
        self.arrays = {"values": self.adapter.values, "first": first, "second": second}
        self.settings = {"lora": dataclasses.asdict(self.adapter.settings)}
        self.updating = False

    def learn(self, samples: Sequence[TokenSample], rate: float, step: int) -> StepResult:
        result, gradient = self._model.step(samples)
        clip(gradient, self._clip)
        self.updating = True
        self._optimizer.steps = step - 1
        self._optimizer.step(self.adapter.values, gradient, rate)
        return result

    def evaluate(self, samples: Sequence[TokenSample]) -> StepResult:
        return self._model.evaluate(samples)

    def write(self, folder: Path) -> None:
        write_adapter(folder, self.adapter, self._base)


class Training:
    """One training.

    learner  what learns
    data     samples to learn from, and to judge by
    out      a folder: the best stands in ``best/``, or in it itself where ``in_itself``, the last in ``last/``; ``loss.svg`` is a
             picture of the losses, and ``events/`` the same for TensorBoard, where that is installed
    about    what else makes this training this one, for going on: the model's checksum, options
    """

    def __init__(
        self,
        learner: Learner,
        data: Dataset,
        course: CourseSettings,
        learning: LearningSettings,
        out: Path,
        about: dict[str, Any],
        in_itself: bool = False,
    ) -> None:
        self._learner, self._data, self._out = learner, data, out
        self.best_folder = out if in_itself else out / "best"
        self._learning = learning
        self._course = Course([len(sample) for sample in data.training], course)
        self.total = self._course.total
        self._schedule = Schedule(learning.learning_rate, self.total, learning.warm_up)
        identity = {
            **about,
            "course": dataclasses.asdict(course),
            "learning": dataclasses.asdict(learning),
            **learner.settings,
            "data": digest_of([*data.training, *data.evaluation]),
        }
        self._folder = StateFolder(out / "state", identity)
        self.state = self._folder.load(learner.arrays)
        self._every = learning.evaluate_every or max(1, self.total // 10)
        self._events = EventFile(out / "events")

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
        if not self._learner.updating and self.state.step:
            self._save()

    def _step(self, samples: Sequence[TokenSample]) -> Progress:
        begin = time.perf_counter()
        rate = self._schedule.at(self.state.step)
        result = self._learner.learn(samples, rate, self.state.step + 1)
        self.state.step += 1
        self._learner.updating = False
        tokens = sum(map(len, samples))
        seconds = time.perf_counter() - begin
        self.state.log.append(_record(self.state.step, result, lr=rate, tokens=tokens))
        return Progress(self.state.step, self.total, result, rate, tokens, seconds)

    def _evaluate(self) -> StepResult | None:
        """What has been learned on the samples kept for that; the best yet is written."""
        if not self._data.evaluation:
            self._learner.write(self.best_folder)
            return None
        result = self._learner.evaluate(self._data.evaluation[:EVALUATED])
        check_finite(result.loss, "the loss on the samples kept for evaluation")
        self.state.log.append(_record(self.state.step, result, evaluation=True))
        if self.state.best is None or result.loss < self.state.best:
            self.state.best = result.loss
            self._learner.write(self.best_folder)
        return result

    def _save(self) -> None:
        self._learner.write(self._out / "last")
        self._folder.save(self.state, self._learner.arrays)
        write_text(self._out / "loss.svg", loss_curve(self.state.log))
        self._events.write(self.state.log)


class Finetuning(Training):
    """A training of an adapter, which stands in ``out`` itself.

    model  with the adapter that learns
    base   the name of the model
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
        learner = AdapterLearner(model, learning, base)
        super().__init__(learner, data, course, learning, out, about, in_itself=True)
        self.adapter, self._model = learner.adapter, model

    def run(self) -> Iterator[Progress]:
        """As of Training; when all is done, what the frozen blocks made of the samples is removed."""
        yield from super().run()
        self._model.remove_front()


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
