"""Progress bars with bytes and time left, on stderr, quiet where nobody watches."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from tqdm import tqdm

Notice = Callable[[str], None]


@contextmanager
def byte_bar(total: int, label: str) -> Iterator[tuple[Callable[[int], None], Notice]]:
    """(a function to call with bytes done, a function that prints a line above the bar)."""
    bar = tqdm(
        total=total, desc=label, unit="B", unit_scale=True, unit_divisor=1024, mininterval=0.5, disable=None
    )

    def advance(count: int) -> None:
        bar.update(count)

    def say(text: str) -> None:
        bar.write(text)

    try:
        yield advance, say
    finally:
        bar.close()
