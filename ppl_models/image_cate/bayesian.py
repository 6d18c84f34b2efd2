"""Bayesian kernels of the gate, by staged empirical Bayes.

Stage 1 trains the gate without a prior on its kernels.  Stage 2 gives each kernel tensor the prior N(its stage-1
values, (a tenth of their standard deviation)^2) and learns a mean-field normal posterior beside that of the effects, as
the reference implementation of Jerzak, Johansson and Daoud (arXiv 2206.06417) does.
"""

import torch
from pyro import sample
from pyro.distributions import Normal
from torch import Tensor, nn
from torch.func import functional_call

from inference import ELBO
from ppl_models.image_cate.data import Units
from ppl_models.image_cate.mixture import TypeGuide
from ppl_models.image_cate.towers import ImageEffectModel, Tower

__all__ = ["BayesianObjective", "kernel_names", "with_kernels"]

_LEAST_SCALE = 1e-3
_PRIOR_SHARE = 0.1
_START = 0.01  # posterior standard deviation at the start


def kernel_names(tower: Tower) -> list[str]:
    """Names of the backbone's kernels: its trained parameters of two dimensions and more."""
    return [n for n, p in tower.backbone.named_parameters() if p.ndim >= 2]


def with_kernels(tower: Tower, flat: Tensor, images: Tensor) -> Tensor:
    """The backbone's features ``(N, F)`` with these kernels, ``(P,)``, in place of its own."""
    own = dict(tower.backbone.named_parameters())
    values, start = {}, 0
    for name in kernel_names(tower):
        count = own[name].numel()
        values[name] = flat[start : start + count].view_as(own[name])
        start += count
    features: Tensor = functional_call(tower.backbone, values, (images,))
    return features


class _KernelModel(nn.Module):
    """The model of images and units with kernels as the latent site ``kernels`` ``(P,)``."""

    loc: Tensor
    scale: Tensor

    def __init__(self, model: ImageEffectModel) -> None:
        super().__init__()
        assert model.gate is not None
        self.model = model
        own = dict(model.gate.backbone.named_parameters())
        kernels = [own[n].detach() for n in kernel_names(model.gate)]
        scales = [(_PRIOR_SHARE * k.std()).clamp(min=_LEAST_SCALE).expand(k.numel()) for k in kernels]
        self.register_buffer("loc", torch.cat([k.flatten() for k in kernels]))
        self.register_buffer("scale", torch.cat(scales))

    def logits(self, kernels: Tensor, images: Tensor, units: Units) -> Tensor:
        """Of the types, ``(B, U or 1, K)``."""
        gate = self.model.gate
        assert gate is not None
        features = with_kernels(gate, kernels, images)
        return nn.functional.pad(gate.on_features(features, units.modifiers), (1, 0))

    def forward(self, images: Tensor, units: Units) -> None:
        kernels = sample("kernels", Normal(self.loc, self.scale).to_event(1))
        found = self.model.beside_types(images, units)
        self.model.mixture(self.logits(kernels, images, units), *found, units)


class _KernelGuide(nn.Module):
    def __init__(self, model: _KernelModel, types: TypeGuide) -> None:
        super().__init__()
        self._model, self.types = (model,), types
        self.loc = nn.Parameter(model.loc.clone())
        self.raw = nn.Parameter(torch.full_like(model.loc, _START).expm1().log())

    def scale(self) -> Tensor:
        """Posterior standard deviations ``(P,)``."""
        return nn.functional.softplus(self.raw)

    def forward(self, images: Tensor, units: Units) -> None:
        kernels = sample("kernels", Normal(self.loc, self.scale()).to_event(1))
        model = self._model[0]
        self.types(model.logits(kernels, images, units), *model.model.beside_types(images, units), units)


class BayesianObjective(nn.Module):
    """Stage 2: negative ELBO of a batch of images for each unit of the trial, with kernels random.

    Args:
        model: after stage 1.
        types: its guide, which is trained on.
        images, units: of the trial.
        num_units: N.
    """

    def __init__(self, model: ImageEffectModel, types: TypeGuide, images: Tensor, units: Units, num_units: int) -> None:
        super().__init__()
        self.kernels = _KernelModel(model)
        self.guide = _KernelGuide(self.kernels, types)
        self.elbo = ELBO(self.kernels, self.guide, record=False)
        self._data, self.num_units = (images, units), num_units

    def forward(self, rows: Tensor) -> Tensor:
        """Loss of the images ``rows``."""
        loss: Tensor = self.elbo(self._data[0][rows], Units(*(x[rows] for x in self._data[1])))
        return loss / self.num_units

    @torch.no_grad()
    def settle(self) -> None:
        """Put the posterior means into the network and the standard deviations beside them."""
        model = self.kernels.model
        assert model.gate is not None
        own, start = dict(model.gate.backbone.named_parameters()), 0
        for name in kernel_names(model.gate):
            count = own[name].numel()
            own[name].copy_(self.guide.loc[start : start + count].view_as(own[name]))
            start += count
        model.kernel_scale = self.guide.scale().detach()
