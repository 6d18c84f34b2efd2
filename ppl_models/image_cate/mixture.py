"""The mixture over effect types as one Pyro model, and the guides that make its objectives.

With gate logits and baseline of each unit given (Jerzak, Johansson and Daoud, Image-based Treatment Effect
Heterogeneity, CLeaR 2023, arXiv 2206.06417, Schema 1),

    mu_k ~ N(m, s^2),   rho_{t,k} ~ N,   Z_i ~ Categorical(pi_i),   Y_i ~ law(f0_i + T_i mu_{Z_i}, rho_{T_i, Z_i}),
    f0_i = b_i - e_i sum_k pi_ik mu_k;

the baseline ``b`` is the outcome without treatment where e is 0 (the paper's form), and the outcome at average
treatment where e is the propensity: then errors of b are orthogonal to those of mu (Nie and Wager, arXiv:1712.04912).
The spread of effects inside a type is part of the treated arm's noise, from which data cannot tell it apart.  The model
is one; the guide of Z decides on the objective, and Z is summed out exactly under each:

    guide Z ~ pi_i                      E_pi[log p(y | Z)]       image types ("gated", the paper's)
    guide Z ~ p(Z | y_i), or no guide   log sum_k pi_k p(y | k)  unit types ("marginal")
"""

from collections.abc import Callable
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.distributions import Categorical, HalfNormal, MultivariateNormal, Normal
from pyro.distributions import RelaxedOneHotCategorical as Relaxed
from pyro.infer.autoguide import AutoMultivariateNormal, AutoNormal, init_to_value
from pyro.nn import PyroModule
from torch import Tensor, nn

from ppl_models.image_cate.data import Units
from ppl_models.image_cate.likelihoods import Likelihood

__all__ = ["OBJECTIVES", "EffectMixture", "TypeGuide", "type_log_likelihood"]

OBJECTIVES = ("gated", "marginal", "relaxed")


class EffectMixture(PyroModule):
    """The mixture, a Pyro model of the units of some images.

    Sites: ``mu`` ``(K, L)``, ``rho`` ``(2, P, K)`` if the law has noise, ``intercept`` ``(K, L)`` and ``slope``
    ``(L,)`` of a cross-fitted baseline, ``site_scale`` and ``site`` with a site effect, ``z`` and ``y`` in the plates
    ``image`` (dim -2) and ``unit`` (dim -1); or, with ``summed``, one factor ``y`` of all images in place of both.

    Args:
        likelihood: law of the outcome.
        num_clusters: K.
        objective: one of ``OBJECTIVES``; decides what ``summed`` means.
        effect_loc: prior mean of the effects, ``(L,)``.
        effect_scale: their prior standard deviation, on the standardised scale.
        noise_loc: prior mean of the raw noise of each arm, ``(2, P)``.
        noise_spread: prior standard deviation of the raw noise around that, common to all types.
        noise_pooling: that of a type's around the common one.
        calibrated: whether the baseline is cross-fitted and gets a slope and, for each type, an intercept. With one
            intercept for all an arm of little noise would decide on the types' effects, through what they say of its
            own mean.
        num_sites: sites with a random effect in the baseline; 0 for none.
        num_images: images in all, S; a batch of B scales the likelihood by S / B.
        temperature: of the relaxed types.
    """

    def __init__(
        self,
        likelihood: Likelihood,
        num_clusters: int,
        objective: str,
        effect_loc: Tensor,
        noise_loc: Tensor,
        *,
        effect_scale: float = 1.0,
        noise_spread: float = 1.0,
        noise_pooling: float = 0.3,
        calibrated: bool = False,
        num_sites: int = 0,
        num_images: int = 1,
        temperature: float = 0.5,
    ) -> None:
        super().__init__()
        self.likelihood = likelihood
        self.num_clusters, self.objective, self.num_sites = num_clusters, objective, num_sites
        self.calibrated = calibrated
        self.num_images, self.effect_scale, self.temperature = num_images, effect_scale, temperature
        self.register_buffer("effect_loc", effect_loc)
        self.register_buffer("noise_loc", noise_loc)
        eye = torch.eye(num_clusters, dtype=effect_loc.dtype, device=effect_loc.device)
        self.register_buffer("noise_covariance", noise_spread**2 + noise_pooling**2 * eye)

    def globals(self) -> dict[str, Tensor]:
        """Draw the sites that all units share."""
        k, predictors = self.num_clusters, self.likelihood.num_predictors
        loc = self.effect_loc.expand(k, predictors)
        drawn = {"mu": pyro.sample("mu", Normal(loc, self.effect_scale).to_event(2))}
        if self.likelihood.num_noise:
            noise_loc = self.noise_loc.unsqueeze(-1).expand(*self.noise_loc.shape, k)
            drawn["rho"] = pyro.sample("rho", MultivariateNormal(noise_loc, self.noise_covariance).to_event(2))
        else:
            drawn["rho"] = loc.new_zeros(2, 0, k)
        if self.calibrated:
            drawn["intercept"] = pyro.sample("intercept", Normal(torch.zeros_like(loc), 1.0).to_event(2))
            drawn["slope"] = pyro.sample("slope", Normal(loc.new_ones(predictors), 1.0).to_event(1))
        if self.num_sites:
            scale = pyro.sample("site_scale", HalfNormal(loc.new_full((), 0.3)))
            raw = pyro.sample("site", Normal(loc.new_zeros(self.num_sites), 1.0).to_event(1))
            drawn["site"] = scale * raw
        return drawn

    def laws(
        self, drawn: dict[str, Tensor], logits: Tensor, baseline: Tensor, deviation: Tensor | None, units: Units
    ) -> tuple[Tensor, Tensor]:
        """For all types at once: predictors ``(B, U, K, L)`` and raw noise ``(B, U, K, P)``."""
        effect = drawn["mu"] if deviation is None else drawn["mu"] + deviation
        share = logits.softmax(-1).unsqueeze(-1)
        if self.calibrated:
            baseline = (share * drawn["intercept"]).sum(-2) + drawn["slope"] * baseline
        start = self.untreated(drawn, baseline, (share * effect).sum(-2), units)
        arm = units.treatment[..., None, None]
        noise = drawn["rho"].mT  # (2, K, P)
        return start.unsqueeze(-2) + arm * effect, (1 - arm) * noise[0] + arm * noise[1]

    def untreated(self, drawn: dict[str, Tensor], baseline: Tensor, average: Tensor, units: Units) -> Tensor:
        """Predictors f0 without treatment, ``(B, U, L)``, of the average effect ``(B, U or 1, L)``."""
        if self.num_sites:
            baseline = baseline + drawn["site"][units.site].unsqueeze(-1)
        return baseline - units.propensity.unsqueeze(-1) * average

    def forward(
        self, logits: Tensor, baseline: Tensor, deviation: Tensor | None, units: Units, summed: bool = False
    ) -> None:
        """Run the model.

        Args:
            logits: of the types, ``(B, U or 1, K)``.
            baseline: predictors without treatment, ``(B, U or 1, L)``.
            deviation: of effects inside a type, by effect networks, ``(B, U or 1, K, L)``; None for none.
            units: the units of the B images.
            summed: sum Z out here, as the objective has it, in one factor; for engines that take a density.
        """
        drawn = self.globals()
        eta, noise = self.laws(drawn, logits, baseline, deviation, units)
        if summed:
            each = type_log_likelihood(self.likelihood, eta, noise, units)
            log_pi = logits.log_softmax(-1)
            gated = self.objective != "marginal"
            total = (log_pi.exp() * each).sum(-1) if gated else (log_pi + each).logsumexp(-1)
            weighted = torch.where(units.mask, units.weight * total, torch.zeros_like(total))
            pyro.factor("y", weighted.sum())
            return
        with self.plates(units):
            z = self.draw_types(logits, units, guide=False)
            chosen = z if self.objective == "relaxed" else nn.functional.one_hot(z, self.num_clusters).to(eta.dtype)
            law = self.likelihood.law((chosen.unsqueeze(-1) * eta).sum(-2), (chosen.unsqueeze(-1) * noise).sum(-2))
            pyro.sample("y", law, obs=units.outcome)

    def plates(self, units: Units) -> Any:
        """The plates of images and units, with masked padding and weighted likelihood."""
        shown = units.mask.shape[0]
        rows = torch.arange(shown, device=units.mask.device)
        stack = _Stack(
            pyro.plate("image", max(self.num_images, shown), subsample=rows, dim=-2),
            pyro.plate("unit", units.mask.shape[1], dim=-1),
            poutine.scale(scale=units.weight),
            poutine.mask(mask=units.mask),  # type: ignore[call-overload]
        )
        return stack

    def draw_types(self, logits: Tensor, units: Units, guide: bool) -> Tensor:
        """The site ``z``, inside of the plates."""
        wide = logits.expand(*units.mask.shape, self.num_clusters)
        if self.objective == "relaxed":
            z: Tensor = pyro.sample("z", Relaxed(wide.new_full((), self.temperature), logits=wide))
            return z
        # Only a guide says how z is summed out; in the model the engine decides.
        infer: Any = {"enumerate": "parallel"} if guide else {}
        z = pyro.sample("z", Categorical(logits=wide), infer=infer)
        return z


class TypeGuide(PyroModule):
    """A guide of the mixture: a joint normal over effects and noise scales, and Z as the objective has it.

    Args:
        mixture: the model.
        values: starting values of its sites.
        scale: starting standard deviation.
    """

    def __init__(self, mixture: EffectMixture, values: dict[str, Tensor], scale: float = 0.05) -> None:
        super().__init__()
        self._mixture = (mixture,)  # not a submodule: its parts are the model's
        start: Callable[..., Any] = init_to_value(values=values)
        joint: list[str] = [name for name in ("mu", "rho", "intercept", "slope", "site_scale") if name in values]
        self.joint = AutoMultivariateNormal(poutine.block(mixture, expose=joint), start, init_scale=scale)
        self.site = (
            AutoNormal(poutine.block(mixture, expose=["site"]), init_loc_fn=start, init_scale=scale)
            if mixture.num_sites
            else None
        )

    def forward(self, logits: Tensor, baseline: Tensor, deviation: Tensor | None, units: Units) -> None:
        """Draw all latent sites."""
        mixture = self._mixture[0]
        drawn = dict(self.joint(logits, baseline, deviation, units))
        if self.site is not None:
            drawn["site"] = drawn["site_scale"] * self.site(logits, baseline, deviation, units)["site"]
        drawn.setdefault("rho", logits.new_zeros(2, 0, mixture.num_clusters))
        if mixture.objective == "marginal":
            # The responsibilities, at which the bound on z is the exact marginal likelihood; it is flat there, so their
            # own gradient adds nothing.
            with torch.no_grad():
                eta, noise = mixture.laws(drawn, logits, baseline, deviation, units)
                logits = logits.log_softmax(-1) + type_log_likelihood(mixture.likelihood, eta, noise, units)
        with mixture.plates(units):
            mixture.draw_types(logits, units, guide=True)


def type_log_likelihood(likelihood: Likelihood, eta: Tensor, noise: Tensor, units: Units) -> Tensor:
    """log p(y | type) of every unit and type, ``(B, U, K)``."""
    found: Tensor = likelihood.law(eta, noise).log_prob(units.outcome.unsqueeze(-1))
    return found


class _Stack:
    """Context managers, entered in order."""

    def __init__(self, *managers: Any) -> None:
        self.managers = managers

    def __enter__(self) -> None:
        for manager in self.managers:
            manager.__enter__()

    def __exit__(self, *details: Any) -> None:
        for manager in reversed(self.managers):
            manager.__exit__(*details)
