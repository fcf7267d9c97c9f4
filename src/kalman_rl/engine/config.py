"""Settings of the commands: what there is to set, TOML in and out, and the check before anything starts.

A configuration is made of layers, later ones winning: defaults, each ``--config`` file, command-line flags.
The text under each field is its documentation, on the command line too; its range stands beside its type.
"""

from __future__ import annotations

import os
import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import tomli_w
from pydantic import Field

from kalman_rl.engine.runs.run import name_problem
from kalman_rl.engine.strict import Number, Place, Text, read, show
from kalman_rl.errors import ConfigError, KalmanRLError, unknown_name
from kalman_rl.sampling.budget import Budget, check_belief_only, check_select

MODELS = ("smollm2", "tiny")
"""Models that need no download; anything else is a directory or a hub id OWNER/NAME."""

REPORTERS = (
    *("none", "azure_ml", "clearml", "codecarbon", "comet_ml", "dagshub", "dvclive", "kubeflow"),
    *("mlflow", "neptune", "swanlab", "tensorboard", "trackio", "wandb"),
)

MAX_TOML_BYTES = 10_000_000

C = TypeVar("C")


@dataclass(frozen=True)
class Subject:
    """What is trained on what: the first settings of :class:`TrainConfig`."""

    method: Text = "kpo_diffuse"
    """Method, by name (`kalman-rl methods` lists them), or your own as MODULE:FUNCTION."""
    method_options: dict[Text, Number] = field(default_factory=dict)
    """Options of the method as KEY=NUMBER, e.g. `process_noise=1e-4 low=0.05`; in TOML, keys of [method]."""
    model: Text = "smollm2"
    """smollm2, tiny (made on the spot), a directory with a model, or a hub id OWNER/NAME."""
    task: Text = "products"
    """Built-in task to train on."""
    data: Place | None = None
    """JSONL or Parquet file with your rows; replaces the task."""
    reward: Text | None = None
    """Your reward function as MODULE:FUNCTION, in TRL's signature. Naming it runs its code."""
    run: Place | None = None
    """Directory to create for the run. Unset: runs/TASK-METHOD-TIME, in UTC."""
    seed: Annotated[int, Field(ge=0, le=2**32 - 1)] = 0
    """Seed of the prompts' order, of sampling and of new weights."""
    steps: Annotated[int, Field(ge=1, le=10_000_000)] = 20
    """Optimizer steps in all."""
    prompts_per_generation: Annotated[int | None, Field(ge=1, le=65_536)] = None
    """Prompts in one generation batch. Unset: 8 in groups, 64 with one completion each."""
    completions_per_prompt: Annotated[int | None, Field(ge=1, le=4_096)] = None
    """Completions sampled for each prompt: one group. 1 needs an advantage that compares with more than the group:
    tracked, batch_mean, james_stein, or a method whose own does. Unset: 1 where the advantage is tracked, else 8."""
    advantage: Literal["method", "tracked", "leave_one_out", "batch_mean", "james_stein"] = "method"
    """The method's own advantage, one from a belief about each prompt's value that is kept from step to step
    (tracked), or a baseline without memory to compare with."""
    belief: Text = "auto"
    """Belief behind tracked advantages: auto (learns noise, drift and prior from the rewards), gaussian, beta, spo, one
    of an installed package, or your own as MODULE:FUNCTION."""
    prompt_features: bool = False
    """Tell the belief each prompt's mean hidden state, so that it guesses prompts it has not seen."""
    source_column: Text | None = None
    """Column of the rows that names where a prompt comes from, e.g. data_source: the belief learns noise, drift, prior
    and scale for each source by itself. Unset: one for all."""


@dataclass(frozen=True)
class TrainConfig(Budget, Subject):
    """Everything that decides a training run. One generation batch is sampled, then trained on."""

    reward_noise: Annotated[float, Field(ge=0, le=1e6)] = 0.0
    """Standard deviation of Gaussian noise added to training rewards, to study noisy scorers."""
    updates_per_generation: Annotated[int, Field(ge=1, le=65_536)] = 2
    """Optimizer steps in one pass over a generation batch; must divide prompts * completions."""
    iterations: Annotated[int, Field(ge=1, le=1_000)] = 1
    """Passes over each generation batch."""
    gradient_accumulation: Annotated[int, Field(ge=1, le=65_536)] = 1
    """Micro-batches per optimizer step: the same result in less memory."""
    learning_rate: Annotated[float, Field(ge=0, le=1)] = 3e-4
    """Peak learning rate of AdamW, per optimizer step."""
    warmup_steps: Annotated[int, Field(ge=0, le=10_000_000)] = 4
    """Optimizer steps over which the learning rate rises from 0."""
    schedule: Literal["constant_with_warmup", "linear", "cosine"] = "constant_with_warmup"
    """Learning rate after the warm-up; linear and cosine fall to 0 at the last step."""
    weight_decay: Annotated[float, Field(ge=0, le=10)] = 0.0
    """AdamW's decoupled weight decay."""
    max_grad_norm: Annotated[float, Field(ge=0, le=1e9)] = 1.0
    """Longest gradient (L2 norm); 0 switches clipping off."""
    nonfinite: Literal["stop", "skip"] = "stop"
    """When a loss, penalty or gradient is NaN or infinite: stop before the optimizer step, or skip that step."""
    temperature: Annotated[float, Field(ge=0.01, le=10)] = 1.0
    """Sampling temperature, applied to the log-probabilities of the loss too."""
    max_completion_tokens: Annotated[int | None, Field(ge=1, le=1_000_000)] = None
    """Longest completion, in tokens. Unset: the task's own limit."""
    max_prompt_tokens: Annotated[int | None, Field(ge=1, le=1_000_000)] = None
    """Longest prompt, in tokens; longer ones are left out and counted. Unset: a prompt that does not fit the model
    is an error."""
    kl: Annotated[float, Field(ge=0, le=1_000)] = 0.0
    """Weight of the KL penalty towards the starting model, per nat; 0 switches it off."""
    lora_rank: Annotated[int, Field(ge=0, le=1_024)] = 16
    """Rank of the LoRA adapters; 0 trains every weight."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Number format of the weights; auto is bfloat16 on a GPU that has it, else float32."""
    eval_every: Annotated[int, Field(ge=0, le=10_000_000)] = 10
    """Optimizer steps between held-out evaluations; 0 evaluates only before and after."""
    eval_prompts: Annotated[int, Field(ge=1, le=1_000_000)] = 128
    """Held-out prompts per evaluation."""
    eval_samples: Annotated[int, Field(ge=1, le=1_024)] = 4
    """Sampled replies per held-out prompt; the greedy reply is one."""
    pool_prompts: Annotated[int, Field(ge=0, le=1_000_000)] = 0
    """Training prompts evaluated beside the held-out ones, as pool/...; 0 evaluates none."""
    save_every: Annotated[int, Field(ge=0, le=10_000_000)] = 10
    """Optimizer steps between checkpoints, rounded up to whole generation batches; 0 writes none."""
    traces_per_step: Annotated[int, Field(ge=0, le=4_096)] = 4
    """Completions per optimizer step recorded token by token."""
    train_size: Annotated[int | None, Field(ge=1, le=100_000_000)] = None
    """Training questions of the task. Unset: the task's own number."""
    test_size: Annotated[int | None, Field(ge=1, le=10_000_000)] = None
    """Held-out questions of the task. Unset: the task's own number."""
    report_to: Text = "none"
    """Tracker to report to besides metrics.jsonl, by TRL's name for it: none, tensorboard, wandb, ..."""
    collapse: Literal["off", "warn", "checkpoint", "stop"] = "off"
    """When the reward falls below half of its best: warn, also save a checkpoint, or also stop there (exit code 3)."""
    threads: Annotated[int | None, Field(ge=1, le=4_096)] = None
    """CPU threads. Unset: PyTorch's choice."""
    log_every: Annotated[int, Field(ge=1, le=10_000_000)] = 1
    """Optimizer steps between rows of metrics.jsonl."""
    quiet: bool = False
    """Print errors only."""

    @property
    def group_size(self) -> int:
        """Completions per prompt, also where the setting is unset."""
        default = 1 if self.advantage == "tracked" else 8
        return default if self.completions_per_prompt is None else self.completions_per_prompt

    @property
    def prompts(self) -> int:
        """Prompts in one generation batch, also where the setting is unset."""
        default = 64 if self.group_size == 1 else 8
        return default if self.prompts_per_generation is None else self.prompts_per_generation

    def __post_init__(self) -> None:
        """Nothing yet: one layer of settings may need another; :func:`validate` looks at all of them."""


@dataclass(frozen=True)
class StressConfig:
    """Methods side by side under harsher and harsher conditions, one tiny run for each method and seed."""

    conditions: tuple[Literal["A", "B", "C"], ...] = ("A", "B", "C")
    """Conditions to run."""
    methods: tuple[Text, ...] = ("grpo", "gspo", "kpo", "kpo_diffuse", "ratio_one")
    """Methods to compare, by name."""
    seeds: Annotated[int, Field(ge=1, le=1_000)] = 1
    """Repetitions of every run, with seeds from first_seed on."""
    first_seed: Annotated[int, Field(ge=0, le=2**31)] = 0
    """Seed of the first repetition."""
    run: Place = Path("runs/stress")
    """Directory of the study; each run is a directory below it."""
    steps: Annotated[int, Field(ge=1, le=1_000_000)] = 192
    """Optimizer steps of each run."""
    rollouts: Annotated[int, Field(ge=1, le=65_536)] = 512
    """Completions in one generation batch, 8 for each prompt."""
    minibatch: Annotated[int, Field(ge=1, le=65_536)] = 64
    """Completions per optimizer step; must divide rollouts."""
    jobs: Annotated[int | None, Field(ge=1, le=1_024)] = None
    """Runs at the same time, one CPU thread each. Unset: one per CPU core."""
    eval_prompts: Annotated[int, Field(ge=1, le=1_000_000)] = 128
    """Held-out prompts per evaluation."""
    quiet: bool = False
    """Print errors only."""


@dataclass(frozen=True)
class DemoConfig:
    """A small complete run on this machine: train, evaluate, report."""

    run: Place = Path("runs/demo")
    """Directory of the run."""
    seed: Annotated[int, Field(ge=0, le=2**32 - 1)] = 0
    """Seed of everything random."""
    overwrite: bool = True
    """Replace the run of an earlier demo in that directory."""
    quiet: bool = False
    """Print errors only."""


def build(kind: type[C], *layers: Mapping[str, Any]) -> C:
    """A configuration from defaults and layers of settings, later layers winning.

    Options of a method belong to it: a layer that names another method drops the options set so far, and
    options for the same method add up key by key.

    Raises: ConfigError for a name that is no field, and for a value of the wrong type or out of its range.

    >>> kpo = {"method": "kpo", "method_options": {"low": 0.1}}
    >>> build(TrainConfig, kpo, {"method_options": {"high": 0.2}}).method_options
    {'low': 0.1, 'high': 0.2}
    >>> build(TrainConfig, kpo, {"method": "grpo"}).method_options
    {}
    """
    settings: dict[str, Any] = {}
    options: dict[str, float] = {}
    method = getattr(kind, "method", None)
    for layer in layers:
        if layer.get("method", method) != method:
            method, options = layer["method"], {}
        options = {**options, **layer.get("method_options", {})}
        settings |= layer
    if options or "method_options" in settings:
        settings["method_options"] = options
    return read(kind, settings)


def load_toml(path: Path, kind: type = TrainConfig) -> dict[str, Any]:
    """Read one layer of settings from a TOML file.

    ``[method]`` with ``name`` and further keys is short for ``method`` and ``method_options``.

    Raises: ConfigError ``file: key: got ..., expected ...`` for what is unreadable, unknown, of the wrong type or
        out of its range.
    """
    try:
        with open(path, "rb") as file:
            data = file.read(MAX_TOML_BYTES + 1)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", error)
        raise ConfigError(f"config: cannot read {show(str(path))}: {reason}") from None
    if len(data) > MAX_TOML_BYTES:
        raise ConfigError(f"{path}: got more than {MAX_TOML_BYTES:,} bytes, expected a file of settings")
    try:
        table = tomllib.loads(data.decode())
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: not valid TOML in UTF-8: {error}") from None
    try:
        if isinstance(options := table.get("method"), dict):
            if "method_options" in table:
                raise ConfigError(
                    "method_options: got both [method] and method_options, expected one of them"
                )
            name = {"method": options.pop("name")} if "name" in options else {}
            table = {**table, "method_options": options}
            del table["method"]
            table |= name
        config: Any = read(kind, table)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None
    return {name: getattr(config, name) for name in table}


def to_toml(config: Any) -> str:
    """The configuration as TOML; what is unset (None) is left out, except the size of the batch, which depends on other
    settings and is written out. :func:`load_toml` reads it back."""
    table = {spec.name: getattr(config, spec.name) for spec in fields(config)}
    if isinstance(config, TrainConfig):
        table |= {"prompts_per_generation": config.prompts, "completions_per_prompt": config.group_size}
    plain = {key: str(value) if isinstance(value, Path) else value for key, value in table.items()}
    return tomli_w.dumps({key: value for key, value in plain.items() if value is not None})


def labels(config: TrainConfig) -> dict[str, Any]:
    """What a run is grouped by in reports; advantage, allocation and selection are part of the method."""
    method = config.method
    if config.advantage != "method":
        method += f"+{config.belief if config.advantage == 'tracked' else config.advantage}"
    for part, default in ((config.allocation, "fixed"), (config.select, "passes")):
        if part != default:
            method += f"+{part}"
    task = config.task if config.data is None else config.data.stem
    return {"method": method, "model": config.model, "task": task, "seed": config.seed}


def validate(config: Any) -> None:
    """Check a whole configuration before anything starts: types, ranges, names, files, what must divide what.

    Raises: ConfigError, and no other exception, naming the field, what came, what is allowed, what to do.
    """
    read(type(config), {spec.name: getattr(config, spec.name) for spec in fields(config)})
    if config.run is not None and (problem := name_problem(config.run)):
        raise ConfigError(f"run: {problem}")
    if isinstance(config, TrainConfig):
        _check_train(config)
    elif isinstance(config, StressConfig):
        _check_stress(config)


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
        f"belief = {config.belief!r} is not read: advantage is {config.advantage!r}, not 'tracked'": (
            config.belief != TrainConfig.belief and config.advantage != "tracked"
        ),
    }
    return [text for text, applies in remarks.items() if applies]


def _check_train(config: TrainConfig) -> None:
    from kalman_rl.engine.tasks.table import TASKS

    _check_method(config.method, config.method_options)
    if config.advantage == "tracked" or config.belief != TrainConfig.belief:
        _check_belief(config.belief)
    _check_group_size(config)
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
    where = f"with advantage={config.advantage!r}"
    check_belief_only(config, config.advantage == "tracked", where, "set advantage = 'tracked'")
    if config.reward_noise:
        check_select(config.select, config.select_weights, "real")
    if config.aim == "mixed_groups" and config.reward_noise:
        raise ConfigError(
            f"aim: got 'mixed_groups' with reward_noise = {config.reward_noise}, expected gradient; noisy groups are "
            "mixed from the second completion on"
        )
    Budget.of(config)
    prompts, group = config.prompts, config.group_size
    updates, micro = config.updates_per_generation, config.gradient_accumulation
    batch = f"{prompts} prompts * {group} completions = {prompts * group}"
    if prompts * group % updates:
        raise ConfigError(f"updates_per_generation: got {updates}, expected a divisor of {batch}")
    if prompts * group // updates % micro:
        raise ConfigError(
            f"gradient_accumulation: got {micro}, expected a divisor of {prompts * group // updates} "
            f"(completions per optimizer step: {batch}, over {updates} updates)"
        )


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


def _check_method(name: str, options: Mapping[str, float]) -> None:
    from kalman_rl.methods import make_method  # here, because it brings in torch

    try:
        make_method(name, **options)
    except ConfigError:
        raise
    except (KalmanRLError, TypeError, OverflowError) as error:
        raise ConfigError(f"method_options of {name}: {error}") from None


def _check_belief(name: str) -> None:
    from kalman_rl.beliefs import make_belief  # here, because it brings in torch

    make_belief(name)


def _check_group_size(config: TrainConfig) -> None:
    from kalman_rl.engine.method import chosen_method  # here, because it brings in torch
    from kalman_rl.objectives.inputs import check_group_size

    method = chosen_method(config.method, config.method_options, config.advantage, config.belief)
    check_group_size(method, config.group_size, "completions_per_prompt", "advantage = 'tracked'")


def _check_model(model: str) -> None:
    if model in MODELS or os.path.isdir(model):
        return
    if model.startswith(("/", ".", "~")):
        raise ConfigError(f"model: got {show(model)}, expected a directory that exists, or OWNER/NAME")
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]{0,99}/[\w.-]{1,100}", model, re.ASCII):
        raise ConfigError(f"{unknown_name('model', model, MODELS)}; or a directory, or a hub id OWNER/NAME")
