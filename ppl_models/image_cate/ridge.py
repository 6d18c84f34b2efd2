"""Ridge regressions: linear with a cross-validated penalty, and logistic.

They are what is needed beside a model of images, and no more: some columns, some thousand units, no loop over
penalties.
"""

import torch
from torch import Tensor, nn

__all__ = ["LogisticRidge", "Ridge", "RidgePath"]

_PENALTIES = tuple(10.0 ** (k / 2) for k in range(-6, 11))  # per unit of mean squared standardised column


class _Standard:
    """Shift and scale of columns; a constant column becomes 0."""

    def __init__(self, x: Tensor) -> None:
        self.shift = x.mean(0)
        scale = (x - self.shift).square().mean(0).sqrt()
        flat = scale <= 1e-10 * self.shift.abs()
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
        coefficients, intercept = RidgePath(self._standard(x), folds).fit(y.unsqueeze(1))
        self._coefficients, self._intercept = coefficients[:, 0], intercept[0]

    def predict(self, x: Tensor) -> Tensor:
        """Predicted outcomes ``(M,)``."""
        return self._intercept + self._standard(x) @ self._coefficients


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


class RidgePath:
    """Ridge regressions on the same rows, for any outcomes; each takes the penalty of the least squared error over
    folds.

    The decompositions are made once, so that a further outcome costs products alone.

    Args:
        x: ``(N, P)``, float64, columns of about unit spread.
        folds: fold of each row ``(N,)``, int64; rows that are alike share one.
        weight: ``(N,)``; None: equal.
    """

    def __init__(self, x: Tensor, folds: Tensor, weight: Tensor | None = None) -> None:
        w = x.new_ones(len(x)) if weight is None else weight
        self._x, self._weight = x, w
        self._penalties = torch.tensor(_PENALTIES, dtype=x.dtype, device=x.device)
        self._whole = _Rows(x, w)
        labels = folds.unique().tolist()
        outs = [folds == fold for fold in labels] if len(labels) > 1 else []
        self._parts = [(out, _Rows(x[~out], w[~out])) for out in outs if bool((w[~out] > 0).any())]

    def fit(self, y: Tensor, penalty: float | None = None) -> tuple[Tensor, Tensor]:
        """Coefficients ``(P, Q)`` and intercepts ``(Q,)`` of the outcomes ``y`` ``(N, Q)``, of one penalty; by default
        the best.
        """
        rows = self._whole
        slope = rows.slope(y, self.best_penalty(y) if penalty is None else penalty)
        return slope, rows.mean(y) - rows.shift @ slope

    def held_out(self, y: Tensor, penalty: float) -> Tensor:
        """What the slopes without a row's fold say of it, ``(N, Q)``; with one fold, those of all rows.  The level is
        that of all rows: the others' would tell the fold.
        """
        rows = self._whole
        told = (self._x - rows.shift) @ rows.slope(y, penalty)
        for out, part in self._parts:
            told[out] = (self._x[out] - rows.shift) @ part.slope(y[~out], penalty)
        return told + rows.mean(y)

    def best_penalty(self, y: Tensor) -> float:
        """That of the least squared error over folds; with one fold, the middle one."""
        return _PENALTIES[int(self._losses(y)[:-1].argmin()) if self._parts else len(_PENALTIES) // 2]

    def foretells(self, y: Tensor) -> bool:
        """Whether some penalty has less squared error over folds than an infinite one: than the mean of the others."""
        losses = self._losses(y)
        return bool(losses[:-1].min() < losses[-1])

    def _losses(self, y: Tensor) -> Tensor:
        """Squared error over folds of each penalty and, last, of an infinite one."""
        losses = torch.zeros(len(self._penalties) + 1, dtype=y.dtype, device=y.device)
        for out, rows in self._parts:
            turned = rows.project(y[~out])
            seen = (self._x[out] - rows.shift) @ rows.vectors
            shrink = nn.functional.pad(rows.shrink(self._penalties), (0, 1))
            weight = self._weight[out]
            for q in range(y.shape[1]):
                guess = rows.mean(y[~out])[q] + seen @ (shrink * turned[:, q : q + 1])
                losses += (weight.unsqueeze(1) * (y[out, q : q + 1] - guess).square()).sum(0)
        return losses


class _Rows:
    """Eigenvectors of the weighted second moments of rows about their mean."""

    def __init__(self, x: Tensor, weight: Tensor) -> None:
        self._share = weight / weight.sum()
        self.shift = self._share @ x
        self._centred = x - self.shift
        values, self.vectors = torch.linalg.eigh(self._centred.mT @ (self._share.unsqueeze(1) * self._centred))
        self._values = values.clamp_min(0)

    def mean(self, y: Tensor) -> Tensor:
        return self._share @ y

    def project(self, y: Tensor) -> Tensor:
        moments = self._centred.mT @ (self._share.unsqueeze(1) * (y - self.mean(y)))
        turned: Tensor = self.vectors.mT @ moments
        return turned

    def slope(self, y: Tensor, penalty: float) -> Tensor:
        found: Tensor = self.vectors @ (self.shrink(y.new_tensor([penalty])) * self.project(y))
        return found

    def shrink(self, penalties: Tensor) -> Tensor:
        found: Tensor = 1 / (self._values.unsqueeze(1) + penalties)
        return found
