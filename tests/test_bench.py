"""moss-jt bench: counts what a token reads, compares with the machine, ends with one JSON object."""

import json
import re

import numpy as np
import pytest

from moss_jt.commands.bench import parse_contexts
from moss_jt.commands.cli import main
from moss_jt.engine.engine import Engine
from moss_jt.engine.sequence import Sequence as Text
from moss_jt.errors import MossError
from moss_jt.measure.bench import Times, measure, prefill_operations, prompt_ids, shares
from moss_jt.measure.cpu_limits import MachineLimits
from moss_jt.measure.first_words import TurnTime, first_words, line_of
from moss_jt.measure.side_by_side import measure_together
from moss_jt.store.config import MOSS_MOON_003
from moss_jt.store.model_folder import open_store
from moss_jt.store.sizes import GIB, sizes_of_geometry, sizes_of_store
from tests.support.models import tiny_model_folder
from tests.support.plans import plan
from tests.support.scripted_model import ScriptedModel, count_up


class Counting:
    """A model that notes its passes."""

    capacity, pass_tokens = 100, 16

    def __init__(self) -> None:
        self.passes: list[tuple[int, int]] = []

    def forward(self, token_ids: list[int], start_pos: int, rows: str) -> np.ndarray:
        self.passes.append((len(token_ids), start_pos))
        return np.zeros((1, 50), np.float32)


def test_prompts_are_read_in_passes_and_tokens_follow_one_by_one() -> None:
    model = Counting()
    times = measure(model, [40], vocabulary=50, steps=2, repeats=2)  # type: ignore[arg-type]
    run = [(16, 0), (16, 16), (8, 32), (1, 40), (1, 41)]
    assert model.passes == [(16, 0), (16, 16), (8, 32), *run, *run]
    assert times[0].context == 40
    assert 0 < times[0].decode_s
    with pytest.raises(MossError, match="do not fit"):
        measure(model, [99], 50, 2, 1)  # type: ignore[arg-type]


def test_shares_are_of_the_bytes_and_operations_that_are_needed() -> None:
    """MOSS resident at 100 GB/s: 32.1 GB of weights and 0.86 GB of cache take 0.33 s; twice that is half the limit."""
    placed = plan(sizes_of_geometry(MOSS_MOON_003), 2048, 64 * GIB)
    read = placed.weight_bytes_per_pass + 2 * 34 * 1024 * 6144 * 2
    limits = MachineLimits(read=100e9, sgemm=1e12)
    operations = prefill_operations(placed, 1024)
    assert operations == pytest.approx(2 * 1024 * 34 * 12 * 6144**2, rel=0.05)
    actual = shares(Times(1024, operations / 1e12 * 4, 0, read / 100e9 * 2), placed, limits, None)
    assert actual.prefill == pytest.approx(0.25)
    assert actual.decode == pytest.approx(0.5, rel=1e-3)


def test_contexts_are_parsed() -> None:
    assert parse_contexts(" 32, 256") == [32, 256]
    for text in ("", "32,", "x", "-1", "1e3", "99999999999"):
        with pytest.raises(MossError, match="--contexts"):
            parse_contexts(text)
    assert len(set(prompt_ids(1000, 2000))) == 1000


def test_conversations_are_measured_together_through_the_engine() -> None:
    """In turns of four tokens, all in one pass, each turn from the same length of text on."""
    model = ScriptedModel(count_up, 200, pages=20)
    sizes: list[int] = []
    forward = model.forward_many

    def counted(runs, wanted):  # type: ignore[no-untyped-def]
        sizes.append(len(runs))
        assert {run.start for run in runs} <= set(range(99, 105)) and all(len(run.pages) == 2 for run in runs)
        return forward(runs, wanted)

    model.forward_many = counted  # type: ignore[method-assign]
    turns: list[int] = []
    together = measure_together(Engine(model), [1, 9], 100, 50, 8, lambda: turns.append(len(sizes)))
    assert [(entry.count, entry.context) for entry in together] == [(1, 100), (9, 100)]
    assert sizes == ([1] * 5 + [9] * 5) * 2 and turns == [0, 10, 20]
    assert all(entry.pass_s > 0 for entry in together)
    for counts, context, message in ([1, 11], 100, "11 conversations"), ([1], 197, "202 positions"):
        with pytest.raises(MossError, match=message):
            measure_together(Engine(model), counts, context, 50, 4)


def test_the_wait_for_the_first_word_is_measured_turn_by_turn() -> None:
    """Of each turn only what is new is read; where the context ends, no more turns are measured."""
    engine = Engine(ScriptedModel(count_up, 1024))
    text = Text(engine)
    words = first_words(text, 2000)
    assert [(next(words).tokens, text.timing.prefill_tokens) for _ in range(3)] == [
        (300, 300),
        (16, 17),
        (600, 601),
    ]
    assert text.position == 919 and not list(words)
    short = Text(Engine(ScriptedModel(count_up, 400)))
    assert [word.turn for word in first_words(short, 2000)] == ["first turn", "second turn"]
    assert re.fullmatch(
        r"First word of the second turn, 16 tokens: \d+\.\d\d s", line_of(TurnTime("second turn", 16, 0.1))
    )


def test_the_command_ends_with_json(capsys: pytest.CaptureFixture[str]) -> None:
    folder = tiny_model_folder()
    with pytest.raises(SystemExit) as left:
        main(
            [
                "bench",
                str(folder),
                "--contexts",
                "8,20",
                "--new-tokens",
                "2",
                "--repeats",
                "1",
                "--context",
                "64",
                "--parallel",
                "1,3",
                "--turns",
            ]
        )
    assert left.value.code == 0
    lines = capsys.readouterr().out.strip().split("\n")
    summary = json.loads(lines[-1])
    assert [row["context"] for row in summary["contexts"]] == [8, 20]
    assert summary["peak_gib"] < 2 and "first_words" not in summary, "a context of 64 has no room for a turn"
    assert [row["conversations"] for row in summary["parallel"]] == [1, 3]
    assert all(row["tok_s"] > 0 and row["context"] == 20 for row in summary["parallel"])
    assert all(row["decode_tok_s"] > 0 and row["prefill_share"] > 0 for row in summary["contexts"])
    assert sizes_of_store(open_store(folder)).bits == summary["bits"] == 16
