"""Maximum likelihood of unnormalised models by stochastic compositional optimisation (MECO).

Jiang, Qin, Wu, Chen, Yang and Zhang, "Learning Unnormalized Statistical Models via Compositional Optimization", ICML
2023, arXiv:2306.07485.  The negative log-likelihood of ``p = exp(l_theta) / Z(theta)`` is

    F(theta) = -mean_i l_theta(x_i) + log g(theta),      g(theta) = E_q[exp(l_theta(z)) / q(z)] = Z(theta),

an expectation inside a logarithm.  A running estimate u of g follows the parameters:

    a_j    = l_theta(z_j) - log q(z_j),   z_j ~ q,   j = 1..M,     log g_t = logsumexp(a) - log M
    log u_t = logaddexp(log(1 - beta) + log u_{t-1}, log beta + log g_t),     u_0 = g_0
    G_t    = -mean_i grad l(x_i) + sum_j w_j grad l(z_j),          w_j = exp(a_j - log u_t) / M

All is done with logarithms.  As u_t contains its own batch, the weights sum to at most 1 / beta.  At fixed parameters u
has the mean Z and the relative variance ``beta / (2 - beta) (E_q[(p / q)^2] - 1) / M``.

u lags where Z moves fast.  Gradient descent of rate eta on a model with ``R = |grad log Z|`` is stable only for about
``eta R^2 < (2 - beta) / (1 - beta)``.  ``correction="ratio"`` moves u along with the parameters by the ratio of the
same noise batch's estimates at the new and at the old ones,

    log u_{t-1}  <-  log u_{t-1} + log g(theta_t; z_t) - log g(theta_{t-1}; z_t),

(a STORM correction that keeps u positive; it is not in the paper), at the cost of one more pass of some of the noise
without a gradient.  Half of the draws serve, and of many 256: their share of Var(log u) is
``(1 - beta)^2 / (beta (2 - beta))`` times that of the change of l over one step, which is small beside the estimate's
own.  The draws must be fresh ones: those of the step before, whose values at theta_{t-1} are known already, are what
the step from there was fitted to, and on them Z falls too much.  Before, ``warmup_steps`` steps are made with beta = 1.

With the correction the data's mean gradient has the same weight as the noise's,

    G_t    = sum_j w_j (grad l(z_j) - mean_i grad l(x_i)),         sum_j w_j = g_t / u_t,

so that its mean is ``Z / u_t`` times grad F, whatever u_t is, and a constant added to l, which changes no law, has no
gradient.  In the paper's G_t such a constant follows the noise of ``g_t / u_t``: log Z wanders by tens of nats, and now
and then a fit runs away with it (one of 24 of eight Gaussians by a network of 12,608 parameters).  Also not in the
paper; at beta = 1 the two are the same.
"""

import math
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor

from inference.citation import Paper
from inference.kernels.base import count
from inference.objectives.unnormalised.objective import UnnormalisedObjective, positive_weights
from inference.objectives.unnormalised.pair import Draws
from inference.objectives.unnormalised.schedules import BetaSchedule, Constant, as_beta
from inference.results.evidence import LogPartition, from_weights, with_upper_bound
from inference.runtime import distributed

__all__ = ["CompositionalLikelihood", "mix"]

_CORRECTIONS = ("ratio", "none")
_ADAPTATIONS = ("none", "data", "cross_entropy")
_CORRECTED_BY_HALF = 64  # noise draws from which every other one carries the ratio correction
_VALIDATION_DRAWS = 16_384
_CORRECTING = 256  # draws that do so at most, of larger batches


def mix(log_u: Tensor, log_g: Tensor, beta: Tensor) -> Tensor:
    """``log((1 - beta) u + beta g)`` in the log domain."""
    return torch.logaddexp(torch.log1p(-beta) + log_u, beta.log() + log_g)


class CompositionalLikelihood(UnnormalisedObjective):
    """Negative mean log-likelihood of any unnormalised Pyro model, as an objective for ``inference.fit``.

    The loss that it returns is ``-mean l(x) + log u``; its gradient is the estimator G above.  Latent sites of the
    model outside the data plate (a prior on a parameter, a ``PyroSample``) are learned too: their values are those of
    largest posterior density (MAP), and the loss then has the term ``-log prior / num_data``.  The model sees data
    and noise in one call, with as many rows as both together; plates are sized by the rows it is given.  A tensor of
    the batch that no noise site observes is a covariate; then the noise's rows take the data's covariates in turn, and
    one constant normalises the joint law over the data's covariates (the joint tilt, which is consistent for the
    conditional only in families closed under a factor that depends on the covariates; see
    ``ConditionalCompositionalLikelihood``).

    Args:
        model: Pyro model ``model(x, ...)`` that observes ``x`` at a site in a plate of ``len(x)`` rows; its density may
            hold an ``ImproperUniform``, factors in the plate, or a law without its constant.
        guide: the noise: a Pyro callable that draws the same site, for one row (``pyro.sample("x", q)``), or for the
            rows it is given, or in a plate of its own.  Its support must hold the model's.
        noise_samples: noise draws M in a step; by default those of the guide's own plate, or else 256.
        beta: weight of the new batch in u: a number in (0, 1], or a schedule (``Cosine``, ``InverseTime``,
            ``Proximal``, ``TargetVariance``).  1 is importance-sampled maximum likelihood, biased by O(1 / M).
        correction: ``"ratio"``, for the two above; or ``"none"``, for the paper's u and G.
        warmup_steps: steps with beta = 1 before the schedule.
        adapt: what the guide's own parameters learn: ``"none"``; ``"data"``: the likelihood of the data;
            ``"cross_entropy"``: that of the model, through self-normalised weights (minimise over q the
            logmeanexp of ``l(z) - log q(z)`` at fixed z).
        on_collapse: ``"raise"``, ``"warn"`` or ``"ignore"`` when the noise weights collapse.
        num_data: rows of the whole data, which a model with priors needs unless its data plate says it
            (``pyro.plate("data", num_data, subsample=...)``).

    Attributes:
        log_u: the running estimate of log Z, ``()`` in float64.
        refreshed: the estimate that u was last set to by ``refresh``, with its standard error: after a fit with
            ``average_last`` that of the averaged parameters. None before.
        history: of each step ``log_partition`` (log u), ``log_partition_batch``, ``ess`` (the effective share of the
            noise) and ``beta``.

    Raises:
        CollapseError: in a fit, when fewer than 1 % of the noise draws carried the estimate for 50 steps.

    Example:
        >>> import pyro, pyro.distributions as dist
        >>> from pyro.nn import PyroModule, PyroParam
        >>> class Quartic(PyroModule):  # p(x) ~ exp(-c x^4)
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.c = PyroParam(torch.tensor(1.0), dist.constraints.positive)
        ...     def forward(self, x):
        ...         with pyro.plate("data", len(x)):
        ...             pyro.sample("x", dist.ImproperUniform(dist.constraints.real, (), ()), obs=x)
        ...             pyro.factor("energy", -self.c * x**4)
        >>> def noise():
        ...     pyro.sample("x", dist.Normal(0.0, 1.0))
        >>> x = torch.linspace(-1, 1, 101)  # sample mean of x^4 is 0.2081, so c = 1 / (4 * 0.2081)
        >>> from inference.fit import fit
        >>> objective = CompositionalLikelihood(Quartic(), noise)
        >>> _ = fit(objective, x, num_steps=600, lr=0.02, average_last=0.5, progress=False)
        >>> round(objective.pair.model.c.item(), 1)
        1.2
    """

    papers: ClassVar[tuple[Paper, ...]] = (
        Paper(
            "inproceedings",
            "jiang2023learning",
            author="Jiang, Wei and Qin, Jiayu and Wu, Lingyu and Chen, Changyou and Yang, Tianbao and Zhang, Lijun",
            title="Learning Unnormalized Statistical Models via Compositional Optimization",
            booktitle="International Conference on Machine Learning",
            year=2023,
        ),
    )
    columns: ClassVar[tuple[str, ...]] = ("log_partition", "log_partition_batch", "ess", "beta")
    _takes_priors: ClassVar[bool] = True
    log_u: Tensor
    share: Tensor

    def __init__(
        self,
        model: Callable[..., Any],
        guide: Callable[..., Any],
        noise_samples: int | None = None,
        *,
        beta: float | BetaSchedule = 0.1,
        correction: str = "ratio",
        warmup_steps: int = 100,
        adapt: str = "none",
        on_collapse: str = "raise",
        num_data: int | None = None,
    ) -> None:
        if guide is None:
            raise ValueError(
                "an unnormalised model needs noise to estimate its constant: give a guide that draws the site that the "
                "model observes"
            )
        super().__init__(model, guide, noise_samples, on_collapse=on_collapse)
        if correction not in _CORRECTIONS:
            raise ValueError(f"correction must be one of {_CORRECTIONS}, got {correction!r}")
        if adapt not in _ADAPTATIONS:
            raise ValueError(f"adapt must be one of {_ADAPTATIONS}, got {adapt!r}")
        self.schedule = as_beta(beta)
        self.correction, self.adapt = correction, adapt
        self.warmup_steps = count("warmup_steps", warmup_steps, 0)
        self.num_data = None if num_data is None else count("num_data", num_data, 1)
        self.register_buffer("log_u", torch.zeros((), dtype=torch.float64))
        self.register_buffer("share", torch.ones((), dtype=torch.float64))
        self.refreshed: LogPartition | None = None
        self._judged: tuple[list[int], Tensor] | None = None
        self._refuse_no_average()

    def forward(self, *batch: Tensor) -> Tensor:
        """The loss on a batch, a scalar; in training it advances u, and held-out rows are judged by fresh noise."""
        self._prepare(batch)
        if not self._advances():
            return self._fresh_log_z(batch) - self.log_density(*batch).mean() + self._penalty(batch)
        draws = self.pair.draw(self.noise_samples, batch, record=True)
        at_data, at_noise = self._joined(batch, draws)
        a = (at_noise.detach() - draws.log_q).double()
        log_g, log_second = _log_means(torch.stack([a, 2 * a]))
        with torch.no_grad():
            share = (2 * log_g - log_second).exp()
            log_u, beta = self._follow(a, log_g, share, draws, batch)
            weights = (a - log_u).exp().to(at_noise.dtype) / len(a)
            self.log_u.copy_(log_u)
        total = (log_g - log_u).exp().to(at_data.dtype) if self.correction == "ratio" else 1.0  # of the weights
        surrogate = positive_weights(weights, at_noise) - total * at_data.mean()
        if self.adapt == "cross_entropy":
            log_q = self.pair.log_q(draws.values, batch, record=True)
            surrogate = surrogate + torch.logsumexp(at_noise.detach() - log_q, 0)
        elif self.adapt == "data":
            surrogate = surrogate - self.pair.log_q(self.pair.data(batch), batch, record=True).mean()
        self._write(log_u, log_g, share, beta)
        value = log_u.to(surrogate.dtype) - at_data.detach().mean()
        return value + surrogate - surrogate.detach() + self._penalty(batch)

    def _fresh_log_z(self, batch: tuple[Tensor, ...]) -> Tensor:
        """log Z by noise of its own: u follows draws of some steps, which a density that has learned its rows by heart
        may have slipped past.  Held-out rows come in chunks, and share one estimate while nothing has changed.
        """
        key = [t._version for t in (*self.parameters(), *self.buffers())]
        if self._judged is None or self._judged[0] != key or self.pair.covariates(batch):
            log_weights = self._fresh_log_weights(_VALIDATION_DRAWS, 0, batch)
            self._judged = key, torch.logsumexp(log_weights, 0) - math.log(len(log_weights))
        return self._judged[1]

    def _penalty(self, batch: tuple[Tensor, ...]) -> Tensor | float:
        """``-log prior / num_data`` where the model has priors."""
        if not len(self.pair.points):
            return 0.0
        rows = self.num_data or self.pair.plate_size
        if rows is None:
            raise ValueError(
                f"the model has priors ({', '.join(self.pair.latent_values())}), whose weight depends on how many data "
                "there are in all: give num_data=, or pyro.plate('data', num_data, subsample=x)"
            )
        return -self.pair.log_prior(batch, record=self._advances()) / rows

    @property
    def point_estimate(self) -> dict[str, Tensor]:
        """The model's latent sites outside the data plate at the parameters so far, by name."""
        return {n: v.detach() for n, v in self.pair.latent_values().items()}

    def refresh(
        self, num_samples: int = 100_000, seed: int = 0, batch: tuple[Tensor, ...] | None = None
    ) -> LogPartition:
        """Set u to a fresh estimate, as is due after the parameters were averaged or put back; with its error.

        Args:
            num_samples, seed, batch: as in ``log_weights``. With covariates the batch must be given; then u is that of
                the joint law over its rows' covariates.
        """
        batch = self._example() if batch is None else batch
        self._prepare(batch)
        found = with_upper_bound(from_weights(self._fresh_log_weights(num_samples, seed, batch), "importance"))
        self.log_u.fill_(found.value)
        self.refreshed = found
        return found

    def refresh_after_average(self, *batch: Tensor) -> None:
        """What ``inference.fit`` calls once it has put the average of the parameters in place."""
        self.refresh(batch=batch)

    # ------------------------------------------------------------------ the running estimate
    def _follow(
        self, a: Tensor, log_g: Tensor, share: Tensor, draws: Draws, batch: tuple[Tensor, ...]
    ) -> tuple[Tensor, Tensor]:
        """log u_t and beta_t; keeps the parameters for the next step's correction."""
        before = self.log_u
        if self.correction == "ratio" and self.pair.learned:
            current = self.pair.learned
            found = {n: self._buffers.get(_key(n)) for n in current}
            kept = {n: v for n, v in found.items() if v is not None}
            if len(kept) < len(current):
                for n, p in current.items():
                    self.register_buffer(_key(n), p.detach().clone())
            else:
                stride = 1 if len(a) < _CORRECTED_BY_HALF else max(2, len(a) // _CORRECTING)
                some = slice(None, None, stride)  # evenly over a grid, too
                values = {n: z[some] for n, z in draws.values.items()}
                covariates = self._covariates(batch, len(a), some)
                old = self.pair.log_density(values, covariates, record=True, parameters=kept)
                now, then = _log_means(torch.stack([a[some], (old - draws.log_q[some]).double()]))
                before = before + (now - then).nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)
                torch._foreach_copy_(list(kept.values()), [p.detach() for p in current.values()])
        if not isinstance(self.schedule, Constant):  # the schedule sees an average over some batches
            self.share.copy_(torch.where(self.step == 0, share, self.share.lerp(share, 0.05)))
        beta = self.schedule(self.step, before, self.share, self.noise_samples)
        beta = torch.where(self.step < self.warmup_steps, torch.ones_like(beta), beta)
        followed = mix(before, log_g, beta)
        return torch.where(self.step == 0, log_g, followed), beta

    def _covariates(self, batch: tuple[Tensor, ...], num: int, some: slice) -> tuple[Tensor, ...]:
        """The batch with the covariates of some of ``num`` noise rows."""
        covariates = self.pair.covariates(batch)
        if not covariates:
            return batch
        index = torch.arange(num, device=batch[0].device)[some] % len(batch[0])
        return tuple(t[index] if k in covariates else t for k, t in enumerate(batch))

    def _prepare(self, batch: tuple[Tensor, ...]) -> None:
        first = not self.pair.inspected
        super()._prepare(batch)
        if first:
            self._refuse_no_average()

    def _refuse_no_average(self) -> None:
        constant = isinstance(self.schedule, Constant) and self.schedule.beta == 1.0
        if constant and self.noise_samples == 1:
            raise ValueError(
                "noise_samples=1 with beta=1 has the weight 1 at every step, so that nothing estimates Z: use beta "
                "below 1, or more noise_samples"
            )

    def _state_names(self) -> set[str]:
        return super()._state_names() | {"log_u", "share"}


def _key(name: str) -> str:
    return "previous/" + name.replace(".", "/")


def _log_means(a: Tensor) -> tuple[Tensor, Tensor]:
    """log of the mean of exp(a) for two rows ``(2, draw)``; over all ranks' noise where there are several."""
    found = torch.logsumexp(a, 1) - math.log(a.shape[1])
    if distributed.world_size() > 1:
        ranks = distributed.gather_rows(found[None], to_all=True)
        found = torch.logsumexp(ranks, 0) - math.log(len(ranks))
    first, second = found.unbind()
    return first, second
