"""Score matching: fit the gradient of the log-density, with no normalising constant anywhere.

* Denoising (Vincent, Neural Computation 23, 2011): with ``y = x + sigma e``, ``sigma^2 / 2 |grad log p(y) + e /
  sigma|^2``. Its minimiser is the data's density smoothed by sigma.
* Sliced (Song, Garg, Shi and Ermon, UAI 2019, arXiv:1905.07088), variance-reduced form: ``v' H v + |grad log p|^2 / 2``
  with v of independent signs.
"""

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor

from inference.kernels.base import positive
from inference.objectives.unnormalised.objective import UnnormalisedObjective, refuse_edges

__all__ = ["DenoisingScoreMatching", "SlicedScoreMatching"]


class _ScoreMatching(UnnormalisedObjective):
    columns: ClassVar[tuple[str, ...]] = ("score_loss",)

    def __init__(self, model: Callable[..., Any], guide: Callable[..., Any] | None = None) -> None:
        super().__init__(model, guide, on_collapse="ignore")

    def forward(self, *batch: Tensor) -> Tensor:
        """The loss on a batch, a scalar, up to a constant that does not depend on the parameters."""
        self._prepare(batch)
        (site,) = self.pair.sites
        data = self.pair.data(batch)[site]
        if not data.is_floating_point():
            raise ValueError("score matching needs continuous data: use method 'compositional', 'nce' or 'snl'")
        with torch.enable_grad():
            loss = self._loss(data, lambda x: self.pair.log_density({site: x}, batch, record=True))
        if self._advances():
            self._write(loss)
        return loss if torch.is_grad_enabled() else loss.detach()

    def _prepare(self, batch: tuple[Tensor, ...]) -> None:
        first = not self.pair.inspected
        super()._prepare(batch)
        if first:
            refuse_edges(self.pair.support, "score matching")

    def _loss(self, x: Tensor, log_density: Callable[[Tensor], Tensor]) -> Tensor:
        raise NotImplementedError


class DenoisingScoreMatching(_ScoreMatching):
    """Denoising score matching.

    Args:
        model: as in ``CompositionalLikelihood``, for continuous data.
        guide: not used, but its support is checked against the data where given.
        sigma: standard deviation of the noise that is added, in units of the data.
    """

    def __init__(
        self, model: Callable[..., Any], guide: Callable[..., Any] | None = None, *, sigma: float = 0.1
    ) -> None:
        super().__init__(model, guide)
        self.sigma = positive("sigma", sigma)

    def _loss(self, x: Tensor, log_density: Callable[[Tensor], Tensor]) -> Tensor:
        noise = torch.randn_like(x)
        moved = (x + self.sigma * noise).requires_grad_(True)
        values = log_density(moved)
        self._note(values, len(values))
        (score,) = torch.autograd.grad(values.sum(), moved, create_graph=True)
        residual = self.sigma * score + noise
        return 0.5 * residual.square().flatten(1).sum(1).mean() if x.dim() > 1 else 0.5 * residual.square().mean()


class SlicedScoreMatching(_ScoreMatching):
    """Sliced score matching with one slice a row; arguments as in ``DenoisingScoreMatching``."""

    def _loss(self, x: Tensor, log_density: Callable[[Tensor], Tensor]) -> Tensor:
        leaf = x.detach().clone().requires_grad_(True)
        values = log_density(leaf)
        self._note(values, len(values))
        (score,) = torch.autograd.grad(values.sum(), leaf, create_graph=True)
        signs = torch.randint(0, 2, x.shape, device=x.device).to(x.dtype) * 2 - 1
        (curved,) = torch.autograd.grad((score * signs).sum(), leaf, create_graph=True)
        per_row = (signs * curved + 0.5 * score.square()).reshape(len(x), -1)
        return per_row.sum(1).mean()
