"""Streams made by the counter-based generator, and programs launched as one CUDA graph."""

import math
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from scipy import stats

from inference import HMC, MCLMC, MCMC, MEADS, NUTS, SGHMC, ChEES
from inference.potential import Program, trace
from inference.potential.cuda_graph import Launched
from inference.runtime import generators
from inference.runtime.generators import ChainGenerators
from inference.runtime.philox import PhiloxStreams, philox
from tests.inference.zoo import SCHOOLS_SE, SCHOOLS_Y, eight_schools

F64 = torch.float64
on_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


@pytest.mark.parametrize(
    ("counter", "key", "words"),
    [
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_words_are_those_that_its_authors_publish(
    counter: tuple[int, ...], key: tuple[int, ...], words: tuple[int, ...]
) -> None:
    found = philox([torch.tensor(c) for c in counter], [torch.tensor(k) for k in key])
    assert [int(w) for w in found] == list(words)


@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_laws_of_the_streams(dtype: torch.dtype) -> None:
    streams = PhiloxStreams([1, 2, 1 << 62], torch.device("cpu"))
    uniform = streams.uniform(50_000, 1, dtype)[..., 0]
    normal = streams.normal(49_999, 1, dtype)[..., 0]
    assert uniform.dtype == normal.dtype == dtype
    assert float(uniform.min()) >= 0 and float(uniform.max()) < 1
    for chain in range(3):
        assert stats.kstest(uniform[:, chain].double().numpy(), "uniform").pvalue > 1e-3
        assert stats.kstest(normal[:, chain].double().numpy(), "norm").pvalue > 1e-3
    for drawn in (uniform, normal):
        between = torch.corrcoef(drawn.T.double()) - torch.eye(3)
        assert float(between.abs().max()) < 4.5 / math.sqrt(len(drawn))
        centred = (drawn - drawn.mean(0)) / drawn.std(0)
        following = (centred[1:] * centred[:-1]).mean(0)
        assert float(following.abs().max()) < 4.5 / math.sqrt(len(drawn))


def test_a_chain_of_the_streams_does_not_know_of_the_others() -> None:
    alone, together = PhiloxStreams([7], torch.device("cpu")), PhiloxStreams([3, 7, 9], torch.device("cpu"))
    for streams in (alone, together):
        streams.uniform(3, 5, F64)
    assert torch.equal(alone.normal(4, 3, F64)[:, 0], together.normal(4, 3, F64)[:, 1])
    assert not torch.equal(together.normal(4, 3, F64)[:, 0], together.normal(4, 3, F64)[:, 0])


def test_minibatches_do_not_depend_on_how_many_steps_share_a_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    for keys in (1, 1 << 25):
        monkeypatch.setattr(generators, "_KEYS", keys)
        streams = ChainGenerators(1, range(3))
        streams._philox = PhiloxStreams([4, 5, 6], torch.device("cpu"))
        found.append(streams.indices(7, 38, 30))
        assert streams.indices(7, 38, 4).shape == (7, 3, 4)
    assert torch.equal(*found) and found[0].shape == (7, 3, 30)
    assert all(len(set(row.tolist())) == 30 for row in found[0].flatten(0, 1))


@on_cuda
def test_streams_of_the_accelerator_go_on_where_they_were_saved() -> None:
    streams = ChainGenerators(1, range(3), "cuda")
    shape = torch.tensor([0.5, 2.0], device="cuda", dtype=F64)
    streams.normal(2, 3, F64), streams.gamma(2, shape)
    saved = streams.state_dict()
    drawn = streams.normal(2, 3, F64), streams.gamma(2, shape), streams.indices(3, 10, 4)
    other = ChainGenerators(1, range(3), "cuda")
    other.load_state_dict(saved)
    again = other.normal(2, 3, F64), other.gamma(2, shape), other.indices(3, 10, 4)
    assert all(torch.equal(a, b) for a, b in zip(drawn, again, strict=True))
    alone = ChainGenerators(1, [2], "cuda")
    alone.normal(2, 3, F64)
    assert torch.equal(alone.normal(2, 3, F64)[:, 0], drawn[0][:, 2])
    assert all(len(set(row.tolist())) == 4 for row in drawn[2].flatten(0, 1))


@on_cuda
@pytest.mark.parametrize("compile", [False, True])
def test_a_step_in_place_is_one_launch_on_the_accelerator(compile: bool) -> None:
    x = torch.linspace(-1, 1, 12, device="cuda").reshape(3, 4)
    pushed = torch.full_like(x, 0.25)
    program = Program(lambda state, push: (state[0] * 1.5 + push, state[1] + 1), compile=compile)
    state = x.clone(), torch.zeros((), dtype=torch.int64, device="cuda")
    program.bind(state, pushed)
    assert type(program.advance).__name__ == "_Replay"
    assert torch.equal(state[0], x) and int(state[1]) == 0
    for _ in range(3):
        program.advance()
    pushed.fill_(0.0)  # read where it lies
    program.advance()
    expected = x
    for push in (0.25, 0.25, 0.25, 0.0):
        expected = expected * 1.5 + push
    torch.testing.assert_close(state[0], expected)
    assert int(state[1]) == 4


@on_cuda
def test_a_function_becomes_one_launch_on_the_accelerator() -> None:
    launched = Launched(lambda a, b: [a @ b, (a * 2)[:, :1]])
    first: list[torch.Tensor] = []
    for k in range(6):
        a = torch.full((2, 3), float(k), device="cuda")
        b = torch.ones(3, 2, device="cuda")
        product, column = launched(a, b)
        torch.testing.assert_close(product, a @ b)
        torch.testing.assert_close(column, 2 * a[:, :1])
        first.append(product)
    assert launched.graphed
    assert [float(p[0, 0]) for p in first] == [3.0 * k for k in range(6)]  # a later call writes into none


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        (lambda a: (a @ a).exp().sum(1)[torch.tensor([0, 1], device=a.device)], True),
        (lambda a: torch.linalg.vector_norm(a, dim=-1), True),
        (lambda a: a.sqrt() + a.square().cumsum(0), True),
        (lambda a: torch.linalg.cholesky(a @ a.T), False),
        (lambda a: torch.linalg.solve(a, a), False),
        (lambda a: torch.linalg.qr(a).R, False),
        (lambda a: torch.linalg.eigvalsh(a), False),
        (lambda a: torch.cholesky_solve(a, a), False),
        (lambda a: torch.linalg.slogdet(a).logabsdet, False),
    ],
)
def test_what_may_wait_for_the_device_is_not_tried(
    function: Callable[[torch.Tensor], torch.Tensor], expected: bool
) -> None:
    found = trace(function, torch.eye(3))
    assert all(n.meta["one_launch"] for n in found.graph.nodes if "one_launch" in n.meta) is expected


@pytest.mark.parametrize("kernel", [NUTS, HMC, ChEES, MEADS, MCLMC, SGHMC])
def test_a_step_of_each_sampler_may_become_one_launch(kernel: Any) -> None:
    made = kernel(eight_schools, **({"step_size": 0.3, "friction": 1.0} if kernel is SGHMC else {}))
    mcmc = MCMC(made, 8, 8, num_chains=8, seed=0, progress=False, compile=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        mcmc.run(SCHOOLS_Y, SCHOOLS_SE)
    steps = [run for program in mcmc._programs for run, _ in program._recorded.values()]
    assert steps and all(isinstance(step, torch.fx.GraphModule) for step in steps)
    nodes = [n for step in steps for n in step.graph.nodes]
    assert not {str(n.target) for n in nodes if not n.meta.get("one_launch", True)}


@on_cuda
def test_a_recording_that_breaks_off_leaves_nothing_behind() -> None:
    launched = Launched(lambda a: [a.nonzero().sum().clone()])
    torch.cuda.manual_seed(3)
    expected = torch.rand(3, device="cuda")
    torch.cuda.manual_seed(3)
    for _ in range(5):
        (found,) = launched(torch.tensor([0.0, 1.0, 1.0], device="cuda"))
        assert int(found) == 3
    assert not launched.graphed
    assert torch.equal(torch.rand(3, device="cuda"), expected)


@on_cuda
@pytest.mark.filterwarnings("ignore::inference.SamplerWarning")  # a few trees of the funnel diverge
@pytest.mark.parametrize("kernel", ["nuts", "sghmc"])
def test_samplers_on_the_accelerator_in_one_launch_a_step(kernel: str) -> None:
    data = SCHOOLS_Y.to("cuda"), SCHOOLS_SE.to("cuda")
    made = NUTS(eight_schools) if kernel == "nuts" else SGHMC(eight_schools, step_size=0.3, friction=1.0)
    mcmc = MCMC(made, 600, 300, num_chains=64, seed=0, progress=False)
    mcmc.run(*data)
    assert any(type(p.advance).__name__ == "_Replay" for p in mcmc._programs)
    draws = mcmc.get_samples()
    assert draws["mu"].is_cuda
    assert abs(float(draws["mu"].mean()) - 4.4) < 0.5
    assert mcmc.summary()["mu"]["mean"] == pytest.approx(float(draws["mu"].mean()))
    mcmc.to_arviz()  # it evaluates the log-likelihood where the data are
