"""What would fail late or silently, looked at before a run begins: one sentence each."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Callable, Collection, Sequence
from typing import Any

from kalman_rl.engine.evaluation import prompt_tokens
from kalman_rl.engine.runs.run import Run
from kalman_rl.engine.tasks import Row, Task
from kalman_rl.errors import ConfigError

Say = Callable[[str], None]
NAMED = 3  # rows or layers that a sentence names


def check_same_data(
    run: Run, task: Task, source: str, *, resume: bool, allow_change: Collection[str] = ()
) -> str:
    """The digest of all rows; a resumed run must find the one in its manifest.

    Raises: ConfigError when rows or their split changed and ``allow_change`` does not name data.
    """
    digest = task.digest()
    known = run.manifest.get("data_sha256")
    if resume and known not in (None, digest) and "data" not in allow_change:
        raise ConfigError(
            f"data: got other rows in {source} than the run began with, expected the same, as prompts it trained on "
            "may now be held out; restore them, or resume with --allow-change data"
        )
    return digest


def fit_prompts(task: Task, tokenizer: Any, model: Any, most: int | None, max_tokens: int, say: Say) -> Task:
    """The task without prompts of more than ``most`` tokens, when all others fit into the model with a completion.

    Raises: ConfigError when a prompt and ``max_tokens`` exceed the model's positions, or no prompt is left.
    """
    lengths = {side: _lengths(tokenizer, task, getattr(task, side)) for side in ("train", "test")}
    if most is not None:
        kept = {side: [n <= most for n in found] for side, found in lengths.items()}
        count = sum(map(len, kept.values()))
        left_out = count - sum(map(sum, kept.values()))
        if left_out:
            say(
                f"{left_out} of {count} prompts are left out: they have more than {most} tokens (max_prompt_tokens)"
            )
        rows = {s: [row for row, keep in zip(getattr(task, s), kept[s]) if keep] for s in kept}
        lengths = {side: [n for n in found if n <= most] for side, found in lengths.items()}
        if not rows["train"]:
            raise ConfigError(
                f"max_prompt_tokens: got {most}, expected at least one training prompt as short; raise it"
            )
        task = dataclasses.replace(task, train=rows["train"], test=rows["test"])
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if positions is None:
        return task
    if max_tokens >= positions:
        raise ConfigError(
            f"max_completion_tokens: got {max_tokens}, expected less than the {positions} positions of the model; "
            "lower it"
        )
    pairs = zip([*task.train, *task.test], [*lengths["train"], *lengths["test"]], strict=True)
    long = [(str(row["prompt_id"]), n) for row, n in pairs if n + max_tokens > positions]
    if long:
        named = ", ".join(f"{name} ({n} tokens)" for name, n in long[:NAMED])
        more = f" and {len(long) - NAMED} more" if len(long) > NAMED else ""
        raise ConfigError(
            f"prompt: got {named}{more} with max_completion_tokens = {max_tokens}, expected at most {positions} tokens "
            f"together, the positions of the model; set max_prompt_tokens = {positions - max_tokens} to leave such "
            "prompts out, or lower max_completion_tokens"
        )
    return task


def _lengths(tokenizer: Any, task: Task, rows: Sequence[Row]) -> list[int]:
    asked = [task.ask(row["prompt"]) for row in rows]
    return [len(ids) for ids in prompt_tokens(tokenizer, asked)] if rows else []


def check_lora_targets(model: Any, targets: Sequence[str], say: Say) -> None:
    """Raises ConfigError when the model has none of the layers that get adapters; names the ones that it lacks.

    ``all-linear`` stands for all that there are.
    """
    if list(targets) == ["all-linear"]:
        return
    layers = {
        name.rpartition(".")[2]
        for name, module in model.named_modules()
        if getattr(getattr(module, "weight", None), "ndim", 0) == 2
    }
    missing = [name for name in targets if name not in layers]
    if not missing:
        return
    near = dict.fromkeys(n for name in missing for n in difflib.get_close_matches(name, sorted(layers), 1))
    found = ", ".join(near) or ", ".join(sorted(layers)[:NAMED])
    if len(missing) < len(targets):
        say(
            f"note: the model has no {', '.join(missing)} to adapt (near: {found}); the other layers get adapters"
        )
        return
    raise ConfigError(
        f"lora_target_modules: got a model without any of {', '.join(targets)}, expected at least one to adapt; it has "
        f"{found}; name them, or set lora_rank = 0 to train every weight"
    )
