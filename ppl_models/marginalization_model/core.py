"""The two networks of a marginalization model, its Pyro model, its checks at the door and its file."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar

import pyro
import torch
from torch import Tensor

from inference.any_order import MISSING
from inference.citation import Paper
from inference.runtime.generators import scoped_seed
from ppl_models.base import Model, Standardiser, check_count, check_counts, to_tensor
from ppl_models.marginalization_model.causal import CausalMarginals
from ppl_models.marginalization_model.distribution import MarginalizationDistribution
from ppl_models.marginalization_model.networks import BODIES, BodySpec, ConditionalNetwork, MarginalNetwork, build_body

__all__ = ["MarginalizationNetworks"]

_MARGINALS = ("trunk", "separate", "shared", "causal")
_NARROWER, _SHALLOW = 2, 2  # layers that every step of the causal law goes through: half as wide, two at the most
_VALUES_AT_ONCE = 1 << 24  # hidden values held at once: 64 MiB in float32


class MarginalizationNetworks(Model):
    """Networks, Pyro model and file; see ``MarginalizationModel``, which adds the fits and the queries."""

    papers: ClassVar[tuple[Paper, ...]] = (
        Paper(
            "inproceedings",
            "liu2024generative",
            author="Liu, Sulin and Ramadge, Peter J. and Adams, Ryan P.",
            title="Generative Marginalization Models",
            booktitle="International Conference on Machine Learning",
            year=2024,
        ),
    )

    kind: ClassVar[str] = "MarginalizationModel"
    cardinalities: Tensor
    _level: float = 0.0  # what f lacks to the density that it was fitted to, everywhere

    def __init__(
        self,
        cardinalities: Sequence[int] | Tensor,
        network: str = "mlp",
        context_features: int = 0,
        *,
        marginal: str = "trunk",
        hidden: int = 256,
        depth: int = 3,
        dropout: float = 0.1,
        num_heads: int = 4,
        shape: tuple[int, int] | None = None,
        classes: int = 64,
        seed: int = 0,
    ) -> None:
        super().__init__()
        plain = cardinalities.tolist() if isinstance(cardinalities, Tensor) else cardinalities
        counts = list(check_counts("cardinalities", plain))
        if not counts:
            raise ValueError("cardinalities is empty: give the number of values of each variable")
        if network not in BODIES:
            raise ValueError(f"network must be one of {tuple(BODIES)}, got {network!r}")
        if marginal not in _MARGINALS:
            raise ValueError(f"marginal must be one of {_MARGINALS}, got {marginal!r}")
        if isinstance(dropout, bool) or not isinstance(dropout, int | float) or not 0 <= dropout < 1:
            raise ValueError(f"dropout must be at least 0 and below 1, got {dropout!r}")
        check_count("hidden", hidden)
        check_count("depth", depth)
        check_count("num_heads", num_heads)
        check_count("classes", classes)
        context_features = check_count("context_features", context_features, 0)
        if network in ("transformer", "unet") and hidden % num_heads:
            raise ValueError(f"hidden must be a multiple of num_heads, got {hidden} and {num_heads}")
        if shape is not None and network not in ("unet", "lattice"):
            raise ValueError(f"shape is for the networks 'unet' and 'lattice', and network is {network!r}")
        sides = None if shape is None else check_counts("shape", shape)
        self._config: dict[str, Any] = {
            "cardinalities": counts,
            "network": network,
            "context_features": context_features,
            "marginal": marginal,
            "hidden": hidden,
            "depth": depth,
            "dropout": float(dropout),
            "num_heads": num_heads,
            "shape": None if sides is None else list(sides),
            "classes": classes,
            "seed": seed,
        }
        self.context_features, self._width = context_features, hidden
        self.register_buffer("cardinalities", torch.tensor(counts), persistent=False)
        self.log_states = float(sum(math.log(k) for k in counts))
        sides = _sides(sides, len(counts)) if network in ("unet", "lattice") else (0, 0)
        spec = BodySpec(
            len(counts), max(counts), hidden, depth, float(dropout), context_features, num_heads=num_heads, shape=sides
        )
        self.context_units = Standardiser(context_features) if context_features else None
        with scoped_seed(seed):
            trunk = build_body(network, spec)
            self.conditionals = ConditionalNetwork(trunk, counts)
            reads = marginal != "separate"
            # f is a regression on as many rows as are drawn: no dropout
            spec = replace(spec, extra=hidden * reads, dropout=0.0)
            own = None if marginal == "shared" else build_body(network, spec)
            self.marginals = MarginalNetwork(own, trunk if reads else None, counts, classes, hidden)
            if marginal == "causal":
                size = max(1, hidden // _NARROWER), min(depth, _SHALLOW)
                self.marginals.causal = CausalMarginals(self.marginals.base, *size, context_features)
        self.eval()

    def config(self) -> dict[str, Any]:
        """The constructor's arguments."""
        return self._config

    @property
    def num_variables(self) -> int:
        """Number of variables D."""
        return len(self.cardinalities)

    # ------------------------------------------------------------------ the Pyro model
    def forward(self, x: Tensor | None = None, context: Tensor | None = None, num_rows: int = 1) -> Tensor:
        """The Pyro model: rows ``x`` in the plate ``rows``, observed if given (-1 is missing), else drawn.

        Args:
            x: ``(N, D)``.
            context: ``(N, C)``.
            num_rows: N, where neither is given.
        """
        rows = next((len(part) for part in (x, context) if part is not None), num_rows)
        with pyro.plate("rows", rows):
            return pyro.sample("x", self.distribution(context), obs=x)

    def distribution(
        self,
        context: Any = None,
        *,
        observed: Tensor | None = None,
        order: Sequence[int] | Tensor | None = None,
        dtype: torch.dtype = torch.long,
    ) -> MarginalizationDistribution:
        """The law as a Pyro distribution with event shape ``(D,)``: a likelihood, a prior factor, a guide.

        Args:
            context: ``(*batch, C)``, of a model with context.
            observed: ``(*batch, D)``, true where a variable counts; all by default (and -1 is missing in any case).
            order: draw, and evaluate, by the chain rule along this order of the variables: exact, D passes.
            dtype: of the draws; ``torch.float`` for a guide of Bernoulli sites.

        Raises:
            TypeError, ValueError: context or order does not fit.
        """
        if self.context_features:
            if context is None:
                raise ValueError(f"context is needed: (*batch, {self.context_features})")
            context = to_tensor("context", context).to(self._weight)
            if context.shape[-1] != self.context_features:
                raise ValueError(
                    f"context must have {self.context_features} features (last dimension), got {tuple(context.shape)}"
                )
            context = self._in_own_units(context)
        elif context is not None:
            raise ValueError("context was given and the model has none: set context_features")
        shape = torch.Size() if observed is None else observed.shape[:-1]
        return MarginalizationDistribution(self, context, observed, self._check_order(order), shape, dtype)

    def _log_marginal(self, values: Tensor, context: Tensor | None) -> Tensor:
        """``f(x_S) - f(nothing)`` of rows ``(B, D)``, in one call of the network, with gradients; 0 if all is missing.

        After a fit to data f is 0 there by structure; of an energy the row of nothing travels along.
        """
        if self.marginals.kind == "data":
            return self.marginals(values, context)
        f = self.marginals(torch.cat([values, torch.full_like(values[:1], -1)]), context)
        nothing = (values < 0).all(1)
        return torch.where(nothing, torch.zeros_like(f[:-1]), f[:-1] - f[-1])

    # ------------------------------------------------------------------ checks
    @property
    def _weight(self) -> Tensor:
        """A parameter, whose device and dtype are the model's."""
        return next(self.conditionals.parameters())

    def _check_values(self, name: str, x: Any, missing: bool = True) -> Tensor:
        """``x`` as integers ``(N, D)`` on the model's device.

        Raises:
            TypeError, ValueError: not integers, out of range, or of another shape; a missing value where none may be.
        """
        try:
            raw = to_tensor(name, x)
        except ValueError as error:
            if "finite" not in str(error):
                raise
            raise ValueError(f"{name} holds NaN or infinite values: a missing value is -1") from error
        if raw.ndim != 2 or raw.shape[1] != self.num_variables:
            raise ValueError(f"{name} must have shape (N, {self.num_variables}), got {tuple(raw.shape)}")
        values = raw.long().to(self._weight.device)
        if raw.dtype.is_complex or (raw.is_floating_point() and bool((raw != raw.long()).any())):
            raise ValueError(f"{name} must hold integers (-1 where missing), got fractions")
        bad = (values < (MISSING if missing else 0)) | (values >= self.cardinalities)
        if bool(bad.any()):
            row, column = (int(i) for i in bad.nonzero()[0])
            allowed = f"0 to {int(self.cardinalities[column]) - 1}" + (", or -1 for missing" if missing else "")
            advice = "" if missing else " (missing values are not allowed here: impute them first)"
            raise ValueError(
                f"{name} is out of range at row {row}, column {column}: {int(values[row, column])}; "
                f"this variable takes {allowed}{advice}"
            )
        return values

    def _in_own_units(self, context: Tensor | None) -> Tensor | None:
        """A context as the networks take it: standardised as the first fit's was."""
        return context if context is None or self.context_units is None else self.context_units(context)

    def _learn_context(self, context: Tensor | None) -> None:
        """The units of contexts ``(N, C)``; those of a model that was fitted before stay as they are."""
        units = self.context_units
        if context is not None and units is not None and bool(((units.shift == 0) & (units.scale == 1)).all()):
            units.learn(context)

    def _check_context(self, context: Any, rows: int, name: str = "context") -> Tensor | None:
        """A context ``(rows, C)`` as the networks take it."""
        return self._in_own_units(self._raw_context(context, rows, name))

    def _raw_context(self, context: Any, rows: int, name: str = "context") -> Tensor | None:
        if context is None:
            if self.context_features:
                raise ValueError(f"{name} is needed: shape (N, {self.context_features})")
            return None
        if not self.context_features:
            raise ValueError(f"{name} was given and the model has none: set context_features")
        c = to_tensor(name, context).to(self._weight)
        if c.shape != (rows, self.context_features):
            raise ValueError(f"{name} must have shape ({rows}, {self.context_features}), got {tuple(c.shape)}")
        return c

    def _check_mask(self, name: str, mask: Any, like: Tensor) -> Tensor:
        m = to_tensor(name, mask)
        if m.dtype != torch.bool and not bool(((m == 0) | (m == 1)).all()):
            raise ValueError(f"{name} must be a mask of true and false")
        if m.shape not in (like.shape, like.shape[1:]):
            raise ValueError(f"{name} must have shape {tuple(like.shape)}, got {tuple(m.shape)}")
        return m.to(like.device, torch.bool).expand_as(like)

    def _check_order(self, order: Any) -> Tensor | None:
        if order is None:
            return None
        found = to_tensor("order", order).tolist() if not isinstance(order, list | tuple | range) else list(order)
        if not isinstance(found, list) or sorted(found) != list(range(self.num_variables)):
            raise ValueError(f"order must hold each of 0 to {self.num_variables - 1} once, got {found}")
        return torch.tensor([int(j) for j in found], device=self._weight.device)

    def _in_chunks(self, function: Callable[..., Any], *parts: Tensor | None) -> Any:
        """``function`` of rows, a tensor or several, in chunks that fit into memory."""
        first = next(part for part in parts if part is not None)
        per_variable = self._config["network"] != "mlp" or self.marginals.normalised
        width = max(self._width, self._config["classes"]) * (4 * self.num_variables if per_variable else 1)
        size = max(1, _VALUES_AT_ONCE // width)
        if len(first) <= size:
            return function(*parts)
        chunks = range(0, len(first), size)
        found = [function(*(None if p is None else p[i : i + size] for p in parts)) for i in chunks]
        if isinstance(found[0], Tensor):
            return torch.cat(found)
        return tuple(torch.cat(column) for column in zip(*found, strict=True))

    # ------------------------------------------------------------------ files
    def _extra_state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        tensors, causal = self.marginals.pairwise.terms(), self.marginals.causal
        if causal is not None and causal.small is not None:
            tensors["small"] = causal.small
        return tensors, {"kind": self.marginals.kind, "level": self._level}

    def _restore_extra(self, tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> None:
        if meta["kind"] not in ("data", "pairwise", "energy", "none"):
            raise ValueError(f"unknown kind {meta['kind']!r}")
        self.marginals.kind, self._level = meta["kind"], float(meta.get("level", 0.0))
        terms = dict(tensors)
        small = terms.pop("small", None)
        self.marginals.pairwise.set_terms(**terms)
        if self.marginals.causal is not None and small is not None:
            self.marginals.causal.small = small.to(self._weight)


def _sides(sides: tuple[int, ...] | None, size: int) -> tuple[int, int]:
    height, width = (math.isqrt(size),) * 2 if sides is None else sides if len(sides) == 2 else (0, 0)
    if height * width != size or min(height, width) < 3:
        given = sides or (height, width)
        raise ValueError(f"shape must be (height, width) of the {size} variables, at least 3 each, got {given}")
    return height, width
