"""One server over moss-tiny for all tests of a run, in this process."""

import contextlib
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import httpx

from moss_jt import Moss
from moss_jt.engine.sampling import SamplingParams
from moss_jt.plugins.registry import make_plugins
from moss_jt.serve.server import Server
from moss_jt.serve.settings import Limits, Settings
from tests.support.models import tiny_model_folder

NAME = "moss-tiny"


@contextlib.contextmanager
def served(moss: Moss | None, home: Path, **changes: Any) -> Iterator[Server]:
    """A server with such settings at a free port; without a model it is loading for ever."""
    settings = Settings(
        **{
            "home": home,
            "ports": [0],
            "plugins": make_plugins(["calculator", "solver"]),
            "default_plugins": ["calculator", "solver"],
            "params": SamplingParams(temperature=0),
            **changes,
        }
    )
    server = Server(settings, NAME)
    server.start()
    try:
        if moss is not None:
            server.ready(moss)
        yield server
    finally:
        server.stop()


@cache
def shared_moss() -> Moss:
    """moss-tiny, loaded once, with room for several conversations."""
    return Moss.load(tiny_model_folder(), memory="2GiB", context=1024, parallel=16)


@cache
def shared_server() -> Server:
    """One server for all tests that need no settings of their own; it ends with the run."""
    import atexit
    import shutil

    home = Path(mkdtemp(prefix="moss-jt-serving-"))
    context = served(shared_moss(), home)
    server = context.__enter__()

    def end() -> None:
        context.__exit__(None, None, None)
        shutil.rmtree(home, ignore_errors=True)

    atexit.register(end)
    return server


def url(server: Server) -> str:
    return f"http://127.0.0.1:{server.ports[0]}"


def client(server: Server, **options: Any) -> httpx.Client:
    return httpx.Client(base_url=url(server), timeout=60, **options)


__all__ = ["Limits", "NAME", "client", "served", "shared_moss", "shared_server", "url"]
