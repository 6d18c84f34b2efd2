"""Networks of a solve and its segments: the gradients are those of plain modules, whatever is asked for."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import sde.solvers
import sde.step_network
from inference.runtime.generators import scoped_seed
from sde import MarkovFractionalBrownianMotion, Step, StepNetwork, path_kl, path_log_ratio, solve, uniform_grid

NOISE = MarkovFractionalBrownianMotion(0.7, 3, kind="rl")
GRID = NOISE.discretise(uniform_grid(1.0, 22))


@contextmanager
def plain(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Networks as the modules that they look like."""
    with monkeypatch.context() as patch:
        patch.setattr(sde.step_network, "transformed", lambda: True)
        yield


class Networks(nn.Module):
    def __init__(self, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        with scoped_seed(0):
            self.drift = StepNetwork([2, 16, 16, 2]).to(dtype)
            self.control = StepNetwork([2 + 6, 16, 2]).to(dtype)
            self.diffusion = StepNetwork([2, 2]).to(dtype)

    def solve(self, x0: Tensor, scheme: str = "euler", **settings: Any) -> Tensor:
        def control(step: Step, x: Tensor, v: Tensor) -> Tensor:
            out: Tensor = self.control(torch.cat([x, v.flatten(1)], -1))
            return out

        def diffusion(t: Tensor, x: Tensor) -> Tensor:
            # a network of each dimension alone would be needed for calculus; here only gradients are compared
            out: Tensor = torch.exp(0.1 * self.diffusion(x))
            return out

        path = solve(
            lambda t, x: self.drift(x), 1.0 if scheme == "euler" else diffusion, NOISE, GRID, x0, seed=0,
            control=control, scheme=scheme, keep=[7, 22], **settings,
        )  # fmt: skip
        return path.x.square().sum() + path_kl(path).sum() + path_log_ratio(path).sum()


def gradients(model: Networks, x0: Tensor, **settings: Any) -> list[Tensor]:
    wanted = [x0, *(p for p in model.parameters() if p.requires_grad)]
    found = torch.autograd.grad(model.solve(x0, **settings), wanted, allow_unused=True)
    return [torch.zeros_like(w) if g is None else g for w, g in zip(wanted, found, strict=True)]


@pytest.mark.parametrize(
    ("scheme", "segments", "batch"),
    [
        ("euler", None, 3),
        ("euler", 4, 3),
        ("euler", None, 60),
        ("heun", 4, 3),
        ("milstein", None, 3),
        ("milstein", 4, 3),
    ],
)
def test_gradients_are_those_of_plain_modules(
    scheme: str, segments: Any, batch: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """60 rows times 22 steps are more than are laid by at once; milstein differentiates the diffusion within."""
    model, x0 = Networks(), torch.linspace(-1, 1, 2 * batch).double().reshape(batch, 2).requires_grad_()
    with plain(monkeypatch):
        exact = gradients(model, x0, scheme=scheme)
    assert min(float(g.abs().max()) for g in exact[: -2 if scheme == "euler" else None]) > 1e-3
    found = gradients(model, x0, scheme=scheme, checkpoint_segments=segments)
    for a, b in zip(exact, found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def test_single_precision_agrees_to_its_rounding(monkeypatch: pytest.MonkeyPatch) -> None:
    x0 = torch.linspace(-1, 1, 40).reshape(20, 2).requires_grad_()
    model = Networks(torch.float32)
    with plain(monkeypatch):
        exact = gradients(model, x0)
    for a, b in zip(exact, gradients(model, x0), strict=True):
        assert float((a - b).abs().max()) <= 2e-5 * float(a.abs().max())
    with sde.step_network.shared_gradients():
        wide = torch.linspace(-20, 20, 1001).reshape(-1, 1)
        with scoped_seed(0):
            net = StepNetwork([1, 1, 1])
        with torch.no_grad():
            for p in net.parameters():
                p.fill_(1.0 if p.ndim == 2 else 0.0)
        assert float((net(wide).detach() - torch.tanh(wide)).abs().max()) < 3e-7


def test_a_pass_that_leaves_the_weights_out_leaves_nothing_behind() -> None:
    """Twice through one graph: first for the start alone, then for everything."""
    model, x0 = Networks(), torch.ones(4, 2).double().requires_grad_()
    once = gradients(model, x0)
    loss = model.solve(x0)
    torch.autograd.grad(loss, x0, retain_graph=True)
    wanted = [x0, *model.drift.parameters(), *model.control.parameters()]
    for _ in range(2):
        again = torch.autograd.grad(loss, wanted, retain_graph=True)
        for a, b in zip(once, again, strict=False):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def test_frozen_networks_and_accumulated_gradients() -> None:
    model, x0 = Networks(), torch.ones(4, 2).double()
    model.drift.requires_grad_(False)
    (grown,) = torch.autograd.grad(model.solve(x0), [next(model.control.parameters())])
    for _ in range(2):
        model.solve(x0).backward()
    own = next(model.control.parameters()).grad
    assert own is not None
    torch.testing.assert_close(own, 2 * grown)
    assert all(p.grad is None for p in model.drift.parameters())


def test_outside_a_solve_it_is_a_sequential_module() -> None:
    with scoped_seed(0):
        net, zero = StepNetwork([2, 4, 1]), StepNetwork([2, 4, 1], zero_last=True)
        like = nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, 1))
    like.load_state_dict(net.state_dict())
    x = torch.randn(3, 5, 2, generator=torch.Generator().manual_seed(0), requires_grad=True)
    assert torch.equal(net(x), like(x))
    (slope,) = torch.autograd.grad(net(x).sum(), x, create_graph=True)
    torch.autograd.grad(slope.square().sum(), x)  # differentiated once more
    assert float(zero(x).detach().abs().max()) == 0


def test_second_derivatives_are_refused_or_right(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's own mark for such functions lets ``autograd.grad`` leave out what it can't reach, silently."""
    model, x0 = Networks(), torch.ones(4, 2).double().requires_grad_()
    with pytest.raises(RuntimeError, match="StepNetwork"):
        torch.autograd.grad(model.solve(x0), x0, create_graph=True)
    with plain(monkeypatch):
        with pytest.raises(RuntimeError, match="checkpoint_segments"):
            torch.autograd.grad(model.solve(x0, checkpoint_segments=4), x0, create_graph=True)
        seconds = []
        for scheme in ("fused", "apart"):
            # a transform of functions is what the fused step gives way to as well
            with monkeypatch.context() as patch:
                if scheme == "apart":
                    patch.setattr(sde.solvers, "transformed", lambda: True)
                (slope,) = torch.autograd.grad(model.solve(x0), x0, create_graph=True)
                wanted = [x0, *model.drift.parameters(), *model.control.parameters()]
                seconds.append(torch.autograd.grad(slope.square().sum(), wanted, allow_unused=True))
        for a, b in zip(*seconds, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


# ---------------------------------------------------------------- segments
def compare(drift: Any, wanted: list[Tensor], x0: Tensor) -> None:
    found = []
    for segments in (None, "sqrt"):
        path = solve(drift, 1.0, NOISE, GRID, x0, seed=0, checkpoint_segments=segments, keep=[22])
        found.append(torch.autograd.grad(path.x.square().sum(), wanted, retain_graph=True))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def test_segments_see_what_a_drift_closes_over() -> None:
    """A tensor computed outside, a parameter in a list, one per step, one beside the state that follows from it."""
    raw = torch.tensor([0.3, 0.6], dtype=torch.float64, requires_grad=True)
    rate, table = raw.exp(), torch.linspace(0, 1, 22).double().requires_grad_()
    pieces = [raw.sin(), torch.ones(2, dtype=torch.float64, requires_grad=True)]
    each = (table * raw[0]).unbind()

    def drift(t: Tensor, x: Tensor) -> Tensor:
        n = min(int(float(t) * 22 + 0.5), 21)
        return -rate * x + torch.stack(pieces).sum(0) + each[n]

    compare(drift, [raw, table, pieces[1]], torch.ones(3, 2).double() * raw)


def test_segments_take_drifts_that_differentiate_for_themselves() -> None:
    scale = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)

    def drift(t: Tensor, x: Tensor) -> Tensor:
        with torch.enable_grad():
            y = x if x.requires_grad else x.detach().requires_grad_()
            energy = (scale * y.square() + torch.cos(y)).sum()
            (slope,) = torch.autograd.grad(energy, y, create_graph=True)
        return -slope

    compare(drift, [scale], torch.ones(3, 2).double())


class Hidden(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor) -> Tensor:
        ctx.save_for_backward(x, w)
        return x * w

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, Tensor]:
        x, w = ctx.saved_tensors
        return g * w, (g * x).sum()


def test_segments_refuse_what_they_cannot_watch() -> None:
    """Silence would mean a gradient that is too small."""
    w = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
    x0 = torch.ones(3, 2).double()

    def drift(t: Tensor, x: Tensor) -> Tensor:
        out: Tensor = Hidden.apply(x, w)
        return out

    path = solve(drift, 1.0, NOISE, GRID, x0 * w, seed=0, checkpoint_segments=4, keep=[22])
    with pytest.raises(RuntimeError, match=r"custom autograd\.Function"):
        path.x.sum().backward()
    compare(lambda t, x: Hidden.apply(x, w.view_as(w)), [w], x0 * w)


def nodes(*outputs: Tensor) -> int:
    todo = [out.grad_fn for out in outputs]
    seen = set(todo)
    while todo:
        node = todo.pop()
        for following, _ in node.next_functions:  # type: ignore[union-attr]
            if following is not None and following not in seen:
                seen.add(following)
                todo.append(following)
    return len(seen)


def test_the_graph_of_a_segmented_solve_is_short() -> None:
    """Its nodes are what grew with the steps after the tensors were freed: a few a segment, none a step."""
    model = Networks()

    def count(steps: int, segments: Any) -> int:
        path = solve(
            lambda t, x: model.drift(x), 1.0, NOISE, uniform_grid(1.0, steps), torch.zeros(2, 2).double(), seed=0,
            checkpoint_segments=segments, keep=[steps],
        )  # fmt: skip
        return nodes(path.x)

    assert count(100, None) > 300
    assert count(100, "sqrt") < 120
