"""Estimates of log Z with their errors from importance weights, one way or both ways.

With weights ``w`` whose mean is unbiased for Z, ``log mean(w)`` is on average below log Z (Jensen), and by the delta
method its standard error is ``sd(w) / (mean(w) sqrt(n))``.  Weights of the reverse process have ``E[1 / w] = 1 / Z``,
so ``-log mean(1 / w)`` is on average above log Z (Grosse, Ghahramani and Adams, "Sandwiching the marginal likelihood
using bidirectional Monte Carlo", 2015, arXiv:1511.02543).  Both together give the bridge estimator (Meng and Wong,
Statistica Sinica 6, 1996, equation 4.1; on paths of states it is Bennett's acceptance ratio).
"""

import math
import warnings
from typing import NamedTuple

import torch
from torch import Tensor

from inference._errors import SamplerWarning
from inference.results.diagnostics import ess_mean
from inference.results.pareto import pareto_k

__all__ = ["LogPartition", "bridge", "from_weights", "margin", "sandwich", "tail_shape", "with_upper_bound"]

_HALVINGS = 100  # of the interval that holds the logarithm of r
_FARTHEST, _EXACT = 1e9, 1e-13  # nats that it may be widened by, and its relative width in the end
_FEW_TERMS = 3.0  # effective ones; below it errors of normal weights are larger than they say, above it they are right
_ERRORS_OF_A_BOUND = 2.0


class LogPartition(NamedTuple):
    """An estimate of log Z, the log normalising constant (log evidence of a Bayesian model).

    Attributes:
        value: the estimate of log Z.
        standard_error: of ``value``, by the delta method; NaN where there is nothing to estimate it from.
        lower: a stochastic lower bound, E[lower] <= log Z, less two of its standard errors (where there are any), so
            that log Z lies above it in 97 % of the runs; minus infinity where the method gives none.
        upper: a stochastic upper bound, E[upper] >= log Z, and two standard errors; infinity where the method gives
            none.
        ess: effective number of the weights, ``(sum w)^2 / sum w^2`` (the smaller one of both directions).
        pareto_k: shape of the weights' upper tail (the larger one of both directions); above 0.7 neither ``value`` nor
            ``standard_error`` can be trusted (Vehtari, Simpson, Gelman, Yao and Gabry, JMLR 25, 2024,
            arXiv:1507.02646).
        exact: whether the bounds hold as stated.  False where posterior draws went in that are only approximate, so
            that ``upper`` is too low if they miss a part of the posterior, and where the weights are unbiased only in
            the limit (adaptive SMC).
        method: how it was made.
        log_weights: log weights of the forward chains, draws or runs ``(n,)``; their mean exponential is Z.
        reverse_log_weights: the same quantity on reverse chains ``(m,)``, whose mean of ``exp(-x)`` is 1 / Z; empty if
            there are none.
    """

    value: float
    standard_error: float
    lower: float
    upper: float
    ess: float
    pareto_k: float
    exact: bool
    method: str
    log_weights: Tensor
    reverse_log_weights: Tensor

    @property
    def khat(self) -> float:
        """``pareto_k`` under the name that it has in papers."""
        return self.pareto_k

    def __str__(self) -> str:
        """One line; the weights are left out."""
        return (
            f"log Z = {self.value:.4f} +- {self.standard_error:.4f} by {self.method}, bounds {self.lower:.4f} and "
            f"{self.upper:.4f}, {self.ess:.0f} effective weights, Pareto k {self.pareto_k:.2f}"
        )


def from_weights(
    log_weights: Tensor, method: str, *, reverse: bool = False, exact: bool = True, groups: Tensor | None = None
) -> LogPartition:
    """log Z from weights of one direction.

    Args:
        log_weights: ``(n,)``.
        method: name for the record.
        reverse: the weights are those of reverse chains, ``E[exp(-x)] = 1 / Z``.
        exact: whether what the chains started from was.
        groups: a number for each weight ``(n,)``, 0, 1, ...; weights of the same number are dependent (reverse chains
            from the same draw), those of different numbers are not.
    """
    x = log_weights.detach().double()
    signed = -x if reverse else x
    mean = torch.logsumexp(signed, 0) - math.log(len(x))
    relative = (signed - mean).exp()
    value = float(-mean if reverse else mean)
    error = math.sqrt(float(_variance_of_mean(relative, groups)))
    return LogPartition(
        value=value,
        standard_error=error,
        lower=-math.inf if reverse else value - margin(error),
        upper=value + margin(error) if reverse else math.inf,
        ess=float(relative.sum().square() / relative.square().sum()),
        pareto_k=tail_shape(signed),
        exact=exact,
        method=method,
        log_weights=x[:0] if reverse else x,
        reverse_log_weights=x if reverse else x[:0],
    )


def sandwich(
    forward: Tensor, reverse: Tensor, method: str, *, exact: bool = True, groups: Tensor | None = None
) -> LogPartition:
    """log Z from weights of both directions: the bridge estimate between the forward lower and reverse upper bound.

    Args:
        forward: log weights ``(n,)``.
        reverse: log weights of reverse chains ``(m,)``.
        method, exact, groups: as in :func:`from_weights`; ``groups`` are those of the reverse chains.
    """
    low = from_weights(forward, method)
    high = from_weights(reverse, method, reverse=True, groups=groups)
    value, variance = bridge(forward, reverse, groups=groups)
    return LogPartition(
        value=value,
        standard_error=math.sqrt(variance),
        lower=low.lower,
        upper=high.upper,
        ess=min(low.ess, high.ess),
        pareto_k=max(low.pareto_k, high.pareto_k),
        exact=exact,
        method=method,
        log_weights=low.log_weights,
        reverse_log_weights=high.reverse_log_weights,
    )


def with_upper_bound(found: LogPartition) -> LogPartition:
    """The estimate with a stochastic upper bound made from the same independent weights.

    For every b, ``log Z <= exp(-b) Z + b - 1``.  With b from one half of the weights and Z from the other, both ways
    round, the mean of the bound's estimate is at or above log Z; it is never below ``value``.
    """
    half = len(found.log_weights) // 2
    if half < 1:
        return found
    first = torch.logsumexp(found.log_weights[:half], 0) - math.log(half)
    second = torch.logsumexp(found.log_weights[half:], 0) - math.log(len(found.log_weights) - half)
    upper = 0.5 * (first + second) + torch.cosh((first - second).clamp(-700, 700)) - 1
    return found._replace(upper=max(float(upper), found.value) + margin(found.standard_error))


def margin(error: float) -> float:
    """How far a bound is moved out for its sampling error; nothing where a single weight shows none."""
    return 0.0 if math.isnan(error) else _ERRORS_OF_A_BOUND * error


def bridge(
    proposal: Tensor, target: Tensor, *, chains: int | None = None, groups: Tensor | None = None
) -> tuple[float, float]:
    """The bridge estimate of log Z and its variance.

    With ``l = q / g`` the ratio of the unnormalised target to the proposal, evaluated on ``n_2`` proposal draws and
    ``n_1`` target draws, and ``s_i = n_i / (n_1 + n_2)``, Meng and Wong's optimal bridge is the fixed point of

        r = mean_2[l / (s_1 l + s_2 r)] / mean_1[1 / (s_1 l + s_2 r)].

    It is found by bisection.  Its relative error is that of Frühwirth-Schnatter, "Estimating marginal likelihoods for
    mixture and Markov switching models using bridge sampling techniques", Econometrics Journal 7 (2004), equation 17.

    Args:
        proposal: log l on proposal draws ``(n_2,)``.
        target: log l on target draws ``(n_1,)``.
        chains: number of Markov chains that the target draws come from, chain by chain; their autocorrelation then
            counts.  ``None``: they are independent.
        groups: as in :func:`from_weights`, for the target draws.
    """
    at_proposal, at_target = proposal.detach().double(), target.detach().double()
    n_1, n_2 = float(len(at_target)), float(len(at_proposal))
    if chains is not None:
        correlated = ess_mean(at_target.reshape(chains, -1))
        n_1 = min(n_1, float(correlated.nan_to_num(nan=n_1)))
    log_s1, log_s2 = math.log(n_1 / (n_1 + n_2)), math.log(n_2 / (n_1 + n_2))

    def denominator(log_l: Tensor, log_r: Tensor) -> Tensor:
        return torch.logaddexp(log_s1 + log_l, log_s2 + log_r)

    def excess(log_r: Tensor) -> bool:
        above = torch.logsumexp(at_proposal - denominator(at_proposal, log_r), 0) - math.log(len(at_proposal))
        below = torch.logsumexp(-denominator(at_target, log_r), 0) - math.log(len(at_target))
        return bool(above - below > log_r)

    # The right side over r falls in r.  Meng and Wong's iteration crawls where the two sets of draws hardly overlap.
    log_r = torch.logsumexp(at_proposal, 0) - math.log(n_2)
    every = torch.cat([at_proposal, at_target])
    if bool(log_r.isfinite()) and not bool(at_target.isnan().any()):
        low, high = every[every.isfinite()].aminmax()
        width = 1 + high - low
        while not excess(low) and bool(width < _FARTHEST):  # draws of density zero pull it below all others
            low, width = low - width, 2 * width
        for _ in range(_HALVINGS):
            log_r = 0.5 * (low + high)
            low, high = (log_r, high) if excess(log_r) else (low, log_r)
            if bool(high - low <= _EXACT * (1 + log_r.abs())):
                break
    f_1 = (at_proposal - denominator(at_proposal, log_r)).exp()
    f_2 = (log_r - denominator(at_target, log_r)).exp()
    few = min(float((f.sum().square() / f.square().sum()).nan_to_num(0.0)) for f in (f_1, f_2))  # 0 / 0: none at all
    if few < min(_FEW_TERMS, n_1 / 4, n_2 / 4):
        warnings.warn(
            f"the bridge estimate of log Z rests on {few:.1f} effective draws that both laws know: neither it nor its "
            "error can be trusted. Use more temperatures, more draws, or a proposal nearer to the target",
            SamplerWarning,
            stacklevel=4,
        )
    second = f_2 / f_2.mean()
    if chains is None:
        variance_2 = _variance_of_mean(second, groups)
    else:
        series = second.reshape(chains, -1)
        size = ess_mean(series).nan_to_num(nan=float(second.numel()))
        variance_2 = second.var() / size
    return float(log_r), float(_variance_of_mean(f_1 / f_1.mean(), None) + variance_2)


def _variance_of_mean(x: Tensor, groups: Tensor | None) -> Tensor:
    """Variance of the mean of ``x``, of independent values or of independent groups of them; NaN for a single one."""
    if groups is None:
        return x.var() / len(x) if len(x) > 1 else x.new_tensor(math.nan)
    count = int(groups.max()) + 1
    if count < 2:
        return x.new_tensor(math.nan)
    deviation = torch.zeros(count, dtype=x.dtype, device=x.device).scatter_add(0, groups, x - x.mean())
    return deviation.square().sum() / len(x) ** 2 * count / (count - 1)


def tail_shape(log_weights: Tensor) -> float:
    """Pareto k of the weights; NaN where there are fewer than 25 that are positive, or all are equal."""
    x = log_weights.detach()
    x = x[x > -math.inf]
    k = pareto_k(x) if len(x) >= 25 else math.nan
    return math.nan if k == -math.inf else k
