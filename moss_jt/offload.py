"""How weights that do not fit are kept away: our stream, or Jittor's own swapping, which is decided before it starts."""

import os
import sys

from moss_jt.errors import MossError

WAYS = ("auto", "stream", "swap")
SWITCH = "JT_SAVE_MEM"  # Jittor reads it when it is compiled and when it starts


def decide_offload(offload: str) -> bool:
    """Whether Jittor's swapping is asked for; if so, make Jittor start with it.

    Args:
        offload: "auto" or "stream" for our own stream, "swap" for Jittor's JT_SAVE_MEM.

    Raises:
        MossError: it is none of these, or Jittor already runs without swapping.
    """
    if offload not in WAYS:
        raise MossError(f"there is no offload {offload!r} on the CPU: give {', '.join(WAYS)}.")
    if offload != "swap":
        return False
    if "moss_jt.backend" in sys.modules and os.environ.get(SWITCH, "0") == "0":
        raise MossError(
            "Jittor runs in this process without swapping, and cannot change that. "
            f"Load with offload='swap' in a new process, before anything else, or set {SWITCH}=1 for it."
        )
    os.environ[SWITCH] = "1"
    return True
