"""Segments of a long solve whose inner states are made again in the backward pass.

``torch.utils.checkpoint`` frees a segment's tensors but keeps the nodes of its graph, some tens of kilobytes a step, so
that memory goes on growing with the number of steps.  Here a segment is one node: it runs without a graph, and its
backward pass runs it again with one.  What a segment reads besides its inputs (weights of networks, tensors that a
drift closes over) is found by watching the first run.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

__all__ = ["run_segment"]


def run_segment(function: Callable[..., Sequence[Tensor]], *inputs: Tensor) -> tuple[Tensor, ...]:
    """``function(*inputs)``, whose graph is made in the backward pass only; no second derivatives.

    Raises:
        RuntimeError: in the backward pass, where the function reaches a tensor with gradient in a way that can't be
            watched (as the argument of a custom ``autograd.Function``).
    """
    watch = _Watch()
    with torch.no_grad(), watch:
        outputs = function(*inputs)
    outside = [t for t in watch.found.values() if all(t is not own for own in inputs)]
    # Each its own tensor: an output that is given twice would be one node's output twice.
    made: tuple[Tensor, ...] = _Segment.apply(function, [t.clone() for t in outputs], len(inputs), *inputs, *outside)
    return made


class _Watch(TorchFunctionMode):
    """Notes the tensors with gradient that are used and were not made while watching."""

    def __init__(self) -> None:
        super().__init__()
        self.found: dict[int, Tensor] = {}
        self._made: dict[int, Tensor] = {}  # by code that turns gradients on for itself

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        for value in _tensors((args, tuple(kwargs.values()))):
            if value.requires_grad and id(value) not in self._made:
                self.found[id(value)] = value
        out = func(*args, **kwargs)
        for value in _tensors((out,)):
            if value.requires_grad and id(value) not in self.found:
                self._made[id(value)] = value
        return out


class _Replace(TorchFunctionMode):
    """Puts others in the place of some tensors."""

    def __init__(self, others: dict[int, Tensor]) -> None:
        super().__init__()
        self.others = others
        self.leaves: list[Tensor] = []  # made by code that differentiates for itself

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        others = self.others
        kwargs = {name: _replaced(value, others) for name, value in kwargs.items()} if kwargs else {}
        out = func(*[_replaced(value, others) for value in args], **kwargs)
        if isinstance(out, Tensor) and out.requires_grad and out.is_leaf:
            self.leaves.append(out)
        return out


def _tensors(values: Any) -> list[Tensor]:
    found: list[Tensor] = []
    for value in values:
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, tuple | list):
            found += _tensors(value)
    return found


def _replaced(value: Any, others: dict[int, Tensor]) -> Any:
    if isinstance(value, Tensor):
        return others.get(id(value), value)
    if type(value) in (tuple, list):
        return type(value)(_replaced(part, others) for part in value)
    return value


class _Segment(torch.autograd.Function):
    """Outputs that were computed already, and how they come from inputs and from what else was read."""

    @staticmethod
    def forward(ctx: Any, function: Any, outputs: list[Tensor], count: int, *given: Tensor) -> tuple[Tensor, ...]:
        ctx.function, ctx.count = function, count
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*given)
        return tuple(outputs)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor | None) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise RuntimeError("a solve in segments has no second derivatives: leave checkpoint_segments out")
        given = ctx.saved_tensors
        fresh = [t.detach().requires_grad_(t.requires_grad) for t in given]
        others = {id(t): new for t, new in zip(given[ctx.count :], fresh[ctx.count :], strict=True)}
        with torch.enable_grad(), _Replace(others) as replace:
            outputs = ctx.function(*fresh[: ctx.count])
        pairs = [(out, g) for out, g in zip(outputs, cotangents, strict=True) if g is not None and out.requires_grad]
        wanted = [t for t, needed in zip(fresh, ctx.needs_input_grad[3:], strict=True) if needed]
        if not pairs or not wanted:
            return None, None, None, *[None] * len(fresh)
        _check_leaves([out for out, _ in pairs], [*fresh, *replace.leaves])
        found = iter(torch.autograd.grad([o for o, _ in pairs], wanted, [g for _, g in pairs], allow_unused=True))
        return None, None, None, *[next(found) if needed else None for needed in ctx.needs_input_grad[3:]]


def _check_leaves(outputs: Sequence[Tensor], known: Sequence[Tensor]) -> None:
    """Raise where the graph reaches a leaf that is none of ``known``."""
    own = {id(t) for t in known}
    todo: list[Any] = [out.grad_fn for out in outputs]
    seen = set(todo)
    while todo:
        node = todo.pop()
        variable = getattr(node, "variable", None)
        if variable is not None and id(variable) not in own:
            raise RuntimeError(
                f"a solve in segments reaches a tensor of shape {tuple(variable.shape)} with gradient in a way that "
                "can't be watched, such as the argument of a custom autograd.Function: use it in an operation of "
                "torch first (t.view_as(t)), or leave checkpoint_segments out"
            )
        for following, _ in node.next_functions:
            if following is not None and following not in seen:
                seen.add(following)
                todo.append(following)
