"""The contract that every sampler meets, for one chain or thousands in the same program.

A kernel is configuration only.  Its functions are pure: ``init`` maps starting points to a state, ``step`` maps a
state and its inputs to the next
state and a record of what happened.  All randomness comes in as ``StepInputs.noise``, drawn by the driver from one
generator per chain, so a kernel never
touches a generator.  States are named tuples of tensors whose first field is ``position`` of shape ``(chain, dim)``.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

import torch
from pyro.infer.autoguide.initialization import init_to_uniform
from torch import Tensor

from inference._checks import count, nonnegative, positive
from inference.citation import Citable
from inference.potential import InDims, Potential, Program
from inference.runtime.streams import Streams, block_steps

__all__ = ["Kernel", "Lift", "Noise", "StepInputs", "Transition", "count", "nonnegative", "positive"]


State = Any
Info = dict[str, Tensor]
Lift = Callable[[Callable[..., Any], int], Program]


class Noise(NamedTuple):
    """What one step of one chain consumes.

    Attributes:
        normal: number of standard normals.
        uniform: number of uniforms.
        gamma: concentrations ``(k,)`` of standard gamma draws.
    """

    normal: int = 0
    uniform: int = 0
    gamma: Tensor | None = None


class StepInputs(NamedTuple):
    """Everything a step needs besides its state.

    Attributes:
        noise: ``normal``, ``uniform`` and ``gamma`` draws, each ``(chain, k)``.
        control: scalars that the kernel scheduled for this step (0-dim tensors).
        batch: indices of each minibatch plate, ``(batch_size,)`` or ``(chain, batch_size)``.
    """

    noise: dict[str, Tensor]
    control: dict[str, Tensor]
    batch: dict[str, Tensor]


class Transition(NamedTuple):
    """One step of all chains.

    The next step may write into its tensors: whoever keeps one makes a copy.

    Attributes:
        state: the state after it; its position is exact at every step, all else at a block's last one.
        info: what happened, each entry ``(chain,)``.
        gradients: gradients that it took, of all chains together.
    """

    state: State
    info: Info
    gradients: int | Tensor


class _Moving(NamedTuple):
    """What a step in place changes: the state, the record of the step, and the row of the next one's inputs, 0-dim."""

    state: State
    info: Info
    clock: Tensor


class Kernel(Citable, ABC):
    """A Markov kernel on the unconstrained space of a Pyro model.

    Attributes:
        stochastic: whether it tolerates a minibatch gradient; a Metropolis-corrected kernel does not.
    """

    stochastic: ClassVar[bool] = False
    model: Callable[..., Any] | None = None
    potential_fn: Callable[[dict[str, Tensor]], Tensor] | None = None
    transforms: Mapping[str, Any] | None = None
    max_plate_nesting: int | None = None
    init_strategy: Callable[[Any], Any] = staticmethod(init_to_uniform)

    def _set_target(
        self,
        model: Callable[..., Any] | None,
        potential_fn: Callable[[dict[str, Tensor]], Tensor] | None,
        transforms: Mapping[str, Any] | None,
        max_plate_nesting: int | None,
        init_strategy: Callable[[Any], Any],
    ) -> None:
        if (model is None) == (potential_fn is None):
            raise ValueError("give exactly one of model and potential_fn")
        if not callable(model if model is not None else potential_fn):
            raise TypeError("model (or potential_fn) must be callable")
        self.model, self.potential_fn = model, potential_fn
        self.transforms, self.max_plate_nesting, self.init_strategy = transforms, max_plate_nesting, init_strategy

    def own_potential(self, args: tuple[Any, ...], kwargs: Mapping[str, Any], in_dims: InDims) -> Potential | None:
        """The target of a kernel that does not move in unconstrained space, at the arguments of ``run``; else None."""
        return None

    @abstractmethod
    def noise(self, potential: Potential) -> Noise:
        """The random numbers that one step of one chain consumes."""

    @abstractmethod
    def init(self, position: Tensor, potential: Potential) -> State:
        """The state at starting points ``(chain, dim)``."""

    @abstractmethod
    def step(self, state: State, inputs: StepInputs, potential: Potential) -> tuple[State, Info]:
        """The next state of all chains and what happened, each entry of the record ``(chain,)``."""

    def build(self, potential: Potential, lift: Lift) -> Callable[[State, StepInputs, Any], tuple[State, Info]] | None:
        """``step`` with its pieces recorded as graphs: ``lift(function, calls_per_step)`` returns the function as a
        graph.  ``None`` where the whole step is one graph.
        """
        return None

    def runner(
        self, potential: Potential, lift: Lift, streams: Streams
    ) -> Callable[[State, int, int, int], Iterator[Transition]]:
        """The function ``run(state, start, stop, warmup_steps)`` that takes a block of steps, one after another unless
        overridden.
        """
        step = self.build(potential, lift)
        if step is None:
            return self._in_place(potential, lift, streams)

        def run(state: State, start: int, stop: int, warmup_steps: int) -> Iterator[Transition]:
            plan = self.plan(state)
            gradients = plan if isinstance(plan, int) else 1
            for inputs in streams.inputs(stop - start, self.controls(start, stop, warmup_steps)):
                state, info = step(state, inputs, plan)
                yield Transition(state, info, gradients * len(state.position))

        return run

    def _in_place(
        self, potential: Potential, lift: Lift, streams: Streams
    ) -> Callable[[State, int, int, int], Iterator[Transition]]:
        """Steps that change the state where it lies and find their row of the block's inputs by a clock, so that
        nothing passes through Python between them.
        """

        def tick(moving: _Moving, block: StepInputs) -> _Moving:
            now = moving.clock[None]
            inputs = StepInputs(*({n: v.index_select(0, now)[0] for n, v in group.items()} for group in block))
            state, info = self.step(moving.state, inputs, potential)
            return _Moving(state, info, moving.clock + 1)

        program = lift(tick, 1)
        moving: _Moving | None = None
        memory: StepInputs | None = None
        advance: Callable[[], Any] = _nothing

        def run(state: State, start: int, stop: int, warmup_steps: int) -> Iterator[Transition]:
            nonlocal moving, memory, advance
            noise = None if memory is None else memory.noise
            drawn = streams.block(stop - start, self.controls(start, stop, warmup_steps), noise)
            if moving is None or memory is None:
                rows = block_steps(self.noise(potential))
                memory = StepInputs(
                    *({n: v.new_zeros((rows, *v.shape[1:])) for n, v in group.items()} for group in drawn)
                )
                first = StepInputs(*({n: v[0] for n, v in group.items()} for group in drawn))
                example = self.step(state, first, potential)[1]
                info = {n: torch.zeros_like(v, memory_format=torch.contiguous_format) for n, v in example.items()}
                moving = _Moving(_copied(state), info, torch.zeros((), dtype=torch.int64, device=state.position.device))
                _fill(memory, drawn)
                advance = program.bind(moving, memory)
            else:
                _fill(memory, drawn)
                overwrite(moving.state, state)
            moving.clock.zero_()
            transition = Transition(moving.state, moving.info, len(state.position))
            for _ in range(start, stop):
                advance()
                yield transition

        return run

    def controls(self, start: int, stop: int, warmup_steps: int) -> dict[str, Sequence[float]]:
        """The scheduled scalars of steps ``start`` to ``stop``, by name."""
        return {}

    def boundaries(self, warmup_steps: int) -> list[int]:
        """Steps of the warm-up after which ``end_window`` is called."""
        return []

    def end_window(self, state: State, step: int, warmup_steps: int, potential: Potential) -> State:
        """Adaptation that is due between steps rather than in each."""
        return state

    def plan(self, state: State) -> Any:
        """Host-side numbers for the coming block of steps, read back once a block."""
        return None

    def kept_steps(self, num_samples: int, thin: int) -> Sequence[int]:
        """Steps after the warm-up (from 0) whose positions are the draws; every ``thin``-th unless the kernel
        schedules otherwise.
        """
        return range(thin - 1, num_samples * thin, thin)

    def describe(self) -> dict[str, Any]:
        """The configuration that identifies a run, as plain values."""
        plain = (int, float, str, bool, type(None))
        return {
            k: v if isinstance(v, plain) else repr(v)
            for k, v in sorted(vars(self).items())
            if isinstance(v, plain) or k in ("schedule", "full_mass")
        }


def _nothing() -> None:
    """No step."""


def _fill(memory: StepInputs, drawn: StepInputs) -> None:
    for kept, given in zip(memory, drawn, strict=True):
        for name, value in given.items():
            if value._base is not kept[name]:  # drawn where it is kept
                kept[name][: len(value)] = value


def _copied(state: Any) -> Any:
    """The state in memory of its own."""
    if isinstance(state, Tensor):
        return state.clone(memory_format=torch.contiguous_format)
    return type(state)(*(_copied(part) for part in state))


def overwrite(target: Any, source: Any) -> None:
    """Put what ``source`` holds, a tree of named tuples of tensors, into the memory of ``target``."""
    if isinstance(target, Tensor):
        if target is not source:
            target.copy_(source)
        return
    for part, value in zip(target, source, strict=True):
        overwrite(part, value)


def per_chain_norm(x: Tensor) -> Tensor:
    """Euclidean norm of each chain's row, ``(chain, 1)``."""
    return torch.linalg.vector_norm(x, dim=-1, keepdim=True)
