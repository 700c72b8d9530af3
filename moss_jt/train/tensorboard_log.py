"""A training's log for TensorBoard, where that is installed: it frames and checks the records, and shows them."""

import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from moss_jt.store.files import writing

NAME = "events.out.tfevents"


class EventFile:
    """Records of a log as TensorBoard's events, in a file of this process; that of one before it is replaced."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._path, self._written = (
            folder,
            folder / f"{NAME}.{int(time.time())}.{os.getpid()}",
            0,
        )

    def write(self, log: Sequence[Mapping[str, Any]]) -> None:
        """What of the log is not written yet. Nothing, where TensorBoard is not installed.

        Raises:
            MossError: the disk is full, or it fails.
        """
        try:
            from tensorboard.compat.proto.event_pb2 import Event
            from tensorboard.compat.proto.summary_pb2 import Summary
            from tensorboard.summary.writer.record_writer import RecordWriter
        except ImportError:
            return
        events = [Event(wall_time=time.time(), file_version="brain.Event:2")] if not self._written else []
        for record in log[self._written :]:
            kind = "evaluation" if record.get("evaluation") is True else "training"
            values = [
                Summary.Value(tag=f"{kind}/{name}", simple_value=value)
                for name, value in record.items()
                if name in ("loss", "accuracy", "lr") and isinstance(value, float)
            ]
            events.append(Event(wall_time=time.time(), step=record["step"], summary=Summary(value=values)))
        with writing(self._path):
            self._folder.mkdir(parents=True, exist_ok=True)
            if not self._written:
                for old in self._folder.glob(f"{NAME}.*"):
                    old.unlink()
            with self._path.open("ab") as file:
                writer = RecordWriter(file)
                for event in events:
                    writer.write(event.SerializeToString())
        self._written = len(log)
