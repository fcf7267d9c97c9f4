"""A run: a folder with what was asked, the newest checkpoint and the curve; the same call goes on where it stopped."""

from __future__ import annotations

import csv
import io
import json
import os
import sys
import zipfile
from dataclasses import asdict, dataclass
from math import isnan
from pathlib import Path
from statistics import fmean, median
from typing import Any

import torch

from kalman_rl.checks import is_whole
from kalman_rl.errors import ConfigError, NumericError, PlaceError, RunError, one_line, quote
from kalman_rl.palette import LIGHT, MUTED
from kalman_rl.reppo.environments import Environments, evaluate, make
from kalman_rl.reppo.learner import Learner
from kalman_rl.reppo.presets import PRESETS
from kalman_rl.reppo.settings import Settings
from kalman_rl.terminal import tell

OUTSIDE = 0.01
"""Share of targets outside the critic's range that is warned of."""
EVALUATION_SEED = 1_000_000


@dataclass(frozen=True)
class TrainingPlan:
    """What a run does.

    Args:
        env: name of the environment. steps: of the environment, over all copies. seed: of everything.
        settings: of the learner. copies, horizon: environments, and steps of each in a batch.
        evaluations: during the run, evenly spread; each saves. episodes: of one evaluation, without noise.
    """

    env: str
    steps: int
    seed: int
    settings: Settings
    copies: int = 8
    horizon: int = 128
    evaluations: int = 20
    episodes: int = 20

    def __post_init__(self) -> None:
        for name in ("steps", "copies", "horizon", "evaluations", "episodes"):
            value = getattr(self, name)
            if not is_whole(value, 1):
                raise ConfigError(f"{name}: got {quote(value, 40)}, expected a whole number of at least 1")
        if not is_whole(self.seed, 0, 2**31):
            raise ConfigError(f"seed: got {quote(self.seed, 40)}, expected a whole number from 0 to 2**31")


def settings_for(env: str, changes: dict[str, Any]) -> Settings:
    """Settings of a known environment with changes; of another one the range has to be among the changes.

    Raises: ConfigError, and what :func:`make` raises.
    """
    found = PRESETS.get(env, {}) | changes
    if "low" not in found or "high" not in found:
        make(env, {}).close()  # a name that does not exist is the first mistake
        raise ConfigError(
            f"{env[:80]}: got no range of the critic, expected low and high; rewards from a to b per step give "
            "a / (1 - gamma) to b / (1 - gamma), take a little more"
        )
    return Settings(**{name: value for name, value in found.items() if name != "horizon"})


def horizon_for(env: str) -> int:
    """Steps of each copy in a batch: the preset's, or 128."""
    return int(PRESETS.get(env, {}).get("horizon", 128))


def train(plan: TrainingPlan, folder: Path, *, quiet: bool = False) -> list[dict[str, float]]:
    """Train, evaluate and save; a folder with a checkpoint of the same plan goes on there, with new episodes.

    Args: folder: is made if it is not there. quiet: print nothing but warnings.
    Returns: rows of ``curve.csv``, one per evaluation.
    Raises: RunError if the folder holds another run or cannot be written; ConfigError, NumericError.
    """
    begin(plan, folder)
    step, rows, state = newest(folder)
    envs = Environments(plan.env, plan.copies, seed=1000 * plan.seed + step)
    learner = Learner(
        envs.inputs, envs.actions, discrete=envs.discrete, settings=plan.settings, seed=plan.seed
    )
    if state is not None:
        try:
            learner.load_state_dict(state)
        except (ConfigError, NumericError) as error:
            raise _damaged(folder / "checkpoint.pt", error) from error
        if not quiet:
            tell(f"{folder}: going on at step {step:,} of {plan.steps:,}")
    every, batch = plan.steps / plan.evaluations, plan.copies * plan.horizon
    warned = False
    while step < plan.steps:
        found = learner.update(envs.rollout(learner, plan.horizon))
        due = (step + batch) // every > step // every or step + batch >= plan.steps
        step += batch
        if found["outside"] > OUTSIDE and not warned:
            warned = True
            tell(
                f"{plan.env}: got {found['outside']:.0%} of the returns outside the critic's range "
                f"{plan.settings.low:g} to {plan.settings.high:g}, expected below 1 %; widen low and high, or lower "
                "reward_scale",
                error=True,
            )
        if due:
            returns = evaluate(
                plan.env,
                lambda seen: learner.act(seen, greedy=True)[0],
                episodes=plan.episodes,
                seed=EVALUATION_SEED,
            )
            last = envs.finished[-20:] or [float("nan")]
            rows.append(
                {"step": step, "return": fmean(returns), "median": median(returns), "lowest": min(returns)}
                | {"training_return": fmean(last)}
                | found
            )
            save(folder, step, rows, learner)
            if not quiet:
                tell(line(rows[-1], plan.steps), wipe=sys.stdout.isatty())
        elif not quiet and sys.stdout.isatty():
            tell(f"{plan.env}: step {step:,} of {plan.steps:,}", end="", wipe=True)
    envs.close()
    return rows


def line(row: dict[str, float], steps: int) -> str:
    """One evaluation as a line."""
    trained = row["training_return"]  # NaN until an episode is over
    training = "-" if isnan(trained) else f"{trained:.1f}"
    return (
        f"step {row['step']:>9,.0f} of {steps:,}   return {row['return']:9.1f}   "
        f"training {training:>9}   "
        f"KL {row['kl']:.3f}   gated {row['gated']:4.0%}   entropy {row['entropy']:6.2f}   outside {row['outside']:.1%}"
    )


def begin(plan: TrainingPlan, folder: Path) -> None:
    """Write ``run.json``, or check that it says the same. ``steps`` may grow.

    Raises: PlaceError.
    """
    asked = json.loads(json.dumps(asdict(plan)))
    file = folder / "run.json"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not file.exists():
            _replace(file, json.dumps(asked, indent=1).encode())
            return
        was = json.loads(file.read_text(encoding="utf-8"))
        flat = [
            {k: v for k, v in (p | p.get("settings", {})).items() if k != "settings"} for p in (was, asked)
        ]
    except RunError:
        raise
    except (AttributeError, OSError, TypeError, ValueError) as error:
        raise PlaceError(
            f"{file}: cannot be read or written ({one_line(error, 160)}); name another folder with --output"
        ) from error
    other = sorted(k for k in flat[1] if k != "steps" and flat[0].get(k) != flat[1][k])
    if other:
        name = other[0]
        raise PlaceError(
            f"{folder}: got a run with {name} {quote(flat[0].get(name))}, expected {quote(flat[1][name])}; name "
            "another folder with --output"
        )


def newest(folder: Path) -> tuple[int, list[dict[str, float]], dict[str, Any] | None]:
    """Step, rows and the learner's state of the checkpoint, or the beginning.

    Raises: RunError if it is damaged.
    """
    file = folder / "checkpoint.pt"
    if not file.exists():
        return 0, [], None
    try:
        with zipfile.ZipFile(file) as archive:  # torch does not compare the sums that it writes
            if archive.testzip() is not None:
                raise ValueError("a checksum is wrong")
        found = torch.load(file, weights_only=True)
        step, rows, learner = found["step"], found["rows"], found["learner"]
        if not (is_whole(step, 1) and rows and all("return" in row for row in rows)):
            raise ValueError("it holds no evaluation")
        return step, rows, learner
    except Exception as error:  # whatever a damaged archive makes torch raise
        raise _damaged(file, error) from error


def _damaged(file: Path, error: Exception) -> RunError:
    what = f"{type(error).__name__}: {one_line(error, 160)}"
    return RunError(f"{file}: got a damaged checkpoint ({what}); delete it to begin again")


def save(folder: Path, step: int, rows: list[dict[str, float]], learner: Learner) -> None:
    """Write ``curve.csv`` and ``checkpoint.pt``, each whole or not at all.

    The checkpoint comes last: a run that dies between the two makes the newest row of the curve again.

    Raises: RunError.
    """
    curve, checkpoint = io.StringIO(newline=""), io.BytesIO()
    writer = csv.DictWriter(curve, rows[-1], restval="", extrasaction="ignore")
    writer.writeheader()
    writer.writerows(rows)
    torch.save({"step": step, "rows": rows, "learner": learner.state_dict()}, checkpoint)
    _replace(folder / "curve.csv", curve.getvalue().encode())
    _replace(folder / "checkpoint.pt", checkpoint.getvalue())


def draw_curve(rows: list[dict[str, float]], title: str, file: Path) -> None:
    """Return over steps as a picture; needs the extra ``plot``. Raises: RunError."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.0, 3.4), layout="constrained")
    ax = figure.subplots()
    steps = [row["step"] for row in rows]
    ax.plot(steps, [row["return"] for row in rows], color=LIGHT[0], label="without noise, mean")
    ax.plot(steps, [row["lowest"] for row in rows], color=LIGHT[0], alpha=0.35, label="lowest episode")
    ax.plot(steps, [row["training_return"] for row in rows], color=MUTED, label="while training")
    ax.set_xlabel("steps of the environment")
    ax.set_ylabel("return")
    ax.set_title(title, fontsize="medium")
    ax.spines[["top", "right"]].set_visible(False)
    ax.legend(frameon=False, fontsize="small")
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=110)
    _replace(file, picture.getvalue())


def _replace(file: Path, data: bytes) -> None:
    """Write a file whole or not at all. Raises: RunError."""
    temporary = file.with_name(f".{file.name}")
    try:
        temporary.write_bytes(data)
        os.replace(temporary, file)
    except OSError as error:
        raise RunError(
            f"{file}: cannot be written ({error}); make room, the same command goes on; or name another folder"
        ) from error
