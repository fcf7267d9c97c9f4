"""The class swapped and nothing else: losses, gradients, logs and weights are those of TRL's own trainer."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("trl")
from datasets import Dataset, IterableDataset
from transformers import LlamaForCausalLM
from trl import GRPOConfig, GRPOTrainer, TrlParser

from kalman_rl import make_method
from kalman_rl.errors import ConfigError, RewardError
from kalman_rl.hosts.trl import KalmanGRPOConfig, KalmanGRPOTrainer
from kalman_rl.hosts.trl.config import check_combination, resolve_method
from kalman_rl.hosts.trl.translate import AGGREGATE, DEFAULTS, RATIO
from kalman_rl.objectives import advantage, aggregate, ratio, trust
from tests.hosts.test_trl import (
    assert_same_curves,
    assert_same_training,
    digit_sum,
    model_path,
    run,
    settings,
    two_ranks,
)
from tests.hosts.tiny_llama import tokenizer

__all__ = ["model_path"]  # a fixture

SEVERAL = {"gradient_accumulation_steps": 2, "steps_per_generation": 4, "per_device_train_batch_size": 4}
"""Two optimizer steps a generation batch, each of two micro-batches."""

SEQUENCE = {"importance_sampling_level": "sequence"}


def length(completions: list[str], **columns: Any) -> list[float | None]:
    """A second reward, which has nothing to say about some completions."""
    return [len(text) / 10 if text[:1] != "3" else None for text in completions]


def both(model_path: str, tmp_path: Path, **changes: Any) -> tuple[Any, Any, Any, Any]:
    rewards = changes.pop("reward", digit_sum)
    mine = run(
        KalmanGRPOTrainer, KalmanGRPOConfig(**settings(tmp_path / "a", **changes)), model_path, reward=rewards
    )
    theirs = run(GRPOTrainer, GRPOConfig(**settings(tmp_path / "b", **changes)), model_path, reward=rewards)
    return *mine, *theirs


def assert_same_class(
    model_path: str, tmp_path: Path, curves: bool = True, **changes: Any
) -> tuple[Any, Any]:
    trainer, mine, theirs, reference = both(model_path, tmp_path, **changes)
    assert_same_training(mine, reference)
    for name, value in theirs.model.state_dict().items():
        torch.testing.assert_close(trainer.model.state_dict()[name], value, rtol=1e-4, atol=2e-5)
    if (
        trainer.args.gradient_accumulation_steps == 1 and curves
    ):  # else TRL averages the means of micro-batches
        assert_same_curves(mine, reference)
    for left, right in zip(mine.logs, reference.logs, strict=True):
        for name in ("kl", "policy_loss", "entropy_coef", "frac_reward_zero_std"):
            assert (name in left) == (name in right), name
            assert left.get(name, 0.0) == pytest.approx(right.get(name, 0.0), rel=2e-4, abs=1e-6), name
    return trainer, theirs


@pytest.mark.parametrize("kind", AGGREGATE)
def test_every_loss_type(kind: str, model_path: str, tmp_path: Path) -> None:
    level = SEQUENCE if kind == "luspo" else {}
    assert_same_class(model_path, tmp_path, loss_type=kind, max_steps=3, **SEVERAL, **level)


@pytest.mark.parametrize("level", RATIO)
@pytest.mark.parametrize("kind", AGGREGATE)
def test_every_loss_type_at_both_levels(kind: str, level: str, model_path: str, tmp_path: Path) -> None:
    """Weights, and every curve of TRL's log."""
    scale = ("group", "batch", "none")[list(AGGREGATE).index(kind) % 3]
    changes = {
        "loss_type": kind,
        "importance_sampling_level": level,
        "scale_rewards": scale,
        "num_iterations": 2,
    }
    assert_same_class(model_path, tmp_path, max_steps=5, **changes)


CASES: dict[str, dict[str, Any]] = {
    "defaults": {"steps_per_generation": None},
    "generation batch": {"steps_per_generation": None, "generation_batch_size": 16},
    "several iterations": {"num_iterations": 2},
    "two-sided": {"loss_type": "grpo", "delta": 1.25},
    "two-sided, micro-batches": {"loss_type": "grpo", "delta": 1.5, **SEVERAL},
    # TRL's curve counts nothing above a band that delta cuts; ours counts what delta drops.
    "two-sided inside the band": {"delta": 1.05, "epsilon": 0.1, "epsilon_high": 0.3, "curves": False},
    "bands": {"epsilon": 0.05, "epsilon_high": 0.1},
    "scale by batch": {"scale_rewards": "batch"},
    "no scale": {"scale_rewards": False},
    "several rewards": {
        "reward": [digit_sum, length],
        "reward_weights": [1.0, 0.5],
        "multi_objective_aggregation": "normalize_then_sum",
    },
    "missing rewards": {"reward": length},
    "gspo": {"loss_type": "grpo", "epsilon": 0.02, **SEQUENCE},
    "gspo, high-entropy tokens": {"loss_type": "grpo", "top_entropy_quantile": 0.5, **SEQUENCE},
    "gspo, kl": {"loss_type": "grpo", "beta": 0.1, **SEQUENCE},
    "cispo by sequence": {
        "loss_type": "cispo",
        "epsilon_high": 1.02,
        "top_entropy_quantile": 0.5,
        **SEQUENCE,
    },
    "kl": {"beta": 0.1, "loss_type": "bnpo"},
    "entropy": {"entropy_coef": 0.1, **SEVERAL},
    "entropy, grpo": {"entropy_coef": 0.1, "loss_type": "grpo", **SEVERAL},
    "entropy of some tokens": {"entropy_coef": 0.1, "top_entropy_quantile": 0.5},
    "adaptive entropy": {
        **{
            "entropy_coef": 0.1,
            "use_adaptive_entropy": True,
            "entropy_target": 2.4,
            "entropy_coef_delta": 0.05,
        },
        **SEVERAL,
    },
    "stale sequences": {"off_policy_mask_threshold": 0.01, "loss_type": "grpo"},
    "truncated completions": {
        "mask_truncated_completions": True,
        "loss_type": "grpo",
        "max_completion_length": 10,
    },
    # TRL's curves by sequence count the emptied ones.
    "truncated completions, luspo": {
        "mask_truncated_completions": True,
        "loss_type": "luspo",
        "curves": False,
        **SEQUENCE,
    },
}


@pytest.mark.parametrize("case", CASES)
def test_settings(case: str, model_path: str, tmp_path: Path) -> None:
    changes = {"max_steps": 3} | CASES[case]
    trainer, theirs = assert_same_class(model_path, tmp_path, **changes)
    assert trainer.entropy_coef == pytest.approx(theirs.entropy_coef)


def test_plain_settings_of_trl(model_path: str, tmp_path: Path) -> None:
    """TRL's own configuration class in our trainer is a swapped class, too."""
    changes = {"max_steps": 2, "loss_type": "bnpo", "scale_rewards": "batch"}
    _, mine = run(KalmanGRPOTrainer, GRPOConfig(**settings(tmp_path / "a", **changes)), model_path)
    _, theirs = run(GRPOTrainer, GRPOConfig(**settings(tmp_path / "b", **changes)), model_path)
    assert_same_training(mine, theirs)


def test_a_run_without_rewards_goes_on_as_trls(model_path: str, tmp_path: Path) -> None:
    def none(completions: list[str], **columns: Any) -> list[None]:
        return [None for _ in completions]

    config = KalmanGRPOConfig(**settings(tmp_path, max_steps=10))
    trainer, history = run(KalmanGRPOTrainer, config, model_path, reward=none)
    assert trainer.state.global_step == 10 and all(log["loss"] == 0 for log in history.logs)


@pytest.mark.timeout(300)
def test_two_processes(model_path: str, tmp_path: Path) -> None:
    """Groups and micro-batches that straddle two gloo ranks."""
    body = """
    kwargs = dict(per_device_train_batch_size=4, num_generations=16, max_steps=2, loss_type="bnpo", beta=0.1)
    for name, cls, config in (
        ("ours", t.KalmanGRPOTrainer, t.KalmanGRPOConfig(**t.settings(out / "a", scale_rewards="batch", **kwargs))),
        ("trl", GRPOTrainer, GRPOConfig(**t.settings(out / "b", scale_rewards="batch", **kwargs))),
    ):
        trainer, history = t.run(cls, config, model_path)
        results[name] = [(h["loss"], h["grad_norm"], h.get("reward", 0.0)) for h in history.logs]
    """
    for rank in two_ranks(body, model_path, tmp_path):
        for mine, theirs in zip(rank["ours"], rank["trl"], strict=True):
            assert mine == pytest.approx(theirs, rel=1e-4, abs=2e-6)


def test_entropy_bonus_beside_a_method(model_path: str, tmp_path: Path) -> None:
    losses = []
    for coefficient in (0.0, 0.5):
        config = KalmanGRPOConfig(
            **settings(tmp_path, method="kpo_diffuse", entropy_coef=coefficient, max_steps=1)
        )
        losses.append(run(KalmanGRPOTrainer, config, model_path)[1].logs[0])
    gained = losses[0]["loss"] - losses[1]["loss"]
    assert gained == pytest.approx(0.5 * losses[0]["entropy"], rel=1e-3)


# ---- the composition


def composed(tmp_path: Path, **changes: Any) -> Any:
    return resolve_method(None, KalmanGRPOConfig(**settings(tmp_path, **changes)))


def test_the_table_has_the_compositions(tmp_path: Path) -> None:
    """Where TRL's settings spell a method of the table, it is that method."""
    for name, changes in {
        "grpo": {"loss_type": "grpo"},
        "dapo": {"loss_type": "dapo", "epsilon_high": 0.28},
        "dr_grpo": {"loss_type": "dr_grpo", "scale_rewards": "none", "max_completion_length": 1024},
        "cispo": {"loss_type": "cispo", "epsilon_high": 5.0},
        "sapo": {"loss_type": "sapo"},
        "vespo": {"loss_type": "vespo"},
        "luspo": {"loss_type": "luspo", "epsilon": 2e-3, "epsilon_high": 2.5e-3, **SEQUENCE},
    }.items():
        assert composed(tmp_path, **changes) == make_method(name)


def test_parts(tmp_path: Path) -> None:
    method = composed(tmp_path, loss_type="bnpo", scale_rewards="batch", epsilon=0.1, delta=3.0)
    assert (method.name, method.ratio, method.aggregate) == ("bnpo", ratio.token, aggregate.token_mean)
    assert (method.advantage, method.trust) == (advantage.BatchScaled(), trust.Clip(0.1, 0.1, 3.0))


def test_defaults_are_trls(tmp_path: Path) -> None:
    mine, theirs = KalmanGRPOConfig(str(tmp_path), bf16=False), GRPOConfig(str(tmp_path), bf16=False)
    for field in dataclasses.fields(GRPOConfig):
        if field.name not in ("logging_dir", "run_name"):
            assert getattr(mine, field.name) == getattr(theirs, field.name), field.name
    named = KalmanGRPOConfig(str(tmp_path), bf16=False, method="grpo")
    assert {name for name in DEFAULTS if getattr(named, name) is not None} == set()


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"loss_type": "grop"}, "loss_type: got 'grop', expected .*did you mean 'grpo'"),
        ({"importance_sampling_level": "word"}, "importance_sampling_level: got 'word'"),
        ({"scale_rewards": "all"}, "scale_rewards: got 'all'"),
        ({"multi_objective_aggregation": "sum"}, "multi_objective_aggregation: got 'sum'"),
        ({"delta": 0.5}, "delta: got 0.5, expected a bound > 1"),
        ({"method_options": {"low": 0.1}}, "method_options: got .* without a method"),
    ],
)
def test_unknown_values(changes: dict[str, Any], text: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=text):
        composed(tmp_path, **changes)


# ---- beside a method


@pytest.mark.parametrize(
    ("method", "changes", "text"),
    [
        ("grpo", {"loss_type": "dapo"}, "loss_type: got 'dapo' beside method 'grpo'.*set method='dapo'"),
        ("kpo_diffuse", {"loss_type": "grpo"}, "loss_type: got 'grpo' beside"),
        ("rloo", {"loss_type": "grpo"}, "loss_type: got 'grpo' beside"),
        ("dr_grpo", {"loss_type": "luspo"}, "loss_type: got 'luspo' beside"),
        ("grpo", {"epsilon": 0.3}, r"epsilon: got 0.3 .*set method_options=\{'low': 0.3\}"),
        ("cispo", {"epsilon_high": 4.0}, r"set method_options=\{'high': 4.0\}"),
        ("cispo", {"epsilon": 0.0}, "epsilon: got 0.0 .*"),
        ("grpo", {"delta": 2.0}, r"set method_options=\{'dual': 2.0\}"),
        ("rloo", {"epsilon": 0.2}, "epsilon: got 0.2 .*leave it out"),
        ("grpo", SEQUENCE, "importance_sampling_level: got 'sequence' .*set method='gspo'"),
        ("dr_grpo", {"scale_rewards": "group"}, "scale_rewards: got 'group'"),
        ("sapo", {"sapo_temperature_neg": 2.0}, r"set method_options=\{'negative': 2.0\}"),
        ("sapo", {"vespo_k_neg": 2.0}, "vespo_k_neg: got 2.0 .*leave it out"),
    ],
)
def test_contradictions_are_refused(method: str, changes: dict[str, Any], text: str, tmp_path: Path) -> None:
    args = KalmanGRPOConfig(**settings(tmp_path, method=method, **changes))
    with pytest.raises(ConfigError, match=text):
        check_combination(resolve_method(None, args), args)


@pytest.mark.parametrize(
    ("method", "changes"),
    [
        (
            "grpo",
            {
                "loss_type": "grpo",
                "epsilon": 0.2,
                "scale_rewards": True,
                "importance_sampling_level": "token",
            },
        ),
        ("dapo", {"loss_type": "dapo", "epsilon_high": 0.28}),
        ("gspo", {"loss_type": "grpo", "epsilon": 3e-4, **SEQUENCE}),
        ("dr_grpo", {"loss_type": "dr_grpo", "scale_rewards": False}),
        ("luspo", {"loss_type": "luspo", "epsilon": 2e-3}),
        ("cispo", {"loss_type": "cispo", "epsilon_high": 5.0}),
        ("sapo", {"loss_type": "sapo", "sapo_temperature_neg": 1.05}),
        ("vespo", {"loss_type": "vespo", "vespo_lambda_pos": 3.0}),
        (
            "grpo",
            {
                "method_options": {"dual": 3.0},
                "delta": 3.0,
                "multi_objective_aggregation": "sum_then_normalize",
            },
        ),
    ],
)
def test_settings_that_say_the_same_are_taken(method: str, changes: dict[str, Any], tmp_path: Path) -> None:
    args = KalmanGRPOConfig(**settings(tmp_path, method=method, **changes))
    check_combination(resolve_method(None, args), args)
    again = dataclasses.replace(args, generation_batch_size=None)
    check_combination(resolve_method(None, again), again)


# ---- command line and data sets


def test_options_on_the_command_line(tmp_path: Path) -> None:
    words = ["--output_dir", str(tmp_path), "--bf16", "False", "--method", "kpo_diffuse"]
    words += ["--method_options", '{"process_noise": 1e-4}', "--correction", "truncated"]
    words += [
        "--correction_options",
        '{"cap": 3.0}',
        "--belief",
        "beta",
        "--belief_options",
        '{"memory": 0.5}',
    ]
    (args,) = TrlParser((KalmanGRPOConfig,)).parse_args_and_config(words)
    assert args.method_options == {"process_noise": 1e-4}
    assert args.belief_options == {"memory": 0.5}
    assert args.correction_options == {"cap": 3.0}
    (plain,) = TrlParser((KalmanGRPOConfig,)).parse_args_and_config(
        ["--output_dir", str(tmp_path), "--bf16", "False"]
    )
    assert plain.method_options == {} and plain.loss_type == "dapo"


def test_belief_without_unused_columns(model_path: str, tmp_path: Path) -> None:
    """``remove_unused_columns`` keeps the column that the belief reads."""
    config = KalmanGRPOConfig(**settings(tmp_path, remove_unused_columns=True, belief="auto", max_steps=2))
    _, history = run(KalmanGRPOTrainer, config, model_path)
    assert len(history.logs) == 2 and all(math.isfinite(log["loss"]) for log in history.logs)


class Digits:
    """An environment that brings its own prompt."""

    def reset(self, **row: Any) -> str:
        return row.get("start", "12") + ">"


CHAT = "{% for message in messages %}{{ message.content }}{{ message.tool_calls or '' }}>{% endfor %}"
"""A chat template that can show tool calls, as TRL asks of it where there are environments."""


def said(completions: list[Any], **columns: Any) -> list[float]:
    return digit_sum([messages[-1]["content"] for messages in completions])


@pytest.mark.parametrize("belief", [None, "auto"])
def test_an_environment_brings_the_prompt(
    belief: str | None, model_path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows without a column ``prompt``, as TRL allows them where environments make it."""
    monkeypatch.setattr("trl.trainer.grpo_trainer.is_jmespath_available", lambda: True)
    words = tokenizer()
    words.chat_template = CHAT
    seen: list[Any] = []
    trainer = KalmanGRPOTrainer(
        model=LlamaForCausalLM.from_pretrained(model_path),
        reward_funcs=said,
        args=KalmanGRPOConfig(**settings(tmp_path, max_steps=2, belief=belief)),
        train_dataset=Dataset.from_list([{"start": f"{i}", "prompt_id": i} for i in range(8)]),
        processing_class=words,
        environment_factory=Digits,
        observers=[seen.append],
    )
    trainer.train()
    first = seen[0].inputs
    assert first["prompt"] == [None] * 8
    shown = words.batch_decode(first["prompt_ids"], skip_special_tokens=True)
    assert shown == [f"{name}>>" for name in first["prompt_id"]]


@pytest.mark.parametrize("streamed", [False, True])
def test_rows_without_a_prompt_are_one_sentence(streamed: bool, model_path: str, tmp_path: Path) -> None:
    rows: Any = Dataset.from_list([{"question": "1>", "prompt_id": i} for i in range(8)])
    if streamed:
        rows = IterableDataset.from_generator(lambda: iter([{"question": "1>"}] * 8))
    with pytest.raises(
        ConfigError, match=r"^train_dataset: got the columns question.*expected a column prompt"
    ):
        KalmanGRPOTrainer(
            model=LlamaForCausalLM.from_pretrained(model_path),
            reward_funcs=digit_sum,
            args=KalmanGRPOConfig(**settings(tmp_path, accelerator_config={"dispatch_batches": False})),
            train_dataset=rows,
            processing_class=tokenizer(),
        ).train()


@pytest.mark.parametrize("belief", [None, "auto"])
def test_an_infinite_reward_is_one_sentence(belief: str | None, model_path: str, tmp_path: Path) -> None:
    def broken(completions: list[str], **columns: Any) -> list[float]:
        return [math.inf if i == 3 else 1.0 for i in range(len(completions))]

    config = KalmanGRPOConfig(**settings(tmp_path, belief=belief))
    with pytest.raises(
        RewardError, match=r"^reward broken: got inf for completion 3 .*return None where there is none$"
    ):
        run(KalmanGRPOTrainer, config, model_path, reward=broken)
