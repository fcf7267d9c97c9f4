"""A run: it learns, saves, goes on where it stopped, and says in one sentence what is wrong."""

from __future__ import annotations

import csv
import dataclasses
import errno
import math
import os
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch

from kalman_rl.errors import ConfigError, NumericError, RunError
from kalman_rl.reppo.learner import Learner, Rollout
from kalman_rl.reppo.settings import Settings

pytest.importorskip("gymnasium", reason="needs the extra control")

from kalman_rl.reppo import training
from kalman_rl.reppo.__main__ import main
from kalman_rl.reppo.training import PRESETS, TrainingPlan, horizon_for, newest, settings_for, train
from tests.reppo.worlds import register

SMALL = {"hidden": 16, "bins": 21, "epochs": 2, "minibatches": 2}


@pytest.fixture(autouse=True)
def worlds() -> None:
    register()


def plan(env: str = "test/Counter-v0", steps: int = 96, **changes: Any) -> TrainingPlan:
    settings = settings_for(env, {"low": -10.0, "high": 20.0} | SMALL | changes)
    return TrainingPlan(env, steps, 0, settings, copies=2, horizon=8, evaluations=3, episodes=2)


@pytest.mark.parametrize("gradient", ["expected", "score"])
@pytest.mark.parametrize(("env", "good"), [("test/Bandit-v0", -0.01), ("test/DiscreteBandit-v0", 1.0)])
def test_a_bandit_is_learned(env: str, good: float, gradient: str, tmp_path: Path) -> None:
    settings = Settings(
        -2.5, 1.5, hidden=32, bins=41, lr=3e-3, gradient=gradient, alpha=0.01, target_entropy=-3.0
    )
    rows = train(
        TrainingPlan(env, 3072, 0, settings, copies=8, horizon=32, evaluations=2, episodes=2),
        tmp_path,
        quiet=True,
    )
    assert (
        rows[-1]["return"] >= good and rows[-1]["training_return"] > good - 0.1
    )  # an idle actor earns -0.25, 1/3


@pytest.mark.parametrize(
    "changes",
    [
        {"critic": "scalar"},
        {"auxiliary": 0.5},
        {"next_actions": 4, "executed_entropy": True},
        {"kl_bound": float("inf")},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_every_option_trains(changes: dict[str, Any], tmp_path: Path) -> None:
    rows = train(plan(**changes), tmp_path, quiet=True)
    assert len(rows) == 3 and all(torch.tensor(list(row.values())).isfinite().all() for row in rows)


def test_a_run_that_dies_goes_on_with_the_same_learner(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    updates: list[Learner] = []
    update = Learner.update

    def dies(self: Learner, rollout: Rollout) -> dict[str, float]:
        updates.append(self)
        if len(updates) == 4:
            raise KeyboardInterrupt
        return update(self, rollout)

    monkeypatch.setattr(Learner, "update", dies)
    with pytest.raises(KeyboardInterrupt):
        train(plan(), tmp_path)
    step, rows, state = newest(tmp_path)
    assert (step, len(rows)) == (32, 1) and state is not None
    capsys.readouterr()
    loaded: list[dict[str, Any]] = []
    load = Learner.load_state_dict
    monkeypatch.setattr(
        Learner,
        "load_state_dict",
        lambda self, s: (load(self, s), loaded.append(deepcopy(self.state_dict()))),
    )
    assert [row["step"] for row in train(plan(), tmp_path)] == [32, 64, 96]
    assert "going on at step 32 of 96" in capsys.readouterr().out
    assert len(updates) == 4 + 4  # two were lost with the third update after the checkpoint
    for name in ("actor", "critic", "duals", "norm"):
        for key, value in state[name].items():
            assert torch.equal(loaded[0][name][key], value), (name, key)
    with (tmp_path / "curve.csv").open() as file:
        assert [float(row["step"]) for row in csv.DictReader(file)] == [32, 64, 96]
    assert train(plan(), tmp_path) == newest(tmp_path)[1] and len(updates) == 8  # nothing is left to do
    assert len(train(plan(steps=128), tmp_path, quiet=True)) > 3  # steps may grow


def test_two_runs_of_one_seed_are_the_same(tmp_path: Path) -> None:
    first, again = (train(plan(), tmp_path / name, quiet=True) for name in "ab")
    assert first == again
    other = train(dataclasses.replace(plan(), seed=1), tmp_path / "c", quiet=True)
    assert other != first


def test_another_run_in_the_folder_is_refused(tmp_path: Path) -> None:
    training.begin(plan(), tmp_path)
    with pytest.raises(RunError, match=r"got a run with gamma 0.99, expected 0.9; name another folder"):
        train(plan(gamma=0.9), tmp_path)
    with pytest.raises(RunError, match=r"got a run with env 'test/Counter-v0', expected 'test/Ends-v0'"):
        train(plan("test/Ends-v0"), tmp_path)


def test_a_damaged_checkpoint_is_one_sentence(tmp_path: Path) -> None:
    training.begin(plan(), tmp_path)
    (tmp_path / "checkpoint.pt").write_bytes(b"PK cut short")
    with pytest.raises(RunError, match=r"checkpoint.pt: got a damaged checkpoint .*delete it to begin again"):
        train(plan(), tmp_path)
    for text in ("{", "[]", '{"settings": 3}'):
        (tmp_path / "run.json").write_text(text)
        with pytest.raises(RunError, match=r"run.json: cannot be read"):
            train(plan(), tmp_path)


def test_one_changed_byte_of_a_checkpoint_is_found(tmp_path: Path) -> None:
    train(plan(), tmp_path, quiet=True)
    file = tmp_path / "checkpoint.pt"
    whole, weight = file.read_bytes(), newest(tmp_path)[2]["actor"]["last.weight"].numpy().tobytes()
    place = whole.index(weight) + 2
    file.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
    with pytest.raises(
        RunError, match=r"checkpoint.pt: got a damaged checkpoint \(ValueError: a checksum is wrong"
    ):
        train(plan(steps=128), tmp_path)
    file.write_bytes(whole)
    found = torch.load(file, weights_only=True)
    found["learner"]["actor"]["last.bias"].fill_(float("nan"))
    torch.save(found, file)
    with pytest.raises(RunError, match=r"checkpoint.pt: got a damaged .*NaN in actor.last.bias.*begin again"):
        train(plan(steps=128), tmp_path)


@pytest.mark.parametrize("dies_at", ["checkpoint.pt", "curve.csv"])
def test_a_run_that_dies_in_a_save_goes_on(
    dies_at: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The newest row of the curve is at most one ahead of the checkpoint, and is made again."""
    replace, saves = os.replace, []

    def dies(source: Path, target: Path) -> None:
        saves.append(target.name)
        if saves.count(dies_at) == 2:
            raise KeyboardInterrupt
        replace(source, target)

    monkeypatch.setattr(os, "replace", dies)
    with pytest.raises(KeyboardInterrupt):
        train(plan(), tmp_path, quiet=True)
    monkeypatch.undo()
    assert newest(tmp_path)[0] == 32
    rows = train(plan(), tmp_path, quiet=True)
    with (tmp_path / "curve.csv").open() as file:
        assert (
            [float(row["step"]) for row in csv.DictReader(file)]
            == [row["step"] for row in rows]
            == [32, 64, 96]
        )


@pytest.mark.parametrize("name", ["run.json", "curve.csv", "checkpoint.pt", "curve.png"])
def test_a_full_disk_is_one_sentence(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = Path.write_bytes

    def full(self: Path, data: bytes) -> int:
        if self.name == f".{name}":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(self, data)

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(
        RunError, match=rf"{name}: cannot be written \(.*No space left.*the same command goes on"
    ):
        training.draw_curve(train(plan(), tmp_path, quiet=True), "title", tmp_path / "curve.png")
    assert not (tmp_path / name).exists()


def test_a_state_of_other_networks_is_refused() -> None:
    small, wide = (
        Learner(2, 1, discrete=False, settings=Settings(-1.0, 1.0, hidden=h, bins=5)) for h in (4, 8)
    )
    with pytest.raises(ConfigError, match="reppo state: got a damaged one"):
        small.load_state_dict(wide.state_dict())
    with pytest.raises(ConfigError, match="reppo state: got no critic"):
        small.load_state_dict({k: v for k, v in small.state_dict().items() if k != "critic"})


def test_returns_outside_the_range_are_counted_and_warned_of_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = train(plan(low=-0.5, high=0.5), tmp_path, quiet=True)
    assert all(row["outside"] > 0.5 for row in rows)
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1 and "of the returns outside the critic's range -0.5 to 0.5" in said[0]
    assert train(plan(low=-100.0, high=300.0), tmp_path / "wide", quiet=True)[-1]["outside"] == 0
    assert capsys.readouterr().err == ""


def test_a_loss_that_is_not_finite_stops_the_run() -> None:
    learner = Learner(1, 1, discrete=False, settings=Settings(-1.0, 1.0, hidden=4, bins=5))
    zeros, no = torch.zeros(4, 1), torch.zeros(4, 1, dtype=torch.bool)
    broken = Rollout(
        zeros[..., None], zeros[..., None], zeros, zeros * float("nan"), zeros[..., None], no, no
    )
    with pytest.raises(NumericError, match="critic: got a loss of nan"):
        learner.update(broken)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"low": 3.0, "high": 1.0}, r"low, high: got \(3.0, 1.0\), expected low < high"),
        ({"low": -math.inf}, r"low, high: got \(-inf, 1.0\), expected low < high, finite"),
        ({"target_entropy": math.nan}, "target_entropy: got nan, expected a finite number or None"),
        ({"alpha": math.inf}, "alpha: got inf, expected a finite number above 0"),
        ({"gamma": 1.5}, "gamma: got 1.5, expected a number from 0 to 1"),
        ({"lr": 0.0}, "lr: got 0.0, expected a finite number above 0"),
        ({"bins": 2}, "bins: got 2, expected a whole number of at least 3"),
        ({"auxiliary": -1.0}, "auxiliary: got -1.0, expected a finite number of at least 0"),
        ({"gradient": "both"}, "gradient: got 'both', expected 'expected' or 'score'"),
        ({"critic": "mlp"}, "critic: got 'mlp', expected 'categorical' or 'scalar'"),
    ],
)
def test_a_setting_out_of_range_is_one_sentence(changes: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        Settings(**({"low": -1.0, "high": 1.0} | changes))


@pytest.mark.parametrize(
    ("env", "least", "most"),
    [
        ("CartPole-v1", 0.0, 1.0),
        ("Acrobot-v1", -1.0, 0.0),
        ("MountainCar-v0", -1.0, 0.0),
        ("Pendulum-v1", -16.3, 0.0),
    ],
)
def test_a_preset_s_range_holds_every_return_three_bins_from_its_ends(
    env: str, least: float, most: float
) -> None:
    settings = settings_for(env, {})
    bins = 3 * (settings.high - settings.low) / (settings.bins - 1)
    unit = settings.reward_scale / (1 - settings.gamma)
    assert settings.low + bins <= least * unit and most * unit <= settings.high - bins


def test_presets_are_settings_and_changes_come_after_them() -> None:
    for env in PRESETS:
        settings_for(env, {})
    assert (horizon_for("CartPole-v1"), horizon_for("Pendulum-v1"), horizon_for("other")) == (512, 128, 128)
    assert settings_for("CartPole-v1", {"gamma": 0.5}).gamma == 0.5


def test_the_auxiliary_loss_needs_an_action_in_the_critic() -> None:
    with pytest.raises(ConfigError, match="auxiliary: got a weight with discrete actions"):
        Learner(1, 2, discrete=True, settings=Settings(-1.0, 1.0, auxiliary=1.0))


def test_the_command_trains_draws_and_names_mistakes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = "--env CartPole-v1 --steps 64 --copies 2 --horizon 16 --evaluations 2 --episodes 1 --hidden 8"
    words = [*command.split(), "--output", str(tmp_path / "run")]
    assert main(words) == 0
    out = capsys.readouterr().out.splitlines()
    assert (
        len(out) == 3 and out[0].startswith("step        32 of 64   return") and "after 64 steps" in out[-1]
    )
    assert {"run.json", "checkpoint.pt", "curve.csv"} <= {file.name for file in (tmp_path / "run").iterdir()}
    assert main([*words, "--gamma", "0.5"]) == 2
    assert "got a run with gamma 0.99" in capsys.readouterr().err
    assert (
        main(["--env", "CartPol-v1", "--steps", "10", "--low", "0", "--high", "1", "--output", str(tmp_path)])
        == 2
    )
    assert capsys.readouterr().err.count("\n") == 1
    assert main(["--env", "test/Counter-v0", "--steps", "10"]) == 2
    assert "test/Counter-v0: got no range of the critic" in capsys.readouterr().err
    assert main(["--env", "CartPol-v1", "--steps", "10"]) == 2
    assert "did you mean 'CartPole-v1'?" in capsys.readouterr().err
    assert main(["--env", "CartPole-v1", "--steps", "0"]) == 2
    assert "steps: got 0" in capsys.readouterr().err
