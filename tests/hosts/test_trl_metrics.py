"""What the trainer logs: numbers of the whole step, however it was cut into micro-batches and ranks."""

from __future__ import annotations

import logging
import statistics
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("trl")
from kalman_rl.hosts.trl import KalmanGRPOConfig, KalmanGRPOTrainer
from tests.hosts.test_trl import few_digits, model_path, run, settings, two_ranks

__all__ = ["model_path"]

OF_TIME = (
    "step_time",
    "num_tokens",
    "epoch",
    "learning_rate",
    "frac_reward_zero_std",
    "reward",
    "completions/",
)


def step_of(pieces: int, processes: int = 1, **changes: Any) -> dict[str, Any]:
    """Settings of two optimizer steps on the same 16 completions, each cut into ``pieces`` micro-batches per rank;
    truncated completions are emptied, which leaves rows of 0 to 5 tokens."""
    return {
        "per_device_train_batch_size": 16 // pieces // processes,
        "gradient_accumulation_steps": pieces,
        "steps_per_generation": pieces,
        "num_iterations": 2,
        "num_generations": 4,
        "max_steps": 2,
        "optim": "sgd",
        "learning_rate": 30.0,
        "max_grad_norm": 0.0,
        "mask_truncated_completions": True,
        "temperature": 1.0,
    } | changes


def numbers(log: dict[str, Any]) -> dict[str, float]:
    return {k: v for k, v in log.items() if not k.startswith(OF_TIME) and isinstance(v, float)}


@pytest.mark.parametrize("method", ["grpo", "kpo", "gmpo", "dppo_tv"])
def test_metrics_do_not_depend_on_micro_batches(method: str, model_path: str, tmp_path: Path) -> None:
    runs, empty = {}, 0
    for pieces in (1, 2, 4, 8):
        config = KalmanGRPOConfig(**settings(tmp_path / str(pieces), **step_of(pieces), beta=0.05))
        filled: list[int] = []
        observe = [lambda batch, seen=filled: seen.append(int(batch.rollouts.mask.sum()))]
        _, history = run(KalmanGRPOTrainer, config, model_path, method=method, observers=observe)
        runs[pieces] = [numbers(log) for log in history.logs]
        empty += filled.count(0)
    assert empty, "the case needs a micro-batch without any token"
    first = runs[1]
    assert first[1]["ratio/raw_log_variance"] > 1e-4 and 0 < first[1]["trust/kept"] < 1
    for pieces in (2, 4, 8):
        for log, expected in zip(runs[pieces], first, strict=True):
            assert log == pytest.approx(expected, rel=1e-5, abs=1e-6), pieces


@pytest.mark.timeout(300)
def test_ranks_log_the_numbers_of_all_their_tokens(model_path: str, tmp_path: Path) -> None:
    """Two ranks of two micro-batches each against the same completions in one piece."""
    body = """
    import tests.hosts.test_trl_metrics as m
    config = t.KalmanGRPOConfig(**t.settings(out / "a", method="grpo", **m.step_of(2, 2)))
    batches = []
    trainer, history = t.run(t.KalmanGRPOTrainer, config, model_path, observers=[batches.append])
    results["logs"] = [m.numbers(log) for log in history.logs]
    results["tokens"] = [int(b.rollouts.mask.sum()) for b in batches]
    results["kept"] = [int(b.loss.tokens.kept.sum()) for b in batches]
    results["kl"] = [float((b.loss.tokens.log_ratio.expm1() - b.loss.tokens.log_ratio).sum()) for b in batches]
    results["ratios"] = [b.loss.tokens.log_ratio[b.rollouts.mask].tolist() for b in batches]
    """
    ranks = two_ranks(body, model_path, tmp_path)
    assert ranks[0]["logs"] == ranks[1]["logs"]
    assert len({*ranks[0]["tokens"], *ranks[1]["tokens"]}) > 2, "the case needs pieces of different size"
    for step, log in enumerate(ranks[0]["logs"]):
        piece = slice(2 * step, 2 * step + 2)
        total = {key: sum(sum(r[key][piece]) for r in ranks) for key in ("tokens", "kept", "kl")}
        ratios = [x for r in ranks for part in r["ratios"][piece] for x in part]
        assert log["trust/kept"] == pytest.approx(total["kept"] / total["tokens"], rel=1e-9)
        assert log["policy/kl_old"] == pytest.approx(total["kl"] / total["tokens"], rel=1e-5, abs=1e-9)
        assert log["ratio/max_abs_log_ratio"] == pytest.approx(max(map(abs, ratios)), rel=1e-6)
        assert log["ratio/raw_log_variance"] == pytest.approx(statistics.pvariance(ratios), rel=1e-5)
    assert log["ratio/raw_log_variance"] > 1e-4 and log["trust/kept"] < 1


def test_numbers_between_two_log_lines_are_divided_once(model_path: str, tmp_path: Path) -> None:
    changes = step_of(2) | {"max_steps": 4}
    found = {}
    for every in (1, 4):
        config = KalmanGRPOConfig(**settings(tmp_path / str(every), **changes, logging_steps=every))
        batches: list[Any] = []
        _, history = run(KalmanGRPOTrainer, config, model_path, method="grpo", observers=[batches.append])
        found[every] = history.logs
    tokens = [sum(int(b.rollouts.mask.sum()) for b in batches[i : i + 2]) for i in range(0, 8, 2)]
    (whole,) = found[4]
    for name in ("entropy", "trust/kept", "policy/kl_old", "clip_ratio/region_mean"):
        expected = sum(n * log[name] for n, log in zip(tokens, found[1])) / sum(tokens)
        assert whole[name] == pytest.approx(expected, rel=1e-6, abs=1e-12), name
    largest = max(log["ratio/max_abs_log_ratio"] for log in found[1])
    assert whole["ratio/max_abs_log_ratio"] == pytest.approx(largest, rel=1e-9)
    surrogate = sum(log["objective/surrogate"] for log in found[1]) / 4
    assert whole["objective/surrogate"] == pytest.approx(surrogate, rel=1e-6)


def test_a_step_without_tokens_says_nothing(model_path: str, tmp_path: Path) -> None:
    """Missing, not 0: every completion is cut off and emptied."""
    changes = step_of(2) | {
        "max_completion_length": 1,
        "max_steps": 1,
        "generation_kwargs": {"suppress_tokens": [0, 1]},
        "allow_biased_sampling": True,
    }
    _, history = run(
        KalmanGRPOTrainer, KalmanGRPOConfig(**settings(tmp_path, **changes)), model_path, method="grpo"
    )
    (log,) = history.logs
    for name in ("entropy", "trust/kept", "ratio/effective_sample_size", "ratio/noop", "clip_ratio/low_mean"):
        assert name not in log
    assert log["objective/surrogate"] == 0


@pytest.mark.parametrize("options", [{"method": "dr_grpo"}, {"belief": "auto", "method": "grpo"}])
def test_logged_completions_show_the_advantages_trained_on(
    options: dict[str, Any], model_path: str, tmp_path: Path
) -> None:
    config = KalmanGRPOConfig(**settings(tmp_path, **options, max_steps=2))
    batches: list[Any] = []
    trainer, _ = run(KalmanGRPOTrainer, config, model_path, observers=[batches.append], reward=few_digits)
    shown = sorted(trainer._logs["advantages"])
    assert shown == pytest.approx(
        sorted(a for b in batches for a in b.inputs["advantages"].tolist()), rel=1e-6
    )
    assert len(shown) == 16 and len(set(shown)) > 2


def test_a_clip_that_drops_most_tokens_is_named_once(
    model_path: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """One step without and twelve with ratios that moved."""
    said = {}
    for clip in (0.0, 50.0):
        caplog.clear()
        config = KalmanGRPOConfig(
            **settings(
                tmp_path / str(clip), **step_of(1, num_iterations=13, max_steps=13, learning_rate=1e-3)
            ),
            method="gspo",
            method_options={"low": clip, "high": clip},
        )
        with caplog.at_level(logging.WARNING, logger="kalman_rl"):
            _, history = run(KalmanGRPOTrainer, config, model_path)
        mean = statistics.fmean(log["trust/kept"] for log in history.logs[1:9])
        said[clip] = [m for record in caplog.records if "tokens kept" in (m := record.getMessage())]
        if clip:
            assert mean > 0.5 and said[clip] == []
        else:
            assert mean < 0.5
            expected = f"gspo: got {100 * mean:.0f} % of tokens kept, expected 50 % or more"
            assert said[clip] == [f"{expected}; widen its clip (low 0, high 0 now)"]
