# %% [markdown]
# # Train a small model and look at its tokens
#
# A model of 113 thousand parameters is trained to sort digits, in seconds on a CPU. Every optimizer step leaves some
# completions with the log-probability of each token before and after the update: what the report's inspector shows.

# %%
import tempfile
from pathlib import Path

from matplotlib import pyplot as plt

from kalman_rl import plot as plots
from kalman_rl.cli.main import main
from kalman_rl.engine.runs import traces
from kalman_rl.engine.runs.reading import read_metrics

run = Path(tempfile.mkdtemp()) / "first"
settings = (
    "--model tiny --task sort_spread --train-size 256 --test-size 32 --lora-rank 0 --advantage tracked "
    "--updates-per-generation 4 --steps 40 --warmup-steps 0 --learning-rate 3e-4 "
    "--eval-every 0 --eval-prompts 16 --quiet"
).split()
assert main(["train", *settings, "--run", str(run)]) == 0

# %%
metrics = read_metrics(run)
steps = [row["step"] for row in metrics if "reward" in row]
ax = plt.subplots(figsize=(7, 3), layout="constrained")[1]
ax.plot(steps, [row["reward"] for row in metrics if "reward" in row])
ax.set_ylim(0, 1)
ax.set_xlabel("step")
_ = ax.set_ylabel("reward in training")
# %% [markdown]
# Ten batches of 64 single completions, each reward known to about 0.06: a start, too short to show that it learns. What
# longer runs show is on the page "What we measured".

# %% [markdown]
# ## The tokens of one step
#
# `logp_old` is the policy that sampled, `logp` the one that is trained. In the last update of a batch they
# differ most.

# %%
files = traces.steps(run)
step = max(files)
columns = ["sequence", "token", "log_ratio", "filtered_log_ratio", "coefficient", "kept"]
problems: list[str] = []
table = traces.read(files[step], columns, problems)
assert table is not None, problems
first = table["sequence"][0]
rows = [row for row in zip(*(table[name] for name in columns)) if row[0] == first]
print(f"step {step}; every column: {', '.join(traces.TRACE_COLUMNS)}")
print("token  log-ratio  filtered  coefficient  kept")
for _, token, raw, filtered, coefficient, kept in rows:
    print(f"{token!r:6} {raw:+9.4f}  {filtered:+8.4f}  {coefficient:11.4f}  {kept}")

# %%
ax = plt.subplots(figsize=(7, 3), layout="constrained")[1]
ax.plot([row[2] for row in rows], "o", color=plots.OBSERVED, label="observed")
ax.plot([row[3] for row in rows], color=plots.BELIEVED, label="filtered")
ax.set_xticks(range(len(rows)), [row[1] for row in rows])
ax.set_ylabel("log-ratio")
_ = ax.legend(frameon=False)
# %% [markdown]
# ## What another method would have done
#
# `replay` recomputes any method on the stored tokens, without the model: what share it keeps, and on which
# tokens the two disagree.

# %%
assert main(["replay", str(run), "--method", "grpo", "--top", "5"]) == 0

# %% [markdown]
# `kalman-rl report RUN` writes all of this as one page, with every token in its colour.
