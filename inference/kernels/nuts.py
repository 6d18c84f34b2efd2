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
from typing import Any, ClassVar, NamedTuple, TypeVar

import torch
from pyro.infer.autoguide.initialization import init_to_uniform
from torch import Tensor

from inference.citation import Paper
from inference.kernels.adaptation import DualAverage, Moments
from inference.kernels.base import Info, Lift, Noise, StepInputs, Transition, overwrite
from inference.kernels.hamiltonian import DIVERGENCE, Hamiltonian, leapfrog
from inference.kernels.mass_matrix import FullMass
from inference.potential import Potential, Program
from inference.runtime.generators import ChainGenerators
from inference.runtime.streams import Streams

__all__ = ["NUTS", "NUTSState"]

_ROWS = 128  # transitions in a block at most
_NUMBERS = 1 << 18  # a block's momenta of one chain at most, which bounds memory where the dimension is large
_TREE = 8  # leapfrog steps of a transition, before any has been seen
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
    ticks: program steps that the run has taken, 0-dim; they decide when the program is compiled.
    """

    position: Tensor
    potential: Tensor
    gradient: Tensor
    average: DualAverage
    moments: Moments
    mass_factor: Tensor
    ticks: Tensor


class End(NamedTuple):
    """One end of a trajectory: position, whitened momentum and gradient, each ``(chain, dim)``."""

    z: Tensor
    p: Tensor
    gradient: Tensor


class Point(NamedTuple):
    """A point that may become a draw: position and gradient ``(chain, dim)``, U and H ``(chain,)``."""

    z: Tensor
    gradient: Tensor
    energy: Tensor
    h: Tensor


class Tree(NamedTuple):
    """Where each chain is in its block of transitions and in its present tree; ``(chain,)`` unless said.

    Attributes:
        clock: ticks since uniforms were last drawn, 0-dim.
        drawn: transitions completed.
        left, right: the trajectory's ends.
        chosen: the tree's draw so far; between trees, the chain's state.
        offered: the draw of the subtree that is growing.
        rho, grown: sums of the momenta of the tree and of the subtree, ``(chain, dim)``.
        p_first, rho_first: momentum, and sum of the subtree's momenta, where each level's open subtree began,
            ``(chain, level, dim)``.
        weight, grown_weight: log weights of the tree and of the subtree.
        h_start: H at the trajectory's start.
        accepted: sum of the acceptance probabilities of the trajectory's points.
        step: step size of this trajectory.
        direction: 1 forwards in time, -1 backwards.
        depth: doublings made.
        leaf: points in the subtree.
        leaves: points in the trajectory besides its start.
        average: dual averaging of each chain's step size.
        kept: position and record of each completed transition, ``(row + 1, chain, dim + len(_RECORD))``; the last
            row takes what chains that complete none write.
    """

    clock: Tensor
    drawn: Tensor
    left: End
    right: End
    chosen: Point
    offered: Point
    rho: Tensor
    grown: Tensor
    p_first: Tensor
    rho_first: Tensor
    weight: Tensor
    grown_weight: Tensor
    h_start: Tensor
    accepted: Tensor
    step: Tensor
    direction: Tensor
    depth: Tensor
    leaf: Tensor
    leaves: Tensor
    average: DualAverage
    kept: Tensor


class Memory(NamedTuple):
    """What a tick reads and writes, at one place throughout a run, since a bound program knows places alone.

    Attributes:
        tree: where the chains are.
        uniforms: ``(tick, chain, 3)``: to draw within the subtree, to draw between tree and subtree, for the
            direction.
        momenta: of the block's transitions, ``(row, chain, dim)``.
        factor: the mass matrix's.
        length: transitions of the block, 0-dim.
        warm: 1 if step sizes adapt, else 0; 0-dim.
    """

    tree: Tree
    uniforms: Tensor
    momenta: Tensor
    factor: Tensor
    length: Tensor
    warm: Tensor


_Group = TypeVar("_Group", End, Point, DualAverage)


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

    papers: ClassVar[tuple[Paper, ...]] = (
        Paper(
            "article",
            "hoffman2014nuts",
            author="Hoffman, Matthew D. and Gelman, Andrew",
            title="The {N}o-{U}-{T}urn Sampler: Adaptively Setting Path Lengths in {H}amiltonian {M}onte {C}arlo",
            journal="Journal of Machine Learning Research",
            volume=15,
            pages="1593--1623",
            year=2014,
        ),
        Paper(
            "misc",
            "betancourt2017conceptual",
            author="Betancourt, Michael",
            title="A Conceptual Introduction to {H}amiltonian {M}onte {C}arlo",
            eprint="1701.02434",
            archiveprefix="arXiv",
            year=2017,
        ),
        Paper(
            "misc",
            "phan2019composable",
            author="Phan, Du and Pradhan, Neeraj and Jankowiak, Martin",
            title="Composable Effects for Flexible and Accelerated Probabilistic Programming in {N}um{P}yro",
            eprint="1912.11554",
            archiveprefix="arXiv",
            year=2019,
        ),
    )

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
        return NUTSState._make((*parts, torch.zeros((), dtype=torch.int64, device=parts[0].device)))

    def step(self, state: NUTSState, inputs: StepInputs, potential: Potential) -> tuple[NUTSState, Info]:
        """Trees of different sizes have no common step; ``runner`` runs whole blocks of transitions."""
        raise NotImplementedError("NUTS runs blocks of transitions; see runner")

    def runner(
        self, potential: Potential, lift: Lift, streams: Streams
    ) -> Callable[[NUTSState, int, int, int], Iterator[Transition]]:
        """Blocks of transitions, each advanced tick by tick until all chains have completed it."""
        tick = lift(functools.partial(self._tick, potential), _TREE)
        held: list[Memory] = []

        def run(state: NUTSState, start: int, stop: int, warmup_steps: int) -> Iterator[Transition]:
            rows = _rows(potential.dim)
            for first in range(start, stop, rows):
                last = min(stop, first + rows)
                collect = self.controls(first, last, warmup_steps)["collect"]
                adapting = first < warmup_steps and self.adapt_step_size
                state, positions, records = self._block(tick, held, state, first, last - first, adapting, streams)
                if collect[0]:
                    state = state._replace(moments=state.moments.update(positions.flatten(0, 1)))
                columns = dict(zip(_RECORD, records.unbind(-1), strict=True))
                for row in range(last - first):
                    info = {name: column[row] for name, column in columns.items()}
                    yield Transition(state._replace(position=positions[row]), info, info["num_steps"].sum())

        return run

    # ------------------------------------------------------------------ a block
    def _block(
        self,
        tick: Program,
        held: list[Memory],
        state: NUTSState,
        first: int,
        length: int,
        adapting: bool,
        streams: Streams,
    ) -> tuple[NUTSState, Tensor, Tensor]:
        """Run ``length`` transitions of each chain in the memory that ``held`` has, or is given by the first block.

        Returns:
            The state at the end; positions ``(length, chain, dim)``; records ``(length, chain, len(_RECORD))``.
        """
        position = state.position
        generators = streams.fresh("tree", first)
        begun = self._begun(state, streams.noise(length)["normal"], generators, adapting)
        ticks = int(state.ticks)
        if not held:
            held.append(begun)
            tick.bind(*begun, called=ticks)
        else:
            overwrite(held[0], begun)
        tree, uniforms = held[0].tree, held[0].uniforms
        remaining, used = length, 1
        while remaining:
            if tick.outgrown(ticks):
                tick.bind(*held[0], called=ticks)
            # Each transition takes one tick at least.
            for _ in range(max(4, remaining)):
                if used == _TICKS:
                    uniforms.copy_(generators.uniform(_TICKS, 3, position.dtype))
                    tree.clock.zero_()
                    used = 0
                tick.advance()
                used += 1
            ticks += max(4, remaining)
            remaining = length - int(tree.drawn.min())
        dim = position.shape[1]
        # What the next block writes into stays here.
        positions, records = tree.kept[:length, :, :dim], tree.kept[:length, :, dim:]
        chosen = tree.chosen
        state = state._replace(
            position=chosen.z,
            potential=chosen.energy,
            gradient=chosen.gradient,
            average=tree.average,
            ticks=torch.full_like(state.ticks, ticks),
        )
        return state, positions, records

    def _begun(self, state: NUTSState, momenta: Tensor, generators: ChainGenerators, adapting: bool) -> Memory:
        """A block of as many transitions as there are momenta, its first tick not taken."""
        position = state.position
        rows = position.new_zeros((_rows(position.shape[1]), *position.shape))
        rows[: len(momenta)] = momenta
        uniforms = generators.uniform(_TICKS, 3, position.dtype)
        return Memory(
            self._first_tree(state, rows[0], uniforms[0, :, 2], adapting),
            uniforms.contiguous(),
            rows,
            state.mass_factor.contiguous(),
            torch.full((), len(momenta), device=position.device),
            torch.full((), float(adapting), dtype=position.dtype, device=position.device),
        )

    def _first_tree(self, state: NUTSState, p: Tensor, uniform: Tensor, adapting: bool) -> Tree:
        z, gradient, energy = state.position, state.gradient, state.potential
        chains, dim = z.shape
        drawn, depth, leaf, leaves = torch.zeros((4, chains), dtype=torch.int64, device=z.device)
        average = DualAverage(*(x.clone() for x in state.average))
        before = energy + 0.5 * p.square().sum(1)
        # Each its own tensor: the program writes into them.
        levels = (chains, self.max_tree_depth, dim)
        return Tree(
            clock=torch.ones((), dtype=torch.int64, device=z.device),
            drawn=drawn,
            left=End(z.clone(), p.clone(), gradient.clone()),
            right=End(z.clone(), p.clone(), gradient.clone()),
            chosen=Point(z.clone(), gradient.clone(), energy.clone(), before.clone()),
            offered=Point(z.clone(), gradient.clone(), energy.clone(), before.clone()),
            rho=p.clone(),
            grown=torch.zeros_like(p),
            p_first=z.new_zeros(levels),
            rho_first=z.new_zeros(levels),
            weight=torch.zeros_like(energy),
            grown_weight=torch.zeros_like(energy),
            h_start=before,
            accepted=torch.zeros_like(energy),
            step=self._bounded(average.log_step if adapting else average.log_average),
            direction=torch.where(uniform < 0.5, -1.0, 1.0).to(z.dtype),
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
            tree, uniforms, momenta, factor, length, warm: as in ``Memory``.
        """
        uniform = uniforms.index_select(0, tree.clock[None])[0]
        active = tree.drawn < length
        forward = tree.direction > 0

        # The leapfrog step, from the end that the direction names.
        z, p, gradient = _where(forward, tree.right, tree.left)
        signed = (tree.step * tree.direction)[:, None]
        z, p, gradient, energy = leapfrog(z, p, gradient, signed, factor, potential)
        h = energy + 0.5 * p.square().sum(1)
        error = torch.nan_to_num(h - tree.h_start, nan=torch.inf, posinf=torch.inf)
        diverging = error > DIVERGENCE
        accepted = tree.accepted + (-error).clamp(max=0.0).exp()
        leaves = tree.leaves + 1

        # The subtree: its weight, its draw, the sum of its momenta.
        opening = tree.leaf == 0
        grown_weight = torch.where(opening, -error, torch.logaddexp(tree.grown_weight, -error))
        take = opening | (uniform[:, 0] < (-error - grown_weight).exp())
        grown = torch.where(opening[:, None], p, tree.grown + p)
        offered = _where(take, Point(z, gradient, energy, h), tree.offered)
        turning, p_first, rho_first = self._turning_within(tree, p, grown)

        # The subtree is complete, or of no use.
        complete = tree.leaf + 1 == torch.ones_like(tree.depth) << tree.depth
        good = complete & ~turning & ~diverging
        closing = complete | turning | diverging
        move = good & (uniform[:, 1] < (grown_weight - tree.weight).exp())
        chosen = _where(move & active, offered, tree.chosen)
        weight = torch.where(good, torch.logaddexp(tree.weight, grown_weight), tree.weight)
        rho = torch.where(good[:, None], tree.rho + grown, tree.rho)
        depth = tree.depth + good
        end = End(z, p, gradient)
        left, right = _where(forward, tree.left, end), _where(forward, end, tree.right)
        stop = closing & (~good | _is_turning(left.p, right.p, rho) | (depth == self.max_tree_depth))

        # The transition is complete: record it, adapt, and start the next one.
        finished = stop & active
        acceptance = accepted / leaves
        columns = [chosen.energy, chosen.h, acceptance, diverging.to(z.dtype), depth.to(z.dtype), leaves.to(z.dtype)]
        record = torch.cat([chosen.z, torch.stack([*columns, tree.step], dim=1)], dim=1)
        chains = torch.arange(len(record), device=record.device)
        slot = torch.where(finished, tree.drawn, len(tree.kept) - 1)
        adapted = tree.average.update(acceptance, self.target_accept_prob)
        average = _where(finished & (warm > 0), adapted, tree.average)
        drawn = tree.drawn + finished
        row = drawn.clamp(max=momenta.shape[0] - 1)
        p_next = momenta.gather(0, row[None, :, None].expand(1, -1, momenta.shape[2]))[0]
        h_next = chosen.energy + 0.5 * p_next.square().sum(1)
        step_next = self._bounded(torch.where(warm > 0, average.log_step, average.log_average))
        start = End(chosen.z, p_next, chosen.gradient)
        turn = torch.where(uniform[:, 2] < 0.5, -1.0, 1.0).to(z.dtype)
        nothing, zero = torch.zeros_like(weight), torch.zeros_like(depth)
        return Tree(
            clock=tree.clock + 1,
            drawn=drawn,
            left=_where(stop, start, left),
            right=_where(stop, start, right),
            chosen=chosen._replace(h=torch.where(stop, h_next, chosen.h)),
            offered=offered,
            rho=torch.where(stop[:, None], p_next, rho),
            grown=grown,
            p_first=p_first,
            rho_first=rho_first,
            weight=torch.where(stop, nothing, weight),
            grown_weight=grown_weight,
            h_start=torch.where(stop, h_next, tree.h_start),
            accepted=torch.where(stop, nothing, accepted),
            step=torch.where(stop, step_next, tree.step),
            direction=torch.where(closing, turn, tree.direction),
            depth=torch.where(stop, zero, depth),
            leaf=torch.where(closing, zero, tree.leaf + 1),
            leaves=torch.where(stop, zero, leaves),
            average=average,
            kept=tree.kept.index_put((slot, chains), record),
        )

    def _turning_within(self, tree: Tree, p: Tensor, grown: Tensor) -> tuple[Tensor, Tensor, Tensor]:
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
        p_first = torch.where(opens, p[:, None], tree.p_first)
        rho_first = torch.where(opens, grown[:, None], tree.rho_first)
        closes = odd[:, None] & (levels <= top[:, None]) & (levels > (top - completed)[:, None])
        turning = _is_turning(p_first, p[:, None], grown[:, None] - rho_first + p_first)
        return (turning & closes).any(1), p_first, rho_first


def _where(condition: Tensor, first: _Group, second: _Group) -> _Group:
    """Each chain's rows of the one group of tensors or the other."""
    pairs = zip(first, second, strict=True)
    return type(first)(*(torch.where(condition if a.dim() == 1 else condition[:, None], a, b) for a, b in pairs))


def _rows(dim: int) -> int:
    """Transitions in a block, for which a graph is recorded whatever the block's length."""
    return max(1, min(_ROWS, _NUMBERS // dim))


def _is_turning(p_left: Tensor, p_right: Tensor, rho: Tensor) -> Tensor:
    """Whether the trajectory with these end momenta and sum of momenta has turned; the last dimension is summed."""
    inside = rho - 0.5 * (p_left + p_right)
    return ((p_left * inside).sum(-1) <= 0) | ((p_right * inside).sum(-1) <= 0)
