"""Longer runs of marginalization models: mixtures, lattices and real tables, with their bounds."""

import time
from importlib.util import find_spec
from typing import Any

import pytest
import torch

from benchmarks.marginalization_model import enumerate_states, heat_bath, missing_scores, moses, string_bits, text
from inference.objectives.reverse_kl import AutoregressiveKL
from inference.runtime.generators import scoped_seed
from ppl_models import MarginalizationModel
from ppl_models.datasets import load_binary, load_digits
from ppl_models.marginalization_model import LatticeIsing
from ppl_models.marginalization_model.distribution import all_values
from ppl_models.marginalization_model.results import Evaluation
from tests.ppl_models.marginalization_cases import BernoulliMixture, hide_some

pytestmark = pytest.mark.slow


def told(**figures: float) -> dict[str, float]:
    """Print figures, which the record of the test keeps, and give them back."""
    print(", ".join(f"{name} {value:.4g}" for name, value in figures.items()))
    return figures


def told_of_pass(found: Evaluation) -> Evaluation:
    """The same for one pass against five orders."""
    told(one_order=found.one_order, five_orders=found.ensemble, one_pass=found.one_pass)
    told(bias=found.bias, mae=found.mae, pearson=found.pearson)
    return found


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_every_marginal_of_a_mixture(seed: int) -> None:
    """S1 and S4; a million rows stand for two million fresh ones.

    100,000 do not tell the law to S1's bound: of seed 2 the conditionals were then 0.077 off, and f 0.068.
    """
    mixture = BernoulliMixture(10, seed)
    mam = MarginalizationModel([2] * 10, hidden=128, depth=3)
    mam.fit(mixture.sample(1_000_000), num_steps=4000, marginal_steps=6000, num_rows=30_000, seed=seed, progress=False)
    rows = hide_some(mixture.sample(4000), seed)
    error = mam.log_prob(rows) - mixture.log_prob(rows)
    off = told(mae=float(error.abs().mean()), rms=float(error.square().mean().sqrt()))
    assert off["mae"] <= 0.05 and off["rms"] <= 0.10
    states = all_values(torch.full((10,), 2))
    p = mixture.log_prob(states).exp()
    variation = float((mam.log_prob(states).exp() - p).abs().sum()) / 2
    worst = 0.0
    for i in range(10):
        for j in range(i, 10):
            query = torch.full((1, 10), -1)
            query[0, [i, j]] = 1
            worst = max(worst, abs(float(mam.log_prob(query).exp() - p[(states[:, [i, j]] == 1).all(1)].sum())))
    told(total_variation=variation, worst_marginal=worst)
    assert variation <= 0.06 and worst <= 0.02
    violation = mam.consistency_report(rows[:1000]).sum_rule
    off_by = float(violation[~violation.isnan()].abs().median())
    few = mixture.sample(100)[:, :2]
    completions = torch.cat([few.repeat_interleave(256, 0), all_values(torch.full((8,), 2)).repeat(100, 1)], 1)
    summed = mam.log_prob(completions).view(100, 256).logsumexp(1)
    one_pass = mam.log_prob(torch.cat([few, torch.full((100, 8), -1)], 1))
    apart = float((summed - one_pass).abs().median())
    told(sum_rule=off_by, eight_summed_out=apart)
    assert off_by <= 0.05 and apart <= 0.15


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_a_four_by_four_lattice(seed: int) -> None:
    """S2 for the default objective; complete states are exact by structure, so the chain rule is held to the bound."""
    lattice = LatticeIsing(width=4, coupling=0.1, field=0.2)
    mam = MarginalizationModel([2] * 16, hidden=256, depth=3)
    mam.fit_energy(lattice.log_density, num_steps=3000, seed=seed, progress=False)
    states = all_values(torch.full((16,), 2))
    log_z = lattice.log_partition()
    along = mam.distribution(order=range(16)).log_prob(states).detach().double()
    singles = mam.log_prob(torch.where(torch.eye(16, dtype=torch.bool), 1, -1)).exp()
    found = told(
        kl=float((along.exp() * (along - lattice.log_density(states).double() + log_z)).sum()),
        log_z_of_f=mam.log_partition("network").value - log_z,
        log_z_by_importance=mam.log_partition().value - log_z,
        worst_marginal=float((singles - (1 + lattice.mean_spin()) / 2).abs().max()),
    )
    assert found["kl"] <= 0.05 and found["worst_marginal"] <= 0.02
    assert abs(found["log_z_of_f"]) <= 0.05 and abs(found["log_z_by_importance"]) <= 0.03


@pytest.mark.parametrize("objective", ["kl", "consistency"])
def test_a_lattice_without_its_structure(objective: str) -> None:
    """S2 as the paper has it: f knows nothing of the energy's terms."""
    lattice = LatticeIsing(width=4, coupling=0.1, field=0.2)
    mam = MarginalizationModel([2] * 16, hidden=256, depth=3)
    mam.fit_energy(lattice.log_density, objective, num_steps=3000, structure=False, progress=False)
    states = all_values(torch.full((16,), 2))
    log_p = lattice.log_density(states).double() - lattice.log_partition()
    q = mam.log_prob(states).double().log_softmax(0)
    found = told(kl=float((q.exp() * (q - log_p)).sum()))
    assert found["kl"] <= (0.05 if objective == "kl" else 0.02)


def test_thirty_by_thirty_spins_by_a_network_that_saw_ten_by_ten() -> None:
    """The issue's bound is 15 nats of forward KL (the paper: about 32); 0.2 was measured."""
    small = LatticeIsing(width=10, coupling=0.1, field=0.2)
    mam = MarginalizationModel([2] * 100, "lattice", hidden=16, depth=2, marginal="shared")
    mam.fit_energy(small.log_density, num_steps=600, batch_size=48, lr=6e-3, progress=False)
    lattice = LatticeIsing(width=30, coupling=0.1, field=0.2)
    large = mam.resized((30, 30), lattice.log_density)
    log_z = 3 * LatticeIsing(width=10, coupling=0.1, field=0.2, height=30).log_partition()
    draws = heat_bath(lattice, 24, 200, torch.device("cpu"), 0)
    log_q = large.log_prob_autoregressive(draws, orders=1).mean.double()
    found = told(
        forward_kl=float((lattice.log_density(draws).double() - log_z - log_q).mean()),
        log_z_of_f=large.log_partition("network").value - log_z,
    )
    assert found["forward_kl"] < 1.5 and abs(found["log_z_of_f"]) < 3


def test_the_noise_of_autoregressive_gradients() -> None:
    """S3: a random start, 100 spins, 128 rows, 25 batches."""
    lattice = LatticeIsing(width=10, coupling=0.1, field=0.2)
    mam = MarginalizationModel([2] * 100, hidden=128, depth=2)
    spread = []
    for monte_carlo in (False, True):
        arm = AutoregressiveKL(
            mam.conditionals, lattice.log_density, mam.cardinalities, batch_size=128, monte_carlo=monte_carlo
        )
        with scoped_seed(0):
            grads = [torch.autograd.grad(arm(), list(mam.conditionals.parameters())) for _ in range(25)]
        spread.append(float(torch.stack([torch.cat([g.flatten() for g in grad]) for grad in grads]).var(0).mean()))
    told(ratio=spread[1] / spread[0])
    assert spread[1] >= 100 * spread[0]


def test_digits() -> None:
    """R1."""
    import numpy as np

    x = (load_digits().x[torch.from_numpy(np.random.RandomState(0).permutation(1797))] >= 8).long()
    mam = MarginalizationModel([2] * 64, hidden=384, depth=3, dropout=0.2)
    mam.fit(x[:1297], x[1297:1497], num_steps=1500, marginal_steps=2500, refit_rows=30_000, progress=False)
    found = told_of_pass(mam.evaluate(x[1497:]))
    assert -found.one_order <= 17.6 and -found.ensemble <= 16.9
    assert found.pearson >= 0.94 and found.mae <= 1.2
    half = told_of_pass(mam.evaluate(hide_half(x[1497:])))
    assert half.pearson >= 0.955 and half.mae <= 0.7


def hide_half(x: torch.Tensor) -> torch.Tensor:
    g = torch.Generator().manual_seed(0)
    return x.masked_fill(torch.rand(x.shape, generator=g).argsort(1).argsort(1) < x.shape[1] // 2, -1)


def test_nltcs_by_default(data_dir: object) -> None:
    """R5, and what was asked of likelihood, mass and pairs at once."""
    table = load_binary("nltcs")
    mam = MarginalizationModel([2] * 16)
    mam.fit(table.train, table.valid, progress=False)
    found = told_of_pass(mam.evaluate(table.test))
    assert found.ensemble >= -5.99 and found.one_order >= -6.05
    assert found.pearson >= 0.99 and found.mae <= 0.15
    summed = told(**enumerate_states(mam))
    assert abs(summed["mass"] - 1) <= 0.02
    assert summed["worst_one_pass_two_steps"] <= 0.005


def by_default(name: str, network: dict[str, Any] | None = None, **settings: Any) -> Evaluation:
    """A table's test rows by a model and a fit without a setting of its own, but for those given."""
    table = load_binary(name)
    mam = MarginalizationModel([2] * table.train.shape[1], **(network or {}))
    begin = time.process_time()
    mam.fit(table.train, table.valid, progress=False, **settings)
    told(fit_processor_seconds=time.process_time() - begin)
    return told_of_pass(mam.evaluate(table.test[:1500]))


LARGER: dict[str, Any] = {"network": {"hidden": 384, "depth": 3}, "num_steps": 2000, "marginal_steps": 2500}


@pytest.mark.parametrize("settings", [pytest.param({}, id="default"), pytest.param(LARGER, id="larger")])
def test_plants(data_dir: object, settings: dict[str, Any]) -> None:
    """R5 and R6, by default settings and by a larger network with more updates of f."""
    found = by_default("plants", **settings)
    assert found.one_order >= -12.9 and found.ensemble >= -12.7
    assert found.pearson >= 0.985 and found.mae <= 0.9


def test_jester(data_dir: object) -> None:
    """Above a mixture of 100 (-52.98), by default settings; R5 has no bound for it."""
    found = by_default("jester")
    assert found.ensemble >= -52.0 and found.pearson >= 0.985


def test_digits_with_missing_pixels() -> None:
    """R4: 0.88 of the classes were right in the first run, and pixels scored -0.245 (mixture -0.255)."""
    found = told(**missing_scores(1000, 256, 3, 0.2, 0, torch.device("cpu")))
    assert found["accuracy"] >= 0.86
    assert found["pixel_log_score"] > found["pixel_log_score_of_latent_classes"]


def told_of_bits(*parts: torch.Tensor, steps: int) -> float:
    """Bits a symbol by five orders."""
    found = string_bits(*parts, (steps, 128, 4, 0.0), num_test=100, batch_size=64, lr=3e-3, progress=False)
    told(**{k: v for k, v in found.items() if k != "validation_bits"})
    return float(found["five_orders"])


def test_text() -> None:
    """R3: in minutes below 3.3 bits a character, which bigrams have."""
    assert told_of_bits(*text(), steps=1000) < 3.3


@pytest.mark.skipif(find_spec("moses") is None, reason="no MOSES strings: pip install --no-deps molsets==0.3.1")
def test_strings_of_molecules() -> None:
    """R2: at most 1.15 bits a symbol, below positional bigrams (1.26)."""
    assert told_of_bits(*moses(50_000), steps=1500) <= 1.15
