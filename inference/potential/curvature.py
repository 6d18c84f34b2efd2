"""Second derivatives of a model's energy ``U(z) = -log p(z, data)`` at one point, by matrix-vector products.

- ``hessian``: the exact Hessian of U.
- ``ggn``: the Hessian of the prior's part of U plus ``J^T Lambda J``, with J the Jacobian of the likelihood's
  parameters in z and Lambda their Fisher information.  In an exponential family's natural parameters Lambda is the
  Hessian of ``-log p(y | .)`` for every y, so this is the generalised Gauss-Newton matrix; and as a Fisher information
  changes with coordinates as ``J^T Lambda J`` does, any parameters of the family give the same matrix (Martens, "New
  insights and perspectives on the natural gradient method", 2020, arXiv:1412.1193, sections 8 and 9).  With
  ``Lambda = B B^T`` it is the squared Jacobian of ``B^T theta(z)``, B held fixed:

      Normal(m, s)               m / s*,  sqrt(2) s / s*
      Bernoulli(logits f)        sqrt(p*(1 - p*)) f
      Categorical(logits f)      sqrt(p*) (f - p*^T f)
      Poisson(r)                 r / sqrt(r*)
      MultivariateNormal(m, S)   L*^-1 m,  L*^-1 S L*^-T / sqrt(2)      with S* = L* L*^T

- ``empirical_fisher``: the same with the sum of ``score score^T`` over the elements of the observed sites in place of
  ``J^T Lambda J``: cheap, and no curvature away from the truth (Kunstner, Balles and Hennig, "Limitations of the
  empirical Fisher approximation", 2019, arXiv:1905.12558).
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributions as td
from pyro import poutine
from pyro.distributions.torch_distribution import MaskedDistribution
from pyro.distributions.util import scale_and_mask
from torch import Tensor
from torch.func import jvp, vjp, vmap

from inference.potential.graph import CaptureError, trace
from inference.potential.log_density import LogDensity, _Unconstrained, scoped_model
from inference.potential.potential import Potential
from inference.runtime.generators import scoped_seed

__all__ = ["CURVATURES", "Curvature"]

CURVATURES = ("hessian", "ggn", "empirical_fisher")
_ELEMENTS = 1 << 22  # of the result that are computed at once
_FAMILIES = "Normal, Bernoulli, Categorical, Poisson and MultivariateNormal"
_Product = Callable[[Tensor, Tensor], Tensor]


class Curvature:
    """The matrix of one kind for one model, at any point.

    Args:
        potential: of a model; for ``ggn`` and ``empirical_fisher`` without summed-out sites.
        kind: one of ``CURVATURES``.
        example: a point of positive density, where the parts of the model are recorded, ``(dim,)``.

    Raises:
        ValueError: the likelihood has no such matrix, or cannot be recorded.
    """

    def __init__(self, potential: Potential, kind: str, example: Tensor) -> None:
        self._product = (
            _hessian_product(potential) if kind == "hessian" else _squared_jacobian_product(potential, kind, example)
        )

    def __call__(self, z: Tensor, index: Tensor, *, diagonal: bool = False) -> Tensor:
        """The rows and columns ``index`` ``(k,)`` of the matrix at ``z`` ``(dim,)``.

        Returns:
            ``(k, k)``, symmetric; with ``diagonal``, its diagonal ``(k,)`` alone.
        """
        rows = []
        for part in index.split(max(1, _ELEMENTS // len(z))):
            basis = torch.zeros(len(part), len(z), dtype=z.dtype, device=z.device)
            basis.scatter_(1, part.unsqueeze(1), 1.0)
            columns = self._product(z, basis)
            rows.append(columns.gather(1, part.unsqueeze(1)).squeeze(1) if diagonal else columns[:, index])
        joined = torch.cat(rows)
        return joined if diagonal else (joined + joined.T) / 2


def _hessian_product(potential: Potential) -> _Product:
    if potential.captured:
        return _derivative(lambda x: potential.value_and_grad(x.unsqueeze(0))[1].squeeze(0))

    def product(z: Tensor, basis: Tensor) -> Tensor:
        # A model that is no graph: Python runs it once, and its double backward serves all products.
        with torch.enable_grad():
            leaf = z.detach().requires_grad_(True)
            energy = -potential.density.run(potential.density.unflatten(leaf))[0]
            slope = torch.autograd.grad(energy, leaf, create_graph=True)[0]
        return torch.stack([torch.autograd.grad(slope, leaf, v, retain_graph=True)[0] for v in basis])

    return product


def _derivative(gradient: Callable[[Tensor], Tensor]) -> _Product:
    """Products with the Jacobian of a gradient, forwards where every operator knows how, else backwards."""

    def product(z: Tensor, basis: Tensor) -> Tensor:
        try:
            return vmap(lambda v: jvp(gradient, (z,), (v,))[1])(basis)
        except (NotImplementedError, RuntimeError):
            pull = vjp(gradient, z)[1]
            return vmap(lambda v: pull(v)[0])(basis)

    return product


def _squared_jacobian_product(potential: Potential, kind: str, example: Tensor) -> _Product:
    density = potential.density
    if not isinstance(density, LogDensity) or not density.observed:
        raise ValueError(f"curvature={kind!r} needs a model with observed sites: give curvature='hessian'")
    if density._enumerated:
        raise ValueError(
            f"curvature={kind!r} needs a likelihood of its own for each data point, and sites are summed out of this "
            "one: give curvature='hessian'"
        )

    def prior_gradient(x: Tensor) -> Tensor:
        with torch.enable_grad():
            leaf = x.detach().requires_grad_(True)
            sites, log_det = _sites(density, leaf)
            terms = [_weighted(site).sum() for name, site in sites.items() if name not in density.observed]
            return torch.autograd.grad(-(torch.stack(terms).sum() + log_det), leaf)[0]

    def rows(x: Tensor, mode: Tensor) -> Tensor:
        # The mode is an input of its own: a graph does not know that a part of it shall not be differentiated.
        sites, _ = _sites(density, x)
        fixed, _ = _sites(density, mode)
        names = [name for name in sites if name in density.observed]
        if kind == "ggn":
            parts = [part for name in names for part in _whitened(name, sites[name], fixed[name], x.dtype)]
        else:
            parts = [_weighted(sites[name], root=True) for name in names]
        return torch.cat([part.reshape(-1) for part in parts]).to(x.dtype)

    try:
        with scoped_seed(0, example.device):
            prior, likelihood = trace(prior_gradient, example), trace(rows, example, example.clone())
    except CaptureError as error:
        raise ValueError(f"curvature={kind!r} needs a model that can be recorded as a graph: {error}") from error
    of_prior = _derivative(prior)

    def product(z: Tensor, basis: Tensor) -> Tensor:
        def at(x: Tensor) -> Tensor:
            return likelihood(x, z)

        pull = vjp(at, z)[1]
        return of_prior(z, basis) + vmap(lambda v: pull(jvp(at, (z,), (v,))[1])[0])(basis)

    return product


# ---------------------------------------------------------------- the model's parts
def _sites(density: LogDensity, z: Tensor) -> tuple[dict[str, Any], Tensor | float]:
    """The sites with a density at ``z``, and the sum of the log-Jacobians."""
    messenger = _Unconstrained(density.unflatten(z), {}, density.transforms)
    with scoped_model(validate=False), poutine.trace() as recorder, messenger:
        density.model(*density.args, **density.kwargs)
    sites = {
        name: site
        for name, site in recorder.trace.nodes.items()
        if site["type"] == "sample" and isinstance(site["fn"], td.Distribution) and not _without_density(site)
    }
    return sites, messenger.log_det


def _without_density(site: Any) -> bool:
    return bool(site["infer"].get("_deterministic")) or type(site["fn"]).__name__ == "_Subsample"


def _weighted(site: Any, root: bool = False) -> Tensor:
    """Scaled and masked log-probabilities, or with the roots of the scales."""
    log_prob = site["fn"].log_prob(site["value"], *site["args"], **site["kwargs"])
    scale = site["scale"] ** 0.5 if root else site["scale"]
    weighted: Tensor = scale_and_mask(log_prob, scale, site["mask"])
    return weighted


def _unwrapped(site: Any, dtype: torch.dtype) -> tuple[Any, Tensor]:
    """The family of an observed site, and the root of each element's weight in the family's batch shape."""
    fn, mask = site["fn"], site["mask"]
    batch_shape = fn.batch_shape
    while isinstance(fn, td.Independent | MaskedDistribution):
        if isinstance(fn, MaskedDistribution):
            mask = fn._mask if mask is None else mask & fn._mask
        fn = fn.base_dist
    weight = torch.ones(batch_shape, dtype=dtype, device=site["value"].device)
    weight = scale_and_mask(weight, site["scale"] ** 0.5, mask)
    wide = weight.reshape((*weight.shape, *(1,) * (len(fn.batch_shape) - weight.dim())))
    return fn, wide.expand(fn.batch_shape)


def _whitened(name: str, site: Any, at_mode: Any, dtype: torch.dtype) -> list[Tensor]:
    """B^T theta of an observed site, B at the mode; see the module's docstring."""
    fn, weight = _unwrapped(site, dtype)
    fixed, _ = _unwrapped(at_mode, dtype)
    if isinstance(fn, td.Normal):
        return [weight * fn.loc / fixed.scale, weight * 2**0.5 * fn.scale / fixed.scale]
    if isinstance(fn, td.Bernoulli):
        return [weight * (fixed.probs * (1 - fixed.probs)).sqrt() * fn.logits]
    if isinstance(fn, td.Categorical):
        centred = fn.logits - (fixed.probs * fn.logits).sum(-1, keepdim=True)
        return [weight.unsqueeze(-1) * fixed.probs.sqrt() * centred]
    if isinstance(fn, td.Poisson):
        return [weight * fn.rate / fixed.rate.sqrt()]
    if isinstance(fn, td.MultivariateNormal):
        root = fixed.scale_tril
        half = torch.linalg.solve_triangular(root, fn.covariance_matrix, upper=False)
        covariance = torch.linalg.solve_triangular(root, half.mT, upper=False)
        loc = torch.linalg.solve_triangular(root, fn.loc.unsqueeze(-1), upper=False)
        each = weight.unsqueeze(-1).unsqueeze(-1)
        return [each * loc, each * covariance / 2**0.5]
    raise ValueError(
        f"curvature='ggn' knows the likelihoods {_FAMILIES}; observed site {name!r} is {type(fn).__name__}: give "
        "curvature='hessian' or 'empirical_fisher'"
    )
