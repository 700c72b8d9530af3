"""Small, bounded HTTP for plugins: a JSON or bytes answer from an address that the user gave, with limits on time and size."""

import json
import urllib.error
import urllib.parse
import urllib.request
from typing import Any

from moss_jt.errors import MossError

TIMEOUT_S = 15.0
MAX_JSON_BYTES = 4 << 20
SCHEMES = ("http", "https")


class _SameSchemes(urllib.request.HTTPRedirectHandler):
    """Follows redirects to http and https only."""

    max_redirections = 3

    def redirect_request(self, req: Any, fp: Any, code: int, msg: str, headers: Any, newurl: str) -> Any:
        if urllib.parse.urlsplit(newurl).scheme not in SCHEMES:
            raise urllib.error.HTTPError(newurl, code, "redirect to another scheme", headers, fp)
        return super().redirect_request(req, fp, code, msg, headers, newurl)


# No handlers for files and ftp: an answer of the network must not name a local file.
_opener = urllib.request.OpenerDirector()
for _handler in (
    urllib.request.ProxyHandler(),
    urllib.request.HTTPHandler(),
    urllib.request.HTTPSHandler(),
    urllib.request.HTTPDefaultErrorHandler(),
    urllib.request.HTTPErrorProcessor(),
    _SameSchemes(),
):
    _opener.add_handler(_handler)


def check_address(address: str, option: str) -> str:
    """The address without a slash at its end.

    Raises:
        MossError: it is no http or https address.
    """
    parts = urllib.parse.urlsplit(address)
    if parts.scheme not in SCHEMES or not parts.netloc:
        raise MossError(f"{option} {address!r} is no address; write it as http://host:port")
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
        OSError: no connection, an error status, or no answer in time.
        ValueError: the answer is larger than ``max_bytes``.
    """
    data = None if body is None else json.dumps(body).encode()
    all_headers = {
        "User-Agent": "moss-jt",
        **({"Content-Type": "application/json"} if data else {}),
        **(headers or {}),
    }
    request = urllib.request.Request(url, data=data, headers=all_headers)
    with _opener.open(request, timeout=timeout_s) as answer:
        content: bytes = answer.read(max_bytes + 1)
    if len(content) > max_bytes:
        raise ValueError(f"the answer has more than {max_bytes} bytes")
    return content


def fetch_json(
    url: str, *, body: Any = None, headers: dict[str, str] | None = None, max_bytes: int = MAX_JSON_BYTES
) -> Any:
    """The same, parsed as JSON."""
    return json.loads(fetch(url, body=body, headers=headers, max_bytes=max_bytes))
