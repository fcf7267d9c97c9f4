"""The far side of a supervised reward: a keeper that imports the function once, and the worker it forks to call it.

    trainer  --starts-->  keeper  --forks-->  worker

The keeper is a fresh interpreter, so nothing is forked from a process with the trainer's threads or its CUDA context;
the next worker costs milliseconds even where the function's module takes seconds to import. It runs no foreign code
after that import: it waits, ends what the worker left behind in its process group, says how it ended, and forks again.
Calls come pickled from the trainer. Answers go back as JSON, so that no foreign object is ever unpickled there.
"""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import json
import os
import pickle
import random
import select
import signal
import socket
import struct
import sys
import time
import traceback
from collections.abc import Callable
from typing import Any

from kalman_rl.errors import ConfigError, RewardError
from kalman_rl.hosts.rewards.values import numbers
from kalman_rl.registry import source_digest
from kalman_rl.terminal import without_secrets

HEAD = struct.Struct(">Q")
MESSAGE, TRACEBACK = 500, 8000
"""Most characters of an error that are handed on, and of its traceback."""


def send(sock: socket.socket, data: bytes) -> None:
    """Send one message: its length, then it."""
    sock.sendall(HEAD.pack(len(data)) + data)


def receive(sock: socket.socket) -> bytes | None:
    """The next message; None where the other side is gone."""
    head = _exactly(sock, HEAD.size)
    return None if head is None else _exactly(sock, HEAD.unpack(head)[0])


def given(function: Any) -> Any:
    """The function itself: what makes it, where it can be sent."""
    return function


def main(number: int) -> None:
    """The keeper. ``number`` is the descriptor of the socket to the trainer."""
    import resource  # there is none on Windows

    control = socket.socket(fileno=number)
    setup = pickle.loads(receive(control) or b"")
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if setup["memory"]:
        resource.setrlimit(resource.RLIMIT_DATA, (setup["memory"], setup["memory"]))
    try:
        function = pickle.loads(setup["make"])()
        name = str(getattr(function, "__name__", type(function).__name__))
    except BaseException as error:
        text = str(error) if isinstance(error, ConfigError) else _said(error)
        _tell(control, refused=without_secrets(text))
        return
    _tell(control, ready=name, source=source_digest(function))
    woken, wake = os.pipe()
    os.set_blocking(wake, False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.set_wakeup_fd(wake)
    while True:
        trainer, ours = socket.socketpair()
        pid = _fork()
        if pid == 0:
            signal.set_wakeup_fd(-1)
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            for other in (trainer, control):
                other.close()
            os.close(woken)
            os.close(wake)
            _serve(ours, function, name)
        _own_group(pid)
        ours.close()
        socket.send_fds(control, [json.dumps({"pid": pid}).encode() + b"\n"], [trainer.fileno()])
        trainer.close()
        while not (ended := os.waitpid(pid, os.WNOHANG))[0]:
            ready = select.select([control.fileno(), woken], [], [])[0]
            if control.fileno() in ready and not control.recv(1):  # the trainer is gone
                _end_group(pid)
                return
            if woken in ready:
                os.read(woken, 4096)
        _end_group(pid)  # what the worker left behind
        _tell(control, ended=ended[1])


def _serve(sock: socket.socket, function: Callable[..., Any], name: str) -> None:
    """The worker: answer calls until the trainer is gone."""
    _own_group(0)
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(
            1
        )  # its threads do not survive a fork, and waiting for them hangs
    code = 1
    try:
        while (data := receive(sock)) is not None:
            send(sock, json.dumps(answer(function, name, pickle.loads(data)), default=str).encode())
        code = 0
    except BaseException:  # a call that cannot be unpickled here
        traceback.print_exc()
    finally:
        os._exit(code)


def answer(function: Callable[..., Any], name: str, job: dict[str, Any]) -> dict[str, Any]:
    """What a call came to: ``rewards``, or ``wrong`` (no list of numbers), or ``raised`` with its ``place`` and
    ``traceback``; what the function logged; and the seconds it took."""
    metrics: list[Any] = []
    extra: list[Any] = []
    found: dict[str, Any] = {"metrics": metrics, "extra": extra}
    columns, count = job["columns"], len(job["columns"]["completions"])
    _seed(job["seed"])
    start = time.perf_counter()
    try:
        returned = function(
            **columns,
            log_metric=lambda key, value: metrics.append([str(key), float(value)]),
            log_extra=lambda key, values: extra.append([str(key), list(values)]),
        )
        if inspect.iscoroutine(returned):
            returned = asyncio.run(returned)
        if inspect.isgenerator(returned):
            returned = list(returned)
        try:
            found["rewards"] = numbers(name, returned, count)
        except RewardError as error:
            found["wrong"] = without_secrets(str(error))
    except BaseException as error:
        if _does_not_fit(function, columns, error):
            names = ", ".join(columns)
            found["wrong"] = (
                f"reward: {name} cannot be called: {_said(error)}; expected a function of {names}, "
                "or of some of them and **columns"
            )
        found["raised"] = without_secrets(_said(error))
        found["place"] = _place(error)
        found["traceback"] = without_secrets(_trace(error))[-TRACEBACK:]
    found["seconds"] = time.perf_counter() - start
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(BaseException):
            stream.flush()
    return found


def _does_not_fit(function: Callable[..., Any], columns: dict[str, Any], error: BaseException) -> bool:
    """Whether a call failed at its own arguments (a column that is not there, no ``**columns``): no retry helps."""
    inside = error.__traceback__.tb_next if error.__traceback__ is not None else None
    if not isinstance(error, TypeError) or inside is not None:
        return False
    try:
        inspect.signature(function).bind(**columns, log_metric=None, log_extra=None)
    except TypeError:
        return True
    except ValueError:  # compiled, without a signature
        return False
    return False


def _said(error: BaseException) -> str:
    try:
        return f"{type(error).__name__}: {error}"[:MESSAGE]
    except BaseException:  # an error whose text raises
        return type(error).__name__


def _place(error: BaseException) -> str:
    frames = traceback.extract_tb(error.__traceback__)
    return f"{frames[-1].filename}:{frames[-1].lineno}"


def _trace(error: BaseException) -> str:
    """The traceback from the function's own frame on."""
    frames = error.__traceback__.tb_next if error.__traceback__ is not None else None
    return "".join(traceback.format_exception(type(error), error, frames))


def _seed(seed: int) -> None:
    """Seed every global generator that is loaded: the same completions at the same step see the same numbers."""
    random.seed(seed)
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed(seed % 2**32)
    if "torch" in sys.modules:
        sys.modules["torch"].manual_seed(seed)


def _fork() -> int:
    while True:
        try:
            return os.fork()
        except OSError:  # the table of processes is full: what fills it is being ended
            time.sleep(0.05)


def _own_group(pid: int) -> None:
    """Give a worker a process group of its own; both sides do it, so that it holds from the start."""
    with contextlib.suppress(OSError):
        os.setpgid(pid, pid)


def _end_group(pid: int) -> None:
    with contextlib.suppress(OSError):  # nobody is left in it
        os.killpg(pid, signal.SIGKILL)


def _tell(control: socket.socket, **what: Any) -> None:
    control.sendall(json.dumps(what).encode() + b"\n")


def _exactly(sock: socket.socket, size: int) -> bytes | None:
    data = bytearray()
    while len(data) < size:
        part = sock.recv(min(size - len(data), 1 << 20))
        if not part:
            return None
        data += part
    return bytes(data)
