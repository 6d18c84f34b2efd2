"""Target processes: what functions should look like before data, stated as a Gaussian process or as any sampler.

A target is a callable ``(x, n) -> (n, M, K)``: ``n`` independent functions at the ``M`` rows of ``x``, with ``K``
outputs.  Those here have zero mean and also offer ``covariance(x)``, the mean covariance over their hyperparameters,
for matching by covariances.

Tran, Rossi, Milios and Filippone, All you need is a good functional prior for Bayesian deep learning, JMLR 23(74),
2022.  The reference implementation writes draws of a hyper-prior into gpytorch's *raw* parameters, so that the kernel
sees ``softplus(draw)``, and overwrites the kernel that it was given.  Here a draw is the value of the hyperparameter,
and a kernel that is passed in stays as it is.
"""

import copy
import math
from collections.abc import Callable
from typing import Any

import gpytorch
import torch
from torch import Tensor

__all__ = ["GPTarget", "HierarchicalRBF", "as_target", "gp_target"]

_JITTER = 1e-6  # relative to the variance, in float64: the paper's value, far above rounding
_MAX_DOUBLINGS = 10
_MEAN_NODES = 256  # of a mean over a log-normal
_CHUNK = 2**24  # matrix entries factorised at once: 128 MiB in float64


class HierarchicalRBF:
    """The paper's target: an RBF Gaussian process whose length scales and variance are random.

    ``k(x, x') = alpha^2 exp(-sum_d (x_d - x'_d)^2 / (2 l_d^2))`` with independent ``l_d ~ LogNormal`` and ``alpha^2 ~
    LogNormal``.  Every function has its own draw of both.  **The second parameter of each LogNormal is a variance**
    (of the logarithm), as in the paper, where ``torch.distributions.LogNormal`` and gpytorch take a standard deviation.

    The K outputs of one function share its hyperparameters and are independent given them: a discrepancy that
    compares outputs one by one sees the same law as with separate hyperparameters, at a K-th of the factorisations.

    Args:
        in_features: number of inputs D.
        num_outputs: K.
        log_lengthscale_mean: mean of ``log l_d``; by default ``log sqrt(2 D)``.
        log_lengthscale_variance: its variance.
        log_variance_mean: mean of ``log alpha^2``.
        log_variance_variance: its variance.
        jitter: added to the diagonal, relative to ``alpha^2``.

    Raises:
        ValueError: a count below 1 or a variance below 0.
    """

    def __init__(
        self,
        in_features: int,
        num_outputs: int = 1,
        *,
        log_lengthscale_mean: float | None = None,
        log_lengthscale_variance: float = 1.0,
        log_variance_mean: float = 0.1,
        log_variance_variance: float = 1.0,
        jitter: float = _JITTER,
    ) -> None:
        for name, count in (("in_features", in_features), ("num_outputs", num_outputs)):
            if count < 1:
                raise ValueError(f"{name} must be at least 1, got {count}")
        for name, value in (
            ("log_lengthscale_variance", log_lengthscale_variance),
            ("log_variance_variance", log_variance_variance),
            ("jitter", jitter),
        ):
            if not value >= 0:
                raise ValueError(f"{name} must not be negative, got {value}")
        self.in_features = in_features
        self.num_outputs = num_outputs
        default = math.log(2 * in_features) / 2
        self.log_lengthscale_mean = default if log_lengthscale_mean is None else log_lengthscale_mean
        self.log_lengthscale_variance = log_lengthscale_variance
        self.log_variance_mean = log_variance_mean
        self.log_variance_variance = log_variance_variance
        self.jitter = jitter

    @classmethod
    def regression(cls, in_features: int, num_outputs: int = 1) -> "HierarchicalRBF":
        """The paper's regression setting: ``alpha^2 ~ LogNormal(0.1, 1)`` for standardised targets."""
        return cls(in_features, num_outputs)

    @classmethod
    def classification(cls, in_features: int, num_outputs: int) -> "HierarchicalRBF":
        """The paper's classification setting: ``alpha^2 ~ LogNormal(log 8, 0.3)`` for functions before the softmax."""
        return cls(in_features, num_outputs, log_variance_mean=math.log(8.0), log_variance_variance=0.3)

    def hyperparameters(self, n: int, device: torch.device | None = None) -> tuple[Tensor, Tensor]:
        """``n`` independent draws, float64: length scales ``(n, D)`` and variances ``alpha^2`` ``(n,)``."""
        log_l = torch.randn(n, self.in_features, dtype=torch.float64, device=device)
        log_v = torch.randn(n, dtype=torch.float64, device=device)
        return self._lengthscale(log_l), self._variance(log_v)

    def link(self, value: Tensor) -> Tensor:
        """From a log-normal value to the hyperparameter: the identity, for a subclass to override."""
        return value

    def _lengthscale(self, z: Tensor) -> Tensor:
        return self.link((self.log_lengthscale_mean + math.sqrt(self.log_lengthscale_variance) * z).exp())

    def _variance(self, z: Tensor) -> Tensor:
        return self.link((self.log_variance_mean + math.sqrt(self.log_variance_variance) * z).exp())

    @torch.no_grad()
    def __call__(self, x: Tensor, n: int) -> Tensor:
        """``n`` independent functions at ``x``, ``(M, D)`` or flattened to it: ``(n, M, K)``, like ``x`` in dtype."""
        points = _rows(x, self.in_features)
        lengthscale, variance = self.hyperparameters(n, x.device)
        draws = []
        for part in _chunks(n, points.shape[0]):
            scaled = points / lengthscale[part].unsqueeze(1)
            # The norms cancel to the last digits of float64 near the diagonal, 10^-10 and less of the jitter.
            half = scaled.square().sum(-1, keepdim=True) / 2
            exponent = (scaled @ scaled.mT).sub_(half).sub_(half.mT).clamp_max_(0)
            covariance = exponent.exp_().mul_(variance[part, None, None])
            draws.append(_draw(covariance, self.jitter, self.num_outputs))
        return torch.cat(draws).to(x.dtype)

    @torch.no_grad()
    def covariance(self, x: Tensor, num_nodes: int = 64) -> Tensor:
        """Covariance of a function's values at ``x``, averaged over the hyperparameters: ``(M, M)``.

        ``E[alpha^2] prod_d E[exp(-(x_d - x'_d)^2 / (2 l_d^2))]``, each factor by the trapezoidal rule in ``log l_d``.
        """
        points = _rows(x, self.in_features)
        z, weights = _normal_rule(num_nodes)
        z, weights = z.to(x.device), weights.to(x.device)
        precision = self._lengthscale(z) ** -2
        total = self._variance_mean(x.device).expand((points.shape[0],) * 2)
        for column in points.T:
            square = (column.unsqueeze(-1) - column).square()
            factor = torch.zeros_like(square)
            for w, p in zip(weights, precision, strict=True):
                factor += w * torch.exp(-square * p / 2)
            total = total * factor
        return total.to(x.dtype)

    @property
    def variance_mean(self) -> float:
        """``E[alpha^2]``."""
        return float(self._variance_mean())

    def _variance_mean(self, device: torch.device | None = None) -> Tensor:
        z, weights = (v.to(device=device) for v in _normal_rule(_MEAN_NODES))
        return (weights * self._variance(z)).sum()


class GPTarget:
    """Zero-mean Gaussian process with a gpytorch kernel; priors on its hyperparameters make it hierarchical.

    Where the kernel carries gpytorch priors, every function has its own hyperparameters, drawn independently from
    them and set through the priors' setting closures (values, not raw parameters); the K outputs of a function share
    them.  Without priors all functions share the kernel's present values.  Everything is computed in float64 on a
    copy of the kernel.

    Build it with :func:`gp_target`.
    """

    def __init__(self, kernel: gpytorch.kernels.Kernel, num_outputs: int, jitter: float) -> None:
        self.num_outputs = num_outputs
        self.jitter = jitter
        self._kernel = copy.deepcopy(kernel).double().requires_grad_(False)
        self._hierarchical = next(iter(self._kernel.named_priors()), None) is not None
        self._scratch: tuple[Any, gpytorch.kernels.Kernel] | None = None

    @torch.no_grad()
    def __call__(self, x: Tensor, n: int) -> Tensor:
        """``n`` independent functions at ``x`` ``(M, *event)``: ``(n, M, K)``, dtype and device of ``x``."""
        points = _rows(x)
        if not self._hierarchical:
            covariance = self._kernel.to(x.device)(points).to_dense()
            return _draw(covariance.expand(n, *covariance.shape), self.jitter, self.num_outputs).to(x.dtype)
        batch = self._kernel.batch_shape.numel()
        draws = [
            _draw(
                self._with_drawn_hyperparameters(part.stop - part.start, x)(points).to_dense(),
                self.jitter,
                self.num_outputs,
            )
            for part in _chunks(n, points.shape[0], batch)
        ]
        return torch.cat(draws).to(x.dtype)

    @torch.no_grad()
    def covariance(self, x: Tensor, num_draws: int = 500) -> Tensor:
        """Covariance of a function at ``x``: ``(M, M)``, or ``(K, M, M)`` for a kernel of batch shape ``(K,)``.

        With priors, the average over ``num_draws`` draws of the hyperparameters from the global generator.
        """
        points = _rows(x)
        if not self._hierarchical:
            return self._kernel.to(x.device)(points).to_dense().to(x.dtype)
        parts = _chunks(num_draws, points.shape[0], self._kernel.batch_shape.numel())
        sums = [self._with_drawn_hyperparameters(p.stop - p.start, x)(points).to_dense().sum(0) for p in parts]
        return (torch.stack(sums).sum(0) / num_draws).to(x.dtype)

    def _with_drawn_hyperparameters(self, n: int, x: Tensor) -> gpytorch.kernels.Kernel:
        # gpytorch keeps batches in front of each parameter: n sets of hyperparameters are one kernel with n in front.
        if self._scratch is None or self._scratch[0] != (n, x.device):
            kernel = copy.deepcopy(self._kernel)
            for module in kernel.modules():
                if isinstance(module, gpytorch.kernels.Kernel):
                    for parameter in module.parameters(recurse=False):
                        parameter.data = parameter.data.expand(n, *parameter.shape).clone()
                    module.batch_shape = torch.Size([n, *module._batch_shape])
            self._scratch = ((n, x.device), kernel.to(x.device))
        kernel = self._scratch[1]
        for name, module, prior, closure, setting_closure in kernel.named_priors():
            if setting_closure is None:
                raise ValueError(f"kernel's prior {name} has no setting closure, so its draws cannot be set")
            shape = closure(module).shape[: closure(module).ndim - len(prior.event_shape)]
            setting_closure(module, prior.expand(shape).sample() if prior.batch_shape else prior.sample(shape))
        return kernel


def gp_target(kernel: gpytorch.kernels.Kernel, num_outputs: int | None = None, *, jitter: float = _JITTER) -> GPTarget:
    """A zero-mean Gaussian process as a target.

    Args:
        kernel: any gpytorch kernel, with or without priors on its hyperparameters (see :class:`GPTarget`).  Its batch
            shape must be ``()``, one law for all outputs, or ``(K,)``, one entry an output.  It is copied: neither
            drawing nor a later change of it affects the other.
        num_outputs: K; by default the kernel's batch size.
        jitter: added to the diagonal, relative to the mean variance; doubled while the factorisation fails.

    Raises:
        TypeError: ``kernel`` is no gpytorch kernel.
        ValueError: its batch shape does not fit ``num_outputs``, or a parameter is not finite.
    """
    if not isinstance(kernel, gpytorch.kernels.Kernel):
        raise TypeError(f"kernel must be a gpytorch kernel, got {type(kernel).__name__}")
    if not jitter >= 0:
        raise ValueError(f"jitter must not be negative, got {jitter}")
    batch = tuple(kernel.batch_shape)
    outputs = (batch[0] if batch else 1) if num_outputs is None else num_outputs
    if outputs < 1 or batch not in ((), (outputs,)):
        raise ValueError(f"kernel's batch shape must be () or (num_outputs,) = ({outputs},), got {batch}")
    for name, parameter in kernel.named_parameters():
        if parameter.is_cpu and not bool(torch.isfinite(parameter).all()):
            raise ValueError(f"kernel's parameter {name} is NaN or infinite")
    return GPTarget(kernel, outputs, jitter)


def as_target(obj: Any, num_outputs: int = 1) -> Callable[[Tensor, int], Tensor]:
    """A target from a gpytorch kernel, from a target, or from any sampler of functions.

    Args:
        obj: a gpytorch kernel, or a callable ``(x, n) -> (n, M, num_outputs)`` that returns independent draws.
        num_outputs: K.

    Returns:
        ``(x, n) -> (n, M, K)``.  A user's callable is wrapped: it raises ``ValueError`` where a draw has the wrong
        shape or (on the CPU, where looking is free) holds NaN or infinite values.

    Raises:
        TypeError: ``obj`` is neither.
    """
    if isinstance(obj, gpytorch.kernels.Kernel):
        return gp_target(obj, num_outputs)
    if isinstance(obj, GPTarget | HierarchicalRBF):
        if obj.num_outputs != num_outputs:
            raise ValueError(f"the target has {obj.num_outputs} outputs, num_outputs is {num_outputs}")
        return obj
    if not callable(obj) or isinstance(obj, type):
        raise TypeError(f"target must be a gpytorch kernel or a callable (x, n) -> (n, M, K), got {obj!r}")

    def checked(x: Tensor, n: int) -> Tensor:
        draws = obj(x, n)
        expected = (n, x.shape[0], num_outputs)
        if not isinstance(draws, Tensor) or tuple(draws.shape) != expected:
            found = tuple(draws.shape) if isinstance(draws, Tensor) else type(draws).__name__
            raise ValueError(f"target must return (n, M, K) = {expected}, got {found}")
        if draws.is_cpu and not bool(torch.isfinite(draws).all()):
            raise ValueError("target drew NaN or infinite function values")
        return draws

    return checked


def _draw(covariance: Tensor, jitter: float, num_outputs: int) -> Tensor:
    """``(n, M, K)`` draws of ``N(0, covariance)``; covariance ``(n, M, M)`` or, one an output, ``(n, K, M, M)``."""
    n, points = covariance.shape[0], covariance.shape[-1]
    shared = covariance.stride(0) == 0  # an expanded matrix is factorised once
    factor = _factorise(covariance[:1] if shared else covariance, jitter)
    if covariance.ndim == 3:
        noise = torch.randn(n, points, num_outputs, dtype=torch.float64, device=covariance.device)
        return factor @ noise
    noise = torch.randn(n, num_outputs, points, 1, dtype=torch.float64, device=covariance.device)
    return (factor @ noise).squeeze(-1).mT


def _factorise(covariance: Tensor, jitter: float) -> Tensor:
    """Lower Cholesky factors of ``covariance + jitter * mean variance * I``, the jitter doubled while one fails.

    On an accelerator the outcome is not read back, which would stall it at each step: a matrix that fails is drawn as
    NaN, which the optimisation loop's guard reports.
    """
    scale = covariance.diagonal(dim1=-2, dim2=-1).mean(-1, keepdim=True)
    added = 0.0
    covariance = covariance.clone()
    for _ in range(_MAX_DOUBLINGS):
        covariance.diagonal(dim1=-2, dim2=-1).add_((jitter - added) * scale)
        factor, info = torch.linalg.cholesky_ex(covariance)
        if not covariance.is_cpu:
            return factor.masked_fill((info != 0)[..., None, None], math.nan)
        if not bool(info.any()):
            return factor
        jitter, added = 2 * jitter, jitter
    raise ValueError(
        f"the target's covariance is not positive definite even with a jitter of {jitter / 2:.1e} of its variance: "
        f"it holds NaN, or the kernel is no covariance function"
    )


def _normal_rule(num_nodes: int) -> tuple[Tensor, Tensor]:
    """Nodes and weights, float64, of a mean over a standard normal: the trapezoidal rule on (-7, 7)."""
    z = torch.linspace(-7, 7, num_nodes, dtype=torch.float64)
    weights = torch.exp(-z.square() / 2)
    return z, weights / weights.sum()


def _rows(x: Tensor, features: int | None = None) -> Tensor:
    if not isinstance(x, Tensor) or x.ndim < 2:
        raise ValueError(f"x must be (M, ...), one point a row, got shape {tuple(getattr(x, 'shape', ()))}")
    rows = x.detach().flatten(1).double()
    if features is not None and rows.shape[1] != features:
        raise ValueError(f"x has {rows.shape[1]} features, the target was built for in_features = {features}")
    return rows


def _chunks(n: int, points: int, batch: int = 1) -> list[slice]:
    size = max(1, _CHUNK // (points * points * batch))
    return [slice(i, min(i + size, n)) for i in range(0, n, size)]
