"""What the two models on fractional paths share: the prior SDE, its horizon and solver grid, bounds, prior paths."""

from collections.abc import Callable
from numbers import Real
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from inference.citation import Paper
from inference.runtime.generators import derive_seed, generator
from ppl_models.base import Model, check_count
from ppl_models.fractional_sde.bound import PathBound, PathLikelihood
from ppl_models.fractional_sde.data import SeriesData, check_series
from ppl_models.fractional_sde.posterior import Draws, PathPosterior, SolverGrid, start_state
from ppl_models.fractional_sde.system import FractionalSystem
from sde import MarkovNoise, Path, observation_grid, solve
from sde._checks import as_number, as_numbers, as_times

__all__ = ["PathModel"]

_SOLVER_STEPS = 100  # of the whole span, unless max_step says otherwise


class PathModel(Model):
    """Base of ``FractionalSDE`` and ``LatentFractionalSDE``; a subclass sets the modules and gives ``_weigh``."""

    papers: ClassVar[tuple[Paper, ...]] = (
        Paper(
            "inproceedings",
            "daems2024variational",
            author="Daems, Rembert and Opper, Manfred and Crevecoeur, Guillaume and Birdal, Tolga",
            title="Variational Inference for {SDE}s Driven by Fractional Noise",
            booktitle="International Conference on Learning Representations",
            year=2024,
        ),
    )

    system: FractionalSystem
    posterior: PathPosterior
    likelihood: PathLikelihood
    horizon: float | None
    _data: SeriesData | None
    _max_step: float | None
    _shared = False  # whether all series of the fit miss the same, so that their covariances are one; set by ``_see``

    def _weigh(
        self, grid: SolverGrid, observations: Tensor, mask: Tensor, particles: int, seed: int | None
    ) -> tuple[Tensor, Draws]:
        """log p(observations | draws), ``(P B,)``, and the draws, whose KL and log-ratio hold all latent sites."""
        raise NotImplementedError

    @property
    def data(self) -> SeriesData:
        """What the model was fitted to."""
        if self._data is None:
            raise RuntimeError("the model has not seen data: call fit(times, observations) first")
        return self._data

    @property
    def hurst(self) -> Tensor:
        """H, ``()`` or ``(D,)``; the posterior mean after NUTS, NaN of a noise of yours without an H of its own."""
        noise = self.system.noise
        return noise.hurst.detach() if noise.has_hurst else torch.full_like(noise.raw_hurst.detach(), torch.nan)

    @property
    def noise(self) -> MarkovNoise:
        """The driving noise at the present H."""
        return self.system.noise.current()

    @property
    def noise_std(self) -> Tensor:
        """Standard deviation of the observations' errors, ``(D,)``."""
        return self.likelihood().detach()

    @staticmethod
    def _plain(config: dict[str, Any]) -> dict[str, Any]:
        """The constructor's arguments as plain data for a file."""
        out = dict(config)
        for name in ("drift", "diffusion", "noise"):
            if isinstance(out[name], Real):  # a numpy number
                out[name] = float(out[name])
            if not isinstance(out[name], str | float):
                raise TypeError(
                    f"a model whose {name} is the user's own object has no file form: save its state_dict() instead"
                )
        for name in ("hurst", "grid"):
            if not isinstance(out[name], str):
                value = as_numbers(out[name], name)
                out[name] = float(value) if value.ndim == 0 else {"tensor": value.tolist()}
        if not isinstance(out.get("initial", ""), str):
            out["initial"] = [torch.as_tensor(v).tolist() for v in out["initial"]]
        return out

    def _arguments(
        self, times: Any, observations: Any, mask: Any, num_series: int, shape: tuple[int, ...]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Times, observations (zeros where there are none) and mask of a call of the Pyro model."""
        like = self.system.start_mean
        if observations is None:
            clock = as_times(times)
            values = like.new_zeros(num_series, len(clock), *shape)
            found = SeriesData(clock, values, torch.ones_like(values, dtype=torch.bool))
        else:
            found = check_series(times, observations, mask, shape)
        if not self.system.noise.ready:
            last = float(found.times[-1])
            self.system.noise.set_horizon(2 * last, last / len(found.times))
        return found.times, found.values.to(like), found.mask

    def _see(self, data: SeriesData, max_step: float | None) -> None:
        last = float(data.times[-1])
        horizon = 2 * last if self.horizon is None else self.horizon
        if last == 0:
            raise ValueError("times must reach beyond 0, where the path starts")
        if last > horizon * (1 + 1e-9):
            raise ValueError(
                f"times reach {last:g}, beyond horizon={horizon:g}, up to which the noise's weights are optimal; build "
                f"the model with horizon={last:g} or more"
            )
        max_step = None if max_step is None else as_number(max_step, "max_step")
        self.to(device=data.values.device, dtype=data.values.dtype)
        self.system.noise.set_horizon(horizon, last / len(data.times))
        self._data, self._max_step, self._shared = data, max_step, data.shared

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        super()._apply(fn, recurse)
        data = getattr(self, "_data", None)
        if data is not None:
            self._data = data._replace(values=fn(data.values).to(data.values.dtype), mask=fn(data.mask))
        return self

    def _grid(self, times: Tensor, wanted: Tensor | None = None, checkpoint: int | str | None = None) -> SolverGrid:
        """Solver times that meet ``times`` (whose states are kept) or, if given, ``wanted`` as well (kept instead),
        strictly increasing and snapped.
        """
        union = times if wanted is None else torch.unique(torch.cat([times, wanted]))
        step = float(times[-1]) / _SOLVER_STEPS if self._max_step is None else self._max_step
        grid = observation_grid(union, step)
        place = grid.positions[torch.searchsorted(union, times)]
        keep = place if wanted is None else grid.positions[torch.searchsorted(union, wanted)]
        return SolverGrid(self.system.noise.current().discretise(grid.times), place, keep.tolist(), checkpoint)

    # ------------------------------------------------------------------ bounds
    @torch.no_grad()
    def _bounds(self, num_particles: int, seed: int) -> tuple[Tensor, Tensor]:
        check_count("num_particles", num_particles)
        objective = PathBound(self, self._grid(self.data.times), 1, "elbo", 0)
        return objective.evaluate(self.data.values, self.data.mask, num_particles, derive_seed(seed, "bound"))

    def _within(self, times: Tensor, name: str) -> None:
        horizon = self.system.noise.horizon
        if float(times[-1]) > horizon * (1 + 1e-9):
            raise ValueError(
                f"{name} reach {float(times[-1]):g}, beyond horizon={horizon:g}, up to which the noise's weights are "
                f"optimal; build the model with horizon={float(times[-1]):g} or more and fit again"
            )

    @torch.no_grad()
    def _prior_paths(self, times: Any, num_samples: int, seed: int) -> Tensor:
        """Draws of X from the prior SDE, ``(num_samples, T, D)``."""
        check_count("num_samples", num_samples)
        clock = as_times(times).cpu()
        like = self.system.start_mean
        last = float(clock[-1])
        if self._data is None and self.horizon is None and not last <= self.system.noise.horizon < float("inf"):
            self.system.noise.set_horizon(2 * last if last > 0 else 1.0)
        self._within(clock, "times")
        clock_grid = self._grid(clock) if float(clock[-1]) > 0 else None
        noise = self.system.noise.current()
        source = generator(seed, "prior", device=like.device)
        xi = torch.randn(
            num_samples, self.state_size, noise.num_processes + 1, generator=source, dtype=like.dtype,
            device=like.device,
        )  # fmt: skip
        x0, v0 = start_state(self.system, noise, xi)
        if clock_grid is None:
            return x0.unsqueeze(1)
        path = self._solve_prior(noise, clock_grid, x0, v0, derive_seed(seed, "prior paths"))
        return path.x.movedim(0, 1)

    def _solve_prior(
        self, noise: MarkovNoise, grid: SolverGrid, x0: Tensor, v0: Tensor, seed: int | None = None
    ) -> Path:
        return solve(
            self.system.drift, self.system.field, noise, grid.steps, x0, y0=v0,
            additive=self.system.additive, keep=grid.keep, seed=seed,
        )  # fmt: skip
