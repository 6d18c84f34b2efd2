"""What an optimisation run is made of: its state, one update, blocks of updates, validation, capture and restore.

Nothing is read back from the device while updates run: the losses and the largest gradient entries stay there and are
read once a block of about half a second.  A block that met a NaN or an infinity is run again from its start with a look
at each step, so that the error names the step and the parameter.

With several ranks each takes its part of every batch, and losses, gradients and buffers are made one before anything
looks at them: what follows (clipping, the optimiser, the guard, early stopping) then goes alike on all.  This is one
sum of a flat buffer rather than ``DistributedDataParallel``, whose hooks exclude what objectives here do in their
forward: train a critic with gradients of their own, call captured graphs, leave out parameters now and then.
"""

import copy
import math
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_, get_total_norm
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from inference._errors import CheckpointError, NonFiniteError
from inference.runtime import distributed
from inference.runtime.checkpoint import fingerprint, flatten_state, load_checkpoint, save_checkpoint, unflatten_state
from inference.runtime.generators import derive_seed, generator, scoped_seed
from inference.runtime.progress import Progress

__all__ = ["OptimizationRun", "Settings", "own_rows", "scalar_loss"]

_BLOCK_SECONDS = 0.5  # between two looks at the losses; an interrupt loses at most this much work, or one step
_BLOCK_STEPS = 4096
_ADVICE = (
    "the objective keeps the parameters from before it; a smaller lr or a clip_norm may help, or a look at the data"
)


@dataclass(frozen=True)
class Settings:
    """The checked arguments that make a run what it is."""

    num_steps: int
    batch_size: int
    clip_norm: float | None
    validate_every: int
    patience: int | None
    average_from: int
    seed: int
    device: torch.device


def own_rows(settings: Settings) -> range:
    """Which rows of each batch are this rank's."""
    return distributed.shard(settings.batch_size, "rows of a batch")


class OptimizationRun:
    """The state of a run, and the steps that change it.

    ``capture`` and ``restore`` serve interrupts, replays and checkpoints alike, so that all three see the same state.
    """

    def __init__(
        self,
        objective: nn.Module,
        optimizer: Optimizer,
        scheduler: LRScheduler | None,
        data: tuple[Tensor, ...],
        validation: tuple[Tensor, ...],
        settings: Settings,
        loss_dtype: torch.dtype,
    ) -> None:
        self.objective, self.optimizer, self.scheduler = objective, optimizer, scheduler
        self.data, self.validation, self.settings = data, validation, settings
        self.parameters = [(name, p) for name, p in objective.named_parameters() if p.requires_grad]
        self.step = 0
        self.losses = torch.empty(settings.num_steps, dtype=loss_dtype)
        self.rates = torch.empty(settings.num_steps, dtype=torch.float64)
        self.average: list[Tensor] = []
        self.validations: list[tuple[int, float]] = []
        self.best: dict[str, Any] | None = None
        self.best_step: int | None = None
        self.best_loss = math.inf
        self.stale = 0
        self.stopped = False
        self.seconds = 0.0
        self._started = time.perf_counter()
        self._checkpoint: Path | None = None
        self._every = settings.num_steps
        self._identity: dict[str, str] = {}
        self._permutations: dict[int, Tensor] = {}
        self._norms: list[Tensor] = []
        self._strict = False
        self.own = own_rows(settings) if data else range(0)
        self._weight = len(self.own) / settings.batch_size if data else 1.0 / distributed.world_size()

    # -- one update

    def batch(self, step: int) -> tuple[Tensor, ...]:
        """This rank's rows of an update: a function of the seed and the step, so no shuffling state has to be saved."""
        size, own = self.settings.batch_size, self.own
        if not self.data or size == len(self.data[0]):
            return tuple(values[own.start : own.stop] for values in self.data)
        epoch, offset = divmod(step * size, len(self.data[0]))
        rows = self._permutation(epoch)[offset : offset + size]
        if len(rows) < size:
            rows = torch.cat([rows, self._permutation(epoch + 1)[: size - len(rows)]])
        return tuple(values.index_select(0, rows[own.start : own.stop]) for values in self.data)

    def _permutation(self, epoch: int) -> Tensor:
        if epoch not in self._permutations:
            device = self.settings.device
            shuffle = generator(self.settings.seed, "epoch", epoch, device=device)
            kept = {e: rows for e, rows in self._permutations.items() if e == epoch - 1}
            self._permutations = kept | {epoch: torch.randperm(len(self.data[0]), generator=shuffle, device=device)}
        return self._permutations[epoch]

    def update(self) -> Tensor:
        """One step of the optimiser; the loss before it, still on the device."""
        batch = self.batch(self.step)
        losses: list[Tensor] = []

        def closure() -> Tensor:
            for _, p in self.parameters:
                p.grad = None
            loss = scalar_loss(self.objective, batch)
            loss.backward()
            loss = self._pool(loss.detach())
            losses.append(loss)
            self._watch_gradients(loss)
            return loss

        self.optimizer.step(closure)  # type: ignore[arg-type]  # torch takes a tensor as well
        if self._strict:
            for name, p in self.parameters:
                if not torch.isfinite(p).all():
                    raise NonFiniteError(f"parameter {name!r} became NaN or infinite in {self._where()}; {_ADVICE}")
        if self.scheduler is not None and not isinstance(self.scheduler, ReduceLROnPlateau):
            self.scheduler.step()
        self.step += 1
        self._average()
        return losses[0]

    def _pool(self, loss: Tensor) -> Tensor:
        """The ranks' mean loss, weighted by rows; the gradients likewise, and rank 0's buffers, are put in place."""
        if distributed.world_size() == 1:
            return loss
        for name, p in self.parameters:
            if p.grad is not None and p.grad.layout != torch.strided:
                raise ValueError(
                    f"the gradient of {name!r} is sparse and cannot be averaged over ranks: use sparse=False"
                )
        # Which parameters have a gradient is known to the host: a tensor there costs no look at the device.
        present = torch.tensor([float(p.grad is not None) for _, p in self.parameters], device="cpu", dtype=loss.dtype)
        gradients = [p.new_zeros(p.shape) if p.grad is None else p.grad * self._weight for _, p in self.parameters]
        buffers = [b for b in self.objective.buffers() if b.dtype != torch.bool]
        # A sum with zeros is rank 0's value to the bit, so that constants do not drift.
        shared = [b if distributed.is_main() else torch.zeros_like(b) for b in buffers]
        loss, anywhere, *pooled = distributed.sum_flat([loss * self._weight, present, *gradients, *shared])
        for (_, p), gradient, used in zip(self.parameters, pooled, anywhere.tolist(), strict=False):
            p.grad = gradient if used else None
        with torch.no_grad():
            for b, value in zip(buffers, pooled[len(gradients) :], strict=True):
                b.copy_(value)
        return loss

    def _watch_gradients(self, loss: Tensor) -> None:
        """Note the gradient's norm (and clip); where the trouble is known to be near, look at each parameter."""
        gradients = {name: _entries(p.grad) for name, p in self.parameters if p.grad is not None and p.grad.numel()}
        if self._strict:
            bad = [name for name, g in gradients.items() if not torch.isfinite(g).all()]
            if bad or not torch.isfinite(loss):
                place = (
                    f"the gradient of parameter {bad[0]!r} is NaN or infinite" if bad else "every gradient is finite"
                )
                raise NonFiniteError(f"the loss is {loss.item():g} and {place} in {self._where()}; {_ADVICE}")
        if self.settings.clip_norm is not None:
            norm = clip_grad_norm_([p for _, p in self.parameters], self.settings.clip_norm)
            if self._strict and not torch.isfinite(norm):
                raise NonFiniteError(f"the gradient's norm overflows its dtype in {self._where()}; {_ADVICE}")
            self._norms.append(norm)
        elif gradients:
            self._norms.append(get_total_norm(gradients.values(), math.inf))

    def _where(self) -> str:
        return f"step {self.step + 1} of {self.settings.num_steps}"

    def _average(self) -> None:
        count = self.step - self.settings.average_from
        if count == 1:
            wide = {torch.float16: torch.float32, torch.bfloat16: torch.float32}
            self.average = [p.detach().to(wide.get(p.dtype, p.dtype), copy=True) for _, p in self.parameters]
        elif count > 1:
            for mean, (_, p) in zip(self.average, self.parameters, strict=True):
                mean.lerp_(p.detach().to(mean.dtype), 1.0 / count)

    # -- blocks of updates

    def run(self, bar: Progress) -> bool:
        """Go on to the end; whether an interrupt ended it."""
        total, block = self.settings.num_steps, 1
        good = self.capture()
        try:
            with distributed.ending_together() as ending:
                if self.validation and not self.validations:
                    self._validate()
                    good = self.capture()
                if self.step == 0:
                    self._save(good)
                while self.step < total and not self.stopped:
                    first, clock = self.step, time.perf_counter()
                    end = min(total, first + block, self._due(self._every))
                    if self.validation:
                        end = min(end, self._due(self.settings.validate_every))
                    self._advance(end, good)
                    taken = max(time.perf_counter() - clock, 1e-6) / (end - first)
                    # The ranks' clocks differ, and a block that is run again must be the same on all.
                    block = distributed.broadcast_plain(
                        max(1, min(2 * block, _BLOCK_STEPS, int(_BLOCK_SECONDS / taken)))
                    )
                    if self.validation and (end % self.settings.validate_every == 0 or end == total):
                        self._validate()
                    good = self.capture()
                    if end % self._every == 0 or end == total or self.stopped:
                        self._save(good)
                    try:
                        bar.update(end, **self._fields(first))
                    except KeyboardInterrupt:
                        ending.requested = True
                    if ending.agreed():
                        self._save(good)
                        return True
        except KeyboardInterrupt:
            if distributed.world_size() > 1:  # the others wait in the middle of this update and cannot be joined again
                raise
            # the interrupt may have come in the middle of an update: go back to the last state that is whole
            self.restore(good)
            self._save(good)
            return True
        return False

    def _due(self, every: int) -> int:
        return (self.step // every + 1) * every

    def _fields(self, first: int) -> dict[str, float]:
        fields = {"loss": self.losses[first : self.step].double().mean().item(), "learning_rate": self._rate()}
        return fields | ({"validation_loss": self.validations[-1][1]} if self.validations else {})

    def _rate(self) -> float:
        return float(self.optimizer.param_groups[0]["lr"])

    def _advance(self, end: int, good: dict[str, Any]) -> None:
        first = self.step
        losses, rates, self._norms = [], [], []
        while self.step < end:
            rate = self.optimizer.param_groups[0]["lr"]
            rates.append(rate.clone() if isinstance(rate, Tensor) else rate)
            losses.append(self.update())
        stacked = torch.stack(losses)
        values = [p.detach() for _, p in self.parameters if p.numel()]
        finite = torch.isfinite(stacked).all() & torch.isfinite(get_total_norm(values, math.inf))
        if self._norms:
            finite &= torch.isfinite(torch.stack(self._norms)).all()
        if not finite:
            self._locate(end, good)
        self.losses[first:end] = stacked.cpu()
        self.rates[first:end] = torch.tensor([float(rate) for rate in rates], dtype=torch.float64)

    def _locate(self, end: int, good: dict[str, Any]) -> None:
        """Run the block again and look at each step; always raises, with the state from before the step at fault."""
        self.restore(good)
        self._strict = True
        while self.step < end:
            before = self.capture()
            try:
                self.update()
            except NonFiniteError:
                self.restore(before)
                raise
        self.restore(good)
        raise NonFiniteError(
            f"a loss, gradient or parameter was NaN or infinite between steps {self.step + 1} and {end}, and was not "
            "when these steps were run again: the objective depends on more than its tensors and torch's random numbers"
        )

    # -- held-out data

    def _validate(self) -> None:
        loss = distributed.broadcast_plain(self._held_out())
        if math.isnan(loss):
            raise NonFiniteError(
                f"the validation loss after step {self.step} is NaN although the parameters are finite"
            )
        self.validations = [*self.validations, (self.step, loss)]
        if self.best_step is None or loss < self.best_loss:
            self.best_loss, self.best_step, self.stale = loss, self.step, 0
            if self.settings.patience is not None:
                self.best = self._values()
        else:
            self.stale += 1
        self.stopped = self.settings.patience is not None and self.stale >= self.settings.patience
        if isinstance(self.scheduler, ReduceLROnPlateau) and self.step:
            self.scheduler.step(loss)

    def _held_out(self) -> float:
        rows, size = len(self.validation[0]), self.settings.batch_size
        seed = derive_seed(self.settings.seed, "validation")
        modes = {module: module.training for module in self.objective.modules()}
        self.objective.eval()
        try:
            with torch.no_grad(), scoped_seed(seed, self.settings.device):
                losses = []
                for start in range(0, rows, size):
                    chunk = tuple(values[start : start + size] for values in self.validation)
                    losses.append(scalar_loss(self.objective, chunk) * len(chunk[0]))
        finally:
            for module, mode in modes.items():
                module.training = mode
        return float(torch.stack(losses).cpu().double().sum()) / rows

    # -- the whole state, for replays, interrupts and files

    def _values(self) -> dict[str, Any]:
        return {
            "parameters": {name: p.detach().clone() for name, p in self.objective.named_parameters()},
            "buffers": {name: b.detach().clone() for name, b in self.objective.named_buffers()},
        }

    def _set_values(self, values: dict[str, Any], leave: Iterable[str] = ()) -> None:
        with torch.no_grad():
            for name, p in self.objective.named_parameters():
                p.copy_(values["parameters"][name])
            for name, b in self.objective.named_buffers():
                if name in leave:
                    continue
                saved = values["buffers"][name]
                if b.shape == saved.shape:
                    b.copy_(saved)
                else:
                    path, _, last = name.rpartition(".")
                    self.objective.get_submodule(path).register_buffer(last, saved.to(b.device, copy=True))

    def capture(self) -> dict[str, Any]:
        """Copies of all that the coming updates depend on."""
        kind = self.settings.device.type
        random = {"cpu": torch.get_rng_state()}
        if kind not in ("cpu", "meta"):
            random[kind] = getattr(torch, kind).get_rng_state(self.settings.device)
        return {
            **self._values(),
            "optimizer": copy.deepcopy(self.optimizer.state_dict()),
            "scheduler": None if self.scheduler is None else copy.deepcopy(self.scheduler.state_dict()),
            "random": random,
            "average": [mean.clone() for mean in self.average],
            "step": self.step,
            "validations": self.validations,
            "best": self.best,
            "best_step": self.best_step,
            "best_loss": self.best_loss,
            "stale": self.stale,
            "stopped": self.stopped,
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Go back to a captured state, which stays as it is."""
        self._set_values(state)
        self.optimizer.load_state_dict(copy.deepcopy(state["optimizer"]))
        if self.scheduler is not None:
            self.scheduler.load_state_dict(copy.deepcopy(state["scheduler"]))
        for kind, random in state["random"].items():
            if kind == "cpu":
                torch.set_rng_state(random)
            else:
                getattr(torch, kind).set_rng_state(random, self.settings.device)
        self.average = [
            mean.to(p.device, copy=True) for mean, (_, p) in zip(state["average"], self.parameters, strict=False)
        ]
        for name in ("step", "validations", "best", "best_step", "best_loss", "stale", "stopped"):
            setattr(self, name, state[name])

    def join_ranks(self) -> None:
        """Make sure that all ranks were given the same, and start them from rank 0's parameters and buffers."""
        if distributed.world_size() == 1:
            return
        distributed.require_same(self._describe())
        distributed.broadcast([*self.objective.parameters(), *self.objective.buffers()])

    def open_checkpoint(self, path: Path, every: int) -> None:
        """Save to this file from now on, and go on from what it holds if it is of this run."""
        self._checkpoint, self._every = path, every
        self._identity = self._describe()
        found = distributed.from_main(lambda: load_checkpoint(path, kind="fit"))
        if found is None:
            return
        tensors, meta = found
        theirs = meta.get("run", {})
        differing = sorted(n for n in theirs | self._identity if theirs.get(n) != self._identity.get(n))
        if differing:
            raise CheckpointError(
                f"checkpoint {path} is of another run (different: {', '.join(differing)}). Give the same arguments to "
                "resume it, another path to keep it, or delete it to start afresh."
            )
        state = unflatten_state(tensors, meta["state"])
        if distributed.world_size() > 1:  # cloned, as torch's generator reads a view's memory from its base's start
            state["random"] = {kind: rows[distributed.rank()].clone() for kind, rows in state["random"].items()}
        self.restore(state)
        self.losses[: self.step], self.rates[: self.step] = state["losses"], state["rates"]
        self.seconds = state["seconds"]

    def _save(self, state: dict[str, Any]) -> None:
        if self._checkpoint is None:
            return
        step, path, random = state["step"], self._checkpoint, state["random"]
        if distributed.world_size() > 1:  # the random streams are all that the ranks do not share
            random = {kind: distributed.gather_rows(value.unsqueeze(0)) for kind, value in random.items()}
        histories = {"losses": self.losses[:step], "rates": self.rates[:step], "seconds": self.elapsed()}

        def write() -> None:
            tensors, packed = flatten_state({**state, "random": random, **histories})
            save_checkpoint(path, tensors, {"run": self._identity, "state": packed}, kind="fit")

        distributed.from_main(write)

    def _describe(self) -> dict[str, str]:
        """What makes this run this one; the optimiser by its class and settings, as code cannot be compared."""
        named = [*self.objective.named_parameters(), *self.objective.named_buffers()]
        groups = [{k: v for k, v in group.items() if k != "params"} for group in self.optimizer.param_groups]
        schedule = {} if self.scheduler is None else self.scheduler.state_dict()
        settings = {**vars(self.settings), "device": self.settings.device.type, "validation": bool(self.validation)}
        return {
            "settings": fingerprint(settings),
            "objective": fingerprint(type(self.objective), [(n, v.dtype, v.shape, v.requires_grad) for n, v in named]),
            "optimizer": fingerprint(type(self.optimizer), [_identify(group) for group in groups]),
            "scheduler": fingerprint(type(self.scheduler), _identify(schedule)),
            "data": fingerprint(self.data),
            "validation": fingerprint(self.validation),
            **({"ranks": str(distributed.world_size())} if distributed.world_size() > 1 else {}),
        }

    def elapsed(self) -> float:
        """Wall time in seconds, that before a resume included."""
        return self.seconds + time.perf_counter() - self._started

    def finish(self) -> None:
        """Put the parameters in place that the caller asked for: the best, the averaged or the last."""
        for _, p in self.parameters:
            p.grad = None
        with torch.no_grad():
            for mean, (_, p) in zip(self.average, self.parameters, strict=False):
                p.copy_(mean)
        if self.best is not None:
            self._set_values(self.best, getattr(self.objective, "record_buffers", ()))
        told: Any = getattr(self.objective, "refresh_after_average", None)
        if (self.average or self.best is not None) and told is not None:
            told(*self.data)


def scalar_loss(objective: nn.Module, batch: tuple[Tensor, ...]) -> Tensor:
    """The objective's loss on a batch, checked to be one real number."""
    loss = objective(*batch)
    if not isinstance(loss, Tensor) or loss.numel() != 1 or not loss.dtype.is_floating_point:
        found = f"shape {tuple(loss.shape)}, {loss.dtype}" if isinstance(loss, Tensor) else type(loss).__name__
        raise ValueError(f"objective must return one real number as a tensor, its call returned {found}")
    return loss.reshape(())


def _entries(gradient: Tensor) -> Tensor:
    return gradient._values() if gradient.is_sparse else gradient


def _identify(values: dict[str, Any]) -> dict[str, str]:
    """Fingerprints of the entries; an entry that has none counts by its type."""
    found = {}
    for name, value in values.items():
        try:
            found[name] = fingerprint(value)
        except TypeError:
            found[name] = type(value).__qualname__
    return found
