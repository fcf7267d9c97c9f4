"""tools/trl_suite.py: the stand-ins load by the names of the hub, and every test's end is told apart."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("trl")

ROOT = Path(__file__).resolve().parents[2]
TOOL = ROOT / "tools" / "trl_suite.py"
TESTS = """
import pytest
from datasets import load_dataset
from transformers import AutoTokenizer
from trl import GRPOConfig, GRPOTrainer


def trainer(folder, **settings):
    rows = load_dataset("trl-internal-testing/zen", "standard_prompt_only", split="train")
    small = dict(num_generations=3, per_device_train_batch_size=3, max_completion_length=4, max_steps=1)
    args = GRPOConfig(str(folder), report_to="none", use_cpu=True, **small, **settings)
    return GRPOTrainer("trl-internal-testing/tiny-Qwen2ForCausalLM-2.5", lambda completions, **_: [1.0, 2.0, 4.0], args,
                       train_dataset=rows)


def test_passes(tmp_path):
    made = trainer(tmp_path, loss_type="bnpo")
    made.train()
    print(type(made).__name__)


def test_refused(tmp_path):
    trainer(tmp_path, loss_type="dapo", delta=0.5)


def test_fails():
    assert 1 == 2


def test_skips():
    pytest.skip("not here")


def test_asks_for_more():
    AutoTokenizer.from_pretrained("trl-internal-testing/tiny-Unknown")
"""


def load(name: str = "trl_suite") -> Any:
    spec = importlib.util.spec_from_file_location(name, ROOT / "tools" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "tools"))  # it imports its neighbour
        spec.loader.exec_module(module)
    return module


@pytest.mark.timeout(300)
def test_every_end_is_told_apart(tmp_path: Path) -> None:
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "__init__.py").touch()
    (tmp_path / "tests" / "test_grpo_trainer.py").write_text(TESTS)
    command = [sys.executable, str(TOOL), "--checkout", str(tmp_path)]
    both = subprocess.run(command, capture_output=True, text=True, env=dict(os.environ), check=False)
    ends = {
        who: {
            line[18:].partition(":")[0]: line[5:17].strip()
            for line in both.stdout.splitlines()
            if line.startswith(f"{who:<5}") and " test_" in line
        }
        for who in ("ours", "TRL")
    }
    assert ends["ours"] == {
        "test_passes": "passed",
        "test_refused": "refused",
        "test_fails": "failed",
        "test_skips": "skipped",
        "test_asks_for_more": "no stand-in",
    }
    assert ends["TRL"] == ends["ours"] | {"test_refused": "passed"}
    assert "ours: 1 passed, 1 refused, 1 failed, 1 no stand-in, 1 skipped" in both.stdout
    table = both.stdout.partition("\n\n")[2].splitlines()
    assert table[:2] == [
        "TRL:  2 passed, 1 failed, 1 no stand-in, 1 skipped",
        "ours: 1 passed, 1 refused, of those that pass with TRL's classes",
    ]
    assert len(table) == 3 and table[2].startswith("refused      test_refused: ConfigError: delta: got 0.5")
    assert both.returncode == 1
    plain = subprocess.run(
        [*command, "--plain", "-k", "refused or passes"], capture_output=True, text=True, check=False
    )
    assert "TRL: 2 passed" in plain.stdout and plain.returncode == 0


def test_a_test_that_did_not_end_failed() -> None:
    tool = load()
    plain = {"a": ("passed", ""), "b": ("failed", "E"), "c": ("passed", "")}
    assert tool.compared(plain, {"a": ("refused", "C"), "b": ("passed", "")}) == {
        "a": ("refused", "C"),
        "c": ("failed", "did not end"),
    }


def test_words_of_qwen() -> None:
    """A call of a tool, written out in Qwen's numbers, is the text that it is there."""
    words = load("trl_stand_ins").tokenizer()
    call = [
        151657,
        198,
        4913,
        606,
        788,
        330,
        35744,
        497,
        330,
        16370,
        788,
        5212,
        64,
        788,
        220,
        18,
        11248,
        151658,
    ]
    assert (
        words.decode(call, skip_special_tokens=True)
        == '<tool_call>\n{"name": "increment", "arguments": {"a": 3}}\n</tool_call>'
    )
    assert words.decode(words("7 + 8 = é").input_ids) == "7 + 8 = é"


def test_rows(tmp_path: Path) -> None:
    tool = load("trl_stand_ins")
    tool.make_rows(tmp_path)
    rows = [
        json.loads(line)
        for line in (tmp_path / "standard_prompt_only" / "train.jsonl").read_text().splitlines()
    ]
    assert len({row["prompt"] for row in rows}) == tool.TRAIN


def test_no_checkout(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        load().main(["--checkout", str(tmp_path)])
    assert "expected a folder with tests/test_grpo_trainer.py" in capsys.readouterr().err
