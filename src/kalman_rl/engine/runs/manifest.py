"""What a run was made with (versions, machine, commit), and what must not be written about it (secrets)."""

from __future__ import annotations

import contextlib
import os
import platform
import re
import subprocess
from collections.abc import Mapping
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from kalman_rl.engine.runs.files import FORMAT
from kalman_rl.terminal import without_secrets

_SECRET = re.compile(r"_(KEY|TOKEN|SECRET|PASSWORD)$", re.IGNORECASE)


def new_manifest(labels: Mapping[str, Any]) -> dict[str, Any]:
    """The manifest that a run starts with."""
    return {
        "format": FORMAT,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "status": "running",
        "seed": labels.get("seed"),
        "labels": dict(labels),
        "versions": versions(),
        "dtype": None,
        "device": None,
        "threads": None,
        "platform": platform.platform(),
        "cpu": _cpu(),
        "git": _git(),
        "pid": os.getpid(),
        "folder": os.getcwd(),
        "seconds": 0.0,
    }


def versions() -> dict[str, str]:
    """Versions of Python and the packages that training rests on."""
    found = {"python": platform.python_version()}
    for package in ("kalman-rl", "torch", "transformers", "trl", "peft"):
        with contextlib.suppress(PackageNotFoundError):
            found[package.replace("-", "_")] = version(package)
    return found


def _cpu() -> str:
    with contextlib.suppress(OSError, UnicodeDecodeError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _git() -> dict[str, Any] | None:
    """Commit of the working directory's repository and whether files differ from it; None outside of one."""

    def ask(*words: str) -> str:
        command = ["git", "-c", "core.fsmonitor=false", "--no-optional-locks", *words]
        return subprocess.run(command, capture_output=True, text=True, timeout=5, check=True).stdout.strip()

    try:
        return {"commit": ask("rev-parse", "HEAD"), "dirty": bool(ask("status", "--porcelain"))}
    except (OSError, ValueError, subprocess.SubprocessError):
        return None


def redacted(value: Any) -> Any:
    """``value`` without secrets: entries named like ``*_TOKEN``, values of such environment variables."""
    if isinstance(value, Mapping):
        return {k: "[redacted]" if _SECRET.search(str(k)) else redacted(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [redacted(item) for item in value]
    if isinstance(value, str):
        return without_secrets(value)
    return value


def redacted_toml(text: str) -> str:
    """TOML text without the values of keys, tokens, secrets and passwords."""
    pattern = r"(?im)^(\s*[\w.-]*_(?:key|token|secret|password)\s*=).*$"
    return str(redacted(re.sub(pattern, r'\1 "[redacted]"', text)))
