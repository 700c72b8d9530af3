"""Search(query): one plugin over interchangeable sources of results."""

import dataclasses
import os
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from moss_jt.errors import MossError, Reason
from moss_jt.plugins.interface import Item, Outcome, Style

SERPER_KEY = "SERPER_API_KEY"
MAX_QUERY_CHARACTERS = 300


class SearchBackend(Protocol):
    """Where results come from."""

    def search(self, query: str, wanted: int) -> list[Item]:
        """At most ``wanted`` results, best first; any exception is ``No result.``"""
        ...


class Search:
    """The plugin."""

    name = "search"
    label = "Web search"
    function = "Search"
    argument = "query"
    style: Style = "items"
    timeout_s = 20.0

    def __init__(self, backend: SearchBackend) -> None:
        self.backend = backend

    def call(self, argument: str, wanted: int) -> Outcome:
        query = " ".join(argument.split())[:MAX_QUERY_CHARACTERS]
        items = self.backend.search(query, wanted) if query else []
        short = (dataclasses.replace(item, text=" ".join(item.text.split())) for item in items[:wanted])
        return Outcome(items=tuple(item for item in short if item.text))


def make_search(
    folder: Path | None,
    address: str | None,
    progress: Callable[[int, int], None] | None = None,
    notice: Callable[[str], None] | None = None,
) -> Search:
    """Search in a folder of text files, at a SearXNG address, by Serper where its key is set, else by ddgs.

    Raises:
        MossError: the folder is not there, or nothing to search with is installed.
    """
    if folder is not None:
        from moss_jt.plugins.folder_search import FolderSearch

        return Search(FolderSearch(folder, progress=progress, notice=notice))
    from moss_jt.plugins.web_search import Ddgs, SearXNG, Serper, ddgs_installed

    if address is not None:
        return Search(SearXNG(address))
    if key := os.environ.get(SERPER_KEY):
        return Search(Serper(key))
    if not ddgs_installed():
        raise MossError(
            Reason(
                "web search needs the package ddgs: pip install ddgs. Without it, start with --search-folder DIR to search "
                "your own text files, with --search-url and a SearXNG server's address, or with a Serper key in {key}.",
                key=SERPER_KEY,
            )
        )
    return Search(Ddgs())
