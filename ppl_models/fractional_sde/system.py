"""The prior SDE, dX = b(t, X) dt + s(t, X) o dB: drift, diffusion, noise of learnable Hurst index, law of X(0)."""

import warnings
from collections.abc import Callable, Sequence
from numbers import Real
from typing import Any

import torch
from torch import Tensor, nn

from ppl_models.base import check_count
from ppl_models.fractional_sde.data import SeriesData
from ppl_models.fractional_sde.networks import (
    ConstantDiffusion,
    DiagonalNeuralDiffusion,
    LinearDrift,
    build_diffusion,
    build_drift,
)
from sde import (
    BrownianMotion,
    LinearSDE,
    MarkovFractionalBrownianMotion,
    MarkovNoise,
    MultifractionalMotion,
    NoiseWarning,
    StepNetwork,
)

__all__ = ["FractionalSystem", "HurstNoise"]

_HURST = ("learn", "learn_per_dimension", "learn_in_time")
_FASTEST = 2.5  # speed of the fastest process times the observations' mean gap, at least


class HurstNoise(nn.Module):
    """The driving noise and its Hurst index, a parameter through a sigmoid where it is learned.

    Args:
        state_size: D.
        noise: ``"fractional"``, ``"brownian"``, or a ``MarkovNoise`` of the user's, which is taken as it is.
        hurst: a number or ``(D,)`` tensor in (0, 1), ``"learn"``, ``"learn_per_dimension"`` or ``"learn_in_time"``
            (a network of time; needs ``kind="rl"``).
        settings: of ``MarkovFractionalBrownianMotion``.
    """

    def __init__(self, state_size: int, noise: Any, hurst: Any, settings: dict[str, Any]) -> None:
        super().__init__()
        # A file holds tensors among the settings as lists.
        settings = {k: _tensor(v) for k, v in settings.items()}
        hurst = _tensor(hurst)
        self.state_size, self.settings = state_size, settings
        self.given = noise if isinstance(noise, MarkovNoise) else None
        self.brownian = isinstance(noise, str) and noise == "brownian"
        if self.given is None and noise not in ("fractional", "brownian"):
            raise ValueError(f"noise must be 'fractional', 'brownian' or an sde.MarkovNoise, got {noise!r}")
        if self.given is not None and self.given.dims not in ((), (state_size,)):
            raise ValueError(f"noise has {self.given.dims[0]} dimensions, state_size is {state_size}")
        if isinstance(hurst, str):
            if hurst not in _HURST:
                raise ValueError(f"hurst must lie in (0, 1) or be one of {', '.join(_HURST)}, got {hurst!r}")
            self.mode = hurst
            start: Any = torch.full((state_size,) if hurst == "learn_per_dimension" else (), 0.5)
        else:
            self.mode, start = "fixed", hurst
        # Built once here so that what is wrong with the settings is said at the door; the data's unit of time is not
        # known yet, only that of the fastest speed.
        fastest = settings["max_speed"]
        reach = 1 / float(fastest) if isinstance(fastest, Real) and 0 < float(fastest) < float("inf") else 1.0
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", NoiseWarning)  # of another horizon than the data's
            example = MarkovFractionalBrownianMotion(start, horizon=reach, **settings)
        if example.hurst.shape not in ((), (state_size,)):
            raise ValueError(f"hurst must be a number or ({state_size},), got shape {tuple(example.hurst.shape)}")
        if self.mode == "learn_in_time" and example.kind != "rl":
            raise ValueError("hurst='learn_in_time' needs kind='rl', which has no past to correlate with")
        self._fractional_processes = example.num_processes
        fractional = self.given is None and not self.brownian
        raw = torch.logit(example.hurst).to(torch.get_default_dtype())
        if fractional and self.mode in ("learn", "learn_per_dimension"):
            self.raw_hurst = nn.Parameter(raw)
        else:
            self.register_buffer("raw_hurst", raw)
        self.net = StepNetwork([1, 16, 16, 1], zero_last=True) if fractional and self.mode == "learn_in_time" else None
        self._base: MarkovFractionalBrownianMotion | None = None
        self.horizon = float("inf")
        self.held: Tensor | None = None  # whether H has no gradient for now, (), on the device

    @property
    def learned(self) -> bool:
        """Whether H is a parameter."""
        return self.raw_hurst.requires_grad or self.net is not None

    @property
    def constant_loadings(self) -> bool:
        """Whether H is the same at all times."""
        return self.net is None

    @property
    def ready(self) -> bool:
        """Whether the horizon is set."""
        return self.horizon < float("inf")

    @property
    def num_processes(self) -> int:
        """K."""
        if self.given is not None:
            return self.given.num_processes
        return 1 if self.brownian else self._fractional_processes

    @property
    def hurst(self) -> Tensor:
        """H, ``()`` or ``(D,)``; 1/2 of Brownian noise, and of a noise of the user's that has none."""
        own = getattr(self.given, "hurst", None)
        if own is not None:
            return torch.as_tensor(own).to(self.raw_hurst)
        if self.given is not None or self.brownian:
            return torch.full_like(self.raw_hurst, 0.5)
        raw = self.raw_hurst
        return torch.sigmoid(raw if self.held is None else torch.where(self.held, raw.detach(), raw))

    @property
    def has_hurst(self) -> bool:
        """Whether ``hurst`` is the noise's: a mixture or another noise of the user's may have none."""
        return self.given is None or isinstance(self.given, BrownianMotion) or hasattr(self.given, "hurst")

    def hurst_at(self, times: Tensor) -> Tensor:
        """H(t), ``(T,)``."""
        if self.net is None:
            return self.hurst.expand(len(times), *self.hurst.shape)
        u = (times / self.horizon).to(self.raw_hurst).unsqueeze(-1)
        return torch.sigmoid(self.raw_hurst + self.net(u).squeeze(-1))

    def set_horizon(self, horizon: float, gap: float | None = None) -> None:
        """Build the speeds and what the weights of every H are solved with, for [0, horizon].

        Args:
            horizon: the time up to which the weights are optimal.
            gap: mean distance of the observations. Unless the user chose the speeds, the fastest process is no slower
                than 2.5 / gap: increments are made by those that change between two observations, and with a range set
                by the horizon alone H of 500 daily values came out at 0.38 instead of 0.42.
        """
        self.horizon = horizon
        if self.given is not None or self.brownian:
            return
        start = torch.full_like(self.raw_hurst, 0.5, dtype=torch.float64)
        base = MarkovFractionalBrownianMotion(start, horizon=horizon, **self.settings)
        free = self.settings["max_speed"] is None and base.grid == "horizon"
        if free and gap is not None and base.speeds.tolist()[-1] < (1 - 1e-9) * _FASTEST / gap:
            base = MarkovFractionalBrownianMotion(
                start, horizon=horizon, **{**self.settings, "max_speed": _FASTEST / gap}
            )
        self._base = base
        # At H = 1/2, where a learned H starts, few weights are needed; those for other H may cancel.
        fixed = [torch.sigmoid(self.raw_hurst).double()]
        for index in [torch.full_like(start, h) for h in (0.3, 0.7)] if self.learned else fixed:
            base.with_hurst(index).warn_of_cancelling()

    def current(self, hurst: Tensor | None = None) -> MarkovNoise:
        """The noise at the present H, or at the one given."""
        if self.given is not None:
            return self.given
        if self.brownian:
            noise = BrownianMotion(horizon=self.horizon)
            noise.loadings, noise.gains = (
                noise.loadings.to(self.raw_hurst.device),
                noise.gains.to(self.raw_hurst.device),
            )
            noise.initial_factor = noise.initial_factor.to(self.raw_hurst.device)
            return noise
        if self._base is None:
            raise RuntimeError("the noise has no horizon yet: call fit, or give horizon to the model")
        if self.net is not None:
            return MultifractionalMotion(self.hurst_at, self._base.with_hurst(self.hurst.double()))
        return self._base.with_hurst(self.hurst.double() if hurst is None else hurst.double())


class FractionalSystem(nn.Module):
    """Drift, diffusion, noise and the law of X(0), which the models share.

    Args:
        state_size: D.
        drift, diffusion: see ``build_drift`` and ``build_diffusion``.
        noise: see ``HurstNoise``.
        initial: ``"learn"``, or mean and standard deviation of X(0); 0 for a known start.
        hidden: widths of the networks.
    """

    given_start_mean: Tensor
    given_start_std: Tensor
    start_centre: Tensor
    start_unit: Tensor
    tick: Tensor

    def __init__(
        self, state_size: int, drift: Any, diffusion: Any, noise: HurstNoise, initial: Any, hidden: Sequence[int]
    ) -> None:
        super().__init__()
        self.state_size = check_count("state_size", state_size)
        self.drift = build_drift(drift, state_size, hidden)
        self.diffusion = build_diffusion(diffusion, state_size, hidden)
        self.noise = noise
        self.register_buffer("tick", torch.ones(()))
        self.learns_start = initial == "learn" if isinstance(initial, str) else False
        if self.learns_start:
            # Learned in the data's units, like the drift.
            self.raw_start_mean = nn.Parameter(torch.zeros(state_size))
            self.log_start_std = nn.Parameter(torch.zeros(state_size))
            self.register_buffer("start_centre", torch.zeros(state_size))
            self.register_buffer("start_unit", torch.ones(state_size))
        else:
            try:
                if any(isinstance(v, Tensor) and v.is_complex() for v in initial):
                    raise TypeError("complex numbers")
                mean, std = (torch.as_tensor(v, dtype=torch.get_default_dtype()) for v in initial)
            except (TypeError, ValueError) as error:
                raise ValueError(f"initial must be 'learn' or a pair (mean, std) of X(0), got {initial!r}") from error
            if not bool(torch.isfinite(mean).all() & torch.isfinite(std).all() & (std >= 0).all()):
                raise ValueError(f"initial must be finite with a std of 0 or more, got {initial!r}")
            if any(v.shape not in ((), (state_size,)) for v in (mean, std)):
                raise ValueError(f"initial must hold numbers or ({state_size},) vectors")
            self.register_buffer("given_start_mean", mean.expand(state_size).clone())
            self.register_buffer("given_start_std", std.expand(state_size).clone())

    @property
    def start_mean(self) -> Tensor:
        """Mean of X(0), ``(D,)``."""
        return self.start_centre + self.start_unit * self.raw_start_mean if self.learns_start else self.given_start_mean

    @property
    def start_std(self) -> Tensor:
        """Standard deviation of X(0), ``(D,)``."""
        return self.log_start_std.exp() if self.learns_start else self.given_start_std

    def check_start(self, data: SeriesData, noise_std: Any) -> None:
        """Raise where an exact observation says what X(0) is, and ``initial`` as well."""
        if isinstance(noise_std, str) or self.learns_start or float(data.times[0]) > 0:
            return
        exact = torch.as_tensor(noise_std, dtype=torch.float64).cpu() == 0
        known = self.given_start_std.cpu() == 0
        if bool((exact & known & data.mask[:, 0].any(0).cpu()).any()):
            raise ValueError(
                "times start at 0 with observations without error, and initial fixes X(0) as well: leave time 0 out, "
                "or give initial a std above 0"
            )

    @torch.no_grad()
    def put_start(self, mean: Tensor, std: Tensor, unit: Tensor) -> None:
        """Set the learned law of X(0), and in which unit its mean is learned, ``(D,)`` each."""
        self.start_centre.copy_(mean)
        self.start_unit.copy_(unit)
        self.raw_start_mean.zero_()
        self.log_start_std.copy_(std.log())

    def set_units(self, times: Tensor, jump: Tensor, centre: Tensor) -> None:
        """From the data's times, what x moves by in a unit of time, and its mean, ``(D,)``; a tick is the mean gap."""
        if isinstance(self.drift, LinearDrift):
            self.drift.set_units(times, jump, centre)
        self.tick.fill_(float(times[-1]) / len(times))

    @property
    def scale(self) -> Tensor:
        """s of a constant diffusion, ``(D,)``.

        Noise of index H moves X by s t^H in time t.  What is learned is this move in a ``tick`` of the data's time,
        over the tick's root: s itself would have to follow every change of H by the tick to its power.
        """
        assert isinstance(self.diffusion, ConstantDiffusion)
        own = self.diffusion.scale
        return own * self.tick_factor if self.diffusion.learned else own

    @property
    def tick_factor(self) -> Tensor:
        """What a scale learned as said is s over, ``()`` or ``(D,)``."""
        return self.tick ** (0.5 - self.noise.hurst)

    def put_scale(self, value: Tensor) -> None:
        """Set s of a learned constant diffusion, at the present H."""
        assert isinstance(self.diffusion, ConstantDiffusion)
        with torch.no_grad():
            self.diffusion.log_scale.copy_((value / self.tick_factor).log())

    @property
    def factor(self) -> Tensor | float:
        """What s is over a diffusion that depends on the state."""
        return self.tick_factor if isinstance(self.diffusion, DiagonalNeuralDiffusion) else 1.0

    @property
    def field(self) -> Any:
        """The diffusion as a function of time and state, for a solver."""
        return self.field_of(self.diffusion)

    def field_of(self, diffusion: Callable[[Tensor, Tensor], Tensor]) -> Any:
        """The same with another way to call the diffusion."""
        if not isinstance(self.diffusion, ConstantDiffusion):
            factor = self.factor
            return diffusion if isinstance(factor, float) else lambda time, x: diffusion(time, x) * factor
        scale = self.scale
        return lambda time, x: scale.expand_as(x)

    @property
    def linear(self) -> bool:
        """Whether likelihood and posterior are exact: linear drift, constant diffusion and H."""
        return (
            isinstance(self.drift, LinearDrift)
            and isinstance(self.diffusion, ConstantDiffusion)
            and self.noise.constant_loadings
        )

    @property
    def additive(self) -> bool:
        """Whether the diffusion ignores the state."""
        return bool(getattr(self.diffusion, "additive", False))

    def parameters_now(self) -> dict[str, Tensor]:
        """Values of the linear form: ``hurst``, ``theta``, ``constant``, ``scale``, ``start_mean``, ``start_std``."""
        drift = self.drift
        assert isinstance(drift, LinearDrift)
        out = {"scale": self.scale, "start_mean": self.start_mean, "start_std": self.start_std}
        out["hurst"] = self.noise.hurst
        if drift.theta is not None:
            out["theta"] = drift.theta
        if drift.constant is not None:
            out["constant"] = drift.constant
        return out

    def linear_sde(self, values: dict[str, Tensor] | None = None) -> LinearSDE:
        """The linear form at the given values, by default the present ones."""
        v = self.parameters_now() if values is None else values
        theta = v["theta"].double() if "theta" in v else 0.0
        constant = v["constant"].double() if "constant" in v else 0.0
        return LinearSDE(
            self.noise.current(v["hurst"]),
            theta,
            v["scale"].double(),
            constant,
            v["start_mean"].double(),
            v["start_std"].double(),
        )


def _tensor(value: Any) -> Any:
    return (
        torch.tensor(value["tensor"], dtype=torch.float64)
        if isinstance(value, dict) and value.keys() == {"tensor"}
        else value
    )
