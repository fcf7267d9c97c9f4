"""Our losses inside verl against verl's own vanilla loss, called as verl's actor calls them::

    python -m benchmarks.speed.verl [--quick]

One CPU thread; a loss from verl's registry and its backward, metrics included, on 8 x 2048 tokens in float32 (see
``interleaved.py`` for how ratios are taken). Before anything is timed, the gradient of ``kalman_rl/grpo`` is compared
with vanilla's. Exit code 1 if the target was missed in two of three attempts.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable

import torch
from torch import Tensor
from verl.trainer.ppo.core_algos import get_policy_loss_fn
from verl.workers.config import FSDPActorConfig, PolicyLossConfig

from benchmarks.speed.interleaved import ROUNDS, SAMPLE, Promise, judge, table
from kalman_rl.hosts.verl import KalmanPolicyLossConfig

NAMES = ("kpo", "kpo_diffuse", "grpo", "gspo", "cispo", "dr_grpo")
TARGET = 1.2
AGREED = {"low": 0.2, "high": 0.2, "dual": 3.0}  # vanilla's clip, for the comparison


def loss(name: str, rows: int, length: int) -> Callable[[], Tensor]:
    """One call: a loss by its name in verl's registry and its backward, on one micro-batch of two."""
    draw = torch.Generator().manual_seed(0)
    old = -2 * torch.rand(rows, length, generator=draw)
    logp = old + 0.05 * torch.randn(rows, length, generator=draw)
    advantage = torch.randn(rows, 1, generator=draw).expand(rows, length).contiguous()
    mask = torch.arange(length) < torch.randint(length // 2, length + 1, (rows, 1), generator=draw)
    policy = PolicyLossConfig(loss_mode=name)
    if name.startswith("kalman_rl/"):
        bare = name.removeprefix("kalman_rl/")
        policy = KalmanPolicyLossConfig(loss_mode=name, options=AGREED if bare == "grpo" else {})
    config = FSDPActorConfig(rollout_n=1, ppo_micro_batch_size_per_gpu=rows, policy_loss=policy)
    counts = {"dp_size": 1, "batch_num_tokens": 2 * int(mask.sum()), "global_batch_size": 2 * rows}
    config.global_batch_info.update(counts, loss_scale_factor=None)
    function = get_policy_loss_fn(name)

    def call() -> Tensor:
        leaf = logp.detach().requires_grad_()
        value, _ = function(
            old_log_prob=old,
            log_prob=leaf,
            advantages=advantage,
            response_mask=mask,
            loss_agg_mode="token-mean",
            config=config,
        )
        value.backward()
        return leaf.grad

    return call


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="8 x 64, two rounds")
    quick = parser.parse_args().quick
    torch.set_num_threads(1)
    rows, length = (8, 64) if quick else (8, 2048)
    calls = {"vanilla": loss("vanilla", rows, length)}
    calls |= {f"kalman_rl/{name}": loss(f"kalman_rl/{name}", rows, length) for name in NAMES}
    torch.testing.assert_close(calls["kalman_rl/grpo"](), calls["vanilla"](), rtol=1e-4, atol=1e-9)
    promises = [Promise(name, "vanilla", TARGET) for name in calls if name != "vanilla"]
    how = {"rounds": 2 if quick else ROUNDS, "least": 0.0 if quick else SAMPLE}
    found = judge(f"({rows}, {length})", calls, promises, **how)
    print(table(found))
    return int(not quick and any(row.holds is False for row in found))


if __name__ == "__main__":
    sys.exit(main())
