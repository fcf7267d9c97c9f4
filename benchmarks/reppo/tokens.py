"""The expected gradient on tokens: ``python -m benchmarks.reppo.tokens``; again to go on.

The tiny language model sorts digits (the pool of ``kalman-rl reproduce``: 40 % hopeless, 30 % between, 30 % solved).
An arm spends 8192 completions, 32 questions x 4 a step, one step of Adam each, and weighs tokens as GRPO does:

    GRPO        z-score of the group on every sampled token
    tracked     reward minus the Kalman filter's belief about the question (bridge a), no critic
    critic      Q(s, a) - sum_v pi(v) Q(s, v) on the sampled token
    expected    sum over the top 8 tokens of grad pi(v) (Q(s, v) - V), V their mean under pi: no sampled token is used

The critic of the last two is a copy of the model with HL-Gauss values per token, fitted to the reward at the sampled
tokens; it learns alone for the first 8 or 24 steps. ``variance`` measures the four gradients on the same completions.
Rates are chosen on seed 900, once per arm.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from kalman_rl.beliefs import make_belief
from kalman_rl.beliefs.protocol import Belief
from kalman_rl.instruments.reproduce.policy import CausalPolicy, Replies
from kalman_rl.instruments.reproduce.pool import MATHS, Pool, World, draw_pool, tiny_world
from kalman_rl.methods import make_method
from kalman_rl.objectives.loss import policy_loss
from kalman_rl.objectives.rollouts import Rollouts
from kalman_rl.reppo.networks import HLGauss

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results" / "reppo" / "tokens.jsonl"
ARMS = ("GRPO", "tracked", "critic", "expected")
RATES = (1e-5, 3e-5, 1e-4, 3e-4)
TUNING, SEEDS = (900,), (0, 1, 2)
QUESTIONS, GROUP, STEPS, TOP = 32, 4, 64, 8
ALONE = {"GRPO": (0,), "tracked": (0,), "critic": (8, 24), "expected": (8, 24)}
"""Steps in which the critic learns and the policy waits; tried are both."""


class TokenCritic(nn.Module):
    """Q(s, v) of every token v after every prefix s: a copy of the model, with a distribution per token as its head."""

    def __init__(self, model: Any, rate: float = 1e-3) -> None:
        super().__init__()
        self.body = copy.deepcopy(model.model)
        self.values = HLGauss(-0.3, 1.3, 17)
        self.vocabulary = model.config.vocab_size
        self.head = nn.Linear(model.config.hidden_size, self.vocabulary * self.values.size)
        with torch.no_grad():
            self.head.weight.mul_(0.01)
        self.optimizer = torch.optim.Adam(self.parameters(), lr=rate)

    def logits(self, replies: Replies) -> Tensor:
        """(N, T, V, bins)."""
        width = replies.mask.shape[1]
        positions = (replies.seen.long().cumsum(1) - 1).clamp(min=0)
        out = self.body(
            input_ids=replies.ids, attention_mask=replies.seen.long(), position_ids=positions, use_cache=False
        )
        return self.head(out.last_hidden_state[:, -width - 1 : -1]).unflatten(
            -1, (self.vocabulary, self.values.size)
        )

    def q(self, replies: Replies) -> Tensor:
        """(N, T, V) without a gradient."""
        with torch.no_grad():
            return self.values.decode(self.logits(replies))

    def fit(self, replies: Replies, steps: int = 2) -> None:
        """Steps of Adam towards the reward at the sampled tokens."""
        width = replies.mask.shape[1]
        token = replies.ids[:, -width:, None, None].expand(-1, -1, 1, self.values.size)
        target = replies.right[:, None].expand(replies.mask.shape)
        for _ in range(steps):
            logits = self.logits(replies).gather(2, token)[:, :, 0]
            loss = self.values.loss(logits, target)[replies.mask].mean()
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()


def log_probs(policy: CausalPolicy, replies: Replies) -> Tensor:
    """(N, T, V) with gradient."""
    positions = (replies.seen.long().cumsum(1) - 1).clamp(min=0)
    out = policy.model(
        input_ids=replies.ids,
        attention_mask=replies.seen.long(),
        position_ids=positions,
        logits_to_keep=replies.mask.shape[1] + 1,
        use_cache=False,
    )
    return out.logits[:, :-1].float().log_softmax(-1)


def loss_of(
    arm: str,
    policy: CausalPolicy,
    replies: Replies,
    names: list[str],
    *,
    critic: TokenCritic | None,
    belief: Belief | None,
    step: int,
) -> Tensor:
    """The loss of one arm on completions; neither critic nor belief has seen them."""
    every = log_probs(policy, replies)
    width = replies.mask.shape[1]
    token = replies.ids[:, -width:, None]
    logp = every.gather(2, token)[..., 0]
    group = torch.arange(len(names)) // GROUP
    rollouts = Rollouts(logp.detach(), replies.mask, replies.right, group)
    advantage = None
    if arm == "tracked":
        assert belief is not None
        advantage = belief.advantages(names, replies.right, step=step).advantage.float()
    if arm in ("critic", "expected"):
        assert critic is not None
        q = critic.q(replies)
        if arm == "expected":
            top = every.topk(TOP, dim=-1)
            probability, found = top.values.exp(), q.gather(2, top.indices)
            share = probability.detach() / probability.detach().sum(-1, keepdim=True)
            value = (share * found).sum(-1, keepdim=True)
            per_token = -(probability * (found - value)).sum(-1)
            weights = replies.mask / (replies.mask.sum(1, keepdim=True) * len(names))
            return (weights * per_token).sum()
        advantage = (q.gather(2, token)[..., 0] - (every.detach().exp() * q).sum(-1)).float()
    return policy_loss(make_method("grpo"), rollouts, logp, advantage=advantage).value


def batches(pool: Pool, seed: int) -> Any:
    """Endless batches of questions, each repeated ``GROUP`` times, in passes over the pool."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        order = torch.randperm(len(pool.rows), generator=generator).tolist()
        for start in range(0, len(order) - QUESTIONS + 1, QUESTIONS):
            yield [pool.rows[place] for place in order[start : start + QUESTIONS] for _ in range(GROUP)]


def begin(world: World, seed: int) -> tuple[CausalPolicy, Pool, torch.Generator, TokenCritic, Belief]:
    policy = world.policy
    assert isinstance(policy, CausalPolicy)
    policy.load(world.start)
    torch.manual_seed(seed)
    return (
        policy,
        draw_pool(world, MATHS, 256, seed),
        torch.Generator().manual_seed(seed),
        TokenCritic(policy.model),
        make_belief("auto"),
    )


def train(world: World, arm: str, rate: float, seed: int, alone: int) -> dict[str, Any]:
    """One run, the critic alone at first: exact accuracy on the pool every eight steps, and held out at the end."""
    policy, pool, generator, critic, belief = begin(world, seed)
    optimizer = torch.optim.Adam(policy.parameters(), lr=rate)
    curve = [policy.success(pool.rows).mean().item()]
    for step, rows in zip(range(STEPS), batches(pool, seed)):
        names = [row["prompt_id"] for row in rows]
        replies = policy.sample(rows, generator)
        if step >= alone:
            loss = loss_of(arm, policy, replies, names, critic=critic, belief=belief, step=step)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
            optimizer.step()
        if arm in ("critic", "expected"):
            critic.fit(replies)
        if arm == "tracked":
            belief.update(names, replies.right, step=step)
        if (step + 1) % 8 == 0:
            curve.append(policy.success(pool.rows).mean().item())
    held_out = policy.success(pool.held_out).mean().item()
    return {"arm": arm, "rate": rate, "seed": seed, "alone": alone, "curve": curve, "held_out": held_out}


def variance(world: World, seed: int, *, warm: int = 48, number: int = 32) -> dict[str, Any]:
    """The arms' gradients on the same completions of the start policy, after ``warm`` batches for critic and belief.

    Noise = tr Cov / |mean|^2 over batches; cosine of an arm's mean with the mean of the other half's leave-one-out
    gradients, which is unbiased.
    """
    policy, pool, generator, critic, belief = begin(world, seed)
    stream = batches(pool, seed)
    for step in range(warm):
        rows = next(stream)
        replies = policy.sample(rows, generator)
        critic.fit(replies)
        belief.update([row["prompt_id"] for row in rows], replies.right, step=step)
    found: dict[str, list[Tensor]] = {arm: [] for arm in (*ARMS, "reference")}
    weights = list(policy.parameters())
    for _ in range(number):
        rows = next(stream)
        names = [row["prompt_id"] for row in rows]
        replies = policy.sample(rows, generator)
        for arm in ARMS:
            loss = loss_of(arm, policy, replies, names, critic=critic, belief=belief, step=warm)
            found[arm].append(_flat(torch.autograd.grad(loss, weights)))
        every = log_probs(policy, replies)
        logp = every.gather(2, replies.ids[:, -replies.mask.shape[1] :, None])[..., 0]
        right = replies.right.reshape(-1, GROUP)
        others = (right.sum(1, keepdim=True) - right) / (GROUP - 1)
        plain = -(
            (right - others).flatten()[:, None] * logp * replies.mask / replies.mask.sum(1, keepdim=True)
        )
        found["reference"].append(_flat(torch.autograd.grad(plain.sum(1).mean(), weights)))
    reference = torch.stack(found.pop("reference")).double()
    halves = slice(0, number // 2), slice(number // 2, number)
    rows_: dict[str, Any] = {}
    for arm, gradients in found.items():
        each = torch.stack(gradients).double()
        cosines = [
            torch.cosine_similarity(each[one].mean(0), reference[other].mean(0), dim=0).item()
            for one, other in (halves, halves[::-1])
        ]
        noise = each.var(0).sum() / each.mean(0).square().sum()
        rows_[arm] = {"noise": noise.item(), "cosine": sum(cosines) / 2}
    return {"kind": "variance", "seed": seed, "warm": warm, "batches": number, "arms": rows_}


def _flat(parts: tuple[Tensor, ...]) -> Tensor:
    return torch.cat([part.flatten() for part in parts])


def best_rate(rows: list[dict[str, Any]], arm: str, alone: int) -> float:
    """The rate with the highest mean of the curve on the tuning seeds."""
    mine = [row for row in rows if (row.get("arm"), row.get("alone")) == (arm, alone)]
    tried = {
        rate: [sum(r["curve"]) for r in mine if r["rate"] == rate and r["seed"] in TUNING] for rate in RATES
    }
    return max(RATES, key=lambda rate: sum(tried[rate]) / max(len(tried[rate]), 1))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--minutes", type=float, default=float("inf"), help="begin no run after so many")
    args = parser.parse_args()
    torch.set_num_threads(1)
    end = time.monotonic() + 60 * args.minutes
    world = tiny_world(ROOT / "runs" / ".cache", print)
    args.output.parent.mkdir(parents=True, exist_ok=True)

    def known() -> list[dict[str, Any]]:
        lines = args.output.read_text(encoding="utf-8").splitlines() if args.output.exists() else []
        return [json.loads(line) for line in lines if line]

    def keep(row: dict[str, Any]) -> None:
        """Write a line down; stop once the time is over."""
        with args.output.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        print(json.dumps(row)[:200], flush=True)
        if time.monotonic() > end:
            raise SystemExit("tokens: time is over; the same command goes on")

    for seed in SEEDS:
        if not any(row.get("kind") == "variance" and row["seed"] == seed for row in known()):
            keep(variance(world, seed))
    for arm, alone in ((name, steps) for name in ARMS for steps in ALONE[name]):
        for seed, rates in [(s, RATES) for s in TUNING] + [(s, None) for s in SEEDS]:
            for rate in rates or [best_rate(known(), arm, alone)]:
                run = {"arm": arm, "rate": rate, "seed": seed, "alone": alone}
                if not any(run.items() <= row.items() for row in known() if "arm" in row):
                    keep(train(world, arm, rate, seed, alone))


if __name__ == "__main__":
    main()
