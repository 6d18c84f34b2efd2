"""KL(model || target) of a discrete model by the score function, and the regression of its log-marginal on a target.

For an unnormalised target f the gradient of the divergence is ``E_model[ grad log p(x) (log p(x) - log f(x)) ]``,
with a baseline from the other rows, which leaves the row itself out and so keeps the estimate unbiased (Mnih and
Rezende, ICML 2016).
"""

import torch
from torch import Tensor, nn

from inference.any_order import LogDensity, ancestral, as_proposal, chain_rule, hide, pick, random_ranks
from inference.objectives.persistent_chains import PersistentChains, uniform_values
from inference.objectives.self_consistency import draw_depth, pair_residuals

__all__ = ["AutoregressiveKL", "MarginalKL", "MarginalRegression", "leave_one_out"]


def leave_one_out(reward: Tensor) -> Tensor:
    """Each entry less the mean of the others, ``(B,)``."""
    return (reward - reward.mean()) * (len(reward) / max(len(reward) - 1, 1))


class MarginalKL(nn.Module):
    """The energy-based objective of Liu, Ramadge and Adams (ICML 2024): the divergence and a penalty on consistency.

    ``mean(R f(x)) + penalty (D mean r^2 + (f(nothing) - anchor)^2)`` on persistent chains, R the centred
    ``f(x) - log f(x)``.  The score-function part is biased until f is consistent, since ``exp f`` does not sum to
    one: a baseline moves the level of f, which only the other two terms hold.  The reward is not divided by its
    standard deviation, which would change ``penalty`` with the temperature.

    Args:
        marginals, conditionals: modules; the conditionals learn from consistency alone.
        log_density: finite unnormalised log-density of complete rows.
        cardinalities: ``(D,)``.
        num_chains: chains, and rows of an update.
        block: variables that a chain redraws in an update.
        penalty: the paper's alpha.
        anchor: level of f where nothing is observed.
        window: updates between two looks at the chains' R-hat.
    """

    def __init__(
        self,
        marginals: nn.Module,
        conditionals: nn.Module,
        log_density: LogDensity,
        cardinalities: Tensor,
        *,
        num_chains: int = 256,
        block: int = 4,
        penalty: float = 4.0,
        anchor: float = 0.0,
        window: int = 512,
    ) -> None:
        super().__init__()
        self.marginals, self.conditionals, self.log_density = marginals, conditionals, log_density
        self.chains = PersistentChains(cardinalities, num_chains, block, window=window)
        self.penalty, self.anchor = penalty, anchor

    def forward(self) -> Tensor:
        """Scalar whose gradient is the estimate; its value is not the divergence."""
        values, log_f = self.chains.advance(self.conditionals, self.log_density)
        f = self.marginals(values, None)
        reward = leave_one_out((f - log_f).detach())
        return (reward * f).mean() + self.penalty * _consistency(self, values, self.anchor)


class MarginalRegression(nn.Module):
    """Flow matching in the paper's code: f regressed on the target at given rows, and consistency on rows and chains.

    The level of f where nothing is observed is free, and is its estimate of log Z.

    Args:
        marginals, conditionals, log_density, cardinalities, num_chains, block, penalty, window: as in ``MarginalKL``.
        rows: states to regress at ``(M, D)``; half of an update's rows are drawn from them.  Uniform rows by default.
    """

    rows: Tensor | None
    cardinalities: Tensor

    def __init__(
        self,
        marginals: nn.Module,
        conditionals: nn.Module,
        log_density: LogDensity,
        cardinalities: Tensor,
        *,
        num_chains: int = 256,
        block: int = 4,
        penalty: float = 4.0,
        rows: Tensor | None = None,
        window: int = 512,
    ) -> None:
        super().__init__()
        self.marginals, self.conditionals, self.log_density = marginals, conditionals, log_density
        self.chains = PersistentChains(cardinalities, num_chains, block, window=window)
        self.penalty = penalty
        self.register_buffer("rows", rows, persistent=False)
        self.register_buffer("cardinalities", cardinalities, persistent=False)

    def forward(self) -> Tensor:
        """Scalar loss."""
        chains, log_f_chains = self.chains.advance(self.conditionals, self.log_density)
        with torch.no_grad():
            if self.rows is None:
                given = uniform_values(self.cardinalities, len(chains))
            else:
                given = self.rows[torch.randint(len(self.rows), (len(chains),), device=chains.device)]
            log_f = torch.cat([self.log_density(given), log_f_chains])
        values = torch.cat([given, chains])
        error = (self.marginals(values, None) - log_f).square().mean()
        return 0.5 * error + 0.5 * self.penalty * _consistency(self, values, None)


def _consistency(objective: MarginalKL | MarginalRegression, values: Tensor, anchor: float | None) -> Tensor:
    ranks = random_ranks(values)
    size = values.shape[1]
    depth = draw_depth(torch.full((len(values),), size, device=values.device), "uniform")
    r, _ = pair_residuals(objective.marginals, objective.conditionals, values, ranks, depth)
    total = size * r.square().mean()
    if anchor is not None:
        total = total + (objective.marginals(torch.full_like(values[:1], -1), None) - anchor).square().mean()
    return total


class AutoregressiveKL(nn.Module):
    """Autoregressive baselines: the divergence with the chain rule's log-probability, in a fixed or a random order.

    Args:
        conditionals: module; its parameters are learned.
        log_density: finite unnormalised log-density of complete rows.
        cardinalities: ``(D,)``.
        batch_size: draws of the model in an update.
        order: variables in the order of drawing ``(D,)``; the given order by default.
        monte_carlo: replace the sum over D terms by D times a random one, in score and reward by independent draws.
            Unbiased, and of a variance so large that it is of no use but to show that (the paper's ARM-MC).
    """

    ranks: Tensor

    def __init__(
        self,
        conditionals: nn.Module,
        log_density: LogDensity,
        cardinalities: Tensor,
        *,
        batch_size: int = 256,
        order: Tensor | None = None,
        monte_carlo: bool = False,
    ) -> None:
        super().__init__()
        self.conditionals, self.log_density = conditionals, log_density
        self.batch_size, self.monte_carlo = batch_size, monte_carlo
        size = len(cardinalities)
        order = torch.arange(size, device=cardinalities.device) if order is None else order
        self.register_buffer("ranks", order.argsort(), persistent=False)

    def forward(self) -> Tensor:
        """Scalar whose gradient is the estimate; its value is not the divergence."""
        size = len(self.ranks)
        ranks = self.ranks.expand(self.batch_size, -1)
        with torch.no_grad():
            empty = ranks.new_full((self.batch_size, size), -1)
            draws = ancestral(as_proposal(self.conditionals), empty, ranks, steps=size)
            log_f = self.log_density(draws.values)
        if not self.monte_carlo:
            log_p = chain_rule(self.conditionals, draws.values, ranks)[:, -1]
            return (leave_one_out((log_p - log_f).detach()) * log_p).mean()
        score, reward = self._random_term(draws.values), self._random_term(draws.values)
        return (leave_one_out((reward - log_f).detach()) * score).mean()

    def _random_term(self, values: Tensor) -> Tensor:
        size = values.shape[1]
        step = torch.randint(size, (len(values),), device=values.device)
        ranks = self.ranks.expand(len(values), -1)
        log_p = self.conditionals(hide(values, ranks < step.unsqueeze(1)), None)
        return size * pick(log_p, values, ranks.argsort(1).gather(1, step.unsqueeze(1)).squeeze(1))
