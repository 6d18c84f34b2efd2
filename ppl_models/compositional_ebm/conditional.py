"""Conditional densities known up to a constant for each x: ``p(y | x) = b(y) exp(-E(x, y)) / Z(x)``.

Gustafsson, Danelljan, Bhat and Schön, "Energy-Based Models for Deep Probabilistic Regression", ECCV 2020, with the
normalisers followed by compositional estimates (``inference.objectives.unnormalised.conditional``): regression whose
predictive law may have any shape, several modes included.
"""

import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, Self

import pyro
import torch
from torch import Tensor, nn
from torch.distributions import Distribution, Independent

from inference._errors import CheckpointError, SamplerWarning
from inference.citation import Paper
from inference.objectives.unnormalised import CompositionalLikelihood, ConditionalCompositionalLikelihood
from inference.objectives.unnormalised.noise import Noise
from inference.results.brief import brief
from inference.runtime.generators import derive_seed, generator, scoped_seed
from ppl_models.base import Model, Standardiser, check_batch_size, check_count, check_counts, to_precision, to_tensor
from ppl_models.compositional_ebm.distribution import EnergyDistribution, check_energy
from ppl_models.compositional_ebm.methods import EnergyFit, check_schedule, optimise, split_of_few
from ppl_models.compositional_ebm.networks import LOW_DIMENSION, EnergyNetwork, mlp
from ppl_models.compositional_ebm.noise import (
    as_noise,
    covering_mixture,
    noise_for_file,
    noise_for_load,
    noise_of_file,
    without_noise,
)

__all__ = ["ConditionalEnergyModel", "ConditionalPrediction"]

_NORMALISERS = ("table", "network", "minibatch", "joint")
_GRID = 512  # points in one dimension; 64 a side in two
_IMPORTANCE = 4096  # shared noise draws for log Z(x) in more than two dimensions
_VALUES_AT_ONCE = 1 << 20
_Y_BANDWIDTH = 1.0  # beside many columns of x
_EFFECTIVE = 25.0  # noise draws that must carry log Z(x)
_MOST_ASIDE = 200  # rows: each has noise of its own
_BY_HEART = 0.1  # rows a parameter; 2,000 rows of 12,700 parameters are better learned from as a whole
_AT_THE_EDGE = 1e-3  # share of a law on the outermost points from which it does not end there


@brief
class ConditionalPrediction(NamedTuple):
    """Attributes:
    mean: ``(N, *event)``.
    variance: ``(N, *event)``.
    quantiles: ``(len(levels), N, *event)``, of each coordinate.
    levels: of the quantiles.
    """

    mean: Tensor
    variance: Tensor
    quantiles: Tensor
    levels: tuple[float, ...]


class PairEnergy(nn.Module):
    """The default network: ``(x, y)`` side by side, standardised, with Fourier features where they are few, else of y
    alone, in which the law is sharp.
    """

    def __init__(self, x_columns: int, y_columns: int, hidden: tuple[int, ...], seed: int) -> None:
        super().__init__()
        # at a bandwidth of 1 pairs are learned by heart: two branches' held-out excess was 0.07 nats, here 0.025
        columns = x_columns + y_columns
        few = columns <= LOW_DIMENSION
        sharp, bandwidth = (columns, 0.5) if few else (y_columns, _Y_BANDWIDTH)
        self.network = EnergyNetwork(columns, hidden, bandwidth=bandwidth, seed=seed, sharp=sharp)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """``(row, Dx)`` and ``(row, Dy)`` to ``(row,)``."""
        out: Tensor = self.network(torch.cat([x, y], 1))
        return out


class _LogNormaliser(nn.Module):
    """log u(x) of ``normaliser="network"``."""

    def __init__(self, columns: int, seed: int) -> None:
        super().__init__()
        self.units = Standardiser(columns)
        self.layers = mlp((columns, 64, 64, 1), seed, output_bias=True)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.layers(self.units(x)).squeeze(1)
        return out


class _Guide(nn.Module):  # a PyroModule would not take noise that a fitted model has used
    def __init__(self, noise: Noise) -> None:
        super().__init__()
        self.noise = noise

    def forward(self, y: Tensor, x: Tensor) -> None:
        pyro.sample("y", self.noise.distribution())


class ConditionalEnergyModel(Model):
    """An energy of y given x.

    Gustafsson, Danelljan, Bhat and Schön, ECCV 2020, by the compositional likelihood of Jiang et al., ICML 2023.

    ``model(y, x)`` is the Pyro model with the site ``y`` in the plate ``data``.  It and ``log_prob(y, x)`` read as
    p(y | x), y first; ``fit``, ``sample`` and ``predict`` take x first.

    Args:
        energy: a module ``(x (B, Dx), y (B, Dy)) -> (B,)`` without an output bias; None: a perceptron on standardised
            inputs, with random Fourier features where x and y have up to four columns together, else of up to four
            columns of y.
        normaliser: how log Z(x) is followed in training: ``"table"`` (one running estimate a row of data),
            ``"network"`` (a network of x), ``"minibatch"`` (each row's own noise draws), or ``"joint"`` (one constant
            for all x, which is right only for families closed under a factor that depends on x).
        base: ``"tilt"``: b is the noise; None: b = 1.
        hidden: widths of the default network.
        seed: of its initial weights.
        x_columns, y_columns: Dx and Dy, where known before a fit.

    Attributes:
        noise: the noise over y.
        result: what the last fit returned; None before.

    Raises:
        TypeError, ValueError: an argument does not fit.
        RuntimeError: a query of a model that has not been fitted.
    """

    papers: ClassVar[tuple[Paper, ...]] = CompositionalLikelihood.papers

    kind: ClassVar[str] = "ConditionalEnergyModel"

    def __init__(
        self,
        energy: nn.Module | None = None,
        normaliser: str = "table",
        base: str | None = "tilt",
        *,
        hidden: tuple[int, ...] = (64, 64),
        seed: int = 0,
        x_columns: int | None = None,
        y_columns: int | None = None,
    ) -> None:
        super().__init__()
        check_energy(energy)
        if normaliser not in _NORMALISERS:
            raise ValueError(f"normaliser must be one of {_NORMALISERS}, got {normaliser!r}")
        if base not in ("tilt", None):
            raise ValueError(f"base must be 'tilt' or None, got {base!r}")
        self.normaliser, self.base, self.hidden, self.seed = normaliser, base, check_counts("hidden", hidden), seed
        self._custom, self.flat_y, self._lacks_noise = energy is not None, False, False
        self.energy: nn.Module | None = energy
        self.noise: Noise | None = None
        self.result: EnergyFit | None = None
        for name, columns in (("x_columns", x_columns), ("y_columns", y_columns)):
            if columns is not None:
                check_count(name, columns)
        self.x_columns, self.y_columns = x_columns, y_columns
        if x_columns is not None and y_columns is not None:
            self._build(x_columns, y_columns)

    def _build(self, x_columns: int, y_columns: int) -> None:
        self.x_columns, self.y_columns = x_columns, y_columns
        if not self._custom:
            self.energy = PairEnergy(x_columns, y_columns, self.hidden, self.seed)

    # ------------------------------------------------------------------ the Pyro model
    def forward(self, y: Tensor, x: Tensor) -> Tensor:
        """The Pyro model of ``y`` ``(row, Dy)`` at ``x`` ``(row, Dx)``."""
        with pyro.plate("data", len(x)):
            observed: Tensor = pyro.sample("y", self._law(x), obs=y)
        return observed

    def _law(self, x: Tensor) -> EnergyDistribution:
        assert self.energy is not None and self.noise is not None
        energy, base = self.energy, self.noise.distribution() if self.base == "tilt" else None
        return EnergyDistribution(lambda y: energy(x, y), (self.y_columns or 1,), base)

    # ------------------------------------------------------------------ fitting
    def fit(
        self,
        x: Any,
        y: Any,
        noise: Any = "auto",
        noise_samples: int = 64,
        batch_size: int | None = 64,
        beta: float = 0.5,
        num_steps: int = 3000,
        seed: int = 0,
        *,
        valid: tuple[Any, Any] | None = None,
        penalty: float = 1e-3,
        lr: float = 3e-3,
        weight_decay: float | None = None,
        checkpoint: str | Path | None = None,
        progress: bool | Callable[[dict[str, Any]], None] = True,
    ) -> EnergyFit:
        """Fit to pairs.

        Args:
            x: covariates ``(N, Dx)`` or ``(N,)``.
            y: responses ``(N, Dy)`` or ``(N,)``, continuous.
            noise: over y: ``"auto"`` (a mixture of normals fitted to all y, with a tenth of a wide normal), a
                distribution over ``(Dy,)`` (over numbers for y without columns), or a noise model.
            noise_samples: draws for each row of a batch.
            beta: weight of a new estimate in a row's own, for ``"table"``; small where ``noise_samples`` is small.
            valid: held-out pairs ``(x, y)``; with and without them all is as in ``EnergyModel.fit``, but that rows are
                set aside, 200 at most, where there are fewer than a tenth of the energy's parameters.
            penalty: weight of ``(log Z(x))^2``, which keeps the free function of x in E from wandering.
            batch_size, num_steps, seed, lr, weight_decay, checkpoint, progress: as in ``EnergyModel.fit``.

        Raises:
            TypeError, ValueError, NonFiniteError, CollapseError: as in ``EnergyModel.fit``.
        """
        x, y = self._columns("x", x), self._columns("y", y)
        if len(x) != len(y):
            raise ValueError(f"x has {len(x)} rows and y {len(y)}: they must match")
        self.flat_y = self._was_flat
        check_count("num_steps", num_steps)
        check_count("noise_samples", noise_samples)
        check_schedule(lr, 0.0 if weight_decay is None else weight_decay, 0.0)
        held: tuple[Tensor, ...] | None = None
        if valid is not None:
            held = self._columns("y", valid[1]), self._columns("x", valid[0])
            if len(held[0]) != len(held[1]) or [part.shape[1] for part in held] != [y.shape[1], x.shape[1]]:
                raise ValueError("valid must be a pair (x, y) of equally many rows, with the columns of x and y")
        size = check_batch_size(batch_size, len(x), 64)
        y = y.to(x)
        if isinstance(noise, str) and noise == "auto":
            # never discrete: a response of few values is still a number
            components = max(1, min(10, len(y) // 20))
            found: Noise = covering_mixture(y, components, inflation=1.2, wide=1.5, ridge=1e-2, seed=seed)
        else:
            if self.flat_y and isinstance(noise, Distribution) and not (noise.batch_shape or noise.event_shape):
                noise = Independent(noise.expand(torch.Size((1,))), 1)
            found = as_noise(noise, y, None, seed)
        self._build(x.shape[1], y.shape[1])
        assert self.energy is not None
        self.energy.to(device=x.device, dtype=x.dtype)
        if isinstance(self.energy, PairEnergy):
            self.energy.network.units.learn(torch.cat([x, y], 1))
        self.noise, self.result = found, None
        split = None if held is not None else split_of_few(len(x), self.energy, seed, _MOST_ASIDE, _BY_HEART)
        if split is not None:
            held = y[split.aside], x[split.aside]
            x, y = x[split.kept], y[split.kept]
        objective, data = self._objective(x, y, noise_samples, beta, penalty, seed)
        if held is not None:
            nowhere = torch.zeros(len(held[0]), dtype=torch.long, device=x.device)  # in the table
            held = tuple([nowhere] * (len(data) - 2)) + tuple(part.to(x) for part in held)
        decay = (0.0 if split is None else split.weight_decay) if weight_decay is None else weight_decay
        loop, history = optimise(
            objective,
            data,
            valid=held,
            early=split is not None and split.early,
            num_steps=num_steps,
            batch_size=None if size is None else min(size, len(x)),
            lr=lr,
            weight_decay=decay,
            average_last=0.0,
            seed=seed,
            checkpoint=checkpoint,
            progress=progress,
        )
        self.result = EnergyFit(history, None, self.normaliser, loop)
        return self.result

    def _objective(
        self, x: Tensor, y: Tensor, noise_samples: int, beta: float, penalty: float, seed: int
    ) -> tuple[nn.Module, tuple[Tensor, ...]]:
        assert self.noise is not None
        guide = _Guide(self.noise)
        if self.normaliser == "joint":
            return CompositionalLikelihood(self, guide, 4 * noise_samples, beta=min(beta, 0.1)), (y, x)
        network = None
        if self.normaliser == "network":
            network = _LogNormaliser(x.shape[1], derive_seed(seed, "normaliser")).to(x)
            network.units.learn(x)
        objective = ConditionalCompositionalLikelihood(
            self,
            guide,
            len(x),
            noise_samples,
            normaliser=self.normaliser,
            network=network,
            beta=beta,
            penalty=penalty,
        )
        return objective, (torch.arange(len(x), device=x.device), y, x)

    def _columns(self, name: str, value: Any) -> Tensor:
        value = to_tensor(name, value)
        value = value if value.is_floating_point() else to_precision(name, value, torch.get_default_dtype())
        if value.dim() not in (1, 2):
            raise ValueError(f"{name} must have shape (N,) or (N, D), got {tuple(value.shape)}")
        self._was_flat = value.dim() == 1
        value = value[:, None] if value.dim() == 1 else value
        wanted = self.x_columns if name == "x" else self.y_columns
        if wanted is not None and value.shape[1] != wanted:
            raise ValueError(f"{name} must have {wanted} columns, got {value.shape[1]}")
        return value

    # ------------------------------------------------------------------ queries
    @torch.no_grad()
    def log_prob(self, y: Any, x: Any) -> Tensor:
        """Normalised log p(y | x) in nats, ``(N,)``.

        log Z(x) is a sum over a grid for one or two columns of y, and importance sampling for more.

        Raises:
            RuntimeError: the model has not been fitted.
            TypeError, ValueError: bad data.

        Warns:
            SamplerWarning: the grid or the noise does not hold the law at some x.
        """
        x, y = self._query(x), self._columns("y", y).to(self._like())
        if len(x) != len(y):
            raise ValueError(f"x has {len(x)} rows and y {len(y)}: they must match")
        return self._law(x).log_prob(y) - self.log_partition(x)

    @torch.no_grad()
    def log_partition(self, x: Any, seed: int = 0) -> Tensor:
        """log Z(x), ``(N,)``."""
        different, which = torch.unique(self._query(x), dim=0, return_inverse=True)
        values, log_volume = self._table(different, seed)[1:]
        return (torch.logsumexp(values, 1) + log_volume)[which]

    @torch.no_grad()
    def sample(self, x: Any, n: int, seed: int = 0) -> Tensor:
        """Draws of y at each x, ``(n, N, Dy)``, or ``(n, N)`` where y was given without columns."""
        check_count("n", n)
        x = self._query(x)
        points, values, _ = self._table(x, seed)
        draw = generator(seed, "conditional", device=x.device)
        index = torch.multinomial(values.double().softmax(1), n, replacement=True, generator=draw)
        chosen = points[index]
        if self._width is not None:
            u = torch.rand(chosen.shape, generator=draw, dtype=chosen.dtype, device=chosen.device)
            chosen = chosen + (u - 0.5) * self._width
        chosen = chosen.transpose(0, 1)
        return chosen.squeeze(2) if self.flat_y else chosen

    @torch.no_grad()
    def predict(self, x: Any, levels: tuple[float, ...] = (0.05, 0.5, 0.95), num_samples: int = 2000) -> Any:
        """Mean, variance and quantiles of y at each x; see ``ConditionalPrediction``."""
        draws = self.sample(x, num_samples)
        grid = torch.tensor(levels, dtype=draws.dtype, device=draws.device)
        return ConditionalPrediction(draws.mean(0), draws.var(0), draws.quantile(grid, 0), tuple(levels))

    def _table(self, x: Tensor, seed: int) -> tuple[Tensor, Tensor, Tensor]:
        """Points ``(P, Dy)``, log p~ + weight of each at each x ``(N, P)``, and what makes their sum log Z."""
        assert self.noise is not None and self.y_columns is not None
        dim = self.y_columns
        with scoped_seed(derive_seed(seed, "points"), x.device):
            drawn = self.noise.draw(_IMPORTANCE)
        self._width: Tensor | None = None
        if dim <= 2:
            low, high = drawn.amin(0), drawn.amax(0)
            low, high = low - 0.05 * (high - low), high + 0.05 * (high - low)
            side = _GRID if dim == 1 else 64
            self._width = (high - low) / side
            steps = torch.arange(side, dtype=low.dtype, device=low.device) + 0.5
            axes = [low[i] + self._width[i] * steps for i in range(dim)]
            points = torch.stack(torch.meshgrid(*axes, indexing="ij"), -1).reshape(-1, dim)
            offset, constant = torch.zeros_like(points[:, 0]), self._width.log().sum()
        else:
            points, offset = drawn, -self.noise.log_prob(drawn)
            constant = -torch.tensor(float(len(drawn)), dtype=x.dtype, device=x.device).log()
        chunk = max(1, _VALUES_AT_ONCE // len(points))
        blocks = []
        for part in x.split(chunk):
            rows = part.repeat_interleave(len(points), 0)
            values = self._law(rows).log_prob(points.repeat(len(part), 1)).reshape(len(part), -1)
            blocks.append(values + offset)
        table = torch.cat(blocks)
        self._warn_of_gaps(table)
        return points, table, constant

    def _warn_of_gaps(self, values: Tensor) -> None:
        """Warn of rows x whose law the points ``(N, P)`` do not hold, or are too far apart for."""
        p, dim = values.softmax(1), self.y_columns or 1
        beyond = torch.zeros(len(p), dtype=torch.bool, device=p.device)
        if dim <= 2:
            cells = p.reshape(len(p), *(round(p.shape[1] ** (1 / dim)),) * dim)
            inner = cells[(slice(None), *(slice(1, -1),) * dim)].flatten(1).sum(1)
            beyond = 1 - inner > _AT_THE_EDGE
        narrow = 1 / p.square().sum(1) < (2**dim if dim <= 2 else _EFFECTIVE)
        reasons = {"beyond the noise's range": beyond, "narrower than the points are apart": narrow & ~beyond}
        for reason, rows in reasons.items():
            if bool(rows.any()):
                warnings.warn(
                    f"p(y | x) lies {reason} at {int(rows.sum())} of {len(rows)} x (the first is row "
                    f"{int(rows.nonzero()[0])}): its log Z(x) and draws cannot be trusted. Ask at x like those of the "
                    "fit, or fit with noise= that covers y there and little else",
                    SamplerWarning,
                    stacklevel=4,
                )

    def _query(self, x: Any) -> Tensor:
        if self.noise is None or self.energy is None:
            raise RuntimeError("this query needs a fitted model: call fit(x, y) first")
        return self._columns("x", x).to(self._like())

    def _like(self) -> Tensor:
        assert self.energy is not None
        return next(iter(self.energy.parameters()))

    # ------------------------------------------------------------------ files
    def config(self) -> dict[str, Any]:
        """The constructor's arguments and the sizes that the fit saw."""
        return {
            "normaliser": self.normaliser,
            "base": self.base,
            "hidden": list(self.hidden),
            "seed": self.seed,
            "x_columns": self.x_columns,
            "y_columns": self.y_columns,
        }

    @classmethod
    def load(cls, path: str | Path, **objects: Any) -> Self:
        """The model that ``save`` wrote; ``energy`` and ``noise`` are given again where they were yours."""
        noise = objects.pop("noise", None)
        try:
            model = super().load(path, **objects)
        except CheckpointError as error:
            if "energy" in objects or "state_dict" not in str(error):
                raise
            raise CheckpointError(f"{path} holds an energy of yours: give load(path, energy=...)") from error
        if noise is not None or model._lacks_noise:
            model.noise = noise_for_load(noise, (model.y_columns or 1,), model._like(), path)
        return model

    def _extra_state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        meta: dict[str, Any] = {"flat_y": self.flat_y, "custom": self._custom}
        if self.noise is None:
            return {}, meta
        tensors, meta["noise"] = noise_for_file(self.noise)
        return tensors, meta

    def _restore_extra(self, tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> None:
        if meta["custom"] and not self._custom:
            raise ValueError("the energy was a module of yours, which a file cannot hold: give load(path, energy=...)")
        self.flat_y = meta["flat_y"]
        if "noise" in meta:
            self.noise = noise_of_file(meta["noise"], tensors)
            self._lacks_noise = self.noise is None

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """The energy's tensors; the noise has a place of its own in the file."""
        return without_noise(super().state_dict(*args, **kwargs), kwargs.get("prefix", ""))
