"""Commands in processes of their own whose files become shorter the moment that a function is called."""

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from moss_jt.backend.device import SWAP_SWITCH

PROGRAM = """
import importlib, json, os, sys
from pathlib import Path
from unittest import mock
from moss_jt.commands.cli import main
where, calls, folder, files, size, arguments = json.loads(sys.argv[1])
module, name = where.rsplit(".", 1)
try:
    owner = importlib.import_module(module)
except ModuleNotFoundError:
    package, part = module.rsplit(".", 1)
    owner = getattr(importlib.import_module(package), part)
real, seen = getattr(owner, name), []
def cut_first(*arguments, **options):
    seen.append(1)
    if len(seen) == calls:
        for path in Path(folder).glob(files):
            os.truncate(path, size)
        print("cut", file=sys.stderr, flush=True)
    return real(*arguments, **options)
with mock.patch.object(owner, name, cut_first):
    main(arguments)
"""


def last_line(
    where: str,
    folder: Path,
    files: str,
    *arguments: str | Path,
    calls: int = 1,
    size: int = 4096,
    environment: Mapping[str, str] | None = None,
) -> str:
    """What the command says last, where ``files`` in ``folder`` are cut to ``size`` bytes when the function ``where`` is
    called for the ``calls``-th time.

    ``environment`` decides for what Jittor starts, which it does before the command says so. None: as for the CPU.
    """
    asked = json.dumps([where, calls, str(folder), files, size, [str(argument) for argument in arguments]])
    decided = ("cache_name", SWAP_SWITCH)
    on_cpu = {key: value for key, value in os.environ.items() if key not in decided}
    done = subprocess.run(
        [sys.executable, "-P", "-c", PROGRAM, asked],
        capture_output=True,
        text=True,
        check=False,
        timeout=1200,
        env=on_cpu if environment is None else environment,
    )
    assert done.returncode == 1 and "Traceback" not in done.stderr, done
    lines = done.stderr.splitlines()
    assert "cut" in lines and lines[-1].startswith("moss-jt: error: "), done
    return lines[-1]
