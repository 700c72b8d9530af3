"""The server's life: it listens at once, loads the model, answers until it is told to stop, and ends answers cleanly then."""

import asyncio
import signal
import socket
import threading
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from types import FrameType
from typing import TYPE_CHECKING, Any

import uvicorn

from moss_jt.backend.allocator import use_few_arenas
from moss_jt.errors import MossError
from moss_jt.kernels.cpu.operators import let_others_run
from moss_jt.serve.app import make_app
from moss_jt.serve.kept_conversations import ConversationStores
from moss_jt.serve.service import Service
from moss_jt.serve.settings import Settings
from moss_jt.serve.slow_connections import bounded_protocol

if TYPE_CHECKING:
    from moss_jt.moss import Moss

STOP_S = 10
SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Server:
    """A service and the thread whose loop answers. The model computes in the engine's own thread.

    ports  where it listens
    """

    def __init__(self, settings: Settings, name: str) -> None:
        """
        Raises:
            MossError: a port is taken, or the address is not this machine's.
        """
        self.service = Service(settings, name)
        self.stores = ConversationStores(self.service, settings.home)
        self._sockets = [listening(settings.host, port) for port in settings.ports]
        self.ports = [listener.getsockname()[1] for listener in self._sockets]
        config = uvicorn.Config(
            make_app(self.service, self.stores),
            http=bounded_protocol(settings.limits.body_s),
            ws="none",
            lifespan="off",
            log_config=None,
            access_log=False,
            server_header=False,
            proxy_headers=False,
            timeout_graceful_shutdown=STOP_S,
        )
        self._uvicorn = uvicorn.Server(config)
        self._stop_listening: Callable[[], None] = lambda: None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread = threading.Thread(target=self._serve, name="moss-jt server", daemon=True)

    def start(self) -> None:
        """Begin to answer: before the model is loaded, that it is not."""
        use_few_arenas()
        self._thread.start()

    def ready(self, moss: "Moss") -> None:
        """Answer with this model, which nobody else may be loading another beside: its thread alone uses Jittor from now on."""
        let_others_run(moss.model.operators)
        self._stop_listening = moss.engine.listen(self.service.answers.computed)
        self.service.moss = moss

    def stop(self) -> None:
        """End all answers, and wait for that."""
        if self._loop is not None and self._thread.is_alive():
            asyncio.run_coroutine_threadsafe(self._stop(), self._loop)
        self._thread.join()
        self._stop_listening()
        self.stores.close()
        for listener in self._sockets:
            listener.close()

    async def _stop(self) -> None:
        await self.service.stop()
        self._uvicorn.should_exit = True

    def _serve(self) -> None:
        async def serve() -> None:
            self._loop = asyncio.get_running_loop()
            await self._uvicorn.serve(self._sockets)

        asyncio.run(serve())


def listening(host: str, port: int) -> socket.socket:
    """A socket that listens there.

    Raises:
        MossError: it cannot.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, protocol)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(512)
    except OSError as error:
        raise MossError(
            f"cannot listen at {host}, port {port}: {error.strerror or error}. Give another --host or --port."
        ) from error
    return listener


def run(
    server: Server, load: Callable[[], AbstractContextManager["Moss"]], say: Callable[[str], None]
) -> None:
    """Serve until SIGINT or SIGTERM; to be called in the main thread, where Jittor may start.

    Args:
        load: gives the model.
        say: tells the server's owner something, on one line.
    """
    stopped = threading.Event()

    def stop(number: int, frame: FrameType | None) -> Any:
        if stopped.is_set() or server.service.moss is None:
            raise KeyboardInterrupt  # a second time, or nothing is being answered yet: at once
        stopped.set()

    server.start()
    before = {number: signal.signal(number, stop) for number in SIGNALS}
    try:
        with load() as moss:
            server.ready(moss)
            say(f"{server.service.name} is ready.")
            stopped.wait()
            say("Stopping: answers that are being written end here.")
            server.stop()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def addresses(host: str, ports: Sequence[int]) -> list[str]:
    name = f"[{host}]" if ":" in host else host
    return [f"http://{name}:{port}" for port in ports]
