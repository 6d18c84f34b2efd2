"""A pairwise model's law with some groups held, as the samplers see it."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag, pad

from ppl_models.monotone_dbm.groups import Groups
from ppl_models.monotone_dbm.operators import PairwiseMap

__all__ = ["PairwiseEnergy"]


class PairwiseEnergy:
    """``log p~(x) = 1/2 x' Phi x + b' x`` over state numbers, as an ``inference`` ``DiscreteEnergy``.

    Args:
        groups: the layout.
        phi: Phi, without gradients.
        bias: b ``(N,)``.
        colours: groups that do not interact, colour by colour; drawn at once.
        states: held states ``(B, G)``; B is 1 or the number of rows.
        mask: which groups are held, ``(B, G)``.
        drop_held: leave groups that are held in every row out of the blocks.
    """

    def __init__(
        self,
        groups: Groups,
        phi: PairwiseMap,
        bias: Tensor,
        colours: Sequence[Tensor],
        states: Tensor,
        mask: Tensor,
        *,
        drop_held: bool = False,
    ) -> None:
        self.groups, self._phi, self._bias = groups, phi, bias.detach()
        self.sizes, self.dtype, self.device = groups.sizes, bias.dtype, bias.device
        self._states, self._mask = states, mask
        held = mask.all(0)
        kept = [colour[~held[colour]] for colour in colours] if drop_held else list(colours)
        self.blocks = [colour for colour in kept if len(colour)]
        self._columns = [self._entries(colour) for colour in self.blocks]
        self._any_held = bool(mask.any())

    def _entries(self, colour: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Flat entries of a colour's groups ``(n, K)``, which of them are none, and Phi's columns there."""
        widest = self.groups.largest
        sizes = torch.tensor(self.sizes, device=self.device)[colour]
        steps = torch.arange(widest, device=self.device)
        beyond = steps >= sizes[:, None]
        entries = torch.where(
            beyond, torch.zeros_like(beyond, dtype=torch.long), self.groups.offset[colour, None] + steps
        )
        matrix = self._phi.matrix
        return entries, beyond, None if matrix is None else matrix[:, entries.flatten()].contiguous()

    def log_density(self, states: Tensor) -> Tensor:
        """See ``DiscreteEnergy``."""
        x = self.groups.one_hot(states, self.dtype)
        return (x * (0.5 * self._phi.apply(x) + self._bias)).sum(1)

    def conditional_logits(self, states: Tensor, block: int) -> Tensor:
        """See ``DiscreteEnergy``; a held group has its own state alone."""
        entries, beyond, columns = self._columns[block]
        if columns is None:
            made = self._phi.apply(self.groups.one_hot(states, self.dtype))[:, entries.flatten()]
        else:
            made = embedding_bag(states + self.groups.offset, columns, mode="sum")
        logits = made.unflatten(1, entries.shape) + self._bias[entries]
        logits = logits.masked_fill(beyond, -math.inf)
        if self._any_held:
            colour = self.blocks[block]
            own = torch.nn.functional.one_hot(self._states[:, colour], entries.shape[1]).bool()
            logits = logits.masked_fill(self._mask[:, colour, None] & ~own, -math.inf)
        return logits

    def base_logits(self, probabilities: Tensor) -> Tensor:
        """Logs of independent probabilities ``(G, K)``, no state below a millionth."""
        least = probabilities.clamp_min(1e-6).log()
        return pad(least, (0, self.groups.largest - least.shape[-1]))
