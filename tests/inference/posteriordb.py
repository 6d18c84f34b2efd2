"""Reference posteriors: models, data and published draws of posteriordb, for tests of every sampler.

The models are Pyro's wording of the Stan programs of the same names in posteriordb (github.com/stan-dev/posteriordb;
Magnusson, Torgander, Bürkner, Zhang, Carpenter and Vehtari, "posteriordb: Testing, benchmarking and developing
Bayesian inference algorithms", AISTATS 2025), with the same priors.  The reference draws are ten chains of 1,000 draws
of Stan, thinned until nearly independent.
"""

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.distributions import constraints
from torch import Tensor

from inference.results.diagnostics import mcse_mean, mcse_sd

F64 = torch.float64
Draws = dict[str, Tensor]


def eight_schools_noncentered(y: Tensor, sigma: Tensor) -> None:
    """Effects of coaching in eight schools; the site is the standardised effect, theta = mu + tau theta_trans."""
    mu = pyro.sample("mu", dist.Normal(y.new_zeros(()), 5.0))
    tau = pyro.sample("tau", dist.HalfCauchy(y.new_full((), 5.0)))
    with pyro.plate("school", len(y)):
        theta_trans = pyro.sample("theta_trans", dist.Normal(y.new_zeros(()), 1.0))
        pyro.sample("y", dist.Normal(mu + tau * theta_trans, sigma), obs=y)


def ar_k(lags: Tensor, y: Tensor) -> None:
    """Autoregression of order K given the first K values; ``lags`` is ``(T - K, K)``, the latest value first."""
    alpha = pyro.sample("alpha", dist.Normal(y.new_zeros(()), 10.0))
    beta = pyro.sample("beta", dist.Normal(y.new_zeros(lags.shape[-1]), 10.0).to_event(1))
    sigma = pyro.sample("sigma", dist.HalfCauchy(y.new_full((), 2.5)))
    with pyro.plate("t", len(y)):
        pyro.sample("y", dist.Normal(alpha + lags @ beta, sigma), obs=y)


def blr(x: Tensor, y: Tensor) -> None:
    """Linear regression without intercept; ``x`` is ``(N, D)``."""
    beta = pyro.sample("beta", dist.Normal(y.new_zeros(x.shape[-1]), 10.0).to_event(1))
    sigma = pyro.sample("sigma", dist.HalfNormal(y.new_full((), 10.0)))
    with pyro.plate("n", len(y)):
        pyro.sample("y", dist.Normal(x @ beta, sigma), obs=y)


def kidscore_momiq(mom_iq: Tensor, kid_score: Tensor) -> None:
    """Linear regression with a flat prior on intercept and slope, which are strongly correlated."""
    beta = pyro.sample("beta", dist.ImproperUniform(constraints.real_vector, (), (2,)))
    sigma = pyro.sample("sigma", dist.HalfCauchy(kid_score.new_full((), 2.5)))
    with pyro.plate("n", len(kid_score)):
        pyro.sample("kid_score", dist.Normal(beta[0] + beta[1] * mom_iq, sigma), obs=kid_score)


def _ar_k_args(data: dict[str, Any]) -> tuple[Tensor, ...]:
    y, k = _tensor(data["y"]), data["K"]
    return y.unfold(0, k, 1)[:-1].flip(1), y[k:]


_POSTERIORS: dict[str, tuple[str, Callable[..., None], Callable[[dict[str, Any]], tuple[Tensor, ...]]]] = {
    "eight_schools_noncentered": (
        "eight_schools-eight_schools_noncentered",
        eight_schools_noncentered,
        lambda d: (_tensor(d["y"]), _tensor(d["sigma"])),
    ),
    "arK": ("arK-arK", ar_k, _ar_k_args),
    "blr": ("sblrc-blr", blr, lambda d: (_tensor(d["X"]), _tensor(d["y"]))),
    "kidscore_momiq": (
        "kidiq-kidscore_momiq",
        kidscore_momiq,
        lambda d: (_tensor(d["mom_iq"]), _tensor(d["kid_score"])),
    ),
}
NAMES = tuple(_POSTERIORS)


def _tensor(values: Any) -> Tensor:
    return torch.tensor(values, dtype=F64)


def load(name: str) -> tuple[Callable[..., None], tuple[Tensor, ...], Draws]:
    """The Pyro model, its arguments (float64) and the reference draws ``{scalar: (10, 1000)}`` of one of ``NAMES``.

    Skips the calling test, with the reason, where the files are absent.
    """
    root = Path(__file__).resolve().parents[2]
    folder = Path(os.environ.get("PPL_MODELS_DATA", root.parent / "shared" / "data")) / "posteriordb"
    if not folder.is_dir():
        pytest.skip(f"no reference posteriors at {folder}; set PPL_MODELS_DATA to the folder that holds posteriordb")
    stem, model, arguments = _POSTERIORS[name]
    with np.load(folder / f"{stem}.npz", allow_pickle=False) as draws:
        reference = {scalar: _tensor(draws[scalar]) for scalar in draws.files}
    return model, arguments(json.loads((folder / f"{stem}.data.json").read_text())), reference


def flatten(samples: Mapping[str, Tensor]) -> Draws:
    """Draws by site, ``(chain, draw, ...)``, as draws by scalar, ``(chain, draw)``, under the reference's names."""
    sites = dict(samples)
    if "theta_trans" in sites:
        sites["theta"] = sites["mu"].unsqueeze(-1) + sites["tau"].unsqueeze(-1) * sites.pop("theta_trans")
    scalars: Draws = {}
    for name, value in sites.items():
        if value.dim() == 2:
            scalars[name] = value
        else:
            scalars |= {f"{name}[{i + 1}]": column for i, column in enumerate(value.flatten(2).unbind(2))}
    return scalars


def standard_errors_off(samples: Mapping[str, Tensor], reference: Mapping[str, Tensor]) -> dict[str, float]:
    """How far mean and sd of every scalar are from the reference, in Monte Carlo standard errors of the difference.

    Args:
        samples: draws by site, ``(chain, draw, ...)``, as ``get_samples(group_by_chain=True)`` gives them.
        reference: draws by scalar, ``(chain, draw)``.

    Returns:
        ``{"mean mu": z, "sd mu": z, ...}``, with z = |difference| / sqrt(MCSE^2 + MCSE of the reference^2).
    """
    draws = flatten(samples)
    assert draws.keys() == reference.keys(), (sorted(draws), sorted(reference))
    off: dict[str, float] = {}
    for name, truth in reference.items():
        ours = draws[name].to(F64)
        for what, value, error in (
            ("mean", lambda x: x.mean(), mcse_mean),
            ("sd", lambda x: x.std(), mcse_sd),
        ):
            scale = (error(ours).square() + error(truth).square()).sqrt()
            off[f"{what} {name}"] = float((value(ours) - value(truth)).abs() / scale)
    return off


def assert_agrees(samples: Mapping[str, Tensor], reference: Mapping[str, Tensor], *, k: float = 4.0) -> None:
    """Fail unless every mean and every sd is within ``k`` Monte Carlo standard errors of the reference's."""
    # not (z <= k): a NaN, as chains that never moved give, is no agreement
    wrong = {what: round(z, 2) for what, z in standard_errors_off(samples, reference).items() if not z <= k}
    assert not wrong, f"off by more than {k} Monte Carlo standard errors: {wrong}"
