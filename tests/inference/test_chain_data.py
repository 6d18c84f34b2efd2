"""Chains with their own data: one recorded graph, each row the posterior of its own data set."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import config_enumerate

from inference import HMC, MCMC, SGLD, CheckpointError, ScaleGibbs
from inference.potential import LogDensity, Potential
from tests.inference import zoo

F64 = torch.float64
CHAINS = 5
_g = torch.Generator().manual_seed(11)
X = torch.randn(CHAINS, 20, 3, generator=_g, dtype=F64)
Y = torch.randn(CHAINS, 20, generator=_g, dtype=F64)
WEIGHT = torch.rand(20, generator=_g, dtype=F64) + 0.5


def regression(x, y, weight):
    """Constrained, deterministic and data-dependent sites: the support of ``w`` reaches to the chain's own extremes."""
    bound = 1 + y.abs().max()
    w = pyro.sample("w", dist.Uniform(-bound, bound).expand([3]).to_event(1))
    scale = pyro.sample("scale", dist.Gamma(x.new_full((), 2.0), x.new_full((), 1.0)))
    pyro.deterministic("bound", bound)
    with pyro.plate("n", len(y)):
        pyro.sample("y", dist.Normal(x @ w, scale / weight.sqrt()), obs=y)


def branching(x, y, weight):
    if y[0] > 0:
        pyro.factor("shift", -y.square().sum())
    regression(x, y, weight)


def minibatch(x, y, weight):
    w = pyro.sample("w", dist.Normal(x.new_zeros(3), 1.0).to_event(1))
    with pyro.plate("n", len(x), subsample_size=6) as i:
        pyro.sample("y", dist.Normal(x[i] @ w, weight[i]), obs=y[i])


@config_enumerate
def enumerated(x, y, weight):
    m = pyro.sample("m", dist.Normal(x.new_zeros(2), 3.0).to_event(1))
    with pyro.plate("n", len(y)):
        c = pyro.sample("c", dist.Categorical(x.new_full((2,), 0.5)))
        pyro.sample("y", dist.Normal(m[c], weight), obs=y)


IN_DIMS = (0, 0, None)
MODELS = {f.__name__: f for f in (regression, minibatch, enumerated)}


def potential(model=regression, *, in_dims=IN_DIMS, **options):
    return Potential(LogDensity(model, (X, Y, WEIGHT), in_dims=in_dims), **options)


def separate(model, chain):
    return Potential(LogDensity(model, (X[chain], Y[chain], WEIGHT)), capture=False)


def positions(p, n=CHAINS):
    return torch.randn(n, p.dim, generator=torch.Generator().manual_seed(3), dtype=F64)


@pytest.mark.parametrize("options", [{}, {"chunk_size": 2}, {"capture": False}], ids=str)
@pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)
def test_each_row_is_the_potential_of_its_own_data(model, options):
    together = potential(model, **options)
    assert together.captured == options.get("capture", True)
    z = positions(together)
    batch = together.density.minibatch(1)
    energy, gradient = together.value_and_grad(z, batch)
    constrained = together.constrain(z, deterministic=True)
    for chain in range(CHAINS):
        alone = separate(model, chain)
        one = alone.value_and_grad(z[chain : chain + 1], batch)
        torch.testing.assert_close(energy[chain], one[0][0], rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(gradient[chain], one[1][0], rtol=1e-10, atol=1e-10)
        for name, value in alone.constrain(z[chain : chain + 1], deterministic=True).items():
            torch.testing.assert_close(constrained[name][chain], value[0], rtol=1e-12, atol=1e-12)


def test_indices_and_data_may_both_differ():
    p = potential(minibatch)
    z = positions(p)
    indices = torch.stack([torch.randperm(20, generator=_g)[:6] for _ in range(CHAINS)])
    energy = p(z, {"n": indices})
    for chain in range(CHAINS):
        one = separate(minibatch, chain)(z[chain : chain + 1], {"n": indices[chain]})
        torch.testing.assert_close(energy[chain], one[0], rtol=1e-10, atol=1e-10)


def test_draws_of_all_chains_are_constrained_with_their_own_data():
    p = potential()
    z = positions(p, CHAINS * 4)
    together = p.constrain(z)["w"].unflatten(0, (CHAINS, 4))
    for chain in range(CHAINS):
        alone = separate(regression, chain).constrain(z.unflatten(0, (CHAINS, 4))[chain])["w"]
        torch.testing.assert_close(together[chain], alone, rtol=1e-12, atol=1e-12)


def test_the_model_runs_no_more_often_for_more_chains():
    """One trace serves all chains: the data are inputs of the graph and no constants."""
    calls = []

    def counted(x, y, weight):
        calls.append(None)
        regression(x, y, weight)

    counts = []
    for copies in (1, 20):
        calls.clear()
        args = (X.repeat(copies, 1, 1), Y.repeat(copies, 1), WEIGHT)
        p = Potential(LogDensity(counted, args, in_dims=IN_DIMS))
        p.value_and_grad(positions(p, copies * CHAINS))
        counts.append(len(calls))
    assert counts[0] == counts[1] < 12


def test_a_branch_on_the_data_runs_chain_by_chain():
    with pytest.warns(match="one chain at a time"):
        p = potential(branching)
    z = positions(p)
    assert not p.captured and len(set((Y[:, 0] > 0).tolist())) == 2
    for chain in range(CHAINS):
        torch.testing.assert_close(p(z)[chain], separate(branching, chain)(z[chain : chain + 1])[0])


# ---------------------------------------------------------------------- the driver
def run(*args, kernel=None, in_dims=IN_DIMS, **options):
    settings = {"num_samples": 12, "warmup_steps": 10, "num_chains": CHAINS, "progress": False, **options}
    kernel = kernel or SGLD(regression, step_size=1e-3)
    return MCMC(kernel, in_dims=in_dims, **settings).run(*(args or (X, Y, WEIGHT)))


def test_a_chain_alone_is_the_row_of_the_batch():
    """Without adaptation chains share nothing, so the first chain alone makes the draws that it makes among others."""
    kernel = HMC(regression, step_size=0.05, num_steps=4, adapt_step_size=False, adapt_mass_matrix=False)
    together = run(kernel=kernel).get_samples(group_by_chain=True)
    for options in ({"in_dims": IN_DIMS}, {"in_dims": None}):
        first = (X[:1], Y[:1], WEIGHT) if options["in_dims"] else (X[0], Y[0], WEIGHT)
        alone = run(*first, kernel=kernel, num_chains=1, **options).get_samples(group_by_chain=True)
        for name, value in alone.items():
            torch.testing.assert_close(together[name][:1], value, rtol=1e-9, atol=1e-9)


def test_chains_start_inside_their_own_support():
    """Each chain's first point is drawn from its own model: scaled data move it, though the noise is the same."""

    def start(y):
        def model(y):
            a = pyro.sample("a", dist.Normal(y.mean(), 1e-3))
            pyro.sample("y", dist.Normal(a, 1.0).expand([20]).to_event(1), obs=y)

        kernel = SGLD(model, step_size=1e-9, init_strategy=pyro.infer.autoguide.init_to_sample)
        return run(y, kernel=kernel, in_dims=(0,), num_samples=1, warmup_steps=0).get_samples()["a"]

    y = Y + 10 * torch.arange(CHAINS, dtype=F64)[:, None]
    torch.testing.assert_close(start(y), y.mean(1), rtol=0, atol=0.02)


def test_keyword_arguments_are_mapped_by_name():
    kernel = SGLD(regression, step_size=1e-3)
    options = {"num_samples": 12, "warmup_steps": 10, "num_chains": CHAINS, "progress": False}
    expected = run().get_samples()["w"]
    for in_dims, args, kwargs in (
        ({"x": 0, "y": 0}, (), {"x": X, "y": Y, "weight": WEIGHT}),
        ((0, {"y": 0}), (X,), {"y": Y, "weight": WEIGHT}),
    ):
        mcmc = MCMC(kernel, in_dims=in_dims, **options).run(*args, **kwargs)
        assert torch.equal(mcmc.get_samples()["w"], expected)


def test_a_checkpoint_of_other_rows_is_refused(tmp_path):
    first = run(checkpoint=tmp_path)
    assert torch.equal(first.get_samples()["w"], run(checkpoint=tmp_path).get_samples()["w"])
    with pytest.raises(CheckpointError, match="other settings, data or model"):
        run(X, Y.flip(0), WEIGHT, checkpoint=tmp_path)


def test_what_would_pool_different_posteriors_is_refused():
    mcmc = run()
    for pooled in (mcmc.summary, mcmc.diagnostics, mcmc.to_arviz):
        with pytest.raises(ValueError, match="different posteriors"):
            pooled()


def gamma_scale(x, y, weight):
    v = pyro.sample("v", dist.InverseGamma(x.new_full((), 2.0), x.new_full((), 2.0)))
    w = pyro.sample("w", dist.Normal(x.new_zeros(3), v.sqrt()).to_event(1))
    with pyro.plate("n", len(y)):
        pyro.sample("y", dist.Normal(x @ w, 1.0), obs=y)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"in_dims": (0, 0)}, ValueError, "2 entries for positional arguments, and run was called with 3"),
        ({"in_dims": (0, 1, None)}, TypeError, "0 or None for argument 1, got 1"),
        ({"in_dims": (0, True, None)}, TypeError, "0 or None for argument 1"),
        ({"in_dims": 0}, TypeError, "in_dims must be a tuple"),
        ({"in_dims": {"z": 0}}, ValueError, r"keyword arguments \['z'\]"),
        ({"in_dims": (0, 0, 0)}, ValueError, "disagree in their number of chains"),
        ({"num_chains": 4}, ValueError, "5 rows over chains; num_chains is 4"),
        (
            {"kernel": HMC(potential_fn=lambda z: z["a"].square().sum()), "initial_params": {"a": Y}},
            ValueError,
            "in_dims maps the arguments of a model",
        ),
        (
            {"kernel": SGLD(gamma_scale, step_size=0.01, gibbs=[ScaleGibbs("v", "w")])},
            ValueError,
            "cannot be used with in_dims",
        ),
    ],
)
def test_bad_in_dims_are_named(options, error, message):
    with pytest.raises(error, match=message):
        run(**options)


def test_arguments_that_cannot_be_mapped_and_rows_that_do_not_match_are_named():
    with pytest.raises(TypeError, match="argument 0, which must be a tensor, got list"):
        LogDensity(regression, ([1.0], Y, WEIGHT), in_dims=IN_DIMS)
    with pytest.raises(ValueError, match="leading dimension must be the chain"):
        LogDensity(regression, (torch.tensor(1.0), Y, WEIGHT), in_dims=IN_DIMS)
    p = potential()
    with pytest.raises(ValueError, match="one row a chain"):
        p.value_and_grad(positions(p, 3))
    with pytest.raises(ValueError, match="no multiple"):
        p.constrain(positions(p, 7))


def test_models_without_data_of_their_own_are_as_before():
    p = Potential(LogDensity(zoo.eight_schools, (zoo.SCHOOLS_Y, zoo.SCHOOLS_SE)))
    assert p.data == () and p.value_and_grad(positions(p, 3))[0].shape == (3,)
