"""A Pyro model with one discrete latent site as an unnormalised log-density of that site's flat value."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from pyro import poutine
from pyro.poutine.messenger import Messenger
from torch import Tensor
from torch.func import vmap

from inference.potential.log_density import _without_validation, scoped_model
from inference.runtime.generators import scoped_seed

__all__ = ["DiscreteDensity"]


class _Fix(Messenger):
    """Give the site a value, and let no distribution branch on values."""

    def __init__(self, site: str, value: Tensor) -> None:
        super().__init__()
        self.site, self.value = site, value

    def _pyro_sample(self, msg: Any) -> None:
        msg["fn"] = _without_validation(msg["fn"])
        if msg["name"] == self.site:
            msg["value"], msg["is_observed"] = self.value, True


class DiscreteDensity:
    """``log p(site = x, data)`` of a Pyro model, over rows ``(B, D)`` of the site's values in flat order.

    All rows are evaluated at once by ``vmap``; the model need not broadcast.  The sum of the joint over all values is
    the evidence of the data.

    Args:
        model: a Pyro model whose only latent site is ``site``.
        site: name of a discrete site; scalars inside a plate and vectors alike.
        args, kwargs: what the model is called with.

    Attributes:
        cardinalities: number of values of each variable ``(D,)``.

    Raises:
        ValueError: the site is missing, observed or not discrete with values 0, 1, ...; or the model has other
            latent sites.
    """

    def __init__(
        self,
        model: Callable[..., Any],
        site: str,
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> None:
        if not callable(model):
            raise TypeError(f"model must be a Pyro callable, got {type(model).__name__}")
        self.model, self.site = model, site
        self.args, self.kwargs = tuple(args), dict(kwargs or {})
        with scoped_seed(0), scoped_model(True):
            nodes = poutine.trace(model).get_trace(*self.args, **self.kwargs).nodes
        latent = [
            n
            for n, node in nodes.items()
            if node["type"] == "sample" and not node["is_observed"] and type(node["fn"]).__name__ != "_Subsample"
        ]
        if site not in latent:
            raise ValueError(f"site {site!r} is no latent site of the model; its latent sites are {latent}")
        if len(latent) > 1:
            others = [n for n in latent if n != site]
            raise ValueError(
                f"the model has the latent sites {others} beside {site!r}: condition on them, or sum them out"
            )
        fn: Any = nodes[site]["fn"]
        value: Any = nodes[site]["value"]
        while fn.event_dim:
            fn = getattr(fn, "base_dist", None)
            if fn is None:
                raise ValueError(f"site {site!r} must hold integers, each with a law of its own")
        if not fn.has_enumerate_support:
            raise ValueError(f"site {site!r} has a {type(fn).__name__}, which has no finite list of values")
        levels = fn.enumerate_support(expand=False).flatten()
        if not torch.equal(levels.long(), torch.arange(len(levels), device=levels.device)):
            raise ValueError(f"site {site!r} must hold integers 0, 1, ..., its values are {levels.tolist()}")
        self.shape, self.dtype = value.shape, value.dtype
        self.cardinalities = torch.full((math.prod(self.shape),), len(levels), device=value.device)

    def __call__(self, x: Tensor) -> Tensor:
        """``(B, D)`` to ``(B,)``."""

        def one(row: Tensor) -> Tensor:
            value = row.view(self.shape).to(self.dtype)
            traced = poutine.trace(_Fix(self.site, value)(self.model)).get_trace(*self.args, **self.kwargs)
            total = traced.log_prob_sum()
            assert isinstance(total, Tensor)
            return total

        with scoped_model(False):
            return vmap(one)(x)
