"""Objectives that learn log Z as a parameter: noise-contrastive estimation, its exponential form, self-normalisation.

With ``r(x) = log p~(x) - c - log q(x)`` and M noise draws for B rows of data:

* NCE (Gutmann and Hyvärinen, AISTATS 2010), noise ratio nu:
  ``-E_data log sigma(r - log nu) - nu E_q log sigma(log nu - r)``.
* eNCE (Liu, Rosenfeld, Ravikumar and Risteski, ICLR 2022, arXiv:2110.11271):
  ``E_data exp(-r / 2) / 2 + E_q exp(r / 2) / 2``, meant for normalised gradient descent (``NormalisedSGD``).
* SNL (self-normalised likelihood, a submission to ICLR 2024): ``-E_data log p~ + exp(-b) g + b - 1`` with g the noise's
  estimate of Z, an unbiased upper bound of the negative log-likelihood that is tight at b = log Z.
"""

import math
from collections.abc import Callable, Iterable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.optim import Optimizer

from inference.kernels.base import positive
from inference.objectives.unnormalised.objective import UnnormalisedObjective

__all__ = ["ExponentialNoiseContrastive", "NoiseContrastive", "NormalisedSGD", "SelfNormalisedLikelihood"]


class _LearnedConstant(UnnormalisedObjective):
    """A model whose log Z is the parameter ``log_z``; it starts at a first noise batch's estimate."""

    columns: ClassVar[tuple[str, ...]] = ("log_partition", "log_partition_batch", "ess")
    log_z: nn.Parameter | None

    def __init__(
        self,
        model: Callable[..., Any],
        guide: Callable[..., Any],
        noise_samples: int | None = None,
        *,
        on_collapse: str = "ignore",
    ) -> None:
        super().__init__(model, guide, noise_samples, on_collapse=on_collapse)
        self.register_parameter("log_z", None)

    def forward(self, *batch: Tensor) -> Tensor:
        """The loss on a batch, a scalar."""
        self._prepare(batch)
        draws = self.pair.draw(self.noise_samples, batch, record=True)
        at_data, at_noise = self._joined(batch, draws)
        if self.log_z is None:
            a = (at_noise - draws.log_q).detach()
            start = torch.logsumexp(a, 0) - math.log(len(a))
            self.log_z = nn.Parameter(torch.where(torch.isfinite(start), start, torch.zeros_like(start)))
        log_z = self.log_z
        loss = self._loss(at_data, at_noise, draws.log_q, log_z, batch)
        if self._advances():
            a = (at_noise - draws.log_q).detach().double()
            first, second = (torch.logsumexp(torch.stack([a, 2 * a]), 1) - math.log(len(a))).unbind()
            self._write(log_z, first, (2 * first - second).exp())
        return loss

    def _loss(self, at_data: Tensor, at_noise: Tensor, log_q: Tensor, log_z: Tensor, batch: Any) -> Tensor:
        raise NotImplementedError


class NoiseContrastive(_LearnedConstant):
    """Noise-contrastive estimation: tell data from noise by the model's density.

    Args:
        model, guide, noise_samples, on_collapse: as in ``CompositionalLikelihood``.
        noise_ratio: nu, the noise's weight against the data's; by default M / B, the true ratio. A large one with few
            draws is "noisier" NCE (arXiv:2405.16730).

    Attributes:
        log_z: the learned log Z.
    """

    def __init__(
        self,
        model: Callable[..., Any],
        guide: Callable[..., Any],
        noise_samples: int | None = None,
        *,
        noise_ratio: float | None = None,
        on_collapse: str = "ignore",
    ) -> None:
        super().__init__(model, guide, noise_samples, on_collapse=on_collapse)
        self.noise_ratio = None if noise_ratio is None else positive("noise_ratio", noise_ratio)

    def _loss(self, at_data: Tensor, at_noise: Tensor, log_q: Tensor, log_z: Tensor, batch: Any) -> Tensor:
        ratio = len(at_noise) / len(at_data) if self.noise_ratio is None else self.noise_ratio
        with torch.no_grad():
            q_at_data = self.pair.log_q(self.pair.data(batch), batch, record=True)
        of_data = at_data - log_z - q_at_data - math.log(ratio)
        of_noise = at_noise - log_z - log_q - math.log(ratio)
        return -functional.logsigmoid(of_data).mean() - ratio * functional.logsigmoid(-of_noise).mean()


class ExponentialNoiseContrastive(_LearnedConstant):
    """eNCE: the exponential loss in place of the logistic one; arguments as in ``CompositionalLikelihood``.

    Attributes:
        log_z: the learned log Z.
    """

    def _loss(self, at_data: Tensor, at_noise: Tensor, log_q: Tensor, log_z: Tensor, batch: Any) -> Tensor:
        with torch.no_grad():
            q_at_data = self.pair.log_q(self.pair.data(batch), batch, record=True)
        of_data = 0.5 * (at_data - log_z - q_at_data)
        of_noise = 0.5 * (at_noise - log_z - log_q)
        return 0.5 * (-of_data).exp().mean() + 0.5 * of_noise.exp().mean()


class SelfNormalisedLikelihood(_LearnedConstant):
    """SNL: the likelihood's bound that is linear in the estimate of Z; arguments as in ``CompositionalLikelihood``.

    Attributes:
        log_z: the learned b.
    """

    def _loss(self, at_data: Tensor, at_noise: Tensor, log_q: Tensor, log_z: Tensor, batch: Any) -> Tensor:
        relative = torch.logsumexp(at_noise - log_q, 0) - math.log(len(at_noise)) - log_z
        return relative.exp() + log_z - 1 - at_data.mean()


class NormalisedSGD(Optimizer):
    """Gradient descent along the unit vector of the whole gradient: ``theta <- theta - lr g / |g|``.

    Where a loss is flat and its curvature uneven, as NCE's is far from the noise, its steps do not shrink with the
    gradient (Liu et al. 2022, section 4).
    """

    def __init__(self, params: Iterable[nn.Parameter], lr: float = 1e-2) -> None:
        super().__init__(params, {"lr": positive("lr", lr)})

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """One update; the loss, if ``closure`` makes it and the gradients."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        found = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        norm = torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(p.grad) for p in found]))
        tiny = torch.finfo(norm.dtype).tiny
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    p.sub_(group["lr"] * p.grad / norm.clamp(min=tiny))
        return loss
