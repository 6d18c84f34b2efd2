"""What one would use today on a small regression table: Bayesian ridge, an exact Gaussian process, a deep ensemble.

Each takes a split and returns the mean and the standard deviation of y at its test inputs, in the data's units;
``quick`` takes fewer steps.
"""

import math
from collections.abc import Callable

import gpytorch
import torch
from torch import Tensor, nn

from benchmarks.data import Split
from inference import fit
from inference.runtime.generators import generator, scoped_seed
from ppl_models.functional_prior_bnn.empirical_bayes import fit_gp_hyperparameters

__all__ = ["BASELINES", "gaussian_scores"]

Moments = tuple[Tensor, Tensor]


def ridge(data: Split, quick: bool = False) -> Moments:
    """scikit-learn's Bayesian ridge regression."""
    from sklearn.linear_model import BayesianRidge

    standard = data.standardised()
    model = BayesianRidge().fit(standard.x_train.numpy(), standard.y_train.numpy())
    mean, sd = (torch.from_numpy(part).float() for part in model.predict(standard.x_test.numpy(), return_std=True))
    return _in_units(data, mean, sd)


def gaussian_process(data: Split, quick: bool = False) -> Moments:
    """gpytorch's exact process with an RBF kernel; length scales, variance and noise by marginal likelihood."""
    standard = data.standardised()
    x, y, x_test = (part.double() for part in (standard.x_train, standard.y_train, standard.x_test))
    kernel = gpytorch.kernels.ScaleKernel(gpytorch.kernels.RBFKernel(ard_num_dims=x.shape[1]))
    learned = fit_gp_hyperparameters(kernel, x, y, num_restarts=1 if quick else 4)
    with torch.no_grad():
        prior = learned.kernel(x).add_jitter(float(learned.noise)).to_dense()
        cross = learned.kernel(x, x_test).to_dense()
        factor = torch.linalg.cholesky(prior)
        mean = cross.T @ torch.cholesky_solve(y[:, None], factor)[:, 0]
        explained = torch.linalg.solve_triangular(factor, cross, upper=False).square().sum(0)
        variance = learned.kernel(x_test, diag=True) - explained + learned.noise
    return _in_units(data, mean.float(), variance.sqrt().float())


class _GaussianHead(nn.Module):
    """Negative log-likelihood of a network with two outputs, the mean and the log-variance of y."""

    def __init__(self, features: int, width: int = 100) -> None:
        super().__init__()
        self.network = nn.Sequential(nn.Linear(features, width), nn.Tanh(), nn.Linear(width, 2))

    def moments(self, x: Tensor) -> Moments:
        mean, log_variance = self.network(x).unbind(-1)
        return mean, log_variance.exp()

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        mean, variance = self.moments(x)
        return 0.5 * (variance.log() + (y - mean).square() / variance).mean()


def deep_ensemble(data: Split, quick: bool = False) -> Moments:
    """Lakshminarayanan et al. (2017): networks of the same width, stopped early on a tenth of the training data."""
    standard = data.standardised()
    means, variances = [], []
    for seed in range(2 if quick else 5):
        order = torch.randperm(len(standard.y_train), generator=generator(seed, "held out"))
        held, kept = order[: len(order) // 10], order[len(order) // 10 :]
        with scoped_seed(seed):
            network = _GaussianHead(standard.x_train.shape[1])
        fit(
            network,
            (standard.x_train[kept], standard.y_train[kept]),
            validation=(standard.x_train[held], standard.y_train[held]),
            num_steps=200 if quick else 4000,
            batch_size=32,
            optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=3e-3, weight_decay=1e-2),
            patience=10,
            seed=seed,
            progress=False,
        )
        with torch.no_grad():
            mean, variance = network.moments(standard.x_test)
        means.append(mean)
        variances.append(variance)
    mean = torch.stack(means).mean(0)
    variance = (torch.stack(variances) + torch.stack(means).square()).mean(0) - mean.square()
    return _in_units(data, mean, variance.sqrt())


def _in_units(data: Split, mean: Tensor, sd: Tensor) -> Moments:
    scale = data.y_train.std(correction=0)
    return mean * scale + data.y_train.mean(), sd * scale


BASELINES: dict[str, Callable[[Split, bool], Moments]] = {
    "Bayesian ridge (scikit-learn)": ridge,
    "exact GP, ML-II (gpytorch)": gaussian_process,
    "deep ensemble of 5": deep_ensemble,
}


def gaussian_scores(mean: Tensor, sd: Tensor, y: Tensor) -> dict[str, float]:
    """RMSE, mean negative log density, and share of y inside the central 90 % interval of N(mean, sd^2)."""
    error = (y - mean) / sd
    inside = error.abs() < math.sqrt(2) * torch.erfinv(torch.tensor(0.9))
    return {
        "RMSE": float((y - mean).square().mean().sqrt()),
        "NLL": float((0.5 * error.square() + sd.log()).mean()) + 0.5 * math.log(2 * math.pi),
        "90% coverage": float(inside.float().mean()),
    }
