"""What the ranks of ``torchrun`` run in the tests of many processes: fits, each of which says how it went."""

import os
import signal
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from inference._errors import RankError
from inference.fit import fit
from inference.runtime import distributed
from tests.inference.fit_cases import F64, QUIET, LeastSquares, Noisy, regression, state

FITS: dict[str, dict[str, Any]] = {
    # 61 rows and batches of 7: shards of 4 and 3 rows, and batches that an epoch cuts
    "minibatches": dict(num_steps=60, batch_size=7, lr=0.05, clip_norm=0.5),
    "whole data": dict(num_steps=40, optimizer=torch.optim.SGD, lr=0.1, average_last=0.5),
    "quasi-newton": dict(num_steps=4, optimizer=lambda p: torch.optim.LBFGS(p, line_search_fn="strong_wolfe")),
    "early stopping": dict(num_steps=400, batch_size=9, lr=0.2, validation=True, validate_every=5, patience=3),
}


def least_squares(name: str, **more: Any) -> dict[str, Any]:
    data = regression(61)
    keywords = {**FITS[name], **QUIET, **more}
    if keywords.pop("validation", False):
        keywords["validation"] = tuple(values[:25] for values in data)
    objective = LeastSquares()
    result = fit(objective, data, **keywords)
    return {**outcome(objective, result), "validation": result.validation_losses, "best": result.best_step}


def outcome(objective: nn.Module, result: Any) -> dict[str, Any]:
    return {"state": state(objective), "losses": result.losses, "steps": result.num_steps}


def noisy(checkpoint: Path | None = None, objective: nn.Module | None = None, **more: Any) -> dict[str, Any]:
    objective = objective or Noisy()
    keywords = dict(num_steps=40, batch_size=9, checkpoint=checkpoint, checkpoint_every=7) | QUIET | more
    result = fit(objective, regression(dtype=torch.float32), **keywords)
    return {**outcome(objective, result), "interrupted": result.interrupted}


class Struck(Noisy):
    """At a call, something happens to a rank."""

    def __init__(self, call: int, strike: Callable[[], None]):
        super().__init__()
        self.call, self.strike, self.calls = call, strike, 0

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        self.calls += 1
        if self.calls == self.call:
            self.strike()
        return super().forward(x, y)


def only_on(rank: int, number: signal.Signals) -> Callable[[], None]:
    return lambda: os.kill(os.getpid(), number) if distributed.rank() == rank else None


def never() -> Struck:
    return Struck(-1, lambda: None)


class NaNOnRank1(nn.Module):
    """The weight falls by a half a step and meets the edge in step 5, on one rank alone."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros((), dtype=F64))

    def forward(self, rows: Tensor) -> Tensor:
        return torch.where(self.weight < -1.9 - 100 * (distributed.rank() == 0), torch.nan, 1.0) * self.weight


class HalfUsed(nn.Module):
    """One parameter has a gradient on rank 1 alone, another on none."""

    def __init__(self) -> None:
        super().__init__()
        self.all, self.one, self.none = (nn.Parameter(torch.ones((), dtype=F64)) for _ in range(3))

    def forward(self, rows: Tensor) -> Tensor:
        loss = self.all * rows.mean()
        return loss + self.one if distributed.rank() == 1 else loss


class Summed(LeastSquares):
    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return (y - x @ self.weight).square().sum()


class PerRow(LeastSquares):
    """A mean over rows with a draw for each: its loss at twice the rows is another, but on average the same."""

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return (y - x @ self.weight + torch.randn(len(y), dtype=F64)).square().mean()


def error_of(function: Callable[[], Any]) -> str:
    try:
        function()
    except (ValueError, ArithmeticError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}"
    return "none"


def fit_cases(folder: Path) -> dict[str, Any]:
    rank = distributed.rank()
    found: dict[str, Any] = {name: least_squares(name) for name in FITS}

    apart = LeastSquares()
    with torch.no_grad():
        apart.weight += rank  # as when a script forgets to seed
    fit(apart, regression(61), **{**FITS["minibatches"], **QUIET})
    found["different starts"] = state(apart)

    whole = noisy()
    stopped = noisy(folder / "interrupt", Struck(19, only_on(1, signal.SIGINT)))
    found["interrupt"] = {"whole": whole, "stopped": stopped, "resumed": noisy(folder / "interrupt", never())}
    found["after"] = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    found["streams"] = streams()

    half = HalfUsed()
    fit(half, torch.ones(4, dtype=F64), num_steps=3, optimizer=lambda p: torch.optim.SGD(p, lr=0.1, weight_decay=0.1),
        **QUIET)  # fmt: skip
    found["unused"] = state(half)

    rows = torch.ones(8, dtype=F64)
    found["errors"] = {
        "nan": error_of(lambda: fit(NaNOnRank1(), rows, num_steps=20, optimizer=torch.optim.SGD, lr=0.5, **QUIET)),
        "data": error_of(lambda: fit(LeastSquares(), regression(60 + rank), num_steps=3, batch_size=4, **QUIET)),
        "rows": error_of(lambda: fit(LeastSquares(), regression(), num_steps=3, batch_size=1, **QUIET)),
        "barrier": "none" if rank else error_of(lambda: distributed.barrier(0.05)),
    }
    reports: list[int] = []
    for name, objective in {"sum": Summed(), "mean": LeastSquares(), "per row": PerRow()}.items():
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            fit(objective, regression(), num_steps=2, progress=lambda event: reports.append(event["step"]))
        found[f"warnings of {name}"] = [str(w.message) for w in caught]
    found["reports"] = reports
    found["helpers"] = helpers()
    return found


def streams() -> Tensor:
    """What an objective draws on this rank."""
    drawn: list[Tensor] = []

    class Draws(LeastSquares):
        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            drawn.append(torch.rand(3))
            return super().forward(x, y)

    fit(Draws(), regression(), num_steps=2, **QUIET)
    return torch.stack(drawn)[-2:]  # the updates'


def helpers() -> dict[str, Any]:
    rank = distributed.rank()
    return {
        "shard": list(distributed.shard(5)),
        "sum": distributed.sum_over_ranks(torch.tensor([1.0, 10.0**rank])),
        "rows": distributed.gather_rows(torch.full((2 + rank, 2), bool(rank)), to_all=True),
        "main": distributed.gather_rows(torch.arange(3) + rank),
        "plain": distributed.broadcast_plain({"a": [rank, None, 0.1]}),
        "error": error_of(lambda: distributed.shard(1)),
    }


def killed_fit(folder: Path) -> dict[str, Any]:
    """Rank 1 kills itself in the first attempt; torchrun starts both again and they go on from the checkpoint."""
    first = not (folder / "struck").exists()
    distributed.barrier()
    if first and distributed.rank() == 1:
        (folder / "struck").touch()
    objective = Struck(31, only_on(1, signal.SIGKILL)) if first else never()
    try:
        found = noisy(folder / "run", objective)
    except RankError as error:
        (folder / "error").write_text(str(error))
        raise
    undisturbed = never()
    return {"resumed": found, "whole": noisy(objective=undisturbed), "calls": [objective.calls, undisturbed.calls]}


CASES: dict[str, Callable[[Path], dict[str, Any]]] = {"fit": fit_cases, "killed_fit": killed_fit}
