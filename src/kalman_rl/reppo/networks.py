"""Networks of REPPO: policies, critics that give a distribution over returns, and running statistics of observations.

A block is Linear, RMSNorm, SiLU. Actions live in (-1, 1); the environment's bounds are the sampler's business.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from kalman_rl.errors import ConfigError, quote

START = 40.0
"""Factor of a learned vector added to the critic's logits; it makes Q = 0 at first, and learns that much faster."""
HALF_LOG_2PI = 0.5 * math.log(2 * math.pi)


@dataclass(frozen=True)
class GaussianPolicy:
    """A normal policy over actions, squashed by tanh into (-1, 1).

        u ~ N(mean, std^2),   a = tanh(u),   log pi(a) = sum_i [log N(u_i) - log(1 - tanh(u_i)^2)]

    Args:
        mean, std: (..., A), carry the gradient. squash: False leaves a = u.

    >>> GaussianPolicy(torch.zeros(2), torch.ones(2)).kl(GaussianPolicy(torch.ones(2), torch.ones(2)))
    tensor(1.)
    """

    mean: Tensor
    std: Tensor
    squash: bool = True

    def sample(self, number: int = 1, *, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
        """``number`` actions (number, ..., A) and their log-densities (number, ...); both carry a gradient, as the
        noise does not depend on the policy."""
        u = self._noisy(number, generator)
        return self._action(u), self._log_prob(u)

    def draw(self, number: int = 1, *, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
        """Like :meth:`sample`, but only the log-densities carry a gradient: for the score-function estimator."""
        u = self._noisy(number, generator).detach()
        return self._action(u), self._log_prob(u)

    def kl(self, other: GaussianPolicy) -> Tensor:
        """KL(self || other), (...); exact, because tanh is the same for both and its terms cancel."""
        ratio, shift = self.std / other.std, (self.mean - other.mean) / other.std
        return (0.5 * (ratio.square() + shift.square() - 1) - ratio.log()).sum(-1)

    @property
    def mode(self) -> Tensor:
        """The action without noise (..., A)."""
        return self._action(self.mean)

    def at(self, rows: Tensor) -> GaussianPolicy:
        """The policy of some rows."""
        return GaussianPolicy(self.mean[rows], self.std[rows], self.squash)

    def _noisy(self, number: int, generator: torch.Generator | None) -> Tensor:
        noise = torch.randn((number, *self.mean.shape), generator=generator, dtype=self.mean.dtype)
        return self.mean + self.std * noise

    def _action(self, u: Tensor) -> Tensor:
        return u.tanh() if self.squash else u

    def _log_prob(self, u: Tensor) -> Tensor:
        normal = -0.5 * ((u - self.mean) / self.std).square() - self.std.log() - HALF_LOG_2PI
        slope = 2 * (math.log(2) - u - functional.softplus(-2 * u)) if self.squash else torch.zeros_like(u)
        return (normal - slope).sum(-1)


@dataclass(frozen=True)
class CategoricalPolicy:
    """A policy over finitely many actions; every expectation is exact.

    Args:
        log_probs: normalised (..., A), carry the gradient.

    >>> CategoricalPolicy(torch.tensor([0.5, 0.5]).log()).kl(CategoricalPolicy(torch.tensor([0.5, 0.5]).log()))
    tensor(0.)
    """

    log_probs: Tensor

    def draw(self, number: int = 1, *, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
        """``number`` actions (number, ...) and their log-probabilities; the latter carry a gradient."""
        flat = self.log_probs.detach().exp().reshape(-1, self.log_probs.shape[-1])
        action = torch.multinomial(flat, number, replacement=True, generator=generator).T
        action = action.reshape(number, *self.log_probs.shape[:-1])
        spread = self.log_probs.expand(number, *self.log_probs.shape)
        return action, spread.gather(-1, action[..., None])[..., 0]

    def mean(self, table: Tensor) -> Tensor:
        """Expectation of a table (..., A) under the policy."""
        return (self.log_probs.exp() * table).sum(-1)

    def kl(self, other: CategoricalPolicy) -> Tensor:
        """KL(self || other), (...)."""
        return self.mean(self.log_probs - other.log_probs)

    @property
    def mode(self) -> Tensor:
        """The likeliest action (...)."""
        return self.log_probs.argmax(-1)

    def at(self, rows: Tensor) -> CategoricalPolicy:
        """The policy of some rows."""
        return CategoricalPolicy(self.log_probs[rows])


Policy = GaussianPolicy | CategoricalPolicy


class HLGauss(nn.Module):
    """A return as a distribution over n bins: a Gaussian's mass in each bin (histogram loss).

        w = (high - low) / (n - 1),  edges from low - w/2 to high + w/2,  p_i ~ Phi((e_(i+1) - x)/s) - Phi((e_i - x)/s)

    with s = 0.75 w, renormalised; Q = sum_i softmax(logits)_i c_i. Within three bins of a border the mean is biased
    towards the middle (0.37 bins at the border itself), so the range has to be wider than the returns.

    Args:
        low, high: first and last bin's centre. bins: at least 3. sigma: in bins.
    Source: arXiv 2403.03950, as used in arXiv 2507.11019.

    >>> head = HLGauss(-10.0, 10.0, 21)
    >>> head.decode(head.encode(torch.tensor([2.5])).log())
    tensor([2.5000])
    """

    centres: Tensor
    edges: Tensor

    def __init__(self, low: float, high: float, bins: int = 151, sigma: float = 0.75) -> None:
        super().__init__()
        self.low, self.high, self.size = low, high, bins
        width = (high - low) / (bins - 1)
        self.sigma = sigma * width
        half = 0.5 * width
        self.register_buffer("centres", torch.linspace(low, high, bins), persistent=False)
        self.register_buffer("edges", torch.linspace(low - half, high + half, bins + 1), persistent=False)

    def encode(self, value: Tensor) -> Tensor:
        """Probabilities (..., n) of returns (...), which are clipped to [low, high] first."""
        z = (self.edges - value.clamp(self.low, self.high)[..., None]) / (self.sigma * math.sqrt(2))
        mass = torch.erf(z).diff(dim=-1)
        return mass / mass.sum(-1, keepdim=True)

    def decode(self, logits: Tensor) -> Tensor:
        """Mean return (...) of logits (..., n); carries the gradient."""
        return logits.softmax(-1) @ self.centres

    def loss(self, logits: Tensor, target: Tensor) -> Tensor:
        """Cross-entropy (...) of the encoded target; the gradient reaches the logits only."""
        return -(self.encode(target.detach()) * logits.log_softmax(-1)).sum(-1)

    def start(self) -> Tensor:
        """Where logits begin, in units of ``START``: a return of 0, or the end of the range next to it."""
        return self.encode(torch.zeros(()))


class Scalar(nn.Module):
    """The plain critic for comparison: one output, squared error in units of half the range; nothing is clipped."""

    def __init__(self, low: float, high: float) -> None:
        super().__init__()
        self.low, self.high, self.size, self.unit = low, high, 1, 0.5 * (high - low)

    def decode(self, logits: Tensor) -> Tensor:
        """Return (...) of outputs (..., 1)."""
        return logits[..., 0] * self.unit

    def loss(self, logits: Tensor, target: Tensor) -> Tensor:
        """Half the squared error (...), in units of half the range."""
        return 0.5 * ((self.decode(logits) - target.detach()) / self.unit).square()

    def start(self) -> Tensor:
        """Output of a return of 0."""
        return torch.zeros(1)


class RunningNorm(nn.Module):
    """Running mean and variance of observations: (x - mean) / sqrt(variance + 0.01).

    >>> norm = RunningNorm(1)
    >>> norm.update(torch.tensor([[1.0], [3.0]]))
    >>> norm.mean, norm.variance
    (tensor([2.], dtype=torch.float64), tensor([1.], dtype=torch.float64))
    """

    mean: Tensor
    variance: Tensor
    count: Tensor

    def __init__(self, size: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(size, dtype=torch.float64))
        self.register_buffer("variance", torch.ones(size, dtype=torch.float64))
        self.register_buffer("count", torch.zeros((), dtype=torch.float64))

    def update(self, observation: Tensor) -> None:
        """Merge a batch (B, size) into the statistics."""
        batch = observation.double()
        number, mean, variance = len(batch), batch.mean(0), batch.var(0, correction=0)
        total = self.count + number
        shift, share = mean - self.mean, number / total
        self.variance = self.variance * (1 - share) + variance * share + shift.square() * share * (1 - share)
        self.mean = self.mean + shift * share
        self.count = total

    def forward(self, observation: Tensor) -> Tensor:
        return ((observation - self.mean) / (self.variance + 1e-2).sqrt()).float()


class Actor(nn.Module):
    """Three blocks from a normalised observation to a policy; it begins centred, with standard deviation 1 or uniform.

    Args:
        discrete: whether ``actions`` counts actions or dimensions. least_std: added to the standard deviation.
    """

    def __init__(self, inputs: int, actions: int, *, discrete: bool, hidden: int, least_std: float) -> None:
        super().__init__()
        self.discrete, self.least_std = discrete, least_std
        self.body = nn.Sequential(block(inputs, hidden), block(hidden, hidden), block(hidden, hidden))
        self.last = nn.Linear(hidden, actions if discrete else 2 * actions)
        with torch.no_grad():
            self.last.weight.mul_(0.01)
            self.last.bias.zero_()

    def forward(self, observation: Tensor) -> Policy:
        found = self.last(self.body(observation))
        if self.discrete:
            return CategoricalPolicy(found.log_softmax(-1))
        mean, log_std = found.chunk(2, -1)
        return GaussianPolicy(mean, log_std.exp() + self.least_std)


class Critic(nn.Module):
    """Encoder of state and action, and a head that gives the distribution of the return.

    A discrete critic sees the state alone and gives one distribution per action. ``predict`` guesses the features of
    the next state and action, for the auxiliary loss.

    Args: values: :class:`HLGauss` or :class:`Scalar`.
    """

    def __init__(
        self, inputs: int, actions: int, *, discrete: bool, hidden: int, values: HLGauss | Scalar
    ) -> None:
        super().__init__()
        self.values, self.actions, self.discrete = values, actions, discrete
        self.encoder = nn.Sequential(
            block(inputs if discrete else inputs + actions, hidden), nn.Linear(hidden, hidden)
        )
        outputs = values.size * (actions if discrete else 1)
        last = nn.Linear(hidden, outputs)
        self.head = nn.Sequential(nn.SiLU(), block(hidden, hidden), last)
        self.predict = nn.Sequential(nn.SiLU(), block(hidden, hidden), nn.Linear(hidden, hidden))
        self.start = nn.Parameter(values.start())
        with torch.no_grad():
            last.weight.mul_(0.01)
            last.bias.zero_()

    def features(self, observation: Tensor, action: Tensor | None = None) -> Tensor:
        """Of a state, and an action unless discrete: (..., hidden)."""
        if action is None:
            return self.encoder(observation)
        observation = observation.expand(*action.shape[:-1], observation.shape[-1])
        return self.encoder(torch.cat([observation, action], -1))

    def logits(self, features: Tensor) -> Tensor:
        """(..., n) of features, or (..., A, n) if discrete."""
        found = self.head(features)
        if self.discrete:
            found = found.unflatten(-1, (self.actions, self.values.size))
        return found + START * self.start

    def forward(self, observation: Tensor, action: Tensor | None = None) -> Tensor:
        """Q (...) of states and actions; (..., A) of states if discrete."""
        return self.values.decode(self.logits(self.features(observation, action)))


def block(inputs: int, outputs: int) -> nn.Sequential:
    """Linear, RMSNorm, SiLU."""
    return nn.Sequential(nn.Linear(inputs, outputs), nn.RMSNorm(outputs, eps=1e-6), nn.SiLU())


def value_head(kind: str, low: float, high: float, bins: int) -> HLGauss | Scalar:
    """The critic's kind of output by name, "categorical" or "scalar".

    Raises: ConfigError for another name.
    """
    if kind == "categorical":
        return HLGauss(low, high, bins)
    if kind == "scalar":
        return Scalar(low, high)
    raise ConfigError(f"critic: got {quote(kind)}, expected categorical or scalar")
