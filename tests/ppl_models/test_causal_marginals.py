"""The normalised law of subsets: sums to one, looks back only, and starts at the mixture."""

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from inference.runtime.generators import scoped_seed
from ppl_models import MarginalizationModel
from ppl_models.marginalization_model.causal import CausalMarginals
from ppl_models.marginalization_model.distribution import all_values
from tests.ppl_models.marginalization_cases import BernoulliMixture, hide_some

SIZES = [2, 3, 1, 4]
OPTIONS: dict[str, Any] = {"context_features": 2, "hidden": 16, "depth": 2, "classes": 3}


@pytest.fixture
def mam() -> MarginalizationModel:
    """Random weights throughout, in double precision."""
    with scoped_seed(0):
        mam = MarginalizationModel(SIZES, marginal="causal", **OPTIONS).double()
        mam.marginals.base.learn(_rows(200), generator=torch.Generator().manual_seed(0))
        for parameter in _law(mam).parameters():
            torch.nn.init.normal_(parameter)
    return mam


def _law(mam: MarginalizationModel) -> CausalMarginals:
    assert mam.marginals.causal is not None
    return mam.marginals.causal


def _rows(count: int, missing: bool = False) -> Tensor:
    draw = torch.Generator().manual_seed(1)
    rows = (torch.rand(count, len(SIZES), generator=draw) * torch.tensor(SIZES)).long()
    return rows.masked_fill(torch.rand(rows.shape, generator=draw) < 0.4, -1) if missing else rows


def test_the_law_of_every_subset_sums_to_one(mam: MarginalizationModel) -> None:
    states = all_values(mam.cardinalities)
    for context in torch.tensor([[0.3, -1.0], [2.0, 0.5]]).double():
        for seen in itertools.product([False, True], repeat=len(SIZES)):
            values = states.masked_fill(~torch.tensor(seen), -1).unique(dim=0)
            total = mam.log_prob(values, context.expand(len(values), 2)).exp().sum()
            assert abs(float(total) - 1) < 1e-13, seen


def test_sets_of_one_and_two_are_looked_up_and_every_law_still_sums_to_one(tmp_path: Path) -> None:
    """Random weights: the conditionals' two ways round differ, and the chain rule is neither nor their mean."""
    with scoped_seed(0):
        mam = MarginalizationModel(SIZES, marginal="causal", hidden=16, depth=2, classes=3).double()
        for parameter in mam.parameters():
            torch.nn.init.normal_(parameter)
        chain = mam.log_prob(_rows(60, missing=True))
        mam._look_up_small_sets()
    rows = _rows(60, missing=True)
    count = (rows >= 0).sum(1)
    few = (count == 1) | (count == 2)
    with torch.no_grad():
        ahead, behind = (mam.distribution(order=order).log_prob(rows) for order in (range(4), range(3, -1, -1)))
    found = mam.log_prob(rows)
    torch.testing.assert_close(found[few].exp(), (ahead.exp() + behind.exp())[few] / 2, rtol=0, atol=1e-14)
    assert float((ahead - behind)[count == 2].abs().max()) > 0.1, "the ways round differ"
    assert float((found - chain)[few].abs().max()) > 0.1 and torch.equal(found[~few], chain[~few])
    assert bool((count == 0).any()) and bool((found[count == 0] == 0).all())
    states = all_values(mam.cardinalities)
    for seen in itertools.product([False, True], repeat=len(SIZES)):
        values = states.masked_fill(~torch.tensor(seen), -1).unique(dim=0)
        assert abs(float(mam.log_prob(values).exp().sum()) - 1) < 1e-13, seen
    mam.save(tmp_path / "model")
    assert torch.equal(MarginalizationModel.load(tmp_path / "model").log_prob(rows), found)


def test_a_step_sees_what_is_before_it_and_nothing_else(mam: MarginalizationModel) -> None:
    """To the bit: neither its own value nor a later one has an influence; each value before it has."""
    rows, context = _rows(40, missing=True), torch.ones(40, 2).double()
    with torch.no_grad():
        steps = _law(mam).steps(rows, context)
        for place, size in enumerate(SIZES):
            changed = rows.clone()
            changed[:, place] = (rows[:, place] + 2) % (size + 1) - 1  # the next one of -1, 0, ..., K - 1
            found = _law(mam).steps(changed, context)
            assert torch.equal(found[:, : place + 1], steps[:, : place + 1])
            if place < len(SIZES) - 1:
                assert bool((found[:, 3] != steps[:, 3]).any(1).all())
        other = _law(mam).steps(rows, 2 * context)
    assert bool((other[:, [0, 1, 3]] != steps[:, [0, 1, 3]]).any(2).all()), "every step sees the context"


def test_it_starts_at_the_mixture(mam: MarginalizationModel) -> None:
    fresh = MarginalizationModel(SIZES, marginal="causal", **OPTIONS).double()
    fresh.marginals.base.load_state_dict(mam.marginals.base.state_dict())
    rows, context = _rows(50, missing=True), torch.ones(50, 2)
    torch.testing.assert_close(fresh.log_prob(rows, context), fresh.marginals.base(rows), rtol=0, atol=1e-12)
    assert float((mam.log_prob(rows, context) - mam.marginals.base(rows)).abs().max()) > 0.1


def test_rows_one_by_one_in_single_precision_and_from_a_file(mam: MarginalizationModel, tmp_path: Path) -> None:
    rows, context = _rows(20, missing=True), torch.ones(20, 2)
    found = mam.log_prob(rows, context)
    each = [mam.log_prob(row[None], c[None]) for row, c in zip(rows, context, strict=True)]
    torch.testing.assert_close(torch.cat(each), found, rtol=0, atol=1e-12)
    mam.save(tmp_path / "model")
    assert torch.equal(MarginalizationModel.load(tmp_path / "model").log_prob(rows, context), found)
    torch.testing.assert_close(mam.float().log_prob(rows, context), found.float(), rtol=1e-4, atol=1e-4)


def test_it_learns_every_marginal_from_independent_variables() -> None:
    """Where one class is all that it starts from."""
    truth = BernoulliMixture(8)
    mam = MarginalizationModel([2] * 8, hidden=64, depth=2, marginal="causal", classes=1)
    settings: dict[str, Any] = {"num_steps": 350, "marginal_steps": 150, "lr": 4e-3, "batch_size": 256}
    mam.fit(truth.sample(4000), truth.sample(500), num_rows=2000, progress=False, **settings)
    rows = hide_some(truth.sample(2000))
    error = (mam.log_prob(rows) - truth.log_prob(rows)).abs().mean()
    alone = (mam.marginals.base(rows) - truth.log_prob(rows)).abs().mean()
    assert error < 0.1 and error < 0.4 * alone
    assert abs(float(mam.log_prob(all_values(mam.cardinalities)).double().exp().sum()) - 1) < 1e-5


def test_the_result_says_whether_one_pass_is_normalised() -> None:
    for marginal in ("causal", "trunk"):
        mam = MarginalizationModel([2, 2], hidden=8, depth=1, marginal=marginal)
        result = mam.fit(_rows(30)[:, :2] % 2, num_steps=2, num_rows=20, progress=False)
        assert result.check is not None and result.check.normalised == (marginal == "causal")
        assert ("not a likelihood" in result.summary()) == (marginal == "trunk")
        law = mam.marginals.causal
        assert law is None or law.small is not None, "sets of one and two variables are looked up"
        mam.fit_energy(lambda x: x.sum(1).float(), num_steps=2, batch_size=8, progress=False)
        assert not mam.marginals.normalised, "an energy's f is no law of subsets by structure"
