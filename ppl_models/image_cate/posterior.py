"""The posterior of effects, scales and the weights of the gate's rules, with what the rules say of every image held:
by Laplace's method, a variational fit, NUTS or stochastic-gradient HMC of the shared engines.

Rules come from members that did not see the image.  Networks cost nothing then, so that the joint law, which mean-field
guides understate, takes seconds.
"""

import math
import warnings
from typing import Any, NamedTuple

import pyro
import torch
from pyro.distributions import HalfNormal, Normal
from pyro.infer.autoguide import AutoMultivariateNormal, init_to_value
from pyro.nn import PyroModule
from torch import Tensor, nn

from inference import ELBO, MCMC, NUTS, SGHMC, CurvatureError, Laplace, LaplaceResult, SamplerWarning, fit
from inference.runtime.generators import derive_seed, scoped_seed
from ppl_models.image_cate.data import Units
from ppl_models.image_cate.mixture import EffectMixture

__all__ = ["POSTERIORS", "HeadDesign", "HeadsModel", "log_odds", "mode_of_heads", "sample_heads"]

POSTERIORS = ("laplace", "svi", "nuts", "sghmc")
_WEIGHT_SCALE = 3.0  # prior scale of a rule's weight, for log odds of unit mean square
_BIAS_SCALE = 2.0  # prior standard deviation of the log odds that all images share
_WIDER = (2.0, 4.0)  # distances between types of units, where the search also starts, by that between types of images
_FIRST_WEIGHTS = (4.0, 0.5)  # of one rule and of the others, where the search for the mode starts: once for each


class HeadDesign(NamedTuple):
    """What the posterior is taken from, for S images and their units.

    Attributes:
        rules: log odds of the types by each rule, from members that did not see the image, ``(S, U or 1, K - 1, C)``;
            None with one type.
        baseline: predictors, from networks that did not see the image, ``(S, U or 1, L)``.
        deviation: of effect networks, ``(S, U or 1, K, L)``, or None.
        units: the units.
    """

    rules: Tensor | None
    baseline: Tensor
    deviation: Tensor | None
    units: Units

    def of(self, rows: Tensor) -> "HeadDesign":
        """Of some images."""
        rules, deviation = (None if x is None else x[rows] for x in (self.rules, self.deviation))
        return HeadDesign(rules, self.baseline[rows], deviation, Units(*(x[rows] for x in self.units)))


class HeadsModel(PyroModule):
    """The mixture with the weights of the gate's rules as latent sites: ``gate_weight`` ``(C,)``, not negative, and
    ``gate_bias`` ``(K - 1,)``.

    Args:
        mixture: the rest of the model, in double precision.
    """

    def __init__(self, mixture: EffectMixture) -> None:
        super().__init__()
        self.mixture = mixture

    def forward(self, design: HeadDesign) -> None:
        """Run the Pyro model, with the types summed out."""
        units, rules = design.units, design.rules
        weight = bias = None
        if rules is not None:
            zero = units.outcome.new_zeros(())
            weight = pyro.sample("gate_weight", HalfNormal(zero + _WEIGHT_SCALE).expand(rules.shape[-1:]).to_event(1))
            bias = pyro.sample("gate_bias", Normal(zero, _BIAS_SCALE).expand(rules.shape[-2:-1]).to_event(1))
        self.mixture(log_odds(design, weight, bias), design.baseline, design.deviation, units, summed=True)


def log_odds(design: HeadDesign, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    """Of the types against the first, ``(S, U or 1, K)``."""
    if design.rules is None or weight is None or bias is None:
        return design.units.outcome.new_zeros(len(design.units.mask), 1, 1)
    return nn.functional.pad(design.rules @ weight + bias, (1, 0))


def mode_of_heads(model: HeadsModel, design: HeadDesign, start: dict[str, Tensor], seed: int) -> dict[str, Tensor]:
    """The most probable values of the sites."""
    return _found(model, design, start, seed)[0].mode


def sample_heads(
    model: HeadsModel,
    design: HeadDesign,
    start: dict[str, Tensor],
    method: str,
    num_samples: int,
    seed: int,
    progress: Any = False,
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Draws ``(chain, draw, ...)`` of the sites, and the sampler's statistics; all methods go from the mode, which is
    searched from ``start``.

    Raises:
        ValueError: an unknown method.
    """
    if method not in POSTERIORS:
        raise ValueError(f"posterior must be one of {', '.join(POSTERIORS)}, got {method!r}")
    if method == "laplace":
        return {n: v.unsqueeze(0) for n, v in _laplace(model, design, start, num_samples, seed).items()}, {}
    start = {**start, **mode_of_heads(model, design, start, seed)}
    if method == "svi":
        return {n: v.unsqueeze(0) for n, v in _svi(model, design, start, num_samples, seed).items()}, {}
    chains = 2
    draws = -(-num_samples // chains)
    strategy = init_to_value(values=start)
    kernel: Any
    if method == "nuts":
        kernel, thin, warmup = NUTS(model, init_strategy=strategy, full_mass=True), 1, 300
    else:
        size = 0.3 / math.sqrt(int(design.units.mask.sum()))
        kernel, thin, warmup = SGHMC(model, step_size=size, friction=0.1, init_strategy=strategy), 10, 1000
    mcmc = MCMC(kernel, draws, warmup, num_chains=chains, thin=thin, seed=seed, progress=progress)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SamplerWarning)  # in the statistics that are returned
        mcmc.run(design)
    return mcmc.get_samples(group_by_chain=True), dict(mcmc.sample_stats)


def _found(
    model: HeadsModel, design: HeadDesign, start: dict[str, Tensor], seed: int
) -> tuple[LaplaceResult, dict[str, Tensor]]:
    """Laplace's approximation from a start for each of the gate's rules, and what was held.

    Units may be of other types than the image's likeliest: the marginal objective is also started with types of units
    that lie further apart than those of images, under a gate that is less sure.
    """
    # The scale of site effects is at its mode's edge at zero: held where it was learned, as empirical Bayes has it.
    held = {"site_scale": start["site_scale"]} if "site_scale" in start else {}
    conditioned = pyro.poutine.condition(model, held) if held else model
    count = len(start["gate_weight"]) if "gate_weight" in start else 1
    first = {n: v.expand(count, *v.shape) for n, v in start.items() if n not in held}
    if "gate_weight" in first:
        chosen = torch.eye(count, dtype=torch.bool, device=design.units.outcome.device)
        high, low = (design.units.outcome.new_tensor(v).log() for v in _FIRST_WEIGHTS)
        first["gate_weight"] = torch.where(chosen, high, low)
        if model.mixture.objective == "marginal":
            middle = start["mu"].mean(0)
            unsure = {**first, "gate_weight": first["gate_weight"] - math.log(_FIRST_WEIGHTS[0])}
            further = [(middle + by * (start["mu"] - middle)).expand_as(first["mu"]) for by in _WIDER]
            starts = [first, *({**unsure, "mu": mu} for mu in further)]
            first = {n: torch.cat([one[n] for one in starts]) for n in first}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SamplerWarning)
        try:
            found = Laplace(conditioned, initial_params=first, seed=seed).run(design)
        except CurvatureError:
            # A gate that is sure of every image leaves directions flat; those are then held.
            subset = [n for n in first if not n.startswith("gate")]
            found = Laplace(conditioned, initial_params=first, seed=seed, subset=subset).run(design)
    return found, held


def _laplace(
    model: HeadsModel, design: HeadDesign, start: dict[str, Tensor], num_samples: int, seed: int
) -> dict[str, Tensor]:
    found, held = _found(model, design, start, seed)
    return {**found.get_samples(num_samples, seed), **{n: v.expand(num_samples) for n, v in held.items()}}


def _svi(
    model: HeadsModel, design: HeadDesign, start: dict[str, Tensor], num_samples: int, seed: int
) -> dict[str, Tensor]:
    with scoped_seed(derive_seed(seed, "guide")):
        guide = AutoMultivariateNormal(model, init_loc_fn=init_to_value(values=start), init_scale=0.05)
        objective = _OnDesign(ELBO(model, guide, num_particles=4), design)
    fit(objective, num_steps=1000, lr=0.01, average_last=0.3, seed=seed, progress=False)
    with torch.no_grad(), scoped_seed(derive_seed(seed, "draws")):
        posterior = guide.get_posterior(design)
        flat = posterior.sample(torch.Size((num_samples,)))
        return {n: torch.stack(v) for n, v in _unpack(guide, flat).items()}


def _unpack(guide: AutoMultivariateNormal, flat: Tensor) -> dict[str, list[Tensor]]:
    found: dict[str, list[Tensor]] = {}
    for row in flat:
        for site, unconstrained in guide._unpack_latent(row):
            transform = torch.distributions.biject_to(site["fn"].support)
            found.setdefault(site["name"], []).append(transform(unconstrained))
    return found


class _OnDesign(nn.Module):
    def __init__(self, elbo: ELBO, design: HeadDesign) -> None:
        super().__init__()
        self.elbo, self._design = elbo, (design,)

    def forward(self) -> Tensor:
        loss: Tensor = self.elbo(self._design[0]) / self._design[0].units.mask.sum()
        return loss
