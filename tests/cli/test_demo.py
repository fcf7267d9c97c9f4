"""The demo: its parts in order, and its two ways to spend completions at a very small size."""

from __future__ import annotations

import sys
import types
from pathlib import Path
from typing import Any

import pytest

from kalman_rl.cli import demo as demo_module
from kalman_rl.engine.config import DemoConfig
from kalman_rl.engine.runs.reading import find_runs
from kalman_rl.engine.tasks import sorting
from kalman_rl.instruments.report.page import page
from kalman_rl.instruments.report.stats.spent import completions


def test_both_runs_are_evaluated_at_the_same_completions(tmp_path: Path) -> None:
    grpo, stream = demo_module.spending(DemoConfig(run=tmp_path, seed=3))
    for plan, batch in ((grpo, 128), (stream, 64)):
        assert plan.prompts * plan.group_size == batch and plan.seed == 3
        assert plan.steps * batch / plan.updates_per_generation == demo_module.COMPLETIONS
        assert plan.eval_every * batch / plan.updates_per_generation == 1024
    assert (stream.select, stream.advantage, stream.group_size) == ("stream", "tracked", 1)


def test_runs_on_the_pool_share_a_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sorting, "WARM_START", 20)
    for plan in demo_module.spending(DemoConfig(run=tmp_path, quiet=True), completions=128):
        assert demo_module.run_one(plan, tmp_path / ".cache") == 0
    runs = find_runs([tmp_path])
    assert [run.labels["method"] for run in runs] == ["grpo", "grpo+auto+stream"]
    for run in runs:
        spent = completions(run)
        assert spent and spent(run.steps) == 128
        measured = {"pool/sampled_accuracy", "eval/sampled_accuracy"}
        assert len(run.evals) >= 2 and all(measured <= set(row) for row in run.evals)
    html = page([tmp_path])
    assert "compared by the completions they had sampled" in html and "Completions by difficulty" in html


@pytest.mark.parametrize("failing", [None, "main", "pool", "stress"])
def test_parts_come_in_order_and_a_failing_one_is_the_last(
    failing: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[str] = []

    def part(name: str) -> Any:
        def entry(*args: Any, **options: Any) -> int:
            done.append(name)
            return 130 if name == failing else 0

        return entry

    monkeypatch.setattr(demo_module, "run_one", part("main"))
    monkeypatch.setattr(demo_module, "_spend", part("pool"))
    for home, names in {
        "kalman_rl.cli.stress": ["stress"],
        "kalman_rl.instruments.report": ["write_report", "write_figure"],
    }.items():
        module = types.ModuleType(home)
        for name in names:
            setattr(module, name, part(name))
        monkeypatch.setitem(sys.modules, home, module)
    code = demo_module.demo(DemoConfig(run=tmp_path, quiet=True))
    parts = [*demo_module.PARTS, "write_report", "write_figure"]
    assert done == (parts[: parts.index(failing) + 1] if failing else parts)
    assert code == (130 if failing else 0)
