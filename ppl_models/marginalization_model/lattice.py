"""The Ising model on a periodic lattice, with exact answers by transfer matrix.

``log f(s) = coupling * s'As + field * sum(s)``, the energy of Liu, Ramadge and Adams, ICML 2024, arXiv 2310.12920.
``Z = tr(T^height)`` with T the matrix of a row's weights beside the next row's (Kramers and Wannier, Physical Review
60, 1941).
"""

import math
from typing import Any

import torch
from torch import Tensor

from ppl_models.base import check_count, to_tensor

__all__ = ["LatticeIsing"]

_WIDEST = 12  # 2^12 columns of a transfer matrix
_COLUMNS = 512  # of the transfer matrix carried along at once


class LatticeIsing:
    """Spins ``s = 2 x - 1`` on a periodic lattice, ``log f(s) = coupling * s'As + field * sum(s)``.

    A is the adjacency matrix of the torus, so each edge counts twice: the usual coupling is ``2 * coupling``.  Variable
    ``row * width + column`` is the spin at that place.

    Args:
        width: columns, at least 3 (with 2 a neighbour on the left would be the one on the right).
        coupling: of ``s'As``.
        field: of ``sum(s)``.
        height: rows; ``width`` by default.

    Example:
        >>> lattice = LatticeIsing(width=4, coupling=0.1, field=0.2)
        >>> round(lattice.log_partition(), 6)
        12.598503
    """

    def __init__(self, width: int, coupling: float, field: float, height: int | None = None) -> None:
        self.width = check_count("width", width, 3)
        self.height = self.width if height is None else check_count("height", height, 3)
        for name, value in (("coupling", coupling), ("field", field)):
            if isinstance(value, bool) or not isinstance(value, int | float):
                raise TypeError(f"{name} must be a number, got {value!r}")
            if not math.isfinite(value):
                raise ValueError(f"{name} must be finite, got {value}")
        self.coupling, self.field = float(coupling), float(field)

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns."""
        return self.height, self.width

    @property
    def num_variables(self) -> int:
        """Number of spins D."""
        return self.height * self.width

    def log_density(self, x: Any) -> Tensor:
        """Unnormalised log-density of rows ``(B, D)`` of zeros and ones, ``(B,)`` in torch's default dtype.

        Of a row with missing spins (-1) it is the sum of the terms whose spins are all there.

        Raises:
            TypeError, ValueError: another shape, or other values.
        """
        x = to_tensor("x", x)
        if x.ndim != 2 or x.shape[1] != self.num_variables:
            raise ValueError(f"x must have shape (B, {self.num_variables}), got {tuple(x.shape)}")
        s = x.to(torch.get_default_dtype())
        there = s >= 0
        # An accelerator would have to wait for this look.
        if x.is_cpu and not torch.compiler.is_compiling() and bool(((s != 1) & (s != 0) & (s != -1)).any()):
            raise ValueError("x must hold 0 (spin down) and 1 (spin up), or -1 where a spin is missing")
        s = ((2 * s - 1) * there).view(-1, *self.shape)
        edges = (s * (s.roll(1, 1) + s.roll(1, 2))).sum((1, 2))
        return 2 * self.coupling * edges + self.field * s.sum((1, 2))

    def log_partition(self) -> float:
        """log Z, exact to rounding, in float64.

        Raises:
            ValueError: the lattice is wider than 12 both ways, or colder than double precision can tell.
        """
        return self._log_z_and_slope(0.0, 0.0)[0]

    def mean_log_density(self) -> float:
        """``E[log f(x)]`` under the normalised law."""
        return self._log_z_and_slope(self.coupling, self.field)[1]

    def mean_spin(self) -> float:
        """``E[s]`` of a single spin."""
        return self._log_z_and_slope(0.0, 1.0)[1] / self.num_variables

    def entropy(self) -> float:
        """Entropy in nats, ``log Z - E[log f(x)]``."""
        log_z, mean = self._log_z_and_slope(self.coupling, self.field)
        return log_z - mean

    def _log_z_and_slope(self, coupling: float, field: float) -> tuple[float, float]:
        """log Z, and its derivative as the parameters move in the direction ``(coupling, field)``."""
        across, along = sorted(self.shape)
        if across > _WIDEST:
            raise ValueError(
                f"a lattice of {self.height} x {self.width} has no exact solution here: one side must be at most "
                f"{_WIDEST} (of a longer torus log Z grows as its number of spins: take a strip of 12 by its length)"
            )
        states = torch.arange(2**across)
        spins = 2.0 * ((states.unsqueeze(1) >> torch.arange(across)) & 1).double() - 1
        edges, total = (spins * spins.roll(1, 1)).sum(1), spins.sum(1)
        pair = torch.tensor([[1.0, -1.0], [-1.0, 1.0]], dtype=torch.float64)
        row = 2 * self.coupling * edges + self.field * total
        row_slope = 2 * coupling * edges + field * total
        top = row.max()
        weight = (row - top).exp()
        strongest = 2 * abs(self.coupling)
        bond = (2 * self.coupling * pair - strongest).exp()
        bond_slope = 2 * coupling * pair * bond
        # T = diag(w) B x ... x B with one 2 x 2 factor for each bond between two rows; trace(T^along) by its columns,
        # whose largest number is kept at one: a long or a cold lattice would leave the range of float64.
        size = 2**across
        pieces = []
        for first in range(0, size, _COLUMNS):
            columns = torch.arange(first, min(first + _COLUMNS, size))
            value = torch.zeros(size, len(columns), dtype=torch.float64)
            value[columns, torch.arange(len(columns))] = 1.0
            change = torch.zeros_like(value)
            log_scale = 0.0
            for _ in range(along):
                for axis in range(across):
                    shaped = value.view(2 ** (across - 1 - axis), 2, -1)
                    bent = change.view_as(shaped)
                    change = (bond @ bent + bond_slope @ shaped).reshape(size, -1)
                    value = (bond @ shaped).reshape(size, -1)
                change = weight[:, None] * (change + row_slope[:, None] * value)
                value = weight[:, None] * value
                scale = float(value.max())
                value, change, log_scale = value / scale, change / scale, log_scale + math.log(scale)
            diagonal = (columns, torch.arange(len(columns)))
            pieces.append(torch.stack([value[diagonal].sum(), change[diagonal].sum(), value.new_tensor(log_scale)]))
        traces, slopes, scales = torch.stack(pieces, 1)
        relative = (scales - scales.max()).exp()
        trace = relative @ traces
        log_z, slope = trace.log() + scales.max(), (relative @ slopes) / trace
        if not bool(torch.isfinite(log_z + slope)):
            raise ValueError(f"coupling = {self.coupling} is too strong for an exact solution in double precision")
        return float(log_z + along * (top + across * strongest)), float(slope)
