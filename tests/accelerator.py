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


def register_stand_in() -> None:
    """Called once, before the first backward pass of the process: autograd counts its devices then."""
    if torch.cuda.is_available() or hasattr(torch, _NAME):
        return
    try:
        from torch.utils.backend_registration import _setup_privateuseone_for_python_backend
    except ImportError:
        return
    _setup_privateuseone_for_python_backend(_NAME)


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
