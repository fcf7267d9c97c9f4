"""TRL: ``KalmanGRPOTrainer(GRPOTrainer)`` runs any :class:`kalman_rl.objectives.Method`.

A few small overrides: rewards are noted as they pass, advantages come from the method, the loss is
:func:`kalman_rl.objectives.policy_loss`, a step's end is where a method learns, and the first step checks that
this loss really ran. Inputs that a method needs beyond TRL's are made here or in ``forward``. Generation,
reference model, PEFT, accelerate, FSDP, DeepSpeed, vLLM, logging and checkpoints are TRL's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from trl import GRPOConfig

from kalman_rl.beliefs.advantage import Tracked
from kalman_rl.errors import AdapterError, quote
from kalman_rl.hosts.lengths import notes_on_length
from kalman_rl.hosts.state import load_state, save_state
from kalman_rl.hosts.trl.bounds import step_method
from kalman_rl.hosts.trl.candidates import candidates_of
from kalman_rl.hosts.trl.config import (
    KalmanGRPOConfig,
    check_combination,
    names_a_method,
    resolve_method,
)
from kalman_rl.hosts.trl.dealing import spread_fillers
from kalman_rl.hosts.trl.entropy import entropy_bonus
from kalman_rl.hosts.trl.factors import scaled_advantage
from kalman_rl.hosts.trl.finite import FiniteTrainer
from kalman_rl.hosts.trl.forward import PASSED_ON, current_policy, next_tokens_of
from kalman_rl.hosts.trl.generation import make_tracking, note_advantages, tracked_generation
from kalman_rl.hosts.trl.missing import MissingRewards, check_finite, judge
from kalman_rl.hosts.trl.prompts import check_names, check_prompts
from kalman_rl.hosts.trl.retention import keep_newest
from kalman_rl.hosts.trl.sampling import check_own_sampling, check_sampling
from kalman_rl.hosts.trl.sinks import guard
from kalman_rl.hosts.trl.stream import NamedRows, look_ahead
from kalman_rl.hosts.trl.supervise import supervised, watched
from kalman_rl.hosts.trl.tally import Tally, sums_behind
from kalman_rl.hosts.trl.translate import DEFAULTS, step_totals
from kalman_rl.objectives.aggregate import Totals
from kalman_rl.objectives.inputs import inputs_of
from kalman_rl.objectives.learning import LearnedState
from kalman_rl.objectives.loss import Loss, Method, policy_loss
from kalman_rl.objectives.penalty import KL
from kalman_rl.objectives.rollouts import Rollouts, score_norm_squared
from kalman_rl.objectives.trust.few import FewKept
from kalman_rl.sampling.tracking import Tracking
from kalman_rl.terminal import logger


class TokenBatch(NamedTuple):
    """What an observer of the trainer sees after each micro-batch; everything detached."""

    step: int
    inputs: dict[str, Any]
    rollouts: Rollouts
    logp: Tensor
    loss: Loss


class KalmanGRPOTrainer(FiniteTrainer):
    """TRL's GRPOTrainer with the policy objective of this package.

    Args:
        method: a Method or a name of :data:`kalman_rl.methods.METHODS`; default: ``args.method`` with
            ``args.method_options``, and without one what TRL's settings of the loss stand for.
        observers: callables that receive a :class:`TokenBatch` after every training micro-batch, as does the
            method ``observe`` of a callback that has one. ``step_metrics`` of a callback receives the metrics of
            each optimizer step over all ranks, before the step.
        Everything else as in GRPOTrainer. ``args.beta > 0`` adds the k3 penalty as in TRL.

    Raises:
        ConfigError: a TRL setting contradicts the method that was named, or cannot be combined.
        RewardError: several generation batches in a row had no reward at all, or too many calls of supervised rewards
            failed; the step that was reached is saved.
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
        self.method = resolve_method(method, args)
        self.observers = list(observers)
        self.tracking: Tracking | None = None
        if isinstance(self.method.advantage, Tracked):
            self.tracking = make_tracking(self.method.advantage, args)
        self.prompt_features = getattr(args, "prompt_features", False)
        self.learning = LearnedState(self.method, self._sum_over_ranks)
        self._step_method = self.method
        self._own_loss_ran = False
        self._noop_steps = 0
        self._last_rewards: Tensor | None = None
        self.missing = MissingRewards()
        self.few_kept = FewKept(self.method.name, self.method.trust)
        named = names_a_method(method, args)
        self.as_trl = not named and self.tracking is None
        check_combination(self.method, args, named=named)
        check_sampling(self.method, args, named=not self.as_trl)
        self.prompt_pool: NamedRows | None = None
        if self.tracking is not None:
            dataset = more[0] if more else kwargs.get("train_dataset")
            self.prompt_pool = look_ahead(self.tracking, dataset, args)
        super().__init__(model, supervised(reward_funcs, args), args, *more, **kwargs)
        guard(self.callback_handler)
        self.supervised = watched(self)
        self.failed_calls = 0
        own = self.accelerator.unwrap_model(self.model)
        check_own_sampling(self.method, args, own, named=not self.as_trl)
        for text in notes_on_length(self.method, args.max_completion_length):
            logger.warning("%s", text)
        if self.environment_factories is None:
            check_prompts(getattr(self.train_dataset, "column_names", None))
        if self.tracking is not None:
            check_names(self.train_dataset)
            self.candidates = candidates_of(self)
        self.tally = {mode: Tally(self.accelerator.gather) for mode in ("train", "eval")}
        for name in ("scale_rewards", "multi_objective_aggregation"):  # TRL's metrics read them
            setattr(self, name, getattr(self, name) or DEFAULTS[name])
        cycle = self.args.steps_per_generation * self.num_iterations
        if self.args.gradient_accumulation_steps % cycle == 0 and not self.use_vllm and not self.as_trl:
            self._warn_noop(
                f"one optimizer step per generation batch (gradient_accumulation_steps="
                f"{self.args.gradient_accumulation_steps}, steps_per_generation * num_iterations={cycle})"
            )

    def _calculate_rewards(
        self, inputs: Any, prompts: Any, completions: Any, completion_ids_list: Any
    ) -> Tensor:
        before = sum(function.failed for function in self.supervised)
        rewards: Tensor = super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)
        self.failed_calls += sum(function.failed for function in self.supervised) - before
        check_finite(rewards, self.reward_func_names)
        weighted = (rewards * self.reward_weights.to(rewards.device)).nansum(dim=1)
        self._last_rewards = weighted.masked_fill(rewards.isnan().all(dim=1), torch.nan)
        self._rewards_by_function = rewards
        return rewards

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        columns: Any = self._signature_columns  # type: ignore[has-type]
        if self.tracking is not None and "prompt_id" not in columns:
            self._signature_columns = [*columns, "prompt_id"]

    def _prepare_inputs(self, generation_batch: Any) -> dict[str, Any]:
        before = self._buffered_inputs
        inputs: dict[str, Any] = super()._prepare_inputs(generation_batch)
        if self.tracking is None or self._buffered_inputs is before:
            return inputs
        spread_fillers(self)
        return self._buffered_inputs[self._step % self.args.steps_per_generation]

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        if self.environment_factories is None:
            check_prompts(inputs[0])
        self.failed_calls = 0
        if self.tracking is not None and self.model.training:
            generate = super()._generate_and_score_completions
            output = tracked_generation(self, self.tracking, inputs, generate)
            self._method_inputs(output)
            return self._counted(output)
        output = super()._generate_and_score_completions(inputs)
        rewards: Any = self._last_rewards  # of all ranks, groups contiguous
        if self.model.training:
            judge(self, rewards)
        size = self.num_generations if self.model.training else self.num_generations_eval
        if size == 1:
            self._metrics["train" if self.model.training else "eval"].pop("frac_reward_zero_std", None)
        group = torch.arange(len(rewards), device=rewards.device) // size
        local = slice(
            self.accelerator.process_index * len(inputs), (self.accelerator.process_index + 1) * len(inputs)
        )
        extra = self._method_inputs(output)
        output["advantages"] = self.method.advantage(rewards, group, **extra)[local]
        mask, advantage = self._loss_mask(output), output["advantages"]
        if advantage.dim() == 2:
            advantage = torch.where(mask, advantage, 0.0).sum(1) / mask.sum(1).clamp(min=1)
        note_advantages(self, self.accelerator.gather(advantage).tolist())
        output["rewards"] = rewards[local]
        if "lag" in self.method.inputs:
            output["sampled_at"] = torch.full_like(output["rewards"], self.state.global_step)
        output["prompt"] = [row.get("prompt") for row in inputs]  # an environment may bring it later
        output["prompt_id"] = [row.get("prompt_id") for row in inputs]
        return self._counted(output)

    def _counted(self, output: dict[str, Any]) -> dict[str, Any]:
        filled = self._loss_mask(output).any(dim=1).sum()
        return output | {"num_sequences_in_batch": self.accelerator.gather(filled).sum()}

    def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> Tensor:
        self._own_loss_ran = True
        mode = "train" if self.model.training else "eval"
        mask = self._loss_mask(inputs)
        logp, entropy, aux_loss = self._score(model, inputs)
        rollouts = self._rollouts(inputs, logp)
        advantage = scaled_advantage(self, inputs, logp, entropy, mask)
        current = current_policy(self, model, inputs, logp, advantage)
        method = step_method(self, model, inputs, rollouts, current, advantage)
        loss = policy_loss(method, rollouts, current, advantage=advantage, totals=self._totals(inputs, mode))
        share = self.current_gradient_accumulation_steps if mode == "train" else 1
        kl = None
        if rollouts.logp_reference is not None:
            level: Any = getattr(self.method.penalty, "level", "token")
            estimate = KL(1.0, importance_weighted=self.args.use_bias_correction_kl, level=level)
            kl = estimate(logp.detach().float(), rollouts)
        more, asked = {"entropy": entropy, "kl": kl}, inputs["advantages"]
        self._record(mode, loss, sums_behind(method, loss, asked, rollouts, share, more, aux_loss))
        if mode == "train":
            self.learning.observe(logp, rollouts)
            watching = (call.observe for call in self.callback_handler.callbacks if hasattr(call, "observe"))
            for observe in (*self.observers, *watching):
                observe(TokenBatch(self.state.global_step, inputs, rollouts, logp.detach(), loss))
        value = loss.value
        if self._entropy_bonus_enabled:
            value = value + entropy_bonus(self, entropy, mask, mode, loss.value)
        if aux_loss is not None:
            value = value + self.router_aux_loss_coef * aux_loss / share
        return value

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        # transformers deletes by modification time, and before our part is written.
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self.args.save_total_limit = limit
        if self.accelerator.is_main_process and self.args.should_save:
            folder = Path(self._get_output_dir(trial=trial)) / f"checkpoint-{self.state.global_step}"
            state = {"method": self.method.name, "learning": self.learning.state_dict()}
            if self.tracking is not None:
                state["tracking"] = self.tracking.state_dict()
            save_state(folder, state)
            keep_newest(folder, limit, best=self.state.best_model_checkpoint)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        state = load_state(checkpoint) if checkpoint is not None else None
        if state is not None:
            self.learning.load_state_dict(state["learning"])
        if checkpoint is not None and self.tracking is not None:
            self.tracking.load_state_dict((state or {}).get("tracking"))

    def _score(self, model: Any, inputs: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor | None]:
        """Log-probabilities (B, T), entropies (B, T), auxiliary loss of the completions under the model."""
        scores: tuple[Tensor, Tensor, Tensor | None] = self._get_per_token_logps_and_entropies(
            model,
            torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1),
            torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1),
            inputs["completion_ids"].size(1),
            compute_entropy=True,
            compute_aux_loss=self.aux_loss_enabled,
            **{key: inputs.get(key) for key in PASSED_ON},
        )
        return scores

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        output: Tensor = super().training_step(model, inputs, num_items_in_batch)
        if self._step % self.current_gradient_accumulation_steps == 0:
            self.learning.end_step()
        if not self._own_loss_ran:
            raise AdapterError(
                f"KalmanGRPOTrainer._compute_loss: got bypassed in the first step, expected method "
                f"{quote(self.method.name)} to compute the loss; another library replaced TRL's compute_loss "
                "(Unsloth does): import it after this trainer is built, or do without it"
            )
        return output

    def _sum_over_ranks(self, values: Tensor) -> Tensor:
        total: Tensor = self.accelerator.reduce(values.to(self.accelerator.device), reduction="sum")
        return total.to(values.device)

    def _rollouts(self, inputs: dict[str, Any], logp: Tensor) -> Rollouts:
        # TRL leaves the old log-probabilities out when the update is exactly on-policy.
        old = inputs.get("old_per_token_logps", logp.detach())
        logp_behaviour = inputs.get("sampling_per_token_logps")
        if logp_behaviour is None and "logp_behaviour" in self.method.inputs:
            logp_behaviour = old  # transformers samples from the very model that is trained
        sampled_at = inputs.get("sampled_at")
        lag = None if sampled_at is None else self.state.global_step - sampled_at
        return Rollouts(
            logp_old=old,
            mask=self._loss_mask(inputs),
            lag=None if lag is None else lag[:, None].expand_as(old),
            reward=inputs["rewards"],
            logp_behaviour=logp_behaviour,
            logp_reference=inputs.get("ref_per_token_logps"),
            top_behaviour=inputs.get("top_behaviour"),
            allow_empty=True,
        )

    def _method_inputs(self, output: dict[str, Any]) -> dict[str, Tensor]:
        """What the advantage asks for, of all ranks; notes the behaviour policy's distributions for the loss."""
        asked, mask = self.method.inputs, self._loss_mask(output)
        found: dict[str, Tensor] = {"mask": mask, "length": mask.sum(dim=1)}
        if {"top_behaviour", "score_norm_squared"} & set(asked):
            now = next_tokens_of(self, self.model, output)
            if "top_behaviour" in asked:
                output["top_ids"], output["top_behaviour"] = now.top_ids, now.top_logp
            found["score_norm_squared"] = torch.where(
                mask, score_norm_squared(now.logp, now.sum_pi_squared), 0.0
            )
        padded = {name: found[name] for name in inputs_of(self.method.advantage) if name != "rewards"}
        for name, value in padded.items():
            if value.dim() == 2:
                value = self.accelerator.pad_across_processes(value, dim=1)
            padded[name] = self.accelerator.gather(value)
        if "rewards" in asked:
            padded["rewards"] = self._rewards_by_function  # TRL gathered them
        return padded

    @staticmethod
    def _loss_mask(inputs: dict[str, Any]) -> Tensor:
        mask = inputs["completion_mask"]
        return (mask if "tool_mask" not in inputs else mask * inputs["tool_mask"]).bool()

    def _totals(self, inputs: dict[str, Any], mode: str) -> Totals:
        """Counts of one optimizer step per rank. TRL counts over the generation batch, which spans
        ``steps_per_generation`` micro-batches; gradients are averaged over ranks, hence the division."""
        share = 1.0 / self.accelerator.num_processes
        accumulation = self.current_gradient_accumulation_steps if mode == "train" else 1
        if mode == "train":
            share *= accumulation / self.args.steps_per_generation
        tokens = float(inputs["num_items_in_batch"]) * share
        if self.as_trl:
            return step_totals(self.args.loss_type, self._loss_mask(inputs), tokens, accumulation)
        return Totals(tokens, float(inputs["num_sequences_in_batch"]) * share)

    def _record(self, mode: str, loss: Loss, sums: dict[str, Tensor]) -> None:
        """Note the sums behind the metrics of one micro-batch."""
        self.tally[mode].add(sums)
        if mode == "eval":
            self.tally[mode].share()
            return
        if self.accelerator.sync_gradients:  # the step's last micro-batch
            metrics = self.tally[mode].share()
            self.notice_terms(metrics)
            for call in self.callback_handler.callbacks:
                getattr(call, "step_metrics", lambda metrics: None)(metrics)
            if not self.as_trl and (hint := self.few_kept.see(metrics)):
                logger.warning("%s", hint)
        cycle = self.args.steps_per_generation * self.num_iterations
        self._noop_steps = self._noop_steps + 1 if bool(loss.metrics["ratio/noop"]) else 0
        if self._noop_steps == 2 * cycle and not self.as_trl:
            self._warn_noop(f"{self._noop_steps} micro-batches in a row")

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """TRL's, with the loss's metrics divided once over all tokens since the last line."""
        mode = "train" if self.model.training else "eval"
        self._metrics[mode].update({name: [value] for name, value in self.tally[mode].end().items()})
        super().log(logs, start_time)

    def _warn_noop(self, why: str) -> None:
        logger.warning(
            "log-ratio: got exactly 0 at every token (%s), so ratio, filter and clip of %r do nothing; take "
            "several optimizer steps per generation (steps_per_generation, num_iterations) if you want them",
            why,
            self.method.name,
        )
