"""Log-marginals and conditionals of an unnormalised discrete density, by self-consistency alone.

With ``f(x) := log f(x)`` at complete states, the residuals ``f(x_S) + log p(x_j | x_S) - f(x_{S + j})`` are zero for
all S and j only if f are the log-marginals of the target, up to the constant ``f(nothing observed) = log Z``.  The
rows that the squares are averaged over may come from anywhere with full support, so nothing here is an expectation
under the model (da Silva, Mesquita and Lahlou, "Particle GFlowNets", UAI 2026, arXiv 2609.11538: detailed balance of
a GFlowNet whose flow is f).
"""

import math

import torch
from torch import Tensor, nn

from inference.any_order import LogDensity, hide, pick, random_ranks
from inference.objectives.masked_completion import completion_loss, uniform_depth
from inference.objectives.persistent_chains import PersistentChains, uniform_values
from inference.objectives.self_consistency import draw_depth, pair_residuals, segment_residuals

__all__ = ["EnergyConsistency"]


class EnergyConsistency(nn.Module):
    """Squared residuals on chains and uniform rows, as an objective without data for ``inference.fit``.

    The loss of a row is the sum of: D times the squared residual of random pairs (or segments) of an order; that of
    the pair next to the complete state; ``(f(x) - log f(x))^2`` unless f is exact there; and ``likelihood`` times
    the order-agnostic negative log-likelihood of the chains' rows, which teaches the conditionals directly.

    Args:
        marginals: module ``(values, context) -> f (B,)``.
        conditionals: module of log-probabilities ``(B, D, K)``.
        log_density: finite unnormalised log-density of complete rows.
        cardinalities: ``(D,)``.
        num_chains: rows from chains in each update.
        uniform: uniform rows, in proportion to all.
        block: variables that a chain redraws in an update.
        metropolis: accept or refuse each block by ``log_density``, so that the chains have the target's law from the
            start and one pass draws a block; otherwise a block is drawn variable by variable and kept.
        likelihood: weight of the chains' likelihood; only with ``metropolis`` are they draws of the target.
        exact: whether f equals ``log_density`` at complete rows by structure.
        depth: law of the size of S (see ``draw_depth``).
        children: residuals to one prefix.
        length: steps of a segment residual, in place of pairs; None for pairs.
        window: updates between two looks at the chains' R-hat.
    """

    cardinalities: Tensor

    def __init__(
        self,
        marginals: nn.Module,
        conditionals: nn.Module,
        log_density: LogDensity,
        cardinalities: Tensor,
        *,
        num_chains: int = 256,
        uniform: float = 0.2,
        block: int = 4,
        metropolis: bool = True,
        likelihood: float = 1.0,
        exact: bool = False,
        depth: str = "uniform",
        children: int = 1,
        length: int | None = None,
        window: int = 512,
    ) -> None:
        super().__init__()
        if not 0 <= uniform < 1:
            raise ValueError(f"uniform must be at least 0 and below 1, got {uniform!r}")
        self.marginals, self.conditionals = marginals, conditionals
        self.log_density = log_density
        self.chains = PersistentChains(
            cardinalities,
            num_chains,
            block,
            parallel=metropolis,
            target=log_density if metropolis else None,
            window=window,
        )
        self.num_uniform = math.ceil(num_chains * uniform / (1 - uniform)) if uniform else 0
        self.likelihood, self.exact, self.depth, self.num_children = likelihood, exact, depth, children
        self.length = length
        self.register_buffer("cardinalities", cardinalities, persistent=False)

    def forward(self) -> Tensor:
        """Scalar loss, after the chains have moved."""
        values, log_f = self.chains.advance(self.conditionals, self.log_density)
        num_chains = len(values)
        if self.num_uniform:
            with torch.no_grad():
                extra = uniform_values(self.cardinalities, self.num_uniform)
                values, log_f = torch.cat([values, extra]), torch.cat([log_f, self.log_density(extra)])
        ranks = random_ranks(values)
        size = values.shape[1]
        loss = size * self._residuals(values, log_f, ranks) + self._last_pair(values, log_f, ranks)
        if not self.exact:
            loss = loss + (self.marginals(values, None) - log_f).square().mean()
        if self.likelihood:
            rows, order = values[:num_chains], ranks[:num_chains]
            depth = uniform_depth(torch.full((num_chains,), size, device=rows.device))
            revealed = order < depth.unsqueeze(1)
            log_p = self.conditionals(hide(rows, revealed), None)
            loss = loss + self.likelihood * completion_loss(log_p, rows, revealed).mean()
        return loss

    def _residuals(self, values: Tensor, log_f: Tensor, ranks: Tensor) -> Tensor:
        count = torch.full((len(values),), values.shape[1], device=values.device)
        depth = draw_depth(count, self.depth)
        clamped = self._clamped(values.shape[1], log_f)
        if self.length is not None:
            return segment_residuals(clamped, self.conditionals, values, ranks, depth, self.length).square().mean()
        r, valid = pair_residuals(clamped, self.conditionals, values, ranks, depth, children=self.num_children)
        return (r.square().sum(1) / valid.sum(1)).mean()

    def _clamped(self, size: int, log_f: Tensor):  # type: ignore[no-untyped-def]
        """f, but the target itself at complete rows; rows come in groups of one row's parents and children."""

        def marginals(values: Tensor, context: Tensor | None) -> Tensor:
            f = self.marginals(values, context)
            if self.exact:
                return f
            parents = len(log_f)
            repeats = len(values) // parents - 1
            known = torch.cat([log_f, log_f.repeat_interleave(repeats)])
            return torch.where((values >= 0).all(1), known, f)

        return marginals

    def _last_pair(self, values: Tensor, log_f: Tensor, ranks: Tensor) -> Tensor:
        position = ranks.argmax(1)
        parent = hide(values, ranks < values.shape[1] - 1)
        log_p = pick(self.conditionals(parent, None), values, position)
        return (self.marginals(parent, None) + log_p - log_f).square().mean()
