"""Partly observed discrete vectors: random orders, the chain rule along them, ancestral draws, block Gibbs.

A row of values ``(D,)`` holds integers ``0 .. K_j - 1``, and -1 where the variable is missing.  A network that gives
all conditionals ``log p(x_j | x_S)`` in one pass (an order-agnostic autoregressive model: Uria, Murray and
Larochelle, "A deep and tractable density estimator", ICML 2014) can be asked along any order.

``ranks[b, j]`` is the step, from 0, at which variable j of row b is revealed; ``ranks < d`` are the first d.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = [
    "MISSING",
    "AncestralDraws",
    "Conditionals",
    "Marginals",
    "ancestral",
    "as_proposal",
    "block_gibbs",
    "chain_rule",
    "from_marginals",
    "hide",
    "pick",
    "random_ranks",
    "value_counts",
]

MISSING = -1

Conditionals = Callable[[Tensor, Tensor | None], Tensor]
"""``(values (B, D), context (B, C) or None) -> log p(x_j = k | x_S)`` ``(B, D, K)``, normalised over k; of meaning
where the variable is missing."""

Marginals = Callable[[Tensor, Tensor | None], Tensor]
"""``(values (B, D), context) -> log p(x_S)`` ``(B,)``, up to one constant."""

Proposal = Callable[[Tensor, Tensor, Tensor | None], Tensor]
"""``(values (B, D), positions (B, n), context) -> log-probabilities (B, n, K)`` of the variables at the positions."""

LogDensity = Callable[[Tensor], Tensor]
"""``complete values (B, D) -> (B,)``, unnormalised."""


class AncestralDraws(NamedTuple):
    """Draws of the missing variables.

    Attributes:
        values: complete rows ``(B, D)``.
        log_prob: log-probability of what was drawn, along the order that was taken ``(B,)``; with several candidates
            that of the proposals, as the law of the chosen ones is not known.
        path: the same after each step, ``(B, steps + 1)``; the first column is 0.
    """

    values: Tensor
    log_prob: Tensor
    path: Tensor


def hide(values: Tensor, keep: Tensor) -> Tensor:
    """``values`` with those that are not in ``keep`` missing."""
    return values.masked_fill(~keep, MISSING)


def value_counts(values: Tensor, levels: int) -> Tensor:
    """How often each variable has each value: ``(N, D)`` to ``(D, levels)``; missing ones are not counted."""
    counts = values.new_zeros(values.shape[1], levels + 1)
    return counts.scatter_add_(1, values.mT + 1, torch.ones_like(values.mT))[:, 1:]


def random_ranks(values: Tensor, generator: torch.Generator | None = None, missing_first: bool = False) -> Tensor:
    """A uniformly random order of each row's observed variables, ``(B, D)``; the missing ones come after all of them.

    Args:
        values: ``(B, D)``.
        generator: by default torch's global one.
        missing_first: a random order of the missing variables, before the observed ones.
    """
    keys = torch.rand(values.shape, generator=generator, device=values.device)
    last = values >= 0 if missing_first else values < 0
    return (keys + last).argsort(1).argsort(1)


def pick(log_probs: Tensor, values: Tensor, positions: Tensor) -> Tensor:
    """``log p(x_j)`` at one position j of each row: ``(B, D, K)``, ``(B, D)``, ``(B,)`` to ``(B,)``."""
    rows = torch.arange(len(values), device=values.device)
    return log_probs[rows, positions, values[rows, positions].clamp(min=0)]


def chain_rule(conditionals: Conditionals, values: Tensor, ranks: Tensor, context: Tensor | None = None) -> Tensor:
    """``log p(x_{first d})`` for d = 0, 1, ..., D by the chain rule along each row's order.

    Args:
        conditionals: all conditionals in one pass.
        values: ``(B, D)``; missing variables must have the last ranks.
        ranks: ``(B, D)``.
        context: ``(B, C)`` or None.

    Returns:
        ``(B, D + 1)``; the first column is 0, and beyond the observed variables the last value stays.
    """
    count = (values >= 0).sum(1)
    order = ranks.argsort(1)
    increments = []
    for d in range(values.shape[1]):
        log_p = pick(conditionals(hide(values, ranks < d), context), values, order[:, d])
        increments.append(torch.where(d < count, log_p, torch.zeros_like(log_p)))
    path = torch.stack(increments, 1).cumsum(1)
    return torch.cat([torch.zeros_like(path[:, :1]), path], 1)


def as_proposal(conditionals: Conditionals) -> Proposal:
    """Draw from the network of conditionals."""

    def propose(values: Tensor, positions: Tensor, context: Tensor | None) -> Tensor:
        log_p = conditionals(values, context)
        return log_p.gather(1, positions.unsqueeze(-1).expand(-1, -1, log_p.shape[-1]))

    return propose


def from_marginals(marginals: Marginals, cardinalities: Tensor, levels: int | None = None) -> Proposal:
    """Conditionals read off the marginals, ``p(x_j = k | x_S) = exp f(x_S, k) / sum_l exp f(x_S, l)``: K evaluations.

    (Liu, Ramadge and Adams, "Generative marginalization models", ICML 2024, equation 6.)  ``levels`` is the largest
    cardinality, where it is known; else it is read from the device.
    """
    largest = int(cardinalities.max()) if levels is None else levels

    def propose(values: Tensor, positions: Tensor, context: Tensor | None) -> Tensor:
        rows, n = positions.shape
        levels = torch.arange(largest, device=values.device)
        impossible = levels >= cardinalities.to(values.device)[positions].unsqueeze(-1)
        filled = values[:, None, None, :].expand(rows, n, largest, -1).clone()
        level = levels.expand(rows, n, largest).masked_fill(impossible, 0)
        filled.scatter_(3, positions[:, :, None, None].expand(-1, -1, largest, 1), level.unsqueeze(-1))
        repeated = None if context is None else context.repeat_interleave(n * largest, 0)
        f = marginals(filled.flatten(0, 2), repeated).view(rows, n, largest)
        return f.masked_fill(impossible, -torch.inf).log_softmax(-1)

    return propose


def ancestral(
    propose: Proposal,
    values: Tensor,
    ranks: Tensor,
    context: Tensor | None = None,
    *,
    block: int = 1,
    candidates: int = 1,
    marginals: Marginals | None = None,
    steps: int | None = None,
    generator: torch.Generator | None = None,
) -> AncestralDraws:
    """Draw the missing variables in the order of their ranks; what is observed stays as it is.

    Args:
        propose: where each variable's law comes from: ``as_proposal`` or ``from_marginals``.
        values: ``(B, D)``.
        ranks: ``(B, D)``; the missing variables come first (``random_ranks(..., missing_first=True)``).
        context: ``(B, C)`` or None.
        block: variables drawn at once, from the product of their laws; more than one is an approximation.
        candidates: with ``marginals``, so many proposals of each block are drawn and one is taken with probability in
            proportion to ``exp f(x_S, x_block) / product of laws`` (sampling-importance-resampling): the block's own
            dependence comes back as their number grows.
        marginals: log-marginals for the weights of the candidates.
        steps: the largest number of missing variables, where it is known; else it is read from the device.
        generator: by default torch's global one.
    """
    if candidates > 1 and marginals is None:
        raise ValueError(f"candidates={candidates} are chosen among by marginals=, which were not given")
    order = ranks.argsort(1)
    total = None
    path = []
    for d in range(0, int((values < 0).sum(1).max()) if steps is None else steps, block):
        positions = order[:, d : d + block]
        drawn = values.gather(1, positions) < 0
        log_p = propose(values, positions, context)
        new = _categorical(log_p.expand(candidates, *log_p.shape), generator)
        log_new = log_p.expand(candidates, *log_p.shape).gather(-1, new.unsqueeze(-1)).squeeze(-1)
        log_new = torch.where(drawn, log_new, torch.zeros_like(log_new)).sum(-1)
        new = torch.where(drawn, new, values.gather(1, positions))
        if marginals is not None and candidates > 1:
            filled = values.expand(candidates, *values.shape).scatter(2, positions.expand(candidates, -1, -1), new)
            repeated = None if context is None else context.repeat(candidates, 1)
            weights = marginals(filled.flatten(0, 1), repeated).view(candidates, -1) - log_new
            chosen = _categorical(weights.T, generator)
        else:
            chosen = positions.new_zeros(len(values))
        rows = torch.arange(len(values), device=values.device)
        values = values.scatter(1, positions, new[chosen, rows])
        step = log_new[chosen, rows]
        total = step if total is None else total + step
        path.append(total)
    if total is None:
        total = torch.zeros(len(values), device=values.device)
    return AncestralDraws(values, total, torch.stack([torch.zeros_like(total), *path], 1))


@torch.no_grad()
def block_gibbs(
    conditionals: Conditionals,
    values: Tensor,
    steps: int,
    block: int,
    context: Tensor | None = None,
    *,
    free: Tensor | None = None,
    parallel: bool = False,
    log_density: LogDensity | None = None,
    log_f: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Resample random blocks of complete rows: hide ``block`` variables, draw them anew given the others.

    With exact conditionals and without ``parallel`` the stationary law is exactly theirs, for any block.  With
    ``log_density`` each block is a Metropolis-Hastings proposal for that density, whose law is then stationary
    whatever the conditionals are.

    Args:
        conditionals: all conditionals in one pass.
        values: complete rows ``(B, D)``.
        steps: blocks, one after the other.
        block: variables in each.
        context: ``(B, C)`` or None.
        free: ``(B, D)``, which variables may change; all by default.
        parallel: draw the block from the product of its conditionals given the others, in one pass instead of
            ``block``.  Only with ``log_density`` is that exact.
        log_density: unnormalised target of complete rows.
        log_f: its values at ``values``, if they are known.
        generator: by default torch's global one.

    Returns:
        The rows, and ``log_density`` at them (None without one).
    """
    propose = as_proposal(conditionals)
    if log_density is not None and log_f is None:
        log_f = log_density(values)
    for _ in range(steps):
        marked = values if free is None else hide(values, free)
        ranks = random_ranks(marked, generator)
        positions = ranks.argsort(1)[:, :block]
        old = values.gather(1, positions)
        changes = torch.ones_like(old, dtype=torch.bool) if free is None else free.gather(1, positions)
        hidden = values.scatter(1, positions, torch.where(changes, MISSING, old))
        new, log_ratio = _redraw(propose, hidden, positions, old, changes, context, parallel, log_density, generator)
        proposed = hidden.scatter(1, positions, new)
        if log_density is None:
            values = proposed
            continue
        assert log_f is not None
        proposed_f = log_density(proposed)
        uniform = torch.rand(len(values), generator=generator, device=values.device)
        # A chain that stands where the density is zero leaves; a NaN of two such states is a leave as well.
        accept = (uniform.log() < proposed_f - log_f + log_ratio) | (log_f == -torch.inf)
        values = torch.where(accept.unsqueeze(1), proposed, values)
        log_f = torch.where(accept, proposed_f, log_f)
    return values, log_f


def _redraw(
    propose: Proposal,
    hidden: Tensor,
    positions: Tensor,
    old: Tensor,
    changes: Tensor,
    context: Tensor | None,
    parallel: bool,
    log_density: LogDensity | None,
    generator: torch.Generator | None,
) -> tuple[Tensor, Tensor]:
    """New values at the positions ``(B, block)``, and log q(old) - log q(new) of the proposal ``(B,)``."""
    if parallel:
        log_p = propose(hidden, positions, context)
        new = torch.where(changes, _categorical(log_p, generator), old)
        difference = (log_p.gather(-1, old.unsqueeze(-1)) - log_p.gather(-1, new.unsqueeze(-1))).squeeze(-1)
        return new, torch.where(changes, difference, torch.zeros_like(difference)).sum(1)
    forward, backward, drawn = hidden, hidden, []
    log_ratio = torch.zeros(len(hidden), device=hidden.device)
    for i in range(positions.shape[1]):
        at = positions[:, i : i + 1]
        log_p = propose(forward, at, context)[:, 0]
        new_i = torch.where(changes[:, i], _categorical(log_p, generator), old[:, i])
        if log_density is not None:
            log_q = log_p if i == 0 else propose(backward, at, context)[:, 0]
            rows = torch.arange(len(hidden), device=hidden.device)
            difference = log_q[rows, old[:, i]] - log_p[rows, new_i]
            log_ratio = log_ratio + torch.where(changes[:, i], difference, torch.zeros_like(difference))
        forward = forward.scatter(1, at, new_i.unsqueeze(1))
        backward = backward.scatter(1, at, old[:, i : i + 1])
        drawn.append(new_i)
    return torch.stack(drawn, 1), log_ratio


def _categorical(log_p: Tensor, generator: torch.Generator | None) -> Tensor:
    """A draw from the last dimension, by the Gumbel trick; log-probabilities need not be normalised."""
    u = torch.rand(log_p.shape, generator=generator, device=log_p.device, dtype=log_p.dtype)
    tiny = torch.finfo(log_p.dtype).tiny
    return (log_p - (-u.clamp(min=tiny).log()).clamp(min=tiny).log()).argmax(-1)
