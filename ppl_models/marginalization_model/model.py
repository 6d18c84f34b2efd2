"""Generative marginalization models: log p of any subset of discrete variables in one network pass.

Liu, Ramadge and Adams, "Generative marginalization models", ICML 2024, PMLR 235:31773-31807, arXiv 2310.12920.  One
network gives ``f(x_S) = log p(x_S)`` for any subset S, another all conditionals ``log p(x_j | x_S)``; self-consistency
ties them.  Training on an energy follows da Silva, Mesquita and Lahlou, "Particle GFlowNets", UAI 2026, by default.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from inference._checks import nonnegative
from inference.any_order import ancestral, as_proposal, chain_rule, random_ranks
from inference.objectives.energy_consistency import EnergyConsistency
from inference.objectives.persistent_chains import uniform_values
from inference.objectives.reverse_kl import AutoregressiveKL, MarginalKL, MarginalRegression
from inference.objectives.self_consistency import PathConsistency
from inference.objectives.small_sets import PairMarginals, pair_products
from inference.results.evidence import LogPartition, from_weights, sandwich
from inference.runtime.generators import derive_seed, generator
from ppl_models.base import check_batch_size, check_count, check_counts
from ppl_models.marginalization_model.evaluation import compare, group_correlation
from ppl_models.marginalization_model.networks import Lattice
from ppl_models.marginalization_model.pairwise import agrees, find_pairwise
from ppl_models.marginalization_model.results import Evaluation, MarginalizationResult
from ppl_models.marginalization_model.target import EnergyTarget, make_target
from ppl_models.marginalization_model.training import CHECK_ORDERS, Progress, Training, check_settings, present

__all__ = ["MarginalizationModel"]

_METHODS = ("two-stage", "joint")
_LOSSES = ("path", "pair", "segment", "sum_rule", "kl")
_ROWS = ("data", "model", "mixture", "uniform")
_OBJECTIVES = ("consistency", "kl", "fm", "arm", "arm_mc")
_PARTITIONS = ("importance", "bridge", "network")
_BATCH = 512
_AVERAGED = 0.3  # of the second stage's updates
_FEWEST_TO_SPLIT, _MOST_SET_ASIDE = 20, 10_000
_MASKS = 500  # at least, of held-out rows: few rows are looked at behind many
_FASTER, _SMALLER = 4.0, 2  # its rate and its batches: each row teaches every step of the chain rule
_LEVEL_DRAWS = 1024  # for the level of f after a fit by divergence


class MarginalizationModel(Training):
    """A discrete distribution that answers marginals of any subset in one pass, learned from data or from an energy.

    Liu, Ramadge and Adams, ICML 2024, arXiv 2310.12920.

    The object is a Pyro model: ``mam(x)`` observes rows ``x`` (-1 where missing) at the site ``x`` in the plate
    ``rows``.  ``mam.distribution()`` is the law itself, for any other model.

    **What to trust.**  The chain rule (``log_prob_autoregressive``) is a normalised density.  The one-pass
    ``log_prob`` is as right as training has made it: ``log_prob_with_error`` and ``consistency_report`` say how right
    at the very rows asked, ``refine=`` recomputes what is not, and every fit's result holds the comparison.  With
    ``marginal="causal"`` it is, after a fit to data, a normalised density too, over the values of any set of variables.

    Args:
        cardinalities: number of values K_j of each variable; they may differ.
        network: ``"mlp"`` (residual), ``"transformer"`` (for sequences: it sees how far apart variables stand),
            ``"unet"`` (images) or ``"lattice"`` (periodic convolutions).
        context_features: size C of a vector that the law is conditional on, in any units: the first fit standardises
            it; 0 for none.
        marginal: the network of f: ``"trunk"``, of its own, reading the features of the conditionals' network;
            ``"separate"``, of its own alone; ``"shared"``, a head on those features; or ``"causal"``, after a fit to
            data a chain rule along the order of the variables, all of whose steps come from one pass, so that the law
            of any set of them sums to one (of an energy as ``"trunk"``).  As it looks back only, it can't read those
            features; it works for every variable, so that a query takes several times as long.
        hidden: width.
        depth: layers (blocks).
        dropout: of the conditionals' network while it learns from data; f and energies are learned without.
        num_heads: of attention.
        shape: ``(height, width)`` of an image or a lattice; by default a square.
        classes: of the mixture of latent classes that f corrects after a fit to data: always consistent, learned in
            seconds.  1 is the independence model.
        seed: of the initial parameters.

    Raises:
        TypeError, ValueError: an argument that is unknown, out of range, or at odds with another.

    Example:
        >>> x = torch.randint(2, (200, 1), generator=torch.Generator().manual_seed(0)).repeat(1, 4)  # four copies
        >>> mam = MarginalizationModel(cardinalities=[2] * 4, hidden=32, depth=2)
        >>> result = mam.fit(x, num_steps=200, progress=False)
        >>> mam.log_prob([[1, -1, -1, -1], [-1, -1, -1, -1]]).exp().round(decimals=1)
        tensor([0.5000, 1.0000])
    """

    # ------------------------------------------------------------------ from data
    def fit(
        self,
        x: Any,
        valid: Any = None,
        seed: int = 0,
        *,
        context: Any = None,
        valid_context: Any = None,
        method: str = "two-stage",
        num_steps: int = 4000,
        marginal_steps: int | None = None,
        batch_size: int | None = _BATCH,
        lr: float = 1e-3,
        weight_decay: float = 0.01,
        rows: str | Any = "mixture",
        num_rows: int = 16384,
        refit_rows: int = 0,
        loss: str = "path",
        depth: str = "uniform",
        children: int = 1,
        penalty: float = 1.0,
        patience: int | None = None,
        checkpoint: str | Path | None = None,
        progress: Progress = True,
    ) -> MarginalizationResult:
        """Maximum likelihood.  First the conditionals, by masked completion; then f, by consistency with them.

        Args:
            x: ``(N, D)`` integers, -1 where missing (at random); each row has an observed variable.
            valid: held-out rows; the first stage keeps the parameters that were best on them. The second, whose rows
                are drawn and whose loss on few rows is mostly their orders', averages its last ones.  Without them a
                tenth of 20 or more rows, at most 10,000, is set aside for it: few rows are learned by heart in the
                default number of updates.
            seed: same seed, same machine, same result to the bit.
            context, valid_context: ``(N, C)`` of a model with context.
            method: ``"two-stage"``, or ``"joint"`` for both at once with ``penalty`` on the consistency.
            num_steps: updates of the first stage (or the joint one).
            marginal_steps: updates of the second; half as many by default.
            batch_size: rows of an update; None for all. The default is all rows where there are fewer.
            lr: of AdamW, decaying to zero by a cosine (a Transformer's rises first).  With ``marginal="causal"`` the
                second stage takes four times this rate and half of the rows.
            weight_decay: of AdamW.
            rows: where consistency is asked: ``"data"``, ``"model"`` (draws), ``"mixture"`` (rows of the data in which
                a random share of the variables is drawn anew), ``"uniform"`` values, or rows of your own ``(M, D)``.
            num_rows: how many of them are made for the second stage.
            refit_rows: after the first stage the conditionals are fitted once more, to so many of their own draws
                along random orders (0: they are not).  The draws come from one law, the mixture over orders, so that
                afterwards orders agree better, and f with them.  For few rows of many variables.
            loss: ``"path"``, where each row has an order along which the chain rule is known beforehand; or with fresh
                orders ``"pair"`` (the paper's), ``"segment"``, ``"sum_rule"`` or ``"kl"``: see
                ``inference.objectives.self_consistency``.  Joint fits take ``"pair"`` for ``"path"``.
            depth: of the pairs, ``"uniform"`` or ``"poisson"``.
            children: pairs to one prefix.
            penalty: weight of consistency in a joint fit.
            patience: validations in a row without improvement after which a stage ends, with its best parameters;
                None runs to the end.
            checkpoint: file to resume from; those of the further stages stand beside it.
            progress: a progress bar for each stage and for the draws between them, or a function that receives its
                fields, of which ``description`` names the stage: ``"conditionals"``, ``"draws"``, ``"marginals"``
                (of a refit, ``"conditionals of draws"``).

        Returns:
            Histories, and one pass compared with the chain rule on held-out rows.  A ``KeyboardInterrupt`` ends the fit
            early; in the first stage f is then only the data's latent classes.

        Raises:
            TypeError, ValueError: bad data or settings, before any work.
            NonFiniteError: the loss became non-finite.
        """
        derive_seed(seed)  # refuses a seed that is no integer
        if isinstance(x, Tensor):
            self.to(x.device)
        for name, value, known in (("method", method, _METHODS), ("loss", loss, _LOSSES)):
            if value not in known:
                raise ValueError(f"{name} must be one of {known}, got {value!r}")
        if isinstance(rows, str) and rows not in _ROWS:
            raise ValueError(f"rows must be one of {_ROWS} or rows of your own, got {rows!r}")
        values, held_out = self._training_rows("x", x), None
        c, held_c = self._raw_context(context, len(values)), None
        if valid is not None:
            held_out = self._training_rows("valid", valid)
            held_c = self._raw_context(valid_context, len(held_out), "valid_context")
        check_count("num_steps", num_steps)
        check_count("num_rows", num_rows, 2)
        steps = -(-num_steps // 2) if marginal_steps is None else check_count("marginal_steps", marginal_steps)
        check_settings(lr, depth, children, penalty, weight_decay, patience)
        count = check_count("refit_rows", refit_rows, 0)
        if count and method == "joint":
            raise ValueError("refit_rows is of two-stage fits: a joint one has no stage to refit after")
        size = check_batch_size(batch_size, len(values), _BATCH) or len(values)
        own = None if isinstance(rows, str) else self._training_rows("rows", rows)
        if (own is not None or rows != "data") and self.context_features and method == "joint":
            raise ValueError("a joint fit of a model with context takes rows='data'")
        kind = "pair" if loss == "path" else loss
        path = None if checkpoint is None else Path(checkpoint)
        settings: dict[str, Any] = {"batch": size, "lr": lr, "weight_decay": weight_decay}
        settings |= {"patience": patience, "progress": progress}
        judged = (values, c) if held_out is None else (held_out, held_c)
        self._learn_context(c)
        c, held_c = self._in_own_units(c), self._in_own_units(held_c)
        self._start("data", None)
        self.marginals.base.learn(values, generator=generator(seed, "classes", device=values.device))
        kept, kept_c = values, c
        if held_out is None and len(values) >= _FEWEST_TO_SPLIT:
            (kept, kept_c), (held_out, held_c) = self._split(values, c, seed)
        self.conditionals.start_from(kept)
        data, held = present(kept, kept_c), present(held_out, held_c)
        held = tuple(part.repeat(-(-_MASKS // len(part)), 1) for part in held)
        settings["batch"] = min(size, len(kept))
        likelihood = self._likelihood(kept)
        if method == "joint":
            consistency = self._consistency(kind, depth, children, True)
            joint: nn.Module = self._penalised(
                likelihood, consistency, penalty, rows if own is None else own, settings["batch"], seed
            )
            settings["description"] = "both networks"
            history, second = self._train(joint, data, held, num_steps, seed, path, **settings), None
            self._look_up_small_sets()
            return self._result(history, second, *judged, seed)
        history = self._train(likelihood, data, held, num_steps, seed, path, description="conditionals", **settings)
        refit = None
        if count and not history.interrupted:
            again = None if path is None else path.with_name(path.name + ".refit")
            refit = self._refit(values, c, count, held, num_steps, seed, again, **settings)
        if (history if refit is None else refit).interrupted:
            return self._result(history, None, *judged, seed, refit)
        with_paths = loss == "path"
        few = None if held_out is None or not with_paths else held_out[:num_rows]
        drawn = own is None and rows in ("model", "mixture")
        passes = self.num_variables * (num_rows * (drawn + with_paths) + (0 if few is None else len(few)))
        with self._reported("draws", passes, progress):
            pool, pool_c, paths = self._pool(values, c, rows if own is None else own, num_rows, seed, with_paths)
            held = present(held_out, held_c)
            if few is not None:
                few_c = None if held_c is None else held_c[:num_rows]
                held = present(few, *self._paths(few, few_c, seed), few_c)
        if drawn:  # the model's own law, without the accidents of the data
            self.marginals.base.learn(pool, generator=generator(seed, "classes", device=pool.device))
        stage: nn.Module = self._consistency(kind, depth, children, False)
        second_path = None if path is None else path.with_name(path.name + ".marginals")
        settings["batch"] = min(size, len(pool))
        if paths and self.marginals.normalised:  # small sets are looked up
            stage = PathConsistency(self.marginals)
            settings |= {"batch": max(1, settings["batch"] // _SMALLER), "lr": _FASTER * lr}
        elif paths:
            products = None if self.context_features else pair_products(self.conditionals, self.cardinalities)
            pairs = None if products is None else PairMarginals(products, self.cardinalities)
            stage = PathConsistency(self.marginals, pairs=pairs)
        if patience is None:
            settings["average_last"] = _AVERAGED
        second = self._train(
            stage, present(pool, *paths, pool_c), held, steps, seed, second_path, description="marginals", **settings
        )
        self._look_up_small_sets()
        return self._result(history, second, *judged, seed, refit)

    @staticmethod
    def _split(
        values: Tensor, context: Tensor | None, seed: int
    ) -> tuple[tuple[Tensor, Tensor | None], tuple[Tensor, Tensor | None]]:
        """Rows to learn from and rows to set aside, with their contexts."""
        draw = generator(seed, "set aside", device=values.device)
        order = torch.randperm(len(values), generator=draw, device=values.device)
        aside = order[: min(len(values) // 10, _MOST_SET_ASIDE)].sort().values
        rest = order[len(aside) :].sort().values
        return tuple((values[i], None if context is None else context[i]) for i in (rest, aside))  # type: ignore[return-value]

    # ------------------------------------------------------------------ from an energy
    def fit_energy(
        self,
        log_density: Callable[..., Any],
        objective: str = "consistency",
        seed: int = 0,
        *,
        site: str | None = None,
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
        num_steps: int = 3000,
        batch_size: int = 256,
        lr: float = 1e-3,
        block: int | None = None,
        metropolis: bool = True,
        likelihood: float = 1.0,
        uniform: float = 0.2,
        structure: bool = True,
        depth: str = "uniform",
        children: int = 1,
        length: int | None = None,
        penalty: float = 4.0,
        order: Sequence[int] | Tensor | None = None,
        rows: Any = None,
        checkpoint: str | Path | None = None,
        progress: Progress = True,
    ) -> MarginalizationResult:
        """Learn an unnormalised density: amortised sampling, any marginal, and log Z.

        Args:
            log_density: ``(B, D) -> (B,)`` of complete integer rows; or a Pyro model whose latent site ``site`` is
                discrete, the evidence of whose data is then log Z.
            objective: ``"consistency"`` (squared residuals alone, unbiased from any rows); ``"kl"`` (the paper's);
                ``"fm"`` (f regressed on the target); ``"arm"`` and ``"arm_mc"``, autoregressive baselines without
                marginals.
            seed: same seed, same machine, same result to the bit.
            site: name of the Pyro model's discrete site.
            args, kwargs: what the Pyro model is called with.
            num_steps: updates.
            batch_size: chains, and rows of an update.
            lr: of Adam, decaying to zero by a cosine.
            block: variables that a chain redraws in an update; by default 4, or a sixteenth of the variables with
                ``metropolis`` if that is more.
            metropolis: correct the chains by the density, so that they have its law (``"consistency"``).
            likelihood: weight of the conditionals' likelihood on the chains (``"consistency"`` with ``metropolis``).
            uniform: share of uniform rows (``"consistency"``).
            structure: recognise a density of unary and pairwise terms, and let f hold the terms inside S exactly.
            depth, children, length: of the residuals: see ``inference.objectives.energy_consistency``.
            penalty: weight of consistency (``"kl"``, ``"fm"``).
            order: of the autoregressive baselines; as given by default.
            rows: states at which ``"fm"`` regresses; uniform by default.
            checkpoint: file to resume from.
            progress: progress bar, or a function that receives its fields.

        Raises:
            TypeError, ValueError: bad settings, or a density of another shape, NaN, or zero everywhere.
            NonFiniteError: the loss became non-finite.
            RuntimeError: a density that was taken for one of unary and pairwise terms is none where the chains ended.

        Warns:
            SamplerWarning: some states have zero density.
        """
        derive_seed(seed)
        if objective not in _OBJECTIVES:
            raise ValueError(f"objective must be one of {_OBJECTIVES}, got {objective!r}")
        if self.context_features:
            raise ValueError("fit_energy has no context: make the model with context_features=0")
        check_count("num_steps", num_steps)
        check_count("batch_size", batch_size, 2)
        check_settings(lr, depth, children, penalty)
        nonnegative("likelihood", likelihood)
        if nonnegative("uniform", uniform) >= 1:
            raise ValueError(f"uniform must be at least 0 and below 1, got {uniform!r}")
        if length is not None:
            check_count("length", length)
        if block is None:
            block = max(4, self.num_variables // 16) if metropolis and objective == "consistency" else 4
        check_count("block", block)
        draw = generator(seed, "energy", device=self._weight.device)
        target = make_target(log_density, site, args, kwargs, self.cardinalities, self._weight, draw)
        found = self._check_order(order)
        states = None if rows is None else self._check_values("rows", rows, missing=False)
        self.conditionals.independent.zero_()  # where rows of data were, if there were any
        terms = self._terms_of(target, draw, seed) if objective == "consistency" and structure else None
        if terms is None and objective in ("consistency", "fm"):
            target.centre(self._typical(target, batch_size, draw))
        self._start("none" if objective.startswith("arm") else "energy" if terms is None else "pairwise", target)
        if terms is not None:
            self.marginals.pairwise.set_terms(**terms)
        self.marginals.freeze_trunk = False
        self._level = target.offset
        networks = (self.marginals, self.conditionals, target, self.cardinalities)
        loss: nn.Module
        if objective == "consistency":
            loss = EnergyConsistency(
                *networks,
                num_chains=batch_size,
                uniform=uniform,
                block=block,
                metropolis=metropolis,
                likelihood=likelihood if metropolis else 0.0,
                exact=terms is not None,
                depth=depth,
                children=children,
                length=length,
            )
        elif objective == "kl":
            loss = MarginalKL(*networks, num_chains=batch_size, block=block, penalty=penalty, anchor=self.log_states)
        elif objective == "fm":
            loss = MarginalRegression(*networks, num_chains=batch_size, block=block, penalty=penalty, rows=states)
        else:
            loss = AutoregressiveKL(
                self.conditionals,
                target,
                self.cardinalities,
                batch_size=batch_size,
                order=found,
                monte_carlo=objective == "arm_mc",
            )
        loss.to(self._weight.device)
        chains = getattr(loss, "chains", None)
        if chains is not None:
            chains.start(uniform_values(self.cardinalities, batch_size, draw))
        history = self._train(
            loss,
            None,
            None,
            num_steps,
            seed,
            None if checkpoint is None else Path(checkpoint),
            batch=None,
            lr=lr,
            weight_decay=0.0,
            patience=None,
            progress=progress,
        )
        if objective.startswith("arm"):
            order = torch.arange(self.num_variables) if found is None else found
            return MarginalizationResult(self, history, None, None, order=order)
        if objective == "kl":
            self._level = self._level_of(target, seed)
        draws = self.sample(self._check_count(), seed=seed)
        # With uniform rows, since the rounding of the terms is that of the largest values they were found from.
        met = torch.cat([draws if chains is None else chains.values, draws, self._uniform_rows(seed)])
        if terms is not None and not agrees(terms, target.log_density, met):
            self._start("none", target)
            raise RuntimeError(
                "log_density has terms of more than two variables, at states that were met in the course of the fit "
                "alone, so that f is wrong there: call fit_energy with structure=False"
            )
        check = compare(self, draws, None, CHECK_ORDERS, seed)
        return MarginalizationResult(self, history, None, check, int(chains.restarts) if chains is not None else 0)

    def resized(
        self, shape: Sequence[int], log_density: Callable[[Tensor], Tensor], *, seed: int = 0
    ) -> "MarginalizationModel":
        """The same networks on a periodic lattice of another size, for one that is too large to train on.

        The lattice network looks ``2 * depth`` steps far and no further, and what f adds to the energy is a sum over
        the places that are not observed.  Both therefore serve a lattice of any size, if one place's law depends on
        what is near: correlations that are short beside that distance.  ``log_partition`` and the fit's own check say
        how well; ``fit_energy`` of the returned model goes on from there.

        Args:
            shape: ``(height, width)``.
            log_density: the density on that lattice.
            seed: of the rows that it is tried at.

        Raises:
            RuntimeError: the model was not fitted to a density of unary and pairwise terms.
            TypeError, ValueError: another network, places that differ, a lattice narrower than what the network sees,
                or a bad density.
        """
        body = self.conditionals.body
        if not isinstance(body, Lattice):
            raise ValueError(
                f"only the network 'lattice' has no size of its own, this one is {self._config['network']!r}"
            )
        if self.marginals.kind != "pairwise":
            raise RuntimeError("resized needs a fit to a density of unary and pairwise terms: call fit_energy first")
        levels = set(self._config["cardinalities"])
        if len(levels) > 1:
            raise ValueError(f"all places must have the same number of values, they have {sorted(levels)}")
        sides = check_counts("shape", shape)
        widest = 2 * body.reach + 1
        for name, pair in (("the lattice that it was trained on", body.shape), ("shape", sides)):
            if min(pair) < widest:
                raise ValueError(
                    f"the network looks {body.reach} steps far, so either side must be at least {widest}: {name} is "
                    f"{tuple(pair)}"
                )
        size = math.prod(sides)
        changed = {**self._config, "cardinalities": [levels.pop()] * size, "shape": list(sides)}
        larger = type(self)(**changed).to(self._weight)
        own = ("marginals.base.", "marginals.causal.", "conditionals.independent")
        state = {k: v for k, v in self.state_dict().items() if not k.startswith(own)}
        larger.load_state_dict(state, strict=False)
        larger.marginals.scale_head(math.sqrt(size / self.num_variables))
        draw = generator(seed, "energy", device=self._weight.device)
        target = make_target(log_density, None, (), None, larger.cardinalities, self._weight, draw)
        terms = find_pairwise(target.log_density, larger.cardinalities, draw)
        if terms is None:
            raise ValueError("log_density has terms of more than two variables, or is too large to tell")
        larger._start("pairwise", target)
        larger.marginals.pairwise.set_terms(**terms)
        return larger

    @torch.no_grad()
    def _level_of(self, target: EnergyTarget, seed: int) -> float:
        """What f lacks to the density on average over draws: the divergence does not see a constant in f."""
        draws = self.sample(_LEVEL_DRAWS, seed=seed)
        return float((target(draws) - self._in_chunks(self.marginals, draws, None)).double().mean())

    def _energy(self, values: Tensor) -> Tensor:
        if self._target is not None:
            return self._target.exact(values)
        if self.marginals.kind == "pairwise":  # as read from a file
            return self.marginals.pairwise(values)
        raise RuntimeError(
            "there is no energy: call fit_energy first; after load, give the density again by log_density="
        )

    @torch.no_grad()
    def log_partition(
        self,
        method: str = "importance",
        *,
        num_samples: int = 4096,
        seed: int = 0,
        order: Sequence[int] | Tensor | None = None,
        log_density: Callable[[Tensor], Tensor] | None = None,
    ) -> LogPartition:
        """log Z of the density that ``fit_energy`` was given, with bounds.

        Args:
            method: ``"importance"``: draws of the conditionals weighted by the density, unbiased for Z, so that
                ``value`` is a lower bound on average, and ``lower`` two standard errors below it; ``"bridge"``: between
                those and draws of the target; ``"network"``: f where nothing is observed, without an error.
            num_samples: draws of each kind.
            seed: of the draws.
            order: of drawing, of a model fitted as an autoregressive baseline.
            log_density: the density, where the model was read from a file.

        Returns:
            ``upper`` comes from approximate draws of the target (resampled draws, moved by Metropolis steps), so
            ``exact`` is False.

        Raises:
            RuntimeError: the model was not fitted to an energy.
            ValueError: unknown method.
        """
        if method not in _PARTITIONS:
            raise ValueError(f"method must be one of {_PARTITIONS}, got {method!r}")
        check_count("num_samples", num_samples, 2)
        if log_density is not None:
            draw = generator(seed, "energy", device=self._weight.device)
            self._target = EnergyTarget(log_density, self.cardinalities, self._weight, draw)
        if self.marginals.kind == "data":
            raise RuntimeError("log_partition is of an energy: call fit_energy first (a fit to data has Z = 1)")
        empty = self.cardinalities.new_full((num_samples, self.num_variables), -1)
        if method == "network":
            value = float(self.marginals(empty[:1], None)) + self._level
            none = torch.zeros(0, dtype=torch.float64)
            return LogPartition(value, math.nan, -math.inf, math.inf, math.nan, math.nan, False, method, none, none)
        found = self._check_order(order)
        draw = generator(seed, "partition", device=self._weight.device)
        ranks = random_ranks(empty, draw, missing_first=True) if found is None else found.argsort().expand_as(empty)

        def fill(v: Tensor, r: Tensor) -> tuple[Tensor, Tensor]:
            drawn = ancestral(as_proposal(self.conditionals), v, r, generator=draw)
            return drawn.values, drawn.log_prob

        values, log_q = self._in_chunks(fill, empty, ranks)
        offset = 0.0 if self._target is None else self._target.offset
        forward = self._in_chunks(self._energy, values).double() + offset - log_q.double()
        if bool((forward == -math.inf).all()):
            raise RuntimeError(
                f"all of {num_samples} draws have zero density: fit longer, or give a density of which more states are "
                "possible"
            )
        chosen = torch.multinomial((forward - forward.max()).exp(), num_samples, replacement=True, generator=draw)
        moved = self._moved(values[chosen], self._energy, draw)
        path = self._in_chunks(lambda v, r: chain_rule(self.conditionals, v, r)[:, -1], moved, ranks)
        backward = self._in_chunks(self._energy, moved).double() + offset - path.double()
        if method == "bridge":
            return sandwich(forward, backward, method, exact=False)
        low, high = from_weights(forward, method), from_weights(backward, method, reverse=True)
        upper = max(high.upper, low.value)
        return low._replace(upper=upper, exact=False, reverse_log_weights=backward)

    # ------------------------------------------------------------------ how good
    def evaluate(self, x: Any, context: Any = None, *, orders: int = 5, seed: int = 0) -> Evaluation:
        """One-pass log-marginals of rows, complete or partial, against the chain rule along ``orders`` random orders.

        Raises:
            TypeError, ValueError: bad rows, context or count; a row without an observed variable.
        """
        values = self._training_rows("x", x)
        return compare(self, values, self._check_context(context, len(values)), check_count("orders", orders), seed)

    def evaluate_regenerated(
        self, x: Any, hidden: Sequence[int], threshold: float, *, orders: int = 5, seed: int = 0
    ) -> tuple[float, float, int]:
        """The paper's measure: mean Pearson and Spearman correlation between versions of a row, and the number of rows.

        Of each complete row there are versions with ``hidden`` many variables drawn anew; those closer than
        ``threshold`` nats to another are dropped.  A weak test, as a few points far apart correlate easily: see
        ``evaluate``.
        """
        values = self._check_values("x", x, missing=False)
        counts = tuple(check_count("hidden", h) for h in hidden)
        return group_correlation(self, values, counts, float(threshold), check_count("orders", orders), seed)
