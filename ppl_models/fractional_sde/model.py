"""SDEs driven by fractional noise, fitted to series observed with error.

R. Daems, M. Opper, G. Crevecoeur, T. Birdal, *Variational Inference for SDEs Driven by Fractional Noise*, ICLR 2024,
arXiv 2310.12975: fractional noise as a sum of Ornstein-Uhlenbeck processes, a controlled SDE as the posterior, the
evidence bound by Girsanov's theorem.  Where this differs from the authors' code: the path's KL is a sum over dimensions
(theirs is divided by D), V(0) of Mandelbrot-Van Ness noise has a posterior, steps are exact in the noise's state,
and the posterior starts at the linear optimum and may shrink the steps' noise, so that linear models have no gap.
"""

import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path as FilePath
from typing import Any, ClassVar, Self

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn

from inference._errors import SamplerWarning
from inference.fit import fit as run_fit
from inference.kernels import NUTS
from inference.mcmc import MCMC
from inference.runtime.generators import derive_seed, generator, scoped_seed
from ppl_models.base import check_batch_size, check_count
from ppl_models.fractional_sde.bound import PathBound, PathLikelihood, particles_of
from ppl_models.fractional_sde.data import SeriesData, check_series, scales
from ppl_models.fractional_sde.exact import (
    ExactEvidence,
    ParameterModel,
    checked_priors,
    climb,
    default_priors,
    gaussian_log_likelihood,
    one_step_ahead,
    posterior_draws,
)
from ppl_models.fractional_sde.initial import start_from_increments
from ppl_models.fractional_sde.networks import (
    ConstantDiffusion,
    DiagonalNeuralDiffusion,
    LinearDrift,
    NeuralDrift,
    check_sizes,
)
from ppl_models.fractional_sde.paths import PathModel
from ppl_models.fractional_sde.posterior import Draws, Evidence, PathPosterior, SolverGrid, start_state
from ppl_models.fractional_sde.pyro_form import ControlledPath, PriorPath
from ppl_models.fractional_sde.results import FractionalSDEResult, PathPrediction
from ppl_models.fractional_sde.system import FractionalSystem, HurstNoise
from sde import MarkovNoise, snap_times
from sde._checks import as_number, as_times

__all__ = ["FractionalSDE"]

_POINTS = 256  # of the data at which a drift's derivatives are looked at
_EXACT_STEPS = 400  # of Adam by default, before a search that ends sooner where it is at the maximum
_METHODS = ("auto", "exact", "variational", "nuts")


class FractionalSDE(PathModel):
    """dX = b(t, X) dt + s(t, X) o dB with fractional (or Brownian) B, observed with Gaussian error at some times.

    Daems, Opper, Crevecoeur and Birdal, ICLR 2024, arXiv 2310.12975.

    The object is a Pyro model: ``model(times, observations, mask)`` has the sites ``start`` (the standardised start of
    state and noise), ``path`` (its density is relative to the prior's path measure) and ``obs``, in the plate
    ``series``; ``model.guide`` has the first two.  Where drift and diffusion are linear, paths are integrated out
    exactly and ``model.parameter_model`` is a Pyro model of the parameters.

    Args:
        state_size: D, which is also the size of an observation.
        drift: ``"neural"`` (a network of the state), ``"linear"`` (constant - theta x), ``"constant"``, ``"none"``, or
            a torch module ``(time, x (B, D)) -> (B, D)``.
        diffusion: ``"constant"`` (learned, one a dimension), ``"neural"`` (a positive network of each dimension's own
            state, read in the Stratonovich sense), a positive number, or a torch module; an attribute ``additive =
            True`` of it says that it ignores the state.
        noise: ``"fractional"``, ``"brownian"``, or an ``sde.MarkovNoise``.
        hurst: ``"learn"``, ``"learn_per_dimension"``, ``"learn_in_time"`` (needs ``kind="rl"`` and
            ``posterior="neural"``), or a number or ``(D,)`` tensor in (0, 1).
        kind: ``"mvn"`` or 1 (stationary increments), ``"rl"`` or 2.
        num_processes, max_speed, normalisation, grid, start: of the noise, see
            ``sde.MarkovFractionalBrownianMotion``; without ``max_speed`` the fastest process of the default grid also
            keeps up with the observations.
        horizon: time up to which the noise's weights are optimal and predictions can be asked for; twice the last
            observation time by default.
        initial: law of X(0): ``"learn"``, or (mean, std); std 0 for a known start.
        posterior: ``"gaussian"`` (each step's noise is shifted and shrunk; exact for linear models), ``"control"``
            (shifted only: Girsanov, linear optimum plus network) or ``"neural"`` (the paper's: a network alone).
        initial_posterior: of V(0): ``"gaussian"``, or ``"prior"`` as in the authors' code.
        hidden: widths of all networks.
        seed: of the networks' initial weights.

    Attributes:
        result: what the last fit returned, None before.

    Raises:
        TypeError, ValueError: an argument that is unknown, out of range, or at odds with another.

    Example:
        >>> times = torch.linspace(0.1, 1.0, 10)
        >>> model = FractionalSDE(1, drift="linear", hurst="learn", initial=(0.0, 0.0))
        >>> result = model.fit(times, torch.sin(3 * times).reshape(1, 10, 1), num_steps=5, progress=False)
        >>> model.predict([0.55, 1.2], num_samples=20).samples.shape
        torch.Size([20, 1, 2, 1])
    """

    kind: ClassVar[str] = "FractionalSDE"

    def __init__(
        self,
        state_size: int = 1,
        drift: str | nn.Module = "neural",
        diffusion: str | float | nn.Module = "constant",
        noise: str | MarkovNoise = "fractional",
        hurst: str | float | Tensor | Sequence[float] = "learn",
        kind: str | int = "mvn",
        *,
        num_processes: int = 7,
        max_speed: float | None = None,
        normalisation: str = "unit",
        grid: str | Tensor | Sequence[float] = "horizon",
        start: str = "auto",
        horizon: float | None = None,
        initial: str | tuple[Any, Any] = "learn",
        posterior: str = "gaussian",
        initial_posterior: str = "gaussian",
        hidden: Sequence[int] = (64, 64),
        seed: int = 0,
    ) -> None:
        super().__init__()
        check_count("state_size", state_size)
        widths = check_sizes("hidden", hidden)
        settings = {
            "num_processes": check_count("num_processes", num_processes),
            "max_speed": max_speed,
            "kind": kind,
            "normalisation": normalisation,
            "grid": grid,
            "start": start,
        }
        horizon = None if horizon is None else as_number(horizon, "horizon")
        self._config = {
            "state_size": state_size, "drift": drift, "diffusion": diffusion, "noise": noise, "hurst": hurst,
            "kind": kind, **{k: v for k, v in settings.items() if k != "kind"}, "horizon": horizon, "initial": initial,
            "posterior": posterior, "initial_posterior": initial_posterior, "hidden": widths, "seed": seed,
        }  # fmt: skip
        self.state_size, self.horizon = state_size, horizon
        with scoped_seed(seed):
            source = HurstNoise(state_size, noise, hurst, settings)
            self.system = FractionalSystem(state_size, drift, diffusion, source, initial, widths)
            self.posterior = PathPosterior(self.system, posterior, initial_posterior, 0, widths)
            self.likelihood = PathLikelihood(state_size)
        if horizon is not None:
            source.set_horizon(horizon)
        self.result: FractionalSDEResult | None = None
        self._data: SeriesData | None = None
        self._max_step: float | None = None
        self._method = "variational"

    # ------------------------------------------------------------------ data
    def config(self) -> dict[str, Any]:
        """The constructor's arguments, as plain data."""
        return self._plain(self._config)

    def _initialise(self, data: SeriesData, seed: int) -> None:
        """Starting values and units from the data."""
        found = scales(data)
        system, span = self.system, float(data.times[-1])
        system.set_units(data.times, found.jump, found.mean)
        with torch.no_grad():
            for module in (system.drift, system.diffusion):
                if isinstance(module, NeuralDrift | DiagonalNeuralDiffusion):
                    module.centre.copy_(found.mean)
                    module.scale.copy_(found.std)
            if isinstance(system.drift, NeuralDrift):
                system.drift.rate.fill_(10 / span)
            if isinstance(system.drift, LinearDrift):
                theta = 2 / span if system.drift.reverts else None
                system.drift.set(theta, found.slope if theta is None else found.mean * theta)
            if isinstance(system.diffusion, ConstantDiffusion) and system.diffusion.learned:
                system.diffusion.log_scale.copy_(found.jump.log())
            if isinstance(system.diffusion, DiagonalNeuralDiffusion):
                system.diffusion.unit.copy_(found.jump)
            if system.learns_start:
                first = data.values[:, 0][data.mask[:, 0].all(-1)]
                mean = first.mean(0) if len(first) else found.mean
                std = first.std(0) if len(first) > 2 else found.std
                system.put_start(mean, torch.where(std > 0, std, found.std), found.std)
            self.posterior.drift.set_units(data.times, found.jump, found.mean)
            self.posterior.centre.copy_(found.mean)
            self.posterior.spread.copy_(found.std)
        if not isinstance(system.drift, LinearDrift) and system.noise.constant_loadings:
            jump = start_from_increments(system, data, found, self.likelihood().detach(), seed)
            if jump is not None:
                self._put_jump(jump)
        if not isinstance(system.drift, LinearDrift):
            seen = data.values[data.mask.all(-1)]
            points = seen[:: max(1, len(seen) // _POINTS)] if len(seen) else found.mean.unsqueeze(0)
            self.posterior.linearise(system.drift, found.mean, points)

    @torch.no_grad()
    def _put_jump(self, jump: Tensor) -> None:
        """What the noise moves x by in a tick, over the tick's root, ``(D,)``."""
        diffusion = self.system.diffusion
        if isinstance(diffusion, ConstantDiffusion) and diffusion.learned:
            diffusion.log_scale.copy_(jump.log())
        if isinstance(diffusion, DiagonalNeuralDiffusion):
            diffusion.unit.copy_(jump)

    def _evidence(self, values: Tensor, mask: Tensor) -> Evidence:
        """From ``(B, T, D)`` data; a mask that all series share is held once."""
        here = mask.to(values.dtype).movedim(0, 1)
        if self._shared:
            here = here[:, :1]
        return Evidence(values.movedim(0, 1), here, self.likelihood().detach())

    def _weigh(
        self, grid: SolverGrid, observations: Tensor, mask: Tensor, particles: int, seed: int | None
    ) -> tuple[Tensor, Draws]:
        draws = self.posterior.draw(self.system, grid, self._evidence(observations, mask), particles, seed)
        here = mask.to(observations.dtype).movedim(0, 1)
        return self.likelihood.log_prob(draws.x, observations.movedim(0, 1), here), draws

    # ------------------------------------------------------------------ Pyro
    def forward(self, times: Any, observations: Any = None, mask: Any = None, num_series: int = 1) -> Tensor:
        """The Pyro model; returns the states at ``times``, ``(N, T, D)``.

        Args:
            times: ``(T,)``.
            observations: ``(N, T, D)``, or None to draw them.
            mask: as in ``fit``.
            num_series: N where there are no observations.
        """
        clock, values, here = self._arguments(times, observations, mask, num_series, (self.state_size,))
        grid = self._grid(clock)
        batch, size = len(values), self.state_size
        noise = self.system.noise.current()
        with pyro.plate("series", batch):
            xi = pyro.sample(
                "start",
                dist.Normal(values.new_zeros(()), 1.0).expand([batch, size, noise.num_processes + 1]).to_event(2),
            )
            x0, v0 = start_state(self.system, noise, xi)

            def simulate() -> Any:
                return self._solve_prior(noise, grid, x0, v0)

            path = pyro.sample("path", PriorPath(simulate, torch.Size([batch]), torch.Size([len(clock), size])))
            law = dist.Normal(path, self.likelihood()).mask(here).to_event(2)
            pyro.sample("obs", law, obs=None if observations is None else values)
        return path

    def guide(self, times: Any, observations: Any, mask: Any = None, num_series: int = 1) -> None:
        """The Pyro guide of the same arguments: the posterior's start and path."""
        clock, values, here = self._arguments(times, observations, mask, num_series, (self.state_size,))
        grid = self._grid(clock)
        evidence = Evidence(values.movedim(0, 1), here.to(values.dtype).movedim(0, 1), self.likelihood().detach())
        plan = self.posterior.plan(self.system, grid, evidence)
        law = self.posterior.start_law(self.system, evidence, plan)
        covariance = law.factor @ law.factor.mT
        with pyro.plate("series", len(values)):
            start = dist.MultivariateNormal(law.mean, covariance.expand(len(values), -1, -1, -1)).to_event(1)
            xi = pyro.sample("start", start)
            x0, v0 = start_state(self.system, plan.noise, xi)

            def simulate() -> Any:
                return self.posterior.path(self.system, grid, plan, x0, v0)

            shape = torch.Size([len(clock), self.state_size])
            pyro.sample("path", ControlledPath(simulate, torch.Size([len(values)]), shape))

    @property
    def parameter_model(self) -> ParameterModel:
        """A Pyro model of the linear form's parameters under the default priors, for any engine; its ``in_full`` turns
        draws of the sites into the SDE's parameters.
        """
        return self._parameter_model(None)

    # ------------------------------------------------------------------ fitting
    def fit(
        self,
        times: Any,
        observations: Any,
        mask: Any = None,
        noise_std: float | str | Sequence[float] | Tensor = 0.1,
        seed: int = 0,
        *,
        method: str = "auto",
        num_steps: int | None = None,
        lr: float | None = None,
        batch_size: int | None = None,
        num_particles: int = 8,
        bound: str = "elbo",
        max_step: float | None = None,
        clip_norm: float | None = 100.0,
        kl_warmup: int = 0,
        average_last: float = 0.2,
        checkpoint_segments: int | str | None = None,
        priors: Mapping[str, Any] | None = None,
        num_samples: int = 500,
        warmup_steps: int = 500,
        num_chains: int = 4,
        checkpoint: str | FilePath | None = None,
        progress: bool | Callable[[dict[str, Any]], None] = True,
    ) -> FractionalSDEResult:
        """Fit to series observed at common times; a series that lacks some has its mask False there.

        The first fit starts from scales of the data and, for a nonlinear drift, from what increments say of drift,
        noise and H (``initial.py``); a later one goes on from the parameters that the model has.  H beside a neural
        drift waits for half of the steps, until the posterior has learned with it.

        Args:
            times: strictly increasing, ``(T,)``; time 0 is where the path starts.
            observations: ``(N, T, D)``; values where the mask is False don't matter and may be NaN.
            mask: ``(N, T)`` or ``(N, T, D)``, True where there is an observation; None for all.
            noise_std: of the observations' errors: a number, ``(D,)``, or ``"learn"``; 0 for exact observations of a
                linear model.
            seed: same seed, same result to the bit.
            method: ``"exact"`` maximises the evidence of the linear form; ``"variational"`` maximises a bound;
                ``"nuts"`` samples the parameters of the linear form, starting at the maximum; ``"auto"`` is exact where
                the model is linear and variational elsewhere.
            num_steps: of the optimiser (Adam, cosine schedule); 400 exact, 1000 variational.  An exact fit goes on to
                the maximum by L-BFGS, in up to half as many more, unless in batches.
            lr: its learning rate; 0.05 exact, 0.005 variational.
            batch_size: series in a step; None for all.
            num_particles: paths of each series in a step.
            bound: ``"elbo"`` or ``"iwae"``.
            max_step: longest solver step; a hundredth of the span by default.
            clip_norm: longest gradient.
            kl_warmup: steps over which the weight of the path's KL rises to 1.
            average_last: share of the steps, from the end, over which parameters are averaged.
            checkpoint_segments: of a solve, for long series: ``"sqrt"`` makes memory grow like the root of its steps.
            priors: for NUTS: parameter (``hurst``, ``scale``, ``theta``, ``constant``, ``noise_std``) of
                dX = (constant - theta X) dt + scale dB to a Pyro distribution, of one number for all dimensions or
                ``(D,)``, if the model learns that parameter; those given replace the defaults, see
                ``default_priors``, which are in the data's own units.
            num_samples, warmup_steps, num_chains: of NUTS.
            checkpoint: file to resume from (of NUTS, a folder beside it holds the chains).
            progress: progress bar, or a function that receives its fields.

        Returns:
            The result, which is also kept as ``result``.

        Raises:
            TypeError, ValueError: bad data or settings, before any work is done.
            NonFiniteError: the loss became non-finite.

        Warns:
            SamplerWarning: an exact fit of 400 steps or more ended where the evidence still rises.
        """
        data = check_series(times, observations, mask, (self.state_size,))
        if method not in _METHODS:
            raise ValueError(f"method must be one of {', '.join(_METHODS)}, got {method!r}")
        if method in ("exact", "nuts") and not self.system.linear:
            raise ValueError(
                f"method={method!r} needs drift 'linear', 'constant' or 'none', a constant diffusion and one H; use "
                "method='variational'"
            )
        method = ("exact" if self.system.linear else "variational") if method == "auto" else method
        if priors is not None and method != "nuts":
            raise ValueError("priors are for method='nuts'")
        derive_seed(seed)
        size = check_batch_size(batch_size, len(data.values))
        check_count("num_particles", num_particles)
        self.likelihood.check(noise_std, positive=method == "variational")
        self.system.check_start(data, noise_std)
        if method == "nuts":
            priors = checked_priors(self.system, priors, isinstance(noise_std, str))
        fresh = self._data is None
        self._see(data, max_step)
        self.likelihood.set(noise_std, scales(data).std)
        if fresh:
            self._initialise(data, seed)
        exact = method != "variational"
        steps = (_EXACT_STEPS if exact else 1000) if num_steps is None else check_count("num_steps", num_steps)
        objective: nn.Module
        if exact:
            objective = ExactEvidence(self.system, self.likelihood, data.times, data.shared)
        else:
            grid = self._grid(data.times, checkpoint=checkpoint_segments)
            wait = steps // 2 if isinstance(self.system.drift, NeuralDrift) else 0
            objective = PathBound(self, grid, num_particles, bound, kl_warmup, wait)
        history = converged = None
        if any(p.requires_grad for p in objective.parameters()):
            history = run_fit(
                objective,
                (data.values, data.mask),
                num_steps=steps,
                batch_size=size,
                lr=(0.05 if exact else 0.005) if lr is None else lr,
                scheduler=lambda made: torch.optim.lr_scheduler.CosineAnnealingLR(made, steps, 1e-5),
                clip_norm=clip_norm,
                average_last=0.0 if exact else average_last,
                seed=seed,
                checkpoint=checkpoint,
                progress=progress,
            )
            # The draws of NUTS need no more than its start, and batches were asked for where all series are too many.
            if method == "exact" and size is None and not history.interrupted:
                converged = climb(objective, (data.values, data.mask), steps // 2)
                if not converged and steps >= _EXACT_STEPS:
                    text = "the fit is not at a maximum: give more num_steps, or float64 data"
                    warnings.warn(text, SamplerWarning, stacklevel=3)
        self._method = method
        self.result = FractionalSDEResult(self, method, history, converged=converged)
        if method == "nuts":
            folder = None if checkpoint is None else FilePath(f"{checkpoint}.chains")
            self._sample(history, priors, num_samples, warmup_steps, num_chains, seed, folder, progress)
        return self.result

    def _parameter_model(self, priors: Mapping[str, Any] | None) -> ParameterModel:
        if not self.system.linear:
            raise ValueError("parameters can be sampled with the paths integrated out for linear models only")
        data = self.data
        chosen = default_priors(self.system, self.likelihood().detach(), float(data.times[-1]), self.likelihood.learned)
        chosen |= dict(priors or {})
        here = data.mask.double().movedim(0, 1)
        here = here[:, :1] if data.shared else here
        values = data.values.movedim(0, 1)
        drift = self.system.drift
        assert isinstance(drift, LinearDrift)
        # A prior of the user's is of the SDE's parameter, the default one of what it is in the data's units.
        tick = torch.ones_like(self.system.tick) if "scale" in (priors or {}) else self.system.tick
        centre = torch.zeros_like(drift.centre) if "constant" in (priors or {}) else drift.centre
        return ParameterModel(self.system, data.times, values, here, self.likelihood().detach(), chosen, tick, centre)

    def _sample(
        self,
        history: Any,
        priors: Any,
        num_samples: int,
        warmup: int,
        chains: int,
        seed: int,
        folder: Any,
        progress: Any,
    ) -> None:
        model = self._parameter_model(priors)
        if not model.priors:
            raise ValueError(
                "there is no free parameter to sample: let hurst, diffusion, drift or noise_std be learned"
            )
        mcmc = MCMC(
            NUTS(model, full_mass=True, target_accept_prob=0.9, init_strategy=model.near_the_maximum),
            num_samples, warmup, num_chains=chains, seed=seed, checkpoint=folder, progress=progress, compile=False,
            transforms=model.units(),
        )  # fmt: skip
        mcmc.run()
        samples = model.in_full(mcmc.get_samples(group_by_chain=True))
        self.result = FractionalSDEResult(self, "nuts", history, samples, mcmc.sample_stats)
        self._put({name: value.flatten(0, 1).mean(0) for name, value in samples.items()})

    def _put(self, values: Mapping[str, Tensor]) -> None:
        """Set parameters of the linear form."""
        system = self.system
        drift = system.drift
        assert isinstance(drift, LinearDrift)
        with torch.no_grad():
            if "hurst" in values:
                system.noise.raw_hurst.copy_(torch.logit(values["hurst"]))
            if "scale" in values:
                system.put_scale(values["scale"].expand(self.state_size))
            drift.set(values.get("theta"), values.get("constant"))
            if "noise_std" in values:
                self.likelihood.log_std.copy_(values["noise_std"].log().expand(self.state_size))

    # ------------------------------------------------------------------ queries
    def elbo(self, num_particles: int = 256, seed: int = 0) -> Tensor:
        """The evidence bound in nats, summed over all series, a scalar; after an exact fit the evidence itself."""
        if self._fitted() != "variational":
            return self._exact_evidence()
        bound, _ = self._bounds(num_particles, seed)
        return bound

    def log_evidence(self, num_particles: int = 64, seed: int = 0) -> Tensor:
        """log p(observations) in nats, summed over series, a scalar: exact for a linear model, else the
        importance-weighted bound of ``num_particles`` draws a series (Burda et al. 2015, arXiv 1509.00519).
        """
        if self._fitted() != "variational":
            return self._exact_evidence()
        _, bound = self._bounds(num_particles, seed)
        return bound

    def _fitted(self) -> str:
        _ = self.data
        return self._method

    @torch.no_grad()
    def _exact_evidence(self) -> Tensor:
        data = self.data
        here = data.mask.double().movedim(0, 1)
        here = here[:, :1] if data.shared else here
        return gaussian_log_likelihood(
            self.system.linear_sde(), data.times, data.values.movedim(0, 1), here, self.likelihood()
        ).sum()

    @torch.no_grad()
    def predict(self, new_times: Any, num_samples: int = 200, seed: int = 0) -> PathPrediction:
        """Posterior of X at new times, between the observations (interpolation) and after them (forecast).

        Mean and variance are in closed form after an exact fit, over the draws of the parameters after NUTS, and of the
        draws of paths after a variational fit.

        Args:
            new_times: strictly increasing, ``(T',)``, up to the horizon.
            num_samples: joint draws.
            seed: of the draws.

        Raises:
            RuntimeError: the model has not been fitted.
            ValueError: times that are unsorted, repeated, or beyond the horizon.
        """
        method = self._fitted()
        wanted = as_times(new_times, "new_times").cpu()
        check_count("num_samples", num_samples)
        self._within(wanted, "new_times")
        data, dtype = self.data, self.data.values.dtype
        source = generator(seed, "predict", device=data.values.device)
        if method != "variational":
            found = posterior_draws(
                self.system, self._parameter_model({}) , self.result.samples if self.result else {}, wanted,
                num_samples, source,
            )  # fmt: skip
            mean, variance, samples, noise = (part.to(dtype) for part in found)
            return PathPrediction(wanted, mean, variance, samples, noise)
        asked, place = torch.unique(snap_times(wanted, data.times), return_inverse=True)
        grid, evidence = self._grid(data.times, asked), self._evidence(data.values, data.mask)
        at_once = particles_of(len(data.values))
        parts = [
            self.posterior.draw(
                self.system, grid, evidence, min(at_once, num_samples - i), derive_seed(seed, "predict", i)
            ).x.unflatten(1, (-1, len(data.values)))
            for i in range(0, num_samples, at_once)
        ]
        samples = torch.cat(parts, 1)[place].permute(1, 2, 0, 3)
        unbiased = num_samples > 1
        return PathPrediction(
            wanted, samples.mean(0), samples.var(0, unbiased=unbiased), samples, self.likelihood().detach()
        )

    @torch.no_grad()
    def forecast_errors(self) -> tuple[Tensor, Tensor]:
        """Forecast of each observation from those before it, for linear models: error and standard deviation.

        Returns:
            Observation minus forecast, and the forecast's standard deviation with the observation's noise, both
            ``(N, T, D)``; of calibrated forecasts the quotients are standard normal.
        """
        self._fitted()
        if not self.system.linear:
            raise ValueError("forecast_errors needs a linear model")
        data = self.data
        here = data.mask.double().movedim(0, 1)
        error, std = one_step_ahead(
            self.system.linear_sde(), data.times, data.values.movedim(0, 1), here, self.likelihood()
        )
        return error.movedim(0, 1).to(data.values.dtype), std.movedim(0, 1).to(data.values.dtype)

    def sample_prior(self, times: Any, num_samples: int = 1, seed: int = 0) -> Tensor:
        """Draws of X from the prior SDE, ``(num_samples, T, D)``.

        Raises:
            ValueError: times that are unsorted, repeated or beyond the horizon.
        """
        return self._prior_paths(times, num_samples, seed)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        super()._apply(fn, recurse)
        result: FractionalSDEResult | None = getattr(self, "result", None)
        if result is not None:
            result.samples.update({n: fn(v).to(v.dtype) for n, v in result.samples.items()})
        return self

    # ------------------------------------------------------------------ files
    def _extra_state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        if self._data is None or self.result is None:
            return {}, {}
        tensors = dict(self._data._asdict())
        tensors |= {f"samples/{n}": v for n, v in self.result.samples.items()}
        tensors |= {f"stats/{n}": v for n, v in self.result.sample_stats.items()}
        meta = {"method": self._method, "max_step": self._max_step, "learned_noise": self.likelihood.learned}
        return tensors, meta

    def _restore_extra(self, tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> None:
        if "method" not in meta:
            return
        state = {k: v.clone() for k, v in self.state_dict().items()}
        data = SeriesData(tensors["times"], tensors["values"], tensors["mask"].bool())
        self._see(data, meta["max_step"])
        self.load_state_dict(state)
        self.likelihood.learn(bool(meta["learned_noise"]))
        self._method = str(meta["method"])
        groups = [{n.removeprefix(g): v for n, v in tensors.items() if n.startswith(g)} for g in ("samples/", "stats/")]
        self.result = FractionalSDEResult(self, self._method, None, *groups)
