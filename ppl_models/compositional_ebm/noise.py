"""Which noise a model starts from, and what users may give for it."""

import math
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import pyro
import torch
from pyro import poutine
from torch import Tensor
from torch.distributions import Distribution, constraints

from inference._errors import SamplerWarning
from inference.objectives.unnormalised.bounded import BoxNoise, HalfLineNoise
from inference.objectives.unnormalised.heavy_tails import StudentTNoise, heavy_tailed
from inference.objectives.unnormalised.mixture import MixtureNoise
from inference.objectives.unnormalised.noise import (
    BernoulliNoise,
    DefensiveMixture,
    DistributionNoise,
    FlowNoise,
    GaussianNoise,
    KernelNoise,
    NegativeBinomialNoise,
    Noise,
    PoissonNoise,
    noise_from_config,
)
from inference.objectives.unnormalised.quasi_random import QuasiRandomNoise
from inference.runtime.generators import scoped_seed

__all__ = [
    "BernoulliNoise",
    "BoxNoise",
    "CallableNoise",
    "DefensiveMixture",
    "DistributionNoise",
    "FlowNoise",
    "GaussianNoise",
    "HalfLineNoise",
    "KernelNoise",
    "MixtureNoise",
    "NegativeBinomialNoise",
    "Noise",
    "PoissonNoise",
    "QuasiRandomNoise",
    "StudentTNoise",
    "as_noise",
    "auto_noise",
    "covering_mixture",
    "given_noise",
    "noise_for_file",
    "noise_for_load",
    "noise_of_file",
    "refuse_outside",
    "without_noise",
]

_FEW = 3  # dimensions that one inflated normal still covers well
_OVERDISPERSED = 1.3  # variance of counts over their mean, above which Poisson noise does not cover them
_LARGE = 10.0  # mean count, above which Poisson noise of 1.3 times it lies a standard deviation and more too high
_INFLATION = 1.3
_COMPONENTS = 60  # at most, of the automatic mixture
_PRIOR_ROWS = 0.125  # rows a dimension that each component's prior, the data's own variance, is worth
_FINE = 30.0  # standard deviation, in steps of the lattice, from which whole numbers are as good as real ones
_ATOM, _TIES = 0.1, 10  # share of the rows, and rows, at one value, from which data have no density


class CallableNoise(Noise):
    """A user's Pyro callable that draws one row at the site ``"x"``."""

    def __init__(self, guide: Callable[[], Any]) -> None:
        with scoped_seed(0), torch.no_grad(), poutine.block():
            nodes: Any = poutine.trace(guide).get_trace().nodes
        site = nodes.get("x")
        if site is None or site["type"] != "sample":
            raise ValueError('noise must draw the site "x": pyro.sample("x", ...)')
        if site["fn"].batch_shape:
            raise ValueError(
                f"noise must draw one row at a time, without a plate; its site has batch shape "
                f"{tuple(site['fn'].batch_shape)}"
            )
        drawn = {n: s for n, s in nodes.items() if s["type"] == "sample" and not s["infer"].get("_deterministic")}
        others = sorted(drawn.keys() - {"x"})
        if others:
            raise ValueError(
                f"noise must draw the site 'x' alone, it has {others} too: the density of x would be that given what "
                "they drew. Sum them out: a mixture is MixtureSameFamily"
            )
        super().__init__(site["fn"].event_shape)
        self.guide = guide
        self._law = site["fn"].support

    @property
    def support(self) -> Any:
        """That of the site."""
        return self._law

    def draw(self, num: int) -> Tensor:
        """As in ``Noise``."""
        with torch.no_grad(), poutine.block(), poutine.trace() as recorder, pyro.plate("rows", num):
            self.guide()
        node: Any = recorder.trace.nodes["x"]
        value: Tensor = node["value"]
        return value

    def log_prob(self, x: Tensor) -> Tensor:
        """As in ``Noise``."""
        with poutine.block(), poutine.trace() as recorder, pyro.plate("rows", len(x)), poutine.condition(data={"x": x}):
            self.guide()
        total = torch.zeros(len(x), dtype=x.dtype, device=x.device)
        node: Any = recorder.trace.nodes["x"]
        return total + node["fn"].log_prob(x)

    def config(self) -> dict[str, Any]:
        """Refused: a file cannot hold code."""
        raise ValueError("this noise is a function of yours, which a file cannot hold: give it to load(noise=...)")


def is_discrete(support: Any) -> bool:
    """Whether a constraint is on whole numbers."""
    return bool(support.is_discrete)


def whole_numbers(x: Tensor) -> bool:
    """Whether data are whole numbers: integers by type, or by value throughout."""
    return not x.is_floating_point() or bool((x == x.round()).all())


def steps_of_spread(x: Tensor) -> Tensor:
    """Standard deviation of each coordinate in units of the smallest gap between its values, ``(dim,)`` in float64.

    Data ``(row, *event)``; a constant coordinate has none and counts as 0.
    """
    flat = x.reshape(len(x), -1).double()
    gaps = flat.sort(0).values.diff(dim=0)
    least = torch.where(gaps > 0, gaps, math.inf).amin(0) if len(gaps) else torch.full_like(flat[0], math.inf)
    return flat.std(0, correction=0) / least


def counts_or_labels(x: Tensor) -> bool:
    """Whether data must be modelled on the whole numbers: whole throughout, in some coordinate on a coarse lattice.

    A law that is smooth over 30 steps of its lattice has the same probabilities as a density times the step, to a
    part in a thousand: prices, incomes and sums of pixels are continuous data, whole as they are, and discrete noise
    would serve them badly (independent coordinates, and logarithms of factorials that single precision cannot hold).
    """
    return whole_numbers(x) and bool((steps_of_spread(x) < _FINE).any())


def auto_noise(x: Tensor, support: Any = None, seed: int = 0) -> Noise:
    """Noise for data ``(row, *event)``: that which covers them and little else.

    Zeros and ones get Bernoulli noise, counts Poisson, or negative binomial where one varies more than that or is
    large; a box or half-line, as ``support`` says, uniform or exponential noise; real data of up to three dimensions a
    normal of 1.3 times their standard deviations, or a t law where they have heavy tails, and more dimensions a mixture
    of normals with a tenth of a wide normal.  Whole numbers on a large scale are real data (see ``counts_or_labels``);
    ``support=constraints.nonnegative_integer`` makes counts of them.

    Warns:
        SamplerWarning: some coordinates are whole numbers on a large scale and others on a small one, which independent
            counts serve badly.
    """
    inner = support.base_constraint if isinstance(support, constraints.independent) else support
    if (inner is None and counts_or_labels(x)) or (inner is not None and is_discrete(inner)):
        fine = steps_of_spread(x) >= _FINE
        if inner is None and bool(fine.any()):
            warnings.warn(
                f"coordinates {_few(fine)} are whole numbers on a large scale and {_few(~fine)} on a small one: taken "
                "as independent counts, which covers the former badly. Add noise of a unit's width to the latter, so "
                "that all are real data, or give noise=",
                SamplerWarning,
                stacklevel=3,
            )
        if bool(((x == 0) | (x == 1)).all()):
            return BernoulliNoise.fit(x)
        if bool((x < 0).any()):
            raise ValueError("data of whole numbers below zero have no automatic noise: give noise=")
        counts = x.double()
        mean = counts.mean(0)
        spread = bool(((counts.var(0, correction=0) > _OVERDISPERSED * mean) | (mean > _LARGE)).any())
        return NegativeBinomialNoise.fit(x) if spread else PoissonNoise.fit(x)
    x = x if x.is_floating_point() else x.to(torch.get_default_dtype())
    low, high = getattr(inner, "lower_bound", None), getattr(inner, "upper_bound", None)
    if low is not None and high is not None:
        shape = x.shape[1:]
        edges = [torch.as_tensor(e, dtype=x.dtype, device=x.device).expand(shape) for e in (low, high)]
        return BoxNoise(edges[0], edges[1])
    if low is not None:
        return HalfLineNoise.fit(x, float(low))
    if high is not None or inner not in (None, constraints.real):
        raise ValueError(f"there is no automatic noise for the support {support}: give noise=")
    _refuse_one_row(x)
    if x[0].numel() <= _FEW:
        return StudentTNoise.fit(x, _INFLATION) if heavy_tailed(x) else GaussianNoise.fit(x, _INFLATION)
    dim = x[0].numel()
    components = max(1, min(_COMPONENTS, len(x) // (10 * dim)))
    ridge = _PRIOR_ROWS * dim * components / len(x)
    return covering_mixture(x, components, inflation=1.1, ridge=ridge, seed=seed)


def _refuse_one_row(x: Tensor) -> None:
    if len(x) < 2:
        raise ValueError("one row has no spread that automatic noise could have: give noise=, or more rows")


def covering_mixture(
    x: Tensor, components: int, *, inflation: float = 1.0, wide: float = _INFLATION, ridge: float, seed: int
) -> DefensiveMixture:
    """A mixture of normals fitted to ``x``, with a tenth of one normal of ``wide`` times the standard deviations."""
    _refuse_one_row(x)
    narrow = MixtureNoise.fit(x, components, inflation=inflation, ridge=ridge, seed=seed)
    return DefensiveMixture(narrow, GaussianNoise.fit(x, wide), 0.1)


def given_noise(noise: Any, event_shape: tuple[int, ...]) -> Noise:
    """A distribution, a Pyro callable or a noise model as a noise model.

    Raises:
        TypeError, ValueError: it is none of them, or of another event shape.
    """
    if isinstance(noise, Noise):
        found = noise
    elif isinstance(noise, Distribution):
        found = DistributionNoise(noise)
    elif callable(noise):
        found = CallableNoise(noise)
    else:
        raise TypeError(f"noise must be 'auto', a distribution or a Pyro callable, got {type(noise).__name__}")
    if tuple(found.event_shape) != event_shape:
        raise ValueError(f"the noise has event shape {tuple(found.event_shape)}, the data have {event_shape}")
    return found


def as_noise(noise: Any, x: Tensor, support: Any = None, seed: int = 0) -> Noise:
    """What a user gave for the noise, as a noise model on the data's device, checked against the data.

    Raises:
        TypeError, ValueError: it is none, of another event shape, discrete where the data are continuous or the other
            way round, or it cannot draw some of the data.
    """
    if noise is None:
        raise ValueError("an unnormalised model needs noise: give noise='auto', a distribution or a Pyro callable")
    if isinstance(noise, str) and noise != "auto":
        raise ValueError(f"noise must be 'auto', a distribution or a Pyro callable, got {noise!r}")
    found = auto_noise(x, support, seed) if isinstance(noise, str) else given_noise(noise, tuple(x.shape[1:]))
    discrete = is_discrete(found.support)
    if not discrete and counts_or_labels(x):
        raise ValueError(
            "the data are whole numbers and the noise is continuous: a density has no maximum there. Give discrete "
            "noise (PoissonNoise, NegativeBinomialNoise, BernoulliNoise, noise='auto'), or add noise of a unit's width "
            "to the data"
        )
    if discrete and not whole_numbers(x):
        raise ValueError("the data are continuous and the noise is discrete: give continuous noise")
    if not discrete:
        _warn_of_atoms(x)
    found.to(device=x.device, dtype=x.dtype if x.is_floating_point() else None)
    refuse_outside(found, x, "data")
    return found


def _warn_of_atoms(x: Tensor) -> None:
    """Warn where one value is so frequent that the data have no density there."""
    flat = x.reshape(len(x), -1)
    value = flat.mode(0).values
    share = (flat == value).double().mean(0)
    atoms = (share > _ATOM) & (share * len(x) >= _TIES)
    if bool(atoms.any()):
        first = int(atoms.nonzero()[0])
        warnings.warn(
            f"coordinates {_few(atoms)} take one value in more than {_ATOM:.0%} of the rows (coordinate {first}: "
            f"{float(value[first]):g} in {float(share[first]):.0%}), and a density has no maximum at such an atom: "
            "model the atom apart, or add noise of the width to which the data are known",
            SamplerWarning,
            stacklevel=4,
        )


def _few(chosen: Tensor) -> list[int]:
    found: list[int] = chosen.nonzero().flatten()[:5].tolist()
    return found


def refuse_outside(noise: Noise, x: Tensor, name: str) -> None:
    """Refuse rows that the noise cannot draw: there the model would get no weight."""
    with torch.no_grad():
        values = torch.cat([noise.log_prob(part) for part in x.split(4096)])
    outside = ~torch.isfinite(values)
    if bool(outside.any()):
        raise ValueError(
            f"{int(outside.sum())} of {len(x)} rows of {name} lie outside the noise's support (the first is row "
            f"{int(outside.nonzero()[0])}): the noise must be able to draw whatever the data may be"
        )


def noise_for_file(noise: Noise) -> tuple[dict[str, Tensor], Any]:
    """Tensors and description of a noise for a model's file; ``"object"`` describes what a file cannot hold."""
    try:
        return dict(noise.state_dict()), {"kind": type(noise).__name__, "config": noise.config()}
    except ValueError:
        return {}, "object"


def noise_of_file(description: Any, tensors: Mapping[str, Tensor]) -> Noise | None:
    """The noise that ``noise_for_file`` described; None where it could not."""
    if not isinstance(description, dict):
        return None
    return noise_from_config(description["kind"], description["config"], tensors)


def noise_for_load(noise: Any, event_shape: tuple[int, ...], like: Tensor, path: Any) -> Noise:
    """What a user gave ``load`` for noise that the file at ``path`` does not hold.

    Raises:
        TypeError, ValueError: it is None, or none that could be noise.
    """
    if noise is None:
        raise ValueError(f"{path} was fitted with noise that a file cannot hold: give load(path, noise=...)")
    return given_noise(noise, event_shape).to(device=like.device, dtype=like.dtype)


def without_noise(state: dict[str, Any], prefix: str) -> dict[str, Any]:
    """A model's ``state_dict`` without its noise and tilt, which have a place of their own in its file."""
    for name in [n for n in state if n.startswith((f"{prefix}noise.", f"{prefix}tilt."))]:
        del state[name]
    return state
