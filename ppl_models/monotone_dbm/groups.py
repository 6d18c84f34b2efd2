"""Many categorical variables as one flat vector: one-hot codes, softmaxes and covariances group by group.

A group is a categorical variable; its states stand together in the flat vector of ``N = sum of sizes`` entries.
Neighbouring groups of one size form a block, which is handled in one operation.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ppl_models.base import check_counts

__all__ = ["Groups"]

_FEW = 8  # states up to which torch's own softmax, made for long rows, takes three times the time of its parts


class Block(NamedTuple):
    """``num`` groups of ``size`` states, from group ``first``, in entries ``start`` to ``stop``."""

    first: int
    num: int
    size: int
    start: int
    stop: int


def _softmax(x: Tensor) -> Tensor:
    if x.shape[-1] > _FEW:
        return x.softmax(-1)
    made = (x - x.detach().amax(-1, keepdim=True)).exp()
    return made / made.sum(-1, keepdim=True)


class Groups(nn.Module):
    """The layout of G categorical variables.

    Args:
        sizes: states of each, at least 2.

    Attributes:
        sizes, num_groups (G), num_states (N), largest (K), blocks.
        offset: first entry of each group, ``(G,)``.
        group_of: the group of each entry, ``(N,)``.

    Raises:
        TypeError, ValueError: no groups, or one of fewer than two states.
    """

    offset: Tensor
    group_of: Tensor

    def __init__(self, sizes: Sequence[int] | Tensor) -> None:
        super().__init__()
        self.sizes = check_counts("group_sizes", sizes.tolist() if isinstance(sizes, Tensor) else sizes, 2)
        if not self.sizes:
            raise ValueError("group_sizes is empty: a model needs at least one group")
        self.num_groups, self.num_states, self.largest = len(self.sizes), sum(self.sizes), max(self.sizes)
        self.blocks: list[Block] = []
        start = 0
        for g, k in enumerate(self.sizes):
            last = self.blocks[-1] if self.blocks else None
            if last is not None and last.size == k:
                self.blocks[-1] = last._replace(num=last.num + 1, stop=start + k)
            else:
                self.blocks.append(Block(g, 1, k, start, start + k))
            start += k
        counts = torch.tensor(self.sizes)
        self.register_buffer("offset", torch.cumsum(counts, 0) - counts, persistent=False)
        owner = [g for g, k in enumerate(self.sizes) for _ in range(k)]
        self.register_buffer("group_of", torch.tensor(owner), persistent=False)

    def parts(self, flat: Tensor) -> list[Tensor]:
        """``(..., N)`` as one view ``(..., count, size)`` a block."""
        if len(self.blocks) == 1:
            block = self.blocks[0]
            return [flat.unflatten(-1, (block.num, block.size))]
        return [flat[..., b.start : b.stop].unflatten(-1, (b.num, b.size)) for b in self.blocks]

    @staticmethod
    def join(parts: Sequence[Tensor]) -> Tensor:
        """The flat vector of blocks ``(..., count, size)``."""
        return parts[0].flatten(-2) if len(parts) == 1 else torch.cat([part.flatten(-2) for part in parts], -1)

    def each(self, function: Callable[[Tensor], Tensor], flat: Tensor) -> Tensor:
        """``function`` of ``(..., count, size)`` block by block."""
        return self.join([function(part) for part in self.parts(flat)])

    def softmax(self, logits: Tensor) -> Tensor:
        """Of each group, ``(..., N)``."""
        return self.each(_softmax, logits)

    def log_softmax(self, logits: Tensor) -> Tensor:
        """Of each group, ``(..., N)``."""
        return self.each(lambda part: part.log_softmax(-1), logits)

    def totals(self, flat: Tensor) -> Tensor:
        """Sums over the states of each group, ``(..., G)``."""
        return torch.cat([part.sum(-1) for part in self.parts(flat)], -1)

    def covariance(self, q: Tensor, v: Tensor) -> Tensor:
        """``(diag(q) - q q') v`` of each group; zero where q is one-hot."""
        pairs = zip(self.parts(q), self.parts(v), strict=True)
        return self.join([p * (u - (p * u).sum(-1, keepdim=True)) for p, u in pairs])

    def spread(self, per_group: Tensor) -> Tensor:
        """``(..., G)`` repeated for the states of each group, ``(..., N)``."""
        if len(self.blocks) == 1:
            size = self.blocks[0].size
            return per_group.unsqueeze(-1).expand(*per_group.shape, size).reshape(*per_group.shape[:-1], -1)
        return per_group.index_select(-1, self.group_of)

    def one_hot(self, states: Tensor, dtype: torch.dtype) -> Tensor:
        """State numbers ``(..., G)`` as ``(..., N)``."""
        flat = torch.zeros(*states.shape[:-1], self.num_states, dtype=dtype, device=states.device)
        return flat.scatter(-1, states + self.offset, 1.0)

    def states(self, flat: Tensor) -> Tensor:
        """The most probable state of each group, ``(..., G)``."""
        return torch.cat([part.argmax(-1) for part in self.parts(flat)], -1)

    def entries(self, groups: Tensor) -> tuple[Tensor, Tensor]:
        """Entries of some groups ``(n, k)``, k the largest of their sizes, and which of them there are; the others are
        their group's first.
        """
        states = torch.arange(max(self.sizes[g] for g in groups.tolist()), device=groups.device)
        inside = states < groups.new_tensor(self.sizes)[groups, None]
        return self.offset.to(groups.device)[groups, None] + torch.where(inside, states, 0), inside

    def padded(self, flat: Tensor, fill: float = 0.0) -> Tensor:
        """``(..., G, K)`` with ``fill`` beyond a group's own states."""
        parts = self.parts(flat)
        wide = [nn.functional.pad(part, (0, self.largest - part.shape[-1]), value=fill) for part in parts]
        return torch.cat(wide, -2)
