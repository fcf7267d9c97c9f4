"""A run that is small and real: a model of one layer, its settings, and the command in a process of its own."""

from __future__ import annotations

import atexit
import gc
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

SETTINGS: dict[str, Any] = {
    "task": "sort12",
    "method": "kpo",
    "advantage": "tracked",
    "belief": "beta",
    "dtype": "float32",
    "steps": 6,
    "prompts_per_generation": 4,
    "completions_per_prompt": 2,
    "updates_per_generation": 2,
    "warmup_steps": 0,
    "lora_rank": 0,
    "eval_every": 3,
    "eval_prompts": 4,
    "eval_samples": 1,
    "save_every": 1,
    "traces_per_step": 1,
    "train_size": 16,
    "test_size": 8,
    "max_completion_tokens": 4,
    "threads": 1,
}


def tiny_model(folder: Path) -> Path:
    """A Llama of one layer with a tokenizer of characters, on disk."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM
    from transformers.utils.logging import disable_progress_bar

    from kalman_rl.engine.models.tiny import character_tokenizer

    disable_progress_bar()
    tokenizer = character_tokenizer()
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        initializer_range=0.2,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def train_command(model: Path, run: Path, **changes: Any) -> list[str]:
    """Words of ``kalman-rl train``."""
    settings = SETTINGS | {"model": model, "run": run} | changes
    return [
        "train",
        *(word for key, value in settings.items() for word in (f"--{key.replace('_', '-')}", str(value))),
    ]


def load() -> None:
    """Import what training needs, so that forks need not; with one thread, as threads do not survive a fork."""
    import torch

    torch.set_num_threads(1)
    import kalman_rl.engine.train  # noqa: F401
    from kalman_rl.cli.main import main  # noqa: F401


def warm(model: Path, run: Path) -> None:
    """Train once in this process, so that a fork finds all of it loaded and compiled; then spare the collector what is
    there, which a fork would copy by looking at it."""
    load()
    from kalman_rl.cli.main import main

    if code := main([*train_command(model, run), "--quiet"]):
        raise RuntimeError(f"the first run ended with {code}")
    gc.collect()
    gc.freeze()
    atexit.register(gc.unfreeze)  # or libraries complain about what they leave behind


def forked(work: Callable[[], int], log: Path) -> int:
    """Process id of a fork that does some work and ends with the code it returns; its output goes to ``log``, which is
    there even if the fork is killed at once."""
    log.touch()
    pid = os.fork()
    if pid:
        return pid
    code = 70
    try:
        out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(out, 1)
        os.dup2(out, 2)
        code = work()
    except BaseException as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def ended(pid: int, seconds: float = 600.0) -> int:
    """Exit code of a fork, negative for a signal. Raises: TimeoutError after killing it."""
    deadline = time.monotonic() + seconds
    while True:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() > deadline:
            os.kill(pid, 9)
            os.waitpid(pid, 0)
            raise TimeoutError(f"no end within {seconds:.0f} s")
        time.sleep(0.005)


def command(words: list[str], log: Path, before: Callable[[], object] | None = None) -> int:
    """Process id of the command ``kalman-rl`` in a fork; ``before`` is called in it first."""

    def work() -> int:
        from kalman_rl.cli.main import main

        if before is not None:
            before()
        return main(words)

    return forked(work, log)


def program(words: list[str], log: Path) -> int:
    """Process id of the command ``kalman-rl`` in a Python of its own."""
    words = [sys.executable, "-m", "kalman_rl.cli.main", *words]
    return forked(lambda: os.execv(sys.executable, words), log)
