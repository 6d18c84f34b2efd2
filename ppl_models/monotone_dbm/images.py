"""Images with labels as a monotone Boltzmann machine: complete them, classify them, both from any part of them.

Pixels are binned; layers of hidden groups at lower resolutions and the label complete the model (Feng, Winston and
Kolter 2023, section 4, whose network the default follows).
"""

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from inference.objectives.masked import Head
from inference.runtime.generators import generator
from ppl_models.base import check_count, check_counts, from_array, to_tensor
from ppl_models.monotone_dbm.boltzmann import BoltzmannModel
from ppl_models.monotone_dbm.convolution import ConvOperator, Layer, check_layers, layer_groups
from ppl_models.monotone_dbm.groups import Groups
from ppl_models.monotone_dbm.jitter import jittered
from ppl_models.monotone_dbm.operators import Curvature, DenseOperator, check_bound
from ppl_models.monotone_dbm.pairwise import Query, to_mask
from ppl_models.monotone_dbm.styles import COUPLED, StyledOperator, class_styles
from ppl_models.monotone_dbm.training import DBMFit, check_run

__all__ = ["ConvMonotoneDBM"]

_TEMPERATURE = 10.0  # of pixels at the start of a fit: the setting that matters most
_LABEL_TEMPERATURE = 5.0  # of labels that are not summed over
_STYLE_TEMPERATURE = 0.5  # of styles of 64 pixels, which are not as independent as EM takes them to be
_STYLES_SUMMED = 8  # at most
_SMALL = 256  # pixels up to which a dense model is the default


class ConvMonotoneDBM(BoltzmannModel):
    """A joint model of images and labels with one mean-field answer to any query.

    Feng, Winston and Kolter, TMLR 2023, arXiv 2307.04990, section 4.

    ``net.fit(images, labels)``, then ``classify`` and ``complete`` from any observed pixels.  The queries of all
    pairwise models (``marginals``, ``sample``, ``log_partition``, ...) take states of all groups: pixels row by row (in
    each its colours), hidden groups, the label last.

    Layers are joined by convolutions.  In images of up to 256 pixels kernels that span the whole image are better and
    faster: there A is dense by default.  In larger square ones pixels meet their neighbours through 3 x 3 kernels, and
    hidden groups without places through kernels that span the image.

    Args:
        image_shape: ``(C, H, W)``.
        num_bins: equal bins of an intensity in [0, 1].
        num_classes: 0 for images without labels.
        hidden: hidden layers ``(channels, height, width, groups)``, or ``(channels, groups)`` without places; by
            default 32 groups of 4 states without places.
        kernels: ``kernels[i][j]``, the kernel from layer j (pixels, hidden layers, label) to row i; 0 for none.  By
            default 3 x 3 from each layer to its own row and those above, and the whole of each layer to rows without
            places.
        rank: rows of a dense A instead of convolutions; by default, in small images and if neither ``hidden`` nor
            ``kernels`` is given, one for each state, with which any Phi under the bound can be had.
        sum_labels: sum over the classes exactly, each a mean field of its own, instead of by mean field over pixels,
            hidden groups and label together.  A query then costs as much as one for each class.  The label's potentials
            need no bound, and what is seen decides among different pictures instead of one average: pixels and labels
            are both predicted better.  By default where the network is the default of small images.
        styles: looks of each class; other hidden groups are none by default then.  A hidden group of ``num_classes *
            styles`` states is summed over instead of the label, which follows from it (see ``styles``): the 8 most
            probable ones of each query.  A fit begins with a mixture of images for each class and goes on from there:
            the most accurate model of images.
        monotonicity, curvature: as in :class:`MonotoneDBM`; the widest bound by default.
        seed: of the initial potentials.

    Raises:
        TypeError, ValueError: sizes that do not fit the strides, or bad numbers.
    """

    kind: ClassVar[str] = "ConvMonotoneDBM"
    levels: Tensor

    def __init__(
        self,
        image_shape: Sequence[int],
        num_bins: int = 4,
        num_classes: int = 10,
        *,
        hidden: Sequence[Sequence[int]] | None = None,
        kernels: Sequence[Sequence[int]] | None = None,
        rank: int | None = None,
        sum_labels: bool | None = None,
        styles: int = 0,
        monotonicity: float = 0.01,
        curvature: Curvature = "pinsker",
        seed: int = 0,
    ) -> None:
        shape = check_counts("image_shape", image_shape)
        if len(shape) != 3:
            raise ValueError(f"image_shape must be (C, H, W), got {shape}")
        check_count("num_bins", num_bins, 2)
        if check_count("num_classes", num_classes, 0) == 1:
            raise ValueError("num_classes must be 0 (no labels) or at least 2, got 1")
        check_bound(monotonicity, curvature)
        for name, table in (("hidden", hidden), ("kernels", kernels)):
            if table is not None and not isinstance(table, list | tuple):
                raise TypeError(f"{name} must be a list of lists of integers, got {table!r}")
        channels, height, width = shape
        small = rank is None and hidden is None and kernels is None and height * width <= _SMALL
        if check_count("styles", styles, 0) and (not num_classes or sum_labels):
            raise ValueError(
                f"styles={styles} needs labels and no sum_labels=True: the label follows from the style that is summed "
                "over"
            )
        if sum_labels is None:
            sum_labels = small and num_classes > 0 and not styles
        elif not isinstance(sum_labels, bool):
            raise TypeError(f"sum_labels must be True or False, got {sum_labels!r}")
        elif sum_labels and not num_classes:
            raise ValueError("sum_labels=True, and the model has no labels (num_classes=0)")
        if small:
            hidden = [] if styles else [(4 * 32, 32)]
            rank = channels * num_bins * height * width + 4 * 32 * len(hidden) + num_classes
        elif hidden is None and styles:
            hidden = []
        elif hidden is None and (rank is not None or height == width):
            hidden = [(4 * 32, 32)]
        elif hidden is None:
            raise ValueError(
                f"images of {height} x {width} do not fit the default kernels, which are square: pad the images, or "
                "give hidden and kernels, or a rank"
            )
        given = [(channels * num_bins, height, width, channels), *hidden]
        layers = check_layers([*given, (num_classes, 1)] if num_classes else given)
        random, label = generator(seed, "potentials"), len(layer_groups(layers).sizes) - 1
        summed = label if sum_labels else None
        options: dict[str, Any] = {"unbounded": summed, "coupled": COUPLED if styles else 1.0}
        bounded: DenseOperator | ConvOperator
        if rank is not None:
            if kernels is not None:
                raise ValueError("give kernels for convolutions or rank for a dense model, not both")
            check_count("rank", rank)
            bounded = DenseOperator(layer_groups(layers), rank, monotonicity, curvature, random, **options)
        else:
            sizes = _default_kernels(layers, bool(styles)) if kernels is None else kernels
            options["seed_generator"] = random
            bounded = ConvOperator(layers, sizes, None, monotonicity, curvature, **options)
        if styles:
            summed = label
            others = bounded.groups.sizes
            groups = Groups([*others[:label], num_classes * styles, *others[label:]])
            super().__init__(StyledOperator(groups, bounded, label))
            self.most = _STYLES_SUMMED
        else:
            super().__init__(bounded)
        self.summed = summed
        self.image_shape, self.num_bins, self.num_classes, self.styles = shape, num_bins, num_classes, styles
        self.num_pixels = channels * height * width
        self.register_buffer("levels", torch.linspace(0, 1, num_bins))
        with torch.no_grad():
            if styles:  # the looks are sharp without temperatures, and too sure of themselves
                self.log_temperature[label] = math.log(_STYLE_TEMPERATURE * math.sqrt(64 / self.num_pixels))
            if not styles or rank is None:
                self.log_temperature[: self.num_pixels] = math.log(_TEMPERATURE)
                if num_classes and not sum_labels and not styles:
                    self.log_temperature[-1] = math.log(_LABEL_TEMPERATURE)
        self._config = {
            "image_shape": list(shape),
            "num_bins": num_bins,
            "num_classes": num_classes,
            "hidden": [list(map(int, layer)) for layer in hidden],
            "kernels": None if kernels is None else [list(map(int, row)) for row in kernels],
            "rank": rank,
            "sum_labels": sum_labels,
            "styles": styles,
            "monotonicity": float(monotonicity),
            "curvature": curvature if isinstance(curvature, str) else int(curvature),
            "seed": seed,
        }

    def config(self) -> dict[str, Any]:
        """The constructor's arguments."""
        return dict(self._config)

    # ------------------------------------------------------------------ training
    def fit(
        self,
        images: Any,
        labels: Any = None,
        observed_fraction: float | tuple[float, float] = 0.4,
        seed: int = 0,
        *,
        objective: str = "masked",
        num_steps: int | None = None,
        batch_size: int | None = 96,
        lr: float | None = None,
        label_weight: float = 0.5,
        labels_shown: float = 0.25,
        focal: float = 0.0,
        balance: float = 0.0,
        jitter: int = 0,
        annealed: float = 0.0,
        num_chains: int = 96,
        num_sweeps: int = 1,
        progress: bool | Callable[[dict[str, Any]], None] = True,
        checkpoint: str | Path | None = None,
    ) -> DBMFit:
        """Learn from images with labels.  A second fit goes on from the first, and keeps its styles.

        Args:
            images: ``(N, C, H, W)`` in [0, 1].
            labels: ``(N,)``, integers below ``num_classes``.
            observed_fraction: share of the pixels that masked training shows; of a pair, drawn for each image.
            seed: same seed, same machine, same parameters to the bit.
            objective: ``"masked"``, ``"elbo"`` or ``"pcd"`` (see ``MonotoneDBM.fit``).
            num_steps, lr: 1,000 and 0.02 by default.  With styles, of which EM has learned most before, 100 steps, at
                0.1 if kernels join the pixels, whose few weights are all that is left to learn, else at 0.001.
            batch_size, annealed, num_chains, num_sweeps, progress, checkpoint: as there.
            label_weight: share of the label's loss in the whole.
            labels_shown: share of the images whose label masked training shows, which teaches how the classes look.
            focal: gamma of the focal loss of pixels (published: 2); 0 for the likelihood.
            balance: beta of the class-balanced weights of bins (published: 0.9999); 0 for none.
            jitter: copies of each image to learn from as well, turned by up to 7 degrees, moved by up to a twentieth of
                the width and scaled by up to 5%; a third of what is seen in training then are copies.

        Raises:
            TypeError, ValueError: images or labels of other shapes or out of range.
        """
        num_steps = (100 if self.styles else 1000) if num_steps is None else num_steps
        if lr is None:
            lr = 0.02 if not self.styles else 0.1 if self._config["rank"] is None else 1e-3
        pixels = self._check_images("images", images)
        if isinstance(images, Tensor):  # the model goes where its data are, and takes their precision, not below single
            self.to(device=images.device, dtype=torch.promote_types(pixels.dtype, torch.float32))
            pixels = pixels.to(images.device)
        if check_count("jitter", jitter, 0):
            numbers = torch.arange(len(pixels), device=pixels.device).repeat(3 * jitter)
            labels = None if labels is None else self._check_labels(labels, len(pixels))[numbers]
            pixels = torch.cat([pixels.repeat(2 * jitter, 1, 1, 1), jittered(pixels, jitter, seed)])
        states = self.bin(pixels)
        visible = torch.arange(self.num_pixels, device=states.device)
        unit_of = visible // self.image_shape[0]
        heads = [Head(visible, 1.0, focal=focal, balance=balance)]
        if self.num_classes:
            if labels is None:
                raise ValueError(
                    f"labels are needed: the model has {self.num_classes} classes (num_classes=0 for none)"
                )
            if not 0 <= label_weight <= 1:
                raise ValueError(f"label_weight must lie in [0, 1], got {label_weight!r}")
            states = torch.cat([states, self._check_labels(labels, len(states))[:, None]], 1)
            visible = torch.cat([visible, visible.new_tensor([self.groups.num_groups - 1])])
            unit_of = torch.cat([unit_of, unit_of.max()[None] + 1])
            label = torch.tensor([self.num_pixels])
            heads = [heads[0]._replace(weight=1 - label_weight), Head(label, label_weight, labels_shown)]
        elif labels is not None:
            raise ValueError("labels were given and the model has none (num_classes=0)")
        if objective not in ("masked", "elbo", "pcd"):
            raise ValueError(f"objective must be one of masked, elbo, pcd, got {objective!r}")
        batch_size = check_run(len(states), batch_size, lr)
        loss = self._objective(
            objective,
            visible,
            heads,
            unit_of,
            observed_fraction,
            num_steps=num_steps,
            annealed=annealed,
            num_chains=num_chains,
            num_sweeps=num_sweeps,
            seed=seed,
        )
        self._learn_levels(pixels)
        if self.styles:
            self._start_styles(states, seed)
        else:
            self._start_bias(states[:, : self.num_pixels])
        return self._run_fit(loss, objective, (states,), num_steps, batch_size, lr, seed, progress, checkpoint)

    def calibrate(
        self, observed: Any, mask: Any, truth: Any, *, groups: Sequence[int] | None = None, num_steps: int = 200
    ) -> DBMFit:
        """As of every pairwise model, of the queries that :meth:`image_query` makes.

        Args:
            observed, mask, truth, num_steps: as there.
            groups: the label by default, if there is one, else the pixels.

        Raises:
            TypeError, ValueError: as there, or groups with the styles, of which nobody knows the truth.
        """
        last = self.groups.num_groups - 1
        if groups is None:
            groups = [last] if self.num_classes else range(self.num_pixels)
        elif self.styles and self.summed in groups:
            raise ValueError(
                f"groups must not hold {self.summed}, the styles, whose truth is not known: groups=[{last}] scales "
                "their temperature for the best likelihood of the label that follows from them"
            )
        return super().calibrate(observed, mask, truth, groups=list(groups), num_steps=num_steps)

    # ------------------------------------------------------------------ queries
    def classify(self, images: Any, mask: Any = None) -> Tensor:
        """Probabilities of the classes ``(N, num_classes)``, tempered, from the observed pixels.

        Args:
            images: ``(N, C, H, W)`` in [0, 1]; pixels that are not observed are not looked at.
            mask: True where observed, ``(N, H, W)``, ``(N, 1, H, W)``, ``(N, C, H, W)`` or ``(H, W)``; all without it.

        Raises:
            TypeError, ValueError: bad shapes, or a model without labels.
        """
        if not self.num_classes:
            raise ValueError("the model has no labels (num_classes=0): there is nothing to classify")
        query = self.image_query(images, mask)
        return torch.cat([self._predicted(part)[:, -self.num_classes :] for part in self._chunks(query)])

    def complete(self, images: Any, mask: Any = None, labels: Any = None) -> Tensor:  # type: ignore[override]
        """Images whose unobserved pixels are their expected intensities, ``(N, C, H, W)``.

        Args:
            images, mask: as in :meth:`classify`; with an empty mask the images are drawn up from the label alone.
            labels: known classes ``(N,)``, if any; negative for unknown.

        Raises:
            TypeError, ValueError: as in :meth:`classify`.
        """
        query = self.image_query(images, mask, labels)
        channels, height, width = self.image_shape
        made = []
        for part in self._chunks(query):
            probabilities = self._predicted_pixels(part)
            expected = (probabilities * self.levels.to(probabilities)).sum(-1)
            made.append(expected.reshape(-1, height, width, channels).permute(0, 3, 1, 2))
        given = self._check_images("images", images, self._pixel_mask(mask, images))
        shown = query.mask[:, : self.num_pixels].reshape(-1, height, width, channels).permute(0, 3, 1, 2)
        return torch.where(shown, given.to(made[0]), torch.cat(made))

    def pixel_probabilities(self, images: Any, mask: Any = None, labels: Any = None) -> Tensor:
        """Tempered probabilities of the bins of every pixel, ``(N, C, H, W, num_bins)``."""
        query = self.image_query(images, mask, labels)
        channels, height, width = self.image_shape
        parts = [self._predicted_pixels(part) for part in self._chunks(query)]
        return torch.cat(parts).reshape(-1, height, width, channels, self.num_bins).permute(0, 3, 1, 2, 4)

    # ------------------------------------------------------------------ between images and states
    def bin(self, images: Tensor) -> Tensor:
        """States of the pixels ``(N, H W C)``: K equal bins of [0, 1], the last one closed."""
        states = (images * self.num_bins).long().clamp(max=self.num_bins - 1)
        return states.permute(0, 2, 3, 1).flatten(1)

    def image_query(self, images: Any, mask: Any = None, labels: Any = None) -> Query:
        """Images, mask and labels as states and mask of all groups."""
        shown = self._pixel_mask(mask, images)
        pixels = self._check_images("images", images, shown)
        rows, count = len(pixels), self.groups.num_groups
        states = torch.zeros(rows, count, dtype=torch.long, device=pixels.device)
        known = torch.zeros(rows, count, dtype=torch.bool, device=pixels.device)
        known[:, : self.num_pixels] = shown.permute(0, 2, 3, 1).flatten(1)
        states[:, : self.num_pixels] = torch.where(known[:, : self.num_pixels], self.bin(pixels), 0)
        if labels is not None:
            if not self.num_classes:
                raise ValueError("labels were given and the model has none (num_classes=0)")
            given = self._check_labels(labels, rows, unknown=True)
            states[:, -1], known[:, -1] = given.clamp(min=0), given >= 0
        return Query(states, known)

    def _predicted(self, query: Query) -> Tensor:
        """The predictive, ``(B, N)``."""
        with torch.no_grad():
            q = self.groups.softmax(self.predictive_logits(query))
            return torch.where(self._free(query), q, self._clamped(query))

    def _predicted_pixels(self, query: Query) -> Tensor:
        return self._predicted(query)[:, : self.num_pixels * self.num_bins].unflatten(1, (-1, self.num_bins))

    def _check_images(self, name: str, images: Any, shown: Tensor | None = None) -> Tensor:
        """Finite images ``(N, C, H, W)`` in [0, 1], zero where they are not shown."""
        if not isinstance(images, Tensor):
            try:
                images = from_array(images)
            except (TypeError, ValueError, RuntimeError) as error:
                raise TypeError(f"{name} must be a tensor or a numeric array, got {type(images).__name__}") from error
        channels, height, width = self.image_shape
        value = images[:, None] if images.dim() == 3 and channels == 1 else images
        if shown is not None and value.shape == shown.shape and value.is_floating_point():
            value = torch.where(shown.to(value.device), value, torch.zeros_like(value))
        value = to_tensor(name, value).to(self.bias.device)
        if value.dim() != 4 or tuple(value.shape[1:]) != self.image_shape:
            raise ValueError(f"{name} must be (N, {channels}, {height}, {width}), got {tuple(value.shape)}")
        value = value if value.is_floating_point() else value.to(self.bias.dtype)
        low, high = float(value.min()), float(value.max())
        if low < 0 or high > 1:
            raise ValueError(f"{name} must lie in [0, 1], they reach from {low:.4g} to {high:.4g}; divide bytes by 255")
        return value

    def _pixel_mask(self, mask: Any, images: Any) -> Tensor:
        channels, height, width = self.image_shape
        rows = len(images)
        shape = (rows, channels, height, width)
        if mask is None:
            return torch.ones(shape, dtype=torch.bool, device=self.bias.device)
        known = to_mask(mask)
        known = known[:, None] if known.dim() == 3 else known
        try:
            return known.to(self.bias.device).expand(shape)
        except RuntimeError:
            raise ValueError(
                f"mask must be ({rows}, {height}, {width}), {shape} or ({height}, {width}), got {tuple(known.shape)}"
            ) from None

    def _check_labels(self, labels: Any, rows: int, unknown: bool = False) -> Tensor:
        value = to_tensor("labels", labels).to(self.bias.device)
        if value.dim() != 1 or len(value) != rows:
            raise ValueError(f"labels must be ({rows},), one an image, got {tuple(value.shape)}")
        whole = value.long()
        if not bool((whole == value).all()):
            raise ValueError("labels must be integers")
        low = int(whole.min())
        if int(whole.max()) >= self.num_classes or (low < 0 and not unknown):
            raise ValueError(f"labels must be 0 to {self.num_classes - 1}, they reach from {low} to {int(whole.max())}")
        return whole

    def _start_bias(self, states: Tensor) -> None:
        """Independent pixels' own frequencies, where the fit is the model's first."""
        with torch.no_grad():
            bias = self.bias[: self.num_pixels * self.num_bins]
            if not bool((bias == 0).all()):
                return
            counts = torch.stack([(states == k).sum(0) for k in range(self.num_bins)], 1).to(bias.dtype)
            frequency = (counts + 1) / (counts + 1).sum(1, keepdim=True)
            factor = self.log_temperature[: self.num_pixels].exp()
            bias.copy_(((frequency.log() - frequency.log().mean(1, keepdim=True)) / factor[:, None]).flatten())

    def _start_styles(self, states: Tensor, seed: int) -> None:
        """A mixture for each class, where the fit is the model's first; states of pixels and label."""
        operator = self.operator
        assert isinstance(operator, StyledOperator)
        if operator.begun:
            return
        pixels, labels = states[:, : self.num_pixels], states[:, -1]
        looks, own, bias = class_styles(pixels, labels, self.num_bins, self.num_classes, self.styles, seed)
        between = looks.new_zeros(len(operator.templates) - len(looks) - len(own), looks.shape[1])
        operator.begin(torch.cat([looks, between, own]))
        with torch.no_grad():
            self.bias[operator.start : operator.start + len(bias)] = bias

    def _learn_levels(self, pixels: Tensor) -> None:
        """The mean intensity of each bin; an empty one keeps its place between 0 and 1."""
        flat = pixels.flatten()
        place = (flat * self.num_bins).long().clamp(max=self.num_bins - 1)
        zero = torch.zeros(self.num_bins, dtype=flat.dtype, device=flat.device)
        counts = zero.index_add(0, place, torch.ones_like(flat))
        means = zero.index_add(0, place, flat) / counts.clamp(min=1)
        even = torch.linspace(0, 1, self.num_bins, dtype=flat.dtype, device=flat.device)
        self.levels = torch.where(counts > 0, means, even).to(self.levels)


def _default_kernels(layers: Sequence[Layer], styles: bool) -> list[list[int]]:
    if styles and len(layers) == 2:  # pixels, and a label that follows from the styles
        return [[3, 0], [0, 1]]
    rows = []
    for i, layer in enumerate(layers):
        placed = not layer.height == layer.width == 1
        rows.append([3 if placed else below.height for below in layers[: i + 1]] + [0] * (len(layers) - i - 1))
    return rows
