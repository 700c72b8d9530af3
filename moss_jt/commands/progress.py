"""Progress bars with bytes and time left, on stderr, quiet where nobody watches."""

from tqdm import tqdm

from moss_jt.terminal.output import harmless

# No thread that watches the bars: Jittor forks its compilers, and a fork may inherit a lock that a thread holds.
tqdm.monitor_interval = 0


def byte_bar(label: str, total: int) -> tqdm:
    """A context; ``update`` is to be called with bytes done."""
    return tqdm(
        total=total,
        desc=harmless(label),
        unit="iB",
        unit_scale=True,
        unit_divisor=1024,
        mininterval=0.5,
        disable=None,
    )


def token_bar(label: str, total: int, unit: str = "tok", done: int = 0) -> tqdm:
    """The same for tokens, or other units; ``done`` of them were so before."""
    return tqdm(total=total, initial=done, desc=harmless(label), unit=unit, mininterval=0.5, disable=None)
