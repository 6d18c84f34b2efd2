"""An energy as the prior of a latent-variable model: ``p(z) = N(z; 0, I) exp(-E(z)) / Z``.

Aneja, Schwing, Kautz and Vahdat, "A Contrastive Learning Approach for Training Variational Autoencoder Priors", NeurIPS
2021, arXiv:2010.02917, with the compositional likelihood in place of the classifier: a VAE that is already trained
leaves a gap between its prior and the law of its codes, and the tilt closes it.  The bound on log p(x) gains
``mean_q(z|x) [-E(z)] - log Z``.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from inference.objectives.unnormalised import CompositionalLikelihood
from inference.objectives.unnormalised.noise import GaussianNoise
from ppl_models.base import check_batch_size, check_count, to_tensor
from ppl_models.compositional_ebm.methods import EnergyFit, check_schedule, optimise
from ppl_models.compositional_ebm.model import EnergyModel

__all__ = ["LatentEnergyPrior"]


class _FreshCodes(nn.Module):
    """The objective on codes that are drawn anew from the encoder's normals at each step."""

    def __init__(self, density: CompositionalLikelihood) -> None:
        super().__init__()
        self.density = density

    def forward(self, mean: Tensor, scale: Tensor) -> Tensor:
        loss: Tensor = self.density(mean + scale * torch.randn_like(mean))
        return loss


class LatentEnergyPrior(EnergyModel):
    """The tilt of a standard normal, fitted to the codes of an encoder.

    Args:
        num_latents: size of a code.
        energy: as in ``EnergyModel``.
        hidden: widths of the default network.
        seed: of its initial weights.
    """

    kind: ClassVar[str] = "LatentEnergyPrior"

    def __init__(
        self, num_latents: int, energy: nn.Module | None = None, *, hidden: tuple[int, ...] = (128, 128), seed: int = 0
    ) -> None:
        super().__init__(energy, (check_count("num_latents", num_latents),), "tilt", hidden=hidden, seed=seed)

    def fit(  # type: ignore[override]
        self,
        mean: Any,
        scale: Any,
        noise_samples: int = 512,
        batch_size: int | None = 256,
        beta: Any = 0.1,
        num_steps: int = 2000,
        seed: int = 0,
        *,
        lr: float = 1e-3,
        weight_decay: float = 1e-2,
        checkpoint: str | Path | None = None,
        progress: bool | Callable[[dict[str, Any]], None] = True,
    ) -> EnergyFit:
        """Fit to the encoder's normals.

        Args:
            mean: of each code ``(N, num_latents)``.
            scale: standard deviations ``(N, num_latents)``.
            noise_samples, batch_size, beta, num_steps, seed, lr, weight_decay, checkpoint, progress: as in
                ``EnergyModel.fit``.

        Raises:
            TypeError, ValueError, NonFiniteError, CollapseError: as in ``EnergyModel.fit``.
        """
        mean, scale = self._check(mean, "mean"), to_tensor("scale", scale)
        if scale.shape != mean.shape or bool((scale < 0).any()):
            raise ValueError(f"scale must be nonnegative in the shape of mean, {tuple(mean.shape)}")
        check_count("num_steps", num_steps)
        check_schedule(lr, weight_decay, 0.0)
        size = self.event_shape[0]
        normal = GaussianNoise(torch.zeros(size).to(mean), torch.eye(size).to(mean))
        self._start(mean, normal, seed, frozen=False)
        density = CompositionalLikelihood(self, normal, noise_samples, beta=beta)
        batch = check_batch_size(batch_size, len(mean), 256)
        settings: dict[str, Any] = {"lr": lr, "weight_decay": weight_decay, "average_last": 0.0}
        loop, history = optimise(
            _FreshCodes(density),
            (mean, scale.to(mean)),
            density=density,
            num_steps=num_steps,
            batch_size=batch,
            seed=seed,
            checkpoint=checkpoint,
            progress=progress,
            **settings,
        )
        self.result = EnergyFit(history, self._measure(seed), "compositional", loop)
        return self.result

    @torch.no_grad()
    def bound_gain(self, z: Any) -> float:
        """How much the evidence bound gains on codes ``(N, num_latents)`` drawn by the encoder, in nats a datum."""
        self._fitted("bound_gain")
        return float(-self.energy(self._check(z, "z")).double().mean()) - float(self.log_z or 0.0)

    def config(self) -> dict[str, Any]:
        """The constructor's arguments that a file can hold."""
        return {"num_latents": self.event_shape[0], "hidden": list(self.hidden), "seed": self.seed}
