"""Several rewards: their weighted sum is trained on, each has a curve, the first decides what is correct."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("trl")

from kalman_rl.engine.config import TrainConfig, build, load_toml, validate
from kalman_rl.engine.evaluation import evaluate
from kalman_rl.engine.models.load import load_model
from kalman_rl.engine.runs.reading import read_metrics
from kalman_rl.engine.tasks import guard_reward, load_task, parts_of
from kalman_rl.engine.tasks.weighted import joined
from kalman_rl.errors import ConfigError
from tests.engine.test_train import start

NAMES = ("tests.engine.graded:digits", "tests.engine.graded:length")


def ones(completions: list[Any], **columns: Any) -> list[float | None]:
    return [1.0, None, None][: len(completions)]


def halves(completions: list[Any], **columns: Any) -> list[float | None]:
    return [0.5, 0.5, None][: len(completions)]


def test_the_weighted_sum_of_what_is_there() -> None:
    reward = guard_reward(joined(["a:ones", "b:halves"], [ones, halves], [1.0, -2.0]))
    assert reward(["x", "y", "z"]) == [0.0, -1.0, None]
    assert [part.name for part in parts_of(reward)] == ["ones", "halves"]
    assert joined(["a:ones"], [ones], []) is ones and joined(["a:ones"], [ones], [1.0]) is ones
    same = joined(["a:score", "b.c:score"], [ones, halves], [])
    assert [part.name for part in parts_of(same)] == ["a-score", "b-c-score"]


def test_an_edit_of_any_function_changes_the_source() -> None:
    class Watched:
        def __init__(self, source: str | None) -> None:
            self.source = source

    def source(*of: str | None) -> str | None:
        return joined(["a:one", "b:two"], [Watched(each) for each in of], []).source  # type: ignore[misc]

    assert source("1", "2") == source("1", "2") != source("1", "3")
    assert source("2", "1") != source("1", "2") and source(None, None) is None


def test_each_reward_has_a_curve_and_a_record(model_path: str, tmp_path: Path) -> None:
    path = tmp_path / "run"
    _, code = start(model_path, path, reward=NAMES, reward_weights=(1.0, 0.5), steps=2)
    assert code == 0
    rows = read_metrics(path)
    for row in rows:
        if row["kind"] == "eval":
            digits, length = row["eval/rewards/digits"], row["eval/rewards/length"]
            assert row["eval/sampled_reward"] == pytest.approx(digits + 0.5 * length) and digits > 0
        elif "reward" in row:
            digits, length = row["rewards/digits/mean"], row["rewards/length/mean"]
            assert row["reward"] == pytest.approx(digits + 0.5 * length) and length > 0
    assert {file.name for file in path.glob("rewards*")} == {"rewards-digits.jsonl", "rewards-length.jsonl"}


def test_the_first_reward_decides_what_is_correct(model_path: str, tmp_path: Path) -> None:
    loaded = load_model(model_path, cache=tmp_path, dtype="float32")
    test = load_task("sort12", train_size=1, test_size=2).test

    def wrong(completions: list[Any], **columns: Any) -> list[float]:
        return [0.0] * len(completions)

    def right(completions: list[Any], **columns: Any) -> list[float]:
        return [1.0] * len(completions)

    for functions, accuracy in (([right, wrong], 1.0), ([wrong, right], 0.0)):
        reward = joined(["a:one", "a:two"], functions, [3.0, 3.0])
        found = evaluate(loaded.model, loaded.tokenizer, test, reward, max_completion_tokens=2)
        assert found["eval/sampled_accuracy"] == found["eval/greedy_accuracy"] == accuracy
        assert found["eval/sampled_reward"] == 3.0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"reward": ("no function",)}, "^reward: got 'no function', expected MODULE:FUNCTION"),
        ({"reward": ("a:f", "a:f")}, "^reward: got 'a:f' twice"),
        (
            {"reward": ("a:f", "b:g"), "reward_weights": (1.0,)},
            "^reward_weights: got 1 for 2 reward functions",
        ),
        ({"reward_weights": (1.0,)}, "^reward_weights: got 1 for 0"),
        (
            {"reward": ("a:f",), "reward_weights": (0.0,)},
            "^reward_weights: got .0.0., expected one that is not 0",
        ),
        ({"reward": ("a:f", "b:g"), "reward_noise": 0.1}, "^reward_noise: got 0.1 with several rewards"),
        ({"stop": ("",)}, "^stop: got ''"),
        ({"system": " "}, "^system: got ' ', expected a message"),
        ({"lora_target_modules": ()}, r"^lora_target_modules: got \[\], expected names of layers"),
        ({"lora_target_modules": ("all-linear", "q_proj")}, "^lora_target_modules: .* all-linear alone"),
    ],
)
def test_settings_that_do_not_fit(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        validate(build(TrainConfig, changes))


def test_one_text_in_a_file_is_a_list_of_one(tmp_path: Path) -> None:
    (tmp_path / "run.toml").write_text(
        'reward = "a:f"\nlora_target_modules = "all-linear"\nstop = ["x", "y"]\n'
    )
    config = build(TrainConfig, load_toml(tmp_path / "run.toml"))
    assert (config.reward, config.lora_target_modules, config.stop) == (("a:f",), ("all-linear",), ("x", "y"))
