"""docs/memory.md and docs/cuda.md show what the code computes: tables and example are made again and compared."""

import re
from pathlib import Path

import pytest
from click.testing import CliRunner

from benchmarks.memory_tables import TABLES, THREADS
from moss_jt.commands.plan import command

DOCUMENTS = Path(__file__).resolve().parents[1] / "docs"
TEXT = "".join((DOCUMENTS / name).read_text() for name in ("memory.md", "cuda.md"))


@pytest.mark.parametrize("name", TABLES)
def test_computed_tables_are_current(name: str) -> None:
    match = re.search(rf"<!-- table: {name} -->\n(.*?)\n<!-- end -->", TEXT, re.DOTALL)
    assert match is not None
    assert match.group(1) == TABLES[name](), (
        "python benchmarks/memory_tables.py prints the tables as they are now"
    )


def test_the_example_is_current(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", str(THREADS))
    shown = re.search(r"```\n\$ moss-jt plan (.*?)\n(.*?)```", TEXT, re.DOTALL)
    assert shown is not None
    result = CliRunner().invoke(command, shown.group(1).split())
    assert result.exit_code == 0 and result.output == shown.group(2)
