"""What would fail late or silently is said early: long prompts, changed rows, missing layers, no signal, torchrun."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("trl")
from kalman_rl.cli.main import main
from kalman_rl.engine.callbacks import NoSignal
from kalman_rl.engine.config import TrainConfig
from kalman_rl.engine.early import check_lora_targets, fit_prompts
from kalman_rl.engine.models.tiny import character_tokenizer
from kalman_rl.engine.runs.run import Run
from kalman_rl.engine.tasks import Task, rows
from kalman_rl.engine.train import train
from kalman_rl.errors import ConfigError
from tests.engine.test_train import start


def write(path: Path, lines: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def lines(count: int) -> list[dict[str, Any]]:
    return [{"prompt": f"{i}>", "answer": str(i)} for i in range(count)]


# ---- context length


def model(positions: int | None) -> Any:
    config = SimpleNamespace(max_position_embeddings=positions)
    return SimpleNamespace(config=SimpleNamespace(get_text_config=lambda: config))


@pytest.fixture
def lengths(tmp_path: Path) -> Task:
    """Prompts of 1 to 9 tokens to train on, one of 7 held out."""
    data = [{"prompt": "1" * n, "answer": "1", "prompt_id": n, "split": "train"} for n in (1, 2, 3, 8, 9)]
    held = {"prompt": "2" * 7, "answer": "1", "prompt_id": "held", "split": "test"}
    return rows(write(tmp_path / "x.jsonl", [*data, held]))


def test_prompts_that_do_not_fit_are_named(lengths: Task) -> None:
    said: list[str] = []
    spell = character_tokenizer()
    assert fit_prompts(lengths, spell, model(14), None, 5, said.append) is lengths, "9 + 5 is exactly 14"
    assert fit_prompts(lengths, spell, model(None), None, 5, said.append) is lengths
    with pytest.raises(ConfigError, match=r"prompt: got 9 \(9 tokens\) with .* = 5, expected at most 13"):
        fit_prompts(lengths, spell, model(13), None, 5, said.append)
    with pytest.raises(
        ConfigError, match=r"got 3 \(3 tokens\), 8 .*, 9 \(9 tokens\) and 1 more .*max_prompt_tokens = 2 "
    ):
        fit_prompts(lengths, spell, model(7), None, 5, said.append)
    with pytest.raises(ConfigError, match="max_completion_tokens: got 5, expected less than the 5 positions"):
        fit_prompts(lengths, spell, model(5), None, 5, said.append)
    assert said == []


def test_longer_prompts_are_left_out_and_counted(lengths: Task) -> None:
    said: list[str] = []
    kept = fit_prompts(lengths, character_tokenizer(), model(8), 3, 5, said.append)
    assert [row["prompt_id"] for row in kept.train] == [1, 2, 3] and kept.test == []
    assert said == ["3 of 6 prompts are left out: they have more than 3 tokens (max_prompt_tokens)"]
    alone = rows_of(lengths, 8, 9)
    with pytest.raises(ConfigError, match="max_prompt_tokens: got 3, expected at least one training prompt"):
        fit_prompts(alone, character_tokenizer(), model(8), 3, 5, said.append)


def rows_of(task: Task, *ids: int) -> Task:
    return dataclasses.replace(task, train=[row for row in task.train if row["prompt_id"] in ids])


def test_a_run_checks_its_prompts_before_it_begins(model_path: str, tmp_path: Path) -> None:
    long = [*lines(20), {"prompt": "1" * 3000, "answer": "1", "prompt_id": "endless"}]
    data = write(
        tmp_path / "x.jsonl", [row | {"split": "train"} for row in long] + [lines(21)[-1] | {"split": "test"}]
    )
    with pytest.raises(ConfigError, match=r"prompt: got endless \(3000 tokens\)"):
        start(model_path, tmp_path / "a", data=data)
    _, code = start(model_path, tmp_path / "b", data=data, max_prompt_tokens=40, steps=2)
    assert code == 0


# ---- changed rows


def test_resume_notices_that_the_rows_changed(model_path: str, tmp_path: Path) -> None:
    data, path = write(tmp_path / "x.jsonl", lines(40)), tmp_path / "run"
    config, _ = start(model_path, path, data=data, steps=2)
    before = json.loads((path / "manifest.json").read_text())["data_sha256"]
    assert before == rows(data).digest() and len(before) == 64
    with Run.open(path) as run:
        assert train(config, run, resume=True) == 0
    write(data, lines(41))
    with (
        Run.open(path) as run,
        pytest.raises(ConfigError, match=r"data: got other rows in .*x\.jsonl .*--allow-change data"),
    ):
        train(config, run, resume=True)
    with Run.open(path) as run:
        assert train(config, run, resume=True, allow_change=["data"]) == 0
        assert run.manifest["data_sha256"] == rows(data).digest() != before


def test_the_digest_knows_rows_sides_and_types(tmp_path: Path) -> None:
    def digest(*changed: Any) -> str:
        made = [row | {"split": "train", "n": 7} for row in lines(4)]
        made[1] |= dict(changed)
        return rows(write(tmp_path / "x.jsonl", made)).digest()

    assert digest() == digest()
    assert len({digest(), digest(("split", "test")), digest(("n", 7.0)), digest(("answer", "5"))}) == 4


# ---- layers, signal, processes


def layers(*names: str) -> torch.nn.Module:
    return torch.nn.ModuleDict({name: torch.nn.Linear(2, 2) for name in names})


def test_missing_layers_are_named_with_near_ones() -> None:
    said: list[str] = []
    targets = TrainConfig.lora_target_modules
    check_lora_targets(layers(*targets), targets, said.append)
    assert said == []
    check_lora_targets(layers("q_proj", "v_proj", "out_proj", "fc1"), targets, said.append)
    assert len(said) == 1 and "no o_proj, down_proj to adapt (near: out_proj)" in said[0]
    with pytest.raises(
        ConfigError,
        match=r"without any of q_proj, v_proj, .*; it has qkv_proj; name them, or set lora_rank = 0",
    ):
        check_lora_targets(layers("qkv_proj", "dense"), targets, said.append)


def test_batches_without_a_difference_are_announced_once() -> None:
    said: list[str] = []
    callback = NoSignal(said.append, patience=3)
    nothing: Any = None
    for share in (1.0, 1.0, 0.5, 1.0, None, 1.0):
        callback.on_log(nothing, nothing, nothing, {} if share is None else {"frac_reward_zero_std": share})
    assert said == []
    for _ in range(5):
        callback.on_log(nothing, nothing, nothing, {"frac_reward_zero_std": 1.0})
    assert (
        len(said) == 1
        and "in 3 generation batches no prompt had completions with different rewards" in said[0]
    )


def test_torchrun_is_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    for words in (["train", "--run", str(tmp_path / "run")], ["resume", str(tmp_path / "run")]):
        assert main(words) == 2
        assert "kalman-rl: torchrun: got WORLD_SIZE=2, expected one process" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
