"""The bodies that read a partly observed vector."""

import pytest
import torch

from inference.runtime.generators import scoped_seed
from ppl_models.marginalization_model.networks import _RotaryBlock

ROUNDED = 2e-6  # the angles' cosines are of single precision, and lengths about 4


@pytest.mark.parametrize(("width", "num_heads"), [(16, 2), (12, 4), (4, 4)])
def test_what_attention_sees_of_places_is_their_distance(width: int, num_heads: int) -> None:
    """The products of queries and keys that are alike at all places; lengths stay; of one feature nothing is turned."""
    with scoped_seed(0):
        block = _RotaryBlock(9, width, num_heads, 0.0).double()
        query, key = torch.randn(2, 1, num_heads, 1, width // num_heads, dtype=torch.float64).expand(2, 1, -1, 9, -1)
    turned = block._turned(query), block._turned(key)
    products = turned[0] @ turned[1].mT
    for distance in range(-8, 9):
        along = products.diagonal(distance, 2, 3)
        torch.testing.assert_close(along, along[..., :1].expand_as(along), rtol=0, atol=ROUNDED)
    assert (width == num_heads) == torch.equal(products, (query @ key.mT).expand_as(products))
    torch.testing.assert_close(turned[0].norm(dim=3), query.norm(dim=3), rtol=0, atol=ROUNDED)


def test_each_variable_sees_every_other_one_and_where_it_stands() -> None:
    with scoped_seed(0):
        block = _RotaryBlock(6, 8, 2, 0.0).double()
        x = torch.randn(1, 6, 8, dtype=torch.float64, requires_grad=True)
        out = block(x)
        for j in range(6):
            (grad,) = torch.autograd.grad(out[0, j].sum(), x, retain_graph=True)
            assert bool((grad[0].abs().sum(1) > 1e-6).all())
        swapped = block(x.flip(1)).flip(1)
    assert float((swapped - out).detach().abs().max()) > 1e-3, "the order counts"
