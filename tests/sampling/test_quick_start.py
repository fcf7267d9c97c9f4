"""The quick start as written, the environments, and what the threshold does."""

from __future__ import annotations

import math
import statistics

import pytest
import torch
from torch import Tensor

import kalman_rl
from kalman_rl import KalmanPreferenceTracker, SimulatedPreferenceEnv, run_adaptive_sampling
from kalman_rl.errors import ConfigError, NumericError, RewardError, ShapeError
from kalman_rl.sampling.one_prompt.environment import PreferenceEnvironment


def test_the_quick_start_verbatim() -> None:
    env = SimulatedPreferenceEnv(success=0.5)

    tracker = KalmanPreferenceTracker(dim=128, Q_val=1e-5, R_val=1.0)
    k_taken, history = run_adaptive_sampling(env, tracker, threshold=1.5)

    assert isinstance(k_taken, int) and 2 <= k_taken <= 32 and env.taken == k_taken
    assert set(history[0]) >= {"mean", "variance", "n", "criterion", "stop_reason"}
    assert [row["stop_reason"] for row in history[:-1]] == [None] * (len(history) - 1)
    last = history[-1]
    assert last["stop_reason"] == "confident" and last["n"] == k_taken and last["criterion"] >= 1.5
    assert math.sqrt(last["variance"]) <= math.exp(-1.5) / 2
    assert all(row["criterion"] < 1.5 for row in history[:-1])


def test_the_public_names() -> None:
    for name in ("KalmanPreferenceTracker", "run_adaptive_sampling", "SimulatedPreferenceEnv"):
        assert name in kalman_rl.__all__ and getattr(kalman_rl, name).__name__ == name


# ---- the threshold


def taken(success: float, runs: int = 120, **options: float) -> tuple[float, float]:
    """Mean completions over prompts of this success probability, and its standard error."""
    counts = []
    for seed in range(runs):
        env = SimulatedPreferenceEnv(success=success, dim=4, seed=seed)
        tracker = KalmanPreferenceTracker(dim=4, Q_val=1e-5, R_val=1.0)
        counts.append(float(run_adaptive_sampling(env, tracker, **options)[0]))
    count = torch.tensor(counts)
    return count.mean().item(), (count.std() / math.sqrt(runs)).item()


def test_easy_and_hopeless_prompts_stop_before_hard_but_solvable_ones() -> None:
    """Differences are several times their standard error, 0.1 to 0.4."""
    mean, error = {}, {}
    for success in (0.005, 0.1, 0.3, 0.5, 0.98):
        mean[success], error[success] = taken(success)
    assert max(error.values()) < 0.5
    assert mean[0.005] + 1.2 < mean[0.1] and mean[0.98] + 1.2 < mean[0.1]
    assert mean[0.1] + 3 < mean[0.3] and mean[0.3] + 1 < mean[0.5]


def test_a_higher_threshold_takes_more_and_the_caps_hold() -> None:
    means = [taken(0.5, runs=20, threshold=threshold)[0] for threshold in (0.3, 0.8, 1.2, 1.5, 9.0)]
    assert means == sorted(means) and means[0] == 2 and means[-1] == 32
    env, tracker = SimulatedPreferenceEnv(dim=4), KalmanPreferenceTracker(dim=4)
    k_taken, history = run_adaptive_sampling(env, tracker, 9.0, rounds=(3, 4), n_min=5, n_max=11)
    assert k_taken == 11 and history[-1]["stop_reason"] == "max_samples"
    assert [row["n"] for row in history] == [5, 9, 11]


def test_the_posterior_of_a_prompt_the_tracker_knows_nothing_about() -> None:
    """Beta(a + successes, b + failures) with (a, b) of Jeffreys' prior fused with N(0, 1), by hand."""
    _, history = run_adaptive_sampling(
        SimulatedPreferenceEnv(success=1.0, dim=4), KalmanPreferenceTracker(dim=4, Q_val=0.0)
    )
    mean, variance = 0.5 * 8 / (8 + 1), 1 / (8 + 1)
    size = mean * (1 - mean) / variance - 1
    a, b = mean * size + 6, (1 - mean) * size
    assert history[-1]["n"] == 6
    assert history[-1]["mean"] == pytest.approx(a / (a + b))
    assert history[-1]["variance"] == pytest.approx(a * b / ((a + b) ** 2 * (a + b + 1)))
    assert history[-1]["criterion"] == pytest.approx(0.5 * math.log(0.25 / history[-1]["variance"]))


def test_noisy_rewards_read_their_own_spread() -> None:
    counts = {}
    for noise in (0.3, 2.0):
        runs = []
        for seed in range(30):
            env = SimulatedPreferenceEnv(success=0.5, dim=4, noise=noise, seed=seed)
            runs.append(run_adaptive_sampling(env, KalmanPreferenceTracker(dim=4), n_max=64)[0])
        counts[noise] = sum(runs) / len(runs)
    assert counts[0.3] + 3 < counts[2.0]


def test_the_posterior_of_real_rewards_in_closed_form() -> None:
    rewards, strength, prior, noise = [0.2, 1.7, -0.4], 4.0, 0.5, 2.0

    env = Scripted([torch.tensor(rewards, dtype=torch.float64)], torch.ones(1))
    tracker = KalmanPreferenceTracker(1, Q_val=0.0, R_val=noise, P_val=prior, noise_strength=strength)
    taken, history = run_adaptive_sampling(env, tracker, rounds=(3,), n_min=3, n_max=3)
    pooled = (strength * noise + 2 * statistics.variance(rewards)) / (strength + 2)
    precision = 1 / prior + 3 / pooled
    assert taken == 3 and history[-1]["variance"] == pytest.approx(1 / precision)
    assert history[-1]["mean"] == pytest.approx(sum(rewards) / pooled / precision)
    assert history[-1]["criterion"] == pytest.approx(0.5 * math.log(noise * precision))


@pytest.mark.parametrize(("rewards", "strength"), [([0.2, 1.7, -0.4], None), ([0.2], 4.0)])
def test_without_a_spread_to_learn_from_the_trackers_noise_stands(
    rewards: list[float], strength: float | None
) -> None:
    n = len(rewards)
    env = Scripted([torch.tensor(rewards, dtype=torch.float64)], torch.ones(1))
    tracker = KalmanPreferenceTracker(1, Q_val=0.0, R_val=2.0, P_val=0.5, noise_strength=strength)
    _, history = run_adaptive_sampling(env, tracker, rounds=(n,), n_min=n, n_max=n)
    precision = 1 / 0.5 + n / 2.0
    assert history[-1]["variance"] == pytest.approx(1 / precision)
    assert history[-1]["mean"] == pytest.approx(sum(rewards) / 2.0 / precision)


def test_a_tracker_that_knows_the_prompt_needs_fewer_completions() -> None:
    tracker = KalmanPreferenceTracker(dim=8, Q_val=0.0, R_val=0.25)
    features = torch.zeros(8, dtype=torch.float64).index_fill_(0, torch.tensor([2]), 1.0)
    first, *_, last = (
        run_adaptive_sampling(SimulatedPreferenceEnv(0.5, seed=seed, features=features), tracker)[0]
        for seed in range(6)
    )
    assert last < first
    assert tracker.value(features[None]).mean.item() == pytest.approx(0.5, abs=0.15)
    before = tracker.root.clone()
    run_adaptive_sampling(SimulatedPreferenceEnv(0.5, features=features.roll(1)), tracker, gap=0.0)
    assert not torch.equal(tracker.root, before), "it learns from every prompt"


# ---- environments that misbehave


class Scripted:
    """Answers from a list; an exception in it is raised."""

    def __init__(self, answers: list, features: object = None) -> None:
        self.answers, self.phi = answers, torch.ones(3) if features is None else features

    def features(self) -> Tensor:
        return self.phi

    def sample(self, k: int) -> Tensor:
        answer = self.answers.pop(0)
        if isinstance(answer, BaseException):
            raise answer
        return answer


def test_a_ten_line_environment_is_one() -> None:
    class Dice:
        def features(self) -> Tensor:
            return torch.tensor([1.0, 0.0])

        def sample(self, k: int) -> Tensor:
            return torch.randint(0, 2, (k,)).float()

    assert isinstance(Dice(), PreferenceEnvironment)
    assert run_adaptive_sampling(Dice(), KalmanPreferenceTracker(dim=2))[0] >= 2


def test_what_the_environment_raises_comes_through() -> None:
    """The published loop booked any failure as the full number of samples."""
    tracker = KalmanPreferenceTracker(dim=3)
    before = tracker.root.clone()
    with pytest.raises(ConnectionError, match="scorer is down") as caught:
        run_adaptive_sampling(Scripted([ConnectionError("scorer is down")]), tracker)
    assert torch.equal(tracker.root, before)
    with pytest.raises(KeyError) as caught:
        run_adaptive_sampling(Scripted([torch.tensor([0.0, 1.0]), KeyError("x")]), tracker)
    assert caught.value.__notes__ == ["raised by env.sample(2) after 2 completions of this prompt"]


def test_missing_rewards() -> None:
    tracker, nan = KalmanPreferenceTracker(dim=3), math.nan
    answers = [torch.tensor([nan, 1.0]), torch.tensor([nan, nan]), torch.tensor([1.0, 1.0])]
    k_taken, history = run_adaptive_sampling(Scripted(answers), tracker, 9.0, n_max=6)
    assert k_taken == 6 and [(row["n"], row["known"]) for row in history] == [(2, 1), (4, 1), (6, 3)]
    assert history[0]["mean"] == history[1]["mean"] < history[2]["mean"]
    nothing = [torch.full((2,), nan) for _ in range(3)]
    _, history = run_adaptive_sampling(Scripted(nothing), KalmanPreferenceTracker(dim=3), 0.1, n_max=6)
    assert history[-1]["stop_reason"] == "no_rewards" and history[-1]["known"] == 0
    env = SimulatedPreferenceEnv(success=0.5, dim=3, missing=0.5, seed=1)
    k_taken, history = run_adaptive_sampling(env, KalmanPreferenceTracker(dim=3), n_max=100)
    assert history[-1]["stop_reason"] == "confident" and history[-1]["known"] < k_taken


@pytest.mark.parametrize(
    "features, error, message",
    [
        (torch.tensor([1.0, math.nan, 0.0]), NumericError, "features.*got nan at position 1"),
        (torch.tensor([1.0, 0.0, math.inf]), NumericError, "features.*got inf at position 2"),
        (torch.ones(1, 3), ShapeError, r"got torch.float32 \(1, 3\), expected a floating tensor \(F,\)"),
        (torch.ones(0), ShapeError, r"\(0,\)"),
        (torch.ones(3, dtype=torch.long), ShapeError, "got torch.int64"),
        ([1.0, 2.0], ShapeError, "got list"),
        (torch.ones(5), ShapeError, "got width 5, expected 3"),
    ],
)
def test_features_that_cannot_be(features: object, error: type, message: str) -> None:
    tracker = KalmanPreferenceTracker(dim=3)
    run_adaptive_sampling(SimulatedPreferenceEnv(dim=3), tracker)
    before = tracker.root.clone()
    with pytest.raises(error, match=message):
        run_adaptive_sampling(Scripted([torch.ones(2)] * 9, features), tracker)
    assert torch.equal(tracker.root, before)


@pytest.mark.parametrize(
    "answer, error, message",
    [
        (torch.ones(3), RewardError, r"got \(3,\), expected a tensor \(2,\)"),
        (torch.ones(2, 1), RewardError, r"got \(2, 1\)"),
        ([1.0, 0.0], RewardError, "got list"),
        (None, RewardError, "got NoneType"),
        (torch.tensor([1.0, math.inf]), NumericError, "got reward inf at row 1"),
    ],
)
def test_rewards_that_cannot_be(answer: object, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        run_adaptive_sampling(Scripted([answer]), KalmanPreferenceTracker(dim=3))


@pytest.mark.parametrize(
    "options, message",
    [
        ({"threshold": 0.0}, "threshold: got 0.0"),
        ({"threshold": -1.5}, "threshold: got -1.5"),
        ({"threshold": math.nan}, "threshold: got nan"),
        ({"rounds": ()}, "rounds: got"),
        ({"rounds": (0,)}, "rounds: got"),
        ({"n_min": 0}, "n_min, n_max: got 0"),
        ({"n_min": 9, "n_max": 8}, "n_min, n_max: got 9, 8"),
    ],
)
def test_options_that_cannot_be(options: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        run_adaptive_sampling(SimulatedPreferenceEnv(), KalmanPreferenceTracker(), **options)


# ---- the simulated environment


def test_the_simulated_truth() -> None:
    rewards = SimulatedPreferenceEnv(success=0.3, dim=7, noise=2.0, seed=3).sample(20000)
    assert rewards.mean().item() == pytest.approx(0.3, abs=0.06)
    assert rewards.var().item() == pytest.approx(4 + 0.21, rel=0.05)
    env, twin = (SimulatedPreferenceEnv(success=0.3, dim=7, seed=5) for _ in range(2))
    assert env.features().shape == (7,) and env.features().norm().item() == pytest.approx(1.0)
    assert torch.equal(env.features(), twin.features()) and torch.equal(env.sample(9), twin.sample(9))
    assert set(env.sample(100).tolist()) == {0.0, 1.0}
    assert not torch.equal(env.features(), SimulatedPreferenceEnv(dim=7, seed=6).features())


@pytest.mark.parametrize(
    "options, error",
    [
        ({"success": 1.1}, ConfigError),
        ({"success": math.nan}, ConfigError),
        ({"noise": -1.0}, ConfigError),
        ({"missing": 1.0}, ConfigError),
        ({"dim": 0}, ConfigError),
        ({"features": torch.ones(2, 2)}, ShapeError),
    ],
)
def test_simulations_that_cannot_be(options: dict, error: type) -> None:
    with pytest.raises(error, match=r"^\w+: got"):
        SimulatedPreferenceEnv(**options)


# ---- a language model


@pytest.fixture(scope="module")
def language_model() -> tuple[object, object]:
    pytest.importorskip("transformers")
    from tests.hosts.tiny_llama import model, tokenizer

    return model(), tokenizer()


def has_even_digit(prompts: list[str], completions: list[str], **columns: object) -> list[float]:
    return [float(any(c in "02468" for c in text)) for text in completions]


def test_a_language_model_is_an_environment(language_model: tuple) -> None:
    from kalman_rl.sampling.one_prompt.language_model import LanguageModelEnvironment

    model, tokenizer = language_model
    model.train()
    state = torch.get_rng_state()
    env = LanguageModelEnvironment(model, tokenizer, "12>", has_even_digit, max_new_tokens=3, seed=1)
    tracker = KalmanPreferenceTracker(dim=8, Q_val=1e-5, R_val=1.0)
    k_taken, history = run_adaptive_sampling(env, tracker, threshold=1.5)
    assert len(env.completions) == k_taken == history[-1]["n"] and len(set(env.completions)) > 1
    assert torch.equal(torch.get_rng_state(), state) and model.training
    hidden = model.eval()(**tokenizer(["12>"], return_tensors="pt"), output_hidden_states=True).hidden_states[
        -1
    ]
    torch.testing.assert_close(env.features(), hidden[0].mean(0).detach())
    assert not env.features().requires_grad
    twin = LanguageModelEnvironment(model, tokenizer, "12>", has_even_digit, max_new_tokens=3, seed=1)
    assert torch.equal(twin.sample(2), env._scored(env.completions[:2]))
    assert twin.completions == env.completions[:2]


def test_sampling_follows_the_models_own_distribution(language_model: tuple) -> None:
    from kalman_rl.sampling.one_prompt.language_model import LanguageModelEnvironment

    model, tokenizer = language_model
    env = LanguageModelEnvironment(model, tokenizer, "12>", has_even_digit, max_new_tokens=1)
    with torch.no_grad():
        logits = model.eval()(**tokenizer(["12>"], return_tensors="pt")).logits[0, -1]
    chance = torch.softmax(logits, 0)[tokenizer.convert_tokens_to_ids(list("02468"))].sum().item()
    rewards = env.sample(2000)
    assert rewards.mean().item() == pytest.approx(chance, abs=4 * math.sqrt(chance * (1 - chance) / 2000))


@pytest.mark.parametrize(
    "reward, error, message",
    [
        (lambda prompts, completions: [1.0], RewardError, "got 1 numbers, expected 2"),
        (lambda prompts, completions: ["good", "bad"], RewardError, "expected a number per completion"),
        (lambda prompts, completions: 1.0, RewardError, "got 1.0"),
        (lambda prompts, completions: [0.0, math.inf], NumericError, "got reward inf at row 1"),
        (lambda prompts, completions: 1 / 0, ZeroDivisionError, "division"),
    ],
)
def test_rewards_of_a_language_model_that_cannot_be(
    language_model: tuple, reward: object, error: type, message: str
) -> None:
    from kalman_rl.sampling.one_prompt.language_model import LanguageModelEnvironment

    env = LanguageModelEnvironment(*language_model, "12>", reward, max_new_tokens=2)
    with pytest.raises(error, match=message):
        run_adaptive_sampling(env, KalmanPreferenceTracker(dim=8))


def test_language_model_options_and_missing_rewards(language_model: tuple) -> None:
    from kalman_rl.sampling.one_prompt.language_model import LanguageModelEnvironment

    for options, message in (
        ({"temperature": 0.0}, "temperature: got 0.0"),
        ({"max_new_tokens": 0}, "max_new_tokens: got 0"),
    ):
        with pytest.raises(ConfigError, match=message):
            LanguageModelEnvironment(*language_model, "1>", has_even_digit, **options)
    with pytest.raises(ConfigError, match="no tokens"):
        LanguageModelEnvironment(*language_model, "", has_even_digit)
    env = LanguageModelEnvironment(*language_model, "1>", lambda prompts, completions: [None, 1.0])
    assert env.sample(2).isnan().tolist() == [True, False]
