"""The simulation of beliefs runs, and says what no honest one could hide."""

from __future__ import annotations

from benchmarks.beliefs.tasks import Task, perform


def gain(row: dict, name: str) -> float:
    """Mean error of the group mean over that of a method."""
    return float(row["rows"][name]["gain"].mean)


def test_estimates_at_noisy_rewards() -> None:
    """At G = 8 and noise 2 KRPO as published is worse than the group mean, a belief much better, and it beats the
    constant that knows no prompts."""
    row = perform(Task(4, "clean", {"group": 8, "noise": 2.0, "walk": 0.3}, 1))
    assert gain(row, "krpo") < 0.6
    assert gain(row, "ours") > 4.0
    assert gain(row, "ours") > gain(row, "const")


def test_the_log_det_rule_never_reads_a_reward() -> None:
    """The published rule stops every prompt after the same number of samples."""
    for row in perform(Task(6, "log_det", {"prompts": 4}, 1))["rows"]:
        counts = [row[f"p={p}"] for p in ("0.01", "0.5", "0.99")]
        assert counts[0] == counts[1] == counts[2] and counts[0][1] == 0.0, row
