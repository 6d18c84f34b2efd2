"""Turn a Python function of tensors into a flat graph of tensor operations, so that Python's and Pyro's overhead is
paid once.

``trace`` records one evaluation (``recorder.py``).  The recorded graph is cleaned: repeated and dead nodes are dropped,
and the
error checks of matrix factorisations become NaN in the chain that failed, instead of an exception for all.
``program`` runs a function of
pytrees as such a graph, and compiles it where that pays.
"""

import operator
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx
from torch.utils._pytree import tree_leaves

from inference._errors import CaptureWarning
from inference.potential.cuda_graph import Launched, is_recordable, step_in_place
from inference.potential.elementary import quick_logits, quick_tanh
from inference.potential.recorder import CaptureError, is_random, lift_constants, record
from inference.potential.replay import replay

__all__ = ["CaptureError", "Program", "trace"]


class _Costs(NamedTuple):
    """Seconds that a node of an uncompiled graph takes, and each number that it gives; that compilation takes, and for
    each node.

    Only their ratio to a run's length matters, and they are constants rather than timings so that the same run makes
    the same choice, and hence the same bits, every time.
    """

    node: float
    number: float
    compilation: float
    compilation_of_node: float


_CPU = _Costs(5e-6, 5e-10, 3.0, 0.01)
_ACCELERATOR = _Costs(3e-6, 2e-12, 5.0, 0.05)  # with the launches of a step as one

# Compiled programs of this process by the text of their graph and the layout of their inputs, the last used at the end.
_COMPILED: dict[Any, Callable[[list[Tensor]], Any]] = {}
_MOST_COMPILED = 64

_NAN_ON_FAILURE = {
    torch.ops.aten.linalg_cholesky_ex.default: 1,
    torch.ops.aten.linalg_inv_ex.default: 1,
    torch.ops.aten._linalg_solve_ex.default: 3,
    torch.ops.aten.linalg_lu_factor_ex.default: 2,
}
_IDENTITIES = {
    torch.ops.aten.detach.default,
    torch.ops.aten.alias.default,
    torch.ops.aten.lift_fresh_copy.default,
    torch.ops.aten.lift_fresh.default,
}


def trace(
    function: Callable[..., Any], *example: Tensor, closed_over: Sequence[Tensor] = (), random: bool = False
) -> fx.GraphModule:
    """Record ``function`` at ``example`` as a graph of tensor operations.

    Args:
        function: tensors in, a tensor or a flat list of tensors out.
        example: where it is recorded; shapes, dtypes and devices are frozen.
        closed_over: tensors that the function reads without being given them. The graph takes them as further inputs;
            all others that the function closes over are constants of it.
        random: whether the function may draw random numbers; the graph then draws anew on each call.

    Raises:
        CaptureError: the function reads a value back to Python (a branch on a tensor, ``float()``, ``.item()``),
            changes a tensor of ``closed_over``, or draws random numbers without ``random``.
    """
    try:
        constants, graph = record(function, example, closed_over)
    except CaptureError:
        raise
    except (RuntimeError, NotImplementedError, TypeError, AttributeError) as error:
        raise CaptureError(
            str(error).strip().splitlines()[0][:300] if str(error).strip() else type(error).__name__
        ) from error
    drawn = [n for n in graph.nodes if is_random(n)]
    if drawn and not random:
        raise CaptureError(
            f"the function draws random numbers ({drawn[0].target}): its value would change from call to call"
        )
    _clean(graph)
    return fx.GraphModule(constants, graph)


def _clean(graph: fx.Graph) -> None:
    _nan_where_factorisation_failed(graph)
    _spell_out_log_sigmoid(graph)
    _chains_before_rows(graph)
    _merge_repeated(graph)
    # Draws that nothing uses are dropped as well: by default fx keeps them.
    graph.eliminate_dead_code(is_impure_node=lambda node: node.is_impure(impure_random=False))
    one_launch = [is_recordable(node) for node in graph.nodes]
    for node, recordable in zip(graph.nodes, one_launch, strict=True):
        given = [x for x in tree_leaves(node.meta.get("val")) if isinstance(x, Tensor)]
        node.meta.clear()  # it holds what every operation gave
        node.meta |= {"numbers": sum(x.numel() for x in given), "cpu": all(x.device.type == "cpu" for x in given)}
        node.meta["dtype"] = given[0].dtype if given else None
        node.meta["one_launch"] = recordable


def _nan_where_factorisation_failed(graph: fx.Graph) -> None:
    for node in list(graph.nodes):
        if node.target is torch.ops.aten._linalg_check_errors.default:
            graph.erase_node(node)
    for node in list(graph.nodes):
        if node.target not in _NAN_ON_FAILURE:
            continue
        results = {u.args[1]: u for u in node.users if u.target is operator.getitem}
        if 0 not in results:
            continue
        result = results[0]
        with graph.inserting_after(result):
            info = graph.call_function(operator.getitem, (node, _NAN_ON_FAILURE[node.target]))
        with graph.inserting_after(info):
            ok = graph.call_function(torch.ops.aten.eq.Scalar, (info, 0))
        with graph.inserting_after(ok):
            column = graph.call_function(torch.ops.aten.unsqueeze.default, (ok, -1))
        with graph.inserting_after(column):
            square = (
                graph.call_function(torch.ops.aten.unsqueeze.default, (column, -1))
                if not _is_vector_solve(node)
                else column
            )
        with graph.inserting_after(square):
            safe = graph.call_function(torch.ops.aten.where.ScalarOther, (square, result, float("nan")))
        result.replace_all_uses_with(safe, delete_user_cb=lambda user, keep=safe: user is not keep)


def _spell_out_log_sigmoid(graph: fx.Graph) -> None:
    """Its derivative as a product: under ``vmap`` torch's own operator warns where the cotangent has no chains."""
    for node in list(graph.nodes):
        if node.target is not torch.ops.aten.log_sigmoid_backward.default:
            continue
        with graph.inserting_before(node):
            negative = graph.call_function(torch.ops.aten.neg.default, (node.args[1],))
            slope = graph.call_function(torch.ops.aten.sigmoid.default, (negative,))
            product = graph.call_function(torch.ops.aten.mul.Tensor, (node.args[0], slope))
        product.meta = dict(node.meta)
        node.replace_all_uses_with(product)
        graph.erase_node(node)


def _chains_before_rows(graph: fx.Graph) -> None:
    """``A W'`` as ``(W A')'``: data times the weights of all chains, which vmap writes with the chains as columns.

    What follows runs over memory in this order, and a row of few chains fills no vector register: 2 to 16 logistic
    regressions took the same time.
    """
    turned = torch.ops.aten.permute.default

    def turns(node: Any) -> bool:
        return isinstance(node, fx.Node) and node.target is turned and node.args[1] == [1, 0]

    for node in list(graph.nodes):
        if node.target is not torch.ops.aten.mm.default or not turns(node.args[1]):
            continue
        made = node.meta.get("val")
        if made is None or made.shape[1] == 1:
            continue
        data, weights = node.args[0], node.args[1].args[0]
        with graph.inserting_before(node):
            columns = graph.call_function(turned, (data, [1, 0]))
            product = graph.call_function(torch.ops.aten.mm.default, (weights, columns))
            back = graph.call_function(turned, (product, [1, 0]))
        for user in [u for u in node.users if turns(u)]:
            user.replace_all_uses_with(product)
        node.replace_all_uses_with(back)


def _is_vector_solve(node: fx.Node) -> bool:
    value = node.meta.get("val")
    if node.target is not torch.ops.aten._linalg_solve_ex.default or value is None:
        return False
    return value[0].dim() == value[3].dim() + 1


def _merge_repeated(graph: fx.Graph) -> None:
    """Common subexpressions once; identities and additions of the number zero not at all."""
    seen: dict[Any, fx.Node] = {}
    for node in list(graph.nodes):
        if node.op not in ("call_function", "get_attr") or is_random(node):
            continue
        target = node.target
        if target in _IDENTITIES or _changes_nothing(node):
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)
            continue
        key = (node.op, target, _hashable(node.args), _hashable(node.kwargs))
        try:
            first = seen.setdefault(key, node)
        except TypeError:
            continue
        if first is not node:
            node.replace_all_uses_with(first)
            graph.erase_node(node)


def _changes_nothing(node: fx.Node) -> bool:
    """Whether it adds the number zero or takes the first power, of what has its dtype already: ``0 + flag`` makes an
    integer of a flag.
    """
    if node.target is torch.ops.aten.add.Tensor:
        plain = len(node.args) == 2 and not isinstance(node.args[1], fx.Node) and node.args[1] == 0
    else:
        plain = node.target is torch.ops.aten.pow.Tensor_Scalar and node.args[1] == 1
    if not plain:
        return False
    assert isinstance(node.args[0], fx.Node)
    given, made = node.args[0].meta.get("val"), node.meta.get("val")
    return isinstance(given, Tensor) and isinstance(made, Tensor) and given.dtype == made.dtype


def _hashable(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return (type(value).__name__, *(_hashable(v) for v in value))
    if isinstance(value, dict):
        return tuple(sorted((k, _hashable(v)) for k, v in value.items()))
    return (type(value).__name__, value)


@dataclass(frozen=True)
class _Compiled:
    """Compiled code, the constants that are its last inputs, and whether it launches kernels and does nothing else."""

    code: Callable[[list[Tensor]], Any]
    constants: list[Tensor]
    one_launch: bool

    def __call__(self, *inputs: Tensor) -> Any:
        return self.code([*inputs, *self.constants])


class Program:
    """A pure function of pytrees of tensors, run as a recorded graph.

    The first call records it (and compiles it, if asked to); later calls run the graph alone.  A call whose shapes,
    dtypes or devices differ is
    recorded anew.

    Args:
        function: pure; tensors in, tensors out, in any nesting of tuples, named tuples, lists and dicts.
        calls: how often the run is likely to call it; with ``compile="auto"`` it is compiled where that saves more
            than it costs.
        compile: ``True``, ``False`` or ``"auto"``.
        record: ``False`` runs the function itself, for one that cannot be recorded.

    Attributes:
        compiled: whether a graph of it was compiled.
        advance: the step in place that was bound last.
    """

    def __init__(
        self, function: Callable[..., Any], *, calls: int = 0, compile: bool | str = "auto", record: bool = True
    ) -> None:
        if compile not in (True, False, "auto"):
            raise ValueError(f"compile must be True, False or 'auto', got {compile!r}")
        self.function, self.calls, self.compile, self.record = function, calls, compile, record
        self.compiled = False
        self._recorded: dict[Any, tuple[Callable[..., Any], Any]] = {}
        self._last: tuple[Any, Callable[..., Any], Any] | None = None
        self._bound: Callable[..., Any] | None = None
        self.advance: Callable[[], Any] = _unbound

    @property
    def recordings(self) -> int:
        """How often it was recorded."""
        return len(self._recorded)

    def __call__(self, *args: Any) -> Any:
        if not self.record:
            return self.function(*args)
        flat: list[Tensor] = []
        _flatten(args, flat)
        key = tuple([x.shape for x in flat])
        if self._last is None or self._last[0] != key:
            if key not in self._recorded:
                run, structure = self._record(flat, args)
                self._recorded[key] = Launched(run) if _is_one_launch(run) and flat[0].is_cuda else run, structure
            self._last = (key, *self._recorded[key])
        _, run, structure = self._last
        # Compiled code reads memory as it lay when it was compiled, and checks nothing.
        flat = [x if x.is_contiguous() else x.contiguous() for x in flat]
        with torch.no_grad():
            return _unflatten(structure, iter(run(*flat)))

    def bind(self, state: Any, *args: Any, called: int = 0) -> Callable[[], None]:
        """The program as a step in place, for small steps that run very often: each call replaces what the tensors of
        ``state`` hold by what the function makes of them.

        ``function(state, *args)`` must return a tree of the shapes and dtypes of ``state``, whose tensors must be its
        own; nothing is allocated or unpacked in a call.  ``called`` is how often the run has called it so far, where
        that says more than ``calls``: see ``outgrown``.

        Raises:
            ValueError: a tensor is not contiguous.
        """
        flat: list[Tensor] = []
        _flatten(state, flat)
        if not self.record:
            self.advance = lambda: _overwrite(flat, self.function(state, *args))
            return self.advance
        updated = len(flat)
        _flatten(args, flat)
        if not all(x.is_contiguous() for x in flat):
            raise ValueError("a program in place needs contiguous tensors")
        key = (updated, *(x.shape for x in flat))
        if key not in self._recorded:
            self._recorded[key] = self._record(flat, (state, *args), updated)
        self._bound, structure = self._recorded[key]
        if self.outgrown(called) and isinstance(self._bound, fx.GraphModule):
            self._bound = self._compiled(self._bound, [x.clone() for x in flat])
            self._recorded[key] = self._bound, structure
        run = self._bound
        step: Callable[[], Any] | None = None
        if _is_one_launch(run):
            with torch.no_grad():
                step = step_in_place(run, flat[:updated], flat[updated:])
        if step is None and isinstance(run, _Compiled):
            step = replay(run.code, flat[:updated], [*flat[updated:], *run.constants])

        def call() -> None:
            with torch.no_grad():
                run(*flat)

        self.advance = step or call
        return self.advance

    def outgrown(self, called: int) -> bool:
        """Whether the bound step runs uncompiled under ``compile="auto"`` and has been called so often that its
        compilation would have cost less; ``bind`` then compiles it.

        Who compiles at that point, and not before, pays at most twice what a prophet would, however long the run.  The
        number of calls decides and no clock, so that the same run does the same.
        """
        return self.compile == "auto" and isinstance(self._bound, fx.GraphModule) and _pays(self._bound, called)

    def _record(self, flat: list[Tensor], args: tuple[Any, ...], updated: int = 0) -> tuple[Callable[..., Any], Any]:
        structure: list[Any] = []

        def flat_function(*inputs: Tensor) -> list[Tensor]:
            result = self.function(*_unflatten(args, iter(inputs)))
            structure[:] = [_skeleton(result)]
            outputs: list[Tensor] = []
            _flatten(result, outputs)
            return outputs

        # Two inputs that happen to be one tensor at the first call are two inputs at the next.
        flat = [x.detach().clone(memory_format=torch.contiguous_format) for x in flat]
        with torch.no_grad():
            graph = trace(flat_function, *flat)
            if updated:
                _write_back(graph)
            if self.compile is True or (self.compile == "auto" and _pays(graph, self.calls)):
                return self._compiled(graph, flat), structure[0]
        if updated:
            graph.recompile()
        return graph, structure[0]

    def _compiled(self, graph: fx.GraphModule, flat: list[Tensor]) -> Callable[..., Any]:
        one_launch = _is_one_launch(graph)
        quick_tanh(graph.graph)
        quick_logits(graph.graph)
        constants = lift_constants(graph)
        inputs = [*flat, *constants]
        # A second run of a model differs in its constants alone.
        layouts = [(tuple(x.shape), x.stride(), x.dtype, x.device) for x in inputs]
        key = (graph.code, repr(layouts), torch.get_num_threads())
        try:
            with warnings.catch_warnings(), _compiler_settings():
                warnings.simplefilter("ignore")
                compiled = _COMPILED.pop(key, None) or _compile(graph, inputs)
            _COMPILED[key] = compiled
            while len(_COMPILED) > _MOST_COMPILED:
                del _COMPILED[next(iter(_COMPILED))]
            self.compiled = True
            return _Compiled(compiled, constants, one_launch)
        except Exception as error:
            message = str(error).strip().splitlines()
            warnings.warn(
                f"compilation failed ({type(error).__name__}: "
                f"{message[0][:200] if message else ''}); the uncompiled graph runs instead. "
                "A C++ compiler is needed on CPUs; compile=False silences this",
                CaptureWarning,
                stacklevel=3,
            )
            return lambda *inputs: graph(*inputs, *constants)


def _unbound() -> None:
    raise RuntimeError("no step has been bound")


def _pays(graph: fx.GraphModule, calls: int) -> bool:
    """Whether so many calls of the graph cost more than its compilation."""
    calculated = [n for n in graph.graph.nodes if n.op == "call_function"]
    costs = _CPU if all(n.meta.get("cpu", True) for n in calculated) else _ACCELERATOR
    numbers = sum(n.meta.get("numbers", 0) for n in calculated)
    seconds = len(calculated) * costs.node + numbers * costs.number
    return calls * seconds > costs.compilation + len(calculated) * costs.compilation_of_node


def _is_one_launch(run: Callable[..., Any]) -> bool:
    if isinstance(run, _Compiled):
        return run.one_launch
    return isinstance(run, fx.GraphModule) and all(n.meta.get("one_launch", True) for n in run.graph.nodes)


def _overwrite(tensors: list[Tensor], tree: Any) -> None:
    values: list[Tensor] = []
    _flatten(tree, values)
    for tensor, value in zip(tensors, [v.clone() for v in values], strict=True):
        tensor.copy_(value)


def _write_back(module: fx.GraphModule) -> None:
    """Let the graph put its outputs into its first inputs, one into the other in their order, and return nothing."""
    graph = module.graph
    places = [n for n in graph.nodes if n.op == "placeholder"]
    output = next(n for n in graph.nodes if n.op == "output")
    results = list(output.args[0])
    with graph.inserting_before(output):
        pairs = []
        for place, result in zip(places, results, strict=False):
            if result is place:
                continue
            if _origin(result).op == "placeholder":
                # It shows an input, which may be written to before it is read.  A copy would do, but the compiler takes
                # one of a view for nothing and reads late.
                result = graph.call_function(torch.ops.aten.maximum.default, (result, result))
            pairs.append((place, result))
        for place, result in pairs:
            graph.call_function(torch.ops.aten.copy_.default, (place, result))
    output.args = ([],)


def _origin(node: fx.Node) -> fx.Node:
    """The node whose memory this one shows."""
    while node.target is operator.getitem or (isinstance(node.target, torch._ops.OpOverload) and node.target.is_view):
        node = node.args[0]  # type: ignore[assignment]
    return node


def _compile(graph: fx.GraphModule, inputs: list[Tensor]) -> Callable[[list[Tensor]], Any]:
    """The compiled graph as a function of the list of its inputs.

    Straight to the compiler, since Dynamo has nothing left to find in a flat graph; and past what autograd wraps its
    result in, which costs as much as a small step does.  That both do the same is seen on copies of the inputs.
    """
    from torch._inductor.compile_fx import compile_fx, compile_fx_inner

    inner: list[Callable[[list[Tensor]], Any]] = []

    def keep(*args: Any, **kwargs: Any) -> Any:
        inner.append(compile_fx_inner(*args, **kwargs))
        return inner[-1]

    # A module without attributes: those that folding has left behind would become inputs.
    wrapped: Any = compile_fx(fx.GraphModule({}, graph.graph), _stand_ins(inputs), inner_compile=keep)
    first, second = [x.clone() for x in inputs], [x.clone() for x in inputs]
    expected = wrapped(*first)
    if len(inner) == 1:
        direct = inner[0]
        found = direct(list(second))
        pairs = [*zip(expected, found, strict=False), *zip(first, second, strict=True)]
        if len(expected) == len(found) and all(_same(a, b) for a, b in pairs):
            return direct
    return lambda given: wrapped(*given)


def _same(a: Any, b: Any) -> bool:
    return isinstance(a, Tensor) and isinstance(b, Tensor) and torch.allclose(a, b, equal_nan=True)


def _stand_ins(inputs: list[Tensor]) -> list[Any]:
    """Tensors of these shapes that hold nothing, of a kind that the compiler's cache on disk demands."""
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.fx.experimental.symbolic_shapes import ShapeEnv

    mode = FakeTensorMode(shape_env=ShapeEnv())
    return [mode.from_tensor(x, static_shapes=True) for x in inputs]


@contextmanager
def _compiler_settings() -> Iterator[None]:
    """Let the compiler's cache on disk serve graphs that did not come from Dynamo, and leave out checks of sizes that
    a recorded graph has fixed already: for a small step they cost as much as its arithmetic.  A value that took many
    operations is kept for its second use, not made again.
    """
    import torch._functorch.config as functorch
    import torch._inductor.config as inductor

    wanted: dict[Any, dict[str, Any]] = {
        functorch: {"bundled_autograd_cache": False, "enable_autograd_cache": False},
        inductor: {"size_asserts": False, "alignment_asserts": False, "realize_opcount_threshold": 30},
    }
    with ExitStack() as stack:
        for config, settings in wanted.items():
            known = {name: value for name, value in settings.items() if hasattr(config, name)}
            stack.enter_context(config.patch(known))
        yield


# torch's own pytrees cost as much as a small step does; these handle what programs are made of and nothing else.
def _flatten(tree: Any, leaves: list[Tensor]) -> None:
    if isinstance(tree, Tensor):
        leaves.append(tree)
    elif isinstance(tree, dict):
        for value in tree.values():
            _flatten(value, leaves)
    elif isinstance(tree, tuple | list):
        for value in tree:
            _flatten(value, leaves)
    else:
        raise TypeError(f"a program takes and returns tensors in tuples, lists and dicts, got {type(tree).__name__}")


def _unflatten(tree: Any, leaves: Iterator[Tensor]) -> Any:
    if isinstance(tree, dict):
        return {k: _unflatten(v, leaves) for k, v in tree.items()}
    if isinstance(tree, tuple):
        parts = [_unflatten(v, leaves) for v in tree]
        return type(tree)(*parts) if hasattr(tree, "_fields") else tuple(parts)
    if isinstance(tree, list):
        return [_unflatten(v, leaves) for v in tree]
    return next(leaves)


def _skeleton(tree: Any) -> Any:
    """The structure of a pytree without its tensors, which a recording must not keep alive."""
    leaves: list[Tensor] = []
    _flatten(tree, leaves)
    return _unflatten(tree, iter([None] * len(leaves)))  # type: ignore[list-item]
