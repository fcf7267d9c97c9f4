"""Settings of a policy loss in verl's configuration tree, checked when verl reads them: before anything starts."""

# No postponed annotations: verl's and Hydra's readers look at the types of the fields.
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Optional

from verl.workers.config import PolicyLossConfig

from kalman_rl.errors import ConfigError, quote
from kalman_rl.hosts.verl.choice import SelectedMethod, choose
from kalman_rl.hosts.verl.settings import PREFIX, check_actor, check_policy_loss

KNOBS = (
    "low",
    "high",
    "dual",
    "process_noise",
    "observation_noise",
    "initial_variance",
    "kalman_Q",
    "kalman_R",
)
"""Fields that are options of a method by that name; None leaves the method's default."""


@dataclass
class KalmanPolicyLossConfig(PolicyLossConfig):
    """verl's PolicyLossConfig with the options of a method of ours.

    Select it with ``actor_rollout_ref.actor.policy_loss._target_=kalman_rl.hosts.verl.KalmanPolicyLossConfig``.

    Args:
        loss_mode: ``kalman_rl/NAME``, NAME a key of :data:`kalman_rl.METHODS` or ``module:function`` where
            :func:`~kalman_rl.hosts.verl.plugin.register` registered it.
        options: options of the method; verl's names (``clip_ratio_low``) are understood with verl's meaning.
        low, high, dual: clip distances, as far as the method has them; None = its default.
        process_noise, observation_noise, initial_variance: Q, R, P0 of the filter, nats^2.
        aggregation: "verl", ``actor.loss_agg_mode`` decides; "method", as the method was published.
        allow_biased_sampling: allow rollout.top_p, top_k or a repetition penalty beside a loss with a ratio.
        kalman_Q, kalman_R, is_clip: names of KPO's published fork: Q, R, and whether there is a clip.

    Raises: ConfigError at construction, see :func:`kalman_rl.hosts.verl.choice.choose`.
    """

    options: dict[str, Any] = field(default_factory=dict)
    low: Optional[float] = None  # noqa: UP045 read at run time
    high: Optional[float] = None  # noqa: UP045
    dual: Optional[float] = None  # noqa: UP045
    process_noise: Optional[float] = None  # noqa: UP045
    observation_noise: Optional[float] = None  # noqa: UP045
    initial_variance: Optional[float] = None  # noqa: UP045
    aggregation: str = "verl"
    allow_biased_sampling: bool = False
    kalman_Q: Optional[float] = None  # noqa: UP045 the fork's names
    kalman_R: Optional[float] = None  # noqa: UP045
    is_clip: Optional[bool] = None  # noqa: UP045

    def __post_init__(self) -> None:
        self.choice()

    def choice(self) -> SelectedMethod:
        """The method that these settings name. Raises: ConfigError, as at construction."""
        if not isinstance(self.loss_mode, str) or not self.loss_mode.startswith(PREFIX):
            raise ConfigError(
                f"policy_loss.loss_mode: got {quote(self.loss_mode)} with KalmanPolicyLossConfig, expected "
                f"{PREFIX}NAME with a method's name; for verl's own losses leave policy_loss._target_ as it is"
            )
        # Hydra reads `no` as a text, and a text is true.
        for switch in ("allow_biased_sampling", "is_clip"):
            if not isinstance(value := getattr(self, switch), bool | None):
                raise ConfigError(f"policy_loss.{switch}: got {quote(value)}, expected true or false")
        if not isinstance(self.options, Mapping):
            raise ConfigError(f"policy_loss.options: got {quote(self.options)}, expected options by name")
        name = self.loss_mode.removeprefix(PREFIX)
        check_policy_loss(name, self)
        options: dict[str, Any] = dict(self.options)
        for knob in KNOBS:
            value = getattr(self, knob)
            if value is not None:
                if knob in options:
                    raise ConfigError(
                        f"policy_loss.{knob}: got it twice, beside options.{knob}, expected one of the two"
                    )
                options[knob] = value
        name, options = _with_clip(name, options, self.is_clip)
        return choose(name, options, aggregation=self.aggregation)


def choice_for(name: str, config: Any) -> SelectedMethod:
    """The settings of a method in the actor's configuration; the method's defaults where there are none."""
    check_actor(name, config)
    settings = getattr(config, "policy_loss", None)
    if isinstance(settings, KalmanPolicyLossConfig) and settings.loss_mode == PREFIX + name:
        return settings.choice()
    return choose(name, {})


def _with_clip(name: str, options: dict[str, Any], is_clip: bool | None) -> tuple[str, dict[str, Any]]:
    """The fork's switch: KPO without its clip is a separate method here, with the fork's Q where none is given."""
    if is_clip is None or (is_clip and name == "kpo"):
        return name, options
    if name != "kpo":
        raise ConfigError(
            f"policy_loss.is_clip: got {is_clip} for {PREFIX}{name}, expected it with {PREFIX}kpo only"
        )
    given = {"kalman_Q", "process_noise"} & options.keys()
    return "kpo_unclipped", options if given else options | {"process_noise": 1e-6}
