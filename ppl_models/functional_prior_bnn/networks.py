"""Networks as pure functions of named weights, with NTK scaling.

An affine layer divides its linear part by the square root of its fan-in, ``h = W^T a / sqrt(fan_in) + b``, so that a
prior standard deviation of one is of the right order at any width (Tran et al., JMLR 23(74), 2022).  The weights come
in as a dictionary ``{"W1": ..., "b1": ..., "W2": ...}`` and nothing is stored: the same function serves one draw, a
vmapped bag of draws, and a sampler's chains.

Dense weights are ``(in, out)``, convolution kernels ``(out, in, k, k)`` with fan-in ``in k^2``.

Normalisation.  Batch normalisation makes the output at one input depend on the other inputs of its minibatch.  The
likelihood is then no product over data points, a minibatch gradient no longer estimates the full one, and a prediction
depends on what else is predicted.  PreResNet20 is therefore built on group normalisation (Wu and He, ECCV 2018), which
normalises each image by itself and has, as the paper's batch normalisation, no trainable parameters.
"""

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["ACTIVATIONS", "MLP", "VGG16", "Layer", "LeNet5", "Network", "PreResNet20", "build_network", "evaluate"]

Weights = Mapping[str, Tensor]

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "tanh": torch.tanh,
    "relu": torch.relu,
    "leaky_relu": F.leaky_relu,
    "softplus": F.softplus,
    "swish": F.silu,
    "sin": torch.sin,
    "cos": torch.cos,
    "rbf": lambda h: torch.exp(-h.square()),
    "linear": lambda h: h,
}

_GROUP_CHANNELS = 8  # channels normalised together; the narrowest stage of PreResNet20 has 16
_GROUP_FLOOR = 1e-5  # added to a group's variance: a flat image has none


class Layer(NamedTuple):
    """Shapes of one affine map.

    Attributes:
        weight: shape of W.
        fan_in: number of inputs of one output; W is divided by its square root.
        bias: shape of b, or None without one.
    """

    weight: tuple[int, ...]
    fan_in: int
    bias: tuple[int, ...] | None


class Network(nn.Module):
    """A function ``(weights, x) -> f`` with a list of its layers.  Holds no parameter.

    Attributes:
        layers: layer l is ``layers[l - 1]`` and has the weights ``W{l}`` and, unless it has no bias, ``b{l}``.
        in_features: size D of a flattened input.
        out_features: number of outputs K.
        widest: most values that one layer holds for one input, for sizing chunks.
    """

    layers: tuple[Layer, ...]
    in_features: int
    out_features: int
    widest: int

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Name of every weight to its shape, layer by layer."""
        shapes: dict[str, tuple[int, ...]] = {}
        for number, layer in enumerate(self.layers, 1):
            shapes[f"W{number}"] = layer.weight
            if layer.bias is not None:
                shapes[f"b{number}"] = layer.bias
        return shapes

    def forward(self, weights: Weights, x: Tensor) -> Tensor:
        """Function values ``(N, K)`` at ``x`` ``(N, D)`` for one set of weights."""
        raise NotImplementedError

    def _dense(self, weights: Weights, number: int, h: Tensor) -> Tensor:
        layer = self.layers[number - 1]
        out = h @ weights[f"W{number}"] / math.sqrt(layer.fan_in)
        return out if layer.bias is None else out + weights[f"b{number}"]

    def _conv(self, weights: Weights, number: int, h: Tensor, stride: int = 1, padding: int = 0) -> Tensor:
        layer = self.layers[number - 1]
        kernel = weights[f"W{number}"] / math.sqrt(layer.fan_in)
        bias = None if layer.bias is None else weights[f"b{number}"]
        return F.conv2d(h, kernel, bias, stride=stride, padding=padding)


def evaluate(network: Network, weights: Weights, x: Tensor, chunk_size: int | None = None) -> Tensor:
    """Function values of a bag of draws.

    Args:
        network: the network.
        weights: name to ``(*draws, *shape)``, the same leading shape for all.
        x: ``(N, D)``.
        chunk_size: draws evaluated at once; all by default.

    Returns:
        ``(*draws, N, K)``.
    """
    shapes = network.shapes
    first = next(iter(shapes))
    draws = weights[first].shape[: weights[first].ndim - len(shapes[first])]
    if not draws:
        return network(weights, x)
    flat = {name: weights[name].reshape(-1, *shape) for name, shape in shapes.items()}
    values = torch.func.vmap(network, in_dims=(0, None), chunk_size=chunk_size)(flat, x)
    return values.reshape(*draws, *values.shape[1:])


class MLP(Network):
    """Fully connected network; without hidden layers an affine map.

    Args:
        in_features: D.
        out_features: K.
        hidden: widths of the hidden layers.
        activation: a name in ``ACTIVATIONS``.
    """

    def __init__(
        self, in_features: int, out_features: int, hidden: Sequence[int] = (100,), activation: str = "tanh"
    ) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.activation = _activation(activation)
        widths = [in_features, *hidden, out_features]
        self.widest = max(widths)
        self.layers = tuple(Layer((a, b), a, (b,)) for a, b in itertools.pairwise(widths))

    def forward(self, weights: Weights, x: Tensor) -> Tensor:
        """Function values ``(N, K)``."""
        h = self._dense(weights, 1, x)
        for number in range(2, len(self.layers) + 1):
            h = self._dense(weights, number, self.activation(h))
        return h


class _ImageNetwork(Network):
    """Common part of the convolutional networks: flattened images come in and are put back to ``(N, C, H, W)``."""

    _channels_at_full_size: ClassVar[int]

    def __init__(self, image_shape: Sequence[int], out_features: int, activation: str, least_side: int) -> None:
        super().__init__()
        channels, height, width = image_shape
        if min(height, width) < least_side:
            raise ValueError(
                f"{type(self).__name__} needs images of at least {least_side} x {least_side} pixels, "
                f"got image_shape = {tuple(image_shape)}"
            )
        self.image_shape = (channels, height, width)
        self.in_features, self.out_features = math.prod(image_shape), out_features
        self.widest = height * width * self._channels_at_full_size
        self.activation = _activation(activation)

    def _images(self, x: Tensor) -> Tensor:
        return x.reshape(x.shape[0], *self.image_shape)


def _conv_layer(channels_in: int, channels_out: int, kernel: int, bias: bool = True) -> Layer:
    return Layer(
        (channels_out, channels_in, kernel, kernel), channels_in * kernel**2, (channels_out,) if bias else None
    )


class LeNet5(_ImageNetwork):
    """LeCun et al. (1998): convolutions of 6 and 16 channels, 5 x 5, each with a 2 x 2 max-pool, then 120-84-K.

    Images of 28 x 28 are padded by 2 in the first convolution as in the original, so that 28 and 32 pixels give 16 x 5
    x 5 features alike.
    """

    _channels_at_full_size = 6

    def __init__(self, image_shape: Sequence[int], out_features: int, activation: str = "relu") -> None:
        super().__init__(image_shape, out_features, activation, least_side=12)
        channels, height, width = image_shape
        self._padding = 2 if min(height, width) <= 28 else 0
        side_h, side_w = (((side + 2 * self._padding - 4) // 2 - 4) // 2 for side in (height, width))
        flat = 16 * side_h * side_w
        self.layers = (
            _conv_layer(channels, 6, 5),
            _conv_layer(6, 16, 5),
            Layer((flat, 120), flat, (120,)),
            Layer((120, 84), 120, (84,)),
            Layer((84, out_features), 84, (out_features,)),
        )

    def forward(self, weights: Weights, x: Tensor) -> Tensor:
        """Function values ``(N, K)``."""
        h = F.max_pool2d(self.activation(self._conv(weights, 1, self._images(x), padding=self._padding)), 2)
        h = F.max_pool2d(self.activation(self._conv(weights, 2, h)), 2).flatten(1)
        for number in (3, 4):
            h = self.activation(self._dense(weights, number, h))
        return self._dense(weights, 5, h)


class VGG16(_ImageNetwork):
    """Simonyan and Zisserman (2015): thirteen 3 x 3 convolutions, five 2 x 2 max-pools, one dense layer, as used for
    CIFAR-10; no normalisation.
    """

    _channels_at_full_size = 64
    _STAGES = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))

    def __init__(self, image_shape: Sequence[int], out_features: int, activation: str = "relu") -> None:
        super().__init__(image_shape, out_features, activation, least_side=32)
        channels, height, width = image_shape
        layers = []
        for widths in self._STAGES:
            for wide in widths:
                layers.append(_conv_layer(channels, wide, 3))
                channels = wide
        flat = channels * (height // 32) * (width // 32)
        self.layers = (*layers, Layer((flat, out_features), flat, (out_features,)))

    def forward(self, weights: Weights, x: Tensor) -> Tensor:
        """Function values ``(N, K)``."""
        h = self._images(x)
        number = 0
        for widths in self._STAGES:
            for _ in widths:
                number += 1
                h = self.activation(self._conv(weights, number, h, padding=1))
            h = F.max_pool2d(h, 2)
        return self._dense(weights, number + 1, h.flatten(1))


class PreResNet20(_ImageNetwork):
    """He, Zhang, Ren and Sun, Identity mappings in deep residual networks (ECCV 2016), 20 layers.

    3 x 3 convolution to 16 channels; three stages of three blocks with 16, 32, 64 channels, stride 2 into the second
    and third; a block is norm-activation-conv-norm-activation-conv plus its input, through a strided 1 x 1 convolution
    where the shape changes; norm-activation, global average pool, dense layer.  Convolutions have no bias.  The
    normalisation is by groups of channels of one image (see the module's docstring).
    """

    _channels_at_full_size = 16

    def __init__(self, image_shape: Sequence[int], out_features: int, activation: str = "relu") -> None:
        super().__init__(image_shape, out_features, activation, least_side=8)
        layers = [_conv_layer(image_shape[0], 16, 3, bias=False)]
        channels = 16
        self._blocks: list[tuple[int, bool]] = []  # (stride, whether the shortcut is a convolution)
        for wide in (16, 32, 64):
            for block in range(3):
                changes = wide != channels
                layers += [_conv_layer(channels, wide, 3, bias=False), _conv_layer(wide, wide, 3, bias=False)]
                if changes:
                    layers.append(_conv_layer(channels, wide, 1, bias=False))
                self._blocks.append((2 if block == 0 and changes else 1, changes))
                channels = wide
        self.layers = (*layers, Layer((64, out_features), 64, (out_features,)))

    def _normalise(self, h: Tensor) -> Tensor:
        grouped = h.unflatten(-3, (-1, _GROUP_CHANNELS))
        centred = grouped - grouped.mean((-3, -2, -1), keepdim=True)
        variance = centred.square().mean((-3, -2, -1), keepdim=True)
        return self.activation((centred * torch.rsqrt(variance + _GROUP_FLOOR)).reshape(h.shape))

    def forward(self, weights: Weights, x: Tensor) -> Tensor:
        """Function values ``(N, K)``."""
        h = self._conv(weights, 1, self._images(x), padding=1)
        number = 2
        for stride, projected in self._blocks:
            a = self._conv(weights, number, self._normalise(h), stride=stride, padding=1)
            a = self._conv(weights, number + 1, self._normalise(a), padding=1)
            number += 2
            if projected:
                h = self._conv(weights, number, h, stride=stride)
                number += 1
            h = h + a
        return self._dense(weights, number, self._normalise(h).mean((-1, -2)))


_IMAGE_NETWORKS: dict[str, Callable[..., _ImageNetwork]] = {
    "lenet5": LeNet5,
    "vgg16": VGG16,
    "preresnet20": PreResNet20,
}


def build_network(
    network: str,
    *,
    in_features: int | None,
    out_features: int,
    hidden: Sequence[int],
    activation: str | None,
    image_shape: Sequence[int] | None,
) -> Network:
    """The network of that name.

    Args:
        network: ``"mlp"``, ``"lenet5"``, ``"vgg16"`` or ``"preresnet20"``.
        in_features: D; for an image network it may be left out.
        out_features: K.
        hidden: widths of an MLP's hidden layers.
        activation: name in ``ACTIVATIONS``; by default ``"tanh"`` for an MLP and ``"relu"`` for the image networks.
        image_shape: ``(C, H, W)``, needed by the image networks.

    Raises:
        ValueError: an unknown name, a size below 1, or sizes that disagree.
        TypeError: a size that is no integer.
    """
    _positive_int("out_features", out_features)
    if network == "mlp":
        if image_shape is not None and in_features is None:
            in_features = math.prod(image_shape)
        if in_features is None:
            raise ValueError("in_features is needed: the number of columns of x")
        _positive_int("in_features", in_features)
        if isinstance(hidden, str) or not isinstance(hidden, Sequence):
            raise TypeError(f"hidden must be a sequence of widths, such as (100,), got {hidden!r}")
        for i, width in enumerate(hidden):
            _positive_int(f"hidden[{i}]", width)
        return MLP(in_features, out_features, hidden, activation or "tanh")
    if network not in _IMAGE_NETWORKS:
        raise ValueError(f"network must be one of {['mlp', *_IMAGE_NETWORKS]}, got {network!r}")
    if image_shape is None or len(image_shape) != 3:
        raise ValueError(f"network={network!r} needs image_shape=(channels, height, width), got {image_shape!r}")
    for i, side in enumerate(image_shape):
        _positive_int(f"image_shape[{i}]", side)
    if in_features not in (None, math.prod(image_shape)):
        raise ValueError(
            f"in_features = {in_features} disagrees with image_shape = {tuple(image_shape)}, "
            f"which has {math.prod(image_shape)} values"
        )
    return _IMAGE_NETWORKS[network](image_shape, out_features, activation or "relu")


def _positive_int(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an integer, got {value!r}")
    if value < 1:
        raise ValueError(f"{name} must be at least 1, got {value}")


def _activation(name: str) -> Callable[[Tensor], Tensor]:
    if name not in ACTIVATIONS:
        raise ValueError(f"activation must be one of {sorted(ACTIVATIONS)}, got {name!r}")
    return ACTIVATIONS[name]
