"""What ``benchmarks.speed.cpu`` writes: tables, a figure, and where the published arithmetic breaks."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.speed.interleaved import Row, table
from benchmarks.speed.published import kpo_filter
from benchmarks.speed.recursion import Q, R, batch, reference
from kalman_rl.numerics.kalman import causal_mean
from kalman_rl.palette import LIGHT, MUTED


def where_it_breaks() -> list[str]:
    """The published filter's float32 arithmetic on 8 full rows of N(0.5, 1), against the definition."""
    lines = [
        "| Q / R | T | published: NaN | from token | error > 0.01 from token | largest error (finite) | ours |",
        "|---|---|---|---|---|---|---|",
    ]
    for q in (1e-7, 1e-6, 1e-4, 1e-2, 1.0):
        for length in (1024, 16384):
            z = torch.randn(8, length, generator=torch.Generator().manual_seed(0)) + 0.5
            mask = torch.ones(8, length, dtype=torch.bool)
            exact = reference(z, mask, q, 1.0)
            ours = np.abs(causal_mean(z, mask, process_noise=q, observation_noise=1.0).numpy() - exact).max()
            theirs = kpo_filter(z, mask, q, 1.0).numpy()
            bad, error = np.isnan(theirs), np.abs(np.nan_to_num(theirs - exact))
            first = [np.flatnonzero(flags.any(0))[:1] + 1 for flags in (bad, error > 1e-2)]
            cells = [" ".join(map(str, f)) or "-" for f in first]
            worst = "-" if bad.all() else f"{error.max():.1e}"
            lines.append(
                f"| {q:g} | {length} | {bad.mean():.0%} | {cells[0]} | {cells[1]} | {worst} | {ours:.1e} |"
            )
    z, mask, holes = batch(8, 4096)
    z = torch.where(mask, z, 0.0)
    gap = np.abs(kpo_filter(z, holes, Q, R).numpy() - reference(z, holes, Q, R))[holes.numpy()]
    lines += [
        "",
        f"30 % holes at Q / R = {Q:g}: a hole counts as an observation of 0, so the published filter is ",
    ]
    lines[-1] += f"off by {gap.mean():.2f} on average and {gap.max():.2f} at most, on values around 0.5."
    return lines


def render(results: dict[str, Any]) -> str:
    rows = [Row(**row) for row in results["rows"]]
    about = results["machine"]
    lines = [
        "# Speed on one CPU thread",
        "",
        f"`{results['command']}` on {about['cpu']}, {about['cores']} cores, load "
        f"{about['load'][0]:.1f} to {about['load'][1]:.1f}, {results['date']}; "
        + ", ".join(f"{name} {number}" for name, number in results["versions"].items())
        + ".",
        "Ratios of processor time: medians over interleaved rounds in one process, quartiles in brackets.",
        "",
        table(rows),
        "",
        *(f"- {line}" for line in results["skipped"]),
        "",
        "## Where the published arithmetic breaks",
        "",
        *results["breaks"],
        "",
        f"First call in a fresh process: {results['cold']}.",
    ]
    return "\n".join(lines) + "\n"


def cold_start() -> str:
    """Seconds of the first filter in a fresh process: with empty cache, and with machine code at hand."""
    code = (
        "import time, torch; from kalman_rl.numerics.kalman import causal_mean; z = torch.ones(4, 64); "
        "s = time.time(); causal_mean(z, z > 0, process_noise=1.0, observation_noise=1.0); print(time.time() - s)"
    )
    with tempfile.TemporaryDirectory() as cache:
        environment = {**os.environ, "NUMBA_CACHE_DIR": cache}
        seconds = [
            float(subprocess.check_output([sys.executable, "-c", code], env=environment)) for _ in range(2)
        ]
    return f"{seconds[0]:.1f} s to compile, {seconds[1]:.2f} s with the cache (import of numba included)"


def draw(rows: Sequence[Row], path: Path) -> None:
    """Every promised row as its margin to the target; right of 1 is better than promised."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    shown = [row for row in rows if row.target is not None]
    figure, axes = plt.subplots(figsize=(9, 0.32 * len(shown) + 1.2))
    for place, row in enumerate(reversed(shown)):
        margins = [row.target / v if row.smaller else v / row.target for v in (row.low, row.ratio, row.high)]
        axes.plot([margins[0], margins[2]], [place, place], color=MUTED, linewidth=3)
        axes.plot(margins[1], place, "o", color=LIGHT[2] if row.holds else LIGHT[1])
    names = [f"{row.name} / {row.peer}, {row.case}" for row in reversed(shown)]
    axes.set_yticks(range(len(shown)), names, fontsize=7)
    axes.axvline(1.0, color="black", linewidth=1)
    axes.set_xscale("log")
    axes.set_xticks([1, 2, 5, 10], ["1", "2", "5", "10"])
    axes.xaxis.set_minor_formatter("")
    axes.set_xlabel("times better than the target (median, quartiles)")
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    plt.close(figure)


def cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()
