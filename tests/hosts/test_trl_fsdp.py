"""Two gloo ranks under FSDP 2, by accelerate's launcher and the example's file; one of them is killed."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
import yaml

pytest.importorskip("trl")
from kalman_rl.hosts.trl import last_good_checkpoint
from tests.hosts.test_trl import model_path, two_ranks
from tests.hosts.test_trl_ranks import ports, started

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


WRITTEN = """
    def one(name, sent=None, resume=None):
        trainer = train(name, sent, resume=resume)
        write(name + os.environ["RANK"], [trainer.state.global_step, b.flat(trainer.tracking.state_dict())] + [
            p.full_tensor().double().sum().item() for p in trainer.model_wrapped.parameters()
        ])
"""


def launcher(folder: Path) -> tuple[str, ...]:
    """accelerate's launcher with the example's file, made to fit this machine."""
    settings = yaml.safe_load(EXAMPLE.read_text()) | ON_CPU
    settings["fsdp_config"]["fsdp_transformer_layer_cls_to_wrap"] = "LlamaDecoderLayer"
    (folder / "fsdp2.yaml").write_text(yaml.safe_dump(settings))
    return "accelerate.commands.launch", "--config_file", str(folder / "fsdp2.yaml"), "--main_process_port"


@pytest.mark.timeout(600)
def test_sharded_ranks_train_as_whole_ones(model_path: str, tmp_path: Path) -> None:
    """Losses and beliefs equal those of two ranks that each hold all weights, and a resumed run equals a whole one."""
    for name in ("ddp", "fsdp"):
        (tmp_path / name).mkdir()
    fsdp = two_ranks(SHARDED + RUNS, model_path, tmp_path / "fsdp", launcher(tmp_path))
    ddp = two_ranks(RUNS, model_path, tmp_path / "ddp")
    assert [rank["whole"]["weights"] for rank in fsdp] == [["DTensor"]] * 2
    assert [rank["whole"]["weights"] for rank in ddp] == [["Parameter"]] * 2
    for sharded, whole in zip(fsdp, ddp, strict=True):
        assert sharded["whole"]["loss"] == pytest.approx(whole["whole"]["loss"], abs=1e-6)
        assert sharded["whole"]["belief"] == whole["whole"]["belief"]
        assert sharded["rest"]["loss"] == sharded["whole"]["loss"][2:]
        assert sharded["rest"]["belief"] == sharded["whole"]["belief"]


@pytest.mark.timeout(600)
def test_a_killed_rank_ends_the_other_and_the_run_resumes(model_path: str, tmp_path: Path) -> None:
    """Rank 1 gets SIGKILL in step 6: the launcher ends within a minute with an error. Two ranks that go on from the
    checkpoint left behind end with the weights and beliefs of two that nobody killed."""
    body = SHARDED + WRITTEN + "    one('whole')\n    one('killed', signal.SIGKILL)\n"
    with started(body, model_path, tmp_path, "-m", *launcher(tmp_path), ports(1)[0]) as agent:
        agent.wait(timeout=280)
        now, text = time.time(), (tmp_path / "log").read_text()
    assert (tmp_path / "ended-killed").exists(), text[-3000:]
    assert agent.returncode == 1 and now - float((tmp_path / "ended-killed").read_text()) < 60
    assert "Signal 9 (SIGKILL) received by PID" in text
    good = last_good_checkpoint(tmp_path / "killed")
    assert good == tmp_path / "killed" / "checkpoint-4"
    body = SHARDED + WRITTEN + f"    one('killed', resume={str(good)!r})\n"
    with started(body, model_path, tmp_path, "-m", *launcher(tmp_path), ports(1)[0]) as agent:
        agent.wait(timeout=280)
    names = [f"{name}{rank}.json" for name in ("whole", "killed") for rank in (0, 1)]
    assert all((tmp_path / name).exists() for name in names), (tmp_path / "log").read_text()[-3000:]
    results = [json.loads((tmp_path / name).read_text()) for name in names]
    assert all(result == results[0] for result in results)
    assert results[0][0] == 8 and len(results[0][1]) > 50
