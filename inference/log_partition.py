"""log Z with its error: annealed importance sampling both ways, bridge sampling, importance sampling.

    ais(model, data)                                     # a stochastic lower bound
    ais_sandwich(model, data, posterior_samples=exact)   # lower and upper bound, and the bridge between them
    bridge_sampling(model, mcmc.get_samples(group_by_chain=True), data)
    importance(model, data, proposal=guide_distribution)

Z is the normalising constant of the model's joint density, the evidence of the data.  Annealing (Neal, "Annealed
importance sampling", Statistics and Computing 11, 2001) goes from f_0, the prior, to f_K, the joint density, through
f_k = prior L^beta_k with moves T_k that leave f_k invariant:

    forward, z_0 ~ f_0:        log w = sum_k log f_k(z_{k-1}) / f_{k-1}(z_{k-1}),   z_k ~ T_k(z_{k-1}),   E[w] = Z
    reverse, z_K ~ f_K / Z:    the same sum over z_{k-1} ~ T_k(z_k), k = K, ..., 1,   E[1 / w] = 1 / Z

where ``T_k`` is reversible.  Any result is a :class:`LogPartition`.
"""

import math
import warnings
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.distributions import Distribution

from inference._errors import SamplerWarning
from inference.citation import Paper, from_papers
from inference.kernels.base import count
from inference.kernels.tempered_hmc import TemperedHMC, likelihood
from inference.potential import TemperedPath, tempered_path
from inference.potential.log_density import _without_validation
from inference.potential.tempered import Reference, _check_base, _draws
from inference.results.evidence import LogPartition, bridge, from_weights, sandwich
from inference.runtime.generators import derive_seed, generator
from inference.smc import Annealed, anneal, ladder, lift, refuse_bad

__all__ = ["LogPartition", "ais", "ais_sandwich", "annealed_log_weights", "bridge_sampling", "importance"]

_S = TypeVar("_S")
_PILOT_PARTICLES = 256
_FEW_WEIGHTS = 10  # effective ones
_UNRELIABLE_K = 0.7
_WARP = ("none", "normal", "symmetric")


_AIS = Paper(
    "article",
    "neal2001annealed",
    author="Neal, Radford M.",
    title="Annealed Importance Sampling",
    journal="Statistics and Computing",
    volume=11,
    pages="125--139",
    year=2001,
)
_SANDWICH = Paper(
    "misc",
    "grosse2015sandwiching",
    author="Grosse, Roger B. and Ghahramani, Zoubin and Adams, Ryan P.",
    title="Sandwiching the Marginal Likelihood Using Bidirectional {M}onte {C}arlo",
    eprint="1511.02543",
    archiveprefix="arXiv",
    year=2015,
)
_BRIDGE = Paper(
    "article",
    "meng1996simulating",
    author="Meng, Xiao-Li and Wong, Wing Hung",
    title="Simulating Ratios of Normalizing Constants via a Simple Identity: A Theoretical Exploration",
    journal="Statistica Sinica",
    volume=6,
    number=4,
    pages="831--860",
    year=1996,
)
_PARETO = Paper(
    "article",
    "vehtari2024pareto",
    author="Vehtari, Aki and Simpson, Daniel and Gelman, Andrew and Yao, Yuling and Gabry, Jonah",
    title="{P}areto Smoothed Importance Sampling",
    journal="Journal of Machine Learning Research",
    volume=25,
    year=2024,
)


@from_papers(_AIS)
def annealed_log_weights(
    state: _S,
    num_temperatures: int,
    log_increment: Callable[[_S, int], Tensor],
    transition: Callable[[_S, int], _S],
    *,
    reverse: bool = False,
) -> tuple[_S, Tensor]:
    """The core of AIS, for states and transitions of any kind (a Gibbs sweep over binary units, say).

    Args:
        state: of all chains; draws of f_0, or with ``reverse`` of f_K.
        num_temperatures: K, the number of densities after f_0.
        log_increment: ``(state, k) -> log f_k - log f_{k-1}`` at the state, ``(chain,)``, k = 1, ..., K.
        transition: ``(state, k) -> state``: leaves f_k invariant; its reversal with respect to f_k if ``reverse``.
        reverse: from f_K to f_0.

    Returns:
        tuple: the last state and the log weights ``(chain,)`` in float64, with E[exp(x)] = Z_K / Z_0, or with
        ``reverse`` E[exp(-x)] = Z_0 / Z_K.
    """
    log_weights: Tensor | None = None
    for k in range(num_temperatures, 0, -1) if reverse else range(1, num_temperatures + 1):
        if reverse:
            state = transition(state, k)
        increment = log_increment(state, k).double()
        log_weights = increment if log_weights is None else log_weights + increment
        if not reverse:
            state = transition(state, k)
    assert log_weights is not None
    return state, log_weights


@from_papers(_AIS, _PARETO)
def ais(
    target: Callable[..., Any] | TemperedPath,
    *args: Any,
    num_chains: int = 256,
    num_temperatures: int = 1024,
    direction: str = "forward",
    posterior_samples: Mapping[str, Tensor] | None = None,
    num_steps: int = 5,
    inverse_temperatures: Tensor | None = None,
    reference: Reference = "prior",
    seed: int = 0,
    compile: bool = False,
    **kwargs: Any,
) -> LogPartition:
    """Annealed importance sampling with HMC moves, all chains in one program.

    A pilot run of tempered SMC chooses temperatures, step sizes and preconditioners, which are then fixed, so that the
    weights are exactly unbiased and independent given the pilot.

    Args:
        target: a Pyro model, ``TemperedFunction`` or ``TemperedPotential``.
        args: the model's arguments; ``kwargs`` likewise.
        num_chains: independent weights.
        num_temperatures: K, one HMC transition at each.
        direction: ``"forward"`` from prior to posterior, a lower bound; ``"reverse"`` an upper bound, which lies above
            log Z by minus the log of the prior's share where the likelihood is not zero: reverse chains stay there.
        posterior_samples: for ``"reverse"``: exact draws of the posterior by site, in constrained space ``(draw,
            *shape)``.  Data that were simulated from the model come with one, the latent values that made them.  Chains
            start from the draws in turn; the error counts those from the same draw as dependent, so with a single draw
            it is NaN.
        num_steps: leapfrog steps of a transition.
        inverse_temperatures: increasing from above 0 to 1, in place of the pilot's ladder.
        reference: ``"prior"``, or a distribution over flat unconstrained vectors where the path starts.
        seed: same seed, same machine, same result to the bit.
        compile: whether to compile the move.

    Raises:
        ValueError, TypeError: bad arguments; a minibatch model; a model without proper prior.
        NonFiniteError: no draw of the prior has a positive likelihood.
    """
    if direction not in ("forward", "reverse"):
        raise ValueError(f"direction must be 'forward' or 'reverse', got {direction!r}")
    if (posterior_samples is not None) != (direction == "reverse"):
        raise ValueError("posterior_samples are what direction='reverse' starts from; give both or neither")
    _check(num_chains, num_temperatures, num_steps, inverse_temperatures)
    path = tempered_path(target, args, kwargs, reference)
    plan = _Plan.make(path, num_chains, num_temperatures, num_steps, inverse_temperatures, seed, compile)
    if direction == "forward":
        found = from_weights(plan.forward(), "AIS")
    else:
        assert posterior_samples is not None
        start, groups = _starts(path.unconstrain(posterior_samples), num_chains)
        found = from_weights(plan.reverse(start), "reverse AIS", reverse=True, groups=groups)
    if found.pareto_k > _UNRELIABLE_K or found.ess < min(_FEW_WEIGHTS, num_chains / 4):
        warnings.warn(
            f"log Z rests on {found.ess:.0f} effective weights of {num_chains} (Pareto k = {found.pareto_k:.2f}): "
            "neither the estimate nor its error can be trusted, and only the bound holds. Use more num_temperatures, "
            "or bridge_sampling with posterior draws",
            SamplerWarning,
            stacklevel=2,
        )
    return found


@from_papers(_AIS, _SANDWICH, _BRIDGE)
def ais_sandwich(
    target: Callable[..., Any] | TemperedPath,
    *args: Any,
    num_chains: int = 256,
    num_temperatures: int = 1024,
    posterior_samples: Mapping[str, Tensor] | None = None,
    num_burn_in: int = 50,
    num_steps: int = 5,
    inverse_temperatures: Tensor | None = None,
    reference: Reference = "prior",
    seed: int = 0,
    compile: bool = False,
    **kwargs: Any,
) -> LogPartition:
    """log Z between a stochastic lower and upper bound: AIS forward and reverse (bidirectional Monte Carlo).

    ``lower`` and ``upper`` are the two one-sided estimates, ``value`` is the bridge between them, which is better than
    either.  Without ``posterior_samples`` the reverse chains start from the pilot's particles after ``num_burn_in``
    transitions at the posterior; then ``exact`` is False, because draws that miss a mode leave ``upper`` too low and
    agree with the forward chains that missed it too.

    Args:
        posterior_samples: as in :func:`ais`.
        num_burn_in: transitions at beta = 1 before reverse chains that start from approximate draws.
        target, args, num_chains, num_temperatures, num_steps, inverse_temperatures, reference, seed, compile, kwargs:
            as in :func:`ais`.
    """
    count("num_burn_in", num_burn_in, 0)
    _check(num_chains, num_temperatures, num_steps, inverse_temperatures)
    path = tempered_path(target, args, kwargs, reference)
    plan = _Plan.make(path, num_chains, num_temperatures, num_steps, inverse_temperatures, seed, compile)
    if posterior_samples is None:
        start, groups = plan.approximate_draws(num_burn_in), None
    else:
        start, groups = _starts(path.unconstrain(posterior_samples), num_chains)
    exact = posterior_samples is not None
    return sandwich(plan.forward(), plan.reverse(start), "AIS sandwich", exact=exact, groups=groups)


@from_papers(_BRIDGE)
def bridge_sampling(
    target: Callable[..., Any] | TemperedPath,
    posterior_samples: Mapping[str, Tensor],
    *args: Any,
    num_proposals: int | None = None,
    warp: str = "normal",
    reference: Reference = "prior",
    seed: int = 0,
    **kwargs: Any,
) -> LogPartition:
    """log Z from posterior draws by Meng and Wong's optimal bridge to a normal law in unconstrained space.

    The first half of each chain fits the normal, the second half makes the estimate, so that a fit to the same draws
    does not bias it (Overstall and Forster, Computational Statistics and Data Analysis 54, 2010).

    Args:
        target: as in :func:`ais`.
        posterior_samples: site -> draws ``(chain, draw, *shape)`` in constrained space, as
            ``mcmc.get_samples(group_by_chain=True)`` gives them; the error counts their autocorrelation.
        args, kwargs: the model's arguments.
        num_proposals: draws of the normal; as many as the second half has.
        warp: ``"normal"``: the normal has the draws' mean and covariance.  ``"none"``: their mean and variances alone.
            ``"symmetric"``: as ``"normal"``, and the posterior is made symmetric about its mean (Warp-III of Meng and
            Schilling, JCGS 11, 2002), which helps if it is skewed.
        reference: only how the density is split; no effect on the result.
        seed: of the proposals.

    Raises:
        ValueError: bad arguments, too few draws, or draws that do not vary.
    """
    if warp not in _WARP:
        raise ValueError(f"warp must be one of {_WARP}, got {warp!r}")
    leading = {n: tuple(v.shape[:2]) for n, v in posterior_samples.items()}
    if any(len(s) < 2 for s in leading.values()) or len(set(leading.values())) != 1:
        raise ValueError(f"posterior_samples must be (chain, draw, *shape), alike for all sites; they begin {leading}")
    path = tempered_path(target, args, kwargs, reference)
    chains, draws = next(iter(leading.values()))
    z = path.unconstrain({n: v.flatten(0, 1) for n, v in posterior_samples.items()}).reshape(chains, draws, -1)
    half = draws // 2
    if half < 4 or chains * half < 2 * path.dim:
        raise ValueError(
            f"{chains} chains of {draws} draws are too few for {path.dim} dimensions: at least 8 draws a chain, and 4 "
            "in all a dimension"
        )
    fit, used = z[:, :half].flatten(0, 1), z[:, half:].flatten(0, 1)
    num = len(used) if num_proposals is None else count("num_proposals", num_proposals, 2)
    mean = fit.mean(0)
    covariance = torch.diag(fit.var(0)) if warp == "none" else torch.cov(fit.T).reshape(path.dim, path.dim)
    factor, failed = torch.linalg.cholesky_ex(covariance)
    if bool(failed):
        raise ValueError("the covariance of posterior_samples is singular: some coordinates do not vary")
    noise = generator(seed, "bridge", device=path.device)
    xi = torch.randn(num, path.dim, generator=noise, dtype=path.dtype, device=path.device)
    other = torch.linalg.solve_triangular(factor, (used - mean).T, upper=False).T

    def log_ratio(x: Tensor) -> Tensor:
        log_q = _log_density(path, mean + x @ factor.T)
        if warp == "symmetric":
            log_q = torch.logaddexp(log_q, _log_density(path, mean - x @ factor.T)) - math.log(2)
        log_normal = -0.5 * x.double().square().sum(1) - 0.5 * path.dim * math.log(2 * math.pi)
        return log_q + factor.diagonal().log().sum().double() - log_normal

    at_proposal, at_target = log_ratio(xi), log_ratio(other)
    value, variance = bridge(at_proposal, at_target, chains=chains)
    low = from_weights(at_proposal, "bridge")
    return low._replace(
        value=value,
        standard_error=math.sqrt(variance),
        exact=False,
        pareto_k=math.nan,  # the bridge does not rest on the proposal's tail
        reverse_log_weights=at_target,
    )


@from_papers(_PARETO)
def importance(
    target: Callable[..., Any] | TemperedPath,
    *args: Any,
    num_samples: int = 10_000,
    proposal: Distribution | None = None,
    reference: Reference = "prior",
    seed: int = 0,
    **kwargs: Any,
) -> LogPartition:
    """log Z by importance sampling, with the Pareto shape of its weights.

    Args:
        target, args, reference, kwargs: as in :func:`ais`.
        num_samples: independent draws.
        proposal: a distribution over flat unconstrained vectors ``(dim,)``; ``None``: the reference.
        seed: of the draws.

    Warns:
        SamplerWarning: the weights' Pareto k is above 0.7: a few draws make the estimate.
    """
    count("num_samples", num_samples, 2)
    path = tempered_path(target, args, kwargs, reference)
    if proposal is None:
        z = path.sample(num_samples, [derive_seed(seed, "importance")])
        log_weights = _log_likelihood(path, z)
    else:
        _check_base("proposal", proposal, path.dim)
        proposal = _without_validation(proposal)
        z = _draws(proposal, num_samples, [derive_seed(seed, "importance")], path.device, path.dtype)
        log_weights = likelihood(_log_density(path, z) - proposal.log_prob(z))
    refuse_bad(log_weights[None])
    found = from_weights(log_weights, "importance")
    if found.pareto_k > _UNRELIABLE_K:
        warnings.warn(
            f"the importance weights have Pareto k = {found.pareto_k:.2f} > {_UNRELIABLE_K}: neither the estimate nor "
            "its error can be trusted. Use ais, SMC or a proposal with heavier tails",
            SamplerWarning,
            stacklevel=2,
        )
    return found


# ---------------------------------------------------------------- annealing with HMC
def _check(num_chains: int, num_temperatures: int, num_steps: int, inverse_temperatures: Tensor | None) -> None:
    count("num_chains", num_chains, 2)
    count("num_temperatures", num_temperatures, 1)
    count("num_steps", num_steps, 1)
    if inverse_temperatures is not None:
        ladder(inverse_temperatures)


class _State(NamedTuple):
    """Attributes:
    position: ``(chain, dim)``.
    log_likelihood: ``(chain,)``.
    """

    position: Tensor
    log_likelihood: Tensor


class _Plan(NamedTuple):
    """Everything that a pilot run fixed before the first weight.

    Attributes:
        path, num_chains, seed: as given.
        betas: ``(K + 1,)`` from 0 to 1, float64.
        step_size: ``(K + 1,)``.
        scale: ``(K + 1, dim)``.
        move: the transition.
        pilot: the run.
    """

    path: TemperedPath
    num_chains: int
    seed: int
    betas: Tensor
    step_size: Tensor
    scale: Tensor
    move: TemperedHMC
    pilot: Annealed

    @classmethod
    def make(
        cls,
        path: TemperedPath,
        num_chains: int,
        num_temperatures: int,
        num_steps: int,
        inverse_temperatures: Tensor | None,
        seed: int,
        compile: bool,
    ) -> "_Plan":
        fixed = None if inverse_temperatures is None else ladder(inverse_temperatures).to(path.device)
        move = TemperedHMC(path, num_steps, 0.5, lift(path, compile))
        pilot = anneal(
            path,
            num_particles=max(_PILOT_PARTICLES, num_chains),
            num_runs=1,
            target_ess=0.5,
            num_moves=None,
            num_steps=num_steps,
            target_accept_prob=0.9,
            jitter=0.5,
            ladder=None,
            seed=derive_seed(seed, "pilot"),
            move=move,
        )
        known = torch.cat([pilot.inverse_temperatures.new_zeros(1), pilot.inverse_temperatures])
        zero = known.new_zeros(1)
        if fixed is None:
            # The pilot's temperatures are equally hard to step over. Where its particles were slow to forget, chains
            # lag behind, and least is lost by numbers of steps that go with the root of that time (Sivak and Crooks,
            # Physical Review Letters 108, 2012, equation 15).
            hard = torch.cat([zero, pilot.moves.double().sqrt().cumsum(0)])
            even = torch.linspace(0, 1, num_temperatures + 1, dtype=known.dtype, device=known.device) * hard[-1]
            upper = torch.searchsorted(hard, even).clamp(1, len(hard) - 1)
            place = upper - 1 + (even - hard[upper - 1]) / (hard[upper] - hard[upper - 1])
            betas = _interpolate(place, known)
            betas[-1] = 1.0
        else:
            betas = torch.cat([zero, fixed])
            upper = torch.searchsorted(known, betas).clamp(1, len(known) - 1)
            place = upper - 1 + (betas - known[upper - 1]) / (known[upper] - known[upper - 1])
        tuned = (place - 1).clamp(min=0)  # there is no move at beta = 0 to learn from
        log_step = _interpolate(tuned, pilot.step_size.double().log())
        log_scale = _interpolate(tuned, pilot.scale.double().log())
        tensors = (log_step.exp().to(path.dtype), log_scale.exp().to(path.dtype))
        return cls(path, num_chains, seed, betas, *tensors, move, pilot)

    def forward(self) -> Tensor:
        """Log weights of chains from the reference to the target."""
        start = self.path.sample(self.num_chains, [derive_seed(self.seed, "reference")])
        state = _State(start, _log_likelihood(self.path, start))
        refuse_bad(state.log_likelihood[None])
        with torch.no_grad():
            return annealed_log_weights(state, len(self.betas) - 1, self._increment, self._transition("forward"))[1]

    def reverse(self, start: Tensor) -> Tensor:
        """Log weights of chains from posterior draws ``(num_chains, dim)`` to the reference."""
        state = _State(start, _log_likelihood(self.path, start))
        bad = int((state.log_likelihood == -math.inf).sum())
        if bad:
            raise ValueError(f"{bad} of the posterior draws have no positive density: they are not of this posterior")
        run = self._transition("reverse")
        with torch.no_grad():
            return annealed_log_weights(state, len(self.betas) - 1, self._increment, run, reverse=True)[1]

    def approximate_draws(self, num_burn_in: int) -> Tensor:
        """The pilot's particles after more moves at beta = 1."""
        state = _State(self.pilot.position[0, : self.num_chains], self.pilot.log_likelihood[0, : self.num_chains])
        run = self._transition("burn-in")
        with torch.no_grad():
            for _ in range(num_burn_in):
                state = run(state, len(self.betas) - 1)
        return state.position

    def _increment(self, state: _State, k: int) -> Tensor:
        return (self.betas[k] - self.betas[k - 1]) * state.log_likelihood.double()

    def _transition(self, stream: str) -> Callable[[_State, int], _State]:
        noise = generator(self.seed, "ais", stream, device=self.path.device)

        def transition(state: _State, k: int) -> _State:
            z = state.position
            normal = torch.randn(z.shape, generator=noise, dtype=z.dtype, device=z.device)
            uniform = torch.rand(len(z), 2, generator=noise, dtype=z.dtype, device=z.device)
            beta = self.betas[k].to(z.dtype).expand(len(z))
            moved = self.move(z, beta, self.step_size[k].expand(len(z)), self.scale[k].expand_as(z), normal, uniform)
            return _State(moved.position, moved.log_likelihood)

        return transition


def _interpolate(place: Tensor, values: Tensor) -> Tensor:
    """``values`` ``(n, ...)`` at the real-valued indices ``place``."""
    below = place.floor().long().clamp(0, len(values) - 1)
    above = (below + 1).clamp(max=len(values) - 1)
    weight = (place - below).reshape(-1, *(1,) * (values.dim() - 1))
    return (1 - weight) * values[below] + weight * values[above]


def _starts(draws: Tensor, num_chains: int) -> tuple[Tensor, Tensor | None]:
    """A draw for each chain, in turn, and which one it is where several chains share one."""
    if len(draws) >= num_chains:
        return draws[:num_chains], None
    owner = torch.arange(num_chains, device=draws.device) % len(draws)
    return draws[owner], owner


def _log_density(path: TemperedPath, z: Tensor) -> Tensor:
    """log of the unnormalised target, ``(row,)`` in float64; minus infinity where it is not defined."""
    with torch.no_grad():
        return likelihood(-path.energy_and_grad(z, z.new_ones(len(z)))[0].double())


def _log_likelihood(path: TemperedPath, z: Tensor) -> Tensor:
    with torch.no_grad():
        return likelihood(path.energy_and_grad(z, z.new_zeros(len(z)))[1])
