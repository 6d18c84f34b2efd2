"""What a marginalization model can be asked: marginals, conditionals, draws, and how far to trust them.

With f(x_S) for ``log p(x_S)`` and the conditionals' network (Liu, Ramadge and Adams, ICML 2024, arXiv 2310.12920):

    log p(x_U | x_V) = f(x_U, x_V) - f(x_V)                                        two passes
    log p(x_S) = log 1/R sum_r prod_d p(x_{o_r(d)} | x_{o_r(<d)})                  the chain rule along R orders
    p(x_j = k | x_S) = exp f(x_S, x_j = k) / sum_l exp f(x_S, x_j = l)             conditionals of f (equation 6)
"""

import math
from typing import Any

import torch
from torch import Tensor

from inference.any_order import (
    AncestralDraws,
    ancestral,
    as_proposal,
    block_gibbs,
    chain_rule,
    from_marginals,
    hide,
    random_ranks,
)
from inference.objectives.self_consistency import pair_residuals, sum_rule_residuals
from inference.runtime.generators import generator
from ppl_models.base import check_count
from ppl_models.marginalization_model.core import MarginalizationNetworks
from ppl_models.marginalization_model.results import AutoregressiveLogProb, ConsistencyReport, MarginalEstimate

__all__ = ["Queries"]

_SOURCES = ("conditional", "marginal")
_MOST_COMPLETIONS = 1024  # of a row, summed exactly


class Queries(MarginalizationNetworks):
    """The queries.  Values are integers ``(B, D)`` with -1 for missing; random numbers come from ``seed``."""

    # ------------------------------------------------------------------ densities
    @torch.no_grad()
    def log_prob(self, x: Any, context: Any = None, *, refine: int = 0, seed: int = 0) -> Tensor:
        """log p of the observed part of each row, ``(B,)``, in one network pass; 0 where nothing is observed.

        Args:
            x: ``(B, D)``, -1 where missing.
            context: ``(B, C)``.
            refine: instead of one pass: after a fit to data, the chain rule over the observed part along so many
                random orders (their ensemble); after a fit to an energy, the sum over the missing part, exact if it
                has at most 1024 states, else by so many draws of the conditionals as importance sampling.
            seed: of the orders or draws.

        Raises:
            TypeError, ValueError: bad values, context or count.
        """
        values = self._check_values("x", x)
        c = self._check_context(context, len(values))
        if check_count("refine", refine, 0):
            return self._refined(values, c, refine, seed)
        return self._in_chunks(self._log_marginal, values, c)

    @torch.no_grad()
    def log_prob_with_error(
        self,
        x: Any,
        context: Any = None,
        *,
        num_steps: int = 16,
        refine: int = 0,
        refine_above: float = 0.0,
        seed: int = 0,
    ) -> MarginalEstimate:
        """log p of the observed part with an error bar.

        Along an order the residuals ``r`` of all n steps add up to the chain rule less the one-pass value, so n times
        the mean residual of random steps estimates that gap without bias.  The error bar is the root of the squared
        estimate plus its squared standard error.

        Args:
            x, context: as in ``log_prob``.
            num_steps: residuals looked at, each one pass of either network.
            refine: rows whose error is above ``refine_above`` are computed anew as by ``log_prob(refine=...)``; their
                error stays that of one pass.  0: none are.
            refine_above: nats.
            seed: of the steps.
        """
        values = self._check_values("x", x)
        c = self._check_context(context, len(values))
        check_count("num_steps", num_steps, 2)
        value = self._in_chunks(self._log_marginal, values, c)
        gap, gap_error = self._gap(values, c, num_steps, seed)
        error = torch.hypot(gap, gap_error)
        refined = (error > refine_above) & bool(check_count("refine", refine, 0))
        if bool(refined.any()):
            value = value.clone()
            value[refined] = self._refined(values[refined], None if c is None else c[refined], refine, seed)
        return MarginalEstimate(value, error, refined)

    @torch.no_grad()
    def log_conditional(self, x: Any, query: Any, given: Any, context: Any = None) -> Tensor:
        """``log p(x_query | x_given)``, ``(B,)``: the difference of two log-marginals.

        Args:
            x: ``(B, D)``; must be observed wherever query or given is true.
            query, given: masks ``(B, D)`` or ``(D,)`` that do not overlap.
            context: ``(B, C)``.

        Raises:
            TypeError, ValueError: bad values or masks.
        """
        values = self._check_values("x", x)
        c = self._check_context(context, len(values))
        asked, known = self._check_mask("query", query, values), self._check_mask("given", given, values)
        if bool((asked & known).any()):
            row, column = (int(i) for i in (asked & known).nonzero()[0])
            raise ValueError(f"query and given overlap, first at row {row}, column {column}")
        if bool(((asked | known) & (values < 0)).any()):
            row, column = (int(i) for i in ((asked | known) & (values < 0)).nonzero()[0])
            raise ValueError(f"x is missing at row {row}, column {column}, where query or given is true")
        both = self._in_chunks(self._log_marginal, hide(values, asked | known), c)
        return both - self._in_chunks(self._log_marginal, hide(values, known), c)

    @torch.no_grad()
    def conditional_logits(self, x: Any, context: Any = None) -> Tensor:
        """``log p(x_j = k | observed part)`` of every variable, ``(B, D, K)``; an observed one has all its mass on its
        value.

        Raises:
            TypeError, ValueError: bad values or context.
        """
        values = self._check_values("x", x)
        log_p = self._in_chunks(self.conditionals, values, self._check_context(context, len(values)))
        levels = torch.arange(log_p.shape[2], device=values.device)
        known = torch.zeros_like(log_p).masked_fill(values.unsqueeze(2) != levels, -math.inf)
        return torch.where((values >= 0).unsqueeze(2), known, log_p)

    @torch.no_grad()
    def log_prob_autoregressive(
        self, x: Any, orders: int = 5, context: Any = None, seed: int = 0
    ) -> AutoregressiveLogProb:
        """log p of the observed part by the chain rule along random orders: as many passes as variables are observed.

        Args:
            x: ``(B, D)``, -1 where missing.
            orders: random orders of each row.
            context: ``(B, C)``.
            seed: of the orders.

        Raises:
            TypeError, ValueError: bad values, context or count.
        """
        values = self._check_values("x", x)
        c = self._check_context(context, len(values))
        log_p = self._along_orders(values, c, check_count("orders", orders), seed)
        spread = log_p.std(0, correction=0)
        return AutoregressiveLogProb(log_p.mean(0), log_p.logsumexp(0) - math.log(orders), spread)

    def _along_orders(self, values: Tensor, context: Tensor | None, orders: int, seed: int) -> Tensor:
        """``(orders, B)``."""
        repeated = values.repeat(orders, 1)
        ranks = random_ranks(repeated, generator(seed, "orders", device=values.device))
        c = None if context is None else context.repeat(orders, 1)
        path = self._in_chunks(lambda v, r, k: chain_rule(self.conditionals, v, r, k)[:, -1], repeated, ranks, c)
        return path.view(orders, -1)

    # ------------------------------------------------------------------ trust
    @torch.no_grad()
    def consistency_report(
        self, x: Any, context: Any = None, *, num_steps: int = 16, seed: int = 0
    ) -> ConsistencyReport:
        """How far f is from consistent at these rows: the sum rule over each missing variable, and the gap to the chain
        rule.

        Args:
            x, context: as in ``log_prob``.
            num_steps: random steps for the gap.
            seed: of the steps.
        """
        values = self._check_values("x", x)
        c = self._check_context(context, len(values))
        check_count("num_steps", num_steps, 2)
        sum_rule = torch.full(values.shape, math.nan, device=values.device, dtype=self._weight.dtype)
        rows, columns = (values < 0).nonzero(as_tuple=True)
        if len(rows):

            def violation(v: Tensor, j: Tensor, k: Tensor | None) -> Tensor:
                return sum_rule_residuals(self.marginals, self.cardinalities, v, j, k)

            picked = None if c is None else c[rows]
            sum_rule[rows, columns] = self._in_chunks(violation, values[rows], columns, picked)
        return ConsistencyReport(sum_rule, *self._gap(values, c, num_steps, seed))

    def _gap(self, values: Tensor, context: Tensor | None, num_steps: int, seed: int) -> tuple[Tensor, Tensor]:
        """Chain rule less one pass, estimated from random steps of random orders, and its standard error."""
        count = (values >= 0).sum(1)
        draw = generator(seed, "steps", device=values.device)
        found = []
        for _ in range(num_steps):
            ranks = random_ranks(values, draw)
            u = torch.rand(len(values), generator=draw, device=values.device)
            depth = torch.minimum((u * count).long(), (count - 1).clamp(min=0))

            def residual(v: Tensor, r: Tensor, d: Tensor, c: Tensor | None) -> Tensor:
                return pair_residuals(self.marginals, self.conditionals, v, r, d, c)[0][:, 0]

            found.append(self._in_chunks(residual, values, ranks, depth, context) * count)
        r = torch.stack(found)
        return r.mean(0), r.std(0) / math.sqrt(num_steps)

    # ------------------------------------------------------------------ draws
    @torch.no_grad()
    def sample(
        self,
        n: int,
        order: Any = None,
        context: Any = None,
        seed: int = 0,
        *,
        block: int = 1,
        candidates: int = 1,
        source: str = "conditional",
    ) -> Tensor:
        """Draws ``(n, D)``.

        Args:
            n: number of draws.
            order: of drawing ``(D,)``; by default a random one for each draw.
            context: ``(n, C)``.
            seed: same seed, same draws.
            block: variables drawn in one pass, as if independent given the rest.
            candidates: proposals of a block, of which one is taken by its one-pass weight: mends what ``block`` breaks.
            source: ``"conditional"``, or ``"marginal"`` for the conditionals that f implies, of which each takes as
                many evaluations as the variable has values.

        Raises:
            TypeError, ValueError: bad arguments.
        """
        empty = self.cardinalities.new_full((check_count("n", n), self.num_variables), -1)
        return self._fill(empty, self._check_context(context, n), order, seed, block, candidates, source).values

    @torch.no_grad()
    def impute(
        self,
        x: Any,
        num_samples: int = 10,
        context: Any = None,
        seed: int = 0,
        *,
        block: int = 1,
        candidates: int = 1,
        source: str = "conditional",
    ) -> Tensor:
        """Draws of the missing given the observed, ``(num_samples, B, D)``; the arguments as in ``sample``.

        Raises:
            TypeError, ValueError: bad arguments.
        """
        values = self._check_values("x", x)
        c = self._check_context(context, len(values))
        repeated = values.repeat(check_count("num_samples", num_samples), 1)
        c = None if c is None else c.repeat(num_samples, 1)
        return self._fill(repeated, c, None, seed, block, candidates, source).values.view(num_samples, *values.shape)

    def _fill(
        self,
        values: Tensor,
        context: Tensor | None,
        order: Any,
        seed: int,
        block: int = 1,
        candidates: int = 1,
        source: str = "conditional",
    ) -> AncestralDraws:
        check_count("block", block)
        check_count("candidates", candidates)
        if source not in _SOURCES:
            raise ValueError(f"source must be one of {_SOURCES}, got {source!r}")
        draw = generator(seed, "draws", device=values.device)
        found = self._check_order(order)
        ranks = random_ranks(values, draw, missing_first=True)
        if found is not None:
            ranks = (found.argsort() + self.num_variables * (values >= 0)).argsort(1).argsort(1)
        if source == "conditional":
            propose = as_proposal(self.conditionals)
        else:
            propose = from_marginals(self.marginals, self.cardinalities)
        return ancestral(
            propose,
            values,
            ranks,
            context,
            block=block,
            candidates=candidates,
            marginals=self.marginals if candidates > 1 else None,
            generator=draw,
        )

    @torch.no_grad()
    def gibbs(
        self, x: Any, steps: int, block: int = 4, context: Any = None, seed: int = 0, *, free: Any = None
    ) -> Tensor:
        """Complete rows after so many blocks of Gibbs sampling by the conditionals, ``(B, D)``.

        Args:
            x: complete rows ``(B, D)``.
            steps: blocks.
            block: variables redrawn in each, one by one.
            context: ``(B, C)``.
            seed: same seed, same draws.
            free: mask of the variables that may change; all by default.

        Raises:
            TypeError, ValueError: bad arguments; a missing value (``impute`` first).
        """
        values = self._check_values("x", x, missing=False)
        c = self._check_context(context, len(values))
        check_count("steps", steps)
        size = min(check_count("block", block), self.num_variables)
        mask = None if free is None else self._check_mask("free", free, values)
        draw = generator(seed, "gibbs", device=values.device)
        return block_gibbs(self.conditionals, values, steps, size, c, free=mask, generator=draw)[0]

    # ------------------------------------------------------------------ slower, surer
    def _refined(self, values: Tensor, context: Tensor | None, draws: int, seed: int) -> Tensor:
        if self.marginals.kind == "data":
            log_p = self._along_orders(values, context, draws, seed)
            return log_p.logsumexp(0) - math.log(draws)
        nothing = torch.full_like(values[:1], -1)
        log_p = self._log_sum(values, draws, seed) - self._log_sum(nothing, max(draws, 4096), seed)
        return log_p.masked_fill((values < 0).all(1), 0.0)

    def _log_sum(self, values: Tensor, draws: int, seed: int) -> Tensor:
        """log of the sum of the energy's exponential over the missing variables of each row."""
        counts = torch.where(values < 0, self.cardinalities, torch.ones_like(values)).double().log().sum(1)
        few = counts <= math.log(_MOST_COMPLETIONS + 0.5)
        result = torch.empty(len(values), device=values.device, dtype=self._weight.dtype)
        if bool(few.any()):
            result[few] = self._sum_of_all(values[few])
        if not bool(few.all()):
            rows = values[~few]
            found = self._fill(rows.repeat(draws, 1), None, None, seed)
            weights = (self._energy(found.values) - found.log_prob).view(draws, -1)
            result[~few] = weights.logsumexp(0) - math.log(draws)
        return result

    def _sum_of_all(self, values: Tensor) -> Tensor:
        """The sum over every completion: number i of a row gives its missing values in mixed radix."""
        radix = torch.where(values < 0, self.cardinalities, torch.ones_like(values))
        stride = radix.cumprod(1) // radix
        total = radix.prod(1)
        index = torch.arange(int(total.max()), device=values.device)
        digits = (index[None, :, None] // stride[:, None, :]) % radix[:, None, :]
        filled = torch.where((values < 0).unsqueeze(1), digits, values.unsqueeze(1))
        log_f = self._energy(filled.flatten(0, 1)).view(len(values), -1)
        return log_f.masked_fill(index >= total.unsqueeze(1), -math.inf).logsumexp(1)

    def _energy(self, values: Tensor) -> Tensor:
        """The target of ``fit_energy`` at complete rows."""
        raise NotImplementedError
