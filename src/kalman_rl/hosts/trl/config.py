"""Settings of the trainer: a method beside or instead of TRL's loss options, and the guard of TRL's private hooks."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from trl import GRPOConfig

from kalman_rl.beliefs.advantage import Tracked
from kalman_rl.errors import ConfigError, quote
from kalman_rl.hooks import check
from kalman_rl.hosts.rewards.supervised import MEMORY
from kalman_rl.hosts.trl.hooks import TORCH, TRANSFORMERS, TRL
from kalman_rl.hosts.trl.translate import DEFAULTS, check_settings, translated
from kalman_rl.methods import make_method
from kalman_rl.objectives.correction import CORRECTIONS
from kalman_rl.objectives.inputs import INPUTS, check_group_size, check_provided, inputs_of
from kalman_rl.objectives.loss import Method
from kalman_rl.objectives.penalty import KL
from kalman_rl.registry import make
from kalman_rl.sampling.budget import Budget, check_belief_only, check_prior

PROVIDED = {*INPUTS, "past_steps", "whole_step"}
"""What the trainer makes for a method, as :func:`kalman_rl.objectives.inputs.missing` reads it."""


def check_host() -> None:
    """Raise AdapterError if the installed libraries have other hooks than the ones this adapter was tested on."""
    check(TRL, TRANSFORMERS, TORCH)


check_host()


class _One(int):
    """The number 1 in TRL's checks of its settings, except that it is not refused for being below 2."""

    def __lt__(self, other: int) -> bool:
        return False


def _budget_field(name: str, text: str) -> Any:
    """A field of :class:`~kalman_rl.sampling.budget.Budget` again, with its default, for TRL's command line."""
    return field(default=getattr(Budget, name), metadata={"help": text})


def _loss_field(name: str) -> Any:
    """A field of GRPOConfig that may stay unset."""
    text = GRPOConfig.__dataclass_fields__[name].metadata["help"]
    return field(default=None, metadata={"help": f"{text} Unset beside a method."})


@dataclass
class KalmanGRPOConfig(GRPOConfig):
    """GRPOConfig with a method, by name.

    Without one it is GRPOConfig: same settings, same defaults, same training. With one, TRL's settings of the loss
    stay unset (None), and without ``steps_per_generation`` (and ``generation_batch_size``) it takes four optimizer
    steps per generation batch. TRL's default is exactly on-policy, where every log-ratio is 0 and every ratio method
    is the same method.
    """

    _VALID_DICT_FIELDS = [
        *GRPOConfig._VALID_DICT_FIELDS,
        "method_options",
        "correction_options",
        "belief_options",
    ]

    loss_type: str | None = _loss_field("loss_type")
    importance_sampling_level: str | None = _loss_field("importance_sampling_level")
    epsilon: float | None = _loss_field("epsilon")
    sapo_temperature_neg: float | None = _loss_field("sapo_temperature_neg")
    sapo_temperature_pos: float | None = _loss_field("sapo_temperature_pos")
    vespo_k_pos: float | None = _loss_field("vespo_k_pos")
    vespo_lambda_pos: float | None = _loss_field("vespo_lambda_pos")
    vespo_k_neg: float | None = _loss_field("vespo_k_neg")
    vespo_lambda_neg: float | None = _loss_field("vespo_lambda_neg")
    scale_rewards: str | None = _loss_field("scale_rewards")
    multi_objective_aggregation: str | None = _loss_field("multi_objective_aggregation")

    method: str | None = field(
        default=None,
        metadata={"help": "Name in kalman_rl.METHODS, or module:function; None: TRL's loss settings decide."},
    )
    method_options: dict[str, Any] | str | None = field(
        default_factory=dict,
        metadata={"help": 'Options of the method, for example {"process_noise": 1e-4}.'},
    )
    allow_biased_sampling: bool = field(
        default=False,
        metadata={
            "help": "Allow top_p, top_k, min_p, a repetition penalty and the like beside a method with a ratio: "
            "completions then come from another distribution than the one whose probabilities the ratio divides."
        },
    )
    nonfinite: str = field(
        default="stop",
        metadata={
            "help": "When a loss, penalty or gradient is NaN or infinite: stop with an error before the optimizer "
            "step, or skip that step."
        },
    )
    reward_timeout: float | None = field(
        default=None,
        metadata={
            "help": "Seconds that a call of a reward function may take. Set: reward functions run in watched processes "
            "and a completion whose call fails twice has no reward. None: they run in the trainer's process."
        },
    )
    reward_memory: float = field(
        default=MEMORY,
        metadata={"help": "GiB that a reward function may use, where reward_timeout is set; 0: no limit."},
    )
    top_k_distribution: int = field(
        default=32,
        metadata={"help": "Tokens per position for methods that look at distributions (DPPO top-k, CAPO)."},
    )
    correction: str | None = field(
        default=None,
        metadata={
            "help": "Correction for a behaviour policy that is not the old policy: truncated, masked, icepop, "
            "filtered, rejected or truncated_rejected. "
            "With vLLM, TRL's own correction must then be off (vllm_importance_sampling_correction=False)."
        },
    )
    correction_options: dict[str, Any] | str | None = field(
        default_factory=dict, metadata={"help": 'Its options, for example {"cap": 2.0, "level": "sequence"}.'}
    )

    belief: str | None = field(
        default=None,
        metadata={
            "help": "Take advantages from a belief about every prompt's value instead of the method's own: auto, "
            "gaussian, beta, spo, one of a package, or module:function. The dataset needs a stable column prompt_id."
        },
    )
    belief_options: dict[str, Any] | str | None = field(
        default_factory=dict, metadata={"help": "Options of the belief."}
    )
    prompt_features: bool = field(
        default=False,
        metadata={
            "help": "Give the belief the mean hidden state of each prompt (one forward pass per prompt)."
        },
    )
    source_column: str | None = field(
        default=None,
        metadata={
            "help": "Column of the dataset that names where a prompt comes from, like data_source: the belief learns "
            "noise, drift, prior and scale for each source by itself. None: one for all."
        },
    )
    prior_column: str | None = field(
        default=None,
        metadata={
            "help": "Column of the dataset with solve rates of the start model, like "
            '{"rate": 0.25, "count": 8} or None: the belief begins with them.'
        },
    )
    select: str = _budget_field(
        "select",
        "Prompts of a generation batch: passes over the dataset, or drawn from all of it in proportion to what the "
        "belief expects a prompt to teach: stream (variance of its reward) or sage (SAGE's score, reconstructed).",
    )
    select_weights: str = _budget_field(
        "select_weights", "Weight of what was drawn: equal, or unbiased for the mean over the dataset."
    )
    select_floor: float = _budget_field(
        "select_floor", "Share of draws that are uniform over the dataset, in (0, 1]."
    )
    select_power: float = _budget_field(
        "select_power", "Power of the score that draws are in proportion to; 0: uniform."
    )
    allocation: str = _budget_field(
        "allocation",
        "Completions per prompt: fixed (num_generations), predictive (from the belief, before sampling) or rounds "
        "(the belief sees each round's rewards).",
    )
    aim: str = _budget_field("aim", "What an allocation buys: gradient, or mixed_groups.")
    budget: float | None = _budget_field(
        "budget", "Mean completions per prompt; None: all rows of the batch."
    )
    rounds: list[int] = field(
        default_factory=lambda: list(Budget.rounds),
        metadata={"help": "Completions per prompt and round; the last repeats."},
    )
    max_rounds: int = _budget_field(
        "max_rounds", "Rounds per generation batch; the last one takes what is left."
    )
    candidates: int | None = _budget_field(
        "candidates",
        "Prompts an allocation chooses among, at least those of a batch; None: as many as the batch has completions.",
    )
    completions_min: int = _budget_field("completions_min", "Least completions of a prompt; 0 may skip it.")
    completions_max: int = _budget_field("completions_max", "Most completions of a prompt in a batch.")
    coverage_steps: int = _budget_field(
        "coverage_steps", "A prompt is due again after so many steps without a completion."
    )
    reward_range: str = _budget_field(
        "reward_range", "unit if rewards lie in [0, 1], else real; read by allocations."
    )
    reward_noise_variance: float = _budget_field(
        "reward_noise_variance", "Variance of the scorer's noise, where reward_range is real."
    )

    def __post_init__(self) -> None:
        self.given = [name for name in DEFAULTS if getattr(self, name) is not None]
        """TRL's settings of the loss that the user wrote."""
        if self.method is None:
            for name in set(DEFAULTS) - set(self.given):
                setattr(self, name, DEFAULTS[name])
        elif getattr(self, "steps_per_generation", None) is None and self.generation_batch_size is None:
            self.steps_per_generation = 4 * self.gradient_accumulation_steps
        size: int = self.num_generations  # type: ignore[has-type]
        # Whether 1 can work is for the method to say, see check_combination.
        self.num_generations = _One(1) if size == 1 else size
        super().__post_init__()
        self.num_generations = size


def names_a_method(method: Method | str | None, args: GRPOConfig) -> bool:
    """Whether the trainer or its settings name a method; else TRL's loss settings are translated."""
    return method is not None or getattr(args, "method", None) is not None


def resolve_method(method: Method | str | None, args: GRPOConfig) -> Method:
    """The method to train with: as given, by name from the settings, or what TRL's settings of the loss stand for,
    with correction and penalty added.

    Raises: ConfigError for an unknown name or option, or a correction beside TRL's own; NumericError for a value out
        of range.
    """
    level: Any = "token"
    if isinstance(method, Method):
        resolved = method
    elif names_a_method(method, args):
        name = str(method or getattr(args, "method", None))
        resolved = make_method(name, **_options(args, "method_options"))
    else:
        if _options(args, "method_options"):
            raise ConfigError(
                f"method_options: got {quote(getattr(args, 'method_options', {}))} without a method, expected "
                "{}; name the method, or write them as TRL's settings"
            )
        resolved, level = translated(args), args.importance_sampling_level
    belief = getattr(args, "belief", None)
    if belief is not None:
        tracked = Tracked(belief, tuple(_options(args, "belief_options").items()))
        resolved = dataclasses.replace(resolved, advantage=tracked)
    correction = getattr(args, "correction", None)
    if correction is not None:
        if args.use_vllm and args.vllm_importance_sampling_correction:
            raise ConfigError(
                f"correction: got {quote(correction)} beside vllm_importance_sampling_correction=True, expected "
                "one of the two because the behaviour policy's mismatch would count twice; set TRL's to False"
            )
        factor = make("correction", CORRECTIONS, correction, _options(args, "correction_options"))
        resolved = dataclasses.replace(resolved, correction=factor)
    if args.beta and resolved.penalty is None:
        resolved = dataclasses.replace(
            resolved, penalty=KL(args.beta, importance_weighted=args.use_bias_correction_kl, level=level)
        )
    return resolved


def _options(args: GRPOConfig, name: str) -> Mapping[str, Any]:
    options = getattr(args, name, {})
    if not isinstance(options, Mapping):
        raise ConfigError(f"{name}: got {quote(options)}, expected options by name, {{}} for none")
    return options


def check_combination(method: Method, args: GRPOConfig, *, named: bool = True) -> None:
    """Raise ConfigError for settings that a ``named`` method would silently override or cannot work with."""
    if named:
        changed = [name for name, default in DEFAULTS.items() if getattr(args, name) != default]
        check_settings(method, args, getattr(args, "given", changed))
    check_group_size(method, args.num_generations, "num_generations", "belief='auto'")
    rows = args.generation_batch_size
    Budget.of(args).chooses_among(rows // args.num_generations, rows)
    where = f"for method {quote(method.name)}"
    check_belief_only(args, isinstance(method.advantage, Tracked), where, "set belief='auto'")
    check_prior(getattr(args, "prior_column", None), 0, getattr(args, "prompt_features", False))
    if args.use_vllm:  # it does not pass on the behaviour policy's distributions
        advice = "take the binary form (dppo_tv, dppo_kl), or train without vLLM"
        check_provided(method, PROVIDED - {"top_behaviour"}, "KalmanGRPOTrainer with vLLM", advice)
    if (
        args.use_vllm
        and args.vllm_importance_sampling_correction
        and "logp_behaviour" in inputs_of(method.ratio)
    ):
        raise ConfigError(
            f"vllm_importance_sampling_correction: got True beside the ratio {method.ratio} {where}, expected False "
            "because that ratio is already taken to vLLM's policy; the mismatch would count twice"
        )
    check_provided(method, PROVIDED, "KalmanGRPOTrainer", f"known inputs are {', '.join(sorted(PROVIDED))}")
    share = args.gradient_accumulation_steps
    if "trust" in method.learns and (args.steps_per_generation or share) % share:
        raise ConfigError(
            f"gradient_accumulation_steps: got {share}, expected a divisor of steps_per_generation = "
            f"{args.steps_per_generation} because {quote(method.name)} chooses its bounds once per optimizer step"
        )
    if isinstance(method.penalty, KL) and not args.beta:
        raise ConfigError(
            f"beta: got {args.beta}, expected a value > 0 because method {quote(method.name)} has a penalty "
            "against a reference policy; TRL computes reference log-probabilities only with beta > 0"
        )
