"""Stopping a run and going on: signals at any time, before the first checkpoint and after the last step."""

from __future__ import annotations

import dataclasses
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("trl")

from kalman_rl.engine import held_out
from kalman_rl.engine import train as train_module
from kalman_rl.engine.config import TrainConfig, build, load_toml, to_toml, validate
from kalman_rl.engine.runs.reading import read_manifest, read_metrics
from kalman_rl.engine.runs.run import Run
from kalman_rl.errors import ConfigError

SMALL: dict[str, Any] = {
    "dtype": "float32",
    "task": "sort12",
    "method": "grpo",
    "steps": 4,
    "prompts_per_generation": 4,
    "completions_per_prompt": 4,
    "updates_per_generation": 2,
    "warmup_steps": 0,
    "lora_rank": 0,
    "eval_every": 0,
    "eval_prompts": 8,
    "eval_samples": 1,
    "save_every": 2,
    "traces_per_step": 0,
    "train_size": 32,
    "test_size": 16,
    "max_completion_tokens": 5,
    "quiet": True,
}
PATIENCE = 600  # seconds that a process may need to get somewhere
DRIVER = """
import os, sys, threading, time
from pathlib import Path

wanted, sign, command = int(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:]
from kalman_rl.engine import held_out
evaluate, calls = held_out.evaluate, 0

def slow(*args, **options):
    global calls
    calls += 1
    if calls == wanted:
        sign.write_text("here")
        while True:  # ends by the signal, which one long sleep may miss at its start
            time.sleep(0.1)
    return evaluate(*args, **options)

held_out.evaluate = slow
from kalman_rl.cli.main import main
sys.exit(main(command))
"""


def command(model_path: str, path: Path, **changes: Any) -> list[str]:
    flags = {k: v for k, v in SMALL.items() if k != "quiet"} | {"model": model_path, "run": path} | changes
    return ["train", *(word for k, v in flags.items() for word in (f"--{k.replace('_', '-')}", str(v)))]


def stopped_in(evaluation: int, number: int, tmp_path: Path, words: list[str]) -> tuple[int, str]:
    """Exit code and stderr of a process that gets a signal in the n-th evaluation."""
    sign = tmp_path / f"evaluation-{evaluation}"
    process = subprocess.Popen(
        [sys.executable, "-c", DRIVER, str(evaluation), str(sign), *words], stderr=subprocess.PIPE, text=True
    )
    try:
        until(sign.exists, process)
        process.send_signal(number)
        _, stderr = process.communicate(timeout=PATIENCE)
    finally:
        process.kill()
    return process.returncode, stderr


def until(condition: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.05)


def resumed(path: Path, allow_change: tuple[str, ...] = (), **changes: Any) -> int:
    config = build(TrainConfig, load_toml(path / "config.toml"))
    config = dataclasses.replace(config, run=path, **{"quiet": True} | changes)
    with Run.open(path) as run:
        return train_module.train(config, run, resume=True, allow_change=allow_change)


def start(model_path: str, path: Path, **changes: Any) -> int:
    config = build(TrainConfig, SMALL | {"model": model_path, "run": path} | changes)
    validate(config)
    with Run.create(path, to_toml(config), {}) as run:
        return train_module.train(config, run)


def steps(path: Path, kind: str) -> list[int]:
    return [row["step"] for row in read_metrics(path) if row["kind"] == kind]


def model(path: Path, name: str = "model") -> bytes:
    return (path / "model" / f"{name}.safetensors").read_bytes()


def interrupt(monkeypatch: pytest.MonkeyPatch, evaluation: int, number: int = signal.SIGTERM) -> None:
    """Send this process a signal at the beginning of the n-th evaluation."""
    evaluate, calls = held_out.evaluate, []

    def signalled(*args: Any, **options: Any) -> dict[str, float]:
        calls.append(1)
        if len(calls) == evaluation:
            os.kill(os.getpid(), number)
        return evaluate(*args, **options)

    monkeypatch.setattr(held_out, "evaluate", signalled)


@pytest.mark.timeout(3 * PATIENCE)
@pytest.mark.parametrize(("evaluation", "reached"), [(1, 0), (2, 4)])
def test_sigterm_in_an_evaluation(model_path: str, tmp_path: Path, evaluation: int, reached: int) -> None:
    path = tmp_path / "run"
    code, stderr = stopped_in(evaluation, signal.SIGTERM, tmp_path, command(model_path, path))
    assert code == 130, stderr
    assert f"stopped at step {reached}; continue with: kalman-rl resume {path}" in stderr
    assert "Traceback" not in stderr
    assert read_manifest(path)["status"] == "interrupted"
    assert steps(path, "train") == list(range(1, reached + 1))
    assert (path / "model" / "model.safetensors").is_file() == (reached == 4)
    words = [sys.executable, "-m", "kalman_rl.cli.main", "resume", str(path)]
    done = subprocess.run(words, stderr=subprocess.PIPE, text=True, timeout=PATIENCE)
    assert done.returncode == 0, done.stderr
    assert read_manifest(path)["status"] == "finished"
    assert steps(path, "train") == [1, 2, 3, 4] and steps(path, "eval") == [0, 4]
    assert (path / "model" / "model.safetensors").is_file()


@pytest.mark.timeout(3 * PATIENCE)
def test_a_run_killed_before_its_first_checkpoint_begins_again(model_path: str, tmp_path: Path) -> None:
    whole, path = tmp_path / "whole", tmp_path / "run"
    assert start(model_path, whole) == 0
    code, _ = stopped_in(1, signal.SIGKILL, tmp_path, command(model_path, path))
    assert code == -signal.SIGKILL and read_manifest(path)["status"] == "running"
    (path / "checkpoints" / "checkpoint-2").mkdir()  # the first save was cut short
    assert resumed(path) == 0
    assert steps(path, "train") == [1, 2, 3, 4] and steps(path, "eval") == [0, 4]
    assert model(path) == model(whole)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("save_every", [0, 2])
def test_stopped_in_the_last_evaluation_nothing_is_trained_again(
    model_path: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    number: int,
    save_every: int,
) -> None:
    path = tmp_path / "run"
    with monkeypatch.context() as patch:
        interrupt(patch, 2, number)
        assert start(model_path, path, save_every=save_every) == 130
    assert read_manifest(path)["status"] == "interrupted"
    before = model(path)
    shutil.rmtree(path / "model")
    assert resumed(path) == 0
    assert read_manifest(path)["status"] == "finished" and model(path) == before
    assert steps(path, "train") == [1, 2, 3, 4] and steps(path, "eval") == [0, 4]


def test_stopped_in_the_first_evaluation_nothing_is_trained(
    model_path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "run"
    interrupt(monkeypatch, 1)
    assert start(model_path, path) == 130
    assert read_manifest(path)["status"] == "interrupted" and not read_metrics(path)


def test_stopped_while_the_model_is_loaded(
    model_path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(*args: Any, **options: Any) -> None:
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(train_module, "load_model", load)
    assert start(model_path, tmp_path / "run") == 130
    assert read_manifest(tmp_path / "run")["status"] == "interrupted"


@pytest.mark.parametrize("lost", [True, False])
def test_ctrl_c_that_a_library_turned_into_something_else(
    model_path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lost: bool
) -> None:
    """Lazy imports make an error of it, callbacks of C code lose it: no step is trained either way."""
    load = train_module.load_model

    def turned(*args: Any, **options: Any) -> Any:
        try:
            os.kill(os.getpid(), signal.SIGINT)
        except KeyboardInterrupt as error:
            if not lost:
                raise RuntimeError("Failed to import transformers.models") from error
        return load(*args, **options)

    monkeypatch.setattr(train_module, "load_model", turned)
    assert start(model_path, tmp_path / "run") == 130
    assert read_manifest(tmp_path / "run")["status"] == "interrupted"
    assert steps(tmp_path / "run", "train") == []


def test_steps_at_or_below_the_checkpoint(model_path: str, tmp_path: Path) -> None:
    path = tmp_path / "run"
    assert start(model_path, path, lora_rank=2) == 0
    before = model(path, "adapter_model")
    shutil.rmtree(path / "model")
    with pytest.raises(
        ConfigError, match="^steps: got 2, expected at least 4, the step of the newest checkpoint"
    ):
        resumed(path, ("steps",), steps=2)
    assert read_manifest(path)["status"] == "finished" and not (path / "model").exists()
    assert resumed(path) == 0
    assert model(path, "adapter_model") == before
    assert steps(path, "train") == [1, 2, 3, 4] and steps(path, "eval") == [0, 4]


def test_a_signal_in_the_last_batch_leaves_the_evaluation_to_resume(
    model_path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, log = tmp_path / "run", Run.log

    def logged(self: Run, kind: str, step: int, **values: Any) -> None:
        log(self, kind, step, **values)
        if (kind, step) == ("train", 3):
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(Run, "log", logged)
        assert start(model_path, path) == 130
    assert steps(path, "train") == [1, 2, 3, 4] and steps(path, "eval") == [0]
    assert resumed(path) == 0
    assert steps(path, "train") == [1, 2, 3, 4] and steps(path, "eval") == [0, 4]
