"""What all Boltzmann machines share beyond their queries: sampling, log Z, corrections of mean field, and training."""

import functools
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

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
from ppl_models.base import check_count, check_counts, to_tensor
from ppl_models.monotone_dbm.beyond_mean_field import Correlations, correct, mixture
from ppl_models.monotone_dbm.calibration import scale_temperatures
from ppl_models.monotone_dbm.energy import PairwiseEnergy
from ppl_models.monotone_dbm.mean_field import solve
from ppl_models.monotone_dbm.pairwise import PairwiseModel, Query
from ppl_models.monotone_dbm.training import DBMFit, check_run, conditional_of, one_cycle, slow_temperatures, to_query

__all__ = ["BoltzmannModel"]

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
        num_steps: int | None = None,
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

        A second fit goes on from the first, and keeps its styles: other data want a new model.

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
            num_steps, lr: of Adam with one cycle of rates; temperatures learn at a quarter of ``lr``.  1,000 steps by
                default; 300 with styles, which EM has learned before.
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
        num_steps = (300 if self.styled else 1000) if num_steps is None else num_steps
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
        batch_size = check_run(len(query.states), batch_size, lr)
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
        self._begin(query, seed)
        return self._run_fit(loss, objective, data, num_steps, batch_size, lr, seed, progress, checkpoint)

    def _begin(self, data: Query, seed: int) -> None:
        """What a fit starts with, once all is known to be right."""

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

        @functools.cache
        def colours() -> list[Tensor]:
            """When a fit begins with styles they couple to all, and before it to nothing."""
            with torch.no_grad():
                return self.colours(self.operator.prepare().matrix)

        return PersistentContrastiveDivergence(
            self,
            lambda states: -clamped(states),
            self.log_density,
            lambda: self._energy(nothing, colours=colours()),
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
        try:
            history = fit(
                loss,
                data,
                num_steps=num_steps,
                batch_size=batch_size,
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
            groups: which are scaled, and scored where the mask hides them; all by default, but styles, whose truth
                nobody knows.  Of a model that sums over a group it is that group's temperature that is scaled, and
                these are mixtures over its states.
            num_steps: of Adam.

        Raises:
            TypeError, ValueError: bad arguments, or a mask that hides none of the groups.
        """
        query = self._query(observed, mask)
        states = self._check_states("truth", self._with_styles(to_tensor("truth", truth)))
        if states.shape != query.states.shape:
            raise ValueError(f"truth must be {tuple(query.states.shape)}, as the queries, got {tuple(states.shape)}")
        count = self.groups.num_groups - self.styled
        indices = tuple(range(count)) if groups is None else check_counts("groups", groups, 0)
        if not indices or len(set(indices)) < len(indices) or max(indices) >= count:
            raise ValueError(f"groups must be different numbers below {count}, got {indices}")
        chosen = torch.tensor(indices, device=self.bias.device)
        history = scale_temperatures(self, query, states, chosen, num_steps)
        return DBMFit(history, "calibration")


def _exact(log_p: Tensor) -> LogPartition:
    value = float(log_p.double().logsumexp(0))
    empty = torch.empty(0, dtype=torch.float64)
    return LogPartition(value, 0.0, value, value, math.inf, math.nan, True, "enumeration", empty, empty)
