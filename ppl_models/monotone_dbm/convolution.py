"""Phi of several image-like layers that are joined by convolutions.

Layer j is a tensor ``(C, H, W)`` of ``C / r`` states for each of r groups at a location.  A is a block matrix of
convolutions ``A_ij`` from layer j to row i; a kernel of size 0 is none.  With ``padding = ceil((stride (k - 2) + k) /
2)`` every input meets all taps of its kernels, so the diagonal blocks of A' A repeat with the period of the strides:
they are tiles that are subtracted without an error at borders (Feng, Winston and Kolter 2023).
"""

import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import conv2d, conv_transpose2d

from ppl_models.base import check_count, check_counts
from ppl_models.monotone_dbm.groups import Groups
from ppl_models.monotone_dbm.operators import (
    _DENSE_LIMIT,
    START_NOISE,
    Curvature,
    PairwiseMap,
    ScaledOperator,
    hollow,
    identity_scale,
    of_matrix,
)

__all__ = ["ConvOperator", "Layer", "layer_groups"]


class Layer(NamedTuple):
    """``channels = groups * states`` maps of ``height x width``; channel ``g * states + s`` is state s of group g."""

    channels: int
    height: int
    width: int
    groups: int

    @property
    def states(self) -> int:
        """States of each group."""
        return self.channels // self.groups

    @property
    def size(self) -> int:
        """Entries."""
        return self.channels * self.height * self.width


class _Edge(NamedTuple):
    row: int
    layer: int
    kernel: int
    stride: int
    padding: int
    whole: bool  # one kernel that spans the layer


def check_layers(layers: Sequence[Sequence[int]]) -> list[Layer]:
    """Layers as given, ``(channels, height, width, groups)`` or ``(channels, groups)`` for one without locations."""
    found = []
    for i, given in enumerate(layers):
        numbers = check_counts(f"layers[{i}]", given)
        if len(numbers) == 2:
            numbers = (numbers[0], 1, 1, numbers[1])
        if len(numbers) != 4:
            raise ValueError(f"layers[{i}] must be (channels, height, width, groups), got {numbers}")
        layer = Layer(*numbers)
        if layer.channels % layer.groups or layer.states < 2:
            raise ValueError(
                f"layers[{i}]: {layer.channels} channels do not divide into {layer.groups} groups of at least 2 states"
            )
        found.append(layer)
    if not found:
        raise ValueError("layers is empty: a model needs at least one")
    return found


def layer_groups(layers: Sequence[Layer]) -> Groups:
    """The layout: layer by layer, in each location by location (rows first), there group by group."""
    return Groups([layer.states for layer in layers for _ in range(layer.height * layer.width * layer.groups)])


class ConvOperator(ScaledOperator):
    """Phi of a block matrix of convolutions.

    Args:
        layers: each ``(channels, height, width, groups)``.
        kernels: ``kernels[i][j]``, the size of the kernel from layer j to row i; 0 for none.
        rows: output channels of each row; those of layer i by default.
        monotonicity, curvature: as in the dense operator.
        dense_limit: states up to which Phi is a matrix.
        seed_generator: of the initial weights.
        unbounded: as in the base class; the only group of its layer.
        coupled: as in the dense operator.

    Raises:
        TypeError, ValueError: sizes that do not fit the strides, or a row that mixes kernels of different outputs.
    """

    def __init__(
        self,
        layers: Sequence[Layer],
        kernels: Sequence[Sequence[int]],
        rows: Sequence[int] | None,
        monotonicity: float | None,
        curvature: Curvature,
        dense_limit: int = _DENSE_LIMIT,
        seed_generator: torch.Generator | None = None,
        unbounded: int | None = None,
        coupled: float = 1.0,
    ) -> None:
        super().__init__(layer_groups(layers), monotonicity, curvature, unbounded)
        self.layers, self.dense_limit = list(layers), dense_limit
        counts = [layer.height * layer.width * layer.groups for layer in layers]
        starts = itertools.accumulate(counts[:-1], initial=0)
        self._bounded = [(start, count) != (unbounded, 1) for start, count in zip(starts, counts, strict=True)]
        self.edges = _edges(self.layers, kernels)
        outputs = [layer.channels for layer in layers] if rows is None else list(rows)
        weights = []
        for edge in self.edges:
            source = self.layers[edge.layer]
            shape = (outputs[edge.row], source.channels, edge.kernel, edge.kernel)
            # Every column of the noise has length START_NOISE, whatever the number of rows that it meets.
            taps = outputs[edge.row] * edge.kernel**2 / edge.stride**2 * sum(e.layer == edge.layer for e in self.edges)
            weight = coupled * START_NOISE * torch.randn(shape, generator=seed_generator) / math.sqrt(max(taps, 1.0))
            if edge.row == edge.layer and outputs[edge.row] == source.channels:
                # As in the dense operator: A starts at a multiple of the identity, where Phi = 0.
                middle = edge.kernel // 2
                weight[:, :, middle, middle] += identity_scale(self.bound) * torch.eye(source.channels)
            weights.append(nn.Parameter(weight))
        self.weights = nn.ParameterList(weights)
        self.periods = [max((e.stride for e in self.edges if e.layer == j), default=1) for j in range(len(self.layers))]
        for j, (layer, period) in enumerate(zip(self.layers, self.periods, strict=True)):
            if layer.height % period or layer.width % period:
                raise ValueError(
                    f"layer {j} of {layer.height} x {layer.width} must be divisible by its strides' period {period}"
                )

    def colours(self, matrix: Tensor | None) -> list[Tensor]:
        """As in the base class; of a large model, locations of one layer that no kernel spans together, group by
        group.
        """
        if matrix is not None:
            return super().colours(matrix)
        start, device = 0, self.groups.group_of.device
        found: list[Tensor] = []
        for j, layer in enumerate(self.layers):
            apart = max(e.kernel for e in self.edges if e.layer == j)
            numbers = torch.arange(layer.height * layer.width * layer.groups, device=device)
            lattice = (start + numbers).reshape(layer.height, layer.width, layer.groups)
            start += len(numbers)
            for down in range(min(apart, layer.height)):
                for right in range(min(apart, layer.width)):
                    places = lattice[down::apart, right::apart].flatten(0, 1)
                    found.extend(places[:, g] for g in range(layer.groups))
        return found

    # ------------------------------------------------------------------ layouts
    def _split(self, flat: Tensor) -> list[Tensor]:
        """``(B, N)`` as images ``(B, C, H, W)``."""
        images, start = [], 0
        for layer in self.layers:
            part = flat[:, start : start + layer.size].reshape(-1, layer.height, layer.width, layer.channels)
            images.append(part.permute(0, 3, 1, 2))
            start += layer.size
        return images

    @staticmethod
    def _join(images: Sequence[Tensor]) -> Tensor:
        return torch.cat([image.permute(0, 2, 3, 1).flatten(1) for image in images], 1)

    def _centred_weights(self) -> list[Tensor]:
        if not self.centred:
            return list(self.weights)
        made = []
        for edge, weight in zip(self.edges, self.weights, strict=True):
            split = weight.unflatten(1, (self.layers[edge.layer].groups, -1))
            made.append((split - split.mean(2, keepdim=True)).flatten(1, 2))
        return made

    def _tiles(self, weights: Sequence[Tensor]) -> list[Tensor]:
        """Diagonal blocks of A' A, ``(S, S, groups, n, n)`` for each layer."""
        tiles = []
        for j, layer in enumerate(self.layers):
            period, total = self.periods[j], None
            for edge, weight in zip(self.edges, weights, strict=True):
                if edge.layer != j:
                    continue
                split = weight.unflatten(1, (layer.groups, layer.states))
                gram = torch.einsum("cgmuv,cgnuv->uvgmn", split, split)
                taps = torch.arange(edge.kernel, device=gram.device)
                # tap u meets the inputs at stride * output + u - padding
                place = (taps[:, None] - edge.padding) % edge.stride == torch.arange(edge.stride, device=gram.device)
                one_hot = place.to(gram.dtype)  # (kernel, stride)
                tile = torch.einsum("ua,vb,uvgmn->abgmn", one_hot, one_hot, gram)
                repeat = period // edge.stride
                tile = tile.repeat(repeat, repeat, 1, 1, 1)
                total = tile if total is None else total + tile
            if total is None:
                raise ValueError(f"layer {j} meets no kernel")
            tiles.append(total)
        return tiles

    def prepare(self) -> PairwiseMap:
        """See the base class."""
        weights = self._centred_weights()
        tiles = self._tiles(weights)
        scales = [  # (S, S, groups)
            self.scale(tile) if bounded else tile.new_ones(tile.shape[:3])
            for tile, bounded in zip(tiles, self._bounded, strict=True)
        ]
        roots = []
        for layer, period, s in zip(self.layers, self.periods, scales, strict=True):
            root = s.sqrt().repeat_interleave(layer.states, 2).permute(2, 0, 1)
            roots.append(root.repeat(1, layer.height // period, layer.width // period))

        def apply(x: Tensor) -> Tensor:
            z = [root * part for root, part in zip(roots, self._split(x), strict=True)]
            out = self._columns(self._rows(z, weights), weights)
            own = [self._own(tile, part, j) for j, (tile, part) in enumerate(zip(tiles, z, strict=True))]
            return self._join([root * (d - o) for root, d, o in zip(roots, own, out, strict=True)])

        if self.groups.num_states > self.dense_limit:
            return PairwiseMap(apply, None, monotone=self.monotone)
        with torch.no_grad():
            matrix = self._matrix(roots, weights)
        found = of_matrix(matrix, monotone=self.monotone)
        # Gradients go through the convolutions of a batch, which cost less than those of the matrix.
        return found._replace(apply=apply) if torch.is_grad_enabled() else found

    def _matrix(self, roots: Sequence[Tensor], weights: Sequence[Tensor]) -> Tensor:
        """Phi, the sum of each row's part; a row's part is as large as the layers that it meets."""
        count = self.groups.num_states
        phi = roots[0].new_zeros(count, count)
        starts = [0, *itertools.accumulate(layer.size for layer in self.layers)]
        for i in sorted({edge.row for edge in self.edges}):
            met = {e.layer: (e, w) for e, w in zip(self.edges, weights, strict=True) if e.row == i}
            made: dict[int, Tensor] = {}  # the row's A^ transposed, (entries of the layer, outputs)
            for j, (edge, weight) in met.items():
                eye = torch.diag(roots[j].permute(1, 2, 0).flatten())
                image = eye.unflatten(1, roots[j].permute(1, 2, 0).shape).permute(0, 3, 1, 2)
                made[j] = _forward(edge, weight, image).flatten(1)
            outputs = next(iter(made.values())).shape[1]
            first, last = min(made), max(made)
            a = torch.cat([made.get(j, phi.new_zeros(self.layers[j].size, outputs)) for j in range(first, last + 1)])
            place = slice(starts[first], starts[last + 1])
            phi[place, place] -= a @ a.T
        return hollow(phi, self.groups)

    def _rows(self, z: Sequence[Tensor], weights: Sequence[Tensor]) -> list[Tensor]:
        """A z, one image a row."""
        rows: dict[int, Tensor] = {}
        for edge, weight in zip(self.edges, weights, strict=True):
            y = _forward(edge, weight, z[edge.layer])
            rows[edge.row] = rows[edge.row] + y if edge.row in rows else y
        return [rows[i] for i in sorted(rows)]

    def _columns(self, rows: Sequence[Tensor], weights: Sequence[Tensor]) -> list[Tensor]:
        """A' of rows, one image a layer."""
        by_row = dict(zip(sorted({e.row for e in self.edges}), rows, strict=True))
        out: dict[int, Tensor] = {}
        for edge, weight in zip(self.edges, weights, strict=True):
            y, layer = by_row[edge.row], self.layers[edge.layer]
            if edge.whole:
                x = y.flatten(1) @ weight.permute(0, 2, 3, 1).flatten(1)
                x = x.view(-1, layer.height, layer.width, layer.channels).permute(0, 3, 1, 2)
                out[edge.layer] = out[edge.layer] + x if edge.layer in out else x
                continue
            extra = [
                full - ((y.shape[d] - 1) * edge.stride - 2 * edge.padding + edge.kernel)
                for d, full in ((2, layer.height), (3, layer.width))
            ]
            if edge.stride == 1 and not any(extra) and edge.padding < edge.kernel:
                turned = weight.flip(2, 3).transpose(0, 1)  # the same, in less than half of the time
                x = conv2d(y, turned, padding=edge.kernel - 1 - edge.padding)
            else:
                x = conv_transpose2d(y, weight, stride=edge.stride, padding=edge.padding, output_padding=extra)
            out[edge.layer] = out[edge.layer] + x if edge.layer in out else x
        return [out[j] for j in range(len(self.layers))]

    def _own(self, tile: Tensor, z: Tensor, j: int) -> Tensor:
        """The diagonal blocks times z."""
        layer, period = self.layers[j], self.periods[j]
        if period == 1 and layer.groups == 1:
            return (z.permute(0, 2, 3, 1) @ tile[0, 0, 0]).permute(0, 3, 1, 2)
        if layer.height == layer.width == 1:
            split = z.reshape(len(z), layer.groups, layer.states).transpose(0, 1)
            return (split @ tile[0, 0]).transpose(0, 1).reshape(z.shape)
        down, right = layer.height // period, layer.width // period
        split = z.reshape(len(z), layer.groups, layer.states, down, period, right, period)
        made = torch.einsum("abgmn,zgnxayb->zgmxayb", tile, split)
        return made.reshape(z.shape)


def _forward(edge: _Edge, weight: Tensor, x: Tensor) -> Tensor:
    """The edge's part of A x, of images ``(B, C, H, W)``."""
    if edge.whole:
        flat = x.permute(0, 2, 3, 1).flatten(1)
        return (flat @ weight.permute(0, 2, 3, 1).flatten(1).T)[:, :, None, None]
    return conv2d(x, weight, stride=edge.stride, padding=edge.padding)


def _edges(layers: Sequence[Layer], kernels: Sequence[Sequence[int]]) -> list[_Edge]:
    if any(len(row) != len(layers) for row in kernels):
        raise ValueError(
            f"kernels must have {len(layers)} columns, one a layer; its rows have {[len(r) for r in kernels]}"
        )
    edges = []
    for i, row in enumerate(kernels):
        present = [j for j, k in enumerate(row) if check_count(f"kernels[{i}]", k, 0)]
        if not present:
            raise ValueError(f"kernels[{i}] is all zero: a row needs at least one kernel")
        target = layers[i] if i < len(layers) else layers[max(present)]
        outputs = set()
        for j in present:
            source, k = layers[j], row[j]
            if source.height % target.height or source.width % target.width:
                raise ValueError(
                    f"row {i} of {target.height} x {target.width} must divide layer {j} of {source.height} x "
                    f"{source.width}: the image's size does not fit the strides"
                )
            stride = source.height // target.height
            if source.width // target.width != stride:
                raise ValueError(f"layer {j} must shrink alike in height and width on its way to row {i}")
            full = k == source.height == source.width and target.height == target.width == 1
            padding = 0 if full else math.ceil((stride * (k - 2) + k) / 2)
            sizes = tuple((n + 2 * padding - k) // stride + 1 for n in (source.height, source.width))
            outputs.add(sizes)
            edges.append(_Edge(i, j, k, stride, padding, full))
        if len(outputs) > 1:
            raise ValueError(f"kernels[{i}] = {list(row)} give outputs of sizes {sorted(outputs)}, which must be one")
    return edges
