"""What a fit of a pairwise model is made of: its conditionals as a function of the progress, and its optimiser."""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import Parameter
from torch.optim import Adam, Optimizer
from torch.optim.lr_scheduler import LRScheduler, OneCycleLR

from inference.fit import FitResult
from inference.fixed_point import cheap_to_read
from inference.newton_cg import newton_cg
from inference.results.brief import brief
from inference.results.export import to_arviz
from ppl_models.base import check_batch_size
from ppl_models.monotone_dbm.batch_newton import fits, solve_batch
from ppl_models.monotone_dbm.mean_field import solve
from ppl_models.monotone_dbm.pairwise import PairwiseModel, Query

__all__ = ["DBMFit", "check_run", "conditional_of", "slow_temperatures", "to_query"]

_LOOSE, _TIGHT = 3e-2, 3e-3  # residual that is asked of the solver at the start of a fit, and at its end
_ADJOINT = 1e-2  # relative residual of the gradient's linear system; the minibatch's noise is far above it
_UPDATES = 10  # where the device is not waited for
_STEPS, _INNER = 6, 12  # the same of Newton's method, and products in each step
_FINE = 1e-3  # rate of parameters that EM has learned
_BACK = 16  # products for the gradient there; 9 to 12 reach _ADJOINT


@brief
@dataclass(frozen=True, eq=False)
class DBMFit:
    """How a fit went.

    Attributes:
        history: losses, rates, validation and time, as ``inference.fit`` gives them.
        objective: what was minimised.
    """

    history: FitResult
    objective: str

    @property
    def losses(self) -> Tensor:
        """Training loss before each update, ``(num_steps,)``."""
        return self.history.losses

    def summary(self) -> str:
        """One line on how it went."""
        return f"{self.objective}: {self.history.summary()}"

    def to_arviz(self) -> Any:
        """The history as ArviZ's sample_stats: ``loss`` and ``learning_rate``, one chain, a draw an update."""
        stats = {"loss": self.history.losses[None], "learning_rate": self.history.learning_rates[None]}
        return to_arviz(sample_stats=stats, attrs={"objective": self.objective})


def check_run(rows: int, batch_size: int | None, lr: object) -> int | None:
    """The rows in a step, None for all.

    Raises:
        TypeError, ValueError: more of them than there are, or a bad rate.
    """
    if isinstance(lr, bool) or not isinstance(lr, int | float) or not 0 < lr < math.inf:
        raise ValueError(f"lr must be positive and finite, got {lr!r}")
    return check_batch_size(batch_size, rows, 96)


def to_query(model: PairwiseModel, visible: Tensor, states: Tensor, shown: Tensor) -> Query:
    """Observations of the visible groups as those of all groups."""
    rows, count = len(states), model.groups.num_groups
    full = torch.zeros(rows, count, dtype=torch.long, device=states.device)
    full = full.index_copy(1, visible, torch.where(shown, states, torch.zeros_like(states)))
    mask = torch.zeros(rows, count, dtype=torch.bool, device=states.device).index_copy(1, visible, shown)
    return Query(full, mask)


def mean_field_logits(model: PairwiseModel, query: Query, progress: Tensor) -> Tensor:
    """Differentiable tempered logits ``(B, N)`` at a tolerance that tightens as the fit goes on."""
    cases = query if model.summed is None else model.all_cases(query)
    phi = model.phi_of(cases)
    problem = model.problem(phi.detach(), cases)
    waits = cheap_to_read(progress)
    with torch.no_grad():
        if waits:
            tolerance = _LOOSE * (_TIGHT / _LOOSE) ** float(progress)
            found = solve(problem, phi.detach(), tolerance=tolerance)
        elif fits(phi):
            parts = (model.groups, problem.bias, problem.clamped, problem.free)
            found = solve_batch(phi.detach(), *parts, tolerance=None, max_iterations=_UPDATES)
        else:
            start = problem.first_logits()
            found = newton_cg(problem, start, tolerance=None, max_iterations=_STEPS, max_inner=_INNER)
    logits = model.attach(phi, problem, found, tolerance=_ADJOINT, wait=waits, max_iterations=400 if waits else _BACK)
    if cases is query:
        return model.tempered(logits)
    return model.mixed(query, cases, phi, logits, model.energies(phi, problem, logits))


def conditional_of(
    model: PairwiseModel, visible: Tensor, annealed: float = 0.0
) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """Tempered conditionals of the visible groups, as ``MaskedConditionals`` asks for them.

    Args:
        model: the model.
        visible: groups with data, ``(V,)``.
        annealed: share of the fit over which the bound is widened from half of it to the whole: a flatter problem
            first.
    """

    entries, inside = model.groups.entries(visible)

    def conditional(states: Tensor, shown: Tensor, progress: Tensor) -> Tensor:
        if annealed:
            model.operator.share = (0.5 + 0.5 * progress / annealed).clamp(max=1.0)
        logits = mean_field_logits(model, to_query(model, visible, states, shown), progress)
        made = logits.index_select(1, entries.flatten()).unflatten(1, entries.shape)
        return made.masked_fill(~inside, -torch.inf)

    return conditional


def slow_temperatures(
    model: PairwiseModel, lr: float, rate: float = 0.25
) -> Callable[[Iterable[Parameter]], Optimizer]:
    """Adam whose rate for the temperatures is ``rate`` times that of the rest, and for parameters that were learned
    before at most ``_FINE``.
    """
    slow = {id(model.log_temperature)}
    fine = {id(p) for p in model.operator.learned_before()} if lr > _FINE else set()

    def make(parameters: Iterable[Parameter]) -> Optimizer:
        given = list(parameters)
        rest = [p for p in given if id(p) not in slow | fine]
        groups: list[dict[str, Any]] = [{"params": rest, "lr": lr}]
        for some, at in ((slow, rate * lr), (fine, _FINE)):
            if kept := [p for p in given if id(p) in some]:
                groups.append({"params": kept, "lr": at})
        return Adam(groups, betas=(0.9, 0.99))

    return make


def one_cycle(num_steps: int) -> Callable[[Optimizer], LRScheduler]:
    """Rates that rise over the first tenth and fall along a cosine."""

    def make(optimizer: Optimizer) -> LRScheduler:
        rates = [group["lr"] for group in optimizer.param_groups]
        return OneCycleLR(optimizer, rates, total_steps=num_steps + 1, pct_start=0.1, cycle_momentum=False)

    return make


def frozen(model: nn.Module, names: Sequence[str]) -> list[Parameter]:
    """Parameters that are not to be learned, switched off; the caller switches them on again."""
    chosen = [p for n, p in model.named_parameters() if n in names and p.requires_grad]
    for p in chosen:
        p.requires_grad_(False)
    return chosen
