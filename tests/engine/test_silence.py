"""A whole training run with every lookup and connection refused, and no offline variable set."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("trl")

from benchmarks.chaos.silence import attempts


@pytest.mark.timeout(300)
def test_training_reaches_for_no_machine(model_path: str, tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(
        "def score(completions, **_): return [float(len(c)) for c in completions]\n"
    )
    settings = {
        "task": "sort12",
        "model": model_path,
        "reward": "mine:score",
        "run": "run",
        "steps": 2,
        "prompts-per-generation": 4,
        "completions-per-prompt": 4,
        "lora-rank": 2,
        "eval-prompts": 2,
        "save-every": 2,
        "max-completion-tokens": 4,
    }
    words = [word for name, value in settings.items() for word in (f"--{name}", str(value))]
    assert attempts(["train", *words], tmp_path) == []
    assert (tmp_path / "run" / "model").is_dir()


def test_an_attempt_is_found(tmp_path: Path) -> None:
    code = "import socket\ntry: socket.getaddrinfo('huggingface.co', 443)\nexcept OSError: pass\n"
    (tmp_path / "curious.py").write_text(code + "def f(completions, **_): return [0.0] * len(completions)\n")
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "1", "answer": "1"}\n')
    (found,) = attempts(["doctor", "--data", str(rows), "--reward", "curious:f"], tmp_path)
    assert "socket.getaddrinfo ('huggingface.co'" in found and "curious.py:2" in found
