"""Random streams that depend on the seed, the chain and the purpose, and on nothing else.

In torch, ``randn(4, n)`` and the first rows of ``randn(8, n)`` differ at one seed, so a chain that draws from a shared
generator changes when a chain is added beside it.  Here every chain owns a generator whose seed is a hash of ``(seed,
purpose, chain)``; a block of ``T`` steps is drawn in one call per chain, so the cost per step vanishes.  Chain ``i`` is
then the same alone, in a batch, resumed, or on another process.  On an accelerator a counter-based generator makes the
streams of all chains in one pass (``philox.py``).
"""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from inference.runtime.philox import PhiloxStreams

__all__ = ["ChainGenerators", "derive_seed", "generator", "reseed", "scoped_seed"]

_KEYS = 1 << 25  # random keys of minibatches that are held at once
_FEW = 16  # a subset of k of n costs k^2 / 2 comparisons or n keys, of which a key takes some ten times as long


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
        seeds = [derive_seed(seed, stream, chain) for chain in chains]
        self._philox = None if self.device.type == "cpu" else PhiloxStreams(seeds, self.device)
        self._generators = [] if self._philox else [torch.Generator().manual_seed(s) for s in seeds]
        self._identity = seed, stream, list(chains)

    def normal(self, steps: int, size: int, dtype: torch.dtype, out: Tensor | None = None) -> Tensor:
        """Standard normals, ``(steps, chain, size)``; in the first rows of ``out`` if it is given."""
        if self._philox is not None:
            return _put(self._philox.normal(steps, size, dtype), out)
        return self._rows(lambda row, g: row.normal_(generator=g), steps, size, dtype, out)

    def uniform(self, steps: int, size: int, dtype: torch.dtype, out: Tensor | None = None) -> Tensor:
        """Uniforms on [0, 1), ``(steps, chain, size)``; in the first rows of ``out`` if it is given."""
        if self._philox is not None:
            return _put(self._philox.uniform(steps, size, dtype), out)
        return self._rows(lambda row, g: row.uniform_(generator=g), steps, size, dtype, out)

    def _rows(
        self,
        fill: Callable[[Tensor, torch.Generator], Tensor],
        steps: int,
        size: int,
        dtype: torch.dtype,
        out: Tensor | None,
    ) -> Tensor:
        """Each chain's row filled by its generator, the step put first."""
        drawn = torch.empty(len(self._generators), steps, size, dtype=dtype, device="cpu")
        for row, g in zip(drawn.unbind(), self._generators, strict=True):
            fill(row, g)
        return _put(drawn.transpose(0, 1), out)

    def gamma(self, steps: int, concentration: Tensor) -> Tensor:
        """Standard gamma draws of the given ``(size,)`` concentrations, ``(steps, chain, size)``."""
        if self._philox is not None and not self._generators:  # made where they are needed: one draw each is a launch
            seed, stream, chains = self._identity
            self._generators = [generator(seed, stream, "gamma", c, device=self.device) for c in chains]
        rows = concentration.expand(steps, -1)
        return self._stack(lambda g: torch._standard_gamma(rows, generator=g))

    def indices(self, steps: int, size: int, batch_size: int) -> Tensor:
        """Uniform random subsets of ``range(size)`` without replacement, ``(steps, chain, batch_size)``."""
        if batch_size**2 <= _FEW * size:
            return _subsets(self.uniform(steps, batch_size + batch_size % 2, torch.float64)[..., :batch_size], size)
        if self._philox is None:
            return self._stack(lambda g: torch.rand(steps, size, generator=g).topk(batch_size, sorted=False).indices)
        # Whole blocks of words a step: how many steps share a pass must not move the stream.
        padded = size + -size % 4
        rows = max(1, _KEYS // (len(self._identity[2]) * padded))
        parts = [min(rows, steps - first) for first in range(0, steps, rows)]
        keys = (self._philox.uniform(part, padded, torch.float32)[:, :, :size] for part in parts)
        return torch.cat([k.topk(batch_size, sorted=False).indices for k in keys])

    def _stack(self, draw: Callable[[torch.Generator], Tensor]) -> Tensor:
        drawn = [draw(g) for g in self._generators]
        return drawn[0].unsqueeze(1) if len(drawn) == 1 else torch.stack(drawn, dim=1)

    def state_dict(self) -> dict[str, Tensor]:
        """Where the streams are: a generator's state as a byte tensor for each chain, and what all have drawn."""
        state = {str(i): g.get_state() for i, g in enumerate(self._generators)}
        return state if self._philox is None else {**state, "drawn": torch.tensor(self._philox.drawn)}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Put the streams back to a saved state."""
        if self._philox is not None:
            self._philox.drawn = int(state["drawn"])
            self._generators = [torch.Generator(self.device) for _ in range(len(state) - 1)]
        for i, g in enumerate(self._generators):
            g.set_state(state[str(i)])


def _put(drawn: Tensor, out: Tensor | None) -> Tensor:
    return drawn.contiguous() if out is None else out[: len(drawn)].copy_(drawn)


def _subsets(uniform: Tensor, size: int) -> Tensor:
    """Subsets of ``range(size)`` from uniforms ``(..., k)``: Floyd's algorithm (Bentley and Floyd, "A sample of
    brilliance", CACM 1987) on all rows at once.

    The i-th member is uniform on ``range(size - k + i + 1)``, or that range's last number if it is a member already.
    """
    count = uniform.shape[-1]
    last = torch.arange(size - count, size, device=uniform.device)
    chosen = (uniform * (last + 1)).long().to(torch.int32 if size <= 2**31 else torch.int64)
    chosen = chosen.movedim(-1, 0).contiguous()
    for i in range(1, count):
        repeated = ((chosen[:i] - chosen[i]).abs_().amin(0)) == 0
        chosen[i].masked_fill_(repeated, size - count + i)
    return chosen.movedim(0, -1).long()
