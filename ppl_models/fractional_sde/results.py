"""What a fit of a fractional SDE returns, and what a prediction holds."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from inference.fit import FitResult
from inference.results.brief import brief
from inference.results.export import to_arviz
from inference.runtime.generators import generator
from ppl_models.fractional_sde.exact import one_step_log_density

if TYPE_CHECKING:
    from ppl_models.fractional_sde.latent import LatentFractionalSDE
    from ppl_models.fractional_sde.model import FractionalSDE

__all__ = ["FractionalSDEResult", "LatentResult", "PathPrediction"]

_LOG_2PI = 1.8378770664093453


@brief
class PathPrediction:
    """Posterior of the state at some times.

    Attributes:
        times: ``(T,)``, float64.
        mean: of X, ``(N, T, D)``.
        variance: of X, ``(N, T, D)``.
        samples: joint draws of X, ``(num_samples, N, T, D)``.
        noise_std: of an observation, ``(D,)`` or one a draw, ``(num_samples, 1, 1, D)``; None of a Bernoulli
            likelihood, whose X (here and in what follows) is the probability of a one.
    """

    def __init__(
        self, times: Tensor, mean: Tensor, variance: Tensor, samples: Tensor, noise_std: Tensor | None
    ) -> None:
        self.times, self.mean, self.variance, self.samples = times, mean, variance, samples
        self.noise_std = noise_std

    @property
    def std(self) -> Tensor:
        """``(N, T, D)``."""
        return self.variance.sqrt()

    def quantile(self, q: float | list[float]) -> Tensor:
        """Quantiles of X over the draws, ``(*q, N, T, D)``."""
        level = torch.as_tensor(q, dtype=self.samples.dtype, device=self.samples.device)
        return torch.quantile(self.samples, level, dim=0)

    def observations(self, seed: int = 0) -> Tensor:
        """Draws of observations, X with their noise or zeros and ones, ``(num_samples, N, T, D)``."""
        source = generator(seed, "observations", device=self.samples.device)
        if self.noise_std is None:
            return torch.bernoulli(self.samples, generator=source)
        noise = torch.randn(self.samples.shape, generator=source, dtype=self.samples.dtype, device=self.samples.device)
        return self.samples + self.noise_std.to(self.samples) * noise


@brief
class FractionalSDEResult:
    """What ``FractionalSDE.fit`` returns.

    Attributes:
        model: the fitted model.
        method: ``"exact"``, ``"variational"`` or ``"nuts"``.
        history: losses (negative evidence or its bound, per series) of the optimisation, None where there was none.
        samples: parameter to draws ``(chain, draw, ...)``, of NUTS; else empty.
        sample_stats: statistics of the sampler, ``(chain, draw)``.
        converged: whether an exact fit ended at a maximum; None where that was not looked at.
    """

    def __init__(
        self,
        model: "FractionalSDE",
        method: str,
        history: FitResult | None,
        samples: Mapping[str, Tensor] | None = None,
        sample_stats: Mapping[str, Tensor] | None = None,
        *,
        converged: bool | None = None,
    ) -> None:
        self.model, self.method, self.history = model, method, history
        self.samples, self.sample_stats = dict(samples or {}), dict(sample_stats or {})
        self.converged = converged

    def summary(self) -> str:
        """One line: how it was fitted and what H is."""
        hurst = ", ".join(f"{h:.3f}" for h in self.model.hurst.detach().reshape(-1).tolist())
        text = f"{self.method}: H {hurst}" + ", not at a maximum" * (self.converged is False)
        return text if self.history is None else f"{text}; {self.history.summary()}"

    def to_arviz(self, num_samples: int = 200, seed: int = 0) -> Any:
        """ArviZ object: posterior (parameters of NUTS; else paths ``x`` at the observation times), posterior_predictive
        and log_likelihood of ``y`` (0 where masked), observed_data (NaN where masked), sample_stats of NUTS.

        The log-likelihood of an observation is that given its path; after NUTS, which knows no paths, given the
        observations before it: a draw's sum is then its log evidence.

        Args:
            num_samples: draws of paths, unless NUTS made the draws; the posterior predictive has as many.
            seed: of the draws of paths and observations.
        """
        model = self.model
        data = model.data
        y = torch.where(data.mask.bool(), data.values, torch.nan)
        dims = {"y": ["series", "time", "dim"], "x": ["series", "time", "dim"]}
        coords = {"time": data.times.cpu().numpy()}
        attrs = {"method": self.method}
        if self.samples:
            names = {n: ["dim"] for n, v in self.samples.items() if v.ndim == 3}
            stats = dict(self.sample_stats)
            if "potential_energy" in stats:
                stats["lp"] = -stats.pop("potential_energy")
            shape = next(iter(self.samples.values())).shape[:2]
            drawn = model.predict(data.times, shape.numel(), seed).observations(seed)
            with torch.no_grad():
                each = one_step_log_density(model._parameter_model({}), self.samples)
            return to_arviz(
                dict(self.samples), sample_stats=stats or None, observed_data={"y": y},
                posterior_predictive={"y": drawn.unflatten(0, shape)}, log_likelihood={"y": each},
                dims={**names, "y": dims["y"]}, coords=coords, attrs=attrs,
            )  # fmt: skip
        prediction = model.predict(data.times, num_samples=num_samples, seed=seed)
        assert prediction.noise_std is not None
        error = (data.values - prediction.samples) / prediction.noise_std
        density = -0.5 * (error.square() + _LOG_2PI) - prediction.noise_std.log().expand_as(error)
        groups: dict[str, Any] = {}
        if bool((prediction.noise_std > 0).all()):
            groups["log_likelihood"] = {"y": torch.where(data.mask.bool(), density, 0.0).unsqueeze(0)}
        return to_arviz(
            {"x": prediction.samples.unsqueeze(0)},
            posterior_predictive={"y": prediction.observations(seed).unsqueeze(0)},
            observed_data={"y": y}, dims=dims, coords=coords, attrs=attrs, **groups,
        )  # fmt: skip


@brief
class LatentResult:
    """What ``LatentFractionalSDE.fit`` returns.

    Attributes:
        model: the fitted model.
        history: losses (negative bound per series), None of a model from a file.
    """

    def __init__(self, model: "LatentFractionalSDE", history: FitResult | None) -> None:
        self.model, self.history = model, history

    def summary(self) -> str:
        """One line: what H is and how the fit went."""
        hurst = ", ".join(f"{h:.3f}" for h in self.model.hurst.reshape(-1).tolist())
        return f"H {hurst}" if self.history is None else f"H {hurst}; {self.history.summary()}"

    def to_arviz(self, num_samples: int = 20, seed: int = 0) -> Any:
        """ArviZ object: posterior (means of frames, ``frame``), observed_data (``y``, NaN where masked)."""
        data = self.model.data
        prediction = self.model.reconstruct(num_samples, seed)
        inner = [f"axis{i}" for i in range(data.values.ndim - 2)]
        y = torch.where(data.mask, data.values, torch.nan)
        dims = {name: ["series", "time", *inner] for name in ("frame", "y")}
        return to_arviz(
            {"frame": prediction.samples.unsqueeze(0)}, observed_data={"y": y}, dims=dims,
            coords={"time": data.times.cpu().numpy()},
        )  # fmt: skip
