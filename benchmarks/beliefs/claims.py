"""Three claims, each with where it holds and where it does not: sentences computed from the stored numbers."""

from __future__ import annotations

from typing import Any

Row = dict[str, Any]


def sentences(results: Row) -> dict[str, list[str]]:
    """Claim to sentences; a claim whose tasks were not run is left out."""
    found = {
        "Orders of magnitude lower error": _error(results),
        "Adaptive compute": _compute(results),
        "Robustness": _robust(results),
    }
    return {claim: lines for claim, lines in found.items() if lines}


def _name(cell: Row) -> str:
    epochs = f", {cell['epochs']} epochs" if cell.get("epochs") else ""
    return f"G={cell['group']}, noise {cell['noise']:g}, drift {cell['walk']:g}{epochs}"


def _range(values: list[float]) -> str:
    low, high = min(values), max(values)
    return f"{low:.2g}" if len(values) == 1 else f"{low:.2g} to {high:.2g}"


def _error(results: Row) -> list[str]:
    cells = [t for t in results["tasks"] if t["kind"] in ("clean", "long")]
    if not cells:
        return []
    gain = {_name(t["cell"]): t["rows"]["ours"]["gain"][0] for t in cells}
    const = {_name(t["cell"]): t["rows"]["const"]["gain"][0] for t in cells}
    over = {_name(t["cell"]): t["rows"]["ours"]["over_const"] for t in cells}
    krpo = {_name(t["cell"]): t["rows"]["ours"]["over_krpo"][0] for t in cells}
    ten, hundred = ([t for t in cells if gain[_name(t["cell"])] >= x] for x in (10, 100))
    best = max(gain, key=gain.__getitem__)
    lines = [
        f"Against the group mean the error falls tenfold or more in {len(ten)} of {len(cells)} cells, a hundred times "
        f"in {len(hundred)}; the most is {gain[best]:.3g} ({best}), where the pool's mean alone, a constant, gets "
        f"{const[best]:.3g}.",
    ]
    if ten:
        least = min(t["cell"]["noise"] for t in ten)
        lines.append(f"No cell with score noise below {least:g} reaches ten.")
    clean = [gain[_name(t["cell"])] for t in cells if t["cell"]["noise"] == 0]
    if clean:
        lines.append(
            f"With clean 0/1 rewards the factor is {_range(clean)} over all cells: not an order of magnitude."
        )
    lines.append(
        f"Against the constant the factor is {_range([v[0] for v in over.values()])}; against KRPO as published "
        f"{_range(list(krpo.values()))}."
    )
    worse = [name for name, value in over.items() if value[0] + (value[1] or 0) < 1]
    tied = [name for name, value in over.items() if abs(value[0] - 1) <= (value[1] or 0)]
    if worse:
        lines.append(f"Worse than that constant: {'; '.join(worse)}.")
    if tied:
        lines.append(f"Not told apart from that constant: {'; '.join(tied)}.")
    if not worse and not tied:
        lines.append("It beats that constant in every cell.")
    return lines


def _compute(results: Row) -> list[str]:
    pools = [t for t in results["tasks"] if t["kind"] == "allocation"]
    lines = []
    for t in pools:
        rows = t["rows"]
        for key, what in (
            ("gradient", "equal gradient quality"),
            ("informative", "an equal number of mixed groups"),
        ):
            ours = {n: r[key] for n, r in rows.items() if n.startswith("ours") and r[key]}
            # With the tracker's baseline a published rule is no longer the published one.
            others = {n: r[key] for n, r in rows.items() if "[loo]" in n and r[key]}
            if not ours or not others:
                continue
            a, b = (max(x, key=lambda n: x[n][0]) for x in (ours, others))
            lines.append(
                f"{t['cell']['pool']}: at {what} {a} needs {ours[a][0]:.2f} times fewer completions than groups of "
                f"8; the best rule without our belief is {b} with {others[b][0]:.2f}."
            )
        mixed = [n for n, r in rows.items() if n.startswith("ours mixed_groups") and r["gradient"] is None]
        if mixed:
            lines.append(
                f"{t['cell']['pool']}: aiming at mixed groups ({', '.join(sorted(mixed))}) never reaches the gradient "
                "quality of groups of 8 within its sweep: no rule serves both aims."
            )
    for t in results["tasks"]:
        if t["kind"] == "log_det":
            spread = max(r[k][1] for r in t["rows"] for k in r if k.startswith("p="))
            moved = max(
                max(r[k][0] for k in r if k.startswith("p=")) - min(r[k][0] for k in r if k.startswith("p="))
                for r in t["rows"]
            )
            lines.append(
                f"The published log-det rule: largest difference between difficulties {moved:.2f} completions, largest "
                f"standard deviation {spread:.2f}: "
                + ("it adapts to nothing." if moved < 0.05 else "it varies.")
            )
    return lines


def _robust(results: Row) -> list[str]:
    worlds = [t for t in results["tasks"] if t["kind"] == "wrong"]
    lines = []
    for t in worlds:
        rows, label = t["rows"], t["cell"]["label"]
        fixed = {n: r["gain"][0] for n, r in rows.items() if n.startswith(("fixed", "krpo_c"))}
        best, worst = max(fixed, key=fixed.__getitem__), min(fixed, key=fixed.__getitem__)
        ours = rows["ours"]["gain"][0]
        verdict = "holds" if ours >= 0.9 * fixed[best] and ours > 1 else "does not hold"
        lines.append(
            f"{label}: {verdict}. Ours {ours:.2f} over the group mean; the best fixed setting {fixed[best]:.2f} "
            f"({best}), the worst {fixed[worst]:.2f} ({worst}); the 90 % interval covers "
            f"{rows['ours']['coverage'][0]:.0%}."
        )
    return lines
