"""A pretended accelerator, to find tensors that a GPU run would leave on the CPU.

Fake tensors carry a device and no data; one that meets a CPU tensor raises.  On a machine with CUDA the device is
``cuda`` itself.  Without CUDA, torch's autograd
engine cannot run backward on fake ``cuda`` tensors (it asks the absent driver for a stream), so torch's own stand-in
backend takes its place: the same rules,
forward and backward.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode

_NAME = "standin"


class _StandIn:
    """What torch asks of a backend's module; it has no random state of its own."""

    def is_available(self) -> bool:
        return False

    def is_initialized(self) -> bool:
        return True

    def _is_in_bad_fork(self) -> bool:
        return False

    def current_device(self) -> int:
        return 0

    def device_count(self) -> int:
        return 1

    def manual_seed_all(self, seed: int) -> None:
        pass

    def get_rng_state(self, device: Any = None) -> torch.Tensor:
        return torch.empty(0, dtype=torch.uint8)

    def set_rng_state(self, state: torch.Tensor, device: Any = None) -> None:
        pass


def register_stand_in() -> None:
    """Called once, before the first backward pass of the process: autograd counts its devices then."""
    if torch.cuda.is_available() or hasattr(torch, _NAME):
        return
    try:
        from torch.utils.backend_registration import _setup_privateuseone_for_python_backend
    except ImportError:
        return
    _setup_privateuseone_for_python_backend(_NAME, backend_module=_StandIn())


def _device() -> torch.device:
    if torch.cuda.is_available():
        return torch.device("cuda")
    if not hasattr(torch, _NAME):
        pytest.skip("this torch has neither CUDA nor a stand-in backend to run backward on")
    return torch.device(_NAME)


class _ConstantsByWayOfTheCPU(TorchFunctionMode):
    """The stand-in has no memory to write a Python number to, so ``torch.tensor(1.0, device=...)`` takes its shape
    from the CPU.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if (
            func in (torch.tensor, torch.as_tensor)
            and kwargs.get("device") is not None
            and not isinstance(args[0], torch.Tensor)
        ):
            device = kwargs.pop("device")
            return self._like(func(*args, **kwargs), device)
        if func is torch.Tensor.new_tensor and not isinstance(args[1], torch.Tensor):
            return self._like(torch.tensor(args[1], dtype=kwargs.get("dtype", args[0].dtype)), args[0].device)
        return func(*args, **kwargs)

    @staticmethod
    def _like(value: torch.Tensor, device: torch.device) -> torch.Tensor:
        return torch.empty(value.shape, dtype=value.dtype, device=device)


@contextmanager
def fake_accelerator() -> Iterator[torch.device]:
    """Inside the block, tensors are fake; put some on the device that is yielded, and any other that meets them is an
    error.
    """
    device = _device()
    with FakeTensorMode(allow_non_fake_inputs=True), _ConstantsByWayOfTheCPU():
        yield device


def place(module: torch.nn.Module, device: torch.device) -> None:
    """Give a module fake parameters and buffers on ``device``; ``Module.to`` cannot swap fake tensors."""
    for part in module.modules():
        for key, value in part._parameters.items():
            if value is not None:
                fake = torch.empty(value.shape, dtype=value.dtype, device=device)
                part._parameters[key] = torch.nn.Parameter(fake, requires_grad=value.requires_grad)
        for key, buffer in part._buffers.items():
            if buffer is not None:
                part._buffers[key] = torch.empty(buffer.shape, dtype=buffer.dtype, device=device)
