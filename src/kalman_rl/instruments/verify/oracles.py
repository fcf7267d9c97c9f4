"""Oracles: definitions, autograd of the literal loss, and limits in which one method becomes another."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from kalman_rl.instruments.verify.advantages import by_definition
from kalman_rl.instruments.verify.check import Check, relative_error
from kalman_rl.instruments.verify.definitions import literal_loss, log_weights
from kalman_rl.instruments.verify.example import Example, example
from kalman_rl.instruments.verify.place import CPU, Place
from kalman_rl.methods import METHODS
from kalman_rl.objectives import aggregate, ratio, trust
from kalman_rl.objectives.advantage.group import ConstantBaseline
from kalman_rl.objectives.loss import Method, estimate_advantage, policy_loss

SEEDS = (0, 1, 2)
TOLERANCE = 1e-10
"""Relative; both sides are float64 but sum in another order."""


def checks(method: Method, place: Place = CPU) -> Iterator[Check]:
    """Every oracle that knows a method, each the worst of a few random batches."""
    yield _worst(method, place, "log-weights against a loop over tokens", _ratio_error)
    yield _worst(method, place, "gradient against autograd of the literal loss", _literal_error)
    yield _worst(method, place, "advantage against its definition", _advantage_error)
    yield _worst(method, place, "on-policy gradient is REINFORCE's", _on_policy_error)
    yield _worst(method, place, "nothing under the mask is read", _mask_error)
    for title, limit in _limits().get(method.name, {}).items():
        tolerance = place.tolerance(1e-6 if "->" in title else TOLERANCE)
        yield Check(method.name, title, limit(place), tolerance)


def _worst(method: Method, place: Place, title: str, error: Callable[[Method, Example], float]) -> Check:
    errors = [error(method, example(seed, place=place)) for seed in SEEDS]
    worst = math.nan if any(map(math.isnan, errors)) else max(errors)
    return Check(method.name, title, worst, place.tolerance(TOLERANCE))


def advantage_of(method: Method, batch: Example) -> Tensor:
    """The method's advantages (B, T) on the batch's rewards."""
    advantage = estimate_advantage(method, batch.rollouts)
    return (advantage if advantage.dim() == 2 else advantage[:, None]).expand_as(batch.logp)


def gradient(method: Method, batch: Example, advantage: Tensor | None = None) -> Tensor:
    """d loss / d logp (B, T)."""
    logp = batch.logp.clone().requires_grad_()
    loss = policy_loss(method, batch.rollouts, batch.current(logp), advantage=advantage)
    (found,) = torch.autograd.grad(loss.value, logp)
    return found


def _ratio_error(method: Method, batch: Example) -> float:
    expected = log_weights(method, batch, batch.logp)
    if expected is None:
        return math.nan  # verify/definitions.py has no loop for this transform yet
    masked = torch.where(batch.rollouts.mask, batch.logp, 0.0)
    return relative_error(method.ratio(masked, batch.rollouts).log_weight, expected)


def _advantage_error(method: Method, batch: Example) -> float:
    expected = by_definition(method.advantage, batch.rollouts)
    if expected is None:
        return math.nan  # verify/advantages.py has no definition of this one yet
    return relative_error(estimate_advantage(method, batch.rollouts), expected)


def _literal_error(method: Method, batch: Example) -> float:
    advantage = advantage_of(method, batch)
    logp = batch.logp.clone().requires_grad_()
    value = literal_loss(method, batch, logp, advantage)
    if value is None:
        return math.nan  # verify/losses.py has no loss for this composition yet
    (expected,) = torch.autograd.grad(value, logp)
    return relative_error(gradient(method, batch, advantage), expected)


def _on_policy_error(method: Method, batch: Example) -> float:
    """At the old policy every weight is 1 and every token is kept: weights A, written out."""
    rollouts = batch.rollouts
    assert rollouts.top_behaviour is not None
    still = batch.step._replace(learning_rate=0.0)
    batch = Example(rollouts, rollouts.logp_old, rollouts.top_behaviour, still)
    advantage = advantage_of(method, batch)
    plain = Method(method.name, method.advantage, ratio.one, trust.log_likelihood, method.aggregate)
    logp = batch.logp.clone().requires_grad_()
    value = literal_loss(plain, batch, logp, advantage)
    if value is None:
        return math.nan
    (expected,) = torch.autograd.grad(value, logp)
    return relative_error(gradient(method, batch, advantage), expected)


def _mask_error(method: Method, batch: Example) -> float:
    """NaN where the mask is False changes nothing."""
    advantage, hidden = advantage_of(method, batch), ~batch.rollouts.mask
    changes: dict[str, Any] = {
        name: getattr(batch.rollouts, name).masked_fill(hidden, math.nan)
        for name in ("logp_old", "logp_behaviour", "logp_reference")
    }
    poisoned = Example(
        dataclasses.replace(batch.rollouts, **changes),
        batch.logp.masked_fill(hidden, math.nan),
        batch.top_logp.masked_fill(hidden[..., None], math.nan),
        batch.step,
    )
    return relative_error(gradient(method, poisoned, advantage), gradient(method, batch, advantage))


# ---- limits: name of a method -> {what must hold: error in a place}

Limit = Callable[[Place], float]
Table = dict[str, dict[str, Limit]]

A = torch.tensor([1.0, -0.5, 0.25, -1.0, 2.0, -0.75] * 2, dtype=torch.float64)


def _same(ours: Method, other: Method, *, length: int = 9, own: bool = False) -> Limit:
    """Gradients of two methods on the same batches, with given advantages or (``own``) each its own."""

    def error(place: Place) -> float:
        errors = []
        for seed in SEEDS:
            batch = example(seed, length=length, place=place)
            given = None if own else place.put(A)[:, None].expand_as(batch.logp)
            errors.append(relative_error(gradient(ours, batch, given), gradient(other, batch, given)))
        return max(errors)

    return error


def _with(name: str, part: Method, **parts: Any) -> Method:
    """A method with parts taken from elsewhere."""
    return dataclasses.replace(part, name=name, **parts)


def _proportional(first: Method, second: Method) -> Limit:
    """Advantages equal up to one positive factor, groups of three."""

    def error(place: Place) -> float:
        errors = []
        for seed in SEEDS:
            batch = example(seed, place=place)
            a, b = advantage_of(first, batch), advantage_of(second, batch)
            factor = (a * b).sum() / (b * b).sum()
            errors.append(relative_error(a, factor * b) if factor > 0 else math.inf)
        return max(errors)

    return error


def _by_group(first: Method, second: Method) -> Limit:
    """Advantages that differ by the mean reward of the group alone, whatever the group."""

    def error(place: Place) -> float:
        errors = []
        for seed in SEEDS:
            batch = example(seed, place=place)
            reward, group = batch.rollouts.reward, batch.rollouts.group
            assert reward is not None and group is not None
            same = (group[:, None] == group).to(reward)
            mean = (same @ reward / same.sum(1))[:, None]
            errors.append(relative_error(advantage_of(first, batch) * mean, advantage_of(second, batch)))
        return max(errors)

    return error


def _last_token(method: Method, other: Method) -> Limit:
    """Log-weights of two methods at the last trained token of each row."""

    def error(place: Place) -> float:
        errors = []
        for seed in SEEDS:
            batch = example(seed, place=place)
            last = [int(row.nonzero()[-1]) for row in batch.rollouts.mask]
            logp = torch.where(batch.rollouts.mask, batch.logp, 0.0)
            pair = [m.ratio(logp, batch.rollouts).log_weight[range(len(last)), last] for m in (method, other)]
            errors.append(relative_error(*pair))
        return max(errors)

    return error


def _loop(method: Method) -> Limit:
    """Log-weights against the loop over tokens, for options that switch another branch on."""
    return lambda place: max(_ratio_error(method, example(seed, place=place)) for seed in SEEDS)


def _second_token(method: Method) -> Limit:
    """The log-weight of each row's second trained token against the sum of the first two log-ratios."""

    def error(place: Place) -> float:
        errors = []
        for seed in SEEDS:
            batch = example(seed, place=place)
            logp = torch.where(batch.rollouts.mask, batch.logp, 0.0)
            found = method.ratio(logp, batch.rollouts)
            pairs = [(i, row.nonzero().flatten()[:2]) for i, row in enumerate(batch.rollouts.mask)]
            pairs = [(i, pair) for i, pair in pairs if len(pair) == 2]
            ours = torch.stack([found.log_weight[i, pair[1]] for i, pair in pairs])
            errors.append(relative_error(ours, torch.stack([found.log_ratio[i, p].sum() for i, p in pairs])))
        return max(errors)

    return error


def _ours(name: str, **options: float) -> Method:
    """A method of our own table: the limits hold whatever name another package claims."""
    return METHODS.table[name](**options)


def _advantage_limits() -> Table:
    make = _ours
    return {
        "dapo": {
            "equals GRPO up to aggregation": _same(
                make("dapo", high=0.2), _with("grpo", make("grpo"), aggregate=aggregate.token_mean)
            )
        },
        "maxrl": {"advantage is Dr.GRPO's over the group's mean": _by_group(make("maxrl"), make("dr_grpo"))},
        "dr_grpo": {"advantage is RLOO's up to (G-1)/G": _proportional(make("dr_grpo"), make("rloo"))},
        "krpo_invariant": {
            "P0 -> inf is RLOO up to scale": _proportional(
                make("krpo_invariant", initial_variance=1e9), make("rloo")
            )
        },
        "k_grpo": {
            "first batch: the James-Stein baseline": _proportional(make("k_grpo"), make("james_stein"))
        },
        "spo": {
            "first batch: the baseline 1/2": _same(
                make("spo"),
                _with("half", make("spo"), advantage=ConstantBaseline(0.5)),
                own=True,
            )
        },
        "gpg": {"no degenerate group: Dr.GRPO's advantage": _proportional(make("gpg"), make("dr_grpo"))},
    }


def _ratio_limits() -> Table:
    make, inf = _ours, math.inf
    token = _with("token", make("cispo", high=inf), aggregate=aggregate.sequence_mean)
    band = {"low": 3e-4, "high": 4e-4}
    grpo_band, still = make("grpo", **band), make("kpo", process_noise=0.0)
    return {
        "kpo": {
            "Q = inf is GRPO with the same clip": _same(make("kpo", process_noise=inf), grpo_band),
            "Q = P0 = 0 is ratio 1 with the same clip": _same(still, make("ratio_one")),
        },
        "kpo_unclipped": {
            "Q = inf is the token ratio": _same(make("kpo_unclipped", process_noise=inf), token)
        },
        "kpo_diffuse": {
            "Q = 0 ends in GSPO's sequence ratio": _last_token(
                make("kpo_diffuse", process_noise=0.0), make("gspo")
            ),
            "Q = inf is GRPO with the same clip": _same(
                make("kpo_diffuse", process_noise=inf, **band), grpo_band
            ),
        },
        "kpo_auto": {
            "before it has learned: kpo_diffuse with its clip": _same(
                make("kpo_auto"), make("kpo_diffuse", low=0.05, high=0.05)
            ),
            "start values that move: a loop over tokens": _loop(make("kpo_auto", process_noise=0.3)),
        },
        "kpo_noise": {
            "scale = 0 is kpo_diffuse with R = floor": _same(
                make("kpo_noise", scale=0.0), make("kpo_diffuse", observation_noise=0.1)
            ),
            "Q = inf is GRPO with the same clip": _same(
                make("kpo_noise", process_noise=inf, **band), grpo_band
            ),
        },
        "kpo_robust": {
            "threshold = P0 = inf is kpo_diffuse": _same(
                make("kpo_robust", threshold=inf, initial_variance=inf), make("kpo_diffuse")
            ),
            "threshold = inf, P0 = 0 is KPO": _same(
                make("kpo_robust", threshold=inf, initial_variance=0.0, **band), make("kpo")
            ),
            "clipped innovations: a loop over tokens": _loop(
                make("kpo_robust", observation_noise=0.05, threshold=0.5)
            ),
        },
        "gspo_token": {"equals GSPO with one advantage per row": _same(make("gspo_token"), make("gspo"))},
        "luspo": {
            "every token at 1 is GSPO with a constant length": _same(
                make("luspo", **band),
                _with("gspo", make("gspo"), aggregate=aggregate.SequenceSum(1.0)),
            )
        },
        "pnpo": {
            "the prefix's geometric mean is kpo_diffuse at Q = 0": _same(
                _with("pnpo", make("pnpo"), trust=trust.unclipped),
                _with(
                    "kpo",
                    make("kpo_diffuse", process_noise=0.0),
                    trust=trust.unclipped,
                    aggregate=aggregate.token_mean,
                ),
            ),
            "ends in GSPO's sequence ratio": _last_token(make("pnpo"), make("gspo")),
        },
        "a3po": {
            "no clip: the truncated ratio to the behaviour policy": _same(
                make("a3po", low=inf, high=inf, cap=inf),
                _with("token", token, ratio=ratio.BehaviourToken(), aggregate=aggregate.token_mean),
            ),
        },
        "minpro": {"second token: the exact prefix ratio": _second_token(make("minpro"))},
        "minpro_clipped": {"second token: the exact prefix ratio": _second_token(make("minpro_clipped"))},
    }


def _trust_limits() -> Table:
    make, inf = _ours, math.inf
    token = make("cispo", high=inf)  # every token at its ratio, token mean
    table: Table = {
        "bapo": {
            "target = 0 is a PPO clip at [0.6, 1.2]": _same(
                make("bapo", target=0.0), make("dapo", low=0.4, high=0.2)
            )
        },
        "capo": {"no bounds: GRPO": _same(make("capo", objective=inf, policy=inf), make("grpo"))},
        "gmpo": {
            "no bounds: GSPO without clip": _same(
                make("gmpo", low=inf, high=inf), _with("gspo", make("gspo"), trust=trust.unclipped)
            )
        },
        "cispo": {
            "no cap: the token ratio": _same(token, _with("token", token, trust=trust.unclipped)),
        },
        "sapo": {
            "tau -> 0 is the token ratio": _same(
                make("sapo", positive=1e-9, negative=1e-9),
                _with("token", token, aggregate=aggregate.sequence_mean),
            )
        },
    }
    mu = _with("mu", token, ratio=ratio.BehaviourToken())
    table |= {
        "drpo": {
            "no bound: the ratio to the behaviour policy": _same(
                _with("drpo", make("drpo", bound=inf), aggregate=aggregate.token_mean), mu
            ),
        },
        "cfpo": {
            "no bound: the token ratio": _same(
                _with("cfpo", make("cfpo", bound=inf), aggregate=aggregate.token_mean), token
            )
        },
        "cppo": {"no bound: the ratio to the behaviour policy": _same(make("cppo", bound=inf), mu)},
        "m2po": {"no bound: the ratio to the behaviour policy": _same(make("m2po", bound=inf), mu)},
        "vaco": {
            "no threshold: the truncated ratio": _same(
                make("vaco", low=inf, high=inf), _with("cap", make("cispo", high=2.0), ratio=mu.ratio)
            )
        },
    }
    table["vespo"] = {
        "no power, decay -> 0: ratio 1": _same(
            make("vespo", positive_power=0.0, positive_decay=1e-12, negative_power=0.0, negative_decay=1e-12),
            _with("one", token, ratio=ratio.one, trust=trust.log_likelihood),
        )
    }
    for name in ("dppo_tv", "dppo_kl", "dppo_topk_tv", "dppo_topk_kl"):
        method = make(name, low=inf, high=inf)
        cap = _with("cap", make("cispo", high=1e4), aggregate=method.aggregate)
        table[name] = {"no threshold: the truncated ratio": _same(method, cap)}
    return table


@functools.cache
def _limits() -> Table:
    """Limits by method; made when they are asked for, so that a card is shown whatever other packages claim."""
    return _advantage_limits() | _ratio_limits() | _trust_limits()
