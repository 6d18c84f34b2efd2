"""Effects of yes or no and of counts, whose size depends on the outcome without treatment."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from ppl_models import ImageCATE
from ppl_models.image_cate.estimation import image_groups


def trial(outcome: str, shares: tuple[float, float], count: int = 1500) -> tuple[Tensor, ...]:
    """Two types, told by the first of four pixels: outcome, treatment, images, propensity, type, true effects (2,)."""
    noise = torch.Generator().manual_seed(0)
    kind = torch.randint(2, (count,), generator=noise)
    images = torch.randn(count, 4, generator=noise, dtype=torch.float64)
    images[:, 0] += 8 * kind
    share = torch.tensor(shares, dtype=torch.float64)[kind]
    treated = torch.bernoulli(share, generator=noise)
    gain = torch.tensor([3.0, 0.5] if outcome == "bernoulli" else [1.5, 0.2], dtype=torch.float64)
    low = torch.full_like(gain, -2.0 if outcome == "bernoulli" else 0.0)
    mean = torch.sigmoid if outcome == "bernoulli" else torch.exp
    draw = torch.bernoulli if outcome == "bernoulli" else torch.poisson
    y = draw(mean(low[kind] + treated * gain[kind]), generator=noise)
    return y, treated, images, share, kind, mean(low + gain) - mean(low)


@pytest.mark.parametrize("outcome", ["bernoulli", "poisson"])
def test_effects_where_the_propensity_depends_on_the_image(outcome: str, tmp_path: Path) -> None:
    """The baseline has a unit's own share of the effect in it; taking off the mean share halved the difference."""
    y, treated, images, share, kind, truth = trial(outcome, (0.15, 0.85))
    model = ImageCATE(2, outcome=outcome, backbone="fixed", num_folds=2, num_samples=50)
    model.fit(y, treated, images, propensity=share, progress=False)
    arms = [[y[(kind == k) & (treated == t)] for t in (0, 1)] for k in (0, 1)]
    plain = torch.stack([one.mean() - zero.mean() for zero, one in arms])
    error = torch.stack([(one.var() / len(one) + zero.var() / len(zero)).sqrt() for zero, one in arms])
    found = torch.stack([model.effect(images)[kind == k].mean() for k in (0, 1)])
    assert ((found - plain).abs() < 1.5 * error).all() and ((found - truth).abs() < 4 * error).all()
    of_types = model.cluster_effects().effect
    assert ((of_types - plain.sort().values).abs() < 1.5 * error[plain.argsort()]).all()
    model.save(tmp_path / "model")
    again = ImageCATE.load(tmp_path / "model")
    assert torch.equal(again.effect(images[:20]), model.effect(images[:20]))
    assert torch.equal(again.cluster_effects().effect, of_types)


@pytest.mark.parametrize(("outcome", "types"), [("normal", 2), ("bernoulli", 1), ("bernoulli", 2), ("poisson", 2)])
def test_salience_is_the_derivative_of_the_effect(outcome: str, types: int) -> None:
    y, treated, images, share, *_ = trial("poisson" if outcome == "normal" else outcome, (0.3, 0.6), 400)
    model = ImageCATE(types, outcome=outcome, backbone="fixed", num_folds=2, num_samples=20)
    model.fit(y, treated, images, propensity=share, progress=False)
    some, step = images[:30], 1e-4
    moved = step * torch.eye(4, dtype=torch.float64)
    slopes = torch.stack([(model.effect(some + d) - model.effect(some - d)) / (2 * step) for d in moved], 1)
    torch.testing.assert_close(model.salience(some), slopes, rtol=1e-4, atol=1e-6)
    assert outcome == "normal" or slopes.abs().max() > 0.01


def test_groups_that_share_an_image_are_one() -> None:
    """One picture in two groups used to make every picture a group of its own, so that folds cut through groups."""
    images = torch.randn(40, 3, generator=torch.Generator().manual_seed(1))
    images[8] = images[0]  # in groups 0 and 2
    group = torch.arange(40) // 4
    treated = (torch.arange(40) % 2).float()
    y = torch.randn(40, generator=torch.Generator().manual_seed(2)) + treated
    model = ImageCATE(1, backbone="fixed", num_folds=5, num_samples=5)
    with pytest.warns(UserWarning, match="10 groups share images, so that 9"):
        model.fit(y, treated, images, groups=group, progress=False)
    state = model._fitted("test")
    of_image = image_groups(state.trial)[state.trial.image_index]
    expected = torch.where(group == 2, 0, group)
    assert torch.equal(of_image.unsqueeze(0) == of_image.unsqueeze(1), expected.unsqueeze(0) == expected.unsqueeze(1))
    fold = state.folds[state.trial.image_index]
    assert all(len(fold[expected == g].unique()) == 1 for g in expected.unique())


def test_a_propensity_that_is_nearly_certain_is_said() -> None:
    y, treated, images, share, *_ = trial("bernoulli", (0.3, 0.6), 200)
    share[:3] = torch.where(treated[:3] > 0, 1 - 1e-4, 1e-4)
    model = ImageCATE(1, outcome="bernoulli", backbone="fixed", num_folds=2, num_samples=5)
    with pytest.warns(UserWarning, match="3 units have a propensity nearer to 0 or 1"):
        model.fit(y, treated, images, propensity=share, progress=False)
