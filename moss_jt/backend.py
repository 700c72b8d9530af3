"""The one place that imports Jittor, after deciding everything that Jittor decides at import."""

import importlib
import os
import sys
from pathlib import Path
from typing import Any


def _link_onednn(jittor_home: Path) -> None:
    """Put oneDNN's wheel where Jittor looks before it would download its own copy."""
    folder = jittor_home / ".cache" / "jittor" / "mkl" / "dnnl_lnx_2.2.0_cpu_gomp"
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("include", "lib"):
        link, target = folder / name, Path(sys.prefix) / name
        if not (link / ("dnnl.h" if name == "include" else "libmkldnn.so")).exists():
            link.unlink(missing_ok=True)
            link.symlink_to(target)


def _start() -> Any:
    os.environ["nvcc_path"] = ""
    os.environ.setdefault("log_silent", "1")
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")
    _link_onednn(Path(os.environ.get("JITTOR_HOME", Path.home())))
    # Jittor imports both where they are installed: cupy without a driver makes that fail, torch takes 180 MB.
    hidden = [name for name in ("cupy", "torch") if name not in sys.modules]
    for name in hidden:
        sys.modules[name] = None  # type: ignore[assignment]
    jittor = importlib.import_module("jittor")
    for name in hidden:
        del sys.modules[name]
    return jittor


jt = _start()
