# %% [markdown]
# # Quick start: how many completions does a prompt deserve?
#
# As many as it takes to know its value. A Kalman filter holds what is believed of a prompt, and sampling goes
# on until the belief is narrow enough. Everything here runs on a CPU in seconds: the environment draws
# rewards at a success rate; a language model takes its place with `LanguageModelEnvironment`.

# %%
import torch

from kalman_rl import (
    Gaussian,
    KalmanPreferenceTracker,
    SimulatedPreferenceEnv,
    make_belief,
    run_adaptive_sampling,
)
from kalman_rl import plot as plots

# %% [markdown]
# ## One prompt
#
# `history` has a row for every round: the mean of the belief, its variance, and how much narrower it is than
# one reward, in nats.

# %%
env = SimulatedPreferenceEnv(success=0.3, dim=64, seed=0)
tracker = KalmanPreferenceTracker(dim=128, Q_val=1e-5, R_val=1.0)
k_taken, history = run_adaptive_sampling(env, tracker, threshold=1.5)
print(f"{k_taken} completions, {history[-1]['stop_reason']}")

rounds = Gaussian(*(torch.tensor([row[name] for row in history]) for name in ("mean", "variance")))
ax = plots.values({"belief after each round": rounds})
ax.axhline(0.3, color="black", linewidth=0.8)
_ = ax.set_xlabel("round")
# %% [markdown]
# ## Forty prompts
#
# Prompts that always or never succeed are clear after a few completions. Those in between take more.

# %%
rates = torch.linspace(0.01, 0.99, 40).tolist()
counts = []
for number, rate in enumerate(rates):
    env = SimulatedPreferenceEnv(success=rate, dim=64, seed=number)
    counts.append(run_adaptive_sampling(env, KalmanPreferenceTracker(dim=128), threshold=1.5)[0])
print(f"{sum(counts)} completions in all; 32 for everybody would be {32 * len(counts)}")
_ = plots.spent(counts, rates)
# %% [markdown]
# ## In training: one completion a prompt
#
# A belief that is kept from step to step is the baseline of the advantage. After some visits it knows prompts
# apart, so one completion is enough where a group of eight was needed to learn how hard a prompt is.

# %%
generator = torch.Generator().manual_seed(0)
truth = torch.tensor([0.05, 0.2, 0.5, 0.8, 0.95], dtype=torch.float64)
ids = ["hopeless", "hard", "even", "easy", "solved"]
belief = make_belief("auto")
early = None
for step in range(40):
    reward = torch.bernoulli(truth, generator=generator)
    belief.update(ids, reward, step=step)
    if step == 3:
        early = belief.predict(ids, step=step + 1)
late = belief.predict(ids, step=40)
ax = plots.values({"after 4 visits": early, "after 40 visits": late}, truth=truth.tolist())
_ = ax.set_xticks(range(5), ids)

# %% [markdown]
# The advantage of a reward is the reward minus what was expected before it. A reward never moves its own
# baseline:

# %%
reward = torch.bernoulli(truth, generator=generator)
now = belief.advantages(ids, reward, step=40)
other = belief.advantages(ids, 1 - reward, step=40)
assert torch.equal(now.baseline, other.baseline)
for name, r, b, a in zip(ids, reward.tolist(), now.baseline.tolist(), now.advantage.tolist()):
    print(f"{name:9} reward {r:.0f}  expected {b:.2f}  advantage {a:+.2f}")

# %% [markdown]
# In TRL this is `KalmanGRPOConfig("out", belief="auto", num_generations=1)`, on the command line `kalman-rl
# train --advantage tracked`.
