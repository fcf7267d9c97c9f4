"""Processes that are watched while they work (time, memory, processes, output) and replaced when they end."""

from __future__ import annotations

import contextlib
import json
import math
import os
import pickle
import signal
import socket
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Container, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import wait
from typing import Any

from kalman_rl.errors import ConfigError, RewardError
from kalman_rl.hosts.rewards.worker import HEAD, send

PROCESSES = 64
"""Most processes of one worker at a time, itself included."""
START = 180.0
"""Seconds that importing the function may take."""
LOOK, GLANCE = 0.1, 0.02
"""Least seconds between two looks at memory and processes, and between two glances at how many processes there are."""
ANSWER = 1 << 26
"""Longest answer, in bytes."""
_COMMAND = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[1]); "
    "from kalman_rl.hosts.rewards.worker import main; main(int(sys.argv[2]))"
)


@dataclass
class Outcome:
    """What became of a call: its answer, or in words why there is none; and the seconds it took."""

    answer: dict[str, Any] = field(default_factory=dict)
    failure: str = ""
    seconds: float = 0.0


class Worker:
    """A keeper and the process behind it that is called, seen from the trainer."""

    def __init__(self, setup: bytes, hear: Callable[[bytes], None]) -> None:
        self.control, theirs = socket.socketpair()
        self.output, writing = os.pipe()
        command = [sys.executable, "-c", _COMMAND, json.dumps(sys.path), str(theirs.fileno())]
        try:
            self.keeper = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=writing,
                stderr=writing,
                pass_fds=[theirs.fileno()],
                start_new_session=True,
            )
        finally:
            theirs.close()
            os.close(writing)
        os.set_blocking(self.output, False)
        self.hear, self.since = hear, time.monotonic()
        self.name = self.refused = ""
        self.source: str | None = None
        self.gone = False
        self.pid = 0
        self.channel: socket.socket | None = None
        self.job: int | None = None
        self.done: Outcome | None = None
        self._lines, self._answer, self._descriptors = b"", bytearray(), deque[int]()
        with contextlib.suppress(OSError):  # it ended at once: read as such
            send(self.control, setup)

    @property
    def idle(self) -> bool:
        return self.channel is not None and self.job is None

    def take(self, job: int, data: bytes, seconds: float) -> None:
        """Begin a call."""
        assert self.channel is not None
        self.job, self.since, self.done = job, time.monotonic(), None
        self._answer.clear()
        self.channel.settimeout(seconds)
        try:
            send(self.channel, data)
        except OSError:
            self.kill("did not take its call")

    def kill(self, why: str) -> None:
        """End the worker with its process group; its call is over."""
        if self.pid:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self.pid, signal.SIGKILL)
        self._over(Outcome(failure=why))
        self._drop()

    def close(self) -> None:
        """End keeper and worker."""
        self.kill("closed")
        self.gone = True
        self.control.close()
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.keeper.pid, signal.SIGKILL)
        self.keeper.wait()
        os.close(self.output)
        while self._descriptors:
            os.close(self._descriptors.popleft())

    def sources(self) -> list[Any]:
        """What to wait for."""
        return [self.control, self.output, *([self.channel] if self.job is not None and self.channel else [])]

    def read(self, source: Any) -> None:
        """Take in what has arrived at one of :meth:`sources`."""
        if source is self.control:
            self._read_control()
        elif source is self.channel:
            self._read_answer()
        else:
            self.drain()

    def drain(self) -> None:
        """Hand on what was printed."""
        with contextlib.suppress(BlockingIOError, OSError):
            while data := os.read(self.output, 1 << 16):
                self.hear(data)

    def _read_control(self) -> None:
        try:
            data, descriptors, _, _ = socket.recv_fds(self.control, 1 << 16, 4)
        except OSError:
            data, descriptors = b"", []
        self._descriptors.extend(descriptors)
        if not data:
            self.kill("lost the process that kept it")
            self.gone = True
            return
        *lines, self._lines = (self._lines + data).split(b"\n")
        for line in lines:
            said = json.loads(line)
            if "pid" in said:
                self.pid, self.channel = said["pid"], socket.socket(fileno=self._descriptors.popleft())
            elif "ended" in said:
                self._over(Outcome(failure=_ending(said["ended"])))
                self._drop()
            else:
                self.name, self.refused = said.get("ready", ""), said.get("refused", "")
                self.source = said.get("source")

    def _read_answer(self) -> None:
        assert self.channel is not None
        try:
            data = self.channel.recv(1 << 20)
        except OSError:
            data = b""
        if not data:  # how it ended comes from the keeper; where it has only closed its side, time runs out
            self.channel.close()
            self.channel = None
            return
        self._answer += data
        if len(self._answer) < HEAD.size:
            return
        size = HEAD.unpack_from(self._answer)[0]
        if size > ANSWER:
            self.kill(f"answered with more than {ANSWER >> 20} MiB")
        elif len(self._answer) >= HEAD.size + size:
            try:
                found = json.loads(self._answer[HEAD.size : HEAD.size + size])
            except ValueError:
                self.kill("answered with something else than JSON")
            else:
                self._over(Outcome(found))

    def _over(self, outcome: Outcome) -> None:
        if self.job is not None and self.done is None:
            outcome.seconds = time.monotonic() - self.since
            self.done = outcome

    def _drop(self) -> None:
        self.pid, self.since = 0, time.monotonic()
        if self.channel is not None:
            self.channel.close()
            self.channel = None


class WorkerPool:
    """Up to ``workers`` processes that call one function.

    Args:
        make: pickled; a function without arguments that returns the function, called in each keeper.
        seconds: > 0, longest call. memory: bytes of a worker with all its processes; 0 is no limit.
        workers: most processes that call at the same time.
        hear: receives what is printed over there.

    Raises: ConfigError where the function cannot be made.
    """

    def __init__(
        self, make: bytes, *, seconds: float, memory: int, workers: int, hear: Callable[[bytes], None]
    ) -> None:
        self.seconds, self.memory, self.size, self.hear = seconds, memory, workers, hear
        self._setup = pickle.dumps({"make": make, "memory": memory})
        self._workers: list[Worker] = []
        self._next_look = self._next_glance = 0.0
        self._tasks, self._owner, self.name = 0, os.getpid(), ""
        self.source: str | None = None

    def start(self) -> None:
        """Start the first worker and wait for it; ``name`` and ``source`` are then the function's."""
        try:
            self._grow(1)
            while not any(worker.channel for worker in self._workers):
                self._step()
        except BaseException:
            self.close()
            raise

    def run(self, jobs: Sequence[bytes]) -> list[Outcome]:
        """Make all calls, each at most once; their outcomes in order. Whatever ends this ends the calls."""
        waiting, found = deque(range(len(jobs))), [Outcome() for _ in jobs]
        left = len(jobs)
        try:
            self._grow(min(left, self.size))
            self._next_look, self._tasks = time.monotonic() + LOOK, tasks()
            while left:
                for worker in self._workers:
                    if worker.done is not None and worker.job is not None:
                        found[worker.job], worker.job, worker.done = worker.done, None, None
                        left -= 1
                    if worker.idle and waiting:
                        number = waiting.popleft()
                        worker.take(number, jobs[number], self.seconds)
                if left and not any(worker.done for worker in self._workers):
                    self._step()
        except BaseException:
            for worker in self._workers:
                if worker.job is not None:
                    worker.kill("was interrupted")
                    worker.job = worker.done = None
            raise
        for worker in self._workers:
            worker.drain()
        return found

    def close(self) -> None:
        """End every process; the next call starts new ones. A fork of the trainer that ends takes none with it."""
        while self._workers and os.getpid() == self._owner:
            self._workers.pop().close()

    def _grow(self, size: int) -> None:
        self._workers = [worker for worker in self._workers if not self._closed(worker)]
        while len(self._workers) < size:
            self._workers.append(Worker(self._setup, self.hear))

    @staticmethod
    def _closed(worker: Worker) -> bool:
        if worker.gone:
            worker.close()
        return worker.gone

    def _step(self) -> None:
        """Wait for something to happen, and see that nobody takes too much."""
        now = time.monotonic()
        busy = [worker for worker in self._workers if worker.job is not None]
        coming = [worker for worker in self._workers if worker.job is None and worker.channel is None]
        ends = [worker.since + self.seconds for worker in busy] + [worker.since + START for worker in coming]
        glance = now + GLANCE if busy else math.inf
        sources = [(source, worker) for worker in self._workers for source in worker.sources()]
        ready = wait([source for source, _ in sources], max(min([*ends, glance]) - now, 0.0))
        for source, worker in sources:
            if source in ready:
                worker.read(source)
        now = time.monotonic()
        for worker in list(self._workers):
            self.name, self.source = self.name or worker.name, self.source or worker.source
            if worker.gone:
                self._replace(worker)
            elif worker.refused:
                raise ConfigError(worker.refused)
            elif worker in busy and worker.done is None and now >= worker.since + self.seconds:
                worker.kill(f"took longer than {self.seconds:g} s")
            elif worker in coming and worker.channel is None and now >= worker.since + START:
                raise RewardError(
                    f"reward: got no worker within {START:g} s, expected its module to be imported by then"
                )
        if not busy:
            return
        count = tasks()
        self._tasks = min(self._tasks, count)
        if now >= (self._next_glance if count > self._tasks + PROCESSES else self._next_look):
            self._look([worker for worker in busy if worker.done is None])

    def _replace(self, worker: Worker) -> None:
        """A keeper has ended: at its first start that is the module's doing, later somebody else's."""
        if not worker.name:
            status = worker.keeper.wait()
            raise ConfigError(
                f"reward: the process that imports it {_ending_of(status)}, expected a module that imports without "
                "ending its process"
            )
        if worker.job is None:
            worker.close()
            self._workers[self._workers.index(worker)] = Worker(self._setup, self.hear)

    def _look(self, busy: Sequence[Worker]) -> None:
        start = time.monotonic()
        used = usage({worker.pid for worker in busy})
        for worker in busy:
            processes, memory = used.get(worker.pid, (0, 0))
            if processes > PROCESSES:
                worker.kill(f"had more than {PROCESSES} processes")
            elif self.memory and memory > self.memory:
                worker.kill(f"used more than {self.memory / 2**30:g} GiB")
        now = time.monotonic()  # where there are many processes, a look takes long
        self._next_look, self._next_glance = now + max(LOOK, 20 * (now - start)), now + (now - start)


def tasks() -> int:
    """Processes and threads of this machine; 0 where there is no /proc."""
    with contextlib.suppress(OSError, ValueError, IndexError), open("/proc/loadavg") as file:
        return int(file.read().split()[3].partition("/")[2])
    return 0


def usage(groups: Container[int]) -> dict[int, tuple[int, int]]:
    """Processes and resident bytes of process groups, as far as is needed to see that one has too many; nothing where
    there is no /proc."""
    found: dict[int, tuple[int, int]] = {}
    page = os.sysconf("SC_PAGE_SIZE")
    with contextlib.suppress(OSError):
        for name in reversed(os.listdir("/proc")):  # the youngest first
            if name.isdigit():
                with (
                    contextlib.suppress(OSError, ValueError, IndexError),
                    open(f"/proc/{name}/stat", "rb") as file,
                ):
                    fields = file.read().rpartition(b")")[2].split()
                    if (group := int(fields[2])) in groups:
                        processes, memory = found.get(group, (0, 0))
                        found[group] = (processes + 1, memory + page * int(fields[21]))
                        if processes >= PROCESSES:
                            break
    return found


def _ending(status: int) -> str:
    """How a process ended, from what ``wait`` says of it."""
    return _ending_of(os.waitstatus_to_exitcode(status))


def _ending_of(code: int) -> str:
    if code < 0:
        with contextlib.suppress(ValueError):
            return f"was ended by {signal.Signals(-code).name}"
        return f"was ended by signal {-code}"
    return f"ended with exit code {code}"
