"""What may be different when a run goes on: some settings, and nothing else without a word.

A resumed run equals the uninterrupted one bit for bit with the same settings, rows and weights, on the same versions,
device and threads. The first three are compared and refused; the others are recorded and said.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Collection
from dataclasses import fields
from pathlib import Path
from typing import Any, get_args

import torch

from kalman_rl.engine.runs.checkpoints import step_of
from kalman_rl.engine.runs.manifest import redacted, versions
from kalman_rl.engine.runs.reading import read_manifest
from kalman_rl.engine.runs.run import Run
from kalman_rl.engine.settings import Changeable, TrainConfig
from kalman_rl.engine.strict import show
from kalman_rl.errors import ConfigError, RunError, quote
from kalman_rl.registry import imported, source_digest

FREE = ("run", "quiet")
"""Settings that may change without a word: where the run lies, and what is printed."""
MACHINE = ("versions", "device", "dtype", "threads")
"""Entries of the manifest on which bitwise equality rests."""


def began_elsewhere(run: Path) -> str | None:
    """The folder that rows, model and reward of a run are named from, if it is still there and is not this one.

    Raises: RunError where there is no run.
    """
    folder = read_manifest(run).get("folder")
    if not isinstance(folder, str) or not os.path.isdir(folder) or os.path.samefile(folder, "."):
        return None
    return folder


def plain_settings(config: TrainConfig) -> dict[str, Any]:
    """The settings as ``manifest.json`` holds them: plain values, without secrets, the batch's size as it came out."""
    table = {spec.name: getattr(config, spec.name) for spec in fields(config) if spec.name not in FREE}
    table |= {"prompts_per_generation": config.prompts, "completions_per_prompt": config.group_size}
    plain = {name: str(value) if isinstance(value, Path) else value for name, value in table.items()}
    found: dict[str, Any] = json.loads(json.dumps(redacted(plain)))
    return found


def changed_settings(run: Run, config: TrainConfig) -> dict[str, tuple[Any, Any]]:
    """Settings by name that differ from those the run has trained with, as (then, now)."""
    then, now = run.manifest.get("settings"), plain_settings(config)
    if not isinstance(then, dict):
        return {}
    return {name: (then[name], now[name]) for name in now if name in then and then[name] != now[name]}


def check_same_settings(run: Run, config: TrainConfig, allow_change: Collection[str] = ()) -> None:
    """Compare a run's settings with those it began with.

    Raises: ConfigError for one that changed and may not, or that ``allow_change`` does not name.
    """
    changes = changed_settings(run, config)
    for name, (then, now) in changes.items():
        if name in allow_change:
            continue
        begin = f"kalman-rl train --config {run.path / 'config.toml'} --run {run.path} --overwrite"
        advice = (
            f"set it back, or resume with --allow-change {name}"
            if name in get_args(Changeable)
            else f"set it back, or begin again with `{begin}`"
        )
        raise ConfigError(
            f"{name}: got {show(now)} in {run.path / 'config.toml'}, expected {show(then)}, with which the run has "
            f"trained; {advice}"
        )


def check_same_weights(
    run: Run, model: Any, name: str, *, resume: bool, allow_change: Collection[str] = ()
) -> str:
    """The digest of the start model's weights; a resumed run must find the one in its manifest.

    Raises: ConfigError when they changed and ``allow_change`` does not name model.
    """
    digest = weights_digest(model)
    known = run.manifest.get("model_sha256")
    if resume and known not in (None, digest) and "model" not in allow_change:
        raise ConfigError(
            f"model: got other weights for {show(name)} than the run began with, expected the same, as adapters and "
            "the KL penalty rest on them; restore them, or resume with --allow-change model"
        )
    return digest


def check_same_code(
    run: Run, config: TrainConfig, reward: Any, *, resume: bool, allow_change: Collection[str] = ()
) -> dict[str, str]:
    """Digests of the files that hold the run's own reward, method and belief, by setting; a resumed run must find those
    in its manifest. What such a file imports is not looked at.

    Raises: ConfigError when one changed and ``allow_change`` does not name code.
    """
    found = {"reward": getattr(reward, "source", None) if config.reward else None}
    for name in ("method", "belief"):
        if ":" in (value := getattr(config, name)):
            found[name] = source_digest(imported(name, value))
    digests = {name: digest for name, digest in found.items() if digest is not None}
    then = run.manifest.get("code_sha256")
    known = then if resume and isinstance(then, dict) and "code" not in allow_change else {}
    for name, digest in digests.items():
        if known.get(name, digest) != digest:
            value = getattr(config, name)
            said = value if isinstance(value, str) else ", ".join(value)
            raise ConfigError(
                f"{name}: got another file of {quote(said)} than the run began with, expected the "
                "same, as what it trained on came from the other; restore it, or resume with --allow-change code"
            )
    return digests


def weights_digest(model: Any) -> str:
    """SHA-256 over names, types and bytes of a model's weights."""
    digest = hashlib.sha256()
    for name, value in model.state_dict().items():
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def checkpoint_of(run: Run, config: TrainConfig) -> Path | None:
    """The checkpoint to go on from, None where none was completed.

    A run whose ``steps`` were raised may have ended inside a generation batch; it goes on from the end of a whole one.

    Raises: RunError if none is intact; ConfigError if the newest lies beyond ``steps``.
    """
    cycle = config.updates_per_generation * config.iterations
    found = [step_of(folder) for folder in run.checkpoints()]
    if not found and run.manifest.get("status") == "finished":
        raise RunError(
            f"{run.path}: got a finished run without checkpoints, which cannot go on; begin another one"
        )

    if found and found[-1] > config.steps:
        raise ConfigError(
            f"steps: got {config.steps}, expected at least {found[-1]}, the step of the newest checkpoint in "
            f"{run.path}; raise it"
        )

    def serves(step: int) -> bool:
        return step == config.steps or step % cycle == 0

    return run.latest_checkpoint(serves) if any(map(serves, found)) else None


def note_machine(run: Run, now: dict[str, Any], step: int | None, say: Callable[[str], None]) -> None:
    """Write the machine that trains into the manifest; with ``step``, at which a run goes on, say what differs.

    Args:
        now: ``device``, ``dtype`` and ``threads``.
        step: of the checkpoint; None at a run's beginning.
    """
    now = now | {"versions": versions()}
    if step is None:
        run.update_manifest(**now)
        return
    then = {name: run.manifest.get(name) for name in MACHINE}
    differs = _differences(then, now)
    if differs:
        listed = ", ".join(f"{name} {old} -> {new}" for name, (old, new) in differs.items())
        say(
            f"note: the run goes on elsewhere than it began ({listed}); it is no longer bitwise what it would have been"
        )
    earlier = run.manifest.get("resumed")
    row = {"step": step, **{name: list(pair) for name, pair in differs.items()}}
    run.update_manifest(**now, resumed=[*(earlier if isinstance(earlier, list) else []), row])


def _differences(then: dict[str, Any], now: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Entries known on both sides that differ; packages one by one."""
    flat: list[dict[str, Any]] = []
    for side in (then, now):
        packages = side["versions"] if isinstance(side.get("versions"), dict) else {}
        flat.append({**packages, **{name: side.get(name) for name in MACHINE if name != "versions"}})
    old, new = flat
    return {
        name: (old[name], new[name]) for name in new if old.get(name) is not None and old[name] != new[name]
    }
