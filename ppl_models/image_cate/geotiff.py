"""Image windows round places, from GeoTIFF files; needs rasterio, which is imported at the call."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ppl_models.base import check_count
from ppl_models.image_cate.checks import as_matrix

__all__ = ["Windows", "read_windows"]


@dataclass(frozen=True)
class Windows:
    """Square windows of a raster.

    Attributes:
        images: ``(N, C, size, size)``, float32; pixels that are not valid repeat the nearest row and column at the
            raster's edge, and hold the window's channel mean where the raster has no data.
        valid: pixels that the raster has ``(N, size, size)``, bool: inside it, and data in every band.
        lon_lat: the places asked for, in degrees ``(N, 2)``.
        pixel_size: width and height of a pixel in the raster's own units.
        crs: the raster's coordinate reference system.
        bands: numbers of the bands, from 1.
        acquired: date of the file's TIFFTAG_DATETIME, if it has one.
    """

    images: Tensor
    valid: Tensor
    lon_lat: Tensor
    pixel_size: tuple[float, float]
    crs: str
    bands: tuple[int, ...]
    acquired: date | None


def read_windows(
    path: str | Path, lon_lat: Any, size: int, bands: Sequence[int] | None = None, before: date | None = None
) -> Windows:
    """Windows of ``size x size`` pixels whose centre pixel holds the place (for an even size, the one right below
    centre).

    Args:
        path: a GeoTIFF file, or anything that rasterio opens.
        lon_lat: longitude and latitude in degrees, WGS 84, ``(N, 2)``.
        size: pixels a side.
        bands: numbers of the bands, from 1; None: all.
        before: date of treatment; images must be older, and the file must say so.

    Raises:
        ImportError: rasterio is not installed.
        FileNotFoundError: there is no such file.
        ValueError: coordinates out of range, a place outside the raster, an unknown band, a raster without
            georeference, an image that is not known to be older than ``before``.
    """
    try:
        import rasterio
        from rasterio.warp import transform
        from rasterio.windows import Window
    except ImportError as error:
        raise ImportError("GeoTIFF files are read by rasterio; run: pip install 'ppl-models[geotiff]'") from error

    places = as_matrix("lon_lat", lon_lat)
    if places.shape[1] != 2:
        raise ValueError(f"lon_lat must have shape (N, 2), longitude and latitude, got {tuple(places.shape)}")
    out = (places[:, 0].abs() > 180) | (places[:, 1].abs() > 90)
    if bool(out.any()):
        where = int(out.nonzero()[0])
        raise ValueError(
            f"lon_lat must hold longitude in [-180, 180] and latitude in [-90, 90] degrees, got "
            f"{places[where].tolist()} at index {where}"
        )
    size = check_count("size", size)
    if "://" not in str(path) and not Path(path).exists():
        raise FileNotFoundError(f"{path} does not exist")
    with rasterio.open(path) as source:
        if source.crs is None:
            raise ValueError(f"{path} has no coordinate reference system; windows cannot be placed")
        chosen = tuple(range(1, source.count + 1)) if bands is None else tuple(int(b) for b in bands)
        if not chosen or any(not 1 <= b <= source.count for b in chosen):
            raise ValueError(f"bands must be numbers from 1 to {source.count}, got {list(chosen)}")
        acquired = _acquired(source.tags().get("TIFFTAG_DATETIME"))
        if before is not None and (acquired is None or acquired >= before):
            raise ValueError(
                f"{path} must be older than the treatment of {before}, it "
                + (f"is of {acquired}" if acquired else "does not say when it was taken (TIFFTAG_DATETIME)")
            )
        x, y = transform("EPSG:4326", source.crs, places[:, 0].tolist(), places[:, 1].tolist())
        east_north, to_pixel = np.asarray([x, y, np.ones(len(x))]), ~source.transform
        column, row = np.floor(np.asarray(to_pixel).reshape(3, 3)[:2] @ east_north).astype(int)
        outside = (column < 0) | (column >= source.width) | (row < 0) | (row >= source.height)
        if outside.any():
            raise ValueError(
                f"lon_lat: {int(outside.sum())} of {len(places)} places lie outside {path}, the first at index "
                f"{int(np.flatnonzero(outside)[0])}"
            )
        images = np.empty((len(places), len(chosen), size, size), dtype=np.float32)
        valid = np.empty((len(places), size, size), dtype=bool)
        for i in range(len(places)):
            top, left = row[i] - size // 2, column[i] - size // 2
            up, low = max(top, 0), min(top + size, source.height)
            west, east = max(left, 0), min(left + size, source.width)
            window = Window.from_slices((up, low), (west, east))
            pixels = source.read(chosen, window=window).astype(np.float32)
            data = (source.read_masks(chosen, window=window) > 0).all(0) & np.isfinite(pixels).all(0)
            if not data.all():
                mean = pixels[:, data].mean(1) if data.any() else np.zeros(len(chosen), np.float32)
                pixels = np.where(data, pixels, mean[:, None, None])
            margin = ((up - top, top + size - low), (west - left, left + size - east))
            images[i] = np.pad(pixels, ((0, 0), *margin), mode="edge")
            valid[i] = np.pad(data, margin, constant_values=False)
        pixel_size = (abs(source.transform.a), abs(source.transform.e))
        crs = source.crs.to_string()
    return Windows(torch.from_numpy(images), torch.from_numpy(valid), places, pixel_size, crs, chosen, acquired)


def _acquired(text: str | None) -> date | None:
    """The date of a TIFF time stamp, ``YYYY:MM:DD HH:MM:SS``; ISO dates occur too."""
    if not text:
        return None
    try:
        return date.fromisoformat(text.strip()[:10].replace(":", "-"))
    except ValueError:
        return None
