"""The TRL trainer against TRL's own, and every way of running it that a user would try."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import signal
import socket
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("trl")
from datasets import Dataset
from transformers import AutoModelForCausalLM, MixtralConfig, MixtralForCausalLM, TrainerCallback
from trl import GRPOConfig, GRPOTrainer

from kalman_rl import METHODS, make_method
from kalman_rl.errors import AdapterError, ConfigError
from kalman_rl.hosts import trl as adapter
from kalman_rl.hosts.trl import KalmanGRPOConfig, KalmanGRPOTrainer, TokenBatch
from tests.hosts.tiny_llama import model, tokenizer

ROWS = [
    {"prompt": f"{a}{b}>", "prompt_id": f"p{a}{b}", "data_source": "maths" if b % 2 else "code"}
    for a in range(4)
    for b in range(4)
]


@pytest.fixture(scope="module")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A random Llama on disk: with beta > 0 TRL loads the reference model from its path."""
    path = tmp_path_factory.mktemp("model")
    model().save_pretrained(path)
    tokenizer().save_pretrained(path)
    return str(path)


def digit_sum(completions: list[str], **columns: Any) -> list[float]:
    return [sum(int(c) for c in text if c.isdigit()) / 20 for text in completions]


def few_digits(completions: list[str], **columns: Any) -> list[float]:
    return [min(score, 1.0) for score in digit_sum(completions)]


def sixteenths(completions: list[str], **columns: Any) -> list[float]:
    """Exact in float32, so that an advantage of 0 is 0 however it is rounded on the way."""
    return [sum(int(c) for c in text if c.isdigit()) / 16 for text in completions]


def settings(output: Path, **changes: Any) -> dict[str, Any]:
    return {
        "output_dir": str(output),
        "per_device_train_batch_size": 8,
        "num_generations": 4,
        "max_completion_length": 6,
        "steps_per_generation": 2,
        "learning_rate": 1e-2,
        "max_steps": 4,
        "logging_steps": 1,
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "seed": 7,
    } | changes


class History(TrainerCallback):
    """Losses, log lines and gradients (before the optimizer uses them) of a run."""

    def __init__(self) -> None:
        self.logs: list[dict[str, float]] = []
        self.gradients: list[dict[str, torch.Tensor]] = []

    def on_pre_optimizer_step(
        self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any
    ) -> None:
        self.gradients.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if "loss" in logs:
            self.logs.append(dict(logs))


def run(
    trainer_class: Any, config: Any, model_path: str, *, checkpoint: Path | None = None, **kwargs: Any
) -> tuple[Any, History]:
    history = History()
    trainer = trainer_class(
        model=AutoModelForCausalLM.from_pretrained(model_path),
        reward_funcs=kwargs.pop("reward", digit_sum),
        args=config,
        train_dataset=Dataset.from_list(ROWS),
        processing_class=tokenizer(),
        callbacks=[history],
        **kwargs,
    )
    trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    return trainer, history


def ours(
    output: Path,
    model_path: str,
    method: Any,
    *,
    checkpoint: Path | None = None,
    reward: Any = digit_sum,
    **changes: Any,
) -> tuple[Any, History]:
    config = KalmanGRPOConfig(**settings(output, **changes))
    return run(KalmanGRPOTrainer, config, model_path, checkpoint=checkpoint, method=method, reward=reward)


PARITY = {
    "several_steps": {},
    "iterations": {"num_iterations": 2},
    "accumulation": {"gradient_accumulation_steps": 2, "steps_per_generation": 4},
    "on_policy": {"steps_per_generation": 1},
    "kl": {"beta": 0.05},
    "kl_uncorrected": {"beta": 0.05, "use_bias_correction_kl": False},
    "high_entropy_tokens": {"top_entropy_quantile": 0.5},
}
METHOD_TO_TRL = {
    "grpo": {"loss_type": "grpo"},
    "dapo": {"loss_type": "dapo", "epsilon_high": 0.28},
    "dr_grpo": {"loss_type": "dr_grpo", "scale_rewards": "none"},
    "cispo": {"loss_type": "cispo", "epsilon_high": 5.0},
    "sapo": {"loss_type": "sapo"},
}


def assert_same_training(a: History, b: History) -> None:
    assert len(a.logs) == len(b.logs) > 0
    for left, right in zip(a.logs, b.logs, strict=True):
        assert left["loss"] == pytest.approx(right["loss"], rel=1e-4, abs=2e-6)
        assert left["grad_norm"] == pytest.approx(right["grad_norm"], rel=1e-4)
        assert left.get("reward") == right.get("reward")  # logged in steps that generate
    for left, right in zip(a.gradients, b.gradients, strict=True):
        assert left.keys() == right.keys()
        for name in left:
            torch.testing.assert_close(left[name], right[name], rtol=2e-4, atol=1e-6)
    assert any(g.abs().max() > 1e-3 for g in a.gradients[-1].values()), "nothing was trained"


def assert_same_curves(mine: History, reference: History) -> None:
    """Every number that TRL logs, but its clock: a dashboard of TRL's shows the same curves."""
    for left, right in zip(mine.logs, reference.logs, strict=True):
        for name in right.keys() - {"loss", "grad_norm", "step_time"}:
            assert left[name] == pytest.approx(right[name], rel=1e-4, abs=2e-6, nan_ok=True), name


@pytest.mark.parametrize("case", PARITY)
def test_plain_grpo_equals_trl(case: str, model_path: str, tmp_path: Path) -> None:
    _, mine = ours(tmp_path / "a", model_path, "grpo", reward=sixteenths, **PARITY[case])
    theirs = GRPOConfig(**settings(tmp_path / "b", loss_type="grpo", **PARITY[case]))
    _, reference = run(GRPOTrainer, theirs, model_path, reward=sixteenths)
    assert_same_training(mine, reference)
    if "beta" in PARITY[case]:
        assert mine.logs[-1]["kl"] == pytest.approx(reference.logs[-1]["kl"], rel=1e-4)
    assert mine.logs[-1]["entropy"] == pytest.approx(reference.logs[-1]["entropy"], rel=1e-4)
    if case != "accumulation":  # there TRL averages the averages of micro-batches
        assert_same_curves(mine, reference)
        assert "clip_ratio/low_min" in reference.logs[-1]


@pytest.mark.parametrize("name", METHOD_TO_TRL)
def test_other_methods_equal_trl(name: str, model_path: str, tmp_path: Path) -> None:
    options = {"length": 6} if name == "dr_grpo" else {}
    _, mine = ours(tmp_path / "a", model_path, make_method(name, **options))
    theirs = GRPOConfig(**settings(tmp_path / "b", **METHOD_TO_TRL[name]))
    _, reference = run(GRPOTrainer, theirs, model_path)
    assert_same_training(mine, reference)
    assert_same_curves(mine, reference)


def test_gspo_equals_trl_sequence_level(model_path: str, tmp_path: Path) -> None:
    _, mine = ours(tmp_path / "a", model_path, make_method("gspo", low=0.1, high=0.1))
    theirs = GRPOConfig(
        **settings(
            tmp_path / "b",
            loss_type="grpo",
            importance_sampling_level="sequence",
            epsilon=0.1,
            epsilon_high=0.1,
        )
    )
    _, reference = run(GRPOTrainer, theirs, model_path)
    assert_same_training(mine, reference)
    assert_same_curves(mine, reference)
    assert any(0 < log["clip_ratio/region_mean"] < 1 for log in reference.logs), "something is clipped"


def test_a_mixture_of_experts_equals_trl(tmp_path: Path) -> None:
    """The router's loss is in the loss and in the log."""
    torch.manual_seed(0)
    sizes = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2)
    experts = dict(
        num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2, router_aux_loss_coef=0.1
    )
    config = MixtralConfig(
        vocab_size=14, pad_token_id=0, eos_token_id=1, initializer_range=0.2, **sizes, **experts
    )
    path = str(tmp_path / "model")
    MixtralForCausalLM(config).save_pretrained(path)
    _, mine = ours(tmp_path / "a", path, "grpo")
    _, reference = run(GRPOTrainer, GRPOConfig(**settings(tmp_path / "b", loss_type="grpo")), path)
    assert_same_training(mine, reference)
    assert_same_curves(mine, reference)
    assert reference.logs[-1]["aux_loss"] > 0.1


@pytest.mark.parametrize("name", METHODS)
def test_every_method_trains_and_logs(name: str, model_path: str, tmp_path: Path) -> None:
    seen: list[TokenBatch] = []
    # At this rate CAPO's own bounds drop every token that has an advantage: what was left to train on was rounding.
    options = {"objective": 10.0, "policy": 10.0} if name == "capo" else {}
    config = KalmanGRPOConfig(**settings(tmp_path, method=name, method_options=options, max_steps=3))
    reward = few_digits if name == "spo" else digit_sum  # success counts need rewards in [0, 1]
    _, history = run(KalmanGRPOTrainer, config, model_path, observers=[seen.append], reward=reward)
    last = history.logs[-1]
    for metric in (
        "ratio/raw_log_variance",
        "ratio/filtered_log_variance",
        "ratio/effective_sample_size",
        "ratio/raw_sign_switch",
        "ratio/filtered_sign_switch",
        "ratio/noop",
        "trust/kept",
        "trust/clipped_low",
        "trust/clipped_high",
        "policy/kl_old",
        "objective/surrogate",
        "entropy",
    ):
        assert metric in last and last[metric] == last[metric], metric
    assert history.logs[1]["ratio/raw_log_variance"] > 0, "second step of a generation batch is off-policy"
    assert [batch.step for batch in seen] == [0, 1, 2]
    assert any(log["grad_norm"] > 0 for log in history.logs), "nothing was trained"


def test_emptied_rows_are_not_counted(model_path: str, tmp_path: Path) -> None:
    """With truncated completions masked out, the mean is over the sequences that are left (TRL's
    ``loss_type="grpo"`` divides by all rows)."""
    seen: list[TokenBatch] = []
    config = KalmanGRPOConfig(
        **settings(tmp_path, method="grpo", mask_truncated_completions=True, max_steps=2)
    )
    run(KalmanGRPOTrainer, config, model_path, observers=[seen.append])
    filled = sum(int(batch.rollouts.mask.any(dim=1).sum()) for batch in seen)
    assert 0 < filled < 16, "the case needs some but not all rows truncated"
    assert float(seen[0].inputs["num_sequences_in_batch"]) == filled


def test_lora_and_bfloat16_train(model_path: str, tmp_path: Path) -> None:
    from peft import LoraConfig

    model = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.bfloat16)
    config = KalmanGRPOConfig(**settings(tmp_path, method="kpo_diffuse", bf16=True, beta=0.01))
    trainer = KalmanGRPOTrainer(
        model=model,
        reward_funcs=digit_sum,
        args=config,
        train_dataset=Dataset.from_list(ROWS),
        processing_class=tokenizer(),
        peft_config=LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"),
    )
    before = {n: p.clone() for n, p in trainer.model.named_parameters() if p.requires_grad}
    assert before and all("lora" in name for name in before)
    trainer.train()
    after = dict(trainer.model.named_parameters())
    assert any(not torch.equal(before[name], after[name]) for name in before)


def test_resume_equals_the_uninterrupted_run(model_path: str, tmp_path: Path) -> None:
    whole, _ = ours(tmp_path / "a", model_path, "kpo_diffuse", max_steps=4)
    ours(tmp_path / "b", model_path, "kpo_diffuse", max_steps=4, save_strategy="steps", save_steps=2)
    point = tmp_path / "b" / "checkpoint-2"
    resumed, history = ours(tmp_path / "b", model_path, "kpo_diffuse", checkpoint=point, max_steps=4)
    assert len(history.logs) == 2
    for (name, left), right in zip(
        whole.model.state_dict().items(), resumed.model.state_dict().values(), strict=True
    ):
        assert torch.equal(left, right), name


def test_missing_rewards_do_not_move_the_policy(model_path: str, tmp_path: Path) -> None:
    def sometimes(completions: list[str], **columns: Any) -> list[float | None]:
        return [None if i % 3 == 0 else float(i % 2) for i in range(len(completions))]

    seen: list[TokenBatch] = []
    config = KalmanGRPOConfig(**settings(tmp_path, method="rloo", max_steps=2))
    trainer = KalmanGRPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(model_path),
        reward_funcs=sometimes,
        args=config,
        train_dataset=Dataset.from_list(ROWS),
        processing_class=tokenizer(),
        observers=[seen.append],
    )
    trainer.train()
    inputs = seen[0].inputs
    missing = inputs["rewards"].isnan()
    assert missing.any() and not missing.all()
    assert (inputs["advantages"][missing] == 0).all()


def test_on_policy_setting_warns_that_ratios_do_nothing(
    model_path: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, logger=adapter.trainer.__name__):
        _, history = ours(tmp_path, model_path, "kpo", steps_per_generation=1, max_steps=2)
    assert "exactly 0 at every token" in caplog.text
    assert all(log["ratio/noop"] == 1 for log in history.logs)


def test_default_is_off_policy(tmp_path: Path) -> None:
    values = settings(tmp_path, gradient_accumulation_steps=2)
    del values["steps_per_generation"]
    assert KalmanGRPOConfig(**values, method="grpo").steps_per_generation == 8
    assert KalmanGRPOConfig(**values).steps_per_generation == GRPOConfig(**values).steps_per_generation == 2


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"loss_type": "sapo"}, "loss_type"),
        ({"epsilon": 0.1}, "epsilon"),
        ({"epsilon_high": 0.3}, "epsilon_high"),
        ({"delta": 4.0}, "delta"),
        ({"scale_rewards": "none"}, "scale_rewards"),
        ({"importance_sampling_level": "sequence"}, "importance_sampling_level"),
        ({"multi_objective_aggregation": "normalize_then_sum"}, "multi_objective_aggregation"),
        ({"sapo_temperature_pos": 2.0}, "sapo_temperature_pos"),
    ],
)
def test_settings_that_would_be_ignored_are_refused(
    changes: dict[str, Any], name: str, model_path: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=rf"^{name}: got .*expected"):
        ours(tmp_path, model_path, "kpo", **changes)


def test_unknown_method_names_the_nearest(model_path: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="did you mean 'kpo_diffuse'"):
        ours(tmp_path, model_path, "kpo_difuse")


def test_replaced_loss_is_noticed(model_path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def foreign(self: Any, model: Any, inputs: Any) -> torch.Tensor:
        return GRPOTrainer._compute_loss(self, model, inputs)

    monkeypatch.setattr(KalmanGRPOTrainer, "_compute_loss", foreign)
    with pytest.raises(AdapterError, match="got bypassed in the first step"):
        ours(tmp_path, model_path, "kpo")


def test_foreign_hooks_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(GRPOTrainer, "_compute_loss", lambda self, inputs: None)
    with pytest.raises(AdapterError, match=r"trl==1\.16"):
        adapter.check_host()


RANK = """
import json, sys
sys.path.insert(0, {root!r})
import torch, tests.hosts.test_trl as t
from pathlib import Path
from trl import GRPOConfig, GRPOTrainer
out, model_path = Path({out!r}), {model!r}
results = {{}}
{body}
rank = trainer.accelerator.process_index
results["processes"] = trainer.accelerator.num_processes
(out / f"tmp{{rank}}").write_text(json.dumps(results))
(out / f"tmp{{rank}}").rename(out / f"rank{{rank}}.json")
"""


def two_ranks(
    body: str, model_path: str, tmp_path: Path, launcher: tuple[str, ...] = ()
) -> list[dict[str, Any]]:
    """Run ``body`` in two gloo processes; what each left in ``results``. It must define ``trainer``.

    ``launcher``: module and arguments in the place of torch's launcher; the port is appended.

    Judged by the files the ranks write: TRL itself sometimes aborts after training, at process exit.
    """
    script = tmp_path / "ddp.py"
    root = str(Path(__file__).parents[2])
    body = textwrap.dedent(body)
    script.write_text(RANK.format(root=root, out=str(tmp_path), model=model_path, body=body))
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    launcher = launcher or (
        "torch.distributed.run",
        "--nproc-per-node=2",
        "--master-addr=127.0.0.1",
        "--master-port",
    )
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", *launcher, str(port), str(script)],
            env=environment,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
        deadline = time.monotonic() + 240
        while process.poll() is None and time.monotonic() < deadline:
            if len(list(tmp_path.glob("rank*.json"))) == 2:
                break
            time.sleep(0.2)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # the ranks too, whatever state they are in
        process.wait()
    files = sorted(tmp_path.glob("rank*.json"))
    assert len(files) == 2, (tmp_path / "log").read_text()[-3000:]
    ranks = [json.loads(file.read_text()) for file in files]
    assert [rank["processes"] for rank in ranks] == [2, 2]
    return ranks


@pytest.mark.timeout(300)
def test_two_processes_equal_trl(model_path: str, tmp_path: Path) -> None:
    """Two gloo ranks with every group split over both: same losses as TRL's trainer on both ranks."""
    body = """
    kwargs = dict(per_device_train_batch_size=4, num_generations=16, max_steps=2)
    for name, cls, config in (
        ("ours", t.KalmanGRPOTrainer, t.KalmanGRPOConfig(**t.settings(out / "a", method="grpo", **kwargs))),
        ("trl", GRPOTrainer, GRPOConfig(**t.settings(out / "b", loss_type="grpo", **kwargs))),
    ):
        trainer, history = t.run(cls, config, model_path)
        results[name] = [(h["loss"], h["grad_norm"], h.get("reward", 0.0)) for h in history.logs]
        results[name + "_weights"] = sum(p.double().abs().sum().item() for p in trainer.model.parameters())
    """
    ranks = two_ranks(body, model_path, tmp_path)
    for rank in ranks:
        for mine, theirs in zip(rank["ours"], rank["trl"], strict=True):
            assert mine == pytest.approx(theirs, rel=1e-4, abs=2e-6)
        assert rank["ours_weights"] == pytest.approx(rank["trl_weights"], rel=1e-6)
    assert ranks[0]["ours_weights"] == ranks[1]["ours_weights"]
