"""Windows of a GeoTIFF file that the test writes, pixel by pixel."""

import sys
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ppl_models.image_cate.geotiff import read_windows

WIDTH, HEIGHT, NO_DATA = 40, 30, 255

# rasterio multiplies its transforms in a way that a newer version of its dependency warns of.
pytestmark = pytest.mark.filterwarnings("ignore:Use `@` matmul:PendingDeprecationWarning")


@pytest.fixture
def raster(tmp_path: Path) -> tuple[Path, np.ndarray]:
    """Two bands on a UTM grid of 100 m in Uganda, whose values name row and column; one pixel without data."""
    rasterio = pytest.importorskip("rasterio", reason="rasterio is not installed; pip install 'ppl-models[geotiff]'")
    path = tmp_path / "tile.tif"
    values = np.indices((HEIGHT, WIDTH)).astype(np.uint8)
    values[:, 4, 6] = NO_DATA
    transform = rasterio.Affine(100, 0, 450_000, 0, -100, 150_000)
    with rasterio.open(
        path,
        "w",
        driver="GTiff",
        width=WIDTH,
        height=HEIGHT,
        count=2,
        dtype="uint8",
        crs="EPSG:32636",
        transform=transform,
        nodata=NO_DATA,
    ) as target:
        target.write(values)
        target.update_tags(TIFFTAG_DATETIME="2007:06:30 08:00:00")
    return path, values


def padded(values: np.ndarray, margin: tuple[int, int]) -> np.ndarray:
    return np.pad(values, ((0, 0), margin, margin), "edge")


def place(rows: Any, columns: Any) -> np.ndarray:
    """Longitude and latitude of pixels' centres."""
    from rasterio.warp import transform

    x = 450_000 + 100 * (np.asarray(columns) + 0.5)
    y = 150_000 - 100 * (np.asarray(rows) + 0.5)
    return np.column_stack(transform("EPSG:32636", "EPSG:4326", x.tolist(), y.tolist()))


def test_windows_are_centred_on_the_place(raster: tuple[Path, np.ndarray]) -> None:
    path, values = raster
    found = read_windows(path, place([15, 20], [20, 9]), 5)
    assert found.images.shape == (2, 2, 5, 5) and found.images.dtype.is_floating_point
    np.testing.assert_array_equal(found.images[0].numpy(), values[:, 13:18, 18:23])
    np.testing.assert_array_equal(found.images[1].numpy(), values[:, 18:23, 7:12])
    assert bool(found.valid.all())
    assert found.pixel_size == (100.0, 100.0) and found.crs == "EPSG:32636" and found.bands == (1, 2)
    assert found.acquired == date(2007, 6, 30)
    even = read_windows(path, place([15], [20]), 4, bands=[2])
    np.testing.assert_array_equal(even.images[0, 0].numpy(), values[1, 13:17, 18:22])


def test_past_the_edge_the_nearest_pixels_repeat_and_are_marked(raster: tuple[Path, np.ndarray]) -> None:
    path, values = raster
    found = read_windows(path, place([0, HEIGHT - 1], [0, WIDTH - 1]), 5)
    np.testing.assert_array_equal(found.images[0].numpy(), padded(values[:, :3, :3], (2, 0)))
    np.testing.assert_array_equal(found.images[1].numpy(), padded(values[:, -3:, -3:], (0, 2)))
    assert found.valid[0].sum() == 9 and bool(found.valid[0, 2:, 2:].all())
    assert found.valid[1].sum() == 9 and bool(found.valid[1, :3, :3].all())


def test_pixels_without_data_hold_the_windows_mean_and_are_marked(raster: tuple[Path, np.ndarray]) -> None:
    path, values = raster
    found = read_windows(path, place([4], [6]), 3)
    assert found.valid[0].tolist() == [[True] * 3, [True, False, True], [True] * 3]
    others = [int(values[0, r, c]) for r in (3, 4, 5) for c in (5, 6, 7) if (r, c) != (4, 6)]
    assert float(found.images[0, 0, 1, 1]) == pytest.approx(np.mean(others))


def test_images_must_be_older_than_the_treatment(raster: tuple[Path, np.ndarray], tmp_path: Path) -> None:
    path, _ = raster
    read_windows(path, place([15], [20]), 3, before=date(2008, 1, 1))
    with pytest.raises(ValueError, match="must be older than the treatment of 2007-01-01, it is of 2007-06-30"):
        read_windows(path, place([15], [20]), 3, before=date(2007, 1, 1))
    import rasterio

    undated = tmp_path / "undated.tif"
    with rasterio.open(path) as source, rasterio.open(undated, "w", **source.profile) as target:
        target.write(source.read())
    with pytest.raises(ValueError, match="does not say when it was taken"):
        read_windows(undated, place([15], [20]), 3, before=date(2008, 1, 1))


def test_bad_input(raster: tuple[Path, np.ndarray], tmp_path: Path) -> None:
    path, _ = raster
    good = place([15], [20])
    for lon_lat, size, bands, message in [
        ([[200.0, 0.0]], 3, None, r"longitude in \[-180, 180\]"),
        ([[0.0, 0.0]], 3, None, "1 of 1 places lie outside"),
        ([1.0, 2.0, 3.0], 3, None, r"shape \(N, 2\)"),
        (good, 0, None, "size must be at least 1"),
        (good, 3, [3], "bands must be numbers from 1 to 2, got"),
    ]:
        with pytest.raises(ValueError, match=message):
            read_windows(path, lon_lat, size, bands)
    with pytest.raises(FileNotFoundError, match="does not exist"):
        read_windows(tmp_path / "none.tif", good, 3)
    import rasterio

    bare = tmp_path / "bare.tif"
    with (
        pytest.warns(rasterio.errors.NotGeoreferencedWarning),
        rasterio.open(bare, "w", driver="GTiff", width=4, height=4, count=1, dtype="uint8") as target,
    ):
        target.write(np.ones((1, 4, 4), np.uint8))
    with (
        pytest.warns(rasterio.errors.NotGeoreferencedWarning),
        pytest.raises(ValueError, match="no coordinate reference"),
    ):
        read_windows(bare, good, 3)


def test_without_rasterio_the_error_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "rasterio", None)
    with pytest.raises(ImportError, match=r"pip install 'ppl-models\[geotiff\]'"):
        read_windows("tile.tif", [[32.0, 1.0]], 8)
