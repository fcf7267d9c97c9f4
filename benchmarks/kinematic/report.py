"""Tables, verdicts and one figure of the stored numbers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.intervals import Mean, text
from benchmarks.kinematic import decision, series, truth
from benchmarks.kinematic.controls import controls
from kalman_rl.palette import INK, LIGHT

Stored = dict[str, Any]


def report(stored: Stored) -> str:
    """What is stored, as Markdown."""
    titles = {letter: control.title for letter, control in controls(decision.INTENSITY).items()}
    lines = ["`python -m benchmarks.kinematic`; ± is the 95 % interval of Student's t over five seeds.", ""]
    for part in (_truth(stored), _decision(stored, titles), _series(stored, titles), _verdicts(stored)):
        lines += [*part, ""]
    return "\n".join(lines).rstrip() + "\n"


def _row(*cells: object) -> str:
    return "| " + " | ".join(str(cell) for cell in cells) + " |"


def _head(*names: str) -> list[str]:
    return [_row(*names), "|---" * len(names) + "|"]


def _truth(stored: Stored) -> list[str]:
    kinds = [kind for kind in truth.KINDS if f"truth {kind}" in stored]
    if not kinds:
        return []
    lines = [
        "## Known paths",
        "",
        "Root mean square error of velocity, and of acceleration after the comma, noise 1, 100 knots, 20 series a "
        "seed; a dash where the path has none. Strides and windows are the best ones for the truth. `lag L` knows L "
        "knots more.",
        "",
        *_head("path", *truth.METHODS),
    ]
    found = {kind: truth.summary(stored[f"truth {kind}"], kind) for kind in kinds}
    for kind in kinds:
        cells = [f"{text(v, 3)}, {text(a, 3)}" for v, a in (found[kind][name] for name in truth.METHODS)]
        lines.append(_row(kind, *cells))
    lines += ["", *_head("path", "95 % band of x holds", "of v", "innovation squared")]
    for kind in kinds:
        x, v = found[kind]["coverage"]
        lines.append(_row(kind, text(x, 3), text(v, 3), text(found[kind]["nis"][0], 3)))
    return lines


def _cells(stored: Stored, irregular: bool) -> list[Stored]:
    names = [
        f"decision {size}{' irregular' if odd else ''}" for size, odd in decision.CELLS if odd is irregular
    ]
    return [stored[name] for name in names if name in stored]


def _decision(stored: Stored, titles: dict[str, str]) -> list[str]:
    lines: list[str] = []
    for irregular in (False, True):
        cells = _cells(stored, irregular)
        if not cells:
            continue
        found = [decision.summary(cell) for cell in cells]
        title = "irregular times, where tokens are no fixed linear map" if irregular else "regular grid"
        lines += [
            f"## Decision, {title}",
            "",
            f"Regret against the Bayes rule, whose expected utility is {cells[0]['bayes']:.3f} and which acts in "
            f"{cells[0]['bayes_acts']:.0%} of cases; never acting has that regret. In brackets: share of cases it "
            "acts in, share of seeds that act in less than 1 %.",
            "",
            *_head("control", *(f"{cell['size']} windows" for cell in cells)),
        ]
        for letter in found[0]:
            row = [each[letter] for each in found]
            parts = [f"{text(r['regret'], 3)} ({r['acts'].mean:.0%}, {r['collapsed']:.0%})" for r in row]
            lines.append(_row(f"{letter}: {titles[letter]}", *parts))
        lines += ["", "Regret minus that of b, paired by seed:", ""]
        lines += _head("control", *(f"{cell['size']} windows" for cell in cells))
        for letter in found[0]:
            if letter != "b":
                row = [text(each[letter]["minus_b"], 3) for each in found]
                lines.append(_row(f"{letter}: {titles[letter]}", *row))
        largest = f"{cells[-1]['size']} windows"
        lines += [
            "",
            f"Risk and coverage: mean utility of acting on the surest share of cases, {largest}:",
            "",
        ]
        lines += _head("control", *(f"{share:.0%}" for share in decision.SHARES))
        for letter, each in found[-1].items():
            lines.append(_row(f"{letter}: {titles[letter]}", *(text(part, 2) for part in each["coverage"])))
        lines.append("")
    if "tuning" in stored:
        rates = decision.tuned(stored["tuning"])
        chosen = ", ".join(f"{letter} {rate[0]:g}" for letter, rate in rates.items())
        lines.append(f"Learning rates, chosen on seeds 1 and 2 among the same three for each: {chosen}.")
    return lines


def _walks(stored: Stored) -> list[Stored]:
    return [stored[f"series {name}"] for name in series.SHIPPED if f"series {name}" in stored]


def _mean(values: Any) -> Mean:
    return Mean(*values)


def _series(stored: Stored, titles: dict[str, str]) -> list[str]:
    walks = _walks(stored)
    if not walks:
        return []
    lines = [
        "## Shipped series",
        "",
        "Net payoff per step after costs, in deviations of a step; ± over ten stretches of time, five networks "
        "averaged. In brackets: the share of steps in which it acts. The null has the same changes, centred, in random "
        "order.",
        "",
        *_head("series", "steps", "log10 q/R", "hold", *(f"{k}: {title}" for k, title in titles.items())),
    ]
    for walk in walks:
        for kind in ("real", "null"):
            part = walk[kind]
            cells = [
                f"{text(_mean(part['table'][k]['net']), 3)} ({part['table'][k]['acts']:.0%})"
                for k in ("hold", *titles)
            ]
            name = walk["name"] if kind == "real" else "its null"
            lines.append(_row(name, part["steps"], f"{part['log10_ratio']:.1f}", *cells))
    lines += [
        "",
        "b and f minus holding, of the series itself:",
        "",
        *_head("series", "b - hold", "f - hold"),
    ]
    for walk in walks:
        table = walk["real"]["table"]
        lines.append(_row(walk["name"], *(text(_mean(table[k]["above_hold"]), 3) for k in ("b", "f"))))
    return lines


def _verdicts(stored: Stored) -> list[str]:
    """The six statements of ``__main__`` on the stored numbers; what is not stored is not decided."""
    lines = ["## Verdicts", "", *_head("statement", "measured", "verdict")]

    def say(statement: str, measured: str, holds: bool) -> None:
        lines.append(_row(statement, measured, "holds" if holds else "**does not hold**"))

    own = f"truth {truth.KINDS[0]}"
    if own in stored:
        found = truth.summary(stored[own], truth.KINDS[0])
        ours = found["smoother"][0]
        rivals = [found[name][0] for name in ("finite differences", "Savitzky-Golay")]
        bands = [each.mean for each in found["coverage"]]
        nis = found["nis"][0].mean
        holds = all(ours.mean < r.mean for r in rivals) and all(0.93 <= b <= 0.97 for b in bands)
        measured = f"{text(ours, 3)} against {text(rivals[0], 3)}, {text(rivals[1], 3)}"
        measured += f"; bands {bands[0]:.3f}, {bands[1]:.3f}"
        say(
            "1 smoother best on its own paths, calibrated",
            f"{measured}; {nis:.3f}",
            holds and 0.95 <= nis <= 1.05,
        )
    regular = {cell["size"]: decision.summary(cell) for cell in _cells(stored, False)}
    few, many = (regular.get(size) for size in (decision.SIZES[0], decision.SIZES[-1]))
    if few and many:
        small, large = few["a"]["minus_b"], many["a"]["minus_b"]
        holds = small.mean - small.half > 0 and abs(large.mean) < small.mean / 2
        say("2 a prior for small samples: a - b", f"{text(small, 3)} at 64, {text(large, 3)} at 4096", holds)
        equal = few["c"]["minus_b"]
        say("3 the prior, not the freezing: c - b at 64", text(equal, 3), abs(equal.mean) <= equal.half)
        more = many["f"]["minus_b"]
        say("4 more than (x, v): f - b at 4096", text(more, 3), more.mean - more.half > 0)
        a, b = few["a"]["collapsed"], few["b"]["collapsed"]
        say("5 raw windows collapse, tokens do not, at 64", f"a {a:.0%}, b {b:.0%} of seeds", a > b == 0)
    daily = [walk for walk in _walks(stored) if walk["name"] in ("sp500", "nasdaq", "wti")]
    if daily:
        gains = {walk["name"]: _mean(walk["real"]["table"]["b"]["above_hold"]) for walk in daily}
        measured = ", ".join(f"{name} {text(gain, 3)}" for name, gain in gains.items())
        say("6 profit over holding after costs", measured, any(g.mean - g.half > 0 for g in gains.values()))
    return lines if len(lines) > 4 else []


def picture(stored: Stored, path: Path) -> None:
    """Errors of velocity on known paths; regret by sample size."""
    from matplotlib import pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(10.5, 4.2), layout="constrained")
    kinds = [k for k in truth.KINDS if f"truth {k}" in stored and k != "random walk"]
    for number, name in enumerate(("finite differences", "Savitzky-Golay", "lag 1", "lag 4", "smoother")):
        found = [truth.summary(stored[f"truth {kind}"], kind)[name][0] for kind in kinds]
        places = [k + 0.15 * (number - 2) for k in range(len(kinds))]
        heights, halves = [f.mean for f in found], [f.half for f in found]
        left.bar(places, heights, 0.14, yerr=halves, label=name, color=LIGHT[number], ecolor=INK)
    left.set_xticks(range(len(kinds)), kinds)
    left.set_ylabel("error of velocity (root mean square)")
    cells = _cells(stored, False)
    found = [decision.summary(cell) for cell in cells]
    titles = controls(decision.INTENSITY)
    for number, letter in enumerate(titles if found else []):
        rows = [each[letter]["regret"] for each in found]
        places = [cell["size"] * 1.06 ** (number - 3) for cell in cells]
        label = f"{letter}: {titles[letter].title}"
        means, halves = [r.mean for r in rows], [r.half for r in rows]
        right.errorbar(places, means, halves, marker="o", ms=4, capsize=2, label=label, color=LIGHT[number])
    if cells:
        right.axhline(cells[0]["bayes"], color=INK, lw=0.8, ls=":")
        last = (cells[-1]["size"], cells[0]["bayes"])
        right.annotate("never acts", last, va="bottom", ha="right", fontsize="small")
        right.set_xscale("log")
        right.set_xticks([cell["size"] for cell in cells], [str(cell["size"]) for cell in cells], minor=False)
        right.minorticks_off()
    right.set_xlabel("training windows")
    right.set_ylabel("regret against the Bayes rule")
    for ax, columns in ((left, 3), (right, 2)):
        ax.set_ylim(bottom=0)
        ax.spines[["top", "right"]].set_visible(False)
        ax.legend(frameon=False, fontsize="x-small", loc="lower left", bbox_to_anchor=(0, 1), ncols=columns)
    figure.savefig(path, dpi=130)
    plt.close(figure)
