"""Ridge regressions for nuisance functions: linear with a cross-validated penalty, and logistic.

They are what is needed beside a model of images, and no more: a few columns, a few thousand units, no loop over
penalties.
"""

import torch
from torch import Tensor

__all__ = ["LogisticRidge", "Ridge"]

_PENALTIES = tuple(10.0 ** (k / 2) for k in range(-6, 11))  # per unit of mean squared standardised column


class _Standard:
    """Shift and scale of columns; a constant column becomes 0."""

    def __init__(self, x: Tensor) -> None:
        self.shift = x.mean(0)
        scale = (x - self.shift).square().mean(0).sqrt()
        flat = scale <= 1e-10 * (1 + self.shift.abs())
        self.inverse_scale = torch.where(flat, 0.0, 1 / torch.where(flat, 1.0, scale))

    def __call__(self, x: Tensor) -> Tensor:
        return (x - self.shift) * self.inverse_scale


class Ridge:
    """Linear ridge regression whose penalty has the least squared error over folds.

    Args:
        x: ``(N, P)``, float64.
        y: ``(N,)``.
        folds: fold of each unit ``(N,)``, int64, for the choice of the penalty; units that are alike share one.
    """

    def __init__(self, x: Tensor, y: Tensor, folds: Tensor) -> None:
        self._standard = _Standard(x)
        z = self._standard(x)
        self._mean = y.mean()
        penalties = torch.tensor(_PENALTIES, dtype=y.dtype, device=y.device)
        losses = torch.zeros_like(penalties)
        labels = folds.unique().tolist()
        for fold in labels if len(labels) > 1 else ():
            out = folds == fold
            path, mean = _ridge_path(z[~out], y[~out], penalties)
            losses += (y[out].unsqueeze(1) - mean - z[out] @ path).square().sum(0)
        best = penalties[int(losses.argmin()) if len(labels) > 1 else len(penalties) // 2]
        self._coefficients = _ridge_path(z, y, best.unsqueeze(0))[0][:, 0]

    def predict(self, x: Tensor) -> Tensor:
        """Predicted outcomes ``(M,)``."""
        return self._mean + self._standard(x) @ self._coefficients


class LogisticRidge:
    """Logistic regression with a squared penalty on standardised columns, by Newton's method.

    Args:
        x: ``(N, P)``, float64.
        treatment: zeros and ones ``(N,)``.
        penalty: half of it times the squared coefficients is added to the negative log-likelihood; 1 is scikit-learn's
            default.

    Raises:
        RuntimeError: no convergence in 100 iterations, which a positive penalty excludes but for rounding.
    """

    def __init__(self, x: Tensor, treatment: Tensor, penalty: float = 1.0) -> None:
        self._standard = _Standard(x)
        z = self._design(x)
        ridge = torch.full((z.shape[1],), penalty, dtype=z.dtype, device=z.device)
        ridge[0] = 0.0
        beta = z.new_zeros(z.shape[1])

        def loss(b: Tensor) -> Tensor:
            return torch.nn.functional.softplus(z @ b).sum() - treatment @ (z @ b) + 0.5 * (ridge * b) @ b

        current = loss(beta)
        for _ in range(100):
            p = torch.sigmoid(z @ beta)
            slope = z.mT @ (p - treatment) + ridge * beta
            curvature = z.mT @ ((p * (1 - p)).unsqueeze(1) * z) + torch.diag(ridge + 1e-12)
            move = torch.linalg.solve(curvature, slope)
            if float(move.abs().max()) < 1e-10:
                break
            size = 1.0
            while size > 1e-6 and not bool(loss(beta - size * move) <= current + 1e-12 * current.abs()):
                size /= 2
            beta = beta - size * move
            current = loss(beta)
        else:
            raise RuntimeError("the logistic regression of treatment on the features did not converge")
        self._coefficients = beta

    def predict(self, x: Tensor) -> Tensor:
        """Probabilities of treatment ``(M,)``."""
        return torch.sigmoid(self._design(x) @ self._coefficients)

    def _design(self, x: Tensor) -> Tensor:
        z = self._standard(x)
        return torch.cat([z.new_ones(len(z), 1), z], 1)


def _ridge_path(z: Tensor, y: Tensor, penalties: Tensor) -> tuple[Tensor, Tensor]:
    """Coefficients ``(P, L)`` of L penalties, each times N, from one singular value decomposition, and the intercept's
    part ``(L,)`` for columns that are not centred.
    """
    shift, mean = z.mean(0), y.mean()
    u, s, vh = torch.linalg.svd(z - shift, full_matrices=False)
    shrink = s.unsqueeze(1) / (s.square().unsqueeze(1) + penalties * len(z)).clamp_min(torch.finfo(z.dtype).tiny)
    path = vh.mT @ (shrink * (u.mT @ (y - mean)).unsqueeze(1))
    return path, mean - shift @ path
