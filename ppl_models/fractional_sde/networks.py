"""Drifts and diffusions, by name or the user's own, each a function of time and state."""

import itertools
import math
from collections.abc import Sequence
from numbers import Real
from typing import Any

import torch
from torch import Tensor, nn

from ppl_models.base import check_count
from sde import StepNetwork

__all__ = [
    "DiagonalNeuralDiffusion",
    "LinearDrift",
    "NeuralDrift",
    "build_diffusion",
    "build_drift",
    "check_sizes",
    "jacobian",
]

_DRIFTS = ("neural", "linear", "constant", "none")
_DIFFUSIONS = ("constant", "neural")


class LinearDrift(nn.Module):
    """b = constant - theta x, each dimension on its own; theta in 1 / time, constant in units of x / time.

    Learned as the drift at the data's centre and its slope, in units of the data's own, so that an optimiser's steps
    mean the same whatever x and time are counted in and from.

    Args:
        state_size: D.
        reverts: learn theta; without it theta is 0.
        moves: learn the constant; without it the constant is 0.
    """

    rate: Tensor
    speed: Tensor
    centre: Tensor

    def __init__(self, state_size: int, reverts: bool = True, moves: bool = True) -> None:
        super().__init__()
        self.reverts, self.moves = reverts, moves
        self.raw_theta = nn.Parameter(torch.zeros(state_size)) if reverts else None
        self.raw_constant = nn.Parameter(torch.zeros(state_size)) if moves else None
        self.register_buffer("rate", torch.ones(()))
        self.register_buffer("speed", torch.ones(state_size))
        self.register_buffer("centre", torch.zeros(state_size))

    @property
    def theta(self) -> Tensor | None:
        """``(D,)``."""
        return None if self.raw_theta is None else self.raw_theta * self.rate

    @property
    def constant(self) -> Tensor | None:
        """``(D,)``."""
        if self.raw_constant is None:
            return None
        at_centre, theta = self.raw_constant * self.speed, self.theta
        return at_centre if theta is None else at_centre + theta * self.centre

    @torch.no_grad()
    def set_units(self, times: Tensor, jump: Tensor, centre: Tensor) -> None:
        """From the data's times, what x moves by in a unit of time, and its mean, ``(D,)`` both: the rate is the
        geometric mean of 1 / span and 1 / gap, the speed what the noise moves x by in 1 / rate, times the rate.
        """
        span = float(times[-1])
        self.centre.copy_(centre)
        self.rate.fill_(len(times) ** 0.5 / span)
        self.speed.copy_(jump * self.rate.sqrt())

    @torch.no_grad()
    def set(self, theta: Tensor | float | None = None, constant: Tensor | float | None = None) -> None:
        """Put values in, where there are such parameters."""
        if theta is not None and self.raw_theta is not None:
            self.raw_theta.copy_(theta / self.rate)
        if constant is not None and self.raw_constant is not None:
            at_centre = constant if self.theta is None else constant - self.theta * self.centre
            self.raw_constant.copy_(at_centre / self.speed)

    def forward(self, time: Tensor, x: Tensor) -> Tensor:
        """``(B, D)``."""
        theta = self.theta
        out = torch.zeros_like(x) if self.raw_constant is None else (self.raw_constant * self.speed).expand_as(x)
        return out if theta is None else out - theta * (x - self.centre)


class NeuralDrift(nn.Module):
    """A network of the state, in the data's units: b = (scale / time unit) net((x - centre) / scale).

    Args:
        state_size: D.
        hidden: widths.
    """

    centre: Tensor
    scale: Tensor
    rate: Tensor

    def __init__(self, state_size: int, hidden: Sequence[int]) -> None:
        super().__init__()
        self.net = StepNetwork([state_size, *hidden, state_size])
        self.register_buffer("centre", torch.zeros(state_size))
        self.register_buffer("scale", torch.ones(state_size))
        self.register_buffer("rate", torch.ones(()))

    def forward(self, time: Tensor, x: Tensor) -> Tensor:
        """``(B, D)``."""
        out: Tensor = self.net((x - self.centre) / self.scale) * (self.scale * self.rate)
        return out


class ConstantDiffusion(nn.Module):
    """s, positive, one a dimension, given; or learned: s is then a system's ``scale``, which goes by H and a tick."""

    additive = True

    def __init__(self, state_size: int, value: float | None = None) -> None:
        super().__init__()
        self.learned = value is None
        log_scale = torch.full((state_size,), 0.0 if value is None else math.log(value))
        if value is None:
            self.log_scale = nn.Parameter(log_scale)
        else:
            self.register_buffer("log_scale", log_scale)

    @property
    def scale(self) -> Tensor:
        """``(D,)``."""
        return self.log_scale.exp()

    def forward(self, time: Tensor, x: Tensor) -> Tensor:
        """``(B, D)``."""
        return self.scale.expand_as(x)


class DiagonalNeuralDiffusion(nn.Module):
    """s_d(x_d) = scale_d softplus(net_d(x_d)): a network a dimension, all in one batched product.

    Each sees its own dimension only, as a diagonal Stratonovich noise needs it.
    """

    additive = False
    centre: Tensor
    scale: Tensor
    unit: Tensor

    def __init__(self, state_size: int, hidden: Sequence[int]) -> None:
        super().__init__()
        sizes = [1, *hidden, 1]
        pairs = list(itertools.pairwise(sizes))
        self.weights = nn.ParameterList(
            [nn.Parameter(torch.randn(state_size, m, n) / math.sqrt(m) * (i < len(pairs) - 1))
             for i, (m, n) in enumerate(pairs)]
        )  # fmt: skip
        self.biases = nn.ParameterList([nn.Parameter(torch.zeros(state_size, 1, n)) for _, n in pairs])
        self.register_buffer("centre", torch.zeros(state_size))
        self.register_buffer("scale", torch.ones(state_size))
        self.register_buffer("unit", torch.ones(state_size))

    def forward(self, time: Tensor, x: Tensor) -> Tensor:
        """``(B, D)``; starts at the constant ``unit``."""
        h = ((x - self.centre) / self.scale).T.unsqueeze(-1)  # (D, B, 1)
        for i, (weight, bias) in enumerate(zip(self.weights, self.biases, strict=True)):
            h = torch.baddbmm(bias, h if i == 0 else torch.tanh(h), weight)
        # softplus, 1 where the network is 0
        return torch.nn.functional.softplus(h.squeeze(-1).T + math.log(math.e - 1)) * self.unit


@torch.enable_grad()
def jacobian(drift: nn.Module, points: Tensor) -> tuple[Tensor, Tensor]:
    """A drift at ``(M, D)`` points at time 0, ``(M, D)``, and its derivatives, ``(M, D, D)``."""
    x = points.clone().requires_grad_()
    b = drift(x.new_zeros(()), x)
    if not b.requires_grad:
        return b, b.new_zeros(*b.shape, b.shape[-1])
    rows = [torch.autograd.grad(part.sum(), x, retain_graph=True, allow_unused=True)[0] for part in b.unbind(-1)]
    return b.detach(), torch.stack([torch.zeros_like(x) if row is None else row for row in rows], -2)


def check_sizes(name: str, sizes: Any) -> list[int]:
    """``sizes`` as a list of positive integers."""
    if not isinstance(sizes, Sequence) or isinstance(sizes, str | bytes):
        raise TypeError(f"{name} must be a sequence of integers, such as (64, 64), got {sizes!r}")
    return [check_count(name, size) for size in sizes]


def build_drift(drift: Any, state_size: int, hidden: Sequence[int]) -> nn.Module:
    """A drift by name, or the user's module ``(time, x (B, D)) -> (B, D)``."""
    if isinstance(drift, nn.Module):
        return _probed("drift", drift, state_size)
    if drift == "neural":
        return NeuralDrift(state_size, hidden)
    if drift in _DRIFTS:
        return LinearDrift(state_size, reverts=drift == "linear", moves=drift != "none")
    raise ValueError(f"drift must be one of {', '.join(_DRIFTS)} or a torch module, got {drift!r}")


def build_diffusion(diffusion: Any, state_size: int, hidden: Sequence[int]) -> nn.Module:
    """A diffusion by name, a fixed positive number, or the user's module."""
    if isinstance(diffusion, nn.Module):
        return _probed("diffusion", diffusion, state_size)
    if isinstance(diffusion, Real) and not isinstance(diffusion, bool):
        if not 0 < float(diffusion) < math.inf:
            raise ValueError(f"diffusion must be positive and finite, got {diffusion}")
        return ConstantDiffusion(state_size, float(diffusion))
    if diffusion == "constant":
        return ConstantDiffusion(state_size)
    if diffusion == "neural":
        return DiagonalNeuralDiffusion(state_size, hidden)
    raise ValueError(
        f"diffusion must be one of {', '.join(_DIFFUSIONS)}, a positive number or a torch module, got {diffusion!r}"
    )


def _probed(name: str, module: nn.Module, state_size: int) -> nn.Module:
    """The module, after one call that shows it takes and gives ``(B, D)``."""
    like = next(module.parameters(), torch.zeros(()))
    x = torch.zeros(2, state_size, dtype=like.dtype, device=like.device)
    with torch.no_grad():
        try:
            out = module(x.new_zeros(()), x)
        except Exception as error:
            raise ValueError(f"{name} must be callable as {name}(time, x) with x (B, {state_size}): {error}") from error
    if not isinstance(out, Tensor) or out.shape != x.shape:
        got = tuple(out.shape) if isinstance(out, Tensor) else type(out).__name__
        raise ValueError(f"{name}(time, x) must return (B, {state_size}), got {got} for x {tuple(x.shape)}")
    return module
