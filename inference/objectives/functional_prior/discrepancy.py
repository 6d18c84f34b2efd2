"""Discrepancies between two bags of functions that need no inner optimisation.

A bag is a tensor ``(n, M, K)``: ``n`` functions drawn independently, each seen at the same ``M`` measurement points,
with ``K`` outputs. Every discrepancy compares the two laws on R^M output by output and sums over the outputs.

References:
    Székely and Rizzo, Energy statistics, J. Stat. Plan. Inference 143(8), 2013 (energy distance).
    Bonneel, Rabin, Peyré and Pfister, Sliced and Radon Wasserstein barycenters of measures, JMIV 51, 2015.
    Dowson and Landau, The Fréchet distance between multivariate normal distributions, J. Multivar. Anal. 12(3), 1982.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

__all__ = ["EnergyDistance", "GaussianWasserstein", "SlicedWasserstein", "check_bags", "gaussian_wasserstein"]

_FEW_POINTS = 25


def check_bags(f: Tensor, g: Tensor, *, equal_size: bool = False) -> None:
    """Raise ``ValueError`` unless ``f`` and ``g`` are ``(n, M, K)`` bags of at least two functions each."""
    for name, bag in (("f", f), ("g", g)):
        if bag.ndim != 3:
            raise ValueError(f"{name} must be a bag of functions (n, M, K), got shape {tuple(bag.shape)}")
        if bag.shape[0] < 2:
            raise ValueError(f"{name} must hold at least 2 functions, got {bag.shape[0]}")
    if f.shape[1:] != g.shape[1:]:
        raise ValueError(f"f and g must agree in (M, K), got {tuple(f.shape[1:])} and {tuple(g.shape[1:])}")
    if equal_size and f.shape[0] != g.shape[0]:
        raise ValueError(f"f and g must hold equally many functions here, got {f.shape[0]} and {g.shape[0]}")
    if f.dtype != g.dtype or f.device != g.device:
        raise ValueError(f"f and g must share dtype and device, got {f.dtype}, {f.device} and {g.dtype}, {g.device}")


@dataclass(frozen=True)
class EnergyDistance:
    """Energy distance ``2 E|f - g| - E|f - f'| - E|g - g'|`` with the Euclidean norm on R^M.

    It is zero only where the laws are equal.  The estimate is the U-statistic (no pair of a draw with itself), so it
    is unbiased and may be slightly negative when the laws are close.  No inner loop: the default choice for tuning.
    """

    def __call__(self, f: Tensor, g: Tensor) -> Tensor:
        """Scalar estimate from bags ``f`` ``(n, M, K)`` and ``g`` ``(m, M, K)``; differentiable in both."""
        check_bags(f, g)
        centre = g.detach().mean(0)  # distances do not see it, rounding does
        f, g = (f - centre).permute(2, 0, 1), (g - centre).permute(2, 0, 1)
        return 2 * _distances(f, g).mean(dim=(-1, -2)).sum() - _mean_within(f) - _mean_within(g)


def _mean_within(bag: Tensor) -> Tensor:
    n = bag.shape[1]
    d = _distances(bag, bag)
    return (d.sum() - d.diagonal(dim1=-2, dim2=-1).sum()) / (n * (n - 1))


def _distances(a: Tensor, b: Tensor) -> Tensor:
    # The Gram matrix is several times faster but loses half of the digits where two draws nearly coincide, and the
    # direction of the gradient with them.  On few points that is common, and there the exact differences cost little.
    # The derivative at distance 0 is 0 in both.
    few = a.shape[-1] <= _FEW_POINTS
    return torch.cdist(a, b, compute_mode="donot_use_mm_for_euclid_dist" if few else "use_mm_for_euclid_dist")


@dataclass(frozen=True)
class SlicedWasserstein:
    """Sliced 1-Wasserstein distance: the mean over random unit directions of W1 between the projected bags.

    On a line W1 is the mean absolute difference of the sorted draws.  Directions are uniform on the sphere of R^M and
    fresh at each call (global generator), shared by the outputs.  The value is biased upwards by O(n^-1/2): it does
    not vanish at equal laws.

    Args:
        num_projections: number of random directions.
    """

    num_projections: int = 100

    def __post_init__(self) -> None:
        if self.num_projections < 1:
            raise ValueError(f"num_projections must be at least 1, got {self.num_projections}")

    def __call__(self, f: Tensor, g: Tensor) -> Tensor:
        """Scalar estimate from two bags ``(n, M, K)`` of equal size."""
        check_bags(f, g, equal_size=True)
        directions = torch.randn(self.num_projections, f.shape[1], dtype=f.dtype, device=f.device)
        directions = directions / directions.norm(dim=-1, keepdim=True)
        p, q = ((directions @ bag).sort(dim=0).values for bag in (f, g))  # (n, L, K)
        return (p - q).abs().mean(dim=(0, 1)).sum()


@dataclass(frozen=True)
class GaussianWasserstein:
    """Squared 2-Wasserstein distance between the Gaussians with the bags' sample means and covariances.

    Sees the first two moments only.  With ``A``, ``B`` the centred bags over ``sqrt(n - 1)``, the cross term is the
    nuclear norm of ``A B^T``, whose gradient (the polar factor) stays finite for repeated and vanishing singular
    values, so ``n < M`` is allowed; the plug-in estimate is then biased upwards.  Where covariances are known, use
    :func:`gaussian_wasserstein`.
    """

    def __call__(self, f: Tensor, g: Tensor) -> Tensor:
        """Scalar estimate from bags ``f`` ``(n, M, K)`` and ``g`` ``(m, M, K)``."""
        check_bags(f, g)
        f, g = f.permute(2, 0, 1), g.permute(2, 0, 1)
        mean_f, mean_g = f.mean(dim=1, keepdim=True), g.mean(dim=1, keepdim=True)
        a = (f - mean_f) / (f.shape[1] - 1) ** 0.5
        b = (g - mean_g) / (g.shape[1] - 1) ** 0.5
        cross = torch.linalg.svdvals(a @ b.mT).sum()
        return (mean_f - mean_g).square().sum() + a.square().sum() + b.square().sum() - 2 * cross


def gaussian_wasserstein(mean_f: Tensor, cov_f: Tensor, mean_g: Tensor, cov_g: Tensor) -> Tensor:
    """Squared 2-Wasserstein distance between ``N(mean_f, cov_f)`` and ``N(mean_g, cov_g)`` (Dowson and Landau 1982).

    ``|mean_f - mean_g|^2 + tr(cov_f + cov_g - 2 (cov_g^1/2 cov_f cov_g^1/2)^1/2)``, differentiable in all four
    arguments.

    Args:
        mean_f: ``(*batch, M)``.
        cov_f: ``(*batch, M, M)``, symmetric positive semi-definite.
        mean_g: ``(*batch, M)``.
        cov_g: ``(*batch, M, M)``.

    Returns:
        ``(*batch,)``.

    Raises:
        ValueError: a covariance is not square or does not fit its mean.
    """
    for name, mean, cov in (("f", mean_f, cov_f), ("g", mean_g, cov_g)):
        if cov.ndim < 2 or cov.shape[-1] != cov.shape[-2] or mean.shape[-1:] != cov.shape[-1:]:
            found = f"{tuple(cov.shape)} and {tuple(mean.shape)}"
            raise ValueError(f"cov_{name} must be (*batch, M, M) and mean_{name} (*batch, M), got {found}")
    root: Tensor = _SquareRoot.apply(cov_g)
    inner = root @ cov_f @ root
    eigenvalues = torch.linalg.eigvalsh((inner + inner.mT) / 2)
    # Rounding leaves the null space at +-eps of the largest eigenvalue, where the square root would have a huge
    # meaningless slope.
    floor = torch.finfo(inner.dtype).eps * inner.shape[-1] * eigenvalues[..., -1:].detach()
    cross = torch.where(eigenvalues > floor, eigenvalues, 0).where(eigenvalues > floor, 1).sqrt()
    cross = torch.where(eigenvalues > floor, cross, 0).sum(-1)
    traces = cov_f.diagonal(dim1=-2, dim2=-1).sum(-1) + cov_g.diagonal(dim1=-2, dim2=-1).sum(-1)
    return (mean_f - mean_g).square().sum(-1) + traces - 2 * cross


class _SquareRoot(torch.autograd.Function):
    """Symmetric square root of a positive semi-definite matrix.

    The derivative solves the Sylvester equation ``X dX + dX X = dS``; in the eigenbasis this divides by ``sqrt(l_i) +
    sqrt(l_j)``, and not by ``l_i - l_j`` as automatic differentiation of ``eigh`` does, so equal eigenvalues are
    harmless.
    """

    @staticmethod
    def forward(ctx: Any, matrix: Tensor) -> Tensor:
        eigenvalues, basis = torch.linalg.eigh(matrix)
        roots = eigenvalues.clamp_min(0).sqrt()
        ctx.save_for_backward(roots, basis)
        return (basis * roots.unsqueeze(-2)) @ basis.mT

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> Tensor:
        roots, basis = ctx.saved_tensors
        floor = torch.finfo(roots.dtype).eps ** 0.5 * roots[..., -1:, None]
        sums = (roots.unsqueeze(-1) + roots.unsqueeze(-2)).clamp_min(floor)
        grad = (grad_outputs[0] + grad_outputs[0].mT) / 2
        return basis @ ((basis.mT @ grad @ basis) / sums) @ basis.mT
