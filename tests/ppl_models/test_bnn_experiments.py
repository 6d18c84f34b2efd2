"""MAP, deep ensembles, cold posteriors, active learning, scores."""

import math

import pytest
import torch
from scipy import stats

from ppl_models.functional_prior_bnn import FunctionalPriorBNN
from ppl_models.functional_prior_bnn.deep_ensemble import DeepEnsemble
from ppl_models.functional_prior_bnn.experiments import active_learning, auroc, calibration_error, search_temperature
from ppl_models.functional_prior_bnn.laplace_evidence import LaplaceEvidence, tune_prior_by_evidence

G = torch.Generator().manual_seed(0)
X = torch.randn(120, 2, generator=G)
Y = torch.sin(2 * X[:, 0]) + 0.1 * torch.randn(120, generator=G)
LABELS = (X[:, 0] + X[:, 1] > 0).long()
RUN = {"num_chains": 2, "warmup_steps": 100, "num_samples": 4, "thin": 5, "batch_size": 20, "progress": False}


@pytest.mark.parametrize("parametrisation", ["centred", "noncentred"])
def test_map_of_a_linear_model_is_ridge_regression(parametrisation: str) -> None:
    """With the 1/sqrt(D) of the network and unit scales, the mode solves (A^T A / sn2 + I) w = A^T y / sn2."""
    bnn = FunctionalPriorBNN(2, hidden=(), parametrisation=parametrisation).double()
    result = bnn.fit_map(X.double(), 3 * X.double()[:, 0] - 1, num_steps=1500, lr=0.03, num_members=2, progress=False)
    x, y = bnn.standardise(X.double(), 3 * X.double()[:, 0] - 1)
    design = torch.cat([x / math.sqrt(2), torch.ones(120, 1, dtype=torch.float64)], 1)
    w = torch.linalg.solve(design.T @ design / 0.1 + torch.eye(3, dtype=torch.float64), design.T @ y / 0.1)
    found = torch.cat([result.weights["W1"][:, 0, :, 0], result.weights["b1"][:, 0]], 1)
    assert torch.allclose(found, w.T.expand(2, 3), atol=1e-4)
    assert bnn.predict(X).samples.shape == (2, 1, 120, 1) and "map" in result.summary()


def test_map_by_minibatches_learns_and_leaves_the_prior_alone() -> None:
    bnn = FunctionalPriorBNN(2, hidden=(20,), prior="hierarchical")
    psi = [p.clone() for p in bnn.prior.parameters()]
    bnn.fit_map(X, Y, num_steps=600, batch_size=30, num_members=3, progress=False)
    assert bnn.predict(X).rmse(Y) < 0.35 and all(
        torch.equal(a, b) for a, b in zip(psi, bnn.prior.parameters(), strict=True)
    )
    with pytest.raises(ValueError, match="batch_size"):
        bnn.fit_map(X, Y, batch_size=121)


def test_deep_ensemble_learns_the_noise_where_it_is() -> None:
    """The noise is 0.05 on the left and 0.5 on the right; a head that ignores x would give both sides the same."""
    g = torch.Generator().manual_seed(1)
    x = 4 * torch.rand(600, 1, generator=g) - 2
    y = 10 + 5 * (x[:, 0] + torch.where(x[:, 0] < 0, 0.05, 0.5) * torch.randn(600, generator=g))
    ensemble = DeepEnsemble(1, hidden=(20,), num_members=3)
    with pytest.raises(RuntimeError, match="call fit"):
        ensemble.predict(x)
    history = ensemble.fit(x, y, num_steps=800, batch_size=100, progress=False)
    assert history.losses[-50:].mean() < history.losses[:50].mean() - 0.5
    prediction = ensemble.predict(torch.tensor([[-1.0], [1.0]]))
    assert prediction.samples.shape == (3, 1, 2, 1)
    assert torch.allclose(prediction.mean[:, 0], torch.tensor([5.0, 15.0]), atol=0.7)
    sd = prediction.variance[:, 0].sqrt()
    assert sd[0] < 0.8 and 1.7 < sd[1] < 3.5
    classifier = DeepEnsemble(2, 2, hidden=(10,), likelihood="categorical", num_members=2)
    classifier.fit(X, LABELS, num_steps=300, batch_size=None, progress=False)
    assert classifier.predict(X).accuracy(LABELS) > 0.95


def test_the_penalty_on_a_member_does_not_depend_on_their_number() -> None:
    """A mean over members divides each one's gradient by their number, but not Adam's penalty: ten members collapsed to
    a constant (errors of 0.6).
    """
    errors = []
    for num_members in (1, 10):
        ensemble = DeepEnsemble(2, hidden=(30,), num_members=num_members)
        ensemble.fit(X, Y, num_steps=500, weight_decay=0.003, progress=False)
        errors.append(float((ensemble.predict(X).samples[..., 0] - Y).square().mean().sqrt()))
    assert errors[0] < 0.2 and errors[1] < 1.3 * errors[0]


def test_temperature_search_keeps_the_best_on_validation_data() -> None:
    bnn = FunctionalPriorBNN(2, hidden=(10,))
    found = search_temperature(bnn, X[:80], Y[:80], X[80:], Y[80:], temperatures=(1.0, 0.01), **RUN)
    assert found.validation_nll.shape == (2,) and found.best == found.temperatures[found.validation_nll.argmin()].item()
    assert found.posterior.info["temperature"] == pytest.approx(found.best) and bnn.result is found.posterior
    assert found.posterior.predict(X[80:]).nll(Y[80:]) == found.validation_nll.min()
    with pytest.raises(ValueError, match="temperatures"):
        search_temperature(bnn, X, Y, X, Y, temperatures=())


def test_active_learning_asks_where_the_posterior_is_unsure() -> None:
    """The pool is a cluster and a few far points; the initial labels are of the cluster, so the queries must go to the
    far points.
    """
    g = torch.Generator().manual_seed(2)
    x = torch.cat([0.1 * torch.randn(60, 1, generator=g), torch.tensor([[3.0], [-3.0], [3.2], [-3.2]])])
    y = torch.sin(x[:, 0])
    bnn = FunctionalPriorBNN(1, hidden=(20,), standardise=False)
    seed = next(s for s in range(50) if not _far_rows_are_initial(s, 64, 10))
    found = active_learning(
        bnn,
        x,
        y,
        x,
        y,
        num_initial=10,
        num_queries=2,
        seed=seed,
        warmup_again=100,
        **{**RUN, "batch_size": 8, "warmup_steps": 400},
    )
    assert all(row >= 60 for row in found.chosen[10:].tolist())
    assert found.num_labels.tolist() == [10, 11, 12] and found.scores[-1] < found.scores[0]
    random = active_learning(
        bnn,
        x,
        y,
        x,
        y,
        num_initial=10,
        num_queries=1,
        seed=seed,
        acquisition="random",
        warmup_again=10,
        **{**RUN, "batch_size": 8},
    )
    assert torch.equal(random.chosen[:10], found.chosen[:10]) and len(set(random.chosen.tolist())) == 11
    for options, message in (
        ({"acquisition": "best"}, "acquisition"),
        ({"num_initial": 60}, "pool of 64"),
        ({"num_queries": 0}, "num_queries"),
    ):
        with pytest.raises(ValueError, match=message):
            active_learning(bnn, x, y, x, y, **options)  # type: ignore[arg-type]


def test_active_learning_keeps_the_precision_of_the_pool() -> None:
    """In single precision all inputs near 1e8 are one number; such a pool used to be rounded without a word."""
    x = 1e8 + X[:30].double()
    options = {"num_initial": 10, "num_queries": 1, "acquisition": "random", **RUN, "batch_size": None}
    found = active_learning(FunctionalPriorBNN(2, hidden=(3,)), x, Y[:30], x, Y[:30], **options)  # type: ignore[arg-type]
    assert torch.equal(found.posterior.x_train, x[found.chosen])
    with pytest.raises(ValueError, match="x varies by"):
        active_learning(FunctionalPriorBNN(2, hidden=(3,)), x.numpy(), Y[:30], x, Y[:30], **options)  # type: ignore[arg-type]


def _far_rows_are_initial(seed: int, n: int, num_initial: int) -> bool:
    from inference.runtime.generators import generator

    return bool((torch.randperm(n, generator=generator(seed, "active learning"))[:num_initial] >= 60).any())


def test_chains_can_start_where_others_stopped() -> None:
    bnn = FunctionalPriorBNN(2, hidden=(5,))
    first = bnn.fit(X, Y, **RUN)
    after = bnn.fit(X, Y, **{**RUN, "warmup_steps": 0, "num_samples": 1, "thin": 1}, start_from=first)
    gap = (after.samples["eps_W1"][:, 0] - first.samples["eps_W1"][:, -1]).abs().max()
    assert gap < 0.3 < (first.samples["eps_W1"][0, -1] - first.samples["eps_W1"][1, -1]).abs().max()
    with pytest.raises(ValueError, match="start_from"):
        FunctionalPriorBNN(2, hidden=(6,)).fit(X, Y, **RUN, start_from=first)


def test_auroc_is_the_rank_statistic() -> None:
    g = torch.Generator().manual_seed(0)
    inside, outside = (
        torch.randn(40, generator=g).round(decimals=1),
        (torch.randn(30, generator=g) + 1).round(decimals=1),
    )
    expected = stats.mannwhitneyu(outside.numpy(), inside.numpy()).statistic / (40 * 30)
    assert auroc(inside, outside).item() == pytest.approx(expected, abs=1e-12)
    assert auroc(inside.numpy(), outside.tolist()).item() == pytest.approx(expected, abs=1e-3)  # in single precision
    assert auroc([0, 1], [0.5, 2.0]).item() == 0.75
    assert auroc(torch.zeros(3), torch.ones(2)) == 1 and auroc(torch.ones(3), torch.ones(2)) == 0.5
    with pytest.raises(ValueError, match="outside"):
        auroc(inside, outside[:0])


def test_calibration_error_by_hand() -> None:
    p = torch.tensor([[0.95, 0.05], [0.95, 0.05], [0.35, 0.65], [0.45, 0.55]])
    labels = torch.tensor([0, 1, 1, 0])
    # Bins: {0.95, 0.95} half right, {0.65} right, {0.55} wrong.
    expected = (abs(1 - 1.9) + abs(1 - 0.65) + abs(0 - 0.55)) / 4
    assert calibration_error(p, labels).item() == pytest.approx(expected, abs=1e-6)
    assert calibration_error(p[:, 1:], labels).item() == pytest.approx(expected, abs=1e-6)
    assert calibration_error(p.numpy(), labels.tolist()).item() == pytest.approx(expected, abs=1e-6)
    with pytest.raises(ValueError, match="labels"):
        calibration_error(p, labels[:1])


def test_laplace_evidence_of_a_linear_model_is_the_exact_one() -> None:
    """log N(y; 0, sn2 I + design S^2 design^T) in closed form, with more rows than weights and the other way round."""
    for rows in (2, 60):
        bnn = FunctionalPriorBNN(2, hidden=(), noise_variance=0.2).double()
        with torch.no_grad():
            bnn.prior.log_scale["W1"].fill_(math.log(1.7))  # type: ignore[attr-defined, union-attr]
        data = X[:rows].double(), (2 * X[:rows, 0] + 0.3 * X[:rows, 1]).double()
        mode = bnn.fit_map(*data, num_steps=1500, lr=0.03, progress=False)
        x, y = bnn.standardise(*data)
        assert y is not None
        evidence = -rows * LaplaceEvidence(bnn, {n: w[0, 0] for n, w in mode.weights.items()}, x, y)()
        design = torch.cat([1.7 * x / math.sqrt(2), torch.ones(rows, 1, dtype=torch.float64)], 1)
        covariance = design @ design.T + 0.2 * torch.eye(rows, dtype=torch.float64)
        exact = torch.distributions.MultivariateNormal(torch.zeros(rows, dtype=torch.float64), covariance).log_prob(
            y[:, 0]
        )
        assert evidence.item() == pytest.approx(exact.item(), abs=1e-4)


def test_evidence_shrinks_a_prior_that_the_labels_do_not_need() -> None:
    """Labels at random: nothing beats the constant 1/2, whose evidence is -log 2 a point, and the scales must go there
    from above.
    """
    bnn = FunctionalPriorBNN(2, hidden=(5,), likelihood="categorical", out_features=2)
    labels = torch.randint(0, 2, (60,), generator=torch.Generator().manual_seed(3))
    history = tune_prior_by_evidence(bnn, X[:60], labels, num_rounds=5)
    assert history[-1] > history[0] and history[-1].item() == pytest.approx(-math.log(2), abs=0.005)
    untuned = FunctionalPriorBNN(2, hidden=(5,), likelihood="categorical", out_features=2)
    tuned_size, size = (model.sample_prior(X[:60], 200).square().mean() for model in (bnn, untuned))
    assert tuned_size < 0.25 * size
    with pytest.raises(ValueError, match="Laplace evidence"):
        tune_prior_by_evidence(FunctionalPriorBNN(2, hidden=(5,), prior="flow"), X, Y, num_rounds=1, mode_steps=1)


def test_evidence_finds_a_prior_for_a_function() -> None:
    bnn = FunctionalPriorBNN(2, hidden=(10,))
    history = tune_prior_by_evidence(bnn, X, Y, num_rounds=5)
    assert history[-1] > history[0] and history.diff().min() > -0.05
