"""Draws of a fitted energy: resampled noise, Markov chains by the shared kernels, annealing."""

from collections.abc import Callable
from typing import Any

import pyro
import torch
from torch import Tensor
from torch.distributions import AffineTransform, ComposeTransform, biject_to

from inference.kernels import HMC, NUTS, SGLD
from inference.mcmc import MCMC
from inference.objectives.unnormalised.noise import Noise, NoiseDistribution
from inference.potential import TemperedFunction
from inference.runtime.generators import derive_seed, scoped_seed
from inference.smc import SMC
from ppl_models.compositional_ebm.distribution import EnergyDistribution

__all__ = ["FlatNoise", "Unconstrained", "chains", "resample", "sample"]

_CANDIDATES = 20  # noise draws for each draw that is asked for
_MOST_CHAINS = 512
_SPREAD = 256  # draws that the spread of a law's numbers is taken from
_FAR = 80.0  # in unconstrained space, where a draw fell on the edge of the support
_METHODS = ("sir", "hmc", "nuts", "sgld", "annealed")


class FlatNoise(NoiseDistribution):
    """A noise in unconstrained space, as a distribution over vectors."""

    def __init__(self, noise: Noise, space: "Unconstrained") -> None:
        super().__init__(noise)
        self.space = space
        self._event_shape = torch.Size((space.dim,))

    def sample(self, sample_shape: Any = torch.Size()) -> Tensor:  # noqa: B008
        """Draws ``(*sample_shape, dim)``."""
        shape = torch.Size(sample_shape)
        with torch.no_grad():
            return self.space.flat(self.noise.draw(shape.numel())).reshape(shape + self.event_shape)

    def log_prob(self, value: Tensor) -> Tensor:
        """Log-density of vectors ``(*batch, dim)``, with the Jacobian."""
        return self.space.log_density(self.noise.log_prob, value.reshape(-1, self.space.dim)).reshape(value.shape[:-1])


class Unconstrained:
    """Vectors of real numbers in place of events on a support with edges, by the support's own bijection.

    Args:
        law: whose support it is.
        noise: what its chains start from.
    """

    def __init__(self, law: EnergyDistribution, noise: Noise) -> None:
        self.law, self.noise = law, noise
        self.transform = biject_to(law.support)
        self.shape = torch.Size(self.transform.inverse_shape(law.event_shape))
        self.dim = max(1, self.shape.numel())

    def events(self, y: Tensor) -> Tensor:
        """``(*batch, dim)`` to ``(*batch, *event)``."""
        found: Tensor = self.transform(y.reshape(*y.shape[:-1], *self.shape))
        return found

    def flat(self, x: Tensor) -> Tensor:
        """``(*batch, *event)`` to ``(*batch, dim)``.

        Raises:
            ValueError: some events lie outside the support.
        """
        support: Any = self.law.support
        if not bool(support.check(x).all()):
            raise ValueError("the noise draws events outside the model's support: annealing needs noise on the support")
        y = self.transform.inv(x).nan_to_num(posinf=_FAR, neginf=-_FAR)  # draws on the very edge
        return y.reshape(*x.shape[: x.dim() - len(self.law.event_shape)], self.dim)

    def log_density(self, log_prob: Callable[[Tensor], Tensor], y: Tensor) -> Tensor:
        """That of vectors ``(row, dim)`` where ``log_prob`` is the events'."""
        inner = y.reshape(-1, *self.shape)
        x = self.transform(inner)
        jacobian = self.transform.log_abs_det_jacobian(inner, x).reshape(len(y), -1).sum(1)
        return log_prob(x) + jacobian

    def path(self) -> TemperedFunction:
        """From the noise to the law."""
        return TemperedFunction(lambda y: self.log_density(self.law.log_prob, y), FlatNoise(self.noise, self))


def resample(law: EnergyDistribution, noise: Noise, num: int, seed: int) -> Tensor:
    """Sampling-importance-resampling from the noise: ``num`` of 20 times as many candidates, systematically."""
    count = max(_CANDIDATES * num, 4096)
    like = next(iter([*noise.buffers(), *noise.parameters()]), None)
    with torch.no_grad(), scoped_seed(derive_seed(seed, "sir"), None if like is None else like.device):
        z = noise.draw(count)
        weights = (law.log_prob(z) - noise.log_prob(z)).double().softmax(0)
        start = torch.rand((), device=z.device, dtype=torch.float64)
        place = (torch.arange(num, device=z.device, dtype=torch.float64) + start) / num
        index = torch.searchsorted(weights.cumsum(0).clamp(max=1.0), place).clamp(max=count - 1)
        return z[index][torch.randperm(num, device=z.device)]


def chains(
    law: EnergyDistribution,
    start: Tensor,
    method: str,
    num_samples: int,
    seed: int,
    *,
    warmup_steps: int = 100,
    thin: int = 5,
    step_size: float | None = None,
    spread: Tensor | None = None,
    progress: bool | Callable[[dict[str, Any]], None] = False,
) -> MCMC:
    """Markov chains from ``start`` ``(chain, *event)``, all in one program.

    ``spread`` is the unit of each unconstrained number, for a sampler that has one step size for all of them.
    """
    # what the engine looks at the model with, before it goes to the chains' own starts
    event = tuple(law.event_shape)
    started = EnergyDistribution(law.energy, event, law.base, law.log_z, law.support, lambda num: start[:num])

    def model() -> None:
        pyro.sample("x", started)

    if method == "hmc":
        kernel: Any = HMC(model, step_size=0.1 if step_size is None else step_size, num_steps=10)
    elif method == "nuts":
        kernel = NUTS(model, step_size=0.1 if step_size is None else step_size)
    else:
        kernel = SGLD(model, step_size=1e-2 if step_size is None else step_size)
    to_unconstrained: Any = biject_to(law.support).inv
    if spread is not None:
        to_unconstrained = ComposeTransform([to_unconstrained, AffineTransform(0.0, 1 / spread, len(event))])
    mcmc = MCMC(
        kernel,
        num_samples,
        warmup_steps,
        initial_params={"x": to_unconstrained(start)},
        num_chains=len(start),
        transforms={"x": to_unconstrained},
        thin=thin,
        seed=seed,
        progress=progress,
    )
    return mcmc.run()


def sample(law: EnergyDistribution, noise: Noise, num: int, method: str, seed: int, **options: Any) -> Tensor:
    """``num`` draws ``(num, *event)`` by one of the methods."""
    if method not in _METHODS:
        raise ValueError(f"method must be one of {_METHODS}, got {method!r}")
    if method == "sir":
        if options:
            raise TypeError(f"method='sir' takes no options, got {sorted(options)}")
        return resample(law, noise, num, seed)
    if law.support.is_discrete:
        raise ValueError(f"method={method!r} moves along gradients, and the data are discrete: use method='sir'")
    shape = torch.Size(noise.event_shape)
    if method == "annealed":
        space = Unconstrained(law, noise)
        smc = SMC(space.path(), num_particles=max(num, 256), seed=seed, progress=False, **options).run()
        return space.events(smc.get_samples()["x"][:num])
    number = min(num, _MOST_CHAINS)
    each = -(-num // number)
    start = resample(law, noise, max(number, _SPREAD) if method == "sgld" else number, seed)
    if method == "sgld":
        spread = biject_to(law.support).inv(start).clamp(-_FAR, _FAR).std(0)
        options["spread"] = torch.where(spread > 0, spread, torch.ones_like(spread))
    mcmc = chains(law, start[:number], method, each, seed, **options)
    draws = mcmc.get_samples(group_by_chain=True)["x"]
    return draws.transpose(0, 1).flatten(0, 1)[:num].reshape(num, *shape)
