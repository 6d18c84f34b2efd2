"""Dense networks that are called at every step of a solve, with one gradient of the weights for all of them.

Backpropagation through N steps makes N gradients of each weight, each a product over the batch alone, and adds them up:
for the usual 200-200 networks on a batch of 32 that is a third of the backward pass.  Here a network is one node of the
graph, the steps' activations and cotangents are laid by, and the weights' gradient is one product over the rows of
many steps.  Same gradient, another order of its sums.
"""

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["StepNetwork", "shared_gradients", "transformed"]

_ROWS_AT_ONCE = 512  # laid by before they are multiplied: enough for a good product, little enough for the cache


class StepNetwork(nn.Sequential):
    """Dense layers with tanh between them, for drifts and controls: ``(B, inputs)`` to ``(B, outputs)``.

    Outside a solve it is the ``nn.Sequential`` that it looks like; its parameters have the same names.  Within
    ``sde.solve`` and a recorded gradient, it is the same function with a cheaper backward pass (which can't be
    differentiated once more).  In float32 tanh is then accurate to 1e-7 absolutely, not relatively.

    Args:
        sizes: widths of input, hidden layers and output.
        zero_last: start with an output of 0.
    """

    def __init__(self, sizes: Sequence[int], zero_last: bool = False) -> None:
        layers: list[nn.Module] = []
        for i in range(len(sizes) - 1):
            layers += [nn.Linear(sizes[i], sizes[i + 1]), nn.Tanh()]
        last = layers[-2]
        assert isinstance(last, nn.Linear)
        if zero_last:
            nn.init.zeros_(last.weight)
            nn.init.zeros_(last.bias)
        super().__init__(*layers[:-1])

    def forward(self, x: Tensor) -> Tensor:
        """``(..., inputs)`` to ``(..., outputs)``."""
        tape = getattr(_here, "tape", None)
        if tape is None or x.ndim != 2 or not torch.is_grad_enabled() or transformed() or torch.is_autocast_enabled():
            out: Tensor = super().forward(x)
            return out
        return tape.call(self, x)


_here = threading.local()


def transformed() -> bool:
    """Whether a transform of ``torch.func`` is at work, which takes no such node."""
    return bool(torch._C._are_functorch_transforms_active())


@contextmanager
def shared_gradients() -> Iterator[None]:
    """Networks called inside make one gradient each."""
    outer = getattr(_here, "tape", None)
    _here.tape = _Tape()
    try:
        yield
    finally:
        _here.tape = outer


class _Tape:
    """The networks that were called, and what a call needs of each."""

    def __init__(self) -> None:
        self.entries: dict[int, tuple[StepNetwork, _Entry]] = {}

    def call(self, network: StepNetwork, x: Tensor) -> Tensor:
        found = self.entries.get(id(network))
        if found is None:
            found = self.entries[id(network)] = network, _Entry(network, x)
        entry = found[1]
        out: Tensor = _Call.apply(x, entry.token, entry)
        return out


class _Entry:
    """A network on one tape: its weights, and activations and cotangents that wait for their product.

    Attributes:
        token: what every call depends on and what depends on the weights: autograd visits it after all the calls.
    """

    def __init__(self, network: StepNetwork, x: Tensor) -> None:
        # As views, so that a mode that watches torch's functions sees the parameters.
        parameters = [
            p.view_as(p) for layer in network if isinstance(layer, nn.Linear) for p in (layer.weight, layer.bias)
        ]
        self.weights = [p.detach() for p in parameters[::2]]
        self.transposed = [w.t() for w in self.weights]
        self.biases = [p.detach() for p in parameters[1::2]]
        # tanh(z) = 2 sigmoid(2 z) - 1: torch's sigmoid takes a quarter of the time of its tanh in float32 on a CPU.
        self.minus_one = -x.new_ones(()) if x.is_cpu and x.dtype == torch.float32 else None
        if self.minus_one is not None:
            self.transposed[:-1] = [2 * w for w in self.transposed[:-1]]
            self.biases[:-1] = [2 * b for b in self.biases[:-1]]
        self.waiting: dict[int, _Waiting] = {}
        self.token: Tensor = _Gate.apply(self, *parameters)


class _Waiting:
    """What one backward pass has laid by."""

    def __init__(self, layers: int) -> None:
        self.inputs: list[list[Tensor]] = [[] for _ in range(layers)]
        self.cotangents: list[list[Tensor]] = [[] for _ in range(layers)]
        self.rows = 0
        self.gradients: list[Tensor] = []

    def flush(self) -> None:
        if not self.rows:
            return
        fresh = []
        for inputs, cotangents in zip(self.inputs, self.cotangents, strict=True):
            g = torch.cat(cotangents)
            fresh += [g.t() @ torch.cat(inputs), g.sum(0)]
            inputs.clear()
            cotangents.clear()
        self.gradients = [a.add_(b) for a, b in zip(self.gradients, fresh, strict=True)] if self.gradients else fresh
        self.rows = 0


class _Call(torch.autograd.Function):
    """One call of a network."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, token: Tensor, entry: _Entry) -> Tensor:
        held, h = [x], x
        last, one = len(entry.weights) - 1, entry.minus_one
        for i, (weight, bias) in enumerate(zip(entry.transposed, entry.biases, strict=True)):
            h = torch.addmm(bias, h, weight)
            if i < last:
                h = h.tanh_() if one is None else torch.add(one, h.sigmoid_(), alpha=2, out=h)
                held.append(h)
        ctx.entry = entry
        ctx.save_for_backward(*held)
        return h

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> tuple[Tensor | None, None, None]:
        if torch.is_grad_enabled():
            raise RuntimeError(
                "a StepNetwork in a solve has no second derivatives: build the network of nn.Linear and nn.Tanh in an "
                "nn.Sequential for those (create_graph=True)"
            )
        entry, held = ctx.entry, ctx.saved_tensors
        waiting = None
        if ctx.needs_input_grad[1]:
            # A pass that asks for no gradient of the weights never comes to the gate; the next must not add to it.
            run = torch._C._current_graph_task_id()
            waiting = entry.waiting.get(run)
            if waiting is None:
                waiting = entry.waiting[run] = _Waiting(len(entry.weights))
            waiting.rows += len(cotangent)
        g: Tensor | None = cotangent
        for i in range(len(held) - 1, -1, -1):
            assert g is not None
            if waiting is not None:
                waiting.inputs[i].append(held[i])
                waiting.cotangents[i].append(g)
            if i:
                g = torch.ops.aten.tanh_backward(g @ entry.weights[i], held[i])
            else:
                g = g @ entry.weights[0] if ctx.needs_input_grad[0] else None
        if waiting is not None and waiting.rows >= _ROWS_AT_ONCE:
            waiting.flush()
        return g, None, None


class _Gate(torch.autograd.Function):
    """From the weights to the token; on the way back, the weights' gradient."""

    @staticmethod
    def forward(ctx: Any, entry: _Entry, *parameters: Tensor) -> Tensor:
        ctx.entry = entry
        ctx.set_materialize_grads(False)
        return parameters[0].new_zeros(())

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor | None) -> tuple[Tensor | None, ...]:
        entry = ctx.entry
        waiting = entry.waiting.pop(torch._C._current_graph_task_id(), None)
        entry.waiting.clear()
        if waiting is None:
            return None, *[None] * (2 * len(entry.weights))
        waiting.flush()
        return None, *waiting.gradients
