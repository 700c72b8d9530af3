"""What every test may rely on, whatever started the run."""

import signal
from collections.abc import Iterator

import pytest

# A run in the background inherits an ignored Ctrl-C, and so would every process that a test starts.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session", autouse=True)
def home_of_the_tests(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """The user who runs the tests keeps their models and notes: a command notes in its home what it used, to take it next time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MOSS_JT_HOME", str(tmp_path_factory.mktemp("moss-jt-home")))
        yield
