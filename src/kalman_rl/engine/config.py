"""Settings of the commands: what there is to set, TOML in and out, and the check before anything starts.

A configuration is made of layers, later ones winning: defaults, each ``--config`` file, command-line flags.
The text under each field is its documentation, on the command line too; its range stands beside its default.
"""

from __future__ import annotations

import os
import re
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, TypeVar, get_type_hints

import tomli_w

from kalman_rl.engine.reading import line_of, read, show, text_of
from kalman_rl.engine.runs.run import name_problem
from kalman_rl.errors import ConfigError, KalmanRLError, unknown_name
from kalman_rl.sampling.budget import Budget

MODELS = ("smollm2", "tiny")
"""Models that need no download; anything else is a directory or a hub id OWNER/NAME."""

REPORTERS = (
    *("none", "azure_ml", "clearml", "codecarbon", "comet_ml", "dagshub", "dvclive", "kubeflow"),
    *("mlflow", "neptune", "swanlab", "tensorboard", "trackio", "wandb"),
)

C = TypeVar("C")


def number(default: Any, low: float, high: float, because: str = "") -> Any:
    """A numeric field with its default and the inclusive range [low, high] that :func:`validate` enforces."""
    return field(default=default, metadata={"range": (low, high), "because": because})


@dataclass(frozen=True)
class TrainConfig:
    """Everything that decides a training run. One generation batch is sampled, then trained on."""

    method: str = "kpo_diffuse"
    """Method, by name; `kalman-rl methods` lists them."""
    method_options: dict[str, float] = field(default_factory=dict)
    """Options of the method as KEY=NUMBER, e.g. `process_noise=1e-4 low=0.05`; in TOML, keys of [method]."""
    model: str = "smollm2"
    """smollm2, tiny (made on the spot), a directory with a model, or a hub id OWNER/NAME."""
    task: str = "products"
    """Built-in task to train on."""
    data: Path | None = None
    """JSONL or Parquet file of your own rows; replaces the task."""
    reward: str | None = None
    """Reward function of your own as MODULE:FUNCTION, in TRL's signature. Naming it runs its code."""
    run: Path | None = None
    """Directory to create for the run. Unset: runs/TASK-METHOD-TIME, in UTC."""
    seed: int = number(0, 0, 2**32 - 1)
    """Seed of the prompts' order, of sampling and of new weights."""
    steps: int = number(20, 1, 10_000_000)
    """Optimizer steps in all."""
    prompts_per_generation: int = number(8, 1, 65_536)
    """Prompts in one generation batch."""
    completions_per_prompt: int = number(8, 2, 4_096, "; TRL's trainer samples groups")
    """Completions sampled for each prompt: one group."""
    advantage: Literal["method", "tracked", "leave_one_out", "batch_mean", "james_stein"] = "method"
    """The method's own advantage, one from a belief about each prompt's value that is kept from step to step
    (tracked), or a baseline without memory to compare with."""
    belief: Literal["auto", "gaussian", "beta", "spo"] = "auto"
    """Belief behind tracked advantages; auto learns noise, drift and prior from the rewards."""
    prompt_features: bool = False
    """Tell the belief each prompt's mean hidden state, so that it guesses prompts it has not seen."""
    allocation: Literal["fixed", "predictive", "rounds"] = "fixed"
    """Completions per prompt: the same for all, from the belief before sampling, or in rounds that see rewards."""
    aim: Literal["gradient", "mixed_groups"] = "gradient"
    """What an allocation buys: gradient (spend near success rate 1/2) or mixed_groups (groups with both outcomes)."""
    budget: float | None = number(None, 0.01, 4_096)
    """Mean completions per prompt that an allocation may spend. Unset: completions_per_prompt."""
    rounds: tuple[int, ...] = (2, 4)
    """Completions per prompt in each round of allocation=rounds; the last number repeats."""
    max_rounds: int = number(2, 1, 64)
    """Rounds per generation batch; the last one takes what is left of the budget."""
    completions_min: int = number(0, 0, 4_096)
    """Least completions of a prompt in a batch; with 0 an allocation may pass a prompt over."""
    completions_max: int = number(32, 1, 4_096)
    """Most completions of a prompt in a batch."""
    coverage_steps: int = number(256, 1, 10_000_000)
    """Optimizer steps after which a prompt that was passed over is due again."""
    reward_range: Literal["unit", "real"] = "unit"
    """Where rewards lie, for an allocation: unit in [0, 1], real anywhere."""
    reward_noise_variance: float = number(0.0, 0.0, 1e12)
    """Variance of the scorer's noise, in squared reward units; read where reward_range is real."""
    reward_noise: float = number(0.0, 0.0, 1e6)
    """Standard deviation of Gaussian noise added to training rewards, to study noisy scorers."""
    updates_per_generation: int = number(2, 1, 65_536)
    """Optimizer steps in one pass over a generation batch; must divide prompts * completions."""
    iterations: int = number(1, 1, 1_000)
    """Passes over each generation batch."""
    gradient_accumulation: int = number(1, 1, 65_536)
    """Micro-batches per optimizer step: the same result in less memory."""
    learning_rate: float = number(3e-4, 0.0, 1.0)
    """Peak learning rate of AdamW, per optimizer step."""
    warmup_steps: int = number(4, 0, 10_000_000)
    """Optimizer steps over which the learning rate rises from 0."""
    schedule: Literal["constant_with_warmup", "linear", "cosine"] = "constant_with_warmup"
    """Learning rate after the warm-up; linear and cosine fall to 0 at the last step."""
    weight_decay: float = number(0.0, 0.0, 10.0)
    """AdamW's decoupled weight decay."""
    max_grad_norm: float = number(1.0, 0.0, 1e9)
    """Longest gradient (L2 norm); 0 switches clipping off."""
    temperature: float = number(1.0, 0.01, 10.0)
    """Sampling temperature, applied to the log-probabilities of the loss too."""
    max_completion_tokens: int | None = number(None, 1, 1_000_000)
    """Longest completion, in tokens. Unset: the task's own limit."""
    kl: float = number(0.0, 0.0, 1_000.0)
    """Weight of the KL penalty towards the starting model, per nat; 0 switches it off."""
    lora_rank: int = number(16, 0, 1_024)
    """Rank of the LoRA adapters; 0 trains every weight."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Number format of the weights; auto is bfloat16 on a GPU that has it, else float32."""
    eval_every: int = number(10, 0, 10_000_000)
    """Optimizer steps between held-out evaluations; 0 evaluates only before and after."""
    eval_prompts: int = number(128, 1, 1_000_000)
    """Held-out prompts per evaluation."""
    eval_samples: int = number(4, 1, 1_024)
    """Sampled replies per held-out prompt; the greedy reply is one."""
    pool_prompts: int = number(0, 0, 1_000_000)
    """Training prompts evaluated beside the held-out ones, as pool/...; 0 evaluates none."""
    save_every: int = number(10, 0, 10_000_000)
    """Optimizer steps between checkpoints, rounded up to whole generation batches; 0 writes none."""
    traces_per_step: int = number(4, 0, 4_096)
    """Completions per optimizer step recorded token by token."""
    train_size: int | None = number(None, 1, 100_000_000)
    """Training questions of the task. Unset: the task's own number."""
    test_size: int | None = number(None, 1, 10_000_000)
    """Held-out questions of the task. Unset: the task's own number."""
    report_to: str = "none"
    """Tracker to report to besides metrics.jsonl, by TRL's name for it: none, tensorboard, wandb, ..."""
    collapse: Literal["off", "warn", "checkpoint", "stop"] = "off"
    """When the reward falls below half of its best: warn, also save a checkpoint, or also stop there (exit code 3)."""
    threads: int | None = number(None, 1, 4_096)
    """CPU threads. Unset: PyTorch's choice."""
    log_every: int = number(1, 1, 10_000_000)
    """Optimizer steps between rows of metrics.jsonl."""
    quiet: bool = False
    """Print errors only."""


@dataclass(frozen=True)
class StressConfig:
    """Methods side by side under harsher and harsher conditions, one tiny run for each method and seed."""

    conditions: tuple[Literal["A", "B", "C"], ...] = ("A", "B", "C")
    """Conditions to run."""
    methods: tuple[str, ...] = ("grpo", "gspo", "kpo", "kpo_diffuse", "ratio_one")
    """Methods to compare, by name."""
    seeds: int = number(1, 1, 1_000)
    """Repetitions of every run, with seeds from first_seed on."""
    first_seed: int = number(0, 0, 2**31)
    """Seed of the first repetition."""
    run: Path = Path("runs/stress")
    """Directory of the study; each run is a directory below it."""
    steps: int = number(192, 1, 1_000_000)
    """Optimizer steps of each run."""
    rollouts: int = number(512, 1, 65_536)
    """Completions in one generation batch, 8 for each prompt."""
    minibatch: int = number(64, 1, 65_536)
    """Completions per optimizer step; must divide rollouts."""
    jobs: int | None = number(None, 1, 1_024)
    """Runs at the same time, one CPU thread each. Unset: one per CPU core."""
    eval_prompts: int = number(128, 1, 1_000_000)
    """Held-out prompts per evaluation."""
    quiet: bool = False
    """Print errors only."""


@dataclass(frozen=True)
class DemoConfig:
    """A small complete run on this machine: train, evaluate, report."""

    run: Path = Path("runs/demo")
    """Directory of the run."""
    seed: int = number(0, 0, 2**32 - 1)
    """Seed of everything random."""
    overwrite: bool = True
    """Replace the run of an earlier demo in that directory."""
    quiet: bool = False
    """Print errors only."""


def build(kind: type[C], *layers: Mapping[str, Any]) -> C:
    """A configuration from defaults and layers of settings, later layers winning.

    Options of a method belong to it: a layer that names another method drops the options set so far, and
    options for the same method add up key by key.

    Raises: ConfigError for a name that is no field; types and ranges are :func:`validate`'s.

    >>> kpo = {"method": "kpo", "method_options": {"low": 0.1}}
    >>> build(TrainConfig, kpo, {"method_options": {"high": 0.2}}).method_options
    {'low': 0.1, 'high': 0.2}
    >>> build(TrainConfig, kpo, {"method": "grpo"}).method_options
    {}
    """
    settings: dict[str, Any] = {}
    options: dict[str, float] = {}
    method = getattr(kind, "method", None)
    known = get_type_hints(kind)
    for layer in layers:
        for name in layer.keys() - known.keys():
            raise unknown_name("key", name, known)
        if layer.get("method", method) != method:
            method, options = layer["method"], {}
        options = {**options, **layer.get("method_options", {})}
        settings |= layer
    if options or "method_options" in settings:
        settings["method_options"] = options
    return kind(**settings)


def load_toml(path: Path, kind: type = TrainConfig) -> dict[str, Any]:
    """Read settings from a TOML file; the values have the fields' types, ranges are :func:`validate`'s.

    ``[method]`` with ``name`` and further keys is short for ``method`` and ``method_options``.

    Raises: ConfigError ``file:line: key: got ..., expected ...`` for what is unreadable, unknown or of the
        wrong type.
    """
    text = text_of(path)
    try:
        table = tomllib.loads(text)
    except (ValueError, RecursionError) as error:
        place = re.search(r"at line (\d+)|at end of document", str(error))
        line = f":{place[1] or text.count(chr(10)) + 1}" if place else ""
        raise ConfigError(f"{path}{line}: not valid TOML: {error}") from None
    hints = get_type_hints(kind)
    settings: dict[str, Any] = {}
    for key, value in table.items():
        where = f"{path}:{line_of(text, key)}"
        if key not in hints:
            raise ConfigError(f"{where}: {unknown_name('key', key, hints)}")
        try:
            if key == "method" and isinstance(value, dict):
                settings |= _method_table(value, "method_options" in table)
            else:
                settings[key] = read(key, value, hints[key])
        except ConfigError as error:
            raise ConfigError(f"{where}: {error}") from None
    return settings


def to_toml(config: Any) -> str:
    """The configuration as TOML; what is unset (None) is left out. :func:`load_toml` reads it back."""
    table = {spec.name: getattr(config, spec.name) for spec in fields(config)}
    plain = {key: str(value) if isinstance(value, Path) else value for key, value in table.items()}
    return tomli_w.dumps({key: value for key, value in plain.items() if value is not None})


def labels(config: TrainConfig) -> dict[str, Any]:
    """What a run is grouped by in reports; a tracked advantage and an allocation are part of the method."""
    method = config.method
    if config.advantage != "method":
        method += f"+{config.belief if config.advantage == 'tracked' else config.advantage}"
    if config.allocation != "fixed":
        method += f"+{config.allocation}"
    task = config.task if config.data is None else config.data.stem
    return {"method": method, "model": config.model, "task": task, "seed": config.seed}


def validate(config: Any) -> None:
    """Check a whole configuration before anything starts: types, ranges, names, files, what must divide what.

    Raises: ConfigError, and no other exception, naming the field, what came, what is allowed, what to do.
    """
    hints = get_type_hints(type(config))
    for spec in fields(config):
        value = read(spec.name, getattr(config, spec.name), hints[spec.name])
        low, high = spec.metadata.get("range", (None, None))
        if value is not None and low is not None and not low <= value <= high:
            raise ConfigError(
                f"{spec.name}: got {show(value)}, expected {low:,} to {high:,}{spec.metadata['because']}"
            )
    if config.run is not None and (problem := name_problem(config.run)):
        raise ConfigError(f"run: {problem}")
    _CHECKS[type(config)](config)


def notes(config: TrainConfig) -> list[str]:
    """What is allowed but probably not meant, one sentence each, for a configuration that is valid."""
    cycle = config.updates_per_generation * config.iterations
    remarks = {
        "updates_per_generation and iterations are 1: every update is on-policy, all ratios are 1, and "
        "filter and clip have no effect": cycle == 1,
        f"steps = {config.steps} is no multiple of {cycle}: the last generation batch is cut short": (
            config.steps % cycle > 0
        ),
        f"warmup_steps = {config.warmup_steps} is not below steps = {config.steps}: the peak learning rate "
        "is not reached": config.warmup_steps >= config.steps,
    }
    return [text for text, applies in remarks.items() if applies]


def _check_train(config: TrainConfig) -> None:
    from kalman_rl.engine.tasks.table import TASKS

    _check_method(config.method, config.method_options)
    _check_model(config.model)
    if config.report_to not in REPORTERS:
        raise unknown_name("report_to", config.report_to, REPORTERS)
    if config.data is None and config.task not in TASKS:
        raise unknown_name("task", config.task, TASKS)
    if config.data is not None and not os.path.isfile(config.data):
        raise ConfigError(f"data: got {show(str(config.data))}, expected a JSONL or Parquet file that exists")
    if config.reward is not None and not re.fullmatch(r"[^\W\d][\w.]*:[^\W\d]\w*", config.reward):
        raise ConfigError(
            f"reward: got {show(config.reward)}, expected MODULE:FUNCTION, e.g. 'my_rewards:exact'"
        )
    _check_allocation(config)
    prompts, group = config.prompts_per_generation, config.completions_per_prompt
    updates, micro = config.updates_per_generation, config.gradient_accumulation
    batch = f"{prompts} prompts * {group} completions = {prompts * group}"
    if prompts * group % updates:
        raise ConfigError(f"updates_per_generation: got {updates}, expected a divisor of {batch}")
    if prompts * group // updates % micro:
        raise ConfigError(
            f"gradient_accumulation: got {micro}, expected a divisor of {prompts * group // updates} "
            f"(completions per optimizer step: {batch}, over {updates} updates)"
        )


def _check_allocation(config: TrainConfig) -> None:
    if config.allocation != "fixed" and config.advantage != "tracked":
        raise ConfigError(
            f"allocation: got {config.allocation!r} with advantage={config.advantage!r}, expected fixed because only a "
            "belief knows how to divide completions; set advantage = 'tracked'"
        )
    if config.aim == "mixed_groups" and config.reward_noise:
        raise ConfigError(
            f"aim: got 'mixed_groups' with reward_noise = {config.reward_noise}, expected gradient; noisy groups are "
            "mixed from the second completion on"
        )
    Budget.of(config)


def _check_stress(config: StressConfig) -> None:
    for name, values in (("conditions", config.conditions), ("methods", config.methods)):
        if not values or len(set(values)) < len(values):
            raise ConfigError(f"{name}: got {show(list(values))}, expected one or more, each once")
    for method in config.methods:
        _check_method(method, {})
    rollouts, minibatch = config.rollouts, config.minibatch
    if rollouts % 8:
        raise ConfigError(f"rollouts: got {rollouts}, expected a multiple of 8")
    if rollouts % minibatch:
        raise ConfigError(f"minibatch: got {minibatch}, expected a divisor of rollouts = {rollouts}")


_CHECKS: dict[type, Callable[[Any], None]] = {
    TrainConfig: _check_train,
    StressConfig: _check_stress,
    DemoConfig: lambda config: None,  # nothing beyond types and ranges
}


def _check_method(name: str, options: Mapping[str, float]) -> None:
    from kalman_rl.methods import make_method  # here, because it brings in torch

    try:
        make_method(name, **options)
    except ConfigError:
        raise
    except (KalmanRLError, TypeError, OverflowError) as error:
        raise ConfigError(f"method_options of {name}: {error}") from None


def _check_model(model: str) -> None:
    if model in MODELS or os.path.isdir(model):
        return
    if model.startswith(("/", ".", "~")):
        raise ConfigError(f"model: got {show(model)}, expected a directory that exists, or OWNER/NAME")
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]{0,99}/[\w.-]{1,100}", model, re.ASCII):
        raise ConfigError(f"{unknown_name('model', model, MODELS)}; or a directory, or a hub id OWNER/NAME")


def _method_table(table: dict[str, Any], also_options: bool) -> dict[str, Any]:
    """``[method] name = "kpo", low = 0.1`` in the words of the fields."""
    if also_options:
        raise ConfigError("method_options: got both [method] and method_options, expected one of them")
    options = read("method", {key: value for key, value in table.items() if key != "name"}, dict[str, float])
    named = {"method": read("method.name", table["name"], str)} if "name" in table else {}
    return {**named, "method_options": options}
