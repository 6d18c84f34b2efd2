"""Elementary functions as compiled code evaluates them, against torch's own."""

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits

from inference.potential import Program, trace
from inference.potential import graph as graph_module
from inference.potential.elementary import quick_logits, quick_tanh

NAN, INF = float("nan"), float("inf")


def rewritten(function: Callable[..., object], *example: Tensor) -> tuple[Callable[..., list[Tensor]], list[str]]:
    """The recorded function after both passes, and the names of its operations that lead to a result."""
    module = copy.deepcopy(trace(function, *example))
    quick_tanh(module.graph)
    quick_logits(module.graph)
    module.graph.eliminate_dead_code()
    module.recompile()
    return module, [str(node.target) for node in module.graph.nodes]


def test_tanh_is_right_to_single_precision() -> None:
    x = torch.cat([torch.linspace(-12, 12, 400_001), torch.logspace(-30, 0, 1001)])
    function, names = rewritten(lambda a: [a.tanh()], x)
    assert "aten.tanh.default" not in names
    found, expected = function(x)[0], x.double().tanh()
    assert float(((found - expected) / expected.abs().clamp_min(1e-30)).abs().max()) < 4e-7
    assert float(found.abs().max()) <= 1.0
    special = torch.full_like(x, 0.0)
    special[:4] = torch.tensor([NAN, INF, -INF, -0.0])
    torch.testing.assert_close(function(special)[0][:4], special[:4].tanh(), rtol=4e-7, atol=0.0, equal_nan=True)


def test_tanh_in_double_precision_is_left_to_torch() -> None:
    assert "aten.tanh.default" in rewritten(lambda a: [a.tanh()], torch.zeros(3, dtype=torch.float64))[1]


def loss_and_slope(x: Tensor, y: Tensor) -> list[Tensor]:
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        loss = binary_cross_entropy_with_logits(x, y, reduction="none")
        return [loss.detach(), torch.autograd.grad(loss.sum(), x)[0]]


def of_chains(x: Tensor, y: Tensor) -> list[Tensor]:
    """As a model is recorded: one chain with its gradient, and that over all chains."""
    return list(torch.func.vmap(trace(loss_and_slope, x[0], y), in_dims=(0, None))(x, y))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_logits_take_one_exponential(dtype: torch.dtype) -> None:
    x = torch.cat([torch.linspace(-30, 30, 1001), torch.tensor([-200.0, 200.0, 0.0])]).to(dtype)
    y = (torch.arange(len(x)) % 2).to(dtype)
    function, names = rewritten(of_chains, x[None], y)
    assert names.count("aten.exp.default") == 1 and "aten.sigmoid.default" not in names
    tolerance = 1e-6 if dtype == torch.float32 else 1e-14
    for found, expected in zip(function(x[None], y), loss_and_slope(x.double(), y.double()), strict=True):
        torch.testing.assert_close(found[0].double(), expected, rtol=tolerance, atol=tolerance)
    assert bool(function(torch.full_like(x, NAN)[None], y)[0].isnan().all())


def test_other_logarithms_are_left_alone() -> None:
    def other(a: Tensor) -> list[Tensor]:
        m = (-a).clamp_min(1)
        return [((-m).exp() + (-a - m).exp()).log()]

    x = torch.linspace(-3, 3, 7)
    function, names = rewritten(other, x)
    assert names.count("aten.exp.default") == 2
    assert torch.equal(function(x)[0], other(x)[0])


def test_compiled_programs_use_them(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[str] = []
    compile_graph = graph_module._compile

    def seen(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[[list[Tensor]], object]:
        compiled.extend(str(node.target) for node in graph.graph.nodes)
        return compile_graph(graph, inputs)

    monkeypatch.setattr(graph_module, "_compile", seen)
    x, y = torch.linspace(-9, 9, 1000), (torch.arange(1000) % 2).float()
    program = Program(lambda a, b: [a.tanh() * 2, *of_chains(a, b)], compile=True)
    for found, expected in zip(program(x[None], y), [x.tanh() * 2, *loss_and_slope(x, y)], strict=True):
        torch.testing.assert_close(found[0], expected, rtol=2e-6, atol=1e-6)
    assert compiled and not {"aten.tanh.default", "aten.sigmoid.default"} & set(compiled)
