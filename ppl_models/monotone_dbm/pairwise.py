"""Pairwise models over categorical variables and the queries that they answer by mean field.

    log p~(x) = 1/2 x' Phi x + b' x,      x the stacked one-hot codes of G variables

Every query is "given these variables, what about the others": observed states ``(B, G)`` and a mask ``(B, G)`` that is
True where they are known, another one in each row if need be.
"""

from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from typing import Any, ClassVar, NamedTuple

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn

from inference.citation import Paper
from inference.fixed_point import FixedPoint, attach_gradient
from inference.newton_cg import solve_adjoint
from inference.results.brief import brief
from ppl_models.base import Model, to_tensor
from ppl_models.monotone_dbm.groups import Groups
from ppl_models.monotone_dbm.mean_field import MeanFieldProblem, extreme_eigenvalues, solve
from ppl_models.monotone_dbm.operators import PairwiseMap, PairwiseOperator

__all__ = ["MeanField", "PairwiseModel", "Query", "to_mask"]

_AT_ONCE = 1 << 20  # numbers in the queries that are answered at once
_ADJOINT = {torch.float64: 1e-9, torch.float32: 1e-4}


@brief
class MeanField(NamedTuple):
    """Mean-field marginals of B queries.

    Attributes:
        probabilities: ``(B, G, K)``, zero beyond a group's own states; one-hot in observed groups.
        iterations: of the solver, ``(B,)``: Newton steps, sweeps or updates.
        residual: largest ``|softmax(Phi q + b) - q|``, ``(B,)``.
        converged: whether that is within the tolerance, ``(B,)``.  Rows that are not are the best iterate.
        free_energy: F ``(B,)``; ``-F`` is a lower bound of the log of the sum of p~ over what is not observed.
        products: products with Phi, each of the whole batch.
    """

    probabilities: Tensor
    iterations: Tensor
    residual: Tensor
    converged: Tensor
    free_energy: Tensor
    products: int


class Query(NamedTuple):
    """Checked observations.

    Attributes:
        states: ``(B, G)``; zero where not observed.
        mask: ``(B, G)``, True where observed.
    """

    states: Tensor
    mask: Tensor


def to_mask(mask: Any) -> Tensor:
    """A mask of true and false, or of ones and zeros, as a boolean tensor.

    Raises:
        TypeError, ValueError: not an array, or other values.
    """
    try:
        known = mask if isinstance(mask, Tensor) else torch.as_tensor(np.asarray(mask))
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"mask must be a boolean tensor or array, got {type(mask).__name__}") from error
    if known.dtype != torch.bool and not bool(((known == 0) | (known == 1)).all()):
        raise ValueError("mask must be boolean, True where observed; it holds other values than 0 and 1")
    return known.bool()


def _shown(observed: Any, mask: Any) -> Tensor:
    """States as a tensor, zero where they are not observed: nothing looks there, it may be NaN."""
    if not isinstance(observed, Tensor):
        try:
            observed = torch.as_tensor(np.asarray(observed))
        except (TypeError, ValueError, RuntimeError):
            return to_tensor("observed", observed)  # which says what is wrong
    if mask is not None and observed.is_floating_point():
        with suppress(RuntimeError):  # shapes that do not fit are refused where they are compared
            observed = torch.where(to_mask(mask).to(observed.device), observed, torch.zeros_like(observed))
    return to_tensor("observed", observed)


class PairwiseModel(Model):
    """What all pairwise models share; see :class:`MonotoneDBM` for the queries' meaning.

    Args:
        operator: makes Phi.

    Attributes:
        groups: the layout of the variables.
        bias: b ``(N,)``.
        log_temperature: of the tempered predictive, ``(G,)``: logits are multiplied by its exponential.
        summed: a group c that mean field does not factorise but that is summed over exactly: the family is ``q(x, c) =
            q(c) prod_g q_g(x_g | c)`` (cutset conditioning, Pearl 1988; a mixture of mean fields, Jaakkola and Jordan
            1998), whose free energy is ``sum_c q(c) (F_c + log q(c))`` with F_c the free energy where c is held.  It
            falls apart into a mean field for each state of c and ``q(c)`` proportional to ``exp(-F_c)``: one answer
            to every query if each has one, however strongly c couples to the others, and ``-F = log sum_c exp(-F_c)``
            is a bound of log Z that is never below that of plain mean field.
        most: states of the summed group that are summed over at most, those which seem the most probable ones where
            the other groups do not interact.  The others' share of the sum is dropped, and the bound holds.
        styled: whether the last group is one of styles, which rows and masks may leave out.
    """

    summed: int | None = None
    most: int | None = None
    styled: bool = False

    papers: ClassVar[tuple[Paper, ...]] = (
        Paper(
            "article",
            "feng2023monotone",
            author="Feng, Zhili and Winston, Ezra and Kolter, J. Zico",
            title="Monotone Deep {B}oltzmann Machines",
            journal="Transactions on Machine Learning Research",
            year=2023,
        ),
    )

    def __init__(self, operator: PairwiseOperator) -> None:
        super().__init__()
        self.operator = operator
        self.groups: Groups = operator.groups
        self.bias = nn.Parameter(torch.zeros(self.groups.num_states))
        self.log_temperature = nn.Parameter(torch.zeros(self.groups.num_groups))

    # ------------------------------------------------------------------ the energy
    def potentials(self) -> Tensor:
        """Phi ``(N, N)``, symmetric and zero inside the groups."""
        with torch.no_grad():
            return self.operator.to_dense()

    def spectrum(self) -> tuple[float, float]:
        """Smallest and largest eigenvalue of Phi (of a large model widened bounds of them)."""
        with torch.no_grad():
            return extreme_eigenvalues(self.operator.prepare(), self.bias)

    def log_density(self, states: Any) -> Tensor:
        """``log p~`` of configurations ``(..., G)``: ``(...)``, differentiable in the parameters."""
        x = self.groups.one_hot(self._check_states("states", states), self.bias.dtype)
        flat = x.reshape(-1, x.shape[-1])
        made = (flat * (0.5 * self.operator.prepare().apply(flat) + self.bias)).sum(1)
        return made.reshape(x.shape[:-1])

    def forward(self, observed: Any = None, mask: Any = None) -> Tensor:
        """The Pyro model: one Categorical site ``x_0``, ``x_1``, ... a group in the plate ``batch``, whose base measure
        is one everywhere, and the factor ``energy``.

        With ``mask`` the sites are half observed: Pyro splits them into ``x_g_observed`` and ``x_g_unobserved``.

        Returns:
            The states ``(B, G)``; with enumerated sites their broadcast, ``(..., B, G)``.
        """
        query = None if observed is None and mask is None else self._query(observed, mask)
        rows = 1 if query is None else len(query.states)
        phi = self.operator.to_dense()
        values = []
        with pyro.plate("batch", rows):
            for g, size in enumerate(self.groups.sizes):
                # As a tensor: the bare False would make zeros of the default dtype.
                nowhere = torch.zeros((), dtype=torch.bool, device=self.bias.device)
                base = dist.Categorical(logits=self.bias.new_zeros(rows, size)).mask(nowhere)
                options: dict[str, Any] = {}
                if query is not None and bool(query.mask[:, g].all()):
                    options = {"obs": query.states[:, g]}
                elif query is not None and bool(query.mask[:, g].any()):
                    options = {"obs": query.states[:, g], "obs_mask": query.mask[:, g]}
                values.append(pyro.sample(f"x_{g}", base, **options))
            states = torch.stack(torch.broadcast_tensors(*values), -1)
            x = self.groups.one_hot(states, self.bias.dtype)
            pyro.factor("energy", (x * (0.5 * (x @ phi) + self.bias)).sum(-1))
        return states

    def guide(self, observed: Any = None, mask: Any = None) -> None:
        """The mean-field guide: independent Categoricals of the free groups at the fixed point, given the summed group
        where there is one.
        """
        query = self._query(observed, mask)
        cases = self.cases(query)
        found = self.marginals(cases.states, cases.mask, differentiable=torch.is_grad_enabled())
        probabilities, chosen = found.probabilities, self.summed
        with pyro.plate("batch", len(query.states)):
            if cases is not query and chosen is not None:
                # The others are drawn given this one, which comes first.
                tried = cases.states[:, chosen].view(len(query.states), -1)
                q = dist.Categorical(logits=self._wide(self.log_shares(query, cases, found.free_energy), tried))
                free = ~query.mask[:, chosen]
                state = pyro.sample(f"x_{chosen}" + "_unobserved" * (not bool(free.all())), q.mask(free))
                state = torch.where(free, state, query.states[:, chosen])
                place = (tried == state[:, None]).long().argmax(1)
                probabilities = probabilities.unflatten(0, tried.shape)[torch.arange(len(state)), place]
            for g, size in enumerate(self.groups.sizes):
                free = ~query.mask[:, g]
                q = dist.Categorical(probs=probabilities[:, g, :size])
                if g == chosen and cases is not query:
                    continue
                if bool(free.all()):
                    pyro.sample(f"x_{g}", q)
                elif bool(free.any()):
                    pyro.sample(f"x_{g}_unobserved", q.mask(free))

    # ------------------------------------------------------------------ queries
    def marginals(
        self,
        observed: Any = None,
        mask: Any = None,
        solver: str = "newton",
        *,
        initial: Tensor | None = None,
        tolerance: float | None = None,
        max_iterations: int | None = None,
        step_size: float | None = None,
        anderson: bool = False,
        callback: Callable[[int, Tensor], None] | None = None,
        differentiable: bool = False,
    ) -> MeanField:
        """Mean-field marginals of what is not observed.

        Args:
            observed: states ``(B, G)`` or ``(G,)``; entries where the mask is False are not looked at.
            mask: True where observed, ``(B, G)`` or ``(G,)``.  Without it all of ``observed`` is.
            solver: ``"newton"``, ``"coordinate"``, ``"parallel"``, ``"damped"``, ``"mirror"``,
                ``"forward_backward"``, ``"peaceman_rachford"``, ``"krahenbuhl"`` (see ``mean_field``).
            initial: first probabilities ``(B, G, K)``; one step from uniform by default.
            tolerance: on the residual; 1e-10 in float64 and 2e-5 in float32 by default.
            max_iterations, step_size, anderson, callback: as in ``mean_field.solve``.
            differentiable: keep the graph of ``probabilities`` and ``free_energy`` to the parameters, through the
                implicit function theorem.

        Returns:
            Marginals with what the solver says of each query.

        Raises:
            TypeError, ValueError: shapes, states out of range, an unknown solver.
        """
        query = self._query(observed, mask)
        cases = self.cases(query)
        each = len(cases.states) // len(query.states)
        with torch.set_grad_enabled(differentiable):
            phi = self.phi_of(cases)
            problem = self.problem(phi.detach(), cases)
            start = None
            if initial is not None:
                start = self._from_padded(initial, len(query.states)).repeat_interleave(each, 0)
            with torch.no_grad():
                colours = self.colours(phi.matrix) if solver == "coordinate" else None
                found = solve(
                    problem,
                    phi.detach(),
                    solver,
                    initial=start,
                    tolerance=tolerance,
                    max_iterations=max_iterations,
                    step_size=step_size,
                    anderson=anderson,
                    colours=colours,
                    callback=callback,
                )
            logits = self.attach(phi, problem, found) if differentiable else found.value
            q = problem.response(logits)
            energy = self.energies(phi, problem, logits)
            steps, residual, converged = found.iterations, found.residual, found.converged
            if each > 1:
                shares = self.log_shares(query, cases, energy)
                q = (shares.softmax(1)[:, :, None] * q.unflatten(0, (-1, each))).sum(1)
                energy = -shares.logsumexp(1)
                steps, residual = (x.view(-1, each).amax(1) for x in (steps, residual))
                converged = converged.view(-1, each).all(1)
        return MeanField(self.groups.padded(q), steps, residual, converged, energy, found.evaluations)

    def predictive(self, observed: Any = None, mask: Any = None, **options: Any) -> Tensor:
        """Tempered probabilities ``(B, G, K)`` for prediction, one-hot in observed groups.

        The bound on Phi bounds how sharp mean field can be; ``log_temperature``, learned in training or by
        ``calibrate``, makes up for it.  These are not the model's marginals.

        Args:
            observed, mask, options: as in :meth:`marginals`.

        Raises:
            RuntimeError: a query did not converge (with a solver other than the default).
        """
        query = self._query(observed, mask)
        made = []
        for part in [query] if options else self._chunks(query):
            with torch.no_grad():
                q = self.groups.softmax(self.predictive_logits(part, **options))
                made.append(self.groups.padded(torch.where(self._free(part), q, self._clamped(part))))
        return torch.cat(made)

    def complete(self, observed: Any = None, mask: Any = None) -> Tensor:
        """The observed states, and the most probable state of each other group by the predictive, ``(B, G)``, without
        styles.
        """
        query = self._query(observed, mask)
        guess = self.predictive(observed, mask).argmax(-1)
        return torch.where(query.mask, query.states, guess)[:, : self.groups.num_groups - self.styled]

    def predictive_logits(self, query: Query, **options: Any) -> Tensor:
        """Tempered logits ``(B, N)`` of the predictive, without gradients."""
        cases = self.cases(query)
        logits = self.solved_logits(cases, **options)
        if cases is query:
            return self.tempered(logits)
        with torch.no_grad():
            phi = self.phi_of(cases)
            return self.mixed(query, cases, phi, logits, self.energies(phi, self.problem(phi, cases), logits))

    def solved_logits(self, query: Query, **options: Any) -> Tensor:
        """``Phi q + b`` ``(B, N)`` at the fixed points of the groups that are not held, without gradients; where there
        is a group to sum over it must be held.
        """
        with torch.no_grad():
            phi = self.phi_of(query)
            found = solve(self.problem(phi, query), phi, **options)
        if not bool(found.converged.all()):
            bad = int((~found.converged).sum())
            raise RuntimeError(
                f"{bad} of {len(found.converged)} queries did not converge (largest residual "
                f"{float(found.residual.max()):.2g}); use solver='newton', or a larger tolerance"
            )
        return found.value

    def tempered(self, logits: Tensor, sharp: Tensor | None = None) -> Tensor:
        """Logits ``(B, N)`` times the temperature factor of their group, but for the part that no bound flattens."""
        factor = self.groups.spread(self.log_temperature.exp())
        return logits * factor if sharp is None else torch.addcmul(sharp, logits - sharp, factor)

    # ------------------------------------------------------------------ the group that is summed over
    def cases(self, query: Query) -> Query:
        """The query with each of the k states of the summed group that are summed over, ``(B k, G)``, query by query;
        the query itself where there is nothing to sum over.
        """
        if self.summed is None or bool(query.mask[:, self.summed].all()):
            return query
        return self.all_cases(query)

    def all_cases(self, query: Query) -> Query:
        """:meth:`cases`, whatever is observed."""
        assert self.summed is not None
        rows, size, device = len(query.states), self.groups.sizes[self.summed], query.states.device
        column = torch.tensor([self.summed], device=device)
        if self.most is None or self.most >= size:
            each = torch.arange(size, device=device).repeat(rows)[:, None]
        else:
            with torch.no_grad():
                scores = self.operator.leanings(self.bias, self._clamped(query), self._free(query))
            known, given = query.mask[:, self.summed, None], query.states[:, self.summed, None]
            scores = scores.masked_fill(known & (given == torch.arange(size, device=device)), torch.inf)
            each = scores.topk(self.most, dim=1).indices.view(-1, 1)
            size = self.most
        states, mask = (x.repeat_interleave(size, 0) for x in query)
        return Query(states.index_copy(1, column, each), mask.index_fill(1, column, True))

    def energies(self, phi: PairwiseMap, problem: MeanFieldProblem, logits: Tensor) -> Tensor:
        """F at fixed points, with the gradient to the parameters: by the envelope theorem the explicit one, which that
        of q does not change.
        """
        at = problem.response(logits).detach()
        return replace(problem, bias=self._bias(phi)).energy(at, phi.apply(at))

    def log_shares(self, query: Query, cases: Query, energies: Tensor) -> Tensor:
        """``-F_c`` ``(B, k)`` of the cases' free energies ``(B k,)``; minus infinity where another is observed."""
        assert self.summed is not None
        made = -energies.view(len(query.states), -1)
        given, known = query.states[:, self.summed, None], query.mask[:, self.summed, None]
        return made.masked_fill(known & (given != cases.states[:, self.summed].view(made.shape)), -torch.inf)

    def _wide(self, shares: Tensor, tried: Tensor) -> Tensor:
        """Logarithms of all states' shares from those of the states ``tried``, both ``(B, k)``."""
        assert self.summed is not None
        size = self.groups.sizes[self.summed]
        if shares.shape[1] == size:
            return shares
        return shares.new_full((len(shares), size), -torch.inf).scatter(1, tried, shares)

    def mixed(self, query: Query, cases: Query, phi: PairwiseMap, logits: Tensor, energies: Tensor) -> Tensor:
        """Log-probabilities ``(B, N)`` of the tempered mixture over the cases."""
        assert self.summed is not None
        shares, inside = self._mixture(query, cases, phi, logits, energies)
        made = (inside + shares[:, :, None]).logsumexp(1)
        start, size = sum(self.groups.sizes[: self.summed]), self.groups.sizes[self.summed]
        wide = self._wide(shares, cases.states[:, self.summed].view(shares.shape))
        return torch.cat([made[:, :start], wide, made[:, start + size :]], 1)

    def predictive_cases(self, query: Query) -> tuple[Tensor, Tensor, Tensor]:
        """States of the summed group ``(B, k)``, their log-probabilities, and those of the other groups given each of
        them ``(B, k, N)``, by the tempered predictive and without gradients.
        """
        assert self.summed is not None
        cases = self.all_cases(query)
        logits = self.solved_logits(cases)
        with torch.no_grad():
            phi = self.phi_of(cases)
            energies = self.energies(phi, self.problem(phi, cases), logits)
            shares, inside = self._mixture(query, cases, phi, logits, energies)
            return cases.states[:, self.summed].view(shares.shape), shares, inside

    def _mixture(
        self, query: Query, cases: Query, phi: PairwiseMap, logits: Tensor, energies: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Own temperatures inside, and that of the summed group on ``-F_c``."""
        assert self.summed is not None
        shares = self.log_shares(query, cases, self.log_temperature[self.summed].exp() * energies).log_softmax(1)
        return shares, self.groups.log_softmax(self.tempered(logits, phi.sharp)).unflatten(0, shares.shape)

    # ------------------------------------------------------------------ parts
    def phi_of(self, cases: Query) -> PairwiseMap:
        """Phi for queries that hold the summed group, if there is one."""
        if self.summed is None:
            return self.operator.prepare()
        return self.operator.prepare_given(cases.states[:, self.summed])

    def problem(self, phi: PairwiseMap, query: Query) -> MeanFieldProblem:
        """The mean-field equations of a query."""
        bias = self._bias(phi).detach()
        return MeanFieldProblem(self.groups, phi.apply, bias, self._clamped(query), self._free(query))

    def _bias(self, phi: PairwiseMap) -> Tensor:
        return self.bias[None] if phi.field is None else self.bias + phi.field

    def attach(
        self,
        phi: PairwiseMap,
        problem: MeanFieldProblem,
        found: FixedPoint,
        *,
        tolerance: float | None = None,
        max_iterations: int = 200,
        wait: bool = True,
    ) -> Tensor:
        """The logits of the fixed point with their implicit gradient; options as in ``solve_adjoint``."""
        q = problem.response(found.value).detach()
        explicit = phi.apply(q) + self._bias(phi)
        product = phi.detach().apply
        options: dict[str, Any] = {"max_iterations": max_iterations, "wait": wait}
        options["tolerance"] = _ADJOINT.get(q.dtype, 1e-4) if tolerance is None else tolerance

        low_rank = phi.low_rank

        def adjoint(g: Tensor) -> Tensor:
            if low_rank is not None:  # (I - P Phi)^-1 g = g + P (I - Phi P)^-1 Phi g
                return g + problem.derivative(q, low_rank.direction(q, product(g)))
            return solve_adjoint(product, lambda v: problem.derivative(q, v), g, **options)

        return attach_gradient(explicit, adjoint)

    def colours(self, matrix: Tensor | None) -> list[Tensor]:
        """Groups that do not interact and may be updated at once, colour by colour."""
        return self.operator.colours(matrix)

    def _clamped(self, query: Query) -> Tensor:
        x = self.groups.one_hot(query.states, self.bias.dtype)
        return x * self.groups.spread(query.mask.to(x.dtype))

    def _free(self, query: Query) -> Tensor:
        return self.groups.spread(~query.mask)

    def _from_padded(self, values: Tensor, rows: int) -> Tensor:
        shape = (self.groups.num_groups, self.groups.largest)
        if values.dim() != 3 or tuple(values.shape[1:]) != shape or len(values) not in (1, rows):
            raise ValueError(f"initial must be ({rows}, {shape[0]}, {shape[1]}), got {tuple(values.shape)}")
        wide = values.to(self.bias).expand(rows, -1, -1)
        made = self.groups.join([wide[:, b.first : b.first + b.num, : b.size] for b in self.groups.blocks])
        if not bool(((made >= 0) & (made < torch.inf)).all()):
            raise ValueError("initial must hold probabilities; it has negative, NaN or infinite values")
        return made

    def _query(self, observed: Any, mask: Any) -> Query:
        """Observations as checked tensors on the model's device."""
        count, device = self.groups.num_groups, self.bias.device
        if observed is None:
            if mask is not None and bool(to_mask(mask).any()):
                raise ValueError("mask marks groups as observed, and observed gives no states")
            rows = 1 if mask is None or to_mask(mask).dim() < 2 else len(mask)
            zeros = torch.zeros(rows, count, dtype=torch.long, device=device)
            return Query(zeros, zeros.bool())
        states = _shown(observed, mask).to(device)
        known = torch.ones(states.shape, dtype=torch.bool) if mask is None else to_mask(mask)
        states, known = self._with_styles(states), self._with_styles(known).to(device)
        states, known = (x[None] if x.dim() == 1 else x for x in (states, known))
        if states.dim() != 2 or states.shape[1] != count:
            raise ValueError(f"observed must be (B, {count}), a state for each group, got {tuple(states.shape)}")
        if known.dim() != 2 or known.shape[1] != count or len({len(known), len(states)} - {1}) > 1:
            raise ValueError(f"mask must be {tuple(states.shape)}, as observed, got {tuple(known.shape)}")
        rows = max(len(known), len(states))
        states, known = states.expand(rows, -1), known.expand(rows, -1)
        kept = torch.where(known, states, torch.zeros_like(states))
        return Query(self._check_states("observed", kept), known)

    def _chunks(self, query: Query) -> list[Query]:
        """Rows that are answered at once: each makes a query for each state that is summed over."""
        cases = 1 if self.summed is None else self.most or self.groups.sizes[self.summed]
        rows = max(1, _AT_ONCE // (cases * self.groups.num_states))
        return [Query(*part) for part in zip(query.states.split(rows), query.mask.split(rows), strict=True)]

    def _with_styles(self, rows: Tensor) -> Tensor:
        """Rows or masks ``(..., G)`` with a column of zeros for the styles, if they leave it out."""
        if self.styled and rows.dim() and rows.shape[-1] == self.groups.num_groups - 1:
            return nn.functional.pad(rows, (0, 1))
        return rows

    def _check_states(self, name: str, states: Any) -> Tensor:
        """State numbers ``(..., G)`` as checked integers."""
        value = to_tensor(name, states).to(self.bias.device)
        if value.dim() == 0 or value.shape[-1] != self.groups.num_groups:
            raise ValueError(f"{name} must be (..., {self.groups.num_groups}), got {tuple(value.shape)}")
        whole = value.long()
        if value.is_floating_point() and not bool((whole == value).all()):
            raise ValueError(f"{name} must hold whole state numbers")
        sizes = torch.tensor(self.groups.sizes, device=value.device)
        bad = (whole < 0) | (whole >= sizes)
        if bool(bad.any()):
            where = tuple(bad.nonzero()[0].tolist())
            size = self.groups.sizes[where[-1]]
            raise ValueError(
                f"{name} holds state {int(whole[where])} at {where}; group {where[-1]} has states 0 to {size - 1}"
            )
        return whole
