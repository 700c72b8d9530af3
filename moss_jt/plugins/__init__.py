"""The plugins that MOSS calls, and the Results field that their answers make."""

from collections.abc import Iterable

from moss_jt.errors import MossError
from moss_jt.plugins.numbered_results import body_of
from moss_jt.plugins.registry import make_plugins
from moss_jt.plugins.run import run_commands


def execute(commands: str, plugins: Iterable[str]) -> str:
    """Run the calls in a Commands field; returns the body of the Results field, as trained.

    ``execute('Calculate("8*4+3"), Calculate("-7")', ["calculator"])`` gives one line per call. Whatever goes wrong inside a
    plugin is its ``No result.``; never an exception.

    Raises:
        MossError: a plugin of that name does not exist, or ``commands`` is no text.
    """
    if not isinstance(commands, str):
        raise MossError(f"commands is {commands!r:.80}; it must be text, such as 'Calculate(\"8*4+3\")'.")
    return body_of(run_commands(commands, make_plugins(plugins)))
