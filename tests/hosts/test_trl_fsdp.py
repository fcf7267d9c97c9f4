"""Two gloo ranks under FSDP 2, by accelerate's launcher and the example's file."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

pytest.importorskip("trl")
from tests.hosts.test_trl import model_path, two_ranks

__all__ = ["model_path"]  # a fixture

EXAMPLE = Path(__file__).parents[2] / "examples" / "scale" / "fsdp2.yaml"
ON_CPU = {"num_processes": 2, "mixed_precision": "no", "use_cpu": True}

SHARDED = """
    from accelerate.state import PartialState
    from accelerate.utils import DistributedType
    plain = PartialState.__init__
    def sharded(self, *args, **kwargs):
        # accelerate offers FSDP to GPUs only; torch shards over gloo as well.
        plain(self, *args, **kwargs)
        if PartialState._shared_state.get("distributed_type") is DistributedType.MULTI_CPU:
            PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
    PartialState.__init__ = sharded
"""
RUNS = """
    from tests.hosts.test_trl_beliefs import flat
    from kalman_rl.hosts.trl import KalmanGRPOConfig, KalmanGRPOTrainer
    def one(name, checkpoint=None):
        global trainer
        config = KalmanGRPOConfig(**t.settings(
            out / name, per_device_train_batch_size=4, belief="auto", allocation="predictive",
            save_strategy="steps", save_steps=2,
        ))
        trainer, history = t.run(
            KalmanGRPOTrainer, config, model_path, checkpoint=checkpoint, method="grpo", reward=t.few_digits
        )
        return {
            "loss": [log["loss"] for log in history.logs],
            "belief": flat(trainer.tracking.state_dict()),
            "weights": sorted({type(p).__name__ for p in trainer.model_wrapped.parameters()}),
        }
    results["whole"] = one("whole")
    results["rest"] = one("rest", out / "whole" / "checkpoint-2")
"""


@pytest.mark.timeout(600)
def test_sharded_ranks_train_as_whole_ones(model_path: str, tmp_path: Path) -> None:
    """Losses and beliefs equal those of two ranks that each hold all weights, and a resumed run equals a whole one."""
    settings = yaml.safe_load(EXAMPLE.read_text()) | ON_CPU
    settings["fsdp_config"]["fsdp_transformer_layer_cls_to_wrap"] = "LlamaDecoderLayer"
    (tmp_path / "fsdp2.yaml").write_text(yaml.safe_dump(settings))
    for name in ("ddp", "fsdp"):
        (tmp_path / name).mkdir()
    launcher = ("accelerate.commands.launch", "--config_file", str(tmp_path / "fsdp2.yaml"))
    fsdp = two_ranks(SHARDED + RUNS, model_path, tmp_path / "fsdp", (*launcher, "--main_process_port"))
    ddp = two_ranks(RUNS, model_path, tmp_path / "ddp")
    assert [rank["whole"]["weights"] for rank in fsdp] == [["DTensor"]] * 2
    assert [rank["whole"]["weights"] for rank in ddp] == [["Parameter"]] * 2
    for sharded, whole in zip(fsdp, ddp, strict=True):
        assert sharded["whole"]["loss"] == pytest.approx(whole["whole"]["loss"], abs=1e-6)
        assert sharded["whole"]["belief"] == whole["whole"]["belief"]
        assert sharded["rest"]["loss"] == sharded["whole"]["loss"][2:]
        assert sharded["rest"]["belief"] == sharded["whole"]["belief"]
