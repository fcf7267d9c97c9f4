"""Pictures show the numbers that they were given."""

from __future__ import annotations

import math

import pytest
import torch

pytest.importorskip("matplotlib")
from matplotlib import pyplot as plt

from kalman_rl import Gaussian, causal_filter, causal_mean, plot

plt.switch_backend("Agg")
Z = torch.randn(2, 6, generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True)
def close() -> object:
    yield
    plt.close("all")


def heights(line: object) -> list[float]:
    return [float(value) for value in line.get_ydata()]


def test_posterior_has_the_mean_and_two_deviations() -> None:
    filtered = causal_filter(Z, process_noise=0.1, observation_noise=1.0, initial_variance=math.inf)
    ax = plot.posterior(filtered, Z, row=1)
    observed, believed = ax.get_lines()
    assert heights(observed) == Z[1].tolist() and heights(believed) == filtered.state.mean[1].tolist()
    band = ax.collections[0].get_paths()[0].vertices[:, 1]
    lowest = (filtered.state.mean - 2 * filtered.state.variance.sqrt())[1].min().item()
    assert band.min() == pytest.approx(lowest)


def test_the_dial_ends_at_the_token_and_at_the_running_mean() -> None:
    ax = plot.dial(Z, (math.inf, 0.5, 0.0))
    token, between, running = map(heights, ax.get_lines())
    assert token == Z[0].tolist()
    assert running == pytest.approx((Z.cumsum(1) / torch.arange(1, 7))[0].tolist())
    expected = causal_mean(Z, process_noise=0.5, observation_noise=1.0, initial_variance=math.inf)
    assert between == expected[0].tolist()
    assert [text.get_text() for text in ax.get_legend().get_texts()][::2] == [
        "Q / R = inf (GRPO)",
        "Q / R = 0 (GSPO so far)",
    ]


def test_values_and_completions() -> None:
    one, other = (
        Gaussian(torch.tensor([0.1, 0.9]), torch.tensor([0.04, 0.01])),
        Gaussian(Z[0, :2], Z[1, :2] ** 2),
    )
    _, ax = plt.subplots()
    assert plot.values({"before": one, "after": other}, truth=[0.2, 0.8], ax=ax) is ax
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["truth", "before", "after"]
    assert ax.containers[0].has_yerr and heights(ax.containers[0][0]) == pytest.approx([0.1, 0.9])
    points = plot.spent([3, 7], [0.5, 0.1]).collections[0].get_offsets()
    assert points.tolist() == [[0.5, 3.0], [0.1, 7.0]]
