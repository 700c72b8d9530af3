"""Which copy drafts for a model, if any: the one of fewest bits that fits, where it pays."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from moss_jt.errors import MossError
from moss_jt.plan.report import GB, Speeds
from moss_jt.plan.residency import ResidencyPlan, TooLittleError
from moss_jt.store.copies import open_copy
from moss_jt.store.model_folder import Store

# Where everything is in memory, a copy that nobody has named must make the model clearly quicker by the plan, which knows neither
# how often this one will be right, nor what Python and Jittor take for each drafted token: a lot beside small models' passes.
CLEARLY, LEAST_BYTES = 1.2, 2 * GB

PlanWith = Callable[[Store | None], ResidencyPlan]


@dataclass(frozen=True)
class Choice:
    """``notice``: a sentence for the user, where a copy would fit with a smaller context."""

    plan: ResidencyPlan
    copy: Store | None = None
    notice: str = ""


def named_copy(store: Store, path: Path, plan_with: PlanWith) -> Choice:
    """The copy that the user has named.

    Raises:
        MossError: it is no copy of this model, or it does not fit.
    """
    copy = open_copy(store, path)
    return Choice(plan_with(copy), copy)


def may_pay(plan: ResidencyPlan) -> bool:
    """Whether a copy that nobody has named is looked for, by the plan without: weights stream, or the CPU holds a large model."""
    return plan.streams or (plan.host_budget_bytes is None and plan.weight_bytes_per_pass >= LEAST_BYTES)


def pays(plan: ResidencyPlan, better: ResidencyPlan, speeds: Speeds) -> bool:
    """Whether a copy that nobody has named is taken, with which the plan becomes ``better``."""
    quicker = speeds.seconds(plan) / speeds.seconds(better)
    return quicker > 1 if plan.streams else quicker >= CLEARLY and not better.streams


def best_copy(
    store: Store, candidates: Sequence[Path], plan: ResidencyPlan, plan_with: PlanWith, speeds: Speeds
) -> Choice:
    """The first of the candidates that fits, if it makes the model quicker.

    Args:
        plan: without a copy.
        plan_with: plans with one, and raises MossError where it does not fit.
    """
    notice = ""
    for path in candidates:
        try:
            copy = open_copy(store, path)
            better = plan_with(copy)
        except TooLittleError as error:
            notice = notice or _smaller_context(path, error)
            continue
        except MossError:
            continue  # damaged, or the memory does not do for other reasons: it is no use as a copy
        if pays(plan, better, speeds):
            return Choice(better, copy)
    return Choice(plan, None, notice)


def _smaller_context(path: Path, error: TooLittleError) -> str:
    if not error.context:
        return ""
    return f"{path.name} would draft for this model, several times as fast, with --context {error.context}."
