"""The stored numbers as markdown: tables, targets, and what the claims come to, in sentences made from them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from benchmarks.beliefs.claims import sentences
from benchmarks.beliefs.targets import TOLERANCE, find, verdicts
from benchmarks.intervals import Mean, text

Row = dict[str, Any]


def render(results: Row) -> str:
    """The whole report."""
    versions = ", ".join(f"{k} {v}" for k, v in results["versions"].items())
    head = [
        "# Beliefs about prompts and adaptive sampling, in simulation",
        "",
        f"`{results['command']}`, {results['date']}, seeds {results['seeds'][0]} to {results['seeds'][-1]}, "
        f"{results['seconds']:.0f} s in {results['jobs']} process(es). {versions}.",
        "",
        "Mean over seeds ± half of the 95 % t-interval. Every world is simulated; no language model was run. "
        "`ours` is the default belief with features, `ours_scalar` without, `ours_predictive` its prediction "
        "without the current group, `ours_beta` the discounted Beta belief (0/1 rewards only). `const` is the true "
        "mean of the pool, `ceiling` exact Bayes with everything known but the private parts. The other rows are "
        "our short readings of published formulas.",
        "",
    ]
    parts = [_claims(results), _targets(results), *(part(results) for part in _PARTS)]
    return "\n".join([*head, *(line for part in parts for line in part)]).rstrip() + "\n"


def _claims(results: Row) -> list[str]:
    out = ["## What the claims come to", ""]
    for claim, lines in sentences(results).items():
        out += [f"**{claim}**", "", *(f"- {line}" for line in lines), ""]
    return out


def _targets(results: Row) -> list[str]:
    rows = []
    for v in verdicts(results):
        if v.word != "not measured":
            rows.append([v.target.claim, v.target.setting, f"{v.target.goal:g}", _cell(v.got), v.word])
    if not rows:
        return []
    words = [row[-1].split(":")[0] for row in rows]
    counts = ", ".join(f"{words.count(w)} {w}" for w in ("inside", "better", "missed") if w in words)
    head = ["claim", "setting", "target", "measured", f"within {TOLERANCE:.0%}"]
    return [f"## Targets: {counts}", "", *_table(head, rows), ""]


def _clean(results: Row) -> list[str]:
    tasks = _of(results, "clean")
    if not tasks:
        return []
    names = ("const", "krpo", "js_loo", "ebpo", "spo_875", "beta_bank", "ours_beta", "ours_scalar")
    names += ("ours_predictive", "ours", "ceiling")
    rows = []
    for t in sorted(
        tasks,
        key=lambda t: (t["cell"]["group"] != 8, t["cell"]["group"], t["cell"]["noise"], t["cell"]["walk"]),
    ):
        c, r = t["cell"], t["rows"]
        rows.append(
            [str(c["group"]), f"{c['noise']:g}", f"{c['walk']:g}", f"{t['mse'][0]:.4f}"]
            + [_cell(r.get(n, {}).get("gain"), with_half=n == "ours") for n in names]
            + [_cell(r["ours"]["over_const"]), _cell(r["ours"].get("coverage"), digits=3)]
        )
    head = ["G", "noise", "drift", "group-mean MSE", *names, "ours / const", "coverage of 90 %"]
    out = ["## Baseline estimate: MSE of the group mean / MSE of the method", "", *_table(head, rows), ""]
    published = [
        [f"{t['cell']['group']}", f"{t['cell']['noise']:g}"]
        + [_cell(t["rows"][n]["gain"]) for n in ("kgrpo_d64_R0.01", "kgrpo_d128_R1")]
        for t in tasks
        if "kgrpo_d64_R0.01" in t["rows"]
    ]
    note = "K-GRPO as published (a new filter per prompt on response features; predicting before the own reward):"
    return [*out, note, "", *_table(["G", "noise", "d=64, R=0.01", "d=128, R=1"], published), ""]


def _long(results: Row) -> list[str]:
    names = ("const", "js_loo", "ebpo", "spo_875", "spo_960", "ours", "ceiling")
    rows = [
        [str(t["cell"]["group"]), f"{t['cell']['noise']:g}", f"{t['cell']['walk']:g}"]
        + [_cell(t["rows"][n]["gain"]) for n in names]
        + [_cell(t["rows"]["ours"]["over_const"]), _cell(t["rows"]["ours"]["over_krpo"])]
        for t in _of(results, "long")
    ]
    head = ["G", "noise", "drift", *names, "ours / const", "ours / krpo"]
    return _section("50 epochs, slow drift", head, rows)


def _cold(results: Row) -> list[str]:
    names = ("loo", "js_loo", "ebpo", "beta_bank", "ours_beta", "ours_scalar", "ours")
    rows = [
        [f"{t['cell']['noise']:g}", f"{t['cell']['share']:g}"]
        + [_cell(t["rows"].get(n, {}).get("first")) for n in names]
        for t in _of(results, "cold")
    ]
    return _section(
        "Cold start: epoch 0, with the very first batch", ["noise", "features' share", *names], rows
    )


def _wrong(results: Row) -> list[str]:
    names = (
        "const",
        "ebpo",
        "beta_bank",
        "fixed_Q1e-05",
        "fixed_Q0.001",
        "fixed_Q0.1",
        "krpo_constants",
        "ours",
    )
    rows = [
        [
            t["cell"]["label"],
            *(_cell(t["rows"].get(n, {}).get("gain")) for n in names),
            _cell(t["rows"]["ours"].get("coverage"), digits=3),
        ]
        for t in _of(results, "wrong")
    ]
    return _section(
        "Misspecified worlds, gain over the group mean (G=8)", ["world", *names, "coverage of 90 %"], rows
    )


def _weights(results: Row) -> list[str]:
    out: list[str] = []
    for t in _of(results, "weights"):
        names = [k for k in t["rows"][0] if k != "p"]
        rows = [[f"{r['p']:g}", *(f"{r[n]:.2f}" for n in names)] for r in t["rows"]]
        title = "Implied weight of a prompt, exact (rounds of 4, stop at the first mixed group, at most 32)"
        out += _section(title, ["p", *names], rows)
    return out


def _gradients(results: Row) -> list[str]:
    cos = ("loo", "krpo", "grpo_std", "js_loo", "spo_875", "ours", "oracle")
    ratio = ("js_loo", "spo_875", "beta_bank", "ours", "oracle")
    rows = []
    for t in sorted(_of(results, "clean"), key=lambda t: (t["cell"]["group"], t["cell"]["noise"])):
        r = t["rows"]
        if "cosine" in r["loo"]:
            rows.append(
                [str(t["cell"]["group"]), f"{t['cell']['noise']:g}"]
                + [f"{r[n]['cosine'][0]:.3f}" for n in cos]
                + [_cell(r[n]["error_ratio"]) for n in ratio]
                + [" / ".join(f"{r[n]['largest'][0]:.1f}" for n in ("krpo", "loo", "ours"))]
            )
    head = [
        "G",
        "noise",
        *(f"cos {n}" for n in cos),
        *(f"error ratio {n}" for n in ratio),
        "largest krpo / loo / ours",
    ]
    return _section("Gradients of a toy softmax: cosine, squared error of LOO / of the method", head, rows)


def _training(results: Row) -> list[str]:
    names = ("krpo", "grpo_std", "group_mean", "loo", "js_loo", "spo_875", "ours", "oracle")
    rows = [
        [str(t["cell"]["group"]), f"{t['cell']['noise']:g}", _cell(t["start"], digits=3)]
        + [f"{_cell(t['rows'][n]['final'], digits=3)} (lr {t['rows'][n]['rate']:g})" for n in names]
        for t in _of(results, "train")
    ]
    return _section("Closed-loop toy training, final true reward", ["G", "noise", "start", *names], rows)


def _allocation(results: Row) -> list[str]:
    out: list[str] = []
    for t in _of(results, "allocation"):
        rounds = find(results, "rounds", t["cell"])
        rows = []
        for name, r in {**t["rows"], **(rounds["rows"] if rounds else {})}.items():
            by = [f"{x:g}" for x in r.get("by_difficulty", [])] or ["-"] * 6
            rows.append(
                [
                    name,
                    _times(r["informative"]),
                    _times(r["gradient"]),
                    f"{r['n'][0]:.1f}",
                    f"{r['mixed'][0]:.3f}",
                    f"{r['cosine'][0]:.3f}",
                    *by,
                ]
            )
        head = ["rule [baseline]", "save: informative", "save: gradient", "mean n", "share mixed", "cos"]
        head += ["n at p<.02", ".02-.2", ".2-.5", ".5-.8", ".8-.98", ">.98"]
        out += _section(f"Completions saved against groups of 8: {t['cell']['pool']}", head, rows)
    return out


def _log_det(results: Row) -> list[str]:
    out: list[str] = []
    for t in _of(results, "log_det"):
        keys = [k for k in t["rows"][0] if k.startswith("p=")]
        rows = [
            [
                f"d={r['dim']}, R={r['R']:g}, threshold {r['threshold']:g}",
                *(f"{r[k][0]:.2f}, sd {r[k][1]:.2f}" for k in keys),
            ]
            for r in t["rows"]
        ]
        out += _section("The published log-det rule: completions at stop (cap 16)", ["setting", *keys], rows)
    return out


_PARTS: tuple[Callable[[Row], list[str]], ...] = (
    _clean,
    _long,
    _cold,
    _wrong,
    _weights,
    _gradients,
    _training,
    _allocation,
    _log_det,
)


def _of(results: Row, kind: str) -> list[Row]:
    return [t for t in results["tasks"] if t["kind"] == kind]


def _cell(value: Sequence[float] | None, digits: int | None = None, with_half: bool = True) -> str:
    if value is None:
        return "-"
    mean = Mean(*value)
    return text(mean if with_half else mean._replace(half=float("nan")), digits)


def _times(value: Sequence[float] | None) -> str:
    return "not reached" if value is None else f"x{_cell(value)}"


def _section(title: str, head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return [f"## {title}", "", *_table(head, rows), ""] if rows else []


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    return [*lines, *("| " + " | ".join(row) + " |" for row in rows)]
