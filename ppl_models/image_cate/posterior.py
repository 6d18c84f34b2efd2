"""The posterior of effects, scales and last layers, with the networks' features held: by Laplace's method, a
variational fit, NUTS or stochastic-gradient HMC of the shared engines.

Features cost nothing then, so that the joint law, which mean-field guides understate, takes seconds.
"""

import math
import warnings
from typing import Any, NamedTuple

import pyro
import torch
from pyro.distributions import Normal
from pyro.infer.autoguide import AutoMultivariateNormal, init_to_value
from pyro.nn import PyroModule
from torch import Tensor, nn

from inference import ELBO, MCMC, NUTS, SGHMC, CurvatureError, Laplace, SamplerWarning, fit
from inference.runtime.generators import derive_seed, scoped_seed
from ppl_models.image_cate.data import Units
from ppl_models.image_cate.mixture import EffectMixture

__all__ = ["POSTERIORS", "HeadDesign", "HeadsModel", "sample_heads"]

POSTERIORS = ("laplace", "svi", "nuts", "sghmc")
_GATE_SCALE = 6.0  # prior standard deviation of the gate's logits, over standardised features
_BASELINE_SCALE = 1.0  # of all weights of the baseline together, in standard deviations of the outcome


class HeadDesign(NamedTuple):
    """What the last layers see, for the S images and their units.

    Attributes:
        gate: standardised features, columns and a one, ``(S, U or 1, F)``; None where the gate is held.
        logits: of the types, where the gate is held, ``(S, U or 1, K)``.
        baseline: design of the baseline's last layer ``(S, U or 1, F0)``; None where it is cross-fitted.
        deviation: of effect networks, ``(S, U or 1, K, L)``, or None.
        units: the units.
    """

    gate: Tensor | None
    logits: Tensor | None
    baseline: Tensor | None
    deviation: Tensor | None
    units: Units


class HeadsModel(PyroModule):
    """The mixture with last layers as latent sites ``gate`` ``(K - 1, F)`` and ``baseline`` ``(L, F0)``.

    Args:
        mixture: the rest of the model, in double precision.
    """

    def __init__(self, mixture: EffectMixture) -> None:
        super().__init__()
        self.mixture = mixture

    def forward(self, design: HeadDesign) -> None:
        """Run the Pyro model, with the types summed out."""
        units, k = design.units, self.mixture.num_clusters
        if design.gate is not None:
            shape = (k - 1, design.gate.shape[-1])
            scale = _GATE_SCALE / math.sqrt(shape[1])
            weight = pyro.sample("gate", Normal(units.outcome.new_zeros(shape), scale).to_event(2))
            logits = nn.functional.pad(design.gate @ weight.mT, (1, 0))
        else:
            assert design.logits is not None
            logits = design.logits
        baseline = units.offset
        if design.baseline is not None:
            shape = (self.mixture.likelihood.num_predictors, design.baseline.shape[-1])
            scale = _BASELINE_SCALE / math.sqrt(shape[1])
            spread = units.outcome.new_full((shape[1],), scale)
            spread = torch.cat([spread[:-1], torch.ones_like(spread[:1])])
            weight = pyro.sample("baseline", Normal(units.outcome.new_zeros(shape), spread).to_event(2))
            baseline = design.baseline @ weight.mT
        self.mixture(logits, baseline, design.deviation, units, summed=True)


def sample_heads(
    model: HeadsModel,
    design: HeadDesign,
    start: dict[str, Tensor],
    method: str,
    num_samples: int,
    seed: int,
    progress: Any = False,
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Draws ``(chain, draw, ...)`` of the sites, from ``start``, and the sampler's statistics.

    Raises:
        ValueError: an unknown method.
    """
    if method not in POSTERIORS:
        raise ValueError(f"posterior must be one of {', '.join(POSTERIORS)}, got {method!r}")
    if method == "laplace":
        return {n: v.unsqueeze(0) for n, v in _laplace(model, design, start, num_samples, seed).items()}, {}
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


def _laplace(
    model: HeadsModel, design: HeadDesign, start: dict[str, Tensor], num_samples: int, seed: int
) -> dict[str, Tensor]:
    # The scale of site effects is at its mode's edge at zero: held where it was learned, as empirical Bayes has it.
    held = {"site_scale": start["site_scale"]} if "site_scale" in start else {}
    conditioned = pyro.poutine.condition(model, held) if held else model
    first = {n: v.unsqueeze(0) for n, v in start.items() if n not in held}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SamplerWarning)
        try:
            found = Laplace(conditioned, initial_params=first, seed=seed).run(design)
        except CurvatureError:
            # A gate that is sure of every image leaves directions flat; those are then held.
            subset = [n for n in first if n != "gate"]
            found = Laplace(conditioned, initial_params=first, seed=seed, subset=subset).run(design)
    draws = found.get_samples(num_samples, seed)
    return {**draws, **{n: v.expand(num_samples) for n, v in held.items()}}


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
