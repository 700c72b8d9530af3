"""Progress bars with bytes and time left, on stderr, quiet where nobody watches."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from tqdm import tqdm

Notice = Callable[[str], None]

# No thread that watches the bars: Jittor forks its compilers, and a fork may inherit a lock that a thread holds.
tqdm.monitor_interval = 0


def size_text(size_bytes: int) -> str:
    """A size as people read it: GiB, or MiB where that would be nearly nothing."""
    gib = size_bytes / 2**30
    return f"{gib:.2f} GiB" if gib >= 0.1 else f"{size_bytes / 2**20:.1f} MiB"


class Status:
    """A few words about what is going on, shown beside the bar that was made with it."""

    def __init__(self) -> None:
        self.bar: tqdm | None = None

    def show(self, text: str) -> None:
        if self.bar is not None:
            self.bar.set_postfix_str(text)


@contextmanager
def byte_bar(
    total: int, label: str, status: Status | None = None
) -> Iterator[tuple[Callable[[int], None], Notice]]:
    """(a function to call with bytes done, a function that prints a line above the bar)."""
    bar = tqdm(
        total=total, desc=label, unit="B", unit_scale=True, unit_divisor=1024, mininterval=0.5, disable=None
    )
    if status is not None:
        status.bar = bar

    def advance(count: int) -> None:
        bar.update(count)

    def say(text: str) -> None:
        bar.write(text, file=sys.stderr)

    try:
        yield advance, say
    finally:
        bar.close()


@contextmanager
def token_bar(total: int, label: str) -> Iterator[Callable[[int], None]]:
    """A function to call with tokens done."""
    bar = tqdm(total=total, desc=label, unit="tok", mininterval=0.5, disable=None)

    def advance(count: int) -> None:
        bar.update(count)

    try:
        yield advance
    finally:
        bar.close()
