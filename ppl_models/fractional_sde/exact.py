"""Exact inference in the linear form: evidence, posterior at any times, joint draws, and the Pyro model of parameters.

Up to some hundred times the observations' covariance is factorised at once; beyond, the square-root Kalman filter and
smoother of ``sde`` take over, in blocks of times side by side.  Both are the same Gaussian law.
"""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn

from inference.lbfgs import minimize
from ppl_models.fractional_sde.system import FractionalSystem
from sde import LinearSDE, backward_information, kalman_filter, kalman_smoother, snap_times, step_guide
from sde.noise import is_uniform

__all__ = ["ExactEvidence", "GaussianLaw", "ParameterModel", "gaussian_log_likelihood", "posterior_law"]

_DENSE = 200  # times up to which a Cholesky factor is faster than the filter's blocks
_DENSE_UNIFORM = 500  # the same at equal distances, where the covariance is a product and a look-up
_NO_ERROR = 1e-4  # of an exact observation's forecast, what stands for its error in a smoother: 1e-8 of the variance
_DENSE_POSTERIOR = 800  # times, observed and wanted, up to which the posterior comes with its joint covariance
_DRAWS_AT_ONCE = 50  # of the parameters, whose filters run side by side
_FLAT = 1e-7  # nats that are left to gain where a climb may end
_SERIES = 3  # from which the spread of their starts has a most likely value
_HISTORY = 50  # most steps that a climb remembers
_STEEP = 1e-2  # nats that the evidence changes by in a unit of a parameter, as learned, where it is not at the maximum


class GaussianLaw(NamedTuple):
    """Joint law of X at some times, per series and dimension.

    Attributes:
        mean: ``(B, D, T)``.
        variance: ``(B, D, T)``.
        factor: L with L L' the covariance, ``(B or 1, D, T, T)``, or None where only the marginals are at hand.
    """

    mean: Tensor
    variance: Tensor
    factor: Tensor | None


def _masked(covariance: Tensor, noise_std: Tensor, mask: Tensor) -> Tensor:
    """Covariance of the observations, with a unit of its own for each that is missing: ``(B or 1, D, T, T)``."""
    here = mask.movedim(0, -1)  # (B or 1, D or 1, T)
    full = covariance + torch.diag_embed((noise_std.double() ** 2).unsqueeze(-1).expand(covariance.shape[:-1]))
    return full * here.unsqueeze(-1) * here.unsqueeze(-2) + torch.diag_embed((1 - here).expand(*here.shape))


def gaussian_log_likelihood(
    linear: LinearSDE, times: Tensor, values: Tensor, mask: Tensor, noise_std: Tensor
) -> Tensor:
    """log p of every series and dimension, ``(B, D)``, float64.

    Args:
        linear: the SDE.
        times: ``(T,)``.
        values: ``(T, B, D)``, 0 where masked.
        mask: float64, 1 where there is an observation, ``(T, B or 1, D or 1)``.
        noise_std: ``(D,)``, 0 or more.
    """
    if len(times) > (_DENSE_UNIFORM if is_uniform(times) else _DENSE):
        return kalman_filter(linear, times, values, noise_std.double(), mask).log_likelihood
    mean, covariance = linear.moments(times)  # (*D, T), (*D, T, T)
    size = values.shape[2]
    mean, covariance = mean.expand(size, -1), covariance.expand(size, -1, -1)
    factor = torch.linalg.cholesky_ex(_masked(covariance, noise_std.expand(size), mask))[0]
    here = mask.movedim(0, -1)
    rest = (values.double().movedim(0, -1) - mean) * here  # (B, D, T)
    white = torch.linalg.solve_triangular(factor, rest.unsqueeze(-1), upper=False).squeeze(-1)
    count = here.expand_as(rest).sum(-1)
    logdet = factor.diagonal(dim1=-2, dim2=-1).log().sum(-1)
    return -0.5 * white.square().sum(-1) - logdet - 0.5 * math.log(2 * math.pi) * count


def posterior_law(
    linear: LinearSDE, times: Tensor, values: Tensor, mask: Tensor, noise_std: Tensor, wanted: Tensor
) -> GaussianLaw:
    """Law of X at ``wanted`` times given the observations; arguments as for ``gaussian_log_likelihood``."""
    union, place = torch.unique(torch.cat([times, snap_times(wanted, times)]), return_inverse=True)
    if len(union) > _DENSE_POSTERIOR:
        return _smoothed(linear, times, union, place, values, mask, noise_std)
    size = values.shape[2]
    mean, covariance = linear.moments(union)
    mean, covariance = mean.expand(size, -1), covariance.expand(size, -1, -1)
    seen, asked = place[: len(times)], place[len(times) :]
    among = covariance[:, seen][:, :, seen]
    cross = covariance[:, asked][:, :, seen]  # (D, T', T)
    factor = torch.linalg.cholesky_ex(_masked(among, noise_std.expand(size), mask))[0]
    here = mask.movedim(0, -1)
    rest = (values.double().movedim(0, -1) - mean[:, seen]) * here
    reach = torch.linalg.solve_triangular(factor, (cross * here.unsqueeze(-2)).mT, upper=False)  # (B or 1, D, T, T')
    white = torch.linalg.solve_triangular(factor, rest.unsqueeze(-1), upper=False)
    posterior_mean = mean[:, asked] + (reach.mT @ white).squeeze(-1)
    rest_covariance = covariance[:, asked][:, :, asked] - reach.mT @ reach
    eigenvalues, vectors = torch.linalg.eigh(rest_covariance)
    root = vectors * eigenvalues.clamp_min(0).sqrt().unsqueeze(-2)
    variance = root.square().sum(-1).expand_as(posterior_mean)
    return GaussianLaw(posterior_mean, variance, root)


def _smoothed(
    linear: LinearSDE, times: Tensor, union: Tensor, place: Tensor, values: Tensor, mask: Tensor, noise_std: Tensor
) -> GaussianLaw:
    count = len(times)
    full, here = _on(union, place[:count], values, mask)
    std = _with_an_error(linear, times, values, mask, noise_std)
    smoothed = kalman_smoother(linear, union, full, std, here)
    asked = place[count:]
    return GaussianLaw(smoothed.mean[asked].movedim(0, -1), smoothed.variance[asked].movedim(0, -1), None)


def _with_an_error(linear: LinearSDE, times: Tensor, values: Tensor, mask: Tensor, noise_std: Tensor) -> Tensor:
    """``noise_std`` with a little in place of 0, which a smoother by information can't take, ``(D,)``."""
    std = noise_std.double().expand(values.shape[2])
    if bool((std > 0).all()):
        return std
    filtered = kalman_filter(linear, times, values, std, mask)
    sure = torch.where(mask > 0, filtered.innovation_variance, torch.inf).amin((0, 1)).sqrt()
    return torch.where(std > 0, std, _NO_ERROR * sure)


def _on(union: Tensor, seen: Tensor, values: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Values and mask on a grid that holds more times."""
    full = values.new_zeros(len(union), *values.shape[1:])
    here = mask.new_zeros(len(union), *mask.shape[1:])
    full[seen], here[seen] = values, mask
    return full, here


def draw_smoothed(
    linear: LinearSDE,
    times: Tensor,
    values: Tensor,
    mask: Tensor,
    noise_std: Tensor,
    wanted: Tensor,
    num_samples: int,
    source: torch.Generator,
) -> Tensor:
    """Joint posterior draws by the exact law of each step's normals, ``(num_samples, B, D, T')``, for long series."""
    union, place = torch.unique(torch.cat([times.new_zeros(1), times, snap_times(wanted, times)]), return_inverse=True)
    full, here = _on(union, place[1 : len(times) + 1], values.double(), mask)
    size, std = values.shape[2], _with_an_error(linear, times, values.double(), mask, noise_std)
    transitions = linear.transitions(union)
    index = torch.arange(len(union))
    info = backward_information(transitions, index, full, std, here)
    guide = step_guide(transitions, index, full, std, here, information=info)
    f, o, _, g = (part if part.ndim == 2 + k else part.unsqueeze(1)
                  for part, k in zip(transitions[1:], (2, 1, 1, 2), strict=True))  # fmt: skip
    mean, factor = linear.start()
    mean, factor = mean.expand(size, -1), factor.expand(size, -1, -1)
    first = torch.zeros(mean.shape[-1], dtype=mean.dtype, device=mean.device)
    first[0] = 1
    row = (here[0] / std).expand(info.factor.shape[1], size)[..., None, None] * first.unsqueeze(-1)
    root = torch.cat([info.factor[0], row], -1)
    vector = info.vector[0] + (here[0] * full[0] / std**2).unsqueeze(-1) * first
    t = root.mT @ factor
    inner = torch.linalg.cholesky(torch.eye(t.shape[-1], dtype=t.dtype, device=t.device) + t.mT @ t)
    score = vector - (root @ (root.mT @ mean.unsqueeze(-1))).squeeze(-1)
    shape = (num_samples, values.shape[1], size)

    def normals(count: int) -> Tensor:
        return torch.randn(*shape, count, 1, generator=source, dtype=mean.dtype, device=mean.device)

    xi = torch.cholesky_solve(factor.mT @ score.unsqueeze(-1), inner)
    xi = xi + torch.linalg.solve_triangular(inner.mT, normals(len(first)), upper=True)
    z = mean + (factor @ xi).squeeze(-1)
    out = [z[..., 0]]
    for n in range(len(union) - 1):
        eps = guide.offset[n].unsqueeze(-1) - guide.gain[n] @ z.unsqueeze(-1) + guide.tril[n] @ normals(g.shape[-1])
        z = (f[n] @ z.unsqueeze(-1) + g[n] @ eps).squeeze(-1) + o[n]
        out.append(z[..., 0])
    return torch.stack(out, -1)[..., place[len(times) + 1 :]]


class ExactEvidence(nn.Module):
    """Negative log evidence per series of the linear form, as an objective of ``inference.fit``.

    Args:
        system: whose parameters are learned.
        log_noise_std: of the observations, a parameter or a buffer of the caller's, ``(D,)``.
        times: ``(T,)``, float64.
        shared: whether all series miss the same.
    """

    def __init__(self, system: FractionalSystem, noise_std: nn.Module, times: Tensor, shared: bool) -> None:
        super().__init__()
        self.system, self.noise_std, self.times, self.shared = system, noise_std, times, shared

    def forward(self, observations: Tensor, mask: Tensor) -> Tensor:
        """Mean over series of -log p, from ``(B, T, D)`` and its mask."""
        here = mask.double().movedim(0, 1)
        here = here[:, :1] if self.shared else here
        values = gaussian_log_likelihood(
            self.system.linear_sde(), self.times, observations.movedim(0, 1), here, self.noise_std()
        )
        return -values.sum(-1).mean()


def climb(objective: nn.Module, data: tuple[Tensor, Tensor], max_evaluations: int) -> bool:
    """Go on to the maximum by L-BFGS, from where a search by gradients stands, in place.

    H, theta and the errors' deviation lie on a ridge, along which Adam's steps are still far from the end when their
    schedule is.  In float64, whatever the parameters are held in; what is worse once they are put back is not kept.

    Args:
        objective: an ``ExactEvidence``.
        data: ``(N, T, D)`` and its mask, all series.
        max_evaluations: of the evidence.

    Returns:
        Whether the evidence is flat where this ended.
    """
    free = {name: p for name, p in objective.named_parameters() if p.requires_grad}
    if len(data[0]) < _SERIES:  # that of one start is zero
        free = {name: p for name, p in free.items() if not name.endswith("log_start_std")}
    if not free:
        return True
    count, sizes = len(data[0]), [p.numel() for p in free.values()]

    def value_and_grad(z: Tensor) -> tuple[Tensor, Tensor]:
        z = z.detach().requires_grad_()
        parts = zip(free.items(), z[0].split(sizes), strict=True)
        at = {name: part.view_as(p) for (name, p), part in parts}
        value = count * torch.func.functional_call(objective, at, data).reshape(1)
        return value.detach(), torch.autograd.grad(value.sum(), z)[0]

    def put(z: Tensor) -> Tensor:
        with torch.no_grad():
            for p, part in zip(free.values(), z[0].split(sizes), strict=True):
                p.copy_(part.view_as(p))
            loss: Tensor = objective(*data)
        return loss

    start = torch.cat([p.detach().double().flatten() for p in free.values()]).unsqueeze(0)
    before = put(start)
    # With as many steps as parameters in mind it takes a fifth of the evaluations for five dimensions.
    history = min(max(10, start.shape[1]), _HISTORY)
    found = minimize(value_and_grad, start, max_evaluations=max_evaluations, tolerance=_FLAT, history=history)
    rounding = torch.finfo(data[0].dtype).eps * before.abs().clamp(min=1.0)
    if not bool(put(found.position) <= before + rounding):
        put(start)
        return False
    return bool(found.converged.all()) or bool(found.gradient.abs().max() <= _STEEP)


class ParameterModel:
    """A Pyro model of the linear form's parameters, with the paths integrated out exactly.

    Sites are those of ``priors``; the evidence enters as the factor ``evidence``.  Any engine for Pyro models takes it.
    Two sites are in the data's own units, and ``in_full`` makes the SDE's parameters of them.  ``scale`` is what the
    noise moves X by in a ``tick``: over a unit of time that is far from the data's gaps it would follow H.  Where the
    drift reverts, ``constant`` is the drift at ``centre``: for data far from 0 that at 0 would follow theta.

    Args:
        system: the linear system; parameters without a prior stay at their present values.
        times, values, mask: the data, ``(T,)``, ``(T, B, D)``, ``(T, B or 1, D or 1)``.
        noise_std: ``(D,)``, used unless ``noise_std`` has a prior.
        priors: parameter name to a Pyro distribution of event shape ``()``, ``(D,)`` or batch shape ``(D,)``.
        tick: time over which the site ``scale`` is the noise's move, ``()``.
        centre: where the site ``constant`` is the drift, ``(D,)``.
    """

    def __init__(
        self,
        system: FractionalSystem,
        times: Tensor,
        values: Tensor,
        mask: Tensor,
        noise_std: Tensor,
        priors: Mapping[str, Any],
        tick: Tensor,
        centre: Tensor,
    ) -> None:
        self.system, self.times, self.values, self.mask, self.priors = system, times, values.double(), mask, priors
        self.tick, self.centre = tick.double(), centre.double()
        self.fixed = {k: v.detach().double() for k, v in system.parameters_now().items()}
        self.fixed["noise_std"] = noise_std.detach().double()

    def in_full(self, draws: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Parameters of the SDE from draws of the sites, with any shape before theirs."""
        out = dict(draws)
        if "scale" in out:
            hurst = out.get("hurst", self.fixed["hurst"])
            one_for_all = self.fixed["hurst"].ndim == 0
            out["scale"] = out["scale"] / self.tick ** (hurst.unsqueeze(-1) if one_for_all else hurst)
        if "constant" in out and "theta" in self.fixed:
            out["constant"] = out["constant"] + out.get("theta", self.fixed["theta"]) * self.centre
        return out

    def parameters(self, draws: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """All parameters of the SDE: these draws of the sites, and the fixed values."""
        return {**self.fixed, **self.in_full(draws)}

    def log_evidence(self, draws: Mapping[str, Tensor]) -> Tensor:
        """log p(data | draws of the sites), a scalar."""
        v = self.parameters(draws)
        linear = self.system.linear_sde(v)
        return gaussian_log_likelihood(linear, self.times, self.values, self.mask, v["noise_std"]).sum()

    def near_the_maximum(self, site: Any) -> Tensor:
        """A starting value of a site: the present value, or the prior's mean where that lies outside its support."""
        value = self._now(site["name"]).expand(site["fn"].shape()).clone()
        jitter = 1 + 0.02 * torch.rand_like(value)
        return torch.where(site["fn"].support.check(value * jitter), value * jitter, site["fn"].mean)

    def _now(self, name: str) -> Tensor:
        """The present value of a site."""
        value = self.fixed[name]
        if name == "scale":
            return value * self.tick ** self.fixed["hurst"]
        return value - self.fixed["theta"] * self.centre if name == "constant" and "theta" in self.fixed else value

    def units(self) -> dict[str, Any]:
        """Transforms of the real-valued sites to units near their posterior deviation, so that no long warm-up has to
        find them: of the constant scale T^(H - 1), the deviation of the noise's mean over the span T.
        """
        span, now = float(self.times[-1]), self.fixed
        sizes = {
            "constant": now["scale"] * span ** (now["hurst"] - 1),
            "theta": now["scale"] * 0 + 3 / span,
        }
        return {
            name: dist.transforms.AffineTransform(self._now(name), sizes[name]).inv
            for name in ("constant", "theta")
            if name in self.priors
        }

    def __call__(self) -> None:
        """The Pyro model."""
        draws = {}
        for name, prior in self.priors.items():
            whole = prior.to_event(len(prior.batch_shape)) if prior.batch_shape else prior
            draws[name] = pyro.sample(name, whole)
        pyro.factor("evidence", self.log_evidence(draws))


def default_priors(system: FractionalSystem, noise_std: Tensor, span: float, learns_noise: bool) -> dict[str, Any]:
    """Weakly informative priors around the present (maximum-likelihood) scales.

    H uniform on (0, 1); scale (what the noise moves X by in a tick, the mean gap of the data) and noise_std log-normal
    with log standard deviation 1.5; theta normal with standard deviation 20 / span, and the constant (of a drift that
    reverts: the drift at the data's mean) normal with a standard deviation of 10 such moves a tick.
    """
    now = {k: v.detach().double() for k, v in system.parameters_now().items()}
    zero, one = torch.zeros_like(now["scale"]), torch.ones_like(now["scale"])
    tick = system.tick.double()
    move = now["scale"] * tick ** now["hurst"]
    priors: dict[str, Any] = {}
    if system.noise.raw_hurst.requires_grad:
        priors["hurst"] = dist.Uniform(torch.zeros_like(now["hurst"]), torch.ones_like(now["hurst"]))
    if getattr(system.diffusion, "learned", False):
        priors["scale"] = dist.LogNormal(move.log(), 1.5 * one)
    if "theta" in now:
        priors["theta"] = dist.Normal(zero, one * 20 / span)
    if "constant" in now:
        priors["constant"] = dist.Normal(zero, 10 * move / tick)
    if learns_noise:
        priors["noise_std"] = dist.LogNormal(noise_std.double().log(), 1.5 * one)
    return priors


def checked_priors(system: FractionalSystem, priors: Mapping[str, Any] | None, learns_noise: bool) -> dict[str, Any]:
    """The user's priors, with that of one number spread over the dimensions.

    Raises:
        TypeError: one that is no distribution.
        ValueError: a name or a shape that is no parameter's, or a parameter that the model lacks or does not learn.
    """
    shapes = {name: value.shape for name, value in system.parameters_now().items()}
    shapes["noise_std"] = shapes["scale"]
    free = {
        "hurst": (system.noise.learned, "noise='fractional' and hurst='learn'"),
        "scale": (getattr(system.diffusion, "learned", False), "diffusion='constant'"),
        "theta": ("theta" in shapes, "drift='linear'"),
        "constant": ("constant" in shapes, "drift='linear' or 'constant'"),
        "noise_std": (learns_noise, "noise_std='learn' in fit"),
    }
    out = {}
    for name, prior in dict(priors or {}).items():
        if name not in free:
            raise ValueError(f"priors names {name}; parameters are {', '.join(free)}")
        if not isinstance(prior, dist.Distribution):
            raise TypeError(f"priors[{name!r}] must be one of pyro.distributions, got {type(prior).__name__}")
        learned, how = free[name]
        if not learned:
            raise ValueError(
                f"priors[{name!r}] is of a parameter that this model lacks or holds fixed: it needs {how}; or leave "
                "the prior out"
            )
        law: Any = prior
        wanted, given = shapes[name], law.shape()
        if not law.event_shape and len(given) <= len(wanted) and all(n == 1 for n in given):
            law = law.expand(wanted)
        if law.shape() != wanted:
            raise ValueError(f"priors[{name!r}] must have shape {tuple(wanted)}, got {tuple(given)}")
        out[name] = law
    return out


def one_step_ahead(
    linear: LinearSDE, times: Tensor, values: Tensor, mask: Tensor, noise_std: Tensor
) -> tuple[Tensor, Tensor]:
    """Error and standard deviation of the forecast of each observation from those before it, ``(T, B, D)`` both."""
    filtered = kalman_filter(linear, times, values, noise_std.double(), mask)
    std = filtered.innovation_variance.sqrt().expand_as(filtered.innovation)
    return torch.where(mask.bool(), filtered.innovation, torch.nan), std


def one_step_log_density(model: ParameterModel, samples: Mapping[str, Tensor]) -> Tensor:
    """log p of each observation given those before it and a draw of the parameters, the paths integrated out.

    Args:
        model: with the data.
        samples: parameters of the SDE, ``(chain, draw, ...)``.

    Returns:
        ``(chain, draw, B, T, D)``, 0 where masked; each draw's sum is its log evidence.
    """
    shape = next(iter(samples.values())).shape[:2]

    def of_one(draw: dict[str, Tensor]) -> Tensor:
        v = {**model.fixed, **draw}
        error, std = one_step_ahead(model.system.linear_sde(v), model.times, model.values, model.mask, v["noise_std"])
        density = -0.5 * (error / std).square() - std.log() - 0.5 * math.log(2 * math.pi)
        return torch.where(model.mask.bool(), density, 0.0)

    flat = {name: value.flatten(0, 1).double() for name, value in samples.items()}
    return torch.func.vmap(of_one, chunk_size=_DRAWS_AT_ONCE)(flat).movedim(1, 2).unflatten(0, shape)


def posterior_draws(
    system: FractionalSystem,
    model: ParameterModel,
    samples: Mapping[str, Tensor],
    wanted: Tensor,
    num_samples: int,
    source: torch.Generator,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Posterior of X at ``wanted`` times: mean and variance ``(B, T', D)``, draws ``(S, B, T', D)``, noise_std.

    With ``samples`` ``(chain, draw, ...)`` of the parameters, they are spread over the draws of X.
    """
    data = (model.times, model.values, model.mask)
    shape = (num_samples, model.values.shape[1], model.values.shape[2])

    def normals(*event: int) -> Tensor:
        return torch.randn(*event, generator=source, dtype=torch.float64, device=model.values.device)

    if not samples:
        linear, std = system.linear_sde(model.fixed), model.fixed["noise_std"]
        law = posterior_law(linear, *data, std, wanted)
        if law.factor is None:
            drawn = draw_smoothed(linear, *data, std, wanted, num_samples, source)
        else:
            drawn = law.mean + (law.factor @ normals(*shape, len(wanted), 1)).squeeze(-1)
        return law.mean.mT, law.variance.mT, drawn.mT, std
    flat = {name: value.flatten(0, 1).double() for name, value in samples.items()}
    count = len(next(iter(flat.values())))
    chosen = torch.linspace(0, count - 1, num_samples).round().long()
    means, variances, drawn_rows, noise = [], [], [], []
    for row in chosen.tolist():
        values = {**model.fixed, **{name: value[row] for name, value in flat.items()}}
        linear, std = system.linear_sde(values), values["noise_std"].expand(shape[2])
        law = posterior_law(linear, *data, std, wanted)
        if law.factor is None:
            one = draw_smoothed(linear, *data, std, wanted, 1, source)[0]
        else:
            one = law.mean + (law.factor @ normals(*shape[1:], len(wanted), 1)).squeeze(-1)
        means.append(law.mean)
        variances.append(law.variance)
        drawn_rows.append(one)
        noise.append(std)
    mean = torch.stack(means)
    between = mean.var(0, unbiased=False)
    variance = torch.stack(variances).mean(0) + between
    return mean.mean(0).mT, variance.mT, torch.stack(drawn_rows).mT, torch.stack(noise)[:, None, None]
