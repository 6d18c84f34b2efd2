"""The contract of every kernel that ``inference.kernels`` exports: a new one inherits these tests by being exported.

One that needs an argument of its own, or more chains, says so in ``NEEDS``.
"""

import contextlib
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

from inference import MCMC, kernels
from inference.kernels import Kernel
from inference.kernels.base import StepInputs
from inference.kernels.parallel_tempering import ParallelTempering
from inference.potential import Program
from tests.accelerator import fake_accelerator
from tests.inference import zoo

KERNELS: list[type[Kernel]] = [
    value
    for name in kernels.__all__
    if isinstance(value := getattr(kernels, name), type)
    and issubclass(value, Kernel)
    and value is not Kernel
    and name not in ("DiscreteGibbs",)  # takes discrete sites alone; it has tests of its own
]
NEEDS: dict[type[Kernel], dict[str, Any]] = {
    kernels.SGLD: {"step_size": 0.01},
    kernels.SGHMC: {"step_size": 0.03},
    kernels.HMC: {"num_steps": 4},
    kernels.ParallelTempering: {"num_temperatures": 3},
}
CHAINS = 8  # MEADS folds its chains
LOGISTIC, DATA = zoo.CONTINUOUS["logistic"]

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*transitions diverged:inference.SamplerWarning", "ignore:.*under-dispersed:inference.SamplerWarning"
)
every_kernel = pytest.mark.parametrize("kind", KERNELS, ids=lambda kind: kind.__name__)


def run(kind: type[Kernel], *args: Tensor, model: Any = LOGISTIC, **options: Any) -> MCMC:
    settings = {"num_samples": 24, "warmup_steps": 16, "num_chains": CHAINS, "progress": False, "compile": False}
    return MCMC(kind(model, **NEEDS.get(kind, {})), **{**settings, **options}).run(*(args or DATA))  # type: ignore[call-arg]


def same(a: MCMC, b: MCMC) -> bool:
    one = {**a.get_samples(), **a.sample_stats}
    two = {**b.get_samples(), **b.sample_stats}
    return one.keys() == two.keys() and all(torch.equal(one[n], two[n]) for n in one)


@every_kernel
def test_interrupted_and_resumed_is_the_whole_run_and_seeds_count(kind: type[Kernel], tmp_path: Path) -> None:
    """Interrupted in the warm-up and again among the draws; what shows the progress does not change a bit."""
    whole, seen = run(kind), []

    def stop_at(step: int) -> Any:
        def stop(fields: dict[str, Any]) -> None:
            seen.append(fields)
            if fields["step"] >= step:
                raise KeyboardInterrupt

        return stop

    for step in (1, 17, 100):
        kernel_warns = pytest.warns(match="interrupted") if step < 100 else contextlib.nullcontext()
        with kernel_warns:
            resumed = run(kind, checkpoint=tmp_path, checkpoint_every=0.0, progress=stop_at(step))
    assert same(whole, resumed)
    assert all(0 < fields["step"] <= fields["total"] for fields in seen) and seen[-1]["step"] == seen[-1]["total"]
    assert not same(whole, run(kind, seed=1))
    data = whole.to_arviz()
    assert data["posterior"]["w"].shape == (CHAINS, 24, 3) and data["log_likelihood"]["y"].shape == (CHAINS, 24, 50)


@every_kernel
def test_all_chains_at_once_are_the_model_chain_by_chain(kind: type[Kernel]) -> None:
    """A recorded program over all chains, in chunks, against Pyro's own model in a loop: to rounding, as long as
    nothing has amplified it.  Single precision stays single precision.
    """
    short = {"num_samples": 3, "warmup_steps": 0 if kind is not ParallelTempering else 1}
    chunks, loop = run(kind, **short, chunk_size=3), run(kind, **short, capture=False)
    single = run(kind, *(d.float() for d in DATA), **short)
    for name, draws in chunks.get_samples().items():
        torch.testing.assert_close(draws, loop.get_samples()[name], rtol=1e-6, atol=1e-6)
        assert single.get_samples()[name].dtype == torch.float32 and draws.dtype == torch.float64


@every_kernel
def test_minibatches_are_taken_or_refused(kind: type[Kernel]) -> None:
    def model(x: Tensor, y: Tensor) -> None:
        w = pyro.sample("w", dist.Normal(x.new_zeros(3), 1.0).to_event(1))
        with pyro.plate("rows", len(x), subsample_size=10) as i:
            pyro.sample("y", dist.Normal(x[i] @ w, 1.0), obs=y[i])

    if kind.stochastic:
        assert bool(run(kind, zoo.X, zoo.Y, model=model).get_samples()["w"].isfinite().all())
    else:
        with pytest.raises(ValueError, match="'rows' is subsampled"):
            run(kind, zoo.X, zoo.Y, model=model)


@every_kernel
def test_bad_arguments_are_named(kind: type[Kernel]) -> None:
    options = NEEDS.get(kind, {})
    with pytest.raises(ValueError, match="exactly one of model and potential_fn"):
        kind(**options)
    with pytest.raises(ValueError, match="exactly one of model and potential_fn"):
        kind(LOGISTIC, potential_fn=LOGISTIC, **options)  # type: ignore[call-arg]
    with pytest.raises(TypeError, match="callable"):
        kind(3, **options)  # type: ignore[call-arg]
    for value, error in ((0.0, ValueError), (-1.0, ValueError), (float("nan"), ValueError), ("big", TypeError)):
        with pytest.raises(error, match="step_size"):
            kind(LOGISTIC, **{**options, "step_size": value})  # type: ignore[call-arg]


class Quadratic:
    """U = z' diag(k) z / 2 on any device."""

    def __init__(self, stiffness: Tensor) -> None:
        self.stiffness, self.dim, self.plates, self.captured = stiffness, len(stiffness), {}, True
        self.dtype, self.device, self.data = stiffness.dtype, stiffness.device, ()

    def value_and_grad(self, z: Tensor, batch: Any = None) -> tuple[Tensor, Tensor]:
        gradient = self.stiffness * z
        return 0.5 * (z * gradient).sum(1), gradient


class OneBlock:
    """Streams that hold one block of one step."""

    def __init__(self, inputs: StepInputs) -> None:
        self._inputs = StepInputs(*({n: v[None] for n, v in group.items()} for group in inputs))

    def block(self, steps: int, controls: Any, out: Any) -> StepInputs:
        return self._inputs


@pytest.mark.parametrize(
    "kind", [k for k in KERNELS if k not in (kernels.NUTS, ParallelTempering)], ids=lambda k: k.__name__
)
def test_a_step_stays_on_the_accelerator(kind: type[Kernel]) -> None:
    """A step and a window on fake tensors of another device, in single precision, which it keeps.

    The tests of NUTS and of parallel tempering, whose step is built otherwise, have their own.
    """
    fixed = {"adapt_step_size": False, "adapt_mass_matrix": False, "adapt_damping": False}
    code = kind.__init__.__code__
    accepted = {n: v for n, v in fixed.items() if n in code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]}
    sampler: Any = kind(potential_fn=lambda z: z, **accepted, **NEEDS.get(kind, {}))  # type: ignore[call-arg]
    with fake_accelerator() as device:
        potential: Any = Quadratic(torch.empty(3, device=device))
        state = sampler.init(torch.empty(CHAINS, 3, device=device), potential)
        spec = sampler.noise(potential)
        noise = {
            n: torch.empty(CHAINS, k, device=device) for n, k in (("normal", spec.normal), ("uniform", spec.uniform))
        }
        inputs = StepInputs(noise, {n: torch.empty((), device=device) for n in sampler.controls(0, 1, 10)}, {})
        lift = lambda function, calls: Program(function, record=False)  # noqa: E731
        step = sampler.build(potential, lift)
        if step is None:  # in place, by a clock
            state, info, _ = next(sampler.runner(potential, lift, OneBlock(inputs))(state, 0, 1, 10))
        else:
            state, info = step(state, inputs, 2)
        state = sampler.end_window(state, 8, 12, potential)  # no first window: chains far out are looked for there
        leaves = [v for v in state if isinstance(v, Tensor)] + list(info.values())
        assert leaves and all(v.device.type == device.type for v in leaves)
        assert all(v.dtype is torch.float32 for v in leaves if v.is_floating_point())
