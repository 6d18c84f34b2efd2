"""Contrastive divergence and its kin: the model's expectation from short Langevin chains.

``G = -mean_i grad l(x_i) + mean_j grad l(x'_j)`` with ``x'`` from k steps of Langevin dynamics

    x <- x + epsilon / 2 grad_x l(x) + N(0, epsilon)

(temperature 1, the shared kernel's move).  CD-k starts at the data (Hinton, Neural Computation 14, 2002), persistent CD
at a buffer of chains that goes on between steps (Tieleman, ICML 2008; re-started now and then as in Du and Mordatch
2019), short-run Langevin at fresh noise (Nijkamp et al., NeurIPS 2019).  None gives log Z.
"""

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor

from inference.kernels.base import count, nonnegative, positive
from inference.kernels.sgld import SGLD, SGLDState
from inference.objectives.unnormalised.objective import UnnormalisedObjective, refuse_edges

__all__ = ["ContrastiveDivergence"]

_STARTS = ("data", "buffer", "noise")


class ContrastiveDivergence(UnnormalisedObjective):
    """CD-k, persistent CD or short-run Langevin, for continuous data without bounds.

    Args:
        model: as in ``CompositionalLikelihood``; one noise site.
        guide: the noise; needed for ``start="noise"``, and for a buffer's restarts.
        num_steps: k, Langevin steps for each loss.
        step_size: epsilon.
        start: ``"data"`` (CD-k), ``"buffer"`` (persistent), ``"noise"`` (short-run).
        buffer_size: chains kept; each step moves as many as there are rows of data.
        restart: share of the buffer's chains that start anew at a step.
        penalty: weight of ``mean l(x)^2 + mean l(x')^2``, which keeps energies from drifting (JEM's code).
    """

    columns: ClassVar[tuple[str, ...]] = ("contrast",)
    chains: Tensor

    def __init__(
        self,
        model: Callable[..., Any],
        guide: Callable[..., Any] | None = None,
        *,
        num_steps: int = 10,
        step_size: float = 0.01,
        start: str = "data",
        buffer_size: int = 2000,
        restart: float = 0.05,
        penalty: float = 0.0,
    ) -> None:
        super().__init__(model, guide, on_collapse="ignore")
        if start not in _STARTS:
            raise ValueError(f"start must be one of {_STARTS}, got {start!r}")
        if start == "noise" and guide is None:
            raise ValueError("start='noise' needs the noise: give guide")
        self.start, self.num_steps = start, count("num_steps", num_steps, 1)
        self.step_size = positive("step_size", step_size)
        self.buffer_size = count("buffer_size", buffer_size, 1)
        self.restart, self.penalty = nonnegative("restart", restart, upper=1.0), nonnegative("penalty", penalty)
        # the move alone is used: positions and gradients are given to it
        self._kernel = SGLD(potential_fn=lambda values: values["x"], step_size=self.step_size)
        self.register_buffer("chains", torch.zeros(0))

    def forward(self, *batch: Tensor) -> Tensor:
        """The contrast ``mean l(x') - mean l(x)``, whose value says nothing of the likelihood."""
        self._prepare(batch)
        site = self._site()
        data = self.pair.data(batch)[site]
        rows, advances = len(data), self._advances()
        index = None
        if self.start == "data":
            begin = data
        elif self.start == "noise":
            begin = self._fresh(rows, batch).to(data)
        else:
            if not len(self.chains):
                self.chains = self._fresh(self.buffer_size, batch).to(data)
            index = torch.randint(self.buffer_size, (rows,), device=data.device)
            again = torch.rand(rows, device=data.device) < self.restart
            shape = (rows, *(1,) * (data.dim() - 1))
            begin = torch.where(again.reshape(shape), self._fresh(rows, batch).to(data), self.chains[index])
        ended = self._langevin(begin.detach(), site, batch)
        if index is not None and advances:
            self.chains[index] = ended
        values = self.pair.log_density({site: torch.cat([data, ended])}, batch, record=True)
        self._note(values, rows)
        at_data, at_model = values[:rows], values[rows:]
        contrast = at_model.mean() - at_data.mean()
        if advances:
            self._write(contrast)
        return contrast + self.penalty * (at_data.square().mean() + at_model.square().mean())

    def _langevin(self, x: Tensor, site: str, batch: tuple[Tensor, ...]) -> Tensor:
        control = {"step_size": x.new_full((), self.step_size), "inject": x.new_ones(())}
        state = SGLDState(x.reshape(len(x), -1))
        for _ in range(self.num_steps):
            with torch.enable_grad():
                leaf = state.position.detach().requires_grad_(True)
                energy = -self.pair.log_density({site: leaf.reshape(x.shape)}, batch, record=True).sum()
                (gradient,) = torch.autograd.grad(energy, leaf)
            state, _ = self._kernel.move(state, gradient, torch.randn_like(leaf), control)
        return state.position.detach().reshape(x.shape)

    def _fresh(self, rows: int, batch: tuple[Tensor, ...]) -> Tensor:
        site = self._site()
        if self.pair._functions[1] is None:
            data = self.pair.data(batch)[site]
            return data[torch.randint(len(data), (rows,), device=data.device)]
        with torch.no_grad():
            return self.pair.draw(rows, batch).values[site][:rows]

    def _site(self) -> str:
        if len(self.pair.sites) > 1:
            raise ValueError(f"Langevin dynamics moves one site, the noise draws {sorted(self.pair.sites)}")
        return self.pair.sites[0]

    def _prepare(self, batch: tuple[Tensor, ...]) -> None:
        first = not self.pair.inspected
        super()._prepare(batch)
        if first and self.pair.covariates(batch):
            raise ValueError("contrastive divergence takes no covariates")
        if first:
            refuse_edges(self.pair.support, "Langevin dynamics")
        if first and not self.pair.data(batch)[self._site()].is_floating_point():
            raise ValueError("Langevin dynamics needs continuous data: use method 'compositional', 'nce' or 'snl'")

    def _state_names(self) -> set[str]:
        return super()._state_names() | {"chains"}
