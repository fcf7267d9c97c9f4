"""Completions spent: as an axis of runs with different batches, and what they were spent on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from kalman_rl.engine.runs.beliefs import BeliefBatch, Beliefs, Visit
from kalman_rl.engine.runs.reading import read_run
from kalman_rl.instruments.report import write_figure
from kalman_rl.instruments.report.page import page
from kalman_rl.instruments.report.sections.spending import by_difficulty, informative, reliability
from kalman_rl.instruments.report.stats.pool import pooled
from kalman_rl.instruments.report.stats.spent import by_completions, completions
from tests.instruments.report_runs import shown_at, write_beliefs, write_run


def settings(prompts: int, each: int, updates: int = 4) -> str:
    return (
        f"prompts_per_generation = {prompts}\ncompletions_per_prompt = {each}\n"
        f"updates_per_generation = {updates}\niterations = 1\n"
    )


def book(run: Path, used: dict[int, float]) -> None:
    """Note completions in the rows of these steps, and leave the other rows as they are."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for row in rows:
        if row["kind"] == "train" and row["step"] in used:
            row["budget/used"] = used[row["step"]]
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_a_batch_is_spent_before_its_first_update(tmp_path: Path) -> None:
    spent = completions(read_run(write_run(tmp_path / "run", {}, config=settings(16, 8)), "run"))
    assert spent and [spent(step) for step in (0, 1, 4, 5, 8)] == [0, 128, 128, 256, 256]
    assert completions(read_run(write_run(tmp_path / "none", {}), "none")) is None


@pytest.mark.parametrize("used", [{1: 100, 5: 60, 9: 20, 13: 20}, {8: 80, 16: 20}])
def test_booked_completions_count_however_often_they_are_logged(
    used: dict[int, float], tmp_path: Path
) -> None:
    run = write_run(tmp_path / "run", {}, updates=16, config=settings(16, 8))
    book(run, used)
    spent = completions(read_run(run, "run"))
    assert spent and (spent(0), spent(8), spent(16)) == (0, 160, 200)


def two_runs(folder: Path, *, each: int, task: str = "sort_spread") -> list[Path]:
    """Groups of 8 in batches of 128, and another run in batches of 64 * each."""
    labels = {"model": "tiny", "task": "sort_spread", "seed": 0}
    return [
        write_run(folder / "a", labels | {"method": "grpo"}, updates=16, config=settings(16, 8)),
        write_run(
            folder / "b", labels | {"method": "stream", "task": task}, updates=32, config=settings(64, each)
        ),
    ]


def test_runs_with_different_batches_are_compared_by_completions(tmp_path: Path) -> None:
    runs = two_runs(tmp_path, each=1)
    axis = by_completions(pooled([read_run(run, run.name) for run in runs]))
    assert axis and [spent(run.steps) for spent, run in zip(axis, map(read_run, runs, "ab"))] == [512, 512]
    html = page(runs)
    assert "compared by the completions they had sampled" in html
    assert 0.6 in shown_at(html, "grpo", "completions")[512] and not shown_at(html, "grpo", "step")
    equal = page(two_runs(tmp_path / "equal", each=2))
    assert "compared by the completions" not in equal and 0.6 in shown_at(equal, "grpo", "step")[16]


def test_runs_on_different_tasks_stand_apart(tmp_path: Path) -> None:
    html = page(two_runs(tmp_path, each=1, task="products"))
    assert "<h2>tiny on sort_spread</h2>" in html and "<h2>tiny on products</h2>" in html
    assert "tie" not in html.split("</header>")[0] and "Highest at the end" not in html
    assert 'id="runs"' in html and 'id="runs-2"' in html


def test_accuracy_on_the_training_prompts_is_shown_where_it_was_measured(tmp_path: Path) -> None:
    runs = two_runs(tmp_path, each=1)
    assert "Accuracy on the training prompts" not in page(runs)
    for run in runs:
        rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        for row in rows:
            if row["kind"] == "eval":
                pool = {name.replace("eval/", "pool/"): value for name, value in row.items() if "/" in name}
                row |= pool | {"pool/sampled_accuracy": 0.25, "pool/count": 100.0}
        (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    html = page(runs)
    assert "Accuracy on the training prompts" in html and 0.25 in shown_at(html, "grpo", "completions")[512]
    assert "grpo at 0.25 (0.18 to 0.34) and stream at 0.25 (0.18 to 0.34)" in html  # Wilson, 100 answers
    pytest.importorskip("matplotlib")
    picture = write_figure(runs, tmp_path / "figure.svg").read_text()
    assert "completions spent" in picture and "accuracy on the training prompts" in picture


def batch(**visits: tuple[float, float, float]) -> Beliefs:
    """One batch; of each prompt: completions, mean reward, what was and is believed (surely)."""
    made = {
        name: Visit(0.0, n, reward, mean, 1e-6, 0.5, mean, 1e-6, float("nan"), False)
        for name, (n, reward, mean) in visits.items()
    }
    n = sum(visit.n for visit in made.values())
    return Beliefs([BeliefBatch(0.0, n, len(made), n, len(made), 0, 0, {}, made)])


def points_of(chart: dict[str, Any]) -> dict[str, list[tuple[float, float]]]:
    return {line["name"]: list(zip(*line["points"])) for line in chart["lines"]}


def test_what_completions_were_spent_on() -> None:
    beliefs = batch(hard=(1, 0.0, 0.1), between=(5, 0.4, 0.5), easy=(2, 1.0, 0.9))
    figure = by_difficulty(beliefs)
    assert figure and "62% of all went to those at 0.2 to 0.8" in figure.note
    expected = {"below 0.2": 0.125, "0.2 to 0.8": 0.625, "above 0.8": 0.25, "0.2 to 0.8, evenly": 0.333333}
    assert points_of(figure.chart) == {name: [(0, value)] for name, value in expected.items()}
    figure = informative(beliefs)  # 4 p (1 - p): 0.36, 1 and 0.36
    assert figure
    assert points_of(figure.chart) == {
        "as drawn": [(0, pytest.approx(0.76, abs=1e-5))],
        "evenly": [(0, pytest.approx(0.57333, abs=1e-4))],
    }
    figure = reliability(batch(a=(6, 0.5, 0.55), b=(4, 1.0, 0.6), few=(9, 0.0, 0.1)))
    assert figure and points_of(figure.chart)["observed"] == [(57, 0.7)]


@pytest.mark.parametrize("each", [1, 8])
def test_a_stream_that_draws_a_prompt_twice_is_still_single(each: int, tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", {}, updates=4, config=settings(8, each))
    write_beliefs(run, batches=6)
    text = (run / "beliefs.jsonl").read_text().replace('"rounds"', '"fixed"')
    (run / "beliefs.jsonl").write_text(text)
    html = page([run])
    groups = ("Informative groups", "Against a fixed number", "Predicted intervals against what came")
    assert all((words in html) == (each > 1) for words in groups)
    assert "Completions by difficulty" in html and "Informative completions" in html
