"""A run's model outside of the run: exported whole with a card, its best weights, and a resume from anywhere."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("trl")
from safetensors.torch import load_file, save_file

from kalman_rl.cli.main import main
from kalman_rl.engine.export import export
from kalman_rl.engine.runs.reading import read_manifest, read_metrics
from kalman_rl.engine.runs.run import Run
from kalman_rl.errors import PlaceError, RunError
from tests.engine.graded import GRADED
from tests.engine.test_scoring import write
from tests.engine.test_train import start

ADAPTED: dict[str, Any] = {
    **GRADED,
    "lora_rank": 2,
    "lora_target_modules": ("all-linear",),
    "lora_dropout": 0.1,
    "keep_best": True,
    "save_total_limit": 1,
    "save_every": 2,
    "gradient_checkpointing": True,
}


@pytest.fixture(scope="module")
def run(model_path: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run with adapters."""
    path = tmp_path_factory.mktemp("exported") / "run"
    _, code = start(model_path, path, **ADAPTED)
    assert code == 0
    return path


def logits(model: Any, tokenizer: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(**tokenizer("312>", return_tensors="pt")).logits


@pytest.mark.parametrize("best", [False, True])
def test_the_whole_model_computes_what_the_adapters_do(run: Path, tmp_path: Path, best: bool) -> None:
    from peft import AutoPeftModelForCausalLM
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = export(run, tmp_path / "whole", best=best)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    whole = AutoModelForCausalLM.from_pretrained(folder)
    adapted = AutoPeftModelForCausalLM.from_pretrained(run / ("best" if best else "model"))
    found, expected = logits(whole, tokenizer), logits(adapted, tokenizer)
    torch.testing.assert_close(found, expected)
    with adapted.disable_adapter():
        assert not torch.allclose(expected, logits(adapted, tokenizer), atol=1e-4) or best
    assert whole.generation_config.eos_token_id in (tokenizer.eos_token_id, [tokenizer.eos_token_id])


def test_the_card_says_what_was_done(run: Path, tmp_path: Path) -> None:
    card = (export(run, tmp_path / "whole") / "README.md").read_text()
    evals = [row for row in read_metrics(run) if row["kind"] == "eval"]
    for word in (
        *(
            "library_name: transformers",
            "kpo_diffuse",
            "tests.engine.graded:digits (weight 1)",
            "built-in task sort12",
        ),
        *("32 for training", "16 held out", "| torch | ", "| learning_rate | 0.01 |", "all-linear"),
        f"| mean reward, sampled | {evals[0]['eval/sampled_reward']:.3f} | {evals[-1]['eval/sampled_reward']:.3f} |",
    ):
        assert word in card, word
    assert "base_model" not in card and str(run.parent) not in card  # a folder of this machine
    assert "apply_chat_template" not in card


def test_best_weights_are_those_of_the_best_evaluation(run: Path) -> None:
    evals = {row["step"]: row["eval/sampled_reward"] for row in read_metrics(run) if row["kind"] == "eval"}
    best = read_manifest(run)["best"]
    assert best == {"step": max(evals, key=evals.__getitem__), "eval/sampled_reward": max(evals.values())}
    assert len(list((run / "checkpoints").glob("checkpoint-*"))) == 1
    settings = json.loads((run / "model" / "adapter_config.json").read_text())
    assert len(settings["target_modules"]) == 7 and settings["lora_dropout"] == 0.1
    assert Path(settings["base_model_name_or_path"]).is_absolute()


def test_what_cannot_be_exported_is_said(run: Path, model_path: str, tmp_path: Path) -> None:
    with Run.create(tmp_path / "begun", 'model = "tiny"\n', {}):
        pass
    with pytest.raises(RunError, match=r"no trained model in model/.*kalman-rl resume"):
        export(tmp_path / "begun")
    with pytest.raises(RunError, match=r"no trained model in best/.*--keep-best"):
        export(tmp_path / "begun", best=True)
    target = export(run, tmp_path / "whole")
    with pytest.raises(PlaceError, match="^output: got .*whole, which exists; replace it with --overwrite"):
        export(run, target)
    assert export(run, target, overwrite=True) == target
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.txt").write_text("years of work")
    with pytest.raises(PlaceError, match="exists and is no exported model"):
        export(run, mine, overwrite=True)
    assert (mine / "thesis.txt").read_text() == "years of work"


def test_a_damaged_model_is_named(run: Path, tmp_path: Path) -> None:
    for name in ("adapter_model.safetensors", "tokenizer.json"):
        copied = tmp_path / name
        shutil.copytree(run, copied)
        (copied / "model" / name).write_bytes((copied / "model" / name).read_bytes()[:100])
        with pytest.raises(RunError, match=r"/model: cannot be loaded \(.*expected what training wrote"):
            export(copied)
        assert not (copied / "export").exists()


def test_adapters_on_other_weights_are_refused(run: Path, model_path: str, tmp_path: Path) -> None:
    copied, base = tmp_path / "run", tmp_path / "base"
    shutil.copytree(run, copied)
    shutil.copytree(model_path, base)
    weights = load_file(base / "model.safetensors")
    save_file(
        {name: value + 1 for name, value in weights.items()}, base / "model.safetensors", {"format": "pt"}
    )
    settings = json.loads((copied / "model" / "adapter_config.json").read_text())
    settings["base_model_name_or_path"] = str(base)
    (copied / "model" / "adapter_config.json").write_text(json.dumps(settings))
    config = (copied / "config.toml").read_text().replace(str(model_path), str(base))
    (copied / "config.toml").write_text(config)
    with pytest.raises(RunError, match="other weights at .*base' than the run began with"):
        export(copied)
    assert not (copied / "export").exists()


def test_a_run_of_all_weights_is_exported_from_anywhere(
    model_path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows, reward and run were named from the folder where it began; it is resumed and exported from another."""
    here, away = tmp_path / "here", tmp_path / "away"
    here.mkdir()
    away.mkdir()
    monkeypatch.setattr("sys.path", [entry for entry in __import__("sys").path if entry])
    monkeypatch.chdir(here)
    (here / "graded_here.py").write_text(
        "def digits(completions, **columns):\n"
        "    return [sum(c.isdigit() for c in text) / 5 for text in completions]\n"
    )
    write(here / "rows.jsonl", [{"prompt": f"{i}>", "prompt_id": i} for i in range(20)])
    shutil.copytree(model_path, here / "start")
    words = [
        "--model",
        "./start",
        "--data",
        "rows.jsonl",
        "--reward",
        "graded_here:digits",
        "--lora-rank",
        "0",
    ]
    words += [
        "--prompts-per-generation",
        "4",
        "--completions-per-prompt",
        "2",
        "--max-completion-tokens",
        "4",
    ]
    words += [
        "--eval-every",
        "0",
        "--eval-samples",
        "1",
        "--save-every",
        "2",
        "--dtype",
        "float32",
        "--quiet",
    ]
    assert main(["train", "--run", "runs/mine", "--steps", "2", *words]) == 0
    config = here / "runs/mine/config.toml"
    config.write_text(config.read_text().replace("steps = 2", "steps = 4"))
    monkeypatch.chdir(away)
    assert main(["resume", "../here/runs/mine", "--allow-change", "steps", "--quiet"]) == 0
    assert max(row["step"] for row in read_metrics(here / "runs/mine")) == 4
    assert main(["export", "../here/runs/mine", "--output", "whole"]) == 0
    found, trained = (load_file(f / "model.safetensors") for f in (away / "whole", here / "runs/mine/model"))
    assert found.keys() == trained.keys() and all(torch.equal(found[name], trained[name]) for name in found)
