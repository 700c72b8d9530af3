"""A weight file that becomes shorter while the model computes: one line, not a bus error."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.models import tiny_model_folder

PROGRAM = """
import os, sys
from pathlib import Path
from moss_jt import Moss
moss = Moss.load(sys.argv[1], draft="off")
moss.logits([1, 2, 3])
for path in Path(sys.argv[1]).glob(sys.argv[2]):
    os.truncate(path, 4096)
print("computing", flush=True)
moss.logits(list(range(int(sys.argv[3]))))
print("computed")
"""


@pytest.mark.parametrize(("files", "tokens"), [("block-*", 4), ("block-*", 80), ("head*", 4)])
def test_a_file_that_shrinks_in_use_is_one_line(tmp_path: Path, files: str, tokens: int) -> None:
    folder = shutil.copytree(tiny_model_folder(), tmp_path / "model")
    command = [sys.executable, "-P", "-c", PROGRAM, folder, files, str(tokens)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert (done.returncode, done.stdout) == (1, "computing\n"), done.stderr
    *before, last = done.stderr.splitlines()
    assert last.startswith("moss-jt: error: a file of the model became shorter")
    assert all("operators" in line for line in before)  # compiling them is announced
