"""One server over moss-tiny for all tests of a run, in this process."""

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import httpx

from moss_jt import Moss
from moss_jt.engine.sampling import SamplingParams
from moss_jt.plugins.interface import Outcome
from moss_jt.plugins.registry import make_plugins
from moss_jt.serve.server import Server
from moss_jt.serve.settings import Settings
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


class WaitingPlugin:
    """A calculator that answers when it is let."""

    name, label, function, argument, style, timeout_s = (
        "waiting",
        "Calculator",
        "Calculate",
        "expression",
        "value",
        30.0,
    )

    def __init__(self) -> None:
        self.asked, self.gate = threading.Event(), threading.Event()

    def call(self, argument: str, wanted: int) -> Outcome:
        self.asked.set()
        self.gate.wait(20)
        return Outcome("1776")


@contextlib.contextmanager
def slowed(moss: Moss, seconds: float) -> Iterator[list[int]]:
    """A model whose passes take so long; yields how many tokens each had."""
    passes: list[int] = []
    forward = moss.model.forward_many

    def slow(runs: Any, *more: Any) -> Any:
        passes.append(sum(len(run.token_ids) for run in runs))
        time.sleep(seconds)
        return forward(runs, *more)

    moss.model.forward_many = slow  # type: ignore[method-assign]
    try:
        yield passes
    finally:
        del moss.model.forward_many


def wait_until(true: Callable[[], bool], seconds: float = 20.0) -> bool:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if true():
            return True
        time.sleep(0.01)
    return False
