"""A discrete law over partly observed vectors, for use inside any Pyro model."""

from typing import TYPE_CHECKING, Any

import torch
from pyro.distributions import TorchDistribution
from torch import Tensor
from torch.distributions import constraints

from inference.any_order import ancestral, as_proposal, chain_rule, hide, random_ranks

if TYPE_CHECKING:
    from ppl_models.marginalization_model.core import MarginalizationNetworks

__all__ = ["MarginalizationDistribution", "all_values"]

_MOST_STATES = 1 << 20


class _PartlyObserved(constraints.Constraint):
    """Vectors of integers from 0 to ``K_j - 1``, or -1 for a missing one."""

    is_discrete = True
    event_dim = 1

    def __init__(self, cardinalities: Tensor) -> None:
        self.cardinalities = cardinalities

    def check(self, value: Tensor) -> Tensor:
        inside = (value >= -1) & (value < self.cardinalities) & (value == value.floor())
        return inside.all(-1)


def all_values(cardinalities: Tensor) -> Tensor:
    """Every complete row, ``(prod K_j, D)``; the last variable changes fastest."""
    return torch.cartesian_prod(*(torch.arange(int(k), device=cardinalities.device) for k in cardinalities)).view(
        -1, len(cardinalities)
    )


class MarginalizationDistribution(TorchDistribution):
    """What ``MarginalizationModel.distribution`` returns.

    ``log_prob`` of a vector with -1s is the log-marginal of the rest, in one network pass, with gradients to the
    networks' parameters.  ``sample`` draws by the conditionals.  The two agree as far as the model is consistent; with
    ``order``, ``log_prob`` is the chain rule along that order (D passes) and exactly the law that ``sample``
    draws complete vectors from, as a guide's should be.

    Note:
        ``dist.mask``, ``poutine.mask`` and ``obs_mask`` switch the whole vector on or off.  Single variables are
        marginalised by -1, or by ``observed``.

    Args:
        model: the model.
        context: ``(*batch, C)``, or None of a model without context; sets the batch shape.
        observed: ``(*batch, D)``, true where a variable counts; what ``log_prob`` is given elsewhere is ignored.
        order: the variables in the order of drawing ``(D,)``.
        batch_shape: without context.
        dtype: of the draws; a guide of Bernoulli sites needs ``torch.float``, as Pyro's Bernoulli takes no integers.
    """

    arg_constraints: dict[str, Any] = {}  # noqa: RUF012 - as torch has it
    has_rsample = False

    def __init__(
        self,
        model: "MarginalizationNetworks",
        context: Tensor | None = None,
        observed: Tensor | None = None,
        order: Tensor | None = None,
        batch_shape: torch.Size | tuple[int, ...] = (),
        dtype: torch.dtype = torch.long,
        validate_args: bool | None = None,
    ) -> None:
        self.model, self.context, self.observed, self.order, self.dtype = model, context, observed, order, dtype
        if context is not None:
            batch_shape = torch.broadcast_shapes(batch_shape, context.shape[:-1])
        super().__init__(torch.Size(batch_shape), torch.Size([model.num_variables]), validate_args=validate_args)

    @constraints.dependent_property(is_discrete=True, event_dim=1)
    def support(self) -> constraints.Constraint:
        """Integers below each variable's cardinality, and -1."""
        return _PartlyObserved(self.model.cardinalities)

    @property
    def has_enumerate_support(self) -> bool:  # type: ignore[override]
        """Whether there are at most 2^20 complete vectors."""
        return self.model.log_states <= torch.log(torch.tensor(_MOST_STATES + 0.5)).item()

    def enumerate_support(self, expand: bool = True) -> Tensor:
        """All complete vectors ``(S, *batch, D)``.

        Raises:
            NotImplementedError: there are more than 2^20.
        """
        if not self.has_enumerate_support:
            raise NotImplementedError("there are more than 2^20 complete vectors: they cannot be enumerated")
        values = all_values(self.model.cardinalities).to(self.dtype)
        values = values.view(-1, *(1,) * len(self.batch_shape), self.event_shape[0])
        return values.expand(-1, *self.batch_shape, -1) if expand else values

    def expand(self, batch_shape: Any, _instance: Any = None) -> "MarginalizationDistribution":
        """The same law with a larger batch shape."""
        shape = torch.Size(batch_shape)
        new = type(self).__new__(type(self)) if _instance is None else _instance
        context = None if self.context is None else self.context.expand(*shape, -1)
        observed = None if self.observed is None else self.observed.expand(*shape, -1)
        MarginalizationDistribution.__init__(new, self.model, context, observed, self.order, shape, self.dtype, False)
        new._validate_args = self._validate_args
        return new

    def log_prob(self, value: Tensor) -> Tensor:
        """``(*sample, *batch, D)`` to ``(*sample, *batch)``."""
        if self._validate_args:
            self._validate_sample(value)
        shape = torch.broadcast_shapes(value.shape[:-1], self.batch_shape)
        size = self.event_shape[0]
        values = value.long().expand(*shape, size)
        if self.observed is not None:
            values = hide(values, self.observed.expand(*shape, size))
        rows = values.reshape(-1, size)
        context = self._context(shape)
        if self.order is None:
            return self.model._log_marginal(rows, context).view(shape)
        ranks = (self._ranks(len(rows)) + size * (rows < 0)).argsort(1).argsort(1)
        return chain_rule(self.model.conditionals, rows, ranks, context)[:, -1].view(shape)

    @torch.no_grad()
    def sample(self, sample_shape: Any = ()) -> Tensor:
        """Complete vectors ``(*sample, *batch, D)``; random numbers are torch's global ones, as in Pyro."""
        shape = torch.Size(sample_shape) + self.batch_shape
        size = self.event_shape[0]
        empty = self.model.cardinalities.new_full((shape.numel(), size), -1)
        ranks = random_ranks(empty, missing_first=True) if self.order is None else self._ranks(len(empty))
        propose = as_proposal(self.model.conditionals)
        return (
            ancestral(propose, empty, ranks, self._context(shape), steps=size).values.view(*shape, size).to(self.dtype)
        )

    def _context(self, shape: torch.Size) -> Tensor | None:
        if self.context is None:
            return None
        return self.context.expand(*shape, -1).reshape(-1, self.context.shape[-1])

    def _ranks(self, rows: int) -> Tensor:
        assert self.order is not None
        return self.order.argsort().expand(rows, -1)
