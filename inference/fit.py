"""The one optimisation loop: any module whose call returns a scalar loss, any torch optimiser and scheduler."""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import Parameter
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from inference._checks import count
from inference.results.brief import brief
from inference.runtime import distributed
from inference.runtime.generators import derive_seed
from inference.runtime.isolation import first_call, isolated, warn_unless_a_mean
from inference.runtime.optimization import OptimizationRun, Settings
from inference.runtime.progress import Progress

__all__ = ["FitResult", "fit"]

_DEFAULT_LR = 1e-3


@brief
@dataclass(frozen=True, eq=False)
class FitResult:
    """What a fit did. The parameters themselves are in the objective.

    Attributes:
        losses: training loss before each update, ``(num_steps,)``, on the CPU.
        learning_rates: rate of the optimiser's first parameter group at each update, ``(num_steps,)``.
        validation_losses: held-out losses, ``(validations,)``; empty without held-out data.
        validation_steps: the number of updates before each of them, ``(validations,)``; the first is 0.
        num_steps: updates made, those before a resume included.
        best_step: updates made when the held-out loss was lowest; None without held-out data.
        stopped_early: whether the patience ran out.
        interrupted: whether a KeyboardInterrupt ended the run.
        seconds: wall time, that before a resume included.
    """

    losses: Tensor
    learning_rates: Tensor
    validation_losses: Tensor
    validation_steps: Tensor
    num_steps: int
    best_step: int | None
    stopped_early: bool
    interrupted: bool
    seconds: float

    def summary(self) -> str:
        """One line on how it went."""
        text = f"{self.num_steps} steps in {self.seconds:.3g} s"
        if self.num_steps:
            tail = self.losses[-max(1, self.num_steps // 10) :].double().mean().item()
            text += f", loss {self.losses[0].item():.5g} -> {tail:.5g} (mean of the last tenth)"
        if self.best_step is not None:
            text += f", lowest validation loss {self.validation_losses.min().item():.5g} after step {self.best_step}"
        return text + ", stopped early" * self.stopped_early + ", interrupted" * self.interrupted


def fit(
    objective: nn.Module,
    data: Tensor | Sequence[Tensor] | None = None,
    *,
    num_steps: int | None = None,
    num_epochs: int | None = None,
    batch_size: int | None = None,
    optimizer: Callable[[Iterable[Parameter]], Optimizer] | None = None,
    lr: float = _DEFAULT_LR,
    scheduler: Callable[[Optimizer], LRScheduler] | None = None,
    clip_norm: float | None = None,
    validation: Tensor | Sequence[Tensor] | None = None,
    validate_every: int = 100,
    patience: int | None = None,
    average_last: float = 0.0,
    seed: int = 0,
    device: str | torch.device | None = None,
    checkpoint: str | Path | None = None,
    checkpoint_every: int = 1000,
    progress: bool | Callable[[dict[str, Any]], None] = True,
    description: str = "fit",
) -> FitResult:
    """Minimise ``objective(*batch)`` over ``objective.parameters()``, in place.

    The same seed on the same machine gives the same bits, resumed or not. What the objective draws comes from torch's
    global generators, which are seeded inside and put back after. The objective is called once before the first step,
    with random numbers of its own, so that parameters which only come to be in a call (Pyro's autoguides, lazy modules)
    are learned too. Pyro objectives such as ``Trace_ELBO()(model, guide)`` run with module-local parameters and a
    parameter store of their own. Modules train in the modes they are in; an objective that is in eval mode as a whole
    is in train mode during the fit.

    Under ``torchrun`` (or in a process group that the script has made) every rank calls ``fit`` with the same arguments
    and the whole data. Each takes its part of every batch, and losses and gradients are averaged with the rows as
    weights: the fit equals that of one process with the same ``batch_size`` to rounding if the loss is a mean over the
    batch's rows (a warning says where it is not) and no random number is drawn. What the objective draws is another
    stream on each rank; buffers are rank 0's, and batch statistics those of the rank's own rows. Validation, decisions
    and the result are alike on all ranks; rank 0 alone shows progress and writes the checkpoint, which as many ranks
    resume. Ctrl-C ends all ranks after the same update.

    Args:
        objective: its call takes the batch's tensors and returns a scalar loss.
        data: one tensor or several with the same number of rows, ``(rows, ...)`` each; None if the objective takes
            nothing. They are moved to the device whole.
        num_steps: number of updates. Give this or ``num_epochs``.
        num_epochs: number of passes over the rows.
        batch_size: rows in each update; None for all. Rows are shuffled anew in each epoch; a batch that the end of an
            epoch cuts is filled up from the next, so that all batches have one size and all rows serve equally often.
        optimizer: makes the optimiser from the parameters; an optimiser class is called with ``lr``. Adam if None.
        lr: learning rate of Adam or of the class given as ``optimizer``.
        scheduler: makes the learning rate's scheduler, which is stepped at each update; a ReduceLROnPlateau at each
            validation.
        clip_norm: the gradient is scaled down to this Euclidean norm where it is longer.
        validation: held-out tensors, as many as in ``data``. Their loss is the mean over chunks of ``batch_size`` rows,
            weighted by rows, in eval mode and without gradients (an objective that differentiates inside opens
            ``torch.enable_grad`` itself), with the same random numbers each time.
        validate_every: updates between two validations; there is one before the first update and one after the last.
        patience: stop after this many validations in a row without a new lowest loss. The parameters and buffers of
            the lowest are put back, however the run ends, but for buffers that the objective names in its
            ``record_buffers``, if it has that: records of the run. Without patience the last parameters stay.
        average_last: fraction of the updates, counted from the end, over which the parameters are averaged (Polyak and
            Juditsky, Acceleration of Stochastic Approximation by Averaging, 1992). 0 keeps the last parameters. What an
            objective estimates along the way belongs to the parameters of each step: its method
            ``refresh_after_average(*data)``, where it has one, is called once the average is in place, or the best
            parameters are.
        seed: names the shuffling and the objective's random numbers.
        device: where to run, ``"auto"`` for the accelerator if there is one; the objective is moved there. None: where
            the objective is, or the data if the objective has no parameters yet.
        checkpoint: file to save to and to resume from. A file of another run (arguments, shapes, data) is refused.
        checkpoint_every: updates between two saves; there is one at the start, at the end and at an interrupt as well.
        progress: True for a line on the terminal, False for none, or a function of a dictionary with ``step``,
            ``total``, ``loss`` (mean since the last call), ``learning_rate`` and, with held-out data,
            ``validation_loss``; called about twice a second.
        description: what is fitted, for the progress bar.

    Returns:
        The histories. A ``KeyboardInterrupt`` ends the run early and returns what there is.

    Raises:
        TypeError, ValueError: an argument does not fit; nothing was trained.
        NonFiniteError: a loss, gradient or parameter became NaN or infinite. The objective keeps the parameters from
            before that step.
        CheckpointError: the checkpoint is damaged, of another run, or cannot be written.
        RankError: another rank of the job is gone.

    Example:
        >>> class LeastSquares(torch.nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.slope = torch.nn.Parameter(torch.zeros(()))
        ...     def forward(self, x, y):
        ...         return (y - self.slope * x).square().mean()
        >>> x, objective = torch.linspace(-1, 1, 50), LeastSquares()
        >>> result = fit(objective, (x, 3 * x), num_steps=300, lr=0.1, progress=False)
        >>> round(objective.slope.item(), 2), result.num_steps
        (3.0, 300)
    """
    if not isinstance(objective, nn.Module):
        raise TypeError(
            f"objective must be a torch.nn.Module whose call returns a loss, got {type(objective).__name__}"
        )
    target = _device(device, objective, data)
    train = _tensors("data", data, target)
    held_out = _tensors("validation", validation, target)
    if held_out and len(held_out) != len(train):
        raise ValueError(f"validation holds {len(held_out)} tensors and data {len(train)}: they must match")
    size = _batch_size(batch_size, train)
    if (num_steps is None) == (num_epochs is None):
        raise ValueError(f"give one of num_steps and num_epochs, got num_steps={num_steps}, num_epochs={num_epochs}")
    if num_steps is not None:
        total = count("num_steps", num_steps)
    elif not train:
        raise ValueError("num_epochs counts passes over data and there is none: give num_steps")
    else:
        total = math.ceil(count("num_epochs", num_epochs) * len(train[0]) / size)
    if patience is not None and average_last:
        raise ValueError("patience puts back the best parameters and average_last an average: give one of them")
    if patience is not None and not held_out:
        raise ValueError("patience needs held-out data: give validation")
    settings = Settings(
        num_steps=total,
        batch_size=size,
        clip_norm=None if clip_norm is None else _positive("clip_norm", clip_norm),
        validate_every=count("validate_every", validate_every),
        patience=None if patience is None else count("patience", patience),
        average_from=total - math.ceil(_fraction("average_last", average_last) * total),
        seed=seed,
        device=target,
    )
    every = count("checkpoint_every", checkpoint_every)
    derive_seed(seed)  # refuses a seed that is no integer
    rate = _positive("lr", lr)
    if device is not None:
        objective.to(target)
    if train:
        distributed.shard(size, "rows of a batch")  # refuses more ranks than rows
    if not distributed.is_main():
        progress = False
    with isolated(objective, settings), Progress(total, description, progress) as bar:
        loss_dtype = first_call(objective, train, settings)
        warn_unless_a_mean(objective, train, settings)
        made, schedule = _make_optimizer(objective, optimizer, rate, scheduler, bool(held_out))
        run = OptimizationRun(objective, made, schedule, train, held_out, settings, loss_dtype)
        run.join_ranks()
        if checkpoint is not None:
            run.open_checkpoint(Path(checkpoint), every)
        interrupted = run.run(bar)
        run.finish()
    return FitResult(
        losses=run.losses[: run.step].clone(),
        learning_rates=run.rates[: run.step].clone(),
        validation_losses=torch.tensor([loss for _, loss in run.validations], dtype=run.losses.dtype),
        validation_steps=torch.tensor([step for step, _ in run.validations], dtype=torch.long),
        num_steps=run.step,
        best_step=run.best_step,
        stopped_early=run.stopped,
        interrupted=interrupted,
        seconds=run.elapsed(),
    )


def _make_optimizer(
    objective: nn.Module,
    factory: Callable[[Iterable[Parameter]], Optimizer] | None,
    lr: float,
    schedule: Callable[[Optimizer], LRScheduler] | None,
    validated: bool,
) -> tuple[Optimizer, LRScheduler | None]:
    parameters = [p for p in objective.parameters() if p.requires_grad]
    if factory is None:
        optimizer: Optimizer = torch.optim.Adam(parameters, lr=lr)
    elif not callable(factory):
        raise TypeError(f"optimizer must be a function from parameters to a torch optimiser, got {factory!r}")
    elif isinstance(factory, type):
        optimizer = factory(parameters, lr=lr)
    elif lr != _DEFAULT_LR:
        raise ValueError(f"lr={lr} would not be used: set it inside the function given as optimizer")
    else:
        optimizer = factory(parameters)
    if not isinstance(optimizer, Optimizer):
        raise TypeError(f"optimizer must return a torch.optim.Optimizer, it returned {type(optimizer).__name__}")
    made = None if schedule is None else schedule(optimizer)
    if made is not None and not isinstance(made, LRScheduler):
        raise TypeError(
            f"scheduler must return a torch.optim.lr_scheduler.LRScheduler, it returned {type(made).__name__}"
        )
    if isinstance(made, ReduceLROnPlateau) and not validated:
        raise ValueError("ReduceLROnPlateau follows the held-out loss: give validation")
    return optimizer, made


def _device(device: str | torch.device | None, objective: nn.Module, data: Any) -> torch.device:
    if device == "auto":
        accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
        return distributed.own_device(accelerator or torch.device("cpu"))
    if device is not None:
        return torch.device(device)
    first = next((p for p in [*objective.parameters(), *objective.buffers()]), None)
    if first is not None:
        return first.device
    candidates = [data] if isinstance(data, Tensor) else data if isinstance(data, list | tuple) else []
    return next((x.device for x in candidates if isinstance(x, Tensor)), torch.device("cpu"))


def _tensors(name: str, values: Any, device: torch.device) -> tuple[Tensor, ...]:
    """The tensors on the device, checked: some rows, as many in each, all finite. Empty for None."""
    if values is None:
        return ()
    found = (values,) if isinstance(values, Tensor) else values
    if not isinstance(found, list | tuple) or not found or not all(isinstance(x, Tensor) for x in found):
        raise TypeError(
            f"{name} must be a tensor or a list of tensors, got {type(values).__name__} (torch.as_tensor helps)"
        )
    shapes = [tuple(x.shape) for x in found]
    if any(x.dim() == 0 for x in found) or len({shape[0] for shape in shapes}) > 1:
        raise ValueError(
            f"the tensors in {name} must have the same number of rows (first dimension), got shapes {shapes}"
        )
    if shapes[0][0] == 0:
        raise ValueError(f"{name} has no rows: shapes {shapes}")
    for index, x in enumerate(found):
        if not torch.isfinite(x).all():
            raise ValueError(f"{name} holds NaN or infinite values (tensor {index}): remove or impute them")
    return tuple(x.detach().to(device) for x in found)


def _batch_size(batch_size: int | None, data: tuple[Tensor, ...]) -> int:
    if not data:
        if batch_size is not None:
            raise ValueError(f"batch_size={batch_size} needs data: there is none to take rows from")
        return 0
    if batch_size is None:
        return len(data[0])
    size = count("batch_size", batch_size)
    if size > len(data[0]):
        raise ValueError(f"batch_size={size} is larger than the data, which has {len(data[0])} rows")
    return size


def _number(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{name} must be a number, got {value!r}")
    return float(value)


def _positive(name: str, value: Any) -> float:
    number = _number(name, value)
    if not 0 < number < math.inf:
        raise ValueError(f"{name} must be positive and finite, got {value!r}")
    return number


def _fraction(name: str, value: Any) -> float:
    number = _number(name, value)
    if not 0 <= number <= 1:
        raise ValueError(f"{name} must be between 0 and 1, got {value!r}")
    return number
