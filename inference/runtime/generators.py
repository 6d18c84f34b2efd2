"""Random streams that depend on the seed, the chain and the purpose, and on nothing else.

In torch, ``randn(4, n)`` and the first rows of ``randn(8, n)`` differ at one seed, so a chain that draws from a shared
generator changes when a chain is added beside it.  Here every chain owns a generator whose seed is a hash of ``(seed,
purpose, chain)``; a block of ``T`` steps is drawn in one call per chain, so the cost per step vanishes.  Chain ``i`` is
then the same alone, in a batch, resumed, or on another process.
"""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

__all__ = ["ChainGenerators", "derive_seed", "generator", "reseed", "scoped_seed"]


def derive_seed(seed: int, *stream: int | str) -> int:
    """A 63-bit seed for the named stream of ``seed``; different names give independent streams."""
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise TypeError(f"seed must be an integer, got {seed!r}")
    digest = hashlib.sha256(repr((seed, *stream)).encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def generator(seed: int, *stream: int | str, device: torch.device | str = "cpu") -> torch.Generator:
    """A torch generator for the named stream of ``seed`` on ``device``."""
    return torch.Generator(device=device).manual_seed(derive_seed(seed, *stream))


@contextmanager
def scoped_seed(seed: int, device: torch.device | str | None = None) -> Iterator[None]:
    """Seed torch's global generators inside the block and put them back as they were afterwards.

    For code that draws from the global generator, such as Pyro's ``sample`` statements.  ``device`` names an
    accelerator whose generator is scoped as well.
    """
    kind = torch.device("cpu" if device is None else device)
    # A device that is not there (fake tensors name one) has no generator to put back.
    backend = getattr(torch, kind.type, None)
    devices = [kind] if backend is not None and hasattr(backend, "get_rng_state") and backend.is_available() else []
    with torch.random.fork_rng(devices=devices, device_type=kind.type if devices else "cuda"):
        torch.random.default_generator.manual_seed(derive_seed(seed, "global"))
        if devices:
            getattr(torch, kind.type).manual_seed(derive_seed(seed, "global"))
        yield


def reseed(seed: int, device_type: str = "cpu") -> None:
    """Seed the global generators of the CPU and of one kind of accelerator, inside of a ``scoped_seed``."""
    torch.random.default_generator.manual_seed(seed)
    backend = None if device_type == "cpu" else getattr(torch, device_type, None)
    if backend is not None and hasattr(backend, "manual_seed") and backend.is_available():
        backend.manual_seed(seed)


class ChainGenerators:
    """One generator per chain, drawn in blocks of steps.

    Args:
        seed: the run's seed.
        chains: global indices of the chains that this process runs.
        device: where the draws are made.
        stream: the purpose (``"noise"``, ``"batch"``, ...).
    """

    def __init__(
        self, seed: int, chains: Sequence[int], device: torch.device | str = "cpu", stream: str = "noise"
    ) -> None:
        self.device = torch.device(device)
        self._generators = [generator(seed, stream, chain, device=self.device) for chain in chains]

    def __len__(self) -> int:
        return len(self._generators)

    def normal(self, steps: int, size: int, dtype: torch.dtype) -> Tensor:
        """Standard normals, ``(steps, chain, size)``."""
        return self._stack(lambda g: torch.randn(steps, size, generator=g, device=self.device, dtype=dtype))

    def uniform(self, steps: int, size: int, dtype: torch.dtype) -> Tensor:
        """Uniforms on [0, 1), ``(steps, chain, size)``."""
        return self._stack(lambda g: torch.rand(steps, size, generator=g, device=self.device, dtype=dtype))

    def gamma(self, steps: int, concentration: Tensor) -> Tensor:
        """Standard gamma draws of the given ``(size,)`` concentrations, ``(steps, chain, size)``."""
        rows = concentration.expand(steps, -1)
        return self._stack(lambda g: torch._standard_gamma(rows, generator=g))

    def indices(self, steps: int, size: int, batch_size: int) -> Tensor:
        """Uniform random subsets of ``range(size)`` without replacement, ``(steps, chain, batch_size)``."""

        def draw(g: torch.Generator) -> Tensor:
            keys = torch.rand(steps, size, generator=g, device=self.device)
            return keys.topk(batch_size, dim=-1, sorted=False).indices

        return self._stack(draw)

    def _stack(self, draw: Callable[[torch.Generator], Tensor]) -> Tensor:
        drawn = [draw(g) for g in self._generators]
        return drawn[0].unsqueeze(1) if len(drawn) == 1 else torch.stack(drawn, dim=1)

    def state_dict(self) -> dict[str, Tensor]:
        """The generators' states, one byte tensor a chain."""
        return {str(i): g.get_state() for i, g in enumerate(self._generators)}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Put the generators back to a saved state."""
        for i, g in enumerate(self._generators):
            g.set_state(state[str(i)])
