"""What SGLD, SGHMC and scale-adapted SGHMC share: the step-size schedule, temperature, warm-up clipping and Gibbs
updates of scales.
"""

from abc import abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from pyro.infer.autoguide.initialization import init_to_uniform
from torch import Tensor

from inference.kernels.base import Info, Kernel, Noise, State, StepInputs, per_chain_norm, positive
from inference.kernels.gibbs import BoundScaleGibbs, ScaleGibbs
from inference.kernels.schedules import Schedule, as_schedule
from inference.potential import Potential

__all__ = ["StochasticGradientKernel"]


class StochasticGradientKernel(Kernel):
    """A kernel whose only contact with the model is a minibatch estimate of U and its gradient.

    Subclasses write ``move``: the update equations of one step given the gradient.

    Args:
        model: a Pyro model whose data plate may be subsampled.
        step_size: epsilon; a number, a ``Schedule``, or a function of the step after the warm-up.
        temperature: T; the sampled law is p(z)^(1/T).  The gradient is divided by T and the noise is left as it is.
        max_grad_norm: in the warm-up only, each chain's gradient of U is scaled down to this Euclidean norm.
            Clipping while sampling would bias the law.
        gibbs: exact updates of scale sites, every ``gibbs_every`` steps.
        gibbs_every: steps between Gibbs updates.
        potential_fn, transforms, max_plate_nesting, init_strategy: as in ``pyro.infer.HMC``.
    """

    stochastic: ClassVar[bool] = True
    _fields_per_dim: ClassVar[int] = 1

    def __init__(
        self,
        model: Callable[..., Any] | None = None,
        potential_fn: Callable[[dict[str, Tensor]], Tensor] | None = None,
        *,
        step_size: float | Schedule | Callable[[int], float],
        temperature: float = 1.0,
        max_grad_norm: float | None = None,
        gibbs: Sequence[ScaleGibbs] = (),
        gibbs_every: int = 20,
        transforms: dict[str, Any] | None = None,
        max_plate_nesting: int | None = None,
        init_strategy: Callable[[Any], Any] = init_to_uniform,
    ) -> None:
        self._set_target(model, potential_fn, transforms, max_plate_nesting, init_strategy)
        self.schedule = as_schedule(step_size)
        self.temperature = positive("temperature", temperature)
        self.max_grad_norm = None if max_grad_norm is None else positive("max_grad_norm", max_grad_norm)
        self.gibbs = tuple(gibbs)
        if not isinstance(gibbs_every, int) or isinstance(gibbs_every, bool) or gibbs_every < 1:
            raise ValueError(f"gibbs_every must be a positive integer, got {gibbs_every!r}")
        self.gibbs_every = gibbs_every
        self._bound: tuple[BoundScaleGibbs, ...] = ()

    @abstractmethod
    def move(self, state: State, gradient: Tensor, noise: Tensor, control: dict[str, Tensor]) -> tuple[State, Info]:
        """One update of all chains given the gradient of U / T, ``(chain, dim)``, and standard normals of the same
        shape.
        """

    def noise(self, potential: Potential) -> Noise:
        """One normal a coordinate, and a gamma for each variance that has a Gibbs update."""
        self._bound = tuple(g.bind(potential, self.temperature) for g in self.gibbs)
        gamma = torch.cat([b.concentration for b in self._bound]) if self._bound else None
        return Noise(normal=potential.dim, gamma=gamma)

    def step(self, state: State, inputs: StepInputs, potential: Potential) -> tuple[State, Info]:
        """Gradient, update, Gibbs.

        Recorded is ``gradient_energy``: U by the step's minibatch where its gradient was taken, before the update.
        """
        energy, gradient = potential.value_and_grad(state.position, inputs.batch)
        gradient = gradient / self.temperature
        if self.max_grad_norm is not None:
            shrink = (self.max_grad_norm / self.temperature / per_chain_norm(gradient).clamp(min=1e-30)).clamp(max=1.0)
            gradient = torch.where(inputs.control["warmup"] > 0, gradient * shrink, gradient)
        new, info = self.move(state, gradient, inputs.noise["normal"], inputs.control)
        info = {"gradient_energy": energy, **info}
        if self._bound:
            new = new._replace(position=self._apply_gibbs(state.position, new.position, inputs))
        return new, info

    def _apply_gibbs(self, old: Tensor, moved: Tensor, inputs: StepInputs) -> Tensor:
        """The weights as moved; each variance as it was, or drawn anew where the schedule says so."""
        due = inputs.control["gibbs"] > 0
        position, start = moved, 0
        for bound in self._bound:
            site = bound.variance
            size = site.stop - site.start
            drawn = bound.draw(moved, inputs.noise["gamma"][:, start : start + size])
            value = torch.where(due, drawn, old[:, site.start : site.stop])
            position = torch.cat([position[:, : site.start], value, position[:, site.stop :]], dim=1)
            start += size
        return position

    def controls(self, start: int, stop: int, warmup_steps: int) -> dict[str, Sequence[float]]:
        """Step size, whether noise is injected, momentum restarts, warm-up and Gibbs flags."""
        rows = [
            self.schedule.warmup(t) if t < warmup_steps else self.schedule.sampling(t - warmup_steps)
            for t in range(start, stop)
        ]
        controls: dict[str, Sequence[float]] = {
            "step_size": [r.step_size for r in rows],
            "inject": [r.noise for r in rows],
            "restart": [r.restart for r in rows],
            "warmup": [float(t < warmup_steps) for t in range(start, stop)],
        }
        if self.gibbs:
            controls["gibbs"] = [float((t + 1) % self.gibbs_every == 0) for t in range(start, stop)]
        return controls

    def kept_steps(self, num_samples: int, thin: int) -> Sequence[int]:
        """As the schedule has it."""
        return self.schedule.kept_steps(num_samples, thin)
