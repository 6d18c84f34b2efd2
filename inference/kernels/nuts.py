"""The No-U-Turn sampler, iterative, with every chain in one program and no chain waiting for another's tree.

The trajectory doubles, forwards or backwards at random, until it turns round (Hoffman and Gelman, JMLR 15, 2014); its
points are drawn with probability proportional to exp(-H), new halves favoured (Betancourt 2017, appendix A.3.2); it
turns where p' rho <= 0 at either end, rho the sum of momenta less half of those at the ends.  Within a subtree the test
runs over all of its own balanced subtrees, whose first momenta are kept in one slot a level (Phan, Pradhan and
Jankowiak 2019, algorithm 2), so that no recursion is left.

A program step, a *tick*, is one leapfrog step of each chain, wherever in its tree that chain is; a chain that completes
a transition goes on to its next one in the same tick.  Chains meet where a block of transitions ends, not after each
tree, so that a short tree never waits for a long one.
"""

import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from pyro.infer.autoguide.initialization import init_to_uniform
from torch import Tensor

from inference.kernels.adaptation import DualAverage, Moments
from inference.kernels.base import Info, Lift, Noise, StepInputs, Transition
from inference.kernels.hamiltonian import DIVERGENCE, Hamiltonian, leapfrog
from inference.kernels.mass_matrix import FullMass
from inference.potential import Potential, Program
from inference.runtime.streams import Streams

__all__ = ["NUTS", "NUTSState"]

_ROWS = 128  # transitions in a block at most
_NUMBERS = 1 << 18  # a block's momenta of one chain at most, which bounds memory where the dimension is large
_TICKS = 64  # whose uniforms are drawn at once
_RECORD = ("potential_energy", "energy", "acceptance_rate", "diverging", "tree_depth", "num_steps", "step_size")


class NUTSState(NamedTuple):
    """Attributes:
    position: z, ``(chain, dim)``.
    potential: U, ``(chain,)``.
    gradient: dU/dz, ``(chain, dim)``.
    average: dual averaging of each chain's step size.
    moments: moments of the current window.
    mass_factor: L, ``(dim,)`` or ``(dim, dim)``; the inverse mass is L L'.
    """

    position: Tensor
    potential: Tensor
    gradient: Tensor
    average: DualAverage
    moments: Moments
    mass_factor: Tensor


class Tree(NamedTuple):
    """Where each chain is in its block of transitions and in its present tree; ``(chain,)`` unless said.

    Attributes:
        clock: ticks since uniforms were last drawn, 0-dim.
        drawn: transitions completed.
        left, right: the trajectory's ends, z, p and gradient, ``(3, chain, dim)``.
        chosen: z and gradient of the tree's draw so far, ``(2, chain, dim)``; between trees, the chain's state.
        offered: the same of the subtree that is growing.
        rho, grown: sums of the momenta of the tree and of the subtree, ``(2, chain, dim)`` as one.
        first: p and rho where each level's open subtree began, ``(2, chain, level, dim)``.
        scalars: U and H of the chosen point, of the offered point; log weights of tree and subtree; H at the start;
            sum of acceptance probabilities; step size; direction, ``(10, chain)``.
        depth: doublings made.
        leaf: points in the subtree.
        leaves: points in the trajectory besides its start.
        average: dual averaging of each chain's step size.
        kept: position and record of each completed transition, ``(row + 1, chain, dim + len(_RECORD))``; the last
            row takes what chains that complete none write.
    """

    clock: Tensor
    drawn: Tensor
    left: Tensor
    right: Tensor
    chosen: Tensor
    offered: Tensor
    sums: Tensor
    first: Tensor
    scalars: Tensor
    depth: Tensor
    leaf: Tensor
    leaves: Tensor
    average: DualAverage
    kept: Tensor


class NUTS(Hamiltonian):
    """The No-U-Turn sampler; arguments, defaults and meaning are those of ``pyro.infer.NUTS``.

    Args:
        model: any Pyro model with continuous latents (discrete ones are enumerated); or give ``potential_fn``.
        step_size: epsilon at the start.
        adapt_step_size, adapt_mass_matrix: whether the warm-up adapts them.
        full_mass: dense instead of diagonal mass, or groups of site names: dense within a group.
        use_multinomial_sampling: ``True``; slice sampling along the trajectory is not offered.
        max_tree_depth: a trajectory has at most ``2 ** max_tree_depth`` points.
        target_accept_prob: of dual averaging.
        min_stepsize, max_stepsize: bounds of the adapted step size.
        jit_compile, jit_options, ignore_jit_warnings: accepted for Pyro's sake; graphs are what this library runs
            anyway.
        potential_fn, transforms, max_plate_nesting, init_strategy: as in Pyro.

    Draws' records hold ``tree_depth`` and ``num_steps``, the leapfrog steps taken.
    """

    pool_every = 75  # chains wait for one another there

    def __init__(
        self,
        model: Callable[..., Any] | None = None,
        potential_fn: Callable[[dict[str, Tensor]], Tensor] | None = None,
        step_size: float = 1.0,
        adapt_step_size: bool = True,
        adapt_mass_matrix: bool = True,
        full_mass: FullMass = False,
        use_multinomial_sampling: bool = True,
        transforms: dict[str, Any] | None = None,
        max_plate_nesting: int | None = None,
        jit_compile: bool = False,
        jit_options: dict[str, Any] | None = None,
        ignore_jit_warnings: bool = False,
        target_accept_prob: float = 0.8,
        max_tree_depth: int = 10,
        init_strategy: Callable[[Any], Any] = init_to_uniform,
        *,
        min_stepsize: float = 1e-10,
        max_stepsize: float = 1e10,
    ) -> None:
        self._set_target(model, potential_fn, transforms, max_plate_nesting, init_strategy)
        self._set_dynamics(
            step_size, adapt_step_size, adapt_mass_matrix, full_mass, target_accept_prob, min_stepsize, max_stepsize
        )
        if use_multinomial_sampling is not True:
            raise ValueError(
                "use_multinomial_sampling must be True: slice sampling along the trajectory is not offered"
            )
        if not isinstance(max_tree_depth, int) or isinstance(max_tree_depth, bool) or not 1 <= max_tree_depth <= 20:
            raise ValueError(f"max_tree_depth must be an integer from 1 to 20, got {max_tree_depth!r}")
        self.max_tree_depth = max_tree_depth

    # ------------------------------------------------------------------ contract
    def noise(self, potential: Potential) -> Noise:
        """Momenta; a tree's uniforms come from streams of its block."""
        return Noise(normal=potential.dim)

    def start(self, *parts: Any) -> NUTSState:
        """A ``NUTSState``."""
        return NUTSState(*parts)

    def step(self, state: NUTSState, inputs: StepInputs, potential: Potential) -> tuple[NUTSState, Info]:
        """Trees of different sizes have no common step; ``runner`` runs whole blocks of transitions."""
        raise NotImplementedError("NUTS runs blocks of transitions; see runner")

    def runner(
        self, potential: Potential, lift: Lift, streams: Streams
    ) -> Callable[[NUTSState, int, int, int], Iterator[Transition]]:
        """Blocks of transitions, each advanced tick by tick until all chains have completed it."""
        tick = lift(functools.partial(self._tick, potential), 16)

        def run(state: NUTSState, start: int, stop: int, warmup_steps: int) -> Iterator[Transition]:
            rows = _rows(potential.dim)
            for first in range(start, stop, rows):
                last = min(stop, first + rows)
                collect = self.controls(first, last, warmup_steps)["collect"]
                adapting = first < warmup_steps and self.adapt_step_size
                average, positions, ends, records = self._block(tick, state, first, last - first, adapting, streams)
                state = NUTSState(*ends, average, state.moments, state.mass_factor)
                if collect[0]:
                    state = state._replace(moments=state.moments.update(positions.flatten(0, 1)))
                columns = dict(zip(_RECORD, records.unbind(-1), strict=True))
                for row in range(last - first):
                    info = {name: column[row] for name, column in columns.items()}
                    yield Transition(state._replace(position=positions[row]), info, info["num_steps"].sum())

        return run

    # ------------------------------------------------------------------ a block
    def _block(
        self, tick: Program, state: NUTSState, first: int, length: int, adapting: bool, streams: Streams
    ) -> tuple[DualAverage, Tensor, tuple[Tensor, Tensor, Tensor], Tensor]:
        """Run ``length`` transitions of each chain.

        Returns:
            The step sizes' averages; positions ``(length, chain, dim)``; position, U and gradient at the end; records
            ``(length, chain, len(_RECORD))``.
        """
        position = state.position
        momenta = position.new_zeros((_rows(position.shape[1]), *position.shape))
        momenta[:length] = streams.noise(length)["normal"]
        generators = streams.fresh("tree", first)
        uniforms = generators.uniform(_TICKS, 3, position.dtype)
        tree = self._first_tree(state, momenta[0], uniforms[0, :, 2], adapting)
        done = torch.full((), length, device=position.device)
        warm = torch.full((), float(adapting), dtype=position.dtype, device=position.device)
        step = tick.bind(tree, uniforms, momenta, state.mass_factor, done, warm)
        remaining, used = length, 1
        while remaining:
            # Each transition takes one tick at least.
            for _ in range(max(4, remaining)):
                if used == _TICKS:
                    uniforms.copy_(generators.uniform(_TICKS, 3, position.dtype))
                    tree.clock.zero_()
                    used = 0
                step()
                used += 1
            remaining = length - int(tree.drawn.min())
        dim = position.shape[1]
        positions, records = tree.kept[:length, :, :dim], tree.kept[:length, :, dim:]
        ends = (tree.chosen[0].clone(), tree.scalars[0].clone(), tree.chosen[1].clone())
        return tree.average, positions, ends, records

    def _first_tree(self, state: NUTSState, p: Tensor, uniform: Tensor, adapting: bool) -> Tree:
        z, gradient, energy = state.position, state.gradient, state.potential
        chains, dim = z.shape
        drawn, depth, leaf, leaves = torch.zeros((4, chains), dtype=torch.int64, device=z.device)
        end = torch.stack([z, p, gradient])
        here = torch.stack([z, gradient])
        before = energy + 0.5 * p.square().sum(1)
        none = torch.zeros_like(energy)
        average = DualAverage(*(x.clone() for x in state.average))
        step = self._bounded(average.log_step if adapting else average.log_average)
        direction = torch.where(uniform < 0.5, -1.0, 1.0).to(z.dtype)
        scalars = torch.stack([energy, before, energy, before, none, none, before, none, step, direction])
        return Tree(
            clock=torch.ones((), dtype=torch.int64, device=z.device),
            drawn=drawn,
            left=end,
            right=end.clone(),
            chosen=here,
            offered=here.clone(),
            sums=torch.stack([p, torch.zeros_like(p)]),
            first=z.new_zeros((2, chains, self.max_tree_depth, dim)),
            scalars=scalars,
            depth=depth,
            leaf=leaf,
            leaves=leaves,
            average=average,
            kept=z.new_zeros((_rows(dim) + 1, chains, dim + len(_RECORD))),
        )

    # ------------------------------------------------------------------ a tick
    def _tick(
        self,
        potential: Potential,
        tree: Tree,
        uniforms: Tensor,
        momenta: Tensor,
        factor: Tensor,
        length: Tensor,
        warm: Tensor,
    ) -> Tree:
        """One leapfrog step of each chain, and all that follows from it.

        Args:
            potential: U.
            tree: where the chains are.
            uniforms: ``(tick, chain, 3)``: to draw within the subtree, to draw between tree and subtree, for the
                direction.
            momenta: of the block's transitions, ``(row, chain, dim)``.
            factor: the mass matrix's.
            length: transitions of the block.
            warm: 1 if step sizes adapt, else 0.
        """
        uniform = uniforms.index_select(0, tree.clock[None])[0]
        u_chosen, h_chosen, u_offered, h_offered, weight, grown_weight, h_start, accepted, step, direction = (
            tree.scalars.unbind(0)
        )
        rho, grown = tree.sums.unbind(0)
        active = tree.drawn < length
        forward = (direction > 0)[:, None]

        # The leapfrog step, from the end that the direction names.
        z, p, gradient = torch.where(forward, tree.right, tree.left).unbind(0)
        z, p, gradient, energy = leapfrog(z, p, gradient, (step * direction)[:, None], factor, potential)
        h = energy + 0.5 * p.square().sum(1)
        error = torch.nan_to_num(h - h_start, nan=torch.inf, posinf=torch.inf)
        diverging = error > DIVERGENCE
        accepted = accepted + (-error).clamp(max=0.0).exp()
        leaves = tree.leaves + 1

        # The subtree: its weight, its draw, the sum of its momenta.
        opening = tree.leaf == 0
        grown_weight = torch.where(opening, -error, torch.logaddexp(grown_weight, -error))
        take = opening | (uniform[:, 0] < (-error - grown_weight).exp())
        grown = torch.where(opening[:, None], p, grown + p)
        offered = torch.where(take[:, None], torch.stack([z, gradient]), tree.offered)
        u_offered, h_offered = torch.where(take, energy, u_offered), torch.where(take, h, h_offered)
        turning, first = self._turning_within(tree, p, grown)

        # The subtree is complete, or of no use.
        complete = tree.leaf + 1 == torch.ones_like(tree.depth) << tree.depth
        good = complete & ~turning & ~diverging
        closing = complete | turning | diverging
        move = good & (uniform[:, 1] < (grown_weight - weight).exp())
        chosen = torch.where(move[:, None], offered, tree.chosen)
        u_chosen, h_chosen = torch.where(move, u_offered, u_chosen), torch.where(move, h_offered, h_chosen)
        weight = torch.where(good, torch.logaddexp(weight, grown_weight), weight)
        rho = torch.where(good[:, None], rho + grown, rho)
        depth = tree.depth + good
        end = torch.stack([z, p, gradient])
        left, right = torch.where(forward, tree.left, end), torch.where(forward, end, tree.right)
        turned = _is_turning(left[1], right[1], rho)
        stop = closing & (~good | turned | (depth == self.max_tree_depth))

        # The transition is complete: record it, adapt, and start the next one.
        finished = stop & active
        acceptance = accepted / leaves
        record = torch.cat(
            [
                chosen[0],
                torch.stack([u_chosen, h_chosen, acceptance, diverging.to(z.dtype), depth.to(z.dtype)], dim=1),
                torch.stack([leaves.to(z.dtype), step], dim=1),
            ],
            dim=1,
        )
        chains = torch.arange(len(record), device=record.device)
        slot = torch.where(finished, tree.drawn, len(tree.kept) - 1)
        adapted = tree.average.update(acceptance, self.target_accept_prob)
        average = DualAverage(
            *(torch.where(finished & (warm > 0), a, b) for a, b in zip(adapted, tree.average, strict=True))
        )
        drawn = tree.drawn + finished
        row = drawn.clamp(max=momenta.shape[0] - 1)
        p_next = momenta.gather(0, row[None, :, None].expand(1, -1, momenta.shape[2]))[0]
        h_next = u_chosen + 0.5 * p_next.square().sum(1)
        step_next = self._bounded(torch.where(warm > 0, average.log_step, average.log_average))
        end_next = torch.stack([chosen[0], p_next, chosen[1]])
        column, none = stop[:, None], torch.zeros_like(weight)
        turn = torch.where(uniform[:, 2] < 0.5, -1.0, 1.0).to(z.dtype)
        scalars = torch.stack(
            [
                u_chosen,
                torch.where(stop, h_next, h_chosen),
                u_offered,
                h_offered,
                torch.where(stop, none, weight),
                grown_weight,
                torch.where(stop, h_next, h_start),
                torch.where(stop, none, accepted),
                torch.where(stop, step_next, step),
                torch.where(closing, turn, direction),
            ]
        )
        zero = torch.zeros_like(depth)
        return Tree(
            tree.clock + 1,
            drawn,
            torch.where(column, end_next, left),
            torch.where(column, end_next, right),
            # A chain that has done its block must stay where its last transition left it.
            torch.where(active[:, None], chosen, tree.chosen),
            offered,
            torch.stack([torch.where(column, p_next, rho), grown]),
            first,
            torch.where(active, scalars, tree.scalars),
            torch.where(stop, zero, depth),
            torch.where(closing, zero, tree.leaf + 1),
            torch.where(stop, zero, leaves),
            average,
            tree.kept.index_put((slot, chains), record),
        )

    def _turning_within(self, tree: Tree, p: Tensor, grown: Tensor) -> tuple[Tensor, Tensor]:
        """Whether one of the balanced subtrees that the new point completes turns, and the levels' first momenta.

        Point ``n`` of a subtree opens one at level popcount(n / 2) if it is even; if odd it completes as many as its
        binary form has trailing ones, of that level and those below.
        """
        levels = torch.arange(self.max_tree_depth, device=p.device)
        bits = (tree.leaf[:, None] >> levels) & 1
        odd = bits[:, 0] > 0
        top = bits[:, 1:].sum(1)
        trailing = tree.leaf[:, None] & ((torch.ones_like(levels) << (levels + 1)) - 1)
        completed = (trailing == (torch.ones_like(levels) << (levels + 1)) - 1).sum(1)
        opens = (~odd[:, None] & (levels == top[:, None]))[:, :, None]
        p_first = torch.where(opens, p[:, None], tree.first[0])
        rho_first = torch.where(opens, grown[:, None], tree.first[1])
        closes = odd[:, None] & (levels <= top[:, None]) & (levels > (top - completed)[:, None])
        turning = _is_turning(p_first, p[:, None], grown[:, None] - rho_first + p_first)
        return (turning & closes).any(1), torch.stack([p_first, rho_first])


def _rows(dim: int) -> int:
    """Transitions in a block, for which a graph is recorded whatever the block's length."""
    return max(1, min(_ROWS, _NUMBERS // dim))


def _is_turning(p_left: Tensor, p_right: Tensor, rho: Tensor) -> Tensor:
    """Whether the trajectory with these end momenta and sum of momenta has turned; the last dimension is summed."""
    inside = rho - 0.5 * (p_left + p_right)
    return ((p_left * inside).sum(-1) <= 0) | ((p_right * inside).sum(-1) <= 0)
