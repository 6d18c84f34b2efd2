"""The gradient step of ``benchmarks.fractional_sde`` in JAX: diffrax on the same augmented SDE, jitted.

    python -m benchmarks.fractional_sde_diffrax

Needs jax and diffrax, which the library does not.  The networks (two 200-200, tanh), batch, dimensions, processes and
weights are those of the other benchmark.  Seconds are of the processor, of a compiled call; compilation stands beside.
"""

import os
import time
from itertools import pairwise
from typing import Any

os.environ.setdefault("XLA_FLAGS", "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1")

import diffrax  # type: ignore[import-not-found,unused-ignore]
import jax  # type: ignore[import-not-found,unused-ignore]
import jax.numpy as jnp  # type: ignore[import-not-found,unused-ignore]
import torch

from benchmarks.fractional_sde import BATCH, DIM, PROCESSES, gradient_seconds, noise_of
from benchmarks.record import markdown_table, one_core, progress, spread

RUNS = {  # of `benchmarks.run`: name, title, arguments
    "sde-diffrax": ("Fractional SDEs: gradient steps by diffrax", ""),
}

SIZES = ([DIM, 200, 200, DIM], [DIM * (1 + PROCESSES), 200, 200, DIM])


class Noise(diffrax.AbstractTerm):  # type: ignore[misc,unused-ignore]
    """sum_k w_k dW for X, dW for each V, nothing for the KL."""

    path: Any
    total: float

    def vf(self, t: Any, y: Any, args: Any) -> Any:
        """Additive: nothing to evaluate."""
        return y

    def contr(self, t0: Any, t1: Any, **kwargs: Any) -> Any:
        """dW, ``(B, D)``."""
        return self.path.evaluate(t0, t1, **kwargs)

    def prod(self, vf: Any, control: Any) -> Any:
        """What dW does to the state."""
        _, v, kl = vf
        return self.total * control, jnp.broadcast_to(control[..., None], v.shape), jnp.zeros_like(kl)


def network(parameters: Any, h: Any) -> Any:
    for weight, bias in parameters[:-1]:
        h = jnp.tanh(h @ weight + bias)
    weight, bias = parameters[-1]
    return h @ weight + bias


def main() -> None:
    one_core()
    torch.set_num_threads(1)
    noise = noise_of(PROCESSES)
    weights, speeds = (jnp.asarray(v.numpy(), dtype=jnp.float32) for v in (noise.weights, noise.speeds))
    total = float(weights.sum())
    keys = iter(jax.random.split(jax.random.PRNGKey(0), 12))
    parameters = [
        [(jax.random.uniform(next(keys), (m, n), minval=-1, maxval=1) / m**0.5, jnp.zeros(n))
         for m, n in pairwise(sizes)]
        for sizes in SIZES
    ]  # fmt: skip

    def field(t: Any, y: Any, args: Any) -> Any:
        x, v, _ = y
        u = network(args[1], jnp.concatenate([x, v.reshape(len(x), -1)], -1))
        dx = network(args[0], x) - (v * (weights * speeds)).sum(-1) + total * u
        return dx, u[..., None] - speeds * v, 0.5 * u**2

    def loss(args: Any, key: Any, solver: Any, steps: int) -> Any:
        shape = jax.ShapeDtypeStruct((BATCH, DIM), jnp.float32)
        path = diffrax.VirtualBrownianTree(0.0, 1.0, tol=0.5 / steps, shape=shape, key=key)
        terms = diffrax.MultiTerm(diffrax.ODETerm(field), Noise(path, total))
        start = (jnp.zeros((BATCH, DIM)), jnp.zeros((BATCH, DIM, PROCESSES)), jnp.zeros((BATCH, DIM)))
        out = diffrax.diffeqsolve(
            terms, solver, 0.0, 1.0, 1 / steps, start, args, stepsize_controller=diffrax.ConstantStepSize(),
            max_steps=steps + 1,
        )  # fmt: skip
        x, _, kl = (part[-1] for part in out.ys)
        return (x**2).sum() + kl.sum()

    rows = []
    for solver in (diffrax.Euler(), diffrax.StratonovichMilstein(), diffrax.ReversibleHeun()):
        step = jax.jit(jax.value_and_grad(loss), static_argnums=(2, 3))
        try:
            started = time.process_time()
            jax.block_until_ready(step(parameters, jax.random.PRNGKey(1), solver, 100))
            compiled = time.process_time() - started
            seconds = []
            for i in range(7):
                started = time.process_time()
                jax.block_until_ready(step(parameters, jax.random.PRNGKey(i), solver, 100))
                seconds.append(time.process_time() - started)
        except Exception as error:
            print(type(solver).__name__, "failed:", str(error)[:300])
            continue
        rows.append({"solver": f"diffrax {type(solver).__name__}", "steps": 100, "seconds": spread(seconds),
                     "first call": round(compiled, 2)})  # fmt: skip
        progress(rows[-1])
    for name, steps in (("here", 100), ("here", 50), ("euler", 100)):
        rows.append({"solver": name, "steps": steps, "seconds": spread(gradient_seconds(name, steps, 9)),
                     "first call": ""})  # fmt: skip
    print(markdown_table(rows))


if __name__ == "__main__":
    main()
