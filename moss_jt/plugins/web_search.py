"""The web as a source of search results: ddgs (no key), a SearXNG server, and Serper (as the reference service did)."""

import html
import importlib.util
import re
import urllib.parse
from typing import Any

from moss_jt.errors import ReasonedError
from moss_jt.plugins.http import check_address, fetch_json
from moss_jt.plugins.interface import Item, Source

SERPER_ADDRESS = "https://google.serper.dev"
MARKUP = re.compile(r"<[^>]{0,200}>")


def plain(text: object) -> str:
    """Text without markup and entities; anything but text is empty."""
    return html.unescape(MARKUP.sub("", text)) if isinstance(text, str) else ""


def item(text: object, title: object, address: object, label: str = "") -> Item:
    """A result whose address is shown to the user: only addresses of web pages are kept."""
    web = isinstance(address, str) and address.startswith(("http://", "https://"))
    return Item(plain(text), Source(plain(title), str(address) if web else ""), label)


def results_of(answer: Any, key: str) -> list[dict[str, Any]]:
    """The list of objects under ``key``, whatever the network sent."""
    entries = answer.get(key) if isinstance(answer, dict) else None
    return [entry for entry in entries if isinstance(entry, dict)] if isinstance(entries, list) else []


class SearXNG:
    """A SearXNG server that answers in JSON."""

    def __init__(self, address: str) -> None:
        self.address = check_address(address, "--search-url")

    def search(self, query: str, wanted: int) -> list[Item]:
        query_string = urllib.parse.urlencode({"q": query, "format": "json"})
        entries = results_of(fetch_json(f"{self.address}/search?{query_string}"), "results")
        items = [item(entry.get("content"), entry.get("title"), entry.get("url")) for entry in entries]
        return [entry for entry in items if entry.text][:wanted]


class Serper:
    """Google's results through serper.dev; an answer box stands alone, as in the recorded dialogues."""

    def __init__(self, key: str, address: str = SERPER_ADDRESS) -> None:
        self.key = key
        self.address = address

    def search(self, query: str, wanted: int) -> list[Item]:
        answer = fetch_json(f"{self.address}/search", body={"q": query}, headers={"X-API-KEY": self.key})
        box = answer.get("answerBox") if isinstance(answer, dict) else None
        if isinstance(box, dict) and (text := plain(box.get("answer") or box.get("snippet"))):
            title = plain(box.get("title"))
            return [item(text, title, box.get("link"), label=title)]
        entries = results_of(answer, "organic")
        items = [item(entry.get("snippet"), entry.get("title"), entry.get("link")) for entry in entries]
        return [entry for entry in items if entry.text][:wanted]


class Ddgs:
    """The package ddgs, which asks public search engines and needs no key."""

    def search(self, query: str, wanted: int) -> list[Item]:
        from ddgs import DDGS
        from ddgs.exceptions import DDGSException

        try:
            entries = DDGS(timeout=10).text(query, max_results=wanted)
        except DDGSException as error:
            raise ReasonedError("the search engines gave no answer ({error})", error=error) from error
        return [
            item(entry.get("body"), entry.get("title"), entry.get("href"))
            for entry in entries
            if isinstance(entry, dict)
        ]


def ddgs_installed() -> bool:
    return importlib.util.find_spec("ddgs") is not None
