"""Hyperparameters of a Gaussian-process target from data: maximum marginal likelihood ("ML-II", empirical Bayes).

The paper's comparison to stating the target by hand: choose length scales, variance and noise by maximising ``log
N(y; 0, K + sn2 I)``, then tune the network's prior to that process (Tran et al., JMLR 23(74), 2022; Rasmussen and
Williams, Gaussian Processes for Machine Learning, 2006, section 5.4.1).  The process and its likelihood are
gpytorch's, the optimisation is ``inference.fit``'s.
"""

import copy
from collections.abc import Iterable
from typing import NamedTuple

import gpytorch
import torch
from linear_operator.utils.errors import NanError, NotPSDError
from torch import Tensor, nn

from inference._errors import NonFiniteError
from inference.fit import fit
from inference.runtime.generators import generator

__all__ = ["GPHyperparameters", "fit_gp_hyperparameters"]

_ITERATIONS = 20  # L-BFGS iterations in one step of the loop


class GPHyperparameters(NamedTuple):
    """What was learned.

    Attributes:
        kernel: a copy of the kernel with the best values, float64, without priors: ready for ``gp_target``.
        noise: variance sn2 of the observation noise, scalar.
        log_marginal_likelihood: of each restart, ``(num_restarts,)``, ``-inf`` where it failed (with priors, plus
            their log density).
    """

    kernel: gpytorch.kernels.Kernel
    noise: Tensor
    log_marginal_likelihood: Tensor


class _MarginalLikelihood(nn.Module):
    """``-log p(y | x) / N`` as an objective of the kernel's parameters and the noise."""

    def __init__(self, kernel: gpytorch.kernels.Kernel, noise: float, x: Tensor, y: Tensor) -> None:
        super().__init__()
        likelihood = gpytorch.likelihoods.GaussianLikelihood()
        likelihood.noise = noise
        model = gpytorch.models.ExactGP(x, y, likelihood)
        model.mean_module = gpytorch.means.ZeroMean()
        model.covar_module = copy.deepcopy(kernel)
        self.mll = gpytorch.mlls.ExactMarginalLogLikelihood(likelihood, model).to(x)

    def forward(self) -> Tensor:
        model = self.mll.model
        (x,), y = model.train_inputs, model.train_targets
        # Above 800 points gpytorch would turn to stochastic estimates, which a line search cannot use.
        with gpytorch.settings.max_cholesky_size(len(y) + 1):
            output = gpytorch.distributions.MultivariateNormal(model.mean_module(x), model.covar_module(x))
            return -self.mll(output, y)


def fit_gp_hyperparameters(
    kernel: gpytorch.kernels.Kernel,
    x: Tensor,
    y: Tensor,
    *,
    noise: float = 0.1,
    num_restarts: int = 4,
    num_steps: int = 10,
    seed: int = 0,
) -> GPHyperparameters:
    """Maximise the exact marginal likelihood over the kernel's parameters and the noise, by L-BFGS from several starts.

    Costs O(N^3) an evaluation.  Priors registered on the kernel enter as in maximum a posteriori estimation.

    Args:
        kernel: any gpytorch kernel of batch shape ``()``; its values are the first start and it is left as it is.
        x: training inputs, ``(N, D)``.
        y: training targets, ``(N,)``, standardised: the process has mean zero.
        noise: first guess of the noise variance.
        num_restarts: number of starts; those after the first are the given values plus N(0, 1) in the raw parameters.
        num_steps: steps of up to 20 L-BFGS iterations each.
        seed: of the starts.

    Raises:
        TypeError: ``kernel`` is no gpytorch kernel.
        ValueError: shapes disagree, data are not finite, or a count is below 1.
        NonFiniteError: every start failed.
    """
    if not isinstance(kernel, gpytorch.kernels.Kernel):
        raise TypeError(f"kernel must be a gpytorch kernel, got {type(kernel).__name__}")
    if kernel.batch_shape:
        raise ValueError(f"kernel must have batch shape (), got {tuple(kernel.batch_shape)}: fit one output at a time")
    if x.ndim != 2 or y.shape != x.shape[:1] or len(y) < 2:
        raise ValueError(f"x must be (N, D) and y (N,) with N >= 2, got shapes {tuple(x.shape)} and {tuple(y.shape)}")
    if not (bool(torch.isfinite(x).all()) and bool(torch.isfinite(y).all())):
        raise ValueError("x and y must be finite, they hold NaN or infinite values")
    for name, count in (("num_restarts", num_restarts), ("num_steps", num_steps)):
        if count < 1:
            raise ValueError(f"{name} must be at least 1, got {count}")
    if not noise > 0:
        raise ValueError(f"noise must be positive, got {noise}")

    rng = generator(seed, "restarts")
    found: list[_MarginalLikelihood] = []
    values: list[float] = []
    for restart in range(num_restarts):
        objective = _MarginalLikelihood(kernel, noise, x.detach().double(), y.detach().double())
        if restart:
            with torch.no_grad():
                for parameter in objective.parameters():
                    parameter.add_(torch.randn(parameter.shape, generator=rng, dtype=torch.float64).to(x.device))
        try:
            fit(objective, num_steps=num_steps, optimizer=_lbfgs, progress=False)
            with torch.no_grad():
                value = -float(objective()) * len(y)
        except (NonFiniteError, NanError, NotPSDError):
            value = float("-inf")
        found.append(objective)
        values.append(value)
    best = found[max(range(num_restarts), key=values.__getitem__)]
    if max(values) == float("-inf"):
        raise NonFiniteError(f"the marginal likelihood could not be maximised from any of the {num_restarts} starts")
    fitted = best.mll.model.covar_module.requires_grad_(False)
    for module in fitted.modules():
        if isinstance(module, gpytorch.Module):
            for name in list(module._priors):  # a target must use the fitted values, not draw them anew
                delattr(module, name)
            module._priors.clear()
    return GPHyperparameters(fitted, best.mll.likelihood.noise.detach().squeeze(), torch.tensor(values))


def _lbfgs(parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.LBFGS(parameters, max_iter=_ITERATIONS, line_search_fn="strong_wolfe")
