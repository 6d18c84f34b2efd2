"""Writes into parts of a tensor as operations that ``vmap`` knows and the compiler sees through.

A model that fills a tensor element by element (``err[t] = ...``) leaves a graph of ``select_scatter`` and, in its
gradient, of ``as_strided`` views of whole tensors: autograd cuts the gradient of a part out of memory.  ``vmap`` has no
rule for these and a loop for ``copy``.  Here a strided view of a contiguous tensor becomes a selection from its
flattened elements; what is read where it was written is the value that was written; and a tensor of which all parts
have been written is their stack, so that a loop costs what the same loop costs with a list and ``torch.stack``.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx

__all__ = ["parts_by_index"]

_aten = torch.ops.aten


def parts_by_index(root: torch.nn.Module, graph: fx.Graph) -> None:
    """Rewrite a graph without writes in place, whose nodes' ``meta["val"]`` holds what they were; ``root`` takes the
    constants that this needs.
    """
    for node in list(graph.nodes):
        if node.target is _aten.as_strided.default and _is_plain(node.args[0]):
            _rewrite(node, lambda n, call: _strided(root, n, call))
        elif node.target is _aten.as_strided_scatter.default and _is_plain(node.args[0]):
            _rewrite(node, lambda n, call: _strided_scatter(root, n, call))
        elif node.target is _aten.slice_scatter.default:
            _rewrite(node, lambda n, call: _slice_scatter(root, n, call))
        elif node.target is _aten.index_put.default and _is_fill_by_mask(node):
            _rewrite(node, _filled_by_mask)
    for node in list(graph.nodes):  # not sooner, and no view later: the value may lie otherwise in memory than its copy
        if node.target in (_aten.copy.default, _aten.fill.Tensor):
            _rewrite(node, _copied)
        elif node.target is _aten.clone.default:
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)
        elif node.target is _aten.view.default:
            node.target = _aten.reshape.default
    for node in list(graph.nodes):
        if node.target is _aten.select.int:
            _read_what_was_written(node)
        elif node.target is _aten.select_scatter.default:
            _forget_what_is_overwritten(node)
    graph.eliminate_dead_code()
    for node in list(graph.nodes):
        if node.target is _aten.select_scatter.default:
            _stack(node)
    graph.eliminate_dead_code()


_Call = Callable[..., Any]


def _rewrite(node: fx.Node, build: Callable[[fx.Node, _Call], fx.Node]) -> None:
    def call(target: Any, *args: Any) -> fx.Node:
        made = node.graph.call_function(target, args)
        made.meta["val"] = target(*fx.node.map_arg(args, lambda n: n.meta["val"]))
        return made

    with node.graph.inserting_before(node):
        result = build(node, call)
    node.replace_all_uses_with(result)
    node.graph.erase_node(node)


def _is_plain(node: Any) -> bool:
    """Whether the elements lie in memory in their order, and nothing else does."""
    value = node.meta.get("val")
    return isinstance(value, Tensor) and value.is_contiguous() and value.storage_offset() == 0


def _copied(node: Any, call: _Call) -> Any:
    """``copy(into, value)`` or ``fill``: the value with shape and dtype of what it is copied into."""
    into, value = node.args[0].meta["val"], node.args[1]
    if value.meta["val"].dtype != into.dtype:
        value = call(_aten._to_copy.default, value)
        value.kwargs = {"dtype": into.dtype}
        value.meta["val"] = value.meta["val"].to(into.dtype)
    if value.meta["val"].shape != into.shape:
        value = call(_aten.expand.default, value, list(into.shape))
    return value


def _layout(node: Any, first: int) -> tuple[list[int], list[int], int]:
    size, stride, *offset = node.args[first:]
    start = offset[0] if offset else node.kwargs.get("storage_offset")
    return list(size), list(stride), int(start or 0)


def _positions(node: Any, first: int) -> Tensor:
    """Places of a strided view's elements among those of the tensor, of the view's size."""
    size, stride, start = _layout(node, first)
    places = torch.full(size, start, dtype=torch.int64)
    for dim, (length, step) in enumerate(zip(size, stride, strict=True)):
        places += (torch.arange(length) * step).reshape([-1] + [1] * (len(size) - dim - 1))
    return places.to(node.args[0].meta["val"].device)


def _constant(root: torch.nn.Module, node: fx.Node, value: Tensor) -> fx.Node:
    name = f"_places_{len(root._buffers)}"
    root.register_buffer(name, value, persistent=False)
    made = node.graph.get_attr(name)
    made.meta["val"] = value
    return made


def _strided(root: torch.nn.Module, node: Any, call: _Call) -> Any:
    base = node.args[0]
    size, _, start = _layout(node, 1)
    whole = list(base.meta["val"].shape)
    if not size and len(whole) == 1:
        return call(_aten.select.int, base, 0, start)
    places = _positions(node, 1)
    if size == whole and torch.equal(places.flatten(), torch.arange(places.numel(), device=places.device)):
        return base
    flat = call(_aten.reshape.default, base, [-1])
    if not size:
        return call(_aten.select.int, flat, 0, start)
    return call(_aten.index.Tensor, flat, [_constant(root, node, places)])


def _strided_scatter(root: torch.nn.Module, node: Any, call: _Call) -> Any:
    base, part = node.args[:2]
    size, _, start = _layout(node, 2)
    whole = list(base.meta["val"].shape)
    if not size and len(whole) == 1:
        return call(_aten.select_scatter.default, base, part, 0, start)
    flat = call(_aten.reshape.default, base, [-1])
    if not size:
        changed = call(_aten.select_scatter.default, flat, part, 0, start)
    else:
        places = _constant(root, node, _positions(node, 2))
        changed = call(_aten.index_put.default, flat, [places], part)
    return call(_aten.reshape.default, changed, whole)


def _slice_scatter(root: torch.nn.Module, node: Any, call: _Call) -> Any:
    given: list[Any] = list(node.args)
    base, part, dim, start, end, step = given + [0, None, None, 1][len(given) - 2 :]
    shape = list(base.meta["val"].shape)
    begin, stop, step = slice(start, end, step).indices(shape[dim])
    if step == 1:
        pieces = [call(_aten.slice.Tensor, base, dim, 0, begin), part, call(_aten.slice.Tensor, base, dim, stop)]
        return call(_aten.cat.default, [p for p in pieces if p.meta["val"].shape[dim]], dim)
    places = torch.arange(base.meta["val"].numel()).reshape(shape)
    places = places.index_select(dim, torch.arange(begin, stop, step))
    constant = _constant(root, node, places.to(base.meta["val"].device))
    changed = call(_aten.index_put.default, call(_aten.reshape.default, base, [-1]), [constant], part)
    return call(_aten.reshape.default, changed, shape)


def _is_fill_by_mask(node: Any) -> bool:
    """Whether one number is put wherever a mask is true: ``x[x < 0] = 0``, and the gradient of that."""
    indices, value = node.args[1:3]
    accumulates = len(node.args) > 3 and node.args[3]
    mask = indices[0].meta["val"] if len(indices) == 1 and isinstance(indices[0], fx.Node) else None
    return mask is not None and mask.dtype == torch.bool and value.meta["val"].numel() == 1 and not accumulates


def _filled_by_mask(node: Any, call: _Call) -> Any:
    base, (mask,), value = node.args[:3]
    missing = base.meta["val"].dim() - mask.meta["val"].dim()
    if missing:
        mask = call(_aten.reshape.default, mask, [*mask.meta["val"].shape, *[1] * missing])
    if value.meta["val"].dim():
        value = call(_aten.reshape.default, value, [])
    return call(_aten.where.self, mask, value, base)


def _part(node: Any, first: int) -> tuple[int, int]:
    """The dimension and the index that ``select`` and ``select_scatter`` name, counted from the front."""
    shape = node.args[0].meta["val"].shape
    dim, index = (*node.args[first:], 0, 0)[:2]
    dim = int(dim) % len(shape)
    return dim, int(index) % shape[dim]


def _read_what_was_written(node: Any) -> None:
    part = _part(node, 1)
    source = node.args[0]
    while isinstance(source, fx.Node) and source.target is _aten.select_scatter.default:
        dim, index = _part(source, 2)
        if dim != part[0]:
            break
        if index == part[1]:
            node.replace_all_uses_with(source.args[1])
            return
        source = source.args[0]
    node.update_arg(0, source)


def _forget_what_is_overwritten(node: Any) -> None:
    before = node.args[0]
    if isinstance(before, fx.Node) and before.target is _aten.select_scatter.default and _same_part(before, node):
        node.update_arg(0, before.args[0])


def _same_part(first: fx.Node, second: fx.Node) -> bool:
    return _part(first, 2) == _part(second, 2)


def _stack(node: Any) -> None:
    """A tensor all of whose parts along a dimension have been written."""
    dim, _ = _part(node, 2)
    length = node.meta["val"].shape[dim]
    parts: dict[int, Any] = {}
    source: Any = node
    while isinstance(source, fx.Node) and source.target is _aten.select_scatter.default and _part(source, 2)[0] == dim:
        parts.setdefault(_part(source, 2)[1], source.args[1])
        source = source.args[0]
        if len(parts) == length:
            _rewrite(node, lambda _, call: call(_aten.stack.default, [parts[i] for i in range(length)], dim))
            return
