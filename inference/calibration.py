"""Simulation-based calibration: does an engine sample the posteriors of a model, for data that the model makes?

Draw theta ~ p(theta) and y ~ p(y | theta), and let theta_1, ..., theta_L be draws of p(theta | y).  For every scalar
quantity f(theta, y) the rank

    r = #{l : f(theta_l, y) < f(theta, y)}  in 0, ..., L

is uniform if the draws are right and independent.  All replications run as one batch, a chain each with its own data.

The ranks of parameters alone do not notice a sampler that ignores the data and returns the prior; those of quantities
that depend on the data do, so the log-likelihood is always among them.

References:
    Talts, Betancourt, Simpson, Vehtari, Gelman, Validating Bayesian inference algorithms with simulation-based
    calibration, 2018 (arXiv:1804.06788), algorithm 1.
    Modrák, Moon, Kim, Bürkner, Huurre, Faltejsková, Gelman, Vehtari, Simulation-based calibration checking for Bayesian
    computation: the choice of test quantities shapes sensitivity, Bayesian Analysis, 2023 (arXiv:2211.02383).
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from pyro import poutine
from pyro.poutine.subsample_messenger import _Subsample
from torch import Tensor

from inference.kernels.base import Kernel
from inference.mcmc import MCMC
from inference.potential import ChainArguments
from inference.results._over_draws import CountBytes, Draws, over_draws, scope
from inference.runtime.generators import derive_seed, generator, scoped_seed

__all__ = ["Calibration", "simulation_based_calibration"]

_LIKELIHOOD = "log_likelihood"
_MOST_BINS = 20  # a sampler's faults are smooth in the rank, so many thin bins only dilute them
_LEAST_EXPECTED = 5  # replications a bin, below which the chi-square law of the statistic is a poor approximation
_ENVELOPE_RUNS = 1000  # simulated sets of uniform ranks for the envelope of the plot

Quantity = Callable[[Draws, Draws], Tensor]


@dataclass(frozen=True)
class Calibration:
    """Ranks of the true values among the posterior draws.

    Attributes:
        ranks: quantity -> ``(replication, *shape)``, integers from 0 to ``num_draws``.
        num_draws: L, the posterior draws a replication.
        autocorrelation: quantity -> lag-1 autocorrelation of its draws, ``(*shape)``, averaged over replications. The
            theory wants independent draws: far from 0 here, ranks crowd at both ends though the sampler be right, and
            ``thin`` should be larger.
    """

    ranks: dict[str, Tensor]
    num_draws: int
    autocorrelation: dict[str, Tensor]

    def chi_square(self, num_bins: int | None = None) -> dict[str, Tensor]:
        """The p-value of a chi-square test of uniform ranks, quantity -> ``(*shape)``.

        Args:
            num_bins: bins of equal width; must divide ``num_draws + 1``.  By default its largest divisor up to 20 that
                leaves five expected replications a bin.

        Raises:
            ValueError: ``num_bins`` does not divide ``num_draws + 1``, or leaves fewer than five replications a bin.
        """
        bins = self._bins(num_bins)
        return {name: _chi_square(self._counts(ranks, bins)) for name, ranks in self.ranks.items()}

    def p_value(self, num_bins: int | None = None) -> float:
        """The smallest p-value of all scalars times their number (Bonferroni), at most 1."""
        values = torch.cat([p.reshape(-1) for p in self.chi_square(num_bins).values()])
        return min(1.0, float(values.min()) * values.numel())

    def plot(self, names: Sequence[str] | None = None, *, kind: str = "ecdf", num_bins: int | None = None) -> Any:
        """Rank plots, one panel a scalar, with the region that holds 95% of the plots of a right sampler.

        Args:
            names: quantities to show; all by default.
            kind: ``"ecdf"``, the difference of the ranks' distribution function from the uniform one, inside an
                envelope for the whole curve; or ``"histogram"``, with an interval for each bar.
            num_bins: as in :meth:`chi_square`, for histograms.

        Returns:
            ``matplotlib.figure.Figure``.

        Raises:
            ImportError: matplotlib is not installed.
            ValueError: ``kind`` or a name is unknown.
        """
        if kind not in ("ecdf", "histogram"):
            raise ValueError(f"kind must be 'ecdf' or 'histogram', got {kind!r}")
        unknown = sorted(set(names or ()) - set(self.ranks))
        if unknown:
            raise ValueError(f"there are no quantities {unknown}; the calibration has {sorted(self.ranks)}")
        try:
            from matplotlib.figure import Figure
        except ImportError as error:
            raise ImportError("the rank plots need matplotlib: pip install 'ppl-models[plots]'") from error
        panels = {
            f"{name}{list(map(int, index)) if index else ''}": ranks[(slice(None), *index)].cpu()
            for name, ranks in self.ranks.items()
            if names is None or name in names
            for index in map(tuple, torch.ones(ranks.shape[1:]).nonzero().tolist())
        }
        columns = math.ceil(math.sqrt(len(panels)))
        rows = math.ceil(len(panels) / columns)
        figure = Figure(figsize=(3.2 * columns, 2.4 * rows), layout="constrained")
        for i, (title, ranks) in enumerate(panels.items()):
            axes = figure.add_subplot(rows, columns, i + 1)
            axes.set_title(title, fontsize="small")
            (self._draw_ecdf if kind == "ecdf" else self._draw_histogram)(axes, ranks, num_bins)
        return figure

    def _draw_histogram(self, axes: Any, ranks: Tensor, num_bins: int | None) -> None:
        bins = self._bins(num_bins)
        expected = len(ranks) / bins
        half = 1.96 * math.sqrt(expected * (1 - 1 / bins))
        axes.axhspan(expected - half, expected + half, color="0.85")
        axes.axhline(expected, color="0.5", linewidth=0.8)
        width = (self.num_draws + 1) / bins
        axes.bar([width * (b + 0.5) for b in range(bins)], self._counts(ranks, bins).tolist(), width=0.9 * width)
        axes.set_xlabel("rank")

    def _draw_ecdf(self, axes: Any, ranks: Tensor, num_bins: int | None) -> None:
        """The envelope is as wide as the largest standardised difference of 95% of simulated sets of uniform ranks."""
        size, levels = len(ranks), self.num_draws + 1
        uniform = torch.arange(1, levels, dtype=torch.float64) / levels
        sd = (uniform * (1 - uniform) / size).sqrt()

        def difference(counts: Tensor) -> Tensor:
            return counts.cumsum(-1)[..., :-1] / size - uniform

        simulated = torch.distributions.Multinomial(size, torch.full((levels,), 1 / levels, dtype=torch.float64))
        with scoped_seed(0):
            envelope = (difference(simulated.sample((_ENVELOPE_RUNS,))) / sd).abs().amax(-1).quantile(0.95) * sd
        axes.fill_between(uniform.tolist(), (-envelope).tolist(), envelope.tolist(), color="0.85")
        axes.axhline(0, color="0.5", linewidth=0.8)
        axes.step(uniform.tolist(), difference(torch.bincount(ranks, minlength=levels).double()).tolist(), where="mid")
        axes.set_xlabel("rank / (L + 1)")

    def _bins(self, num_bins: int | None) -> int:
        levels = self.num_draws + 1
        size = len(next(iter(self.ranks.values())))
        if num_bins is None:
            most = min(_MOST_BINS, size // _LEAST_EXPECTED)
            num_bins = max((b for b in range(2, most + 1) if levels % b == 0), default=0)
            if not num_bins:
                raise ValueError(
                    f"no number of bins from 2 to {most} divides num_samples + 1 = {levels}: take 31, 63 or 99 draws, "
                    "and at least ten replications"
                )
        elif num_bins < 2 or levels % num_bins or size < _LEAST_EXPECTED * num_bins:
            raise ValueError(
                f"num_bins must divide num_samples + 1 = {levels} and leave {_LEAST_EXPECTED} of {size} replications a "
                f"bin, got {num_bins}"
            )
        return num_bins

    def _counts(self, ranks: Tensor, bins: int) -> Tensor:
        """Replications in each bin, ``(bin, *shape)``."""
        bin_of = ranks * bins // (self.num_draws + 1)
        return torch.stack([(bin_of == b).sum(0) for b in range(bins)]).double()


def simulation_based_calibration(
    model: Callable[..., Any],
    kernel: Callable[[Callable[..., Any]], Kernel],
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    observed: Sequence[str],
    num_replications: int = 500,
    num_samples: int = 63,
    warmup_steps: int = 500,
    thin: int = 1,
    quantities: Mapping[str, Quantity] | None = None,
    seed: int = 0,
    **options: Any,
) -> Calibration:
    """Ranks of true values among posterior draws, over replications of a model with a proper prior.

    Step size and mass matrix are adapted over all replications together in the warm-up and then stay: a kernel with
    one fixed setting still leaves every replication's posterior as it is.  So a pooled setting costs efficiency and
    no validity, if the posteriors are of about one scale.  A replication that starts far out may stay there, since the
    step that suits the others is too large for it; ``init_strategy=init_to_sample`` starts all from the prior.

        result = simulation_based_calibration(model, partial(HMC, num_steps=8), (x,), observed=["y"], thin=3)
        assert result.p_value() > 0.01

    Args:
        model: a Pyro model that draws its data when called with ``args`` (``obs=None``), with a proper prior on every
            site.
        kernel: builds the kernel for a model, e.g. ``HMC`` or ``functools.partial(HMC, num_steps=8)``.
        args, kwargs: what the model is called with: covariates, sizes; the same for all replications.
        observed: names of the sites that are data.
        num_replications: data sets, and chains.
        num_samples: L, draws kept of each; ranks go from 0 to L.
        warmup_steps, thin, seed, **options: as in ``MCMC``.  ``thin`` should make draws nearly independent.
        quantities: further test quantities by name: functions of one draw ``{site: value}`` and one data set
            ``{site: value}`` that return a scalar or tensor.

    Returns:
        Calibration: ranks of every continuous latent site, of ``"log_likelihood"`` (where no discrete latent site was
        summed out) and of ``quantities``.  Ties, as discrete quantities have, are broken at random.

    Raises:
        TypeError, ValueError: ``observed`` names no site of the model; the model subsamples a plate or has no proper
            prior to draw from; a quantity has a site's name; bad counts.
    """
    _check_names(observed, quantities or {})
    kwargs = dict(kwargs or {})
    simulated = _simulate(model, tuple(args), kwargs, observed, num_replications, seed, quantities or {})
    data = {name: simulated[name] for name in observed}
    conditioned = _Conditioned(model, tuple(data))
    mcmc = MCMC(
        kernel(conditioned),
        num_samples,
        warmup_steps,
        num_chains=num_replications,
        thin=thin,
        seed=derive_seed(seed, "calibration"),
        in_dims=(*(0 for _ in data), *(None for _ in args)),
        **{"progress": False, **options},
    )
    draws = mcmc.run(*data.values(), *args, **kwargs).get_samples(group_by_chain=True)
    truth = {name: value for name, value in simulated.items() if name in draws and name not in data}
    # The truth stands before its replication's draws, (replication, 1 + L, ...): both see the same functions.
    values = {name: torch.cat([truth[name].unsqueeze(1), draws[name]], 1) for name in truth}
    discrete = set(simulated) - set(truth) - set(data)
    functions: dict[str, Quantity] = dict(quantities or {})
    if not discrete:
        functions[_LIKELIHOOD] = _likelihood(model, tuple(args), kwargs, observed)
    values |= _evaluate(functions, values, data, model)
    noise = generator(seed, "ties", device=next(iter(values.values())).device)
    return Calibration(
        {name: _ranks(value, noise) for name, value in values.items()},
        num_samples,
        {name: _autocorrelation(value[:, 1:]) for name, value in values.items()},
    )


class _Conditioned:
    """The model given its data, which come first among the arguments."""

    def __init__(self, model: Callable[..., Any], names: tuple[str, ...]) -> None:
        self.model, self.names = model, names

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        data = dict(zip(self.names, args, strict=False))
        return poutine.condition(self.model, data)(*args[len(data) :], **kwargs)


def _simulate(
    model: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    observed: Sequence[str],
    size: int,
    seed: int,
    quantities: Mapping[str, Quantity],
) -> Draws:
    """Every sample site's value, ``(replication, ...)``, drawn from the model."""
    if isinstance(size, bool) or not isinstance(size, int):
        raise TypeError(f"num_replications must be an integer, got {size!r}")
    if size < 10:
        raise ValueError(f"num_replications must be at least 10, got {size}")

    def sites(trace: Any) -> dict[str, Any]:
        return {
            name: node
            for name, node in trace.nodes.items()
            if node["type"] == "sample" and not isinstance(node["fn"], _Subsample)
        }

    with scope(derive_seed(seed, "prior"), False, (args, kwargs), (model,)):
        try:
            with CountBytes() as counted:
                trace = poutine.trace(model).get_trace(*args, **kwargs)
        except NotImplementedError as error:
            raise ValueError(f"the model cannot be drawn from; calibration needs a proper prior: {error}") from error
        found = sites(trace)
        for name in observed:
            if name not in found:
                raise ValueError(f"observed names {name!r}, which is no site of the model; it has {sorted(found)}")
        clash = sorted(set(quantities) & set(found))
        if clash:
            raise ValueError(f"quantities: {clash[0]!r} is a site of the model: give the quantity another name")
        for name, node in trace.nodes.items():
            fn = node.get("fn")
            if isinstance(fn, _Subsample) and fn.subsample_size is not None and fn.subsample_size < fn.size:
                raise ValueError(f"plate {name!r} is subsampled: calibrate the model with the full plate")
        drawn = [n for n, node in found.items() if not node["is_observed"] and not node["infer"].get("_deterministic")]
        fixed = [n for n, node in found.items() if node["is_observed"] and not node["infer"].get("_deterministic")]
        if fixed:
            raise ValueError(
                f"the model observes {fixed} already, so what it draws is not its prior: call it without data, and "
                "write a pyro.factor as the distribution that it stands for"
            )

        def one(_: Draws) -> Draws:
            nodes: dict[str, Any] = poutine.trace(model).get_trace(*args, **kwargs).nodes
            return {name: nodes[name]["value"] for name in drawn}

        return over_draws(one, {}, size, None, counted, seed=derive_seed(seed, "prior"), stacklevel=4)


def _likelihood(
    model: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], observed: Sequence[str]
) -> Quantity:
    def log_likelihood(draw: Draws, data: Draws) -> Tensor:
        trace = poutine.trace(poutine.condition(model, {**draw, **data})).get_trace(*args, **kwargs)
        return torch.as_tensor(trace.log_prob_sum(lambda name, site: name in observed))

    return log_likelihood


def _evaluate(functions: dict[str, Quantity], values: Draws, data: Draws, model: Any) -> Draws:
    """Each function at every draw with its replication's data, ``(replication, 1 + L, ...)``."""
    if not functions:
        return {}
    replications, draws = next(iter(values.values())).shape[:2]
    rows = ChainArguments(tuple(data.values()), {}, (0,) * len(data))
    index = torch.arange(replications, device=rows.tensors[0].device).repeat_interleave(draws)
    flat = {name: value.flatten(0, 1) for name, value in values.items()}
    # A draw carries the index of its data and not the data, which would be copied once a draw.
    key = "/replication"

    def one(draw: Draws) -> Draws:
        rest = {name: value for name, value in draw.items() if name != key}
        row: Draws = dict(zip(data, rows.row(draw[key]), strict=True))
        return {name: function(rest, row) for name, function in functions.items()}

    flat[key] = index
    with scope(0, False, (flat, data), (model,)):
        with CountBytes() as counted:
            one({name: value[0] for name, value in flat.items()})
        found = over_draws(one, flat, len(index), None, counted, seed=0, stacklevel=4)
    return {name: value.unflatten(0, (replications, draws)) for name, value in found.items()}


def _ranks(values: Tensor, noise: torch.Generator) -> Tensor:
    """Rank of the first of ``(replication, 1 + L, ...)`` among the others, a random one among equals."""
    truth, draws = values[:, :1], values[:, 1:]
    less, ties = (draws < truth).sum(1), (draws == truth).sum(1)
    share = torch.rand(ties.shape, generator=noise, dtype=torch.float64, device=ties.device)
    return less + (share * (ties + 1)).long()


def _autocorrelation(draws: Tensor) -> Tensor:
    centred = draws.double() - draws.double().mean(1, keepdim=True)
    variance = centred.square().mean(1)
    lagged = (centred[:, 1:] * centred[:, :-1]).mean(1)
    return (lagged / variance).nanmean(0)


def _chi_square(counts: Tensor) -> Tensor:
    """p-values of ``(bin, ...)`` counts against equal expectations: P(chi2 > x) = Q(df / 2, x / 2)."""
    expected = counts.sum(0) / len(counts)
    statistic = ((counts - expected).square() / expected).sum(0)
    half = torch.full_like(statistic, (len(counts) - 1) / 2)
    return torch.special.gammaincc(half, statistic / 2)


def _check_names(observed: Sequence[str], quantities: Mapping[str, Quantity]) -> None:
    if isinstance(observed, str) or not all(isinstance(name, str) for name in observed):
        raise TypeError(f"observed must be a list of site names, got {observed!r}")
    if not observed:
        raise ValueError("observed is empty: name the sites that are data")
    if _LIKELIHOOD in quantities:
        raise ValueError(f"{_LIKELIHOOD!r} is computed for every model: give the quantity another name")
    for name, function in quantities.items():
        if not callable(function):
            raise TypeError(f"quantities[{name!r}] must be a function of a draw and its data, got {function!r}")
