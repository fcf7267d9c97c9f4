"""Rewards that hang, die, fill memory, fork, print or lie: a call of them ends, and nothing else does."""

from __future__ import annotations

import ctypes
import functools
import os
import pickle
import random
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy
import pytest

from kalman_rl.errors import ConfigError, RewardError
from kalman_rl.hosts.rewards import RewardRecord, SupervisedReward, pool
from kalman_rl.hosts.rewards.worker import given

GIB = 2**30


class Base(BaseException):
    """What an `except Exception` does not catch."""


def hostile(completions: list[str], **columns: Any) -> list[float]:
    """What each completion asks for, then 1.0 for all of them."""
    return [float(ACTS[text]() or 1.0) for text in completions]


def spin() -> None:
    while True:
        pass


def raising(error: BaseException) -> None:
    raise error


def fork(children: int, then: Callable[[], Any]) -> None:
    for _ in range(children):
        if os.fork() == 0:
            then()
    time.sleep(600)


def bomb() -> None:
    for _ in range(9):  # 512 processes, where nobody ends them before
        os.fork()
    time.sleep(600)


def hold(size: int) -> None:
    kept = b"x" * size
    time.sleep(600 + len(kept) % 2)


ACTS: dict[str, Callable[[], Any]] = {
    "fine": lambda: 1.0,
    "loop": spin,
    "number": lambda: len(str(10**10**8)),
    "exit": lambda: os._exit(3),
    "kill": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "stop": lambda: os.kill(os.getpid(), signal.SIGSTOP),
    "segfault": lambda: ctypes.string_at(0),
    "memory": lambda: len(bytearray(6 * GIB)),
    "quit": lambda: sys.exit(7),
    "error": lambda: raising(ValueError("boom")),
    "base": lambda: raising(Base("base")),
    "nan": lambda: float("nan"),
    "descriptors": lambda: os.closerange(0, 256),
    "stdout": lambda: os.close(1),
    "print": lambda: print("\x1b[31m" + "x" * 2_000_000),
    "bomb": bomb,
    "together": lambda: fork(3, lambda: hold(GIB // 2)),
}


def supervise(function: Any, *, said: list[str] | None = None, **limits: Any) -> SupervisedReward:
    make = pickle.dumps(functools.partial(given, function))
    return SupervisedReward(make, say=said.append if said is not None else None, **limits)


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    with open(f"/proc/{pid}/stat") as file:
        return file.read().rpartition(")")[2].split()[0] != "Z"


def until(done: Callable[[], bool], seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < end
        time.sleep(0.02)


def test_each_hostile_completion_is_missing_and_only_it() -> None:
    said: list[str] = []
    reward = supervise(hostile, said=said, seconds=1)
    why = {
        "loop": "took longer than 1 s",
        "exit": "ended with exit code 3",
        "kill": "was ended by SIGKILL",
        "segfault": "was ended by SIGSEGV",
        "memory": "raised MemoryError",
        "quit": "raised SystemExit",
        "error": "raised ValueError",
        "base": "raised Base",
        "nan": "",
        "descriptors": "ended with exit code 1",
        "number": "took longer than 1 s",
        "stop": "took longer than 1 s",
    }
    texts = [text for name in why for text in ("fine", name)]
    assert reward(texts) == [1.0, None] * len(why)
    assert reward.reasons == {x: list(why.values()).count(x) for x in why.values() if x}
    assert (reward.failed, reward.missing, reward.scored) == (len(why) - 1, len(why), len(why))
    failures = [text for text in said if "no reward" in text]
    assert len(failures) == 1 and "it is missing, not 0" in failures[0], said
    assert f"{len(why) - 1} of {2 * len(why)} completions" in reward.summary()
    assert reward(["fine"]) == [1.0]
    reward.close()


def test_the_first_traceback_is_shown() -> None:
    said: list[str] = []
    supervise(hostile, said=said)(["error", "error"])
    assert len(said) == 1 and "ValueError: boom" in said[0] and "raise error" in said[0]
    assert "kalman_rl" not in said[0].partition("\n")[2], "it begins with the function's own frames"


def test_output_is_shown_in_part_and_a_closed_stdout_is_no_matter() -> None:
    said: list[str] = []
    reward = supervise(hostile, said=said)
    assert reward(["print", "stdout", "fine"]) == [1.0] * 3
    assert sum(map(len, said)) < 40_000 and not any("\x1b" in text for text in said)
    assert said[-1].endswith("printed more than 20,000 characters; no more is shown")
    quiet: list[str] = []
    assert supervise(chatty, said=quiet)(["a"]) == [0.0]
    assert quiet == ["reward chatty printed: a line with  [2J"]


def chatty(completions: list[str], **columns: Any) -> list[float]:
    print("a line with \x1b[2J")
    return [0.0] * len(completions)


@pytest.mark.skipif(not os.path.exists("/proc/loadavg"), reason="processes are counted in /proc")
def test_processes_are_limited_and_their_memory_counts_together() -> None:
    reward = supervise(hostile, seconds=600, memory=8.0)  # so many processes are over 1 GiB together
    assert reward(["fine"]) == [1.0]
    assert reward(["bomb"]) == [None] and reward.reasons == {f"had more than {pool.PROCESSES} processes": 1}
    reward.close()
    reward = supervise(hostile, seconds=600, memory=1.0)
    assert reward(["together"]) == [None] and reward.reasons["used more than 1 GiB"] == 1
    reward.close()


def once(completions: list[str], marks: list[str], **columns: Any) -> list[float]:
    """Ends its process where a file is not there yet, which it then is."""
    for mark in marks:
        if not os.path.exists(mark):
            Path(mark).touch()
            os._exit(1)
    return [0.5] * len(completions)


def test_a_failure_that_does_not_come_again_costs_nothing(tmp_path: Path) -> None:
    reward = supervise(once)
    assert reward(["a"], marks=[str(tmp_path / "a")]) == [0.5] and reward.failed == 0
    marks = [str(tmp_path / name) for name in "abc"]  # the call ends at b; alone, c ends once more
    assert reward(["a", "b", "c"], marks=marks) == [0.5, 0.5, None] and reward.failed == 1


def whole(
    completions: list[str],
    prompts: list[str],
    trainer_state: Any,
    log_metric: Any,
    log_extra: Any,
    **columns: Any,
) -> list[float]:
    log_metric("seen", len(completions))
    log_extra("step", [trainer_state.global_step] * len(completions))
    columns["answer"][0].clear()
    return [float(len(text)) for text in completions]


def test_a_call_has_the_whole_batch_and_what_it_logs_arrives() -> None:
    metrics: dict[str, float] = {}
    extra: dict[str, Any] = {}
    answer = [{"a": 1}, {"b": 2}]
    state = SimpleNamespace(global_step=3, log_history=[{}] * 1000, callbacks=threading.Lock())
    log: Any = {"log_metric": metrics.__setitem__, "log_extra": extra.__setitem__}
    found = supervise(whole)(["a", "bb"], prompts=["p", "q"], answer=answer, trainer_state=state, **log)
    assert found == [1.0, 2.0] and answer == [{"a": 1}, {"b": 2}]
    assert metrics == {"seen": 2.0, "reward/missing": 0.0, "reward/failed": 0.0} and extra == {"step": [3, 3]}


def returning(completions: list[str], value: Any, **columns: Any) -> Any:
    return value


@pytest.fixture(scope="module")
def returned() -> Any:
    reward = supervise(returning)
    yield reward
    reward.close()


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ([1.0], "returned 1 values, expected a list of 2"),
        (["a", "b"], r"returned 'a' \(str\)"),
        (None, "a NoneType"),
    ],
)
def test_what_is_no_list_of_numbers_is_an_error_at_once(value: Any, message: str, returned: Any) -> None:
    with pytest.raises(RewardError, match=f"^reward: returning .*{message}"):
        returned(["a", "b"], value=value)


def levelled(completions: list[str], level: list[int], **columns: Any) -> list[float]:
    return [1.0 for _ in level]


def closed(completions: list[str]) -> list[float]:
    return [1.0 for _ in completions]


def confused(completions: list[str], **columns: Any) -> list[float]:
    return [levelled(completions)[0]]  # type: ignore[call-arg]


def test_columns_that_do_not_fit_are_an_error_at_once() -> None:
    for function, message in ((levelled, "'level'"), (closed, "unexpected keyword argument 'answer'")):
        with pytest.raises(RewardError, match=f"{function.__name__} cannot be called: .*{message}; .*answer"):
            supervise(function)(["a"], answer=["b"])
    assert supervise(confused)(["a"], answer=["b"]) == [None]


def test_what_cannot_be_sent_is_named(returned: Any) -> None:
    with pytest.raises(ConfigError, match="^reward_timeout: got a column 'lock' that cannot be sent"):
        returned(["a"], value=[1.0], lock=threading.Lock())
    with pytest.raises(ConfigError, match="environments"):
        returned(["a"], value=[1.0], environments=[object()])
    for limits, name in (
        ({"seconds": 0}, "timeout"),
        ({"seconds": float("nan")}, "timeout"),
        ({"memory": -1}, "memory"),
    ):
        with pytest.raises(ConfigError, match=f"^reward_{name}: got"):
            supervise(returning, **limits)


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("os._exit(7)", "the process that imports it ended with exit code 7"),
        ("ctypes.string_at(0)", "the process that imports it was ended by SIGSEGV"),
        ("1 / 0", "ZeroDivisionError"),
        ("print('no f here')", "expected a function"),
    ],
)
def test_a_module_that_does_not_survive_its_import(
    code: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from kalman_rl.registry import imported

    (tmp_path / "hostile_module.py").write_text(f"import ctypes, os\n{code}\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(ConfigError, match=message):
        SupervisedReward(pickle.dumps(functools.partial(imported, "reward", "hostile_module:f")))
    assert "hostile_module" not in sys.modules


def drawn(completions: list[str], **columns: Any) -> list[float]:
    return [random.random() + numpy.random.random() for _ in completions]


def unheard(completions: list[str], **columns: Any) -> list[float]:
    return [float.fromhex(f"0x{os.urandom(4).hex()}") for _ in completions]


def test_random_numbers_depend_on_completions_and_step_alone() -> None:
    one, other = supervise(drawn), supervise(drawn)
    at = lambda step: SimpleNamespace(global_step=step)  # noqa: E731
    first = one(["a", "b"], trainer_state=at(1))
    assert first[0] != first[1] and one(["a", "b"], trainer_state=at(2)) != first
    assert other(["b", "b"], trainer_state=at(1)) != first == other(["a", "b"], trainer_state=at(1))


def test_recorded_answers_are_read_once_after_a_resume(tmp_path: Path) -> None:
    file = tmp_path / "rewards.jsonl"
    at = lambda step: SimpleNamespace(global_step=step)  # noqa: E731

    reward = supervise(unheard)

    def calls(record: RewardRecord, *steps: int) -> list[Any]:
        reward.record = record
        return [reward(["a"], trainer_state=at(step)) for step in steps]

    first = calls(RewardRecord(file), 0, 2, 2, 4)
    assert len({x for (x,) in first}) == 4
    with file.open("a") as torn:
        torn.write('{"step": 4, "comple')
    again = calls(RewardRecord(file), 2, 2, 4, 4, 6)
    assert again[:3] == first[1:] and again[3] not in first
    later = calls(RewardRecord(file), 4, 4, 6)
    assert later == again[2:], "a second resume, behind the torn line"
    assert calls(RewardRecord(file, keep=True), 0, 2) == first[:2]
    assert calls(RewardRecord(file), 0, 2)[0] not in first and len(file.read_text().splitlines()) == 2


def test_a_recorded_failure_is_tried_again(tmp_path: Path) -> None:
    at = SimpleNamespace(global_step=2)
    reward = supervise(unless)
    reward.record = RewardRecord(tmp_path / "rewards.jsonl")
    first = reward(["a", "b"], mended=[str(tmp_path / "mended")] * 2, trainer_state=at)
    assert first[0] is not None and first[1] is None
    (tmp_path / "mended").touch()
    reward.record = RewardRecord(tmp_path / "rewards.jsonl")
    for _ in range(2):  # asked, then read
        assert reward(["a", "b"], mended=[str(tmp_path / "mended")] * 2, trainer_state=at) == [first[0], 2.0]
        (tmp_path / "mended").unlink(missing_ok=True)
        reward.record = RewardRecord(tmp_path / "rewards.jsonl")


def unless(completions: list[str], mended: list[str], **columns: Any) -> list[float]:
    if "b" in completions and not os.path.exists(mended[0]):
        raise ValueError("not yet")
    return [unheard([text])[0] if text == "a" else 2.0 for text in completions]


def leaky(completions: list[str], **columns: Any) -> list[float]:
    print("token", os.environ["SOME_API_TOKEN"])
    raise ValueError("x" * 490 + os.environ["SOME_API_TOKEN"])


def test_secrets_of_the_environment_are_not_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOME_API_TOKEN", "sesame-sesame-sesame")
    said: list[str] = []
    assert supervise(leaky, said=said)(["a"]) == [None]
    assert "token [redacted]" in said[0] and "sesame" not in "".join(said)


async def later(completions: list[str], **columns: Any) -> list[float]:
    return [2.0] * len(completions)


def test_async_rewards_run_in_the_worker() -> None:
    assert supervise(later)(["a"]) == [2.0]


def test_processes_that_others_end_are_replaced() -> None:
    reward = supervise(hostile)
    for victim in (lambda w: w.pid, lambda w: w.keeper.pid):
        assert reward(["fine"]) == [1.0]
        pid = victim(reward._pool._workers[0])
        os.kill(pid, signal.SIGKILL)
        until(lambda pid=pid: not alive(pid))
        assert reward(["fine"]) == [1.0] and reward.failed == 0


def test_a_fork_of_the_trainer_ends_no_worker() -> None:
    reward = supervise(hostile)
    pid = reward._pool._workers[0].pid
    fork = os.fork()
    if fork == 0:  # as a worker of a data loader that ends
        reward.close()
        os._exit(0)
    os.waitpid(fork, 0)
    assert reward(["fine"]) == [1.0] and reward._pool._workers[0].pid == pid


def test_processes_end_with_the_reward() -> None:
    reward = supervise(hostile)
    pids = [reward._pool._workers[0].pid, reward._pool._workers[0].keeper.pid]
    assert all(map(alive, pids))
    del reward
    until(lambda: not any(map(alive, pids)))


def test_ctrl_c_ends_the_call_and_nothing_else() -> None:
    reward = supervise(hostile)
    assert reward(["fine"]) == [1.0]
    pid = reward._pool._workers[0].pid
    timer = threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT))
    timer.start()
    with pytest.raises(KeyboardInterrupt):
        reward(["loop"])
    until(lambda: not alive(pid))
    assert reward(["fine"]) == [1.0]


def test_nothing_is_left_of_a_trainer_that_was_killed(tmp_path: Path) -> None:
    code = """
        from tests.hosts.test_rewards import hostile, supervise
        reward = supervise(hostile)
        reward(["fine"])
        worker = reward._pool._workers[0]
        print(worker.keeper.pid, worker.pid, flush=True)
        reward(["loop"])
    """
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    command = [sys.executable, "-c", textwrap.dedent(code)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as trainer:
        assert trainer.stdout is not None
        pids = [int(word) for word in trainer.stdout.readline().split()]
        assert len(pids) == 2 and all(map(alive, pids))
        trainer.kill()
    until(lambda: not any(map(alive, pids)))
