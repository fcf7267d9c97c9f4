"""The board's server as an ASGI application: three addresses below a secret path, GET only, no file route."""

from __future__ import annotations

import asyncio
import hmac
import json
from collections.abc import AsyncIterator, Callable, Collection
from typing import Any

from starlette.responses import HTMLResponse, PlainTextResponse, Response, StreamingResponse

from kalman_rl.instruments.board.door import Door
from kalman_rl.instruments.board.page import PAGE_POLICY, POLICY, shell
from kalman_rl.instruments.board.source import Source
from kalman_rl.terminal import logger

MAX_LISTENERS = 16
HEARTBEAT = 15.0
HEADERS = {
    "Connection": "close",
    "Cache-Control": "no-store",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
}


class BoardApp:
    """ASGI application.

    ``/TOKEN/`` is the frame, ``/TOKEN/page`` the report, ``/TOKEN/events`` a stream of changes; anything else is 404.
    A Host header that is not in ``hosts`` is 400 before anything else is looked at, so that a page elsewhere whose
    name resolves to this machine learns nothing; then a method other than GET is 405.

    Args:
        source: what is shown.
        token: the secret part of the address.
        hosts: accepted Host headers, with port.
        every: seconds between looks at the run's files.
        closing: whether the server is about to stop, which ends the streams.
    """

    def __init__(
        self,
        source: Source,
        token: str,
        hosts: Collection[str],
        *,
        every: float = 2.0,
        closing: Callable[[], bool] = lambda: False,
    ) -> None:
        self.source, self.token, self.hosts = source, token, frozenset(host.lower() for host in hosts)
        self.every, self.closing = every, closing
        self.door = Door()
        self._listeners = 0

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "http":
            name = self._asked(scope)
            stream = name == "events"
            self._listeners += stream  # before anything is awaited, so that no two take the last place
            try:
                with self.door.answering(scope["client"], stream=stream):
                    try:
                        response = await self._answer(name)
                    except Exception as error:
                        logger.error("the board could not answer: %s: %s", type(error).__name__, error)
                        response = PlainTextResponse("the board could not answer\n", 500)
                    for key, value in HEADERS.items():
                        response.headers.setdefault(key, value)
                    await response(scope, receive, send)
            finally:
                self._listeners -= stream
        elif scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})

    def _asked(self, scope: Any) -> str | Response:
        """The name of what is asked for, or the refusal of who asks."""
        hosts = [value.decode("latin-1").lower() for name, value in scope["headers"] if name == b"host"]
        if len(hosts) != 1 or hosts[0] not in self.hosts:
            return PlainTextResponse("wrong host\n", 400)
        if scope["method"] != "GET":
            return PlainTextResponse("GET only\n", 405, {"Allow": "GET"})
        _, _, rest = scope["path"].partition("/")
        token, slash, name = rest.partition("/")
        if not slash or not hmac.compare_digest(token.encode("utf-8", "replace"), self.token.encode()):
            return PlainTextResponse("not found\n", 404)
        return str(name)

    async def _answer(self, name: str | Response) -> Response:
        if isinstance(name, Response):
            return name
        if name == "":
            version = await asyncio.to_thread(self.source.look)
            return HTMLResponse(
                shell(self.source.run.name, version.version, version.text, version.share),
                headers={"Content-Security-Policy": POLICY},
            )
        if name == "page":
            status, page = await asyncio.to_thread(self.source.page)
            headers = {"Content-Security-Policy": PAGE_POLICY, "X-Frame-Options": "SAMEORIGIN"}
            return HTMLResponse(page, status, headers)
        if name == "events":
            if self._listeners > MAX_LISTENERS:
                return PlainTextResponse("too many listeners\n", 503, {"Retry-After": "10"})
            return StreamingResponse(self._events(), media_type="text/event-stream")
        return PlainTextResponse("not found\n", 404)

    async def _events(self) -> AsyncIterator[str]:
        """One event at the start and one for every change; ends when the run is gone or the server stops."""
        loop = asyncio.get_running_loop()
        last, spoke = None, loop.time()
        while not self.closing():
            seen = await asyncio.to_thread(self.source.look)
            if not seen.version:
                yield _event("gone", {"text": seen.text})
                return
            if seen.version != last:
                last, spoke = seen.version, loop.time()
                yield _event("changed", {"version": seen.version, "text": seen.text, "share": seen.share})
            elif loop.time() - spoke > HEARTBEAT:
                spoke = loop.time()
                yield ": still here\n\n"
            await self._pause()

    async def _pause(self) -> None:
        left = self.every
        while left > 0 and not self.closing():
            await asyncio.sleep(min(left, 0.25))
            left -= 0.25


def _event(name: str, data: dict[str, Any]) -> str:
    return f"event: {name}\ndata: {json.dumps(data)}\n\n"
