"""NaN and infinity are found before the optimizer step, so that none reaches weights or moments.

Losses are looked at as they are logged, gradients once per optimizer step by their norm. All ranks see the same
reduced numbers and decide alike. With fp16, the gradient scaler itself skips steps whose scaled gradients overflow,
which is how it finds its scale: those are left to it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from kalman_rl.errors import ConfigError, NumericError, quote
from kalman_rl.hosts.trl.dropout import warn_of_dropout
from kalman_rl.hosts.trl.ranks import RanksTrainer, last_good_checkpoint
from kalman_rl.terminal import logger

CHOICES = ("stop", "skip")
TERMS = {"objective/surrogate": "loss", "objective/penalty": "penalty"}
MAX_SKIPPED = 10
"""Steps skipped in a row; a run that skips more learns nothing and is stopped."""


class FiniteTrainer(RanksTrainer):
    """A trainer that takes no optimizer step whose loss, penalty or gradient is not finite.

    ``args.nonfinite``: stop with a NumericError, or skip the step: the gradients are dropped, weights and moments
    stay as they are, and the metric ``step/skipped`` counts it. DeepSpeed keeps its gradients and steps inside the
    backward pass: there only the loss is looked at, after its step, and stopping is the only choice.
    """

    _bad_term: str | None = None
    _skipped_in_a_row = 0

    def __init__(self, model: Any, reward_funcs: Any, args: Any, *more: Any, **kwargs: Any) -> None:
        check_nonfinite(args)
        super().__init__(model, reward_funcs, args, *more, **kwargs)
        warn_of_dropout(self.model)

    @property
    def _skips(self) -> bool:
        return getattr(self.args, "nonfinite", "stop") == "skip"

    def notice_terms(self, metrics: Mapping[str, float]) -> None:
        """Remember a term of this step's loss that is not finite, from numbers that all ranks share."""
        for name, term in TERMS.items():
            if self._bad_term is None and not math.isfinite(metrics.get(name, 0.0)):
                self._bad_term = f"a {term} of {metrics[name]}"

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        output: Tensor = super().training_step(model, inputs, num_items_in_batch)
        if self.model.training and self.accelerator.sync_gradients:
            self._judge_step(model)
        return output

    def _judge_step(self, model: Any) -> None:
        bad, self._bad_term = self._bad_term or self._bad_gradient(model), None
        self._skipped_in_a_row = self._skipped_in_a_row + 1 if bad else 0
        if self._skips:
            self._metrics["train"]["step/skipped"].append(float(bad is not None))
        if bad is None:
            return
        step = self.state.global_step + 1
        if not self._skips or self._skipped_in_a_row > MAX_SKIPPED:
            raise NumericError(self._refusal(step, bad))
        logger.warning("step %d: got %s, expected finite numbers; the step is skipped", step, bad)
        model.zero_grad(set_to_none=True)

    def _bad_gradient(self, model: Any) -> str | None:
        """What is wrong with the gradient on any rank, or None."""
        if self.accelerator.scaler is not None:
            return None
        own = gradient_norm(model)
        total = own if self.accelerator.num_processes == 1 else self.accelerator.reduce(own, reduction="sum")
        if math.isfinite(total.item()):
            return None
        broken = (name for name, gradient in gradients(model) if not gradient.isfinite().all())
        names = [name.removeprefix("module.") for name in broken]  # DDP's, around the user's model
        if not names:
            return f"a gradient of norm {total.item()}"
        more = f" and of {len(names) - 1} more parameters" if len(names) > 1 else ""
        return f"a gradient with NaN or infinity of {names[0]}{more}"

    def _refusal(self, step: int, bad: str) -> str:
        good = last_good_checkpoint(self.args.output_dir)
        since = f"the last good checkpoint is {good}" if good else "no checkpoint was saved before"
        again = f" ({self._skipped_in_a_row} steps in a row)" if self._skips else ", or nonfinite='skip'"
        return (
            f"step {step}: got {bad}, expected finite numbers; the step was not taken and {since}; set a lower "
            f"learning_rate or max_grad_norm = 1{again}"
        )


def check_nonfinite(args: Any) -> None:
    """Refuse a choice that is unknown or cannot be kept. Raises: ConfigError."""
    choice = getattr(args, "nonfinite", "stop")
    if choice not in CHOICES:
        raise ConfigError(f"nonfinite: got {quote(choice)}, expected one of {', '.join(CHOICES)}")
    if choice == "skip" and args.deepspeed:
        raise ConfigError("nonfinite: got 'skip' with DeepSpeed, expected 'stop' because it steps by itself")


def gradients(model: Any) -> Iterator[tuple[str, Tensor]]:
    """Names and gradients of the parameters that have one; of a sharded one, this rank's part."""
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            gradient = parameter.grad
            yield name, gradient.to_local() if hasattr(gradient, "to_local") else gradient


def gradient_norm(model: Any) -> Tensor:
    """L2 norm () of this rank's gradients: NaN or infinite if one of them is, or if their squares overflow."""
    parts = [gradient.detach() for _, gradient in gradients(model)]
    norm: Tensor = torch.nn.utils.get_total_norm(parts)
    return norm.float()
