"""Many runs of one function, over seeds, splits or settings, through any ``map``."""

import reprlib
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from inference.runtime.distributed import world_size
from inference.runtime.generators import derive_seed

__all__ = ["sweep"]


def sweep(
    function: Callable[..., Any],
    configurations: Sequence[Mapping[str, Any]],
    *,
    seed: int = 0,
    map: Callable[[Callable[[Any], Any], Iterable[Any]], Iterable[Any]] | Any = None,
) -> list[Any]:
    """Call ``function(**configuration, seed=...)`` for each configuration and return the results in their order.

    Args:
        function: one run. It is called with the configuration's entries as keywords.
        configurations: keyword arguments of each run.
        seed: run i gets the keyword ``seed`` derived from this and i; a configuration that has its own keeps it.
        map: how the runs are carried out: a function like the builtin ``map``, such as the ``map`` of an executor or of
            a Dask client, or a ``joblib.Parallel``, whose backends include Dask and Ray. None: one after another.

    Raises:
        RuntimeError: a run failed; the message names its configuration, and the error itself is the cause.
        ValueError: under ``torchrun``, a ``map``: its ranks work on each run together.

    Example:
        >>> sweep(lambda scale, seed: 2 * scale, [{"scale": 1.0}, {"scale": 3.0}])
        [2.0, 6.0]
    """
    if not callable(function):
        raise TypeError(f"function must be callable, got {function!r}")
    if map is not None and not callable(map):
        raise TypeError(f"map must be callable like the builtin map, or a joblib.Parallel, got {map!r}")
    if map is not None and world_size() > 1:
        raise ValueError(f"map cannot be used under torchrun: its {world_size()} ranks work on each run together")
    jobs = []
    for index, configuration in enumerate(configurations):
        if not isinstance(configuration, Mapping):
            raise TypeError(
                f"configurations must be mappings of keyword arguments, got {configuration!r} at index {index}"
            )
        jobs.append((index, {"seed": derive_seed(seed, "sweep", index), **configuration}))
    run = _Run(function)
    joblib = sys.modules.get("joblib")  # whoever gives a Parallel has imported it
    if map is None:
        results = [run(job) for job in jobs]
    elif joblib is not None and isinstance(map, joblib.Parallel):
        results = list(map(joblib.delayed(run)(job) for job in jobs))
    else:
        results = list(map(run, jobs))
    if len(results) != len(jobs):
        raise ValueError(f"map returned {len(results)} results for {len(jobs)} configurations")
    return results


class _Run:
    """One run of a sweep; an object, so that it can be sent to another process."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function

    def __call__(self, job: tuple[int, dict[str, Any]]) -> Any:
        index, configuration = job
        try:
            return self.function(**configuration)
        except Exception as error:
            described = ", ".join(f"{name}={reprlib.repr(value)}" for name, value in configuration.items())
            raise RuntimeError(
                f"configuration {index} of the sweep ({described}) failed: {type(error).__name__}: {error}"
            ) from error
