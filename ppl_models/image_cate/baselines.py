"""Methods without image types, to compare with: two heads on one network with k-means (TARNet), and a network an
arm."""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from inference import fit
from inference.runtime.generators import derive_seed, scoped_seed
from ppl_models.image_cate.data import Units, make_trial
from ppl_models.image_cate.towers import Tower
from ppl_models.image_cate.training import (
    Prepared,
    Settings,
    flipped,
    images_of_batch,
    kmeans_1d,
    make_backbone,
    one_cycle,
    prepare,
)

__all__ = ["ArmNetworks", "fit_arm_networks"]


class ArmNetworks(nn.Module):
    """Mean outcomes of both arms by image, and types by k-means of their difference.

    Args:
        shared: one network with two heads (TARNet; Shalit, Johansson and Sontag, arXiv:1606.03976), or a network an
            arm.
    """

    centres: Tensor

    def __init__(self, prepared: Prepared, settings: Settings, shared: bool, seed: int) -> None:
        super().__init__()
        self.columns, self.augment, self.shared = nn.ModuleList(prepared.columns), settings.augment, shared
        self.scale = float(prepared.likelihood.scale)
        shape = tuple(prepared.images.shape[1:])
        with scoped_seed(derive_seed(seed, "arms")):
            self.towers = nn.ModuleList(
                [Tower(make_backbone(settings, shape), 0, 2 if shared else 1) for _ in range(1 if shared else 2)]
            ).to(prepared.images)
        self._data = (prepared.images, prepared.units)
        self.register_buffer("centres", torch.zeros(settings.num_clusters))

    def arms(self, images: Tensor) -> Tensor:
        """Standardised means ``(N, 2)`` of control and treated at standardised images."""
        none = images.new_zeros(len(images), 1, 0)
        return torch.cat([tower(images, none)[:, 0] for tower in self.towers], -1)

    def forward(self, rows: Tensor) -> Tensor:
        """Mean squared error of the units of the images ``rows``."""
        images, units = self._data[0][rows], Units(*(x[rows] for x in self._data[1]))
        both = self.arms(flipped(images) if self.augment and self.training else images).unsqueeze(1)
        mean = torch.where(units.treatment == 1, both[..., 1], both[..., 0])
        weight = units.weight * units.mask
        return (weight * (units.outcome - mean).square()).sum() / weight.sum()

    @torch.no_grad()
    def effect(self, images: Tensor) -> Tensor:
        """Effect at each image in outcome units, ``(N,)``."""
        both = self.arms(self.columns[0](images))
        return self.scale * (both[:, 1] - both[:, 0])

    def cluster(self, images: Tensor) -> Tensor:
        """Type of each image by the nearest centre, effects ascending, ``(N,)``."""
        return (self.effect(images).unsqueeze(1) - self.centres).abs().argmin(1)


class ArmFit(NamedTuple):
    """Fitted networks and their history of losses."""

    model: ArmNetworks
    losses: Tensor


def fit_arm_networks(
    outcome: Any, treatment: Any, images: Any, image_index: Any = None, *, shared: bool = True, settings: Settings,
    seed: int = 0,
) -> ArmFit:  # fmt: skip
    """Train by squared error, with the same backbone, optimiser and steps as ``ImageCATE`` has in ``settings``.

    Raises:
        TypeError, ValueError: bad data.
    """
    trial = make_trial(outcome, treatment, images, image_index)
    prepared = prepare(trial, settings, trial.sample_weight)
    model = ArmNetworks(prepared, settings, shared, seed)
    optimizer, scheduler = one_cycle(model, settings, settings.num_steps)
    rows = torch.arange(trial.num_images, device=trial.images.device)
    history = fit(
        model,
        rows,
        num_steps=settings.num_steps,
        batch_size=images_of_batch(prepared, settings, len(rows)),
        optimizer=optimizer,
        scheduler=scheduler,
        clip_norm=5.0,
        seed=seed,
        progress=False,
    )
    model.eval()
    model.centres = kmeans_1d(model.effect(trial.images), settings.num_clusters)[0]
    return ArmFit(model, history.losses)
