"""The likelihood of each data point under a posterior draw that lacks the discrete sites: they are summed out."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from pyro.poutine.messenger import Messenger
from pyro.poutine.subsample_messenger import _Subsample
from torch import Tensor

from inference.potential.enumeration import data_points, enumerated_trace
from inference.potential.graph import CaptureError, trace
from inference.potential.log_density import _without_validation, scoped_model
from inference.results._over_draws import Draws

__all__ = ["MarginalLikelihood"]


class MarginalLikelihood:
    """A function from one draw of the continuous latent sites to the log-likelihood of every data point.

    The enumeration is recorded as a graph, since Pyro's handlers for it do not run under ``vmap``.

    Args:
        model, args, kwargs: the model and what it is called with.
        nesting: how deep its vectorised plates are nested.
        observed: the sites wanted.
        plain: the likelihood of a site that depends on no discrete one.
        first: a draw, site by site.

    Raises:
        ValueError: the data points of a site are not independent given the continuous latents.
    """

    def __init__(
        self,
        model: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        nesting: int,
        observed: Sequence[str],
        plain: Callable[[Any], Tensor],
        first: Draws,
    ) -> None:
        self._run = model, args, kwargs, nesting
        self._observed, self._plain, self._names = observed, plain, list(first)
        values = list(first.values())
        self._points = self._direct
        self._direct(*values)
        try:
            self._points = trace(self._direct, *values)
        except CaptureError:
            return  # draw by draw, as the caller will find out and say

    def __call__(self, draws: Draws) -> Draws:
        """Observed site -> ``(*batch_shape)`` at one draw."""
        return dict(zip(self._observed, self._points(*(draws[n] for n in self._names)), strict=True))

    def _direct(self, *values: Tensor) -> list[Tensor]:
        given = _Latents(dict(zip(self._names, values, strict=True)))
        with scoped_model(validate=False):
            recorded = enumerated_trace(*self._run, given)
            found = data_points(recorded)
        return [found[n] if n in found else self._plain(recorded.nodes[n]) for n in self._observed]


class _Latents(Messenger):
    """Continuous latent sites at a draw's values, in a form that enumeration leaves alone."""

    def __init__(self, values: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.values = values

    def _pyro_sample(self, msg: Any) -> None:
        if isinstance(msg["fn"], _Subsample):
            return
        msg["fn"] = _without_validation(msg["fn"])
        if msg["name"] in self.values and not msg["is_observed"]:
            msg["value"], msg["is_observed"] = self.values[msg["name"]], True
            msg["infer"] = {**msg["infer"], "_given": True}
