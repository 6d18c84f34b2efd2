"""What is recorded does, at other inputs, what the function does; and a step in place is one, compiled or replayed."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

from inference import MCMC, NUTS, SGHMC
from inference.potential import CaptureError, Program, graph, trace

X = torch.tensor([0.3, -1.2, 2.0], dtype=torch.float64)
Y = torch.tensor([[1.5, 0.2, -0.7], [0.1, 0.9, 0.4]], dtype=torch.float64)
MATRIX = torch.eye(3, dtype=torch.float64) + 0.2


def in_place(x: Tensor) -> Tensor:
    filled = torch.zeros(5, dtype=x.dtype)
    filled[1:4] = x
    filled.mul_(2.0)
    return filled.cumsum(0)


def constant_in_place(x: Tensor) -> Tensor:
    """Memory of constants alone is changed after it has been read."""
    weight = torch.ones(3, dtype=x.dtype)
    first = x * weight
    weight.add_(1.0)
    return first + x * weight


def gathered(x: Tensor) -> Tensor:
    leaf = x.detach().requires_grad_(True)
    with torch.enable_grad():
        (slope,) = torch.autograd.grad((leaf[torch.tensor([0, 0, 2])] ** 2).sum(), leaf)
    return slope


def several(x: Tensor) -> list[Tensor]:
    values, vectors = torch.linalg.eigh(torch.outer(x, x) + MATRIX)
    first, *rest = x.unbind()
    return [values, vectors.abs(), first + rest[0], x, torch.full_like(x, 3.0), MATRIX @ MATRIX]


def batched(x: Tensor) -> Tensor:
    return torch.func.vmap(lambda row: torch.linalg.solve_triangular(MATRIX.tril(), row[:, None], upper=False))(x * Y)


def branch_on_a_constant(x: Tensor) -> Tensor:
    return x * 2 if float(MATRIX.sum()) > 0 else x * 3


FUNCTIONS = [in_place, constant_in_place, gathered, several, batched, branch_on_a_constant]


@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda f: f.__name__)
def test_the_graph_is_the_function_at_other_inputs(function):
    recorded = trace(function, X)
    for x in (X, torch.flip(X, (0,)) + 0.5, -3 * X):
        for _ in range(2):  # and leaves nothing behind
            torch.testing.assert_close(recorded(x), function(x), rtol=1e-14, atol=1e-14)


def test_what_no_input_reaches_is_a_constant():
    targets = [n.target for n in trace(several, X).graph.nodes if n.op == "call_function"]
    assert torch.ops.aten.full_like.default not in targets
    assert torch.ops.aten.mm.default not in targets


def test_closed_over_tensors_are_inputs_and_must_not_change():
    weight = torch.nn.Parameter(torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64))
    recorded = trace(lambda x: (weight * x).sum(), X, closed_over=[weight])
    assert float(recorded(X, 2 * weight.detach())) == pytest.approx(2 * float((weight.detach() * X).sum()))
    buffer = torch.zeros(3, dtype=torch.float64)
    with pytest.raises(CaptureError, match="changes a tensor"):
        trace(lambda x: x + buffer[:2].add_(1.0).sum(), X, closed_over=[buffer])
    assert not buffer.any()


def test_a_value_read_back_is_refused_even_if_the_function_hides_it():
    def hiding(x: Tensor) -> Tensor:
        try:
            return x * x.sum().item()
        except RuntimeError as error:
            raise KeyError("something else") from error

    with pytest.raises(CaptureError, match="read back"):
        trace(hiding, X)


def test_results_that_show_the_old_state():
    """A view of the state, returned, is of the state before the step."""
    for compile in (False, True):
        state, before = torch.zeros(3), torch.full((3,), -1.0)
        program = Program(lambda s, one: (s[0] + one, s[0].view(3)), compile=compile)
        advance = program.bind((state, before), torch.tensor(1.0))
        for step in range(4):
            advance()
            assert state.tolist() == [step + 1.0] * 3 and before.tolist() == [float(step)] * 3


def regression(x: Tensor, y: Tensor) -> None:
    slope = pyro.sample("slope", dist.Normal(torch.zeros(2), 10.0).to_event(1))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal(x @ slope, 0.1), obs=y)


def test_a_second_run_compiles_nothing_and_sees_its_own_data(monkeypatch):
    """Same shapes, other data: the compiled program of the first run serves, with the constants of the second; and
    what it runs are the bare kernels, which agree with the graph.
    """
    monkeypatch.setattr(graph, "_COMPILED", {})
    compiled, replayed = [], []
    compile_, replay = graph._compile, graph.replay
    monkeypatch.setattr(graph, "_compile", lambda *a: compiled.append(1) or compile_(*a))
    monkeypatch.setattr(graph, "replay", lambda *a: (replayed.append(replay(*a)), replayed[-1])[1])
    x = torch.randn(40, 2, generator=torch.Generator().manual_seed(0))
    for truth in (torch.tensor([1.0, -2.0]), torch.tensor([4.0, 0.5])):
        for build in (lambda: NUTS(regression), lambda: SGHMC(regression, step_size=0.002, friction=0.2)):
            mcmc = MCMC(build(), 100, 100, num_chains=4, progress=False, compile=True).run(x, x @ truth)
            assert (mcmc.get_samples()["slope"].mean(0) - truth).abs().max() < 0.1
            assert [program.recordings for program in mcmc._programs] == [1]
    assert len(compiled) == 2  # one a kernel
    assert replayed and all(step is not None for step in replayed)


def test_a_step_in_place_keeps_every_draw():
    """The driver copies what the next step writes over; the recorded, compiled and plain runs are one."""
    runs = []
    for options in ({"compile": False}, {"compile": True}, {"capture": False}):
        mcmc = MCMC(SGHMC(regression, step_size=0.002), 12, 3, num_chains=2, progress=False, seed=4, **options)
        seen = []
        mcmc.hook_fn = lambda kernel, values, stage, i, seen=seen: seen.append(values["slope"])
        mcmc.run(torch.eye(2), torch.ones(2))
        draws = mcmc.get_samples(group_by_chain=True)["slope"]
        assert torch.equal(draws, torch.stack(seen[3:], dim=1))
        assert len(draws[0].unique(dim=0)) == 12 and len(mcmc.sample_stats["gradient_energy"][0].unique()) == 12
        runs.append(draws)
    torch.testing.assert_close(runs[1], runs[0], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(runs[2], runs[0], rtol=1e-4, atol=1e-4)
