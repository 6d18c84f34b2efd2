"""How a marginalization model is trained: rows and orders of stage two, the shared loop, the check at the end."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR, LambdaLR, LRScheduler

from inference._checks import nonnegative, positive
from inference.any_order import ancestral, as_proposal, block_gibbs, chain_rule, hide, random_ranks
from inference.fit import FitResult, fit
from inference.objectives.masked_completion import MaskedCompletion
from inference.objectives.persistent_chains import PersistentChains, uniform_values
from inference.objectives.self_consistency import Penalised, SelfConsistency
from inference.objectives.small_sets import SingleConditions, pair_frequencies, pair_products
from inference.runtime import distributed
from inference.runtime.generators import derive_seed, generator
from inference.runtime.progress import Progress as Bar
from ppl_models.base import check_count
from ppl_models.marginalization_model.evaluation import compare
from ppl_models.marginalization_model.pairwise import agrees, energy_of, find_pairwise
from ppl_models.marginalization_model.queries import Queries
from ppl_models.marginalization_model.results import MarginalizationResult
from ppl_models.marginalization_model.target import EnergyTarget

__all__ = ["CHECK_ORDERS", "Progress", "Training", "check_settings", "present"]

CHECK_ORDERS = 5
_DEPTHS = ("uniform", "poisson")
_SAVE_EVERY = 250  # updates between two saves of a checkpoint
_WARM_UP = 0.1  # of the updates
_CHECK_ROWS = 256  # fewer where a row costs more
_CHECK_VARIABLES = 1 << 13
_SWEEPS = 8  # of Metropolis blocks, to draws of a density
_MOVED = 512  # rows at which a density is compared with its terms: about a hundredth of a fit's time

Progress = bool | Callable[[dict[str, Any]], None]


def present(*parts: Tensor | None) -> tuple[Tensor, ...]:
    """Those that are there."""
    return tuple(part for part in parts if part is not None)


def check_settings(
    lr: float, depth: str, children: int, penalty: float, weight_decay: float = 0.0, patience: int | None = None
) -> None:
    """Refuse at the door what the optimiser or an objective would refuse once the model is changed.

    Raises:
        TypeError, ValueError: a setting of the wrong kind or out of range.
    """
    positive("lr", lr)
    nonnegative("weight_decay", weight_decay)
    nonnegative("penalty", penalty)
    check_count("children", children)
    if depth not in _DEPTHS:
        raise ValueError(f"depth must be one of {_DEPTHS}, got {depth!r}")
    if patience is not None:
        check_count("patience", patience)


class Training(Queries):
    """What ``MarginalizationModel``'s fits are made of."""

    _target: EnergyTarget | None = None

    def _training_rows(self, name: str, x: Any) -> Tensor:
        values = self._check_values(name, x)
        empty = (values < 0).all(1)
        if bool(empty.any()):
            raise ValueError(
                f"{name} has {int(empty.sum())} rows in which all is missing, the first is row "
                f"{int(empty.nonzero()[0])}: drop them"
            )
        return values

    def _start(self, kind: str, target: EnergyTarget | None) -> None:
        """Forget a former fit's structure; a shared or watched trunk learns from f in one-stage training only."""
        self.marginals.kind = kind
        self._target, self._level = target, 0.0
        self.marginals.freeze_trunk = True
        if self.marginals.causal is not None:
            self.marginals.causal.small = None

    @torch.no_grad()
    def _look_up_small_sets(self) -> None:
        """A normalised f answers for one and two variables as the conditionals do, the mean of both ways round."""
        if self.marginals.causal is not None and not self.context_features:
            self.marginals.causal.small = pair_products(self.conditionals, self.cardinalities)

    def _likelihood(self, values: Tensor) -> MaskedCompletion:
        frequencies = None if self.context_features else pair_frequencies(values, self.cardinalities)
        singles = None if frequencies is None else SingleConditions(frequencies, values, self.cardinalities)
        return MaskedCompletion(self.conditionals, singles)

    def _refit(
        self,
        values: Tensor,
        context: Tensor | None,
        count: int,
        held_out: tuple[Tensor, ...],
        num_steps: int,
        seed: int,
        checkpoint: Path | None,
        **settings: Any,
    ) -> FitResult:
        """Fit the conditionals once more, to their own draws along random orders.

        Such draws come from one law, the mixture over orders, whose conditionals agree.
        """
        with self._reported("draws", count * self.num_variables, settings["progress"]):
            rows, c, _ = self._pool(values, context, "model", count, derive_seed(seed, "refit"), False)
        settings["batch"] = min(settings["batch"], count)
        settings["description"] = "conditionals of draws"
        return self._train(self._likelihood(rows), present(rows, c), held_out, num_steps, seed, checkpoint, **settings)

    def _consistency(self, loss: str, depth: str, children: int, learn: bool) -> SelfConsistency:
        self.marginals.freeze_trunk = not learn
        return SelfConsistency(
            self.marginals,
            self.conditionals,
            self.cardinalities,
            loss=loss,
            learn_conditionals=learn,
            depth=depth,
            children=children,
        )

    def _penalised(
        self, likelihood: MaskedCompletion, consistency: SelfConsistency, weight: float, rows: Any, size: int, seed: int
    ) -> Penalised:
        chains, pool = None, None
        draw = generator(seed, "rows", device=self._weight.device)
        uniform = uniform_values(self.cardinalities, max(size, 4096), draw)
        if isinstance(rows, Tensor):
            pool = rows
        elif rows in ("model", "mixture"):
            chains = PersistentChains(self.cardinalities, size, 4).to(self._weight.device)
            chains.start(uniform[:size])
        elif rows == "uniform":
            pool = uniform
        own_rows = isinstance(rows, str) and rows in ("data", "mixture")
        return Penalised(likelihood, consistency, weight, chains=chains, pool=pool, own_rows=own_rows)

    @torch.no_grad()
    def _pool(
        self, values: Tensor, context: Tensor | None, rows: Any, count: int, seed: int, with_paths: bool
    ) -> tuple[Tensor, Tensor | None, tuple[Tensor, ...]]:
        """Rows for the second stage, their context, and their orders and chain rules."""
        draw = generator(seed, "rows", device=values.device)
        if isinstance(rows, Tensor):
            pool = rows
        elif rows == "uniform":
            pool = uniform_values(self.cardinalities, count, draw)
        else:
            pool = values
        order = torch.randperm(len(pool), generator=draw, device=pool.device)
        index = order[torch.arange(count, device=pool.device) % len(pool)]
        chosen = pool[index]
        # Rows that are not the data's own take contexts from the data in turn.
        source = index if pool is values else torch.arange(len(index), device=pool.device) % len(values)
        c = None if context is None else context[source]
        if isinstance(rows, str) and rows in ("model", "mixture"):
            share = torch.rand(len(chosen), 1, generator=draw, device=pool.device)
            share = (1.5 * share - 0.25).clamp(0, 1) if rows == "mixture" else torch.zeros_like(share)
            keys = torch.rand(chosen.shape, generator=draw, device=pool.device)
            hidden = hide(chosen, (chosen >= 0) & (keys < share))

            def fill(v: Tensor, r: Tensor, k: Tensor | None) -> Tensor:
                return ancestral(as_proposal(self.conditionals), v, r, k, generator=draw).values

            chosen = self._in_chunks(fill, hidden, random_ranks(hidden, draw, missing_first=True), c)
        # The order of the chain rule is a fresh one: along the order that a row was drawn in, its probability is high.
        return chosen, c, self._paths(chosen, c, seed) if with_paths else ()

    @torch.no_grad()
    def _moved(self, rows: Tensor, log_density: Callable[[Tensor], Tensor], draw: torch.Generator) -> Tensor:
        """Rows after ``_SWEEPS`` of Metropolis blocks for a density."""
        block = max(1, self.num_variables // 16)
        steps = math.ceil(_SWEEPS * self.num_variables / block)
        return block_gibbs(
            self.conditionals, rows, steps, block, parallel=True, log_density=log_density, generator=draw
        )[0]

    def _terms_of(self, target: EnergyTarget, draw: torch.Generator, seed: int) -> dict[str, Tensor] | None:
        """The terms of a density of unary and pairwise ones, None of another.

        A further term may matter at a few states alone.  Where it draws the law to them, rows moved by the density show
        it, and where it keeps the law away, rows moved by the terms.
        """
        terms = find_pairwise(target.log_density, self.cardinalities, draw)
        if terms is None:
            return None
        own = generator(seed, "terms", device=self._weight.device)  # what ``draw`` gives next stays the same
        rows = self._uniform_rows(seed)
        moved = (self._moved(rows, law, own) for law in (target, energy_of(terms)))
        return terms if agrees(terms, target.log_density, torch.cat([rows, *moved])) else None

    def _uniform_rows(self, seed: int) -> Tensor:
        return uniform_values(self.cardinalities, _MOVED, generator(seed, "uniform", device=self._weight.device))

    @torch.no_grad()
    def _typical(self, target: EnergyTarget, count: int, draw: torch.Generator) -> float:
        """A level about which f can be learned: the mean log-density of uniform rows, and of a peaked density what rows
        have that Metropolis steps have moved, less the logarithm of the number of states.
        """
        rows = uniform_values(self.cardinalities, count, draw)
        moved = self._moved(rows, target, draw)
        uniform, typical = (float(target(x).double().mean()) for x in (rows, moved))
        return max(uniform, typical - self.log_states)

    @contextmanager
    def _reported(self, description: str, passes: int, progress: Progress) -> Iterator[None]:
        """A progress bar over so many rows' passes of the conditionals."""
        done = 0
        with Bar(passes, description, progress if passes and distributed.is_main() else False) as bar:

            def count(module: nn.Module, inputs: tuple[Tensor, ...], outputs: Tensor) -> None:
                nonlocal done
                done = min(passes, done + len(outputs))
                bar.update(done)

            hook = self.conditionals.register_forward_hook(count)
            try:
                yield
            finally:
                hook.remove()

    @torch.no_grad()
    def _paths(self, values: Tensor, context: Tensor | None, seed: int) -> tuple[Tensor, Tensor]:
        ranks = random_ranks(values, generator(seed, "paths", device=values.device))
        path = self._in_chunks(lambda v, r, c: chain_rule(self.conditionals, v, r, c), values, ranks, context)
        return ranks, path

    def _train(
        self,
        objective: nn.Module,
        data: tuple[Tensor, ...] | None,
        held_out: tuple[Tensor, ...] | None,
        num_steps: int,
        seed: int,
        checkpoint: Path | None,
        *,
        batch: int | None,
        lr: float,
        weight_decay: float,
        patience: int | None,
        progress: Progress,
        description: str = "fit",
        average_last: float = 0.0,
    ) -> FitResult:
        """One stage: the parameters that are best on held-out rows, or averaged over a share of the last updates."""
        keep_best = bool(held_out) and not average_last
        objective.train()
        if self.marginals.kind != "data":  # an energy has no rows to learn by heart
            for module in objective.modules():
                if isinstance(module, nn.Dropout | nn.MultiheadAttention):
                    module.eval()
        try:
            return fit(
                objective,
                data or None,
                num_steps=num_steps,
                batch_size=batch,
                optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=lr, weight_decay=weight_decay),
                scheduler=self._schedule(num_steps),
                validation=held_out or None,
                patience=(num_steps if patience is None else patience) if keep_best else None,
                average_last=average_last,
                seed=seed,
                checkpoint=checkpoint,
                checkpoint_every=_SAVE_EVERY,
                progress=progress,
                description=description,
            )
        finally:
            self.eval()
            self.marginals.freeze_trunk = True

    def _schedule(self, num_steps: int) -> Callable[[Optimizer], LRScheduler]:
        """A cosine down to zero; attention, which at first looks anywhere, is warmed up to its rate."""
        if self._config["network"] != "transformer":
            return lambda optimizer: CosineAnnealingLR(optimizer, num_steps)

        def factor(step: int) -> float:
            return min(1.0, (step + 1) / (_WARM_UP * num_steps)) * (1 + math.cos(math.pi * step / num_steps)) / 2

        return lambda optimizer: LambdaLR(optimizer, factor)

    def _check_count(self) -> int:
        return max(8, min(_CHECK_ROWS, _CHECK_VARIABLES // self.num_variables))

    def _result(
        self,
        first: FitResult,
        second: FitResult | None,
        values: Tensor,
        context: Tensor | None,
        seed: int,
        refit: FitResult | None = None,
    ) -> MarginalizationResult:
        count = self._check_count()
        few = self._in_own_units(None if context is None else context[:count])
        check = compare(self, values[:count], few, CHECK_ORDERS, seed)
        return MarginalizationResult(self, first, second, check, refit=refit, context=context)
