"""Networks of images without types: TARNet (Shalit et al., 2017) and one network an arm, trained by ``inference.fit``.

Backbone, optimiser and number of updates are those of ``ImageCATE``'s networks; a fifth of the images, held out, stops
them.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from benchmarks.effect_learners import Prediction, Trial, two_means
from inference import fit
from inference.runtime.generators import derive_seed, generator, scoped_seed
from ppl_models.image_cate.backbones import CNN

__all__ = ["separate_arms", "tarnet"]

_STEPS, _BATCH = 400, 100


class _Heads(nn.Module):
    """Outcomes under control and treatment; the call is the squared error of the arm that was seen."""

    def __init__(self, images: Tensor, shared: bool, seed: int) -> None:
        super().__init__()
        with scoped_seed(derive_seed(seed, "heads")):
            self.towers = nn.ModuleList(
                nn.Sequential(tower := CNN(images.shape[1]), nn.Linear(tower.out_features, 2 if shared else 1))
                for _ in range(1 if shared else 2)
            )

    def predict(self, images: Tensor) -> Tensor:
        """``(B, 2)``."""
        return torch.cat([tower(images) for tower in self.towers], 1)

    def forward(self, images: Tensor, outcome: Tensor, treatment: Tensor) -> Tensor:
        seen = self.predict(images).gather(1, treatment.long().unsqueeze(1))[:, 0]
        return (outcome - seen).square().mean()


def _learner(shared: bool) -> Callable[[Trial, Tensor, int], Prediction]:
    def learner(trial: Trial, where: Tensor, seed: int) -> Prediction:
        used = trial.image_index.unique()
        shift, scale = trial.images[used].mean((0, 2, 3), keepdim=True), trial.images[used].std((0, 2, 3), keepdim=True)
        images = (trial.images - shift) / scale
        mean, sd = trial.outcome.mean(), trial.outcome.std()
        outcome = (trial.outcome - mean) / sd
        held_images = used[torch.randperm(len(used), generator=generator(seed, "held"))[: len(used) // 5]]
        held = torch.isin(trial.image_index, held_images)
        data, validation = (
            (images[trial.image_index[rows]], outcome[rows], trial.treatment[rows]) for rows in (~held, held)
        )
        model = _Heads(images, shared, seed)
        fit(
            model,
            data,
            num_steps=_STEPS,
            batch_size=min(_BATCH, len(data[1])),
            optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=3e-3, weight_decay=1e-2),
            scheduler=lambda made: torch.optim.lr_scheduler.OneCycleLR(made, 3e-3, total_steps=_STEPS),
            clip_norm=5.0,
            validation=validation,
            validate_every=_STEPS // 20,
            patience=5,
            seed=seed,
            progress=False,
        )
        model.eval()
        with torch.no_grad():
            arms = model.predict(images[where]).double()
        effect = (arms[:, 1] - arms[:, 0]) * float(sd)
        return Prediction(effect, two_means(effect))

    return learner


tarnet = _learner(shared=True)
separate_arms = _learner(shared=False)
