"""What ``kalman-rl replay`` prints."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

from kalman_rl.engine.runs.reading import clean
from kalman_rl.errors import ConfigError, quote
from kalman_rl.instruments.replay import SELF_CHECK, ReplayResult, StepReplay, replay
from kalman_rl.terminal import tell

LISTED_STEPS = 40


def show_replay(
    run: Path, method: str, options: dict[str, float], against: str, steps: str, top: int, as_json: bool
) -> int:
    """Print a replay; returns 1 if recomputing the run's own method does not give its stored columns, else 0.

    Args: as :func:`kalman_rl.instruments.replay.replay`, with ``against`` and ``steps`` as texts, "" = None.
    Raises: what that raises, and :func:`step_range`.
    """
    result = replay(run, method, options, against=against or None, steps=step_range(steps), top=top)
    tell(json.dumps(as_table(result), indent=2, allow_nan=False) if as_json else as_text(result))
    return 0 if passed(result) is not False else 1


def step_range(text: str) -> tuple[int, int] | None:
    """``3-20`` or ``7``; empty means all. Raises: ConfigError for anything else.

    >>> step_range("3-20"), step_range("7"), step_range("")
    ((3, 20), (7, 7), None)
    """
    if not text:
        return None
    first, _, last = text.partition("-")
    try:
        bounds = int(first), int(last or first)
    except ValueError:
        bounds = (1, 0)
    if not 0 <= bounds[0] <= bounds[1]:
        raise ConfigError(f"steps: got {quote(text)}, expected FIRST-LAST such as 3-20, or one step")
    return bounds


def passed(result: ReplayResult) -> bool | None:
    """Whether the run's own method gives its stored columns again; None if that was not tried."""
    return None if result.self_check is None else result.self_check <= SELF_CHECK and not result.flipped


def as_table(result: ReplayResult) -> dict[str, Any]:
    """JSON-compatible; numbers that are not finite become null."""
    return {
        "method": result.method,
        "against": result.against,
        "self_check": {
            "method": result.own,
            "error": result.self_check,
            "tolerance": SELF_CHECK,
            "tokens_kept_differently": result.flipped,
            "passed": passed(result),
        },
        "notes": result.notes,
        "overall": _plain({**result.overall._asdict(), "step": None}),
        "steps": [_plain(step._asdict()) for step in result.steps],
        "disagreements": [_plain(entry._asdict()) for entry in result.disagreements],
    }


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) or hasattr(value, "_asdict"):
        value = value._asdict()
    if isinstance(value, dict):
        return {key: _plain(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def as_text(result: ReplayResult) -> str:
    """For a terminal: self-check, notes, numbers overall and per step, tokens."""
    a, b = result.method, result.against
    lines = [_self_check(result), *(f"note: {clean(note, 300)}" for note in result.notes), ""]
    total = result.overall
    lines.append(f"{len(result.steps)} steps, {total.sequences} completions, {total.tokens} tokens")
    lines.append(f"cosine of the coefficients of {a} and {b}: {total.cosine:.4f}")
    quantiles = list(total.method.quantiles)
    width = max(len(a), len(b))
    lines.append(
        f"{'':<{width}}  {'kept':>6}  {'ESS':>6}  coefficient at " + "  ".join(f"{q:>7}" for q in quantiles)
    )
    for name, shown in ((a, total.method), (b, total.against)):
        numbers = "  ".join(f"{shown.quantiles[q]:7.3f}" for q in quantiles)
        size = shown.effective_sample_size
        lines.append(f"{name:<{width}}  {shown.kept:6.1%}  {size:6.3f}  {'':<15}{numbers}")
    lines += ["", *_steps(result.steps), *_tokens(result)]
    return "\n".join(line.rstrip() for line in lines)


def _self_check(result: ReplayResult) -> str:
    if result.self_check is None:
        return "self-check: not possible for this run"
    word = "pass" if passed(result) else "FAIL"
    return (
        f"self-check: {word}: {result.own} again, error {result.self_check:.1e} of stored log-weights and "
        f"coefficients, tolerance {SELF_CHECK:.0e}; {result.flipped} tokens kept differently"
    )


def _steps(steps: list[StepReplay]) -> list[str]:
    lines = ["  step  tokens    kept   other     ESS   other  cosine"]
    for s in steps[:LISTED_STEPS]:
        m, o = s.method, s.against
        lines.append(
            f"{s.step:6d}  {s.tokens:6d}  {m.kept:6.1%}  {o.kept:6.1%}  {m.effective_sample_size:6.3f}  "
            f"{o.effective_sample_size:6.3f}  {s.cosine:6.3f}"
        )
    if len(steps) > LISTED_STEPS:
        lines.append(f"... {len(steps) - LISTED_STEPS} more steps; --json prints all, --steps chooses")
    return lines


def _tokens(result: ReplayResult) -> list[str]:
    if not result.disagreements:
        return ["", "no token gets another coefficient"]
    lines = ["", f"tokens with the largest difference, {result.method} | {result.against}"]
    lines.append("  step  seq   pos  log-ratio        log-weights         coefficients  token")
    for entry in result.disagreements:
        pairs = (f"{x:+9.4f} {y:+9.4f}" for x, y in (entry.log_weight, entry.coefficient))
        place = f"{entry.step:6d} {entry.sequence:4d} {entry.position:5d}"
        lines.append(f"{place}  {entry.log_ratio:+9.4f}  {'  '.join(pairs)}  '{clean(entry.token, 24)}'")
    return lines
