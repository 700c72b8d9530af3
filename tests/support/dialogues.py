"""Dialogues like those that moss-tiny was trained on; other seeds than its training's give unseen ones."""

import importlib.util
import random
from pathlib import Path

SOURCE = Path(__file__).resolve().parents[2] / "demos" / "moss-tiny-training" / "dialogues.py"


def dialogues(seed: int, count: int) -> str:
    """The text of ``count`` conversations of 12 turns, plugins and all."""
    spec = importlib.util.spec_from_file_location("moss_tiny_dialogues", SOURCE)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    rng = random.Random(seed)
    return "".join(module.conversation(rng, 12) for _ in range(count))
