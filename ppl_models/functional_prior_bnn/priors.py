"""Priors of a network's weights whose hyperparameters psi can be tuned, as Pyro code.

* ``GaussianPrior``: ``w ~ N(0, s^2)``, psi = the scales.
* ``HierarchicalPrior``: ``s^2 ~ InvGamma(a, r)``, ``w | s ~ N(0, s^2)``, psi = all ``a, r``.
* ``FlowPrior``: the weights and biases of a layer are a planar flow of ``z ~ N(0, diag exp(v))``, psi = ``v`` and the
    flow's parameters.

With psi as built they are the fixed priors of Tran et al. (JMLR 23(74), 2022): s = 1 (FG), a = r = 1 (FH), and a random
flow (FNF).

Any of them can have relevances (MacKay 1994; Neal, Bayesian Learning for Neural Networks, 1996, section 4.1): input d
enters the first layer multiplied by ``exp(relevance z_d)``, ``z_d ~ N(0, 1)``.

``forward`` issues the sample statements and returns the weights; inside a plate it returns one independent set an
element, variances included.  "Non-centred" priors sample standard normals ``eps_*`` and make the weights from them: in
that space the tuned prior is white, so a sampler needs one step size. Psi are plain ``nn.Parameter`` and take no
gradient except while they are tuned: a guide's or a sampler's objective leaves them as they are.
"""

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from torch import Tensor, nn

from inference.runtime.generators import generator
from ppl_models.functional_prior_bnn.flows import PlanarFlow
from ppl_models.functional_prior_bnn.networks import Network

__all__ = ["FlowPrior", "GaussianPrior", "HierarchicalPrior", "WeightPrior"]

# With a below 1/2 the weights have no mean, nor then has any distance between functions, and the variances overflow.
_LEAST_CONCENTRATION = 0.5


class WeightPrior(nn.Module):
    """A law of the weights of a network.

    Args:
        network: gives names and shapes.
        noncentred: sample standard normals instead of the weights.
        relevance: standard deviation of the logarithm of an input's relevance; None for none.
    """

    def __init__(self, network: Network, noncentred: bool, relevance: float | None = None) -> None:
        super().__init__()
        self.shapes = network.shapes
        self.noncentred = noncentred
        self.relevance = relevance

    def forward(self) -> dict[str, Tensor]:
        """Sample statements of one set of weights; name to ``(*plates, *shape)``.

        Relevances are in the ``W1`` that is returned and not in a site of that name.
        """
        weights = self._weights()
        if self.relevance is not None:
            one = next(self.parameters()).detach().new_ones(self.shapes["W1"][0])
            z = pyro.sample("eps_relevance", dist.Normal(torch.zeros_like(one), one).to_event(1))
            relevance = pyro.deterministic("relevance", (self.relevance * z).exp(), event_dim=1)
            weights["W1"] = relevance.unsqueeze(-1) * weights["W1"]
        return weights

    def _weights(self) -> dict[str, Tensor]:
        raise NotImplementedError

    def gibbs_sites(self) -> list[tuple[str, str]]:
        """Pairs (variance site, weight site) whose conditional is inverse-gamma."""
        return []

    def start_tuning(self) -> None:
        """Put psi where tuning starts from, if the fixed prior is no good start."""

    def draw(self, n: int, sites: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
        """Weights of ``n`` functions, name to ``(n, *shape)``, hidden from any Pyro handler around.

        Args:
            n: how many.
            sites: values ``(n, *event)`` of latent sites, such as posterior draws; what is missing is drawn from the
                prior.
        """
        program = self if sites is None else poutine.condition(self, data=dict(sites))
        device = next(self.parameters()).device
        with poutine.block(), pyro.plate("functions", n, device=device):  # type: ignore[arg-type]
            return program()

    @contextmanager
    def tuning(self) -> Iterator[None]:
        """Inside the block psi take gradients."""
        self.requires_grad_(True)
        try:
            yield
        finally:
            self.requires_grad_(False)


class GaussianPrior(WeightPrior):
    """Independent zero-mean Gaussians.

    Args:
        network: gives names and shapes.
        per_parameter: a scale for every weight instead of one for every ``W{l}`` and one for every ``b{l}``.
        noncentred: sample ``eps_W{l} ~ N(0, 1)``, ``W{l} = s eps``.
        relevance: as for ``WeightPrior``.
    """

    def __init__(
        self,
        network: Network,
        per_parameter: bool = False,
        noncentred: bool = True,
        relevance: float | None = None,
    ) -> None:
        super().__init__(network, noncentred, relevance)
        self.log_scale = _log_parameters(self.shapes, per_parameter, 1.0)

    def scale(self, name: str) -> Tensor:
        """Standard deviation s of ``W{l}`` or ``b{l}``: a scalar, or one a weight."""
        return self.log_scale[name].exp()

    def _weights(self) -> dict[str, Tensor]:
        return {name: _normal(name, shape, self.scale(name), self.noncentred) for name, shape in self.shapes.items()}


class HierarchicalPrior(WeightPrior):
    """Gaussians whose variance has an inverse-gamma prior; sites ``var_W{l}``, ``var_b{l}``.

    Args:
        network: gives names and shapes.
        per_parameter: a variance, and its a and r, for every weight.
        noncentred: sample ``eps_W{l} ~ N(0, 1)``, ``W{l} = s eps``; without it the variances can be drawn from their
            exact conditional.
        relevance: as for ``WeightPrior``.
    """

    # softplus(3), as in the paper's code. InvGamma(1, 1) has no mean: its discrepancy to anything is mostly noise.
    _TUNING_START = 3.0486

    def __init__(
        self,
        network: Network,
        per_parameter: bool = False,
        noncentred: bool = False,
        relevance: float | None = None,
    ) -> None:
        super().__init__(network, noncentred, relevance)
        self.per_parameter = per_parameter
        self.log_concentration = _log_parameters(self.shapes, per_parameter, 1.0 - _LEAST_CONCENTRATION)
        self.log_rate = _log_parameters(self.shapes, per_parameter, 1.0)
        self._tuned: Tensor
        self.register_buffer("_tuned", torch.tensor(False))

    def concentration(self, name: str) -> Tensor:
        """Shape a of the variance's inverse gamma."""
        return _LEAST_CONCENTRATION + self.log_concentration[name].exp()

    def rate(self, name: str) -> Tensor:
        """Rate r of the variance's inverse gamma."""
        return self.log_rate[name].exp()

    def start_tuning(self) -> None:
        """The first time, a = r = softplus(3)."""
        if not bool(self._tuned):
            for concentration, rate in zip(self.log_concentration.values(), self.log_rate.values(), strict=True):
                nn.init.constant_(concentration, math.log(self._TUNING_START - _LEAST_CONCENTRATION))
                nn.init.constant_(rate, math.log(self._TUNING_START))
            self._tuned.fill_(True)

    def gibbs_sites(self) -> list[tuple[str, str]]:
        """All pairs; none if non-centred, where the variance is no longer conjugate."""
        return [] if self.noncentred else [(f"var_{name}", name) for name in self.shapes]

    def _weights(self) -> dict[str, Tensor]:
        weights = {}
        for name, shape in self.shapes.items():
            law = dist.InverseGamma(self.concentration(name), self.rate(name))
            variance = pyro.sample(f"var_{name}", law.to_event(len(shape)) if self.per_parameter else law)
            scale = variance.sqrt()
            if not self.per_parameter:
                scale = scale.reshape(*scale.shape, *[1] * len(shape))
            weights[name] = _normal(name, shape, scale, self.noncentred)
        return weights


class FlowPrior(WeightPrior):
    """A planar flow a layer: ``w = flow(z)``, ``z ~ N(0, diag exp(v))``, where w is ``W{l}`` flattened and ``b{l}``
    behind it.

    The layer's ``z{l}`` (or ``eps_z{l}``) is the latent site; ``W{l}`` and ``b{l}`` are deterministic.

    Args:
        network: gives names and shapes.
        noncentred: sample ``eps_z{l} ~ N(0, 1)``, ``z{l} = exp(v / 2) eps``.
        num_maps: planar maps a layer.
        seed: of the flow's initial parameters.
        relevance: as for ``WeightPrior``.
    """

    def __init__(
        self,
        network: Network,
        noncentred: bool = True,
        num_maps: int = 4,
        seed: int = 0,
        relevance: float | None = None,
    ) -> None:
        super().__init__(network, noncentred, relevance)
        self.names = [[f"W{i}"] + ([f"b{i}"] if layer.bias else []) for i, layer in enumerate(network.layers, 1)]
        sizes = [sum(math.prod(self.shapes[name]) for name in group) for group in self.names]
        self.flows = nn.ModuleList(PlanarFlow(d, num_maps, generator(seed, "flow", i)) for i, d in enumerate(sizes))
        self.log_variance = nn.ParameterList(nn.Parameter(torch.zeros(d), requires_grad=False) for d in sizes)

    def _weights(self) -> dict[str, Tensor]:
        weights = {}
        for i, (group, flow) in enumerate(zip(self.names, self.flows, strict=True)):
            scale = (0.5 * self.log_variance[i]).exp()
            w = flow(_normal(f"z{i + 1}", tuple(scale.shape), scale, self.noncentred))
            sizes = [math.prod(self.shapes[name]) for name in group]
            for name, part in zip(group, w.split(sizes, -1), strict=True):
                shape = self.shapes[name]
                weights[name] = pyro.deterministic(name, part.reshape(*part.shape[:-1], *shape), event_dim=len(shape))
        return weights


def _normal(name: str, shape: tuple[int, ...], scale: Tensor, noncentred: bool) -> Tensor:
    """The site ``name ~ N(0, scale^2)`` with event ``shape``; ``scale`` broadcasts against ``(*plates, *shape)``."""
    if noncentred:
        one = scale.detach().new_ones(shape)
        eps = pyro.sample(f"eps_{name}", dist.Normal(torch.zeros_like(one), one).to_event(len(shape)))
        return pyro.deterministic(name, scale * eps, event_dim=len(shape))
    scale = scale.expand(torch.broadcast_shapes(scale.shape, shape))
    return pyro.sample(name, dist.Normal(torch.zeros_like(scale), scale).to_event(len(shape)))


def _log_parameters(shapes: Mapping[str, tuple[int, ...]], per_parameter: bool, value: float) -> nn.ParameterDict:
    """Logarithms: psi span two orders of magnitude, and on this scale a step is relative.  The reference's softplus
    took twice the steps.
    """
    start = math.log(value)
    return nn.ParameterDict(
        {
            name: nn.Parameter(torch.full(shape if per_parameter else (), start), requires_grad=False)
            for name, shape in shapes.items()
        }
    )
