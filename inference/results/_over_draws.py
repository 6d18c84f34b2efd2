"""Run a function of one posterior draw over all draws: vectorised in chunks, or one by one, with global state as it
was found.

Shared by everything that replays a model on posterior draws.  ``torch.func.vmap`` runs the model's Python once per
chunk; a chunk is as many draws as write a fixed number of bytes, and only the result and one chunk are alive at a time.
"""

import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import pyro
import torch
from pyro.poutine.subsample_messenger import SubsampleMessenger
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from inference._errors import CaptureWarning
from inference.results._draw import RowNoise, VmapSafeDraws
from inference.runtime.generators import derive_seed, reseed, scoped_seed

__all__ = ["CountBytes", "Draws", "noting", "over_draws", "scope"]

Draws = dict[str, Tensor]

# Bytes that one chunk may write (every operator's output counted, so what is alive at once is less).  On a CPU no
# single tensor then reaches the 32 MiB above which glibc maps fresh pages for every allocation, which doubled the
# time of a small network.
_CHUNK_BYTES = {"cpu": 32 * 2**20}
_CHUNK_BYTES_ACCELERATOR = 2**30
_LEAST_CHUNK_BYTES = 4 * 2**20  # less would not show beside the interpreter itself


def over_draws(
    one: Callable[[Draws], Draws],
    samples: Draws,
    num: int,
    chunk_size: int | None,
    counted: "CountBytes",
    *,
    seed: int,
    kept: int | None = None,
    stacklevel: int,
) -> Draws:
    """``one`` over all draws, vectorised in chunks, or draw by draw where ``vmap`` cannot.

    Args:
        one: values of one draw's sites -> what is wanted of that draw.
        samples: site -> ``(num, ...)``; may be empty.
        num: number of draws.
        chunk_size: draws a vectorised pass; ``None``: by the bytes that one draw wrote.
        counted: what the eager run of one draw wrote.
        seed: of what ``one`` draws; the numbers of a draw depend on the seed and its place, whatever the chunks.
        kept: bytes of one draw's result, where memory is to stay under twice that of all results.
        stacklevel: of the user's call, for the warning.
    """
    if chunk_size is None:
        budget = _CHUNK_BYTES.get(counted.device, _CHUNK_BYTES_ACCELERATOR)
        if kept is not None:
            budget = min(budget, max(_LEAST_CHUNK_BYTES, num * kept // 3))
        chunk_size = max(1, budget // max(counted.bytes, 1))

    def vectorised(lo: int, hi: int) -> Draws:
        # vmap needs a batched input even where there are no samples (prior predictive)
        part = {name: value.narrow(0, lo, hi - lo) for name, value in samples.items()}
        with VmapSafeDraws(RowNoise(seed, lo)), pyro.settings.context(**_NO_VALIDATION):
            return torch.func.vmap(lambda draws, _: one(draws), randomness="different")(
                part, torch.empty(hi - lo, device="cpu")
            )

    def single(lo: int, hi: int) -> Draws:
        reseed(derive_seed(seed, "draw", lo), counted.device)
        with noting(f"in the run of the model on draw {lo}"):
            return {
                name: value.unsqueeze(0)
                for name, value in one({name: value.select(0, lo) for name, value in samples.items()}).items()
            }

    try:
        return _collect(vectorised, num, min(chunk_size, num))
    except torch.OutOfMemoryError as error:
        error.add_note(f"a chunk of {min(chunk_size, num)} draws does not fit: give a smaller chunk_size")
        raise
    except Exception as error:
        reason = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
    warnings.warn(
        f"the model cannot be vectorised over draws and runs {num} times, slower but correct: {reason}",
        CaptureWarning,
        stacklevel=stacklevel,
    )
    return _collect(single, num, 1)


_NO_VALIDATION = {
    "validate_distributions_pyro": False,
    "validate_distributions_torch": False,
    "validate_infer": False,
    "validate_poutine": False,
}


def _collect(part: Callable[[int, int], Draws], num: int, step: int) -> Draws:
    """Fill the result part by part, so that no more than the result and one part are alive."""
    result: Draws = {}
    for lo in range(0, num, step):
        hi = min(lo + step, num)
        for name, value in part(lo, hi).items():
            if hi - lo == num:  # a copy: a site's value may be the user's own data
                result[name] = value.clone(memory_format=torch.contiguous_format)
                continue
            if lo == 0:
                result[name] = value.new_empty((num, *value.shape[1:]))
            elif value.shape[1:] != result[name].shape[1:]:
                raise ValueError(
                    f"site {name!r} has shape {tuple(value.shape[1:])} in draw {lo} and "
                    f"{tuple(result[name].shape[1:])} in the first: draws of different shapes cannot be stacked"
                )
            result[name].narrow(0, lo, hi - lo).copy_(value)
    return result


class CountBytes(TorchDispatchMode):
    """Counts the bytes that operators write while it is active, and the device they are on."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0
        self.device = "cpu"

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if not (func.is_view or func._schema.is_mutable):
            for value in tree_leaves(out):
                if isinstance(value, Tensor):
                    self.bytes += value.numel() * value.element_size()
                    self.device = value.device.type if value.device.type != "cpu" else self.device
        return out


# ---------------------------------------------------------------- scope
@contextmanager
def scope(seed: int, full_plates: bool, inputs: Any, modules: Iterable[Any]) -> Iterator[None]:
    """No gradients; random state, Pyro's parameter store and its plates are as found when the block ends."""
    store = pyro.get_param_store()
    known = set(store.keys())
    with ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        stack.enter_context(scoped_seed(seed, _accelerator(inputs, modules)))
        if full_plates:
            stack.enter_context(mock.patch.object(SubsampleMessenger, "_subsample", staticmethod(_full_plate)))
        try:
            yield
        finally:
            # a parameter that the store did not know was made by these runs, at its initial value
            for name in set(store.keys()) - known:
                del store[name]


_subsample = SubsampleMessenger._subsample


def _full_plate(
    name: str,
    size: int | None = None,
    subsample_size: int | None = None,
    subsample: Tensor | None = None,
    *args: Any,
    **kwargs: Any,
) -> Any:
    """Pyro's choice of a plate's elements, with all of them; indices that the model passes itself stay."""
    return _subsample(name, size, None if subsample is None else subsample_size, subsample, *args, **kwargs)


def _accelerator(inputs: Any, modules: Iterable[Any]) -> torch.device | None:
    """The accelerator among the tensors that a run reads, whose generator has to be scoped too."""
    tensors = [leaf for leaf in tree_leaves(inputs) if isinstance(leaf, Tensor)]
    for module in modules:
        if isinstance(module, torch.nn.Module):
            tensors += [*module.parameters(), *module.buffers()]
    tensors += [value for _, value in pyro.get_param_store().named_parameters()]
    for tensor in tensors:
        backend = getattr(torch, tensor.device.type, None)
        # a fake tensor names a device that the machine may not have
        if tensor.device.type not in ("cpu", "meta") and backend is not None and backend.is_available():
            return tensor.device
    return None


@contextmanager
def noting(where: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        error.add_note(where)
        raise
