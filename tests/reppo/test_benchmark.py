"""The comparison: a run is made once, a verdict needs every seed, and the token bridge has the right gradient."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("gymnasium", reason="needs the extra control")
pytest.importorskip("tyro")

from benchmarks.reppo import __main__ as command
from benchmarks.reppo import plan, report, tokens

from kalman_rl.instruments.reproduce.policy import Replies


def test_a_verdict_needs_every_seed() -> None:
    assert report.verdict("CartPole-v1", [500.0] * 4) == "open (4 of 5 seeds)"
    assert report.verdict("CartPole-v1", [0.0, 0.0, 475.0, 500.0, 500.0]) == "met"
    assert report.verdict("CartPole-v1", [0.0, 0.0, 474.0, 500.0, 500.0]) == "not met"
    assert report.verdict("MountainCar-v0", [-200.0] * 5) == ""


def test_the_same_command_makes_only_what_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[tuple[Any, ...]] = []

    def one_run(task: str, arm: str, seed: int, steps: int) -> dict[str, Any]:
        made.append((task, arm, seed, steps))
        if len(made) == 3:
            raise KeyboardInterrupt
        curve = [{"step": s, "return": 100.0 * s, "lowest": 0.0} for s in (1, 2)]
        return {
            "task": task,
            "arm": arm,
            "seed": seed,
            "return": 490.0 + seed,
            "seconds": 1.0,
            "curve": curve,
        }

    monkeypatch.setattr(command, "one_run", one_run)
    words = ["reppo", "--tasks", "CartPole-v1", "--arms", "reppo", "ppo", "--output", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", words)
    with pytest.raises(KeyboardInterrupt):
        command.main()
    command.main()
    assert len(made) == 11 and made[2] == made[3] and len(set(made)) == 10  # the one that died was made again
    assert {steps for *_, steps in made} == {plan.TASKS["CartPole-v1"].steps}
    text = (tmp_path / "reppo.md").read_text()
    assert "| CartPole-v1, 100k | reppo | 500, 501, 502, 503, 504 | 502.0 | 475 | met | 150.0 | 1 |" in text
    (ax,) = report.draw(report.read(tmp_path / "ledger.jsonl"), ("reppo", "ppo"), tmp_path / "reppo.png").axes
    assert len(ax.lines) == 10 + 2 + 1 and (tmp_path / "reppo.png").exists()  # runs, medians, the bar
    assert not (tmp_path / "ablations.png").exists()  # no task has every arm


class Table:
    """A policy whose next-token logits are one row for each place, whatever was said."""

    def __init__(self, logits: torch.Tensor) -> None:
        self.logits = logits
        self.model = self

    def __call__(self, input_ids: torch.Tensor, logits_to_keep: int, **kwargs: Any) -> Any:
        return SimpleNamespace(logits=torch.cat([self.logits, self.logits[:, :1]], 1))


def test_the_expected_gradient_over_tokens_is_the_enumeration(monkeypatch: pytest.MonkeyPatch) -> None:
    """With all tokens on top, d loss / d logit_v = -pi_v (Q_v - sum pi Q) / (T N); the sampled tokens do not matter."""
    logits = torch.randn(4, 2, 5, generator=torch.Generator().manual_seed(0), requires_grad=True)
    q = torch.rand(4, 2, 5, generator=torch.Generator().manual_seed(1))
    monkeypatch.setattr(tokens, "TOP", 5)
    found = []
    for drawn in (1, 3):
        ids, mask = torch.full((4, 3), drawn), torch.ones(4, 2, dtype=torch.bool)
        replies = Replies(ids, torch.ones(4, 3, dtype=torch.bool), mask, torch.zeros(4, 2), torch.zeros(4))
        critic: Any = SimpleNamespace(q=lambda _: q)
        loss = tokens.loss_of(
            "expected",
            Table(logits),
            replies,
            list("aaaa"),
            critic=critic,
            belief=None,
            step=0,  # type: ignore[arg-type]
        )
        found += torch.autograd.grad(loss, logits)
    pi = logits.detach().softmax(-1)
    torch.testing.assert_close(found[0], -pi * (q - (pi * q).sum(-1, keepdim=True)) / (2 * 4))
    assert torch.equal(*found)
