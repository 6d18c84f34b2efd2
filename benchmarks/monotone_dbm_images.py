"""Fashion-MNIST, partly seen: complete the image and name it, every method with the same seconds.

    python -m benchmarks.monotone_dbm_images train mdbm rbms sklearn logistic --seconds 300 --out out
    python -m benchmarks.monotone_dbm_images compare --out out
    python -m benchmarks.monotone_dbm_images styles --seconds 300 --out out
    python -m benchmarks.monotone_dbm_images colour --out out

``train`` gives each method that learns so many seconds of processor time, one thread, and keeps what it learned in
``out``; ``compare`` answers the same test images and masks with all that is there, and with neighbours, which learn
nothing.  All see the same four grey values.

* ``mdbm``: ``ConvMonotoneDBM``, its defaults for images of this size.
* ``styles``: the same with styles, trained and compared with neighbours by the command of this name.
* ``rbms``: Potts-Bernoulli machine of rbms 0.5.0 by persistent contrastive divergence, the class as ten more variables.
  ``validate`` chooses its settings on training images set aside.
* ``sklearn``: ``BernoulliRBM`` of scikit-learn on grey values and the class as one vector.
* ``logistic``: logistic regression on images with a mask drawn anew for each, by averaged stochastic gradients.
* neighbours by the observed pixels among all training images: the nearest one's label and pixels; the mean of five,
  which is what ``KNNImputer`` makes of complete donors, and the label of that mean's nearest neighbour.

``colour`` is the same of colour patches by ``ConvMonotoneDBM`` alone, with a picture.

Machines complete by 50 mean-field iterations with the observed pixels held, rbms also by the mean of 100 Gibbs sweeps.
"""

import argparse
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from benchmarks.record import markdown_table, progress, save
from ppl_models import ConvMonotoneDBM

RUNS = {  # of `benchmarks.run`: name, title, arguments
    "dbm-images-1": ("Monotone machines: training on Fashion-MNIST for equal time", "train --seconds 137"),
    "dbm-images-2": ("Monotone machines: labels and completion of Fashion-MNIST", "compare"),
    "dbm-images-styles": ("Monotone machines: styles on Fashion-MNIST for the same time", "styles --seconds 137"),
    "dbm-colour": ("Monotone machines: colour patches", "colour"),
}

Row = dict[str, Any]
Answer = tuple[Tensor | None, Tensor | None]  # pixels (n, 784), labels (n,)
_SHARES = (0.2, 0.4, 0.6)
_BATCH = 64
_RBMS_CHOICES = ((0.05, 1), (0.2, 1), (0.5, 1), (0.2, 5))  # rate of rbms's normalised gradient, sweeps a step
_RBMS = (0.5, 1)
_STYLES = 100


class Data(NamedTuple):
    """Grey values 0, 1/3, 2/3, 1 as rows of 784 pixels, with labels."""

    x: Tensor
    y: Tensor
    test: Tensor
    truth: Tensor


def load(size: int, tests: int) -> Data:
    """The first ``size`` training and ``tests`` test images."""
    from ppl_models.datasets import load_fashion_mnist

    data = load_fashion_mnist()
    x, test = ((part.flatten(1) * 3.999).floor() / 3 for part in (data.x_train[:size], data.x_test[:tests]))
    return Data(x, data.y_train[:size], test, data.y_test[:tests])


def spend(seconds: float, step: Callable[[int], None]) -> int:
    """Steps of which the last one ends after so many seconds of processor time."""
    started, made = time.process_time(), 0
    while time.process_time() - started < seconds:
        step(made)
        made += 1
    return made


def batches(data: Data, seed: int = 0) -> Callable[[], tuple[Tensor, Tensor]]:
    """Random minibatches, and the share of the pixels that a mask shows, drawn as the machine's training does."""
    random = torch.Generator().manual_seed(seed)

    def draw() -> tuple[Tensor, Tensor]:
        rows = torch.randint(len(data.x), (_BATCH,), generator=random)
        return data.x[rows], data.y[rows]

    return draw


# ---------------------------------------------------------------------- methods that learn
def train_mdbm(data: Data, seconds: float, path: Path) -> str:
    """As many steps as the seconds hold, by two short fits timed beforehand."""
    options: Row = {"observed_fraction": (0.2, 0.6), "batch_size": _BATCH, "progress": False}
    images = data.x.reshape(-1, 1, 28, 28)

    def fit(steps: int) -> tuple[ConvMonotoneDBM, float]:
        net, started = ConvMonotoneDBM((1, 28, 28), 4, 10), time.process_time()
        net.fit(images, data.y, num_steps=steps, **options)
        return net, time.process_time() - started

    few, more = fit(5)[1], fit(25)[1]
    each = (more - few) / 20
    steps = max(30, int((seconds - few) / each) + 5)
    net, spent = fit(steps)
    net.save(path)
    return f"{steps} steps in {spent:.0f} s"


def train_styles(data: Data, seconds: float, path: Path) -> str:
    """EM, and as many steps as the rest of the seconds holds by six steps timed beforehand."""
    net, images = ConvMonotoneDBM((1, 28, 28), 4, 10, styles=_STYLES), data.x.reshape(-1, 1, 28, 28)
    options: Row = {"observed_fraction": (0.2, 0.6), "batch_size": 32, "progress": False}
    started, spent = time.process_time(), [0.0]
    for steps in (1, 5):
        net.fit(images, data.y, num_steps=steps, lr=1e-3, **options)
        spent.append(time.process_time() - started)
    steps = max(1, int(5 * (seconds - spent[2]) / (spent[2] - spent[1])))
    net.fit(images, data.y, num_steps=steps, **options)
    net.save(path)
    return f"{_STYLES} styles of each class, {steps + 6} steps in {time.process_time() - started:.0f} s"


def train_sklearn(data: Data, seconds: float, path: Path) -> str:
    """256 hidden units on pixels and class."""
    from sklearn.neural_network import BernoulliRBM

    rbm, draw = BernoulliRBM(256, learning_rate=0.05, batch_size=_BATCH, n_iter=1, random_state=0), batches(data)

    def step(_: int) -> None:
        x, y = draw()
        rbm.partial_fit(torch.cat([x, torch.nn.functional.one_hot(y, 10).float()], 1).numpy())

    steps = spend(seconds, step)
    np.savez(path, w=rbm.components_, b=rbm.intercept_visible_, c=rbm.intercept_hidden_)
    return f"256 hidden, {steps} steps"


def train_rbms(data: Data, seconds: float, path: Path, choice: tuple[float, int] = _RBMS) -> str:
    """256 hidden units; the class is ten variables of which one is in state 1."""
    from rbms.potts_bernoulli.classes import PBRBM
    from rbms.potts_bernoulli.utils import ensure_zero_sum_gauge
    from rbms.training.pcd import fit_batch_pcd

    rate, sweeps = choice
    torch.manual_seed(0)
    joint = torch.cat([(3 * data.x).round(), torch.nn.functional.one_hot(data.y, 10).float()], 1)
    held = type("Held", (), {"data": joint})
    rbm = PBRBM.init_parameters(256, held, torch.device("cpu"), torch.float32)
    rbm.init_grad()
    optimizer = torch.optim.SGD(rbm.parameters(), lr=rate, maximize=True)
    chains = rbm.init_chains(256)
    state: Row = {"chains": chains}

    def step(_: int) -> None:
        rows = torch.randint(len(joint), (256,))
        batch = (joint[rows], torch.ones(256))
        state["chains"], _logs = fit_batch_pcd(batch, state["chains"], rbm, sweeps, 1.0)
        optimizer.step()
        ensure_zero_sum_gauge(rbm)

    with torch.no_grad():
        steps = spend(seconds, step)
    np.savez(path, w=rbm.weight_matrix.numpy(), b=rbm.vbias.numpy(), c=rbm.hbias.numpy())
    return f"256 hidden, {steps} steps of 256, rate {rate:g}, {sweeps} sweeps"


def train_logistic(data: Data, seconds: float, path: Path) -> str:
    """Multinomial, on pixels that are zero where hidden and on the mask beside them."""
    draw, random = batches(data), torch.Generator().manual_seed(1)
    w, b = torch.zeros(2 * 784, 10, requires_grad=True), torch.zeros(10, requires_grad=True)
    mean = [torch.zeros(2 * 784, 10), torch.zeros(10)]
    optimizer = torch.optim.SGD([w, b], lr=0.02)

    def step(number: int) -> None:
        x, y = draw()
        mask = (torch.rand(x.shape, generator=random) < 0.2 + 0.4 * torch.rand(len(x), 1, generator=random)).float()
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(torch.cat([x * mask, mask], 1) @ w + b, y).backward()
        optimizer.step()
        with torch.no_grad():
            for kept, now in zip(mean, (w, b), strict=True):
                kept.lerp_(now, max(1 / (number + 1), 1e-4))

    steps = spend(seconds, step)
    np.savez(path, w=mean[0].numpy(), b=mean[1].numpy())
    return f"{steps} steps"


TRAIN: dict[str, tuple[str, Callable[[Data, float, Path], str]]] = {
    "mdbm": ("dbm_images_mdbm.net", train_mdbm),
    "styles": ("dbm_images_styles.net", train_styles),
    "rbms": ("dbm_images_rbms.npz", train_rbms),
    "sklearn": ("dbm_images_sklearn.npz", train_sklearn),
    "logistic": ("dbm_images_logistic.npz", train_logistic),
}


# ---------------------------------------------------------------------- answers
def ask_mdbm(path: Path, x: Tensor, mask: Tensor) -> Answer:
    net, square = ConvMonotoneDBM.load(path), mask.reshape(-1, 28, 28)
    images = x.reshape(-1, 1, 28, 28)
    return net.complete(images, square).flatten(1), net.classify(images, square).argmax(1)


def ask_sklearn(path: Path, x: Tensor, mask: Tensor) -> Answer:
    """Mean field."""
    w, b, c = _arrays(path, "wbc")
    v = torch.cat([torch.where(mask, x, 0.5), torch.full((len(x), 10), 0.1)], 1)
    for _ in range(50):
        made = torch.sigmoid(torch.sigmoid(v @ w.T + c) @ w + b)
        v = torch.cat([torch.where(mask, x, made[:, :784]), made[:, 784:]], 1)
    return v[:, :784], v[:, 784:].argmax(1)


def ask_rbms(path: Path, x: Tensor, mask: Tensor, sweeps: int = 0) -> Answer:
    """Mean field, or the mean of the second half of so many Gibbs sweeps."""
    w, b, c = _arrays(path, "wbc")
    flat, levels = w.flatten(0, 1), torch.arange(4) / 3
    random = torch.Generator().manual_seed(0)
    given = torch.nn.functional.one_hot((3 * x).round().long(), 4).float()
    shown = mask[:, :, None]
    start = b.softmax(1).expand(len(x), -1, -1)
    v, total = torch.cat([torch.where(shown, given, start[:, :784]), start[:, 784:]], 1), torch.zeros_like(start)
    for number in range(sweeps or 50):
        h = torch.sigmoid(v.flatten(1) @ flat + c)
        if sweeps:
            h = torch.bernoulli(h, generator=random)
        made = ((h @ flat.T).unflatten(1, b.shape) + b).softmax(2)
        total = total + made * (number >= sweeps // 2) if sweeps else made
        if sweeps:
            drawn = (made.cumsum(2) < torch.rand(*made.shape[:2], 1, generator=random)).sum(2).clamp(max=3)
            made = torch.nn.functional.one_hot(drawn, 4).float()
        v = torch.cat([torch.where(shown, given, made[:, :784]), made[:, 784:]], 1)
    total = total / total.sum(2, keepdim=True)
    return total[:, :784] @ levels, total[:, 784:, 1].argmax(1)


def ask_logistic(path: Path, x: Tensor, mask: Tensor) -> Answer:
    w, b = _arrays(path, "wb")
    return None, (torch.cat([x * mask, mask.float()], 1) @ w + b).argmax(1)


def nearest(data: Data, x: Tensor, mask: Tensor, count: int) -> Tensor:
    """The training images that are nearest in the observed pixels, ``(n, count)``."""
    square = data.x.square()
    parts = [
        (m.float() @ square.T - 2 * (p * m) @ data.x.T).topk(count, largest=False).indices
        for p, m in zip(x.split(250), mask.split(250), strict=True)
    ]
    return torch.cat(parts)


def ask_one(data: Data, x: Tensor, mask: Tensor) -> Answer:
    found = nearest(data, x, mask, 1)[:, 0]
    return data.x[found], data.y[found]


def ask_five(data: Data, x: Tensor, mask: Tensor) -> Answer:
    filled = torch.where(mask, x, data.x[nearest(data, x, mask, 5)].mean(1))
    return filled, data.y[nearest(data, filled, torch.ones_like(mask), 1)[:, 0]]


def _arrays(path: Path, names: str) -> list[Tensor]:
    with np.load(path) as held:
        return [torch.tensor(held[name], dtype=torch.float32) for name in names]


def score(answer: Answer, x: Tensor, truth: Tensor, mask: Tensor) -> tuple[float, float]:
    """Accuracy, and mean squared error of the hidden pixels."""
    pixels, labels = answer
    error = float("nan") if pixels is None else float((pixels - x)[~mask].square().mean())
    return float("nan") if labels is None else float((labels == truth).float().mean()), error


def masks(count: int, seed: int) -> dict[float, Tensor]:
    return {s: torch.rand(count, 784, generator=torch.Generator().manual_seed(seed)) < s for s in _SHARES}


def compare(data: Data, out: Path, names: Sequence[str]) -> list[Row]:
    """Accuracy, error and seconds a thousand images of each method that is there, and of neighbours, at each observed
    share.
    """
    methods: dict[str, Callable[[Tensor, Tensor], Answer]] = {}
    asks = {"mdbm": ask_mdbm, "styles": ask_mdbm, "sklearn": ask_sklearn, "logistic": ask_logistic, "rbms": ask_rbms}
    for name in names:
        ask, path = asks[name], out / TRAIN[name][0]
        if path.exists():
            methods[name] = lambda x, m, ask=ask, path=path: ask(path, x, m)  # type: ignore[misc]
            if name == "rbms":
                methods["rbms by Gibbs"] = lambda x, m, path=path: ask_rbms(path, x, m, 100)  # type: ignore[misc]
    methods["1-NN"] = lambda x, m: ask_one(data, x, m)
    methods["5-NN imputation, 1-NN on it"] = lambda x, m: ask_five(data, x, m)
    methods["training mean"] = lambda x, m: (data.x.mean(0).expand(len(x), -1), None)
    rows: list[Row] = []
    for name, method in methods.items():
        row: Row = {"method": name}
        started = time.process_time()
        for share, mask in masks(len(data.test), 1).items():
            accuracy, error = score(method(data.test, mask), data.test, data.truth, mask)
            row[f"accuracy, MSE at {share:.0%}"] = f"{accuracy:.3f}, {error:.4f}"
        row["s a 1,000"] = f"{1000 * (time.process_time() - started) / len(_SHARES) / len(data.test):.2f}"
        rows.append(row)
        progress(row)
    return rows


def validate(data: Data, seconds: float, out: Path) -> list[Row]:
    """Settings of rbms on the last thousand training images, which it does not learn from."""
    kept, rows = data._replace(x=data.x[:-1000], y=data.y[:-1000]), []
    x, truth, mask = data.x[-1000:], data.y[-1000:], masks(1000, 2)[0.4]
    for choice in _RBMS_CHOICES:
        note = train_rbms(kept, seconds, out / "validate.npz", choice)
        for sweeps in (0, 100):
            accuracy, error = score(ask_rbms(out / "validate.npz", x, mask, sweeps), x, truth, mask)
            rows.append({"setting": note, "sweeps": sweeps, "accuracy": f"{accuracy:.3f}", "MSE": f"{error:.4f}"})
            progress(rows[-1])
    return rows


def colour(out: Path, steps: int = 80) -> list[Row]:
    """Patches of 32 x 32 colour pixels of scikit-learn's two photographs, the photograph as the class: completed and
    named where 40% of the pixels are seen, by what was learned in the left two thirds of each, in the right third.
    """
    import matplotlib.pyplot as plt
    from sklearn.datasets import load_sample_images

    photographs = [torch.tensor(image).permute(2, 0, 1).float() / 255 for image in load_sample_images().images]

    def patches(first: int, last: int, apart: int) -> tuple[Tensor, Tensor]:
        made = [p[:, :, first:last].unfold(1, 32, apart).unfold(2, 32, apart) for p in photographs]
        flat = [m.permute(1, 2, 0, 3, 4).reshape(-1, 3, 32, 32) for m in made]
        return torch.cat(flat), torch.arange(2).repeat_interleave(len(flat[0]))

    (x, y), (test, truth) = patches(0, 426, 8), patches(426, 640, 32)
    net = ConvMonotoneDBM((3, 32, 32), num_bins=4, num_classes=2)
    started = time.process_time()
    net.fit(x, y, (0.2, 0.6), num_steps=steps, batch_size=32, progress=False)
    spent = time.process_time() - started
    mask = torch.rand(len(test), 32, 32, generator=torch.Generator().manual_seed(0)) < 0.4
    shown = mask[:, None].float()
    near = [torch.nn.functional.avg_pool2d(v, 5, 1, 2, divisor_override=1) for v in (test * shown, shown)]
    mean = x.mean(0).expand_as(test)
    answers = {
        f"ConvMonotoneDBM, {steps} steps of 32 in {spent:.0f} s": net.complete(test, mask),
        "mean of the observed pixels among 5 x 5": torch.where(near[1] > 0, near[0] / near[1].clamp(min=1), mean),
        "training mean": mean,
    }
    hidden = ~mask[:, None].expand_as(test)
    rows: list[Row] = [
        {"method": name, "MSE": f"{float((made - test)[hidden].square().mean()):.4f}", "accuracy": ""}
        for name, made in answers.items()
    ]
    rows[0]["accuracy"] = f"{float((net.classify(test, mask).argmax(1) == truth).float().mean()):.3f} of {len(test)}"
    some = [*range(0, len(test) // 2, 13), *range(len(test) // 2, len(test), 13)][:12]
    figure, axes = plt.subplots(3, len(some), figsize=(len(some) * 0.8, 2.5), layout="constrained")
    seen = torch.where(mask[:, None], test, torch.ones_like(test))
    for line, pictures in zip(axes, (test, seen, net.complete(test, mask)), strict=True):
        for axis, number in zip(line, some, strict=True):
            axis.imshow(pictures[number].permute(1, 2, 0).clamp(0, 1))
            axis.axis("off")
    figure.savefig(out / "dbm_colour.png", dpi=150)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("train", "validate", "compare", "styles", "colour"))
    parser.add_argument("methods", nargs="*", help=f"which are trained, of {', '.join(TRAIN)}; all by default")
    parser.add_argument("--out", type=Path, default=Path("out"))
    parser.add_argument("--seconds", type=float, default=300.0, help="processor time of each method")
    parser.add_argument("--size", type=int, default=60_000, help="training images")
    parser.add_argument("--tests", type=int, default=1_000, help="test images")
    given = parser.parse_args()
    if unknown := set(given.methods) - set(TRAIN):
        parser.error(f"there is no method {', '.join(sorted(unknown))}")
    torch.set_num_threads(1)
    given.out.mkdir(parents=True, exist_ok=True)
    if given.what == "colour":
        rows = colour(given.out)
        print(f"\n{markdown_table(rows)}", flush=True)
        save(given.out / "dbm_images_colour.json", rows, ["torch", "scikit-learn"])
        return
    data = load(given.size, given.tests)
    if given.what == "train":
        for name in given.methods or TRAIN:
            file, train = TRAIN[name]
            print(f"{name}: {train(data, given.seconds, given.out / file)}", flush=True)
        return
    if given.what == "styles":
        print(f"styles: {train_styles(data, given.seconds, given.out / TRAIN['styles'][0])}", flush=True)
    if given.what == "validate":
        rows = validate(data, given.seconds, given.out)
    else:
        rows = compare(data, given.out, ["styles"] if given.what == "styles" else given.methods or list(TRAIN))
    print(f"\n{markdown_table(rows)}", flush=True)
    save(given.out / f"dbm_images_{given.what}.json", rows, ["torch", "scikit-learn", "rbms"])


if __name__ == "__main__":
    main()
