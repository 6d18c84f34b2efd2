"""Tempered sequential Monte Carlo: particles move from the prior to the posterior through p(z) L(z)^beta.

    smc = SMC(model, num_particles=1000, num_runs=4)
    smc.run(data)
    smc.log_evidence.value, smc.log_evidence.standard_error
    smc.get_samples()

From beta to the next one, particles get the weights ``w = L(z)^(beta' - beta)``, are resampled in proportion to them,
and move by Hamiltonian Monte Carlo at beta' (Del Moral, Doucet and Jasra, "Sequential Monte Carlo samplers", JRSS B 68,
2006, section 3.3.2.3).  The product of the mean weights estimates Z.  The next beta is the one at which the weights'
effective number is a given fraction of the particles (Jasra, Stephens, Doucet and Tsagaris, Scandinavian Journal of
Statistics 38, 2011).  Step size and preconditioner follow the particles, so Z is consistent rather than unbiased, with
a bias of order 1 / N (Beskos, Jasra, Kantas and Thiery, Annals of Applied Probability 26, 2016).

Several independent runs are rows of one batch.  They share temperatures, step sizes and preconditioner.
"""

import math
import warnings
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from inference._errors import NonFiniteError, SamplerWarning
from inference.citation import Citable, Paper
from inference.kernels.base import Lift, count, positive
from inference.kernels.tempered_hmc import TemperedHMC, likelihood
from inference.potential import Program, TemperedPath, tempered_path
from inference.potential.tempered import Reference
from inference.results.evidence import LogPartition, from_weights, margin
from inference.results.export import to_arviz
from inference.runtime.generators import ChainGenerators, derive_seed
from inference.runtime.progress import Progress

__all__ = ["SMC", "Annealed", "anneal", "genealogical_variance", "memory", "next_temperature", "systematic"]

_BISECTIONS = 50
_MAX_TEMPERATURES = 10_000
_FIRST_MOVES = 8  # extra transitions at the first temperature, in which the step size finds its order of magnitude
_BLOCK, _MOST_MOVES = 5, 100  # transitions between looks at what particles remember, and at most
_FORGOTTEN = 0.1  # correlation with where the particles were after resampling
_FEW_ANCESTORS = 20.0
_ENOUGH_RUNS = 10  # from here on the spread of the runs is a better estimate of the error than their genealogies


class Annealed(NamedTuple):
    """What a tempered run leaves behind, for ``run`` runs and ``stage`` temperatures after 0.

    Attributes:
        position: particles at beta = 1, equally weighted, ``(run, particle, dim)``.
        log_likelihood: log L there, ``(run, particle)``.
        log_evidence: log Z of each run ``(run,)``.
        variance: genealogical estimate of the variance of each run's Z / E[Z] ``(run,)``.
        ancestors: effective number of particles of the prior that have descendants ``(run,)``.
        inverse_temperatures: ``(stage,)``, the last is 1.
        ess: effective number of weights before resampling ``(stage, run)``.
        acceptance_rate: mean over particles and runs, ``(stage,)``.
        step_size: ``(stage,)``.
        scale: preconditioner ``(stage, dim)``.
        moves: transitions of a particle ``(stage,)``.
    """

    position: Tensor
    log_likelihood: Tensor
    log_evidence: Tensor
    variance: Tensor
    ancestors: Tensor
    inverse_temperatures: Tensor
    ess: Tensor
    acceptance_rate: Tensor
    step_size: Tensor
    scale: Tensor
    moves: Tensor


class SMC(Citable):
    """Adaptive tempered SMC for any Pyro model, with the log evidence.

    Args:
        model: a Pyro model (discrete latent sites are summed out), or a ``TemperedFunction`` or ``TemperedPotential``.
        num_particles: particles of each run.
        num_runs: independent runs, advanced together.
        target_ess: the next temperature is where the weights' effective number is this fraction of the particles.
        num_moves: transitions at each temperature.  By default as many as the particles need to forget where resampling
            put them, in log L and in position: five at least and a hundred at most.
        num_steps: leapfrog steps of a transition.
        target_accept_prob: acceptance that the step size aims at.
        jitter: step sizes are uniform on epsilon (1 - jitter, 1).
        inverse_temperatures: a fixed ladder, increasing, from above 0 to 1, in place of the adapted one; a run is then
            resampled only where its weights' effective number is below ``target_ess``, and at the end.
        reference: where the path starts: ``"prior"`` or a distribution over flat unconstrained vectors.
        seed: same seed, same machine, same result to the bit; a run's random numbers depend on the seed and its number.
        progress: ``True`` for a bar, ``False`` for none, or a function that receives a dict a temperature.
        compile: ``"auto"`` or ``False``: graphs are recorded; ``True``: also compiled, which pays for long runs.

    Raises:
        ValueError, TypeError: bad arguments; a minibatch model; a model without proper prior.
        NonFiniteError: no particle of a run has a positive density, or one has an infinite one.
    """

    papers: ClassVar[tuple[Paper, ...]] = (
        Paper(
            "article",
            "delmoral2006sequential",
            author="Del Moral, Pierre and Doucet, Arnaud and Jasra, Ajay",
            title="Sequential {M}onte {C}arlo Samplers",
            journal="Journal of the Royal Statistical Society: Series B",
            volume=68,
            number=3,
            pages="411--436",
            year=2006,
        ),
    )

    def __init__(
        self,
        model: Callable[..., Any] | TemperedPath,
        num_particles: int = 1000,
        num_runs: int = 1,
        *,
        target_ess: float = 0.5,
        num_moves: int | None = None,
        num_steps: int = 8,
        target_accept_prob: float = 0.95,
        jitter: float = 0.5,
        inverse_temperatures: Tensor | None = None,
        reference: Reference = "prior",
        seed: int = 0,
        progress: bool | Callable[[dict[str, Any]], None] = True,
        compile: bool | str = "auto",
    ) -> None:
        self.model, self.reference = model, reference
        self.options: dict[str, Any] = {
            "num_particles": count("num_particles", num_particles, 2),
            "num_runs": count("num_runs", num_runs, 1),
            "target_ess": positive("target_ess", target_ess, upper=0.999),
            "num_moves": None if num_moves is None else count("num_moves", num_moves, 1),
            "num_steps": count("num_steps", num_steps, 1),
            "target_accept_prob": positive("target_accept_prob", target_accept_prob, upper=0.999),
            "jitter": fraction("jitter", jitter),
            "ladder": None if inverse_temperatures is None else ladder(inverse_temperatures),
        }
        derive_seed(seed)
        if compile not in (True, False, "auto"):
            raise ValueError(f"compile must be True, False or 'auto', got {compile!r}")
        self.seed, self.progress, self.compile = seed, progress, compile
        self.path: TemperedPath | None = None
        self.result: Annealed | None = None

    def run(self, *args: Any, **kwargs: Any) -> "SMC":
        """Anneal the particles to the posterior of ``model(*args, **kwargs)``."""
        self.path = tempered_path(self.model, args, kwargs, self.reference)
        result = self.result = anneal(
            self.path, seed=self.seed, progress=self.progress, compile=self.compile is True, **self.options
        )
        if float(result.ancestors.min()) < _FEW_ANCESTORS:
            warnings.warn(
                f"all particles of a run descend from about {float(result.ancestors.min()):.0f} draws of the prior: "
                "its log evidence is poor and so is the standard error. Use more particles or a larger target_ess",
                SamplerWarning,
                stacklevel=2,
            )
        if float(result.acceptance_rate.min()) < 0.1:
            warnings.warn(
                f"at one temperature only {float(result.acceptance_rate.min()):.0%} of the moves were accepted: use "
                "more moves (num_moves)",
                SamplerWarning,
                stacklevel=2,
            )
        return self

    @property
    def log_evidence(self) -> LogPartition:
        """log Z of the mean of all runs' estimates of Z; ``exact`` is False because adaptation biases Z by order 1 / N.

        The standard error is the runs' spread if there are ten or more, and otherwise comes from each run's genealogy:
        see :func:`genealogical_variance`.
        """
        result = self._result()
        found = from_weights(result.log_evidence, "SMC", exact=False)
        if len(result.log_evidence) < _ENOUGH_RUNS:
            relative = (result.log_evidence - found.value).exp()
            error = float((relative.square() * result.variance).sum().sqrt()) / len(relative)
            found = found._replace(standard_error=error, lower=found.value - margin(error))
        return found._replace(ess=float(result.ancestors.sum()), pareto_k=math.nan)

    def get_samples(self, group_by_chain: bool = False) -> dict[str, Tensor]:
        """The particles by site, ``(num_runs * num_particles, *shape)``, or with ``group_by_chain`` ``(num_runs,
        num_particles, *shape)``; all equally weighted.
        """
        result = self._result()
        assert self.path is not None
        shape = result.position.shape[:2]
        values = self.path.constrain(result.position.flatten(0, 1))
        return {n: v.unflatten(0, shape) for n, v in values.items()} if group_by_chain else values

    def diagnostics(self) -> dict[str, Any]:
        """The ladder and, by temperature, effective weights (by run), acceptance and step size; by run log evidence,
        its standard error and the effective number of ancestors.
        """
        result = self._result()
        return {
            "inverse_temperatures": result.inverse_temperatures,
            "ess": result.ess,
            "acceptance_rate": result.acceptance_rate,
            "step_size": result.step_size,
            "log_evidence": result.log_evidence,
            "standard_error": result.variance.sqrt(),
            "ancestors": result.ancestors,
        }

    def to_arviz(self, **groups: Any) -> Any:
        """An ArviZ object whose chains are the runs and whose draws are the particles.

        Particles of a run are exchangeable but not independent; R-hat between runs is meaningful, the effective sample
        size is not.
        """
        result = self._result()
        stats = {"log_likelihood_total": result.log_likelihood}
        return to_arviz(self.get_samples(group_by_chain=True), sample_stats=stats, **groups)

    def _result(self) -> Annealed:
        if self.result is None:
            raise RuntimeError("there are no particles yet; call run(...) first")
        return self.result


# ---------------------------------------------------------------- the algorithm
def anneal(
    path: TemperedPath,
    *,
    num_particles: int,
    num_runs: int,
    target_ess: float,
    num_moves: int | None,
    num_steps: int,
    target_accept_prob: float,
    jitter: float,
    ladder: Tensor | None,
    seed: int,
    progress: bool | Callable[[dict[str, Any]], None] = False,
    compile: bool = False,
    move: TemperedHMC | None = None,
) -> Annealed:
    """Tempered SMC; arguments as in :class:`SMC`, ``ladder`` are the inverse temperatures.  A ``move`` that is given
    has its own ``num_steps`` and ``jitter``.
    """
    runs, size = num_runs, num_particles
    noise = ChainGenerators(seed, range(runs), path.device, stream="smc")
    if move is None:
        move = TemperedHMC(path, num_steps, jitter, lift(path, compile))
    with torch.no_grad(), Progress(100, "smc", progress) as bar:
        z = path.sample(size, [derive_seed(seed, "reference", r) for r in range(runs)])
        log_l = likelihood(path.energy_and_grad(z, z.new_zeros(len(z)))[1])
        refuse_bad(log_l.reshape(runs, size))
        # log of the optimal scaling: acceptance falls with the fourth root of the dimension (Neal 2011, section 4.4)
        log_step = torch.tensor(path.dim**-0.25, dtype=z.dtype, device=z.device).log()
        beta = torch.zeros((), dtype=torch.float64, device=z.device)
        log_z = torch.zeros(runs, dtype=torch.float64, device=z.device)
        log_w = torch.full((runs, size), -math.log(size), dtype=torch.float64, device=z.device)
        excess = torch.zeros_like(log_z)
        eve = torch.arange(size, device=z.device).expand(runs, size)
        stages: list[tuple[Tensor, ...]] = []
        fixed = None if ladder is None else ladder.to(device=z.device, dtype=torch.float64)
        for stage in range(_MAX_TEMPERATURES):
            by_run = log_l.reshape(runs, size).double()
            new = next_temperature(by_run, beta, target_ess) if fixed is None else fixed[stage]
            log_w = log_w + (new - beta) * by_run
            log_z = log_z + torch.logsumexp(log_w, 1)
            weights = torch.softmax(log_w, 1)
            ess = 1 / weights.square().sum(1)
            last = float(new) >= 1.0
            # the adapted ladder counts on equal weights; on a fixed one a needless resampling would only add noise
            resample = (
                (ess < target_ess * size) if fixed is not None and not last else torch.ones_like(ess, dtype=torch.bool)
            )
            families = torch.zeros_like(weights).scatter_add(1, eve, weights)
            if last:
                variance, ancestors = genealogical_variance(families, excess), 1 / families.square().sum(1)
            else:
                part = (size * families).frac()
                excess = excess + torch.where(resample, (part * (1 - part)).sum(1) / size**2, 0.0)
            chosen = systematic(weights, noise.uniform(1, 1, torch.float64)[0])
            chosen = torch.where(resample[:, None], chosen, torch.arange(size, device=z.device))
            log_w = torch.where(resample[:, None], -math.log(size), weights.log())
            eve = eve.gather(1, chosen)
            rows = (chosen + size * torch.arange(runs, device=z.device)[:, None]).reshape(-1)
            z = z[rows]
            beta = new
            scale = _spread(z)
            tempering = beta.to(z.dtype).expand(len(z))
            start, first = (z, log_l[rows]), _FIRST_MOVES if stage == 0 else 0
            for moved in range(1, first + (num_moves or _MOST_MOVES) + 1):
                normal = noise.normal(1, size * path.dim, z.dtype).reshape(-1, path.dim)
                uniform = noise.uniform(1, size * 2, z.dtype).reshape(-1, 2)
                step = log_step.exp()
                done = move(z, tempering, step.expand(len(z)), scale.expand_as(z), normal, uniform)
                z, log_l = done.position, done.log_likelihood
                acceptance = done.acceptance.mean()
                log_step = log_step + acceptance - target_accept_prob
                look = num_moves is None and moved > first and (moved - first) % _BLOCK == 0
                if look and memory(*start, z, log_l) < _FORGOTTEN:
                    break
            moves = torch.tensor(moved, device=z.device)
            stages.append((beta, ess, acceptance, step, scale, moves))
            bar.update(int(100 * float(beta)), beta=f"{float(beta):.3g}", acceptance=f"{float(acceptance):.2f}")
            if last:
                break
        else:
            raise RuntimeError(
                f"beta = 1 was not reached in {_MAX_TEMPERATURES} temperatures; use a smaller target_ess, or a prior "
                "or reference that is closer to the posterior"
            )
    columns = [torch.stack(column) for column in zip(*stages, strict=True)]
    return Annealed(z.reshape(runs, size, -1), log_l.reshape(runs, size), log_z, variance, ancestors, *columns)


def memory(z: Tensor, log_l: Tensor, new_z: Tensor, new_log_l: Tensor) -> float:
    """How much particles remember: the correlation of log L, or the root mean square one of the coordinates, with those
    of the same particles before; the larger.
    """
    before, after = (torch.cat([a.double(), b.double()[:, None]], 1) for a, b in ((z, log_l), (new_z, new_log_l)))
    before, after = before - before.mean(0), after - after.mean(0)
    size = (before.square().sum(0) * after.square().sum(0)).sqrt()
    found = ((before * after).sum(0) / size).nan_to_num(nan=1.0)
    return float(torch.maximum(found[-1].abs(), found[:-1].square().mean().sqrt()))


def next_temperature(log_likelihood: Tensor, beta: Tensor, target_ess: float) -> Tensor:
    """The largest beta' <= 1 at which the mean over runs of the weights' effective fraction is at least the target.

    Particles of likelihood zero count in no fraction: no beta' above beta can keep them.

    Args:
        log_likelihood: of equally weighted particles ``(run, particle)``, float64.
        beta: where they are, 0-dim.
        target_ess: fraction of the particles.
    """
    alive = (log_likelihood > -math.inf).sum(1)

    def effective(difference: Tensor) -> Tensor:
        log_w = difference * log_likelihood
        return ((2 * torch.logsumexp(log_w, 1) - torch.logsumexp(2 * log_w, 1)).exp() / alive).mean()

    # on a log scale: from a vague prior the first temperature may be 1e-12
    rest = 1 - beta
    low, high = torch.full_like(beta, -80.0), rest.log()
    for _ in range(_BISECTIONS):
        middle = 0.5 * (low + high)
        enough = effective(middle.exp()) >= target_ess
        low, high = torch.where(enough, middle, low), torch.where(enough, high, middle)
    return torch.where(effective(rest) >= target_ess, torch.ones_like(beta), beta + low.exp())


def systematic(weights: Tensor, uniform: Tensor) -> Tensor:
    """Systematic resampling: particle i of a run gets floor or ceil of ``size * weights[i]`` children.

    With u uniform, child j is the particle whose stretch of the cumulated weights holds ``(j + u) / size`` (Douc, Cappe
    and Moulines, "Comparison of resampling schemes for particle filtering", 2005, section 2.4).

    Args:
        weights: normalised ``(run, particle)``.
        uniform: one number on [0, 1) a run, ``(run, 1)``.

    Returns:
        Tensor: the children's parents, in order, ``(run, particle)``.
    """
    size = weights.shape[1]
    edges = weights.cumsum(1)
    edges = edges / edges[:, -1:]
    points = (torch.arange(size, device=weights.device, dtype=weights.dtype) + uniform) / size
    return torch.searchsorted(edges, points, right=True).clamp(max=size - 1)


def genealogical_variance(families: Tensor, excess: Tensor) -> Tensor:
    """Variance of a single run's Z / E[Z] from the weights that the descendants of each prior draw have.

    With S_k the final weight of all descendants of prior draw k, summing to one, families are nearly independent, so
    ``N / (N - 1) sum_k (S_k - 1 / N)^2`` estimates the relative variance of Z (Chan and Lai, Annals of Statistics 41,
    2013; Lee and Whiteley, Biometrika 105, 2018, whose factor ``(N / (N - 1))^n`` takes out what multinomial resampling
    adds to the S_k but not to Z).  Resampling here is systematic: it keeps the order of the particles, so a family of
    weight S gets ``floor(N S)`` or one more children, which adds ``p (1 - p) / N^2``, p the fractional part of ``N S``,
    at each temperature but the last.  That is what is taken out.  Where little is left of it, half of the first term
    is a floor.

    Args:
        families: S ``(run, particle)``.
        excess: the sum of ``p (1 - p) / N^2`` over families and temperatures ``(run,)``.
    """
    size = families.shape[1]
    raw = size / (size - 1) * (families - 1 / size).square().sum(1)
    return torch.maximum(raw - excess, 0.5 * raw)


def lift(path: TemperedPath, compile: bool) -> Lift:
    """What records the pieces of a move as graphs, where the path can be recorded."""
    return lambda function, calls: Program(function, compile=compile, record=path.captured)


def refuse_bad(log_likelihood: Tensor) -> None:
    """Raise if a run has no particle of positive density, or one of infinite density."""
    alive = (log_likelihood > -math.inf).any(1)
    if not bool(alive.all()):
        raise NonFiniteError(
            "no draw from the prior (or reference) has a positive likelihood: check the model for impossible "
            "observations, or use more particles"
        )
    if bool((log_likelihood == math.inf).any()):
        raise NonFiniteError("the likelihood is infinite at a draw from the prior (or reference)")


def _spread(z: Tensor) -> Tensor:
    """Standard deviations of the particles; 1 where they do not differ."""
    sd = torch.where(torch.isfinite(z), z, 0.0).std(0)
    return torch.where(sd > 0, sd, 1.0)


def fraction(name: str, value: Any) -> float:
    """``value`` as a float in ``[0, 1)``; raises naming the argument."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{name} must be a number, got {value!r}")
    if not 0 <= value < 1:
        raise ValueError(f"{name} must lie in [0, 1), got {value!r}")
    return float(value)


def ladder(values: Any) -> Tensor:
    """Inverse temperatures as float64 ``(stage,)``; raises unless they increase from above 0 to 1."""
    found = torch.as_tensor(values, dtype=torch.float64).detach()
    ok = found.dim() == 1 and len(found) > 0 and bool((found[1:] > found[:-1]).all()) and bool(found[0] > 0)
    if not ok or float(found[-1]) != 1.0:
        raise ValueError(
            f"inverse_temperatures must increase strictly from above 0 to 1, got {tuple(found.shape)}: {found.tolist()}"
        )
    return found
