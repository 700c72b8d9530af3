"""What a training keeps on the disk so that it goes on after any end, with the same bits as without it.

In the adapter's folder: ``state/training.safetensors`` with values and moments, and ``state/log.jsonl`` with a line for each step.
Both are replaced, or cut, in one step; what happened after the last state is simply done again.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from moss_jt.errors import MossError
from moss_jt.store.files import replacing, writing
from moss_jt.store.tensor_file import read_metadata, read_tensors, write_tensors
from moss_jt.train.lora import Floats

STATE, LOG = "training.safetensors", "log.jsonl"


@dataclass
class TrainingState:
    """
    step   steps that are done
    best   the least loss on the samples kept for evaluation; None before the first
    log    a record of each step: step, loss, accuracy, lr, tokens; and of evaluations
    """

    step: int = 0
    best: float | None = None
    log: list[dict[str, Any]] = field(default_factory=list)


class StateFolder:
    """The state of a training whose settings and data are ``identity``, or those of them that are known yet: another's is
    refused.

    Raises:
        MossError: the folder holds another training.
    """

    def __init__(self, folder: Path, identity: Mapping[str, Any]) -> None:
        self._folder, self._identity = folder, dict(identity)

    def save(self, state: TrainingState, arrays: Mapping[str, Floats]) -> None:
        with writing(self._folder):
            self._folder.mkdir(parents=True, exist_ok=True)
        with writing(self._folder / LOG), replacing(self._folder / LOG) as file:
            file.writelines(json.dumps(record).encode() + b"\n" for record in state.log)
        about = {"step": state.step, "best": state.best, "identity": self._identity}
        write_tensors(self._folder / STATE, arrays, {"training": json.dumps(about)})

    def check(self) -> dict[str, Any] | None:
        """What is known of the last state; None where there is none.

        Raises:
            MossError: it belongs to another training, or is damaged.
        """
        path = self._folder / STATE
        if not path.exists():
            return None
        about = self._about(path)
        differing = [
            name for name in self._identity if about["identity"].get(name) != json_like(self._identity[name])
        ]
        if differing:
            raise MossError(
                f"{self._folder.parent} holds another training: {', '.join(differing)} differ. Go on with the same command as "
                "before, or name another --out."
            )
        return about

    def load(self, arrays: Mapping[str, Floats]) -> TrainingState:
        """The last state into these arrays; the beginning where there is none.

        Raises:
            MossError: it belongs to another training, or is damaged.
        """
        about = self.check()
        if about is None:
            return TrainingState()
        path = self._folder / STATE
        tensors = read_tensors(path)
        for name, target in arrays.items():
            if name not in tensors or tensors[name].shape != target.shape:
                raise MossError(f"{path} is damaged. Remove {self._folder} to begin anew.")
            target[:] = tensors[name]
        return TrainingState(about["step"], about["best"], self._records(about["step"]))

    def _about(self, path: Path) -> dict[str, Any]:
        try:
            about = json.loads(read_metadata(path).get("training", ""))
            if isinstance(about["step"], int) and isinstance(about["identity"], dict) and "best" in about:
                return dict(about)
        except (ValueError, RecursionError, KeyError, TypeError):
            pass
        raise MossError(f"{path} is damaged. Remove {self._folder} to begin anew.")

    def _records(self, step: int) -> list[dict[str, Any]]:
        """The log up to a step; it may be newer than the state, and a damaged line is left out: nothing depends on it."""
        records = []
        try:
            lines = (self._folder / LOG).read_text("utf-8", "replace").splitlines()
        except OSError:
            return []
        for line in lines:
            try:
                record = json.loads(line)
            except (ValueError, RecursionError):
                continue
            if isinstance(record, dict) and isinstance(record.get("step"), int) and record["step"] <= step:
                records.append(record)
        return records


def json_like(value: Any) -> Any:
    """As it comes back from JSON."""
    return json.loads(json.dumps(value))
