"""How long and how many connections may stay, so that those that ask for nothing lock nobody out.

A connection waits for its request, then for its answer, and is closed after one. At ``MAX_CONNECTIONS`` the oldest
that still waits for a request makes room for a new one.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

MAX_CONNECTIONS = 64
REQUEST_SECONDS = 5.0
"""From the connection to the end of the request's headers."""
ANSWER_SECONDS = 60.0
"""From there to the end of the answer, unless it is a stream."""


class Door:
    """Connections by their address at the other end, as ``scope["client"]`` has it."""

    def __init__(self) -> None:
        self._waiting: dict[Any, asyncio.Transport] = {}  # oldest first
        self._answering: dict[Any, asyncio.Transport] = {}
        self._ends: dict[Any, asyncio.TimerHandle] = {}

    def admit(self, transport: asyncio.Transport) -> None:
        """A new connection; one more than there may be ends the oldest that waits, or itself if none does."""
        if len(self._waiting) + len(self._answering) >= MAX_CONNECTIONS:
            if not self._waiting:
                transport.abort()
                return
            self._end(next(iter(self._waiting)))
        client = client_of(transport)
        self._waiting[client] = transport
        self._limit(client, transport, REQUEST_SECONDS)

    def leave(self, transport: asyncio.Transport) -> None:
        """A connection is over."""
        client = client_of(transport)
        if self._waiting.get(client) is transport or self._answering.get(client) is transport:
            self._forget(client)

    @contextmanager
    def answering(self, client: Any, *, stream: bool) -> Iterator[None]:
        """While a request is answered; the end of a ``stream`` is the stream's own business."""
        transport = self._waiting.pop(client, None)
        if transport is not None:
            self._answering[client] = transport
            self._ends.pop(client).cancel()
            if not stream:
                self._limit(client, transport, ANSWER_SECONDS)
        yield

    def _limit(self, client: Any, transport: asyncio.Transport, seconds: float) -> None:
        self._ends[client] = asyncio.get_running_loop().call_later(seconds, transport.abort)

    def _end(self, client: Any) -> None:
        transport = self._waiting[client]
        self._forget(client)
        transport.abort()

    def _forget(self, client: Any) -> None:
        self._waiting.pop(client, None)
        self._answering.pop(client, None)
        if (end := self._ends.pop(client, None)) is not None:
            end.cancel()


def client_of(transport: asyncio.Transport) -> Any:
    """Address of the other end as the server's ``scope["client"]`` has it."""
    name = transport.get_extra_info("peername") or ("", 0)
    return str(name[0]), int(name[1])


def guarded(door: Door) -> type[asyncio.Protocol]:
    """The server's protocol behind a door; a request that it cannot read ends the connection without a word."""
    from uvicorn.protocols.http.h11_impl import H11Protocol

    class Guarded(H11Protocol):
        def connection_made(self, transport: asyncio.Transport) -> None:
            super().connection_made(transport)
            door.admit(transport)

        def connection_lost(self, exc: Exception | None) -> None:
            door.leave(self.transport)
            super().connection_lost(exc)

        def data_received(self, data: bytes) -> None:
            try:
                super().data_received(data)
            except Exception:  # h11 and uvicorn know many; none of them is worth a page of the terminal
                self.transport.abort()

    return Guarded
