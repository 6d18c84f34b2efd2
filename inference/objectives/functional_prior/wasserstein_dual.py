"""1-Wasserstein distance between two laws of functions by its Kantorovich dual, with a neural critic.

``W1 = sup { E phi(g) - E phi(f) : phi 1-Lipschitz on R^M }``.  The critic ``phi`` is a 200-200-1 softplus net; the
constraint is a penalty on its gradient at random points between the two bags.

The inner maximisation is part of the *value* of this objective and not a fit of anything the user sees: the critic is
born, trained and dropped within one evaluation, on bags that only exist inside it.  That is why it lives here and not
in ``inference.fit``, which holds the outer loop.

References:
    Tran, Rossi, Milios and Filippone, All you need is a good functional prior for Bayesian deep learning, JMLR
    23(74), 2022, section 3. Gulrajani et al., Improved training of Wasserstein GANs, 2017 (two-sided penalty).
    Petzka, Fischer and Lukovnikov, On the regularization of Wasserstein GANs, 2018 (one-sided penalty).
"""

from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import softplus

from inference.objectives.functional_prior.discrepancy import check_bags

__all__ = ["Critic", "DualEstimate", "WassersteinDual"]

_CHECK_EVERY = 50  # steps between two looks of the host at the early-stop flag; each look waits for the accelerator
_ADAGRAD_EPS = 1e-10


class DualEstimate(NamedTuple):
    """A penalised dual summed over outputs, as the critic states it and corrected for its excess slope."""

    dual: Tensor
    corrected: Tensor


class Critic(NamedTuple):
    """A trained critic ``phi(f) = w3 . softplus(softplus(f W1 + b1) W2 + b2)``, up to a constant that always cancels.

    Attributes:
        w1: ``(M, H)``.
        b1: ``(H,)``.
        w2: ``(H, H)``.
        b2: ``(H,)``.
        w3: ``(H,)``.
        penalty: lambda, which the correction needs.
    """

    w1: Tensor
    b1: Tensor
    w2: Tensor
    b2: Tensor
    w3: Tensor
    penalty: float

    def __call__(self, f: Tensor) -> Tensor:
        """``phi`` of every function and output: ``(n, M, K)`` to ``(n, K)``."""
        return softplus(softplus(f.mT @ self.w1 + self.b1) @ self.w2 + self.b2) @ self.w3

    def estimate(self, f: Tensor, g: Tensor) -> DualEstimate:
        """``E phi(g) - E phi(f)`` on bags that the critic has not seen, and the same corrected; both have gradients.

        With a penalty ``lambda (|grad phi| - 1)^2`` the best critic has slope ``1 + W / (2 lambda)`` instead of 1 and
        so states ``W^ = W (1 + W / (2 lambda))``; solved for ``W`` this is ``lambda (sqrt(1 + 2 W^ / lambda) - 1)``,
        applied output by output (and odd in ``W^``, which can be negative on a fresh bag).
        """
        check_bags(f, g)
        dual = self(g).mean(0) - self(f).mean(0)
        corrected = dual.sign() * self.penalty * ((1 + 2 * dual.abs() / self.penalty).sqrt() - 1)
        return DualEstimate(dual.sum(), corrected.sum())


@dataclass(frozen=True)
class WassersteinDual:
    """W1 by a critic trained afresh at each evaluation: the discrepancy of the paper.

    Differences from the reference implementation, each of which biased it: Adagrad's accumulators start at zero with
    every critic; the penalty is one-sided by default (the two-sided one cannot represent the optimal critic in low
    dimension: for N(0, 4) against N(0, 1) on the line it stays near 0 where the truth is 0.798); the excess slope can
    be corrected.

    Args:
        num_steps: Adagrad ascent steps of the critic.
        lr: its step size.
        penalty: lambda.
        sides: ``"one"`` for ``lambda E max(0, |grad| - 1)^2`` ("lp"), ``"two"`` for ``lambda E (|grad| - 1)^2`` ("gp").
        hidden: width H of the two hidden layers.
        batch_size: functions per ascent step, taken from the bag in turn; ``None`` uses the whole bag at each step as
            the paper does.
        threshold: stop once the norm of the critic's gradient is below it; ``None`` never stops early.
        corrected: return the Lipschitz-corrected value instead of the critic's own.
    """

    num_steps: int = 200
    lr: float = 0.02
    penalty: float = 10.0
    sides: Literal["one", "two"] = "one"
    hidden: int = 200
    batch_size: int | None = None
    threshold: float | None = None
    corrected: bool = False

    def __post_init__(self) -> None:
        for name in ("num_steps", "lr", "penalty", "hidden", "batch_size", "threshold"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"{name} must be positive, got {value!r}")
        if self.sides not in ("one", "two"):
            raise ValueError(f'sides must be "one" or "two", got {self.sides!r}')

    def __call__(self, f: Tensor, g: Tensor) -> Tensor:
        """Scalar estimate from two bags ``(n, M, K)`` of equal size.

        The second halves train the critic, the first halves are scored.
        """
        check_bags(f, g, equal_size=True)
        half = f.shape[0] // 2
        if half < 2:
            raise ValueError(f"f and g must hold at least 4 functions to be split in two bags, got {f.shape[0]}")
        return self.score(self.fit(f[half:], g[half:]), f[:half], g[:half])

    def score(self, critic: Critic, f: Tensor, g: Tensor) -> Tensor:
        """The scalar that this discrepancy reports for a trained critic on fresh bags."""
        estimate = critic.estimate(f, g)
        return estimate.corrected if self.corrected else estimate.dual

    @torch.no_grad()
    def fit(self, f: Tensor, g: Tensor) -> Critic:
        """Train a critic on bags ``(n, M, K)``, which must not be those that it is scored on.

        One critic serves all outputs.  Draws from the global generator of the bags' device; never waits for the
        device, except every 50 steps when ``threshold`` is set (the stop itself takes effect at the very step).
        """
        check_bags(f, g, equal_size=True)
        n, points, outputs = f.shape
        size = n if self.batch_size is None else min(self.batch_size, n)
        blocks = n // size
        bag = torch.stack([f, g])[:, : blocks * size].transpose(-1, -2)  # (2, n, K, M)
        bag = bag.reshape(2, blocks, size * outputs, points).transpose(0, 1).reshape(blocks, 2 * size * outputs, points)
        theta = self._initial(points, f)
        squares = [torch.zeros_like(p) for p in theta]
        active = torch.ones((), dtype=f.dtype, device=f.device)
        for step in range(self.num_steps):
            z = bag[step % blocks]
            mix = torch.rand(size * outputs, 1, dtype=f.dtype, device=f.device)
            grads = _ascent_direction(theta, z, mix, 1 / size, self.penalty, self.sides == "one")
            if self.threshold is not None:
                norm = torch.stack([grad.square().sum() for grad in grads]).sum().sqrt()
                active = active * (norm >= self.threshold)
                grads = [grad * active for grad in grads]
                if step % _CHECK_EVERY == _CHECK_EVERY - 1 and not bool(active):
                    break
            for p, square, grad in zip(theta, squares, grads, strict=True):
                square.addcmul_(grad, grad)
                p.addcdiv_(grad, square.sqrt().add_(_ADAGRAD_EPS), value=self.lr)
        w1, b1, w2, b2, w3 = theta
        return Critic(w1, b1, w2, b2, w3, self.penalty)

    def _initial(self, points: int, like: Tensor) -> list[Tensor]:
        # Xavier-normal weights and N(0, 1) biases.  The output bias of the paper's critic cancels in all that is ever
        # computed.
        h = self.hidden
        shapes = [((points, h), points + h), ((h,), 2), ((h, h), 2 * h), ((h,), 2), ((h,), h + 1)]
        return [torch.randn(s, dtype=like.dtype, device=like.device) * (2 / fans) ** 0.5 for s, fans in shapes]


def _ascent_direction(
    theta: list[Tensor], z: Tensor, mix: Tensor, weight: float, penalty: float, one_sided: bool
) -> list[Tensor]:
    """Gradient in the critic's parameters of ``weight * (sum phi(g) - sum phi(f) - lambda sum pen(|grad phi(f^)|))``.

    ``z`` ``(2B, M)`` holds the rows of ``f``, then those of ``g``; ``f^ = mix f + (1 - mix) g``, row by row.  Written
    out by hand: the penalty needs second derivatives, and the double backward of autograd costs about twice as much.
    ``f^`` shares the products of the first layer with ``f`` and ``g``, since that layer is linear.
    """
    w1, b1, w2, b2, w3 = theta
    b = z.shape[0] // 2
    h1 = torch.addmm(b1, z, w1)
    h1 = torch.cat([h1, torch.lerp(h1[b:], h1[:b], mix)])
    a1, s1 = softplus(h1), h1.sigmoid()
    h2 = torch.addmm(b2, a1, w2)
    a2, s2 = softplus(h2[: 2 * b]), h2.sigmoid()

    # Input gradient at f^, and the derivative of the penalty through it.
    t1, t2 = s1[2 * b :], s2[2 * b :]
    u2 = t2 * w3
    v1 = u2 @ w2.T
    u1 = v1 * t1
    slope = u1 @ w1.T
    norm = slope.norm(dim=-1, keepdim=True).clamp_min(torch.finfo(z.dtype).tiny)
    excess = norm - 1
    if one_sided:
        excess = excess.clamp_min(0)
    p = (-2 * weight * penalty) * (excess / norm) * slope
    du1 = p @ w1
    dv1 = du1 * t1
    du2 = dv1 @ w2

    # Backward pass of all three groups of rows at once.
    d2 = torch.cat([s2[:b] * (-weight * w3), s2[b : 2 * b] * (weight * w3), du2 * u2 * (1 - t2)])
    d1 = (d2 @ w2.T) * s1
    d1_hat = d1[2 * b :].add_(du1 * u1 * (1 - t1))
    rows = torch.cat([d1[:b] + mix * d1_hat, d1[b : 2 * b] + (1 - mix) * d1_hat])
    return [
        torch.addmm(p.T @ u1, z.T, rows),
        d1.sum(0),
        torch.addmm(dv1.T @ u2, a1.T, d2),
        d2.sum(0),
        weight * (a2[b:].sum(0) - a2[:b].sum(0)) + (du2 * t2).sum(0),
    ]
