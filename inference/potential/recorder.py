"""Record what a Python function of tensors does as a graph of tensor operations, by watching it run once.

Every operation that reaches the dispatcher is executed and noted; below autograd and ``vmap``, so that gradients and
batches come out as plain operations.  Operations that no input reaches are executed and not noted: their results are
constants of the graph.  The recorder of torch (``make_fx``) does the same and more (symbolic shapes, fake values,
stack traces) at ten times the cost, which for a model of a few hundred operations was most of a short run.
"""

import operator
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

from inference.potential.in_place import parts_by_index

__all__ = ["CaptureError", "is_random", "lift_constants", "mutates", "record"]

_FOLD_LIMIT = 1 << 24  # elements; a larger constant is recomputed rather than held
_aten = torch.ops.aten
_SAME = {_aten.detach.default, _aten.alias.default, _aten.lift_fresh.default}
_SHAPE_ONLY = {
    _aten.zeros_like.default,
    _aten.ones_like.default,
    _aten.full_like.default,
    _aten.new_zeros.default,
    _aten.new_ones.default,
    _aten.new_full.default,
}


class CaptureError(RuntimeError):
    """The function cannot be recorded as a graph; the message says which operation stands in the way."""


class _NeedsMemory(RuntimeError):
    """An operation in place, where the recording holds constants that it would change."""


def is_random(node: fx.Node) -> bool:
    """Whether the node draws random numbers."""
    return isinstance(node.target, torch._ops.OpOverload) and _draws(node.target)


def mutates(node: fx.Node) -> bool:
    """Whether the node changes a tensor in place."""
    return isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable


def _draws(func: Any) -> bool:
    return torch.Tag.nondeterministic_seeded in func.tags


Recording = tuple[torch.nn.Module, fx.Graph]  # the constants, as buffers, and the operations


def record(function: Callable[..., Any], example: Sequence[Tensor], closed_over: Sequence[Tensor] = ()) -> Recording:
    """The graph of ``function(*example)``.

    Args:
        function: tensors in; a tensor, or a tuple or list of tensors, out.
        example: where it is recorded.
        closed_over: tensors that it reads without being given them; the graph takes them as further inputs.

    Returns:
        Constants and operations, none of them in place; the nodes' ``meta["val"]`` holds what they were at ``example``.

    Raises:
        CaptureError: a value that depends on an input is read back to Python, or a tensor of ``closed_over`` is
            changed.
    """
    try:
        return _run(function, example, closed_over, fold=True)
    except _NeedsMemory:
        imperative = fx.GraphModule(*_run(function, example, closed_over, fold=False))
    # torch's functionalisation lets only what it is given be changed, and what is made like that: constants included.
    constants = lift_constants(imperative)
    functional = torch.func.functionalize(imperative, remove="mutations")
    inputs = [*example, *(t.detach() for t in closed_over)]
    try:
        root, graph = _run(lambda *given: functional(*given, *constants), inputs, (), fold=True)
    except _NeedsMemory:  # something in place that torch's functionalisation leaves to its own recorder
        module = make_fx(lambda *given: functional(*given, *constants))(*inputs)
        return module, module.graph
    parts_by_index(root, graph)
    return root, graph


def _run(
    function: Callable[..., Any], example: Sequence[Tensor], closed_over: Sequence[Tensor], *, fold: bool
) -> Recording:
    recorder = _Recorder(fold, closed_over)
    # Its own tensor each: one that is given twice is two inputs.
    inputs = [x.detach() if x.requires_grad else x.view_as(x) for x in example]
    for name, tensors in (("input", inputs), ("closed_over", closed_over)):
        for index, tensor in enumerate(tensors):
            recorder.track(tensor, recorder.graph.placeholder(f"{name}_{index}"))
    try:
        with recorder:
            result = function(*inputs)
    except Exception:
        # What the function itself made of the exception, Pyro say, hides why it was raised.
        if recorder.refused is not None:
            raise recorder.refused from None
        raise
    recorder.graph.output(tree_map(recorder.argument, result))
    return recorder.root, recorder.graph


def lift_constants(module: fx.GraphModule) -> list[Tensor]:
    """Make the graph's constants its last inputs, so that one compilation serves all data of these shapes."""
    constants: list[Tensor] = []
    places = [n for n in module.graph.nodes if n.op == "placeholder"]
    for node in [n for n in module.graph.nodes if n.op == "get_attr"]:
        value = _attribute(module, node.target)
        if not isinstance(value, Tensor):
            continue
        with module.graph.inserting_after(places[-1]):
            places.append(module.graph.placeholder(f"constant_{len(constants)}"))
        node.replace_all_uses_with(places[-1])
        module.graph.erase_node(node)
        constants.append(value.detach())
    module.recompile()
    return constants


def _attribute(module: fx.GraphModule, target: str) -> Any:
    value: Any = module
    for part in target.split("."):
        value = getattr(value, part)
    return value


class _Recorder(TorchDispatchMode):
    """Notes operations while it is active.

    Args:
        fold: whether operations that no input reaches are left out, their results being constants.
        closed_over: tensors that must not change.
    """

    def __init__(self, fold: bool, closed_over: Sequence[Tensor]) -> None:
        super().__init__()
        self.fold = fold
        self.graph = fx.Graph()
        self.root = torch.nn.Module()
        self._nodes: dict[int, fx.Node] = {}
        self._alive: list[Tensor] = []  # so that no id is given twice
        self._reached: set[fx.Node] = set()
        self._own: set[int] = set()  # memory of constants made while recording, free to be changed
        self._fixed = {_memory(t) for t in closed_over}
        self.refused: Exception | None = None

    def track(self, tensor: Tensor, node: fx.Node, *, reached: bool = True) -> None:
        """Let ``node`` stand for ``tensor``."""
        self._nodes[id(tensor)] = node
        self._alive.append(tensor)
        node.meta["val"] = tensor
        if reached:
            self._reached.add(node)

    def argument(self, value: Any) -> Any:
        """The node of a tensor, a constant's made if need be; anything else is itself."""
        if not isinstance(value, Tensor):
            return value
        node = self._nodes.get(id(value))
        if node is None:
            name = f"_constant_{len(self.root._buffers)}"
            self.root.register_buffer(name, value.detach(), persistent=False)
            node = self.graph.get_attr(name)
            self.track(value, node, reached=False)
            self._own.discard(_memory(value))
        return node

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        tensors = _tensors((args, kwargs))
        nodes = [self._nodes.get(id(t)) for t in tensors]
        reached = any(n in self._reached for n in nodes) or _draws(func)
        if torch.Tag.data_dependent_output in func.tags:
            if reached:
                self._refuse(CaptureError(f"a value that depends on its inputs is read back to Python ({func})"))
            return func(*args, **kwargs)
        if func._schema.is_mutable:
            self._check_change(func, tensors, reached)
        elif func in _SAME and nodes and nodes[0] is not None:
            out = func(*args, **kwargs)
            self._nodes[id(out)] = nodes[0]
            self._alive.append(out)
            return out
        out = func(*args, **kwargs)
        if self.fold and (not reached or func in _SHAPE_ONLY or self._fills(func, args)):
            results = _tensors(out)
            if reached or all(t.numel() <= _FOLD_LIMIT for t in results):
                self._alive.extend(results)
                if not func.is_view or func is _aten.lift_fresh.default:
                    self._own.update(_memory(t) for t in results)
                return out
        taken = fx.node.map_aggregate((args, kwargs), self.argument)
        # A constant that the function makes is made anew on each call, since what follows may change it.
        node = self.graph.call_function(_aten.clone.default if func is _aten.lift_fresh.default else func, *taken)
        if isinstance(out, Tensor):
            self.track(out, node, reached=reached)
        else:
            node.meta["val"] = out
            for index, part in enumerate(out or ()):
                if isinstance(part, Tensor):
                    self.track(part, self.graph.call_function(operator.getitem, (node, index)), reached=reached)
        return out

    def _refuse(self, reason: Exception) -> NoReturn:
        self.refused = reason
        raise reason

    def _fills(self, func: Any, args: Any) -> bool:
        return func is _aten.fill.Scalar and not isinstance(args[1], Tensor)

    def _check_change(self, func: Any, tensors: list[Tensor], reached: bool) -> None:
        changed = _memory(tensors[0]) if tensors else 0
        if changed in self._fixed:
            self._refuse(
                CaptureError("the function changes a tensor that it closes over (batch statistics of a module?)")
            )
        if self.fold and (reached or changed not in self._own):
            self._refuse(_NeedsMemory(f"{func} in place"))
        if reached:  # what was a constant may now be none
            self._reached.update(self.graph.nodes)


def _memory(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _tensors(tree: Any) -> list[Tensor]:
    found: list[Tensor] = []
    _collect(tree, found)
    return found


def _collect(tree: Any, found: list[Tensor]) -> None:
    if isinstance(tree, Tensor):
        found.append(tree)
    elif isinstance(tree, tuple | list):
        for value in tree:
            _collect(value, found)
    elif isinstance(tree, dict):
        for value in tree.values():
            _collect(value, found)
