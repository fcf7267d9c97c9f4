"""TRL: ``KalmanGRPOTrainer(GRPOTrainer)`` runs any :class:`kalman_rl.objective.Method`.

Four overrides, all small: rewards are noted as they pass, advantages come from the method, the loss is
:func:`kalman_rl.objective.policy_loss`, and the first step checks that this loss really ran. Generation,
reference model, PEFT, accelerate, FSDP, DeepSpeed, vLLM, logging and checkpoints are TRL's.
"""

from __future__ import annotations

import dataclasses
import inspect
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import trl
from torch import Tensor
from trl import GRPOConfig, GRPOTrainer

from kalman_rl import diagnosis
from kalman_rl.aggregate import Totals
from kalman_rl.errors import AdapterError, ConfigError
from kalman_rl.methods import make_method
from kalman_rl.objective import Loss, Method, policy_loss
from kalman_rl.penalty import KL, k3
from kalman_rl.rollouts import Rollouts
from kalman_rl.trust import weight_of

logger = logging.getLogger(__name__)

TESTED_TRL = "1.16"
_HOOKS = {
    "_compute_loss": ("model", "inputs"),
    "_calculate_rewards": ("inputs", "prompts", "completions", "completion_ids_list"),
    "_generate_and_score_completions": ("inputs",),
    "_get_per_token_logps_and_entropies": ("model", "input_ids", "attention_mask", "logits_to_keep"),
}
# TRL settings that the method replaces. Changing one would be silently ignored, so it is refused.
_REPLACED = (
    "loss_type",
    "importance_sampling_level",
    "epsilon",
    "epsilon_high",
    "delta",
    "scale_rewards",
    "multi_objective_aggregation",
)
_FORWARD_KEYS = (
    "pixel_values",
    "image_grid_thw",
    "num_images",
    "pixel_attention_mask",
    "spatial_shapes",
    "num_tiles",
    "image_sizes",
    "token_type_ids",
    "mm_token_type_ids",
    "image_position_ids",
)


def check_host() -> None:
    """Raise AdapterError if the installed TRL has other hooks than the ones this adapter was tested on."""
    for name, expected in _HOOKS.items():
        hook = getattr(GRPOTrainer, name, None)
        found = tuple(inspect.signature(hook).parameters)[1:] if hook is not None else ()
        if found[: len(expected)] != expected:
            raise AdapterError(
                f"trl: got version {trl.__version__} with GRPOTrainer.{name}{found}, expected a hook "
                f"starting with {expected} as in {TESTED_TRL}.*; install trl=={TESTED_TRL}.*"
            )


check_host()


@dataclass
class KalmanGRPOConfig(GRPOConfig):
    """GRPOConfig with a method instead of ``loss_type``.

    Differs from GRPOConfig in one default: without ``steps_per_generation`` (and
    ``generation_batch_size``) it takes four optimizer steps per generation batch. TRL's default is exactly
    on-policy, where every log-ratio is 0 and every ratio method is the same method.
    """

    method: str = field(default="kpo_diffuse", metadata={"help": "Name in kalman_rl.METHODS."})
    method_options: dict[str, Any] = field(
        default_factory=dict,
        metadata={"help": 'Options of the method, for example {"process_noise": 1e-4}.'},
    )

    def __post_init__(self) -> None:
        if getattr(self, "steps_per_generation", None) is None and self.generation_batch_size is None:
            self.steps_per_generation = 4 * self.gradient_accumulation_steps
        super().__post_init__()


class TokenBatch(NamedTuple):
    """What an observer of the trainer sees after each micro-batch; everything detached."""

    step: int
    inputs: dict[str, Any]
    rollouts: Rollouts
    logp: Tensor
    loss: Loss


class KalmanGRPOTrainer(GRPOTrainer):
    """TRL's GRPOTrainer with the policy objective of this package.

    Args:
        method: a Method or a name of :data:`kalman_rl.methods.METHODS`; default: ``args.method`` with
            ``args.method_options``.
        observers: callables that receive a :class:`TokenBatch` after every training micro-batch.
        Everything else as in GRPOTrainer. ``args.beta > 0`` adds the k3 penalty as in TRL.

    Raises:
        ConfigError: a TRL setting that the method replaces was changed, or cannot be combined.
        AdapterError: TRL has other hooks than tested, or another library replaced the loss.
    """

    _tag_names = ["trl", "grpo", "kalman-rl"]
    _name = "Kalman-GRPO"
    _paper = {"title": "KPO", "id": "2602.10609"}

    def __init__(
        self,
        model: Any,
        reward_funcs: Any = None,
        args: GRPOConfig | None = None,
        *more: Any,
        method: Method | str | None = None,
        observers: Sequence[Callable[[TokenBatch], None]] = (),
        **kwargs: Any,
    ) -> None:
        args = args if args is not None else KalmanGRPOConfig("kalman-grpo")
        self.method = _resolve_method(method, args)
        self.observers = list(observers)
        self._own_loss_ran = False
        self._noop_steps = 0
        self._last_rewards: Tensor | None = None
        _check_combination(self.method, args)
        super().__init__(model, reward_funcs, args, *more, **kwargs)
        if self._entropy_bonus_enabled:
            raise ConfigError(
                f"entropy_coef: got {self.entropy_coef}, expected 0 because the entropy bonus is not part of "
                "a method yet; set entropy_coef=0 and adaptive entropy off"
            )
        cycle = self.args.steps_per_generation * self.num_iterations
        if self.args.gradient_accumulation_steps % cycle == 0 and not self.use_vllm:
            self._warn_noop(
                f"one optimizer step per generation batch (gradient_accumulation_steps="
                f"{self.args.gradient_accumulation_steps}, steps_per_generation * num_iterations={cycle})"
            )

    def _calculate_rewards(
        self, inputs: Any, prompts: Any, completions: Any, completion_ids_list: Any
    ) -> Tensor:
        rewards: Tensor = super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)
        weighted = (rewards * self.reward_weights.to(rewards.device)).nansum(dim=1)
        self._last_rewards = weighted.masked_fill(rewards.isnan().all(dim=1), torch.nan)
        return rewards

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        output: dict[str, Any] = super()._generate_and_score_completions(inputs)
        rewards: Any = self._last_rewards  # of all ranks, groups contiguous
        size = self.num_generations if self.model.training else self.num_generations_eval
        group = torch.arange(len(rewards), device=rewards.device) // size
        local = slice(
            self.accelerator.process_index * len(inputs), (self.accelerator.process_index + 1) * len(inputs)
        )
        output["advantages"] = self.method.advantage(rewards, group)[local]
        output["rewards"] = rewards[local]
        output["prompt"] = [row["prompt"] for row in inputs]
        output["prompt_id"] = [row.get("prompt_id") for row in inputs]
        filled = self._loss_mask(output).any(dim=1).sum()
        output["num_sequences_in_batch"] = self.accelerator.gather(filled).sum()
        return output

    def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> Tensor:
        self._own_loss_ran = True
        mode = "train" if self.model.training else "eval"
        mask = self._loss_mask(inputs)
        logp, entropy, aux_loss = self._get_per_token_logps_and_entropies(
            model,
            torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1),
            torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1),
            inputs["completion_ids"].size(1),
            compute_entropy=True,
            compute_aux_loss=self.aux_loss_enabled,
            **{key: inputs.get(key) for key in _FORWARD_KEYS},
        )
        rollouts = Rollouts(
            # TRL leaves the old log-probabilities out when the update is exactly on-policy.
            logp_old=inputs.get("old_per_token_logps", logp.detach()),
            mask=mask,
            reward=inputs["rewards"],
            logp_behaviour=inputs.get("sampling_per_token_logps"),
            logp_reference=inputs.get("ref_per_token_logps"),
            allow_empty=True,
        )
        advantage = self._scaled_advantage(inputs, logp, entropy, mask)
        loss = policy_loss(
            self.method, rollouts, logp, advantage=advantage, totals=self._totals(inputs, mode)
        )
        self._record(mode, loss, rollouts, entropy)
        if mode == "train":
            for observe in self.observers:
                observe(TokenBatch(self.state.global_step, inputs, rollouts, logp.detach(), loss))
        value = loss.value
        if self.aux_loss_enabled:
            share = self.current_gradient_accumulation_steps if mode == "train" else 1.0
            value = value + self.router_aux_loss_coef * aux_loss / share
        return value

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        output: Tensor = super().training_step(model, inputs, num_items_in_batch)
        if not self._own_loss_ran:
            raise AdapterError(
                f"KalmanGRPOTrainer._compute_loss: got bypassed in the first step, expected method "
                f"{self.method.name!r} to compute the loss; another library replaced TRL's compute_loss "
                "(Unsloth does): import it after this trainer is built, or do without it"
            )
        return output

    @staticmethod
    def _loss_mask(inputs: dict[str, Any]) -> Tensor:
        mask = inputs["completion_mask"]
        return (mask if "tool_mask" not in inputs else mask * inputs["tool_mask"]).bool()

    def _scaled_advantage(
        self, inputs: dict[str, Any], logp: Tensor, entropy: Tensor, mask: Tensor
    ) -> Tensor:
        """Advantages (B, T) times TRL's detached per-token factors; a factor >= 0 on A scales the gradient
        exactly as it would on the loss, and leaves the trust region's decision alone."""
        advantage = inputs["advantages"]
        advantage = (advantage if advantage.dim() == 2 else advantage[:, None]).expand_as(logp).float()
        if self.top_entropy_quantile < 1.0:
            advantage = advantage * self.get_high_entropy_mask(entropy, mask, 1 - self.top_entropy_quantile)
        if self.use_vllm and self.vllm_importance_sampling_correction:
            advantage = advantage * inputs["importance_sampling_ratio"]
        if self.off_policy_mask_threshold is not None:
            old = inputs.get("old_per_token_logps", logp.detach())
            advantage = advantage * self.get_off_policy_mask(
                advantages=advantage,
                per_token_logps=logp.detach(),
                sampling_per_token_logps=inputs.get("sampling_per_token_logps", old),
                mask=mask,
                off_policy_threshold=self.off_policy_mask_threshold,
            )
        return torch.where(mask, advantage, 0.0)

    def _totals(self, inputs: dict[str, Any], mode: str) -> Totals:
        """Counts of one optimizer step per rank. TRL counts over the generation batch, which spans
        ``steps_per_generation`` micro-batches; gradients are averaged over ranks, hence the division."""
        share = 1.0 / self.accelerator.num_processes
        if mode == "train":
            share *= self.current_gradient_accumulation_steps / self.args.steps_per_generation
        return Totals(
            float(inputs["num_items_in_batch"]) * share, float(inputs["num_sequences_in_batch"]) * share
        )

    def _record(self, mode: str, loss: Loss, rollouts: Rollouts, entropy: Tensor) -> None:
        metrics = loss.metrics | {"entropy": diagnosis.masked_mean(entropy, rollouts.mask)}
        if rollouts.logp_reference is not None:
            ratio = loss.tokens.log_ratio
            drift = rollouts.logp_reference - rollouts.logp_old - ratio
            weight = weight_of(ratio) if self.args.use_bias_correction_kl else 1.0
            metrics["kl"] = diagnosis.masked_mean(weight * k3(drift), rollouts.mask)
        values = torch.stack([value.detach().float() for value in metrics.values()])
        for name, value in zip(
            metrics, self.accelerator.reduce(values, reduction="mean").tolist(), strict=True
        ):
            self._metrics[mode][name].append(value)
        if mode == "train":
            cycle = self.args.steps_per_generation * self.num_iterations
            self._noop_steps = self._noop_steps + 1 if bool(metrics["ratio/noop"]) else 0
            if self._noop_steps == 2 * cycle:
                self._warn_noop(f"{self._noop_steps} micro-batches in a row")

    def _warn_noop(self, why: str) -> None:
        logger.warning(
            "log-ratio: got exactly 0 at every token (%s), so ratio, filter and clip of %r do nothing; take "
            "several optimizer steps per generation (steps_per_generation, num_iterations) if you want them",
            why,
            self.method.name,
        )


def _resolve_method(method: Method | str | None, args: GRPOConfig) -> Method:
    if isinstance(method, Method):
        resolved = method
    else:
        name = method if method is not None else getattr(args, "method", KalmanGRPOConfig.method)
        resolved = make_method(name, **getattr(args, "method_options", {}))
    if args.beta and resolved.penalty is None:
        resolved = dataclasses.replace(
            resolved, penalty=KL(args.beta, importance_weighted=args.use_bias_correction_kl)
        )
    return resolved


def _check_combination(method: Method, args: GRPOConfig) -> None:
    defaults = {f.name: f.default for f in dataclasses.fields(GRPOConfig)}
    for name in _REPLACED:
        value = getattr(args, name)
        if value != defaults[name]:
            raise ConfigError(
                f"{name}: got {value!r}, expected TRL's default {defaults[name]!r} because the method "
                f"{method.name!r} decides this; set it through method_options or a Method of your own"
            )
    if method.penalty is not None and not args.beta:
        raise ConfigError(
            f"beta: got {args.beta}, expected a value > 0 because method {method.name!r} has a penalty "
            "against a reference policy; TRL computes reference log-probabilities only with beta > 0"
        )
