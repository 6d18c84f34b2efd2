"""A group that is summed over exactly, beside enumeration: what mean field of the cases must add up to."""

import math
from pathlib import Path

import pyro.poutine as poutine
import pytest
import torch
from torch import Tensor

from inference.runtime.generators import scoped_seed
from ppl_models import ConvMonotoneDBM, MonotoneDBM
from tests.ppl_models.dbm_cases import D, check_gradients, random_starts

SIZES, CENTRE = [3, 2, 4, 3], 2


def star(strength: float) -> MonotoneDBM:
    """Groups that couple to the centre alone, far beyond the bound: given it they are independent, and a sum over it is
    exact.
    """
    model = MonotoneDBM(SIZES, rank=12, monotonicity=0.1, summed=CENTRE).double()
    noise = torch.Generator().manual_seed(0)
    weight = torch.zeros(12, 12, dtype=D)
    weight[:3, :3], weight[3:5, 3:5], weight[9:, 9:] = (0.9 * torch.eye(k) for k in (3, 2, 3))
    weight[:, 5:9] = strength * torch.randn(12, 4, generator=noise, dtype=D)
    with torch.no_grad():
        model.operator.weight.copy_(weight)  # type: ignore[operator]
        model.bias.copy_(torch.randn(12, generator=noise, dtype=D))
    return model


QUERIES = [
    ([0, 0, 0, 0], [False] * 4),
    ([1, 0, 0, 0], [True, False, False, False]),
    ([0, 0, 3, 0], [False, False, True, False]),
]


@pytest.mark.parametrize(("observed", "mask"), QUERIES)
def test_a_star_is_answered_exactly(observed: list[int], mask: list[bool]) -> None:
    model = star(4.0)
    assert model.spectrum()[1] > 5
    found = model.marginals(observed, mask)
    exact = model.exact_marginals(observed, mask)
    torch.testing.assert_close(found.probabilities, exact, rtol=0, atol=1e-9)
    log_z = model.log_partition(observed, mask, method="exact").value
    assert -found.free_energy.item() == pytest.approx(log_z, abs=1e-9)
    assert model.log_partition(observed, mask, method="mean_field").value == pytest.approx(log_z, abs=1e-9)
    # Temperatures of one leave the predictive at the marginals.
    torch.testing.assert_close(model.predictive(observed, mask), exact, rtol=0, atol=1e-9)
    better = model.correlations(observed, mask)
    torch.testing.assert_close(better.marginals, exact, rtol=0, atol=1e-9)
    torch.testing.assert_close(better.mean_field, exact, rtol=0, atol=1e-9)
    assert better.log_partition.item() == pytest.approx(log_z, abs=1e-9)
    torch.testing.assert_close(
        better.covariance[0, :3, 9:], covariance(model, observed, mask)[:3, 9:], rtol=0, atol=1e-9
    )
    # Every draw of the guide has the same weight: it is the posterior.
    with scoped_seed(0):
        trace = poutine.trace(model.guide).get_trace(observed, mask)
    joint = poutine.trace(poutine.replay(model.forward, trace)).get_trace(observed, mask)
    assert (joint.log_prob_sum() - trace.log_prob_sum()).item() == pytest.approx(log_z, abs=1e-9)


def covariance(model: MonotoneDBM, observed: list[int], mask: list[bool]) -> Tensor:
    """By enumeration."""
    states = torch.cartesian_prod(*[torch.arange(k) for k in SIZES])
    given, known = torch.tensor(observed), torch.tensor(mask)
    log_p = model.log_density(states).detach().masked_fill(((states != given) & known).any(1), -math.inf)
    x, w = model.groups.one_hot(states, D), log_p.softmax(0)
    mean = w @ x
    return torch.einsum("s,si,sj->ij", w, x - mean, x - mean)


def test_several_queries_at_once_of_which_some_hold_the_group() -> None:
    model = star(2.0)
    observed, mask = (torch.tensor([q[i] for q in QUERIES]) for i in (0, 1))
    together = model.marginals(observed, mask)
    for i, (states, known) in enumerate(QUERIES):
        alone = model.marginals(states, known)
        torch.testing.assert_close(together.probabilities[i], alone.probabilities[0], rtol=0, atol=1e-9)
        assert together.free_energy[i].item() == pytest.approx(alone.free_energy.item(), abs=1e-9)
    assert together.residual.shape == together.converged.shape == together.iterations.shape == (3,)


def test_the_bound_is_between_mean_field_and_the_truth() -> None:
    """Ten machines within the bound: the sum over one group never does worse, and its marginals are nearer."""
    errors = []
    for seed in range(10):
        noise = torch.Generator().manual_seed(seed)
        models = [MonotoneDBM([3] * 6, 8, 0.1, curvature=2, summed=g).double() for g in (None, 0)]
        for model in models:
            with torch.no_grad():
                model.operator.weight.copy_(0.28 * torch.randn(8, 18, generator=noise.manual_seed(seed), dtype=D))  # type: ignore[operator]
                model.bias.copy_(torch.randn(18, generator=noise, dtype=D))
        plain, summed = models
        torch.testing.assert_close(plain.potentials(), summed.potentials(), rtol=0, atol=1e-12)
        a, b = plain.marginals(), summed.marginals()
        log_z = plain.log_partition(method="exact").value
        assert -a.free_energy.item() <= -b.free_energy.item() + 1e-12 <= log_z + 1e-9
        exact = plain.exact_marginals()
        errors.append([float((m.probabilities - exact).abs().mean()) for m in (a, b)])
    mean = torch.tensor(errors).mean(0)
    assert mean[1] < mean[0]


def test_one_answer_from_any_start_however_strong_the_group() -> None:
    model = MonotoneDBM([4] * 6, 12, 0.05, curvature="pinsker", summed=5).double()
    with torch.no_grad():
        model.operator.weight.mul_(5)  # type: ignore[operator, union-attr]
    phi = model.potentials()
    assert phi[-4:, :-4].abs().max() > 3
    many = torch.zeros(64, 6, dtype=torch.long), torch.zeros(64, 6, dtype=torch.bool)
    found = model.marginals(*many, initial=random_starts(model, 64), tolerance=1e-12)
    assert found.converged.all() and (found.probabilities - found.probabilities[0]).abs().max() < 1e-8


def test_gradients_through_the_sum() -> None:
    model = MonotoneDBM([3, 3, 4, 2], rank=6, monotonicity=0.1, summed=2).double()
    noise = torch.Generator().manual_seed(1)
    weight = model.operator.weight
    with torch.no_grad():
        weight.mul_(2)  # type: ignore[operator, union-attr]
        model.bias.copy_(torch.randn(12, generator=noise, dtype=D))
    observed, mask = (
        torch.tensor([[1, 0, 2, 0], [0, 1, 2, 1]]),
        torch.tensor([[True, False, False, False], [False] * 4]),
    )
    direction = torch.randn(2, 4, 4, generator=noise, dtype=D)

    def loss() -> Tensor:
        found = model.marginals(observed, mask, differentiable=True, tolerance=1e-12)
        query = model._query(observed, mask)
        return (found.probabilities * direction).sum() + 0.3 * found.free_energy.sum() + model.free_energy(query).sum()

    loss().backward()
    check_gradients(loss, (weight, model.bias), 8, rel=1e-4, abs=1e-6)


def test_images_with_and_without_the_sum(tmp_path: Path) -> None:
    net = ConvMonotoneDBM((1, 4, 4), 2, 3)
    assert net.summed == net.groups.num_groups - 1
    net.save(tmp_path / "net")
    assert ConvMonotoneDBM.load(tmp_path / "net").summed == net.summed
    images = torch.rand(3, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    net.fit(images, [0, 1, 2], num_steps=20, batch_size=3, progress=False)
    assert net.classify(images).argmax(1).tolist() == [0, 1, 2]
    layers = [(4, 2)]
    conv = ConvMonotoneDBM((1, 4, 4), 2, 3, hidden=layers, sum_labels=True)
    plain = ConvMonotoneDBM((1, 4, 4), 2, 3, hidden=layers)
    assert plain.summed is None
    with torch.no_grad():
        for net in (conv, plain):
            for weight in net.operator.weights:  # type: ignore[union-attr]
                weight.mul_(5)
    assert torch.equal(conv.potentials()[:-3, :-3], plain.potentials()[:-3, :-3])
    assert not torch.equal(conv.potentials(), plain.potentials())
    mask = torch.zeros(3, 4, 4, dtype=torch.bool)
    mask[:, :2] = True
    told = conv.complete(images, mask, labels=[0, 1, -1])
    assert torch.isfinite(told).all()
    torch.testing.assert_close(conv.complete(images[:2], mask[:2], labels=[0, 1]), told[:2], rtol=0, atol=1e-4)


@pytest.mark.parametrize("groups", [None, [CENTRE], [0, 1, 3]])
def test_calibrating_the_sum(groups: list[int] | None) -> None:
    """States of which the sum's weights have half the logits: that factor is found again, of the centre itself or of
    the groups that are mixtures over it, and no other temperature moves.
    """
    model, noise, rows = star(4.0), torch.Generator().manual_seed(0), 4000
    nothing = torch.zeros(4, dtype=torch.bool)
    shares = model.exact_marginals()[0, CENTRE, :4]
    centre = torch.multinomial((0.5 * shares.log()).softmax(0), rows, True, generator=noise)
    truth = torch.zeros(rows, 4, dtype=torch.long)
    truth[:, CENTRE] = centre
    held = torch.tensor([False, False, True, False])
    for c in range(4):
        given = model.exact_marginals([0, 0, c, 0], held)[0]
        mine = (centre == c).nonzero()[:, 0]
        for g in (0, 1, 3):
            truth[mine, g] = torch.multinomial(given[g], len(mine), True, generator=noise)
    model.calibrate(truth, nothing, truth, groups=groups)
    found = model.log_temperature.detach().exp().tolist()
    # Two standard errors of the centre alone; the others tell less of it.
    assert found.pop(CENTRE) == pytest.approx(0.5, abs=0.03 if groups != [0, 1, 3] else 0.06)
    assert found == [1.0] * 3


def test_bad_input() -> None:
    with pytest.raises(ValueError, match="summed"):
        MonotoneDBM([2, 3], summed=2)
    with pytest.raises(ValueError, match="no labels"):
        ConvMonotoneDBM((1, 4, 4), 2, 0, sum_labels=True)
    with pytest.raises(TypeError, match="sum_labels"):
        ConvMonotoneDBM((1, 4, 4), 2, 3, sum_labels=1)  # type: ignore[arg-type]
    model = star(1.0)
    truth = torch.zeros(2, 4, dtype=torch.long)
    known = torch.tensor([False, False, True, False])
    with pytest.raises(ValueError, match="nothing to predict"):
        model.calibrate(truth, known, truth)
