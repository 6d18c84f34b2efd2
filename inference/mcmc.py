"""The driver of all samplers: every chain in one program, with Pyro's names.

    kernel = HMC(model)
    mcmc = MCMC(kernel, num_samples=1000, warmup_steps=500, num_chains=4)
    mcmc.run(data)
    mcmc.summary()

The driver owns what kernels must not: random streams, minibatch indices, warm-up, thinning, progress, draws on disk,
checkpoints.  Steps run in blocks; noise and indices of a block are drawn at once, and nothing is read back within it.
"""

import functools
import itertools
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from inference._errors import CheckpointError, NonFiniteError, SamplerWarning
from inference.citation import Citable
from inference.kernels.base import Kernel, Noise, count
from inference.potential import InDims, LogDensity, Potential, PotentialFunction, Program
from inference.results import diagnostics as _diagnostics
from inference.results.export import to_arviz
from inference.results.predictive import exported_log_likelihood
from inference.results.verdict import warn_of_poor_mixing, warn_of_rounding, warn_of_run
from inference.runtime import distributed
from inference.runtime.checkpoint import fingerprint, identify
from inference.runtime.draws import DrawStore
from inference.runtime.generators import derive_seed
from inference.runtime.progress import Progress
from inference.runtime.sampler_files import SamplerFiles
from inference.runtime.state import restore
from inference.runtime.stopping import Stop, StopWatch
from inference.runtime.streams import Streams, block_steps

__all__ = ["MCMC"]

_INIT_TRIES = 100
_SHOWN = ("acceptance_rate", "step_size", "kinetic_temperature")


class MCMC(Citable):
    """Run a kernel for many chains and keep the draws; names and meaning as in ``pyro.infer.MCMC``.

    Args:
        kernel: a kernel of this library, built on a Pyro model.
        num_samples: draws kept per chain.
        warmup_steps: adaptation steps whose positions are discarded; ``num_samples`` if not given.
        initial_params: site name to unconstrained starting values ``(num_chains, *shape)``; with one chain, ``shape``
            alone will do, as in Pyro; beside a ``potential_fn`` a first dimension of one is that of chains.
        num_chains: chains, all advanced together.
        hook_fn: called after every step as ``hook_fn(kernel, values, stage, i)`` with the chains' unconstrained
            values, stage ``"Warmup"`` or ``"Sample"``. Slow.
        mp_context: accepted for Pyro's sake; chains are rows of one batch and no process is started.
        disable_progbar: no progress bar, as in Pyro; same as ``progress=False``.
        disable_validation: accepted for Pyro's sake; the model is validated once before sampling and never inside it.
        transforms: as in Pyro; overrides the kernel's.
        save_params: keep only these sites' draws.
        thin: steps per kept draw.
        seed: same seed, same machine, same draws to the bit; chain i's random numbers depend on nothing but the seed
            and i.
        minibatch: ``"shared"`` gives all chains the same indices at a step, ``"per_chain"`` each its own.
        checkpoint: a folder for draws and checkpoints.  If it holds an unfinished run of the same configuration and
            data, ``run`` goes on from there, to the bit.
        checkpoint_every: seconds between checkpoints.
        progress: ``True`` for a bar, ``False`` for none, or a function that receives a dict a block.
        compile: ``"auto"`` compiles the step for long runs (NUTS also within one, once its trees have made it long; the
            count of leapfrog steps decides, not a clock), ``True`` always, ``False`` never.
        chunk_size: most chains whose gradients are evaluated at once; by default what suits a core's cache.
        capture: ``False`` runs the Pyro model itself at every step, one chain at a time.
        stop: a ``Stop`` that ends the run before ``num_samples`` draws; looked at where blocks of steps end.
        in_dims: gives each chain its own data.  As in ``torch.func.vmap``: one entry per positional argument of
            ``run``, 0 for a tensor whose leading dimension is the chain, ``None`` for what all chains share; for
            keyword arguments a dict from names to entries, alone or as the last entry.  The model is written for one
            data set.  Adaptation stays pooled over chains.

    Under ``torchrun`` (or in a process group that the script has made) the chains are split over the ranks, each of
    which runs this with the same arguments. A chain's random numbers and starting point are those of its number among
    all, and adaptation is pooled over all, so that the draws are those of one process to rounding. Each rank keeps its
    chains' draws and its checkpoint in a folder of its own within ``checkpoint``. After the run rank 0 holds the draws
    of all chains, and warns and prints for all; the others hold those of their own (``chains`` says which). ``hook_fn``
    sees the rank's own chains.

    Raises:
        ValueError, TypeError: bad counts or arguments; a minibatch model in a Metropolis-corrected kernel; no finite
            starting point.
        NonFiniteError: every chain became non-finite.
        CheckpointError: the checkpoint folder belongs to another run, is damaged, or cannot be written.
        RankError: another rank of the job is gone.
    """

    def __init__(
        self,
        kernel: Kernel,
        num_samples: int,
        warmup_steps: int | None = None,
        initial_params: Mapping[str, Tensor] | None = None,
        num_chains: int = 1,
        hook_fn: Callable[..., None] | None = None,
        mp_context: str | None = None,
        disable_progbar: bool = False,
        disable_validation: bool | None = True,
        transforms: Mapping[str, Any] | None = None,
        save_params: list[str] | None = None,
        *,
        thin: int = 1,
        seed: int = 0,
        minibatch: str = "shared",
        checkpoint: str | Path | None = None,
        checkpoint_every: float = 30.0,
        progress: bool | Callable[[dict[str, Any]], None] = True,
        compile: bool | str = "auto",
        chunk_size: int | None = None,
        capture: bool = True,
        stop: Stop | None = None,
        in_dims: InDims = None,
    ) -> None:
        if not isinstance(kernel, Kernel):
            raise TypeError(
                f"kernel must be a kernel of this library (inference.HMC, SGHMC, ...), got {type(kernel).__name__}"
            )
        self.kernel = kernel
        self.num_samples = count("num_samples", num_samples, 1)
        self.warmup_steps = count("warmup_steps", num_samples if warmup_steps is None else warmup_steps, 0)
        self.num_chains = count("num_chains", num_chains, 1)
        self.thin = count("thin", thin, 1)
        if minibatch not in ("shared", "per_chain"):
            raise ValueError(f"minibatch must be 'shared' or 'per_chain', got {minibatch!r}")
        derive_seed(seed)
        self.seed, self.minibatch = seed, minibatch
        self.initial_params, self.hook_fn = initial_params, hook_fn
        self.transforms, self.save_params = transforms, save_params
        self.checkpoint = None if checkpoint is None else Path(checkpoint)
        self.checkpoint_every = checkpoint_every
        self.progress: bool | Callable[[dict[str, Any]], None] = False if disable_progbar else progress
        if stop is not None and not isinstance(stop, Stop):
            raise TypeError(f"stop must be an inference.Stop, got {stop!r}")
        self.stop = stop
        self.stopped: str | None = None  # why the run ended early, if a criterion of stop ended it
        self.compile, self.chunk_size, self.capture, self.in_dims = compile, chunk_size, capture, in_dims
        self.interrupted = False
        self.seconds = 0.0
        self.num_gradients = 0
        self._programs: list[Program] = []
        self.chains = range(num_chains)
        self._samples: dict[str, Tensor] | None = None
        self.sample_stats: dict[str, Tensor] = {}
        self._args: tuple[Any, ...] = ()
        self._kwargs: dict[str, Any] = {}
        self.potential: Potential | None = None

    @property
    def compiled(self) -> bool:
        """Whether the last run's steps were compiled."""
        return any(program.compiled for program in self._programs)

    # ------------------------------------------------------------------ running
    def run(self, *args: Any, **kwargs: Any) -> "MCMC":
        """Sample the posterior of ``model(*args, **kwargs)``.  ``KeyboardInterrupt`` ends the run and keeps the draws
        made so far.
        """
        self._args, self._kwargs = args, kwargs
        self.interrupted, self.stopped = False, None
        self._programs = []
        potential = self.potential = self._potential()
        if potential.plates and not self.kernel.stochastic:
            names = sorted(potential.plates)
            raise ValueError(
                f"{type(self.kernel).__name__} needs the exact density, but plate "
                f"{names[0]!r} is subsampled: its acceptance step would be wrong. "
                "Remove subsample_size, or use SGLD, SGHMC or AdaptiveSGHMC"
            )
        started = time.perf_counter()
        with torch.no_grad():
            self._sample(potential)
        self.seconds = time.perf_counter() - started
        return self

    def _potential(self) -> Potential:
        kernel = self.kernel
        own = kernel.own_potential(self._args, self._kwargs, self.in_dims)
        if own is not None:
            return own
        transforms = self.transforms or kernel.transforms
        if kernel.potential_fn is not None:
            if self.initial_params is None:
                raise ValueError("a kernel with potential_fn needs initial_params")
            if self.in_dims is not None:
                raise ValueError("in_dims maps the arguments of a model; a kernel with potential_fn has none")
            alone = self.num_chains == 1  # then the dimension of chains may be left out
            example = {n: v if alone and v.shape[:1] != (1,) else v[0] for n, v in self.initial_params.items()}
            density: LogDensity = PotentialFunction(kernel.potential_fn, example, transforms)
        else:
            assert kernel.model is not None
            density = LogDensity(
                kernel.model,
                self._args,
                self._kwargs,
                transforms=transforms,
                max_plate_nesting=kernel.max_plate_nesting,
                init_strategy=kernel.init_strategy,
                in_dims=self.in_dims,
            )
            if density.data and distributed.world_size() > 1:
                raise ValueError("in_dims is for one process; chains with data of their own are not split over ranks")
            if density.data and len(density.data[0]) != self.num_chains:
                raise ValueError(
                    f"in_dims maps arguments with {len(density.data[0])} rows over chains; num_chains is "
                    f"{self.num_chains}"
                )
        return Potential(density, chunk_size=self.chunk_size, capture=self.capture)

    def _sample(self, potential: Potential) -> None:
        kernel, own = self.kernel, distributed.shard(self.num_chains)
        noise_spec = kernel.noise(potential)
        kept = list(kernel.kept_steps(self.num_samples, self.thin))
        total = self.warmup_steps + kept[-1] + 1
        edges = self._edges(noise_spec, total)
        streams = Streams(self.seed, own, noise_spec, potential, self.minibatch)
        lift = functools.partial(self._lift, steps=total, potential=potential)
        run = kernel.runner(potential, lift, streams)

        files = None if self.checkpoint is None else SamplerFiles(self.checkpoint, self._identity(potential))
        if distributed.world_size() > 1:
            # The density's value may differ in its last bits between machines, as nothing else may.
            described = {n: fingerprint(v) for n, v in self._description(potential).items() if n != "density"}
            distributed.require_same(described)
        resumed = None if files is None else files.load(streams)
        state = kernel.init(self._starting_points(potential, own), potential)
        done, drawn, gradients, stats_example = 0, 0, 0, None
        watch = StopWatch(self.stop)
        if resumed is not None:
            state = restore(state, resumed[0])
            done, drawn, gradients = resumed[1]["step"], resumed[1]["drawn"], resumed[1]["num_gradients"]
            stats_example = resumed[1]["stats"]
            watch.next_look = resumed[1].get("next_look", watch.next_look)
        store = self._make_store(len(own), None if files is None else files.folder)
        example = self._select(potential.constrain(state.position))
        if resumed is not None and resumed[1]["sites"] != list(example):
            raise CheckpointError(
                f"the run in {self.checkpoint} keeps the sites {resumed[1]['sites']}, not {list(example)}: give it the "
                "save_params that it was started with, or another folder"
            )
        if stats_example is not None:
            store.allocate(self._columns(example, {n: state.position[:, 0] for n in stats_example}), resume=True)
            self.stopped = watch.agreed(drawn, self._shard_of_draws(store, drawn))
        shown = self.progress if distributed.is_main() else False
        bar = Progress(total, "sample" if not self.warmup_steps else "warmup", shown)
        kept_set = {self.warmup_steps + k for k in kept}
        last_saved = time.perf_counter()
        divergences = 0.0
        lost: list[int] = []
        ended = False
        diverged: Tensor | None = None  # since the last kept draw, over the blocks
        with bar, distributed.ending_together() as ending:
            try:
                for start, stop in itertools.pairwise(edges):
                    if self.stopped or stop <= done:
                        continue
                    positions, records = [], []
                    taken: int | Tensor = 0
                    for t, transition in enumerate(run(state, start, stop, self.warmup_steps), start=start):
                        state, info = transition.state, transition.info
                        taken = taken + transition.gradients
                        if self.hook_fn is not None:
                            self._hook(potential, state, t)
                        if "diverging" in info and t >= self.warmup_steps:
                            now = info["diverging"]
                            diverged = now.clone() if diverged is None else torch.maximum(diverged, now)
                            info = {**info, "diverging": diverged}
                        if t in kept_set:
                            positions.append(state.position.clone())
                            records.append({n: v.clone() for n, v in info.items()})
                            diverged = None
                    gradients += int(taken)
                    if positions:
                        stats = {n: torch.stack([r[n] for r in records], dim=1) for n in records[0]}
                        draws = self._constrain(potential, torch.stack(positions, dim=1))
                        if stats_example is None:
                            stats_example = list(stats)
                            store.allocate(self._columns(example, {n: s[:, 0] for n, s in stats.items()}), resume=False)
                        store.write(drawn, self._columns(draws, stats))
                        drawn += len(positions)
                        divergences += float(stats["diverging"].sum()) if "diverging" in stats else 0.0
                    # All collective calls of a run stand from here to the next block: ranks cannot miss each other.
                    lost = [own[i] for i in (~torch.isfinite(state.position).all(1)).nonzero()[:, 0].tolist()]
                    due = stop == total or time.perf_counter() - last_saved >= self.checkpoint_every
                    ended, due = self._agree(ending.requested, due, len(own) - len(lost), stop)
                    if ended:
                        raise KeyboardInterrupt
                    if stop <= self.warmup_steps:
                        state = kernel.end_window(state, stop, self.warmup_steps, potential)
                    done = stop
                    fields = {n: f"{info[n].mean().item():.3g}" for n in _SHOWN if n in info}
                    if divergences:
                        fields["divergences"] = f"{divergences:.0f}"
                    try:
                        bar.update(done, stage="warmup" if done < self.warmup_steps else "sample", **fields)
                    except KeyboardInterrupt:
                        if distributed.world_size() == 1:
                            raise
                        ending.requested = True
                    self.stopped = watch.agreed(drawn, self._shard_of_draws(store, drawn))
                    if files is not None and (due or self.stopped):
                        store.flush()
                        progress = {"step": done, "drawn": drawn, "num_gradients": gradients, "stats": stats_example}
                        progress["next_look"] = 0 if self.stopped else watch.next_look  # a stopped run looks again
                        files.save(state, streams, {**progress, "sites": list(example)})
                        last_saved = time.perf_counter()
                    if self.stopped:
                        break
            except KeyboardInterrupt:
                self.interrupted = True
                if not ended:  # raised here, by a hook: the others hear of it where their block ends
                    self._agree(True, False, 1, done)
        self._finish(store, own, drawn, lost, divergences, state.position)
        self.num_gradients = int(distributed.sum_over_ranks(torch.tensor(gradients, device="cpu")))

    @staticmethod
    def _agree(ended: bool, due: bool, fine: int, step: int) -> tuple[bool, bool]:
        """Whether any rank was asked to end, and whether rank 0's clock says that it is time to save.

        Raises:
            NonFiniteError: on all ranks, if no chain of any is left.
        """
        flags = torch.tensor([ended, due and distributed.is_main(), fine], dtype=torch.int64, device="cpu")
        ended, due, fine = distributed.sum_over_ranks(flags).tolist()
        if not fine:
            raise NonFiniteError(
                f"every chain had become non-finite by step {step}: use a "
                "smaller step size, or check the model's density and data"
            )
        return bool(ended), bool(due)

    def _lift(self, function: Callable[..., Any], calls_per_step: int, *, steps: int, potential: Potential) -> Program:
        calls = calls_per_step * steps
        program = Program(function, calls=calls, compile=self.compile, record=potential.captured)
        self._programs.append(program)
        return program

    @staticmethod
    def _shard_of_draws(store: DrawStore, drawn: int) -> dict[str, Tensor]:
        return {n.removeprefix("draw/"): v for n, v in store.tensors(drawn).items() if n.startswith("draw/")}

    def _make_store(self, chains: int, folder: Path | None) -> DrawStore:
        return DrawStore(chains, self.num_samples, folder)

    def _edges(self, spec: Noise, total: int) -> list[int]:
        block = block_steps(spec)
        inner = [b for b in (self.warmup_steps, *self.kernel.boundaries(self.warmup_steps)) if 0 < b < total]
        return sorted({0, total, *inner, *range(0, total, block)})

    # ------------------------------------------------------------------ starting points
    def _starting_points(self, potential: Potential, own: range) -> Tensor:
        """The positions of the chains ``own``, ``(chain, dim)``."""
        density = potential.density
        if self.initial_params is not None:
            given = dict(self.initial_params)
            if self.num_chains == 1:
                given = {
                    n: v
                    if n in density.sites and v.dim() == len(density.sites[n].unconstrained_shape) + 1
                    else v.unsqueeze(0)
                    for n, v in given.items()
                }
            position = density.flatten(given).detach().clone()
            if len(position) != self.num_chains:
                raise ValueError(f"initial_params hold {len(position)} chains; num_chains is {self.num_chains}")
            position = position[own.start : own.stop]
            bad = self._bad_starts(potential, position)
            if bad:
                raise ValueError(
                    f"initial_params give chains {[own[i] for i in bad]} a density or gradient that is not finite; "
                    "start them elsewhere"
                )
            return position
        assert isinstance(density, LogDensity)
        position = self._draw_starts(density, own, 0)
        for attempt in range(1, _INIT_TRIES + 1):
            bad = self._bad_starts(potential, position)
            if not bad:
                return position
            position[bad] = self._draw_starts(density, [own[i] for i in bad], attempt)
        raise ValueError(
            "no starting point with a finite density and gradient was found "
            f"in {_INIT_TRIES} tries for chains {[own[i] for i in bad]}: check the model for "
            "impossible observations, or give initial_params or an init_strategy"
        )

    def _draw_starts(self, density: LogDensity, chains: Sequence[int], attempt: int) -> Tensor:
        seeds = [derive_seed(self.seed, "init", chain, attempt) for chain in chains]
        return density.initial_positions(
            seeds, self.kernel.init_strategy, [[d[c] for d in density.data] for c in chains]
        )

    def _bad_starts(self, potential: Potential, position: Tensor) -> list[int]:
        energy, gradient = potential.value_and_grad(position, self._dry_batch(potential))
        fine = torch.isfinite(energy) & torch.isfinite(gradient).all(1)
        return (~fine).nonzero()[:, 0].tolist()

    def _dry_batch(self, potential: Potential) -> dict[str, Tensor]:
        return potential.density.minibatch(derive_seed(self.seed, "start"))

    # ------------------------------------------------------------------ draws
    def _select(self, values: dict[str, Tensor]) -> dict[str, Tensor]:
        if self.save_params is None:
            return values
        unknown = sorted(set(self.save_params) - set(values))
        if unknown:
            raise ValueError(
                f"save_params names sites {unknown} that the model does not have; its latent sites are {sorted(values)}"
            )
        return {n: values[n] for n in self.save_params}

    def _constrain(self, potential: Potential, positions: Tensor) -> dict[str, Tensor]:
        flat = potential.constrain(positions.flatten(0, 1))
        return {n: v.unflatten(0, positions.shape[:2]) for n, v in self._select(flat).items()}

    @staticmethod
    def _columns(draws: Mapping[str, Tensor], stats: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {**{f"draw/{n}": v for n, v in draws.items()}, **{f"stat/{n}": v for n, v in stats.items()}}

    def _hook(self, potential: Potential, state: Any, step: int) -> None:
        values = potential.density.unflatten(state.position.clone())
        warming = step < self.warmup_steps
        assert self.hook_fn is not None
        self.hook_fn(
            self.kernel, values, "Warmup" if warming else "Sample", step if warming else step - self.warmup_steps
        )

    def _finish(
        self, store: DrawStore, own: range, drawn: int, lost: list[int], divergences: float, position: Tensor
    ) -> None:
        """Keep the draws: on rank 0 those of all chains, on the others their own."""
        main = distributed.is_main()
        drawn = int(distributed.gather_rows(torch.tensor([drawn], device="cpu"), to_all=True).min())
        self.chains = range(self.num_chains) if main else own
        if not drawn:
            self._samples = None
            if self.interrupted and main:
                warnings.warn(
                    "the run was interrupted in its warm-up; there are no draws", SamplerWarning, stacklevel=4
                )
            return
        tensors = store.tensors(drawn)
        gathered = {n: distributed.gather_rows(v) for n, v in tensors.items()}
        tensors |= {n: v for n, v in gathered.items() if v is not None}
        self._samples = {n.removeprefix("draw/"): v for n, v in tensors.items() if n.startswith("draw/")}
        self.sample_stats = {n.removeprefix("stat/"): v for n, v in tensors.items() if n.startswith("stat/")}
        divergences = float(distributed.sum_over_ranks(torch.tensor(divergences, dtype=torch.float64, device="cpu")))
        everywhere = distributed.gather_rows(torch.tensor(lost, dtype=torch.int64, device="cpu"))
        if everywhere is None:
            return
        warn_of_run(
            interrupted=self.interrupted,
            lost=everywhere.tolist(),
            divergences=divergences,
            draws=drawn,
            asked=self.num_samples,
            chains=self.num_chains,
            stacklevel=4,
        )
        assert self.potential is not None
        if not self.kernel.stochastic and not self.potential.data:
            warn_of_poor_mixing(self._samples, stacklevel=4)
            warn_of_rounding(self.potential, position, stacklevel=4)

    # ------------------------------------------------------------------ checkpoints
    def _identity(self, potential: Potential) -> str:
        return fingerprint(self._description(potential))

    def _description(self, potential: Potential) -> dict[str, Any]:
        """What makes a run this one."""
        model = self.kernel.model if self.kernel.model is not None else self.kernel.potential_fn
        return {
            "model": getattr(model, "__qualname__", type(model).__qualname__),
            "kernel": type(self.kernel).__qualname__,
            "options": self.kernel.describe(),
            "gibbs": [repr(g) for g in getattr(self.kernel, "gibbs", ())],
            "run": [
                self.num_samples,
                self.warmup_steps,
                self.num_chains,
                self.thin,
                self.seed,
                self.minibatch,
                str(self.compile),
                self.capture,
            ],
            "density": potential.probe().hex(),
            "sites": [[s.name, list(s.shape), str(s.dtype)] for s in potential.sites.values()],
            "plates": [list(p) for p in potential.plates.values()],
            "data": [identify(a) for a in (*self._args, *self._kwargs.values())],
            "start": None if self.initial_params is None else {n: identify(v) for n, v in self.initial_params.items()},
        }

    # ------------------------------------------------------------------ results
    def _used(self) -> tuple[object, ...]:
        return (self.kernel,)

    def get_samples(self, num_samples: int | None = None, group_by_chain: bool = False) -> dict[str, Tensor]:
        """The draws by site on the run's device, ``(num_chains * draws, *shape)``, or ``(num_chains, draws, *shape)``
        with ``group_by_chain``; with ``num_samples`` that many are drawn from them with replacement, as in Pyro.
        """
        device = None if self.potential is None else self.potential.device
        samples = {n: v.to(device) for n, v in self._drawn().items()}
        if num_samples is not None:
            first = next(iter(samples.values()))
            size = first.shape[1] if group_by_chain else first.shape[0] * first.shape[1]
            rows = torch.randint(
                size, (num_samples,), generator=torch.Generator().manual_seed(derive_seed(self.seed, "resample"))
            )
            return {n: v[:, rows] if group_by_chain else v.flatten(0, 1)[rows] for n, v in samples.items()}
        return samples if group_by_chain else {n: v.flatten(0, 1) for n, v in samples.items()}

    def _drawn(self) -> dict[str, Tensor]:
        """The draws by chain where the run has put them, on the CPU."""
        if self._samples is None:
            raise RuntimeError("there are no draws yet; call run(...) first")
        return self._samples

    def summary(self, prob: float = 0.9) -> "_diagnostics.Summary":
        """Print and return mean, sd, median, interval, effective sample sizes and R-hat of every scalar."""
        self._refuse_pooling()
        table = _diagnostics.summary(self._drawn(), prob=prob)
        if not distributed.is_main():
            return table
        print(table)
        if "diverging" in self.sample_stats:
            print(f"Number of divergences: {int(self.sample_stats['diverging'].sum())}")
        return table

    def diagnostics(self) -> dict[str, Any]:
        """As in Pyro: ``n_eff`` and ``r_hat`` by site; by chain the divergent draws and the mean acceptance rate."""
        self._refuse_pooling()
        result: dict[str, Any] = {}
        for name, value in self._drawn().items():
            result[name] = {"n_eff": _diagnostics.ess_bulk(value), "r_hat": _diagnostics.rhat(value)}
        if "diverging" in self.sample_stats:
            flags = self.sample_stats["diverging"]
            result["divergences"] = {
                f"chain {c}": f.nonzero()[:, 0].tolist() for c, f in zip(self.chains, flags, strict=True)
            }
        else:
            result["divergences"] = {f"chain {c}": [] for c in self.chains}
        if "acceptance_rate" in self.sample_stats:
            rates = self.sample_stats["acceptance_rate"].mean(1)
            result["acceptance rate"] = {f"chain {c}": float(r) for c, r in zip(self.chains, rates, strict=True)}
        return result

    def to_arviz(
        self,
        *,
        dims: Mapping[str, list[str]] | None = None,
        coords: Mapping[str, Any] | None = None,
        log_likelihood: bool | None = None,
        **groups: Any,
    ) -> Any:
        """An ArviZ object (InferenceData in 0.2x, DataTree in 1.x) with posterior, sample_stats, log_likelihood and
        observed_data.

        Args:
            dims, coords: names of the sites' dimensions and their labels.
            log_likelihood: whether to evaluate the pointwise log-likelihood of the observed sites (needed for
                ``az.loo``); by default where there are any with likelihoods of their own.
            **groups: further groups of ``inference.to_arviz``, such as ``posterior_predictive``.
        """
        self._refuse_pooling()
        posterior = self.get_samples(group_by_chain=True)
        stats = dict(self.sample_stats)
        if "diverging" in stats:
            stats["diverging"] = stats["diverging"] > 0
        if "potential_energy" in stats:
            stats["lp"] = -stats.pop("potential_energy")
        if self.potential is not None and self.kernel.model is not None and self.save_params is None:
            if "log_likelihood" not in groups:
                has_data = bool(getattr(self.potential.density, "observed", True))
                run = self.kernel.model, posterior, self._args, self._kwargs
                found = exported_log_likelihood(log_likelihood, has_data, *run)
                groups |= {"log_likelihood": found} if found else {}
            groups.setdefault("observed_data", self._observed())
        return to_arviz(posterior, sample_stats=stats, dims=dims, coords=coords, **groups)

    def _refuse_pooling(self) -> None:
        if self.potential is not None and self.potential.data:
            raise ValueError(
                "the chains have their own data (in_dims) and so different posteriors, which these results would pool. "
                "get_samples(group_by_chain=True) and sample_stats hold the draws by chain; give the rows of one data "
                "set to inference.summary or inference.to_arviz"
            )

    def _observed(self) -> dict[str, Tensor]:
        assert self.potential is not None
        density = self.potential.density
        return {} if self.potential.plates else dict(getattr(density, "observed", {}))
