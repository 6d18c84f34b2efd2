"""Densities known up to a constant, fitted by maximum likelihood: ``p(x) = b(x) exp(-E(x)) / Z``.

Jiang, Qin, Wu, Chen, Yang and Zhang, "Learning Unnormalized Statistical Models via Compositional Optimization", ICML
2023, arXiv:2306.07485.  Beyond the paper: the tilt of a fitted noise b, so that the weights start at one; the ratio
correction of the running log Z; noise that adapts; guards; and log Z with its error.
"""

import copy
import itertools
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar, Self

import pyro
import torch
from torch import Tensor, nn
from torch.distributions import Distribution

from inference._errors import CheckpointError, SamplerWarning
from inference.citation import Paper
from inference.objectives.unnormalised import CompositionalLikelihood
from inference.objectives.unnormalised.guards import unreliable
from inference.objectives.unnormalised.noise import Noise
from inference.objectives.unnormalised.objective import refuse_edges
from inference.results.evidence import LogPartition
from ppl_models.base import Model, check_batch_size, check_count, check_counts, to_precision, to_tensor
from ppl_models.compositional_ebm.distribution import EnergyDistribution, check_energy
from ppl_models.compositional_ebm.methods import (
    EnergyFit,
    RelativeEnergy,
    RelativeTo,
    StandardisedEnergy,
    StandardisedNoise,
    build_objective,
    check_schedule,
    default_rate,
    judged_by_loss,
    moves_in_space,
    optimise,
    relative,
    split_of_few,
)
from ppl_models.compositional_ebm.networks import EnergyNetwork
from ppl_models.compositional_ebm.noise import (
    as_noise,
    noise_for_file,
    noise_for_load,
    noise_of_file,
    refuse_outside,
    without_noise,
)
from ppl_models.compositional_ebm.normaliser import estimate, importance
from ppl_models.compositional_ebm.sampling import sample

__all__ = ["EnergyModel"]

_CHECK_SAMPLES = 100_000
_ROWS_AT_ONCE = 16_384
_LOSS = 0.5  # nats a row; peers that are short of their optimum are below their noise by less


class EnergyModel(Model):
    """A density with an energy network, or with any energy of yours.

    Jiang, Qin, Wu, Chen, Yang and Zhang, ICML 2023, arXiv 2306.07485.

    The object is a Pyro model: ``ebm(x)`` has the site ``x`` in the plate ``data``, observed; its law is the
    ``EnergyDistribution`` that ``distribution()`` returns.

    Args:
        energy: a module from events ``(B, *event)``, given in their own units, to energies ``(B,)``, without a bias in
            its last layer.  None: a perceptron on standardised inputs, with random Fourier features in up to four
            dimensions.
        event_shape: shape of one datum.
        base: ``"tilt"``: b is the noise that the fit starts from, so that E = 0 is that noise and weights start at one.
            None: b = 1, ``p = exp(-E) / Z`` alone.  A distribution: b is it.
        support: constraint on data, where it is not all real numbers and ``base`` does not say it.
        hidden: widths of the default network.
        seed: of the default network's initial weights.

    Attributes:
        noise: the noise of the last fit.
        log_z: log Z of the fitted model; None before.
        result: what the last fit returned; None before.

    Raises:
        TypeError, ValueError: an argument does not fit.

    Example:
        >>> angle = torch.linspace(0, 6.2, 400)
        >>> ring = torch.stack([angle.cos(), angle.sin()], 1) * (1 + 0.1 * torch.sin(40 * angle))[:, None]
        >>> ebm = EnergyModel(event_shape=(2,))
        >>> result = ebm.fit(ring, num_steps=100, progress=False)
        >>> ebm.log_prob(ring).shape, ebm.sample(5, method="sir").shape
        (torch.Size([400]), torch.Size([5, 2]))
    """

    papers: ClassVar[tuple[Paper, ...]] = CompositionalLikelihood.papers

    kind: ClassVar[str] = "EnergyModel"

    def __init__(
        self,
        energy: nn.Module | None = None,
        event_shape: tuple[int, ...] = (2,),
        base: str | Distribution | None = "tilt",
        *,
        support: Any = None,
        hidden: tuple[int, ...] = (64, 64),
        seed: int = 0,
    ) -> None:
        super().__init__()
        check_energy(energy)
        if not (base is None or base == "tilt" or isinstance(base, Distribution)):
            raise ValueError(f"base must be 'tilt', None or a distribution, got {base!r}")
        self.event_shape = check_counts("event_shape", event_shape)
        if isinstance(base, Distribution) and (base.batch_shape or tuple(base.event_shape) != self.event_shape):
            raise ValueError(
                f"base must have no batch shape and event shape {self.event_shape}; it has {tuple(base.batch_shape)} "
                f"and {tuple(base.event_shape)} (.to_event joins independent dimensions)"
            )
        self._given = {"energy": energy is not None, "base": isinstance(base, Distribution)}
        self.hidden, self.seed = check_counts("hidden", hidden), seed
        size = torch.Size(self.event_shape).numel()
        self.energy = EnergyNetwork(size, self.hidden, seed=seed) if energy is None else energy
        self._given["support"] = support is not None
        if support is None and isinstance(base, Distribution):
            support = base.support
        self._base, self._support = base, support
        self.noise: Noise | None = None
        self.tilt: Noise | None = None
        self.log_z: float | None = None
        self.result: EnergyFit | None = None

    # ------------------------------------------------------------------ the Pyro model
    def forward(self, x: Tensor) -> Tensor:
        """The Pyro model of data ``(row, *event)``."""
        with pyro.plate("data", len(x)):
            observed: Tensor = pyro.sample("x", self._law(None), obs=x)
        return observed

    def distribution(self) -> EnergyDistribution:
        """The fitted density, for use inside any Pyro model; its draws are resampled noise.

        Raises:
            RuntimeError: the model has not been fitted.
        """
        self._fitted("distribution")
        noise, law = self._noise(), self._law(self.log_z)

        def sampler(num: int) -> Tensor:
            seed = int(torch.randint(2**62, ()))
            return sample(law, noise, num, "sir", seed)

        law.sampler = sampler
        return law

    def _law(self, log_z: float | None) -> EnergyDistribution:
        base: Any = self._base
        if base == "tilt":
            base = None if self.tilt is None else self.tilt.distribution()
        return EnergyDistribution(self.energy, self.event_shape, base, log_z, self._support)

    # ------------------------------------------------------------------ fitting
    def fit(
        self,
        x: Any,
        noise: Any = "auto",
        method: str = "compositional",
        noise_samples: int = 256,
        batch_size: int | None = 256,
        beta: Any = 0.1,
        num_steps: int = 2000,
        valid: Any = None,
        seed: int = 0,
        *,
        lr: float | None = None,
        weight_decay: float | None = None,
        average_last: float = 0.0,
        optimizer: Callable[..., Any] | None = None,
        checkpoint: str | Path | None = None,
        progress: bool | Callable[[dict[str, Any]], None] = True,
        **options: Any,
    ) -> EnergyFit:
        """Fit the energy to data.

        Args:
            x: data ``(N, *event)`` in their own units.
            noise: ``"auto"``: by the data (see ``noise.auto_noise``); a distribution over events; a noise model; or a
                Pyro callable that draws one row at the site ``"x"``.
            method: ``"compositional"``, or a peer: ``"mle"`` (beta = 1), ``"snl"``, ``"nce"``, ``"ence"``, ``"cd"``,
                ``"pcd"``, ``"short_run"``, ``"dsm"``, ``"ssm"``.
            noise_samples: noise draws M in a step.
            batch_size: rows in a step; None for all. The default is all rows where there are fewer.
            beta: weight of a new batch in the running estimate of Z, or a schedule of it.
            num_steps: steps of the optimiser.
            valid: held-out data. Their loss is in the history, and the parameters that were best on them are kept
                (not of contrastive divergence, whose loss tells nothing, nor with ``average_last``).  Without them,
                where there are fewer than four rows for each of the energy's parameters, a tenth of them is set aside
                for it, from 30 to 1,000: they are learned by heart in the default number of steps.  With more than
                ten parameters for each row the fit also ends when they do no better.
            seed: same seed, same machine, same result to the bit.
            lr: Adam's first rate; a cosine brings it to zero. None: 5e-3, or 1e-3 of contrastive divergence and score
                matching. In many dimensions more may serve: try it on ``valid``.
            weight_decay: AdamW's. None: 1,000 over the rows where some are set aside, else 0.
            average_last: share of the steps, from the end, over which the parameters are averaged.
            optimizer: a function from parameters to a torch optimiser, in place of Adam.
            checkpoint: file to resume from.
            progress: progress bar, or a function that receives its fields.
            options: of the method: ``correction``, ``warmup_steps``, ``adapt`` and ``on_collapse`` of the compositional
                objective, ``noise_ratio`` of NCE, ``num_steps`` and ``step_size`` of contrastive divergence as
                ``langevin_steps`` and ``langevin_step_size``, ``sigma`` of denoising; steps and sigma are in units
                of the data's standard deviations.

        Returns:
            The histories and log Z, also kept as ``result``.  A fit that ends in an error leaves the model unfitted.

        Raises:
            TypeError, ValueError: bad data or settings, before any work.
            NonFiniteError: the energy became non-finite; the message has the step and the share of the batch.
            CollapseError: the noise lost sight of the model, so that neither fit nor log Z would mean anything.

        Warns:
            SamplerWarning: a fresh estimate of log Z disagrees with the running one, or its weights have a heavy tail,
                as after a contrastive divergence that ran away; or a tilt is below its own noise on its own data.
        """
        x = self._check(x, "x")
        held_out = None if valid is None else self._check(valid, "valid").to(x)
        check_count("num_steps", num_steps)
        check_count("noise_samples", noise_samples)
        rate = default_rate(method) if lr is None else lr
        check_schedule(rate, 0.0 if weight_decay is None else weight_decay, average_last)
        size = check_batch_size(batch_size, len(x), 256)
        if noise is None and self._base is None:
            raise ValueError("an improper model (base=None) has no law to draw noise from: give noise='auto' or a law")
        found = as_noise(noise, x, self._support, seed)
        if held_out is not None:
            refuse_outside(found, held_out, "valid")
        for given, name in (("langevin_steps", "num_steps"), ("langevin_step_size", "step_size")):
            if given in options:
                options[name] = options.pop(given)
        build_objective(method, self, found, noise_samples, beta, options)  # refuses before anything is changed
        if moves_in_space(method):
            refuse_edges(self._support, f"method={method!r}")
            if self._base == "tilt" or found.support.is_discrete:
                refuse_edges(found.support, f"method={method!r}")
        self._start(x, found, seed, frozen=options.get("adapt", "none") != "none")
        rows, early, decay = x, False, weight_decay or 0.0
        if held_out is None and not average_last and judged_by_loss(method):
            split = split_of_few(len(x), self.energy, seed)
            if split is not None:
                rows, held_out, early = x[split.kept], x[split.aside], split.early
                decay = split.weight_decay if weight_decay is None else weight_decay
        data: tuple[Tensor, ...] = (rows,)
        held: tuple[Tensor, ...] | None = None if held_out is None else (held_out,)
        if self._base == "tilt" and relative(method, options):
            model = RelativeEnergy(self.energy, self.event_shape, self._law(None).support)
            relative_to = RelativeTo(method, model, found, noise_samples, beta, options)
            trained: nn.Module = relative_to
            objective = relative_to.density
            data = (rows, self._log_noise(rows))
            held = None if held_out is None else (held_out, self._log_noise(held_out))
        elif moves_in_space(method):
            inside = StandardisedEnergy(self, lambda: self._law(None), x)
            objective = trained = build_objective(
                method, inside, StandardisedNoise(found, inside), noise_samples, beta, options
            )
            data = (inside.standardise(rows),)
            held = None if held_out is None else (inside.standardise(held_out),)
        else:
            objective = trained = build_objective(method, self, found, noise_samples, beta, options)
        loop, history = optimise(
            trained,
            data,
            density=objective,
            valid=held,
            early=early,
            num_steps=num_steps,
            batch_size=None if size is None else min(size, len(rows)),
            lr=rate,
            weight_decay=decay,
            average_last=average_last,
            optimizer=optimizer,
            seed=seed,
            checkpoint=checkpoint,
            progress=progress,
        )
        fresh = self._measure(seed)
        running = float(objective.log_u) if isinstance(objective, CompositionalLikelihood) else fresh.value
        problem = unreliable(running, fresh.value, fresh.standard_error, fresh.khat, fresh.ess) or self._lost(x)
        if problem:
            warnings.warn(problem, SamplerWarning, stacklevel=2)
        self.result = EnergyFit(history, fresh, method, loop)
        return self.result

    def _start(self, x: Tensor, noise: Noise, seed: int, frozen: bool) -> None:
        """Units, noise and tilt of a new fit."""
        like = x if x.is_floating_point() else x.to(torch.get_default_dtype())
        self.energy.to(device=like.device, dtype=like.dtype)
        if isinstance(self.energy, EnergyNetwork):
            self.energy.learn(like.reshape(len(like), -1))
        self.noise, self.log_z, self.result = noise, None, None
        if self._base == "tilt":
            # A noise that learns leaves behind the law that it started from: that is the model's.
            self.tilt = copy.deepcopy(noise).requires_grad_(False) if frozen else noise

    @torch.no_grad()
    def _log_noise(self, x: Tensor) -> Tensor:
        return torch.cat([self._noise().log_prob(part) for part in x.split(_ROWS_AT_ONCE)])

    @torch.no_grad()
    def _lost(self, x: Tensor) -> str | None:
        """How far a tilt is below its own noise, E = 0, on its own data; None where it is not."""
        if self._base != "tilt":
            return None
        energies = torch.cat([self.energy(part) for part in x.split(_ROWS_AT_ONCE)]).double()
        gain = float(-energies.mean()) - float(self.log_z or 0.0)
        if gain > -_LOSS:
            return None
        return (
            f"the fitted density is {-gain:.3g} nats a row below the noise that it started from, on its own data: the "
            "fit ran away, as it may at rows many standard deviations out. Lower lr, or take logarithms of x"
        )

    def _measure(self, seed: int) -> LogPartition:
        found = importance(self._law(None), self._noise(), _CHECK_SAMPLES, seed)
        self.log_z = found.value
        return found

    # ------------------------------------------------------------------ queries
    @torch.no_grad()
    def log_prob(self, x: Any) -> Tensor:
        """Normalised log-density of data ``(N, *event)`` in nats, ``(N,)``.

        Raises:
            RuntimeError: the model has not been fitted.
            TypeError, ValueError: bad data.
        """
        self._fitted("log_prob")
        law, x = self._law(self.log_z), self._check(x, "x")
        held = itertools.chain(self.energy.parameters(), self.energy.buffers())
        x = x.to(next((t for t in held if t.is_floating_point()), x))
        return torch.cat([law.log_prob(part) for part in x.split(_ROWS_AT_ONCE)])

    def log_partition(
        self, method: str = "importance", num_samples: int = 100_000, seed: int = 0, **options: Any
    ) -> LogPartition:
        """log Z with its error.

        Args:
            method: ``"importance"`` from the noise; ``"ais"``: annealed importance sampling both ways, a bound on
                either side; ``"bridge"``: from Markov chains; ``"quadrature"`` in one or two dimensions.
            num_samples: noise draws, or points of the grid.
            seed: of the draws.
            options: of ``inference.ais_sandwich`` or ``inference.bridge_sampling``.

        Importance sampling underestimates log Z on average, so that log-likelihoods come out too high by half its
        squared error; ``upper`` bounds log Z from above on average, and so the likelihood from below.

        Raises:
            RuntimeError: the model has not been fitted.
            TypeError, ValueError: bad method or counts.

        Warns:
            SamplerWarning: the weights have Pareto k above 0.7.
        """
        self._fitted("log_partition")
        check_count("num_samples", num_samples, 100)
        found: LogPartition = estimate(self._law(None), self._noise(), method, num_samples, seed, **options)
        return found

    def sample(self, n: int, method: str = "hmc", seed: int = 0, **options: Any) -> Tensor:
        """Draws ``(n, *event)``.

        Args:
            n: number of draws.
            method: ``"sir"``: resampled noise; ``"hmc"``, ``"nuts"``, ``"sgld"``: Markov chains that start from that;
                ``"annealed"``: tempered SMC from the noise.
            seed: same seed, same machine, same draws to the bit.
            options: of chains ``warmup_steps``, ``thin`` (steps from one kept draw to the next) and ``step_size`` (of
                ``"sgld"`` in units of each number's spread); of annealing those of ``inference.SMC``.

        Raises:
            RuntimeError: the model has not been fitted.
            TypeError, ValueError: bad method or counts.
        """
        self._fitted("sample")
        check_count("n", n)
        return sample(self._law(None), self._noise(), n, method, seed, **options)

    def _noise(self) -> Noise:
        assert self.noise is not None
        return self.noise

    def _fitted(self, query: str) -> None:
        if self.log_z is None:
            raise RuntimeError(f"{query} needs a fitted model: call fit(x) first")

    def _check(self, x: Any, name: str) -> Tensor:
        x = to_tensor(name, x)
        if x.dim() != len(self.event_shape) + 1 or tuple(x.shape[1:]) != self.event_shape:
            hint = " (one datum alone: give x[None])" if tuple(x.shape) == self.event_shape else ""
            wanted = ", ".join(map(str, ("N", *self.event_shape)))
            raise ValueError(f"{name} must have shape ({wanted}), got {tuple(x.shape)}{hint}")
        if not x.is_floating_point():
            x = to_precision(name, x, torch.get_default_dtype())
        if self._support is not None:
            inside = self._support.check(x)
            if not bool(inside.all()):
                bad = int((~inside.reshape(len(x), -1).all(1)).sum())
                raise ValueError(f"{bad} of {len(x)} rows of {name} lie outside the model's support")
        return x

    # ------------------------------------------------------------------ files
    def config(self) -> dict[str, Any]:
        """The constructor's arguments that a file can hold."""
        return {
            "event_shape": list(self.event_shape),
            "base": None if self._base is None else "tilt",
            "hidden": list(self.hidden),
            "seed": self.seed,
        }

    @classmethod
    def load(cls, path: str | Path, **objects: Any) -> Self:
        """The model that ``save`` wrote, on the CPU. Nothing that the file holds is executed.

        Args:
            path: the file.
            objects: what a file cannot hold and the model was made with: ``energy``, ``base``, ``support``, and
                ``noise`` of ``fit``.
        """
        noise = objects.pop("noise", None)
        try:
            model = super().load(path, **objects)
        except CheckpointError as error:
            if "energy" in objects or "state_dict" not in str(error):
                raise
            raise CheckpointError(
                f"{path} holds another energy than the default network; where it was a module of yours, give "
                "load(path, energy=...)"
            ) from error
        if noise is not None or (model.log_z is not None and model.noise is None):
            like = next(iter(model.energy.parameters()))
            model.noise = noise_for_load(noise, tuple(model.event_shape), like, path)
            model.tilt = model.noise if model._base == "tilt" else None
        return model

    def _extra_state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        meta: dict[str, Any] = {"given": self._given, "log_z": self.log_z, "noise": None}
        tensors: dict[str, Tensor] = {}
        for name, part in (("noise", self.noise), ("tilt", self.tilt if self.tilt is not self.noise else None)):
            if part is None:
                continue
            found, meta[name] = noise_for_file(part)
            tensors |= {f"{name}/{n}": v for n, v in found.items()}
        return tensors, meta

    def _restore_extra(self, tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> None:
        missing = [name for name, given in meta["given"].items() if given and not self._given[name]]
        if missing:
            raise ValueError(
                f"the model was made with {', '.join(missing)} of yours, which a file cannot hold: give load(path, "
                + ", ".join(f"{n}=..." for n in missing)
                + ")"
            )
        self.log_z = meta["log_z"]
        for name in ("noise", "tilt"):
            state = {n.removeprefix(f"{name}/"): v for n, v in tensors.items() if n.startswith(f"{name}/")}
            setattr(self, name, noise_of_file(meta.get(name), state))
        if self._base == "tilt" and self.tilt is None:
            self.tilt = self.noise

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """The energy's tensors; the noise has a place of its own in the file."""
        return without_noise(super().state_dict(*args, **kwargs), kwargs.get("prefix", ""))
