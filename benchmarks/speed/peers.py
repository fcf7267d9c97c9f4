"""General Kalman libraries on the local-level model; each is called as its documentation says.

Most start from the predicted covariance, P_0 + Q in our notation. Slow ones get four rows, and their time is
multiplied. A library that is not installed is skipped with a line.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import numpy as np
import torch


@dataclass(frozen=True)
class Peer:
    """``call()`` filters ``rows`` rows and returns their means (rows, T); ``target``: how much faster ours must
    be."""

    name: str
    call: Callable[[], Any]
    rows: int
    target: float
    missing: bool  # True if it was given the holes


Maker = Callable[[np.ndarray, float, float], Callable[[], Any]]


def _dynamax(z: np.ndarray, q: float, r: float) -> Callable[[], Any]:
    import jax
    import jax.numpy as jnp
    from dynamax.linear_gaussian_ssm import (
        ParamsLGSSM,
        ParamsLGSSMDynamics,
        ParamsLGSSMEmissions,
        ParamsLGSSMInitial,
        lgssm_filter,
    )

    one, zero, none = jnp.ones((1, 1)), jnp.zeros(1), jnp.zeros((1, 0))
    model = ParamsLGSSM(
        initial=ParamsLGSSMInitial(mean=zero, cov=q * one),
        dynamics=ParamsLGSSMDynamics(weights=one, bias=zero, input_weights=none, cov=q * one),
        emissions=ParamsLGSSMEmissions(weights=one, bias=zero, input_weights=none, cov=r * one),
    )
    run = jax.jit(jax.vmap(lambda row: lgssm_filter(model, row).filtered_means))
    values = jnp.asarray(z)[..., None]
    return lambda: run(values).block_until_ready()[..., 0]


def _simdkalman(z: np.ndarray, q: float, r: float) -> Callable[[], Any]:
    import simdkalman

    model = simdkalman.KalmanFilter(
        state_transition=np.eye(1),
        process_noise=q * np.eye(1),
        observation_model=np.eye(1),
        observation_noise=r * np.eye(1),
    )
    start = {"initial_value": np.zeros(1), "initial_covariance": q * np.eye(1)}
    values = z.astype(float)
    only = {"smoothed": False, "filtered": True, "observations": False}
    return lambda: model.compute(values, 0, **start, **only).filtered.states.mean[..., 0]


def _torch_kf(z: np.ndarray, q: float, r: float) -> Callable[[], Any]:
    from torch_kf import GaussianState, KalmanFilter

    one = torch.ones(1, 1)
    model = KalmanFilter(one, one, q * one, r * one)
    values = torch.from_numpy(z).T[..., None, None]

    def run() -> torch.Tensor:
        state = GaussianState(torch.zeros(len(z), 1, 1), torch.zeros(len(z), 1, 1))
        means = []
        for observed in values:
            state = model.update(model.predict(state), observed)
            means.append(state.mean[:, 0, 0])
        return torch.stack(means, 1)

    return run


def _statsmodels(z: np.ndarray, q: float, r: float) -> Callable[[], Any]:
    from statsmodels.tsa.statespace.kalman_filter import KalmanFilter

    def filtered(row: np.ndarray) -> np.ndarray:
        model = KalmanFilter(k_endog=1, k_states=1, k_posdef=1)  # one for each series of data
        model["design", 0, 0] = model["transition", 0, 0] = model["selection", 0, 0] = 1.0
        model["state_cov", 0, 0], model["obs_cov", 0, 0] = q, r
        model.bind(row)
        model.initialize_known(np.zeros(1), np.array([[q]]))
        return model.filter().filtered_state[0]

    return lambda: np.stack([filtered(row) for row in z.astype(float)])


# Rows it is given, how much faster ours must be, and if NaN means missing to it.
MAKERS: dict[str, tuple[Maker, int, float, bool]] = {
    "dynamax": (_dynamax, 64, 8.0, False),
    "simdkalman": (_simdkalman, 64, 500.0, True),
    "torch-kf": (_torch_kf, 64, 1000.0, False),
    "statsmodels": (_statsmodels, 4, 2000.0, True),
}


def peers(z: torch.Tensor, seen: torch.Tensor, q: float, r: float, skipped: list[str]) -> Iterator[Peer]:
    """The installed ones, on rows of z, with holes where ``seen`` is False if they know missing values; why
    others are not there is appended to ``skipped``. Nothing has been checked yet."""
    for name, (maker, rows, target, missing) in MAKERS.items():
        try:
            label = f"{name} {version(name)}"
            shown = torch.where(seen, z, torch.nan) if missing else z
            call = maker(shown[:rows].numpy(), q, r)
            call()
        except Exception as error:  # whatever a library that is not pinned here may raise
            skipped.append(f"{name}: skipped ({type(error).__name__}: {error})")
            continue
        yield Peer(label, call, min(rows, len(z)), target, missing)
