"""The private methods of TRL's GRPOTrainer that our trainer overrides or calls, and how they looked when tested.

Apart from the adapter, so that ``kalman-rl doctor`` can name the one that moved where the adapter refuses to load.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any, NamedTuple

TESTED_TRL = "1.16"


class Hook(NamedTuple):
    """Leading parameters after self, in order, and names that must be accepted anywhere."""

    leading: tuple[str, ...]
    names: tuple[str, ...] = ()


HOOKS: Mapping[str, Hook] = {
    "__init__": Hook(("model", "reward_funcs", "args"), ("train_dataset", "processing_class", "callbacks")),
    "training_step": Hook(("model", "inputs", "num_items_in_batch")),
    "_compute_loss": Hook(("model", "inputs")),
    "_calculate_rewards": Hook(("inputs", "prompts", "completions", "completion_ids_list")),
    "_generate_and_score_completions": Hook(("inputs",)),
    "_save_checkpoint": Hook(("model", "trial")),
    "_load_optimizer_and_scheduler": Hook(("checkpoint",)),
    "_get_per_token_logps_and_entropies": Hook(
        ("model", "input_ids", "attention_mask", "logits_to_keep"), ("compute_entropy", "compute_aux_loss")
    ),
    "_tokenize_prompts": Hook(("prompts",)),
    "_get_output_dir": Hook(("trial",)),
    "get_high_entropy_mask": Hook(("entropies", "mask", "threshold")),
    "get_off_policy_mask": Hook(
        (),
        ("advantages", "per_token_logps", "sampling_per_token_logps", "mask", "off_policy_threshold"),
    ),
}


def moved(trainer: type) -> list[str]:
    """One sentence for every hook of ``trainer`` that is missing or has other parameters.

    >>> class Trainer:
    ...     def _compute_loss(self, batch): ...
    >>> moved(Trainer)[2]
    'Trainer._compute_loss: got (batch), expected (model, inputs, ...)'
    """
    texts = []
    for name, hook in HOOKS.items():
        static = inspect.getattr_static(trainer, name, None)
        expected = ", ".join((*hook.leading, *hook.names, "..."))
        if static is None:
            texts.append(f"{trainer.__name__}.{name}: got no such method, expected ({expected})")
        elif not _fits(found := _parameters(trainer, name, static), hook):
            texts.append(f"{trainer.__name__}.{name}: got ({', '.join(found)}), expected ({expected})")
    return texts


def _parameters(trainer: type, name: str, static: Any) -> dict[str, inspect.Parameter]:
    try:
        parameters = dict(inspect.signature(getattr(trainer, name)).parameters)
    except (TypeError, ValueError):
        return {}
    if not isinstance(static, (staticmethod, classmethod)):
        parameters.pop(next(iter(parameters), ""), None)  # self
    return parameters


def _fits(found: Mapping[str, inspect.Parameter], hook: Hook) -> bool:
    if tuple(found)[: len(hook.leading)] != hook.leading:
        return False
    anything = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in found.values())
    return anything or set(hook.names) <= set(found)
