"""What a method learns inside verl: bounds of the whole optimizer step, noises of the steps before, over micro-batches
and real ranks, through checkpoints. The engine is verl's, with a table of log-probabilities as its model."""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("verl", exc_type=ImportError)
from torch import Tensor
from verl.trainer.ppo.core_algos import get_policy_loss_fn
from verl.workers.config import FSDPActorConfig, PolicyLossConfig
from verl.workers.engine.base import BaseEngine, EngineRegistry

from kalman_rl.errors import RunError
from kalman_rl.hosts.verl.learning import EngineLearning, watch_engines
from kalman_rl.methods import make_method
from kalman_rl.objectives.aggregate import token_mean
from kalman_rl.objectives.learning import step_statistics, with_bounds
from kalman_rl.objectives.loss import Method, policy_loss
from kalman_rl.objectives.rollouts import Rollouts
from tests.oracles.batches import Batch, make_batch

ROOT = Path(__file__).parents[2]
ROWS = ([[0, 1], [2, 3]], [[4], [5]])
"""Micro-batches of two ranks."""
RANK = """
import json, sys, torch
from tests.hosts.test_verl_learning import ROWS, Table, given, loss_of

rank = int(sys.argv[1])
torch.distributed.init_process_group("gloo", init_method="file://" + sys.argv[2], rank=rank, world_size=2)
torch.distributed.barrier()
engine = Table(given())
engine.train_batch({"micro": ROWS[rank]}, loss_of("bapo", ranks=2))
print(json.dumps(engine.logp.grad.tolist()))
"""


class Table(BaseEngine):
    """verl's engine whose policy is one number for every token; watched as the plugin does it."""

    def __init__(self, batch: Batch) -> None:
        self.batch, self.logp = batch, batch.logp.clone().requires_grad_()
        self.metrics: list[dict[str, float]] = []
        EngineLearning(self)

    def forward_backward_batch(
        self, data: Any, loss_function: Any, forward_only: bool = False
    ) -> dict[str, Any]:
        for rows in data["micro"]:
            loss, metrics = loss_function(self, rows)
            if not forward_only:
                loss.backward()
                self.metrics.append(metrics)
        return {"metrics": {}}

    def optimizer_zero_grad(self) -> None:
        self.logp.grad = None

    def optimizer_step(self) -> float:
        return 0.0

    def is_mp_src_rank_with_outputs(self) -> bool:
        return False

    def get_data_parallel_group(self) -> None:
        return None

    def save_checkpoint(self, local_path: str, *others: Any) -> None:
        Path(local_path).mkdir(exist_ok=True)

    def load_checkpoint(self, local_path: str, *others: Any) -> None:
        assert Path(local_path).is_dir()


def loss_of(name: str, ranks: int = 1) -> Any:
    """A loss bound to its configuration, as verl's actor hands it to the engine."""
    policy = PolicyLossConfig(loss_mode=f"kalman_rl/{name}")
    config = FSDPActorConfig(rollout_n=1, ppo_micro_batch_size_per_gpu=1, policy_loss=policy)

    def loss(engine: Table, rows: list[int], config: Any) -> tuple[Tensor, dict[str, float]]:
        batch = engine.batch.rows(torch.tensor(rows))
        trained = int(engine.batch.mask.sum())
        config.global_batch_info.update(dp_size=ranks, batch_num_tokens=trained, global_batch_size=6)
        return get_policy_loss_fn(config.policy_loss.loss_mode)(
            old_log_prob=batch.logp_old,
            log_prob=engine.logp[rows],
            advantages=advantages(batch.mask.shape[1])[rows],
            response_mask=batch.mask,
            loss_agg_mode="token-mean",
            config=config,
        )

    return functools.partial(loss, config=config)


def given() -> Batch:
    return make_batch(61, 6, 17, scale=0.5)


def drifting(seed: int) -> Batch:
    """Log-ratios that walk: the start values of the filters expect none of it."""
    batch = make_batch(seed, 6, 64, scale=0.01)
    return dataclasses.replace(batch, logp=batch.logp_old + (batch.logp - batch.logp_old).cumsum(dim=1))


def advantages(length: int = 17) -> Tensor:
    return torch.tensor([1.0, -1.0, 0.5, 2.0, -3.0, 1.5], dtype=torch.float64)[:, None].expand(6, length)


def gradient(method: Method, batch: Batch) -> Tensor:
    """Of the whole optimizer step at once."""
    leaf = batch.logp.clone().requires_grad_()
    policy_loss(
        method, Rollouts(batch.logp_old, batch.mask), leaf, advantage=advantages(batch.mask.shape[1])
    ).value.backward()
    assert leaf.grad is not None
    return leaf.grad


def fitted(method: Method, batch: Batch, rows: list[int]) -> Method:
    """The method with the bounds of an optimizer step that has these rows alone."""
    rollouts = Rollouts(batch.logp_old[rows], batch.mask[rows])
    return with_bounds(
        method, step_statistics(method, rollouts, batch.logp[rows], advantage=advantages()[rows])
    )


def test_bounds_are_those_of_the_step_however_it_is_cut() -> None:
    batch, method = given(), dataclasses.replace(make_method("bapo"), aggregate=token_mean)
    whole = fitted(method, batch, list(range(6)))
    assert any(fitted(method, batch, rows).trust != whole.trust for rows in ([0, 1], [2, 3, 4], [5])), (
        "each micro-batch would choose others"
    )
    engine = Table(batch)
    engine.train_batch({"micro": [[0, 1], [2, 3, 4], [5]]}, loss_of("bapo"))
    torch.testing.assert_close(engine.logp.grad, gradient(whole, batch), rtol=1e-12, atol=1e-15)
    mean = sum(metrics["trust/bound_low"] for metrics in engine.metrics) / 3
    assert mean != 0 and len(engine.metrics) == 3, "a pass that only looks reports nothing"


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_bapo_balances_over_ranks(tmp_path: Path) -> None:
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", "VERL_PLATFORM": "cpu"}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-W", "ignore", "-c", RANK, str(rank), str(tmp_path / "store")],
            env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for rank in range(2)
    ]  # fmt: skip
    out = [rank.communicate(timeout=390) for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], out[0][1] + out[1][1]
    found = sum(torch.tensor(json.loads(text.splitlines()[-1]), dtype=torch.float64) for text, _ in out) / 2

    batch, method = given(), dataclasses.replace(make_method("bapo"), aggregate=token_mean)
    whole = fitted(method, batch, list(range(6)))
    assert any(
        fitted(method, batch, [i for part in rows for i in part]).trust != whole.trust for rows in ROWS
    ), "each rank would choose others"
    torch.testing.assert_close(found, gradient(whole, batch), rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("name", ["kpo_auto", "kpo_robust"])
def test_noises_are_learned_from_the_steps_before(name: str, tmp_path: Path) -> None:
    """The first step uses the start values, the next what the first has shown; a resumed run goes on with it."""
    first, second = drifting(61), drifting(62)
    method = dataclasses.replace(make_method(name), aggregate=token_mean)
    part = method.learns["ratio"]
    state = part.memory * part.initial() + part.statistics(first.logp, Rollouts(first.logp_old, first.mask))
    learned = dataclasses.replace(method, ratio=part.fitted(state))
    expected = gradient(learned, second)
    assert not torch.allclose(expected, gradient(method, second), rtol=1e-3), "nothing was learned"

    engine, loss = Table(first), loss_of(name)
    engine.train_batch({"micro": [[0, 1], [2, 3, 4], [5]]}, loss)
    torch.testing.assert_close(engine.logp.grad, gradient(method, first), rtol=1e-9, atol=1e-12)
    engine.save_checkpoint(str(tmp_path / "actor"), None, 1)
    resumed = Table(second)
    resumed.load_checkpoint(str(tmp_path / "actor"))
    resumed.train_batch({"micro": [[5], [0, 1, 2, 3, 4]]}, loss)
    torch.testing.assert_close(resumed.logp.grad, expected, rtol=1e-6, atol=1e-9)
    resumed.load_checkpoint(str(tmp_path / "actor"))
    with pytest.raises(RunError, match="continue with the method"):
        resumed.train_batch({"micro": [[0]]}, loss_of("kpo_noise"))


def test_a_checkpoint_without_noises_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    engine = Table(given())
    engine.load_checkpoint(str(tmp_path))
    engine.train_batch({"micro": [[0, 1]]}, loss_of("kpo_auto"))
    assert "kpo_auto: got a checkpoint without what was learned" in caplog.text


def test_every_engine_is_watched(monkeypatch: pytest.MonkeyPatch) -> None:
    watch_engines()
    monkeypatch.setattr(EngineRegistry, "get_engine_cls", lambda *kind: lambda **options: Bare())
    found = EngineRegistry.new(model_type="language_model", backend="fsdp2")
    assert isinstance(found.train_batch.__self__, EngineLearning)
    critic = EngineRegistry.new(model_type="value_model", backend="fsdp2")
    assert critic.train_batch.__self__ is critic


class Bare(BaseEngine):
    def __init__(self) -> None:
        """Without a model."""

    def save_checkpoint(self, *others: Any) -> None:
        """Nothing."""

    load_checkpoint = save_checkpoint
