"""How far loading weights has come, on a terminal, once it takes its time."""

from tqdm import tqdm

PATIENCE_S = 2.0  # loading that is quicker is not worth a line
EACH_S = 0.2

# No thread that watches the bars: Jittor forks its compilers, and a fork may inherit a lock that a thread holds.
tqdm.monitor_interval = 0


class LoadingProgress:
    """One line on stderr that counts ``total_bytes`` and goes when it is closed; nothing where nobody watches."""

    def __init__(self, total_bytes: int) -> None:
        self._bar = tqdm(
            total=total_bytes,
            desc="moss-jt: reading weights into memory",
            unit="iB",
            unit_scale=True,
            unit_divisor=1024,
            delay=PATIENCE_S,
            mininterval=EACH_S,
            leave=False,
            disable=None,
        )

    def advance(self, n_bytes: int) -> None:
        self._bar.update(n_bytes)

    def close(self) -> None:
        self._bar.close()
