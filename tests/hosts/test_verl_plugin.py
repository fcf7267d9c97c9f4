"""verl's registries, configuration and ``ppo_loss`` with our methods in them, called live where verl is installed."""

from __future__ import annotations

import dataclasses
import importlib
import re
import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

pytest.importorskip("verl", exc_type=ImportError)
from hydra import compose, initialize_config_module
from hydra.errors import InstantiationException
from omegaconf import OmegaConf
from tensordict import TensorDict
from verl.trainer.ppo import core_algos
from verl.utils import import_utils
from verl.utils import tensordict_utils as tu
from verl.utils.config import omega_conf_to_dataclass, validate_config
from verl.workers.config import FSDPActorConfig, McoreActorConfig, PolicyLossConfig
from verl.workers.utils.losses import ppo_loss

from kalman_rl.errors import AdapterError, ConfigError
from kalman_rl.hosts.verl import KalmanPolicyLossConfig, plugin, register, registered
from kalman_rl.hosts.verl.choice import choose
from kalman_rl.hosts.verl.estimators import TRACKED
from kalman_rl.hosts.verl.losses import BATCH, AsVerl, _say_mode, choice_for, in_our_words
from kalman_rl.kernels import jit
from kalman_rl.methods import METHODS, make_method
from kalman_rl.objectives import advantage, aggregate
from kalman_rl.objectives.learning import step_statistics, with_bounds
from kalman_rl.objectives.loss import estimate_advantage, policy_loss
from kalman_rl.objectives.rollouts import Rollouts
from kalman_rl.objectives.trust.balance import Balance
from tests.oracles.batches import Batch, make_batch

LENGTH = 17
REFUSED = ("dppo_topk_tv", "dppo_topk_kl", "capo", "a3po")
GIVEN = {"process_noise": 1e-3, "observation_noise": 0.5}
RUNNABLE = [name for name in METHODS if name not in REFUSED]
AGGREGATE: dict[str, Any] = {
    "token-mean": aggregate.token_mean,
    "token-sum": lambda rollouts, totals: rollouts.mask.double(),
    "seq-mean-token-mean": aggregate.sequence_mean,
    "seq-mean-token-sum": aggregate.SequenceSum(1.0),
    "seq-mean-token-sum-norm": aggregate.SequenceSum(float(LENGTH)),
}
"""verl's five modes, in our words; its sequence means add 1e-8 to a length."""


def options_of(name: str) -> dict[str, float]:
    """What has to be given: noises that would be learned elsewhere."""
    learning = make_method(name).learns.get("ratio")
    return {} if learning is None else {k: GIVEN[k] for k in learning.learned}


def settings(name: str, **fields: Any) -> KalmanPolicyLossConfig:
    given = {"options": options_of(name)} | fields
    return KalmanPolicyLossConfig(loss_mode=f"kalman_rl/{name}", **given)


def actor(policy: PolicyLossConfig, kind: type = FSDPActorConfig, **fields: Any) -> Any:
    return kind(rollout_n=1, ppo_micro_batch_size_per_gpu=1, policy_loss=policy, **fields)


def call(
    name: str, batch: Batch, advantages: Tensor, mode: str, config: Any, weights: Tensor | None = None
) -> tuple[Tensor, Tensor, dict[str, float]]:
    """Value, gradient and metrics of a loss in verl's registry, called as verl calls it."""
    logp = batch.logp.clone().requires_grad_()
    token = BATCH.set(TensorDict({"rollout_log_probs": batch.logp_old}, batch_size=len(batch.mask)))
    try:
        value, metrics = core_algos.get_policy_loss_fn(name)(
            old_log_prob=batch.logp_old,
            log_prob=logp,
            advantages=advantages,
            response_mask=batch.mask,
            loss_agg_mode=mode,
            config=config,
            rollout_is_weights=weights,
        )
    finally:
        BATCH.reset(token)
    value.backward()
    assert logp.grad is not None
    return value.detach(), logp.grad, metrics


def token_advantages(rows: int, seed: int) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(rows, 1, dtype=torch.float64, generator=g).expand(-1, LENGTH)


# ---- the registry


def test_every_method_is_registered_once() -> None:
    before = dict(core_algos.POLICY_LOSS_REGISTRY)
    register()
    importlib.reload(plugin)  # a second import
    assert before == core_algos.POLICY_LOSS_REGISTRY
    names = {f"kalman_rl/{name}" for name in METHODS}
    assert set(registered()["losses"]) == names
    assert set(registered()["estimators"]) == names | {f"kalman_rl/{TRACKED}"}


def test_a_name_that_somebody_else_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(core_algos.POLICY_LOSS_REGISTRY, "kalman_rl/kpo", lambda **kw: None)
    with pytest.raises(AdapterError, match="got kalman_rl/kpo registered by"):
        register()


def test_another_verl_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(core_algos, "agg_loss", lambda loss_mat, loss_mask: loss_mat.sum())
    missing = "loss_agg_mode, dp_size, batch_num_tokens, global_batch_size"
    expected = rf"agg_loss: got \(loss_mat, loss_mask\), expected \(loss_mat, loss_mask, {missing}"
    with pytest.raises(AdapterError, match=expected):
        plugin.check_host()


# ---- losses: the same numbers as without verl


@pytest.mark.parametrize("mode", list(AGGREGATE))
@pytest.mark.parametrize("name", RUNNABLE)
def test_equals_our_loss(name: str, mode: str) -> None:
    batch = make_batch(11, 6, LENGTH, scale=0.4)
    advantages = token_advantages(6, 1)
    value, gradient, metrics = call(
        f"kalman_rl/{name}", batch, advantages, mode, actor(settings(name), loss_agg_mode=mode)
    )
    method = make_method(name, **options_of(name))
    object.__setattr__(method, "aggregate", AGGREGATE[mode])
    logp = batch.logp.clone().requires_grad_()
    expected = policy_loss(method, Rollouts(batch.logp_old, batch.mask, logp_behaviour=batch.logp_old), logp,
                           advantage=advantages)  # fmt: skip
    expected.value.backward()
    torch.testing.assert_close(gradient, logp.grad, rtol=2e-8, atol=1e-12)
    torch.testing.assert_close(value, expected.value.detach(), rtol=1e-7, atol=1e-12)
    assert gradient.abs().max() > 0
    for key in set(expected.metrics) & set(metrics) - {
        "objective/fused"
    }:  # verl's weights take the parts one by one
        assert metrics[key] == pytest.approx(expected.metrics[key].item(), rel=1e-6, abs=1e-9), key
    assert {"ratio/noop", "trust/kept", "policy/kl_old"} <= set(metrics)


@pytest.mark.parametrize("name", ["kpo", "dr_grpo", "dapo", "gmpo"])
def test_published_aggregation(name: str) -> None:
    batch = make_batch(12, 5, LENGTH)
    advantages = token_advantages(5, 2)
    options = {"length": 50.0} if name == "dr_grpo" else {}
    config = actor(settings(name, aggregation="method", options=options), loss_agg_mode="token-sum")
    value, gradient, _ = call(f"kalman_rl/{name}", batch, advantages, "token-sum", config)
    logp = batch.logp.clone().requires_grad_()
    own = policy_loss(
        make_method(name, **options), Rollouts(batch.logp_old, batch.mask), logp, advantage=advantages
    )
    own.value.backward()
    torch.testing.assert_close(gradient, logp.grad, rtol=2e-8, atol=1e-12)
    torch.testing.assert_close(value, own.value.detach(), rtol=1e-7, atol=1e-12)


def test_a_mode_other_than_the_published_one_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    _say_mode.cache_clear()
    batch, config = make_batch(13, 3, LENGTH), actor(settings("gpg_published"))
    for _ in range(2):
        call("kalman_rl/gpg_published", batch, token_advantages(3, 3), "seq-mean-token-sum", config)
    said = [r.getMessage() for r in caplog.records if "gpg_published" in r.getMessage()]
    assert len(said) == 1 and "published with 'token-mean'" in said[0]


# ---- losses: the same numbers as verl's own

VERLS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    # ours -> verl's, verl's settings, ours
    "grpo": (
        "vanilla",
        {"clip_ratio_low": 0.2, "clip_ratio_high": 0.28, "clip_ratio_c": 1.7},
        {"low": 0.2, "high": 0.28, "dual": 1.7},
    ),
    "gspo": ("gspo", {"clip_ratio_low": 0.01, "clip_ratio_high": 0.02}, {"low": 0.01, "high": 0.02}),
    "cispo": (
        "cispo",
        {"clip_ratio_low": 0.2, "clip_ratio_high": 0.28},
        {"options": {"clip_ratio_low": 0.2, "clip_ratio_high": 0.28}},
    ),
    "sapo": ("sapo", {"tau_pos": 1.3, "tau_neg": 2.1}, {"options": {"tau_pos": 1.3, "tau_neg": 2.1}}),
    "gmpo": ("geo_mean", {"clip_ratio_low": 0.2, "clip_ratio_high": 0.3}, {"low": 0.2, "high": 0.3}),
    "dro": ("dro", {"policy_loss": PolicyLossConfig(dro_beta=0.3)}, {"options": {"dro_beta": 0.3}}),
    "dppo_tv": (
        "dppo_tv",
        {"clip_ratio_low": 0.05, "clip_ratio_high": 0.08, "clip_ratio_c": 1.6},
        {"low": 0.05, "high": 0.08, "options": {"cap": 1.6}},
    ),
}


@pytest.mark.parametrize("name", list(VERLS))
def test_equals_verls_loss(name: str) -> None:
    theirs, fields, mine = VERLS[name]
    mode = "seq-mean-token-mean"  # the one mode that verl's sapo and geo_mean know
    batch = make_batch(21, 7, LENGTH)
    advantages = token_advantages(7, 4)
    fields = {"policy_loss": PolicyLossConfig()} | fields
    config = FSDPActorConfig(rollout_n=1, ppo_micro_batch_size_per_gpu=1, **fields)
    expected = call(theirs, batch, advantages, mode, config)
    found = call(f"kalman_rl/{name}", batch, advantages, mode, actor(settings(name, **mine)))
    torch.testing.assert_close(found[0], expected[0], rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(found[1], expected[1], rtol=1e-7, atol=1e-9)
    assert found[2]["actor/ppo_kl"] == pytest.approx(expected[2]["actor/ppo_kl"], rel=1e-6)
    if name in ("grpo", "gspo"):
        assert 0 < expected[2]["actor/pg_clipfrac"] < 1


@pytest.mark.parametrize("theirs", ["vanilla", "gspo", "cispo", "sapo"])
def test_rollout_weights(theirs: str) -> None:
    """verl's importance weights multiply every token's loss, in ours as in theirs."""
    name = {"vanilla": "grpo"}.get(theirs, theirs)
    _, fields, mine = VERLS[name]
    batch = make_batch(22, 7, LENGTH)
    weights = torch.rand(7, LENGTH, dtype=torch.float64, generator=torch.Generator().manual_seed(3)) * 2
    config = FSDPActorConfig(rollout_n=1, ppo_micro_batch_size_per_gpu=1, **fields)
    mode, advantages = "seq-mean-token-mean", token_advantages(7, 5)
    expected = call(theirs, batch, advantages, mode, config, weights)
    found = call(f"kalman_rl/{name}", batch, advantages, mode, actor(settings(name, **mine)), weights)
    torch.testing.assert_close(found[0], expected[0], rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(found[1], expected[1], rtol=1e-7, atol=1e-9)
    plain = call(f"kalman_rl/{name}", batch, advantages, mode, actor(settings(name, **mine)))
    assert not torch.allclose(found[1], plain[1])


def test_weights_do_not_count_a_mismatch_twice() -> None:
    batch = make_batch(23, 3, LENGTH)
    with pytest.raises(ConfigError, match="already taken to the behaviour policy"):
        call("kalman_rl/dppo_tv", batch, token_advantages(3, 6), "token-mean", actor(settings("dppo_tv")),
             torch.ones_like(batch.logp))  # fmt: skip


def test_megatron_actor() -> None:
    batch, advantages = make_batch(24, 4, LENGTH), token_advantages(4, 7)
    found = call("kalman_rl/kpo", batch, advantages, "token-mean", actor(settings("kpo"), McoreActorConfig))
    expected = call("kalman_rl/kpo", batch, advantages, "token-mean", actor(PolicyLossConfig()))
    assert torch.equal(found[1], expected[1])


# ---- losses: micro-batches


@pytest.mark.parametrize("mode", list(AGGREGATE))
@pytest.mark.parametrize("name", ["kpo", "cispo", "dro", "minpro"])
def test_micro_batches_sum_to_the_whole(name: str, mode: str) -> None:
    batch, advantages = make_batch(31, 8, LENGTH), token_advantages(8, 8)
    advantages = advantages.contiguous()

    def config() -> Any:
        made = actor(settings(name), loss_agg_mode=mode)
        made.global_batch_info.update(dp_size=1, batch_num_tokens=int(batch.mask.sum()), global_batch_size=8,
                                      loss_scale_factor=LENGTH)  # fmt: skip
        return made

    whole = call(f"kalman_rl/{name}", batch, advantages, mode, config())
    parts = [torch.tensor([0, 1, 2]), torch.tensor([3]), torch.tensor([4, 5, 6, 7])]
    found = [call(f"kalman_rl/{name}", batch.rows(i), advantages[i], mode, config()) for i in parts]
    torch.testing.assert_close(torch.cat([f[1] for f in found]), whole[1], rtol=1e-12, atol=1e-15)
    torch.testing.assert_close(sum(f[0] for f in found), whole[0], rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("mode", list(AGGREGATE))
def test_weights_of_a_mode_are_verls(mode: str, ranks: int) -> None:
    """Our words for a mode, which a compiled pass knows, against the gradient of verl's own aggregation."""
    batch = make_batch(45, 4, LENGTH)
    rollouts = Rollouts(batch.logp_old, batch.mask, allow_empty=True)
    info = {"dp_size": ranks, "batch_num_tokens": 131, "global_batch_size": 12, "loss_scale_factor": 40}
    for length in (1.0, 3.0):
        words = in_our_words(mode, info, length, LENGTH)
        if words is None:  # verl sums tokens over ranks, and an average over lengths has no constant
            assert (mode, ranks) == ("token-sum", 2) or (mode, length) == ("seq-mean-token-mean", 3.0)
            continue
        found = words[0](rollouts, words[1])
        expected = AsVerl(mode, info, length)(rollouts, words[1])
        torch.testing.assert_close(found.double(), expected.double(), rtol=1e-7, atol=0)
    assert in_our_words("token-mean", info | {"batch_num_tokens": 1, "dp_size": 2}, 1.0, LENGTH) is None
    assert in_our_words(mode, {}, 1.0, LENGTH) is None or mode == "token-sum"


def test_the_compiled_pass_is_taken() -> None:
    batch, advantages = make_batch(46, 4, LENGTH), token_advantages(4, 1)
    old, logp = batch.logp_old.float(), batch.logp.float()
    config = actor(settings("kpo"))
    config.global_batch_info.update({"dp_size": 2, "batch_num_tokens": 131, "global_batch_size": 12})
    for mode in AGGREGATE:
        leaf = logp.clone().requires_grad_()
        _, metrics = core_algos.get_policy_loss_fn("kalman_rl/kpo")(
            old_log_prob=old, log_prob=leaf, advantages=advantages.float(), response_mask=batch.mask,
            loss_agg_mode=mode, config=config,
        )  # fmt: skip
        share = float(batch.mask.sum()) * 12 / (131 * 4)
        assert metrics["objective/fused"] == pytest.approx(share * (jit.usable(leaf) and mode != "token-sum"))


def test_data_parallel_ranks_average_to_the_whole() -> None:
    batch, advantages = make_batch(32, 6, LENGTH), token_advantages(6, 9)

    def config(dp_size: int) -> Any:
        made = actor(settings("kpo"))
        made.global_batch_info.update(dp_size=dp_size, batch_num_tokens=int(batch.mask.sum()))
        return made

    whole = call("kalman_rl/kpo", batch, advantages, "token-mean", config(1))
    ranks = [
        call("kalman_rl/kpo", batch.rows(i), advantages[i], "token-mean", config(2))
        for i in (torch.arange(4), torch.tensor([4, 5]))
    ]
    torch.testing.assert_close(torch.cat([r[1] for r in ranks]) / 2, whole[1], rtol=1e-12, atol=1e-15)


def test_a_micro_batch_without_trained_tokens() -> None:
    batch = make_batch(33, 2, LENGTH)
    batch.mask[:] = False
    config = actor(settings("kpo"))
    config.global_batch_info.update(batch_num_tokens=7, global_batch_size=4)
    value, gradient, metrics = call("kalman_rl/kpo", batch, token_advantages(2, 1), "token-mean", config)
    assert value == 0 and not gradient.any()
    assert not any(metrics.values()), "nothing is added to the means of the others"


@pytest.mark.parametrize("name", ["bapo", "bapo_published"])
def test_outside_an_engine_a_call_is_the_step(name: str) -> None:
    batch, advantages = make_batch(34, 6, LENGTH, scale=0.5), token_advantages(6, 10)
    config = actor(settings(name))
    config.global_batch_info.update(batch_num_tokens=int(batch.mask.sum()), global_batch_size=6)
    half = torch.arange(3)
    _, _, metrics = call(f"kalman_rl/{name}", batch.rows(half), advantages[half], "token-mean", config)
    method = make_method(name)
    rollouts = Rollouts(batch.logp_old[half], batch.mask[half])
    trust = with_bounds(
        method, step_statistics(method, rollouts, batch.logp[half], advantage=advantages[half])
    ).trust
    share = batch.mask[half].sum() / batch.mask.sum()
    weight = 2 * share.item()  # of two micro-batches, by tokens
    assert metrics["trust/bound_low"] == pytest.approx(weight * (1 - trust.low))
    assert metrics["trust/bound_high"] == pytest.approx(weight * (1 + trust.high))
    assert isinstance(method.trust, Balance)


# ---- ppo_loss, as the actor calls it


def nested(rows: list[Tensor]) -> Tensor:
    return torch.nested.as_nested_tensor(rows, layout=torch.jagged)


@pytest.mark.parametrize("name", ["kpo", "dppo_tv", "dppo_kl"])
def test_ppo_loss_with_nested_tensors(name: str) -> None:
    """Model outputs for prompt and response in one ragged row each, as an FSDP actor hands them over. The ratio of the
    last two is to the policy that sampled, which is neither the old nor the current one."""
    prompt, response = [3, 5, 2], [4, 2, 6]
    g = torch.Generator().manual_seed(5)
    old = [-torch.rand(n, generator=g) for n in response]
    flat = [
        torch.cat((torch.zeros(p), o + 0.3 * torch.randn(len(o), generator=g))) for p, o in zip(prompt, old)
    ]
    behaviour = [row - 0.2 * torch.rand(len(row), generator=g) for row in old]
    advantages = [torch.full((n,), a) for n, a in zip(response, (1.0, -0.5, 0.25))]
    # the model's output at a position is the log-probability of the next token
    leaf = torch.cat([row.roll(-1) for row in flat]).requires_grad_()
    lengths = [p + r for p, r in zip(prompt, response)]
    data = TensorDict(
        {
            "prompts": nested([torch.zeros(p, dtype=torch.long) for p in prompt]),
            "responses": nested([torch.zeros(r, dtype=torch.long) for r in response]),
            "response_mask": nested([torch.ones(r, dtype=torch.long) for r in response]),
            "old_log_probs": nested(old),
            "advantages": nested(advantages),
            "rollout_log_probs": nested(behaviour),
        },
        batch_size=3,
    )
    for key, value in {"dp_size": 1, "batch_num_tokens": sum(response), "global_batch_size": 3}.items():
        tu.assign_non_tensor_data(data, key, value)
    options = {"low": 0.05, "high": 0.05} | ({"process_noise": 0.1} if name == "kpo" else {})
    config = actor(settings(name, **options), loss_agg_mode="seq-mean-token-mean")
    loss, metrics = ppo_loss(config, {"log_probs": nested(list(leaf.split(lengths)))}, data)
    loss.backward()

    shape = (3, max(response))
    mask = torch.arange(shape[1]) < torch.tensor(response)[:, None]
    padded = [
        torch.nn.utils.rnn.pad_sequence(rows, batch_first=True) for rows in (old, advantages, behaviour)
    ]
    logp = torch.nn.utils.rnn.pad_sequence([f[p:] for f, p in zip(flat, prompt)], batch_first=True)
    logp.requires_grad_()
    method = dataclasses.replace(make_method(name, **options), aggregate=aggregate.sequence_mean)
    rollouts = Rollouts(padded[0], mask, logp_behaviour=padded[2])
    expected = policy_loss(method, rollouts, logp, advantage=padded[1])
    expected.value.backward()
    assert loss.item() == pytest.approx(expected.value.item(), rel=1e-5)
    assert leaf.grad is not None and logp.grad is not None
    found = [part[p - 1 : -1] for part, p in zip(leaf.grad.split(lengths), prompt)]
    torch.testing.assert_close(torch.cat(found), logp.grad[mask], rtol=1e-5, atol=1e-7)
    assert metrics["actor/pg_loss"].aggregate() == pytest.approx(loss.item())
    assert metrics["ratio/raw_log_variance"].aggregate() > 0


def test_without_the_rollouts_log_probabilities() -> None:
    batch = make_batch(47, 2, LENGTH)
    with pytest.raises(ConfigError, match=r"kalman_rl/dppo_tv, .*calculate_log_probs=true"):
        core_algos.get_policy_loss_fn("kalman_rl/dppo_tv")(
            old_log_prob=batch.logp_old, log_prob=batch.logp, advantages=token_advantages(2, 1),
            response_mask=batch.mask, config=actor(settings("dppo_tv")),
        )  # fmt: skip


# ---- settings


@contextmanager
def composed(*overrides: str) -> Iterator[Any]:
    """verl's whole configuration, read by Hydra as its command line reads it."""
    with initialize_config_module("verl.trainer.config", version_base=None):
        yield compose(
            "ppo_trainer",
            [
                "actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu=1",
                "actor_rollout_ref.rollout.log_prob_micro_batch_size_per_gpu=1",
                "actor_rollout_ref.ref.log_prob_micro_batch_size_per_gpu=1",
                "actor_rollout_ref.rollout.n=8",
                "algorithm.adv_estimator=kalman_rl/kpo",
                *overrides,
            ],
        )


P = "actor_rollout_ref.actor.policy_loss"
TARGET = f"{P}._target_=kalman_rl.hosts.verl.KalmanPolicyLossConfig"


def test_one_line_selects_a_loss() -> None:
    with composed(f"{P}.loss_mode=kalman_rl/kpo") as config:
        validate_config(config, use_reference_policy=False, use_critic=False)
        made = omega_conf_to_dataclass(config.actor_rollout_ref.actor)
    batch, advantages = make_batch(41, 3, LENGTH), token_advantages(3, 1)
    loss = made.policy_loss.loss_mode
    found = call(loss, batch, advantages, "seq-mean-token-mean", made)
    expected = call(loss, batch, advantages, "seq-mean-token-mean", actor(settings("kpo")))
    assert torch.equal(found[1], expected[1])


def test_options_from_the_command_line() -> None:
    with composed(
        f"{P}.loss_mode=kalman_rl/kpo", TARGET, f"+{P}.low=0.05", f"+{P}.kalman_Q=1e-3", f"+{P}.options.epsilon=1e-4",
        f"+{P}.options.clip_ratio_high=0.07",
    ) as config:  # fmt: skip
        validate_config(config, use_reference_policy=False, use_critic=False)
        made = omega_conf_to_dataclass(config.actor_rollout_ref.actor)
    method = made.policy_loss.choice().method
    assert (method.trust.low, method.trust.high, method.ratio.process_noise) == (0.05, 0.07, 1e-3)
    assert OmegaConf.structured(KalmanPolicyLossConfig(loss_mode="kalman_rl/kpo")).low is None


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (f"+{P}.options.proces_noise=1", "did you mean 'process_noise'"),
        (f"+{P}.options.epsilon=0.5", "algorithm.kalman_rl.epsilon"),
        (f"+{P}.kalman_S=1", "unexpected keyword"),
        (f"+{P}.aggregation=mean", "expected one of verl, method"),
        (f"{P}.loss_mode=kalman_rl/kpo_difuse", "did you mean 'kalman_rl/kpo_diffuse'"),
        (f"{P}.loss_mode=kalman_rl/capo", "train it with TRL"),
        (
            f"{P}.loss_mode=kalman_rl/dppo_topk_kl",
            "log-probabilities of the behaviour policy's top tokens.*dppo_tv",
        ),
        (f"{P}.loss_mode=vanilla", "expected kalman_rl/NAME"),
    ],
)
def test_bad_settings_stop_before_the_run(override: str, message: str) -> None:
    """verl's own check of the configuration, the first thing its command line does, raises."""
    with composed(f"{P}.loss_mode=kalman_rl/kpo", TARGET, override) as config:
        with pytest.raises((InstantiationException, ConfigError), match=message):
            validate_config(config, use_reference_policy=False, use_critic=False)


def documented() -> list[list[str]]:
    """Overrides of every command line of verl in the documentation."""
    text = (Path(__file__).parents[2] / "docs" / "verl.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```bash\n(.*?)```", text, re.DOTALL)
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    return [shlex.split(line)[3:] for line in lines if line.startswith("python -m verl.trainer.main_ppo")]


@pytest.mark.parametrize("overrides", documented(), ids=["one line", "options", "bypass", "trainer"])
def test_documented_commands(overrides: list[str]) -> None:
    """Hydra reads them and verl's own check passes, which builds our settings and so the method."""
    with initialize_config_module("verl.trainer.config", version_base=None):
        config = compose("ppo_trainer", overrides)
    validate_config(config, use_reference_policy=False, use_critic=False)
    made = omega_conf_to_dataclass(config.actor_rollout_ref.actor)
    name = made.policy_loss.loss_mode.removeprefix("kalman_rl/")
    assert choice_for(name, made).method.name == name
    assert config.algorithm.adv_estimator in core_algos.ADV_ESTIMATOR_REGISTRY


def test_the_forks_names() -> None:
    fork = settings("kpo", kalman_Q=1e-5, kalman_R=0.5, is_clip=True)
    assert fork.choice().method == make_method("kpo", process_noise=1e-5, observation_noise=0.5)
    assert settings("kpo", is_clip=False).choice().method == make_method("kpo_unclipped", process_noise=1e-6)
    assert settings("kpo", is_clip=False, kalman_Q=0.1).choice().method.ratio.process_noise == 0.1
    with pytest.raises(ConfigError, match="got it twice for kpo"):
        settings("kpo", kalman_Q=1e-5, process_noise=1e-5)
    with pytest.raises(ConfigError, match="is_clip: got False for kalman_rl/grpo"):
        settings("grpo", is_clip=False)


@pytest.mark.parametrize(
    "given, message",
    [
        ({"is_clip": "no"}, "policy_loss.is_clip: got 'no'"),
        ({"options": None}, "policy_loss.options: got None, expected options by name"),
        ({"options": ["low"]}, "policy_loss.options: got"),
    ],
)
def test_settings_of_another_type(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=f"^{message}"):
        settings("kpo", **given)


def test_settings_without_effect_are_refused() -> None:
    with pytest.raises(ConfigError, match="actor.loss_agg_mode aggregates"):
        settings("dr_grpo", options={"length": 50.0})
    with pytest.raises(ConfigError, match="low: got it twice"):
        settings("grpo", low=0.1, options={"low": 0.1})
    batch = make_batch(42, 2, LENGTH)
    changed = actor(settings("kpo"), clip_ratio_low=0.1)
    with pytest.raises(ConfigError, match=r"policy_loss.options.clip_ratio_low=0.1"):
        call("kalman_rl/kpo", batch, token_advantages(2, 1), "token-mean", changed)


def test_defaults_of_a_method_that_verl_cannot_run() -> None:
    """Without our settings class nothing is checked at the start, so the first loss refuses."""
    batch = make_batch(43, 2, LENGTH)
    with pytest.raises(ConfigError, match="train it with TRL"):
        call("kalman_rl/capo", batch, token_advantages(2, 1), "token-mean", actor(PolicyLossConfig()))


def test_noises_are_learned_from_what_is_given() -> None:
    assert choose("kpo_auto", GIVEN).method.ratio.start.process_noise == GIVEN["process_noise"]
    assert "logp_behaviour" in choose("kpo_noise", {"behaviour": True}).method.inputs


# ---- estimators


def scored(seed: int = 3, rows: int = 10) -> tuple[Tensor, Tensor, Tensor, np.ndarray]:
    """Rewards (B,) on the last token (B, T), a mask, and verl's uids of three interleaved groups."""
    g = torch.Generator().manual_seed(seed)
    length = torch.randint(1, LENGTH + 1, (rows,), generator=g)
    mask = torch.arange(LENGTH) < length[:, None]
    reward = torch.rand(rows, dtype=torch.float64, generator=g)
    scores = torch.zeros(rows, LENGTH, dtype=torch.float64)
    scores[torch.arange(rows), length - 1] = reward
    uids = np.array([f"prompt {i}" for i in (torch.arange(rows) % 3).tolist()], dtype=object)
    return reward, scores, mask, uids


def estimate(name: str, scores: Tensor, mask: Tensor, uids: Any, config: Any = None, **others: Any) -> Tensor:
    function = core_algos.get_adv_estimator_fn(name)
    advantages, returns = function(
        token_level_rewards=scores, response_mask=mask.long(), config=config, index=uids, **others
    )
    assert torch.equal(advantages, returns)
    return advantages


ESTIMATED = [n for n in METHODS if n not in ("otb", "spo", "k_grpo")]


@pytest.mark.parametrize("name", ESTIMATED)
def test_estimator_equals_our_advantage(name: str) -> None:
    reward, scores, mask, uids = scored()
    group = torch.arange(len(reward)) % 3
    expected = estimate_advantage(make_method(name), Rollouts(torch.zeros(mask.shape), mask, reward, group))
    if name == "opo":
        expected = advantage.LengthWeighted()(reward, group, length=mask.sum(1))
    found = estimate(f"kalman_rl/{name}", scores, mask, uids)
    torch.testing.assert_close(
        found, torch.where(mask, expected[:, None], 0.0), check_dtype=False, rtol=1e-6, atol=1e-9
    )
    assert found.abs().max() > 0.01


@pytest.mark.parametrize(("name", "tolerance"), [("grpo", 1e-5), ("rloo", 1e-9), ("opo", 1e-9)])
def test_estimator_equals_verls(name: str, tolerance: float) -> None:
    _, scores, mask, uids = scored(4)
    config = OmegaConf.create({"kalman_rl": {"epsilon": 1e-6}}) if name == "grpo" else None
    expected, _ = core_algos.get_adv_estimator_fn(name)(scores.clone(), mask.double(), index=uids)
    found = estimate(f"kalman_rl/{name}", scores, mask, uids, config)
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance, check_dtype=False)


def test_padding_moves_no_baseline() -> None:
    _, scores, mask, uids = scored(5)
    found = estimate("kalman_rl/batch_mean", scores, mask, uids)
    padded = estimate(
        "kalman_rl/batch_mean",
        torch.cat((scores, torch.zeros(2, LENGTH))),
        torch.cat((mask, torch.zeros(2, LENGTH, dtype=torch.bool))),
        np.concatenate((uids, ["pad", "pad"])),
    )
    assert torch.equal(padded[:-2], found) and not padded[-2:].any()


def test_options_of_an_advantage() -> None:
    _, scores, mask, uids = scored(6)
    with composed("+algorithm.kalman_rl.epsilon=0.5") as config:
        found = estimate("kalman_rl/grpo", scores, mask, uids, config.algorithm)
    plain = estimate("kalman_rl/grpo", scores, mask, uids)
    assert 0 < found.abs().max() < plain.abs().max()
    for key, message in (("epsilonn", "did you mean 'epsilon'"), ("low", "policy_loss.options")):
        config = OmegaConf.create({"kalman_rl": {key: 0.5}})
        with pytest.raises(ConfigError, match=message):
            estimate("kalman_rl/grpo", scores, mask, uids, config)


def test_token_baseline_needs_what_verl_keeps_to_itself() -> None:
    _, scores, mask, uids = scored(7)
    with pytest.raises(ConfigError, match="adv_estimator=optimal_token_baseline"):
        estimate("kalman_rl/otb", scores, mask, uids)
    old = -torch.rand(mask.shape, dtype=torch.float64) - 0.1
    extra = {"old_log_probs": old, "sum_pi_squared": old.exp().square() + 0.3 * (1 - old.exp()).square()}
    found = estimate("kalman_rl/otb", scores, mask, uids, **extra)
    theirs, _ = core_algos.get_adv_estimator_fn("optimal_token_baseline")(
        scores.clone(), mask.double(), index=uids, handle_zero_tail=False, **extra
    )
    torch.testing.assert_close(found, theirs, rtol=1e-6, atol=1e-6, check_dtype=False)


@pytest.mark.parametrize("name", ["k_grpo", "spo", TRACKED])
def test_memory_needs_our_trainer(name: str) -> None:
    _, scores, mask, uids = scored(8)
    with pytest.raises(ConfigError, match="trainer.v1.trainer_mode=kalman_rl"):
        estimate(f"kalman_rl/{name}", scores, mask, uids)


# ---- TRL beside verl


def test_verls_actor_is_built_beside_trl() -> None:
    """TRL 1.16 no longer has a class that verl 0.9 renames a method of, before it shards any model."""
    pytest.importorskip("trl")
    from verl.models.transformers.monkey_patch import apply_monkey_patch

    from tests.hosts import tiny_llama

    apply_monkey_patch(tiny_llama.model(), use_remove_padding=False)


@pytest.mark.parametrize("there", [True, False])
def test_verl_is_told_of_a_trl_that_has_the_class(monkeypatch: pytest.MonkeyPatch, there: bool) -> None:
    found = SimpleNamespace(AutoModelForCausalLMWithValueHead=object) if there else SimpleNamespace()
    monkeypatch.setitem(sys.modules, "trl.experimental.ppo", found)
    import_utils.is_trl_available.cache_clear()
    assert import_utils.is_trl_available() is there
    import_utils.is_trl_available.cache_clear()
