"""A whole training run with every lookup and connection refused, and no offline variable set."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

pytest.importorskip("trl")

from benchmarks.chaos.silence import KALMAN_RL, attempts


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
    assert attempts([*KALMAN_RL, "train", *words], tmp_path) == []
    assert (tmp_path / "run" / "model").is_dir()


def test_an_attempt_is_found_in_whatever_process(tmp_path: Path) -> None:
    inner = "import socket\ntry: socket.getaddrinfo('huggingface.co', 443)\nexcept OSError: pass"
    code = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {inner!r}])"
    (found,) = attempts([sys.executable, "-c", code], tmp_path)
    assert found.startswith("socket.getaddrinfo ('huggingface.co'")
