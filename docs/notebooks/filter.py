# %% [markdown]
# # A Kalman filter over token ratios: the dial from GRPO to GSPO
#
# After an optimizer step the policy gives each token of a completion another probability. The log-ratio `l_t
# = logp_t - logp_old_t` is noisy: most of its movement is the token's own, little is the sequence's. A filter
# takes it as an observation of a slowly moving value.

# %%
import math

import torch

from kalman_rl import Rollouts, causal_filter, make_method, policy_loss
from kalman_rl import plot as plots

generator = torch.Generator().manual_seed(1)
length = 80
drift = 0.03 * torch.randn(1, length, generator=generator).cumsum(1)
ratio = drift + 0.25 * torch.randn(1, length, generator=generator)

# %% [markdown]
# ## What the filter believes
#
# `Q` is how far the value moves from token to token, `R` how noisy a token is. Without a mask every token is
# observed.

# %%
filtered = causal_filter(ratio, process_noise=0.03**2, observation_noise=0.25**2, initial_variance=math.inf)
ax = plots.posterior(filtered, ratio)
_ = ax.plot(range(1, length + 1), drift[0].tolist(), color="black", linewidth=0.8)
# %% [markdown]
# A masked token, such as the output of a tool, is a missing observation: time passes, nothing is learned, and
# the band widens.

# %%
mask = torch.ones_like(ratio, dtype=torch.bool)
mask[:, 30:50] = False
_ = plots.posterior(
    causal_filter(ratio, mask, process_noise=0.03**2, observation_noise=0.25**2, initial_variance=math.inf),
    ratio,
)
# %% [markdown]
# ## The dial
#
# Only `Q / R` and the start matter. A filter that believes every token is GRPO's token ratio; one that
# believes in a constant is the mean of the log-ratios so far, a causal GSPO; with a start that is certain of
# zero there is no ratio at all.

# %%
_ = plots.dial(ratio)
# %%
_ = plots.dial(ratio, initial_variance=0.0)
# %% [markdown]
# ## In a loss
#
# The same dial in a method: how much of the ratios' spread is left, and what share of tokens a clip of 0.05
# keeps.

# %%
rows = Rollouts(
    logp_old=torch.full((4, length), -1.0),
    reward=torch.tensor([1.0, 0.0, 1.0, 0.0]),
    group=torch.tensor([0, 0, 1, 1]),
)
moved = rows.logp_old + 0.25 * torch.randn(4, length, generator=generator)
kept = {}
for noise in (math.inf, 1.0, 1e-2, 1e-4, 0.0):
    method = make_method("kpo_diffuse", process_noise=noise, low=0.05, high=0.05)
    metrics = policy_loss(method, rows, moved).metrics
    kept[noise] = metrics["trust/kept"].item()
    spread = metrics["ratio/filtered_log_variance"].sqrt().item()
    print(f"Q / R = {noise:<7g} spread of the log-weights {spread:.3f}   kept {kept[noise]:.0%}")
assert kept[0.0] > kept[math.inf]
