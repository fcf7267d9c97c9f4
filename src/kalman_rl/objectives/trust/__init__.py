"""Trust regions: which tokens may still move, and how far."""

from kalman_rl.objectives.trust.balance import MAX_POINTS, Balance, First, Measure
from kalman_rl.objectives.trust.clip import (
    LOG_WEIGHT_CAP,
    Band,
    Cap,
    Clip,
    GeometricClip,
    SoftGate,
    Trust,
    TrustRegion,
    everything,
    log_likelihood,
    unclipped,
    weight_of,
)
from kalman_rl.objectives.trust.curvature import (
    CHUNK_NUMBERS,
    Adam,
    CurvatureMask,
    last_layer_step,
    predicted_effect,
)
from kalman_rl.objectives.trust.decoupled import Decoupled
from kalman_rl.objectives.trust.divergence import (
    Averaged,
    Divergence,
    DivergenceMask,
    binary_kl,
    binary_tv,
    log_complement,
    log_probabilities,
    ratio_distance,
    top_k_kl,
    top_k_tv,
    top_k_with_sampled,
)
from kalman_rl.objectives.trust.gamma import LOG_FLOOR, Gamma
from kalman_rl.objectives.trust.moment import SecondMoment
from kalman_rl.objectives.trust.prefix import PrefixBudget
from kalman_rl.objectives.trust.quadratic import Quadratic

__all__ = [
    "CHUNK_NUMBERS",
    "LOG_FLOOR",
    "LOG_WEIGHT_CAP",
    "MAX_POINTS",
    "Adam",
    "Averaged",
    "Balance",
    "Band",
    "Cap",
    "Clip",
    "CurvatureMask",
    "Decoupled",
    "Divergence",
    "DivergenceMask",
    "First",
    "Gamma",
    "GeometricClip",
    "Measure",
    "PrefixBudget",
    "Quadratic",
    "SecondMoment",
    "SoftGate",
    "Trust",
    "TrustRegion",
    "binary_kl",
    "binary_tv",
    "everything",
    "last_layer_step",
    "log_complement",
    "log_likelihood",
    "log_probabilities",
    "predicted_effect",
    "ratio_distance",
    "top_k_kl",
    "top_k_tv",
    "top_k_with_sampled",
    "unclipped",
    "weight_of",
]
