"""What there is to set, in a run, a study and a demo.

The text under each field is its documentation, on the command line too; its range stands beside its type.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

from annotated_types import Interval

from kalman_rl.engine.strict import Number, Option, Place, Text
from kalman_rl.sampling.budget import Budget

MODELS = ("smollm2", "tiny")
"""Models that need no download; anything else is a directory or a hub id OWNER/NAME."""

REPORTERS = (
    *("none", "azure_ml", "clearml", "codecarbon", "comet_ml", "dagshub", "dvclive", "kubeflow"),
    *("mlflow", "neptune", "swanlab", "tensorboard", "trackio", "wandb"),
)


Changeable = Literal[
    "data",
    "model",
    "code",
    "steps",
    "eval_every",
    "eval_prompts",
    "eval_samples",
    "pool_prompts",
    "save_every",
    "save_total_limit",
    "keep_best",
    "gradient_checkpointing",
    "traces_per_step",
    "report_to",
    "collapse",
    "threads",
    "log_every",
    "reward_timeout",
    "reward_memory",
]
"""What may change when a run is resumed, if it is named: what is watched and kept, how long it goes on, and rows,
weights and code for those who know why. All else decides what has been trained."""


@dataclass(frozen=True)
class Subject:
    """What is trained on what: the first settings of :class:`TrainConfig`."""

    method: Text = "kpo_diffuse"
    """Method, by name (`kalman-rl methods` lists them), or your own as MODULE:FUNCTION."""
    method_options: dict[Text, Number] = field(default_factory=dict)
    """Options of the method as KEY=NUMBER, e.g. `process_noise=1e-4 low=0.05`; in TOML, keys of [method]."""
    model: Text = "smollm2"
    """smollm2, tiny (made on the spot), a directory with a model, or a hub id OWNER/NAME."""
    task: Text = "products"
    """Built-in task to train on: products, chain_sum, chain_sum_2x2, chain_sum_3, gcd, letter_counting, leg_counting,
    spell_backward, word_sorting, sort12, sort16, sort_mixed, sort_peel or sort_spread."""
    data: Place | None = None
    """JSONL, Parquet or CSV file with your rows; replaces the task."""
    test_share: Annotated[float, Interval(ge=0, le=0.99)] = 0.1
    """Share of the prompts of your rows that is held out, where they have no column split."""
    reward: tuple[Text, ...] = ()
    """Your reward functions as MODULE:FUNCTION, in TRL's signature; of several the weighted sum is trained on, and the
    first decides what is correct. Naming one runs its code."""
    reward_weights: tuple[Annotated[float, Interval(ge=-1e6, le=1e6)], ...] = ()
    """Weight of each reward function. Unset: 1 each."""
    chat: Literal["auto", "always", "never"] = "auto"
    """Whether prompts go through the model's chat template. auto: messages do; so do texts of your rows where the model
    has a template, unless most of them ask to be continued (their last sign is = : > and the like)."""
    system: Text | None = None
    """System message of every chat that has none of its own. Unset: what the template itself adds."""
    run: Place | None = None
    """Directory to create for the run. Unset: runs/TASK-METHOD-TIME, in UTC."""
    seed: Annotated[int, Interval(ge=0, le=2**32 - 1)] = 0
    """Seed of the prompts' order, of sampling and of new weights."""
    steps: Annotated[int, Interval(ge=1, le=10_000_000)] = 20
    """Optimizer steps in all."""
    prompts_per_generation: Annotated[int | None, Interval(ge=1, le=65_536)] = None
    """Prompts in one generation batch. Unset: 8 in groups, 64 with one completion each."""
    completions_per_prompt: Annotated[int | None, Interval(ge=1, le=4_096)] = None
    """Completions sampled for each prompt: one group. 1 needs an advantage that compares with more than the group:
    tracked, batch_mean, james_stein, or a method whose own does. Unset: 1 where the advantage is tracked, else 8."""
    advantage: Literal["method", "tracked", "leave_one_out", "batch_mean", "james_stein"] = "method"
    """The method's own advantage, one from a belief about each prompt's value that is kept from step to step
    (tracked), or a baseline without memory to compare with."""
    belief: Text = "auto"
    """Belief behind tracked advantages: auto (learns noise, drift and prior from the rewards), gaussian, beta, spo, one
    of an installed package, or your own as MODULE:FUNCTION."""
    belief_options: dict[Text, Option] = field(default_factory=dict)
    """Options of the belief as KEY=VALUE, e.g. `forgetting=0.98`, a list as `[0.9,0.99]`; in TOML, keys of [belief]."""
    prompt_features: bool = False
    """Tell the belief each prompt's mean hidden state, so that it guesses prompts it has not seen."""
    source_column: Text | None = None
    """Column of the rows that names where a prompt comes from, e.g. data_source: the belief learns noise, drift, prior
    and scale for each source by itself. Unset: one for all."""
    prior_column: Text | None = None
    """Column of the rows with solve rates of the start model, as an object with rate (0 to 1) and count (completions
    behind it), or empty: the belief begins with them."""
    measure_prior: Annotated[int, Interval(ge=0, le=4_096)] = 0
    """Completions of every training prompt, sampled from the start model before training, that the belief begins with;
    they are spent and logged as such. 0: none."""


@dataclass(frozen=True)
class TrainConfig(Budget, Subject):
    """Everything that decides a training run. One generation batch is sampled, then trained on."""

    reward_noise: Annotated[float, Interval(ge=0, le=1e6)] = 0.0
    """Standard deviation of Gaussian noise added to training rewards, to study noisy scorers."""
    reward_timeout: Annotated[float, Interval(ge=0.01, le=1e6)] = 60.0
    """Seconds that one call of your reward function may take; a completion whose call fails twice has no reward."""
    reward_memory: Annotated[float, Interval(ge=0, le=1e6)] = 4.0
    """GiB that your reward function may use with its processes; 0: no limit."""
    updates_per_generation: Annotated[int, Interval(ge=1, le=65_536)] = 2
    """Optimizer steps in one pass over a generation batch; must divide prompts * completions."""
    iterations: Annotated[int, Interval(ge=1, le=1_000)] = 1
    """Passes over each generation batch."""
    gradient_accumulation: Annotated[int, Interval(ge=1, le=65_536)] = 1
    """Micro-batches per optimizer step: the same result in less memory."""
    learning_rate: Annotated[float, Interval(ge=0, le=1)] = 3e-4
    """Peak learning rate of AdamW, per optimizer step."""
    warmup_steps: Annotated[int, Interval(ge=0, le=10_000_000)] = 4
    """Optimizer steps over which the learning rate rises from 0."""
    schedule: Literal["constant_with_warmup", "linear", "cosine"] = "constant_with_warmup"
    """Learning rate after the warm-up; linear and cosine fall to 0 at the last step."""
    weight_decay: Annotated[float, Interval(ge=0, le=10)] = 0.0
    """AdamW's decoupled weight decay."""
    max_grad_norm: Annotated[float, Interval(ge=0, le=1e9)] = 1.0
    """Longest gradient (L2 norm); 0 switches clipping off."""
    nonfinite: Literal["stop", "skip"] = "stop"
    """When a loss, penalty or gradient is NaN or infinite: stop before the optimizer step, or skip that step."""
    sampler_lag: Annotated[int, Interval(ge=0, le=4_096)] = 0
    """Optimizer steps by which the sampler's weights are behind, to study stale samples; ratios are taken to the
    sampler. Needs save_every = 0."""
    sampler_bits: Annotated[int, Interval(ge=0, le=16)] = 0
    """Bits that the sampler's matrices are rounded to, at least 2, to study a coarser sampler; ratios are taken to the
    sampler. 0: as they are."""
    temperature: Annotated[float, Interval(ge=0.01, le=10)] = 1.0
    """Sampling temperature, applied to the log-probabilities of the loss too."""
    max_completion_tokens: Annotated[int | None, Interval(ge=1, le=1_000_000)] = None
    """Longest completion, in tokens. Unset: the task's own limit."""
    stop: tuple[Text, ...] = ()
    """Texts that end a reply, beside the model's own end. Unset: the task's own."""
    max_prompt_tokens: Annotated[int | None, Interval(ge=1, le=1_000_000)] = None
    """Longest prompt, in tokens; longer ones are left out and counted. Unset: a prompt that does not fit the model
    is an error."""
    kl: Annotated[float, Interval(ge=0, le=1_000)] = 0.0
    """Weight of the KL penalty towards the starting model, per nat; 0 switches it off."""
    lora_rank: Annotated[int, Interval(ge=0, le=1_024)] = 16
    """Rank of the LoRA adapters; 0 trains every weight."""
    lora_target_modules: tuple[Text, ...] = ("q_proj", "v_proj", "o_proj", "down_proj")
    """Layers that get adapters, by the last part of their name, or all-linear."""
    lora_dropout: Annotated[float, Interval(ge=0, le=0.99)] = 0.0
    """Dropout of the adapters; its noise enters every log-ratio."""
    gradient_checkpointing: bool = False
    """Compute activations again in the backward pass: less memory, about a third more time."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Number format of the weights; auto is bfloat16 where the GPU or CPU computes in it, else float32."""
    eval_every: Annotated[int, Interval(ge=0, le=10_000_000)] = 10
    """Optimizer steps between held-out evaluations; 0 evaluates only before and after."""
    eval_prompts: Annotated[int, Interval(ge=1, le=1_000_000)] = 128
    """Held-out prompts per evaluation."""
    eval_samples: Annotated[int, Interval(ge=1, le=1_024)] = 4
    """Sampled replies per held-out prompt; the greedy reply is one."""
    pool_prompts: Annotated[int, Interval(ge=0, le=1_000_000)] = 0
    """Training prompts evaluated beside the held-out ones, as pool/...; 0 evaluates none."""
    save_every: Annotated[int, Interval(ge=0, le=10_000_000)] = 10
    """Optimizer steps between checkpoints, rounded up to whole generation batches; 0 writes none."""
    save_total_limit: Annotated[int, Interval(ge=1, le=1_000_000)] = 3
    """Checkpoints that are kept: the newest ones."""
    keep_best: bool = False
    """Keep the weights of the best held-out mean reward too, in best/ beside model/."""
    traces_per_step: Annotated[int, Interval(ge=0, le=4_096)] = 4
    """Completions per optimizer step recorded token by token."""
    train_size: Annotated[int | None, Interval(ge=1, le=100_000_000)] = None
    """Training questions of the task. Unset: the task's own number."""
    test_size: Annotated[int | None, Interval(ge=1, le=10_000_000)] = None
    """Held-out questions of the task. Unset: the task's own number."""
    report_to: Text = "none"
    """Tracker to report to besides metrics.jsonl, by TRL's name for it: none, tensorboard, wandb, ..."""
    collapse: Literal["off", "warn", "checkpoint", "stop"] = "off"
    """When the reward falls below half of its best: warn, also save a checkpoint, or also stop there (exit code 3)."""
    threads: Annotated[int | None, Interval(ge=1, le=4_096)] = None
    """CPU threads. Unset: PyTorch's choice."""
    log_every: Annotated[int, Interval(ge=1, le=10_000_000)] = 1
    """Optimizer steps between rows of metrics.jsonl."""
    quiet: bool = False
    """Print errors only."""

    @property
    def group_size(self) -> int:
        """Completions per prompt, also where the setting is unset."""
        default = 1 if self.advantage == "tracked" else 8
        return default if self.completions_per_prompt is None else self.completions_per_prompt

    @property
    def prompts(self) -> int:
        """Prompts in one generation batch, also where the setting is unset."""
        default = 64 if self.group_size == 1 else 8
        return default if self.prompts_per_generation is None else self.prompts_per_generation

    def __post_init__(self) -> None:
        """Nothing yet: one layer of settings may need another; :func:`validate` looks at all of them."""


@dataclass(frozen=True)
class StressConfig:
    """Methods side by side under harsher and harsher conditions, one tiny run for each method and seed."""

    conditions: tuple[Literal["A", "B", "C", "lag0", "lag1", "lag4", "lag16", "quantised", "long"], ...] = (
        "A",
        "B",
        "C",
    )
    """Conditions to run: A, B, C are more updates and longer steps; lagK has one update a batch and a sampler K
    optimizer steps behind; quantised has a sampler with 4-bit weights; long has completions of 65 to 152 tokens."""
    methods: tuple[Text, ...] = ("grpo", "gspo", "kpo", "kpo_diffuse", "ratio_one")
    """Methods to compare, by name."""
    seeds: Annotated[int, Interval(ge=1, le=1_000)] = 1
    """Repetitions of every run, with seeds from first_seed on."""
    first_seed: Annotated[int, Interval(ge=0, le=2**31)] = 0
    """Seed of the first repetition."""
    run: Place = Path("runs/stress")
    """Directory of the study; each run is a directory below it."""
    steps: Annotated[int, Interval(ge=1, le=1_000_000)] = 192
    """Optimizer steps of each run."""
    rollouts: Annotated[int, Interval(ge=1, le=65_536)] = 512
    """Completions in one generation batch, 8 for each prompt."""
    minibatch: Annotated[int, Interval(ge=1, le=65_536)] = 64
    """Completions per optimizer step; must divide rollouts."""
    jobs: Annotated[int | None, Interval(ge=1, le=1_024)] = None
    """Runs at the same time, one CPU thread each. Unset: one per CPU core."""
    eval_prompts: Annotated[int, Interval(ge=1, le=1_000_000)] = 128
    """Held-out prompts per evaluation."""
    quiet: bool = False
    """Print errors only."""


@dataclass(frozen=True)
class DemoConfig:
    """A small complete run on this machine: train, evaluate, report."""

    run: Place = Path("runs/demo")
    """Directory of the run."""
    seed: Annotated[int, Interval(ge=0, le=2**32 - 1)] = 0
    """Seed of everything random."""
    overwrite: bool = True
    """Replace the run of an earlier demo in that directory."""
    quiet: bool = False
    """Print errors only."""
