"""Variational bounds against closed forms, Pyro, finite differences and themselves run another way."""

import copy
import itertools
import math
from collections.abc import Iterator

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.distributions import constraints
from pyro.infer import Trace_ELBO, TraceEnum_ELBO, config_enumerate
from pyro.infer.autoguide import (
    AutoDelta,
    AutoIAFNormal,
    AutoLowRankMultivariateNormal,
    AutoMultivariateNormal,
    AutoNormal,
)
from pyro.nn import PyroModule, PyroParam
from torch import Tensor, nn

from inference._errors import CaptureWarning
from inference.fit import fit
from inference.objectives.elbo import ELBO
from inference.results.export import to_arviz
from inference.results.predictive import Predictive
from inference.runtime.generators import generator, scoped_seed
from tests.inference import zoo
from tests.inference.zoo import F64

QUIET = {"progress": False}
Y = torch.tensor([0.4, -0.3, 1.2, 0.9, 0.1], dtype=F64)


@pytest.fixture(autouse=True)
def seeded() -> Iterator[None]:
    """Objectives draw from the global generator, as Pyro does."""
    with scoped_seed(0):
        yield


def conjugate(y: Tensor) -> None:
    """mean ~ N(0, 1), y_i ~ N(mean, 0.5^2)."""
    mean = pyro.sample("mean", dist.Normal(y.new_zeros(()), 1.0))
    with pyro.plate("data", 5, subsample_size=len(y)):
        pyro.sample("y", dist.Normal(mean, 0.5), obs=y)


class Guide(PyroModule):
    def __init__(self, loc: float = 0.3, scale: float = 0.4):
        super().__init__()
        self.loc = PyroParam(torch.tensor(loc, dtype=F64))
        self.scale = PyroParam(torch.tensor(scale, dtype=F64), constraint=constraints.positive)

    def forward(self, y: Tensor) -> None:
        pyro.sample("mean", dist.Normal(self.loc, self.scale))


def closed_form(loc: Tensor, scale: Tensor, y: Tensor = Y) -> Tensor:
    likelihood = dist.Normal(loc, 0.5).log_prob(y).sum() - len(y) * scale**2 / (2 * 0.25)
    divergence = torch.distributions.kl_divergence(dist.Normal(loc, scale), dist.Normal(torch.zeros_like(loc), 1.0))
    return likelihood - divergence


def evidence(y: Tensor = Y) -> Tensor:
    n = len(y)
    covariance = 0.25 * torch.eye(n, dtype=F64) + torch.ones(n, n, dtype=F64)
    return dist.MultivariateNormal(torch.zeros(n, dtype=F64), covariance).log_prob(y)


def gradient(objective: nn.Module, *args: Tensor) -> dict[str, Tensor]:
    objective.zero_grad()
    objective(*args).backward()
    return {n: p.grad.clone() for n, p in objective.named_parameters() if p.grad is not None}


def repeated(objective: nn.Module, times: int, *args: Tensor, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Mean and standard error of the gradient, over repetitions."""
    with scoped_seed(seed):
        rows = torch.stack(
            [torch.cat([g.reshape(-1) for g in gradient(objective, *args).values()]) for _ in range(times)]
        )
    return rows.mean(0), rows.std(0) / times**0.5


# ---------------------------------------------------------------- closed forms
def test_value_and_gradient_are_the_closed_form():
    objective = ELBO(conjugate, Guide(), num_particles=20_000)
    with scoped_seed(0):
        loss = objective(Y)
        loss.backward()
    leaves = [torch.tensor(v, dtype=F64, requires_grad=True) for v in (0.3, math.log(0.4))]
    exact = -closed_form(leaves[0], leaves[1].exp())
    # log w has a standard deviation below 4 here, and each gradient one below 6: 5 standard errors
    assert loss.item() == pytest.approx(exact.item(), abs=5 * 4 / math.sqrt(20_000))
    expected = torch.autograd.grad(exact, leaves)
    found = [p.grad for p in objective.parameters()]
    torch.testing.assert_close(torch.stack(found), torch.stack(expected), rtol=0, atol=5 * 6 / math.sqrt(20_000))


def test_the_path_gradient_has_no_noise_at_the_exact_posterior():
    precision = 1 + 5 / 0.25
    guide = Guide((Y.sum() / 0.25 / precision).item(), precision**-0.5)
    path, total = (ELBO(conjugate, guide, 8, gradient=kind) for kind in ("path", "total"))
    with scoped_seed(0):
        assert all(g.abs() < 1e-12 for g in gradient(path, Y).values())
        assert max(g.abs() for g in gradient(total, Y).values()) > 0.01
        # the guide is the posterior: every log-weight is the evidence
        assert path(Y).item() == pytest.approx(-evidence().item(), abs=1e-10)
    found = path.evaluate(Y, num_samples=100)
    assert found.elbo == pytest.approx(evidence().item(), abs=1e-10) and found.elbo_se < 1e-10 and found.pareto_k < 0
    elsewhere = Guide()
    means = [repeated(ELBO(conjugate, elsewhere, 50, gradient=kind), 100, Y) for kind in ("path", "total")]
    for (path_mean, path_error), (mean, error) in itertools.pairwise(means):
        assert ((path_mean - mean).abs() < 4 * (path_error**2 + error**2).sqrt()).all()


def test_the_gradient_is_that_of_finite_differences_with_the_same_noise():
    guide = AutoMultivariateNormal(zoo.eight_schools)
    args = (zoo.SCHOOLS_Y, zoo.SCHOOLS_SE)
    for bound in ("elbo", "iwae"):
        objective = ELBO(zoo.eight_schools, guide, 5, bound=bound)
        with scoped_seed(1):
            objective(*args)  # parameters come to be

        def loss(objective: ELBO = objective) -> Tensor:
            with scoped_seed(2), torch.no_grad():
                return objective(*args)

        with scoped_seed(2):
            gradients = gradient(objective, *args)
        for name, p in objective.named_parameters():
            probe = torch.randn(p.shape, generator=generator(0, name), dtype=p.dtype)
            step = 1e-5
            values = []
            for sign in (1, -1):
                with torch.no_grad():
                    p += sign * step * probe
                values.append(loss())
                with torch.no_grad():
                    p -= sign * step * probe
            slope = (values[0] - values[1]) / (2 * step)
            # central differences: the error is of the order step^2 times third derivatives
            torch.testing.assert_close((gradients[name] * probe).sum(), slope, rtol=1e-5, atol=1e-6)


def test_iwae_grows_with_the_particles_to_the_evidence():
    guide = Guide(0.0, 0.6)
    bounds = []
    for particles in (1, 4, 16, 256):
        objective = ELBO(conjugate, guide, particles, bound="iwae")
        with scoped_seed(3), torch.no_grad():
            values = torch.stack([-objective(Y) for _ in range(400)])
        bounds.append((values.mean().item(), values.std().item() / 20))
    assert bounds[0][0] == pytest.approx(closed_form(*guide_values(guide)).item(), abs=4 * bounds[0][1])
    for (low, low_error), (high, high_error) in itertools.pairwise(bounds):
        assert low < high + 3 * math.hypot(low_error, high_error)
    assert bounds[0][0] < bounds[-1][0] - 0.5
    assert bounds[-1][0] == pytest.approx(evidence().item(), abs=0.02)
    assert ELBO(conjugate, guide).evaluate(Y, num_samples=4000).log_evidence == pytest.approx(
        evidence().item(), abs=0.05
    )


def guide_values(guide: Guide) -> tuple[Tensor, Tensor]:
    return guide.loc.detach(), guide.scale.detach()


def test_minibatches_average_to_the_whole():
    """A guide of no width takes the noise away: what is left is linear in the rows."""
    objective = ELBO(conjugate, Guide(0.3, 1e-9))

    def loss(y: Tensor) -> Tensor:
        with torch.no_grad(), scoped_seed(1):  # the density of the draw is the same in each
            return objective(y)

    loss(Y), loss(Y[:2])  # recorded
    losses = [loss(Y[list(rows)]) for rows in itertools.combinations(range(5), 2)]
    torch.testing.assert_close(torch.stack(losses).mean(), loss(Y), rtol=0, atol=1e-6)
    assert torch.stack(losses).std() > 0.1


# ---------------------------------------------------------------- against Pyro
@pytest.mark.parametrize(
    ("name", "guide"),
    [
        ("eight_schools", AutoNormal),
        ("lkj", AutoMultivariateNormal),
        ("pyro_module", AutoLowRankMultivariateNormal),
        ("logistic", AutoIAFNormal),
        ("dirichlet", AutoDelta),
        ("parameter", AutoNormal),
    ],
)
@pytest.mark.filterwarnings("ignore:ConditionalAutoRegressiveNN")
@pytest.mark.changes_globals("default_dtype")
def test_recorded_and_eager_are_one_and_agree_with_pyro(name, guide):
    torch.set_default_dtype(F64)  # AutoIAFNormal takes its weights' dtype from there
    model, args = zoo.CONTINUOUS[name]
    with scoped_seed(0):
        recorded = ELBO(model, guide(model), 30)
        first = recorded(*args)
        eager = ELBO(model, recorded.guide, 30, record=False)
        eager.own = recorded.own
        eager._pair = recorded._pair
        eager(*args)
        with scoped_seed(5):
            a = gradient(recorded, *args)
        with scoped_seed(5):
            b = gradient(eager, *args)
        assert a.keys() == b.keys() and first.shape == ()
        for key in a:
            torch.testing.assert_close(a[key], b[key], rtol=1e-9, atol=1e-9)
        values = torch.stack([recorded(*args).detach() for _ in range(40)])
        if name != "parameter":
            with pyro.settings.context(module_local_params=True), pyro.get_param_store().scope():
                theirs = torch.tensor([Trace_ELBO().loss(model, recorded.guide, *args) for _ in range(150)])
            error = math.hypot(values.std() / 40**0.5, theirs.std() / 150**0.5)
            assert abs(values.mean() - theirs.mean()) < 4.5 * error + 1e-9


@pytest.mark.parametrize("name", ["mixture", "hmm"])
def test_summed_out_sites(name):
    model, args = zoo.ENUMERATED[name]
    guide = AutoNormal(poutine.block(model, expose=["p", "m", "stay"]))
    objective = ELBO(model, guide, 3)
    with scoped_seed(0):
        objective(*args)
        found = objective.evaluate(*args, num_samples=200)
        with pyro.settings.context(module_local_params=True), pyro.get_param_store().scope():
            pyros = TraceEnum_ELBO(max_plate_nesting=1 if name == "mixture" else 0)
            enumerated = config_enumerate(model, "parallel")
            losses = torch.tensor([-pyros.loss(enumerated, guide, *args) for _ in range(25)])
    error = math.hypot(found.elbo_se, losses.std() / 25**0.5)
    assert abs(found.elbo - losses.mean()) < 4.5 * error


def test_summed_out_sites_in_a_minibatch_against_the_sum_by_hand():
    def mixture(y: Tensor) -> None:
        m = pyro.sample("m", dist.Normal(y.new_zeros(2), 3.0).to_event(1))
        with pyro.plate("data", 20, subsample_size=len(y)):
            c = pyro.sample("c", dist.Categorical(y.new_tensor([0.3, 0.7])))
            pyro.sample("y", dist.Normal(m[c], 1.0), obs=y)

    y = zoo.Y[:5]
    m = torch.tensor([0.5, -1.0], dtype=F64, requires_grad=True)

    def guide(y: Tensor) -> None:
        pyro.sample("m", dist.Delta(pyro.param("at", m.detach().clone()), event_dim=1))

    objective = ELBO(mixture, guide, 2)
    found = objective(y)
    found.backward()
    parts = y.new_tensor([0.3, 0.7]).log() + dist.Normal(m, 1.0).log_prob(y.unsqueeze(1))
    expected = -(dist.Normal(y.new_zeros(()), 3.0).log_prob(m).sum() + 20 / 5 * parts.logsumexp(1).sum())
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(next(objective.parameters()).grad, torch.autograd.grad(expected, m)[0])


# ---------------------------------------------------------------- draws without gradients, parameters of functions
def coin(y: Tensor) -> None:
    z = pyro.sample("z", dist.Bernoulli(y.new_tensor(0.3)))
    r = pyro.sample("r", dist.Gamma(y.new_tensor(3.0), y.new_tensor(2.0)))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(2 * z + 0.3 * r, 1.0), obs=y)


def coin_guide(y: Tensor) -> None:
    q = pyro.param("q", y.new_tensor(0.5), constraint=constraints.unit_interval)
    a = pyro.param("a", lambda: y.new_tensor(2.5), constraint=constraints.positive)
    pyro.sample("z", dist.Bernoulli(q))
    pyro.sample("r", dist.Gamma(a, 2.0))


def coin_bound(u: Tensor, v: Tensor, particles: int, bound: str) -> Tensor:
    """By quadrature over r and the sum over z; for the importance-weighted bound with two particles too."""
    r = torch.linspace(1e-3, 20, 4000, dtype=F64)
    width = r[1] - r[0]
    q_r = dist.Gamma(v.exp(), 2.0).log_prob(r)
    weights, masses = [], []
    for z in (0.0, 1.0):
        q_z = dist.Bernoulli(logits=u).log_prob(torch.tensor(z, dtype=F64))
        p = dist.Bernoulli(torch.tensor(0.3, dtype=F64)).log_prob(torch.tensor(z, dtype=F64))
        p = p + dist.Gamma(3.0, 2.0).log_prob(r) + dist.Normal(2 * z + 0.3 * r.unsqueeze(1), 1.0).log_prob(Y).sum(1)
        weights.append(p - q_z - q_r)
        masses.append((q_z + q_r).exp() * width)
    if bound == "elbo" or particles == 1:
        return -sum((w * m).sum() for w, m in zip(weights, masses, strict=True))
    w, m = torch.cat([x[::8] for x in weights]), torch.cat([8 * x[::8] for x in masses])
    return -(m.unsqueeze(1) * m * (torch.logaddexp(w.unsqueeze(1), w) - math.log(2))).sum()


@pytest.mark.parametrize(("bound", "particles"), [("elbo", 1), ("elbo", 8), ("iwae", 2)])
def test_score_function_gradients_against_quadrature(bound, particles):
    objective = ELBO(coin, coin_guide, particles, bound=bound)
    with torch.no_grad():
        objective(Y)
    leaves = [torch.tensor(v, dtype=F64, requires_grad=True) for v in (0.0, math.log(2.5))]
    expected = torch.stack(torch.autograd.grad(coin_bound(*leaves, particles, bound), leaves))
    mean, error = repeated(objective, 500, Y)
    assert (error < 0.3).all() and ((mean - expected).abs() < 4.5 * error).all()


@pytest.mark.parametrize("summed", [False, True])
@pytest.mark.parametrize(("rows", "batch", "weight"), [(40, 10, 1.0), (5, 5, 0.1)])
def test_scales_are_of_what_a_draw_earns_and_not_of_its_score(rows, batch, weight, summed):
    """One in the score too made the gradient N / B times too large, which moves the optimum of shared parameters."""
    half = torch.tensor(0.5, dtype=F64)

    def model() -> None:
        with pyro.plate("data", rows, subsample_size=batch), poutine.scale(scale=weight):
            if summed:
                pyro.sample("other", dist.Bernoulli(half), infer={"enumerate": "parallel"})
            z = pyro.sample("z", dist.Bernoulli(0.8 * half))
            pyro.sample("y", dist.Normal(2 * z - 1, 1.0), obs=torch.ones(batch, dtype=F64))

    def guide() -> None:
        logit = pyro.param("logit", torch.tensor(0.3, dtype=F64))
        with pyro.plate("data", rows, subsample_size=batch), poutine.scale(scale=weight):
            pyro.sample("z", dist.Bernoulli(logits=logit.expand(batch)))

    logit = torch.tensor(0.3, dtype=F64, requires_grad=True)
    q = torch.stack([1 - logit.sigmoid(), logit.sigmoid()])
    log_p = torch.tensor([0.6, 0.4], dtype=F64).log() + dist.Normal(1.0, 1.0).log_prob(torch.tensor([-1.0, 1.0]))
    (expected,) = torch.autograd.grad(-rows * weight * (q * (log_p - q.log())).sum(), logit)
    objective = ELBO(model, guide, 20)
    with torch.no_grad():
        objective()
    mean, error = repeated(objective, 300)
    assert (error < 0.1 * expected.abs()).all() and ((mean - expected).abs() < 4.5 * error).all()


def test_draws_of_a_mixture_count_by_their_score_alone():
    """The components could be differentiated, but ``has_rsample`` is False: both routes at once would count twice."""

    def law(locs: Tensor) -> dist.MixtureSameFamily:
        return dist.MixtureSameFamily(dist.Categorical(locs.new_tensor([0.4, 0.6])), dist.Normal(locs, 0.3))

    def guide(y: Tensor) -> None:
        pyro.sample("mean", law(pyro.param("locs", y.new_tensor([0.0, 0.6]))))

    objective = ELBO(conjugate, guide, 16)
    with torch.no_grad():
        objective(Y)
    locs = torch.tensor([0.0, 0.6], dtype=F64, requires_grad=True)
    z = torch.linspace(-3, 4, 7001, dtype=F64)
    log_p = dist.Normal(0 * z, 1.0).log_prob(z) + dist.Normal(z.unsqueeze(1), 0.5).log_prob(Y).sum(1)
    log_q = law(locs).log_prob(z)
    expected = torch.autograd.grad(-(log_q.exp() * (log_p - log_q)).sum() * (z[1] - z[0]), locs)[0]
    mean, error = repeated(objective, 400, Y)
    assert (error < 0.15).all() and ((mean - expected).abs() < 4.5 * error).all() and expected.abs().max() > 1


def test_parameters_are_the_objectives_and_two_objectives_do_not_meet():
    with pyro.get_param_store().scope():
        pyro.param("q", torch.tensor(0.123))
        one, two = ELBO(coin, coin_guide, 4), ELBO(coin, coin_guide, 4)
        fit(one, Y, num_steps=300, lr=0.05, **QUIET)
        with torch.no_grad():
            two(Y)
        assert dict(pyro.get_param_store().items()) == {"q": torch.tensor(0.123)}
    assert {n for n, _ in one.named_parameters()} == {"own.q", "own.a"}
    assert two.own.q == 0 and one.own.q.abs() > 0.1


def test_modules_that_functions_name_or_close_over_are_learned():
    net, closed = nn.Linear(1, 2, dtype=F64), Guide()

    def guide(y: Tensor) -> None:
        pyro.module("net", net)
        loc, scale = net(y.mean().reshape(1))
        pyro.sample("mean", dist.Normal(loc, scale.exp()))

    def around(y: Tensor) -> None:
        closed(y)

    for function, wanted in ((guide, set(net.parameters())), (around, set(closed.parameters()))):
        objective = ELBO(conjugate, function, 4)
        with torch.no_grad():
            objective(Y)
        assert set(objective.parameters()) == wanted
        fit(objective, Y, num_steps=5, **QUIET)


# ---------------------------------------------------------------- in fit
def test_fit_reaches_the_posterior_and_the_draws_go_to_arviz():
    guide = AutoNormal(conjugate)
    objective = ELBO(conjugate, guide, 16, gradient="path")
    fit(objective, Y, num_steps=600, lr=0.05, **QUIET)
    precision = 1 + 5 / 0.25
    found = guide.quantiles([0.5])["mean"].item()
    assert found == pytest.approx((Y.sum() / 0.25 / precision).item(), abs=1e-3)
    draws = Predictive(conjugate, guide=guide, num_samples=50)(Y)
    exported = to_arviz({"mean": draws["mean"].reshape(1, 50)})
    assert exported.posterior["mean"].shape == (1, 50)


@pytest.mark.parametrize("bound", ["elbo", "iwae"])
def test_an_interrupted_fit_goes_on_to_the_bit(tmp_path, bound):
    def run(steps_until_interrupt: int | None, path: object) -> dict[str, Tensor]:
        objective = ELBO(conjugate, AutoNormal(conjugate), 4, bound=bound)
        calls = 0

        def stop(_: dict[str, object]) -> None:
            nonlocal calls
            calls += 1
            if steps_until_interrupt is not None and calls >= steps_until_interrupt:
                raise KeyboardInterrupt

        fit(objective, Y, num_steps=60, batch_size=2, lr=0.01, checkpoint=path, checkpoint_every=7, progress=stop)
        return {n: p.detach().clone() for n, p in objective.named_parameters()}

    whole = run(None, None)
    path = tmp_path / "fit.ckpt"
    partial = run(1, path)
    assert any(not torch.equal(partial[n], whole[n]) for n in whole)
    resumed = run(None, path)
    assert all(torch.equal(resumed[n], whole[n]) for n in whole)


def test_validation_and_other_batch_sizes():
    objective = ELBO(conjugate, Guide(), 4)
    result = fit(objective, Y, num_steps=20, batch_size=3, validation=Y, validate_every=10, **QUIET)
    assert result.validation_losses.isfinite().all()


# ---------------------------------------------------------------- recordings
def test_pyro_runs_only_while_recording():
    calls = 0

    def counting(y: Tensor) -> None:
        nonlocal calls
        calls += 1
        conjugate(y)

    objective = ELBO(counting, Guide(), 7)
    objective(Y).backward()
    recorded = calls
    for _ in range(10):
        objective(Y).backward()
    assert calls == recorded <= 4
    objective(Y[:2])
    assert recorded < calls <= 2 * recorded
    assert not torch.equal(objective(Y), objective(Y))  # it draws anew


def test_a_number_of_a_module_may_change():
    class Tempered(PyroModule):
        def __init__(self):
            super().__init__()
            self.temperature = 1.0

        def forward(self, y: Tensor) -> None:
            with poutine.scale(scale=self.temperature):
                conjugate(y)

    model = Tempered()
    objective = ELBO(model, Guide(0.3, 1e-9))
    first = objective(Y)
    model.temperature = 0.5
    log_q = dist.Normal(0.0, 1e-9).log_prob(torch.tensor(0.0)).item()
    assert objective(Y).item() == pytest.approx(0.5 * (first.item() - log_q) + log_q, abs=3.0)
    with torch.no_grad():
        objective.guide.loc_unconstrained += 10.0  # parameters are read, not recorded
    assert objective(Y) > first + 100


def test_what_vmap_refuses_runs_particle_by_particle_with_one_warning():
    def branching(y: Tensor) -> None:
        mean = pyro.sample("mean", dist.Normal(y.new_zeros(()), 1.0))
        shift = 0.0 if mean.item() < 1e6 else 1.0
        with pyro.plate("data", 5, subsample_size=len(y)):
            pyro.sample("y", dist.Normal(mean + shift, 0.5), obs=y)

    objective = ELBO(branching, Guide(), 200)
    with pytest.warns(CaptureWarning, match="particle by particle"):
        loss = objective(Y)
    with scoped_seed(0):
        slow = objective(Y)
        slow.backward()
    assert loss.isfinite() and slow.item() == pytest.approx(
        -closed_form(*guide_values(objective.guide)).item(), abs=1.5
    )
    assert objective.evaluate(Y, num_samples=30).elbo_se > 0


def test_guides_that_enumerate():
    @config_enumerate
    def guide(y: Tensor) -> None:
        pyro.sample("z", dist.Bernoulli(pyro.param("q", y.new_tensor(0.5), constraint=constraints.unit_interval)))
        pyro.sample("r", dist.Delta(y.new_tensor(1.0)))

    objective = ELBO(coin, guide)
    with pytest.warns(CaptureWarning, match="guide enumerates"):
        loss = objective(Y)
    expected = 0.0
    for z in (0.0, 1.0):
        p = dist.Bernoulli(0.3).log_prob(torch.tensor(z)) + dist.Gamma(3.0, 2.0).log_prob(torch.tensor(1.0))
        expected -= 0.5 * (p + dist.Normal(2 * z + 0.3, 1.0).log_prob(Y).sum() - math.log(0.5))
    torch.testing.assert_close(loss, expected, check_dtype=False)
    with pytest.raises(ValueError, match="bound='iwae' does not go"):
        ELBO(coin, guide, bound="iwae")(Y)


def test_a_copy_has_parameters_of_its_own():
    objective = ELBO(conjugate, Guide(), 4)
    objective(Y)
    twin = copy.deepcopy(objective)
    twin(Y).backward()
    assert all(p.grad is None for p in objective.parameters()) and all(p.grad is not None for p in twin.parameters())


# ---------------------------------------------------------------- bad input
@pytest.mark.parametrize(
    ("error", "match", "arguments"),
    [
        (TypeError, "model must be", {"model": 3}),
        (TypeError, "guide must be", {"guide": None}),
        (TypeError, "num_particles", {"num_particles": 2.0}),
        (ValueError, "num_particles", {"num_particles": 0}),
        (ValueError, "bound must be", {"bound": "renyi"}),
        (ValueError, "gradient must be", {"gradient": "reinforce"}),
        (ValueError, "biased for bound='iwae'", {"gradient": "path", "bound": "iwae"}),
    ],
)
def test_bad_arguments(error, match, arguments):
    with pytest.raises(error, match=match):
        ELBO(**{"model": conjugate, "guide": Guide(), **arguments})


def test_pairs_that_do_not_fit():
    def nothing(y: Tensor) -> None:
        pass

    def more(y: Tensor) -> None:
        Guide()(y)
        pyro.sample("other", dist.Normal(y.new_zeros(()), 1.0))

    def wider(y: Tensor) -> None:
        pyro.sample("mean", dist.Normal(y.new_zeros(5), 1.0).to_event(1))

    for guide, match in (
        (nothing, "does not draw the model's latent site 'mean'"),
        (more, "\\['other'\\], which are no latent sites"),
        (wider, "site 'mean' is \\(5,\\) in the guide"),
    ):
        with pytest.raises(ValueError, match=match):
            ELBO(conjugate, guide)(Y)
    with pytest.raises(ValueError, match="at least 25"):
        ELBO(conjugate, Guide()).evaluate(Y, num_samples=24)
    with pytest.raises(ValueError, match="read before it has an initial value"):
        ELBO(conjugate, lambda y: pyro.sample("mean", dist.Normal(pyro.param("never"), 1.0)))(Y)
