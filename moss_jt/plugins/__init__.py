"""The plugins that MOSS calls, and the Results field that their answers make.

Light to import: a plugin's own module, and what it needs, are imported when the plugin is switched on.
"""

from collections.abc import Iterable

from moss_jt.plugins.interface import Plugin, PluginFailure
from moss_jt.plugins.registry import PluginSettings, make_plugins, plugin_names
from moss_jt.plugins.results import CallResult, body_of, field_of, iterate_results, run

__all__ = [
    "CallResult",
    "Plugin",
    "PluginFailure",
    "PluginSettings",
    "body_of",
    "execute",
    "field_of",
    "iterate_results",
    "make_plugins",
    "plugin_names",
    "run",
]


def execute(commands: str, plugins: Iterable[str | Plugin], settings: PluginSettings | None = None) -> str:
    """Run the calls in a Commands field; returns the body of the Results field, as trained.

    ``execute('Calculate("8*4+3"), Calculate("-7")', ["calculator"])`` gives one line per call. Whatever goes wrong inside a
    plugin is its ``No result.``; never an exception.

    Raises:
        MossError: a plugin of that name does not exist, or lacks a setting.
    """
    return body_of(run(commands, make_plugins(plugins, settings)))
