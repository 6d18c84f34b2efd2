"""Tune the hyperparameters of a prior so that the functions it implies look like those of a target process.

Tran, Rossi, Milios and Filippone, All you need is a good functional prior for Bayesian deep learning, JMLR 23(74),
2022: minimise over the hyperparameters ``psi`` the expectation over measurement sets ``X_M`` of a discrepancy between
the laws of ``f_prior(X_M; psi)`` and ``f_target(X_M)``.  No observation is used.  Both objectives here are minimised
by ``inference.fit``.
"""

from collections.abc import Callable
from typing import Any, Literal, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from inference.objectives.functional_prior.discrepancy import EnergyDistance, gaussian_wasserstein
from inference.objectives.functional_prior.measurement import MeasurementSampler, as_measurement
from inference.runtime.generators import scoped_seed

__all__ = ["CovarianceMatching", "Discrepancy", "FunctionSampler", "FunctionalPriorMatching"]

FunctionSampler = Callable[[Tensor, int], Tensor]
"""``(x, n) -> (n, M, K)``: ``n`` independent functions at the ``M`` rows of ``x``."""


class Discrepancy(Protocol):
    """Two bags ``(n, M, K)`` to a scalar."""

    def __call__(self, f: Tensor, g: Tensor) -> Tensor:
        """Discrepancy of the laws that ``f`` and ``g`` were drawn from."""
        ...


@runtime_checkable
class FittedDiscrepancy(Discrepancy, Protocol):
    """A discrepancy that learns something from one pair of bags and is read off another, as a dual with a critic is."""

    def fit(self, f: Tensor, g: Tensor) -> Any:
        """What is learned from bags without gradient."""
        ...

    def score(self, learned: Any, f: Tensor, g: Tensor) -> Tensor:
        """The scalar on fresh bags, differentiable in them."""
        ...


class FunctionalPriorMatching(nn.Module):
    """Discrepancy between a prior over functions and a target process, on fresh draws at each call.

    ``forward()`` draws one measurement set, a bag of prior functions with gradient and a bag of target functions, all
    from torch's global generator, and returns their discrepancy.  What a :class:`FittedDiscrepancy` learns (the
    critic of ``WassersteinDual``) it learns from a second, independent pair of bags at the same points: a critic scored
    on the draws that it was trained on would report its own memory.

    ``parameters()`` are the prior's, and nothing of the target's.

    Args:
        prior: the module whose parameters are tuned.
        target: ``(x, n) -> (n, M, K)``, independent functions of the target process.
        measurement: ``num_points -> (num_points, *event)``, or a tensor of fixed points.
        discrepancy: two bags to a scalar.
        num_functions: functions in a bag (the paper: 128 to 512).
        num_points: measurement points M.
        prior_functions: ``(x, n) -> (n, M, K)``, independent functions of the prior, differentiable in its
            parameters; by default the prior's method of that name, or else the prior itself.
        validate_args: make one draw now, outside of the caller's random stream, and check it.

    Raises:
        TypeError: an argument is not callable or no module.
        ValueError: shapes disagree, a draw is not finite, or the prior's draws do not depend on its parameters.

    Example:
        >>> objective = FunctionalPriorMatching(net, target, Grid(low, high), num_points=200)  # doctest: +SKIP
        >>> fit(objective, num_steps=300, lr=0.05, average_last=0.5)  # doctest: +SKIP
    """

    def __init__(
        self,
        prior: nn.Module,
        target: FunctionSampler,
        measurement: Tensor | MeasurementSampler,
        discrepancy: Discrepancy | None = None,
        *,
        num_functions: int = 128,
        num_points: int = 100,
        prior_functions: FunctionSampler | None = None,
        validate_args: bool = True,
    ) -> None:
        super().__init__()
        if not isinstance(prior, nn.Module):
            raise TypeError(f"prior must be a torch.nn.Module, got {type(prior).__name__}")
        draw = getattr(prior, "prior_functions", prior) if prior_functions is None else prior_functions
        for name, part in (("target", target), ("prior_functions", draw)):
            if not callable(part):
                raise TypeError(f"{name} must be a callable (x, n) -> (n, M, K), got {type(part).__name__}")
        if discrepancy is not None and not callable(discrepancy):
            raise TypeError(f"discrepancy must be a callable (f, g) -> scalar, got {type(discrepancy).__name__}")
        _check_count("num_functions", num_functions, 2)
        _check_count("num_points", num_points, 1)
        self.prior = prior
        self.num_functions = num_functions
        self.num_points = num_points
        self.discrepancy = EnergyDistance() if discrepancy is None else discrepancy
        self._draw_prior = (draw,)  # in a tuple: a bound method is no submodule, the prior itself would be one twice
        self._draw_target = _attach(self, "target", target)
        self._measure = _attach(self, "measurement", as_measurement(measurement))
        if validate_args:
            self._dry_draw()

    def forward(self) -> Tensor:
        """Scalar loss on a fresh measurement set and fresh bags."""
        x = self._measure[0](self.num_points)
        f, g = self._bags(x, self.num_functions)
        if not isinstance(self.discrepancy, FittedDiscrepancy):
            return self.discrepancy(f, g)
        with torch.no_grad():
            learned = self.discrepancy.fit(*self._bags(x, self.num_functions))
        return self.discrepancy.score(learned, f, g)

    @torch.no_grad()
    def evaluate(
        self, discrepancy: Discrepancy | None = None, num_functions: int = 1000, x: Tensor | None = None
    ) -> Tensor:
        """Discrepancy on fresh draws without gradient: a check by a measure other than the one that was minimised.

        Args:
            discrepancy: two bags to a scalar; by default the energy distance.
            num_functions: functions in each bag.
            x: measurement set ``(M, *event)``; by default one drawn from the sampler.

        Returns:
            Scalar.
        """
        x = self._measure[0](self.num_points) if x is None else x
        return (EnergyDistance() if discrepancy is None else discrepancy)(*self._bags(x, num_functions))

    def _bags(self, x: Tensor, n: int) -> tuple[Tensor, Tensor]:
        f = self._draw_prior[0](x, n)
        with torch.no_grad():
            g = self._draw_target[0](x, n)
        return f, g.to(f.dtype)

    def _dry_draw(self) -> None:
        parameter = next((p for p in self.prior.parameters() if p.requires_grad), None)
        if parameter is None:
            raise ValueError("prior has no parameter that requires a gradient: there is nothing to tune")
        n = min(self.num_functions, 4)
        with scoped_seed(0, parameter.device), torch.enable_grad():
            x = self._measure[0](self.num_points)
            bags = {"prior": self._draw_prior[0](x, n), "target": self._draw_target[0](x, n)}
        if x.shape[0] != self.num_points:
            raise ValueError(f"measurement returned {x.shape[0]} points, num_points is {self.num_points}")
        for name, bag in bags.items():
            if not isinstance(bag, Tensor) or bag.ndim != 3 or bag.shape[:2] != (n, self.num_points):
                found = tuple(bag.shape) if isinstance(bag, Tensor) else type(bag).__name__
                raise ValueError(f"{name} must draw (n, M, K) = ({n}, {self.num_points}, K), got {found}")
            if not bool(torch.isfinite(bag).all()):
                raise ValueError(f"{name} drew NaN or infinite function values at {self.num_points} measurement points")
        f, g = bags["prior"], bags["target"]
        if f.shape[2] != g.shape[2]:
            raise ValueError(f"prior has {f.shape[2]} outputs K, target has {g.shape[2]}")
        if f.device != g.device:
            raise ValueError(f"prior draws on {f.device}, target on {g.device}: move both to the points' device")
        if not f.requires_grad:
            raise ValueError(
                "prior's draws do not depend on its parameters: draw by reparameterisation, not in no_grad"
            )


class CovarianceMatching(nn.Module):
    """Distance between two covariance functions on a measurement set: matching without any draw of functions.

    For priors whose covariance is known in closed form, such as a network with one hidden layer.  Deterministic if
    the measurement points are.  Only second moments are matched, so a mixture of processes (random hyperparameters)
    is matched in its mean covariance.

    Args:
        prior: the module whose parameters are tuned.
        prior_covariance: ``x -> (*batch, M, M)``, differentiable in the prior's parameters.
        target_covariance: ``x -> (*batch, M, M)``.
        measurement: ``num_points -> (num_points, *event)``, or a tensor of fixed points.
        num_points: measurement points M.
        distance: ``"bures"`` for the squared 2-Wasserstein distance of the zero-mean Gaussians, ``"frobenius"`` for
            the squared Frobenius distance relative to the target's norm (kernel matching).

    Raises:
        TypeError: an argument is not callable or no module.
        ValueError: unknown distance; in ``forward``, covariances of different shapes.
    """

    def __init__(
        self,
        prior: nn.Module,
        prior_covariance: Callable[[Tensor], Tensor],
        target_covariance: Callable[[Tensor], Tensor],
        measurement: Tensor | MeasurementSampler,
        *,
        num_points: int = 100,
        distance: Literal["bures", "frobenius"] = "bures",
    ) -> None:
        super().__init__()
        if not isinstance(prior, nn.Module):
            raise TypeError(f"prior must be a torch.nn.Module, got {type(prior).__name__}")
        for name, part in (("prior_covariance", prior_covariance), ("target_covariance", target_covariance)):
            if not callable(part):
                raise TypeError(f"{name} must be a callable x -> (M, M), got {type(part).__name__}")
        if distance not in ("bures", "frobenius"):
            raise ValueError(f'distance must be "bures" or "frobenius", got {distance!r}')
        _check_count("num_points", num_points, 1)
        self.prior = prior
        self.num_points = num_points
        self.distance = distance
        self._covariances = (prior_covariance, target_covariance)
        self._measure = _attach(self, "measurement", as_measurement(measurement))

    def forward(self) -> Tensor:
        """Scalar loss."""
        x = self._measure[0](self.num_points)
        ours = self._covariances[0](x)
        with torch.no_grad():
            theirs = self._covariances[1](x).to(ours.dtype)
        if ours.shape[-2:] != theirs.shape[-2:]:
            raise ValueError(f"covariances must agree in shape, got {tuple(ours.shape)} and {tuple(theirs.shape)}")
        if self.distance == "frobenius":
            return ((ours - theirs).square().sum((-1, -2)) / theirs.square().sum((-1, -2))).sum()
        mean = torch.zeros_like(ours[..., 0])
        return gaussian_wasserstein(mean, ours, mean, theirs).sum()


def _attach(owner: nn.Module, name: str, part: Callable) -> tuple[Callable]:
    # A part without parameters becomes a submodule, so that `.to` moves its buffers with the objective.  One with
    # parameters must stay outside: they are not what is learned.
    if isinstance(part, nn.Module) and next(part.parameters(), None) is None:
        owner.add_module(name, part)
    return (part,)


def _check_count(name: str, value: int, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an integer, got {value!r}")
    if value < least:
        raise ValueError(f"{name} must be at least {least}, got {value}")
