"""Simulation-based calibration of the models with a proper prior, each through its default engine, in one batched run.

    python -m benchmarks.calibration [--out out] [--replications 500]

Prints, for each quantity, the p-value of a chi-square test of uniform ranks and the coverage of central intervals, and
draws the ranks' distribution functions.
"""

import argparse
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pyro
import torch
from pyro import poutine
from pyro.distributions import Categorical, MixtureSameFamily
from pyro.infer.autoguide.initialization import init_to_sample
from torch import Tensor

from inference import NUTS, AdaptiveSGHMC
from inference.calibration import Calibration, simulation_based_calibration
from inference.kernels.base import Kernel
from ppl_models import FunctionalPriorBNN
from ppl_models.image_cate.data import Units
from ppl_models.image_cate.likelihoods import make_likelihood
from ppl_models.image_cate.mixture import EffectMixture
from ppl_models.image_cate.posterior import HeadDesign, HeadsModel, log_odds

_LEVELS = (0.5, 0.8, 0.9)


def functional_prior_bnn(num_replications: int = 500, seed: int = 0) -> Calibration:
    """A small network on twelve points, by scale-adapted SGHMC; quantities are its function values, since weights have
    no order that the data could tell.
    """
    bnn = FunctionalPriorBNN(1, hidden=(6,), noise_variance=0.1)
    bnn.double()
    x, at = (torch.linspace(-1.5, 1.5, n, dtype=torch.float64).unsqueeze(-1) for n in (12, 4))

    def function(draw: dict[str, Tensor], data: dict[str, Tensor]) -> Tensor:
        with poutine.block():
            weights = poutine.condition(bnn.prior, data=draw)()
        return bnn.network(weights, at)[..., 0]

    kernel: Callable[..., Kernel] = partial(
        AdaptiveSGHMC, step_size=0.03, friction=0.05, noise_correction=False, init_strategy=init_to_sample
    )
    return simulation_based_calibration(
        bnn, kernel, (x,), observed=["obs"], num_replications=num_replications, num_samples=39, warmup_steps=2000,
        thin=500, quantities={"f(x)": function}, seed=seed,
    )  # fmt: skip


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


def image_cate(num_replications: int = 500, seed: int = 0) -> Calibration:
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


MODELS: dict[str, Callable[..., Calibration]] = {
    "functional_prior_bnn": functional_prior_bnn,
    "image_cate": image_cate,
}


def coverage(found: Calibration, level: float) -> dict[str, float]:
    """Share of replications whose truth lies in the central interval of that many draws, the mean over a quantity's
    scalars.
    """
    half = (1 - level) / 2 * (found.num_draws + 1)
    inside = {name: (r >= half - 0.5) & (r <= found.num_draws - half + 0.5) for name, r in found.ranks.items()}
    return {name: float(hit.double().mean()) for name, hit in inside.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("out"))
    parser.add_argument("--replications", type=int, default=500)
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=MODELS)
    given = parser.parse_args()
    torch.set_num_threads(1)
    given.out.mkdir(parents=True, exist_ok=True)
    for name in given.models:
        begin = time.process_time()
        found = MODELS[name](given.replications)
        print(f"{name}: {time.process_time() - begin:.0f} s of processor time, p-value of all {found.p_value():.3f}")
        values, shares = found.chi_square(), {level: coverage(found, level) for level in _LEVELS}
        for quantity, p in values.items():
            lag = float(found.autocorrelation[quantity].max())
            shown = ", ".join(f"{level:.0%} covers {shares[level][quantity]:.3f}" for level in _LEVELS)
            print(f"  {quantity:16} smallest p {float(p.min()):.3f}   lag-1 {lag:+.2f}   {shown}")
        figure = found.plot([n for n in ("f(x)", "effect(m)", "mu", "log_likelihood") if n in values] or None)
        figure.savefig(given.out / f"calibration_{name}.png", dpi=130)


if __name__ == "__main__":
    main()
