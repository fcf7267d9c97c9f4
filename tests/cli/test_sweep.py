"""Several seeds in one command: a run and a process each, one report, and the same command goes on."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("trl")

from kalman_rl.cli.main import main
from kalman_rl.engine.runs.reading import read_manifest, read_metrics

WORDS = (
    *(
        "train",
        "--task",
        "sort12",
        "--reward",
        "tests.engine.graded:digits",
        "--lora-rank",
        "0",
        "--threads",
        "1",
    ),
    *("--prompts-per-generation", "4", "--completions-per-prompt", "2", "--max-completion-tokens", "4"),
    *(
        "--eval-every",
        "0",
        "--eval-samples",
        "1",
        "--eval-prompts",
        "8",
        "--save-every",
        "2",
        "--dtype",
        "float32",
    ),
    *("--train-size", "16", "--test-size", "8", "--quiet", "--run", "study"),
)


def test_seeds_are_pooled_and_go_on(
    model_path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    words = [*WORDS, "--model", model_path, "--steps", "2", "--seed", "3"]
    assert main([*words, "--seeds", "2"]) == 0
    runs = [tmp_path / "study" / f"seed-{seed}" for seed in (3, 4)]
    assert [read_manifest(run)["labels"]["seed"] for run in runs] == [3, 4]
    said = capsys.readouterr().out
    finals = [read_metrics(run)[-1]["eval/sampled_reward"] for run in runs]
    assert (
        f"held-out mean reward: {sum(row['eval/sampled_reward'] for row in map(first, runs)) / 2:.3f} before"
        in said
    )
    assert f"{sum(finals) / 2:.3f} after (95 % interval over 2 seeds" in said
    assert (tmp_path / "study" / "report.html").is_file()
    before = [(run / "metrics.jsonl").read_bytes() for run in runs]
    assert main([*words, "--seeds", "2"]) == 0  # nothing is left to do
    assert [(run / "metrics.jsonl").read_bytes() for run in runs] == before
    assert main([*words, "--seeds", "2", "--learning-rate", "0.5"]) == 2
    assert "seed-3: exists with other settings" in capsys.readouterr().err


def first(run: Path) -> dict:
    return next(row for row in read_metrics(run) if row["kind"] == "eval")


def test_a_number_of_seeds_that_is_none(capsys: pytest.CaptureFixture[str]) -> None:
    for value in ("0", "many"):
        assert main(["train", "--seeds", value]) == 2
        assert "seeds: got" in capsys.readouterr().err
