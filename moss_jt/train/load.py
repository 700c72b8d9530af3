"""A model folder becomes a model that learns. Importing this starts Jittor."""

from pathlib import Path

from moss_jt.kernels.cpu.training import CpuTrainingOperators
from moss_jt.plan.residency import ResidencyPlan
from moss_jt.store.model_folder import Store
from moss_jt.train.lora import Adapter
from moss_jt.train.model import TrainingModel
from moss_jt.weights.cpu_units import open_weights


def load_training(
    store: Store, plan: ResidencyPlan, home: Path, adapter: Adapter, batch_tokens: int, keeps: bool
) -> TrainingModel:
    """The store's model on the CPU, its weights where the plan says.

    Args:
        home: the folder where the disk's speed is remembered.

    Raises:
        MossError: a file cannot be read.
    """
    operators, weights = CpuTrainingOperators(store.config), open_weights(store, plan, home)
    return TrainingModel(store.config, operators, weights, adapter, batch_tokens, keeps)
