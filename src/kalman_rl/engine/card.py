"""The card of a trained model, made from its run: method, data, numbers, versions. Nothing of this machine is in it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from kalman_rl.checks import is_real, is_whole
from kalman_rl.engine.config import TrainConfig
from kalman_rl.engine.settings import MODELS
from kalman_rl.errors import one_line

HUB = {"smollm2": "HuggingFaceTB/SmolLM2-135M-Instruct"}
"""Models of ours that the hub has under another name."""
MEASURED = {
    "eval/sampled_reward": "mean reward, sampled",
    "eval/sampled_accuracy": "accuracy, sampled",
    "eval/greedy_reward": "mean reward, greedy",
    "eval/greedy_accuracy": "accuracy, greedy",
}
SETTINGS = (
    "learning_rate schedule warmup_steps prompts_per_generation completions_per_prompt updates_per_generation "
    "iterations temperature kl lora_rank lora_target_modules seed"
).split()


def model_card(
    config: TrainConfig,
    manifest: Mapping[str, Any],
    metrics: Sequence[Mapping[str, Any]],
    best: Mapping[str, Any] | None,
) -> str:
    """Markdown with the header that the hub reads.

    Args:
        config, manifest, metrics: of the run.
        best: the manifest's entry of the weights that are exported, None for the last ones.
    """
    labels = manifest.get("labels")
    method = str((labels if isinstance(labels, dict) else {}).get("method", config.method))
    steps = [row["step"] for row in metrics if row["kind"] == "train"]
    step = (best or {}).get("step", max(steps, default=0))
    task = config.task if config.data is None else config.data.name
    return "\n".join(
        [
            *_header(config),
            f"# {_base_name(config)}, trained on {_said(task)} with {_said(method)}",
            "",
            "Reinforcement learning from rewards with Kalman-RL, through TRL: "
            f"{step:,} optimizer steps" + (", the best held-out mean reward of the run." if best else "."),
            *["", "## Use", "", "```py", *_use(config, manifest.get("chat") is True), "```", ""],
            *["## Method", "", *_method(config, method), ""],
            *["## Data", "", *_data(config, manifest, task), ""],
            *["## Held-out results", "", *_results(config, metrics, step), ""],
            *["## Versions", "", *_versions(manifest), ""],
            "The licence of the start model holds for these weights too. Nothing was measured but the rows above.",
            "",
        ]
    )


def _header(config: TrainConfig) -> list[str]:
    base = HUB.get(config.model, config.model)
    local = config.model not in HUB and (config.model in MODELS or config.model.startswith((".", "/", "~")))
    named = [] if local or base.count("/") != 1 else [f"base_model: {json.dumps(base)}"]
    return [
        *["---", *named, "library_name: transformers", "pipeline_tag: text-generation"],
        *["tags:", "- reinforcement-learning", "- trl", "- kalman-rl", "---", ""],
    ]


def _base_name(config: TrainConfig) -> str:
    name = HUB.get(config.model, config.model).rstrip("/").rpartition("/")[2]
    return _said(name) or "A model"


def _use(config: TrainConfig, chat: bool) -> list[str]:
    asked = 'inputs = tokenizer("...", return_tensors="pt")'
    if chat:
        system = [{"role": "system", "content": config.system}] if config.system else []
        messages = json.dumps([*system, {"role": "user", "content": "..."}], ensure_ascii=False)
        asked = (
            f"messages = {messages}\ninputs = tokenizer.apply_chat_template(\n    messages, "
            'add_generation_prompt=True, return_dict=True, return_tensors="pt"\n)'
        )
    return [
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        "",
        'model = AutoModelForCausalLM.from_pretrained("THIS_FOLDER")',
        'tokenizer = AutoTokenizer.from_pretrained("THIS_FOLDER")',
        asked,
        "reply = model.generate(**inputs, max_new_tokens=64)[0, inputs.input_ids.shape[1] :]",
        "print(tokenizer.decode(reply, skip_special_tokens=True))",
    ]


def _method(config: TrainConfig, method: str) -> list[str]:
    options = ", ".join(f"{name} = {value:g}" for name, value in config.method_options.items())
    values = {name: getattr(config, name) for name in SETTINGS}
    values |= {"prompts_per_generation": config.prompts, "completions_per_prompt": config.group_size}
    if not config.lora_rank:
        del values["lora_target_modules"]
    rows = [("method", method + (f" ({options})" if options else ""))]
    rows += [
        (name, ", ".join(value) if isinstance(value, tuple) else str(value)) for name, value in values.items()
    ]
    return _table(("setting", "value"), rows)


def _data(config: TrainConfig, manifest: Mapping[str, Any], task: str) -> list[str]:
    sides = {"train_rows": "for training", "test_rows": "held out"}
    counts = [f"{manifest[side]:,} {word}" for side, word in sides.items() if is_whole(manifest.get(side))]
    source = f"built-in task {task}" if config.data is None else f"rows of {task}"
    lines = [f"- {_said(': '.join(filter(None, [source, ', '.join(counts)])))}"]
    if isinstance(digest := manifest.get("data_sha256"), str):
        lines.append(f"- SHA-256 of the rows and their split: {_said(digest)}")
    weights = config.reward_weights or (1.0,) * len(config.reward)
    rewards = [f"{name} (weight {weight:g})" for name, weight in zip(config.reward, weights)]
    own = "that of the task" if config.data is None else "1 where the first line of a reply equals the answer"
    return [*lines, f"- reward: {_said(', '.join(rewards) or own)}"]


def _results(config: TrainConfig, metrics: Sequence[Mapping[str, Any]], step: int) -> list[str]:
    evals = [row for row in metrics if row["kind"] == "eval" and row.get("eval/count")]
    last = next((row for row in reversed(evals) if row["step"] == step), None)
    if last is None:
        return ["Nothing was held out."]
    first, each = evals[0], "eval/rewards/"
    names = MEASURED | {name: name.removeprefix(each) for name in last if name.startswith(each)}
    rows = [
        (said, f"{first[name]:.3f}", f"{last[name]:.3f}")
        for name, said in names.items()
        if is_real(first.get(name), last.get(name))
    ]
    return [
        *_table(("", f"step {first['step']}", f"step {step}"), rows),
        "",
        f"{int(last['eval/count'])} held-out prompts; sampled: {int(last.get('eval/samples') or 1)} replies to each at "
        f"temperature {config.temperature:g}. A reply is correct if its (first) reward is exactly 1.",
    ]


def _versions(manifest: Mapping[str, Any]) -> list[str]:
    found = manifest.get("versions")
    packages = {**(found if isinstance(found, dict) else {}), "dtype": manifest.get("dtype")}
    rows = [(str(name), str(version)) for name, version in packages.items() if version is not None]
    return _table(("package", "version"), rows)


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    lines = [head, ["---"] * len(head), *rows]
    return ["| " + " | ".join(_said(cell) for cell in line) + " |" for line in lines]


def _said(text: str) -> str:
    """Text of a run as one cell or line of Markdown, without a way out of it."""
    return one_line(text, 200).replace("|", "\\|").replace("<", "&lt;").replace("`", "'")
