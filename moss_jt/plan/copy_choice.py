"""Which copy drafts for a model, if any: the one of fewest bits that fits, where it pays."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from moss_jt.errors import MossError
from moss_jt.plan.report import Speeds
from moss_jt.plan.residency import ResidencyPlan, TooLittleError
from moss_jt.store.copies import open_copy
from moss_jt.store.model_folder import Store

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
        if speeds.outlook(better).seconds_per_token < speeds.outlook(plan).seconds_per_token:
            return Choice(better, copy)
    return Choice(plan, None, notice)


def _smaller_context(path: Path, error: TooLittleError) -> str:
    if not error.context:
        return ""
    return f"{path.name} would draft for this model, several times as fast, with --context {error.context}."
