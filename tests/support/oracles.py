"""Programs that say what torch and its libraries make of the same numbers, each in a process of its own."""

import os
import subprocess
import sys
from pathlib import Path


def run_oracle(script: Path, *arguments: str | Path) -> str:
    """What a program of tests/oracle prints."""
    command = [sys.executable, "-P", str(script), *map(str, arguments)]
    environment = {**os.environ, "PYTHONPATH": str(script.parent)}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout
