"""Chains over discrete vectors that live between the updates of a network, as buffers of an objective.

Being buffers, they are saved, restored and moved with the objective by ``inference.fit``.
"""

import torch
from torch import Tensor, nn

from inference.any_order import Conditionals, LogDensity, ancestral, as_proposal, block_gibbs, random_ranks
from inference.results.diagnostics import rhat

__all__ = ["PersistentChains", "uniform_values"]


def uniform_values(cardinalities: Tensor, rows: int, generator: torch.Generator | None = None) -> Tensor:
    """Rows of independent uniform values, ``(rows, D)``."""
    u = torch.rand(rows, len(cardinalities), generator=generator, device=cardinalities.device)
    return torch.minimum((u * cardinalities).long(), cardinalities - 1)


class PersistentChains(nn.Module):
    """Block-Gibbs chains driven by a network of conditionals (Liu, Ramadge and Adams, ICML 2024).

    Args:
        cardinalities: ``(D,)``.
        num_chains: chains C.
        block: variables redrawn in an update.
        parallel: draw a block in one pass, each variable given those outside the block.
        target: unnormalised log-density; if given, each block is a Metropolis-Hastings proposal for it.
        window: every so many updates split R-hat of the density over them is looked at, and chains that disagree
            (above ``rhat_bound``) are drawn anew from the network; 0 never.
        rhat_bound: as da Silva, Mesquita and Lahlou (UAI 2026) have it, 1.1.
    """

    values: Tensor
    trace: Tensor
    updates: Tensor
    restarts: Tensor

    def __init__(
        self,
        cardinalities: Tensor,
        num_chains: int,
        block: int,
        *,
        parallel: bool = False,
        target: LogDensity | None = None,
        window: int = 512,
        rhat_bound: float = 1.1,
    ) -> None:
        super().__init__()
        self.block, self.parallel, self.target = min(block, len(cardinalities)), parallel, target
        self.window, self.rhat_bound = window, rhat_bound
        self._count = 0  # of this process: when to look at R-hat, without asking the device
        self.register_buffer("values", torch.zeros(num_chains, len(cardinalities), dtype=torch.long))
        self.register_buffer("trace", torch.zeros(num_chains, max(window, 1)))
        self.register_buffer("updates", torch.zeros((), dtype=torch.long))
        self.register_buffer("restarts", torch.zeros((), dtype=torch.long))

    @torch.no_grad()
    def start(self, values: Tensor) -> None:
        """Put the chains at these rows ``(C, D)``."""
        self.values = values.clone()

    @torch.no_grad()
    def advance(self, conditionals: Conditionals, log_density: LogDensity | None = None) -> tuple[Tensor, Tensor]:
        """One block further: the rows ``(C, D)``, and the statistic that is watched at them ``(C,)``: ``log_density``,
        or without one the rows' mean.
        """
        statistic = log_density or (lambda rows: rows.double().mean(1))
        values, log_f = block_gibbs(
            conditionals, self.values, 1, self.block, parallel=self.parallel, log_density=self.target
        )
        if log_f is None:
            log_f = statistic(values)
        self.values.copy_(values)
        if self.window:
            place = self.updates % self.window
            self.trace.index_copy_(1, place.reshape(1), log_f.unsqueeze(1).to(self.trace.dtype))
            self.updates += 1
            self._count += 1
            if self._count % self.window == 0 and bool(self.updates % self.window == 0):
                self._restart_if_apart(conditionals)
                log_f = statistic(self.values)
        return self.values.clone(), log_f

    def _restart_if_apart(self, conditionals: Conditionals) -> None:
        spread = rhat(self.trace.double())
        if bool(spread > self.rhat_bound):
            empty = torch.full_like(self.values, -1)
            ranks = random_ranks(empty, missing_first=True)
            self.values.copy_(ancestral(as_proposal(conditionals), empty, ranks, steps=empty.shape[1]).values)
            self.restarts += 1
