"""E6: the lattice's exact answers against brute force and published digits; pairwise terms found in a density."""

import math

import pytest
import torch

from inference.runtime.generators import generator
from ppl_models.marginalization_model import LatticeIsing
from ppl_models.marginalization_model.distribution import all_values
from ppl_models.marginalization_model.pairwise import PairwiseEnergy, find_pairwise


def test_four_by_four_by_brute_force() -> None:
    lattice = LatticeIsing(width=4, coupling=0.1, field=0.2)
    x = all_values(torch.full((16,), 2))
    log_f = lattice.log_density(x).double()
    log_z = log_f.logsumexp(0)
    p = (log_f - log_z).exp()
    # the density is float32: 2^16 terms of a relative error of 1e-7
    assert abs(float(log_z) - lattice.log_partition()) < 1e-5
    assert abs(float((p * log_f).sum()) - lattice.mean_log_density()) < 1e-5
    assert abs(lattice.log_partition() - 12.598502597390) < 1e-9
    assert abs(lattice.mean_log_density() - 3.917235755) < 1e-8
    assert abs(lattice.entropy() - 8.681266843) < 1e-8
    assert abs(lattice.mean_spin() - 0.480005) < 1e-6


def test_ten_by_ten_has_the_published_digits() -> None:
    lattice = LatticeIsing(width=10, coupling=0.1, field=0.2)
    assert abs(lattice.log_partition() - 78.688056194918) < 1e-9
    assert abs(lattice.entropy() - 54.295826) < 1e-6


def test_a_rectangle_either_way_and_an_independent_field() -> None:
    a, b = (LatticeIsing(w, 0.15, -0.3, height=h) for w, h in ((3, 5), (5, 3)))
    assert abs(a.log_partition() - b.log_partition()) < 1e-10
    x = all_values(torch.full((15,), 2))
    assert abs(float(a.log_density(x).double().logsumexp(0)) - a.log_partition()) < 1e-5
    free = LatticeIsing(3, 0.0, 0.7)
    assert abs(free.log_partition() - 9 * math.log(2 * math.cosh(0.7))) < 1e-10
    assert abs(free.mean_spin() - math.tanh(0.7)) < 1e-10


@pytest.mark.parametrize(("width", "height", "coupling"), [(4, 4, 30.0), (4, 3, -30.0), (3, 3, -5.0), (3, 4, 300.0)])
def test_cold_lattices_stay_in_range(width: int, height: int, coupling: float) -> None:
    lattice = LatticeIsing(width, coupling, 0.25, height=height)
    s = 2.0 * all_values(torch.full((width * height,), 2)).double() - 1
    grid = s.view(-1, height, width)
    bonds = (grid * (grid.roll(1, 1) + grid.roll(1, 2))).sum((1, 2))
    log_f = 2 * coupling * bonds + 0.25 * s.sum(1)
    log_z = log_f.logsumexp(0)
    p = (log_f - log_z).exp()
    assert lattice.log_partition() == pytest.approx(float(log_z), rel=1e-12)
    assert lattice.entropy() == pytest.approx(float(torch.special.entr(p).sum()), abs=1e-9)
    assert lattice.mean_spin() == pytest.approx(float(p @ s.mean(1)), abs=1e-9)


def test_a_lattice_too_cold_for_double_precision_is_refused() -> None:
    with pytest.raises(ValueError, match="coupling = -200"):  # frustrated: no row is at its best
        LatticeIsing(3, -200.0, 0.0).log_partition()


def test_density_of_random_rows_by_the_adjacency_matrix() -> None:
    lattice = LatticeIsing(width=5, coupling=0.1, field=0.2, height=4)
    adjacency = torch.zeros(20, 20)
    for row in range(4):
        for column in range(5):
            for down, right in ((1, 0), (0, 1), (-1, 0), (0, -1)):
                adjacency[row * 5 + column, (row + down) % 4 * 5 + (column + right) % 5] += 1
    x = torch.randint(2, (50, 20), generator=generator(0))
    s = 2.0 * x - 1
    expected = 0.1 * ((s @ adjacency) * s).sum(1) + 0.2 * s.sum(1)
    assert torch.allclose(lattice.log_density(x), expected, atol=1e-5)
    partial = x.clone()
    partial[:, 7] = -1
    s[:, 7] = 0
    assert torch.allclose(lattice.log_density(partial), 0.1 * ((s @ adjacency) * s).sum(1) + 0.2 * s.sum(1), atol=1e-5)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"width": 2}, ValueError, "width"),
        ({"width": 3.5}, TypeError, "width"),
        ({"coupling": float("nan")}, ValueError, "coupling"),
        ({"field": "1"}, TypeError, "field"),
    ],
)
def test_bad_lattices(arguments: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        LatticeIsing(**{"width": 4, "coupling": 0.1, "field": 0.2, **arguments})


def test_bad_rows_and_too_wide() -> None:
    with pytest.raises(ValueError, match="16"):
        LatticeIsing(4, 0.1, 0.2).log_density(torch.zeros(3, 15))
    with pytest.raises(ValueError, match=r"0 .*and 1"):
        LatticeIsing(4, 0.1, 0.2).log_density(torch.full((3, 16), 2))
    with pytest.raises(TypeError, match="x must be"):
        LatticeIsing(4, 0.1, 0.2).log_density([["up"] * 16])
    rows = torch.randint(2, (3, 16), generator=generator(0))
    expected = LatticeIsing(4, 0.1, 0.2).log_density(rows)
    for form in (rows.tolist(), rows.numpy(), rows.bool(), rows.float()):
        assert torch.equal(LatticeIsing(4, 0.1, 0.2).log_density(form), expected)
    with pytest.raises(ValueError, match="12"):
        LatticeIsing(13, 0.1, 0.2).log_partition()


def test_pairwise_terms_are_found_and_others_are_not_mistaken_for_them() -> None:
    sizes = torch.tensor([2, 3, 1, 4])
    g = generator(0)
    table = torch.randn(4, 4, 4, 4, generator=g, dtype=torch.float64)

    def pairwise(x: torch.Tensor) -> torch.Tensor:
        return sum((table[i, j, x[:, i], x[:, j]] for i in range(4) for j in range(i + 1)), torch.tensor(3.0))

    terms = find_pairwise(pairwise, sizes, g)
    assert terms is not None
    energy = PairwiseEnergy(4, 4).double()
    energy.set_terms(**terms)
    x = all_values(sizes)
    assert (energy(x) - pairwise(x)).abs().max() < 1e-12
    # terms inside S: with zero-mean terms, their mean over the missing variables
    seen = x[:1].clone()
    seen[0, 1] = -1
    rows = x[:1].repeat(3, 1)
    rows[:, 1] = torch.arange(3)
    assert abs(float(energy(seen)[0] - pairwise(rows).mean())) < 1e-12
    assert find_pairwise(lambda x: pairwise(x) + x[:, 0] * x[:, 1] * x[:, 3], sizes, g) is None
    assert find_pairwise(lambda x: torch.where(x[:, 0] == 1, -torch.inf, 0.0), sizes, g) is None
    assert find_pairwise(lambda x: x.sum(1).double(), torch.full((5000,), 2), g) is None, "too many evaluations"
