"""The scripts of ``docs/trl_methods.md`` run, with log-probabilities of a sampler and without."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("trl")
from datasets import Dataset

from kalman_rl.hosts.trl import KalmanGRPOTrainer
from kalman_rl.hosts.trl.config import check_combination
from tests.hosts.test_trl import ROWS, History, digit_sum, model_path, settings, tokenizer

__all__ = ["model_path"]  # a fixture

PAGE = Path(__file__).resolve().parents[2] / "docs" / "trl_methods.md"
SCRIPTS = dict(
    re.findall(r"^## (.*?)\n.*?```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.S | re.M)
)


class Sampled(KalmanGRPOTrainer):
    """Passes on log-probabilities as an engine would, with the digits of its bfloat16."""

    def _generate_single_turn(self, prompt_ids: Any, *rest: Any, **more: Any) -> Any:
        completions, _ = super()._generate_single_turn(prompt_ids, *rest, **more)
        return completions, [self.coarse(p, c) for p, c in zip(prompt_ids, completions, strict=True)]

    @torch.no_grad()
    def coarse(self, prompt: list[int], completion: list[int]) -> list[float]:
        ids = torch.tensor([[*prompt, *completion]])
        logp = (self.model(ids).logits[0, len(prompt) - 1 : -1] / self.temperature).log_softmax(-1)
        return logp.gather(-1, ids[0, len(prompt) :, None])[:, 0].bfloat16().tolist()


@pytest.mark.parametrize("engine", [False, True])
@pytest.mark.parametrize("title", list(SCRIPTS))
def test_script(title: str, engine: bool, model_path: str, tmp_path: Path) -> None:
    """vLLM is not there: a stand-in returns what it would."""
    text = SCRIPTS[title]
    small = {k: v for k, v in settings(tmp_path).items() if f"{k}=" not in text} | {"max_steps": 2}
    history = History()
    names: dict[str, Any] = {
        "my_reward": digit_sum,
        "my_dataset": Dataset.from_list(ROWS),
        "small": small,
        "more": {"callbacks": [history], "processing_class": tokenizer()},
    }
    for written, instead in (
        ("use_vllm=True", "use_vllm=False"),
        ('output_dir="out"', f"output_dir={str(tmp_path)!r}, **small"),
        ('model="my/model"', f"model={model_path!r}, **more"),
    ):
        assert text.count(written) == 1
        text = text.replace(written, instead)
    if engine:
        text = text.replace("trainer = KalmanGRPOTrainer(", "trainer = Sampled(")
        names["Sampled"] = Sampled
    exec(compile(text, f"{PAGE.name}, {title}", "exec"), names)
    trainer, first = names["trainer"], history.logs[0]
    trainer.args.use_vllm = True
    check_combination(trainer.method, trainer.args)  # as written, with vLLM
    if trainer.method.correction is None:  # before anything has moved, only a sampler can differ
        assert (first["ratio/max_abs_log_ratio"] > 1e-4) == engine  # bfloat16 rounds by thousandths
        assert first["ratio/max_abs_log_ratio"] < 0.1
    else:
        assert (first["correction/effective_sample_size"] < 1) == engine
    assert history.logs[-1]["grad_norm"] > 0
