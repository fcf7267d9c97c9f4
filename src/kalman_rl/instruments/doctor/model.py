"""The model of the planned run, looked at without its weights: template, prompts that fit, dropout, layers for LoRA."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from kalman_rl.errors import AdapterError, ConfigError, quote
from kalman_rl.instruments.doctor.finding import Finding, PlannedRun, explain


def model(plan: PlannedRun) -> Iterator[Finding]:
    """What ``kalman-rl train`` would refuse or change of the model that the settings name."""
    settings = plan.settings
    if settings is None:
        yield from default_model(plan)
        return
    from kalman_rl.engine.early import check_lora_targets, fit_prompts
    from kalman_rl.engine.models.load import EMBEDDED, check_available
    from kalman_rl.engine.models.tiny import check_template
    from kalman_rl.engine.tasks.chat import put_to_model
    from kalman_rl.engine.train import chosen_task

    if settings.model in EMBEDDED:
        try:
            check_available(settings.model, (settings.run.parent if settings.run else plan.run) / ".cache")
        except AdapterError as error:
            yield Finding("model", "problem", str(error))
            return
        yield Finding("model", "ok", f"{settings.model} is made when a run begins, to fit the task")
        return
    try:
        tokenizer, empty = _without_weights(settings.model)
    except (OSError, ValueError, KeyError, ImportError) as error:
        found = f"cannot read {quote(settings.model)}: {explain(error)}"
        yield Finding("model", "problem", found, "name a directory, or a hub model that is cached here")
        return
    template = "has a chat template" if tokenizer.chat_template else "has no chat template: texts only"
    yield Finding("model", "ok", f"{settings.model} {template}")
    notes: list[str] = []
    try:
        task = chosen_task(settings)
        check_template(tokenizer, task, settings.model)
        own = settings.data is not None
        task, said = put_to_model(task, tokenizer, settings.chat, settings.system, own_rows=own)
        if said:
            yield Finding("chat", "ok", said.removeprefix("chat: "))
        tokens = settings.max_completion_tokens or task.max_completion_tokens
        fit_prompts(task, tokenizer, empty, settings.max_prompt_tokens, tokens, notes.append)
        if settings.lora_rank:
            check_lora_targets(empty, settings.lora_target_modules, notes.append)
    except ConfigError as error:
        yield Finding("model", "problem", str(error))
    yield from (Finding("model", "warning", note) for note in notes)
    yield from dropout(empty)


def default_model(plan: PlannedRun) -> Iterator[Finding]:
    """Whether the model that ``kalman-rl train`` takes by default is there; silent without the extra ``app``."""
    try:
        from kalman_rl.engine.models.load import check_available
        from kalman_rl.engine.settings import TrainConfig

        name = TrainConfig().model
        check_available(name, plan.run / ".cache")
    except AdapterError as error:
        if str(error).startswith("smollm2"):
            yield Finding("model", "warning", f"{error}; kalman-rl train takes it where no model is named")
        return
    yield Finding("model", "ok", f"{name}, which kalman-rl train takes where no model is named, is there")


def dropout(module: Any) -> Iterator[Finding]:
    """Whether a model drops something in training, and what its largest rate is."""
    from kalman_rl.hosts.trl.dropout import dropout_of

    if found := dropout_of(module):
        name, rate = max(found.items(), key=lambda pair: pair[1])
        more = f" and {len(found) - 1} more" if len(found) > 1 else ""
        advice = (
            "kalman-rl train switches it off; elsewhere call kalman_rl.hosts.trl.switch_off_dropout(model)"
        )
        yield Finding(
            "model",
            "warning",
            f"dropout {name} = {rate:g}{more}: its noise enters every log-ratio as if the policy had moved",
            advice,
        )
    else:
        yield Finding("model", "ok", "no dropout")


def _without_weights(name: str) -> tuple[Any, Any]:
    """Tokenizer, and the model as a shape: its tensors take no memory."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    config = AutoConfig.from_pretrained(name, trust_remote_code=False)
    with torch.device("meta"):
        empty = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    return AutoTokenizer.from_pretrained(name, trust_remote_code=False), empty
