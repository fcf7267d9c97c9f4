"""What every method, and every trust region, promises to the trainers."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from kalman_rl.instruments.contract.promise import Promise, tried
from kalman_rl.instruments.verify.example import Example, example
from kalman_rl.methods import make_method
from kalman_rl.objectives.aggregate import totals_of
from kalman_rl.objectives.loss import Loss, Method, estimate_advantage, policy_loss
from kalman_rl.objectives.rollouts import LastLayerStep, Rollouts

TOLERANCE = 1e-9
FAR = 40.0  # nats between the old policy and the new one
TOKENS = ("logp_old", "logp_behaviour", "logp_reference", "top_behaviour", "sum_pi_squared", "lag")
ROWS = ("mask", "reward", "group", *TOKENS)


def promises(method: Method) -> Iterator[Promise]:
    """Each promise on random float64 batches of twelve ragged rows with holes."""
    batch = example(0)
    first = tried("a batch gives a loss", lambda: _shapes(method, batch))
    yield first
    if not first.kept:
        return
    yield tried("gradients are finite, also far from the old policy", lambda: _finite(method))
    yield tried("what stands outside the mask is not read", lambda: _padding(method, batch))
    yield tried("the order of rows changes nothing", lambda: _order(method, batch))
    yield tried("the numbers of groups are names only", lambda: _names(method, batch))
    yield tried("the same batch gives the same gradient", lambda: _again(method, batch))
    yield tried("what it is given stays as it was", lambda: _untouched(method, batch))
    if not method.learns:
        yield tried("parts of a batch add up to the whole", lambda: _parts(method, batch))


def trust_promises(trust: Callable[..., Any]) -> Iterator[Promise]:
    """Those of a trust region, in the place of GRPO's clip."""
    method = dataclasses.replace(make_method("grpo"), name="contract", trust=trust)
    first = tried("it returns keep, weight and surrogate, (B, T) each", lambda: _trust_shapes(method))
    yield first
    if first.kept:
        yield from promises(method)


def _loss(method: Method, batch: Example, **changes: Any) -> tuple[Loss, Tensor]:
    logp = batch.logp.clone().requires_grad_()
    advantage = estimate_advantage(method, batch.rollouts)
    loss = policy_loss(method, batch.rollouts, batch.current(logp), **({"advantage": advantage} | changes))
    (gradient,) = torch.autograd.grad(loss.value, logp)
    return loss, gradient


def _shapes(method: Method, batch: Example) -> str:
    shape = batch.logp.shape
    advantage = estimate_advantage(method, batch.rollouts)
    if advantage.shape not in (shape[:1], shape):
        return f"advantage of shape {tuple(advantage.shape)}, expected {(shape[0],)} or {tuple(shape)}"
    loss, _ = _loss(method, batch)
    if loss.value.shape != ():
        return f"a loss of shape {tuple(loss.value.shape)}, expected one number"
    wrong = {
        name: tuple(value.shape)
        for name, value in loss.tokens._asdict().items()
        if value is not None and value.shape != shape
    }
    return f"shapes {wrong}, expected {tuple(shape)}" if wrong else ""


def _finite(method: Method) -> str:
    """The policy, then the old one, gives some tokens a probability of ``exp(-FAR)``."""
    batch = example(1)
    down = FAR * batch.logp.cos().abs()

    def lower(value: Tensor) -> Tensor:
        return torch.cat(((value[..., 0] - down)[..., None], value[..., 1:]), -1)

    old = batch.rollouts
    assert old.logp_behaviour is not None and old.top_behaviour is not None
    lowered: dict[str, Any] = {name: getattr(old, name) - down for name in ("logp_old", "logp_behaviour")}
    lowered["top_behaviour"] = lower(old.top_behaviour)
    cases = {
        "below": batch._replace(logp=batch.logp - down, top_logp=lower(batch.top_logp)),
        "above": batch._replace(rollouts=dataclasses.replace(old, **lowered)),
    }
    for side, case in cases.items():
        loss, gradient = _loss(method, case)
        if not (loss.value.isfinite() and gradient.isfinite().all()):
            found = f"loss {loss.value.item()}, gradient up to {gradient.abs().max().item()}"
            return f"{found} with the policy up to {FAR:g} nats {side} the old one"
    return ""


def _padding(method: Method, batch: Example) -> str:
    """Poison under the mask, and three more columns of it."""

    def poisoned(value: Tensor) -> Tensor:
        hidden = ~batch.rollouts.mask
        value = value.masked_fill(hidden if value.dim() == 2 else hidden[..., None], math.nan)
        columns = torch.full((len(value), 3, *value.shape[2:]), math.nan, dtype=value.dtype)
        return torch.cat((columns[:, :2], value, columns[:, 2:]), 1)

    mask = torch.nn.functional.pad(batch.rollouts.mask, (2, 1))
    fields: dict[str, Any] = {name: poisoned(getattr(batch.rollouts, name)) for name in TOKENS}
    along, curvature = (
        poisoned(value).nan_to_num() for value in (batch.step.alignment, batch.step.curvature)
    )
    step = LastLayerStep(along, curvature, batch.step.learning_rate)
    wider = Example(
        dataclasses.replace(batch.rollouts, mask=mask, **fields),
        poisoned(batch.logp),
        poisoned(batch.top_logp),
        step,
    )
    return _apart(_loss(method, wider)[1][:, 2:-1], _loss(method, batch)[1])


def _picked(batch: Example, rows: Tensor) -> Example:
    fields = {name: getattr(batch.rollouts, name)[rows] for name in ROWS}
    ids = batch.rollouts.prompt_id
    names = None if ids is None else [ids[row] for row in rows.tolist()]
    step = LastLayerStep(batch.step.alignment[rows], batch.step.curvature[rows], batch.step.learning_rate)
    return Example(Rollouts(**fields, prompt_id=names), batch.logp[rows], batch.top_logp[rows], step)


def _order(method: Method, batch: Example) -> str:
    rows = torch.randperm(len(batch.logp), generator=torch.Generator().manual_seed(0))
    return _apart(_loss(method, _picked(batch, rows))[1], _loss(method, batch)[1][rows])


def _names(method: Method, batch: Example) -> str:
    assert batch.rollouts.group is not None
    renamed = dataclasses.replace(batch.rollouts, group=1000 - 7 * batch.rollouts.group)
    return _apart(_loss(method, batch._replace(rollouts=renamed))[1], _loss(method, batch)[1])


def _again(method: Method, batch: Example) -> str:
    first, second = (_loss(method, batch)[1] for _ in range(2))
    return "" if torch.equal(first, second) else f"gradients {_far(first, second):.3g} apart"


def _untouched(method: Method, batch: Example) -> str:
    before = {name: getattr(batch.rollouts, name).clone() for name in ROWS}
    logp = batch.logp.clone()
    _loss(method, batch)
    changed = [
        name for name, value in before.items() if not torch.equal(getattr(batch.rollouts, name), value)
    ]
    changed += [] if torch.equal(batch.logp, logp) else ["logp"]
    return f"{', '.join(changed)} changed" if changed else ""


def _parts(method: Method, batch: Example) -> str:
    """As in gradient accumulation: advantages of the whole, counts of the whole, the rows in two parts."""
    totals = totals_of(batch.rollouts)
    advantage = estimate_advantage(method, batch.rollouts)
    whole = _loss(method, batch)[1]
    rows = torch.arange(len(batch.logp))
    halves = [
        _loss(method, _picked(batch, part), advantage=advantage[part], totals=totals)[1]
        for part in (rows[:5], rows[5:])
    ]
    return _apart(torch.cat(halves), whole)


def _trust_shapes(method: Method) -> str:
    batch = example(0)
    logp, shape = batch.logp.detach(), batch.logp.shape
    ratio = method.ratio(torch.where(batch.rollouts.mask, logp, 0.0), batch.rollouts)
    advantage = estimate_advantage(method, batch.rollouts)[:, None].expand(shape)
    found = method.trust(ratio, advantage, batch.current(logp), batch.rollouts)
    wrong = {
        name: tuple(getattr(found, name).shape)
        for name in ("keep", "weight", "surrogate")
        if getattr(found, name).shape != shape
    }
    if wrong:
        return f"shapes {wrong}, expected {tuple(shape)}"
    if found.keep.dtype != torch.bool:
        return f"keep of type {found.keep.dtype}, expected torch.bool"
    lowest = found.weight[batch.rollouts.mask].min().item()
    return "" if lowest >= 0 else f"a weight of {lowest:.3g}, expected 0 or more: the advantage has the sign"


def _apart(found: Tensor, expected: Tensor) -> str:
    far = _far(found, expected)
    return "" if far <= TOLERANCE else f"the gradient moved by {far:.3g} of its largest entry"


def _far(found: Tensor, expected: Tensor) -> float:
    scale = max(expected.abs().max().item(), 1e-30)
    return ((found - expected).abs().max() / scale).item()
