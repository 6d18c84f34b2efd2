"""Monotone deep Boltzmann machines over categorical variables, and the machines without a bound beside them.

Feng, Winston and Kolter, "Monotone deep Boltzmann machines", TMLR 2023, arXiv 2307.04990: a pairwise model with
connections of any kind, hidden layers and within a layer, whose mean field has exactly one fixed point for every query.
"""

import itertools
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np
import torch
from torch import Tensor, nn

from inference.discrete_ais import discrete_ais
from inference.fit import fit
from inference.kernels.discrete_gibbs import DiscreteGibbs
from inference.mcmc import MCMC
from inference.objectives.contrastive import PersistentContrastiveDivergence
from inference.objectives.masked import Head, MaskedConditionals
from inference.objectives.mean_field_contrast import FreeEnergyContrast
from inference.objectives.pseudo_likelihood import PseudoLikelihood
from inference.results.evidence import LogPartition
from inference.runtime.generators import generator
from ppl_models.base import check_batch_size, check_count, check_counts, to_tensor
from ppl_models.monotone_dbm.beyond_mean_field import Correlations, correct, mixture
from ppl_models.monotone_dbm.calibration import scale_temperatures
from ppl_models.monotone_dbm.energy import PairwiseEnergy
from ppl_models.monotone_dbm.groups import Groups
from ppl_models.monotone_dbm.mean_field import solve
from ppl_models.monotone_dbm.operators import (
    Curvature,
    DenseOperator,
    FreeOperator,
    check_bound,
    check_potentials,
    factor_of,
    hollow,
)
from ppl_models.monotone_dbm.pairwise import PairwiseModel, Query
from ppl_models.monotone_dbm.training import DBMFit, conditional_of, one_cycle, slow_temperatures, to_query

__all__ = ["BoltzmannModel", "DeepBoltzmannMachine", "MonotoneDBM"]

_ENUMERABLE = 1_000_000
_OBJECTIVES = ("masked", "elbo", "pcd", "pseudo_likelihood")
_METHODS = ("ais", "sandwich", "exact", "mean_field")


class BoltzmannModel(PairwiseModel):
    """Sampling, log Z, corrections and training, which all pairwise models have alike."""

    # ------------------------------------------------------------------ beyond mean field
    def sample(self, num_chains: int, num_sweeps: int, observed: Any = None, mask: Any = None, seed: int = 0) -> Tensor:
        """States after each Gibbs sweep, ``(num_chains, num_sweeps, G)``, from uniform starts.

        Groups that do not interact are drawn together: a layer without inner connections in one step.

        Args:
            num_chains: independent chains.
            num_sweeps: sweeps; the first are still on their way from the start.
            observed, mask: what is held, ``(G,)`` for all chains or ``(num_chains, G)``.
            seed: same seed, same machine, same states to the bit.
        """
        check_count("num_chains", num_chains)
        check_count("num_sweeps", num_sweeps)
        query = self._query(observed, mask)
        if len(query.states) not in (1, num_chains):
            raise ValueError(f"observed must have one row, or one a chain ({num_chains}), got {len(query.states)}")
        kernel = DiscreteGibbs(energy=self._energy(query))
        mcmc = MCMC(kernel, num_sweeps, 0, num_chains=num_chains, seed=seed, progress=False)
        return mcmc.run().get_samples(group_by_chain=True)["states"]

    def log_partition(
        self,
        observed: Any = None,
        mask: Any = None,
        method: str = "ais",
        *,
        num_chains: int = 500,
        num_temperatures: int = 100,
        base: str = "uniform",
        seed: int = 0,
    ) -> LogPartition:
        """log of the sum of p~ over what is not observed: log Z without observations, and ``log p(observed)`` is the
        difference of the two.

        Args:
            observed, mask: one query, ``(G,)`` or ``(1, G)``.
            method: ``"ais"`` anneals Gibbs chains: a stochastic lower bound; ``"sandwich"`` both ways, with an
                approximate upper bound; ``"exact"`` enumerates up to a million configurations; ``"mean_field"`` is the
                bound -F.
            num_chains, num_temperatures, seed: of the annealing.
            base: where it starts: ``"uniform"`` or the ``"mean_field"`` marginals.

        Raises:
            TypeError, ValueError: bad arguments, several queries, or too many configurations to enumerate.
        """
        if method not in _METHODS:
            raise ValueError(f"method must be one of {', '.join(_METHODS)}, got {method!r}")
        if base not in ("uniform", "mean_field"):
            raise ValueError(f"base must be 'uniform' or 'mean_field', got {base!r}")
        query = self._query(observed, mask)
        if len(query.states) != 1:
            raise ValueError(f"log_partition answers one query, got {len(query.states)} rows")
        energy = self._energy(query, drop_held=True)
        if method == "exact":
            return _exact(self._enumerate(energy, query))
        if method == "mean_field" or base == "mean_field":
            found = self.marginals(query.states, query.mask)
            if method == "mean_field":
                bound = float(-found.free_energy)
                value = _exact(torch.tensor([bound], dtype=torch.float64))
                return value._replace(exact=False, upper=math.inf, method="mean field")
        start = None if base == "uniform" else energy.base_logits(found.probabilities[0])
        return discrete_ais(
            energy,
            base_logits=start,
            initial=query.states[0],
            num_chains=num_chains,
            num_temperatures=num_temperatures,
            both_ways=method == "sandwich",
            seed=seed,
        )

    def correlations(self, observed: Any = None, mask: Any = None) -> Correlations:
        """Marginals corrected to second order, covariances of all pairs by linear response, and log Z to second order.

        Args:
            observed, mask: as in :meth:`marginals`.
        """
        query = self._query(observed, mask)
        cases = self.cases(query)
        with torch.no_grad():
            logits = self.solved_logits(cases)
            problem, phi = self.problem(self.operator.prepare(), cases), self.phi_of(cases)
            found = correct(problem, self.operator.to_dense(), logits)
            if cases is query:
                return found
            plain = self.log_shares(query, cases, self.energies(phi, problem, logits))
            return mixture(found, self.groups, self.log_shares(query, cases, -found.log_partition), plain)

    def exact_marginals(self, observed: Any = None, mask: Any = None) -> Tensor:
        """The model's own marginals ``(1, G, K)`` by enumeration of up to a million configurations; one query."""
        query = self._query(observed, mask)
        if len(query.states) != 1:
            raise ValueError(f"exact_marginals answers one query, got {len(query.states)} rows")
        energy = self._energy(query, drop_held=True)
        log_p = self._enumerate(energy, query)
        weights = (log_p - log_p.logsumexp(0)).exp()
        x = self.groups.one_hot(self._configurations(query), log_p.dtype)
        return self.groups.padded((weights @ x)[None])

    def _configurations(self, query: Query) -> Tensor:
        choices = [
            [int(query.states[0, g])] if bool(query.mask[0, g]) else list(range(size))
            for g, size in enumerate(self.groups.sizes)
        ]
        total = math.prod(map(len, choices))
        if total > _ENUMERABLE:
            raise ValueError(
                f"about 1e{math.log10(total):.0f} configurations are too many to enumerate; at most {_ENUMERABLE:,}"
            )
        return torch.cartesian_prod(*[torch.tensor(c, device=self.bias.device) for c in choices]).reshape(total, -1)

    def _enumerate(self, energy: PairwiseEnergy, query: Query) -> Tensor:
        """log p~ of all configurations."""
        with torch.no_grad():
            return torch.cat([energy.log_density(part) for part in self._configurations(query).split(1 << 15)])

    def _energy(self, query: Query, *, drop_held: bool = False, colours: list[Tensor] | None = None) -> PairwiseEnergy:
        with torch.no_grad():
            phi = self.operator.prepare()
            sets = self.colours(phi.matrix) if colours is None else colours
            return PairwiseEnergy(self.groups, phi, self.bias, sets, query.states, query.mask, drop_held=drop_held)

    # ------------------------------------------------------------------ training
    def fit(
        self,
        observed: Any,
        mask: Any = None,
        *,
        objective: str = "masked",
        observed_fraction: float | tuple[float, float] = 0.4,
        labels: Sequence[int] = (),
        label_weight: float = 0.5,
        labels_shown: float = 0.0,
        num_steps: int = 1000,
        batch_size: int | None = 96,
        lr: float = 0.02,
        annealed: float = 0.0,
        num_chains: int = 96,
        num_sweeps: int = 1,
        seed: int = 0,
        progress: bool | Callable[[dict[str, Any]], None] = True,
        checkpoint: str | Path | None = None,
    ) -> DBMFit:
        """Learn the potentials from data; the parameters change in place.

        Args:
            observed: states ``(rows, G)``; hidden groups are those that the mask never marks.
            mask: which are data, ``(rows, G)`` or ``(G,)``; all without it.
            objective: ``"masked"`` hides some of each row's data and predicts them from the rest by mean field;
                ``"elbo"`` is the clamped minus the free free energy: no bound of the likelihood, and where couplings
                may be strong it finds ones whose free energy is far above ``-log Z``; ``"pcd"`` maximum likelihood with
                persistent Gibbs chains; ``"pseudo_likelihood"`` needs every group observed.
            observed_fraction: share that is shown to ``"masked"``; of a pair, drawn for each row between the two.
            labels: groups that ``"masked"`` scores on their own, with ``label_weight``.
            label_weight: share of their loss in the whole.
            labels_shown: share of the rows in which ``"masked"`` shows them, so that the others learn from them.
            batch_size: rows in a step; None for all. The default is all rows where there are fewer.
            num_steps, lr: of Adam with one cycle of rates; temperatures learn at a quarter of ``lr``.
            annealed: share of the fit over which the bound on Phi is widened from half to the whole of it.
            num_chains, num_sweeps: persistent chains, and their sweeps before an update.
            seed, progress, checkpoint: as in ``inference.fit``.

        Returns:
            The history.

        Raises:
            TypeError, ValueError: bad data or settings, before any work.
        """
        if objective not in _OBJECTIVES:
            raise ValueError(f"objective must be one of {', '.join(_OBJECTIVES)}, got {objective!r}")
        states = to_tensor("observed", observed)
        self.to(states.device)
        query = self._query(states, mask)
        visible = query.mask.any(0).nonzero()[:, 0]
        if not len(visible):
            raise ValueError("mask marks nothing as data: there is nothing to learn from")
        if bool(query.mask[:, visible].all()):
            data: tuple[Tensor, ...] = (query.states[:, visible],)
        else:
            if objective != "masked":
                raise ValueError(f"objective={objective!r} needs the same groups in every row; 'masked' does not")
            data = (query.states[:, visible], query.mask[:, visible])
        scored = self._heads(visible, labels, label_weight, labels_shown)
        loss = self._objective(
            objective,
            visible,
            scored,
            torch.arange(len(visible), device=visible.device),
            observed_fraction,
            num_steps=num_steps,
            annealed=annealed,
            num_chains=num_chains,
            num_sweeps=num_sweeps,
            seed=seed,
        )
        return self._run_fit(loss, objective, data, num_steps, batch_size, lr, seed, progress, checkpoint)

    @staticmethod
    def _heads(visible: Tensor, labels: Sequence[int], weight: float, shown: float) -> list[Head]:
        if not 0 <= weight <= 1:
            raise ValueError(f"label_weight must lie in [0, 1], got {weight!r}")
        columns = {g: i for i, g in enumerate(visible.tolist())}
        missing = [g for g in labels if g not in columns]
        if missing:
            raise ValueError(f"labels names groups {missing} without data")
        apart = [columns[g] for g in labels]
        rest = [i for i in columns.values() if i not in set(apart)]
        heads = [Head(torch.tensor(rest), 1 - weight if apart else 1.0)] if rest else []
        return heads + ([Head(torch.tensor(apart), weight if rest else 1.0, shown)] if apart else [])

    def _objective(
        self,
        kind: str,
        visible: Tensor,
        heads: Sequence[Head],
        unit_of: Tensor,
        observed_fraction: float | tuple[float, float],
        *,
        num_steps: int,
        annealed: float,
        num_chains: int,
        num_sweeps: int,
        seed: int,
    ) -> nn.Module:
        check_count("num_steps", num_steps)
        if not 0 <= annealed <= 1:
            raise ValueError(f"annealed must lie in [0, 1], got {annealed!r}")
        if kind == "masked":
            conditional = conditional_of(self, visible, annealed)
            return MaskedConditionals(self, conditional, heads, unit_of, observed_fraction, num_steps)
        if kind == "pseudo_likelihood":
            if len(visible) < self.groups.num_groups:
                hidden = self.groups.num_groups - len(visible)
                raise ValueError(f"pseudo-likelihood needs every group observed, and {hidden} are hidden")
            return PseudoLikelihood(self, self.log_conditionals)

        def clamped(states: Tensor) -> Tensor:
            return self.free_energy(to_query(self, visible, states, torch.ones_like(states, dtype=torch.bool)))

        nothing = self._query(None, None)
        if kind == "elbo":
            return FreeEnergyContrast(self, clamped, lambda: self.free_energy(nothing))
        check_count("num_chains", num_chains)
        check_count("num_sweeps", num_sweeps)
        sizes = torch.tensor(self.groups.sizes, device=self.bias.device)
        random = torch.rand(
            num_chains, len(sizes), generator=generator(seed, "chains", device=sizes.device), device=sizes.device
        )
        with torch.no_grad():
            colours = self.colours(self.operator.prepare().matrix)
        return PersistentContrastiveDivergence(
            self,
            lambda states: -clamped(states),
            self.log_density,
            lambda: self._energy(nothing, colours=colours),
            (random * sizes).long(),
            num_sweeps,
        )

    def _run_fit(
        self,
        loss: nn.Module,
        kind: str,
        data: tuple[Tensor, ...],
        num_steps: int,
        batch_size: int | None,
        lr: float,
        seed: int,
        progress: bool | Callable[[dict[str, Any]], None],
        checkpoint: str | Path | None,
    ) -> DBMFit:
        rows = len(data[0])
        size = check_batch_size(batch_size, rows, 96)
        if isinstance(lr, bool) or not isinstance(lr, int | float) or not 0 < lr < math.inf:
            raise ValueError(f"lr must be positive and finite, got {lr!r}")
        try:
            history = fit(
                loss,
                data,
                num_steps=num_steps,
                batch_size=size,
                optimizer=slow_temperatures(self, lr),
                scheduler=one_cycle(num_steps),
                seed=seed,
                checkpoint=checkpoint,
                progress=progress,
            )
        finally:
            self.operator.share = 1.0
        return DBMFit(history, kind)

    def free_energy(self, query: Query) -> Tensor:
        """F at the fixed points ``(B,)``, with its whole gradient: by the envelope theorem the explicit one."""
        cases = self.cases(query)
        phi = self.phi_of(cases)
        problem = self.problem(phi.detach(), cases)
        with torch.no_grad():
            found = solve(problem, phi.detach(), tolerance=1e-4)
        energies = self.energies(phi, problem, found.value)
        return energies if cases is query else -self.log_shares(query, cases, energies).logsumexp(1)

    def log_conditionals(self, states: Tensor) -> Tensor:
        """log p(x_g | all others), ``(B, G)``, at states ``(B, G)``."""
        x = self.groups.one_hot(states, self.bias.dtype)
        return self.groups.totals(self.groups.log_softmax(self.operator.prepare().apply(x) + self.bias) * x)

    def calibrate(
        self, observed: Any, mask: Any, truth: Any, *, groups: Sequence[int] | None = None, num_steps: int = 200
    ) -> DBMFit:
        """Scale the temperatures of some groups by one factor, for the best likelihood of held-out masked states
        (temperature scaling; Guo et al., ICML 2017).

        Args:
            observed, mask: queries ``(B, G)``.
            truth: the whole states ``(B, G)``.
            groups: which are scaled, and scored where the mask hides them; all by default.  Of a model that sums over a
                group it is that group's temperature that is scaled, and these are mixtures over its states.
            num_steps: of Adam.

        Raises:
            TypeError, ValueError: bad arguments, or a mask that hides none of the groups.
        """
        query = self._query(observed, mask)
        states = self._check_states("truth", truth)
        if states.shape != query.states.shape:
            raise ValueError(f"truth must be {tuple(query.states.shape)}, as the queries, got {tuple(states.shape)}")
        indices = tuple(range(self.groups.num_groups)) if groups is None else check_counts("groups", groups, 0)
        if not indices or len(set(indices)) < len(indices) or max(indices) >= self.groups.num_groups:
            raise ValueError(f"groups must be different numbers below {self.groups.num_groups}, got {indices}")
        chosen = torch.tensor(indices, device=self.bias.device)
        history = scale_temperatures(self, query, states, chosen, num_steps)
        return DBMFit(history, "calibration")


class MonotoneDBM(BoltzmannModel):
    """A pairwise model of categorical variables whose mean field has one fixed point for every query.

    Feng, Winston and Kolter, TMLR 2023, arXiv 2307.04990.

    Calling it runs the Pyro model (:meth:`forward`).  Which groups are hidden is a matter of the data: a group that is
    never observed is one.

    Args:
        group_sizes: states of each variable, at least 2.
        rank: rows of A, of which Phi is made.
        monotonicity: m; mean field is m-strongly monotone.  In (0, curvature).
        curvature: 1 for the published bound on Phi, ``lambda_max <= 1 - m``; 2 for the relaxed one, ``2 - m``, which
            gives a unique fixed point just as well; ``"pinsker"`` for the widest, which bounds the distances between
            the columns of A within a group (see ``operators``) and allows all that 2 does.
        summed: a group that is summed over exactly instead of by mean field, k queries for one; see
            :class:`~ppl_models.monotone_dbm.pairwise.PairwiseModel`.  Its potentials need no bound and have none.
        seed: of the initial potentials.

    Attributes:
        groups: the layout of the variables in flat vectors.
        operator: makes Phi.
        bias: b ``(N,)``.
        log_temperature: of the predictive, ``(G,)``.

    Raises:
        TypeError, ValueError: bad sizes, or m outside its range.

    Example:
        >>> dbm = MonotoneDBM(group_sizes=[3] * 6, rank=6)
        >>> answer = dbm.marginals(observed=[[0, 2, 0, 0, 0, 0]], mask=[[True, True, False, False, False, False]])
        >>> answer.probabilities.shape, bool(answer.converged.all())
        (torch.Size([1, 6, 3]), True)
    """

    kind: ClassVar[str] = "MonotoneDBM"

    def __init__(
        self,
        group_sizes: Sequence[int] | Tensor,
        rank: int = 32,
        monotonicity: float = 0.1,
        curvature: Curvature = 1,
        *,
        summed: int | None = None,
        seed: int = 0,
    ) -> None:
        check_bound(monotonicity, curvature)
        check_count("rank", rank)
        groups = Groups(group_sizes)
        if summed is not None and check_count("summed", summed, 0) >= groups.num_groups:
            raise ValueError(f"summed must be the number of a group below {groups.num_groups}, got {summed}")
        random = generator(seed, "potentials")
        super().__init__(DenseOperator(groups, rank, monotonicity, curvature, random, summed))
        self.summed = summed
        self._config = {
            "group_sizes": list(groups.sizes),
            "rank": rank,
            "monotonicity": float(monotonicity),
            "curvature": curvature if isinstance(curvature, str) else int(curvature),
            "summed": summed,
            "seed": seed,
        }

    def config(self) -> dict[str, Any]:
        """The constructor's arguments."""
        return dict(self._config)

    @classmethod
    def from_potentials(
        cls,
        phi: Any,
        bias: Any,
        group_sizes: Sequence[int] | Tensor,
        monotonicity: float = 0.1,
        curvature: Curvature = 1,
        *,
        project: bool = False,
    ) -> Self:
        """The model with these potentials.

        Args:
            phi: ``(N, N)``, symmetric and zero inside the groups; the model takes its precision.
            bias: ``(N,)``.
            group_sizes, monotonicity, curvature: as in the constructor.  Other than with ``curvature=1`` phi is
                centred over the states of each group, and the bias takes up what that moves, so that the law stays the
                same; ``"pinsker"`` takes what 2 takes.
            project: shrink phi to the bound instead of refusing it.

        Raises:
            TypeError, ValueError: shapes, a phi that is not symmetric or not hollow, or one that breaks the bound.
        """
        bound = check_bound(monotonicity, curvature)
        groups, matrix, b = _given(group_sizes, phi, bias)
        if curvature != 1 and matrix.shape == (groups.num_states,) * 2:
            matrix, b = _centred(matrix, b, groups)
        factor = factor_of(matrix, groups, bound, project)
        model = cls(groups.sizes, len(factor), monotonicity, curvature).to(device=matrix.device, dtype=matrix.dtype)
        with torch.no_grad():
            model.operator.weight.copy_(factor)  # type: ignore[operator]
            model.bias.copy_(b)
        return model


class DeepBoltzmannMachine(BoltzmannModel):
    """Layers of categorical variables with any potentials between neighbours: the machines without a bound.

    One visible and one hidden layer make a restricted Boltzmann machine.  Queries, sampling and training are those of
    :class:`MonotoneDBM`; mean field may have several fixed points, and the solver returns one of them.

    Args:
        layers: the group sizes of each layer, the visible one first.
        scale: standard deviation of the initial potentials.
        lateral: connect the groups of a layer as well; one layer alone is then a general Boltzmann machine.
        seed: of them.
    """

    kind: ClassVar[str] = "DeepBoltzmannMachine"

    def __init__(
        self, layers: Sequence[Sequence[int]], scale: float = 0.01, *, lateral: bool = False, seed: int = 0
    ) -> None:
        if not isinstance(lateral, bool):
            raise TypeError(f"lateral must be True or False, got {lateral!r}")
        if len(layers) < (1 if lateral else 2):
            raise ValueError(f"layers must be at least two (or one with lateral=True), got {len(layers)}")
        groups = Groups(list(itertools.chain.from_iterable(layers)))
        numbers = [torch.full((len(layer),), i) for i, layer in enumerate(layers)]
        random = generator(seed, "potentials")
        super().__init__(FreeOperator(groups, torch.cat(numbers), random, scale, lateral))
        self._config = {
            "layers": [list(map(int, layer)) for layer in layers],
            "scale": float(scale),
            "lateral": lateral,
            "seed": seed,
        }

    @classmethod
    def from_potentials(cls, phi: Any, bias: Any, group_sizes: Sequence[int] | Tensor) -> Self:
        """The machine with these potentials, whatever their eigenvalues: mean field may have several fixed points.

        Args:
            phi: ``(N, N)``, symmetric and zero inside the groups; the model takes its precision.
            bias: ``(N,)``.
            group_sizes: states of each variable.

        Raises:
            TypeError, ValueError: shapes, or a phi that is not symmetric or not hollow.
        """
        groups, matrix, b = _given(group_sizes, phi, bias)
        matrix = check_potentials(matrix, groups)
        model = cls([list(groups.sizes)], lateral=True).to(device=matrix.device, dtype=matrix.dtype)
        with torch.no_grad():
            weight, connected = model.operator.weight, model.operator.connected
            weight.copy_(torch.where(connected, matrix, 0.0))  # type: ignore[operator, arg-type]
            model.bias.copy_(b)
        return model

    def config(self) -> dict[str, Any]:
        """The constructor's arguments."""
        return dict(self._config)


def _given(group_sizes: Sequence[int] | Tensor, phi: Any, bias: Any) -> tuple[Groups, Tensor, Tensor]:
    """A user's potentials as tensors of one precision and device."""
    groups = Groups(group_sizes)
    # An array's own precision, and not torch's default: exact potentials ask for exact answers.
    matrix, b = (
        to_tensor(name, torch.as_tensor(x) if isinstance(x, np.ndarray) and x.dtype.kind in "iuf" else x)
        for name, x in (("phi", phi), ("bias", bias))
    )
    if not matrix.is_floating_point():
        matrix = matrix.to(torch.get_default_dtype())
    b = b.to(matrix).flatten()
    if len(b) != groups.num_states:
        raise ValueError(f"bias must be ({groups.num_states},), one entry a state, got {tuple(b.shape)}")
    return groups.to(matrix.device), matrix, b


def _exact(log_p: Tensor) -> LogPartition:
    value = float(log_p.double().logsumexp(0))
    empty = torch.empty(0, dtype=torch.float64)
    return LogPartition(value, 0.0, value, value, math.inf, math.nan, True, "enumeration", empty, empty)


def _centred(phi: Tensor, bias: Tensor, groups: Groups) -> tuple[Tensor, Tensor]:
    """Phi on the simplex's tangent space, and the bias with what that takes from Phi: the same law."""
    same = hollow(torch.ones_like(phi), groups) == 0
    sizes = torch.tensor(groups.sizes, dtype=phi.dtype, device=phi.device)[groups.group_of]
    centre = torch.eye(len(phi), dtype=phi.dtype, device=phi.device) - same.to(phi) / sizes
    moved = ((centre @ phi) / sizes) @ torch.ones_like(bias)
    constant = 0.5 * ((phi / sizes).T / sizes).sum() / groups.num_groups
    return centre @ phi @ centre, bias + moved + constant
