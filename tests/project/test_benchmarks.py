"""Every module of the benchmarks still imports: a name that moved in the package must move here too."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_every_benchmark_imports() -> None:
    files = [path.relative_to(ROOT) for path in (ROOT / "benchmarks").rglob("*.py")]
    modules = sorted(".".join(path.with_suffix("").parts).removesuffix(".__init__") for path in files)
    assert "benchmarks.learning.ratio_filters" in modules
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", "\n".join(f"import {module}" for module in modules)],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
