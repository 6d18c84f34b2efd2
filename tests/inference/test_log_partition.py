"""AIS both ways, bridge and importance sampling against closed forms, quadrature and their own error bars."""

import math
import warnings

import pyro
import pyro.distributions as dist
import pytest
import torch

from inference import HMC, MCMC, NonFiniteError, SamplerWarning
from inference.log_partition import ais, ais_sandwich, annealed_log_weights, bridge_sampling, importance
from inference.potential import TemperedFunction
from inference.results.evidence import bridge, from_weights, sandwich, tail_shape
from inference.results.pareto import pareto_k
from tests.inference import evidence_cases as cases

F64 = torch.float64


def normals(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, dtype=F64, generator=torch.Generator().manual_seed(seed))


def exact_draws(num: int, seed: int = 0) -> dict[str, torch.Tensor]:
    """Of the posterior of ``cases.regression``."""
    law = cases.regression_posterior()
    return {"w": law.mean + normals(num, 2, seed=seed) @ law.scale_tril.T}


# ---------------------------------------------------------------- annealing
def test_both_directions_and_their_errors_are_calibrated():
    """200 groups of 100 chains, from exact draws at either end.

    E[forward] <= log Z <= E[reverse], each bound significant here, and the z-scores of all three estimates have
    variance near 1 (their own standard error 0.1).  A weight taken after the move, a dropped temperature or a lost
    Jacobian moves the mean by many standard errors.
    """
    target, truth, law = cases.gaussian_target(4)
    chains, groups = 20_000, 200
    start = {"x": law.base_dist.loc + law.base_dist.scale * normals(chains, 4)}
    both = ais_sandwich(target, num_chains=chains, num_temperatures=24, num_steps=2, posterior_samples=start, seed=1)
    forward, reverse = both.log_weights.reshape(groups, -1), both.reverse_log_weights.reshape(groups, -1)
    low = [from_weights(f, "") for f in forward]
    high = [from_weights(r, "", reverse=True) for r in reverse]
    middle = [sandwich(f, r, "") for f, r in zip(forward, reverse, strict=True)]
    for results in (low, high, middle):
        z = torch.tensor([(r.value - truth) / r.standard_error for r in results])
        assert 0.7 < z.var() < 1.35
        assert abs(z.mean()) < 0.35
    lower, upper = (torch.tensor([r.value for r in results]) for results in (low, high))
    assert lower.mean() < truth + 2 * lower.std() / math.sqrt(groups)
    assert upper.mean() > truth - 2 * upper.std() / math.sqrt(groups)
    # each bound holds in 97 % of the groups, of which 93 % are three errors below
    for results in (low, middle):
        assert sum(r.lower <= truth for r in results) > 0.93 * groups
    for results in (high, middle):
        assert sum(r.upper >= truth for r in results) > 0.93 * groups
    # the weights themselves are unbiased, which the logarithm hides
    for weights in ((forward - truth).exp(), (truth - reverse).exp()):
        assert abs(weights.mean() - 1) < 3.5 * weights.std() / math.sqrt(chains)
    # the bridge is better than either side, and all of it together is within its error
    spread = torch.tensor([r.value for r in middle]).std()
    assert spread < lower.std() and spread < upper.std()
    assert both.exact and abs(both.value - truth) < 3.5 * both.standard_error


def test_few_temperatures_leave_the_bounds_apart():
    """With two temperatures Jensen's gap is wide, and on the right side."""
    target, truth, law = cases.gaussian_target(8)
    start = {"x": law.base_dist.loc + law.base_dist.scale * normals(4000, 8)}
    weights = ais_sandwich(target, num_chains=4000, num_temperatures=2, posterior_samples=start)
    groups = zip(weights.log_weights.reshape(200, -1), weights.reverse_log_weights.reshape(200, -1), strict=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SamplerWarning)  # a few of the groups hardly overlap
        lower, upper = torch.tensor([sandwich(f, r, "")[2:4] for f, r in groups]).T
    assert lower.mean() + 4 * lower.std() / math.sqrt(200) < truth < upper.mean() - 4 * upper.std() / math.sqrt(200)


@pytest.mark.parametrize("name", cases.MODELS)
def test_models_within_their_errors(name):
    """Within 3.5 errors below 0.03, forward and between approximate bounds; the record says that those are."""
    truth = cases.truth(name)
    found = ais_sandwich(cases.path(name), num_chains=500, num_temperatures=50, num_burn_in=20, seed=2)
    assert found.standard_error < 0.03 and not found.exact
    assert abs(found.value - truth) < 3.5 * found.standard_error
    forward = from_weights(found.log_weights, "AIS")
    assert abs(forward.value - truth) < 3.5 * forward.standard_error
    assert found.lower == forward.value - 2 * forward.standard_error


def test_one_direction_of_a_model():
    """From the exact posterior down, and from the prior up, each with its one bound."""
    truth, options = cases.regression_evidence(), {"num_chains": 300, "num_temperatures": 30, "seed": 3}
    start = exact_draws(300)
    high = ais(cases.path("closed-form"), direction="reverse", posterior_samples=start, **options)
    low = ais(cases.regression, cases.X, cases.Y, **options)
    assert f"log Z = {low.value:.4f}" in str(low) and len(str(low)) < 160  # printed without its 300 weights
    assert high.upper == high.value + 2 * high.standard_error and high.lower == -math.inf
    assert low.lower == low.value - 2 * low.standard_error and low.upper == math.inf
    for found in (low, high):
        assert found.ess > 50 and found.standard_error < 0.15
        assert abs(found.value - truth) < 3.5 * found.standard_error


def test_annealing_from_wide_priors():
    """Steps go where chains are slow.  With 256, as many between any two of the pilot's temperatures, log Z was 1.0 low
    on average with an error of 0.2 (0.4 and 0.1 with 1,024); a pilot that moved its particles twice was half of that.
    """
    truth = cases.wide_regression_evidence()
    found = [ais(cases.wide_regression, cases.WIDE_X, cases.WIDE_Y, seed=seed) for seed in range(4)]
    z = [(f.value - truth) / f.standard_error for f in found]
    assert max(map(abs, z)) < 3.5 and abs(sum(z)) < 3.5 * 2, z


def test_annealing_that_few_chains_survive_is_warned_of():
    """Six variables known to 0.001 from a prior of width 1, in three temperatures: one chain has all the weight."""

    def model():
        x = pyro.sample("x", dist.Normal(0.0, 1.0).expand([6]).to_event(1))
        pyro.sample("y", dist.Normal(x, 1e-3).to_event(1), obs=torch.zeros(6))

    with pytest.warns(SamplerWarning, match="effective weights of 40") as caught:
        found = ais(model, num_chains=40, num_temperatures=3)
    assert found.ess < 5 and caught[0].filename == __file__


def test_seed_ladder_and_shared_draws():
    """Simulated data come with one exact draw: the bound holds in expectation, and there is no spread to see."""
    target, _, _ = cases.gaussian_target()
    options = {"num_chains": 20, "num_temperatures": 8}
    assert torch.equal(ais(target, seed=1, **options).log_weights, ais(target, seed=1, **options).log_weights)
    assert not torch.equal(ais(target, seed=1, **options).log_weights, ais(target, seed=2, **options).log_weights)
    one = ais_sandwich(target, posterior_samples={"x": torch.ones(1, 2, dtype=F64)}, **options)
    assert one.exact and math.isnan(one.standard_error) and math.isfinite(one.upper)
    # one step from 0 to 1 is plain importance sampling from the base
    single = ais(target, inverse_temperatures=[1.0], num_chains=500)
    plain = importance(target, num_samples=500)
    assert abs(single.value - plain.value) < 3.5 * math.hypot(single.standard_error, plain.standard_error)


def test_groups_are_the_unit_of_the_error():
    """Weights that repeat in groups of five are as good as a fifth of them."""
    x = normals(200)
    repeated = from_weights(x.repeat(5), "", groups=torch.arange(200).repeat(5))
    assert repeated.standard_error == pytest.approx(from_weights(x, "").standard_error, rel=1e-9)


def test_core_with_a_discrete_gibbs_transition():
    """Eight binary units in a ring with couplings beta J: Z by enumeration of 256 states; independent of HMC."""
    coupling = 0.8
    states = ((torch.arange(256)[:, None] >> torch.arange(8)) % 2).to(F64) * 2 - 1

    def score(s: torch.Tensor) -> torch.Tensor:
        return coupling * (s * s.roll(1, -1)).sum(-1)

    truth = float(torch.logsumexp(score(states), 0)) - 8 * math.log(2)
    g = torch.Generator().manual_seed(0)
    betas = torch.linspace(0, 1, 41, dtype=F64)

    def gibbs(s: torch.Tensor, k: int) -> torch.Tensor:
        for site in torch.randperm(8, generator=g).tolist():
            field = betas[k] * coupling * (s[:, site - 1] + s[:, (site + 1) % 8])
            up = torch.rand(len(s), generator=g, dtype=F64) < torch.sigmoid(2 * field)
            s = s.clone()
            s[:, site] = up.to(F64) * 2 - 1
        return s

    start = (torch.rand(2000, 8, generator=g, dtype=F64) < 0.5).to(F64) * 2 - 1
    log_increment = lambda s, k: (betas[k] - betas[k - 1]) * score(s)  # noqa: E731
    _, forward = annealed_log_weights(start, 40, log_increment, gibbs)
    exact = states[torch.multinomial(torch.softmax(score(states), 0), 2000, replacement=True, generator=g)]
    _, reverse = annealed_log_weights(exact, 40, log_increment, gibbs, reverse=True)
    for found in (from_weights(forward, ""), from_weights(reverse, "", reverse=True), sandwich(forward, reverse, "")):
        assert found.standard_error < 0.02
        assert abs(found.value - truth) < 3.5 * found.standard_error


# ---------------------------------------------------------------- bridge and importance sampling
def test_bridge_of_two_normals_is_calibrated():
    """Ratio of constants of N(0, 1) and 3 N(0.5, 0.7^2): z-scores of 200 repetitions have variance near 1."""
    scores = []
    for seed in range(200):
        x, y = normals(300, seed=seed), 0.5 + 0.7 * normals(200, seed=1000 + seed)

        def log_ratio(z: torch.Tensor) -> torch.Tensor:
            return math.log(3 / 0.7) - 0.5 * ((z - 0.5) / 0.7).square() + 0.5 * z.square()

        value, variance = bridge(log_ratio(x), log_ratio(y))
        scores.append((value - math.log(3)) / math.sqrt(variance))
    z = torch.tensor(scores)
    assert 0.7 < z.var() < 1.35 and abs(z.mean()) < 0.3


@pytest.mark.parametrize("spread", [5.0, 10.0, 20.0])
def test_the_bridge_of_laws_that_hardly_overlap_is_the_root_and_says_so(spread):
    """Meng and Wong's iteration stopped at its limit up to a hundred nats from the root of its own equation."""
    noise = torch.Generator().manual_seed(0)
    at_proposal, at_target = (
        spread * torch.randn(256, generator=noise, dtype=F64) + sign * spread**2 / 2 for sign in (-1, 1)
    )
    low, high = -2000.0, 2000.0
    for _ in range(100):
        middle = (low + high) / 2
        above = torch.nn.functional.logsigmoid(at_proposal - middle).logsumexp(0)
        below = torch.nn.functional.logsigmoid(middle - at_target).logsumexp(0)
        low, high = (middle, high) if above > below else (low, middle)
    if spread > 5:
        with pytest.warns(SamplerWarning, match="effective draws that both laws know"):
            value, _ = bridge(at_proposal, at_target)
    else:
        value, _ = bridge(at_proposal, at_target)
    assert value == pytest.approx(middle, abs=1e-9)
    # Draws without density pull the root below every weight.
    none = torch.cat([torch.full((9 * 256,), -math.inf, dtype=F64), at_proposal[:0]])
    value, _ = bridge(torch.cat([none, torch.zeros(256, dtype=F64)]), torch.zeros(10 * 256, dtype=F64))
    assert value == pytest.approx(math.log(0.1), abs=1e-9)


def test_the_bridge_of_laws_that_do_not_overlap_at_all_says_so():
    with pytest.warns(SamplerWarning, match=r"rests on 0\.0 effective draws"):
        bridge(-5000 + normals(200, 1)[:, 0], 5000 + normals(200, 1)[:, 0])


@pytest.mark.parametrize("warp", ["none", "normal", "symmetric"])
def test_bridge_sampling_from_markov_chains(warp):
    """Draws of HMC in constrained space, evidence by quadrature."""
    truth = cases.location_scale_evidence()
    found = bridge_sampling(cases.path("quadrature-2d"), _draws(), warp=warp, seed=1)
    assert found.standard_error < 0.03 and abs(found.value - truth) < 3.5 * found.standard_error


_cache: dict[str, torch.Tensor] = {}


def _draws() -> dict[str, torch.Tensor]:
    if not _cache:
        mcmc = MCMC(HMC(cases.location_scale, num_steps=6), 300, 150, num_chains=8, progress=False)
        _cache.update(mcmc.run(cases.SCALE_Y).get_samples(group_by_chain=True))
    return _cache


def test_error_of_the_bridge_counts_autocorrelation():
    """Each target draw repeated ten times in its chain is worth no more than once."""
    x, y = 0.4 * normals(100_000), 0.5 + 0.7 * normals(4, 250, seed=1)
    log_ratio = lambda z: -0.5 * ((z - 0.5) / 0.7).square() + 0.5 * (z / 0.4).square()  # noqa: E731
    _, once = bridge(log_ratio(x), log_ratio(y).flatten(), chains=4)
    _, sticky = bridge(log_ratio(x), log_ratio(y.repeat_interleave(10, 1)).flatten(), chains=4)
    _, blind = bridge(log_ratio(x), log_ratio(y.repeat_interleave(10, 1)).flatten())
    assert sticky == pytest.approx(once, rel=0.3) and blind < 0.5 * once


def test_importance_with_a_proposal_and_from_the_prior():
    truth, law = cases.regression_evidence(), cases.regression_posterior()
    wide = torch.distributions.MultivariateNormal(law.mean, 1.5 * law.covariance_matrix)
    found = importance(cases.regression, cases.X, cases.Y, proposal=wide, num_samples=2000)
    assert found.standard_error < 0.02 and found.pareto_k < 0.5 and found.upper == math.inf
    assert abs(found.value - truth) < 3.5 * found.standard_error
    prior = importance(cases.path("quadrature-2d"), num_samples=20_000)
    assert abs(prior.value - cases.location_scale_evidence()) < 3.5 * prior.standard_error
    base = torch.distributions.Independent(torch.distributions.Normal(torch.zeros(1, dtype=F64), 1.0), 1)
    narrow = TemperedFunction(lambda z: -0.5 * ((z[:, 0] - 6) / 2).square(), base)
    with pytest.warns(SamplerWarning, match="Pareto k"):
        assert importance(narrow).pareto_k > 0.7


def test_a_tail_that_has_no_shape():
    x = normals(3000)
    assert tail_shape(x) == pareto_k(x)
    assert math.isnan(tail_shape(torch.zeros(100, dtype=F64))) and math.isnan(tail_shape(x[:10]))


def test_refusals():
    args = (cases.X, cases.Y)
    for options, error, message in (
        ({"direction": "up"}, ValueError, "direction must be"),
        ({"direction": "reverse"}, ValueError, "give both or neither"),
        ({"posterior_samples": exact_draws(3)}, ValueError, "give both or neither"),
        ({"num_chains": 1}, ValueError, "num_chains must be at least 2"),
        ({"num_temperatures": 0}, ValueError, "num_temperatures"),
        ({"inverse_temperatures": [0.5, 2.0]}, ValueError, "increase strictly"),
    ):
        with pytest.raises(error, match=message):
            ais(cases.regression, *args, **options)
    with pytest.raises(ValueError, match="warp"):
        bridge_sampling(cases.regression, {}, *args, warp="triangular")
    with pytest.raises(ValueError, match=r"must be \(chain, draw"):
        bridge_sampling(cases.regression, {"w": torch.zeros(5)}, *args)
    with pytest.raises(ValueError, match="too few"):
        bridge_sampling(cases.path("closed-form"), {"w": torch.zeros(1, 6, 2)})
    with pytest.raises(ValueError, match="singular"):
        bridge_sampling(cases.path("closed-form"), {"w": torch.zeros(2, 20, 2)})
    base = cases.gaussian_target()[0].base
    half = TemperedFunction(lambda z: torch.where(z[:, 0] > 0, base.log_prob(z), -math.inf), base)
    with pytest.raises(ValueError, match="are not of this posterior"):
        ais(half, direction="reverse", posterior_samples={"x": -torch.ones(2, 2, dtype=F64)}, num_temperatures=3)
    with pytest.raises(NonFiniteError, match="no draw from the prior"):
        importance(TemperedFunction(lambda z: -math.inf + z[:, 0], base))
    with pytest.raises(ValueError, match="one distribution over vectors"):
        importance(cases.path("closed-form"), proposal=torch.distributions.Normal(0.0, 1.0))
