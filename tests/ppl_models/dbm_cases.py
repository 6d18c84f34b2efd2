"""Models that the tests of Boltzmann machines share."""

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

from ppl_models import MonotoneDBM
from ppl_models.monotone_dbm.operators import DenseOperator
from ppl_models.monotone_dbm.pairwise import PairwiseModel

D = torch.float64


def example(scaled: bool = True, factor: float = 1.0) -> MonotoneDBM:
    """Six groups of 3: A[r, j] = sin(r j), b_j = 0.5 cos(j), m = 0.1."""
    dbm = MonotoneDBM(group_sizes=[3] * 6, rank=6, monotonicity=0.1, curvature=1).double()
    rows, columns = torch.arange(1, 7, dtype=D)[:, None], torch.arange(1, 19, dtype=D)
    operator = dbm.operator
    assert isinstance(operator, DenseOperator)
    with torch.no_grad():
        operator.weight.copy_(factor * torch.sin(rows * columns))
        dbm.bias.copy_(0.5 * torch.cos(columns))
    if not scaled:
        operator.monotone = False
    return dbm


def ising(coupling: float, field: tuple[float, float], **options: object) -> MonotoneDBM:
    """Two spins, each a group of two states (up, down)."""
    zero, pair = torch.zeros(2, 2, dtype=D), coupling * torch.tensor([[1.0, -1.0], [-1.0, 1.0]], dtype=D)
    phi = torch.cat([torch.cat([zero, pair], 1), torch.cat([pair, zero], 1)])
    bias = torch.tensor([field[0], -field[0], field[1], -field[1]], dtype=D)
    return MonotoneDBM.from_potentials(phi, bias, [2, 2], **options)  # type: ignore[arg-type]


def magnetisation(probabilities: Tensor) -> Tensor:
    """Of each spin."""
    return probabilities[0, :, 0] - probabilities[0, :, 1]


def random_starts(dbm: PairwiseModel, number: int, seed: int = 0, spread: float = 4.0) -> Tensor:
    """Random probabilities ``(number, G, K)``."""
    noise = torch.Generator().manual_seed(seed)
    shape = (number, dbm.groups.num_groups, dbm.groups.largest)
    return (spread * torch.randn(shape, generator=noise, dtype=D)).softmax(-1)


def check_gradients(
    loss: Callable[[], Tensor], parameters: Sequence[object], entries: int, rel: float, abs: float, scale: float = 1.0
) -> None:
    """The gradients that the parameters have, of ``scale`` times ``loss``, against central differences of some of their
    entries.
    """
    dice = torch.Generator().manual_seed(9)
    for parameter in parameters:
        assert isinstance(parameter, Tensor) and parameter.grad is not None
        flat = parameter.data.view(-1)
        for index in torch.randperm(len(flat), generator=dice)[:entries].tolist():
            kept = flat[index].item()
            flat[index] = kept + 1e-5
            above = loss().item()
            flat[index] = kept - 1e-5
            slope = (above - loss().item()) / 2e-5
            flat[index] = kept
            assert parameter.grad.view(-1)[index].item() / scale == pytest.approx(slope, rel=rel, abs=abs)
