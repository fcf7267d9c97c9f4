"""Ratios: how likely the current policy is to produce a token, against the policy it was sampled from."""

from kalman_rl.objectives.ratio.learned import (
    AutoFiltered,
    Series,
    check_memory,
    innovation_sums,
    observed_series,
)
from kalman_rl.objectives.ratio.robust import BINS, NORMAL_MEDIAN, RobustFiltered, clipped
from kalman_rl.objectives.ratio.token_noise import (
    NoiseFiltered,
    NoiseModel,
    calibrate,
    noise_sums,
    one_minus_p_squared,
)
from kalman_rl.objectives.ratio.transforms import (
    BehaviourToken,
    KalmanFiltered,
    Lagged,
    PrefixMinimum,
    Ratio,
    behaviour,
    one,
    sequence_mean,
    token,
    token_log_ratio,
)

__all__ = [
    "BINS",
    "NORMAL_MEDIAN",
    "AutoFiltered",
    "BehaviourToken",
    "KalmanFiltered",
    "Lagged",
    "NoiseFiltered",
    "NoiseModel",
    "PrefixMinimum",
    "Ratio",
    "RobustFiltered",
    "Series",
    "behaviour",
    "calibrate",
    "check_memory",
    "clipped",
    "innovation_sums",
    "noise_sums",
    "observed_series",
    "one",
    "one_minus_p_squared",
    "sequence_mean",
    "token",
    "token_log_ratio",
]
