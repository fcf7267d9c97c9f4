"""Losses of verl on two real ranks: what a method chooses for a whole optimizer step is the same on both."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("verl", exc_type=ImportError)
from kalman_rl.methods import make_method
from kalman_rl.objectives.aggregate import token_mean
from kalman_rl.objectives.learning import step_statistics, with_bounds
from kalman_rl.objectives.loss import Method, policy_loss
from kalman_rl.objectives.rollouts import Rollouts
from tests.oracles.batches import Batch, make_batch

ROOT = Path(__file__).parents[2]
ROWS = ([0, 1, 2, 3], [4, 5])
RANK = """
import json, sys, torch
from verl.trainer.ppo import core_algos
from verl.workers.config import FSDPActorConfig, PolicyLossConfig
from tests.hosts.test_verl_ranks import ROWS, advantages, given

rank = int(sys.argv[1])
torch.distributed.init_process_group("gloo", init_method="file://" + sys.argv[2], rank=rank, world_size=2)
policy = PolicyLossConfig(loss_mode="kalman_rl/bapo")
config = FSDPActorConfig(rollout_n=1, ppo_micro_batch_size_per_gpu=1, policy_loss=policy)
batch = given()
config.global_batch_info.update(dp_size=2, batch_num_tokens=int(batch.mask.sum()), global_batch_size=6)
part, rows = batch.rows(torch.tensor(ROWS[rank])), torch.tensor(ROWS[rank])
leaf = part.logp.clone().requires_grad_()
value, metrics = core_algos.get_policy_loss_fn("kalman_rl/bapo")(
    old_log_prob=part.logp_old, log_prob=leaf, advantages=advantages()[rows], response_mask=part.mask,
    loss_agg_mode="token-mean", config=config,
)
value.backward()
print(json.dumps([leaf.grad.tolist(), metrics["trust/bound_share"]]))
"""


def given() -> Batch:
    return make_batch(61, 6, 17, scale=0.5)


def fitted(method: Method, batch: Batch, rows: list[int]) -> Method:
    """The method with the bounds of an optimizer step that has these rows alone."""
    rollouts = Rollouts(batch.logp_old[rows], batch.mask[rows])
    return with_bounds(
        method, step_statistics(method, rollouts, batch.logp[rows], advantage=advantages()[rows])
    )


def advantages() -> torch.Tensor:
    return torch.tensor([1.0, -1.0, 0.5, 2.0, -3.0, 1.5], dtype=torch.float64)[:, None].expand(6, 17)


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_bapo_balances_over_ranks(tmp_path: Path) -> None:
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-W", "ignore", "-c", RANK, str(rank), str(tmp_path / "store")],
            env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for rank in range(2)
    ]  # fmt: skip
    out = [rank.communicate(timeout=390) for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], out[0][1] + out[1][1]
    found = [json.loads(text.splitlines()[-1]) for text, _ in out]
    assert [share for _, share in found] == [1.0, 1.0]

    batch, method = given(), dataclasses.replace(make_method("bapo"), aggregate=token_mean)
    whole = fitted(method, batch, list(range(6)))
    assert any(fitted(method, batch, rows).trust != whole.trust for rows in ROWS), (
        "each rank would choose others"
    )
    leaf = batch.logp.clone().requires_grad_()
    policy_loss(whole, Rollouts(batch.logp_old, batch.mask), leaf, advantage=advantages()).value.backward()
    mean = torch.cat([torch.tensor(gradient, dtype=torch.float64) for gradient, _ in found]) / 2
    torch.testing.assert_close(mean, leaf.grad, rtol=1e-12, atol=1e-15)
