"""A model folder becomes a model that learns. Importing this starts Jittor."""

from pathlib import Path

from moss_jt.kernels.cpu.training import CpuTrainingOperators
from moss_jt.plan.residency import ResidencyPlan
from moss_jt.store.model_folder import Store
from moss_jt.train.frozen_front import FrontRows
from moss_jt.train.kept_activations import Waiting
from moss_jt.train.lora import Adapter
from moss_jt.train.model import TrainingModel
from moss_jt.train.step_memory import TrainingNeeds
from moss_jt.weights.cpu_units import open_weights


def load_training(
    store: Store,
    plan: ResidencyPlan,
    home: Path,
    adapter: Adapter,
    needs: TrainingNeeds,
    folder: Path,
    front: FrontRows | None = None,
) -> TrainingModel:
    """The store's model on the CPU, its weights where the plan says.

    Args:
        home: the folder where the disk's speed is remembered.
        needs: with which it was planned.
        folder: where a file of what waits for the way back may be.
        front: see TrainingModel.

    Raises:
        MossError: a file cannot be read.
    """
    operators, weights = CpuTrainingOperators(store.config), open_weights(store, plan, home)
    waiting = Waiting(needs.keeping, store.config.n_layer, folder)
    return TrainingModel(store.config, operators, weights, adapter, needs.batch_tokens, waiting, front)
