"""Videos by a latent SDE: learned Hurst index against Brownian noise, the same network and the same steps.

    python -m benchmarks.fractional_sde_video                         both arms, then their figure
    python -m benchmarks.fractional_sde_video --arm brownian          one
    python -m benchmarks.fractional_sde_video --data pendulum

Two of scikit-learn's 8x8 digits that move and bounce on a 32x32 canvas, 15 frames, or a simulated double pendulum on
the same, 20 frames; 2,000 series, 4 latent dimensions, one solver step a frame.  The fractional arm has ``--seconds``
of one core, and the other as many steps: a few steps on a model that is thrown away say how many that is, which is
kept, so that an arm that was stopped goes on from its checkpoint by the same schedule.  Printed: peak signal-to-noise
ratio of reconstructions of held-out series (and of each series' mean frame), the bound of held-out series in nats, the
energy of frame differences of reconstructions and of prior samples over that of the data, H.  The figure shows held-out
series, their reconstructions and prior samples.
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.record import markdown_table, one_core, progress
from inference.runtime.generators import derive_seed
from ppl_models import LatentFractionalSDE
from ppl_models.datasets import double_pendulum, moving_digits
from ppl_models.fractional_sde.bound import PathBound

__all__ = ["compare", "run"]

RUNS = {  # of `benchmarks.run`: name, title, arguments
    "sde-video": ("Fractional SDEs: moving digits, learned H beside Brownian noise", ""),
}

SIDE, TRAIN, VALID, TEST = 32, 2000, 100, 100  # settings were chosen on the series between
NOISE_STD = 0.15  # of a pixel
PILOT = 30  # steps
ARMS = ("fractional", "brownian")


def videos(data: str) -> tuple[Tensor, Tensor]:
    """``(TRAIN, frames, 1, SIDE, SIDE)`` to learn from and ``(TEST, ...)``."""
    count = TRAIN + VALID + TEST
    if data == "pendulum":
        found = double_pendulum(count, 20, side=SIDE, seed=0)
    else:
        found = moving_digits(count, 15, side=SIDE, seed=0, enlarge=1)
    return found[:TRAIN], found[-TEST:]


def stem(data: str, arm: str, seed: int) -> str:
    return f"fractional_sde_video_{data}_{arm}_{seed}"


def decibel(found: Tensor, truth: Tensor) -> float:
    return float(-10 * (found - truth).square().mean().log10())


def energy(frames: Tensor) -> float:
    """Mean square of what a pixel changes by from frame to frame."""
    return float(frames.diff(dim=1).square().mean())


def build(arm: str, seed: int) -> LatentFractionalSDE:
    return LatentFractionalSDE((1, SIDE, SIDE), 4, 32, noise=arm, decoder="sprites", num_processes=5, seed=seed)


def held_out_bounds(model: LatentFractionalSDE, test: Tensor) -> Tensor:
    """The bound of each held-out series, ``(N,)``."""
    objective = PathBound(model, model._grid(model.data.times), 1, "elbo", 0)
    with torch.no_grad():
        each = [
            objective.evaluate(y.unsqueeze(0), torch.ones_like(y, dtype=torch.bool).unsqueeze(0), 8, derive_seed(0, i))
            for i, y in enumerate(test)
        ]
    return torch.stack([bound for bound, _ in each])


def steps_of(seconds: float, times: Tensor, train: Tensor, settings: dict[str, Any], kept: Path) -> int:
    """Steps that take ``seconds`` of the processor with fractional noise, by a pilot; the number is ``kept``."""
    if not kept.exists():
        model = build("fractional", settings["seed"])
        model.fit(times, train[:SIDE], num_steps=2, progress=False, **settings)  # what is loaded at the first call
        begin = time.process_time()
        model.fit(times, train, num_steps=PILOT, progress=False, **settings)
        kept.write_text(str(max(1, round(seconds * PILOT / (time.process_time() - begin)))))
    return int(kept.read_text())


def run(data: str, arm: str, seconds: float, seed: int, out: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Train an arm, or go on with it, and look at it: a row of figures, and what the figure shows."""
    train, test = videos(data)
    times = torch.arange(1, train.shape[1] + 1).float() / 10
    settings: dict[str, Any] = {
        "noise_std": NOISE_STD, "batch_size": 16, "lr": 3e-3, "seed": seed, "max_step": 0.1001
    }  # fmt: skip
    out.mkdir(parents=True, exist_ok=True)
    name = f"{stem(data, arm, seed)}_{seconds:g}"
    steps = steps_of(seconds, times, train, settings, out / f"{stem(data, 'both', seed)}_{seconds:g}.steps")
    model, spent = build(arm, seed), time.process_time()
    result = model.fit(
        times, train, num_steps=steps, checkpoint=out / f"{name}.checkpoint",
        progress=lambda fields: progress(fields) if fields["step"] % 200 == 0 else None, **settings,
    )  # fmt: skip
    assert result.history is not None
    progress(f"{result.summary()}; {time.process_time() - spent:.0f} s of the processor in this process")
    shown = model.reconstruct(4, observations=test).mean
    bounds = held_out_bounds(model, test)
    drawn = model.sample_prior(times, 100)
    row = {
        "noise": arm, "H": round(float(model.hurst), 3), "steps": steps, "seconds": round(result.history.seconds),
        "PSNR, dB": round(decibel(shown, test), 2),
        "of mean frames": round(decibel(test.mean(1, keepdim=True).expand_as(test), test), 2),
        "bound, nats": round(float(bounds.mean()), 1),
        "energy, reconstructions / data": round(energy(shown) / energy(test), 3),
        "energy, prior samples / data": round(energy(drawn) / energy(train), 3),
    }  # fmt: skip
    return row, {"shown": shown[:6], "drawn": drawn[:6], "test": test[:6], "bounds": bounds}


def compare(data: str, seconds: float, seed: int, out: Path) -> tuple[list[dict[str, Any]], float, float]:
    """Both arms and their figure: their rows, and by how much the bound with fractional noise is above the other, nats
    a series, with its standard error over series.
    """
    found = {arm: run(data, arm, seconds, seed, out) for arm in ARMS}
    gap = found["fractional"][1]["bounds"] - found["brownian"][1]["bounds"]
    figure({arm: pictures for arm, (_, pictures) in found.items()}, out / f"{stem(data, 'both', seed)}.png")
    return [row for row, _ in found.values()], float(gap.mean()), float(gap.std()) / len(gap) ** 0.5


def figure(kept: dict[str, dict[str, Tensor]], path: Path) -> None:
    """Held-out series, their reconstructions, and prior samples of both arms."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    names = {"fractional": "fractional", "brownian": "Brownian"}
    strips = []
    for i in range(2):
        strips.append(("held out", kept["fractional"]["test"][i]))
        strips += [(names[arm], kept[arm]["shown"][i]) for arm in ARMS]
    strips += [(f"{names[arm]} prior", kept[arm]["drawn"][i]) for arm in ARMS for i in range(3)]
    frames = len(strips[0][1])
    drawn, axes = plt.subplots(len(strips), frames, figsize=(0.5 * frames, 0.53 * len(strips)))
    for line, (label, strip) in zip(axes, strips, strict=True):
        for axis, frame in zip(line, strip, strict=True):
            axis.imshow(frame[0].numpy(), cmap="gray", vmin=0, vmax=1)
            axis.set(xticks=[], yticks=[])
        line[0].set_ylabel(label, rotation=0, ha="right", va="center", fontsize=7)
    drawn.subplots_adjust(wspace=0.06, hspace=0.06)
    drawn.savefig(path, dpi=150, bbox_inches="tight")
    plt.close(drawn)
    progress(f"written to {path}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", choices=("digits", "pendulum"), default="digits")
    parser.add_argument("--arm", choices=ARMS, help="one alone, without the figure")
    parser.add_argument("--seconds", type=float, default=600.0, help="of one core, the fractional arm")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("out"))
    given = parser.parse_args()
    one_core()
    torch.set_num_threads(1)
    if given.arm:
        print(json.dumps(run(given.data, given.arm, given.seconds, given.seed, given.out)[0]))
        return
    rows, gap, error = compare(given.data, given.seconds, given.seed, given.out)
    print(markdown_table(rows))
    print(f"bound, fractional minus Brownian: {gap:.1f} (standard error {error:.1f})")


if __name__ == "__main__":
    main()
