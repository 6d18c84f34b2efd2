"""The Laplace approximation of any Pyro model: a Gaussian at the mode, in unconstrained space.

With ``U(z) = -log p(z, data)`` over the unconstrained vector z (log-Jacobians included), its minimum z* and a
curvature H there (MacKay, "Bayesian interpolation", 1992; Tierney and Kadane, 1986),

    p(z | data) ~ N(z*, H^-1),      log p(data) ~ -U(z*) + d/2 log(2 pi) - 1/2 log det H,

both exact where U is quadratic.  H is the exact Hessian, the generalised Gauss-Newton matrix or the empirical Fisher
matrix (``inference.potential.curvature``), full or its diagonal, over all sites or a part of them, the others held at
the mode: for a network the sites of its last layer (Daxberger et al., "Laplace Redux", 2021, arXiv:2106.14806).
"""

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from pyro.infer.autoguide.initialization import init_to_sample
from torch import Tensor
from torch.distributions import Transform

from inference._errors import CurvatureError, NonFiniteError, SamplerWarning
from inference.citation import Citable, Paper
from inference.lbfgs import Minimum, minimize
from inference.potential.curvature import CURVATURES, Curvature
from inference.potential.log_density import LogDensity, Site
from inference.potential.potential import Potential
from inference.results.brief import brief
from inference.results.export import to_arviz
from inference.results.pareto import smooth_weights
from inference.runtime.generators import derive_seed, generator

__all__ = ["ImportanceEstimate", "Laplace", "LaplaceResult"]

_STRUCTURES = ("full", "diagonal")
_MOST_FULL = 20_000  # entries a side of a full matrix: 3 GiB in float64, and its factor again
_PRIOR_DRAWS, _LARGE = 25, 1e3  # that show the prior's spread, and one from which it is the unit of a search
_POLISH = 10  # Newton steps at most, after the search for the mode
_REACHED = 1e-3  # standard deviations from the mode, by the Newton step, that count as there


@dataclass(frozen=True)
class ImportanceEstimate:
    """What draws of the approximation, weighted to the posterior, say.

    Attributes:
        log_evidence: importance-sampling estimate of log p(data), by Pareto-smoothed weights.
        standard_error: of it, by the delta method; of no worth where ``pareto_k`` exceeds 0.7.
        pareto_k: shape of the weights' tail: below 0.5 the approximation is good, above 0.7 it is not to be trusted.
        log_weights: log p(z, data) - log q(z) of each draw, ``(num_samples,)``.
    """

    log_evidence: float
    standard_error: float
    pareto_k: float
    log_weights: Tensor = field(repr=False)


class Laplace(Citable):
    """Laplace approximation of a Pyro model's posterior.

    Args:
        model: Pyro model; discrete sites are summed out where Pyro can enumerate them.
        curvature: ``"hessian"``, exact; ``"ggn"``, positive definite wherever the prior's part is, for observed sites
            that are Normal, Bernoulli, Categorical, Poisson or MultivariateNormal; ``"empirical_fisher"``, the outer
            products of the scores of single observations.
        structure: ``"full"`` or ``"diagonal"``.
        subset: names of the latent sites that get the Gaussian, the others being held at the mode; None for all. The
            last layer of a network is the sites of that layer.
        num_starts: starting points of the search for the mode, all in one batch; the best end is kept.
        init_strategy: Pyro's init strategy of the starts; None for uniform on (-2, 2) in unconstrained space.
        initial_params: starts by site, unconstrained, ``(start, *shape)``, in place of both.
        transforms: site to transform from its support to unconstrained space, as in ``pyro.infer.HMC``. The
            approximation depends on it.
        max_evaluations: most evaluations of the energy of each start.
        seed: of the starts.

    Raises:
        TypeError, ValueError: an argument does not fit.

    Example:
        >>> import pyro, pyro.distributions as dist
        >>> def model(y):
        ...     mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
        ...     with pyro.plate("data", len(y)):
        ...         pyro.sample("y", dist.Normal(mean, 1.0), obs=y)
        >>> result = Laplace(model).run(torch.ones(3))
        >>> round(result.mode["mean"].item(), 4), round(result.covariance.item(), 4)
        (0.75, 0.25)
    """

    papers: ClassVar[tuple[Paper, ...]] = (
        Paper(
            "article",
            "mackay1992bayesian",
            author="MacKay, David J. C.",
            title="Bayesian Interpolation",
            journal="Neural Computation",
            volume=4,
            number=3,
            pages="415--447",
            year=1992,
        ),
        Paper(
            "article",
            "tierney1986accurate",
            author="Tierney, Luke and Kadane, Joseph B.",
            title="Accurate Approximations for Posterior Moments and Marginal Densities",
            journal="Journal of the American Statistical Association",
            volume=81,
            number=393,
            pages="82--86",
            year=1986,
        ),
    )

    def __init__(
        self,
        model: Callable[..., Any],
        curvature: str = "hessian",
        structure: str = "full",
        subset: Sequence[str] | None = None,
        *,
        num_starts: int = 4,
        init_strategy: Callable[[Any], Any] | None = None,
        initial_params: Mapping[str, Tensor] | None = None,
        transforms: Mapping[str, Transform] | None = None,
        max_evaluations: int = 2000,
        seed: int = 0,
    ) -> None:
        if not callable(model):
            raise TypeError(f"model must be a Pyro callable, got {type(model).__name__}")
        if curvature not in CURVATURES:
            raise ValueError(f"curvature must be one of {CURVATURES}, got {curvature!r}")
        if structure not in _STRUCTURES:
            raise ValueError(f"structure must be one of {_STRUCTURES}, got {structure!r}")
        if isinstance(subset, str):
            raise TypeError(f"subset must be a sequence of site names, got the string {subset!r}")
        if subset is not None and not subset:
            raise ValueError("subset names no site: give None for all")
        for name, value in (("num_starts", num_starts), ("max_evaluations", max_evaluations)):
            if isinstance(value, bool) or not isinstance(value, int):
                raise TypeError(f"{name} must be an integer, got {value!r}")
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        derive_seed(seed)
        self.model, self.curvature, self.structure = model, curvature, structure
        self.subset = None if subset is None else list(subset)
        self.num_starts, self.init_strategy, self.initial_params = num_starts, init_strategy, initial_params
        self.transforms, self.max_evaluations, self.seed = transforms, max_evaluations, seed

    def run(self, *args: Any, **kwargs: Any) -> "LaplaceResult":
        """Find the mode of ``model(*args, **kwargs)`` and the curvature there.

        Raises:
            ValueError: the model subsamples a plate, ``subset`` names an unknown site, or the model does not fit
                ``curvature``.
            NonFiniteError: the density is zero or not finite at every start.
            CurvatureError: the curvature at the mode is not positive definite.
        """
        density = LogDensity(self.model, args, kwargs, transforms=self.transforms)
        if density.plates:
            raise ValueError(
                f"the model subsamples the plates {sorted(density.plates)}: a mode and a curvature need all the data. "
                "Call it without subsample_size"
            )
        unknown = sorted(set(self.subset or ()) - set(density.sites))
        if unknown:
            raise ValueError(f"subset: the model has no latent site {unknown}; it has {sorted(density.sites)}")
        chosen = [s for s in density.sites.values() if self.subset is None or s.name in self.subset]
        index = torch.cat([torch.arange(s.start, s.stop, device=density.device) for s in chosen])
        if self.structure == "full" and len(index) > _MOST_FULL:
            raise ValueError(
                f"{len(index)} unconstrained values are too many for a full matrix (at most {_MOST_FULL}): give "
                "structure='diagonal', or a subset such as the last layer"
            )
        potential = Potential(density)
        minimum = self._search(potential)
        best = int(torch.where(minimum.value.isfinite(), minimum.value, math.inf).argmin())
        z, energy, gradient = minimum.position[best], minimum.value[best], minimum.gradient[best]
        if not torch.isfinite(energy) or not torch.isfinite(gradient).all():
            raise NonFiniteError(
                f"the log-density or its gradient is not finite at all {len(minimum.value)} starts: give "
                "initial_params or an init_strategy that starts inside the support"
            )
        curvature = Curvature(potential, self.curvature, z)
        for step in range(_POLISH + 1):
            matrix = curvature(z, index, diagonal=self.structure == "diagonal")
            root = _factor(matrix, chosen, self.curvature)
            change = -_solve(root, gradient[index])
            distance = (-(change * gradient[index]).sum()).clamp(min=0).sqrt()
            if step == _POLISH or distance <= 10 * torch.finfo(z.dtype).eps:
                break
            trial = z.index_add(0, index, change)
            value, slope = (x[0] for x in potential.value_and_grad(trial.unsqueeze(0)))
            # Rounding of the energy hides the last steps; the gradient shows them.
            rounding = 8 * torch.finfo(z.dtype).eps * energy.abs()
            if not (value <= energy + rounding and slope[index].norm() < 0.5 * gradient[index].norm()):
                break
            z, energy, gradient = trial, value, slope
        converged = bool((distance <= _REACHED) & (minimum.converged[best] | (len(index) == density.dim)))
        if not converged:
            warnings.warn(
                f"the mode was not reached: {distance.item():.2g} standard deviations away, largest gradient "
                f"{gradient.abs().max().item():.2g} after {self.max_evaluations} evaluations at most. More "
                "max_evaluations, more num_starts or initial_params may help",
                SamplerWarning,
                stacklevel=2,
            )
        return LaplaceResult(potential, z, -energy, root, index, chosen, self, minimum, distance.item(), converged)

    def _search(self, potential: Potential) -> Minimum:
        density = potential.density
        assert isinstance(density, LogDensity)
        if self.initial_params is not None:
            start = density.flatten(self.initial_params)
        else:
            seeds = [derive_seed(self.seed, "start", i) for i in range(self.num_starts)]
            start = torch.stack([density.initial_position(s, self.init_strategy) for s in seeds])
        unit = self._units(density)

        def in_units(u: Tensor) -> tuple[Tensor, Tensor]:
            value, slope = potential.value_and_grad(u * unit)
            return value, slope * unit

        found = minimize(in_units, start / unit, max_evaluations=self.max_evaluations)
        return found._replace(position=found.position * unit, gradient=found.gradient / unit)

    def _units(self, density: LogDensity) -> Tensor:
        """The unit of each number in the search, ``(dim,)``: the prior's spread where it is in thousands, along which a
        search in steps of one sees no slope; else one, since data tell more than a usual prior.
        """
        seeds = (derive_seed(self.seed, "unit", i) for i in range(_PRIOR_DRAWS))
        drawn = torch.stack([density.initial_position(seed, init_to_sample) for seed in seeds])
        spread = 1.5 * (drawn - drawn.median(0).values).abs().median(0).values
        return torch.where(spread.isfinite() & (spread > _LARGE), spread, 1.0)


@brief
@dataclass(frozen=True, eq=False)
class LaplaceResult(Citable):
    """A Gaussian in unconstrained space.

    Attributes:
        position: the mode z*, ``(dim,)``, all sites.
        log_prob: log p(z*, data), with the log-Jacobians.
        index: entries of the vector that are random, ``(k,)``; the others are held.
        newton_distance: length of the last Newton step in standard deviations of the approximation.
        converged: whether that is below 0.001 and, with a subset, the search over all sites converged too.
    """

    _potential: Potential
    position: Tensor
    log_prob: Tensor
    _root: Tensor
    index: Tensor
    _chosen: list[Site]
    _settings: Laplace
    _minimum: Minimum
    newton_distance: float
    converged: bool

    def _used(self) -> tuple[object, ...]:
        return (self._settings,)

    @property
    def mode(self) -> dict[str, Tensor]:
        """Constrained values of all latent sites at z*, ``(*shape)``."""
        return {name: v[0] for name, v in self._potential.constrain(self.position.unsqueeze(0)).items()}

    @property
    def start_log_probs(self) -> Tensor:
        """log p(z, data) where each start ended, ``(start,)``: ends that differ are modes that differ."""
        return -self._minimum.value

    @property
    def site_slices(self) -> dict[str, slice]:
        """Each random site's rows of ``precision`` and ``covariance``."""
        slices, start = {}, 0
        for site in self._chosen:
            slices[site.name] = slice(start, start + site.stop - site.start)
            start = slices[site.name].stop
        return slices

    @property
    def precision(self) -> Tensor:
        """H, ``(k, k)``, or its diagonal ``(k,)`` for ``structure="diagonal"``."""
        return self._root.square() if self._root.dim() == 1 else self._root @ self._root.T

    @property
    def covariance(self) -> Tensor:
        """H^-1, ``(k, k)``, or its diagonal ``(k,)`` for ``structure="diagonal"``."""
        return self._root.square().reciprocal() if self._root.dim() == 1 else torch.cholesky_inverse(self._root)

    @property
    def log_evidence(self) -> Tensor:
        """-U(z*) + d/2 log(2 pi) - 1/2 log det H, a scalar; with a subset, the evidence given the others' mode."""
        return self.log_prob + 0.5 * len(self.index) * math.log(2 * math.pi) - self._half_log_det

    @property
    def _half_log_det(self) -> Tensor:
        return (self._root if self._root.dim() == 1 else self._root.diagonal()).log().sum()

    def get_samples(self, num_samples: int = 1000, seed: int = 0) -> dict[str, Tensor]:
        """Draws, mapped to the sites' supports: site -> ``(num_samples, *shape)``; held sites repeat their mode."""
        return self._potential.constrain(self._draw(num_samples, seed)[0])

    def importance(self, num_samples: int = 1000, seed: int = 0) -> ImportanceEstimate:
        """Check and correct the approximation by importance sampling with ``num_samples`` draws of it, at least 25."""
        z, noise = self._draw(num_samples, seed)
        if num_samples < 25:
            raise ValueError(f"num_samples must be at least 25 for the tail of the weights, got {num_samples}")
        log_q = self._half_log_det - 0.5 * len(self.index) * math.log(2 * math.pi) - 0.5 * noise.square().sum(-1)
        log_weights = -self._potential(z) - log_q
        log_weights = torch.where(log_weights.isnan(), -math.inf, log_weights)
        smoothed, pareto_k = smooth_weights(log_weights)
        log_evidence = (smoothed.logsumexp(0) - math.log(num_samples)).item()
        relative = (smoothed - log_evidence).exp()
        error = (relative.std() / num_samples**0.5).item()
        return ImportanceEstimate(log_evidence, error, pareto_k, log_weights)

    def to_arviz(self, num_samples: int = 1000, seed: int = 0) -> Any:
        """Draws as one chain, with the observed data and how they were made as attributes."""
        draws = {name: v.unsqueeze(0) for name, v in self.get_samples(num_samples, seed).items()}
        attrs = {
            "inference": "laplace",
            "curvature": self._settings.curvature,
            "structure": self._settings.structure,
            "log_evidence": self.log_evidence.item(),
        }
        observed = getattr(self._potential.density, "observed", {})
        return to_arviz(draws, observed_data=observed or None, attrs=attrs)

    def summary(self) -> str:
        """One line on how it went."""
        ends = self.start_log_probs
        agreeing = int((ends >= ends.max() - 1e-3 * max(1.0, abs(ends.max().item()))).sum())
        return (
            f"log p(mode, data) {self.log_prob.item():.5g}, log evidence {self.log_evidence.item():.5g}, "
            f"{self.newton_distance:.1g} standard deviations from the mode, where {agreeing} of {len(ends)} starts "
            "ended"
        )

    def _draw(self, num_samples: int, seed: int) -> tuple[Tensor, Tensor]:
        """Unconstrained draws ``(num_samples, dim)`` and the standard normals that they are made of."""
        if isinstance(num_samples, bool) or not isinstance(num_samples, int):
            raise TypeError(f"num_samples must be an integer, got {num_samples!r}")
        if num_samples < 1:
            raise ValueError(f"num_samples must be at least 1, got {num_samples}")
        z = self.position
        draw = generator(seed, "laplace", device=z.device)
        noise = torch.randn(num_samples, len(self.index), generator=draw, dtype=z.dtype, device=z.device)
        if self._root.dim() == 1:
            moved = noise / self._root
        else:
            moved = torch.linalg.solve_triangular(self._root.T, noise.T, upper=True).T
        return z.expand(num_samples, -1).index_add(1, self.index, moved), noise


def _solve(root: Tensor, x: Tensor) -> Tensor:
    if root.dim() == 1:
        return x / root.square()
    return torch.cholesky_solve(x.unsqueeze(-1), root).squeeze(-1)


def _factor(matrix: Tensor, sites: list[Site], kind: str) -> Tensor:
    """L with ``H = L L^T``, or the root of a diagonal H; refuses what is not positive definite to rounding.

    Each coordinate is measured in its own unit, ``H_ii^-1/2``, so that scales which differ count as no flatness: the
    pivots of the scaled matrix are the shares of a coordinate's precision that those before it leave.
    """
    eps = torch.finfo(matrix.dtype).eps
    if not torch.isfinite(matrix).all():
        raise CurvatureError(f"the {kind} at the mode is not finite in {_names(sites, ~torch.isfinite(matrix))}")
    diagonal = matrix if matrix.dim() == 1 else matrix.diagonal()
    largest = diagonal.abs().max()
    bad = diagonal <= 0
    if bool(bad.any()):
        shape = "flat" if diagonal[bad].abs().max() <= 100 * eps * largest else "negative"
        raise CurvatureError(
            f"the {kind} at the mode is not positive definite: {shape} along {_names(sites, bad)}. {_ADVICE}"
        )
    if matrix.dim() == 1:
        return diagonal.sqrt()
    unit = diagonal.rsqrt()
    scaled = matrix * unit * unit.unsqueeze(-1)
    limit = 10 * math.sqrt(len(matrix)) * eps  # what rounding makes of a pivot of zero
    root, info = torch.linalg.cholesky_ex(scaled)
    if info == 0 and root.diagonal().min().square() > limit:
        return root / unit.unsqueeze(-1)
    values, vectors = torch.linalg.eigh(scaled)
    wrong = values <= limit
    wrong[0] = True
    shown = [
        f"{'flat' if abs(values[i]) <= 10 * limit else 'negative'} along {_names(sites, vectors[:, i].abs() > 0.3)}"
        for i in wrong.nonzero().flatten().tolist()[:3]
    ]
    more = f" and {int(wrong.sum()) - 3} more directions" if int(wrong.sum()) > 3 else ""
    raise CurvatureError(f"the {kind} at the mode is not positive definite: {'; '.join(shown)}{more}. {_ADVICE}")


_ADVICE = (
    "The point is a saddle or the posterior has a direction that neither prior nor data settle: look at these sites, "
    "give them a proper prior, other initial_params, curvature='ggn', or leave them out of subset"
)


def _names(sites: list[Site], marked: Tensor) -> str:
    """The sites that hold marked rows, with at most four entries of each."""
    rows = marked if marked.dim() == 1 else marked.any(1)
    found, start = [], 0
    for site in sites:
        entries = rows[start : start + site.stop - site.start].nonzero().flatten().tolist()
        start += site.stop - site.start
        if entries:
            places = ", ".join(str(e) for e in entries[:4]) + ", ..." * (len(entries) > 4)
            found.append(f"{site.name!r}" + (f"[{places}]" if site.stop - site.start > 1 else ""))
    return ", ".join(found) or f"a mixture of {', '.join(repr(s.name) for s in sites)}"
