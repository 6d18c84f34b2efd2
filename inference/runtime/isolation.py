"""Runs an objective so that nothing outside sees it: own random state, own Pyro parameters, modes as they were."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import pyro
import torch
from pyro.nn.module import PyroModule, _Context
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from inference.runtime.generators import derive_seed, scoped_seed
from inference.runtime.optimization import Settings, scalar_loss

__all__ = ["first_call", "isolated"]

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
        stack.enter_context(scoped_seed(settings.seed, settings.device))
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
    batch = tuple(values[: settings.batch_size] for values in data)
    buffers = {name: b.detach().clone() for name, b in objective.named_buffers() if not is_lazy(b)}
    with scoped_seed(derive_seed(settings.seed, "first call"), settings.device):
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
    with torch.no_grad():
        for name, b in objective.named_buffers():
            if name in buffers and b.shape == buffers[name].shape:
                b.copy_(buffers[name])
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
