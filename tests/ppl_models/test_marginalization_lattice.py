"""A network of a small lattice on a larger one: identities, what it learned, what is refused."""

from typing import Any

import pytest
import torch

from inference.runtime.generators import generator, scoped_seed
from ppl_models import MarginalizationModel
from ppl_models.marginalization_model import LatticeIsing

SMALL, LARGE = LatticeIsing(5, coupling=0.1, field=0.2), LatticeIsing(7, coupling=0.1, field=0.2)
OPTIONS: dict[str, Any] = {"hidden": 8, "depth": 1, "marginal": "shared"}


@pytest.fixture(scope="module")
def learned() -> MarginalizationModel:
    mam = MarginalizationModel([2] * 25, "lattice", **OPTIONS)
    mam.fit_energy(SMALL.log_density, num_steps=80, batch_size=24, lr=0.02, progress=False)
    return mam


def test_a_pattern_that_repeats_has_four_times_all(learned: MarginalizationModel) -> None:
    """On four copies of a row side by side every window is one of the small lattice's."""
    ten = LatticeIsing(10, coupling=0.1, field=0.2)
    large = learned.resized((10, 10), ten.log_density)
    with scoped_seed(0):
        x = torch.randint(-1, 2, (20, 25))
    copies = x.view(-1, 5, 5).repeat(1, 2, 2).flatten(1)
    with torch.no_grad():
        once, there = learned.conditionals(x), large.conditionals(copies)
        expected = once.view(-1, 5, 5, 2).repeat(1, 2, 2, 1).flatten(1, 2)
        assert torch.allclose(there, expected, atol=1e-5)
        # f adds up; float32 of numbers near 60
        assert torch.allclose(large.marginals(copies), 4 * learned.marginals(x), atol=1e-4)
    complete = copies.clamp(min=0)
    # the terms were found in float32, from 5,051 rows
    assert torch.allclose(large.marginals.pairwise(complete), ten.log_density(complete), atol=1e-4)


def test_what_a_small_lattice_taught_holds_on_a_large_one(learned: MarginalizationModel) -> None:
    """80 updates at 5 x 5; the large lattice was never seen."""
    log_z = LARGE.log_partition()
    found = learned.resized((7, 7), LARGE.log_density).log_partition(num_samples=200)
    assert 0 < log_z - float(found.log_weights.mean()) < 0.25, "KL(model || target)"
    assert abs(found.value - log_z) < 0.1 and found.ess > 100
    fresh = MarginalizationModel([2] * 25, "lattice", **OPTIONS)
    fresh.fit_energy(SMALL.log_density, num_steps=1, batch_size=8, lr=1e-6, progress=False)
    untrained = fresh.resized((7, 7), LARGE.log_density).log_partition(num_samples=50)
    assert log_z - float(untrained.log_weights.mean()) > 2


def test_the_law_of_a_fit_to_data_is_of_one_size_and_stays_behind() -> None:
    mam = MarginalizationModel([2] * 25, "lattice", hidden=8, depth=1, marginal="causal")
    mam.fit_energy(SMALL.log_density, num_steps=2, batch_size=4, progress=False)
    large = mam.resized((7, 7), LARGE.log_density)
    x = torch.randint(-1, 2, (5, 49), generator=generator(0))
    assert large.marginals.causal is not None and bool(torch.isfinite(large.log_prob(x)).all())


def test_it_goes_on_learning_and_is_saved(learned: MarginalizationModel, tmp_path: Any) -> None:
    large = learned.resized((6, 7), LatticeIsing(7, 0.1, 0.2, height=6).log_density)
    large.save(tmp_path / "m")
    x = torch.randint(-1, 2, (5, 42), generator=generator(0))
    assert torch.equal(MarginalizationModel.load(tmp_path / "m").log_prob(x), large.log_prob(x))
    before = large.log_prob(x)
    large.fit_energy(LatticeIsing(7, 0.1, 0.2, height=6).log_density, num_steps=2, batch_size=4, progress=False)
    assert not torch.equal(large.log_prob(x), before)


def fitted(sizes: list[int], **changes: Any) -> MarginalizationModel:
    """As if it were: on a density of pairs."""
    mam = MarginalizationModel(sizes, "lattice", **{**OPTIONS, **changes})
    mam.marginals.kind = "pairwise"
    return mam


def test_what_cannot_be_resized(learned: MarginalizationModel) -> None:
    density = LARGE.log_density
    for mam, shape, error, message in (
        (learned, (2, 10), ValueError, "at least 5: shape is"),
        (learned, 10, TypeError, "shape"),
        (learned, (5, 5), ValueError, "25"),
        (fitted([2] * 25, depth=3), (14, 14), ValueError, "at least 13: the lattice that"),
        (fitted([2] * 24 + [3]), (7, 7), ValueError, "same number of values"),
        (MarginalizationModel([2] * 25, "lattice", **OPTIONS), (7, 7), RuntimeError, "fit_energy"),
        (MarginalizationModel([2] * 25, hidden=8, depth=1), (7, 7), ValueError, "'mlp'"),
    ):
        with pytest.raises(error, match=message):
            mam.resized(shape, density)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="more than two"):
        learned.resized((7, 7), lambda x: x[:, :3].prod(1).float())
    seen = fitted([2] * 81, depth=2).resized((9, 10), LatticeIsing(10, 0.1, 0.2, height=9).log_density)
    assert seen.num_variables == 90, "two blocks look four steps far"
