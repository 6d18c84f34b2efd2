"""Latent classes: a mixture of products of categoricals, whose every marginal is exact.

    p(x_S) = sum_c w_c prod_{j in S} theta_cj(x_j)

for any subset S of the variables (Lazarsfeld and Henry, "Latent structure analysis", 1968).  It is learned by EM
(Dempster, Laird and Rubin, JRSS B 39, 1977), where missing values simply take no part in the products, and is the
maximum of the posterior under a Dirichlet prior on each ``theta_cj`` around the variable's own frequencies.  It starts
from rows far from one another (k-means++; Arthur and Vassilvitskii, SODA 2007): from any rows, two classes often share
a kind of rows and a third stands for two.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional

__all__ = ["LatentClasses", "before"]

_PRIOR = 2.0  # observations that a class has beforehand of each variable
_MOST = 1 << 27  # numbers in the one-hot rows: half a gigabyte
_CANDIDATES = 100  # rows a class among which the starts are looked for
_FLOOR = 1e-6  # of a probability: its logarithm and gradients stay of usual size in float32


def before(terms: Tensor) -> Tensor:
    """Sums over the places before each one: ``(B, D, ...)`` to the same, 0 at the first."""
    return functional.pad(terms[:, :-1], (0, 0, 1, 0)).cumsum(1)


class LatentClasses(nn.Module):
    """The mixture; one uniform class until it has learned.

    Args:
        cardinalities: number of values K_j of each variable.
        classes: number of classes C, at the most.

    Example:
        >>> x = torch.randint(2, (200, 1), generator=torch.Generator().manual_seed(0)).repeat(1, 3)  # three copies
        >>> mixture = LatentClasses([2, 2, 2], classes=2)
        >>> mixture.learn(x, generator=torch.Generator().manual_seed(0))
        >>> log_p = mixture(torch.tensor([[1, 1, -1], [1, 0, -1], [-1, -1, -1]]))
        >>> bool(log_p[0] > -1), bool(log_p[1] < -2), bool(log_p[2].abs() < 1e-6)
        (True, True, True)
    """

    log_weights: Tensor
    log_theta: Tensor
    possible: Tensor

    def __init__(self, cardinalities: list[int], classes: int) -> None:
        super().__init__()
        counts = torch.tensor(cardinalities)
        levels = int(counts.max())
        possible = torch.arange(levels) < counts.unsqueeze(1)
        self.register_buffer("possible", possible, persistent=False)
        self.register_buffer("log_weights", torch.full((classes,), -torch.inf))
        # (D, K, C): products with one-hot rows
        self.register_buffer("log_theta", torch.zeros(*possible.shape, classes))
        self.reset()

    def reset(self) -> None:
        """Back to one uniform class."""
        uniform = -self.possible.sum(1, keepdim=True).to(self.log_theta).log().expand_as(self.possible)
        self.log_theta.copy_(uniform.unsqueeze(2))
        self.log_weights.fill_(-torch.inf)
        self.log_weights[0] = 0.0

    def forward(self, values: Tensor) -> Tensor:
        """``log p(x_S)`` of rows ``(B, D)``, -1 where missing; ``(B,)``."""
        return (self.log_weights + self._one_hot(values) @ self.log_theta.flatten(0, 1)).logsumexp(1)

    def steps(self, values: Tensor) -> tuple[Tensor, Tensor]:
        """The chain rule along the given order: what is known of each variable from the observed ones before it.

        Returns:
            ``log p(x_i = k | x_{S, <i})`` ``(B, D, K)``, and the classes' probabilities behind it ``(B, D, C)``.
        """
        hot = self._one_hot(values).unflatten(1, self.possible.shape)
        classes = (self.log_weights + before(torch.einsum("bdk,dkc->bdc", hot, self.log_theta))).softmax(2)
        return torch.einsum("bdc,dkc->bdk", classes, self.log_theta.exp()).log(), classes

    def _one_hot(self, values: Tensor) -> Tensor:
        levels = torch.arange(self.possible.shape[1], device=values.device)
        return (values.unsqueeze(-1) == levels).to(self.log_theta).flatten(1)

    @torch.no_grad()
    def learn(self, values: Tensor, *, iterations: int = 100, generator: torch.Generator | None = None) -> None:
        """EM from rows far from one another.

        Args:
            values: ``(N, D)``, -1 where missing; a class needs 32 rows, so fewer rows make fewer classes.  Of more rows
                than fit into half a gigabyte some are drawn.
            iterations: passes over the rows.
            generator: of the first rows, and of those drawn.
        """
        most = max(1, _MOST // self.possible.numel())
        if len(values) > most:
            values = values[torch.randperm(len(values), generator=generator, device=values.device)[:most]]
        hot = self._one_hot(values)
        base = (hot.sum(0).unflatten(0, self.possible.shape) + 0.5) * self.possible
        base = base / base.sum(1, keepdim=True)
        classes = max(1, min(len(self.log_weights), len(values) // 32))
        if classes == 1:
            weights, theta = hot.new_ones(1), base.unsqueeze(2)
        else:
            starts = self._apart(hot, classes, generator)
            # A class starts between a row and the frequencies: at a row alone it would keep that row and no other.
            theta = (starts.mT.unflatten(0, self.possible.shape) + 2.0 * base.unsqueeze(2)).clamp(min=_FLOOR)
            theta = theta / theta.sum(1, keepdim=True)
            weights = hot.new_full((classes,), 1.0 / classes)
        for _ in range(iterations if classes > 1 else 0):
            joint = weights.log() + hot @ theta.clamp(min=_FLOOR).log().flatten(0, 1)
            posterior = joint.softmax(1)
            counts = (hot.mT @ posterior).unflatten(0, self.possible.shape) + _PRIOR * base.unsqueeze(2)
            theta = counts / counts.sum(1, keepdim=True)
            weights = (posterior.sum(0) + 1.0) / (len(values) + classes)
        self.reset()
        theta = functional.pad(theta, (0, len(self.log_weights) - classes), value=1.0)
        self.log_theta.copy_(theta.clamp(min=_FLOOR).log())
        self.log_weights[:classes] = weights.log()

    def _apart(self, hot: Tensor, classes: int, generator: torch.Generator | None) -> Tensor:
        """Rows ``(C, D K)``, each with a chance that grows with the squared number of values in which it differs from
        the one before it that is most like it.
        """
        order = torch.randperm(len(hot), generator=generator, device=hot.device)
        some = hot[order[: _CANDIDATES * classes]]
        known = some.unflatten(1, self.possible.shape).sum(2)
        far = torch.full_like(known[:, 0], torch.inf)
        places = [torch.zeros(1, dtype=torch.long, device=hot.device)]
        for _ in range(classes - 1):
            alike, both = (rows @ rows.index_select(0, places[-1])[0] for rows in (some, known))
            far = torch.minimum(far, both - alike)
            # Where no row differs, any.
            places.append(torch.multinomial(far.square() + _FLOOR, 1, generator=generator))
        return some[torch.cat(places)]
