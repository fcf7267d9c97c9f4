"""Alarm and trackers in real training runs of a random character model."""

from __future__ import annotations

import dataclasses
import shutil
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("trl")
from transformers import TrainerCallback
from transformers.integrations import integration_utils

from kalman_rl.engine import train as train_module
from kalman_rl.engine.collapse import CollapseAlarm, rule
from kalman_rl.engine.collapse.rule import FILE, read_alarms
from kalman_rl.engine.config import TrainConfig, build, to_toml, validate
from kalman_rl.engine.runs.reading import read_manifest, read_metrics
from kalman_rl.engine.runs.run import Run
from kalman_rl.engine.tasks import Task
from kalman_rl.errors import ConfigError

SMALL: dict[str, Any] = {
    "dtype": "float32",
    "task": "sort12",
    "method": "grpo",
    "steps": 12,
    "prompts_per_generation": 4,
    "completions_per_prompt": 4,
    "updates_per_generation": 2,
    "learning_rate": 1e-2,
    "warmup_steps": 0,
    "lora_rank": 0,
    "eval_every": 0,
    "eval_prompts": 2,
    "eval_samples": 1,
    "save_every": 4,
    "traces_per_step": 0,
    "train_size": 32,
    "test_size": 16,
    "max_completion_tokens": 4,
    "threads": 1,
}


class Falling:
    """A reward that falls with the third generation batch, is back with the fourth and falls again with the fifth."""

    def __init__(self, sampled: int = 0, batch: int = 16) -> None:
        self.sampled, self.batch = sampled, batch

    def __call__(self, completions: list[str], **columns: Any) -> list[float]:
        self.sampled += len(completions) == self.batch  # evaluations are smaller
        level = float(self.sampled in (0, 1, 2, 4))
        return [level + 0.01 * (len(set(text)) % 3) for text in completions]


@pytest.fixture
def eager(monkeypatch: pytest.MonkeyPatch) -> None:
    """Training with an alarm that needs two rewards to know a level, and one to see it fallen."""
    monkeypatch.setattr(rule, "WARM_UP", 1)
    monkeypatch.setattr(rule, "RATIO", 10.0)


def start(model_path: str, path: Path, **changes: Any) -> tuple[TrainConfig, int]:
    config = build(TrainConfig, SMALL | {"model": model_path, "run": path} | changes)
    validate(config)
    with Run.create(path, to_toml(config), {"method": config.method}) as run:
        return config, train_module.train(config, run, task=falling(config))


def falling(config: TrainConfig, sampled: int = 0) -> Task:
    return dataclasses.replace(train_module.chosen_task(config), reward=Falling(sampled))


def test_stop_saves_and_exits_3_and_the_run_goes_on(
    model_path: str, tmp_path: Path, eager: None, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "run"
    config, code = start(model_path, path, collapse="stop", save_every=0)
    assert code == 3 and read_manifest(path)["status"] == "interrupted"
    alarms = read_alarms(path)
    assert [alarm.step for alarm in alarms] == [5]
    for alarm in alarms:
        sizes = [abs(token.log_ratio) for token in alarm.tokens]
        assert len(sizes) == 3 and sizes == sorted(sizes, reverse=True)
        assert sizes[0] > 1e-3  # of the updates that led here: in the first one after sampling they are zero
        assert all(token.text and token.prompt_id and token.position >= 0 for token in alarm.tokens)
    said = capsys.readouterr().err
    assert "alarm: step 5: the reward has fallen" in said and f"kalman-rl resume {path}" in said
    with Run.open(path) as run:
        assert run.latest_checkpoint().name == "checkpoint-6"  # the end of the generation batch
        off, task = dataclasses.replace(config, collapse="off"), falling(config, 3)
        with pytest.raises(ConfigError, match="^collapse: got 'off' in .*, expected 'stop'"):
            train_module.train(off, run, resume=True, task=task)
    with Run.open(path) as run:
        assert train_module.train(off, run, resume=True, allow_change=["collapse"], task=task) == 0
    assert [row["step"] for row in read_metrics(path) if row["kind"] == "train"] == list(range(1, 13))
    assert read_alarms(path) == alarms


def test_a_resumed_run_raises_the_alarms_of_the_uninterrupted_one(
    model_path: str, tmp_path: Path, eager: None
) -> None:
    path = tmp_path / "run"
    config, code = start(model_path, path, collapse="warn", quiet=True)
    assert code == 0
    whole = (path / FILE).read_text()
    assert {alarm.step for alarm in read_alarms(path)} >= {5, 9}
    for step in (12, 8):
        shutil.rmtree(path / "checkpoints" / f"checkpoint-{step}")
    with Run.open(path) as run:
        assert train_module.train(config, run, resume=True, task=falling(config, 2)) == 0
    assert (path / FILE).read_text() == whole


def test_off_leaves_nothing(model_path: str, tmp_path: Path, eager: None) -> None:
    _, code = start(model_path, tmp_path / "run", steps=6, save_every=0, quiet=True)
    assert code == 0 and not (tmp_path / "run" / FILE).exists()


def test_as_a_callback_of_the_trainer(model_path: str, tmp_path: Path, eager: None) -> None:
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from kalman_rl.hosts.trl import KalmanGRPOConfig, KalmanGRPOTrainer

    alarm = CollapseAlarm("checkpoint")
    trainer = KalmanGRPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(model_path),
        processing_class=AutoTokenizer.from_pretrained(model_path),
        reward_funcs=Falling(batch=8),
        args=KalmanGRPOConfig(
            str(tmp_path),
            method="grpo",
            per_device_train_batch_size=4,
            steps_per_generation=2,
            num_generations=4,
            max_completion_length=4,
            max_steps=8,
            learning_rate=1e-2,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            use_cpu=True,
            bf16=False,
            disable_tqdm=True,
        ),
        train_dataset=Dataset.from_list([{"prompt": f"{i}>"} for i in range(8)]),
        callbacks=[alarm],
    )
    trainer.train()
    assert alarm.alarms and alarm.alarms == read_alarms(tmp_path)
    assert len(alarm.alarms[0].tokens) == 3  # seen through the trainer, without an observer of one's own
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*"))[0] == "checkpoint-6"


# ---------------------------------------------------------------- trackers


class Raising(TrainerCallback):
    """A tracker that fails where it is told to."""

    where = "on_log"
    calls = 0

    def __init__(self) -> None:
        if self.where == "__init__":
            raise RuntimeError("Raising requires a package that is not installed")

    def __getattribute__(self, name: str) -> Any:
        if name == type(self).where:
            type(self).calls += 1
            raise ConnectionError("no\nnetwork")
        return super().__getattribute__(name)


@pytest.mark.parametrize("where", ["__init__", "on_train_begin", "on_log", "on_train_end"])
def test_a_failing_tracker_is_said_once_and_dropped(
    where: str,
    model_path: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(Raising, "where", where)
    monkeypatch.setattr(Raising, "calls", 0)
    monkeypatch.setitem(integration_utils.INTEGRATION_TO_CALLBACK, "wandb", Raising)
    _, code = start(model_path, tmp_path / "run", report_to="wandb", steps=4, save_every=0)
    assert code == 0 and read_manifest(tmp_path / "run")["status"] == "finished"
    assert len([row for row in read_metrics(tmp_path / "run") if row["kind"] == "train"]) == 4
    assert Raising.calls == {"__init__": 0, "on_log": 3}.get(where, 1)
    said = [line for line in capsys.readouterr().err.splitlines() if "report_to" in line]
    assert len(said) == 1 and said[0].startswith("report_to: wandb failed in ")
    assert "the run goes on without it" in said[0]


def test_tensorboard(model_path: str, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    _, code = start(model_path, tmp_path / "run", report_to="tensorboard", steps=4, save_every=0, quiet=True)
    assert code == 0
    (events,) = (tmp_path / "run").rglob("events.out.tfevents.*")
    reader = EventAccumulator(str(events.parent))
    reader.Reload()
    assert [event.step for event in reader.Scalars("train/entropy")] == [1, 2, 3, 4]


class Stuck(TrainerCallback):
    """A tracker whose server does not answer."""

    released = threading.Event()
    calls = 0

    def on_log(self, *args: Any, **kwargs: Any) -> None:
        type(self).calls += 1
        self.released.wait()


class Leaving(TrainerCallback):
    """A tracker that ends the process where it cannot go on."""

    def on_log(self, *args: Any, **kwargs: Any) -> None:
        sys.exit(7)


@pytest.mark.parametrize(("tracker", "why"), [(Stuck, "it took longer than 1 s"), (Leaving, "SystemExit: 7")])
def test_a_tracker_that_hangs_or_exits_ends_nothing(
    tracker: Any,
    why: str,
    model_path: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setitem(integration_utils.INTEGRATION_TO_CALLBACK, "wandb", tracker)
    try:
        _, code = start(model_path, tmp_path / "run", report_to="wandb", steps=4, save_every=0)
    finally:
        Stuck.released.set()
    assert code == 0 and Stuck.calls <= 1
    assert len([row for row in read_metrics(tmp_path / "run") if row["kind"] == "train"]) == 4
    said = [line for line in capsys.readouterr().err.splitlines() if "report_to" in line]
    assert len(said) == 1 and said[0].startswith(f"report_to: wandb failed in on_log ({why})")
