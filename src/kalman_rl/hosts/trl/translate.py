"""TRL's own loss settings as a Method, and what of them may stand beside a method that is named.

Where no method is named, :func:`translated` composes what TRL computes for the same settings, and
:func:`step_totals` counts as TRL does, so that swapping the class changes nothing. Where one is named,
:func:`check_settings` refuses a setting that contradicts the method.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Collection
from typing import Any

from torch import Tensor
from trl import GRPOConfig

from kalman_rl.errors import ConfigError, quote, unknown_name
from kalman_rl.methods import METHODS
from kalman_rl.objectives import advantage, aggregate, ratio, trust
from kalman_rl.objectives.aggregate import Totals
from kalman_rl.objectives.loss import Method

TRUST: dict[str, Any] = {"cispo": trust.Cap, "sapo": trust.SoftGate, "vespo": trust.Gamma}
"""Trust regions of TRL's loss types; all others clip."""

AGGREGATE: dict[str, Any] = {
    "grpo": aggregate.sequence_mean,
    "sapo": aggregate.sequence_mean,
    "bnpo": aggregate.token_mean,
    "dapo": aggregate.token_mean,
    "cispo": aggregate.token_mean,
    "vespo": aggregate.token_mean,
    "dr_grpo": aggregate.SequenceSum,
    "luspo": aggregate.SequenceSum,
}
"""TRL's loss types and how they make tokens one number; ``bnpo`` counts tokens by micro-batch."""

WHOLE_STEP = ("cispo", "dapo", "vespo")
"""Loss types whose denominator spans the optimizer step; the others take means of micro-batches."""

RATIO = {"token": ratio.token, "sequence": ratio.sequence_mean}
ADVANTAGE: dict[str, Any] = {
    "group": advantage.GroupZScore,
    "batch": advantage.BatchScaled,
    "none": advantage.group_centred,
}
OPTIONS = {
    "epsilon": "low",
    "epsilon_high": "high",
    "delta": "dual",
    "sapo_temperature_pos": "positive",
    "sapo_temperature_neg": "negative",
    "vespo_k_pos": "positive_power",
    "vespo_lambda_pos": "positive_decay",
    "vespo_k_neg": "negative_power",
    "vespo_lambda_neg": "negative_decay",
}
"""Numbers of TRL -> attributes of a trust region, and options of the methods that have it."""

CHOICES = ("loss_type", "importance_sampling_level", "scale_rewards", "multi_objective_aggregation")
DEFAULTS = {
    field.name: field.default
    for field in dataclasses.fields(GRPOConfig)
    if field.name in (*CHOICES, *OPTIONS)
}
"""TRL's defaults of all settings that a method decides."""


def translated(args: GRPOConfig) -> Method:
    """The method that TRL's settings stand for, named after ``loss_type``.

    Raises: ConfigError for a value that TRL does not know, or a combination without a composition here.
    """
    kind, level = args.loss_type, args.importance_sampling_level
    for name, value, known in (
        ("loss_type", kind, AGGREGATE),
        ("importance_sampling_level", level, RATIO),
        ("scale_rewards", args.scale_rewards, ADVANTAGE),
    ):
        if value not in known:
            raise unknown_name(name, str(value), known)
    if kind == "vespo" and args.use_vllm and args.vllm_importance_sampling_correction:
        raise ConfigError(
            "vllm_importance_sampling_correction: got True with loss_type='vespo', expected False because TRL's "
            "factor inside the sequence's weight is not composed here; set it to False and method='vespo' with "
            "method_options={'behaviour': True}, which takes the whole ratio to vLLM's policy"
        )
    make: Any = AGGREGATE[kind]
    if make is aggregate.SequenceSum:
        make = make(1.0 if kind == "luspo" else float(args.max_completion_length or 0))
    change = ratio.token if kind == "vespo" else RATIO[level]  # vespo sums the tokens' ratios itself
    return Method(kind, _advantage(args), change, _trust(args), make)


def _advantage(args: GRPOConfig) -> Callable[..., Tensor]:
    if args.multi_objective_aggregation == "normalize_then_sum":
        return advantage.NormalizeThenSum(tuple(map(float, args.reward_weights or ())))
    if args.multi_objective_aggregation != "sum_then_normalize":
        known = ("sum_then_normalize", "normalize_then_sum")
        raise unknown_name("multi_objective_aggregation", str(args.multi_objective_aggregation), known)
    part = ADVANTAGE[args.scale_rewards]
    made: Callable[..., Tensor] = part if part is advantage.group_centred else part(1e-4)
    return made


def _trust(args: GRPOConfig) -> trust.TrustRegion:
    low = args.epsilon
    high = args.epsilon_high if args.epsilon_high is not None else low
    if args.loss_type == "cispo":
        return trust.Cap(high)
    if args.loss_type in TRUST:
        prefix = f"{args.loss_type}_"
        numbers = {own: getattr(args, name) for name, own in OPTIONS.items() if name.startswith(prefix)}
        made: trust.TrustRegion = TRUST[args.loss_type](**numbers)
        return made
    if args.delta is None:
        return trust.Clip(low, high)
    if not args.delta > 1:
        raise ConfigError(
            f"delta: got {args.delta}, expected a bound > 1 of the ratio, or None to switch it off; the ratio "
            "of a policy that has not moved is 1"
        )
    # TRL caps the ratio before it clips: a delta inside the band lowers the band's end, too.
    return trust.Clip(low, min(high, args.delta - 1), max(args.delta, 1 + high))


def step_totals(loss_type: str, mask: Tensor, tokens: float, accumulation: int) -> Totals:
    """The counts that make a method's loss TRL's.

    Args:
        mask: (B, T) trained tokens of this micro-batch.
        tokens: trained tokens of the optimizer step, per rank, as TRL counts them.
        accumulation: micro-batches per optimizer step.

    Returns: rows of a micro-batch times ``accumulation``, rows without tokens among them; ``bnpo`` counts tokens alike.
    """
    if loss_type == "bnpo":
        tokens = max(float(mask.sum()), 1.0) * accumulation
    return Totals(tokens, float(len(mask) * accumulation))


def spreads(method: Method) -> bool:
    """Whether TRL has one loss per sequence, so that a token's factor acts on all tokens of its sequence."""
    return method.ratio is ratio.sequence_mean and not isinstance(method.trust, trust.Cap)


def check_settings(method: Method, args: GRPOConfig, given: Collection[str]) -> None:
    """Refuse settings that contradict the method.

    Args: given: the settings that the user wrote, names of :data:`DEFAULTS`.
    Raises: ConfigError that names the option to use instead.
    """
    for name in given:
        value = getattr(args, name)
        if not _agrees(name, value, method):
            raise ConfigError(
                f"{name}: got {quote(value)} beside method {quote(method.name)}, expected it unset because the method "
                f"decides this; {_advice(name, value, method)}"
            )


def _agrees(name: str, value: Any, method: Method) -> bool:
    if name == "importance_sampling_level":
        return method.ratio is RATIO.get(value)
    if name == "scale_rewards":
        return _is(method.advantage, ADVANTAGE.get(value))
    if name == "multi_objective_aggregation":
        return (value == "normalize_then_sum") == isinstance(method.advantage, advantage.NormalizeThenSum)
    if name == "loss_type":
        plain = method.ratio in RATIO.values()
        clips = _is(method.trust, TRUST.get(value, trust.Clip))
        by_length = value != "luspo" or method.aggregate == aggregate.SequenceSum(1.0)
        return plain and clips and by_length and _is(method.aggregate, AGGREGATE.get(value))
    prefix = name.partition("_")[0]
    wanted = TRUST.get(prefix, trust.Cap if method.name == "cispo" and name == "epsilon_high" else trust.Clip)
    return _is(method.trust, wanted) and getattr(method.trust, OPTIONS[name], None) == value


def _is(part: Any, kind: Any) -> bool:
    return kind is not None and (part is kind or type(part) is kind)


def _advice(name: str, value: Any, method: Method) -> str:
    build = METHODS.table.get(method.name)
    option = OPTIONS.get(name)
    if build is not None and option in inspect.signature(build).parameters:
        return f"set method_options={{{quote(option)}: {quote(value)}}}"
    if name == "loss_type" and value in METHODS.table:
        return f"set method={quote(value)}, or leave loss_type out"
    if name == "importance_sampling_level" and value == "sequence":
        return "set method='gspo', or leave it out"
    return "leave it out, or name no method and let TRL's settings decide"
