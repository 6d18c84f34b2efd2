"""Parallel tempering: every chain is a ladder of replicas at inverse temperatures 1 = beta_1 > ... > beta_T, and the
hot ones carry the cold one from mode to mode.

Each step moves all replicas of all chains by Hamiltonian Monte Carlo at their own temperature, in one batch, and then
proposes to swap neighbours i and i + 1, with probability

    min(1, exp[(beta_i - beta_{i+1}) (log L(z_{i+1}) - log L(z_i))]).

Even and odd pairs take turns without randomness (deterministic even-odd, Okabe et al. 2001), which makes replicas drift
through the ladder instead of diffusing (Syed, Bouchard-Cote, Deligiannidis and Doucet, "Non-reversible parallel
tempering: a scalable highly parallel MCMC scheme", JRSS B 84, 2022, arXiv:1905.02939).  In the warm-up the ladder is
moved to where all pairs are rejected equally often: with r_i the rejection rate of pair i, the communication barrier
Lambda(beta) = sum of r over the pairs hotter than beta is interpolated and cut into equal parts (section 5.1).
"""

from collections.abc import Callable, Sequence
from typing import Any, ClassVar, NamedTuple

import torch
from pyro.infer.autoguide.initialization import init_to_uniform
from torch import Tensor

from inference.citation import Paper
from inference.kernels.base import Info, Kernel, Lift, Noise, StepInputs, positive
from inference.kernels.tempered_hmc import TemperedHMC
from inference.potential import Potential, Program, TemperedPotential
from inference.potential.tempered import Reference
from inference.runtime.distributed import sum_over_ranks

__all__ = ["ParallelTempering", "ParallelTemperingState", "equal_rejection", "swap_neighbours"]

_WINDOW = 10  # warm-up steps between updates of step sizes
_GAIN = 1.5  # of the log step size, per unit of acceptance missed, at the first update
_MIN_REJECTION = 1e-3  # of a pair, so that no two temperatures collapse onto each other


class ParallelTemperingState(NamedTuple):
    """Attributes:
    position: the cold replica, ``(chain, dim)``.
    replicas: all of them, coldest first, ``(chain, temperature, dim)``.
    heading: where a replica was last, 1 at the hottest temperature, 0 at the coldest or neither, ``(chain,
        temperature)``; it moves with the replica.
    round_trips: how often a replica came back to the cold end after the hot one, ``(chain,)``.
    odd: 1 if this step's pairs are the odd ones, 0-dim.
    inverse_temperature: beta, ``(temperature,)``.
    log_step: log step size, ``(temperature,)``.
    scale: preconditioner, ``(temperature, dim)``.
    center: where ``total`` and ``squares`` are counted from, ``(temperature, dim)``.
    collected: steps in the current window, ``(chain,)``.
    acceptance: summed since the last update of the step sizes, ``(chain, temperature)``.
    since: steps since then, ``(chain,)``.
    rejection: summed probabilities of rejecting a swap in the window, ``(chain, temperature - 1)``.
    proposals: how often each pair was proposed in it, ``(chain, temperature - 1)``.
    total, squares: sums of positions and their squares in it, ``(chain, temperature, dim)``.
    """

    position: Tensor
    replicas: Tensor
    heading: Tensor
    round_trips: Tensor
    odd: Tensor
    inverse_temperature: Tensor
    log_step: Tensor
    scale: Tensor
    center: Tensor
    collected: Tensor
    acceptance: Tensor
    since: Tensor
    rejection: Tensor
    proposals: Tensor
    total: Tensor
    squares: Tensor


class ParallelTempering(Kernel):
    """Non-reversible parallel tempering with HMC moves, for posteriors with several modes.

    Run it by ``MCMC`` like any other kernel; a draw is the cold replica's position.  The record holds by draw
    ``swap_rate`` (mean acceptance of the swaps proposed in that step) and ``round_trips`` (since the warm-up).

    Args:
        model: any Pyro model with continuous latents (discrete ones are enumerated); or give ``potential_fn``.
        potential_fn: as in Pyro, with ``reference`` a distribution or ``"flat"``.
        num_temperatures: T, replicas of each chain.  About ``2 Lambda + 1`` is best, Lambda the sum of all pairs'
            rejection rates (Syed et al., section 5.3).
        reference: what is found at beta = 0.  ``"prior"``: the likelihood is tempered.  ``"flat"``: the whole density
            is.  A distribution over flat unconstrained vectors: its density ratio to the target is.
        min_inverse_temperature: of the hottest replica; 0 unless ``reference="flat"``, where 0.01.
        step_size: epsilon at the start, in units of the preconditioner.
        num_steps: leapfrog steps of a move.
        adapt_step_size, adapt_mass_matrix, adapt_temperatures: whether the warm-up adapts them, each temperature's
            step size and diagonal preconditioner of its own.
        target_accept_prob: acceptance that the step sizes aim at.
        jitter: step sizes are uniform on epsilon (1 - jitter, 1).
        transforms, max_plate_nesting, init_strategy: as in Pyro.
    """

    papers: ClassVar[tuple[Paper, ...]] = (
        Paper(
            "article",
            "syed2022nonreversible",
            author="Syed, Saifuddin and Bouchard-C\\^ot\\'e, Alexandre and Deligiannidis, George and Doucet, Arnaud",
            title="Non-Reversible Parallel Tempering: A Scalable Highly Parallel {MCMC} Scheme",
            journal="Journal of the Royal Statistical Society: Series B",
            volume=84,
            year=2022,
        ),
    )

    stochastic: ClassVar[bool] = False

    def __init__(
        self,
        model: Callable[..., Any] | None = None,
        potential_fn: Callable[[dict[str, Tensor]], Tensor] | None = None,
        num_temperatures: int = 8,
        *,
        reference: Reference = "prior",
        min_inverse_temperature: float | None = None,
        step_size: float = 0.5,
        num_steps: int = 8,
        adapt_step_size: bool = True,
        adapt_mass_matrix: bool = True,
        adapt_temperatures: bool = True,
        target_accept_prob: float = 0.8,
        jitter: float = 0.5,
        transforms: dict[str, Any] | None = None,
        max_plate_nesting: int | None = None,
        init_strategy: Callable[[Any], Any] = init_to_uniform,
    ) -> None:
        self._set_target(model, potential_fn, transforms, max_plate_nesting, init_strategy)
        for name, value, least in (("num_temperatures", num_temperatures, 2), ("num_steps", num_steps, 1)):
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ValueError(f"{name} must be an integer of at least {least}, got {value!r}")
        if potential_fn is not None and reference == "prior":
            raise ValueError("potential_fn has no prior: give reference='flat' or a distribution over z")
        if min_inverse_temperature is None:
            min_inverse_temperature = 0.01 if reference == "flat" else 0.0
        least_beta = float(min_inverse_temperature)
        if not 0 <= least_beta < 1 or (least_beta == 0 and reference == "flat"):
            raise ValueError(
                f"min_inverse_temperature must lie in [0, 1), and above 0 if reference='flat', got {least_beta!r}"
            )
        if not 0 <= jitter < 1:
            raise ValueError(f"jitter must lie in [0, 1), got {jitter!r}")
        self.num_temperatures, self.num_steps, self.reference = num_temperatures, num_steps, reference
        self.min_inverse_temperature, self.jitter = least_beta, float(jitter)
        self.step_size = positive("step_size", step_size)
        self.target_accept_prob = positive("target_accept_prob", target_accept_prob, upper=0.999)
        self.adapt_step_size, self.adapt_mass_matrix, self.adapt_temperatures = (
            bool(adapt_step_size),
            bool(adapt_mass_matrix),
            bool(adapt_temperatures),
        )

    # ------------------------------------------------------------------ contract
    def noise(self, potential: Potential) -> Noise:
        """Momenta of all replicas; for each a uniform to accept and one to jitter; one for each pair."""
        t = self.num_temperatures
        return Noise(normal=t * potential.dim, uniform=3 * t - 1)

    def init(self, position: Tensor, potential: Potential) -> ParallelTemperingState:
        """All replicas at the starting points; a geometric ladder, which the warm-up moves."""
        chains, dim = position.shape
        t = self.num_temperatures
        zero, one = position.new_zeros(chains, t), position.new_ones(t, dim)
        hot = max(self.min_inverse_temperature, 1e-3)
        beta = hot ** torch.linspace(0, 1, t, dtype=position.dtype, device=position.device)
        beta[-1] = self.min_inverse_temperature
        log_step = torch.full_like(beta, self.step_size * dim**-0.25).log()
        return ParallelTemperingState(
            position=position,
            replicas=position[:, None].repeat(1, t, 1),
            heading=zero,
            round_trips=zero[:, 0].clone(),
            odd=position.new_zeros(()),
            inverse_temperature=beta,
            log_step=log_step,
            scale=one,
            center=torch.zeros_like(one),
            collected=zero[:, 0].clone(),
            acceptance=zero.clone(),
            since=zero[:, 0].clone(),
            rejection=zero[:, 1:].clone(),
            proposals=zero[:, 1:].clone(),
            total=position.new_zeros(chains, t, dim),
            squares=position.new_zeros(chains, t, dim),
        )

    def step(
        self, state: ParallelTemperingState, inputs: StepInputs, potential: Potential
    ) -> tuple[ParallelTemperingState, Info]:
        """One move of all replicas of all chains and one round of swaps."""
        return self.build(potential, _as_it_is)(state, inputs, None)

    def build(
        self, potential: Potential, lift: Lift
    ) -> Callable[[ParallelTemperingState, StepInputs, Any], tuple[ParallelTemperingState, Info]]:
        """The three graphs of the move, and one of the swaps."""
        path = TemperedPotential(potential, self.reference)
        record = lift if path.captured else _as_it_is
        move = TemperedHMC(path, self.num_steps, self.jitter, record)
        rows, finish = record(self._rows, 1), record(self._finish, 1)

        def run(state: ParallelTemperingState, inputs: StepInputs, plan: Any) -> tuple[ParallelTemperingState, Info]:
            moved = move(*rows(state, inputs))
            return finish(state, inputs, *moved)

        return run

    def controls(self, start: int, stop: int, warmup_steps: int) -> dict[str, Sequence[float]]:
        """Whether this step's statistics are collected."""
        return {"collect": [float(t < warmup_steps) for t in range(start, stop)]}

    def boundaries(self, warmup_steps: int) -> list[int]:
        """Updates of the step sizes, and the windows' ends."""
        return sorted({*range(_WINDOW, warmup_steps + 1, _WINDOW), *_windows(warmup_steps), warmup_steps} - {0})

    def end_window(
        self, state: ParallelTemperingState, step: int, warmup_steps: int, potential: Potential
    ) -> ParallelTemperingState:
        """Step sizes from the acceptance since the last update; at a window's end also ladder and preconditioner, from
        all chains of all ranks.
        """
        if step not in self.boundaries(warmup_steps):
            return state
        if self.adapt_step_size:
            acceptance = sum_over_ranks(state.acceptance.sum(0)) / sum_over_ranks(state.since.sum())
            gain = _GAIN / (1 + 4 * step / warmup_steps)
            state = state._replace(log_step=state.log_step + gain * (acceptance - self.target_accept_prob))
        state = state._replace(acceptance=torch.zeros_like(state.acceptance), since=torch.zeros_like(state.since))
        if step in _windows(warmup_steps):
            state = self._end_ladder_window(state)
        if step == warmup_steps:
            state = state._replace(round_trips=torch.zeros_like(state.round_trips))
        return state

    def plan(self, state: ParallelTemperingState) -> int:
        """Gradients that a step of one chain takes."""
        return self.num_temperatures * (self.num_steps + 1)

    def describe(self) -> dict[str, Any]:
        """As for every kernel, and what the path starts from."""
        return {**super().describe(), "reference": repr(self.reference)}

    # ------------------------------------------------------------------ pieces
    def _rows(self, state: ParallelTemperingState, inputs: StepInputs) -> tuple[Tensor, ...]:
        """Replicas as rows of one batch, chain by chain, with what a move needs."""
        chains, t, dim = state.replicas.shape
        rows = chains * t
        return (
            state.replicas.reshape(rows, dim),
            state.inverse_temperature.repeat(chains),
            state.log_step.exp().repeat(chains),
            state.scale.repeat(chains, 1),
            inputs.noise["normal"].reshape(rows, dim),
            inputs.noise["uniform"][:, : 2 * t].reshape(rows, 2),
        )

    def _finish(
        self,
        state: ParallelTemperingState,
        inputs: StepInputs,
        position: Tensor,
        energy: Tensor,
        log_likelihood: Tensor,
        acceptance: Tensor,
        diverging: Tensor,
    ) -> tuple[ParallelTemperingState, Info]:
        chains, t, dim = state.replicas.shape
        replicas, log_l = position.reshape(chains, t, dim), log_likelihood.reshape(chains, t)
        acceptance, beta = acceptance.reshape(chains, t), state.inverse_temperature
        collect = inputs.control["collect"]

        order, probability, proposed = swap_neighbours(log_l, beta, state.odd, inputs.noise["uniform"][:, 2 * t :])
        minus_reference = energy.reshape(chains, t) + beta * log_l
        replicas = replicas.gather(1, order[:, :, None].expand(-1, -1, dim))
        log_l, heading = log_l.gather(1, order), state.heading.gather(1, order)
        returned = heading[:, 0]
        heading = torch.cat([torch.zeros_like(heading[:, :1]), heading[:, 1:-1], torch.ones_like(heading[:, :1])], 1)

        shifted = replicas - state.center
        new = state._replace(
            position=replicas[:, 0],
            replicas=replicas,
            heading=heading,
            round_trips=state.round_trips + returned,
            odd=1 - state.odd,
            collected=state.collected + collect,
            acceptance=state.acceptance + collect * acceptance,
            since=state.since + collect,
            rejection=state.rejection + collect * proposed * (1 - probability),
            proposals=state.proposals + collect * proposed,
            total=state.total + collect * shifted,
            squares=state.squares + collect * shifted.square(),
        )
        info = {
            "potential_energy": minus_reference.gather(1, order)[:, 0] - log_l[:, 0],
            "acceptance_rate": acceptance[:, 0],
            "diverging": diverging.reshape(chains, t)[:, 0],
            "swap_rate": (probability * proposed).sum(1) / proposed.sum(1),
            "round_trips": new.round_trips,
            "step_size": state.log_step[0].exp().expand(chains),
        }
        return new, info

    def _end_ladder_window(self, state: ParallelTemperingState) -> ParallelTemperingState:
        """Equal rejection rates; step sizes and preconditioners follow the temperatures they belong to."""
        old = state.inverse_temperature
        count = sum_over_ranks(state.collected.sum())
        scale, center = state.scale, state.center
        if self.adapt_mass_matrix and bool(count > 1):
            mean = sum_over_ranks(state.total.sum(0)) / count
            variance = (sum_over_ranks(state.squares.sum(0)) / count - mean.square()).clamp(min=0.0)
            # shrunk towards the scale that is in use, with the weight of five positions
            scale = ((count * variance + 5 * scale.square()) / (count + 5)).sqrt()
            center = center + mean
        beta, log_step = old, state.log_step
        if self.adapt_temperatures:
            proposals = sum_over_ranks(state.proposals.sum(0))
            rejection = sum_over_ranks(state.rejection.sum(0)) / proposals.clamp(min=1.0)
            beta = equal_rejection(old, torch.where(proposals > 0, rejection, 0.5))
            log_step = _at(beta, old, log_step[:, None])[:, 0]
            center = _at(beta, old, center)
            # the preconditioner's change with beta is in the step size too: keep their product smooth
            scale = _at(beta, old, scale.log()).exp()
        return state._replace(
            inverse_temperature=beta,
            log_step=log_step,
            scale=scale,
            center=center,
            collected=torch.zeros_like(state.collected),
            rejection=torch.zeros_like(state.rejection),
            proposals=torch.zeros_like(state.proposals),
            total=torch.zeros_like(state.total),
            squares=torch.zeros_like(state.squares),
        )


def _as_it_is(function: Callable[..., Any], calls: int) -> Program:
    return Program(function, record=False)


def swap_neighbours(
    log_likelihood: Tensor, beta: Tensor, odd: Tensor, uniform: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """One round of deterministic even-odd swaps.

    Args:
        log_likelihood: ``(chain, temperature)``.
        beta: ``(temperature,)``.
        odd: 1: pairs (1, 2), (3, 4), ... take their turn, 0: pairs (0, 1), (2, 3), ..., 0-dim.
        uniform: ``(chain, temperature - 1)``.

    Returns:
        tuple: for each temperature the one whose replica it gets ``(chain, temperature)``; each pair's probability to
        be swapped; and whether it was proposed, both ``(chain, temperature - 1)``.
    """
    pairs = uniform.shape[1]
    index = torch.arange(pairs + 1, device=beta.device)
    proposed = ((index[:-1] % 2).to(beta.dtype) == odd).to(beta.dtype).expand_as(uniform)
    gain = (beta[:-1] - beta[1:]) * (log_likelihood[:, 1:] - log_likelihood[:, :-1])
    probability = torch.nan_to_num(gain, nan=-torch.inf).clamp(max=0.0).exp()
    swap = ((uniform < probability) & (proposed > 0)).long()
    none = torch.zeros_like(swap[:, :1])
    return index + torch.cat([swap, none], 1) - torch.cat([none, swap], 1), probability, proposed


def equal_rejection(beta: Tensor, rejection: Tensor) -> Tensor:
    """The ladder with the same ends on which all pairs would be rejected equally often.

    Args:
        beta: decreasing ``(temperature,)``.
        rejection: rates of its pairs ``(temperature - 1,)``.
    """
    barrier = torch.cat([rejection.new_zeros(1), rejection.clamp(min=_MIN_REJECTION).cumsum(0)])
    wanted = barrier[-1] * torch.linspace(0, 1, len(beta), dtype=beta.dtype, device=beta.device)
    new = _interpolate(wanted, barrier, beta[:, None])[:, 0]
    return torch.cat([beta[:1], new[1:-1], beta[-1:]])


def _at(beta: Tensor, old: Tensor, values: Tensor) -> Tensor:
    """``values`` ``(temperature, ...)``, known on the decreasing ladder ``old``, on the ladder ``beta``."""
    return _interpolate(-beta, -old, values)


def _interpolate(x: Tensor, known: Tensor, values: Tensor) -> Tensor:
    """Piecewise linear, ``known`` increasing."""
    upper = torch.searchsorted(known.contiguous(), x.contiguous()).clamp(1, len(known) - 1)
    weight = ((x - known[upper - 1]) / (known[upper] - known[upper - 1]).clamp(min=torch.finfo(x.dtype).tiny))[:, None]
    return values[upper - 1] + weight.clamp(0, 1) * (values[upper] - values[upper - 1])


def _windows(warmup_steps: int) -> list[int]:
    """Ends of the ladder's windows: each twice as long as the one before, the last tenth for the step sizes alone."""
    ends, last = [], int(0.9 * warmup_steps)
    while last >= 2 * _WINDOW:
        ends.append(last)
        last //= 2
    return sorted(ends)
