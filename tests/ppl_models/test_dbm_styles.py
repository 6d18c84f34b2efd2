"""Styles of the classes: the mixture that a fit begins with is exact in the model, and the bound holds beside it."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from inference.latent_classes import LatentClasses
from inference.runtime.generators import generator
from ppl_models import ConvMonotoneDBM, MonotoneDBM
from ppl_models.monotone_dbm import pairwise
from ppl_models.monotone_dbm.convolution import ConvOperator
from ppl_models.monotone_dbm.styles import StyledOperator, class_styles
from tests.ppl_models.dbm_cases import D, check_gradients, random_starts


def small(coupled: float = 0.0) -> ConvMonotoneDBM:
    """2 x 2 pixels of two grey values, two classes of two looks; pixels and label coupled or not."""
    net = ConvMonotoneDBM((1, 2, 2), 2, 2, styles=2).double()
    operator, noise = net.operator, torch.Generator().manual_seed(0)
    assert isinstance(operator, StyledOperator)
    weight = operator.inner.weight
    with torch.no_grad():
        weight.copy_(torch.eye(*weight.shape, dtype=D) + coupled * torch.randn(weight.shape, generator=noise, dtype=D))
    return net


def rows() -> tuple[Tensor, Tensor]:
    """200 images of four kinds, a tenth of the pixels wrong, and their classes."""
    noise = torch.Generator().manual_seed(1)
    kinds = torch.tensor([[0, 0, 1, 1], [1, 1, 0, 0], [0, 1, 0, 1], [1, 0, 1, 0]])
    kind = torch.randint(4, (200,), generator=noise)
    wrong = (torch.rand(200, 4, generator=noise) < 0.1).long()
    return (kinds[kind] + wrong) % 2, kind // 2


def test_the_first_model_is_the_mixture() -> None:
    """Marginals of every pixel and of the class, by mean field, by enumeration, and by Bayes' rule for the mixture."""
    states, labels = rows()
    net = small()
    net._start_styles(torch.cat([states, labels[:, None]], 1), seed=3)
    looks, own, _ = (x.double() for x in class_styles(states, labels, 2, 2, 2, seed=3))
    theta, weights = looks.view(4, 2, 4).softmax(1), torch.zeros(4, dtype=D)
    for label in (0, 1):
        chosen = states[labels == label]
        hot = torch.nn.functional.one_hot(chosen, 2).to(D)
        part = slice(2 * label, 2 * label + 2)
        # EM has converged: a style's weight is the mean of its posterior, and two rows of each class are its prior.
        mixed = weights[part] + 0.5
        for _ in range(200):
            joint = torch.einsum("ngk,gkz->nz", hot, theta[..., part].log()) + mixed.log()
            mixed = (joint.softmax(1).sum(0) + 1) / (len(chosen) + 2)
        weights[part] = mixed * len(chosen) / len(states)
    observed, mask = [[1, 0, 0, 0, 0, 0]], [[True, False, True, False, False, False]]
    seen = weights * theta[0, 1] * theta[2, 0]
    posterior = seen / seen.sum()
    found, exact = net.marginals(observed, mask), net.exact_marginals(observed, mask)
    torch.testing.assert_close(found.probabilities, exact, rtol=0, atol=1e-9)
    torch.testing.assert_close(found.probabilities[0, 1, :2], theta[1] @ posterior, rtol=0, atol=1e-3)
    torch.testing.assert_close(found.probabilities[0, 4], posterior, rtol=0, atol=1e-3)
    torch.testing.assert_close(found.probabilities[0, 5, :2], own.softmax(0) @ posterior, rtol=0, atol=1e-3)


def test_one_answer_beside_strong_styles() -> None:
    """Free potentials of any strength to the styles, and the bound between the others."""
    net = small(coupled=3.0)
    operator = net.operator
    assert isinstance(operator, StyledOperator)
    with torch.no_grad():
        operator.templates.copy_(5 * torch.randn(10, 4, generator=torch.Generator().manual_seed(2), dtype=D))
    phi = net.potentials()
    assert torch.equal(phi, phi.T) and phi[8:12, 8:12].abs().max() == 0 and phi[:8, 8:12].abs().max() > 5
    others = torch.cat([torch.arange(8), torch.arange(12, 14)])
    torch.testing.assert_close(phi[others][:, others], operator.inner.to_dense(), rtol=0, atol=0)
    many = torch.zeros(64, 6, dtype=torch.long), torch.zeros(64, 6, dtype=torch.bool)
    found = net.marginals(*many, initial=random_starts(net, 64), tolerance=1e-12)
    assert found.converged.all() and (found.probabilities - found.probabilities[0]).abs().max() < 1e-8
    assert found.free_energy[0] >= -net.log_partition(method="exact").value


def test_the_most_probable_styles_alone() -> None:
    """Uncoupled pixels: the styles are chosen by their exact weights, and answers are the mixture of those chosen."""
    net, noise = small(), torch.Generator().manual_seed(3)
    operator = net.operator
    assert isinstance(operator, StyledOperator)
    with torch.no_grad():
        operator.templates.copy_(2 * torch.randn(10, 4, generator=noise, dtype=D))
        net.bias.copy_(torch.randn(14, generator=noise, dtype=D))
    observed = torch.randint(2, (5, 6), generator=noise)
    mask = torch.rand(5, 6, generator=noise) < 0.5
    mask[:, 4] = False
    whole, weights = net.marginals(observed, mask), net.marginals(observed, mask).probabilities[:, 4]
    net.most = 2
    kept = weights.topk(2).indices
    query = net._query(observed, mask)
    scores = operator.leanings(net.bias, net._clamped(query), net._free(query))
    torch.testing.assert_close(scores.softmax(1), weights, rtol=0, atol=1e-9)
    found = net.marginals(observed, mask)
    shares = weights.gather(1, kept) / weights.gather(1, kept).sum(1, keepdim=True)
    torch.testing.assert_close(found.probabilities[:, 4].gather(1, kept), shares, rtol=0, atol=1e-9)
    dropped = -(weights.gather(1, kept).sum(1)).log()
    torch.testing.assert_close(found.free_energy, whole.free_energy + dropped, rtol=0, atol=1e-9)
    each = [_given_style(net, observed[b], mask[b], c) for b in range(5) for c in kept[b].tolist()]
    pixels = torch.stack(each).unflatten(0, (5, 2))
    mixed = (shares[:, :, None, None] * pixels).sum(1)
    torch.testing.assert_close(found.probabilities, mixed, rtol=0, atol=1e-9)
    # A style that is observed is summed over, whatever it is worth.
    least = weights.argmin(1)
    observed[0, 4], mask[0, 4] = least[0], True
    assert net.marginals(observed, mask).probabilities[0, 4, least[0]] == 1
    assert net.predictive(observed, mask)[0, 4, least[0]] == 1


def _given_style(net: ConvMonotoneDBM, observed: Tensor, mask: Tensor, style: int) -> Tensor:
    states, known = observed.clone(), mask.clone()
    states[4], known[4] = style, True
    return net.marginals(states, known).probabilities[0]


@pytest.mark.parametrize("matrix", [True, False])
def test_styles_beside_convolutions(matrix: bool) -> None:
    """The density has the couplings of what differs from the centres, what held styles add is a field, and gradients
    are those of central differences.
    """
    noise = torch.Generator().manual_seed(5)
    net = ConvMonotoneDBM((1, 4, 4), 2, 2, styles=2, kernels=[[3, 0], [4, 1]]).double()
    operator = net.operator
    assert isinstance(operator, StyledOperator) and isinstance(operator.inner, ConvOperator)
    operator.inner.dense_limit = 1000 if matrix else 0
    with torch.no_grad():
        for weight in (*operator.inner.weights, operator.templates, operator.centres, net.bias):
            weight.add_(torch.randn(weight.shape, generator=noise, dtype=D))
    net.most = 3
    phi = net.potentials()
    states = torch.randint(2, (7, net.groups.num_groups), generator=noise)
    others = operator._others(net.groups.one_hot(states, D))
    apart = others - operator.centres.T[states[:, 16]]
    energy = ((0.5 * apart @ operator.inner.to_dense()) * apart).sum(1) + (
        others * operator.templates.T[states[:, 16]]
    ).sum(1)
    energy = energy + (net.groups.one_hot(states, D) * net.bias).sum(1)
    torch.testing.assert_close(net.log_density(states), energy, rtol=0, atol=1e-10)
    x = torch.randn(3, len(phi), generator=noise, dtype=D)
    torch.testing.assert_close(operator.prepare().apply(x), x @ phi, rtol=0, atol=1e-12)
    x[:, 32:36] = torch.eye(4, dtype=D)[[0, 2, 3]]
    given = operator.prepare_given(torch.tensor([0, 2, 3]))
    assert given.field is not None and (given.matrix is None) != matrix
    outside = torch.ones(len(phi), dtype=torch.bool)
    outside[32:36] = False
    torch.testing.assert_close((given.apply(x) + given.field)[:, outside], (x @ phi)[:, outside], rtol=0, atol=1e-12)
    if not matrix:
        colours = operator.colours(None)
        assert sorted(torch.cat(colours).tolist()) == list(range(net.groups.num_groups))
        for colour in colours:
            chosen = torch.isin(net.groups.group_of, colour)
            assert phi[chosen][:, chosen].abs().max() < 1e-14
    observed = torch.randint(2, (2, net.groups.num_groups), generator=noise)
    mask = torch.rand(2, net.groups.num_groups, generator=noise) < 0.3
    mask[:, 16] = torch.tensor([False, True])
    direction = torch.randn(2, net.groups.num_groups, 4, generator=noise, dtype=D)

    def loss() -> Tensor:
        found = net.marginals(observed, mask, differentiable=True, tolerance=1e-12)
        return (found.probabilities * direction).sum() + 0.3 * found.free_energy.sum()

    loss().backward()
    check_gradients(loss, (operator.inner.weights[0], operator.templates, net.bias), 8, rel=1e-5, abs=1e-7)


def test_calibrating_styles() -> None:
    """Labels that follow from styles of half the logits: the factor on the styles is found again."""
    net, noise = small(), torch.Generator().manual_seed(0)
    operator, rows = net.operator, 4000
    assert isinstance(operator, StyledOperator) and net.summed == 4
    own = torch.tensor([[3.0, 0.5, -1.0, -4.0], [-2.0, -0.5, 0.0, 2.0]], dtype=D)
    with torch.no_grad():
        operator.templates[8:] = own
        operator.templates[:8] = torch.randn(8, 4, generator=noise, dtype=D)
        net.log_temperature.zero_()
    mask = torch.tensor([True, True, True, True, False, False])
    observed = torch.randint(2, (rows, 6), generator=noise)
    shares = net.marginals(observed, mask).probabilities[:, 4]
    styles = torch.multinomial((0.5 * shares.log()).softmax(1), 1, generator=noise)[:, 0]
    given = (own - own.mean(0)).softmax(0).T  # given the style the label's logits are its potentials
    truth = observed.clone()
    truth[:, 5] = torch.multinomial(given[styles], 1, generator=noise)[:, 0]
    with pytest.raises(ValueError, match=r"groups=\[5\]"):
        net.calibrate(observed, mask, truth, groups=[4])
    net.calibrate(observed, mask, truth)
    found = net.log_temperature.detach().exp()
    assert found[4].item() == pytest.approx(0.5, abs=0.06)
    assert found[[0, 1, 2, 3, 5]].tolist() == [1.0] * 5


def test_a_class_without_images_and_styles_without_enough() -> None:
    states, labels = rows()
    looks, own, bias = class_styles(states[:40], labels[:40], 2, 3, 4, seed=0)
    assert looks.shape == (8, 12) and own.shape == (3, 12) and bias.shape == (12,)
    assert all(x.isfinite().all() for x in (looks, own, bias))
    assert bias[1:4].max() < bias[0] - 10  # 40 rows make one style of a class


def test_digits_in_styles(tmp_path: Path) -> None:
    """What EM and a few small updates make of them: past 5-NN imputation with 1-NN on it (0.80 and 0.049); the label
    summed over without styles ends at 0.76 and 0.055.
    """
    pytest.importorskip("sklearn")
    from ppl_models.datasets import load_digits

    table = load_digits()
    images, labels = (table.x / 16).view(-1, 1, 8, 8), table.y
    net = ConvMonotoneDBM((1, 8, 8), 4, 10, styles=6)
    net.fit(images[:1437], labels[:1437], (0.2, 0.6), num_steps=3, batch_size=16, lr=1e-4, jitter=3, progress=False)
    test, truth = images[1437:], labels[1437:]
    mask = torch.rand(360, 8, 8, generator=torch.Generator().manual_seed(0)) < 0.4
    levels = torch.linspace(0, 1, 4)
    error = (net.pixel_probabilities(test, mask) @ levels - levels[net.bin(test).view(-1, 1, 8, 8)])[~mask[:, None]]
    assert error.square().mean() < 0.050
    assert (net.classify(test, mask).argmax(1) == truth).float().mean() > 0.80
    # Half of a three as each class: a known class leaves its own styles alone, whatever the image says.
    upper = torch.zeros(8, 8, dtype=torch.bool)
    upper[:4] = True
    three = images[(labels == 3).nonzero()[0]].expand(10, -1, -1, -1)
    lower = net.complete(three, upper, labels=torch.arange(10))[:, 0, 4:]
    assert torch.pdist(lower.flatten(1)).min() > 0.1
    net.save(tmp_path / "net")
    again = ConvMonotoneDBM.load(tmp_path / "net")
    assert torch.equal(again.classify(test[:5], mask[:5]), net.classify(test[:5], mask[:5]))


@pytest.mark.parametrize(
    "options",
    [
        {"styles": -1},
        {"styles": 2.5},
        {"styles": 2, "num_classes": 0},
        {"styles": 2, "sum_labels": True},
    ],
)
def test_bad_styles(options: dict[str, Any]) -> None:
    with pytest.raises((TypeError, ValueError), match="styles"):
        ConvMonotoneDBM(**{"image_shape": (1, 8, 8), **options})


SIZES = [2, 3, 2, 4]


def table(num_rows: int = 400, seed: int = 1) -> tuple[Tensor, Tensor]:
    """Rows of three kinds, a tenth of the values drawn anew, and a mask that hides a fifth of them."""
    noise = torch.Generator().manual_seed(seed)
    kinds = torch.tensor([[0, 2, 1, 3], [1, 0, 1, 0], [0, 1, 0, 2]])
    kind = torch.randint(3, (num_rows,), generator=noise)
    drawn = (torch.rand(num_rows, 4, generator=noise) * torch.tensor(SIZES)).long()
    values = torch.where(torch.rand(num_rows, 4, generator=noise) < 0.1, drawn, kinds[kind])
    return values, torch.rand(num_rows, 4, generator=noise) < 0.8


def begun() -> tuple[MonotoneDBM, LatentClasses]:
    """A machine of uncoupled variables of different sizes at the start of its fit, and the mixture behind it."""
    values, mask = table()
    dbm = MonotoneDBM(SIZES, styles=3).double()
    operator = dbm.operator
    assert isinstance(operator, StyledOperator)
    with torch.no_grad():
        operator.inner.weight.copy_(torch.eye(*operator.inner.weight.shape, dtype=D))  # type: ignore[operator, arg-type]
    dbm._begin(dbm._query(values, mask), seed=3)
    mixture = LatentClasses(SIZES, 3)
    mixture.learn(torch.where(mask, values, -1), iterations=50, generator=generator(3, "styles"))
    return dbm, mixture.double()


def test_tables_begin_with_a_mixture() -> None:
    """Any answer is that of latent classes, whatever the sizes of the variables, and missing values take no part."""
    dbm, mixture = begun()
    configurations = torch.cartesian_prod(*[torch.arange(k) for k in SIZES])
    styles = torch.cartesian_prod(*[torch.arange(k) for k in [*SIZES, 3]])
    log_p = dbm.log_density(styles).view(-1, 3).logsumexp(1)
    expected = mixture(configurations)
    torch.testing.assert_close(log_p - log_p.logsumexp(0), expected - expected.logsumexp(0), rtol=0, atol=1e-6)
    observed, mask = table(6, seed=2)
    found = dbm.marginals(observed, mask).probabilities
    assert found.shape == (6, 5, 4)
    for row, known, q in zip(observed, mask, found, strict=True):
        agrees = ((configurations == row) | ~known).all(1)
        weights = expected[agrees].softmax(0)
        for g, size in enumerate(SIZES):
            right = torch.zeros(size, dtype=D).index_add(0, configurations[agrees, g], weights)
            if not known[g]:
                torch.testing.assert_close(q[g, :size], right, rtol=0, atol=1e-6)


def test_rows_leave_the_styles_out() -> None:
    """Rows, masks and truths with and without a column for them are one query; completions are rows."""
    dbm, _ = begun()
    observed, mask = table(6, seed=2)
    wide, known = torch.nn.functional.pad(observed, (0, 1)), torch.nn.functional.pad(mask, (0, 1))
    assert torch.equal(dbm.predictive(observed, mask), dbm.predictive(wide, known))
    assert torch.equal(dbm.predictive(observed[0], mask[0]), dbm.predictive(wide[:1], known[:1]))
    assert torch.equal(dbm.predictive(observed.double(), mask), dbm.predictive(observed, mask))
    completed = dbm.complete(observed, mask)
    assert completed.shape == observed.shape and torch.equal(completed[mask], observed[mask])
    assert dbm.sample(3, 2, observed[0], mask[0]).shape == (3, 2, 5)
    with pytest.raises(ValueError, match=r"observed must be \(B, 5\)"):
        dbm.predictive(observed[:, :3], mask[:, :3])


def test_many_rows_are_answered_some_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a sum over the styles of all rows at once would need grows with rows, styles and states together."""
    dbm, _ = begun()
    observed, mask = table(50, seed=2)
    whole = dbm.predictive(observed, mask)
    asked = []
    solved = dbm.solved_logits
    monkeypatch.setattr(pairwise, "_AT_ONCE", 7 * 16 * 14)  # seven rows of 16 cases, of 11 states and three styles
    monkeypatch.setattr(dbm, "solved_logits", lambda query, **options: asked.append(len(query.states)) or solved(query))
    torch.testing.assert_close(dbm.predictive(observed, mask), whole, rtol=0, atol=1e-9)
    assert asked == [7 * 3] * 7 + [3]


@pytest.mark.parametrize("images", [False, True])
def test_persistent_chains_see_what_styles_couple_to(monkeypatch: pytest.MonkeyPatch, images: bool) -> None:
    """Styles are alike until a fit begins: what does not interact by then may not be drawn together after it."""
    model: MonotoneDBM | ConvMonotoneDBM = (
        ConvMonotoneDBM((1, 2, 2), 2, 2, styles=2) if images else MonotoneDBM(SIZES, styles=3)
    )
    drawn: list[list[Tensor]] = []
    energy = model._energy
    monkeypatch.setattr(
        model, "_energy", lambda *a, colours, **k: drawn.append(colours) or energy(*a, colours=colours, **k)
    )
    data = (rows()[0].view(-1, 1, 2, 2).float(), rows()[1]) if images else (table()[0],)
    model.fit(*data, objective="pcd", num_steps=2, progress=False)  # type: ignore[arg-type]
    styles = model.summed
    assert drawn
    assert [len(colour) for colour in drawn[0] if styles in colour] == [1]


def test_calibrating_tables_with_styles() -> None:
    """The styles' temperature, by the likelihood of what is known: the truth of a style nobody knows."""
    dbm, _ = begun()
    values, _ = table(2000, seed=5)
    mask = torch.rand(2000, 4, generator=torch.Generator().manual_seed(6)) < 0.5

    def loss(moved: float) -> float:
        with torch.no_grad():
            dbm.log_temperature[4] += moved
            told = dbm.predictive(values, mask)[:, :4].gather(2, values[..., None])[..., 0]
            dbm.log_temperature[4] -= moved
        return -float(told[~mask].log().mean())

    with torch.no_grad():
        dbm.log_temperature[4] = 1.0
    before = loss(0.0)
    dbm.calibrate(values, mask, values)
    assert loss(0.0) < min(before, loss(0.1), loss(-0.1))
    assert dbm.log_temperature[:4].tolist() == [0.0] * 4
    with pytest.raises(ValueError, match="below 4"):
        dbm.calibrate(values, mask, values, groups=[4])


def test_a_table_of_several_kinds() -> None:
    """Sixteen answers of eight kinds of people: pairs of answers do not tell the kinds apart, styles do."""
    noise = torch.Generator().manual_seed(0)
    kinds = torch.randint(2, (8, 16), generator=noise)
    own = kinds[torch.randint(8, (3000,), generator=noise)]
    values = torch.where(torch.rand(3000, 16, generator=noise) < 0.05, 1 - own, own)
    mask = torch.rand(1000, 16, generator=noise) < 0.4
    train, test = values[:2000], values[2000:]

    def loss(one: Tensor) -> float:
        told = torch.where(test == 1, one, 1 - one)
        return -float(told[~mask].log().mean())

    chances = 0.05 + 0.9 * kinds.double()
    agree = torch.where(test[:, None] == 1, chances, 1 - chances).log() * mask[:, None]
    truth = loss(agree.sum(2).softmax(1) @ chances)
    beyond = {}
    for styles in (0, 8):
        dbm = MonotoneDBM([2] * 16, curvature=2, styles=styles)
        dbm.fit(train, num_steps=50 if styles else 300, progress=False)
        beyond[styles] = loss(dbm.predictive(test, mask)[:, :16, 1]) - truth
    assert beyond[8] < 0.02
    assert beyond[0] > 0.04


def test_a_bad_rate_changes_nothing() -> None:
    values, mask = table()
    dbm = MonotoneDBM(SIZES, styles=3)
    before = {name: value.clone() for name, value in dbm.state_dict().items()}
    with pytest.raises(ValueError, match="lr must be positive"):
        dbm.fit(values, mask, lr=-1.0, progress=False)
    assert all(torch.equal(value, before[name]) for name, value in dbm.state_dict().items())


@pytest.mark.parametrize("options", [{"styles": -1}, {"styles": 1}, {"styles": 2.5}, {"styles": 2, "summed": 0}])
def test_bad_styles_of_tables(options: dict[str, Any]) -> None:
    with pytest.raises((TypeError, ValueError), match="styles"):
        MonotoneDBM(SIZES, **options)
