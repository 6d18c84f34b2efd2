"""Where functions are compared: samplers of measurement sets.

A sampler is any callable ``num_points -> (num_points, *event)``.  Those here are modules whose tensors are buffers,
so the objective that holds one takes it along to its device; they draw from the global generator of that device.

Tran et al. (JMLR 23(74), 2022) use a fixed grid in one dimension, 70 training inputs and 30 points of their bounding
box for tables, and minibatches of training inputs for classification.  The reference implementation takes the box
from the test inputs too; here it is built from what is given and nothing else, so give it training inputs.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

__all__ = ["BoxAndData", "DataBatches", "FixedPoints", "Grid", "MeasurementSampler", "as_measurement"]

MeasurementSampler = Callable[[int], Tensor]


class _Sampler(nn.Module):
    def _hold(self, name: str, value: Tensor) -> None:
        # Not persistent: data do not belong in the checkpoint of an objective.
        self.register_buffer(name, value, persistent=False)


class FixedPoints(_Sampler):
    """The same points each time.

    Args:
        points: ``(M, *event)``.
    """

    points: Tensor

    def __init__(self, points: Tensor) -> None:
        super().__init__()
        _check_inputs("points", points, min_rows=1)
        self._hold("points", points)

    def forward(self, num_points: int) -> Tensor:
        """The points; ``ValueError`` if their number is not ``num_points``."""
        if num_points != self.points.shape[0]:
            raise ValueError(f"num_points = {num_points} was asked of a fixed set of {self.points.shape[0]} points")
        return self.points


class Grid(_Sampler):
    """A regular grid on a box, both ends included.

    Args:
        low: lower corner, ``(D,)``.
        high: upper corner, ``(D,)``.
    """

    low: Tensor
    high: Tensor

    def __init__(self, low: Tensor, high: Tensor) -> None:
        super().__init__()
        _check_box(low, high)
        self._hold("low", low)
        self._hold("high", high)

    def forward(self, num_points: int) -> Tensor:
        """``(num_points, D)``; ``ValueError`` unless ``num_points`` is the D-th power of an integer above 1."""
        dim = self.low.shape[0]
        side = round(num_points ** (1 / dim))
        if side < 2 or side**dim != num_points:
            raise ValueError(f"num_points must be side**{dim} with side >= 2 on a {dim}-d grid, got {num_points}")
        steps = torch.linspace(0, 1, side, dtype=self.low.dtype, device=self.low.device)
        unit = torch.cartesian_prod(*[steps] * dim).reshape(num_points, dim)
        return self.low + (self.high - self.low) * unit


class BoxAndData(_Sampler):
    """Training inputs, and points uniform in their bounding box.

    Args:
        inputs: training inputs, ``(N, D)``.
        data_share: share of points that are training inputs, drawn without replacement; the rest is uniform.
        margin: by how much the box exceeds the inputs on each side, as a fraction of its side.
    """

    inputs: Tensor
    low: Tensor
    high: Tensor

    def __init__(self, inputs: Tensor, data_share: float = 0.7, margin: float = 0.0) -> None:
        super().__init__()
        _check_inputs("inputs", inputs, min_rows=2)
        if inputs.ndim != 2:
            raise ValueError(f"inputs must be (N, D), got shape {tuple(inputs.shape)}")
        if not 0 <= data_share <= 1:
            raise ValueError(f"data_share must be in [0, 1], got {data_share!r}")
        if not margin >= 0:
            raise ValueError(f"margin must not be negative, got {margin!r}")
        low, high = inputs.amin(0), inputs.amax(0)
        self.data_share = data_share
        self._hold("inputs", inputs)
        self._hold("low", low - margin * (high - low))
        self._hold("high", high + margin * (high - low))

    def forward(self, num_points: int) -> Tensor:
        """``(num_points, D)``, the training inputs first; ``ValueError`` if there are too few of them."""
        from_data = round(self.data_share * num_points)
        rows = _distinct_rows(self.inputs, from_data)
        shape = (num_points - from_data, self.inputs.shape[1])
        uniform = torch.rand(shape, dtype=self.inputs.dtype, device=self.inputs.device)
        return torch.cat([rows, self.low + (self.high - self.low) * uniform])


class DataBatches(_Sampler):
    """Random minibatches of the training inputs, without replacement.

    Args:
        inputs: training inputs, ``(N, *event)``; images are welcome.
    """

    inputs: Tensor

    def __init__(self, inputs: Tensor) -> None:
        super().__init__()
        _check_inputs("inputs", inputs, min_rows=1)
        self._hold("inputs", inputs)

    def forward(self, num_points: int) -> Tensor:
        """``(num_points, *event)``; ``ValueError`` if there are fewer inputs than that."""
        return _distinct_rows(self.inputs, num_points)


def as_measurement(measurement: Tensor | MeasurementSampler) -> MeasurementSampler:
    """A sampler from a sampler or from a fixed set of points."""
    if isinstance(measurement, Tensor):
        return FixedPoints(measurement)
    if not callable(measurement):
        found = type(measurement).__name__
        raise TypeError(f"measurement must be a tensor or a callable num_points -> points, got {found}")
    return measurement


def _distinct_rows(inputs: Tensor, count: int) -> Tensor:
    if count > inputs.shape[0]:
        raise ValueError(f"{count} distinct measurement points were asked of {inputs.shape[0]} training inputs")
    rows = torch.randperm(inputs.shape[0], device=inputs.device)
    return inputs.index_select(0, rows.narrow(0, 0, count))


def _check_inputs(name: str, value: Tensor, min_rows: int) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(value).__name__}")
    if value.ndim < 2 or value.shape[0] < min_rows:
        raise ValueError(f"{name} must be (N, ...) with N >= {min_rows}, got shape {tuple(value.shape)}")
    if not value.is_floating_point():
        raise TypeError(f"{name} must be floating-point, got {value.dtype}")
    if value.is_cpu and not bool(torch.isfinite(value).all()):
        raise ValueError(f"{name} must be finite, it holds NaN or infinite values")


def _check_box(low: Tensor, high: Tensor) -> None:
    for name, corner in (("low", low), ("high", high)):
        if not isinstance(corner, Tensor) or not corner.is_floating_point():
            raise TypeError(f"{name} must be a floating-point tensor (D,), got {corner!r}")
    if low.ndim != 1 or low.shape != high.shape or low.shape[0] < 1:
        raise ValueError(f"low and high must both be (D,), got shapes {tuple(low.shape)} and {tuple(high.shape)}")
    if low.is_cpu and not bool((low < high).all()):
        raise ValueError(f"low must be below high in every dimension, got {low.tolist()} and {high.tolist()}")
