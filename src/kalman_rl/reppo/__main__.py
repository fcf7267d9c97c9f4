"""``python -m kalman_rl.reppo --env Pendulum-v1 --steps 200000 --seed 0``: train, evaluate, save; again to go on."""

from __future__ import annotations

import argparse
import sys
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

import torch

from kalman_rl.errors import KalmanRLError, exit_code
from kalman_rl.reppo.presets import PRESETS
from kalman_rl.reppo.settings import Settings
from kalman_rl.terminal import tell


def parser() -> argparse.ArgumentParser:
    """The command line; every setting of the learner is an option."""
    found = argparse.ArgumentParser(prog="python -m kalman_rl.reppo", description=__doc__, allow_abbrev=False)
    known = ", ".join(PRESETS)
    found.add_argument(
        "--env", required=True, help=f"an environment of gymnasium; with settings of its own: {known}"
    )
    found.add_argument("--steps", type=int, required=True, help="of the environment, over all copies")
    found.add_argument("--seed", type=int, default=0)
    found.add_argument("--output", type=Path, help="folder of the run; default runs/reppo/ENV-SEED")
    found.add_argument("--copies", type=int, default=8, help="environments that are stepped together")
    found.add_argument("--horizon", type=int, help="steps of each in a batch; default 128, or the preset's")
    found.add_argument("--evaluations", type=int, default=20, help="evenly spread; each saves")
    found.add_argument("--episodes", type=int, default=20, help="of one evaluation, without noise")
    group = found.add_argument_group(
        "settings of the learner",
        "What each does: help(kalman_rl.reppo.Settings). An environment may have its own.",
    )
    for field in fields(Settings):
        name, kind = "--" + field.name.replace("_", "-"), str(field.type)
        if kind == "bool":
            group.add_argument(name, action="store_true", default=None)
        else:
            kinds: dict[str, Any] = {"int": int, "str": str}
            usual = "needed without a preset" if field.default is MISSING else f"default {field.default}"
            group.add_argument(name, type=kinds.get(kind, float), default=None, help=usual)
    return found


def main(arguments: list[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    args = vars(parser().parse_args(arguments))
    changes = {f.name: args.pop(f.name) for f in fields(Settings)}
    output = args.pop("output")
    try:
        from kalman_rl.reppo import training

        torch.set_num_threads(1)  # networks of this size gain nothing from more
        settings = training.settings_for(args["env"], {k: v for k, v in changes.items() if v is not None})
        if args["horizon"] is None:
            args["horizon"] = training.horizon_for(args["env"])
        plan = training.TrainingPlan(**args, settings=settings)
        folder = output or Path("runs") / "reppo" / f"{plan.env.replace('/', '-')}-{plan.seed}"
        rows = training.train(plan, folder)
        tell(
            f"{plan.env}: return {rows[-1]['return']:.1f} after {rows[-1]['step']:,} steps; curve in {folder}"
        )
        try:
            training.draw_curve(rows, f"{plan.env}, seed {plan.seed}", folder / "curve.png")
        except ModuleNotFoundError:
            tell(f"{folder / 'curve.csv'}: no picture without matplotlib; pip install 'kalman-rl[plot]'")
    except KalmanRLError as error:
        tell(f"reppo: {error}", error=True)
        return exit_code(error)
    except KeyboardInterrupt:
        tell("reppo: stopped; the same command goes on at the last evaluation", error=True)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
