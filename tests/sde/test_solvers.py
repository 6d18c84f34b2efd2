"""Solvers: orders, calculus, determinism, checkpointing, faults, an accelerator, and torchsde beside them."""

import gc
import math
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from sde import (
    BrownianMotion,
    MarkovFractionalBrownianMotion,
    MultifractionalMotion,
    PathError,
    Step,
    coarsen,
    path_kl,
    path_log_ratio,
    solve,
    solve_torchsde,
    uniform_grid,
)
from tests.accelerator import fake_accelerator


def papers(hurst: Any, kind: str = "rl", horizon: float = 1.0) -> MarkovFractionalBrownianMotion:
    return MarkovFractionalBrownianMotion(hurst, 5, 20.0, horizon, kind, "gamma", "geometric")


def f64(*values: float) -> Tensor:
    return torch.tensor(values if len(values) > 1 else values[0], dtype=torch.float64)


def still(t: Tensor, x: Tensor) -> Tensor:
    return torch.zeros_like(x)


def identity(t: Tensor, x: Tensor) -> Tensor:
    return x


def bumpy(t: Tensor, x: Tensor) -> Tensor:
    return torch.sin(2 * x) - x / 2


ONES = torch.ones(250, 2, dtype=torch.float64)


def halvings(levels: int, noise: Any, run: Any) -> list[Tensor]:
    """X(1) on ever coarser grids of the same Brownian path, finest first."""
    grid = noise.discretise(uniform_grid(1.0, 2**9))
    source = torch.Generator().manual_seed(0)
    normals = torch.randn(2**9, *ONES.shape, grid.rank, generator=source, dtype=torch.float64)
    increments, ends = grid.increments(normals), []
    for _ in range(levels):
        ends.append(run(grid, increments).x[-1])
        increments, grid = coarsen(increments, grid), noise.discretise(grid.times[::2])
    return ends


@pytest.mark.parametrize("scheme", ["heun", "milstein"])
def test_multiplicative_noise_gives_the_exponential_path_by_path(scheme: str) -> None:
    """dX = X o dBhat from 1 is exp(Bhat): the strong error at least halves with the step (order 1)."""
    noise = papers(0.3)

    def run(grid: Any, increments: Tensor) -> Any:
        return solve(still, identity, noise, grid, ONES, increments=increments, scheme=scheme, keep=[len(grid.steps)])

    def additive(grid: Any, increments: Tensor) -> Any:
        return solve(still, 1.0, noise, grid, 0 * ONES, increments=increments, keep=[len(grid.steps)])

    exact = halvings(1, noise, additive)[0].exp()
    errors = [float((x - exact).square().mean().sqrt()) for x in halvings(6, noise, run)]
    order = math.log2(errors[5] / errors[1]) / 4
    assert order > 0.8, (order, errors)


def test_an_ito_solver_would_be_silently_wrong() -> None:
    """The sheet's E10: E log X_T = 0, and -3.293 in the Ito reading, which is therefore refused."""
    noise = papers(0.3)
    path = solve(still, identity, noise, uniform_grid(1.0, 2000), ONES, seed=0, keep=[2000])
    assert abs(float(path.x.log().mean())) < 0.18  # four standard errors
    # The sheet's mean over many paths, through the exact law of Bhat
    assert math.exp(0.5 * float(noise.covariance([1.0]))) == pytest.approx(1.856551, abs=5e-7)
    correction = -0.5 * float(noise.weights.sum()) ** 2
    assert correction == pytest.approx(-3.293, abs=5e-4)
    with pytest.raises(ValueError, match="Ito"):
        solve(still, identity, noise, [0.0, 1.0], ONES, seed=0, scheme="euler")
    # What the refused scheme would do, to show that the difference is no rounding:
    ito = solve(
        still, identity, noise, uniform_grid(1.0, 2000), ONES, seed=0, scheme="euler", additive=True, keep=[2000]
    )
    assert float(ito.x.abs().log().mean()) == pytest.approx(correction, abs=0.5)


@pytest.mark.parametrize(
    ("scheme", "diffusion"),
    [("euler", 0.7), ("heun", 0.7), ("heun", "state"), ("milstein", "state"), ("milstein", 0.7)],
)
def test_strong_orders(scheme: str, diffusion: Any) -> None:
    """Nonlinear drift: the distance to the finest solution falls with order 1 or more."""
    noise = papers(0.7, "mvn")
    field = (lambda t, x: 1 + 0.3 * torch.sin(x)) if diffusion == "state" else diffusion
    y0 = noise.sample_initial(250 * 2, generator=torch.Generator().manual_seed(1)).reshape(250, 2, 5)

    def run(grid: Any, increments: Tensor) -> Any:
        return solve(bumpy, field, noise, grid, ONES, y0=y0, increments=increments, scheme=scheme)

    ends = halvings(7, noise, run)
    errors = [float((x - ends[0]).square().mean().sqrt()) for x in ends[1:]]
    order = math.log2(errors[5] / errors[2]) / 3
    assert order > 0.85, (order, errors)


def test_plain_euler_needs_the_small_steps_that_exact_transitions_do_not() -> None:
    """Speeds times step of 2.5: the exact transition has the right variance, Euler on V explodes."""
    noise = MarkovFractionalBrownianMotion(0.3, max_speed=50.0, kind="rl", normalisation="gamma")
    x0 = torch.zeros(10_000, 1).double()
    variance = float(noise.covariance([1.0]))
    exact, plain = (
        solve(still, 1.0, noise, uniform_grid(1.0, 20), x0, seed=0, scheme=s, keep=[20], check=False).x.var()
        for s in ("euler", "plain_euler")
    )
    assert float(exact) == pytest.approx(variance, rel=0.055)
    assert not float(plain) < 100 * variance
    fine = solve(still, 1.0, noise, uniform_grid(1.0, 1000), x0[:2000], seed=0, scheme="plain_euler", keep=[1000])
    assert float(fine.x.var()) == pytest.approx(variance, rel=0.12)


def test_solved_noise_has_the_exact_law() -> None:
    """X = B for no drift and unit diffusion: uneven steps, one H per dimension, a past."""
    noise = MarkovFractionalBrownianMotion(f64(0.2, 0.8), horizon=2.0)
    times = f64(0.0, 0.01, 0.5, 0.7, 2.0)
    path = solve(still, 1.0, noise, times, torch.zeros(20_000, 2).double(), seed=0)
    covariance = noise.covariance(times)
    for d in range(2):
        own = path.x[1:, :, d] @ path.x[1:, :, d].mT / 20_000
        exact = covariance[d, 1:, 1:]
        spread = ((exact**2 + torch.outer(exact.diagonal(), exact.diagonal())) / 20_000).sqrt()
        assert bool(((own - exact).abs() < 4.5 * spread).all())
    assert float((path.x[1, :, 0] * path.x[1, :, 1]).mean()) == pytest.approx(0.0, abs=4e-3)  # independent dimensions


def test_time_dependent_hurst() -> None:
    base = MarkovFractionalBrownianMotion(0.5, 7, kind="rl")
    motion = MultifractionalMotion(lambda t: 0.3 + 0.4 * t, base)
    path = solve(still, 1.0, motion, uniform_grid(1.0, 50), torch.zeros(20_000, 1).double(), seed=0)
    for n in (10, 25, 50):
        exact = float(motion.covariance([n / 50]))
        assert float(path.x[n].var()) == pytest.approx(exact, rel=0.04)
    # The same noise frozen at its first H has another law: the test would see a missing dw/dt term.
    frozen = base.with_hurst(f64(0.3))
    assert abs(float(frozen.covariance([0.5])) - float(motion.covariance([0.5]))) > 0.1


def zero_control(step: Step, x: Tensor, y: Tensor) -> Tensor:
    return torch.zeros_like(x)


@pytest.mark.parametrize("scheme", ["euler", "heun", "milstein"])
def test_the_scan_and_the_loop_agree(scheme: str) -> None:
    """Without feedback V is solved in one scan; a control of zero takes the loop, on the same numbers."""
    noise = MarkovFractionalBrownianMotion(0.3, horizon=2.0)
    runs = [
        solve(bumpy, 0.5, noise, f64(0, 0.1, 0.3, 1.0, 2.0), ONES[:7], seed=3, control=c, scheme=scheme)
        for c in (None, zero_control)
    ]
    torch.testing.assert_close(runs[0].x, runs[1].x)
    torch.testing.assert_close(runs[0].y, runs[1].y)
    assert path_kl(runs[1]).abs().max() == 0
    assert path_log_ratio(runs[1]).abs().max() == 0


class Net(nn.Module):
    def __init__(self, size: int, out: int) -> None:
        super().__init__()
        source = torch.Generator().manual_seed(size)
        self.first = nn.Parameter(torch.randn(size, 8, generator=source, dtype=torch.float64) / 3)
        self.last = nn.Parameter(torch.randn(8, out, generator=source, dtype=torch.float64) / 3)

    def forward(self, step: Step, x: Tensor, y: Tensor) -> Tensor:
        return torch.tanh(torch.cat([x, y.flatten(1)], -1) @ self.first) @ self.last


@pytest.mark.parametrize("segments", [4, "sqrt", 100])
@pytest.mark.parametrize("kind", ["mvn", "rl"])
@pytest.mark.parametrize("controlled", [True, False])
def test_checkpointed_gradients_are_the_same(segments: Any, kind: str, controlled: bool) -> None:
    raw, scale = f64(0.3).requires_grad_(), f64(0.4).requires_grad_()
    base = MarkovFractionalBrownianMotion(0.5, 3, kind=kind)
    control = Net(2 + 6, 2)
    wanted = [raw, scale, *(control.parameters() if controlled else [])]
    grid = base.discretise(uniform_grid(1.0, 22))
    results = []
    for count in (None, segments):
        noise = base.with_hurst(torch.sigmoid(raw))
        path = solve(
            bumpy, lambda t, x: torch.exp(scale * torch.sin(x)), noise, grid, ONES[:3], seed=0,
            control=control if controlled else None, checkpoint_segments=count, keep=[0, 7, 22],
        )  # fmt: skip
        loss = path.x.square().sum() + path_kl(path).sum() + path_log_ratio(path).sum()
        results.append((path, torch.autograd.grad(loss, wanted)))
    assert torch.equal(results[0][0].x, results[1][0].x) or not controlled
    torch.testing.assert_close(results[0][0].x, results[1][0].x, rtol=1e-12, atol=1e-12)
    for a, b in zip(results[0][1], results[1][1], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


class Memory(TorchDispatchMode):
    """Counts the bytes of live tensors made inside it."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._known: set[int] = set()

    def _free(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.live -= size

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves(out):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                key = storage._cdata
                if key not in self._known:
                    self._known.add(key)
                    self.live += storage.nbytes()
                    weakref.finalize(storage, self._free, key, storage.nbytes())
        self.peak = max(self.peak, self.live)
        return out


def peak(num_steps: int, segments: Any) -> int:
    noise = MarkovFractionalBrownianMotion(0.7, 3, kind="rl")
    grid, control = noise.discretise(uniform_grid(1.0, num_steps)), Net(1 + 3, 1)
    gc.collect()
    with Memory() as memory:
        path = solve(
            still, 1.0, noise, grid, torch.zeros(64, 1).double(), seed=0, control=control,
            checkpoint_segments=segments, keep=[num_steps],
        )  # fmt: skip
        path_kl(path).sum().backward()
    return memory.peak


def test_memory_grows_like_the_square_root_of_the_steps() -> None:
    full = [peak(n, None) for n in (64, 256)]
    root = [peak(n, "sqrt") for n in (64, 256)]
    assert full[1] > 3.5 * full[0]
    assert root[1] < 2.5 * root[0]  # 2 for the root of a factor 4, and room for what does not grow
    assert root[1] < full[1] / 4


def test_seeds() -> None:
    noise = MarkovFractionalBrownianMotion(0.7)
    times = uniform_grid(1.0, 10)
    a = solve(bumpy, 1.0, noise, times, ONES, seed=1)
    assert torch.equal(a.x, solve(bumpy, 1.0, noise, times, ONES, seed=1).x)
    assert not torch.equal(a.x, solve(bumpy, 1.0, noise, times, ONES, seed=2).x)
    by = [solve(bumpy, 1.0, noise, times, ONES, generator=torch.Generator().manual_seed(4)).x for _ in range(2)]
    assert torch.equal(*by)


@pytest.mark.changes_globals("rng")
def test_without_a_seed_torchs_own_generator_decides() -> None:
    noise = MarkovFractionalBrownianMotion(0.7)
    runs = []
    for _ in range(2):
        torch.random.default_generator.manual_seed(0)
        runs.append(solve(bumpy, 1.0, noise, [0.0, 1.0], ONES).x)
    assert torch.equal(*runs)


def test_going_on_from_the_end_of_a_path() -> None:
    """y is the state: two halves on one set of normals are the whole."""
    noise = MarkovFractionalBrownianMotion(0.3, kind="rl")
    grid = noise.discretise(uniform_grid(1.0, 8))
    normals = torch.randn(8, 5, 2, grid.rank, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    whole = solve(bumpy, 1.0, noise, grid, ONES[:5], normals=normals)
    first = solve(bumpy, 1.0, noise, uniform_grid(0.5, 4), ONES[:5], normals=normals[:4])
    second = solve(bumpy, 1.0, noise, uniform_grid(1.0, 4, start=0.5), first.x[-1], y0=first.y, normals=normals[4:])
    torch.testing.assert_close(second.x, whole.x[4:])


def test_single_precision_follows_the_input() -> None:
    noise = MarkovFractionalBrownianMotion(0.7)
    path = solve(bumpy, 1.0, noise, uniform_grid(1.0, 10), ONES.float(), seed=0, control=zero_control)
    assert path.x.dtype == path.y.dtype == path.kl.dtype == torch.float32


def test_forward_and_backward_on_an_accelerator() -> None:
    noise = MarkovFractionalBrownianMotion(0.6, 3, kind="mvn")
    grid = noise.discretise(uniform_grid(1.0, 6))
    with fake_accelerator() as device:
        raw = torch.zeros(2, device=device, requires_grad=True)
        x0 = torch.zeros(4, 2, device=device)
        y0 = torch.zeros(4, 2, 3, device=device)
        normals = torch.zeros(6, 4, 2, grid.rank, device=device)
        for scheme in ("heun", "milstein"):
            for control in (None, lambda step, x, y: x + y.sum(-1)):
                path = solve(
                    bumpy, lambda t, x: torch.exp(x), noise.with_hurst(torch.sigmoid(raw)), grid, x0, y0=y0,
                    normals=normals, control=control, scheme=scheme, check=False,
                )  # fmt: skip
                (path.x.sum() + path_log_ratio(path).sum()).backward()
        assert path.x.device.type == device.type
        assert raw.grad is not None
        assert raw.grad.device.type == device.type


def test_faults_name_time_and_path() -> None:
    noise = BrownianMotion()
    x0 = torch.zeros(3, 2).double()

    def dying(t: Tensor, x: Tensor) -> Tensor:
        s = torch.ones_like(x)
        s[1, 1] = 1.0 if float(t) < 0.45 else -1.0
        return s

    with pytest.raises(PathError, match=r"from time 0\.5 to 0\.6 on path 1, dimension 1"):
        solve(still, dying, noise, uniform_grid(1.0, 10), x0, seed=0)

    def exploding(t: Tensor, x: Tensor) -> Tensor:
        return torch.where(torch.arange(3).unsqueeze(-1) == 2, 1e200 * (1 + x**2), 0.0)

    for segments in (None, 5):
        with pytest.raises(PathError, match=r"on path 2, dimension 0"):
            solve(
                exploding, 1.0, noise, uniform_grid(1.0, 10), x0.requires_grad_(), seed=0, checkpoint_segments=segments
            )


@pytest.mark.parametrize("method", ["euler", "midpoint", "heun"])
def test_torchsde_solves_the_same_equation(method: str) -> None:
    """Constant control: E X(2) = u sum w (1 - e^(-2g)) / g, Var X(2) = Var Bhat(2), KL = u^2 T / 2."""
    noise = papers(0.7, horizon=2.0)
    path = solve_torchsde(
        still, 1.0, noise, [0.0, 1.0, 2.0], torch.zeros(4000, 2).double(), step_size=0.05, method=method, seed=0,
        control=lambda step, x, y: torch.full_like(x, 0.5),
    )  # fmt: skip
    assert path.x.shape == (3, 4000, 2)
    standard_error = math.sqrt(2.23313143 / 8000)
    assert abs(float(path.x[-1].mean()) - 0.5 * 2.08400302) < 4 * standard_error
    # One tenth of the step times the fastest speed is the discretisation's share.
    assert float(path.x[-1].var()) == pytest.approx(2.23313143, rel=0.1)
    torch.testing.assert_close(path.kl, torch.full((4000, 2), 0.25).double())
    assert bool(path.log_ratio.isnan().all())
    again = solve_torchsde(still, 1.0, noise, [0.0, 2.0], torch.zeros(3, 2).double(), step_size=0.5, seed=0)
    assert torch.equal(
        again.x, solve_torchsde(still, 1.0, noise, [0.0, 2.0], torch.zeros(3, 2).double(), step_size=0.5, seed=0).x
    )


def test_torchsde_reads_state_dependent_diffusion_as_stratonovich_and_differentiates() -> None:
    noise = MarkovFractionalBrownianMotion(0.3, 3, max_speed=10.0, kind="rl")
    x0 = torch.ones(2000, 1).double()
    path = solve_torchsde(still, identity, noise, [0.0, 1.0], x0, step_size=0.01, seed=0)
    assert abs(float(path.x[-1].log().mean())) < 4 * math.sqrt(float(noise.covariance([1.0])) / 2000)

    class Drift(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rate = nn.Parameter(f64(0.5))

        def forward(self, t: Tensor, x: Tensor) -> Tensor:
            return -self.rate * x

    slopes = []
    for adjoint in (False, True):
        drift = Drift()
        end = solve_torchsde(drift, 0.1, noise, [0.0, 1.0], x0[:5], step_size=0.01, seed=0, adjoint=adjoint).x[-1]
        (slope,) = torch.autograd.grad(end.sum(), drift.rate)
        slopes.append(float(slope))
    assert slopes[0] == pytest.approx(slopes[1], rel=0.02)


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"x0": torch.zeros(3)}, "x0"),
        ({"x0": torch.zeros(0, 2)}, "x0"),
        ({"x0": torch.zeros(2, 3)}, "dimensions"),
        ({"times": [0.0, 0.0]}, "strictly increasing"),
        ({"times": [0.0]}, "at least 2"),
        ({"times": [0.0, 9.0]}, "horizon=9"),
        ({"scheme": "runge"}, "scheme"),
        ({"diffusion": 0.0}, "diffusion"),
        ({"diffusion": float("nan")}, "diffusion"),
        ({"control": zero_control, "guide": zero_control}, "not both"),
        ({"seed": 1, "generator": torch.Generator()}, "one of"),
        ({"normals": torch.zeros(1, 2, 2, 9)}, "normals"),
        ({"increments": torch.zeros(3, 2, 2, 8)}, "increments"),
        ({"y0": torch.zeros(2, 2, 1)}, "y0"),
        ({"keep": []}, "keep"),
        ({"keep": [1, 0]}, "keep"),
        ({"checkpoint_segments": "cbrt"}, "checkpoint_segments"),
        ({"checkpoint_segments": 0}, "checkpoint_segments"),
        ({"guide": zero_control, "scheme": "plain_euler"}, "plain_euler"),
    ],
)
def test_bad_input(settings: dict[str, Any], match: str) -> None:
    noise = MarkovFractionalBrownianMotion(f64(0.3, 0.6))
    given = {"diffusion": 1.0, "times": [0.0, 1.0], "x0": torch.zeros(2, 2), **settings}
    with pytest.raises(ValueError, match=match):
        solve(still, noise=noise, **given)


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"method": "srk"}, "method"),
        ({"method": "euler", "diffusion": identity}, "Ito"),
        ({"step_size": 0.0}, "step_size"),
        ({"x0": torch.zeros(2)}, "x0"),
        ({"noise": MultifractionalMotion(lambda t: 0.5 + 0 * t, papers(0.5))}, "loadings"),
    ],
)
def test_bad_input_for_torchsde(settings: dict[str, Any], match: str) -> None:
    given = {"noise": papers(0.5), "diffusion": 1.0, "x0": torch.zeros(2, 1), "step_size": 0.1, **settings}
    with pytest.raises(ValueError, match=match):
        solve_torchsde(still, times=[0.0, 1.0], **given)


def test_integers_are_no_states() -> None:
    with pytest.raises(TypeError, match="x0"):
        solve(still, 1.0, BrownianMotion(), [0.0, 1.0], torch.zeros(2, 2, dtype=torch.int64))
