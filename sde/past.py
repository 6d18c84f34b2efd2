"""The past of Mandelbrot-Van Ness motion on the exponentials of a Markov approximation.

Mandelbrot-Van Ness motion is Riemann-Liouville motion plus an independent Gaussian process made by the noise before
time 0,

    G_t = 1 / Gamma(a) int_0^inf [(t + s)^(a-1) - s^(a-1)] dW_s,   a = H + 1/2,

smooth for t > 0.  Its projection in L2([0, T]) on the functions e^(-g_k t) - 1, Ghat_t = sum_k (e^(-g_k t) - 1) Z_k,
has Gaussian coefficients Z = F w with w standard normal, and F F' is the best covariance for them in the least-squares
sense; an Ornstein-Uhlenbeck state started at Z adds Ghat to the approximation at no cost.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from sde.linear import lower_factor

__all__ = ["PastProjection"]

_TIME_NODES = 48
_GRADING = 4  # G starts like t^H: nodes t = u^4 make it smooth enough for Gauss-Legendre
_REACH, _SPACING = 6.5, 0.1  # trapezoid in y of s = exp(2 sinh y): all but 1e-10 of the past for H in [0.02, 0.98]
_RANK_TOLERANCE = 1e-10


def _past_kernel(hurst: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """The kernel of G over (H - 1/2) at the nodes of the past, times the root of their weights: ``(*H, n, q)``.

    The factor H - 1/2 is apart, so that H = 1/2, where there is no past, is a smooth point.
    """
    count = round(2 * _REACH / _SPACING) + 1
    y = torch.linspace(-_REACH, _REACH, count, dtype=t.dtype, device=t.device)
    x = 2 * torch.sinh(y)  # log s
    u = torch.log1p(t.unsqueeze(-1) * torch.exp(-x))
    delta = (hurst - 0.5)[..., None, None]
    small = delta.abs() < 1e-5
    safe = torch.where(small, 1.0, delta)
    e = delta * u
    power = torch.where(small, u * (1 + e / 2 * (1 + e / 3)), torch.expm1(safe * u) / safe)
    root = torch.exp(hurst[..., None, None] * x + 0.5 * torch.log(2 * torch.cosh(y) * _SPACING))
    return power * root / torch.exp(torch.lgamma(hurst + 0.5))[..., None, None], delta


@dataclass(frozen=True)
class PastProjection:
    """The projection for horizon 1, set up once for all H; it depends on speeds times horizon."""

    nodes: Tensor  # times in (0, 1), (n,)
    root: Tensor  # roots of their weights, (n,)
    left: Tensor  # orthonormal basis of the weighted exponentials, (n, r)
    inverse: Tensor  # from that basis to the coefficients, (K, r)

    @classmethod
    def build(cls, speeds: Tensor, horizon: float) -> "PastProjection":
        u, weight = (torch.from_numpy(part) for part in np.polynomial.legendre.leggauss(_TIME_NODES))
        u, weight = (u + 1) / 2, weight / 2
        nodes, root = u**_GRADING, (weight * _GRADING * u ** (_GRADING - 1)).sqrt()
        basis = torch.expm1(-nodes.unsqueeze(-1) * (speeds * horizon)) * root.unsqueeze(-1)
        left, values, right = torch.linalg.svd(basis, full_matrices=False)
        kept = values > _RANK_TOLERANCE * values[0]
        return cls(nodes, root, left[:, kept], right[kept].mT / values[kept])

    def to(self, device: torch.device) -> "PastProjection":
        return PastProjection(*(part.to(device) for part in (self.nodes, self.root, self.left, self.inverse)))

    def factor(self, hurst: Tensor) -> Tensor:
        """A lower factor of the coefficients' covariance, ``(*H, K, K)``, gamma normalisation, differentiable."""
        kernel, delta = _past_kernel(hurst, self.nodes)
        return lower_factor(delta * (self.inverse @ (self.left.mT @ (self.root.unsqueeze(-1) * kernel))))

    def error(self, hurst: Tensor) -> Tensor:
        """int_0^1 E (G - Ghat)^2 dt, of H's shape."""
        kernel, delta = _past_kernel(hurst, self.nodes)
        weighted = self.root.unsqueeze(-1) * kernel
        rest = weighted - self.left @ (self.left.mT @ weighted)
        return (delta[..., 0, 0] ** 2) * rest.square().sum((-2, -1))


def past_covariance(hurst: Tensor, times: Tensor) -> Tensor:
    """Covariance of G over positive times, ``(*H, T, T)``, gamma normalisation."""
    longest = times[-1]
    kernel, delta = _past_kernel(hurst, times / longest)
    scaled = delta * kernel * longest ** hurst[..., None, None]
    return scaled @ scaled.mT
