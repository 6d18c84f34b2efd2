"""Planar normalising flows on the weights of one layer.

``w = f_T o ... o f_1(z)`` with ``f(z) = z + u^ tanh(c^T z + b)`` (Rezende and Mohamed, ICML 2015).  Each map is
invertible when ``c^T u^ >= -1``, which ``u^ = u + (m(c^T u) - c^T u) c / |c|^2``, ``m(t) = log(1 + e^t) - 1``,
guarantees.

Sampling, and posterior sampling in z, need the forward map alone.  The density of ``w`` is that of the flow run
backwards, ``log p(w) = log q(z) - sum log|1 + (1 - tanh^2) c^T u^|`` at ``z = f^{-1}(w)``; the reference code evaluates
it at ``f(w)``, which is another law.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["PlanarFlow"]

_BISECTIONS = 60  # halves the bracket below rounding in float64 whatever its width


class PlanarFlow(nn.Module):
    """Composition of planar maps on R^d.

    Args:
        dim: d.
        num_maps: T.
        generator: source of the initial ``u, c, b ~ U(-1/sqrt(d), 1/sqrt(d))``.
    """

    def __init__(self, dim: int, num_maps: int = 4, generator: torch.Generator | None = None) -> None:
        super().__init__()

        def uniform(*shape: int) -> nn.Parameter:
            return nn.Parameter((2 * torch.rand(shape, generator=generator) - 1) / dim**0.5, requires_grad=False)

        self.u, self.c, self.b = uniform(num_maps, dim), uniform(num_maps, dim), uniform(num_maps)

    def _maps(self) -> list[tuple[Tensor, Tensor, Tensor, Tensor]]:
        """Of each map u^, c, b and c^T u^."""
        inner = (self.c * self.u).sum(-1, keepdim=True)
        u = self.u + (F.softplus(inner) - 1 - inner) * self.c / self.c.square().sum(-1, keepdim=True)
        return [(u[t], self.c[t], self.b[t], (self.c[t] * u[t]).sum()) for t in range(self.u.shape[0])]

    def forward(self, z: Tensor) -> Tensor:
        """``w`` ``(..., d)`` from ``z`` ``(..., d)``."""
        for u, c, b, _ in self._maps():
            z = z + u * torch.tanh((z * c).sum(-1, keepdim=True) + b)
        return z

    def log_abs_det_jacobian(self, z: Tensor) -> Tensor:
        """``log |det dw/dz|`` ``(...)`` at ``z`` ``(..., d)``."""
        total = torch.zeros_like(z[..., 0])
        for u, c, b, cu in self._maps():
            a = torch.tanh((z * c).sum(-1, keepdim=True) + b)
            total = total + torch.log1p((1 - a[..., 0].square()) * cu)
            z = z + u * a
        return total

    def inverse(self, w: Tensor) -> Tensor:
        """``z`` ``(..., d)`` with ``forward(z) = w``, differentiable.

        Along c a planar map is the increasing function ``t -> t + c^T u^ tanh(t + b)`` of ``t = c^T z``.  Its root is
        bracketed by ``c^T w -+ |c^T u^|`` and found by bisection; one Newton step from there carries the derivative.
        """
        for u, c, b, cu in reversed(self._maps()):
            target = (w * c).sum(-1)
            with torch.no_grad():
                low, high = target - cu.abs(), target + cu.abs()
                for _ in range(_BISECTIONS):
                    middle = (low + high) / 2
                    above = middle + cu * torch.tanh(middle + b) > target
                    low, high = torch.where(above, low, middle), torch.where(above, middle, high)
                root = (low + high) / 2
            a = torch.tanh(root + b)
            root = root - (root + cu * a - target) / (1 + cu * (1 - a.square()))
            w = w - u * torch.tanh(root + b).unsqueeze(-1)
        return w
