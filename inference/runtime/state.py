"""States of kernels as flat lists of tensors, for checkpoints."""

from typing import Any

from torch import Tensor

from inference._errors import CheckpointError

__all__ = ["leaves", "restore"]


def leaves(state: Any) -> list[Tensor]:
    """The tensors of nested tuples, in order."""
    return [leaf for value in state for leaf in ([value] if isinstance(value, Tensor) else leaves(value))]


def restore(state: Any, saved: list[Tensor]) -> Any:
    """``state`` with its tensors replaced, in order, by those that were saved.

    Raises:
        CheckpointError: they are not of these shapes and dtypes.
    """
    current = leaves(state)
    if [(a.shape, a.dtype) for a in current] != [(b.shape, b.dtype) for b in saved]:
        raise CheckpointError("the checkpoint's sampler state does not fit this kernel")
    queue = [b.to(a.device) for a, b in zip(current, saved, strict=True)]

    def rebuild(part: Any) -> Any:
        return type(part)(*(queue.pop(0) if isinstance(v, Tensor) else rebuild(v) for v in part))

    return rebuild(state)
