"""A run that goes on: killed at any time, with edited settings, other rows, other weights, on another machine."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any, get_args

import pytest

pytest.importorskip("trl")

from safetensors.torch import load_file, save_file

from kalman_rl.engine import held_out
from kalman_rl.engine import train as train_module
from kalman_rl.engine.config import TrainConfig, build, load_toml, to_toml
from kalman_rl.engine.resume import FREE, changed_settings, note_machine, plain_settings
from kalman_rl.engine.runs.reading import read_manifest
from kalman_rl.engine.runs.run import Run
from kalman_rl.engine.settings import Changeable
from kalman_rl.errors import ConfigError, RunError
from tests.engine.graded import GRADED
from tests.engine.test_stopping import SMALL, model, resumed, start, steps


def killed_in(
    monkeypatch: pytest.MonkeyPatch, evaluation: int, model_path: str, path: Path, **changes: Any
) -> Path:
    """A whole run, and beside it the folder that a SIGKILL in its n-th evaluation would have left."""
    evaluate, calls, copy = held_out.evaluate, [], path.with_name(f"killed-{evaluation}")

    def noted(*args: Any, **options: Any) -> dict[str, float]:
        calls.append(1)
        if len(calls) == evaluation:
            shutil.copytree(path, copy)
        return evaluate(*args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(held_out, "evaluate", noted)
        assert start(model_path, path, **changes) == 0
    return copy


def beliefs(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (path / "beliefs.jsonl").read_text().splitlines()]


def edit(path: Path, old: str, new: str) -> None:
    text = (path / "config.toml").read_text()
    assert old in text
    (path / "config.toml").write_text(text.replace(old, new))


@pytest.mark.parametrize("evaluation", [2, 3])
def test_killed_in_an_evaluation(
    model_path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, evaluation: int
) -> None:
    """After step 4 of 6, and in the last one, where step 7 of 6 must not be trained; no row is written twice."""
    whole = tmp_path / "whole"
    changes = GRADED | {"advantage": "tracked", "steps": 6, "eval_every": 4, "traces_per_step": 1}
    path = killed_in(monkeypatch, evaluation, model_path, whole, **changes)
    assert read_manifest(path)["status"] == "running"
    assert resumed(path) == 0
    assert model(path) == model(whole) != (Path(model_path) / "model.safetensors").read_bytes()
    assert steps(path, "train") == [1, 2, 3, 4, 5, 6] and steps(path, "eval") == [0, 4, 6]
    assert [row["step"] for row in beliefs(path)] == [0, 2, 4] and beliefs(path) == beliefs(whole)
    assert len(list((path / "traces").iterdir())) == 6


def test_steps_may_be_raised_from_the_end_of_a_generation_batch(model_path: str, tmp_path: Path) -> None:
    """Five steps end inside a batch: the run goes on from step 4, as if it had been longer from the start."""
    whole, path = tmp_path / "whole", tmp_path / "run"
    assert start(model_path, whole, steps=8, **GRADED) == 0
    assert start(model_path, path, steps=5, **GRADED) == 0
    edit(path, "steps = 5\n", "steps = 8\n")
    with pytest.raises(
        ConfigError, match=r"^steps: got 8 in .*config.toml, expected 5, with .*--allow-change steps"
    ):
        resumed(path)
    assert read_manifest(path)["status"] == "finished"
    assert resumed(path, ("steps",)) == 0
    assert model(path) == model(whole) and steps(path, "train") == list(range(1, 9))
    assert read_manifest(path)["settings"]["steps"] == 8


def test_a_finished_run_without_checkpoints_does_not_go_on(model_path: str, tmp_path: Path) -> None:
    path = tmp_path / "run"
    assert start(model_path, path, save_every=0) == 0
    before = model(path)
    with pytest.raises(RunError, match="finished run without checkpoints, which cannot go on"):
        resumed(path, ("steps",), steps=8)
    assert model(path) == before and read_manifest(path)["status"] == "finished"


def test_every_edited_setting_is_refused_with_both_values(tmp_path: Path) -> None:
    config = build(TrainConfig, SMALL | {"run": tmp_path / "run"})
    others: dict[str, Any] = {
        "learning_rate": 1e-5,
        "data": tmp_path / "rows.jsonl",
        "rounds": (2, 3),
        "belief_options": {"forgetting": 0.9},
        "reward": ("mine:exact",),
    }
    for name, value in plain_settings(config).items():
        if name not in others:
            others[name] = not value if isinstance(value, bool) else 7 if not isinstance(value, str) else "x"
    with Run.create(tmp_path / "run", "", {}) as run:
        run.update_manifest(settings=plain_settings(config))
        assert changed_settings(run, config) == {}
        for name, value in others.items():
            edited = build(TrainConfig, SMALL | {"run": tmp_path / "run"})
            object.__setattr__(edited, name, value)
            ((found, (then, now)),) = changed_settings(run, edited).items()
            assert (
                found == name and then == plain_settings(config)[name] and now == plain_settings(edited)[name]
            )
            with pytest.raises(
                ConfigError, match=rf"^{name}: got .* expected .*; set it back, or "
            ) as refused:
                train_module.check_same_settings(run, edited)
            assert ("--allow-change" in str(refused.value)) == (name in get_args(Changeable))
            assert ("--overwrite" in str(refused.value)) == (name not in get_args(Changeable))
    assert set(get_args(Changeable)) - {"code"} <= others.keys() and not set(FREE) & others.keys()


def test_other_weights_under_the_same_name_are_refused(model_path: str, tmp_path: Path) -> None:
    path, mine = tmp_path / "run", tmp_path / "mine"
    shutil.copytree(model_path, mine)
    assert start(str(mine), path, lora_rank=2, steps=2) == 0
    weights = load_file(mine / "model.safetensors")
    name = sorted(weights)[0]
    weights[name][0] *= 1.001
    save_file(weights, mine / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ConfigError, match="^model: got other weights for .*--allow-change model"):
        resumed(path)
    assert read_manifest(path)["status"] == "finished"
    assert resumed(path, ("model",)) == 0


def test_another_machine_is_said_and_written_down(tmp_path: Path) -> None:
    said: list[str] = []
    here = {"device": "cpu", "dtype": "float32", "threads": 2}
    with Run.create(tmp_path / "run", "", {}) as run:
        note_machine(run, here, None, said.append)
        note_machine(run, here, 2, said.append)
        assert said == [] and run.manifest["resumed"] == [{"step": 2}]
        run.update_manifest(versions=run.manifest["versions"] | {"torch": "2.0.0"})
        note_machine(run, here | {"threads": 4}, 4, said.append)
        (text,) = said
        now = run.manifest["versions"]["torch"]
        assert f"torch 2.0.0 -> {now}" in text and "threads 2 -> 4" in text and "bitwise" in text
        assert run.manifest["resumed"][1] == {"step": 4, "torch": ["2.0.0", now], "threads": [2, 4]}
        assert run.manifest["threads"] == 4


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"advantage": "tracked"},
        {"completions_per_prompt": 4},
        {"advantage": "tracked", "select": "stream"},
    ],
)
def test_the_settings_that_a_run_wrote_are_those_it_resumes_with(
    changes: dict[str, Any], tmp_path: Path
) -> None:
    config = TrainConfig(run=tmp_path / "run", **changes)
    (tmp_path / "config.toml").write_text(to_toml(config), encoding="utf-8")
    read = build(TrainConfig, load_toml(tmp_path / "config.toml"))
    assert plain_settings(read) == plain_settings(config)
