"""Whether the hosts are the ones the adapters were written for: hooks of TRL's trainer, the plugin in verl."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator
from importlib import metadata

from kalman_rl.hosts.trl import hooks as trl_hooks
from kalman_rl.instruments.doctor.finding import Finding, Plan, explain

GROUP = "verl.plugins"
SWITCH = "VERL_USE_EXTERNAL_PLUGINS"


def hooks(plan: Plan) -> Iterator[Finding]:
    """Every method of TRL's trainer that ours overrides or calls, against the signature it was tested with."""
    if importlib.util.find_spec("trl") is None:
        yield Finding("trl hooks", "ok", "TRL is not installed, so there is nothing to compare")
        return
    from trl import GRPOTrainer

    moved = trl_hooks.moved(GRPOTrainer)
    for text in moved:
        advice = f"pip install 'trl=={trl_hooks.TESTED_TRL}.*'"
        yield Finding("trl hooks", "problem", text, advice)
    if not moved:
        count = len(trl_hooks.HOOKS)
        yield Finding("trl hooks", "ok", f"{count} methods of GRPOTrainer have the signatures expected")


def plugin(plan: Plan) -> Iterator[Finding]:
    """Is our plugin declared, allowed, importable, and in verl's tables? verl itself hides failures of plugins."""
    if importlib.util.find_spec("verl") is None:
        yield Finding("verl plugin", "ok", "verl is not installed, so there is nothing to load")
        return
    declared = [e for e in metadata.entry_points(group=GROUP) if e.value.startswith("kalman_rl")]
    if not declared:
        yield Finding(
            "verl plugin",
            "warning",
            f"plugin not installed: no entry point of group {GROUP} names kalman_rl, so verl knows none of our losses",
            "reinstall kalman-rl, or set VERL_USE_EXTERNAL_MODULES=kalman_rl.hosts.verl",
        )
        return
    entry = declared[0]
    policy = os.environ.get(SWITCH, "auto").strip().lower()
    if policy != "auto" and entry.name not in {name.strip() for name in policy.split(",")}:
        yield Finding("verl plugin", "warning", f"switched off by {SWITCH}={policy}", f"unset {SWITCH}")
        return
    try:
        entry.load()
    except BaseException as error:
        yield Finding("verl plugin", "problem", f"{entry.value} does not import: {explain(error)}")
        return
    try:
        from verl.trainer.ppo.core_algos import POLICY_LOSS_REGISTRY

        from kalman_rl.hosts.verl import registered  # type: ignore[import-not-found,unused-ignore]

        names = registered()
        missing = sorted(set(names["losses"]) - set(POLICY_LOSS_REGISTRY))
    except BaseException as error:
        yield Finding("verl plugin", "problem", f"loaded, but its tables cannot be read: {explain(error)}")
        return
    if missing or not names["losses"]:
        found = f"loaded, but verl does not know {', '.join(missing[:5]) or 'any loss of it'}"
        yield Finding("verl plugin", "problem", found, "another plugin may have replaced verl's registry")
    else:
        counts = f"{len(names['losses'])} losses and {len(names['estimators'])} advantage estimators"
        yield Finding("verl plugin", "ok", f"{counts}, such as {sorted(names['losses'])[0]}")
