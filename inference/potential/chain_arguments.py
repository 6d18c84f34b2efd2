"""Arguments of a model of which some differ between chains: every chain then has its own data and its own posterior.

``in_dims`` says which, as in ``torch.func.vmap``: an entry per positional argument, 0 for a tensor whose leading
dimension is the chain, ``None`` for what all chains share.  The model itself is written for one data set.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

__all__ = ["ChainArguments", "InDims"]

InDims = Sequence[int | Mapping[str, int | None] | None] | Mapping[str, int | None] | None


class ChainArguments:
    """``args`` and ``kwargs`` of a model, and which of them hold a row a chain.

    Args:
        args, kwargs: what ``run`` was called with.
        in_dims: one entry, 0 or ``None``, per positional argument; for keyword arguments a dict from names to 0 or
            ``None``, alone or as the last entry.  ``None``: all chains share everything.

    Attributes:
        tensors: the arguments that differ, each ``(chain, ...)``; empty if there are none.

    Raises:
        TypeError: an entry of ``in_dims`` is not 0, ``None`` or a dict; an argument that should differ is no tensor.
        ValueError: the entries do not match the arguments; the tensors disagree in their number of chains.
    """

    def __init__(self, args: tuple[Any, ...], kwargs: Mapping[str, Any], in_dims: InDims = None) -> None:
        self.args, self.kwargs = tuple(args), dict(kwargs)
        entries = _entries(in_dims, self.args, self.kwargs)
        for name, dim in entries.items():
            if isinstance(dim, bool) or dim not in (0, None):
                raise TypeError(f"in_dims must hold 0 or None for argument {name!r}, got {dim!r}")
        self._slots = [name for name, dim in entries.items() if dim == 0]
        self.tensors: tuple[Tensor, ...] = tuple(self._checked(name) for name in self._slots)
        sizes = {name: len(t) for name, t in zip(self._slots, self.tensors, strict=True)}
        if len(set(sizes.values())) > 1:
            raise ValueError(f"arguments disagree in their number of chains, the leading dimension: {sizes}")

    @property
    def num_chains(self) -> int | None:
        """Number of rows of the arguments that differ; ``None`` if none does."""
        return len(self.tensors[0]) if self.tensors else None

    def row(self, chain: int | Tensor) -> tuple[Tensor, ...]:
        """The differing arguments of one chain; its index may be a 0-dim tensor, batched by ``vmap``."""
        if isinstance(chain, Tensor):
            return tuple(t.index_select(0, chain.reshape(1)).squeeze(0) for t in self.tensors)
        return tuple(t[chain] for t in self.tensors)

    def filled(self, row: Sequence[Tensor]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Positional and keyword arguments of one chain, given its ``row``."""
        args, kwargs = list(self.args), dict(self.kwargs)
        for slot, value in zip(self._slots, row, strict=True):
            if isinstance(slot, int):
                args[slot] = value
            else:
                kwargs[slot] = value
        return tuple(args), kwargs

    def _checked(self, slot: int | str) -> Tensor:
        value = self.args[slot] if isinstance(slot, int) else self.kwargs[slot]
        if not isinstance(value, Tensor):
            raise TypeError(f"in_dims has 0 for argument {slot!r}, which must be a tensor, got {type(value).__name__}")
        if value.dim() == 0 or len(value) == 0:
            raise ValueError(
                f"in_dims has 0 for argument {slot!r}, whose leading dimension must be the chain; "
                f"its shape is {tuple(value.shape)}"
            )
        return value


def _entries(in_dims: InDims, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[int | str, Any]:
    if in_dims is None:
        return {}
    if not isinstance(in_dims, Mapping | list | tuple):
        raise TypeError(
            f"in_dims must be a tuple of 0 and None, a dict for keyword arguments, or both, got {in_dims!r}"
        )
    positional = [] if isinstance(in_dims, Mapping) else list(in_dims)
    named: Any = in_dims if isinstance(in_dims, Mapping) else {}
    if positional and isinstance(positional[-1], Mapping):
        named = positional.pop()
    if positional and len(positional) != len(args):
        raise ValueError(
            f"in_dims has {len(positional)} entries for positional arguments, and run was called with {len(args)}"
        )
    unknown = sorted(set(named) - set(kwargs))
    if unknown:
        raise ValueError(f"in_dims names keyword arguments {unknown}; run was called with {sorted(kwargs)}")
    return {**dict(enumerate(positional)), **named}
