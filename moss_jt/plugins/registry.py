"""Plugins by name: the four that MOSS was trained with, others through the entry points group ``moss_jt.plugins``, and classes in a
file of the user's own: ``./my_plugin.py:Glossary``.
"""

import difflib
import importlib.util
import sys
import traceback
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

from moss_jt.errors import MossError, Reason, ReasonedError
from moss_jt.plugins.interface import Plugin, plugin_fault

GROUP = "moss_jt.plugins"
MAX_REASON_CHARACTERS = 200

# What a model that was trained with plugins may call without being told to: these two compute here, and reach nothing outside.
HARMLESS = ("calculator", "solver")


class UnknownPluginError(MossError):
    """No plugin has that name."""

    def __init__(self, name: str) -> None:
        names = plugin_names()
        known = tuple(names)
        if meant := difflib.get_close_matches(name.lower(), names, 1):
            super().__init__(
                Reason(
                    "there is no plugin {name!r}; did you mean {meant}? There are {known}.",
                    name=name,
                    meant=meant[0],
                    known=known,
                )
            )
        else:
            super().__init__(
                Reason(
                    "there is no plugin {name!r}; there are {known}. One of your own: ./FILE.py:CLASS.",
                    name=name,
                    known=known,
                )
            )


class PluginLoadError(MossError):
    """A plugin of others cannot be imported or made; ``reason`` is what its code raised."""

    def __init__(self, name: str, reason: str) -> None:
        super().__init__(Reason("the plugin {name} cannot be loaded: {reason}", name=name, reason=reason))


@dataclass(frozen=True)
class PluginSettings:
    """What users may say about plugins.

    search_folder   folder of text files that search reads instead of the web
    search_url      address of a SearXNG server
    image_url       address of an OpenAI-compatible or Automatic1111 server that draws
    picture_folder  where pictures are saved
    progress        called with (files done, files in all) while a folder is read
    notice          called with what of a folder is not searched, in one sentence
    """

    search_folder: Path | None = None
    search_url: str | None = None
    image_url: str | None = None
    picture_folder: Path | None = None
    progress: Callable[[int, int], None] | None = None
    notice: Callable[[str], None] | None = None


def _search(settings: PluginSettings) -> Plugin:
    from moss_jt.plugins.search import make_search

    return make_search(settings.search_folder, settings.search_url, settings.progress, settings.notice)


def _calculator(settings: PluginSettings) -> Plugin:
    from moss_jt.plugins.calculator import Calculator

    return Calculator()


def _solver(settings: PluginSettings) -> Plugin:
    from moss_jt.plugins.solver import Solver

    return Solver()


def _image(settings: PluginSettings) -> Plugin:
    from moss_jt.plugins.image import ImagePlugin

    return ImagePlugin(settings.image_url, settings.picture_folder)


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
        MossError: no plugin has that name, it cannot be loaded or lacks a setting, or it is no plugin; or these are no
            names in a list.
    """
    settings = settings or PluginSettings()
    if isinstance(names, str) or not isinstance(names, Iterable):
        given = [name.strip() for name in names.split(",")] if isinstance(names, str) else ["calculator"]
        raise MossError(f"plugins is {names!r}; give a list of names: plugins={given!r}.")
    made = [_make(name, settings) if isinstance(name, str) else name for name in names]
    for plugin in made:
        if fault := plugin_fault(plugin):
            raise MossError(
                Reason(
                    "the plugin {name} cannot be called: {fault}.", name=type(plugin).__name__, fault=fault
                )
            )
    order = {name: index for index, name in enumerate(BUILT_IN)}
    unique = {plugin.name: plugin for plugin in made}
    return sorted(unique.values(), key=lambda plugin: order.get(plugin.name, len(order)))


def _make(name: str, settings: PluginSettings) -> Plugin:
    if name in BUILT_IN:
        return BUILT_IN[name](settings)
    for point in entry_points(group=GROUP):
        if point.name == name:
            return _loaded(name, point.load)
    path, separator, class_name = name.rpartition(":")
    if separator and path.endswith(".py"):
        return _loaded(name, lambda: _class_of(Path(path).expanduser(), class_name))
    if name.endswith(".py"):
        raise PluginLoadError(name, Reason("name the class in it, too: {name}:CLASS", name=name))
    raise UnknownPluginError(name)


def _loaded(name: str, load: Callable[[], Any]) -> Plugin:
    """The plugin that the class makes which ``load`` imports.

    Raises:
        PluginLoadError: others' code raised something.
    """
    try:
        plugin: Plugin = load()()
    except ReasonedError as error:
        raise PluginLoadError(name, error.reason) from error
    except (Exception, SystemExit) as error:  # noqa: BLE001  others' code may raise anything
        reason = traceback.format_exception_only(error)[-1].strip()[:MAX_REASON_CHARACTERS]
        raise PluginLoadError(name, reason) from error
    return plugin


def _class_of(path: Path, class_name: str) -> Any:
    """A class of a file that the user named: it runs, as any program does that a user starts."""
    if not path.is_file():
        raise ReasonedError("there is no file {path}", path=path)
    spec = importlib.util.spec_from_file_location(f"moss_jt_own_{path.stem}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses look for their module
    spec.loader.exec_module(module)
    if not hasattr(module, class_name):
        raise ReasonedError("{path} has no class {name}", path=path, name=class_name)
    return getattr(module, class_name)
