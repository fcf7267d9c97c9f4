"""A reward function that cannot end or hang a run, in the place of the function itself."""

from __future__ import annotations

import os
import pickle
import types
import weakref
from array import array
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

from kalman_rl.checks import is_real
from kalman_rl.errors import ConfigError, RewardError, quote
from kalman_rl.hosts.rewards.pool import Outcome, WorkerPool
from kalman_rl.hosts.rewards.record import RewardRecord, digest
from kalman_rl.terminal import logger, printable

SECONDS, MEMORY = 60.0, 4.0
"""Defaults: longest call in seconds, memory of a worker in GiB."""
WORKERS = 4
"""Most processes that score single completions at the same time."""
PRINTED = 20_000
"""Characters of a reward's output that are shown in all."""


class SupervisedReward:
    """TRL's reward function, called in a watched process.

    A call gets the whole batch, as in TRL. Where it fails (time, memory, processes, an exception, the end of its
    process) every completion is scored once more, alone; one that fails again has no reward: None, never 0. What is no
    list of numbers is a mistake of the function for every completion, and a RewardError at once.

    Python's random numbers are the same for the same completions at the same optimizer step, and so are NumPy's and
    PyTorch's where the function's module imports them.

    Args:
        make: pickled; a function without arguments that returns the reward function. It is called over there.
        seconds: > 0, longest call.
        memory: GiB of one worker with its processes; 0 is no limit.
        say: receives a line when something failed or was printed; default: this package's logger.

    Attributes:
        missing, scored: replies without a reward and with one so far.
        failed: those of ``missing`` whose call failed. reasons: how often each way. first: what the first one said.
        seconds: that the function itself has taken so far.
        source: SHA-256 of the file that holds the function, or None.
        record: where answers of training are kept for a resume, or None.

    Raises: ConfigError where the function cannot be made, or a limit is out of range.
    """

    def __init__(
        self,
        make: bytes,
        *,
        seconds: float = SECONDS,
        memory: float = MEMORY,
        say: Callable[[str], None] | None = None,
    ) -> None:
        if not is_real(seconds) or not 0 < seconds < 1e9:
            raise ConfigError(f"reward_timeout: got {quote(seconds)}, expected seconds above 0")
        if not is_real(memory) or not 0 <= memory < 1e6:
            raise ConfigError(f"reward_memory: got {quote(memory)}, expected GiB, or 0 for no limit")
        if not hasattr(os, "fork"):
            raise ConfigError(
                "reward_timeout: got a system without fork, expected Linux or macOS; leave it unset"
            )
        self.say = say or (lambda text: logger.warning("%s", text))
        self.missing = self.scored = self.failed = 0
        self.reasons: Counter[str] = Counter()
        self.first = ""
        self.seconds = 0.0
        self.record: RewardRecord | None = None
        self._printed, self._line, self._slow = 0, b"", False
        hear = weakref.WeakMethod(self._hear)  # the pool must not keep alive what ends it
        self._pool = WorkerPool(
            make,
            seconds=seconds,
            memory=round(memory * 2**30),
            workers=min(WORKERS, os.cpu_count() or 1),
            hear=lambda data: found(data) if (found := hear()) else None,
        )
        self.__name__ = "reward"  # until it is known
        self._pool.start()
        self.__name__, self.source = self._pool.name, self._pool.source
        self._end = weakref.finalize(self, self._pool.close)

    def close(self) -> None:
        """End the processes; another call starts new ones."""
        self._pool.close()

    def __call__(self, completions: list[Any], **columns: Any) -> list[float | None]:
        count = len(completions)
        log = {name: columns.pop(name, None) for name in ("log_metric", "log_extra")}
        state = columns.pop("trainer_state", None)
        if columns.get("environments") is not None:
            raise ConfigError(
                "reward_timeout: got a trainer with environments, expected none because they live in the trainer's "
                "process; leave it unset"
            )
        scored = [completions, columns.get("prompts"), _tokens(columns.get("completion_ids"))]
        step = None if state is None else int(getattr(state, "global_step", 0))
        key = digest(self.__name__, self.source, *scored)
        columns |= {"completions": completions, "trainer_state": _plain(state)}
        answer = self._recorded(step, key, columns, count)
        rewards: list[float | None] = answer["rewards"]
        self._count(rewards, answer, log["log_metric"])
        for name, calls in (("log_metric", answer["metrics"]), ("log_extra", answer["extra"])):
            for arguments in calls if callable(log[name]) else []:
                log[name](*arguments)
        return rewards

    def _recorded(self, step: int | None, key: str, columns: dict[str, Any], count: int) -> dict[str, Any]:
        """The answer of a call; in training it is read from the record where it can be, and written there."""
        seed = f"{step} {key}"
        if self.record is None or step is None:
            return self._ask(columns, count, seed)
        known = self.record.find(step, key)
        if known is None:
            answer = self._ask(columns, count, seed)
        elif known["failed"]:  # perhaps the function was mended since
            again = self._alone(columns, known["failed"], count, seed)
            both = zip(known["rewards"], again["rewards"], strict=True)
            answer = again | {"rewards": [new if old is None else old for old, new in both]}
        else:
            return known
        self.record.add(step, key, answer, again=known is not None)
        return answer

    def _ask(self, columns: dict[str, Any], count: int, key: str) -> dict[str, Any]:
        """The answer of a call with all completions, or else of calls with one each."""
        outcome = self._pool.run([self._job(columns, key)])[0]
        if not self._problem(outcome):
            return outcome.answer | {"failed": []}
        found = self._alone(columns, range(count), count, key)
        if outcome.failure.startswith("took longer") and not found["failed"] and count > 1 and not self._slow:
            self._slow = True
            self.say(
                f"reward {self.__name__}: a call with {count} completions {outcome.failure}, each of them alone did "
                "not; a larger --reward-timeout saves scoring them twice"
            )
        return found

    def _alone(self, columns: dict[str, Any], which: Sequence[int], count: int, key: str) -> dict[str, Any]:
        """Answer of calls with one completion each; the others have no reward."""
        jobs = [
            self._job(
                {
                    n: v[i : i + 1] if isinstance(v, list) and len(v) == count else v
                    for n, v in columns.items()
                },
                f"{key} {i}",
            )
            for i in which
        ]
        rewards: list[float | None] = [None] * count
        failed, metrics, extra = [], [], dict[str, list[Any]]()
        for i, outcome in zip(which, self._pool.run(jobs), strict=True):
            if problem := self._problem(outcome):
                failed.append(i)
                self._note(problem, outcome)
                continue
            rewards[i] = outcome.answer["rewards"][0]
            metrics += outcome.answer["metrics"]
            for name, values in outcome.answer["extra"]:
                extra.setdefault(name, [None] * count)[i] = values[0] if values else None
        return {
            "rewards": rewards,
            "failed": failed,
            "metrics": metrics,
            "extra": [list(x) for x in extra.items()],
        }

    def _job(self, columns: dict[str, Any], key: str) -> bytes:
        job = {"columns": columns, "seed": int(digest(key)[:16], 16)}
        try:
            return pickle.dumps(job)
        except Exception as error:
            for name, value in columns.items():
                try:
                    pickle.dumps(value)
                except Exception:
                    raise ConfigError(
                        f"reward_timeout: got a column {quote(name)} that cannot be sent to a worker "
                        f"({error}), expected plain values; leave the column out, or reward_timeout unset"
                    ) from error
            raise

    def _problem(self, outcome: Outcome) -> str:
        """Why a call has no rewards; "" where it has. Raises: RewardError for what is no list of numbers."""
        self.seconds += outcome.answer.get("seconds", 0.0)
        if "wrong" in outcome.answer:
            raise RewardError(outcome.answer["wrong"])
        if "raised" in outcome.answer:
            return f"raised {outcome.answer['raised'].partition(':')[0]}"
        return outcome.failure

    def _note(self, problem: str, outcome: Outcome) -> None:
        if not self.reasons:
            found = outcome.answer
            self.first = f"{found['raised']}; at {found['place']}" if "raised" in found else problem
            self.say(
                f"reward {self.__name__}: a completion has no reward because its call failed twice ({self.first}); it "
                f"is missing, not 0; what follows is only counted\n{found.get('traceback', '')}".rstrip()
            )
        self.reasons[problem] += 1

    def _count(self, rewards: list[float | None], answer: dict[str, Any], log_metric: Any) -> None:
        missing = rewards.count(None)
        self.missing += missing
        self.scored += len(rewards) - missing
        self.failed += len(answer["failed"])
        if rewards and callable(log_metric):
            log_metric("reward/missing", missing / len(rewards))
            log_metric("reward/failed", len(answer["failed"]) / len(rewards))

    def summary(self) -> str:
        """How many completions have no reward because calls failed, and why; "" for none."""
        why = ", ".join(f"{count} {reason}" for reason, count in self.reasons.most_common(5))
        return (
            f"{self.__name__}: {self.failed} of {self.missing + self.scored} completions have no reward because their "
            f"calls failed ({why}; the first: {self.first})"
            if self.failed
            else ""
        )

    def _hear(self, data: bytes) -> None:
        """Show what was printed, line by line, until it is enough."""
        if self._printed > PRINTED:
            return
        *lines, self._line = (self._line + data).split(b"\n")
        if len(self._line) > PRINTED:
            lines, self._line = [*lines, self._line], b""
        for line in lines:
            self._printed += len(line) + 1
            if self._printed > PRINTED:
                self.say(
                    f"reward {self.__name__}: printed more than {PRINTED:,} characters; no more is shown"
                )
                return
            self.say(f"reward {self.__name__} printed: {printable(line.decode(errors='replace'))}")


def _tokens(rows: Any) -> Any:
    """Token ids in fewer characters, quick to digest."""
    try:
        return [array("q", row).tobytes().hex() for row in rows]
    except (TypeError, OverflowError):
        return rows


def _plain(state: Any) -> Any:
    """The numbers, texts and switches of a trainer's state: enough to shape a reward, and quick to send."""
    if state is None:
        return None
    plain = {
        name: value
        for name, value in vars(state).items()
        if value is None or isinstance(value, bool | int | float | str)
    }
    return types.SimpleNamespace(**plain)
