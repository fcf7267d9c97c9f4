"""Versions of Python and of the host libraries, against the ranges that the package's own metadata declares."""

from __future__ import annotations

import importlib
import importlib.util
import platform
import re
import sys
from collections.abc import Iterator
from importlib import metadata
from itertools import zip_longest
from typing import NamedTuple

from kalman_rl.instruments.doctor.finding import Finding, PlannedRun, explain

PACKAGE = "kalman-rl"
LIBRARIES = ("torch", "numba", "triton", "accelerate", "transformers", "trl", "verl")
EXTRAS = ("", "trl", "verl", "fast", "test")  # what a library may be needed for; "": always


class Need(NamedTuple):
    """Range of a library as declared ("" if none), and the extra that asks for it ("": always needed; None: no one)."""

    range: str
    extra: str | None


def python(plan: PlannedRun) -> Iterator[Finding]:
    """This Python against Requires-Python."""
    version = platform.python_version()
    try:
        declared = metadata.metadata(PACKAGE)["Requires-Python"] or ""
    except Exception as error:  # not installed, or damaged in one of many ways
        found = f"{version}; no ranges are known: {explain(error)}"
        yield Finding("python", "warning", found, f"pip install {PACKAGE} (an editable install will do)")
        return
    found = f"{version} ({sys.executable}), expected {declared or 'any'}"
    if inside(version, declared) is False:
        yield Finding("python", "problem", found, f"take {declared}")
    else:
        yield Finding("python", "ok", found)


def declared(name: str, plan: PlannedRun) -> Iterator[Finding]:
    """One library by its metadata: is it there, and in the declared range?"""
    need, installed = declared_need(name), _installed(name)
    if installed is None and importlib.util.find_spec(name) is None:
        extra = f"pip install '{PACKAGE}[{need.extra}]'"
        if need.extra is None:
            yield Finding(name, "ok", "not installed; optional")
        elif not need.extra:
            yield Finding(name, "problem", "not installed", f"pip install '{name}{need.range}'")
        elif need.extra == "trl":
            yield Finding(name, "warning", "not installed; training through TRL needs it", extra)
        else:
            yield Finding(name, "ok", f"not installed; optional ({extra})")
        return
    found = (installed or "of unknown version") + (f", expected {need.range}" if need.range else "")
    if installed and inside(installed, need.range) is False:
        tests_only = need.extra == "test"  # its ranges are what is tested here, not what works
        advice = f"pip install '{name}{need.range}'"
        yield Finding(name, "warning" if tests_only else "problem", found, advice)
    else:
        yield Finding(name, "ok", found)


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
        advice = "two copies are mixed up: remove the one that should not be found first"
        yield Finding(name, "warning", found, advice)


def declared_need(name: str) -> Need:
    """What the installed metadata of this package asks of a library."""
    try:
        lines = metadata.metadata(PACKAGE).get_all("Requires-Dist") or []
    except Exception:  # no metadata: the check of Python says so once
        lines = []
    needs: dict[str, str] = {}
    for line in lines:
        requirement, _, marker = line.partition(";")
        found = re.match(r"([\w.-]+)\s*(?:\[.*\])?\s*(.*)", requirement)
        extra = re.search(r"""extra\s*==\s*['"]([\w-]+)""", marker)
        if found is not None and found[1] == name:
            needs.setdefault(extra[1] if extra else "", found[2].strip())
    return next((Need(needs[extra], extra) for extra in EXTRAS if extra in needs), Need("", None))


def inside(version: str, declared: str) -> bool | None:
    """Whether a version lies in a range; None if that cannot be told. A pre-release counts as its release.

    Read here because the base install has no package for it.

    >>> inside("2.13.0+cpu", ">=2.7"), inside("1.17.0", "==1.16.*"), inside("?", ">=1")
    (True, False, None)
    """
    release = re.match(r"\d+(?:\.\d+)*", version)
    clauses = [
        re.fullmatch(r"(>=|<=|==|!=|<|>)\s*(\d+(?:\.\d+)*)(\.\*)?", part.strip())
        for part in declared.split(",")
    ]
    if not declared:
        clauses = []
    if release is None or None in clauses:
        return None
    got = _numbers(release[0])
    return all(_satisfies(got, *clause.groups()) for clause in clauses if clause is not None)


def _numbers(release: str) -> list[int]:
    return [int(part) for part in release.split(".")]


def _satisfies(got: list[int], sign: str, bound: str, star: str | None) -> bool:
    """One clause of a range, such as ``>=2.7`` or ``==1.16.*``."""
    wanted = _numbers(bound)
    if star:
        got = got[: len(wanted)]
    pairs = list(zip_longest(got, wanted, fillvalue=0))
    left, right = [pair[0] for pair in pairs], [pair[1] for pair in pairs]
    return {
        ">=": left >= right,
        "<=": left <= right,
        "==": left == right,
        "!=": left != right,
        "<": left < right,
        ">": left > right,
    }[sign]


def _installed(name: str) -> str | None:
    try:
        return str(metadata.version(name) or "") or None
    except Exception:  # not installed, or its metadata is damaged: the import will tell
        return None
