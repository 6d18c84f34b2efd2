"""Effects of image types under the marginal objective, through NUTS."""

from collections.abc import Callable
from functools import partial

import pyro
import torch
from pyro.distributions import Categorical, MixtureSameFamily
from pyro.infer.autoguide.initialization import init_to_sample
from torch import Tensor

from inference import NUTS
from inference.calibration import Calibration, simulation_based_calibration
from inference.kernels.base import Kernel
from ppl_models.image_cate.data import Units
from ppl_models.image_cate.likelihoods import make_likelihood
from ppl_models.image_cate.mixture import EffectMixture
from ppl_models.image_cate.posterior import HeadDesign, HeadsModel, log_odds

__all__ = ["DrawnTypes", "calibrate", "two_types"]


class DrawnTypes(EffectMixture):
    """The marginal mixture as a law that outcomes are drawn from, where a fit has a factor of the same density."""

    def forward(
        self, logits: Tensor, baseline: Tensor, deviation: Tensor | None, units: Units, summed: bool = False
    ) -> None:
        drawn = self.globals()
        eta, noise = self.laws(drawn, logits, baseline, deviation, units)
        types = Categorical(logits=logits.expand(eta.shape[:-1]))
        pyro.sample("y", MixtureSameFamily(types, self.likelihood.law(eta, noise)).to_event(2))


def two_types(mixture: type[EffectMixture], num_images: int = 60) -> tuple[HeadsModel, HeadDesign]:
    """Effects, scales and the weights of two rules for two types of units, two units an image.

    Noise is told narrowly, so that types differ: where data cannot tell them apart, chains do not exchange their names.
    """
    g = torch.Generator().manual_seed(0)
    draws = torch.randn(num_images, 4, generator=g, dtype=torch.float64)
    one = torch.ones(num_images, 2, dtype=torch.float64)
    units = Units(
        treatment=torch.randint(2, (num_images, 2), generator=g).double(),
        outcome=torch.randn(num_images, 2, generator=g, dtype=torch.float64),
        weight=one,
        mask=one.bool(),
        modifiers=one.new_zeros(num_images, 2, 0),
        controls=one.new_zeros(num_images, 2, 0),
        site=torch.zeros(num_images, 2, dtype=torch.long),
        propensity=0.5 * one,
        offset=draws[:, 2:3].unsqueeze(1).expand(-1, 2, -1),
    )
    zero = torch.zeros(1, dtype=torch.float64)
    effects = mixture(
        make_likelihood("normal"), 2, "marginal", zero, zero.expand(2, 1), noise_spread=0.3, calibrated=True
    )
    return HeadsModel(effects.double()), HeadDesign(draws[:, None, None, :2], units.offset, None, units)


def calibrate(num_replications: int = 500, seed: int = 0) -> Calibration:
    """The posterior of effects, noise and the gate's weights by NUTS, on sixty images of two units.

    By the marginal objective: the gated one is a bound on the likelihood, and no law that data could come from.
    """
    model, design = two_types(DrawnTypes)

    def effect(draw: dict[str, Tensor], data: dict[str, Tensor]) -> Tensor:
        probs = log_odds(design, draw["gate_weight"], draw["gate_bias"]).softmax(-1)
        return (probs[:3, 0] @ draw["mu"])[:, 0]

    kernel: Callable[..., Kernel] = partial(
        NUTS, full_mass=True, target_accept_prob=0.9, max_tree_depth=6, init_strategy=init_to_sample
    )
    return simulation_based_calibration(
        model, kernel, (design,), observed=["y"], num_replications=num_replications, num_samples=39,
        warmup_steps=300, thin=4, quantities={"effect(m)": effect}, seed=seed,
    )  # fmt: skip
