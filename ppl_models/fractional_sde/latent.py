"""Latent SDEs with fractional noise below an encoder and a decoder, for video and for series of vectors.

R. Daems, M. Opper, G. Crevecoeur, T. Birdal, *Variational Inference for SDEs Driven by Fractional Noise*, ICLR 2024,
arXiv 2310.12975, section 5.  Where this differs: the encoder also gives a stand-in observation of the latent state at
each frame, from which the linear part of the posterior follows in closed form (arXiv 2505.17150); the path's KL is a
sum over dimensions; the content has a prior, so that new videos can be drawn.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path as FilePath
from typing import Any, ClassVar, NamedTuple

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn

from inference.fit import fit as run_fit
from inference.runtime.generators import derive_seed, generator, scoped_seed
from ppl_models.base import check_batch_size, check_count
from ppl_models.fractional_sde.bound import PathBound, PathLikelihood, particles_of
from ppl_models.fractional_sde.data import SeriesData, check_series
from ppl_models.fractional_sde.networks import (
    ConstantDiffusion,
    DiagonalNeuralDiffusion,
    NeuralDrift,
    check_sizes,
)
from ppl_models.fractional_sde.paths import PathModel
from ppl_models.fractional_sde.posterior import Draws, Evidence, PathPosterior, SolverGrid, start_state
from ppl_models.fractional_sde.pyro_form import ControlledPath, PriorPath
from ppl_models.fractional_sde.results import LatentResult, PathPrediction
from ppl_models.fractional_sde.sprites import SpriteDecoder
from ppl_models.fractional_sde.system import FractionalSystem, HurstNoise
from ppl_models.fractional_sde.video import (
    Content,
    Context,
    check_network,
    frame_decoder,
    frame_encoder,
    interpolate,
)
from sde import MarkovNoise, snap_times
from sde._checks import as_number, as_times

__all__ = ["LatentFractionalSDE"]

_FAR_FROM_SQUASHED = 10.0  # of values whose mean lies in (0, 1): no noise reaches there, bytes do
_STAND_IN_STD = 0.1  # of the encoder's observations at the start: with 1 decoders learn from states that are noise
_LIKELIHOODS = ("gaussian", "bernoulli")


class _Encoded(NamedTuple):
    evidence: Evidence
    content_mean: Tensor  # (B, W)
    content_log_std: Tensor


class LatentFractionalSDE(PathModel):
    """Frames y_i ~ p(y | decoder(w, X(t_i))), w ~ N(0, I) the content, dX = b(t, X) dt + s(t, X) o dB the motion.

    Daems, Opper, Crevecoeur and Birdal, ICLR 2024, arXiv 2310.12975, section 5.

    The object is a Pyro model with the sites ``content``, ``start``, ``path`` and ``obs`` in the plate ``series``;
    ``model.guide`` has the first three.

    Args:
        data_shape: of a frame: ``(C, H, W)``, ``(F,)``, or any other with own networks.
        state_size: D, latent dimensions.
        content_size: W, of the content vector; 0 for none.
        drift, diffusion, noise, hurst, kind: as of ``FractionalSDE``.
        likelihood: ``"gaussian"`` (noise_std is given to ``fit``) or ``"bernoulli"`` (frames in [0, 1]).
        squash: whether the Gaussian mean passes a sigmoid; by default for images.
        encoder: module ``(M, *data_shape) -> (M, features)`` of frames in the data's units; by default convolutions or
            dense layers, of standardised frames unless they are squashed or Bernoulli.
        decoder: module ``(M, content_size + state_size) -> (M, *data_shape)``, in the data's units as well; by default
            convolutions or dense layers. ``"sprites"`` for images of things that keep their look and move: each two
            dimensions of the state are the place of one, see ``SpriteDecoder``.
        features: of a frame.
        context_size: C, of the context g(t).
        width: channels of the first convolution.
        posterior: ``"gaussian"``, ``"control"`` or ``"neural"`` (the paper's), as of ``FractionalSDE``; paths of the
            last two have the prior's noise, which a sharp decoder then keeps small.
        initial_posterior, num_processes, max_speed, normalisation, grid, start, horizon, hidden, seed: as of
            ``FractionalSDE``.

    Attributes:
        result: what the last fit returned, None before.

    Raises:
        TypeError, ValueError: an argument that is unknown, out of range, or at odds with another.

    Example:
        >>> model = LatentFractionalSDE((3,), state_size=2, content_size=0, hidden=(8,), width=4)
        >>> times, y = torch.linspace(0.1, 1.0, 6), torch.zeros(4, 6, 3)
        >>> result = model.fit(times, y, num_steps=2, batch_size=2, progress=False)
        >>> model.predict([0.15, 1.1], num_samples=5).mean.shape
        torch.Size([4, 2, 3])
    """

    kind: ClassVar[str] = "LatentFractionalSDE"
    frame_centre: Tensor
    frame_spread: Tensor

    def __init__(
        self,
        data_shape: Sequence[int],
        state_size: int = 4,
        content_size: int = 16,
        drift: str | nn.Module = "neural",
        diffusion: str | float | nn.Module = "constant",
        noise: str | MarkovNoise = "fractional",
        hurst: str | float | Tensor | Sequence[float] = "learn",
        kind: str | int = "mvn",
        *,
        likelihood: str = "gaussian",
        squash: bool | None = None,
        encoder: nn.Module | None = None,
        decoder: str | nn.Module | None = None,
        features: int = 64,
        context_size: int = 16,
        width: int = 16,
        posterior: str = "gaussian",
        initial_posterior: str = "gaussian",
        num_processes: int = 5,
        max_speed: float | None = None,
        normalisation: str = "unit",
        grid: str | Tensor | Sequence[float] = "horizon",
        start: str = "auto",
        horizon: float | None = None,
        hidden: Sequence[int] = (64, 64),
        seed: int = 0,
    ) -> None:
        super().__init__()
        shape = tuple(check_sizes("data_shape", data_shape))
        if not shape:
            raise ValueError("data_shape must name at least one dimension, such as (3,) or (1, 32, 32)")
        check_count("state_size", state_size)
        check_count("content_size", content_size, 0)
        if likelihood not in _LIKELIHOODS:
            raise ValueError(f"likelihood must be one of {', '.join(_LIKELIHOODS)}, got {likelihood!r}")
        widths = check_sizes("hidden", hidden)
        check_count("features", features)
        check_count("context_size", context_size)
        check_count("width", width)
        horizon = None if horizon is None else as_number(horizon, "horizon")
        if squash is not None and not isinstance(squash, bool):
            raise TypeError(f"squash must be True, False or None, got {squash!r}")
        settings = {
            "num_processes": check_count("num_processes", num_processes),
            "max_speed": max_speed, "kind": kind, "normalisation": normalisation, "grid": grid, "start": start,
        }  # fmt: skip
        self.squash = len(shape) == 3 if squash is None else squash
        if isinstance(decoder, str):
            if decoder != "sprites":
                raise ValueError(f"decoder must be 'sprites', a torch module or None, got {decoder!r}")
            if not self.squash and likelihood != "bernoulli":
                raise ValueError("decoder='sprites' draws frames between 0 and 1: it needs squash=True")
        self._config = {
            "data_shape": list(shape), "state_size": state_size, "content_size": content_size, "drift": drift,
            "diffusion": diffusion, "noise": noise, "hurst": hurst, "likelihood": likelihood, "squash": self.squash,
            "encoder": encoder, "decoder": decoder, "features": features, "context_size": context_size,
            "width": width, "posterior": posterior, "initial_posterior": initial_posterior, **settings,
            "horizon": horizon, "hidden": widths, "seed": seed,
        }  # fmt: skip
        self.data_shape, self.state_size, self.content_size = shape, state_size, content_size
        self.family, self.horizon = likelihood, horizon
        with scoped_seed(seed):
            source = HurstNoise(state_size, noise, hurst, settings)
            self.system = FractionalSystem(state_size, drift, diffusion, source, "learn", widths)
            self.posterior = PathPosterior(self.system, posterior, initial_posterior, context_size, widths)
            self.likelihood = PathLikelihood(1)
            inputs = content_size + state_size
            self.encoder: nn.Module = (
                frame_encoder(shape, width, features)
                if encoder is None
                else check_network("encoder", encoder, shape, (features,))
            )
            self.decoder: nn.Module = (
                frame_decoder(content_size, state_size, shape, width)
                if decoder is None
                else SpriteDecoder(content_size, state_size, shape)
                if isinstance(decoder, str)
                else check_network("decoder", decoder, (inputs,), shape)
            )
            self.content = Content(features, content_size) if content_size else None
            self.context = Context(features, context_size)
            self.stand_in = nn.Linear(context_size, state_size)
            self.log_stand_in_std = nn.Parameter(torch.full((state_size,), math.log(_STAND_IN_STD)))
        self.register_buffer("frame_centre", torch.zeros(shape))
        self.register_buffer("frame_spread", torch.ones(()))
        if horizon is not None:
            source.set_horizon(horizon)
        self.result: LatentResult | None = None
        self._data: SeriesData | None = None
        self._max_step: float | None = None

    def config(self) -> dict[str, Any]:
        """The constructor's arguments, as plain data."""
        for name in ("encoder", "decoder"):
            if isinstance(self._config[name], nn.Module):
                raise TypeError(f"a model with its own {name} has no file form: save its state_dict() instead")
        return self._plain(self._config)

    # ------------------------------------------------------------------ the parts
    def _encode(self, times: Tensor, frames: Tensor, mask: Tensor, grid: SolverGrid, shared: bool = False) -> _Encoded:
        """What q needs of ``(B, T, *shape)`` frames; ``shared`` says that all series miss the same."""
        here = mask.flatten(2).any(-1)  # a frame counts where some of it is seen
        own = self._config["encoder"] is not None
        values = torch.where(mask, frames if own else (frames - self.frame_centre) / self.frame_spread, 0.0)
        h = self.encoder(values.flatten(0, 1)).unflatten(0, here.shape)
        g = self.context(h, here, times)
        along = interpolate(g, times, grid.steps.times[:-1].to(times))
        seen = here[:1, :, None] if shared else here.unsqueeze(-1)
        evidence = Evidence(
            self.stand_in(g).movedim(1, 0) * seen.movedim(1, 0),
            seen.movedim(1, 0).to(frames.dtype),
            self.log_stand_in_std.exp(),
            along,
        )
        if self.content is None:
            nothing = frames.new_zeros(len(frames), 0)
            return _Encoded(evidence, nothing, nothing)
        return _Encoded(evidence, *self.content(h, here))

    def decode(self, content: Tensor, x: Tensor) -> Tensor:
        """Mean of frames ``(..., *shape)`` from content ``(..., W)`` and states ``(..., D)``."""
        raw = self._raw(content, x)
        return torch.sigmoid(raw) if self.squash or self.family == "bernoulli" else raw

    def _raw(self, content: Tensor, x: Tensor) -> Tensor:
        joined = torch.cat([content.expand(*x.shape[:-1], -1), x], -1)
        out: Tensor = self.decoder(joined.flatten(0, -2)).unflatten(0, joined.shape[:-1])
        return out if isinstance(self._config["decoder"], nn.Module) else self.frame_centre + self.frame_spread * out

    def _log_prob(self, raw: Tensor, frames: Tensor) -> Tensor:
        """Of each pixel."""
        if self.family == "bernoulli":
            return -nn.functional.binary_cross_entropy_with_logits(raw, frames.expand_as(raw), reduction="none")
        mean = torch.sigmoid(raw) if self.squash else raw
        # Pyro's checks read values back, for which an accelerator would wait at each step.
        return dist.Normal(mean, self.likelihood(), validate_args=False).log_prob(frames)

    def _contents(self, encoded: _Encoded, particles: int, seed: int | None) -> tuple[Tensor, Tensor, Tensor]:
        """Draws ``(P B, W)``, KL and log p / q."""
        mean, log_std = encoded.content_mean, encoded.content_log_std
        source = None
        if seed is not None:
            source = torch.Generator(device=mean.device).manual_seed(derive_seed(seed, "content"))
        eps = torch.randn(particles, *mean.shape, generator=source, dtype=mean.dtype, device=mean.device)
        w = mean + log_std.exp() * eps
        kl = (0.5 * (mean.square() + (2 * log_std).exp() - 1) - log_std).sum(-1)
        ratio = (0.5 * (eps.square() - w.square()) + log_std).sum(-1)
        return w.flatten(0, 1), kl.repeat(particles), ratio.flatten()

    def _weigh(
        self, grid: SolverGrid, observations: Tensor, mask: Tensor, particles: int, seed: int | None
    ) -> tuple[Tensor, Draws]:
        encoded = self._encode(self.data.times.to(observations), observations, mask, grid, self._shared)
        w, kl, ratio = self._contents(encoded, particles, seed)
        draws = self.posterior.draw(self.system, grid, encoded.evidence, particles, seed)
        raw = self._raw(w.unsqueeze(0), draws.x)  # (T, P B, *shape)
        frames, here = observations.movedim(1, 0), mask.movedim(1, 0)
        each = self._log_prob(raw.unflatten(1, (particles, -1)), frames.unsqueeze(1)) * here.unsqueeze(1)
        fits = each.flatten(3).sum((0, -1)).flatten()
        return fits, Draws(draws.x, draws.kl + kl, draws.log_ratio + ratio)

    # ------------------------------------------------------------------ Pyro
    def forward(self, times: Any, observations: Any = None, mask: Any = None, num_series: int = 1) -> Tensor:
        """The Pyro model; returns the states at ``times``, ``(N, T, D)``."""
        clock, values, here = self._arguments(times, observations, mask, num_series, self.data_shape)
        grid, noise, batch = self._grid(clock), self.system.noise.current(), len(values)
        with pyro.plate("series", batch):
            one = dist.Normal(values.new_zeros(()), 1.0)
            w = values.new_zeros(batch, 0)
            if self.content is not None:
                w = pyro.sample("content", one.expand([batch, self.content_size]).to_event(1))
            xi = pyro.sample("start", one.expand([batch, self.state_size, noise.num_processes + 1]).to_event(2))
            x0, v0 = start_state(self.system, noise, xi)

            def simulate() -> Any:
                return self._solve_prior(noise, grid, x0, v0)

            path = pyro.sample("path", PriorPath(simulate, *_shapes(batch, len(clock), self.state_size)))
            raw = self._raw(w.unsqueeze(1), path)
            law: Any = (
                dist.Bernoulli(logits=raw, validate_args=False)
                if self.family == "bernoulli"
                else dist.Normal(torch.sigmoid(raw) if self.squash else raw, self.likelihood())
            )
            event = 1 + len(self.data_shape)
            pyro.sample("obs", law.mask(here).to_event(event), obs=None if observations is None else values)
        return path

    def guide(self, times: Any, observations: Any, mask: Any = None, num_series: int = 1) -> None:
        """The Pyro guide of the same arguments."""
        clock, values, here = self._arguments(times, observations, mask, num_series, self.data_shape)
        grid = self._grid(clock)
        encoded = self._encode(clock.to(values), values, here, grid)
        plan = self.posterior.plan(self.system, grid, encoded.evidence)
        law = self.posterior.start_law(self.system, encoded.evidence, plan)
        with pyro.plate("series", len(values)):
            if self.content is not None:
                std = encoded.content_log_std.exp()
                pyro.sample("content", dist.Normal(encoded.content_mean, std).to_event(1))
            covariance = (law.factor @ law.factor.mT).expand(len(values), -1, -1, -1)
            xi = pyro.sample("start", dist.MultivariateNormal(law.mean, covariance).to_event(1))
            x0, v0 = start_state(self.system, plan.noise, xi)

            def simulate() -> Any:
                return self.posterior.path(self.system, grid, plan, x0, v0)

            pyro.sample("path", ControlledPath(simulate, *_shapes(len(values), len(clock), self.state_size)))

    # ------------------------------------------------------------------ fitting
    def fit(
        self,
        times: Any,
        observations: Any,
        mask: Any = None,
        noise_std: float | str | Tensor = 0.1,
        seed: int = 0,
        *,
        num_steps: int = 2000,
        batch_size: int | None = 32,
        lr: float = 1e-3,
        num_particles: int = 1,
        bound: str = "elbo",
        max_step: float | None = None,
        kl_warmup: int = 0,
        clip_norm: float | None = 100.0,
        checkpoint_segments: int | str | None = None,
        valid: Any = None,
        validate_every: int = 200,
        checkpoint: str | FilePath | None = None,
        progress: bool | Callable[[dict[str, Any]], None] = True,
    ) -> LatentResult:
        """Maximise the evidence bound over all parameters.

        Args:
            times: of the frames, strictly increasing, ``(T,)``; the path starts at time 0.
            observations: ``(N, T, *data_shape)``; values where the mask is False don't matter.
            mask: ``(N, T)`` for whole frames or ``(N, T, *data_shape)`` for points; None for all.
            noise_std: of a pixel, or ``"learn"``; ignored by a Bernoulli likelihood.  The paper's squared error is
                0.7071.
            seed: same seed, same result to the bit.
            num_steps: of Adam, with a cosine schedule.
            batch_size: series in a step; None for all. The default is all series where there are fewer.
            lr: learning rate.
            num_particles: paths of each series in a step.
            bound: ``"elbo"`` or ``"iwae"``.
            max_step: longest solver step; a third of the shortest gap between frames by default, as in the paper.
            kl_warmup: steps over which the KL's weight rises to 1.
            clip_norm: longest gradient.
            checkpoint_segments: of a solve, ``"sqrt"`` for long series.
            valid: held-out observations of the same times, all seen, whose loss is recorded.
            validate_every: steps between two looks at them.
            checkpoint: file to resume from.
            progress: progress bar, or a function that receives its fields.

        Raises:
            TypeError, ValueError: bad data or settings, before any work is done.
            NonFiniteError: the loss became non-finite.
        """
        data = check_series(times, observations, mask, self.data_shape)
        held = None if valid is None else check_series(times, valid, None, self.data_shape)
        if self.family == "bernoulli" and not bool(((data.values >= 0) & (data.values <= 1)).all()):
            raise ValueError("observations must lie in [0, 1] for likelihood='bernoulli'")
        if self.squash and bool((data.values.abs() > _FAR_FROM_SQUASHED).any()):
            low, high = float(data.values.min()), float(data.values.max())
            raise ValueError(
                f"observations reach from {low:.4g} to {high:.4g}, and the frames' means pass a sigmoid into (0, 1): "
                "divide bytes by 255, or build the model with squash=False"
            )
        self.likelihood.check(noise_std, positive=True)
        rows = len(data.values)
        size = check_batch_size(batch_size, rows, 32)
        steps = check_count("num_steps", num_steps)
        check_count("num_particles", num_particles)
        fresh = self._data is None
        gaps = data.times.diff(prepend=data.times.new_zeros(1))
        self._see(data, float(gaps[gaps > 0].min()) / 3 if max_step is None else max_step)
        self.likelihood.set(noise_std, data.values[data.mask].std().reshape(1))
        if fresh:
            self._initialise(data)
        solver = self._grid(data.times, checkpoint=checkpoint_segments)
        objective = PathBound(self, solver, num_particles, bound, kl_warmup)
        history = run_fit(
            objective,
            (data.values, data.mask),
            num_steps=steps,
            batch_size=size,
            lr=lr,
            scheduler=lambda made: torch.optim.lr_scheduler.CosineAnnealingLR(made, steps, 0.01 * lr),
            clip_norm=clip_norm,
            validation=None if held is None else (held.values, held.mask),
            validate_every=validate_every,
            seed=seed,
            checkpoint=checkpoint,
            progress=progress,
        )
        self.result = LatentResult(self, history)
        return self.result

    def _initialise(self, data: SeriesData) -> None:
        """Noise moves the state by about 1 in the geometric mean of gap and span, as far as decoders want it to move;
        frames are standardised point by point, in one unit.
        """
        times, span = data.times, float(data.times[-1])
        with torch.no_grad():
            if not self.squash and self.family == "gaussian":
                here = data.mask.double()
                centre = (data.values * here).sum((0, 1)) / here.sum((0, 1)).clamp_min(1)
                spread = (((data.values - centre) ** 2 * here).sum() / here.sum()).sqrt()
                self.frame_centre.copy_(centre)
                self.frame_spread.copy_(torch.where(spread > 1e-12 * centre.abs().max(), spread, 1.0))
            if isinstance(self.decoder, SpriteDecoder):
                self.decoder.start_from(data.values[data.mask.flatten(2).all(-1)])
            jump = torch.full_like(self.system.start_mean, span**-0.5 * len(times) ** 0.25)
            self.posterior.drift.set_units(times, jump, torch.zeros_like(jump))
            self.system.set_units(times, jump, torch.zeros_like(jump))
            if isinstance(self.system.drift, NeuralDrift):
                self.system.drift.rate.fill_(4 / span)
            if isinstance(self.system.diffusion, ConstantDiffusion) and self.system.diffusion.learned:
                self.system.diffusion.log_scale.copy_(jump.log())
            if isinstance(self.system.diffusion, DiagonalNeuralDiffusion):
                self.system.diffusion.unit.copy_(jump)

    # ------------------------------------------------------------------ queries
    def elbo(self, num_particles: int = 16, seed: int = 0) -> Tensor:
        """The evidence bound in nats, summed over all series, a scalar."""
        return self._bounds(num_particles, seed)[0]

    def log_evidence(self, num_particles: int = 64, seed: int = 0) -> Tensor:
        """The importance-weighted bound of ``num_particles`` draws a series, in nats, summed over series, a scalar."""
        return self._bounds(num_particles, seed)[1]

    @torch.no_grad()
    def predict(
        self, new_times: Any, num_samples: int = 20, seed: int = 0, *, observations: Any = None, mask: Any = None
    ) -> PathPrediction:
        """Posterior of frames' means at new times: reconstruction, interpolation and forecast.

        Args:
            new_times: strictly increasing, ``(T',)``, up to the horizon.
            num_samples: joint draws; all frames of all draws are held at once.
            seed: of the draws.
            observations, mask: other series at the times of the fit, ``(N', T, *data_shape)``; those of the fit by
                default.

        Returns:
            ``mean``, ``variance`` ``(N, T', *data_shape)`` and ``samples`` ``(num_samples, N, T', *data_shape)``.
        """
        fitted = self.data
        data = fitted if observations is None else check_series(fitted.times, observations, mask, self.data_shape)
        wanted = as_times(new_times, "new_times").cpu()
        check_count("num_samples", num_samples)
        self._within(wanted, "new_times")
        asked, place = torch.unique(snap_times(wanted, fitted.times), return_inverse=True)
        grid = self._grid(fitted.times, asked)
        values = data.values.to(self.system.start_mean)
        alike = self._shared and observations is None
        encoded = self._encode(fitted.times.to(values), values, data.mask.to(values.device), grid, alike)
        at_once, parts = particles_of(len(values)), []
        for i in range(0, num_samples, at_once):
            count, stream = min(at_once, num_samples - i), derive_seed(seed, "predict", i)
            w = self._contents(encoded, count, stream)[0]
            x = self.posterior.draw(self.system, grid, encoded.evidence, count, stream).x
            frames = self.decode(w.unsqueeze(0), x[place])  # (T', P B, *shape)
            parts.append(frames.unflatten(1, (count, -1)).movedim(0, 2))
        samples = torch.cat(parts)
        std = None if self.family == "bernoulli" else self.likelihood().detach()
        return PathPrediction(wanted, samples.mean(0), samples.var(0, unbiased=num_samples > 1), samples, std)

    def reconstruct(self, num_samples: int = 20, seed: int = 0, **series: Any) -> PathPrediction:
        """``predict`` at the times of the fit."""
        return self.predict(self.data.times, num_samples, seed, **series)

    @torch.no_grad()
    def sample_prior(self, times: Any, num_samples: int = 1, seed: int = 0) -> Tensor:
        """New series: means of frames from content and paths of the prior, ``(num_samples, T, *data_shape)``."""
        x = self._prior_paths(times, num_samples, seed)
        source = generator(seed, "prior content", device=x.device)
        w = torch.randn(num_samples, 1, self.content_size, generator=source, dtype=x.dtype, device=x.device)
        return self.decode(w, x)

    # ------------------------------------------------------------------ files
    def _extra_state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        if self._data is None or self.result is None:
            return {}, {}
        meta = {"max_step": self._max_step, "learned_noise": self.likelihood.learned}
        return dict(self._data._asdict()), meta

    def _restore_extra(self, tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> None:
        if "max_step" not in meta:
            return
        self._see(SeriesData(tensors["times"], tensors["values"], tensors["mask"].bool()), meta["max_step"])
        self.likelihood.learn(bool(meta["learned_noise"]))
        self.result = LatentResult(self, None)


def _shapes(batch: int, times: int, size: int) -> tuple[torch.Size, torch.Size]:
    return torch.Size([batch]), torch.Size([times, size])
