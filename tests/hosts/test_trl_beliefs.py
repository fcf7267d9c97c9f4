"""Beliefs and budgets inside the TRL trainer: advantages, allocations, rounds, resume, two ranks."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("trl")
from datasets import Dataset
from transformers import LlamaForCausalLM

from kalman_rl.beliefs import make_belief
from kalman_rl.errors import ConfigError, NumericError, RunError
from kalman_rl.hosts.trl import KalmanGRPOConfig, KalmanGRPOTrainer, TokenBatch
from kalman_rl.hosts.trl import rows as batches
from kalman_rl.sampling.budget import Budget
from tests.hosts.test_trl import ROWS, History, model_path, settings, tokenizer, two_ranks

__all__ = ["model_path"]  # a fixture

METRICS = {
    "budget/used",
    "budget/saved",
    "budget/prompts",
    "budget/largest",
    "groups/informative",
    "belief/coverage_90",
    "belief/retired",
    "belief/returned",
    "belief/noise_factor",
    "belief/informative",
}


def odd_first(completions: list[str], **columns: Any) -> list[float]:
    """0/1 reward that this model gets right now and then."""
    return [float(text[:1] in "13579" and text != "") for text in completions]


def trained(
    output: Path,
    model_path: str,
    reward: Any = odd_first,
    resume: Any = None,
    rows: Any = None,
    callbacks: Any = (),
    **changes: Any,
) -> tuple[KalmanGRPOTrainer, list[TokenBatch], History]:
    seen: list[TokenBatch] = []
    history = History()
    changes = {"belief": "auto", "method": "grpo", "learning_rate": 1e-3} | changes
    trainer = KalmanGRPOTrainer(
        model=LlamaForCausalLM.from_pretrained(model_path),
        reward_funcs=reward,
        args=KalmanGRPOConfig(**settings(output, **changes)),
        train_dataset=Dataset.from_list(rows or ROWS),
        processing_class=tokenizer(),
        observers=[seen.append],
        callbacks=[history, *callbacks],
    )
    trainer.train(resume_from_checkpoint=resume)
    return trainer, seen, history


def flat(state: Any) -> list[Any]:
    """Everything in a nested state, in order, tensors as lists."""
    if isinstance(state, torch.Tensor):
        return state.flatten().tolist()
    if isinstance(state, dict):
        return [item for key, value in state.items() for item in (key, *flat(value))]
    if isinstance(state, (list, tuple)):
        return [item for value in state for item in flat(value)]
    return [state]


ALLOCATIONS = {
    "fixed": {},
    "predictive": {"allocation": "predictive", "candidates": 4},
    "rounds": {"allocation": "rounds", "rounds": [1, 2], "max_rounds": 3, "candidates": 4},
    "rounds by source": {"allocation": "rounds", "source_column": "data_source", "candidates": 4},
    "mixed groups, rounds": {"allocation": "rounds", "rounds": [2, 4], "aim": "mixed_groups"},
}


@pytest.mark.parametrize("case", ALLOCATIONS)
def test_trains_and_logs(case: str, model_path: str, tmp_path: Path) -> None:
    trainer, seen, history = trained(tmp_path, model_path, max_steps=8, **ALLOCATIONS[case])
    generated = [log for log in history.logs if "budget/used" in log]
    assert len(generated) == 4
    for log in generated:
        assert set(log) >= METRICS
        assert log["budget/used"] == 16 and log["budget/saved"] == 0
        assert 0 <= log["belief/coverage_90"] <= 1 and 0 <= log["groups/informative"] <= 1
        assert log["frac_reward_zero_std"] == pytest.approx(1 - log["groups/informative"])
    assert any(log["grad_norm"] > 0 for log in history.logs)
    assert trainer.num_generations == 4, "TRL's own number of generations is back"
    if case != "fixed":
        counts = [batch.inputs["prompt_id"] for batch in seen]
        assert any(c.count(c[0]) != 4 for c in counts), "the belief should divide unevenly at some point"


def test_fixed_advantages_are_the_beliefs(model_path: str, tmp_path: Path) -> None:
    """What the trainer used equals the belief fed by hand with the same rewards in the same order."""
    _, seen, _ = trained(tmp_path, model_path, max_steps=6)
    belief = make_belief("auto")
    for start in range(0, len(seen), 2):
        step, pair = seen[start].step, seen[start : start + 2]
        ids = [name for batch in pair for name in batch.inputs["prompt_id"]]
        reward = torch.cat([batch.inputs["rewards"] for batch in pair]).double()
        used = torch.cat([batch.inputs["advantages"] for batch in pair])
        found = belief.advantages(ids, reward, step=step)
        torch.testing.assert_close(used, found.advantage.float(), rtol=1e-5, atol=1e-6)
        belief.update(ids, reward, step=step)


def test_a_belief_is_not_the_groups_own_mean(model_path: str, tmp_path: Path) -> None:
    _, seen, _ = trained(tmp_path, model_path, max_steps=6, num_generations=2)
    reward, advantage = seen[-1].inputs["rewards"], seen[-1].inputs["advantages"]
    same = [reward[i] == reward[i + 1] for i in range(0, 8, 2)]
    assert any(same), "the case needs a group of equal rewards"
    assert (advantage != 0).all(), "a group of equal rewards still says something against a belief"


@pytest.mark.parametrize("allocation", ["predictive", "rounds"])
def test_budget_below_the_rows_saves_completions(allocation: str, model_path: str, tmp_path: Path) -> None:
    calls: list[int] = []

    def counting(completions: list[str], **columns: Any) -> list[float]:
        calls.append(len(completions))
        return odd_first(completions)

    _, seen, history = trained(
        tmp_path, model_path, counting, max_steps=4, allocation=allocation, budget=2.5, completions_max=4
    )
    generated = [log for log in history.logs if "budget/used" in log]
    assert [log["budget/used"] for log in generated] == [10, 10]
    assert [log["budget/saved"] for log in generated] == [6, 6]
    assert sum(calls) == 20, "nothing is sampled beyond the budget"
    assert all(log["budget/largest"] <= 4 for log in generated)
    trained_rows = sum(int(batch.rollouts.mask.any(1).sum()) for batch in seen)
    assert trained_rows == 20
    for batch in seen:
        empty = ~batch.rollouts.mask.any(1)
        assert (batch.inputs["num_sequences_in_batch"] == 10).all()
        assert (batch.loss.tokens.coefficient[empty] == 0).all()


@pytest.mark.parametrize("case", ALLOCATIONS)
def test_resume_equals_the_uninterrupted_run(case: str, model_path: str, tmp_path: Path) -> None:
    options = ALLOCATIONS[case] | {"max_steps": 6, "prompt_features": case == "rounds"}
    whole, _, _ = trained(tmp_path / "a", model_path, **options)
    trained(tmp_path / "b", model_path, save_strategy="steps", save_steps=4, **options)
    point = str(tmp_path / "b" / "checkpoint-4")
    resumed, seen, _ = trained(tmp_path / "b", model_path, resume=point, **options)
    assert [batch.step for batch in seen] == [4, 5]
    assert whole.tracking is not None and resumed.tracking is not None
    assert flat(whole.tracking.state_dict()) == flat(resumed.tracking.state_dict())
    for (name, left), right in zip(
        whole.model.state_dict().items(), resumed.model.state_dict().values(), strict=True
    ):
        assert torch.equal(left, right), name


def test_resume_without_a_saved_belief_is_refused(model_path: str, tmp_path: Path) -> None:
    trained(tmp_path, model_path, belief=None, save_strategy="steps", save_steps=2)
    with pytest.raises(RunError, match="got no beliefs about prompts"):
        trained(tmp_path, model_path, resume=str(tmp_path / "checkpoint-2"))


def test_features_are_mean_hidden_states(model_path: str, tmp_path: Path) -> None:
    trainer, _, _ = trained(
        tmp_path, model_path, belief="auto", prompt_features=True, learning_rate=0.0, max_steps=4
    )
    assert trainer.tracking is not None and len(trainer.tracking.features) == 8
    row = next(row for row in ROWS if row["prompt_id"] in trainer.tracking.features)
    model = LlamaForCausalLM.from_pretrained(model_path)
    ids = torch.tensor([tokenizer()(row["prompt"])["input_ids"]])
    with torch.no_grad():
        hidden = model(ids, output_hidden_states=True).hidden_states[-1].mean(1)[0]
    torch.testing.assert_close(trainer.tracking.features[row["prompt_id"]], hidden, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("allocation", ["fixed", "rounds"])
def test_missing_rewards(allocation: str, model_path: str, tmp_path: Path) -> None:
    def sometimes(completions: list[str], **columns: Any) -> list[float | None]:
        return [None if i % 3 == 1 else float(i % 2) for i in range(len(completions))]

    _, seen, _ = trained(tmp_path, model_path, sometimes, allocation=allocation)
    for batch in seen:
        missing = batch.inputs["rewards"].isnan()
        assert (batch.inputs["advantages"][missing] == 0).all()
    assert any(batch.inputs["rewards"].isnan().any() for batch in seen)


@pytest.mark.timeout(300)
def test_two_ranks_hold_one_belief(model_path: str, tmp_path: Path) -> None:
    """Groups straddle ranks, rounds have odd sizes, some completions are saved: one belief all the same."""
    body = """
    import tests.hosts.test_trl_beliefs as b
    saving = dict(rounds=[1, 2], max_rounds=4, budget=3.3, prompt_features=True, source_column="data_source")
    for name, options in (
        ("fixed", dict(prompt_features=True, num_generations=16)),
        ("predictive", dict(allocation="predictive", budget=3.3, candidates=2)),
        ("rounds", dict(allocation="rounds", candidates=2, **saving)),
        ("single", dict(num_generations=1)),
    ):
        sizes = dict(per_device_train_batch_size=4, num_generations=8, max_steps=4)
        trainer, seen, history = b.trained(out / name, model_path, **(sizes | options))
        results[name] = {
            "state": b.flat(trainer.tracking.state_dict()),
            "weights": sum(p.double().abs().sum().item() for p in trainer.model.parameters()),
            "rows": [
                [batch.step, name, reward, mask]
                for batch in seen
                for name, reward, mask in zip(
                    batch.inputs["prompt_id"], batch.inputs["rewards"].tolist(), batch.rollouts.mask.any(1).tolist()
                )
            ],
            "used": [log["budget/used"] for log in history.logs if "budget/used" in log],
        }
    """
    ranks = two_ranks(body, model_path, tmp_path)
    for allocation, used in (
        ("fixed", [16, 16]),
        ("predictive", [7, 7]),
        ("rounds", [7, 7]),
        ("single", [16, 16]),
    ):
        first, second = ranks[0][allocation], ranks[1][allocation]
        assert first["state"] == second["state"] and len(first["state"]) > 50, allocation
        assert first["weights"] == second["weights"], allocation
        assert first["used"] == second["used"] == used, allocation
        rows = [[(row[0], row[1]) for row in rank["rows"] if row[3]] for rank in (first, second)]
        assert len(rows[0]) + len(rows[1]) == sum(used), allocation
        assert len(first["rows"]) == len(second["rows"]) == 16, allocation
        straddle = bool(set(rows[0]) & set(rows[1]))
        assert straddle == (allocation != "single"), (
            f"{allocation}: the case needs groups that straddle ranks"
        )
        assert abs(len(rows[0]) - len(rows[1])) <= len(used), f"{allocation}: ranks share alike"


def noisy(data_source: list[str], **columns: Any) -> list[float]:
    """Rewards around 0 with the noise of their source, from torch's generator."""
    return [float(torch.randn(())) * {"maths": 0.1, "code": 2.0}[name] for name in data_source]


def test_each_source_learns_its_own_noise(model_path: str, tmp_path: Path) -> None:
    options = {"max_steps": 24, "learning_rate": 0.0, "source_column": "data_source"}
    trainer, _, _ = trained(tmp_path, model_path, noisy, **options)
    assert trainer.tracking is not None
    ids = ["p01", "p00"]  # maths, code
    value = trainer.tracking.belief.predict(ids, step=24)
    new = trainer.tracking.belief.predictive(ids, step=24)
    noise = (new.variance - value.variance).sqrt()
    torch.testing.assert_close(noise, torch.tensor([0.1, 2.0], dtype=torch.float64), rtol=0.3, atol=0)


def test_sources_are_columns(model_path: str, tmp_path: Path) -> None:
    columns = "prompt, prompt_id, data_source"
    message = f"^source_column: got 'dataset', expected a column of the dataset, which has {columns}$"
    with pytest.raises(ConfigError, match=message):
        trained(tmp_path, model_path, source_column="dataset")
    options = {"source_column": "data_source", "save_strategy": "steps", "save_steps": 8, "max_steps": 8}
    trained(tmp_path, model_path, **options)
    options |= {"rows": [row | {"data_source": "maths"} for row in ROWS], "max_steps": 10}
    message = "^source_column: got 'maths' for prompt 'p.*', which was of 'code' before"
    with pytest.raises(ConfigError, match=message):
        trained(tmp_path, model_path, resume=str(tmp_path / "checkpoint-8"), **options)


# ---- one completion per prompt

SINGLE = {"num_generations": 1, "per_device_train_batch_size": 4, "max_steps": 4}
OUTSIDE = {
    "tracked": {"belief": "auto", "method": "grpo"},
    "tracked, predictive": {"belief": "auto", "method": "grpo", "allocation": "predictive"},
    "tracked, rounds": {"belief": "auto", "method": "grpo", "allocation": "rounds", "rounds": [1]},
    "batch mean": {"belief": None, "method": "batch_mean"},
    "constant": {"belief": None, "method": "reinforce"},
}


@pytest.mark.parametrize("case", OUTSIDE)
def test_single_completions(case: str, model_path: str, tmp_path: Path) -> None:
    """They train, a resumed run equals the whole one, and no number about groups is made up."""
    options = SINGLE | OUTSIDE[case]
    whole, seen, history = trained(tmp_path / "a", model_path, **options)
    assert whole.num_generations == 1 and type(whole.args.num_generations) is int
    names = [name for batch in seen[:2] for name in batch.inputs["prompt_id"]]
    assert len(names) == 8
    if "," not in case:
        assert len(set(names)) == 8, "every prompt once"
    reward, found = (
        torch.cat([batch.inputs[key] for batch in seen[:2]]) for key in ("rewards", "advantages")
    )
    if case == "batch mean":
        torch.testing.assert_close(found, reward - (reward.sum() - reward) / 7)
    elif case == "tracked":
        first = make_belief("auto").advantages(names, reward.double(), step=0).advantage
        torch.testing.assert_close(found, first.float())
    assert all(log["grad_norm"] > 0 for log in history.logs)
    for log in history.logs:
        assert all(value is not None and math.isfinite(value) for value in log.values()), log
        assert ("groups/informative" in log) == ("frac_reward_zero_std" in log)
        if "," not in case:
            assert "frac_reward_zero_std" not in log
    generated = [log for log in history.logs if "reward_std" in log]
    of_sample = int(whole.tracking is None)  # TRL's own is the sample's
    assert generated[0]["reward_std"] == pytest.approx(reward.std(correction=of_sample).item())

    trained(tmp_path / "b", model_path, save_strategy="steps", save_steps=2, **options)
    point = str(tmp_path / "b" / "checkpoint-2")
    resumed, seen, _ = trained(tmp_path / "b", model_path, resume=point, **options)
    assert [batch.step for batch in seen] == [2, 3]
    if whole.tracking is not None:
        assert flat(whole.tracking.state_dict()) == flat(resumed.tracking.state_dict())
    for left, right in zip(whole.model.parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(left, right)


@pytest.mark.parametrize("method", ["grpo", "rloo", "opo"])
def test_single_completions_need_a_baseline_from_elsewhere(
    method: str, model_path: str, tmp_path: Path
) -> None:
    with pytest.raises(
        ConfigError, match=f"^num_generations: got 1 for method '{method}', .*tracked.*belief='auto'"
    ):
        trained(tmp_path, model_path, belief=None, **(SINGLE | {"method": method}))


def test_trl_still_checks_all_else_of_single_completions(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="can not be both configured"):
        KalmanGRPOConfig(**settings(tmp_path, num_generations=1, generation_batch_size=16))
    alone = KalmanGRPOConfig(**settings(tmp_path, num_generations=1, per_device_train_batch_size=1))
    assert alone.num_generations == 1 and alone.generation_batch_size == 2


# ---- joining and filling


def test_rows_join_fill_and_take() -> None:
    def batch(rows: int, prompt: int, completion: int, start: int) -> dict[str, Any]:
        ids = torch.arange(rows * completion).reshape(rows, completion) + start
        return {
            "prompt_ids": torch.full((rows, prompt), start),
            "prompt_mask": torch.ones(rows, prompt, dtype=torch.long),
            "completion_ids": ids,
            "completion_mask": torch.ones(rows, completion, dtype=torch.long),
            "advantages": torch.arange(rows) + float(start),
            "tags": [f"{start}-{i}" for i in range(rows)],
            "num_items_in_batch": torch.tensor(rows * completion),
        }

    joined = batches.join([batch(2, 3, 2, 10), batch(1, 5, 4, 50)], padding=-7)
    assert joined["prompt_ids"].tolist() == [[-7, -7, 10, 10, 10]] * 2 + [[50] * 5]
    assert joined["prompt_mask"].tolist() == [[0, 0, 1, 1, 1]] * 2 + [[1] * 5]
    assert joined["completion_ids"].tolist() == [[10, 11, -7, -7], [12, 13, -7, -7], [50, 51, 52, 53]]
    assert joined["completion_mask"].sum(1).tolist() == [2, 2, 4]
    assert joined["tags"] == ["10-0", "10-1", "50-0"] and "num_items_in_batch" not in joined
    filled = batches.fill(joined, 5)
    assert len(filled["tags"]) == len(filled["completion_ids"]) == 5
    assert filled["completion_mask"].sum(1).tolist() == [2, 2, 4, 0, 0]
    assert joined["completion_mask"].sum() == 8, "the input is not touched"
    assert batches.take(filled, torch.tensor([2, 0]))["tags"] == ["50-0", "10-0"]


# ---- bad input


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"belief": "gausian"}, "belief: got 'gausian', .*did you mean 'gaussian'"),
        (
            {"belief": None, "allocation": "rounds"},
            "allocation: got 'rounds' for method 'grpo', expected fixed",
        ),
        ({"allocation": "round"}, "allocation: got 'round', expected one of fixed, predictive, rounds"),
        ({"budget": 4.0}, "budget: got 4.0 with allocation='fixed'"),
        ({"budget": 0.0, "allocation": "rounds"}, "budget: got 0.0, expected a mean number"),
        ({"budget": math.nan, "allocation": "rounds"}, "budget: got nan, expected a mean number"),
        ({"budget": 1.0, "allocation": "rounds", "completions_min": 2}, "budget: got 1.0, expected 2 to 32"),
        ({"allocation": "rounds", "rounds": [0]}, r"rounds: got \[0\], expected"),
        ({"allocation": "predictive", "aim": "lite"}, "aim: got 'lite'"),
        ({"allocation": "rounds", "rounds": 3}, "rounds: got 3, expected a list"),
        ({"belief_options": ["rho"]}, "belief_options: got .*, expected options by name"),
        (
            {"belief": None, "source_column": "data_source"},
            "source_column: got 'data_source' for method 'grpo', expected it unset because only a belief",
        ),
        ({"belief_options": {"source": str}, "source_column": "data_source"}, "options: got a source beside"),
        ({"method_options": ["low"]}, "method_options: got .*expected options by name"),
        ({"allocation": "rounds", "reward_noise_variance": -1.0}, "reward_noise_variance: got -1.0"),
        (
            {"allocation": "predictive", "completions_min": 9, "completions_max": 8},
            "completions_min, completions_max: got 9, 8",
        ),
    ],
)
def test_bad_settings(changes: dict[str, Any], message: str, model_path: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        trained(tmp_path, model_path, **changes)


def test_rows_need_a_stable_name(model_path: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="prompt_id: got None, expected a text or integer .*with_indices"):
        trained(tmp_path, model_path, rows=[{"prompt": row["prompt"]} for row in ROWS])
    with pytest.raises(ConfigError, match="prompt_id: got 'same' for two different rows .*differ in prompt"):
        trained(tmp_path, model_path, rows=[{"prompt": row["prompt"], "prompt_id": "same"} for row in ROWS])


@pytest.mark.parametrize("allocation", ["fixed", "predictive", "rounds"])
def test_one_name_for_two_answers_is_refused(allocation: str, model_path: str, tmp_path: Path) -> None:
    shared = [row | {"answer": "1"} for row in ROWS] + [ROWS[0] | {"answer": "2"}]
    with pytest.raises(
        ConfigError, match=rf"prompt_id: got '{ROWS[0]['prompt_id']}' for two .*differ in answer"
    ):
        trained(tmp_path, model_path, rows=shared, allocation=allocation)
    repeated = [row | {"answer": "1"} for row in [*ROWS, ROWS[0]]]
    trainer, _, _ = trained(tmp_path, model_path, rows=repeated, allocation=allocation, max_steps=2)
    assert trainer.state.global_step == 2


@pytest.mark.parametrize("allocation", ["predictive", "rounds"])
def test_one_prompt_with_two_answers_is_scored_with_both(
    allocation: str, model_path: str, tmp_path: Path
) -> None:
    asked: set[tuple[str, str]] = set()

    def noting(completions: list[str], prompts: list[str], answer: list[str], **columns: Any) -> list[float]:
        asked.update(zip(prompts, answer))
        return odd_first(completions)

    twins = [
        {"prompt": row["prompt"], "prompt_id": f"{row['prompt_id']} {a}", "answer": a}
        for row in ROWS[:2]
        for a in "12"
    ]
    trained(tmp_path, model_path, noting, rows=twins, allocation=allocation, max_steps=2, completions_min=1)
    assert asked == {(row["prompt"], answer) for row in ROWS[:2] for answer in "12"}


def test_rewards_outside_the_declared_range_are_named(model_path: str, tmp_path: Path) -> None:
    def large(completions: list[str], **columns: Any) -> list[float]:
        return [7.5] * len(completions)

    with pytest.raises(NumericError, match=r"reward: got 7\.5 at row 0, expected \[0, 1\]"):
        trained(tmp_path, model_path, large, allocation="rounds")
    trainer, _, _ = trained(tmp_path, model_path, large, allocation="rounds", reward_range="real")
    assert trainer.state.global_step == 4


def test_budget_totals() -> None:
    assert Budget().total(4, 16) == 16
    assert Budget("predictive", budget=2.5, completions_max=4).total(4, 16) == 10
    assert Budget("predictive", budget=8.0, completions_max=9).total(4, 16) == 16, (
        "never more than there are rows"
    )
    assert Budget("predictive", completions_max=3).total(4, 16) == 12, "the cap of one prompt holds"
    assert Budget("rounds", budget=3.0, completions_min=2).total(4, 16) == 12
