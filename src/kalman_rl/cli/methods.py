"""What ``kalman-rl methods`` prints: the table, a card, citations, the results of the checks."""

from __future__ import annotations

import json
import shutil
from typing import Any

from kalman_rl.instruments.verify import Check, verify
from kalman_rl.methods import METHODS, cards, make_method
from kalman_rl.terminal import tell


def show_methods(name: str, *, cite: bool, verify: bool, device: str, as_json: bool) -> int:
    """Print what the flags ask for; returns 1 if a check failed, else 0.

    Raises: ConfigError for a name or a device.
    """
    if name:
        make_method(name)  # an error in the name is raised before anything is printed
    names = [name] if name else list(METHODS)
    if verify:
        return show_checks([name] if name else list(METHODS.table), device, as_json)
    if cite:
        entries = {each: cards.bibtex(each) for each in names}
        tell(json.dumps(entries, indent=2) if as_json else "\n\n".join(dict.fromkeys(entries.values())))
    elif as_json:
        tell(json.dumps(cards.card(name) if name else cards.table(), indent=2))
    else:
        width = min(max(shutil.get_terminal_size((100, 24)).columns, 60), 160)
        tell(cards.as_text(name, width) if name else cards.as_table(width))
    return 0


def show_checks(names: list[str], device: str, as_json: bool) -> int:
    """Run and print the checks of the methods on a device, each with its error and its tolerance."""
    results = verify(names, device=device)
    failed = [result for result in results if not result.passed]
    if as_json:
        rows: list[dict[str, Any]] = [
            # JSON has no NaN and no infinity
            {
                **result._asdict(),
                "error": result.error if abs(result.error) < float("inf") else str(result.error),
                "passed": result.passed,
            }
            for result in results
        ]
        tell(json.dumps(rows, indent=2))
    else:
        for name in names:
            tell(name)
            tell("\n".join(_line(result) for result in results if result.method == name))
        tell(f"{len(results) - len(failed)} of {len(results)} checks passed")
    return 1 if failed else 0


def _line(result: Check) -> str:
    word = "pass" if result.passed else "FAIL"
    return f"  {word}  error {result.error:8.1e}  tolerance {result.tolerance:7.0e}  {result.name}"
