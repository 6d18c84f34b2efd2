"""Everything random that a run consumes, drawn in blocks of steps: noise, and the indices of minibatch plates."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from inference.runtime.generators import ChainGenerators

if TYPE_CHECKING:
    from inference.kernels.base import Noise, StepInputs
    from inference.potential import Potential

__all__ = ["Streams", "block_steps"]

_NOISE_PER_BLOCK = 1 << 18  # random numbers of a chain
_STEPS_PER_BLOCK = 128


def block_steps(spec: "Noise") -> int:
    """Most steps whose noise is drawn at once: bounded in memory, and no function of the number of chains."""
    per_step = max(1, spec.normal + spec.uniform + (0 if spec.gamma is None else spec.gamma.numel()))
    return max(1, min(_STEPS_PER_BLOCK, _NOISE_PER_BLOCK // per_step))


class Streams:
    """The random streams of some of a run's chains.

    Args:
        seed: the run's.
        chains: global indices of the chains that this process runs.
        noise: what one step of one chain consumes.
        potential: for the minibatch plates, dtype and device.
        minibatch: ``"shared"`` or ``"per_chain"``.
    """

    def __init__(
        self, seed: int, chains: Sequence[int], noise: "Noise", potential: "Potential", minibatch: str
    ) -> None:
        self.seed, self.chains, self._spec = seed, chains, noise
        self.dtype, self.device, self._plates = potential.dtype, potential.device, potential.plates
        self._shared = minibatch == "shared"
        self._noise = ChainGenerators(seed, chains, self.device)
        self._most, self._ahead = block_steps(noise), dict[str, Tensor]()
        owners = range(1) if self._shared else chains
        self._batches = ChainGenerators(seed, owners, self.device, stream="minibatch")

    def noise(self, steps: int, out: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
        """The noise of the next steps: ``normal``, ``uniform`` and ``gamma``, each ``(steps, chain, k)`` where the
        kernel asks for it.

        A call of every chain's generator costs as much as some thousand numbers: short blocks, such as the windows of
        a warm-up, share what is drawn at once.

        Args:
            steps: how many.
            out: memory for ``normal`` and ``uniform``, whose first rows are used where nothing drawn before is left.
        """
        if not self._ahead and steps >= self._most:
            return self._draw(steps, out or {})
        pieces: list[dict[str, Tensor]] = []
        while steps:
            if not self._ahead:
                self._ahead = self._draw(self._most, {})
            if not self._ahead:
                return {}
            left = len(next(iter(self._ahead.values())))
            pieces.append({n: v[:steps] for n, v in self._ahead.items()})
            self._ahead = {n: v[steps:] for n, v in self._ahead.items()} if steps < left else {}
            steps -= min(steps, left)
        return pieces[0] if len(pieces) == 1 else {n: torch.cat([p[n] for p in pieces]) for n in pieces[0]}

    def _draw(self, steps: int, out: Mapping[str, Tensor]) -> dict[str, Tensor]:
        spec = self._spec
        drawn: dict[str, Tensor] = {}
        if spec.normal:
            drawn["normal"] = self._noise.normal(steps, spec.normal, self.dtype, out.get("normal"))
        if spec.uniform:
            drawn["uniform"] = self._noise.uniform(steps, spec.uniform, self.dtype, out.get("uniform"))
        if spec.gamma is not None:
            drawn["gamma"] = self._noise.gamma(steps, spec.gamma)
        return drawn

    def block(
        self, steps: int, controls: Mapping[str, Sequence[float]], out: Mapping[str, Tensor] | None = None
    ) -> "StepInputs":
        """The inputs of the next steps, each with the step as its leading dimension; ``controls`` as the kernel
        scheduled them, ``out`` as in ``noise``.
        """
        from inference.kernels.base import StepInputs

        scheduled = {n: torch.tensor(list(v), dtype=self.dtype, device=self.device) for n, v in controls.items()}
        indices: dict[str, Tensor] = {}
        for plate in self._plates.values():
            drawn = self._batches.indices(steps, plate.size, plate.batch_size)
            indices[plate.name] = drawn[:, 0] if self._shared else drawn
        return StepInputs(self.noise(steps, out), scheduled, indices)

    def inputs(self, steps: int, controls: Mapping[str, Sequence[float]]) -> "list[StepInputs]":
        """``block`` step by step."""
        block = self.block(steps, controls)
        rows = [{n: v.unbind(0) for n, v in group.items()} for group in block]
        return [type(block)(*({n: v[t] for n, v in group.items()} for group in rows)) for t in range(steps)]

    def fresh(self, purpose: str, block: int) -> ChainGenerators:
        """Generators for one block alone, for a kernel that cannot say beforehand how much it will draw: what is left
        undrawn moves no later block.
        """
        return ChainGenerators(self.seed, self.chains, self.device, stream=f"{purpose}/{block}")

    def state_dict(self) -> dict[str, Tensor]:
        """The generators' states, and what is drawn and not used yet."""
        return {
            **{f"noise/{n}": g for n, g in self._noise.state_dict().items()},
            **{f"batch/{n}": g for n, g in self._batches.state_dict().items()},
            **{f"ahead/{n}": v.clone() for n, v in self._ahead.items()},
        }

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Put the generators back to a saved state."""
        for group, generators in (("noise", self._noise), ("batch", self._batches)):
            generators.load_state_dict({n.split("/")[1]: g for n, g in state.items() if n.startswith(group)})
        self._ahead = {n.split("/")[1]: v.to(self.device) for n, v in state.items() if n.startswith("ahead")}
