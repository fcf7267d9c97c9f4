"""Recipes for SkyRL, prime-rl and slime: called as these hosts call them, micro-batch by micro-batch.

The hosts cannot be installed beside the others; stubs have the names and signatures read in their sources. The oracle
is one call of ``policy_loss`` on the whole batch, with the aggregation that the host's own scaling amounts to.
"""

from __future__ import annotations

import dataclasses
import sys
import types
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from kalman_rl import METHODS, make_method
from kalman_rl.errors import ConfigError, NumericError
from kalman_rl.hosts.recipes import common, prime_rl, skyrl, slime
from kalman_rl.hosts.recipes.prime_rl_stream import TaskStream
from kalman_rl.objectives.aggregate import sequence_mean, token_mean
from kalman_rl.objectives.loss import policy_loss
from kalman_rl.objectives.rollouts import Rollouts

NAMES = [
    "grpo",
    "gspo",
    "kpo",
    "kpo_diffuse",
    "cispo",
    "sapo",
    "minpro_clipped",
    "dppo_tv",
    "gmpo",
    "ratio_one",
]
B, T = 6, 9


@dataclass
class Batch:
    logp: Tensor
    old: Tensor
    behaviour: Tensor
    mask: Tensor
    advantage: Tensor


def batch(seed: int = 0) -> Batch:
    """Off-policy rows of different lengths, with a hole, and one row without trained tokens."""
    generator = torch.Generator().manual_seed(seed)
    old = -torch.rand(B, T, generator=generator) * 3 - 0.1
    lengths = torch.tensor([9, 5, 1, 7, 9, 0])
    mask = torch.arange(T) < lengths[:, None]
    mask[0, 3:5] = False
    logp = old + 0.4 * torch.randn(B, T, generator=generator)
    behaviour = old + 0.05 * torch.randn(B, T, generator=generator)
    advantage = torch.randn(B, 1, generator=generator).expand(B, T).clone()
    return Batch(logp.requires_grad_(), old, behaviour, mask, advantage)


def expected(name: str, data: Batch, aggregate: Any, old: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Loss and gradient of one call on the whole batch."""
    logp = data.logp.detach().clone().requires_grad_()
    rollouts = Rollouts(
        data.old if old is None else old, data.mask, logp_behaviour=data.behaviour, allow_empty=True
    )
    method = dataclasses.replace(make_method(name), aggregate=aggregate)
    value = policy_loss(method, rollouts, logp, advantage=data.advantage).value
    value.backward()
    assert logp.grad is not None and logp.grad.abs().sum() > 0
    return value.detach(), logp.grad


def same(value: Tensor, gradient: Tensor | None, oracle: tuple[Tensor, Tensor]) -> None:
    torch.testing.assert_close(value.detach(), oracle[0], rtol=1e-5, atol=1e-7)
    assert gradient is not None
    torch.testing.assert_close(gradient, oracle[1], rtol=1e-5, atol=1e-7)


# ---- SkyRL


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("reduction", ["token_mean", "sequence_mean"])
def test_skyrl(name: str, reduction: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Advantages divided as SkyRL divides them, two micro-batches, losses summed."""
    registry: dict[str, Any] = {}
    host = types.ModuleType("skyrl.backends.skyrl_train.utils.ppo_utils")
    host.PolicyLossRegistry = types.SimpleNamespace(register=registry.__setitem__)  # type: ignore[attr-defined]
    parts = host.__name__.split(".")
    for i in range(1, len(parts)):
        monkeypatch.setitem(sys.modules, ".".join(parts[:i]), types.ModuleType(".".join(parts[:i])))
    monkeypatch.setitem(sys.modules, host.__name__, host)
    assert skyrl.register(name) == f"kalman_rl/{name}"
    loss = registry[f"kalman_rl/{name}"]

    data = batch()
    if reduction == "token_mean":
        scaled, oracle = data.advantage / data.mask.sum(), expected(name, data, token_mean)
    else:
        rows = data.mask.any(1).sum()
        scaled = data.advantage / (data.mask.sum(1, keepdim=True).clamp(min=1) * rows)
        oracle = expected(name, data, sequence_mean)
    total = torch.zeros(())
    config = types.SimpleNamespace(policy_loss_type=f"kalman_rl/{name}", loss_reduction=reduction)
    for part in (slice(0, 2), slice(2, 6)):
        value, metrics = loss(
            data.logp[part],
            data.old[part],
            scaled[part],
            config=config,
            loss_mask=data.mask[part].float(),
            rollout_logprobs=data.behaviour[part],
        )
        assert all(isinstance(number, float) for number in metrics.values()) and "clip_ratio" in metrics
        total = total + value
    total.backward()
    same(total, data.logp.grad, oracle)


def test_skyrl_takes_methods_of_ones_own_and_refuses_penalties() -> None:
    assert skyrl.loss_for(make_method("kpo", process_noise=1e-4))(*[torch.zeros(1, 2)] * 3)[0] == 0
    with pytest.raises(ConfigError, match="'dro' with a penalty"):
        skyrl.loss_for("dro")


# ---- prime-rl


@dataclass
class LossInputs:
    trainer_logprobs: Tensor
    inference_logprobs: Tensor
    ref_logprobs: Tensor | None
    advantages: Tensor
    loss_mask: Tensor
    loss_weights: Tensor | None = None


@dataclass
class LossOutputs:
    loss: Tensor
    metrics: dict[str, Tensor]


@pytest.fixture
def prime_host(monkeypatch: pytest.MonkeyPatch) -> None:
    host = types.ModuleType("prime_rl.trainer.rl.loss")
    host.LossOutputs = LossOutputs  # type: ignore[attr-defined]
    for name in ("prime_rl", "prime_rl.trainer", "prime_rl.trainer.rl"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, host.__name__, host)


def prime_step(data: Batch, name: str, weights: Tensor | None = None, **options: Any) -> Tensor:
    """What prime-rl's compute_loss does: a call for each sequence, a sum, one division."""
    total = data.logp.sum() * 0.0
    for i in range(B):
        inputs = LossInputs(
            data.logp[i],
            data.behaviour[i],
            None,
            data.advantage[i],
            data.mask[i],
            None if weights is None else weights[i],
        )
        out = prime_rl.loss(inputs, method=name, **options)
        assert isinstance(out, LossOutputs) and all(v.dim() == 0 for v in out.metrics.values())
        total = total + out.loss
    return total / data.mask.sum()


@pytest.mark.parametrize("name", [*NAMES, "dro"])
def test_prime_rl(name: str, prime_host: None) -> None:
    data = batch(1)
    total = prime_step(data, name)
    total.backward()
    same(total, data.logp.grad, expected(name, data, token_mean, old=data.behaviour))


def test_prime_rl_weights_and_options(prime_host: None) -> None:
    data = batch(2)
    weights = torch.rand(B, T, generator=torch.Generator().manual_seed(5))
    total = prime_step(data, "grpo", weights, low=0.05, high=0.1)
    total.backward()
    weighted = dataclasses.replace(data, advantage=data.advantage * weights)
    rollouts = Rollouts(data.behaviour, data.mask, allow_empty=True)
    logp = data.logp.detach().clone().requires_grad_()
    method = dataclasses.replace(make_method("grpo", low=0.05, high=0.1), aggregate=token_mean)
    policy_loss(method, rollouts, logp, advantage=weighted.advantage).value.backward()
    torch.testing.assert_close(data.logp.grad, logp.grad)
    with pytest.raises(NumericError, match="loss_weights"):
        prime_step(data, "grpo", -weights)


# ---- slime


class SlimeHost(types.ModuleType):
    """Log-probabilities of packed samples, as slime's own function returns them."""

    @staticmethod
    def get_rollout_top_p_logprob_kwargs(args: Any, batch: Any) -> dict[str, Any]:
        return {}

    @staticmethod
    def get_log_probs_and_entropy(
        logits: Tensor,
        *,
        args: Any,
        unconcat_tokens: list[Tensor],
        total_lengths: list[int],
        response_lengths: list[int],
        with_entropy: bool = False,
    ) -> tuple[Tensor, dict[str, list[Tensor]]]:
        assert logits.dim() == 3 and logits.shape[0] == 1
        rows, start = [], 0
        for tokens, total, response in zip(unconcat_tokens, total_lengths, response_lengths, strict=True):
            now = logits[0, start : start + total].log_softmax(-1)
            targets = tokens[total - response :]
            rows.append(now[total - response - 1 : total - 1].gather(-1, targets[:, None])[:, 0])
            start += total
        return torch.empty(0), {"log_probs": rows}


@pytest.fixture
def slime_host(monkeypatch: pytest.MonkeyPatch) -> None:
    host = SlimeHost("slime.backends.megatron_utils.loss")
    package = types.ModuleType("slime.backends.megatron_utils")
    package.loss = host  # type: ignore[attr-defined]
    for module in (types.ModuleType("slime"), types.ModuleType("slime.backends"), package, host):
        monkeypatch.setitem(sys.modules, module.__name__, module)


def slime_case(**changes: Any) -> tuple[Any, dict[str, Any], Tensor, Any, Batch]:
    """Arguments of a slime loss, and the same data as rows. Samples have a prompt of two tokens."""
    generator = torch.Generator().manual_seed(3)
    lengths, vocabulary = [4, 6, 1], 5
    tokens = [torch.randint(vocabulary, (2 + n,), generator=generator) for n in lengths]
    logits = torch.randn(1, sum(lengths) + 6, vocabulary, generator=generator).requires_grad_()
    masks = [torch.ones(n) for n in lengths]
    masks[1][2] = 0.0
    totals = [2 + n for n in lengths]
    now = SlimeHost.get_log_probs_and_entropy(
        logits, args=None, unconcat_tokens=tokens, total_lengths=totals, response_lengths=lengths
    )[1]["log_probs"]
    old = [row.detach() + 0.3 * torch.randn(len(row), generator=generator) for row in now]
    behaviour = [row + 0.05 * torch.randn(len(row), generator=generator) for row in old]
    advantages = [torch.full((n,), float(a)) for n, a in zip(lengths, (1.5, -0.7, 0.4))]
    given = {
        "unconcat_tokens": tokens,
        "total_lengths": totals,
        "response_lengths": lengths,
        "loss_masks": masks,
        "advantages": advantages,
        "log_probs": old,
        "rollout_log_probs": behaviour,
    }
    args = types.SimpleNamespace(use_rollout_logprobs=False, context_parallel_size=1, entropy_coef=0.0)
    vars(args).update(changes)

    def sum_of_sample_mean(values: Tensor) -> Tensor:
        return sum((v * m).sum() / m.sum() for v, m in zip(values.split(lengths), masks, strict=True))

    def rows(parts: list[Tensor]) -> Tensor:
        return torch.nn.utils.rnn.pad_sequence(parts, batch_first=True)

    data = Batch(rows(now), rows(old), rows(behaviour), rows(masks) > 0, rows(advantages))
    return args, given, logits, sum_of_sample_mean, data


@pytest.mark.parametrize("name", [*NAMES, "dro"])
@pytest.mark.parametrize("rollout_logprobs", [False, True])
def test_slime(name: str, rollout_logprobs: bool, slime_host: None) -> None:
    """slime divides the sum of sample means by the batch size: the mean over sequences."""
    args, given, logits, reducer, data = slime_case(
        kalman_rl_method=name, use_rollout_logprobs=rollout_logprobs
    )
    value, log = slime.loss(args, given, logits, reducer)
    (value / 3).backward()
    old = data.behaviour if rollout_logprobs else data.old
    oracle, gradient = expected(name, data, sequence_mean, old)
    torch.testing.assert_close(value.detach() / 3, oracle, rtol=1e-5, atol=1e-7)
    (through,) = torch.autograd.grad(data.logp, logits, gradient)
    torch.testing.assert_close(logits.grad, through, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(log["loss"], value.detach())
    assert 0 <= log["pg_clipfrac"] <= 3


def test_slime_on_policy_and_options(slime_host: None) -> None:
    args, given, logits, reducer, _ = slime_case(kalman_rl_options={"process_noise": 1e-3})
    del given["log_probs"], given["rollout_log_probs"]
    value, log = slime.loss(args, given, logits, reducer)
    torch.testing.assert_close(value.detach(), -torch.tensor(1.5 - 0.7 + 0.4))
    assert log["pg_clipfrac"] == 0


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"use_kl_loss": True, "use_tis": True}, "use_kl_loss, use_tis: got it set"),
        ({"context_parallel_size": 2}, "context_parallel_size: got it set"),
        ({"kalman_rl_options": {"proces_noise": 1.0}}, "did you mean 'process_noise'"),
        ({"kalman_rl_method": "kpoo"}, "did you mean 'kpo'"),
    ],
)
def test_slime_refuses_what_would_not_act(changes: dict[str, Any], words: str, slime_host: None) -> None:
    args, given, logits, reducer, _ = slime_case(**changes)
    with pytest.raises(ConfigError, match=words):
        slime.loss(args, given, logits, reducer)


def test_every_method_is_taken_or_refused_with_a_reason() -> None:
    refused = set()
    for name in METHODS:
        try:
            common.named("SkyRL", name)
        except ConfigError as error:
            refused.add(name)
            assert "train with TRL or verl" in str(error)
    assert refused == {
        *("bapo", "bapo_published", "m2po", "capo", "dppo_topk_kl", "dppo_topk_tv", "a3po"),
        *("kpo_auto", "kpo_noise", "kpo_robust"),
    }


# ---- prime-rl's task sampler


@dataclass
class Task:
    key: str


def episodes(key: str, *rewards: float, broken: int = 0) -> list[Any]:
    """A finalized group as prime-rl's own sampler reads it."""

    def trace(reward: float, error: bool = False) -> Any:
        agent = types.SimpleNamespace(trainable=True)
        return types.SimpleNamespace(reward=reward, has_error=error, agent=agent, num_turns=1)

    made = [types.SimpleNamespace(ok=True, task=Task(key), traces=[trace(reward)]) for reward in rewards]
    made += [types.SimpleNamespace(ok=False, task=Task(key), traces=[trace(1.0)]) for _ in range(broken)]
    return made


def test_prime_rl_draws_tasks_that_teach_and_resumes() -> None:
    tasks = [Task(f"never{i}") for i in range(30)] + [Task(f"half{i}") for i in range(10)]
    sampler = TaskStream(tasks, count=8, seed=1)
    for _ in range(160):
        task = next(sampler)
        rewards = [0.0] * 4 if "never" in task.key else [0.0, 1.0, 0.0, 1.0]
        sampler.observe(episodes(task.key, *rewards, broken=1))
    sampler.observe(episodes("half0", broken=2))  # nothing is known of it
    assert sampler.metrics() == {"groups": 160.0}
    other = TaskStream(tasks, count=8, seed=2)
    next(sampler)  # in the middle of a batch
    other.load_state_dict(sampler.state_dict())
    drawn = [next(sampler).key for _ in range(39)]
    assert drawn == [next(other).key for _ in range(39)]
    assert sum("half" in key for key in drawn) > 20  # a quarter of the pool
    with pytest.raises(ConfigError, match="^pool: got 39 prompts"):
        TaskStream(tasks[1:], count=8).load_state_dict(sampler.state_dict())
    with pytest.raises(ConfigError, match="^tasks: got a list_iterator, expected a finite sequence"):
        TaskStream(iter(tasks), count=8)  # type: ignore[arg-type]
