"""Plugins by name: the four that MOSS was trained with, and others through the entry points group ``moss_jt.plugins``."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path

from moss_jt.errors import MossError
from moss_jt.plugins.interface import Plugin

GROUP = "moss_jt.plugins"


@dataclass(frozen=True)
class PluginSettings:
    """What users may say about plugins.

    search_folder   folder of text files that search reads instead of the web
    search_url      address of a SearXNG server
    image_url       address of an OpenAI-compatible or Automatic1111 server that draws
    image_model     the model that an OpenAI-compatible server is asked for
    picture_folder  where pictures are saved; default: pictures in the program's data folder
    progress        called with (files done, files in all) while a folder is read for the first time
    """

    search_folder: Path | None = None
    search_url: str | None = None
    image_url: str | None = None
    image_model: str | None = None
    picture_folder: Path | None = None
    progress: Callable[[int, int], None] | None = None


def _search(settings: PluginSettings) -> Plugin:
    from moss_jt.plugins.search import make_search

    return make_search(settings.search_folder, settings.search_url, settings.progress)


def _calculator(settings: PluginSettings) -> Plugin:
    from moss_jt.plugins.calculator import Calculator

    return Calculator()


def _solver(settings: PluginSettings) -> Plugin:
    from moss_jt.plugins.solver import Solver

    return Solver()


def _image(settings: PluginSettings) -> Plugin:
    from moss_jt.plugins.image import make_image

    return make_image(settings.image_url, settings.image_model, settings.picture_folder)


# In the order of the meta instruction.
BUILT_IN: dict[str, Callable[[PluginSettings], Plugin]] = {
    "search": _search,
    "calculator": _calculator,
    "solver": _solver,
    "image": _image,
}


def plugin_names() -> list[str]:
    """Every plugin that can be switched on, built in first."""
    return [*BUILT_IN, *sorted({point.name for point in entry_points(group=GROUP)} - BUILT_IN.keys())]


def make_plugins(names: Iterable[str | Plugin], settings: PluginSettings | None = None) -> list[Plugin]:
    """Plugins by name, or as they are where they are objects already; in the meta instruction's order.

    Raises:
        MossError: no plugin has that name, it lacks a setting, or two answer the same function.
    """
    settings = settings or PluginSettings()
    made = [_make(name, settings) if isinstance(name, str) else name for name in names]
    order = {name: place for place, name in enumerate(BUILT_IN)}
    unique = {plugin.name: plugin for plugin in made}
    functions: dict[str, str] = {}
    for plugin in unique.values():
        if (other := functions.setdefault(plugin.function, plugin.name)) != plugin.name:
            raise MossError(
                f"the plugins {other!r} and {plugin.name!r} both answer {plugin.function}; switch one of them off."
            )
    return sorted(unique.values(), key=lambda plugin: order.get(plugin.name, len(order)))


def _make(name: str, settings: PluginSettings) -> Plugin:
    if name in BUILT_IN:
        return BUILT_IN[name](settings)
    for point in entry_points(group=GROUP):
        if point.name == name:
            return _installed(point)
    raise MossError(f"there is no plugin {name!r}; there are {', '.join(plugin_names())}.")


def _installed(point: EntryPoint) -> Plugin:
    """Another package's plugin: its entry point names a class, or a function without arguments, that makes it."""
    try:
        plugin = point.load()()
    except Exception as error:  # noqa: BLE001  another package's code may raise anything
        raise MossError(
            f"the plugin {point.name!r} ({point.value}) does not start: {type(error).__name__}: {error}"
        ) from error
    if not isinstance(plugin, Plugin):
        raise MossError(
            f"the plugin {point.name!r} ({point.value}) lacks a part; moss_jt.plugins.Plugin lists them."
        )
    return plugin
