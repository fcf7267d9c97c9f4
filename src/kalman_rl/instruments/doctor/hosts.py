"""Whether the hosts are the ones this package was written for: their private names, and the plugin in verl."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator
from importlib import metadata

from kalman_rl.errors import AdapterError
from kalman_rl.hooks import Host, moved
from kalman_rl.hosts.trl import hooks as trl
from kalman_rl.hosts.verl import hooks as verl
from kalman_rl.instruments.doctor.finding import Finding, PlannedRun, explain
from kalman_rl.kernels import hooks as kernels


def _of_the_engine(library: str) -> tuple[Host, ...]:
    """Nothing where the extra of the engine is not installed."""
    try:
        from kalman_rl.engine import hooks
    except AdapterError:
        return ()
    return tuple(host for host in (hooks.TORCH, hooks.TRANSFORMERS, hooks.TRL) if host.name == library)


HOOKS = {
    "torch": (trl.TORCH, kernels.TORCH, *_of_the_engine("torch")),
    "transformers": (trl.TRANSFORMERS, *_of_the_engine("transformers")),
    "trl": (trl.TRL, *_of_the_engine("trl")),
    "verl": (verl.VERL, verl.TRAINER, verl.ENGINE, verl.CPU),
}
SWITCH = "VERL_USE_EXTERNAL_PLUGINS"


def hooks(name: str, plan: PlannedRun) -> Iterator[Finding]:
    """Every private name of a library that this package relies on, against what was tested."""
    check = f"{name} hooks"
    if importlib.util.find_spec(name) is None:
        yield Finding(check, "ok", f"{name} is not installed, so there is nothing to compare")
        return
    changed = [(text, host) for host in HOOKS[name] for text in moved(host)]
    for text, host in changed:
        advice = f"pip install '{name}{host.tested}'"
        if host.otherwise:
            yield Finding(check, "warning", f"{text}; {host.otherwise}", advice)
        else:
            yield Finding(check, "problem", text, advice)
    if not changed:
        count = sum(len(names) for host in HOOKS[name] for names in host.hooks.values())
        yield Finding(check, "ok", f"{count} names are as tested")


def plugin(plan: PlannedRun) -> Iterator[Finding]:
    """Is our plugin declared, allowed, importable, and in verl's tables? verl itself hides failures of plugins."""
    if importlib.util.find_spec("verl") is None:
        yield Finding("verl plugin", "ok", "verl is not installed, so there is nothing to load")
        return
    declared = [e for e in metadata.entry_points(group="verl.plugins") if e.value.startswith("kalman_rl")]
    if not declared:
        found = "plugin not installed: no entry point of verl.plugins names kalman_rl"
        advice = "reinstall kalman-rl, or set VERL_USE_EXTERNAL_MODULES=kalman_rl.hosts.verl"
        yield Finding("verl plugin", "warning", found, advice)
        return
    policy = os.environ.get(SWITCH, "auto").strip().lower()
    if policy != "auto" and declared[0].name not in {name.strip() for name in policy.split(",")}:
        yield Finding("verl plugin", "warning", f"switched off by {SWITCH}={policy}", f"unset {SWITCH}")
        return
    try:
        declared[0].load()
        from kalman_rl.hosts.verl import registered

        losses, estimators = registered().values()
    except BaseException as error:
        yield Finding("verl plugin", "problem", f"{declared[0].value} does not import: {explain(error)}")
        return
    if losses:
        found = f"{len(losses)} losses and {len(estimators)} advantage estimators, such as {losses[0]}"
        yield Finding("verl plugin", "ok", found)
    else:
        found = "loaded, but verl does not know any loss of it"
        yield Finding("verl plugin", "problem", found, "another plugin may have replaced verl's registry")
