"""Philox 4x32-10, a counter-based random generator, in tensor operations: the streams of all chains at once.

Salmon, Moraes, Dror and Shaw, "Parallel random numbers: as easy as 1, 2, 3" (SC 2011).  A block of four 32-bit words is
a bijection of its 128-bit counter under a 64-bit key, so that any number of keyed streams costs one pass over a tensor.
One generator object a chain, as on a CPU, would launch one kernel a chain: at thousands of chains that, and not the
model, takes an accelerator's time.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["PhiloxStreams", "philox"]

_WORD = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10


def philox(counter: Sequence[Tensor], key: Sequence[Tensor]) -> list[Tensor]:
    """Four random 32-bit words for each counter and key.

    Args:
        counter: four int64 tensors that hold 32-bit words; broadcast against the key.
        key: two.

    Returns:
        Four int64 tensors with values in [0, 2^32).
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(_ROUNDS):
        # The product of two words may wrap round in 64 bits with a sign: its bits are right all the same.
        first, second = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        high0, high2 = (first >> 32) & _WORD, (second >> 32) & _WORD
        c0, c1, c2, c3 = high2 ^ c1 ^ k0, second & _WORD, high0 ^ c3 ^ k1, first & _WORD
        k0, k1 = (k0 + _WEYL[0]) & _WORD, (k1 + _WEYL[1]) & _WORD
    return [c0, c1, c2, c3]


class PhiloxStreams:
    """One stream a chain, each a function of its seed and of how much all of them have drawn.

    Args:
        seeds: one of up to 64 bits for each chain.
        device: where the draws are made.
    """

    def __init__(self, seeds: Sequence[int], device: torch.device) -> None:
        words = torch.tensor([(s & _WORD, (s >> 32) & _WORD) for s in seeds], dtype=torch.int64, device=device)
        self._key = words.reshape(-1, 2).unbind(1)
        self.device = device
        self.drawn = 0  # blocks of four words, of each chain

    def _words(self, count: int) -> Tensor:
        """The next words of each chain, ``(chain, count)``; a last block that is not used up is not used on."""
        blocks = -(-count // 4)
        index = torch.arange(self.drawn, self.drawn + blocks, device=self.device)
        self.drawn += blocks
        counter = [index & _WORD, index >> 32, torch.zeros_like(index), torch.zeros_like(index)]
        words = philox(counter, [k[:, None] for k in self._key])
        return torch.stack(torch.broadcast_tensors(*words), dim=-1).flatten(1)[:, :count]

    def uniform(self, steps: int, size: int, dtype: torch.dtype) -> Tensor:
        """Uniforms on [0, 1), ``(steps, chain, size)``."""
        integers, bits = self._integers(steps * size, dtype)
        spare = 0 if dtype == torch.float64 else 8  # a float32 holds 24 bits: more would round up to 1
        return self._shaped((integers >> spare).to(dtype) * 2.0 ** (spare - bits), steps, size)

    def normal(self, steps: int, size: int, dtype: torch.dtype) -> Tensor:
        """Standard normals, ``(steps, chain, size)``, by the transform of Box and Muller."""
        half = -(-steps * size // 2)
        integers, bits = self._integers(2 * half, dtype)
        positive = (integers.to(dtype) + 0.5) * 2.0**-bits
        radius = (-2 * positive[:, :half].log()).clamp(min=0.0).sqrt()
        angle = 2 * math.pi * positive[:, half:]
        drawn = torch.cat([radius * angle.cos(), radius * angle.sin()], dim=1)
        return self._shaped(drawn[:, : steps * size], steps, size)

    def _integers(self, count: int, dtype: torch.dtype) -> tuple[Tensor, int]:
        """``(chain, count)`` integers of 32 random bits, or of the 53 that a float64 holds, and how many bits."""
        if dtype != torch.float64:
            return self._words(count), 32
        high, low = self._words(2 * count).unflatten(1, (count, 2)).unbind(-1)
        return (high >> 5) * (1 << 26) + (low >> 6), 53

    @staticmethod
    def _shaped(drawn: Tensor, steps: int, size: int) -> Tensor:
        return drawn.unflatten(1, (steps, size)).transpose(0, 1).contiguous()
