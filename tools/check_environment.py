"""Is this the tested environment? Exit status 1 with one line per problem if not.

Compares what is installed with ``constraints.txt`` and with the extras of the installed ``kalman-rl``, and
refuses a CUDA build of torch on a machine without a GPU (gigabytes that cannot be used, often an accident).

    .venv/bin/python tools/check_environment.py
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).resolve().parent.parent
EXTRAS = ("trl", "verl", "app", "fast", "board", "test", "dev")
REPAIR = "run `make clean install`"


def read_pins(text: str) -> dict[str, Version]:
    """Name to version of every ``name==version`` line."""
    lines = (line.partition("#")[0].strip() for line in text.splitlines())
    pins = (line.split("==") for line in lines if line)
    return {canonicalize_name(name): Version(version) for name, version in pins}


def installed_versions() -> dict[str, Version]:
    """Name to version of every distribution this interpreter sees."""
    return {canonicalize_name(d.metadata["Name"]): Version(d.version) for d in metadata.distributions()}


def required_names(distribution: str, extras: Iterable[str]) -> set[str]:
    """Names of what ``distribution`` requires here, with these extras."""
    requirements = map(Requirement, metadata.requires(distribution) or [])
    environments = [{"extra": extra} for extra in ("", *extras)]
    wanted: set[str] = {
        canonicalize_name(r.name)
        for r in requirements
        if r.marker is None or any(r.marker.evaluate(environment) for environment in environments)
    }
    return wanted - {canonicalize_name(distribution)}


def version_problems(
    pins: Mapping[str, Version], installed: Mapping[str, Version], required: Iterable[str]
) -> list[str]:
    """One line per missing package and per version that was not tested; local parts (+cpu) do not count."""
    missing = [
        f"{name}: got nothing, expected it to be installed; {REPAIR}"
        for name in sorted(required)
        if name not in installed
    ]
    other = [
        f"{name}: got {installed[name]}, expected {pin} (constraints.txt); {REPAIR}"
        for name, pin in sorted(pins.items())
        if name in installed and Version(installed[name].public) != pin
    ]
    return missing + other


def build_problems(cuda_build: str | None, gpu: bool) -> list[str]:
    """A CUDA build is fine with a GPU only."""
    if cuda_build is None or gpu:
        return []
    return [
        f"torch: got a build for CUDA {cuda_build}, expected the CPU build as no GPU is seen; "
        "run `make clean`, then `make install TORCH=FILE` with the CPU wheel of this version"
    ]


def main() -> int:
    """Print the problems, or one line saying what was found."""
    pins = read_pins((ROOT / "constraints.txt").read_text(encoding="utf-8"))
    installed = installed_versions()
    try:
        required = required_names("kalman-rl", EXTRAS)
    except metadata.PackageNotFoundError:
        print("kalman-rl: got nothing, expected it to be installed; run `make install`", file=sys.stderr)
        return 1
    problems = version_problems(pins, installed, required)
    if "torch" in installed:
        import torch

        problems += build_problems(torch.version.cuda, torch.cuda.is_available())
    for problem in problems:
        print(problem, file=sys.stderr)
    if not problems:
        shown = ", ".join(f"{name} {installed[name]}" for name in ("torch", "transformers", "trl"))
        count = sum(name in installed for name in pins)
        print(f"environment: python {sys.version.split()[0]}, {shown}; {count} packages as tested")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
