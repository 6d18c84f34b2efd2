"""The augmented SDE for torchsde's solvers: one adapter, for its adaptive and adjoint schemes and for comparisons.

The state (X, V, 1/2 int u^2) of every dimension is one flat vector with the drift and diffusion that torchsde asks
for.  All processes of a dimension share a Brownian motion, which makes the noise ``general`` (``scalar`` for one
dimension): torchsde has Euler for the Ito form and midpoint, Heun, Euler-Heun and reversible Heun for the Stratonovich
form of such noise. X. Li, T.-K. L. Wong, R. T. Q. Chen, D. Duvenaud, *Scalable Gradients for Stochastic Differential
Equations*, 2020, arXiv 2001.01328.
"""

import torch
import torchsde
from torch import Tensor, nn

from sde._checks import Times, as_number, as_times, base_seed, stream
from sde.noise import MarkovNoise
from sde.solvers import Control, Field, Path, Step, _initial

__all__ = ["AugmentedSDE", "solve_torchsde"]

_METHODS = ("euler", "midpoint", "heun", "euler_heun", "reversible_heun")


class AugmentedSDE(nn.Module):
    """(X, V, 1/2 int u^2) as torchsde wants it.

    Args:
        drift: b, a module where an adjoint is to see its parameters.
        diffusion: s, a function or a tensor that broadcasts to ``(B, D)``.
        noise: B, with constant loadings.
        dim: D.
        control: u, called with a step of number -1 and size 0: torchsde evaluates it anywhere.
        sde_type: ``"stratonovich"``, or ``"ito"`` for additive noise.
    """

    def __init__(
        self,
        drift: Field,
        diffusion: Field | Tensor,
        noise: MarkovNoise,
        dim: int,
        control: Control | None = None,
        sde_type: str = "stratonovich",
    ) -> None:
        super().__init__()
        self.drift, self.diffusion, self.control = drift, diffusion, control
        self.dim, self.count = dim, noise.num_processes
        self.sde_type = sde_type
        self.noise_type = "scalar" if dim == 1 else "general"
        self.speeds, self.loadings, self.gains = noise.speeds, noise.loadings, noise.gains

    def join(self, x: Tensor, y: Tensor, kl: Tensor) -> Tensor:
        """``(B, D)``, ``(B, D, K)``, ``(B, D)`` -> ``(B, D (K + 2))``."""
        return torch.cat([x, y.flatten(1), kl], -1)

    def split(self, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The inverse of ``join``; leading dimensions are kept."""
        x, y, kl = z.split([self.dim, self.dim * self.count, self.dim], -1)
        return x, y.unflatten(-1, (self.dim, self.count)), kl

    def _diffusion(self, t: Tensor, x: Tensor) -> Tensor:
        return (self.diffusion(t, x) if callable(self.diffusion) else self.diffusion).expand_as(x)

    def f(self, t: Tensor, z: Tensor) -> Tensor:
        """Drift, ``(B, D (K + 2))``."""
        x, y, _ = self.split(z)
        dy = -self.speeds.to(x) * y
        kl = torch.zeros_like(x)
        if self.control is not None:
            u = self.control(Step(-1, t, torch.zeros_like(t)), x, y)
            dy = dy + self.gains.to(x) * u.unsqueeze(-1)
            kl = 0.5 * u.square()
        dx = self.drift(t, x) + self._diffusion(t, x) * (self.loadings.to(x) * dy).sum(-1)
        return self.join(dx, dy, kl)

    def g_prod(self, t: Tensor, z: Tensor, v: Tensor) -> Tensor:
        """Diffusion times a Brownian increment ``(B, D)``, without the matrix."""
        x, y, kl = self.split(z)
        weight = (self.loadings * self.gains).sum(-1).to(x)
        dy = self.gains.to(x) * v.unsqueeze(-1)
        return self.join(self._diffusion(t, x) * weight * v, dy.expand_as(y), torch.zeros_like(kl))

    def g(self, t: Tensor, z: Tensor) -> Tensor:
        """Diffusion matrix, ``(B, D (K + 2), D)``."""
        unit = torch.eye(self.dim, dtype=z.dtype, device=z.device)
        return torch.stack([self.g_prod(t, z, unit[d].expand(len(z), -1)) for d in range(self.dim)], -1)


def solve_torchsde(
    drift: Field,
    diffusion: Field | Tensor | float,
    noise: MarkovNoise,
    times: Times,
    x0: Tensor,
    *,
    step_size: float,
    y0: Tensor | None = None,
    control: Control | None = None,
    method: str = "midpoint",
    adaptive: bool = False,
    adjoint: bool = False,
    seed: int | None = None,
    generator: torch.Generator | None = None,
) -> Path:
    """Solve by torchsde; arguments that ``solve`` has as well mean the same.

    V is stepped like everything else here, so ``step_size`` times the fastest speed must stay below about 1.

    Args:
        times: of the kept states, starting at the time of ``x0``.
        step_size: torchsde's dt (the first step, where ``adaptive``).
        method: ``"euler"`` (Ito, additive noise), ``"midpoint"``, ``"heun"``, ``"euler_heun"`` or
            ``"reversible_heun"``.
        adaptive: let torchsde adapt the step, one for the whole batch.
        adjoint: constant memory by the stochastic adjoint; it differentiates the parameters of ``drift``,
            ``diffusion`` and ``control`` where those are modules, and no others.

    Returns:
        A path whose ``log_ratio`` is NaN: the Ito integral of u is not among torchsde's states.

    Raises:
        ValueError: unknown methods, a state-dependent diffusion with ``"euler"``, time-dependent loadings.
    """
    t = as_times(times, minimum=2, horizon=noise.horizon)
    dt = as_number(step_size, "step_size")
    if method not in _METHODS:
        raise ValueError(f"method must be one of {', '.join(_METHODS)}, got {method!r}")
    if method == "euler" and callable(diffusion):
        raise ValueError("method='euler' is Ito's: a state-dependent diffusion needs a Stratonovich method")
    if not noise.constant_loadings:
        raise ValueError("a noise whose loadings change with time needs solve()")
    if x0.ndim != 2:
        raise ValueError(f"x0 must be (B, D), got {tuple(x0.shape)}")
    if not callable(diffusion):
        diffusion = torch.as_tensor(diffusion, dtype=x0.dtype, device=x0.device)
    root = base_seed(seed, generator)
    batch, dim = x0.shape
    sde = AugmentedSDE(drift, diffusion, noise, dim, control, "ito" if method == "euler" else "stratonovich")
    start = sde.join(x0, _initial(noise, x0, y0, root), torch.zeros_like(x0))
    entropy = int(torch.randint(2**31 - 1, (), generator=stream(root, "torchsde")))
    clock = t.to(x0)
    brownian = torchsde.BrownianInterval(
        t0=clock[0], t1=clock[-1], size=(batch, dim), dtype=x0.dtype, device=x0.device, entropy=entropy, dt=dt
    )
    run = torchsde.sdeint_adjoint if adjoint else torchsde.sdeint
    devices = [] if x0.device.type == "cpu" else [x0.device]
    # torchsde compares g with g_prod on a vector from torch's global generator, which is put back.
    with torch.random.fork_rng(devices=devices, device_type=x0.device.type if devices else "cuda"):
        z = run(sde, start, clock, bm=brownian, method=method, dt=dt, adaptive=adaptive)
    x, y, kl = sde.split(z)
    return Path(t, x, y[-1], kl[-1], torch.full_like(kl[-1], float("nan")))
