"""Empirical Bayes on the network's side: tune a Gaussian prior's scales by the Laplace estimate of the evidence.

The comparison to matching a prior to functions (MacKay, A practical Bayesian framework for backpropagation networks,
1992; Immer et al., ICML 2021).  At a mode w* of ``log p(y | w) + log p(w | s)``, with J the Jacobian of f in w, Lambda
= B B^T the Hessian of ``-log p(y | f)`` and S the prior's standard deviations, the generalised Gauss-Newton Hessian
gives

    log p(y | s) ~ log p(y | w*) - |w* / s|^2 / 2 - logdet(I + A S^2 A^T) / 2,    A = B^T J,

exact for a linear model with Gaussian noise.  Training for the mode and steps on s alternate.
"""

import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from inference.fit import fit
from ppl_models.base import check_count
from ppl_models.functional_prior_bnn.point_estimate import NegativeLogPosterior
from ppl_models.functional_prior_bnn.priors import GaussianPrior

if TYPE_CHECKING:
    from ppl_models.functional_prior_bnn.model import FunctionalPriorBNN

__all__ = ["LaplaceEvidence", "tune_prior_by_evidence"]

_LARGEST_FACTOR = 6000  # rows of the matrix that is factorised at every step; 288 MiB in float64


class LaplaceEvidence(nn.Module):
    """Negative log evidence by data point as a function of the prior's scales, at given weights.

    Args:
        bnn: a model with a Gaussian prior and a fixed noise variance, or a classifier.
        weights: the mode, name to ``shape``.
        x: standardised inputs ``(N, D)``.
        y: standardised targets.

    Raises:
        ValueError: another prior, a likelihood without a Gauss-Newton Hessian, or a problem too large to factorise.
    """

    def __init__(self, bnn: "FunctionalPriorBNN", weights: Mapping[str, Tensor], x: Tensor, y: Tensor) -> None:
        super().__init__()
        if (
            not isinstance(bnn.prior, GaussianPrior)
            or bnn.prior.relevance is not None
            or bnn.noise_variance == "learned"
            or bnn.likelihood.name == "laplace"
        ):
            raise ValueError(
                "the Laplace evidence needs prior='gaussian' without relevances and a gaussian (with a fixed noise "
                "variance), bernoulli or categorical likelihood"
            )
        self.prior = bnn.prior
        self._num_rows = len(x)
        self._names = list(bnn.network.shapes)
        shapes = bnn.network.shapes
        dim, outputs = sum(math.prod(s) for s in shapes.values()), len(x) * bnn.network.out_features
        if min(dim, outputs) > _LARGEST_FACTOR:
            raise ValueError(
                f"{dim} weights and {outputs} outputs are too many to factorise: at most {_LARGEST_FACTOR} of one of "
                "them"
            )
        with torch.no_grad():
            values = {n: weights[n].detach() for n in self._names}
            f = bnn.network(values, x)
            noise = bnn._noise()
            self._log_likelihood = bnn.likelihood.distribution(f, noise).log_prob(y).sum().double()
            jacobian = torch.func.jacrev(lambda w: bnn.network(w, x))(values)
            root = _hessian_root(bnn.likelihood.name, f, noise)
            columns = [torch.einsum("nkj,nkd->njd", root, jacobian[n].flatten(2)) for n in self._names]
            factor = torch.cat(columns, -1).flatten(0, 1).double()  # A, (N K, dim)
            self._weights = torch.cat([values[n].reshape(-1) for n in self._names]).double()
        self._by_weights = dim <= outputs
        self._matrix = factor.T @ factor if self._by_weights else factor

    def forward(self) -> Tensor:
        """Scalar loss."""
        shapes = self.prior.shapes
        scale = torch.cat([self.prior.scale(n).expand(shapes[n]).reshape(-1) for n in self._names]).double()
        inner = (
            self._matrix * scale.unsqueeze(1) * scale
            if self._by_weights
            else (self._matrix * scale.square()) @ self._matrix.T
        )
        cholesky = torch.linalg.cholesky(inner + torch.eye(len(inner), dtype=inner.dtype, device=inner.device))
        half_log_det = cholesky.diagonal().log().sum()
        evidence = self._log_likelihood - 0.5 * (self._weights / scale).square().sum() - half_log_det
        return -evidence / self._num_rows


def _hessian_root(likelihood: str, f: Tensor, noise: Tensor | None) -> Tensor:
    """B with ``B B^T`` the Hessian of ``-log p(y | f)`` in f, ``(N, K, K)``."""
    if likelihood == "gaussian":
        assert noise is not None
        return torch.diag_embed(noise.rsqrt().expand_as(f))
    if likelihood == "bernoulli":
        p = torch.sigmoid(f)
        return torch.diag_embed((p * (1 - p)).sqrt())
    p = torch.softmax(f, -1)
    return torch.diag_embed(p.sqrt()) - p.unsqueeze(-1) * p.sqrt().unsqueeze(-2)


def tune_prior_by_evidence(
    bnn: "FunctionalPriorBNN",
    x_train: Any,
    y_train: Any,
    *,
    num_rounds: int = 10,
    mode_steps: int = 20,
    evidence_steps: int = 20,
    lr: float = 0.05,
    seed: int = 0,
    progress: bool | Callable[[dict[str, Any]], None] = False,
) -> Tensor:
    """Alternate training for the mode with steps on the prior's scales; changes ``bnn.prior``, whose former fit is
    dropped.

    The mode is found by L-BFGS on all the data and carried from round to round: the evidence of weights that are no
    mode grows with the scales without end.

    Args:
        bnn: a model with a Gaussian prior.
        x_train, y_train: as in ``FunctionalPriorBNN.fit``.
        num_rounds: alternations.
        mode_steps: steps of L-BFGS, of 20 iterations each, in every round.
        evidence_steps: steps on the scales in every round.
        lr: learning rate of the scales' logarithms.
        seed: of the first start.
        progress: progress bars.

    Returns:
        Log evidence by data point at the end of each round, in standardised units, ``(num_rounds,)``.

    Raises:
        TypeError, ValueError: as in ``fit`` and ``LaplaceEvidence``.
    """
    check_count("num_rounds", num_rounds)
    x, y = bnn.training_data(x_train, y_train)
    history, weights = [], None
    for _ in range(num_rounds):
        weights = _mode(bnn, x, y, weights, mode_steps, seed, progress)
        objective = LaplaceEvidence(bnn, weights, x, y)
        with bnn.prior.tuning():
            fit(objective, num_steps=evidence_steps, lr=lr, seed=seed, progress=progress)
        with torch.no_grad():
            history.append(-objective())
    bnn.result = None
    return torch.stack(history)


def _mode(
    bnn: "FunctionalPriorBNN",
    x: Tensor,
    y: Tensor,
    weights: Mapping[str, Tensor] | None,
    num_steps: int,
    seed: int,
    progress: bool | Callable[[dict[str, Any]], None],
) -> dict[str, Tensor]:
    """Weights of highest posterior density, from ``weights`` or from a draw of the prior."""
    objective = NegativeLogPosterior(bnn, x, y, 1, None, seed)
    prior = bnn.prior
    if weights is not None and isinstance(prior, GaussianPrior):
        # In the sites of the present scales: these have moved under the same weights.
        sites = {f"eps_{n}": w / prior.scale(n) for n, w in weights.items()} if prior.noncentred else dict(weights)
        objective.place({n: v.unsqueeze(0) for n, v in sites.items()})
    fit(
        objective,
        num_steps=num_steps,
        optimizer=lambda parameters: torch.optim.LBFGS(parameters, line_search_fn="strong_wolfe"),
        seed=seed,
        progress=progress,
    )
    drawn = prior.draw(1, {n: v[:, 0] for n, v in objective.samples().items()})
    return {n: w[0].detach() for n, w in drawn.items()}
