"""Images: a real fit of handwritten digits from first to last, colours, files, and bad input."""

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from inference.objectives.masked import Head, _head_loss
from ppl_models import ConvMonotoneDBM
from ppl_models.monotone_dbm import expected_calibration_error
from tests.ppl_models.dbm_cases import D


def digits() -> tuple[Tensor, Tensor]:
    """Images ``(1797, 1, 8, 8)`` of four grey values, and labels."""
    pytest.importorskip("sklearn")
    from ppl_models.datasets import load_digits

    table = load_digits()
    return ((table.x / 4).floor().clamp(max=3) / 3).view(-1, 1, 8, 8), table.y


def half_shown(number: int, size: int = 8, share: float = 0.4, seed: int = 0) -> Tensor:
    return torch.rand(number, size, size, generator=torch.Generator().manual_seed(seed)) < share


def spread_of_answers(net: ConvMonotoneDBM, image: Tensor, mask: Tensor) -> float:
    """Largest difference of marginals between 64 random starts of one query, in double precision."""
    exact = copy.deepcopy(net).double()
    query = exact.image_query(image.double(), mask)
    starts = torch.randn(64, net.groups.num_groups, 10, generator=torch.Generator().manual_seed(0), dtype=D)
    found = exact.marginals(query.states.expand(64, -1), query.mask.expand(64, -1), initial=(3 * starts).softmax(-1))
    assert found.converged.all()
    return float((found.probabilities - found.probabilities[0]).abs().max())


@pytest.mark.changes_globals("rng_python")  # the first import of scikit-learn or ArviZ draws from it
def test_digits_from_first_to_last(tmp_path: Path) -> None:
    """A short fit: better than independent pixels (MSE 0.093) and far better than chance, the same from a file, and one
    answer to a query before and after it.
    """
    images, labels = digits()
    net = ConvMonotoneDBM((1, 8, 8), num_bins=4, num_classes=10, curvature=2)
    assert spread_of_answers(net, images[-1:], half_shown(1)) < 1e-8
    result = net.fit(
        images[:1437],
        labels[:1437],
        observed_fraction=0.4,
        seed=0,
        num_steps=150,
        batch_size=64,
        lr=0.04,
        progress=False,
    )
    # A fit starts at independent pixels of the right frequencies, and labels without knowledge: about 1.6.
    assert 1.4 < result.losses[0] < 1.8 and result.losses[-10:].mean() < 0.55 * result.losses[0]
    assert "loss" in result.to_arviz()["sample_stats"]
    test, truth, mask = images[1437:], labels[1437:], half_shown(360)
    probabilities = net.classify(test, mask)
    assert probabilities.shape == (360, 10)
    assert (probabilities.argmax(1) == truth).float().mean() > 0.55
    error = expected_calibration_error(probabilities, truth)
    assert error < 0.2 and error == pytest.approx(expected_calibration_error(probabilities.numpy(), truth.numpy()))
    completed = net.complete(test, mask)
    hidden = ~mask[:, None]
    assert torch.equal(completed[mask[:, None]], test[mask[:, None]])
    assert (completed - test)[hidden].square().mean() < 0.08
    knowing = net.complete(test, mask, labels=truth)
    assert (knowing - test)[hidden].square().mean() < (completed - test)[hidden].square().mean()
    # Given the class alone, the picture drawn is nearest to that class's mean image.
    drawn = net.complete(test[:10], torch.zeros(8, 8, dtype=torch.bool), labels=torch.arange(10))
    means = torch.stack([images[:1437][labels[:1437] == c].mean(0) for c in range(10)])
    assert (torch.cdist(drawn.flatten(1), means.flatten(1)).argmin(1) == torch.arange(10)).sum() >= 9
    # Given the upper half as well, the classes still differ in the lower one.
    upper = torch.zeros(8, 8, dtype=torch.bool)
    upper[:4] = True
    lower = net.complete(test[:1].expand(10, -1, -1, -1), upper, labels=torch.arange(10))[:, 0, 4:]
    assert torch.pdist(lower.flatten(1)).mean() > 0.5
    net.save(tmp_path / "net")
    again = ConvMonotoneDBM.load(tmp_path / "net")
    assert torch.equal(again.classify(test[:20], mask[:20]), net.classify(test[:20], mask[:20]))
    assert torch.equal(again.complete(test[:20], mask[:20]), net.complete(test[:20], mask[:20]))
    assert spread_of_answers(net, test[:1], mask[:1]) < 1e-8


def test_a_convolutional_model_of_colour_patches(tmp_path: Path) -> None:
    noise = torch.Generator().manual_seed(0)
    ramp = torch.linspace(0, 1, 8)[None, None, None, :].expand(24, 3, 8, 8).clone()
    ramp[::2] = 1 - ramp[::2]
    images = (ramp + 0.05 * torch.randn(24, 3, 8, 8, generator=noise)).clamp(0, 1)
    labels = torch.arange(24) % 2
    net = ConvMonotoneDBM(
        (3, 8, 8),
        3,
        2,
        hidden=[(8, 4, 4, 2), (8, 2, 2, 2)],
        kernels=[[3, 0, 0, 0], [3, 3, 0, 0], [3, 3, 3, 0], [0, 0, 2, 1]],
    )
    net.operator.dense_limit = 0  # type: ignore[assignment]  # the path of large images
    result = net.fit(images, labels, num_steps=8, batch_size=12, lr=0.03, progress=False, focal=2.0, balance=0.9999)
    assert torch.isfinite(result.losses).all()
    mask = half_shown(24)
    slow = net.classify(images, mask)
    net.operator.dense_limit = 10_000  # type: ignore[assignment]
    torch.testing.assert_close(net.classify(images, mask), slow, rtol=0, atol=1e-4)
    assert net.complete(images, mask).shape == images.shape
    assert net.pixel_probabilities(images, mask).shape == (24, 3, 8, 8, 3)
    drawn = net.sample(2, 2, seed=0)
    assert drawn.shape == (2, 2, net.groups.num_groups)


def test_nothing_observed_and_every_pixel_observed() -> None:
    net = ConvMonotoneDBM((1, 4, 4), 2, 3, hidden=[(8, 4)], rank=6)
    images = torch.rand(2, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    drawn = net.complete(images, torch.zeros(2, 4, 4, dtype=torch.bool), labels=[0, 2])
    assert torch.isfinite(drawn).all()
    assert torch.equal(net.complete(images), images)
    unknown = net.complete(images, torch.zeros(2, 4, 4, dtype=torch.bool), labels=[-1, -1])
    assert torch.equal(unknown, net.complete(images, torch.zeros(2, 4, 4, dtype=torch.bool)))
    hidden = images.clone()
    hidden[0, 0, 0, 0] = math.nan
    mask = torch.ones(2, 4, 4, dtype=torch.bool)
    mask[0, 0, 0] = False
    assert torch.isfinite(net.complete(hidden, mask)).all()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (((1, 30, 26),), "square"),
        (((28, 28),), "image_shape"),
        (((1, 8, 8), 1), "num_bins"),
        (((1, 8, 8), 4, 1), "num_classes"),
        (((1, 8, 8), 4, 10, {"hidden": [(9, 4, 4, 2)]}), "do not divide"),
        (((1, 8, 8), 4, 10, {"hidden": [(8, 3, 3, 2)], "kernels": [[3, 0, 0], [3, 3, 0], [0, 3, 1]]}), "strides"),
        (((1, 8, 8), 4, 10, {"hidden": [(8, 4, 4, 2)], "kernels": [[3, 0, 0], [4, 3, 0], [0, 4, 1]]}), "must be one"),
        (((1, 8, 8), 4, 10, {"hidden": [(8, 4, 4, 2)], "kernels": [[3, 0], [3, 3]]}), "columns"),
        (((1, 8, 8), 4, 10, {"rank": 4, "kernels": [[3]]}), "not both"),
        (((1, 8, 8), 4, 10, {"hidden": torch.ones(4)}), "hidden"),
        (((1, 8, 8), 4, 10, {"curvature": torch.ones(2)}), "curvature"),
    ],
)
def test_bad_networks(arguments: tuple[Any, ...], words: str) -> None:
    options = arguments[-1] if isinstance(arguments[-1], dict) else {}
    given = arguments[:-1] if options else arguments
    with pytest.raises((TypeError, ValueError), match=words):
        ConvMonotoneDBM(*given, **options)


def test_bad_images() -> None:
    net = ConvMonotoneDBM((1, 4, 4), 2, 3, hidden=[(8, 4)], rank=6)
    good, labels = torch.rand(2, 1, 4, 4, generator=torch.Generator().manual_seed(0)), [0, 2]
    without = ConvMonotoneDBM((1, 4, 4), 2, 0, hidden=[(8, 4)], rank=6)
    calls: list[tuple[Any, str]] = [
        (lambda: net.fit(255 * good, labels), r"\[0, 1\]"),
        (lambda: net.fit(good * math.nan, labels), "finite"),
        (lambda: net.fit(good[..., :3], labels), r"\(N, 1, 4, 4\)"),
        (lambda: net.fit(good, [0, 3]), "labels must be 0 to 2"),
        (lambda: net.fit(good, [0, -1]), "labels must be 0 to 2"),
        (lambda: net.fit(good, [0]), "one an image"),
        (lambda: net.fit(good), "labels are needed"),
        (lambda: net.fit(good, labels, 1.5), "observed_fraction"),
        (lambda: net.fit(good, labels, objective="pseudo_likelihood"), "objective"),
        (lambda: net.fit(good, labels, label_weight=2.0), "label_weight"),
        (lambda: net.fit(good, labels, focal=-1.0), "focal"),
        (lambda: net.fit(good, labels, balance=1.0), "balance"),
        (lambda: net.fit(good, labels, balance=-0.5), "balance"),
        (lambda: net.classify(good, torch.ones(2, 3, 3, dtype=torch.bool)), "mask must be"),
        (lambda: net.classify(good, torch.full((2, 4, 4), 0.5)), "boolean"),
        (lambda: without.classify(good), "no labels"),
        (lambda: without.fit(good, labels), "no"),
    ]
    for call, words in calls:
        with pytest.raises((TypeError, ValueError), match=words):
            call()


@pytest.mark.parametrize("shape", [(2, 1, 8, 6), (2, 6, 8, 1), (2, 8, 6)])
def test_pixels_in_another_order_are_refused(shape: tuple[int, ...]) -> None:
    """Of as many numbers, they were read in the wrong order."""
    net = ConvMonotoneDBM((1, 6, 8), 2, 3, hidden=[(8, 4)], rank=6)
    for ask in (net.classify, net.complete, net.pixel_probabilities):
        with pytest.raises(ValueError, match=r"\(N, 1, 6, 8\)"):
            ask(torch.zeros(shape))
    assert net.classify(torch.zeros(2, 6, 8)).shape == (2, 3)


def test_the_focal_loss_of_a_sure_pixel_has_a_slope() -> None:
    """A power below one has an infinite one at p = 1, and 0 times infinity is NaN."""
    logits = torch.tensor([[[200.0, 0.0], [0.3, 0.1]]], requires_grad=True)
    head = Head(torch.arange(2), focal=0.5)
    _head_loss(logits, torch.zeros(1, 2, dtype=torch.long), torch.ones(1, 2), head).backward()
    assert logits.grad is not None and torch.isfinite(logits.grad).all()
    assert float(logits.grad[0, 0].abs().max()) < 1e-6 < float(logits.grad[0, 1].abs().max())
