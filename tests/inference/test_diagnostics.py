"""Diagnostics against ArviZ 0.23, the reference: every value to 1e-6 relative, NaN and infinity in the same places."""

import math

import arviz as az
import numpy as np
import pytest
import torch
from scipy import stats

from inference.results import diagnostics
from inference.results.diagnostics import (
    bfmi,
    ess_bulk,
    ess_mean,
    ess_tail,
    mcse_mean,
    mcse_sd,
    rhat,
    rhat_nested,
    summary,
)

pytestmark = pytest.mark.skipif(
    int(az.__version__.split(".")[0]) >= 1, reason="the reference values are those of ArviZ 0.x"
)

# What ArviZ computes for one scalar, (chain, draw) float64 arrays in.
REFERENCES = {
    rhat: lambda x: az.rhat(x) if len(x) > 1 else math.nan,  # az.rhat itself refuses a single chain at the door
    ess_bulk: lambda x: az.ess(x, method="bulk"),
    ess_tail: lambda x: az.ess(x, method="tail"),
    ess_mean: lambda x: az.ess(x, method="mean"),
    mcse_mean: lambda x: az.mcse(x, method="mean"),
    mcse_sd: lambda x: az.mcse(x, method="sd"),
}
# Covers two FFT libraries and the order of summation: differences are below 2e-9 for draws around 1e7, else 1e-14.
RTOL = 1e-6


def autoregressive(rng, shape, coefficient, innovations="normal"):
    """AR(1) chains ``shape = (chain, draw)`` started from their first innovation."""
    noise = rng.standard_normal(shape) if innovations == "normal" else rng.standard_t(2.0, shape)
    x = np.empty(shape)
    x[:, 0] = noise[:, 0]
    for t in range(1, shape[1]):
        x[:, t] = coefficient * x[:, t - 1] + noise[:, t]
    return x


def cases():
    """Name -> draws (chain, draw), each hard on another part of the estimators."""
    rng = np.random.default_rng(20210601)
    shapes = [(1, 100), (2, 4), (2, 5), (1, 6), (3, 7), (4, 9), (4, 250), (5, 251), (4, 1000), (64, 20)]
    for shape in shapes:
        for coefficient in (-0.9, -0.3, 0.0, 0.6, 0.98):
            yield f"ar{coefficient} {shape}", autoregressive(rng, shape, coefficient)
        yield f"student {shape}", autoregressive(rng, shape, 0.5, "student")
        yield f"cauchy {shape}", rng.standard_cauchy(shape)
    for shape in ((4, 200), (3, 201), (1, 150)):
        x = autoregressive(rng, shape, 0.7)
        yield f"ties {shape}", np.round(x)
        yield f"tenths {shape}", np.round(x, 1) + 0.1
        yield f"counts {shape}", rng.poisson(3.0, shape).astype(float)
        yield f"binary {shape}", (x > 0).astype(float)
        yield f"rare {shape}", (x > np.quantile(x, 0.97)).astype(float)
        yield f"shifted {shape}", x + 2.0 * np.arange(shape[0])[:, None]
        yield f"scaled {shape}", x * 4.0 ** np.arange(shape[0])[:, None]
        yield f"trend {shape}", x + np.linspace(0.0, 5.0, shape[1])
        yield f"far {shape}", x + 1e7
        yield f"large {shape}", x * 1e30
        yield f"small {shape}", x * 1e-12
        yield f"one chain stuck {shape}", np.where(np.arange(shape[0])[:, None] == 0, 0.5, x)
        yield f"NaN {shape}", np.where(np.arange(x.size).reshape(shape) == 17, np.nan, x)
        yield f"infinite {shape}", np.where(np.arange(x.size).reshape(shape) == 17, np.inf, x)
    # 0.2 * 2.9 + 0.8 * 2.9 < 2.9: the quantile between two equal draws falls below both, and the indicator changes
    yield "rounded quantile", np.where(np.arange(17) < 6, 2.9, 1.0 + 2.9 * np.arange(17.0))[None]


CASES = dict(cases())


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # ArviZ's own divisions by zero
@pytest.mark.parametrize("function", REFERENCES, ids=lambda f: f.__name__)
def test_equals_arviz(function):
    for name, x in CASES.items():
        np.testing.assert_allclose(
            function(torch.from_numpy(x)).item(), REFERENCES[function](x), rtol=RTOL, err_msg=f"{name}"
        )


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_constants_follow_arviz():
    """ArviZ on numbers whose mean is not rounded; with a rounded mean its zeros become about 1e-17, ours stay zero."""
    for shape in ((1, 10), (4, 50), (3, 51)):
        x = torch.full(shape, 0.5)
        for function, reference in REFERENCES.items():
            np.testing.assert_allclose(function(x).item(), reference(x.double().numpy()), rtol=RTOL)
            np.testing.assert_equal(function(x + 0.1).item(), function(x).item())
        assert ess_bulk(x) == ess_tail(x) == ess_mean(x) == 2 * shape[0] * (shape[1] // 2)
        assert mcse_mean(x) == 0 and mcse_sd(x).isnan() and rhat(x).isnan()


def test_stuck_chains_have_infinite_rhat():
    stuck = torch.tensor([0.1, 0.2, 0.7])[:, None].expand(3, 1000)  # so many that the mean of equal numbers is rounded
    assert rhat(stuck) == torch.inf
    assert ess_bulk(stuck) < 6
    assert 3 < rhat(stuck + torch.linspace(0, 1e-4, 1000)) < torch.inf  # ranks bound it once the chains move at all


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_balanced_binary_draws():
    """Half zeros, half ones: folding at the median leaves a constant, whose R-hat is NaN; that of the draws counts."""
    x = np.random.default_rng(4).permuted(np.tile([0.0, 1.0], (4, 50)), axis=1)
    assert math.isfinite(rhat(torch.from_numpy(x)))
    np.testing.assert_allclose(rhat(torch.from_numpy(x)).item(), az.rhat(x), rtol=RTOL)


@pytest.mark.parametrize("draws", range(4, 18))
def test_short_chains_equal_arviz(draws):
    """Few lags: Geyer's sequence then runs to its last pair, whose even lag may be negative."""
    x = autoregressive(np.random.default_rng(draws), (2 * 60, draws), 0.3).reshape(60, 2, draws)
    for function in (ess_mean, ess_bulk, ess_tail):
        ours = function(torch.from_numpy(x).permute(1, 2, 0)).numpy()
        np.testing.assert_allclose(ours, [REFERENCES[function](row) for row in x], rtol=RTOL)


def test_folding_catches_different_scales():
    """Chains of equal location and different scale: R-hat of the draws themselves sees nothing, the folded one does."""
    rng = np.random.default_rng(1)
    x = rng.standard_normal((4, 1000)) * np.array([1.0, 1.0, 1.0, 3.0])[:, None]
    assert az.rhat(x, method="z_scale") < 1.01 < 1.1 < rhat(torch.from_numpy(x))


@pytest.mark.parametrize("coefficient", [-0.4, 0.0, 0.5, 0.9])
def test_ess_of_autoregression_is_the_known_one(coefficient):
    """The mean of an AR(1) chain has ESS N (1 - a) / (1 + a).

    At 4 x 20000 draws the standard deviation of the estimate over 30 seeds is 5% at a = 0.9, less elsewhere; the bound
    is three of these.  Leaving out the factor 2 of the autocorrelation time is off by far more.
    """
    x = autoregressive(np.random.default_rng(7), (4, 20_000), coefficient)
    expected = min(x.size * (1 - coefficient) / (1 + coefficient), x.size * math.log10(x.size))
    assert ess_mean(torch.from_numpy(x)).item() == pytest.approx(expected, rel=0.15)


@pytest.mark.parametrize("shape", [(1, 40), (4, 501)])
def test_bfmi_equals_arviz(shape):
    energy = autoregressive(np.random.default_rng(3), shape, 0.8) + 1e4
    np.testing.assert_allclose(bfmi(torch.from_numpy(energy)).numpy(), az.bfmi(energy), rtol=RTOL)
    assert bfmi(torch.full((2, 10), 0.1)).isnan().all()


@pytest.mark.parametrize("function", REFERENCES, ids=lambda f: f.__name__)
def test_event_dimensions_dtypes_and_blocks(function, monkeypatch):
    rng = np.random.default_rng(5)
    x = torch.from_numpy(rng.standard_normal((3, 41, 2, 5)))
    x[1, 7, 1, 2] = torch.nan
    whole = function(x)
    assert whole.shape == (2, 5) and whole.dtype == torch.float64
    alone = torch.stack([function(x[..., i, j]) for i in range(2) for j in range(5)]).reshape(2, 5)
    torch.testing.assert_close(whole, alone, equal_nan=True, rtol=1e-12, atol=0)
    assert whole.isnan().sum() == 1 and whole[1, 2].isnan()  # one bad scalar leaves the others alone
    monkeypatch.setattr(diagnostics, "_BLOCK_CPU", 400)
    torch.testing.assert_close(function(x), whole, equal_nan=True, rtol=1e-12, atol=0)
    assert function(x[..., :0]).shape == (2, 0)

    single = x.float().requires_grad_()
    result = function(single)
    assert result.dtype == torch.float64 and not result.requires_grad
    torch.testing.assert_close(result, function(single.detach().double()), equal_nan=True, rtol=0, atol=0)
    for integers in (x.nan_to_num().mul(3).to(torch.int32), x > 0):
        torch.testing.assert_close(function(integers), function(integers.double()), equal_nan=True, rtol=0, atol=0)


def test_torch_sort_gives_the_same(monkeypatch):
    """Off the CPU torch sorts; ties may then stand in another order, which must not matter."""
    x = torch.from_numpy(np.stack([CASES["ties (3, 201)"], CASES["trend (3, 201)"]], axis=-1))
    expected = summary({"x": x})
    monkeypatch.setattr(diagnostics, "_sort", lambda rows: tuple(rows.sort(dim=-1, descending=False)))
    for column, values in summary({"x": x})["x"].items():
        torch.testing.assert_close(values, expected["x"][column], rtol=1e-12, atol=0)


def test_global_state_and_input_are_left_alone():
    x = torch.from_numpy(CASES["ar0.6 (4, 250)"].copy())
    before, state = x.clone(), torch.get_rng_state()
    summary({"x": x})
    for function in REFERENCES:
        function(x)
    assert torch.equal(x, before) and torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("function", [*REFERENCES, bfmi], ids=lambda f: f.__name__)
def test_bad_input_is_refused(function):
    with pytest.raises(TypeError, match=r"must be a tensor .* got ndarray"):
        function(np.zeros((4, 100)))
    with pytest.raises(TypeError, match="must be real"):
        function(torch.zeros(4, 100, dtype=torch.complex64))
    with pytest.raises(ValueError, match=r"must be \(chain, draw.* got shape \(100,\)"):
        function(torch.zeros(100))
    with pytest.raises(ValueError, match=r"4 draws.*\(4, 3\)"):
        function(torch.zeros(4, 3))
    with pytest.raises(ValueError, match="at least one chain"):
        function(torch.zeros(0, 100))


def test_bfmi_takes_one_energy_a_draw():
    with pytest.raises(ValueError, match=r"energy must be \(chain, draw\)"):
        bfmi(torch.zeros(4, 100, 1))


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize(("chains", "draws"), [(4, 250), (3, 101), (1, 50)])
@pytest.mark.parametrize("prob", [0.5, 0.9])
def test_summary_equals_arviz(chains, draws, prob):
    rng = np.random.default_rng(11)
    samples = {
        "w": autoregressive(rng, (chains * 6, draws), 0.5, "student")
        .reshape(chains, 2, 3, draws)
        .transpose(0, 3, 1, 2),
        "count": rng.poisson(4.0, (chains, draws)),
    }
    ours = summary({name: torch.from_numpy(x.copy()) for name, x in samples.items()}, prob=prob)
    for name, x in samples.items():
        for index in np.ndindex(x.shape[2:]):
            scalar = np.ascontiguousarray(x[(..., *index)], dtype=float)
            low, high = az.hdi(scalar.ravel(), hdi_prob=prob)
            expected = {
                "mean": scalar.mean(),
                "sd": scalar.std(ddof=1),
                "median": np.median(scalar),
                "hpdi_low": low,
                "hpdi_high": high,
                "mcse_mean": az.mcse(scalar),
                "ess_bulk": az.ess(scalar),
                "ess_tail": az.ess(scalar, method="tail"),
                "r_hat": REFERENCES[rhat](scalar),
            }
            for column, value in expected.items():
                np.testing.assert_allclose(
                    ours[name][column][index].item(), value, rtol=RTOL, err_msg=f"{name} {column}"
                )


def test_interval_holds_its_mass_and_is_the_shortest():
    """Exponential draws: the shortest 80% interval runs from 0 to the 80% quantile, 1.609; the central one does not."""
    x = torch.from_numpy(stats.expon.rvs(size=(4, 25_000), random_state=2))
    columns = summary({"x": x}, prob=0.8)["x"]
    assert columns["hpdi_low"] < 0.01
    assert columns["hpdi_high"].item() == pytest.approx(math.log(5), abs=0.03)


def test_summary_prints_an_aligned_table():
    generator = torch.Generator().manual_seed(0)
    samples = {
        "w": torch.randn(4, 50, 2, 2, generator=generator),
        "a_long_name": torch.randn(4, 50, generator=generator),
    }
    samples["w"][0, :, 1, 0] += 50
    table = summary(samples, prob=0.8)
    *lines, footer = str(table).splitlines()
    assert [line.split()[0] for line in lines] == ["mean", "w[0,0]", "w[0,1]", "w[1,0]", "w[1,1]", "a_long_name"]
    assert lines[0].split() == list(table["w"])
    assert len({len(line) for line in lines}) == 1
    assert footer == "4 chains of 50 draws; the interval is the 0.8 HPDI"

    numbers = table.to_dict()
    assert list(numbers) == ["w[0,0]", "w[0,1]", "w[1,0]", "w[1,1]", "a_long_name"]
    assert numbers["w[1,0]"]["mean"] == table["w"]["mean"][1, 0].item()
    assert all(type(value) is float for row in numbers.values() for value in row.values())

    short = table.table(max_rows=2).splitlines()
    assert len(short) == 5
    assert short[3].startswith("... 3 more of 5 scalars; largest r_hat") and short[3].count("at w[1,0]") == 2


def test_long_summaries_are_cut_and_empty_sites_allowed():
    samples = {"w": torch.randn(1, 8, 100, generator=torch.Generator().manual_seed(0)), "none": torch.zeros(1, 8, 0)}
    table = summary(samples)
    assert "40 more of 100 scalars; smallest ess_bulk" in str(table)
    assert len(table.table().splitlines()) == 102
    assert table["none"]["r_hat"].shape == (0,)


def test_summary_refuses_bad_input():
    x = torch.zeros(2, 10)
    with pytest.raises(TypeError, match="mapping"):
        summary(x)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="no site"):
        summary({})
    for prob in (0.0, 1.0, 90, math.nan):
        with pytest.raises(ValueError, match="prob must lie strictly between 0 and 1"):
            summary({"x": x}, prob=prob)
    with pytest.raises(ValueError, match=r"samples\['y'\] has \(chain, draw\) = \(2, 9\), but samples\['x'\]"):
        summary({"x": x, "y": torch.zeros(2, 9, 3)})
    with pytest.raises(ValueError, match=r"samples\['y'\] must be"):
        summary({"x": x, "y": torch.zeros(10)})


# ---------------------------------------------------------------------- nested R-hat, which ArviZ 0.23 does not have
def nested_by_hand(x, superchains):
    """The formula of Margossian et al. (2024), loop by loop."""
    chains, draws = x.shape
    members = chains // superchains
    means, inner = [], []
    for k in range(superchains):
        rows = x[k * members : (k + 1) * members]
        means.append(rows.mean())
        between = np.var(rows.mean(1), ddof=1) if members > 1 else 0.0
        within = np.mean([np.var(row, ddof=1) for row in rows]) if draws > 1 else 0.0
        inner.append(between + within)
    return math.sqrt(1 + np.var(means, ddof=1) / np.mean(inner))


@pytest.mark.parametrize("shape", [(12, 50), (12, 1), (12, 2)])
@pytest.mark.parametrize("superchains", [2, 4, 6])
def test_nested_rhat_is_the_formula(shape, superchains):
    rng = np.random.default_rng(5)
    x = rng.standard_normal((*shape, 2)) + rng.standard_normal(shape[0])[:, None, None]
    result = rhat_nested(torch.tensor(x), superchains)
    for i in range(2):
        assert float(result[i]) == pytest.approx(nested_by_hand(x[..., i], superchains), rel=1e-12)
    order = rng.permutation(shape[0])
    ids = np.repeat(np.arange(superchains), shape[0] // superchains)
    shuffled = rhat_nested(torch.tensor(x[order]), torch.tensor(ids[order]))
    torch.testing.assert_close(shuffled, result, rtol=1e-12, atol=0)


def test_nested_rhat_limits():
    """One chain a superchain is R-hat without its factor (n - 1) / n; one draw of M chains tends to sqrt(1 + 1 / M);
    superchains that have not mixed are far above 1.
    """
    rng = np.random.default_rng(6)
    x = torch.tensor(rng.standard_normal((8, 100)))
    plain = az.rhat(x.numpy(), method="identity")
    assert float(rhat_nested(x, 8)) ** 2 == pytest.approx(plain**2 + 1 / 100, rel=1e-10)
    single = torch.tensor(rng.standard_normal((4000, 1)))
    assert float(rhat_nested(single, 400)) == pytest.approx(math.sqrt(1 + 1 / 10), abs=0.01)
    apart = single + 5 * torch.arange(400).repeat_interleave(10)[:, None]
    assert rhat_nested(apart, 400) > 100


def test_nested_rhat_where_it_is_undefined():
    x = torch.zeros(4, 3, 4, dtype=torch.float64)
    x[..., 0] = 7.1
    x[2:, :, 1] = 1.0
    x[..., 2:] = torch.rand(4, 3, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x[0, 0, 2] = torch.inf
    result = rhat_nested(x, 2)
    assert result[0].isnan() and result[1] == torch.inf and result[2].isnan() and result[3] > 1


@pytest.mark.parametrize(
    ("x", "superchains", "error", "message"),
    [
        ([1.0], 2, TypeError, "real tensor"),
        (torch.zeros(4), 2, ValueError, "chain, draw"),
        (torch.zeros(4, 5), 3, ValueError, "divide the number of chains, 4"),
        (torch.zeros(4, 5), 1, ValueError, "two or more superchains"),
        (torch.zeros(4, 5), [0, 0, 0, 1], ValueError, "sizes .3, 1."),
        (torch.zeros(4, 5), [0, 1], ValueError, "4 integers"),
        (torch.zeros(4, 1), 4, ValueError, "two draws"),
    ],
)
def test_nested_rhat_names_bad_arguments(x, superchains, error, message):
    with pytest.raises(error, match=message):
        rhat_nested(x, superchains)
