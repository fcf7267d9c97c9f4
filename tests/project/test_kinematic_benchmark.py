"""The benchmark of kinematic tokens: its Bayes rule against brute force, its controls, no look ahead, its report."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from benchmarks.kinematic import controls as shown
from benchmarks.kinematic import decision, network, series
from benchmarks.kinematic.__main__ import RESULTS, main


@pytest.mark.parametrize("irregular", [False, True])
def test_the_bayes_rule(irregular: bool) -> None:
    """The move is Gaussian about its posterior mean; closed-form utilities are averages over it; nothing beats them."""
    windows = decision.drawn(4000, 7, irregular=irregular)
    error = (windows.move - windows.mean) / windows.deviation
    assert abs(error.mean()) < 0.05 and abs(error.square().mean() - 1) < 0.08
    assert (
        abs((error * windows.value[:, 0]).mean() / windows.value[:, 0].std()) < 0.05
    )  # nothing is left in the window
    value = decision.expected_utility(windows, decision.COST)
    white = torch.randn(20_000, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for k in range(3):
        moves = windows.mean[k] + windows.deviation[k] * white
        assert torch.allclose(network.utility(moves, decision.COST).mean(0), value[k], atol=0.03)
    gained = network.utility(windows.move, decision.COST)
    best = gained.gather(1, value.argmax(1)[:, None]).mean()
    assert best == pytest.approx(float(value.max(1).values.mean()), abs=0.05)
    for threshold in (0.2, 0.5, 1.5):
        other = torch.where(windows.mean.abs() > threshold, windows.mean.sign(), 0.0).long() + 1
        assert value.gather(1, other[:, None]).mean() <= value.max(1).values.mean()


def test_controls_are_what_they_are_called() -> None:
    table = shown.controls(0.01)
    y = torch.randn(shown.WINDOW, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    parts = {k: (c.layer @ y).reshape(shown.TOKENS, shown.CHANNELS) for k, c in table.items()}
    assert torch.equal(table["b"].layer, table["c"].layer) and not table["b"].learned and table["c"].learned
    assert torch.allclose(parts["d"][-1], torch.stack([y.diff(n=k)[-1] if k else y[-1] for k in range(4)]))
    assert torch.allclose(parts["e"][-1], torch.stack([y[-(2**k) :].mean() for k in range(4)]))
    assert torch.allclose(parts["f"][-1, 2:], torch.zeros(2, dtype=torch.float64))
    changed = y.clone()
    changed[-1] += 1.0
    for letter, causal in (("d", True), ("e", True), ("f", True), ("b", False)):
        moved = (table[letter].layer @ changed).reshape(shown.TOKENS, shown.CHANNELS)
        assert torch.equal(moved[:-1], parts[letter][:-1]) is causal


def test_frozen_layers_stay_and_learned_ones_move() -> None:
    windows = decision.drawn(64, 3, irregular=False)
    table = shown.controls(decision.INTENSITY)
    inputs = windows.value.float().expand(len(table), -1, -1)
    gains = network.utility(windows.move.float(), decision.COST).expand(len(table), -1, -1)
    rates, seeds = [1e-2] * len(table), [5] * len(table)
    begun, _ = network.begun(list(table.values()), inputs, [torch.Generator().manual_seed(5) for _ in table])
    found = network.trained(list(table.values()), inputs, gains, seeds, rates, steps=2, every=1)
    moved = {k: bool((a != b).any()) for k, a, b in zip(table, begun.layer, found.layer)}
    assert moved == {k: c.learned for k, c in table.items()}
    alone = network.trained([table["b"]], inputs[:1], gains[:1], [5], [1e-2], steps=2, every=1)
    assert torch.allclose(alone.out[0], found.out[1], atol=1e-6)  # the others do not reach it


def test_a_walk_reads_nothing_ahead() -> None:
    values = np.cumsum(np.random.default_rng(0).normal(size=120))
    rates = {letter: [1e-2] for letter in shown.controls(1.0)}
    other = values.copy()
    other[-10:] += np.arange(1, 11) ** 2
    walks = [series.walked(each, [1], rates, steps=20) for each in (values, other)]
    hold, later = (walk["hold"]["net"][0] for walk in walks)
    known = len(hold) - 10
    assert np.array_equal(hold[:known], later[:known]) and (hold[known:] != later[known:]).all()
    for letter in rates:
        assert np.array_equal(*(walk[letter]["net"][0][:known] for walk in walks)), letter
    assert any(walks[0][letter]["acts"] > 0.1 for letter in rates)
    begin = len(values) - 1 - len(hold)
    size = np.diff(values)[shown.WINDOW - 1 :]
    first = hold[1] * float(torch.tensor(size[: len(size) // 2]).std())
    assert first == pytest.approx(
        np.diff(values)[begin + 1], rel=1e-5
    )  # long from the first step on, in units


def test_the_report_is_that_of_the_stored_numbers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stored = json.loads((RESULTS / "kinematic.json").read_text(encoding="utf-8"))
    (tmp_path / "kinematic.json").write_text(json.dumps(stored), encoding="utf-8")
    assert main(["--render", "--out", str(tmp_path)]) == 0
    text = (tmp_path / "kinematic.md").read_text(encoding="utf-8")
    assert text == (RESULTS / "kinematic.md").read_text(encoding="utf-8") and text in capsys.readouterr().out
    assert "## Verdicts" in text and (tmp_path / "kinematic.png").stat().st_size > 10_000
