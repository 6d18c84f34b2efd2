"""Controls and guides in closed form for linear SDEs, alone or below a learned residual.

For dX = (c - theta X) dt + s dB with Gaussian observations the posterior control is u* = G'(nu - Lambda z), with the
backward information (Lambda, nu) and G = (s sum w, beta): the linear optimum.  Two variants are exact on a grid: the
best control that is frozen over each step (a discrete Riccati recursion, whose value is the floor that no mean shift
can beat on that grid), and the Gaussian law of each step's normals, which also shrinks them and has no gap at all.

Daems et al., *Efficient Training of Neural SDEs Using Stochastic Optimal Control*, 2025, arXiv 2505.17150 (linear part
plus learned residual).
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

from sde.kalman import Information, backward_information, each_std
from sde.linear import LinearSDE, Transitions
from sde.solvers import Step

__all__ = [
    "GaussianStepGuide",
    "LinearControl",
    "LinearPlusResidual",
    "frozen_control",
    "information_control",
    "step_guide",
]


class LinearControl(NamedTuple):
    """u = offset_n - gain_n . (x, v), a control for ``solve``.

    Attributes:
        gain: ``(N, B or 1, D or 1, S)``.
        offset: ``(N, B or 1, D)``.
    """

    gain: Tensor
    offset: Tensor

    def __call__(self, step: Step, x: Tensor, v: Tensor) -> Tensor:
        """``(B, D)``."""
        gain = self.gain[step.number].to(x)
        return self.offset[step.number].to(x) - gain[..., 0] * x - (gain[..., 1:] * v).sum(-1)


class LinearPlusResidual(nn.Module):
    """A control that starts at the linear optimum and learns what the model adds to it.

    Args:
        linear: the linear part.
        residual: a module with the signature of a control; initialise its last layer at zero.
    """

    def __init__(self, linear: LinearControl, residual: nn.Module) -> None:
        super().__init__()
        self.linear, self.residual = linear, residual

    def forward(self, step: Step, x: Tensor, v: Tensor) -> Tensor:
        """``(B, D)``."""
        out: Tensor = self.linear(step, x, v) + self.residual(step, x, v)
        return out


def information_control(
    model: LinearSDE,
    transitions: Transitions,
    index: Tensor,
    observations: Tensor,
    noise_std: float | Tensor,
    mask: Tensor | None = None,
) -> LinearControl:
    """The continuous-time posterior control u* = G'(nu - Lambda z), evaluated at the start of each step.

    With one observation o at T, x0 and theta = 0 it is u* = g(tau) (o - m) / (v + sig^2), m the forecast of X(T), g the
    response of X(T) to dW at lag tau and v = int_0^tau g^2.

    Args:
        model: the linear SDE.
        transitions: exact ones of the grid, ``model.transitions(grid.times)``.
        index: positions of the observations in the grid, ``(M,)``.
        observations: ``(M, B, D)``.
        noise_std: positive, a number, ``(D,)`` or ``(M, B or 1, D or 1)``.
        mask: True where an observation counts, ``(M, B or 1, D or 1)``.
    """
    info = backward_information(transitions, index, observations, noise_std, mask)
    scale = torch.as_tensor(model.scale, dtype=torch.float64, device=info.factor.device).unsqueeze(-1)
    weights = model.noise.weights
    own = (scale * weights).sum(-1, keepdim=True)
    lead = torch.broadcast_shapes(own.shape[:-1], model.noise.gains.shape[:-1])
    g = torch.cat([own.expand(*lead, 1), model.noise.gains.expand(*lead, -1)], -1)
    factor, vector = info.factor[:-1], info.vector[:-1]
    gain = (factor @ (factor.mT @ g.unsqueeze(-1))).squeeze(-1)
    return LinearControl(gain, (vector * g).sum(-1))


def frozen_control(
    transitions: Transitions,
    start: tuple[Tensor, Tensor],
    index: Tensor,
    observations: Tensor,
    noise_std: float | Tensor,
    mask: Tensor | None = None,
) -> tuple[LinearControl, Tensor]:
    """The best control that is frozen over each step, and the evidence bound that it reaches.

    The cost 1/2 sum h u^2 - log-likelihood is quadratic and the noise additive, so dynamic programming gives
    u_n = (h + Gamma' P Gamma)^-1 Gamma' (p - P (F z + o)), P and p those of the next time with its observation.

    Args:
        transitions: of the grid; ``model.euler_transitions(grid)`` for the chain that ``solve`` runs.
        start: mean and factor of the state at time 0, ``model.start()``.
        index, observations, noise_std, mask: as for ``information_control``; an observation at position 0 counts as
            well.

    Returns:
        The control, and the bound per series and dimension, ``(B, D)``: no mean shift on this grid has a higher one
        (its gap to the log evidence is of the order of the step).
    """
    parts = tuple(part.unsqueeze(1) if part.ndim < 2 + k else part
                  for part, k in zip(transitions[1:], (2, 1, 1, 2), strict=True))  # fmt: skip
    # Taken apart once: the gradient of one step's part by an index is a tensor of all steps.
    f, o, r, g = (part.unbind() for part in parts)
    like = f[0]
    size = like.shape[-1]
    std = each_std(noise_std, observations, like)
    here = torch.ones_like(observations[:, :1, :1]) if mask is None else mask.to(like.dtype)
    observations = observations.to(like.dtype)
    observed = {int(n): i for i, n in enumerate(index.tolist())}
    lead = torch.broadcast_shapes(here.shape[1:], std.shape[1:], parts[0].shape[1:2])
    lead = (lead[-2] if len(lead) > 1 else 1, lead[-1])
    big, small = like.new_zeros(*lead, size, size), like.new_zeros(*observations.shape[1:], size)
    rest = torch.zeros_like(observations[0])
    first = torch.zeros(size, dtype=like.dtype, device=like.device)
    first[0] = 1
    gains, offsets = [], []
    for n in range(len(f), -1, -1):
        i = observed.get(n)
        if i is not None:
            precision = here[i] / std[i] ** 2
            big = big + precision.expand(lead)[..., None, None] * torch.outer(first, first)
            small = small + (precision * observations[i]).unsqueeze(-1) * first
            rest = rest + 0.5 * precision * observations[i] ** 2 + 0.5 * here[i] * torch.log(2 * math.pi * std[i] ** 2)
        if n == 0:
            break
        m = n - 1
        rest = rest + 0.5 * ((big @ g[m]) * g[m]).sum((-2, -1))
        pushed = (big @ r[m].unsqueeze(-1)).squeeze(-1)  # P Gamma
        weight = 1 / (transitions.steps[m] + (pushed * r[m]).sum(-1))
        shifted = small - (big @ o[m].unsqueeze(-1)).squeeze(-1)  # p - P o
        reach = (shifted * r[m]).sum(-1)
        gains.append(weight.unsqueeze(-1) * (f[m].mT @ pushed.unsqueeze(-1)).squeeze(-1))
        offsets.append(weight * reach)
        rest = rest - (small * o[m]).sum(-1) + 0.5 * ((big @ o[m].unsqueeze(-1)).squeeze(-1) * o[m]).sum(-1)
        rest = rest - 0.5 * weight * reach**2
        small = (f[m].mT @ (shifted - (weight * reach).unsqueeze(-1) * pushed).unsqueeze(-1)).squeeze(-1)
        big = big - weight[..., None, None] * pushed.unsqueeze(-1) * pushed.unsqueeze(-2)
        big = f[m].mT @ big @ f[m]
    mean, factor = start
    quadratic = ((big @ mean.unsqueeze(-1)).squeeze(-1) * mean).sum(-1) + ((big @ factor) * factor).sum((-2, -1))
    bound = -(0.5 * quadratic - (small * mean).sum(-1) + rest)
    return LinearControl(torch.stack(gains[::-1]), torch.stack(offsets[::-1])), bound


class GaussianStepGuide(NamedTuple):
    """The law of each step's normals given state and later observations, eps ~ N(a_n - A_n z, C_n C_n').

    Attributes:
        gain: A, ``(N, B or 1, D or 1, M, S)``.
        offset: a, ``(N, B, D, M)``.
        tril: C, ``(N, B or 1, D or 1, M, M)``.
    """

    gain: Tensor
    offset: Tensor
    tril: Tensor

    def __call__(self, step: Step, x: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Mean ``(B, D, M)`` and factor ``(B or 1, D or 1, M, M)``."""
        n = step.number
        z = torch.cat([x.unsqueeze(-1), v], -1).unsqueeze(-1)
        return self.offset[n].to(x) - (self.gain[n].to(x) @ z).squeeze(-1), self.tril[n].to(x)


def step_guide(
    transitions: Transitions,
    index: Tensor,
    observations: Tensor,
    noise_std: float | Tensor,
    mask: Tensor | None = None,
    *,
    information: Information | None = None,
) -> GaussianStepGuide:
    """The exact posterior of a linear chain as a guide: its ELBO is the chain's log evidence for any number of steps.

    log p(eps) + log beta(F z + o + G eps) has precision I + G' Lambda G and mean (I + G' Lambda G)^-1 G' (nu - Lambda
    (F z + o)), beta that of the next time with its observation.  An observation at position 0 conditions the start,
    not a step: it is left to q(x0).

    Args:
        transitions: of the chain that is solved, ``model.euler_transitions(grid)``.
        index, observations, noise_std, mask: as for ``information_control``.
        information: what ``backward_information`` made of the same arguments, where it is at hand.
    """
    info = information or backward_information(transitions, index, observations, noise_std, mask)
    f, o, _, g = (part.unsqueeze(1) if part.ndim < 2 + k else part
                  for part, k in zip(transitions[1:], (2, 1, 1, 2), strict=True))  # fmt: skip
    std = each_std(noise_std, observations, f)
    here = torch.ones_like(observations[:, :1, :1]) if mask is None else mask.to(f.dtype)
    root, vector = info.factor[1:], info.vector[1:]
    big = root @ root.mT
    first = torch.zeros(f.shape[-1], dtype=f.dtype, device=f.device)
    first[0] = 1
    extra = torch.zeros_like(big)
    added = torch.zeros_like(vector)
    for i, n in enumerate(index.tolist()):
        if n > 0:
            extra[n - 1] = (here[i] / std[i] ** 2).expand(big.shape[1:3])[..., None, None] * torch.outer(first, first)
            added[n - 1] = (here[i] * observations[i].to(f.dtype) / std[i] ** 2).unsqueeze(-1) * first
    big, vector = big + extra, vector + added
    g = g.unsqueeze(1)
    precision = torch.eye(g.shape[-1], dtype=f.dtype, device=f.device) + g.mT @ big @ g
    upper = torch.linalg.cholesky(precision)
    reach = torch.cholesky_solve(g.mT.expand(*upper.shape[:-1], -1), upper)  # (I + G' Lambda G)^-1 G'
    drift = vector - (big @ o.unsqueeze(1).unsqueeze(-1)).squeeze(-1)
    offset = (reach @ drift.unsqueeze(-1)).squeeze(-1)
    # C C' = precision^-1 with C lower triangular
    inverse = torch.cholesky_inverse(upper)
    return GaussianStepGuide(reach @ big @ f.unsqueeze(1), offset, torch.linalg.cholesky(inverse))
