"""REPPO: on-policy control whose actor learns through the critic, held back by the divergence from the policy that
sampled (arXiv 2507.11019). ``python -m kalman_rl.reppo --env Pendulum-v1 --steps 200000`` trains.

The learner needs torch alone; environments need the extra ``control``.
"""

from kalman_rl.reppo.learner import Learner, Rollout, soft_lambda_targets
from kalman_rl.reppo.networks import CategoricalPolicy, GaussianPolicy, HLGauss
from kalman_rl.reppo.settings import Settings

__all__ = [
    "CategoricalPolicy",
    "GaussianPolicy",
    "HLGauss",
    "Learner",
    "Rollout",
    "Settings",
    "soft_lambda_targets",
]
