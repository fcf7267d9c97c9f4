"""Serve the board on this machine, in a separate process that only reads the run's folder."""

from __future__ import annotations

import contextlib
import gc
import os
import secrets
import socket
import webbrowser
from collections.abc import Callable
from pathlib import Path
from typing import Any

from kalman_rl.checks import is_real, is_whole
from kalman_rl.errors import ConfigError, PlaceError, extra, quote
from kalman_rl.instruments.board.app import BoardApp
from kalman_rl.instruments.board.door import guarded
from kalman_rl.instruments.board.source import Source
from kalman_rl.terminal import tell

LOOPBACK = {"127.0.0.1": "127.0.0.1", "localhost": "127.0.0.1", "::1": "::1"}
"""Accepted names and the address each binds to."""


def serve(
    run: Path,
    *,
    host: str = "127.0.0.1",
    port: int = 0,
    every: float = 2.0,
    browser: bool = False,
    say: Callable[[str], None] = tell,
) -> int:
    """Serve until Ctrl-C; returns the exit code 0.

    Args:
        run: directory of a run, or of a study.
        host: a loopback address; nothing else is accepted.
        port: 0 takes a free one.
        every: in [0.1, 3600], seconds between looks at the run's files.
        browser: open the page.
        say: what the address is given to.

    Raises: ConfigError for a setting out of range; PlaceError without a run there; AdapterError without the server.
    """
    sock = listen(host, port)
    with contextlib.closing(sock):
        source = _source(run, every)
        bound = sock.getsockname()[1]
        token = secrets.token_urlsafe(24)
        app = BoardApp(source, token, accepted_hosts(bound), every=every)
        server = server_of(app)
        shown = f"[{host}]" if ":" in host else host
        address = f"http://{shown}:{bound}/{token}/"
        say(f"{address}  (only this machine can open it; Ctrl-C ends it)")
        if browser:
            webbrowser.open(address)
        _be_nice()
        with contextlib.suppress(KeyboardInterrupt):
            server.run(sockets=[sock])
    tell("board closed", error=True)
    gc.freeze()  # collecting at the end takes long at this priority
    return 0


def server_of(app: BoardApp) -> Any:
    """The server of the application, behind its door. Raises: AdapterError without uvicorn."""
    with extra("board", "kalman-rl board"):
        import uvicorn
    config = uvicorn.Config(
        app,
        http=guarded(app.door),
        log_level="critical",  # what clients send is not worth a line, and the token must be in no log
        access_log=False,
        lifespan="off",
        ws="none",
        server_header=False,
        proxy_headers=False,
        timeout_graceful_shutdown=2,
    )
    server = uvicorn.Server(config)
    app.closing = lambda: server.should_exit
    return server


def listen(host: str, port: int) -> socket.socket:
    """A listening socket on a loopback address. Raises: ConfigError for another address, or a port that is taken."""
    if not isinstance(host, str) or host not in LOOPBACK:
        raise ConfigError(
            f"host: got {quote(host)}, expected 127.0.0.1, localhost or ::1 because the page shows everything "
            "in the run; to see it from elsewhere, forward the port over ssh"
        )
    if not is_whole(port, 0, 65535):
        raise ConfigError(f"port: got {quote(port)}, expected 0 to 65535; 0 takes a free one")
    family = socket.AF_INET6 if ":" in LOOPBACK[host] else socket.AF_INET
    sock: Any = socket.socket(family, socket.SOCK_STREAM)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind((LOOPBACK[host], port))
        sock.listen(128)
    except OSError as error:
        sock.close()
        raise ConfigError(
            f"port: cannot listen on {host}:{port}: {error.strerror}; take another --port"
        ) from None
    return sock


def accepted_hosts(port: int) -> list[str]:
    """Host headers of the board's own address."""
    return [f"{name}:{port}" for name in ("127.0.0.1", "localhost", "[::1]")]


def _source(run: Path, every: float) -> Source:
    if not (is_real(every) and 0.1 <= every <= 3600):
        raise ConfigError(f"every: got {quote(every)}, expected 0.1 to 3600 seconds")
    source = Source(Path(run), least=every)
    if not source.look().version:
        raise PlaceError(f"{run}: got no manifest.json there or below, expected the directory of a run")
    return source


def _be_nice() -> None:
    """Training goes first where both share processors."""
    with contextlib.suppress(OSError, AttributeError):
        os.nice(19)
