"""Hand draws to ArviZ: an ``InferenceData`` with ArviZ 0.x, a ``DataTree`` with ArviZ 1.x, the same groups in both.

The module needs NumPy and ArviZ alone, and the latter only when called.  Tensors are recognised by what they can do
(``detach``, ``cpu``, ``numpy``), so saved draws can be exported where torch is not installed.
"""

import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from importlib import metadata
from typing import Any

import numpy as np

__all__ = ["to_arviz"]

_LIBRARY = "ppl-models"

# Groups of draws (chain, draw, *shape), by the run that they come from: within one, all share chain and draw.
_RUNS = (("posterior", "posterior_predictive", "log_likelihood", "sample_stats"), ("prior", "prior_predictive"))
_DATA_GROUPS = ("observed_data", "constant_data")

# Names in use elsewhere -> ArviZ's schema (https://python.arviz.org/en/stable/schema/schema.html).
_STATISTIC_NAMES = {
    "accept_prob": "acceptance_rate",
    "divergent": "diverging",
    "log_prob": "lp",
    "num_steps": "n_steps",
}


def to_arviz(
    posterior: Mapping[str, Any] | None = None,
    *,
    posterior_predictive: Mapping[str, Any] | None = None,
    log_likelihood: Mapping[str, Any] | None = None,
    sample_stats: Mapping[str, Any] | None = None,
    prior: Mapping[str, Any] | None = None,
    prior_predictive: Mapping[str, Any] | None = None,
    observed_data: Mapping[str, Any] | None = None,
    constant_data: Mapping[str, Any] | None = None,
    dims: Mapping[str, Sequence[str]] | None = None,
    coords: Mapping[str, Any] | None = None,
    attrs: Mapping[str, Any] | None = None,
    created_at: str | None = None,
) -> Any:
    """Draws, statistics and data as one ArviZ object, ready for ``az.summary``, ``az.loo``, plots and ``to_netcdf``.

    Arrays and tensors are not copied where NumPy can share their memory.  A ``/`` in a name, as Pyro's ``scope`` puts
    there, becomes ``.``: the file formats behind ArviZ do not allow it.  Half-precision floats become float32, since
    netCDF has none.

    Args:
        posterior: site -> draws ``(chain, draw, *event)``.
        posterior_predictive: observed site -> draws ``(chain, draw, *shape)``.
        log_likelihood: observed site -> pointwise log-likelihood ``(chain, draw, *batch)``.
        sample_stats: statistic -> ``(chain, draw, ...)`` under ArviZ's names: acceptance_rate, diverging (bool),
            energy, step_size, lp, n_steps.  The names accept_prob, divergent, log_prob and num_steps are translated.
        prior: site -> draws from the prior ``(chain, draw, *event)``.
        prior_predictive: observed site -> draws ``(chain, draw, *shape)``; chain and draw as in ``prior``.
        observed_data: observed site -> data, without chain and draw.
        constant_data: name -> data that the model conditions on, such as covariates.
        dims: variable -> names of its dimensions after chain and draw.
        coords: dimension -> its labels.
        attrs: further attributes of the whole: strings, numbers, or flat sequences of either.
        created_at: a time stamp for the groups, e.g. ``datetime.now(UTC).isoformat()``.  ``None`` leaves it out, so
            that equal draws give equal objects.

    Returns:
        ``arviz.InferenceData`` (ArviZ 0.x) or ``xarray.DataTree`` (ArviZ 1.x).

    Raises:
        ImportError: ArviZ is not installed.
        TypeError: a group is not a mapping, an array is not numeric, or an attribute cannot be saved.
        ValueError: no group is given; a variable disagrees with its group about chain and draw, with ``dims`` or with
            ``coords``; two variables get the same name.
    """
    given = {
        "posterior": posterior,
        "posterior_predictive": posterior_predictive,
        "log_likelihood": log_likelihood,
        "sample_stats": sample_stats,
        "prior": prior,
        "prior_predictive": prior_predictive,
        "observed_data": observed_data,
        "constant_data": constant_data,
    }
    for what, value in (("dims", dims), ("coords", coords), ("attrs", attrs)):
        if value is not None and not isinstance(value, Mapping):
            raise TypeError(f"{what} must be a mapping from names, got {type(value).__name__}")
    groups = {group: _arrays(group, variables) for group, variables in given.items() if variables is not None}
    groups = {group: variables for group, variables in groups.items() if variables}
    if not groups:
        raise ValueError(f"nothing to export: give at least one variable in one of {', '.join(given)}")
    for run in _RUNS:
        _check_draws({group: groups[group] for group in run if group in groups})
    names = {_clean(name): [_clean(dim) for dim in labels] for name, labels in (dims or {}).items()}
    labels = {_clean(dim): np.asarray(values) for dim, values in (coords or {}).items()}
    _check_dims(groups, names, labels)
    library = {"inference_library": _LIBRARY, **_version()}
    return _build(groups, names, labels, {**library, **_check_attrs(attrs)}, library, created_at)


def _build(
    groups: dict[str, dict[str, np.ndarray]],
    dims: dict[str, list[str]],
    coords: dict[str, np.ndarray],
    attrs: dict[str, Any],
    group_attrs: dict[str, Any],
    created_at: str | None,
) -> Any:
    """The one place that knows ArviZ's versions."""
    try:
        import arviz
    except ImportError as error:
        raise ImportError("to_arviz needs ArviZ: pip install arviz") from error
    if int(arviz.__version__.split(".")[0]) >= 1:
        # ArviZ doubts more chains than draws, which is a normal run on an accelerator; shapes are checked above.
        result = arviz.from_dict(groups, dims=dims, coords=coords, check_conventions=False)
    else:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="More chains", category=UserWarning)
            keywords: dict[str, Any] = {**groups, "dims": dims, "coords": coords}
            result = arviz.from_dict(**keywords)
    result.attrs = dict(attrs)
    for group in groups:
        node = result[group]
        node.attrs.pop("created_at", None)
        node.attrs.update(group_attrs if created_at is None else {**group_attrs, "created_at": created_at})
    return result


def _arrays(group: str, variables: Mapping[str, Any]) -> dict[str, np.ndarray]:
    if not isinstance(variables, Mapping):
        raise TypeError(f"{group} must be a mapping from names to arrays, got {type(variables).__name__}")
    arrays: dict[str, np.ndarray] = {}
    for original, values in variables.items():
        name = _clean(original)
        if group == "sample_stats":
            name = _STATISTIC_NAMES.get(name, name)
        if name in arrays:
            raise ValueError(f"{group} has two variables that would be called {name!r}; {original!r} is the second one")
        arrays[name] = _array(values, f"{group}[{original!r}]")
        if group == "sample_stats" and name == "diverging":
            arrays[name] = arrays[name].astype(bool)
    return arrays


def _array(values: Any, what: str) -> np.ndarray:
    if hasattr(values, "detach"):
        values = values.detach().cpu()
        if str(values.dtype) == "torch.bfloat16":  # NumPy has no such type
            values = values.float()
        values = values.numpy()
    array = np.asarray(values)
    if array.dtype.kind not in "biufUSMm":
        raise TypeError(f"{what} must hold real numbers, booleans, strings or times, got dtype {array.dtype}")
    if array.dtype == np.float16:
        array = array.astype(np.float32)
    return np.atleast_1d(array)


def _check_draws(groups: dict[str, dict[str, np.ndarray]]) -> None:
    """All arrays of one run share (chain, draw); those off differ from the most common pair."""
    arrays = [(group, name, array) for group, variables in groups.items() for name, array in variables.items()]
    shapes = {f"{group}[{name!r}]": array.shape for group, name, array in arrays}
    for what, shape in shapes.items():
        if len(shape) < 2:
            raise ValueError(f"{what} must be (chain, draw, ...), got shape {shape}; array[None] makes one chain of it")
    if not shapes:
        return
    counts = Counter(shape[:2] for shape in shapes.values())
    expected = counts.most_common(1)[0][0]
    wrong = [f"{what} has {shape[:2]}" for what, shape in shapes.items() if shape[:2] != expected]
    if wrong:
        holders = [what for what, shape in shapes.items() if shape[:2] == expected]
        raise ValueError(f"(chain, draw) must agree: {'; '.join(wrong)}, but {holders[0]} has {expected}")
    if 0 in expected:
        raise ValueError(f"there must be at least one chain and one draw, got (chain, draw) = {expected}")


def _check_dims(
    groups: dict[str, dict[str, np.ndarray]], dims: dict[str, list[str]], coords: dict[str, np.ndarray]
) -> None:
    known = {name for variables in groups.values() for name in variables}
    unknown = sorted(set(dims) - known)
    if unknown:
        raise ValueError(
            f"dims names {', '.join(map(repr, unknown))}, but the variables are {', '.join(sorted(known))}"
        )
    for dim, values in coords.items():
        if values.ndim != 1:
            raise ValueError(f"coords[{dim!r}] must be a flat sequence of labels, got shape {values.shape}")
    for group, variables in groups.items():
        for name, array in variables.items():
            shape = array.shape if group in _DATA_GROUPS else array.shape[2:]
            _check_variable(f"{group}[{name!r}]", name, shape, dims.get(name), coords, group == "log_likelihood")


def _check_variable(
    what: str,
    name: str,
    shape: tuple[int, ...],
    dims: list[str] | None,
    coords: dict[str, np.ndarray],
    may_be_shorter: bool,
) -> None:
    if dims is None:
        return
    # A multivariate observation has one log-likelihood, so there the last dimensions of the data are missing.
    if len(dims) != len(shape) and not (may_be_shorter and len(dims) > len(shape)):
        raise ValueError(f"dims[{name!r}] = {dims} names {len(dims)} dimensions, but {what} has {len(shape)}: {shape}")
    if name in dims or {"chain", "draw"} & set(dims) or len(set(dims)) < len(dims):
        raise ValueError(
            f"dims[{name!r}] = {dims}: names must differ from each other, from {name!r}, 'chain' and 'draw'"
        )
    for dim, size in zip(dims, shape, strict=False):
        if dim in coords and len(coords[dim]) != size and not may_be_shorter:
            raise ValueError(f"coords[{dim!r}] has {len(coords[dim])} labels, but {what} has size {size} there")


def _check_attrs(attrs: Mapping[str, Any] | None) -> dict[str, Any]:
    """Attributes that netCDF can hold, which has neither booleans nor nested values."""
    checked = dict(attrs or {})
    for key, value in checked.items():
        array = np.asarray(value)
        if array.dtype.kind not in "iufU" or array.ndim > 1:
            raise TypeError(f"attrs[{key!r}] must be a string, a number or a flat sequence of them, got {value!r}")
    return checked


def _clean(name: str) -> str:
    return name.replace("/", ".")


def _version() -> dict[str, str]:
    try:
        return {"inference_library_version": metadata.version(_LIBRARY)}
    except metadata.PackageNotFoundError:  # the file was loaded on its own
        return {}
