"""Which prompts of a pool to train on next.

A prompt teaches in proportion to the variance of its reward, ``theta = p (1 - p)``, and p is known from a
belief:

=========  ==============================================================================================
greedy     the largest E[theta]; best signal, and without the coverage floor it leaves most of the pool unseen
thompson   the largest theta of one draw of every p (as MoPPS and BOTS do)
ids        information-directed sampling (Russo and Van Roy 2018): see :func:`information_directed`
weights    at random with weights ``sqrt(p (1 - p)) + 0.05`` at the mean p (as SPO, arXiv 2509.13232)
uniform    at random
=========  ==============================================================================================

:class:`PromptSelector` does this for a pool. For rows that are sampled already, :func:`score` says by the logit of
success what each still teaches, and :func:`select` keeps the best of every pool of difficulty (:func:`quantile_pools`).
Training draws with :class:`~kalman_rl.sampling.stream.PromptStream`, at random with known probabilities.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kalman_rl.beliefs.base import check_features
from kalman_rl.beliefs.groups import expect_names, places_of
from kalman_rl.beliefs.protocol import Belief
from kalman_rl.checks import expect, expect_tensor, is_real, is_whole, reading, saved
from kalman_rl.errors import ConfigError, NumericError, ShapeError, unknown_name
from kalman_rl.sampling.coverage import Coverage
from kalman_rl.sampling.gains import beta_parameters
from kalman_rl.sampling.learnability import read_signal

METHODS = ("greedy", "thompson", "ids", "weights", "uniform")
_DRAWS = 64  # of the whole pool, for the expected best theta


class PromptSelector:
    """Picks ``count`` different prompts of a pool per call; rewards in [0, 1].

    Args:
        belief: read, not changed; it learns from the rewards elsewhere.
        pool: N different prompt ids. count: prompts per call, 1 <= count <= N.
        method: one of the table above.
        every: coverage floor: calls within which each prompt comes up again, whatever is believed about it.
            None = four passes over the pool, ``4 ceil(N / count)``; 0 = no floor. Prompts never picked take
            their first turns in random order, evenly spread.
        seed: of the own generator; the global one is not touched.

    Raises: ConfigError for an empty pool, repeated ids, an unknown method, a count or floor that cannot be met.
        ShapeError for a pool that is no list of names.

    With the floor no prompt waits longer than ``every`` calls: at most ``count`` become due at a time,
    because at most that many were picked at a time.
    """

    def __init__(
        self,
        belief: Belief,
        pool: Sequence[Hashable],
        count: int,
        *,
        method: str = "greedy",
        every: int | None = None,
        seed: int = 0,
    ) -> None:
        if method not in METHODS:
            raise unknown_name("method", method, METHODS)
        expect_names(pool, "pool")
        if not len(pool):
            raise ConfigError("pool: got no ids, expected at least one")
        different = len(places_of(pool, "pool")[0])
        if different != len(pool):
            raise ConfigError(f"pool: got {len(pool)} ids, {different} different, expected different ids")
        if not is_whole(count, 1, len(pool)):
            raise ConfigError(f"count: got {count!r}, expected an integer from 1 to the pool's {len(pool)}")
        passes = math.ceil(len(pool) / count)
        every = 4 * passes if every is None else every
        if not is_whole(every) or 0 < every < passes:
            raise ConfigError(
                f"every: got {every!r} calls, expected at least {passes} ({len(pool)} prompts, {count} a call) "
                "or 0 for no floor"
            )
        if not is_whole(seed):
            raise ConfigError(f"seed: got {seed!r:.80}, expected an integer >= 0")
        self.belief, self.pool, self.count, self.method = belief, list(pool), count, method
        self._generator = torch.Generator().manual_seed(seed)
        self._coverage = Coverage(every) if every else None
        self._calls = 0
        if self._coverage is not None:  # as if the first turns had been given out before, evenly
            for place, i in enumerate(torch.randperm(len(pool), generator=self._generator).tolist()):
                self._coverage.visit([self.pool[i]], step=place * every // len(pool) - every)

    def select(self, *, step: int, features: Tensor | None = None) -> list[Hashable]:
        """``count`` different ids: those that are due, then the best by the method.

        Args: step: at which the belief is asked. features: None or (N, F) in the order of the pool.

        Raises: ShapeError for features of another shape, and what the belief raises.
        """
        check_features(features, len(self.pool))
        chosen = torch.zeros(len(self.pool), dtype=torch.bool)
        if self._coverage is not None:
            chosen = self._coverage.due(self.pool, step=self._calls, limit=self.count)
        free = (~chosen).nonzero().flatten()
        wanted = self.count - int(chosen.sum())
        if wanted:
            chosen[free[self._best(free, wanted, step, features)]] = True
        ids = [self.pool[i] for i in chosen.nonzero().flatten().tolist()]
        if self._coverage is not None:
            self._coverage.visit(ids, step=self._calls)
        self._calls += 1
        return ids

    def state_dict(self) -> dict[str, Any]:
        coverage = None if self._coverage is None else self._coverage.state_dict()
        return {
            "format": 1,
            "calls": self._calls,
            "generator": self._generator.get_state(),
            "coverage": coverage,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where the saved selector was. Raises: ConfigError for another format or kind of floor."""
        with reading("selector state", state):
            self._load(state)

    def _load(self, state: dict[str, Any]) -> None:
        names = ("format", "coverage", "generator", "calls")
        form, coverage, generator, calls = saved("selector state", state, *names)
        if form != 1 or (coverage is None) != (self._coverage is None):
            raise ConfigError(
                f"selector state: got format {form!r}, {'no' if coverage is None else 'a'} floor, expected 1 and "
                "this one's floor"
            )
        expect("selector state", "calls", is_whole(calls), calls, "a count")
        drawn = torch.Generator()
        drawn.set_state(generator)  # refuses what is no state before anything is written
        if self._coverage is not None:
            self._coverage.load_state_dict(coverage)
        self._generator.set_state(generator)
        self._calls = calls

    def _best(self, free: Tensor, wanted: int, step: int, features: Tensor | None) -> Tensor:
        """Places in ``free`` of the ``wanted`` prompts the method prefers."""
        if self.method == "uniform":
            return torch.randperm(len(free), generator=self._generator)[:wanted]
        names = [self.pool[i] for i in free.tolist()]
        signal = read_signal(
            self.belief, names, step=step, features=None if features is None else features[free]
        )
        assert signal.a is not None and signal.b is not None
        if self.method == "greedy":
            return signal.variance.argsort(descending=True, stable=True)[:wanted]
        if self.method == "weights":
            mean = signal.a / (signal.a + signal.b)
            weight = (mean * (1 - mean)).sqrt() + 0.05
            return torch.multinomial(weight, wanted, generator=self._generator)
        if self.method == "thompson":
            draw = draw_beta(signal.a, signal.b, 1, self._generator)[0]
            return (draw * (1 - draw)).argsort(descending=True, stable=True)[:wanted]
        draws = draw_beta(signal.a, signal.b, _DRAWS, self._generator)
        best = (draws * (1 - draws)).amax(1).mean().item()
        regret = (best - signal.variance).clamp(min=0.0)
        return information_directed(regret, theta_variance(signal.a, signal.b), wanted, self._generator)


def theta_variance(a: Tensor, b: Tensor) -> Tensor:
    """``Var[p (1 - p)]`` for p ~ Beta(a, b), (N,) float64; ``E[p^2 (1-p)^2] = a(a+1)b(b+1) / (s(s+1)(s+2)(s+3))``.

    Raises: NumericError unless a, b > 0.
    """
    a, b = beta_parameters(a, b)
    s = a + b
    second = (a / s) * ((a + 1) / (s + 1)) * (b / (s + 2)) * ((b + 1) / (s + 3))
    return (second - ((a / s) * (b / (s + 1))).square()).clamp(min=0.0)


def best_mixture(regret: Tensor, information: Tensor) -> tuple[int, int, float]:
    """Actions i, j and the probability q of i that minimise ``(expected regret)^2 / expected information``.

    ``(q D_i + (1 - q) D_j)^2 / (q g_i + (1 - q) g_j)`` is convex in q with the stationary point
    ``q = D_j / (D_i - D_j) - 2 g_j / (g_i - g_j)``; two actions are always enough.

    Args: regret, information: (N,), finite, >= 0. Returns: (i, j, q); i = j if one action is best.
    Raises: ShapeError for no action or other shapes, NumericError for a number out of range.
    Source: Russo and Van Roy, "Learning to Optimize via Information-Directed Sampling", 2018.

    >>> i, j, q = best_mixture(torch.tensor([0.1, 1.0]), torch.tensor([0.0, 1.0]))
    >>> i, j, round(q, 4)
    (0, 1, 0.8889)
    """
    _check_actions(regret, information)
    regret, information = regret.double(), information.double()
    keep = _frontier(regret, information)
    d, g = regret[keep], information[keep]
    di, dj, gi, gj = d[:, None], d[None, :], g[:, None], g[None, :]
    steps_d, steps_g = di - dj, gi - gj
    inside = (steps_d != 0) & (steps_g != 0)
    q = dj / torch.where(inside, steps_d, 1.0) - 2 * gj / torch.where(inside, steps_g, 1.0)
    q = torch.where(inside, q, 1.0).clamp(0.0, 1.0)
    top, bottom = (q * di + (1 - q) * dj).square(), q * gi + (1 - q) * gj
    ratio = torch.where(bottom > 0, top / torch.where(bottom > 0, bottom, 1.0), math.inf)
    ratio = torch.where(top == 0, 0.0, ratio)  # no regret is best, whatever is learned
    i, j = divmod(int(ratio.argmin()), len(keep))
    return int(keep[i]), int(keep[j]), float(q[i, j])


def information_directed(
    regret: Tensor, information: Tensor, count: int, generator: torch.Generator
) -> Tensor:
    """``count`` different actions, one after another from the best two-action mixture of those left,
    (count,).

    Regret is E[best theta] - E[theta]; information is Var[theta]. Deviation: the published variance-based
    form takes the variance explained by *which* action is best, of which this is an upper bound; with
    thousands of prompts the identity of the best one carries next to nothing about each.

    Args:
        regret, information: (N,), finite, >= 0.
        count: from 1 to N.
        generator: of the tosses.

    Raises: ConfigError for another count, and what :func:`best_mixture` raises.
    """
    _check_actions(regret, information)
    if not is_whole(count, 1, len(regret)):
        raise ConfigError(f"count: got {count!r}, expected an integer from 1 to the {len(regret)} actions")
    left = torch.ones_like(regret, dtype=torch.bool)
    chosen = []
    for toss in torch.rand(count, generator=generator).tolist():
        places = left.nonzero().flatten()
        i, j, q = best_mixture(regret[places], information[places])
        chosen.append(int(places[i if toss < q else j]))
        left[chosen[-1]] = False
    return torch.tensor(chosen)


def draw_beta(a: Tensor, b: Tensor, draws: int, generator: torch.Generator) -> Tensor:
    """(draws, N) samples of Beta(a, b) that depend on ``generator`` only. Raises: NumericError unless a, b > 0."""
    a, b = beta_parameters(a, b)
    if not is_whole(draws):
        raise ConfigError(f"draws: got {draws!r:.80}, expected a number of draws >= 0")
    seed = int(torch.randint(2**62, (), generator=generator))
    with torch.random.fork_rng(devices=[]):  # torch's Beta takes no generator
        torch.manual_seed(seed)
        return torch.distributions.Beta(a, b).sample(torch.Size([draws]))


def success_margin(mean: Tensor) -> Tensor:
    """``m = log(p / (1 - p))`` (N,) of success probabilities, as a belief has them; -inf at 0, inf at 1.

    Raises: NumericError outside [0, 1]. Detached.
    """
    mean = _vector("mean", mean)
    _every("mean", mean, (mean >= 0) & (mean <= 1), "success probabilities in [0, 1]")
    return mean.log() - torch.log1p(-mean)


def log_score(margin: Tensor, damping: float = 0.1) -> Tensor:
    """``log(g^2 / (h + damping))`` (N,), accurate for any margin, infinite ones included; detached.

    Args: margin: (N,); NaN is refused. damping: >= 0; 0 gives exactly ``-m``.
    Raises: ShapeError, NumericError.
    """
    margin = _vector("margin", margin)
    _every("margin", margin, ~margin.isnan(), "numbers; leave rows without an estimate out")
    _in_range("damping", damping, is_real(damping) and 0 <= damping < math.inf, "a finite number >= 0")
    if damping == 0:
        return -margin
    dtype, margin, damping = margin.dtype, margin.double(), float(damping)  # a damping of 1e-50 is not 0
    small = torch.exp(-margin.abs())
    # e = exp(-|m|):  m < 0:  1 / (e + d (1 + e)^2);   m >= 0:  e^2 / (e + d (1 + e)^2)
    below = torch.log(small + damping * (1 + small).square())
    return (-2 * margin.clamp(min=0.0) - below).to(dtype)


def score(
    margin: Tensor,
    *,
    damping: float = 0.1,
    variance: Tensor | None = None,
    penalty: float = 1.0,
    limit: float = math.inf,
) -> Tensor:
    """Signal against curvature, ``g^2 / (h + damping) / (1 + penalty Var m)``, 0 where ``m < -limit``; (N,), detached.

    g and h are gradient and curvature of ``softplus(-m)``; half the score is about what a Newton step on m gains. It
    is largest for confident errors, **where wrong labels sit too**: with margins N(2, 2) and a tenth of the labels
    flipped, 79 % of the best-scored twentieth are flipped, 51 % with limit 3, 18 % with limit 1 (the test computes it).

    Args:
        margin: (N,), NaN refused.
        damping: >= 0; the score never exceeds ``1 / damping``. At 0 it overflows to inf for very negative m.
        variance: (N,) >= 0, variance of the margin over dropout, checkpoints or a belief: an unstable error
            teaches less. None = 0.
        penalty: >= 0, weight of that variance.
        limit: >= 0; errors more confident than this (in logits) are taken for wrong labels and get 0.

    Raises: ShapeError, NumericError.
    Source: SAGE (arXiv 2602.01207), reconstructed from its abstract; formulas and defaults are ours.

    >>> score(torch.tensor([-9.0, -2.0, 0.0, 2.0]), limit=6.0)
    tensor([0.0000, 3.7845, 0.7143, 0.0693])
    """
    _in_range("limit", limit, is_real(limit) and limit >= 0, "a number of logits >= 0, or inf")
    _in_range("penalty", penalty, is_real(penalty) and 0 <= penalty < math.inf, "a finite number >= 0")
    penalty, limit = float(penalty), float(limit)
    found = log_score(margin, damping).exp()
    if variance is not None:
        variance = _vector("variance", variance, len(found))
        _every("variance", variance, (variance >= 0) & variance.isfinite(), "finite variances >= 0")
        found = found / (1 + penalty * variance)
    return torch.where(margin < -limit, 0.0, found)


def quantile_pools(difficulty: Tensor, count: int) -> Tensor:
    """Pool numbers (N,), 0 to count - 1 from the lowest value: about equally many rows in each.

    Equal values share a pool, so pools may be uneven or empty. Raises: ShapeError, NumericError.

    >>> quantile_pools(torch.tensor([0.9, 0.1, 0.5, 0.7]), 2)
    tensor([1, 0, 0, 1])
    """
    difficulty = _vector("difficulty", difficulty)
    _every("difficulty", difficulty, ~difficulty.isnan(), "numbers")
    _in_range("count", count, is_whole(count, 1, 2**31), "a number of pools from 1 to 2^31")
    ordered, rows = difficulty.sort().values, len(difficulty)
    starts = [
        ordered[math.ceil(i * rows / count)] for i in range(1, count) if math.ceil(i * rows / count) < rows
    ]
    edges = torch.stack(starts) if starts else difficulty.new_zeros(0)
    return torch.bucketize(difficulty, edges, right=True)


class Selection(NamedTuple):
    """``keep`` (N,) bool, and the ``weight`` (N,) of each row's loss: 0 where not kept, 1 on average."""

    keep: Tensor
    weight: Tensor


def select(scores: Tensor, pool: Tensor, fraction: float) -> Selection:
    """Keep the best-scored fraction of every pool; weights make up for the rest, so no row has to be dropped.

    A pool of n rows keeps ``ceil(fraction n)`` of them, but only rows with a score > 0; the earlier row wins
    a tie. Each pool keeps its share of the batch, ``weight = n / kept``. A pool without candidates hands its
    share to the others; if no pool has any, every row is kept with weight 1.

    Args: scores: (N,) >= 0, finite. pool: (N,) integers, from :func:`quantile_pools`. fraction: in (0, 1].
    Raises: ShapeError, NumericError.

    >>> select(torch.tensor([3.0, 1.0, 2.0, 0.0]), torch.tensor([0, 0, 1, 1]), 0.5)
    Selection(keep=tensor([ True, False,  True, False]), weight=tensor([2., 0., 2., 0.]))
    """
    scores = _vector("scores", scores)
    _every("scores", scores, (scores >= 0) & scores.isfinite(), "finite scores >= 0; set damping > 0")
    _in_range("fraction", fraction, is_real(fraction) and 0 < fraction <= 1, "a share in (0, 1]")
    expect_tensor("pool", pool)
    if pool.shape != scores.shape:
        raise ShapeError(f"pool: got shape {tuple(pool.shape)}, expected {tuple(scores.shape)} like scores")
    keep, weight = torch.zeros_like(scores, dtype=torch.bool), torch.zeros_like(scores)
    for number in torch.unique(pool):
        rows = (pool == number).nonzero().flatten()
        order = rows[scores[rows].argsort(descending=True, stable=True)]
        best = order[: math.ceil(fraction * len(rows) - 1e-9)]
        best = best[scores[best] > 0]
        keep[best] = True
        weight[best] = len(rows) / max(len(best), 1)
    if not keep.any():
        return Selection(torch.ones_like(keep), torch.ones_like(weight))
    return Selection(keep, weight * (len(weight) / weight.sum()))


def _check_actions(regret: Tensor, information: Tensor) -> None:
    for name, values in (("regret", regret), ("information", information)):
        vector = isinstance(values, Tensor) and not values.is_complex() and values.dim() == 1
        if not vector or not 0 < len(values) == len(regret):
            got = tuple(values.shape) if isinstance(values, Tensor) else type(values).__name__
            expected = "tensors (N,), N >= 1, regret and information alike"
            raise ShapeError(f"{name}: got {got}, expected {expected}")
        _every(name, values, values.isfinite() & (values >= 0), "finite numbers >= 0")


def _frontier(regret: Tensor, information: Tensor) -> Tensor:
    """Actions that no other beats in both respects, by rising regret."""
    order = information.argsort(descending=True, stable=True)
    order = order[regret[order].argsort(stable=True)]
    known = information[order]
    before = torch.cat((known.new_full((1,), -math.inf), known.cummax(0).values[:-1]))
    return order[known > before]


def _vector(name: str, values: Tensor, rows: int | None = None) -> Tensor:
    """(N,) numbers, detached, in float32 at least."""
    expect_tensor(name, values)
    if values.is_complex():
        raise ShapeError(f"{name}: got {values.dtype}, expected real numbers")
    if values.dim() != 1 or (rows is not None and len(values) != rows):
        expected = "(N,)" if rows is None else f"({rows},)"
        raise ShapeError(f"{name}: got shape {tuple(values.shape)}, expected {expected}: one number a row")
    return values.detach() if values.dtype == torch.float64 else values.detach().float()


def _every(name: str, values: Tensor, legal: Tensor, expected: str) -> None:
    if not legal.all():
        wrong = (~legal).nonzero().flatten().tolist()
        told = f"{values[wrong[0]].item()} at row {wrong[0]} ({len(wrong)} such rows)"
        raise NumericError(f"{name}: got {told}, expected {expected}")


def _in_range(name: str, value: float, legal: bool, expected: str) -> None:
    if not legal:
        raise NumericError(f"{name}: got {value}, expected {expected}")
