"""Energies of data with heavy tails, by automatic noise."""

import pyro.distributions as dist
import pytest
import torch

from inference.runtime.generators import scoped_seed
from ppl_models import EnergyModel
from ppl_models.compositional_ebm.noise import StudentTNoise

LAWS = {
    "logistic": dist.Logistic(0.0, 1.0),
    "laplace": dist.Laplace(0.0, 1.0),
    "lognormal": dist.LogNormal(0.0, 1.5),
    "spike": dist.MixtureSameFamily(
        dist.Categorical(torch.tensor([0.9, 0.1])), dist.Normal(torch.tensor([0.0, 5.0]), torch.tensor([0.2, 3.0]))
    ),
}


@pytest.mark.parametrize("name", LAWS)
def test_energies_of_data_with_heavy_tails(name: str) -> None:
    """With normal noise the log-normal ended 8 nats low or worse, and the others in the collapse error."""
    with scoped_seed(0):
        x, held_out = (LAWS[name].sample((num,))[:, None] for num in (3000, 5000))
    ebm = EnergyModel(event_shape=(1,))
    ebm.fit(1000 * x, num_steps=600, progress=False)
    found = ebm.log_prob(1000 * held_out) + torch.tensor(1000.0).log()
    truth = LAWS[name].log_prob(held_out.squeeze(1))
    assert isinstance(ebm.noise, StudentTNoise)
    assert -0.05 < float((found - truth).mean()) < 0.01


def test_a_file_keeps_what_was_squashed(tmp_path) -> None:
    with scoped_seed(0):
        x = LAWS["laplace"].sample((300, 1))
    ebm = EnergyModel(event_shape=(1,))
    ebm.fit(x, num_steps=20, progress=False)
    ebm.save(tmp_path / "energy")
    assert torch.equal(EnergyModel.load(tmp_path / "energy").log_prob(x), ebm.log_prob(x))
