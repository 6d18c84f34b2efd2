"""A dry run of a Pyro model: what an engine would see of it, before hours are spent.

    check_model(model, x, y)

prints the sites with their shapes, supports and plates, how a minibatch is scaled, and whether the model can be
recorded as a graph or why not.
"""

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from pyro import poutine
from pyro.poutine.subsample_messenger import _Subsample
from torch import Tensor

from inference._errors import CaptureWarning
from inference.potential.log_density import LogDensity, scoped_model
from inference.potential.potential import Potential
from inference.runtime.generators import scoped_seed

__all__ = ["ModelCheck", "PlateCheck", "SiteCheck", "check_model"]


@dataclass(frozen=True)
class SiteCheck:
    """A statement of the model.

    Attributes:
        name: the site's name.
        kind: ``"latent"``, ``"discrete latent"``, ``"observed"``, ``"factor"``, ``"deterministic"`` or ``"param"``.
        distribution: name of its law; of a parameter, empty.
        batch_shape, event_shape: as in torch's distributions; of a site without a law, its shape is ``event_shape``.
        support: where its values lie; of a parameter, its constraint.
        plates: plates that it stands in, outermost first.
        scale: what its log-density is multiplied by, such as N / B in a minibatch; NaN if its rows are weighted
            differently.
    """

    name: str
    kind: str
    distribution: str
    batch_shape: tuple[int, ...]
    event_shape: tuple[int, ...]
    support: str
    plates: tuple[str, ...]
    scale: float


@dataclass(frozen=True)
class PlateCheck:
    """A plate.

    Attributes:
        name: the plate's name.
        size: its elements, N.
        subsample_size: those that one call sees, B; N if it is whole.
        dim: the batch dimension that it takes, from the right; None of a sequential plate.
        scale: N / B, by which the log-densities inside are multiplied.
    """

    name: str
    size: int
    subsample_size: int
    dim: int | None
    scale: float


@dataclass(frozen=True)
class ModelCheck:
    """What a model looks like to an engine; printing it prints a table.

    Attributes:
        sites: its statements, in the order in which they run.
        plates: its plates.
        dim: length of the unconstrained vector that samplers move; 0 if they cannot.
        captured: whether the log-density is recorded as a graph, without Pyro in each step.
        reason: why not; empty if it is.
    """

    sites: tuple[SiteCheck, ...]
    plates: tuple[PlateCheck, ...]
    dim: int
    captured: bool
    reason: str

    def __str__(self) -> str:
        rows: list[tuple[str, ...]] = [("site", "kind", "law", "batch | event", "support", "plates", "scale")]
        for site in self.sites:
            shape = f"{_shape(site.batch_shape)} | {_shape(site.event_shape)}"
            plates, scale = ", ".join(site.plates), "by row" if math.isnan(site.scale) else f"{site.scale:g}"
            rows.append((site.name, site.kind, site.distribution, shape, site.support, plates, scale))
        lines = _table(rows)
        if self.plates:
            rows = [("plate", "size", "in one call", "dim", "scale")]
            rows += [
                (p.name, str(p.size), str(p.subsample_size), "" if p.dim is None else str(p.dim), f"{p.scale:g}")
                for p in self.plates
            ]
            lines += ["", *_table(rows)]
        verdict = f"recorded as a graph, {self.dim} unconstrained dimensions" if self.captured else self.reason
        return "\n".join([*lines, "", ("Samplers: " if self.captured else "Samplers: not recorded: ") + verdict])


def check_model(model: Callable[..., Any], *args: Any, **kwargs: Any) -> ModelCheck:
    """Run ``model(*args, **kwargs)`` once, with validation on, and print and return what engines make of it.

    Nothing global changes: random state, parameter store and validation flags are put back.

    Args:
        model: any Pyro model, one of this library or your own.
        *args, **kwargs: what it is called with.

    Raises:
        TypeError: model cannot be called.
        Exception: what the model itself raises, with a note that names the last site it came to.

    Example:
        >>> import pyro, pyro.distributions as dist
        >>> def model(y):
        ...     mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
        ...     with pyro.plate("data", len(y), subsample_size=5):
        ...         pyro.sample("y", dist.Normal(mean, 1.0), obs=y[:5])
        >>> check_model(model, torch.zeros(20)).plates[0].scale  # doctest: +ELLIPSIS
        site  kind      law ...
        4.0
    """
    if not callable(model):
        raise TypeError(f"model must be a Pyro model, a function or PyroModule, got {type(model).__name__}")
    nodes = _trace(model, args, kwargs)
    subsampled = {name: node for name, node in nodes.items() if isinstance(node.get("fn"), _Subsample)}
    found: dict[str, PlateCheck] = {}
    sites = []
    for name, node in nodes.items():
        if node["type"] not in ("sample", "param") or name in subsampled:
            continue
        for frame in node.get("cond_indep_stack", ()):
            plate = subsampled[frame.name]["fn"] if frame.name in subsampled else None
            size = frame.full_size if plate is None else plate.size
            part = frame.size if plate is None or plate.subsample_size is None else plate.subsample_size
            size = part if size is None else size
            found[frame.name] = PlateCheck(frame.name, size, part, frame.dim, size / part)
        sites.append(_site(name, node))
    dim, captured, reason = _capture(model, args, kwargs)
    check = ModelCheck(tuple(sites), tuple(found.values()), dim, captured, reason)
    print(check)
    return check


def _trace(model: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    device = next((a.device for a in (*args, *kwargs.values()) if isinstance(a, Tensor)), None)
    with scoped_seed(0, device), scoped_model(validate=True), torch.no_grad():
        recorder = poutine.trace()
        try:
            with recorder:
                model(*args, **kwargs)
            recorder.trace.compute_log_prob(site_filter=lambda _, site: not isinstance(site["fn"], _Subsample))
        except Exception as error:
            last = [n for n, node in recorder.trace.nodes.items() if node["type"] in ("sample", "param")]
            error.add_note(f"check_model: the last site that the model came to is {last[-1]!r}" if last else "")
            raise
    return dict(recorder.trace.nodes)


def _site(name: str, node: Any) -> SiteCheck:
    plates = tuple(frame.name for frame in node.get("cond_indep_stack", ()))
    if node["type"] == "param":
        constraint = _support(node["kwargs"].get("constraint"))
        return SiteCheck(name, "param", "", (), tuple(node["value"].shape), constraint, plates, 1.0)
    fn, scale = node["fn"], _scale(node["scale"])
    base, deterministic = fn, bool(node["infer"].get("_deterministic"))
    while isinstance(base, torch.distributions.Independent) or type(base).__name__ in ("MaskedDistribution", "Delta"):
        inner = getattr(base, "base_dist", None)
        if inner is None:
            break
        base = inner
    law = type(base).__name__
    if deterministic:
        kind = "deterministic"
    elif law == "Unit":
        kind = "factor"
    elif node["is_observed"]:
        kind = "observed"
    else:
        kind = "discrete latent" if fn.support.is_discrete else "latent"
    if kind in ("deterministic", "factor"):
        shape = tuple(node["value"].shape) if deterministic else tuple(fn.batch_shape)
        return SiteCheck(name, kind, "", (), shape, "", plates, scale)
    batch, event = tuple(fn.batch_shape), tuple(fn.event_shape)
    return SiteCheck(name, kind, law, batch, event, _support(fn.support), plates, scale)


def _scale(scale: Any) -> float:
    """The factor; NaN where rows have factors of their own."""
    values = torch.as_tensor(scale).detach().flatten()
    return float(values[0]) if len(values) and bool((values == values[0]).all()) else float("nan")


def _support(support: Any) -> str:
    while isinstance(support, torch.distributions.constraints.independent):
        support = support.base_constraint
    text = "" if support is None else repr(support)
    return text.removesuffix("()").lstrip("_").replace("constraints.", "")


def _capture(model: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[int, bool, str]:
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            potential = Potential(LogDensity(model, args, kwargs))
    except (ValueError, RuntimeError, NotImplementedError) as error:
        return 0, False, str(error)
    reasons = [str(w.message) for w in caught if issubclass(w.category, CaptureWarning)]
    return potential.dim, potential.captured, reasons[0] if reasons else ""


def _shape(shape: tuple[int, ...]) -> str:
    return " ".join(map(str, shape)) or "-"


def _table(rows: list[tuple[str, ...]]) -> list[str]:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return [lines[0], "  ".join("-" * width for width in widths), *lines[1:]]
