"""Small, bounded HTTP for plugins: a JSON or bytes answer from an address that the user gave, with limits on time and size."""

import json
import time
import urllib.error
import urllib.parse
import urllib.request
from typing import Any

from moss_jt.errors import MossError, Reason, ReasonedError

TIMEOUT_S = 15.0
MAX_JSON_BYTES = 4 << 20
SCHEMES = ("http", "https")
CHUNK_BYTES = 1 << 16
KEYS = ("Authorization", "X-api-key")  # as urllib spells them
LOOPBACK = ("localhost", "127.0.0.1", "::1")


class _SafeRedirects(urllib.request.HTTPRedirectHandler):
    """Follows redirects to http and https only, and takes keys to no other server."""

    max_redirections = 3

    def redirect_request(self, req: Any, fp: Any, code: int, msg: str, headers: Any, newurl: str) -> Any:
        if urllib.parse.urlsplit(newurl).scheme not in SCHEMES:
            raise urllib.error.HTTPError(newurl, code, "redirect to another scheme", headers, fp)
        following = super().redirect_request(req, fp, code, msg, headers, newurl)
        if (
            following is not None
            and urllib.parse.urlsplit(newurl)[:2] != urllib.parse.urlsplit(req.full_url)[:2]
        ):
            for key in KEYS:
                following.remove_header(key)
        return following


class _NoProxyForLoopback(urllib.request.ProxyHandler):
    """The user's proxies, but not for servers on this machine, which no proxy can reach."""

    def proxy_open(self, req: Any, proxy: Any, type: Any) -> Any:
        if urllib.parse.urlsplit(req.full_url).hostname in LOOPBACK:
            return None
        return super().proxy_open(req, proxy, type)


def _opener() -> urllib.request.OpenerDirector:
    """Without handlers for files and ftp: an answer of the network must not name a local file."""
    opener = urllib.request.OpenerDirector()
    for handler in (
        _NoProxyForLoopback(),
        urllib.request.HTTPHandler(),
        urllib.request.HTTPSHandler(),
        urllib.request.HTTPDefaultErrorHandler(),
        urllib.request.HTTPErrorProcessor(),
        _SafeRedirects(),
    ):
        opener.add_handler(handler)
    return opener


def check_address(address: str, option: str) -> str:
    """The address without a slash at its end.

    Raises:
        MossError: it is no http or https address.
    """
    try:
        parts = urllib.parse.urlsplit(address)
        # The port is read, too: one that is no number would be noticed at the first search only.
        sound = parts.scheme in SCHEMES and bool(parts.hostname) and parts.port != 0
    except ValueError:
        sound = False
    if not sound or not address.isascii() or not address.isprintable() or " " in address:
        raise MossError(
            Reason(
                "{option} {address} is not an address; write it as http://host:port",
                option=option,
                address=f"{address!r:.200}",
            )
        )
    return address.rstrip("/")


def fetch(
    url: str,
    *,
    body: Any = None,
    headers: dict[str, str] | None = None,
    max_bytes: int,
    timeout_s: float = TIMEOUT_S,
) -> bytes:
    """What an address answers; ``body`` is sent as JSON.

    Raises:
        OSError: no connection, an error status, or no complete answer in time.
        ValueError: the answer is larger than ``max_bytes``, or the address is neither http nor https.
    """
    data = None if body is None else json.dumps(body).encode()
    all_headers = {
        "User-Agent": "moss-jt",
        **({"Content-Type": "application/json"} if data else {}),
        **(headers or {}),
    }
    if urllib.parse.urlsplit(url).scheme not in SCHEMES:
        raise ReasonedError("the address is neither http nor https")
    request = urllib.request.Request(url, data=data, headers=all_headers)
    deadline = time.monotonic() + timeout_s
    content = bytearray()
    with _opener().open(request, timeout=timeout_s) as answer:
        # A socket's timeout is for each read, so a server that sends a byte a second would never reach it.
        while chunk := answer.read1(CHUNK_BYTES):
            content += chunk
            if len(content) > max_bytes:
                raise ReasonedError("the answer has more than {limit} bytes", limit=max_bytes)
            if time.monotonic() > deadline:
                raise TimeoutError(Reason("the answer takes too long"))
    return bytes(content)


def fetch_json(
    url: str,
    *,
    body: Any = None,
    headers: dict[str, str] | None = None,
    max_bytes: int = MAX_JSON_BYTES,
    timeout_s: float = TIMEOUT_S,
) -> Any:
    """The same, parsed as JSON."""
    return json.loads(fetch(url, body=body, headers=headers, max_bytes=max_bytes, timeout_s=timeout_s))
