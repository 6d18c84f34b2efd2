"""Trials with images whose true effects are known.

``stripes`` is the design of the method's paper (Jerzak, Johansson, Daoud, CLeaR 2023, section 4) as far as it is
described: the direction of stripes is the effect type, their brightness drives the outcome without treatment, and the
noise is swept.
``trial_on_images`` puts a trial on images that the user has; ``village_trial`` makes a whole study (sites, several
units a site, coordinates, covariates, tiles) without private data.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from inference.runtime.generators import generator
from ppl_models.base import check_count, to_tensor

__all__ = ["SimulatedTrial", "laplacian_texture", "stripes", "trial_on_images", "village_trial"]


@dataclass(frozen=True)
class SimulatedTrial:
    """A trial and its truth.  N units, M images.

    Attributes:
        outcome: ``(N,)``.
        treatment: ``(N,)``, zeros and ones.
        images: ``(M, C, H, W)``.
        image_index: row of ``images`` of each unit ``(N,)``.
        propensity: ``(N,)``.
        types: true type of each image ``(M,)``, sorted by effect.
        effect: true effect of each unit ``(N,)``.
        type_effects: ``(K,)``, ascending.
        covariates: ``(N, P)``; P may be 0.
        covariate_names: P names.
        lon_lat: longitude and latitude of each image ``(M, 2)``; None where places mean nothing.
    """

    outcome: Tensor
    treatment: Tensor
    images: Tensor
    image_index: Tensor
    propensity: Tensor
    types: Tensor
    effect: Tensor
    type_effects: Tensor
    covariates: Tensor
    covariate_names: tuple[str, ...] = ()
    lon_lat: Tensor | None = None


def stripes(
    num_units: int,
    noise: float = 1.0,
    effects: Sequence[float] = (0.0, 2.0),
    size: int = 24,
    pixel_noise: float = 1.0,
    seed: int = 0,
) -> SimulatedTrial:
    """Striped images, one a unit: vertical, horizontal and, with a third effect, diagonal stripes.

    Phase and frequency (2 to 4 waves an image) are random; a brightness shift ``b ~ N(0, 0.5^2)`` is added to all
    pixels, and is the mean outcome without treatment.  Treatment is a fair coin.

    Args:
        num_units: N.
        noise: standard deviation of the outcome's noise; the paper's experiment sweeps it, here from 0.5 to 4.
        effects: of the two or three types, ascending.
        size: height and width.
        pixel_noise: standard deviation of the pixels' noise.
        seed: of everything.

    Raises:
        ValueError: other numbers of types, a negative noise.
    """
    num_units = check_count("num_units", num_units, 2)
    size = check_count("size", size, 4)
    tau = _effects(effects)
    if not 2 <= len(tau) <= 3:
        raise ValueError(f"effects must hold the effects of two or three types, got {len(tau)}")
    _check_noise("noise", noise)
    _check_noise("pixel_noise", pixel_noise)
    g = generator(seed, "stripes")
    types = torch.randint(len(tau), (num_units,), generator=g)
    frequency = 2 + 2 * torch.rand(num_units, 1, 1, generator=g)
    phase = 2 * math.pi * torch.rand(num_units, 1, 1, generator=g)
    brightness = 0.5 * torch.randn(num_units, generator=g)
    line = torch.arange(size) / size
    across, down = line.expand(size, size), line.unsqueeze(1).expand(size, size)
    position = torch.stack([across, down, (across + down) / math.sqrt(2)])[types]
    wave = torch.sin(2 * math.pi * frequency * position + phase)
    images = wave + brightness[:, None, None] + pixel_noise * torch.randn(num_units, size, size, generator=g)
    treatment = _both_arms(torch.full((num_units,), 0.5), g)
    effect = tau[types]
    outcome = brightness + treatment * effect + noise * torch.randn(num_units, generator=g)
    return SimulatedTrial(
        outcome=outcome,
        treatment=treatment,
        images=images.unsqueeze(1),
        image_index=torch.arange(num_units),
        propensity=torch.full((num_units,), 0.5),
        types=types,
        effect=effect,
        type_effects=tau,
        covariates=torch.empty(num_units, 0),
    )


def laplacian_texture(images: Any) -> Tensor:
    """Mean absolute Laplacian of the grey image, standardised over images: how rough a tile is, ``(M,)``."""
    grey = to_tensor("images", images).to(torch.get_default_dtype()).mean(1)
    inner = grey[:, 1:-1, 1:-1]
    around = grey[:, :-2, 1:-1] + grey[:, 2:, 1:-1] + grey[:, 1:-1, :-2] + grey[:, 1:-1, 2:]
    return _standardised((around - 4 * inner).abs().mean((1, 2)))


def trial_on_images(
    images: Any,
    effects: Sequence[float] = (0.0, 2.0),
    noise: float = 0.5,
    propensity: float = 0.5,
    units_per_image: int = 1,
    seed: int = 0,
) -> SimulatedTrial:
    """A semi-synthetic trial: real images, types by their roughness, everything else simulated.

    Images are cut into types of equal size by ``laplacian_texture``; the outcome without treatment is half the
    standardised brightness.

    Args:
        images: ``(M, C, H, W)``, finite.
        effects: of the K types, ascending, smooth tiles first.
        noise: standard deviation of the outcome's noise.
        propensity: probability of treatment.
        units_per_image: units that share an image.
        seed: of treatment and noise.

    Raises:
        ValueError: another shape, images that are all alike, a propensity outside (0, 1), a negative noise.
    """
    pictures = to_tensor("images", images)
    if pictures.ndim != 4 or min(pictures.shape[2:]) < 3:
        raise ValueError(f"images must have shape (M, C, H, W) with at least 3 x 3 pixels, got {tuple(pictures.shape)}")
    tau = _effects(effects)
    if len(pictures) < 2 * len(tau):
        raise ValueError(f"images must hold at least two images a type, {2 * len(tau)}, got {len(pictures)}")
    if not 0 < propensity < 1:
        raise ValueError(f"propensity must lie strictly between 0 and 1, got {propensity}")
    _check_noise("noise", noise)
    units_per_image = check_count("units_per_image", units_per_image)
    texture = laplacian_texture(pictures)
    types = texture.argsort().argsort() * len(tau) // len(texture)
    brightness = _standardised(pictures.to(texture.dtype).mean((1, 2, 3)))
    return _trial(pictures, types, tau, brightness, noise, propensity, units_per_image, generator(seed, "on_images"))


def village_trial(
    num_sites: int = 200,
    units_per_site: int = 8,
    effects: Sequence[float] = (0.1, 1.0),
    noise: float = 1.0,
    size: int = 32,
    seed: int = 0,
) -> SimulatedTrial:
    """A made-up country: villages on a smooth terrain, whose tiles are rugged (small effects) or farmed (large
    effects).

    Ruggedness is a smooth field over longitude and latitude; in rugged tiles brightness is rough at all scales, in
    farmed ones it is cut into bright rectangular fields.  Three channels (green, near infrared, short-wave infrared, as
    Landsat's) are shifted copies with noise.  Villages share a shock.  Covariates: age, and years of school with a few
    missing values.

    Args:
        num_sites: M villages, one tile each.
        units_per_site: people a village.
        effects: of the two types, ascending.
        noise: standard deviation of a person's noise; the village's shock has half of it.
        size: height and width of a tile.
        seed: of everything.

    Raises:
        ValueError: counts out of range, other numbers of types, a negative noise.
    """
    num_sites = check_count("num_sites", num_sites, 8)
    units_per_site = check_count("units_per_site", units_per_site)
    size = check_count("size", size, 8)
    tau = _effects(effects)
    if len(tau) != 2:
        raise ValueError(f"effects must hold the effects of two types, got {len(tau)}")
    _check_noise("noise", noise)
    g = generator(seed, "villages")
    place = torch.rand(num_sites, 2, generator=g)
    lon_lat = torch.tensor([30.0, 0.0]) + torch.tensor([5.0, 4.0]) * place
    terrain = torch.sin(4 * place[:, 0] + 1) + torch.sin(5 * place[:, 1]) + 0.6 * torch.randn(num_sites, generator=g)
    types = (terrain < terrain.median()).long()
    tone = 0.15 * torch.randn(num_sites, generator=g)
    images = _tiles(types, tone, size, g)
    return _trial(
        images, types, tau, _standardised(tone), noise, 0.5, units_per_site, g, site_shock=0.5 * noise, lon_lat=lon_lat
    )


def _trial(
    images: Tensor,
    types: Tensor,
    tau: Tensor,
    brightness: Tensor,
    noise: float,
    propensity: float,
    units_per_image: int,
    g: torch.Generator,
    site_shock: float = 0.0,
    lon_lat: Tensor | None = None,
) -> SimulatedTrial:
    num_images = len(images)
    index = torch.arange(num_images).repeat_interleave(units_per_image)
    n = len(index)
    probability = torch.full((n,), propensity)
    treatment = _both_arms(probability, g)
    effect = tau[types][index]
    baseline = 0.5 * brightness + site_shock * torch.randn(num_images, generator=g)
    outcome = baseline[index] + treatment * effect + noise * torch.randn(n, generator=g)
    covariates = torch.empty(n, 0)
    names: tuple[str, ...] = ()
    if lon_lat is not None:
        age = 18 + 20 * torch.rand(n, generator=g)
        school = torch.poisson(torch.full((n,), 6.0), generator=g)
        outcome = outcome + 0.1 * (school - 6)
        school[torch.rand(n, generator=g) < 0.01] = torch.nan
        covariates, names = torch.stack([age, school], 1), ("age", "years of school")
    return SimulatedTrial(
        outcome, treatment, images, index, probability, types, effect, tau, covariates, names, lon_lat
    )


def _tiles(types: Tensor, tone: Tensor, size: int, g: torch.Generator) -> Tensor:
    """Rugged tiles (type 0): noise of power 1 / f; farmed tiles (type 1): rectangles; ``(M, 3, H, W)`` about [0, 1]."""
    count = len(types)
    frequency = (torch.fft.fftfreq(size).square().unsqueeze(1) + torch.fft.rfftfreq(size).square()).sqrt()
    spectrum = torch.fft.rfft2(torch.randn(count, size, size, generator=g)) / frequency.clamp_min(1 / size) ** 0.8
    rugged = torch.fft.irfft2(spectrum, s=(size, size))
    rugged = rugged / rugged.std((1, 2), keepdim=True)
    # A field's brightness is looked up by which strip of rows and of columns a pixel lies in.
    cuts = torch.rand(count, 2, size, generator=g) < 6 / size
    strip = cuts.cumsum(2) % 16
    level = torch.randn(count, 16, 16, generator=g)
    rows = level.gather(1, strip[:, 0].unsqueeze(2).expand(-1, -1, 16))
    fields = rows.gather(2, strip[:, 1].unsqueeze(1).expand(-1, size, -1))
    grey = torch.where((types == 0)[:, None, None], rugged, fields)
    shift = torch.tensor([0.35, 0.45, 0.4])[None, :, None, None] + tone[:, None, None, None]
    gain = torch.tensor([0.08, 0.12, 0.1])[None, :, None, None]
    return shift + gain * grey.unsqueeze(1) + 0.02 * torch.randn(count, 3, size, size, generator=g)


def _both_arms(probability: Tensor, g: torch.Generator) -> Tensor:
    """A coin for each unit; of an arm that stays empty, which happens in tiny trials only, the last unit changes
    sides.
    """
    treatment = (torch.rand(len(probability), generator=g) < probability).to(probability.dtype)
    if float(treatment.sum()) in (0.0, float(len(treatment))):
        treatment[-1] = 1 - treatment[-1]
    return treatment


def _effects(effects: Sequence[float]) -> Tensor:
    tau = to_tensor("effects", effects).to(torch.get_default_dtype())
    if tau.ndim != 1 or bool((tau[1:] < tau[:-1]).any()):
        raise ValueError(f"effects must be a list of numbers in ascending order, got {tau.tolist()}")
    return tau


def _check_noise(name: str, value: float) -> None:
    if not (math.isfinite(value) and value >= 0):
        raise ValueError(f"{name} must be a standard deviation, not negative and finite, got {value}")


def _standardised(values: Tensor) -> Tensor:
    spread = values.std()
    if float(spread) <= 1e-12 * (1 + float(values.abs().max())):
        raise ValueError("images must differ in brightness and roughness, these are all alike")
    return (values - values.mean()) / spread
