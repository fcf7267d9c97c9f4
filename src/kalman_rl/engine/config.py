"""Settings of the commands: layers of them, TOML in and out, and the check before anything starts.

A configuration is made of layers, later ones winning: defaults, each ``--config`` file, command-line flags.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any, TypeVar

import tomli_w

from kalman_rl.engine.runs.received import MAX_TOML, parse_toml, read_bytes
from kalman_rl.engine.runs.run import name_problem
from kalman_rl.engine.settings import DemoConfig, StressConfig, TrainConfig
from kalman_rl.engine.strict import lists_of_one, read, show
from kalman_rl.errors import ConfigError, quote

__all__ = [
    "DemoConfig",
    "StressConfig",
    "TrainConfig",
    "build",
    "labels",
    "load_toml",
    "notes",
    "settings_of",
    "to_toml",
    "validate",
]

OWNERS = ("method", "belief")
"""Settings that have options of their own, ``method_options`` and ``belief_options``."""

MAX_TOML_BYTES = 10_000_000

C = TypeVar("C")


def build(kind: type[C], *layers: Mapping[str, Any]) -> C:
    """A configuration from defaults and layers of settings, later layers winning. A text may stand for a list of one.

    Options belong to their method or belief: a layer that names another one drops the options set so far, and
    options for the same one add up key by key.

    Raises: ConfigError for a name that is no field, and for a value of the wrong type or out of its range.

    >>> kpo = {"method": "kpo", "method_options": {"low": 0.1}}
    >>> build(TrainConfig, kpo, {"method_options": {"high": 0.2}}).method_options
    {'low': 0.1, 'high': 0.2}
    >>> build(TrainConfig, kpo, {"method": "grpo"}).method_options
    {}
    """
    settings: dict[str, Any] = {}
    for layer in layers:
        merged = {**settings, **layer}
        for owner in OWNERS:
            options, default = f"{owner}_options", getattr(kind, owner, None)
            old, new = settings.get(options), layer.get(options)
            if merged.get(owner, default) == settings.get(owner, default):
                if isinstance(old, Mapping) and isinstance(new, Mapping):
                    merged[options] = {**old, **new}
            elif options not in layer:
                merged.pop(options, None)
        settings = merged
    return read(kind, lists_of_one(kind, settings))


def load_toml(path: Path, kind: type = TrainConfig) -> dict[str, Any]:
    """Read one layer of settings from a TOML file.

    One text may stand for a list of texts. ``[method]`` with ``name`` and further keys is short for ``method`` and
    ``method_options``; so is ``[belief]``.

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
    return _layer(data, path, kind)


def settings_of(run: Path) -> dict[str, Any]:
    """The settings in the ``config.toml`` of a run. Raises: RunError, ConfigError as :func:`load_toml`."""
    return _layer(read_bytes(run, "config.toml", MAX_TOML), Path(run) / "config.toml", TrainConfig)


def _layer(data: bytes, path: Path, kind: type) -> dict[str, Any]:
    try:
        table = parse_toml(data.decode())
    except ValueError as error:
        raise ConfigError(f"{path}: not valid TOML in UTF-8: {error}") from None
    try:
        for owner in OWNERS:
            if isinstance(options := table.get(owner), dict):
                name = f"{owner}_options"
                if name in table:
                    raise ConfigError(f"{name}: got both [{owner}] and {name}, expected one of them")
                del table[owner]
                table |= {owner: options.pop("name")} if "name" in options else {}
                table[name] = options
        config: Any = read(kind, lists_of_one(kind, table))
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
    from kalman_rl.engine.together import check_stress, check_train

    read(type(config), {spec.name: getattr(config, spec.name) for spec in fields(config)})
    if config.run is not None and (problem := name_problem(config.run)):
        raise ConfigError(f"run: {problem}")
    if isinstance(config, TrainConfig):
        check_train(config)
    elif isinstance(config, StressConfig):
        check_stress(config)


def notes(config: TrainConfig) -> list[str]:
    """What is allowed but probably not meant, one sentence each, for a configuration that is valid."""
    cycle = config.updates_per_generation * config.iterations
    remarks = {
        "updates_per_generation and iterations are 1: every update is on-policy, all ratios are 1, and "
        "filter and clip have no effect": cycle == 1 and not (config.sampler_lag or config.sampler_bits),
        f"steps = {config.steps} is no multiple of {cycle}: the last generation batch is cut short": (
            config.steps % cycle > 0
        ),
        f"warmup_steps = {config.warmup_steps} is not below steps = {config.steps}: the peak learning rate "
        "is not reached": config.warmup_steps >= config.steps,
        f"belief = {quote(config.belief)} is not read: advantage is {quote(config.advantage)}, not 'tracked'": (
            config.belief != TrainConfig.belief and config.advantage != "tracked"
        ),
        f"test_share = {config.test_share} is not read: it is about rows of your own (data)": (
            config.test_share != TrainConfig.test_share and config.data is None
        ),
        f"lora_dropout = {config.lora_dropout}: its noise enters every log-ratio as if the policy had moved": (
            config.lora_dropout > 0 and config.lora_rank > 0
        ),
    }
    return [text for text, applies in remarks.items() if applies]
