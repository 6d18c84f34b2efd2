"""Discrete latent sites summed out of a model's joint, all of their states in parallel (Obermeyer et al., "Tensor
Variable Elimination for Plated Factor Graphs", 2019).

In a subsampled plate each row i holds a discrete variable of its own, and the batch stands for all rows:

    log p = N / B  sum_{i in batch}  log sum_{k} p(z_i = k, y_i | theta)

The plate's scale, and the user's, multiply the logarithm of a row's sum.  Within the sum they would temper the row's
posterior, and where one variable is shared by rows of which the batch holds a part, no scale makes the estimate right.
A mask leaves out what depends on the variable, whose own law sums to one with or without it.
"""

from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

from pyro import poutine
from pyro.infer import config_enumerate
from pyro.ops import packed
from pyro.ops.contract import contract_to_tensor
from pyro.poutine.enum_messenger import EnumMessenger
from pyro.poutine.messenger import Messenger
from pyro.poutine.subsample_messenger import _Subsample
from torch import Tensor

from inference._errors import DependentDataError

__all__ = ["data_points", "enumerated_trace", "log_joint", "plate_nesting", "refuse_split_sums"]

_ROUNDING = 1e-6  # of a product of scales, whose order is that of the handlers


def plate_nesting(trace: Any) -> int:
    """How deep a model's vectorised plates are nested."""
    sites = [n for n in trace.nodes.values() if n["type"] == "sample"]
    return max((-f.dim for s in sites for f in s["cond_indep_stack"] if f.vectorized), default=0)


def enumerated_trace(
    model: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any], nesting: int, given: Messenger
) -> Any:
    """A run of the model in which every discrete site that ``given`` gives no value has all of its states at once."""
    enum = EnumMessenger(first_available_dim=-1 - nesting)
    model = config_enumerate(model, default="parallel")
    with poutine.trace(graph_type="flat") as recorder, enum, given:
        model(*args, **kwargs)
    return recorder.trace


def log_joint(trace: Any) -> Tensor:
    """The log-joint with the discrete sites summed out, a scalar."""
    factors, states = _factors(trace)
    total = sum(f.scaled.sum() for f in factors if not states & set(f.value._pyro_dims))
    for group in _components(factors, states):
        total = total + group[0].scale * contract_to_tensor(_tree(group), states)
    assert isinstance(total, Tensor)
    return total


def refuse_split_sums(trace: Any) -> None:
    """See to it that a minibatch holds every row that a discrete variable is in, and that one scale is for all of it.

    Raises:
        ValueError: it holds a part of them, so that the sum over the variable's states cannot be estimated; or sites
            that share a variable have different scales, or one for each row.
    """
    factors, states = _factors(trace)
    for group in _components(factors, states):
        split = frozenset.union(*(f.subsampled for f in group)) - frozenset.intersection(*(f.subsampled for f in group))
        latent = next(f.name for f in group if f.enumerated)
        if split:
            raise ValueError(
                f"the discrete site {latent!r} is summed out, and the subsampled plate {min(split)!r} holds some of "
                "the sites that depend on it and not the others: a minibatch does not tell the sum over its states. "
                "Use the full plate, or put the site into the plate"
            )
        if any(isinstance(f.scale, Tensor) and f.scale.numel() > 1 for f in group):
            raise ValueError(
                f"the discrete site {latent!r} is summed out, and a poutine.scale of it or of what depends on it is a "
                "tensor: only a number can be one. Write the sum over its states into the model for weights of rows"
            )
        scales = {f.name: float(f.scale) for f in group}
        if max(scales.values()) - min(scales.values()) > _ROUNDING * max(scales.values()):
            raise ValueError(
                f"the discrete site {latent!r} is summed out, and it and the sites that depend on it must have one "
                f"poutine.scale, got {scales}: put all of them into it, or write the sum into the model"
            )


def data_points(trace: Any) -> dict[str, Tensor]:
    """log p(y_i | continuous latents) of every observed site that depends on a discrete site that is summed out.

    A data point is all that shares the discrete variable: of a plate within the variable's own, the sum is taken.

    Raises:
        DependentDataError: two observed sites, or all rows of one, share a variable, so that they are not independent
            given the continuous latents and have no likelihoods of their own.
    """
    factors, states = _factors(trace)
    found = {}
    for group in _components(factors, states):
        observed = [f for f in group if f.data]
        if not observed:
            continue
        latent = sorted(f.name for f in group if f.enumerated)
        root = frozenset.intersection(*(f.ordinal for f in group))
        if len(observed) > 1 or (not root and observed[0].ordinal):
            names = [f.name for f in observed]
            what = f"the observed sites {names} share" if len(names) > 1 else f"all rows of {names[0]!r} share"
            raise DependentDataError(
                f"{what} the discrete sites {latent}, which are summed out: given the other latents they are not "
                "independent and have no likelihoods of their own. to_arviz(log_likelihood=False) leaves them out"
            )
        (data,) = observed
        joint: Any = contract_to_tensor(_tree(group), states, target_ordinal=root)
        rest = [f for f in group if f is not data]
        without = contract_to_tensor(_tree(rest), states, target_ordinal=root)
        joint, without = packed.broadcast_all(joint, without)
        found[data.name] = _unpacked(joint, without, trace, root)
    return found


class _Factor(NamedTuple):
    """A site's part of the joint.

    Attributes:
        name: the site's.
        value: packed log-probabilities, masked where it is not itself enumerated, without scales.
        scaled: the same with scales.
        ordinal: symbols of the plates that it is in.
        subsampled: names of those of its plates that are subsampled.
        scale: of these plates and the user's.
        enumerated: whether its value is all states.
        data: whether it is observed, by the user and not by a handler that gives latent values.
    """

    name: str
    value: Any
    scaled: Any
    ordinal: frozenset[str]
    subsampled: frozenset[str]
    scale: Tensor | float
    enumerated: bool
    data: bool


def _factors(trace: Any) -> tuple[list[_Factor], set[str]]:
    """The joint's factors, and the symbols of the enumerated dimensions."""
    nodes = {
        n: s
        for n, s in trace.nodes.items()
        if s["type"] == "sample" and not isinstance(s["fn"], _Subsample) and not s["infer"].get("_deterministic")
    }
    trace.compute_log_prob(site_filter=lambda name, _: name in nodes)
    trace.pack_tensors()
    states = set(trace.symbol_to_dim) - set(trace.plate_to_symbol.values())
    factors = []
    for name, site in nodes.items():
        made, enumerated = site["packed"], site["infer"].get("_enumerate_dim") is not None
        scale = site["scale"]
        value = made["unscaled_log_prob"]
        factors.append(
            _Factor(
                name,
                value if enumerated else packed.scale_and_mask(value, mask=made["mask"]),
                made["log_prob"],
                frozenset(trace.plate_to_symbol[f.name] for f in site["cond_indep_stack"] if f.vectorized),
                frozenset(f.name for f in site["cond_indep_stack"] if f.size != f.full_size),
                scale.reshape(()) if isinstance(scale, Tensor) and scale.numel() == 1 else scale,
                enumerated,
                site["is_observed"] and not site["infer"].get("_given"),
            )
        )
    return factors, states


def _tree(factors: list[_Factor]) -> "OrderedDict[frozenset[str], list[Tensor]]":
    tree: OrderedDict[frozenset[str], list[Tensor]] = OrderedDict()
    for factor in factors:
        tree.setdefault(factor.ordinal, []).append(factor.value)
    return tree


def _components(factors: list[_Factor], states: set[str]) -> Iterator[list[_Factor]]:
    """Factors that are connected by enumerated dimensions, group by group."""
    left = [(f, states & set(f.value._pyro_dims)) for f in factors]
    left = [(f, dims) for f, dims in left if dims]
    while left:
        (first, dims), *left = left
        group = [first]
        while near := [(f, d) for f, d in left if d & dims]:
            group += [f for f, _ in near]
            dims = dims.union(*(d for _, d in near))
            left = [(f, d) for f, d in left if not any(f is g for g in group)]
        yield group


def _unpacked(joint: Any, without: Any, trace: Any, ordinal: frozenset[str]) -> Tensor:
    """The difference of two packed tensors over the same plates, with each plate at its own dimension."""
    places = {trace.symbol_to_dim[symbol]: symbol for symbol in ordinal}
    depth, dims = -min(places, default=0), joint._pyro_dims
    order = [places[d] for d in range(-depth, 0) if d in places and places[d] in dims]
    value: Tensor = (joint - without).permute([dims.index(symbol) for symbol in order])
    shape = [1] * depth
    for symbol, size in zip(order, value.shape, strict=True):
        shape[trace.symbol_to_dim[symbol]] = size
    return value.reshape(shape)
