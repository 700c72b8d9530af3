"""Why a call failed, by the kind of exception that it raised."""

import json
import socket
import urllib.error

from moss_jt.errors import Reason

MAX_REASON_CHARACTERS = 200


def failure_of(error: BaseException) -> str:
    """A Reason where the exception carries one or is of a kind that every plugin meets; or else its name and what it says."""
    if isinstance(error, urllib.error.URLError) and isinstance(error.reason, Exception):
        error = error.reason  # what urllib met
    said = error.args[0] if error.args else ""
    if isinstance(said, Reason):
        return said
    if isinstance(error, urllib.error.HTTPError):
        return Reason("the server answered with error {code}", code=error.code)
    for kind, reason in _KINDS:
        if isinstance(error, kind):
            return reason
    if isinstance(error, OSError) and error.filename is not None:
        return _about_a_file(error)
    return described(error)


_KINDS: tuple[tuple[type[BaseException], Reason], ...] = (
    (ConnectionRefusedError, Reason("the connection was refused; is the server running?")),
    (socket.gaierror, Reason("the server's name is unknown; check the address and the network")),
    (TimeoutError, Reason("the server did not answer in time")),
    (ConnectionError, Reason("the connection was broken off")),
    (json.JSONDecodeError, Reason("the server's answer is not JSON")),
)


def _about_a_file(error: OSError) -> Reason:
    if isinstance(error, FileNotFoundError):
        return Reason("there is no file {path}", path=error.filename)
    if isinstance(error, PermissionError):
        return Reason("no permission for {path}", path=error.filename)
    return Reason("{path} cannot be read or written ({error})", path=error.filename, error=error.strerror)


def described(error: BaseException) -> str:
    """``ValueError: what it says``, short and on one line."""
    try:
        text = f"{type(error).__name__}: {error}"
    except Exception:  # noqa: BLE001  an exception of others may fail to say what it is
        text = type(error).__name__
    return " ".join(text.split())[:MAX_REASON_CHARACTERS]
