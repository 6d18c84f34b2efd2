"""The kernels of a program launched on an NVIDIA device as one CUDA graph.

A small program's kernels take less time than their launches: some hundred launches of 5 us each.  Recorded once into
a CUDA graph, they are one launch.  A graph works on fixed memory: a step in place has that already, and the arguments
of a function are copied to where the graph reads them.

Only what is known beforehand to be recordable is tried: a recording that breaks off leaves torch's default generator
waiting for its end.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensor

__all__ = ["Launched", "is_recordable", "step_in_place"]

_CALLS_BEFORE = 3  # of a function whose layout may not come again
_MOST_BYTES = 1 << 28  # of arguments: beyond, their copies cost more than the launches


# Words in names of operations whose libraries may wait for the device.
_FACTORISATIONS = {"linalg", "cholesky", "lu", "triangular", "eigh", "svd", "qr", "geqrf", "orgqr", "ormqr", "lstsq"}
_FACTORISATIONS |= {"logdet", "slogdet", "pinverse"}
_HARMLESS = {torch.ops.aten.linalg_vector_norm.default, torch.ops.aten.linalg_cross.default}
_READ_BACK = {torch.Tag.dynamic_output_shape, torch.Tag.data_dependent_output}


def is_recordable(node: fx.Node) -> bool:
    """Whether the operation, with its arguments' values in ``meta``, launches kernels and does nothing else."""
    target = node.target
    if node.op != "call_function" or not isinstance(target, torch._ops.OpOverload) or target in _HARMLESS:
        return True
    if target in (torch.ops.aten.index.Tensor, torch.ops.aten.index_put.default):
        indices = [i.meta.get("val") for i in node.args[1] if isinstance(i, fx.Node)]  # type: ignore[union-attr]
        return all(isinstance(i, Tensor) and i.dtype != torch.bool for i in indices)
    words = target.name().removeprefix("aten::").partition(".")[0].split("_")
    return not _READ_BACK & set(target.tags) and _FACTORISATIONS.isdisjoint(words)


def step_in_place(run: Callable[..., Any], state: list[Tensor], others: list[Tensor]) -> Callable[[], None] | None:
    """A function that does to the memory of ``state`` what ``run(*state, *others)`` does, or ``None`` where its kernels
    cannot be put into a graph.

    The state is as it was before when this returns.
    """
    tensors = [*state, *others]
    if not _on_cuda(tensors):
        return None
    before = [x.clone() for x in state]
    run(*tensors)  # libraries make themselves ready in a first call, which a graph would not allow
    expected = [x.clone() for x in state]
    _copy(state, before)
    graph = _recorded(lambda: run(*tensors))
    if graph is None:
        return None
    graph.replay()
    same = all(torch.allclose(x, y, rtol=1e-3, equal_nan=True) for x, y in zip(state, expected, strict=True))
    _copy(state, before)
    return _Replay(graph, tensors) if same else None


class _Replay:
    """One launch of a graph, and what keeps its memory."""

    def __init__(self, graph: Any, tensors: list[Tensor]) -> None:
        self._graph, self._tensors = graph, tensors

    def __call__(self) -> None:
        self._graph.replay()


class Launched:
    """A function of tensors of one layout, whose kernels become one graph after its first calls.

    Args:
        run: the function; returns a list of tensors.

    Attributes:
        graphed: whether they have.
    """

    def __init__(self, run: Callable[..., Sequence[Tensor]]) -> None:
        self._run, self._calls = run, 0
        self._graph: Any = None
        self._inputs: list[Tensor] = []
        self._outputs: list[Tensor] = []

    @property
    def graphed(self) -> bool:
        """Whether the kernels are launched as one."""
        return self._graph is not None

    def __call__(self, *inputs: Tensor) -> Sequence[Tensor]:
        if self._graph is None:
            self._calls += 1
            if self._calls == _CALLS_BEFORE and _on_cuda(inputs) and _bytes(inputs) <= _MOST_BYTES:
                self._record(inputs)
            return self._run(*inputs)
        _copy(self._inputs, inputs)
        self._graph.replay()
        results = [torch.empty_like(x) for x in self._outputs]
        _copy(results, self._outputs)
        return results

    def _record(self, inputs: Sequence[Tensor]) -> None:
        self._inputs = [x.clone(memory_format=torch.contiguous_format) for x in inputs]

        def call() -> None:
            self._outputs = list(self._run(*self._inputs))

        self._graph = _recorded(call)


def _recorded(call: Callable[[], Any]) -> Any:
    """The kernels that a call launches, as a graph; ``None`` where one of them cannot be recorded."""
    graph = torch.cuda.CUDAGraph()
    generator = torch.cuda.default_generators[torch.cuda.current_device()]
    place = generator.get_state()
    try:
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            call()
    except RuntimeError:
        fresh = torch.Generator(generator.device)
        fresh.set_state(place)
        generator.graphsafe_set_state(fresh.graphsafe_get_state())
        return None
    return graph


def _on_cuda(tensors: Sequence[Tensor]) -> bool:
    return all(x.device.type == "cuda" and not isinstance(x, FakeTensor) for x in tensors)


def _bytes(tensors: Sequence[Tensor]) -> int:
    return sum(x.numel() * x.element_size() for x in tensors)


def _copy(targets: Sequence[Tensor], sources: Sequence[Tensor]) -> None:
    """Copy each source into its target, those of one dtype in one launch."""
    groups: dict[torch.dtype, tuple[list[Tensor], list[Tensor]]] = {}
    for target, source in zip(targets, sources, strict=True):
        into, out = groups.setdefault(target.dtype, ([], []))
        into.append(target)
        out.append(source)
    for into, out in groups.values():
        torch._foreach_copy_(into, out)
