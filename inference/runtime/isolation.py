"""Runs an objective so that nothing outside sees it: own random state, own Pyro parameters, modes as they were."""

import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import pyro
import torch
from pyro.nn.module import PyroModule, _Context
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from inference._errors import SamplerWarning
from inference.runtime import distributed
from inference.runtime.generators import derive_seed, scoped_seed
from inference.runtime.optimization import Settings, own_rows, scalar_loss

__all__ = ["first_call", "isolated", "warn_unless_a_mean"]

_OWN = (
    "They would not be learned: instead of pyro.param(...) or pyro.module(...) make them attributes of a PyroModule "
    "(self.x = PyroParam(...)), and give modules, not functions, as model and guide"
)


@contextmanager
def isolated(objective: nn.Module, settings: Settings) -> Iterator[None]:
    """Own random state, own Pyro parameters, gradients on, and every module's mode as it was afterwards."""
    modes = {module: module.training for module in objective.modules()}
    with ExitStack() as stack:
        stack.enter_context(pyro.get_param_store().scope())
        stack.enter_context(pyro.settings.context(module_local_params=True))
        # Rank 0 draws what a single process does, the others from streams of their own.
        rank = distributed.rank()
        seed = derive_seed(settings.seed, "rank", rank) if rank else settings.seed
        stack.enter_context(scoped_seed(seed, settings.device))
        stack.enter_context(torch.enable_grad())
        if not objective.training:
            objective.train()
        try:
            yield
        finally:
            for module, mode in modes.items():
                module.training = mode


def first_call(objective: nn.Module, data: tuple[Tensor, ...], settings: Settings) -> torch.dtype:
    """Call the objective once so that its parameters exist, and check what it returns; buffers stay as they were."""
    for module in objective.modules():
        if isinstance(module, PyroModule):
            make_local(module._pyro_context)
    batch = _first_batch(data, settings)
    with _buffers_kept(objective), scoped_seed(derive_seed(settings.seed, "first call"), settings.device):
        while True:
            try:
                loss = scalar_loss(objective, batch)
                break
            except AttributeError as error:
                # a PyroModule that the objective calls without owning it, made while parameters were global
                if not isinstance(error.obj, _Context) or error.name != "param_state":
                    raise
                make_local(error.obj)
            except NotImplementedError as error:
                if "local param mode" not in str(error):
                    raise
                raise ValueError(f"objective uses parameters that its modules do not own. {_OWN}") from error
    learned = [(name, p) for name, p in objective.named_parameters() if p.requires_grad]
    _refuse_stray_parameters(objective)
    if not learned:
        raise ValueError(
            "objective has no parameters to learn. They must be nn.Parameters of it or of its submodules; with Pyro, "
            "model and guide must be PyroModules (autoguides are) that hold theirs as PyroParam attributes"
        )
    if not loss.requires_grad:
        raise ValueError("the loss that objective returned does not depend on any of its parameters (was it detached?)")
    for name, p in learned:
        if not torch.isfinite(p).all():
            raise ValueError(f"parameter {name!r} of objective is NaN or infinite before the first step")
    return loss.dtype


def warn_unless_a_mean(objective: nn.Module, data: tuple[Tensor, ...], settings: Settings) -> None:
    """Warn where the ranks' mean is not the loss of the whole batch: each row given twice must leave a mean as it is.

    Losses are compared at the same random numbers, several times: those that are drawn per row only add scatter, which
    the bound of eight standard errors passes; a sum over rows doubles.
    """
    if distributed.world_size() == 1 or not data:
        return
    batch = _first_batch(data, settings)
    twice = tuple(torch.cat([values, values]) for values in batch)
    losses = []
    with _buffers_kept(objective):
        for repeat in range(8):
            for rows in (batch, twice):
                with scoped_seed(derive_seed(settings.seed, "mean", repeat), settings.device):
                    losses.append(scalar_loss(objective, rows).detach())
    once, doubled = torch.stack(losses).cpu().double().view(8, 2).unbind(1)
    change = doubled - once
    if abs(change.mean()) > 8 * change.std() / 8**0.5 + 1e-3 * once.abs().mean() and distributed.is_main():
        warnings.warn(
            f"the loss goes from {once.mean():.5g} to {doubled.mean():.5g} when each row is given twice, so it is not "
            "a mean over rows, and the mean over ranks is not what a single process minimises. Scale sums over rows to "
            "the size of the data (in Pyro: pyro.plate(name, size, subsample=rows)) or divide them by the rows",
            SamplerWarning,
            stacklevel=3,
        )


def _first_batch(data: tuple[Tensor, ...], settings: Settings) -> tuple[Tensor, ...]:
    return tuple(values[: len(own_rows(settings))] for values in data)


@contextmanager
def _buffers_kept(objective: nn.Module) -> Iterator[None]:
    """What the calls inside do to the buffers is undone."""
    buffers = {name: b.detach().clone() for name, b in objective.named_buffers() if not is_lazy(b)}
    yield
    with torch.no_grad():
        for name, b in objective.named_buffers():
            if name in buffers and b.shape == buffers[name].shape:
                b.copy_(buffers[name])


def make_local(context: Any) -> None:
    """Give a PyroModule that was made while parameters were global the own store that module-local ones have."""
    if not hasattr(context, "param_state"):
        context.param_state = {"params": {}, "constraints": {}}


def _refuse_stray_parameters(objective: nn.Module) -> None:
    """``pyro.param`` in a function makes parameters that no module owns: they would be used and never learned."""
    owned = {id(p) for p in objective.parameters()}
    stray = sorted(name for name, p in pyro.get_param_store().named_parameters() if id(p) not in owned)
    if stray:
        raise ValueError(f"objective uses the parameters {stray} and its modules do not own them. {_OWN}")
