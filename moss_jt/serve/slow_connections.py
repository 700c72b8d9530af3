"""HTTP as uvicorn speaks it, and connections that send no request, or only half of one, are closed in time."""

import asyncio

from uvicorn.protocols.http.h11_impl import H11Protocol


def bounded_protocol(most_s: float) -> type[H11Protocol]:
    """uvicorn's protocol, for which a request's head must have arrived within so many seconds of its first byte."""

    class BoundedProtocol(H11Protocol):
        _deadline: asyncio.TimerHandle | None = None

        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
            super().connection_made(transport)
            self._watch()

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            self._watch()

        def connection_lost(self, exc: Exception | None) -> None:
            self._end_watch()
            super().connection_lost(exc)

        def _watch(self) -> None:
            if self.cycle is not None and not self.cycle.response_complete:
                self._end_watch()
            elif self._deadline is None:
                self._deadline = self.loop.call_later(most_s, self.transport.close)

        def _end_watch(self) -> None:
            if self._deadline is not None:
                self._deadline.cancel()
                self._deadline = None

    return BoundedProtocol
