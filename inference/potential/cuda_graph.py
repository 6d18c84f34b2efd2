"""The kernels of a program launched on an NVIDIA device as one CUDA graph.

A small program's kernels take less time than their launches: some hundred launches of 5 us each.  Recorded once into
a CUDA graph, they are one launch.  A graph works on fixed memory: a step in place has that already, and the arguments
of a function are copied to where the graph reads them.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

__all__ = ["Launched", "step_in_place"]

_CALLS_BEFORE = 3  # of a function whose layout may not come again
_MOST_BYTES = 1 << 28  # of arguments: beyond, their copies cost more than the launches


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
    torch.cuda.synchronize()
    try:
        with torch.cuda.graph(graph):
            call()
    except RuntimeError:
        torch.cuda.synchronize()
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
