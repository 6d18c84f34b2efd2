"""Self-consistency: a network of log-marginals f that agrees with a network of conditionals.

If ``exp f(x_S)`` were the marginals and ``p(x_j | x_S)`` the conditionals of one law, then for every S and j not in S

    r = f(x_S) + log p(x_j | x_S) - f(x_{S + j}) = 0

(Liu, Ramadge and Adams, "Generative marginalization models", ICML 2024, equation 7).  Along an order the residuals
add up to the difference of ``f`` from the chain rule, so that a segment of it gives a residual as well, and one that
starts at the empty set is a regression of f on the chain rule itself.
"""

import math

import torch
from torch import Tensor, nn

from inference.any_order import Conditionals, Marginals, from_marginals, hide, pick, random_ranks
from inference.objectives.masked_completion import MaskedCompletion, uniform_depth
from inference.objectives.persistent_chains import PersistentChains
from inference.objectives.small_sets import PairMarginals

__all__ = [
    "PathConsistency",
    "Penalised",
    "SelfConsistency",
    "draw_depth",
    "pair_residuals",
    "segment_residuals",
    "sum_rule_residuals",
]

_LOSSES = ("pair", "segment", "sum_rule", "kl")
_DEPTHS = ("uniform", "poisson")
_STEEPEST = 1.5
_PAIRS = 4.0  # weight of exact targets, which have no noise to drown


def draw_depth(count: Tensor, law: str) -> Tensor:
    """How many variables are revealed before the pair, from 0 to ``count - 1``, ``(B,)``.

    Args:
        count: observed variables of each row.
        law: ``"uniform"``; or ``"poisson"``, near complete states: ``count - depth`` is 1 plus a Poisson variable of
            mean log(count), truncated (da Silva, Mesquita and Lahlou, UAI 2026, arXiv 2609.11538).
    """
    if law == "uniform":
        return uniform_depth(count)
    removed = torch.poisson(count.clamp(min=2).float().log()).long()
    return (count - 1 - removed).clamp(min=0)


def pair_residuals(
    marginals: Marginals,
    conditionals: Conditionals,
    values: Tensor,
    ranks: Tensor,
    depth: Tensor,
    context: Tensor | None = None,
    children: int = 1,
) -> tuple[Tensor, Tensor]:
    """``f(x_S) + log p(x_j | x_S) - f(x_{S + j})`` for the prefix S of ``depth`` variables and each of the next ones.

    Args:
        marginals, conditionals: the two networks.
        values: ``(B, D)``.
        ranks: ``(B, D)``.
        depth: ``(B,)``, size of S.
        context: ``(B, C)`` or None.
        children: how many j to one S: they share its two evaluations.

    Returns:
        Residuals ``(B, children)``, zero where a row has no variable left, and which have one.
    """
    order = ranks.argsort(1)
    revealed = ranks < depth.unsqueeze(1)
    prefix = hide(values, revealed)
    steps = depth.unsqueeze(1) + torch.arange(children, device=values.device)
    valid = steps < (values >= 0).sum(1, keepdim=True)
    positions = order.gather(1, steps.clamp(max=values.shape[1] - 1))
    grown = prefix.unsqueeze(1).expand(-1, children, -1).clone()
    grown.scatter_(2, positions.unsqueeze(2), values.gather(1, positions).unsqueeze(2))
    stacked = torch.cat([prefix, grown.flatten(0, 1)])
    repeated = None if context is None else torch.cat([context, context.repeat_interleave(children, 0)])
    f = marginals(stacked, repeated)
    f_prefix, f_grown = f[: len(values)], f[len(values) :].view(-1, children)
    log_p = conditionals(prefix, context)
    chosen = log_p.gather(1, positions.unsqueeze(2).expand(-1, -1, log_p.shape[2]))
    log_p = chosen.gather(2, values.gather(1, positions).clamp(min=0).unsqueeze(2)).squeeze(2)
    residuals = f_prefix.unsqueeze(1) + log_p - f_grown
    return torch.where(valid, residuals, torch.zeros_like(residuals)), valid


def segment_residuals(
    marginals: Marginals,
    conditionals: Conditionals,
    values: Tensor,
    ranks: Tensor,
    start: Tensor,
    length: int,
    context: Tensor | None = None,
) -> Tensor:
    """The residual of a stretch of the order: ``length`` steps from ``start``, or as many as there are; ``(B,)``."""
    count = (values >= 0).sum(1)
    stop = torch.minimum(start + length, count)
    order = ranks.argsort(1)
    total = torch.zeros(len(values), device=values.device)
    for i in range(length):
        step = start + i
        log_p = conditionals(hide(values, ranks < step.unsqueeze(1)), context)
        position = order.gather(1, step.clamp(max=values.shape[1] - 1).unsqueeze(1)).squeeze(1)
        picked = pick(log_p, values, position)
        total = total + torch.where(step < count, picked, torch.zeros_like(picked))
    ends = torch.cat([hide(values, ranks < start.unsqueeze(1)), hide(values, ranks < stop.unsqueeze(1))])
    f = marginals(ends, None if context is None else torch.cat([context, context]))
    return f[: len(values)] + total - f[len(values) :]


def sum_rule_residuals(
    marginals: Marginals,
    cardinalities: Tensor,
    values: Tensor,
    positions: Tensor,
    context: Tensor | None = None,
    levels: int | None = None,
) -> Tensor:
    """``log sum_k exp f(x_S, x_j = k) - f(x_S)`` at one missing variable j of each row, ``(B,)``; no conditionals.

    ``levels`` is the largest cardinality, where it is known; else it is read from the device.
    """
    largest = int(cardinalities.max()) if levels is None else levels
    grown, impossible = _all_values(cardinalities, values, positions, largest)
    repeats = grown.shape[1]
    repeated = None if context is None else torch.cat([context, context.repeat_interleave(repeats, 0)])
    f = marginals(torch.cat([values, grown.flatten(0, 1)]), repeated)
    children = f[len(values) :].view(-1, repeats).masked_fill(impossible, -math.inf)
    return children.logsumexp(1) - f[: len(values)]


def _all_values(cardinalities: Tensor, values: Tensor, positions: Tensor, largest: int) -> tuple[Tensor, Tensor]:
    """Each row with every value at one position, ``(B, K, D)``, and which of them do not exist, ``(B, K)``."""
    levels = torch.arange(largest, device=values.device)
    impossible = levels >= cardinalities.to(values.device)[positions].unsqueeze(1)
    grown = values.unsqueeze(1).expand(-1, len(levels), -1).clone()
    level = levels.expand(len(values), -1).masked_fill(impossible, 0)
    grown.scatter_(2, positions[:, None, None].expand(-1, len(levels), 1), level.unsqueeze(2))
    return grown, impossible


class SelfConsistency(nn.Module):
    """Mean squared violation of self-consistency on the rows of a batch, times their number of variables.

    Args:
        marginals: module ``(values, context) -> (B,)``; its parameters are learned.
        conditionals: module of log-probabilities ``(B, D, K)``.
        cardinalities: number of values of each variable ``(D,)``.
        loss: ``"pair"`` (the paper's residual of one variable), ``"segment"`` (a stretch of the order),
            ``"sum_rule"`` (of the conditionals, it needs those of the last variable of an order alone, in pairs that
            are added: any consistent law, such as independence, keeps the sum rule, and those single out the right
            one), or ``"kl"``, the divergence of the conditionals read off f from those of the network, plus the sum
            rule, without which the level of f would be free.
        learn_conditionals: whether the conditionals' parameters are learned too.
        depth: law of the size of S, ``"uniform"`` or ``"poisson"`` (see ``draw_depth``).
        length: steps of a segment.
        children: residuals to one prefix, with ``"pair"``.
        anchor: if given, ``(f(nothing observed) - anchor)^2`` is added; not needed where f is 0 there by structure.
    """

    cardinalities: Tensor

    def __init__(
        self,
        marginals: nn.Module,
        conditionals: nn.Module,
        cardinalities: Tensor,
        *,
        loss: str = "pair",
        learn_conditionals: bool = False,
        depth: str = "uniform",
        length: int = 8,
        children: int = 1,
        anchor: float | None = None,
    ) -> None:
        super().__init__()
        if loss not in _LOSSES:
            raise ValueError(f"loss must be one of {_LOSSES}, got {loss!r}")
        if depth not in _DEPTHS:
            raise ValueError(f"depth must be one of {_DEPTHS}, got {depth!r}")
        for name, count in (("length", length), ("children", children)):
            if isinstance(count, bool) or not isinstance(count, int) or count < 1:
                raise ValueError(f"{name} must be an integer of at least 1, got {count!r}")
        self.marginals = marginals
        self._frozen = (conditionals,)  # in a tuple: neither learned nor put into train mode
        if learn_conditionals:
            self.conditionals = conditionals
        self.learn_conditionals = learn_conditionals
        self.loss, self.depth, self.length, self.num_children, self.anchor = loss, depth, length, children, anchor
        self.register_buffer("cardinalities", cardinalities, persistent=False)
        self._levels = int(cardinalities.max())

    def forward(self, values: Tensor, context: Tensor | None = None) -> Tensor:
        """Scalar loss of the rows ``(B, D)``; fresh orders at each call."""
        ranks = random_ranks(values)
        count = (values >= 0).sum(1)
        depth = draw_depth(count, self.depth)
        if self.loss == "pair":
            r, valid = pair_residuals(self.marginals, self._log_p, values, ranks, depth, context, self.num_children)
            squared = r.square().sum(1) / valid.sum(1)
        elif self.loss == "segment":
            squared = segment_residuals(
                self.marginals, self._log_p, values, ranks, depth, self.length, context
            ).square()
        else:
            prefix = hide(values, ranks < depth.unsqueeze(1))
            position = ranks.argsort(1).gather(1, depth.unsqueeze(1)).squeeze(1)
            squared = sum_rule_residuals(
                self.marginals, self.cardinalities, prefix, position, context, self._levels
            ).square()
            if self.loss == "kl":
                squared = squared + self._divergence(prefix, position, context)
            else:
                r, _ = pair_residuals(self.marginals, self._log_p, values, ranks, count - 1, context)
                squared = squared + r.square().sum(1)
        total = values.shape[1] * squared.mean()
        if self.anchor is not None:
            empty = values[:1].new_full((1, values.shape[1]), -1)
            level = self.marginals(empty, None if context is None else context[:1])
            total = total + (level - self.anchor).square().mean()
        return total

    def _log_p(self, values: Tensor, context: Tensor | None) -> Tensor:
        if self.learn_conditionals:
            return self._frozen[0](values, context)
        with torch.no_grad():
            return self._frozen[0](values, context)

    def _divergence(self, prefix: Tensor, position: Tensor, context: Tensor | None) -> Tensor:
        """KL(p(x_j | x_S) || softmax_k f(x_S, k)) of each row."""
        at = position.unsqueeze(1)
        log_f = from_marginals(self.marginals, self.cardinalities, self._levels)(prefix, at, context)[:, 0]
        log_p = self._log_p(prefix, context)
        log_p = log_p.gather(1, at.unsqueeze(2).expand(-1, -1, log_p.shape[2])).squeeze(1)
        impossible = log_p == -math.inf  # in both; their difference would be NaN
        difference = log_p.masked_fill(impossible, 0) - log_f.masked_fill(impossible, 0)
        return (log_p.exp() * difference).sum(1)


class PathConsistency(nn.Module):
    """Self-consistency with the chain rule along given orders, whose values are known beforehand.

    The conditionals are frozen, so the chain rule of each row along an order is computed once (``complete``).  Each
    update compares ``f`` with it at one place T of the order: one evaluation of f, none of the conditionals.

    With ``u = f(nothing) + log p(x_T | order) - f(x_T)`` the loss is ``exp(u) - u - 1``, continued by its tangent
    above ``u = 1.5``.  Where orders disagree its minimum is the log of the mean of their densities, which is a
    normalised law over x_T for each T; that of the squared residual is the mean of their logs, whose exponentials add
    up to less than one.

    A share of the places is the end of the order, all that is observed: it is asked most, and densities differ most
    there.  Of the rest half are uniform, half of a density that falls from the empty set: there are few small sets,
    they are asked often, and f must bend most between them.

    Args:
        marginals: module ``(values, context) -> (B,)``; its parameters are learned.  At the empty set it is taken as it
            stands.
        whole: share of the rows at which all that is observed is compared, whatever else is drawn.
        pairs: exact targets of sets of one and two variables, whose loss is added in training.
    """

    def __init__(self, marginals: nn.Module, whole: float = 0.5, pairs: PairMarginals | None = None) -> None:
        super().__init__()
        if not 0 <= whole <= 1:
            raise ValueError(f"whole must be between 0 and 1, got {whole!r}")
        self.marginals, self.whole, self.pairs = marginals, whole, pairs

    def forward(self, values: Tensor, ranks: Tensor, path: Tensor, context: Tensor | None = None) -> Tensor:
        """Mean loss.

        Args:
            values: rows ``(B, D)``.
            ranks: ``(B, D)``.
            path: ``chain_rule`` of them ``(B, D + 1)``.
            context: ``(B, C)`` or None.
        """
        count = (values >= 0).sum(1)
        u = torch.rand(count.shape, device=count.device)
        skewed = torch.rand(count.shape, device=count.device) < 0.5
        stop = torch.minimum((torch.where(skewed, u.square(), u) * count).long() + 1, count)
        stop = torch.where(torch.rand(count.shape, device=count.device) < self.whole, count, stop)
        empty = values.new_full((1, values.shape[1]), -1)
        with torch.no_grad():  # f(nothing | context): its own row each
            level = self.marginals(empty if context is None else empty.expand(len(values), -1), context)
        after = self.marginals(hide(values, ranks < stop.unsqueeze(1)), context)
        loss = _log_mean_loss(level + path.gather(1, stop.unsqueeze(1))[:, 0] - after).mean()
        if self.pairs is not None and self.training:
            loss = loss + _PAIRS * self.pairs(self.marginals)
        return loss


def _log_mean_loss(u: Tensor) -> Tensor:
    """``exp(u) - u - 1``, and above 1.5 its tangent, so that a row far from learned moves f no faster than others."""
    low = u.clamp(max=_STEEPEST)
    return torch.expm1(low) - low + math.expm1(_STEEPEST) * (u - low)


class Penalised(nn.Module):
    """``likelihood + weight * consistency``: both networks at once.

    Args:
        likelihood: objective of the batch.
        consistency: objective of the batch, and of as many rows from ``chains`` or ``pool`` beside it.
        weight: of the second.
        chains: chains of the model, which move at each update.
        pool: rows ``(M, D)``, of which some are drawn.
        own_rows: whether consistency is asked of the batch itself too.
    """

    pool: Tensor | None

    def __init__(
        self,
        likelihood: MaskedCompletion,
        consistency: SelfConsistency,
        weight: float = 1.0,
        *,
        chains: PersistentChains | None = None,
        pool: Tensor | None = None,
        own_rows: bool = True,
    ) -> None:
        super().__init__()
        self.likelihood, self.consistency, self.weight = likelihood, consistency, weight
        self.chains, self.own_rows = chains, own_rows
        self.register_buffer("pool", pool, persistent=False)

    def forward(self, values: Tensor, context: Tensor | None = None) -> Tensor:
        """Scalar loss."""
        loss = self.likelihood(values, context)
        rows = [values] if self.own_rows else []
        if self.chains is not None:
            rows.append(self.chains.advance(self.likelihood.conditionals)[0])
        if self.pool is not None:
            rows.append(self.pool[torch.randint(len(self.pool), (len(values),), device=values.device)])
        return loss + self.weight * self.consistency(torch.cat(rows), context)
