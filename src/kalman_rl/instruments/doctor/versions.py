"""Versions of Python and of the host libraries, against the ranges that the package's own metadata declares."""

from __future__ import annotations

import importlib
import importlib.util
import platform
import sys
from collections.abc import Iterator
from importlib import metadata
from typing import Any, NamedTuple

from kalman_rl.instruments.doctor.finding import Finding, PlannedRun, explain

PACKAGE = "kalman-rl"
LIBRARIES = ("torch", "numba", "triton", "accelerate", "transformers", "trl", "verl")
_OUR_TESTS = {"test", "dev"}  # their ranges say what is tested here, not what works


class Need(NamedTuple):
    """Range of a library as declared ("" if none), and the extras that ask for it, smallest first (none: always)."""

    range: str
    extras: tuple[str, ...]


def python() -> Iterator[Finding]:
    """This Python against Requires-Python."""
    version = platform.python_version()
    try:
        declared = next(iter(metadata.metadata(PACKAGE).get_all("Requires-Python") or ()), "")
    except metadata.PackageNotFoundError:
        yield Finding(
            "python",
            "warning",
            f"{version}; {PACKAGE} is not installed, only on the path, so no ranges are known",
            "pip install it (an editable install will do)",
        )
        return
    except Exception as error:  # metadata can be damaged in many ways
        yield Finding(
            "python", "problem", f"{version}; metadata of {PACKAGE}: {explain(error)}", "reinstall it"
        )
        return
    fits = inside(version, declared)
    found = f"{version} ({sys.executable}), expected {declared or 'any'}"
    yield Finding(
        "python", "ok" if fits is not False else "problem", found, "" if fits else f"take {declared}"
    )


def library(name: str) -> Finding:
    """One library by its metadata: is it there, and in the declared range?"""
    need = declared_need(name)
    installed = _installed(name)
    if installed is None and importlib.util.find_spec(name) is None:
        return _absent(name, need)
    found = f"{installed or 'of unknown version'}" + (f", expected {need.range}" if need.range else "")
    if installed and inside(installed, need.range) is False:
        tests_only = need.extras and not set(need.extras) - _OUR_TESTS
        return Finding(
            name, "warning" if tests_only else "problem", found, f"pip install '{name}{need.range}'"
        )
    return Finding(name, "ok", found)


def imported(name: str, plan: PlannedRun) -> Iterator[Finding]:
    """What is wrong with a library once it is imported; nothing if it is fine or absent."""
    if importlib.util.find_spec(name) is None:
        return
    try:
        module = importlib.import_module(name)
    except BaseException as error:  # SystemExit too: whatever happens is what we came to see
        advice = f"pip install --force-reinstall '{name}{declared_need(name).range}'"
        yield Finding(name, "problem", f"importing it failed: {explain(error)}", advice)
        return
    installed, version = (
        str(v or "").partition("+")[0] for v in (_installed(name), getattr(module, "__version__", ""))
    )
    if installed and version and version != installed:
        where = getattr(module, "__file__", "nowhere")
        found = f"{installed} is installed, but what imports is {version} from {where}"
        yield Finding(
            name, "warning", found, "two copies are mixed up: remove the one that should not be found first"
        )


def declared_need(name: str) -> Need:
    """What the installed metadata of this package asks of a library."""
    try:
        from packaging.requirements import Requirement

        about = metadata.metadata(PACKAGE)
        needs = list(map(Requirement, about.get_all("Requires-Dist") or []))
        extras = about.get_all("Provides-Extra") or []
    except Exception:  # the check of Python says so once
        return Need("", ("unknown",))
    wanted = [item for item in needs if item.name == name]
    if any(item.marker is None for item in wanted):
        return Need(str(wanted[0].specifier), ())
    brings = {
        e: [n.name for n in needs if n.marker is not None and n.marker.evaluate({"extra": e})] for e in extras
    }
    asking = sorted((e for e in extras if name in brings[e]), key=lambda e: len(brings[e]))
    ranges = list(dict.fromkeys(str(item.specifier) for item in wanted))
    return Need(",".join(ranges), tuple(asking))


def inside(version: str, declared: str) -> bool | None:
    """Whether a version lies in a range; None if that cannot be told.

    >>> inside("2.13.0+cpu", ">=2.7"), inside("1.17.0", "==1.16.*"), inside("?", ">=1")
    (True, False, None)
    """
    try:
        from packaging.specifiers import SpecifierSet
        from packaging.version import Version

        return SpecifierSet(declared).contains(Version(version), prereleases=True)
    except Exception:  # no packaging, or not a version
        return None


def _installed(name: str) -> str | None:
    try:
        version: Any = metadata.version(name)
    except Exception:  # not installed, or its metadata is damaged: the import will tell
        return None
    return str(version) if version else None


def _absent(name: str, need: Need) -> Finding:
    if not need.extras:
        return Finding(name, "problem", "not installed", f"pip install '{name}{need.range}'")
    extra = next((e for e in need.extras if e not in _OUR_TESTS), need.extras[0])
    advice = f"pip install '{PACKAGE}[{extra}]'"
    if "trl" in need.extras:
        return Finding(name, "warning", "not installed; training through TRL needs it", advice)
    return Finding(name, "ok", f"not installed; optional ({advice})")
