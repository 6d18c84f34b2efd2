"""Videos by a latent SDE: learned Hurst index against Brownian noise, the same network and the same steps.

    python -m benchmarks.fractional_sde_video --arm fractional --stop 1000 --out out
    python -m benchmarks.fractional_sde_video --arm brownian --stop 1000 --out out
    python -m benchmarks.fractional_sde_video --figure --out out

Two of scikit-learn's 8x8 digits that move and bounce on a 20x20 canvas, 15 frames, or with ``--data pendulum`` a
simulated double pendulum on the same, 20 frames; 4 latent dimensions, one solver step a frame.  An arm is kept in a
checkpoint and goes on from it.  Written: peak signal-to-noise ratio of reconstructions of held-out series (and of each
series' mean frame), the bound of held-out series in nats, the energy of frame differences of prior samples over that of
the data, H; and pictures of both arms.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.record import one_core, save
from inference.runtime.generators import derive_seed
from ppl_models import LatentFractionalSDE
from ppl_models.datasets import double_pendulum, moving_digits
from ppl_models.fractional_sde.bound import PathBound

SIDE, TRAIN, TEST = 20, 1000, 100
NOISE_STD = 0.15  # of a pixel: near the error that both arms end with


def videos(data: str) -> Tensor:
    """``(TRAIN + TEST, frames, 1, SIDE, SIDE)``."""
    if data == "pendulum":
        return double_pendulum(TRAIN + TEST, 20, side=SIDE, seed=0)
    return moving_digits(TRAIN + TEST, 15, side=SIDE, seed=0, enlarge=1)


def stem(data: str, arm: str, seed: int) -> str:
    return f"fractional_sde_video_{'' if data == 'digits' else data + '_'}{arm}_{seed}"


def decibel(found: Tensor, truth: Tensor) -> float:
    return float(-10 * (found - truth).square().mean().log10())


def build(arm: str, seed: int) -> LatentFractionalSDE:
    return LatentFractionalSDE(
        (1, SIDE, SIDE), 4, 16, noise=arm, posterior="gaussian", num_processes=5, width=16, hidden=(64, 64), seed=seed
    )


def held_out_bounds(model: LatentFractionalSDE, test: Tensor) -> Tensor:
    """The bound of each held-out series, ``(N,)``."""
    objective = PathBound(model, model._grid(model.data.times), 1, "elbo", 0)
    with torch.no_grad():
        each = [
            objective.evaluate(y.unsqueeze(0), torch.ones_like(y, dtype=torch.bool).unsqueeze(0), 8, derive_seed(0, i))
            for i, y in enumerate(test)
        ]
    return torch.stack([bound for bound, _ in each])


def run(data: str, arm: str, steps: int, stop: int | None, seed: int, out: Path) -> dict[str, Any]:
    video = videos(data)
    train, test = video[:TRAIN], video[TRAIN:]
    times = torch.arange(1, video.shape[1] + 1).float() / 10
    model = build(arm, seed)

    def progress(fields: dict[str, Any]) -> None:
        if stop is not None and fields["step"] >= stop:
            raise KeyboardInterrupt

    name = stem(data, arm, seed)
    result = model.fit(
        times, train, noise_std=NOISE_STD, num_steps=steps, batch_size=16, lr=3e-3, seed=seed, progress=progress,
        checkpoint=out / f"{name}.checkpoint", max_step=0.1001,
    )  # fmt: skip
    assert result.history is not None
    print(result.summary(), flush=True)
    shown = model.reconstruct(4, observations=test).mean
    bounds = held_out_bounds(model, test)
    drawn = model.sample_prior(times, 100)
    row = {
        "data": data, "noise": arm, "seed": seed,
        "steps": result.history.num_steps, "seconds": round(result.history.seconds),
        "H": round(float(model.hurst), 3),
        "PSNR, dB": round(decibel(shown, test), 2),
        "PSNR of mean frames": round(decibel(test.mean(1, keepdim=True).expand_as(test), test), 2),
        "bound, nats": round(float(bounds.mean()), 1),
        "energy of differences, reconstruction / data": round(
            float(shown.diff(dim=1).square().mean() / test.diff(dim=1).square().mean()), 3
        ),
        "energy of differences, prior / data": round(
            float(drawn.diff(dim=1).square().mean() / train.diff(dim=1).square().mean()), 3
        ),
    }  # fmt: skip
    print(json.dumps(row), flush=True)
    torch.save(
        {"shown": shown[:6], "drawn": drawn[:6], "test": test[:6], "bounds": bounds},
        out / f"{name}.pt",
    )
    save(out / f"{name}.json", [row], ["torch"])
    return row


def figure(data: str, out: Path, seed: int) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    kept = {arm: torch.load(out / f"{stem(data, arm, seed)}.pt") for arm in ("fractional", "brownian")}
    gap = kept["fractional"]["bounds"] - kept["brownian"]["bounds"]
    print(f"bound, fractional minus Brownian: {float(gap.mean()):.1f} (s.e. {float(gap.std()) / len(gap) ** 0.5:.1f})")
    strips = [
        (label, item[i])
        for i in range(2)
        for label, item in (
            ("held out", kept["fractional"]["test"]),
            ("fractional", kept["fractional"]["shown"]),
            ("Brownian", kept["brownian"]["shown"]),
        )
    ]
    strips += [(f"{name} prior", kept[arm]["drawn"][i])
               for arm, name in (("fractional", "fractional"), ("brownian", "Brownian")) for i in range(3)]  # fmt: skip
    frames = len(strips[0][1])
    drawn, axes = plt.subplots(len(strips), frames, figsize=(0.5 * frames, 0.53 * len(strips)))
    for line, (label, strip) in zip(axes, strips, strict=True):
        for axis, frame in zip(line, strip, strict=True):
            axis.imshow(frame[0], cmap="gray", vmin=0, vmax=1)
            axis.set(xticks=[], yticks=[])
        line[0].set_ylabel(label, rotation=0, ha="right", va="center", fontsize=7)
    drawn.subplots_adjust(wspace=0.06, hspace=0.06)
    drawn.savefig(out / f"{stem(data, 'both', seed)}.png", dpi=150, bbox_inches="tight")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", choices=("digits", "pendulum"), default="digits")
    parser.add_argument("--arm", choices=("fractional", "brownian"), default="fractional")
    parser.add_argument("--steps", type=int, default=2600)
    parser.add_argument("--stop", type=int, help="steps after which to look, the schedule being that of all steps")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--figure", action="store_true")
    parser.add_argument("--out", type=Path, default=Path("out"))
    arguments = parser.parse_args()
    one_core()
    torch.set_num_threads(1)
    arguments.out.mkdir(parents=True, exist_ok=True)
    if arguments.figure:
        figure(arguments.data, arguments.out, arguments.seed)
    else:
        run(arguments.data, arguments.arm, arguments.steps, arguments.stop, arguments.seed, arguments.out)


if __name__ == "__main__":
    main()
