"""The potential against Pyro's own, closed forms, and itself run another way."""

import functools
import itertools
import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer.mcmc.util import initialize_model
from pyro.ops.integrator import potential_grad
from torch import Tensor

from inference import CaptureWarning
from inference.potential import CaptureError, LogDensity, Potential, Program, graph, trace
from inference.runtime.generators import scoped_seed
from tests.accelerator import fake_accelerator
from tests.inference import zoo

ALL = {**zoo.CONTINUOUS, **zoo.ENUMERATED}


def positions(potential: Potential, chains: int = 5) -> torch.Tensor:
    return 0.7 * torch.randn(chains, potential.dim, dtype=potential.dtype, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", ALL)
def test_capture_loop_and_pyro_agree_in_float64(name):
    """Three routes to one number: the captured graph mapped over chains, the model chain by chain, and Pyro's
    potential_grad.
    """
    model, args = ALL[name]
    captured = Potential(LogDensity(model, args))
    loop = Potential(LogDensity(model, args), capture=False)
    assert captured.captured and not loop.captured
    z = positions(captured)
    value, gradient = captured.value_and_grad(z)
    slow_value, slow_gradient = loop.value_and_grad(z)
    torch.testing.assert_close(value, slow_value, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(gradient, slow_gradient, rtol=1e-10, atol=1e-10)

    with pyro.validation_enabled(False), pyro.get_param_store().scope(), scoped_seed(0):
        nesting = {"mixture": 1, "hmm": 0}.get(name)
        _, stock, _, _ = initialize_model(model, args, max_plate_nesting=nesting)
        for chain in range(len(z)):
            row = captured.density.unflatten(z[chain])
            grads, energy = potential_grad(stock, {k: v.clone() for k, v in row.items()})
            expected = torch.cat([grads[site].reshape(-1) for site in captured.sites])
            torch.testing.assert_close(value[chain], energy, rtol=1e-10, atol=1e-10)
            torch.testing.assert_close(gradient[chain], expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", ["eight_schools", "logistic", "gaussian_process"])
def test_capture_and_loop_agree_in_float32(name):
    model, args = zoo.CONTINUOUS[name]
    args = tuple(a.float() for a in args)
    captured, loop = Potential(LogDensity(model, args)), Potential(LogDensity(model, args), capture=False)
    assert captured.dtype == torch.float32
    z = positions(captured)
    for a, b in zip(captured.value_and_grad(z), loop.value_and_grad(z), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5 * float(b.abs().max()))


def test_enumerated_mixture_is_the_log_sum_exp():
    potential = Potential(LogDensity(*zoo.ENUMERATED["mixture"]))
    z = positions(potential)
    x = potential.constrain(z)
    for chain in range(len(z)):
        p, m = x["p"][chain], x["m"][chain]
        parts = p.log() + dist.Normal(m, 1.0).log_prob(zoo.Y[:, None])
        log_joint = (
            torch.logsumexp(parts, 1).sum() + dist.Normal(torch.tensor(0.0, dtype=zoo.F64), 3.0).log_prob(m).sum()
        )
        # Dirichlet(1, 1) has log-density log Gamma(2) = 0, and stick-breaking of K = 2 has |dp/du| = p1 p2.
        expected = log_joint + p.log().sum()
        torch.testing.assert_close(-potential(z)[chain], expected, rtol=1e-10, atol=1e-10)


def test_enumerated_hmm_is_the_forward_algorithm():
    potential = Potential(LogDensity(*zoo.ENUMERATED["hmm"]))
    z = positions(potential)
    x = potential.constrain(z)
    for chain in range(len(z)):
        stay, m = x["stay"][chain], x["m"][chain]
        emission = dist.Normal(m, 1.0).log_prob(zoo.Y[:8, None])
        transition = torch.stack([torch.stack([stay, 1 - stay]), torch.stack([1 - stay, stay])]).log()
        alpha = transition[0] + emission[0]
        for t in range(1, 8):
            alpha = torch.logsumexp(alpha[:, None] + transition, 0) + emission[t]
        prior = (
            dist.Beta(torch.tensor(8.0, dtype=zoo.F64), torch.tensor(2.0, dtype=zoo.F64)).log_prob(stay)
            + dist.Normal(torch.tensor(0.0, dtype=zoo.F64), 3.0).log_prob(m).sum()
        )
        expected = torch.logsumexp(alpha, 0) + prior + stay.log() + (1 - stay).log()
        torch.testing.assert_close(-potential(z)[chain], expected, rtol=1e-10, atol=1e-10)


def test_support_that_depends_on_another_latent():
    """x | t ~ Uniform(0, t), t ~ Exponential(1): the sigmoid's scale is t itself, so the Jacobian is t s (1 - s)."""

    def model():
        t = pyro.sample("t", dist.Exponential(torch.tensor(1.0, dtype=zoo.F64)))
        pyro.sample("x", dist.Uniform(torch.zeros((), dtype=zoo.F64), t))

    potential = Potential(LogDensity(model))
    z = positions(potential)
    t, s = z[:, 0].exp(), torch.sigmoid(z[:, 1])
    torch.testing.assert_close(-potential(z), -t + z[:, 0] - t.log() + (t * s * (1 - s)).log(), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(potential.constrain(z)["x"], t * s)


def test_flat_prior():
    def model(y):
        m = pyro.sample("m", dist.ImproperUniform(dist.constraints.real, (), ()))
        with pyro.plate("n", len(y)):
            pyro.sample("y", dist.Normal(m, 1.0), obs=y)

    y = zoo.Y.float()
    potential = Potential(LogDensity(model, (y,)))
    z = positions(potential)
    expected = dist.Normal(z, 1.0).log_prob(y).sum(1)
    torch.testing.assert_close(-potential(z), expected, rtol=1e-5, atol=1e-4)


def minibatch_model(x, y, batch_size=10):
    w = pyro.sample("w", dist.Normal(x.new_zeros(3), 1.0).to_event(1))
    with pyro.plate("n", len(x), subsample_size=batch_size) as index:
        pyro.sample("y", dist.Normal(x[index] @ w, 1.0), obs=y[index])


def test_minibatch_potential_is_unbiased_and_scaled():
    """E9: the mean of 2,000 minibatch potentials is the full one within 3 standard errors; a missing N / B would be
    150 of them off.
    """
    mini = Potential(LogDensity(minibatch_model, (zoo.X, zoo.Y)))
    full = Potential(LogDensity(minibatch_model, (zoo.X, zoo.Y, None)))
    assert mini.plates["n"] == ("n", 50, 10) and not full.plates
    z = positions(mini, 1)
    noise = torch.Generator().manual_seed(0)
    index = torch.stack([torch.randperm(50, generator=noise)[:10] for _ in range(2000)])
    values = mini(z.expand(2000, -1), {"n": index})
    error = (values.mean() - full(z)[0]).abs()
    assert error < 3 * values.std() / math.sqrt(2000)


def discrete_rows(y, batch_size, nested=False):
    """A mixture whose rows have a state each; nested: with three measurements a row, in a plate of their own."""
    loc = pyro.sample("loc", dist.Normal(y.new_zeros(2), 2.0).to_event(1))
    with pyro.plate("n", len(y), subsample_size=batch_size, dim=-1) as index:
        k = pyro.sample("k", dist.Categorical(y.new_tensor([0.3, 0.7])))
        if not nested:
            pyro.sample("y", dist.Normal(loc[k], 1.0), obs=y[index])
        else:
            with pyro.plate("m", 3, dim=-2):
                pyro.sample("y", dist.Normal(loc[k], 1.0), obs=y[index].expand(3, -1))


def discrete_chains(y, batch_size):
    """Sequences of three hidden states, of which a minibatch holds some."""
    loc = pyro.sample("loc", dist.Normal(y.new_zeros(2), 2.0).to_event(1))
    move = y.new_tensor([[0.9, 0.1], [0.3, 0.7]])
    with pyro.plate("n", len(y), subsample_size=batch_size) as index:
        k = torch.zeros((), dtype=torch.long)
        for t in pyro.markov(range(3)):
            k = pyro.sample(f"k{t}", dist.Categorical(move[k]))
            pyro.sample(f"y{t}", dist.Normal(loc[k], 1.0), obs=y[index] + t)


@pytest.mark.parametrize(
    "model",
    [discrete_rows, functools.partial(discrete_rows, nested=True), discrete_chains],
    ids=["rows", "nested", "chains"],
)
def test_discrete_sites_in_a_minibatch_are_summed_out_row_by_row(model):
    """The mean over all ten pairs of five rows is the full density: N / B outside of each row's sum, not within it."""
    y = torch.tensor([0.3, -1.2, 2.5, 0.7, 1.9], dtype=zoo.F64)
    mini, full = Potential(LogDensity(model, (y, 2))), Potential(LogDensity(model, (y, None)))
    assert mini.captured and mini.plates["n"] == ("n", 5, 2)
    z = positions(full, 1)
    pairs = torch.tensor(list(itertools.combinations(range(5), 2)))
    value, gradient = mini.value_and_grad(z.expand(10, -1), {"n": pairs})
    expected, slope = full.value_and_grad(z)
    torch.testing.assert_close(value.mean(), expected[0], rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(gradient.mean(0), slope[0], rtol=1e-10, atol=1e-10)


def test_a_discrete_site_of_which_a_minibatch_holds_a_part_is_refused():
    def shared(y):
        loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
        k = pyro.sample("k", dist.Bernoulli(0.3))
        with pyro.plate("n", len(y), subsample_size=2) as index:
            pyro.sample("y", dist.Normal(loc * k, 1.0), obs=y[index])

    def shared_by_a_group(y):
        loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
        with pyro.plate("groups", 4, dim=-2):
            k = pyro.sample("k", dist.Bernoulli(0.3))
            with pyro.plate("n", len(y), subsample_size=2, dim=-1) as index:
                pyro.sample("y", dist.Normal(loc * k, 1.0), obs=y[index].expand(4, -1))

    for model in (shared, shared_by_a_group):
        with pytest.raises(ValueError, match="discrete site 'k' is summed out, and the subsampled plate 'n'"):
            LogDensity(model, (zoo.Y.float(),))


def test_minibatch_indices_shared_or_per_chain():
    potential = Potential(LogDensity(minibatch_model, (zoo.X, zoo.Y)))
    z = positions(potential, 3)
    index = torch.stack([torch.arange(10), torch.arange(10, 20), torch.arange(5, 15)])
    together, gradient = potential.value_and_grad(z, {"n": index})
    for chain in range(3):
        value, slope = potential.value_and_grad(z[chain : chain + 1], {"n": index[chain]})
        torch.testing.assert_close(together[chain], value[0])
        torch.testing.assert_close(gradient[chain], slope[0])
    with pytest.raises(ValueError, match="minibatch plates"):
        potential(z)


def test_chains_that_would_leave_the_cache_go_in_passes(monkeypatch):
    """Room for 40 chains: 100 go in passes of 40, and 300 in four."""
    model, args = zoo.CONTINUOUS["logistic"]
    potential = Potential(LogDensity(model, args))
    z = positions(potential, 100)
    whole = potential.value_and_grad(z)
    sizes = []
    evaluate = potential._evaluate
    monkeypatch.setattr(potential, "_evaluate", lambda z, *rest: sizes.append(len(z)) or evaluate(z, *rest))
    potential(z)
    assert sizes == [100]
    monkeypatch.setattr("inference.potential.potential._CACHE_BYTES", 40 * potential._widest)
    for a, b in zip(whole, potential.value_and_grad(z), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    potential(positions(potential, 300))
    assert sizes == [100, 40, 40, 20, 75, 75, 75, 75] and potential._widest >= 400


@pytest.mark.parametrize("chunk", [1, 2, 5, 100])
def test_chunks_change_nothing(chunk):
    model, args = zoo.CONTINUOUS["logistic"]
    whole, parts = Potential(LogDensity(model, args)), Potential(LogDensity(model, args), chunk_size=chunk)
    z = positions(whole)
    for a, b in zip(whole.value_and_grad(z), parts.value_and_grad(z), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_the_model_runs_while_capturing_and_never_again():
    calls = []

    def counted(y, se):
        calls.append(1)
        zoo.eight_schools(y, se)

    potential = Potential(LogDensity(counted, (zoo.SCHOOLS_Y, zoo.SCHOOLS_SE)))
    during = len(calls)
    assert during <= 8
    z = positions(potential, 64)
    for _ in range(10):
        potential.value_and_grad(z)
        potential.constrain(z)
    assert len(calls) == during


@pytest.mark.parametrize("kind", ["branch", "float", "tensor"])
def test_a_model_that_reads_values_back_runs_chain_by_chain(kind):
    def model():
        a = pyro.sample("a", dist.Normal(torch.zeros((), dtype=zoo.F64), 1.0))
        if kind == "branch":
            mean = a if a > 0 else -2 * a
        elif kind == "float":
            mean = a * (1.0 + abs(float(a.detach())))
        else:
            mean = a + torch.tensor([a.detach()])[0]
        pyro.sample("y", dist.Normal(mean, 1.0), obs=torch.tensor(1.0, dtype=zoo.F64))

    with pytest.warns(CaptureWarning, match="one chain at a time"):
        potential = Potential(LogDensity(model))
    assert not potential.captured
    z = torch.tensor([[0.5], [-0.5]], dtype=zoo.F64)
    slopes = {"branch": (1.0, 2.0), "float": (1.5, 1.5), "tensor": (2.0, 2.0)}[kind]
    expected = [
        dist.Normal(0.0, 1.0).log_prob(v)
        + dist.Normal(s * abs(v) * (1 if kind == "branch" else v.sign()), 1.0).log_prob(torch.tensor(1.0))
        for v, s in zip(z[:, 0], slopes, strict=True)
    ]
    torch.testing.assert_close(-potential(z), torch.stack(expected), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("power", [False, True])
def test_a_count_of_comparisons_is_a_count(power: bool):
    def model():
        x = pyro.sample("x", dist.Normal(torch.zeros(3, dtype=zoo.F64), 2.0).to_event(1))
        k = sum((x[i] > 1) ** 1 if power else x[i] > 1 for i in range(3))  # begins with the number zero: 0 + flag
        pyro.sample("y", dist.Normal(1.0 * k, 0.5), obs=torch.tensor(3.0, dtype=zoo.F64))

    potential = Potential(LogDensity(model))
    assert potential.captured
    z = torch.tensor([[2.0, 2, 2], [2, 2, 0], [2, 0, 0], [0, 0, 0]], dtype=zoo.F64)
    counts = torch.tensor([3.0, 2, 1, 0], dtype=zoo.F64)
    expected = dist.Normal(0.0, 2.0).log_prob(z).sum(1) + dist.Normal(counts, 0.5).log_prob(torch.tensor(3.0))
    torch.testing.assert_close(-potential(z), expected)


def test_the_graph_is_compared_with_the_model_where_the_prior_is(monkeypatch):
    """A graph that is wrong beyond one standard deviation alone is found out: no point near zero shows it."""

    def drop_flags(node):
        flag = getattr(node.args[1], "meta", {}).get("val") if node.target is torch.ops.aten.mul.Tensor else None
        return isinstance(flag, Tensor) and flag.dtype == torch.bool

    monkeypatch.setattr(graph, "_changes_nothing", drop_flags)

    def model():
        a = pyro.sample("a", dist.Normal(torch.zeros(8, dtype=zoo.F64), 1.0).to_event(1))
        pyro.sample("y", dist.Normal((a * (a.abs() < 1)).sum(), 1.0), obs=torch.tensor(1.0, dtype=zoo.F64))

    with pytest.warns(CaptureWarning, match="other latent values"):
        assert not Potential(LogDensity(model)).captured


def test_a_random_density_is_refused():
    def model():
        a = pyro.sample("a", dist.Normal(0.0, 1.0))
        noisy = torch.nn.functional.dropout(a.expand(10), 0.5).sum()
        pyro.sample("y", dist.Normal(noisy, 1.0), obs=torch.tensor(1.0))

    with pytest.raises(ValueError, match="dropout"):
        Potential(LogDensity(model))


def test_a_failed_cholesky_is_nan_in_its_chain_alone():
    def model(y):
        a = pyro.sample("a", dist.Normal(torch.zeros((), dtype=y.dtype), 1.0))
        k = torch.eye(3, dtype=y.dtype) + a * (1 - torch.eye(3, dtype=y.dtype))
        pyro.sample("y", dist.MultivariateNormal(y.new_zeros(3), k), obs=y)

    potential = Potential(LogDensity(model, (zoo.Y[:3],)))
    assert potential.captured
    z = torch.tensor([[0.2], [1.5], [-0.3]], dtype=zoo.F64)  # 1.5 is not positive definite
    value, gradient = potential.value_and_grad(z)
    assert value.isfinite().tolist() == [True, False, True]
    assert gradient.isfinite()[:, 0].tolist() == [True, False, True]
    for chain in (0, 2):
        alone, _ = potential.value_and_grad(z[chain : chain + 1])
        torch.testing.assert_close(value[chain], alone[0])


def test_discrete_sites_that_cannot_be_summed_out_are_named():
    def model():
        n = pyro.sample("n", dist.Poisson(3.0))
        pyro.sample("a", dist.Normal(n, 1.0))

    with pytest.raises(ValueError, match="'n' is discrete"):
        LogDensity(model)


def test_latent_inside_a_subsampled_plate_is_refused():
    def model(y):
        with pyro.plate("n", len(y), subsample_size=5) as index:
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("y", dist.Normal(z, 1.0), obs=y[index])

    with pytest.raises(ValueError, match="'z' lies inside the subsampled plate 'n'"):
        LogDensity(model, (zoo.Y.float(),))


def test_models_without_latents_and_bad_values_fail_at_the_door():
    with pytest.raises(ValueError, match="no continuous latent site"):
        LogDensity(lambda: pyro.sample("y", dist.Normal(0.0, 1.0), obs=torch.tensor(0.0)))
    with pytest.raises(ValueError, match="scale"):  # Pyro's own message, from the one validated run
        LogDensity(lambda: pyro.sample("y", dist.Normal(0.0, -1.0)))
    covariance = dist.ImproperUniform(dist.constraints.positive_definite, (), (2, 2))
    with pytest.raises(ValueError, match="support of latent site 'cov'"):
        LogDensity(lambda: pyro.sample("cov", covariance))
    density = LogDensity(*zoo.CONTINUOUS["eight_schools"])
    with pytest.raises(ValueError, match=r"missing \['eta', 'tau'\], unknown \['nu'\]"):
        density.flatten({"mu": torch.zeros(2), "nu": torch.zeros(2)})
    with pytest.raises(ValueError, match="'eta' has shape"):
        density.flatten({"mu": torch.zeros(2), "tau": torch.zeros(2), "eta": torch.zeros(2, 7)})


def test_transforms_given_by_the_user_are_used():
    from torch.distributions.transforms import ExpTransform

    def model():
        pyro.sample("s", dist.HalfNormal(torch.tensor(1.0, dtype=zoo.F64)))

    softplus = torch.distributions.transforms.SoftplusTransform()
    z = torch.tensor([[0.3], [-1.0]], dtype=zoo.F64)
    for transform in (ExpTransform(), softplus):
        potential = Potential(LogDensity(model, transforms={"s": transform.inv}))
        x = transform(z[:, 0])
        expected = dist.HalfNormal(1.0).log_prob(x) + transform.log_abs_det_jacobian(z[:, 0], x)
        torch.testing.assert_close(-potential(z), expected, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(potential.constrain(z)["s"], x)


@pytest.mark.parametrize("name", ["eight_schools", "logistic", "factor_mask_scale", "gaussian_process", "markov"])
def test_no_stray_cpu_tensor_on_an_accelerator(name):
    """Under fake tensors a CPU tensor that meets a cuda one is an error, so this is what CI can say about GPUs."""
    model, args = zoo.CONTINUOUS[name]
    with fake_accelerator() as device:
        on_gpu = tuple(torch.empty(a.shape, dtype=a.dtype, device=device) for a in args)
        density = LogDensity(model, on_gpu)
        z = {
            n: torch.empty(s.unconstrained_shape, dtype=s.dtype, device=device, requires_grad=True)
            for n, s in density.sites.items()
        }
        energy = density.run(z)[0]
        energy.backward()
        assert energy.device.type == device.type and all(
            v.grad is not None and v.grad.device.type == device.type for v in z.values()
        )


def test_program_records_again_for_new_shapes_and_rejects_what_it_cannot_hold():
    program = Program(lambda tree, y: ({"sum": tree["a"] + y}, [tree["a"] * 2]), compile=False)
    for size in (2, 3):
        out, (double,) = program({"a": torch.ones(size)}, torch.ones(size))
        assert out["sum"].tolist() == [2.0] * size and double.tolist() == [2.0] * size
    with pytest.raises(TypeError, match="tensors in tuples"):
        program({"a": 1.0}, torch.ones(2))
    with pytest.raises(ValueError, match="compile"):
        Program(lambda x: x, compile="sometimes")
    with pytest.raises(CaptureError):
        trace(lambda x: x if x.sum() > 0 else -x, torch.ones(2))


def test_compiled_program_equals_the_graph():
    potential = Potential(LogDensity(*zoo.CONTINUOUS["logistic"]))
    z = positions(potential, 8)
    plain, fast = Program(potential.value_and_grad, compile=False), Program(potential.value_and_grad, compile=True)
    for a, b in zip(plain(z), fast(z), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)
    assert fast.compiled and not plain.compiled
    assert not Program(potential.value_and_grad, calls=10, compile="auto").compiled


def test_a_step_of_many_numbers_is_worth_compiling_before_one_of_few() -> None:
    """Counted alone, operations on 64,000 numbers weigh as little as those on 64."""
    few, many = (trace(lambda x: (x.sin() * x).exp(), torch.ones(size)) for size in (64, 64_000))
    assert not graph._pays(few, 100_000) and graph._pays(many, 100_000)


def test_a_program_reads_tensors_as_they_lie():
    """Compiled code checks no strides: a transposed input must not be read as if it were contiguous."""
    program = Program(lambda a, b: a @ b + a, compile=True)
    a = torch.randn(3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    b = torch.arange(9.0, dtype=torch.float64).reshape(3, 3)
    for left, right in ((a, b), (a.T, b), (a, b.T)):
        torch.testing.assert_close(program(left, right), left @ right + left)
    with pytest.raises(ValueError, match="contiguous"):
        program.bind((a.T,), b)


@pytest.mark.parametrize("compile", [False, True])
def test_a_program_in_place(compile):
    """It writes what the function makes of the state into the state, reading all of it before; an input that was one
    tensor with another when the program was recorded is its own later.
    """
    zero = torch.zeros(4)
    program = Program(lambda state, step: (state[1], state[0] + state[1] + step), compile=compile)
    program.bind((zero.clone(), zero.clone()), torch.tensor(0.0))()
    a, b, one = torch.zeros(4), torch.ones(4), torch.tensor(1.0)
    advance = program.bind((a, b), one)
    pairs = [(0.0, 1.0)]
    for _ in range(6):
        advance()
        pairs.append((pairs[-1][1], sum(pairs[-1]) + 1.0))
        assert (float(a[0]), float(b[0])) == pairs[-1]
    assert program.recordings == 1 and program.compiled is compile


def test_a_program_tells_equal_inputs_apart():
    """Recorded with one tensor in two places, it must not take them for one ever after."""
    x, y = torch.ones(2), torch.full((2,), 3.0)
    program = Program(lambda a, b: a - b, compile=False)
    assert torch.equal(program(x, x), torch.zeros(2))
    assert torch.equal(program(x, y), torch.full((2,), -2.0))


@pytest.mark.parametrize(("chains", "first"), [(1, "data"), (4, "chains")])
def test_products_of_data_and_the_weights_of_chains_have_the_chains_as_rows(chains: int, first: str) -> None:
    """As columns, few of them fill no vector register in what follows; one chain has the product with a vector."""
    drawn = torch.randn(7 + chains, 3, dtype=zoo.F64, generator=torch.Generator().manual_seed(0))
    x, w = drawn[:7], drawn[7:]
    found = trace(lambda w: torch.vmap(lambda v: (x @ v).tanh())(w), w)
    (product,) = [n for n in found.graph.nodes if n.target is torch.ops.aten.mm.default]
    assert product.args[0].op == ("get_attr" if first == "data" else "placeholder")
    torch.testing.assert_close(found(w), (w @ x.T).tanh())
    assert found(w).is_contiguous()


def test_missing_values_do_not_leave_flat_directions_where_values_are_observed():
    """``obs_mask`` makes a latent of the whole shape; its elements that are observed follow their own law, which
    integrates to one.
    """
    y, seen = torch.tensor([1.0, 0.0, 2.0], dtype=zoo.F64), torch.tensor([True, False, True])

    def model() -> None:
        a = pyro.sample("a", dist.Normal(zoo.zero(y), 1.0))
        with pyro.plate("n", 3), poutine.mask(mask=torch.tensor([True, True, False])):
            pyro.sample("y", dist.Normal(a, 1.0), obs=y, obs_mask=seen)

    potential = Potential(LogDensity(model))
    a, missing = torch.tensor(0.3, dtype=zoo.F64), torch.tensor([0.4, -0.5, 0.6], dtype=zoo.F64)
    z = potential.density.flatten({"a": a[None], "y_unobserved": missing[None]})
    law = dist.Normal(a, 1.0)
    # the user's own mask still holds: the third row counts neither as data nor as a missing value
    expected = dist.Normal(0.0, 1.0).log_prob(a) + law.log_prob(y[0]) + law.log_prob(missing[:2]).sum()
    torch.testing.assert_close(-potential(z)[0], expected, rtol=1e-12, atol=1e-12)


def test_a_model_that_fails_at_some_draws_of_its_latents_is_no_faulty_one():
    """As one that solves an equation of motion, which explodes at many values."""
    runs: list[Tensor] = []

    def model() -> None:
        a = pyro.sample("a", dist.Normal(torch.zeros((), dtype=zoo.F64), 1.0))
        runs.append(a)
        mean = torch.where(a < 0.0, a, torch.full_like(a, math.nan))
        pyro.sample("y", dist.Normal(mean, 1.0), obs=torch.tensor(1.0, dtype=zoo.F64))

    density = LogDensity(model)
    assert len(runs) > 1 and float(runs[-1]) < 0.0 <= float(runs[0]) and density.dim == 1

    def faulty() -> None:
        a = pyro.sample("a", dist.Normal(torch.zeros((), dtype=zoo.F64), 1.0))
        pyro.sample("y", dist.Normal(a, -1.0), obs=torch.tensor(1.0, dtype=zoo.F64))

    with pytest.raises(ValueError, match="scale"):
        LogDensity(faulty)


def test_a_masked_site_that_is_called_observed_is_no_pair_of_the_latent_one() -> None:
    """Only the two sites that ``obs_mask`` makes belong together: here the latent one has a mask of nobody's."""
    seen = torch.tensor([True, False, True])

    def model() -> None:
        depth = pyro.sample("depth", dist.Normal(torch.zeros(()), 1.0))
        with pyro.plate("n", 3), pyro.poutine.mask(mask=seen):
            pyro.sample("depth_observed", dist.Normal(depth, 1.0), obs=torch.ones(3))

    def turned() -> None:  # the observed site first
        with pyro.plate("n", 3), pyro.poutine.mask(mask=seen):
            pyro.sample("depth_observed", dist.Normal(torch.zeros(3), 1.0), obs=torch.ones(3))
        pyro.sample("depth", dist.Normal(torch.zeros(()), 1.0))

    z = torch.tensor([[0.5]])
    for text, gradient in ((model, 0.5 + 2 * (0.5 - 1.0)), (turned, 0.5)):
        assert float(Potential(LogDensity(text, ())).value_and_grad(z)[1]) == pytest.approx(gradient)
