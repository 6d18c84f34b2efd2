"""Sampling that keeps statistics and no draws; names and meaning as in ``pyro.infer.mcmc.api.StreamingMCMC``."""

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from pyro.ops.streaming import CountMeanVarianceStats, StatsOfDict, StreamingStats
from torch import Tensor

from inference.kernels.base import Kernel
from inference.mcmc import MCMC
from inference.runtime.distributed import world_size

__all__ = ["StreamingMCMC"]


class StreamingMCMC(MCMC):
    """Run a kernel and keep no draws but what ``statistics`` makes of them, for models whose draws fill the memory.

    Args:
        kernel: a kernel of this library.
        num_samples: draws per chain.
        warmup_steps, initial_params: as in ``MCMC``.
        statistics: any of ``pyro.ops.streaming``; it is fed ``{(chain, site): value}`` for each draw.  Count, mean and
            variance of each site unless given.
        **options: further arguments of ``MCMC``, but for ``checkpoint``: to resume a run whose draws do not fit in
            memory, give ``MCMC`` a checkpoint folder, which keeps them on disk.

    Raises:
        ValueError: ``checkpoint`` or ``stop`` is given; the job has several ranks.
    """

    def __init__(
        self,
        kernel: Kernel,
        num_samples: int,
        warmup_steps: int | None = None,
        initial_params: Mapping[str, Tensor] | None = None,
        statistics: StreamingStats | None = None,
        num_chains: int = 1,
        **options: Any,
    ) -> None:
        for name in ("checkpoint", "stop"):
            if options.get(name) is not None:
                raise ValueError(f"StreamingMCMC keeps no draws and takes no {name}; use MCMC")
        super().__init__(kernel, num_samples, warmup_steps, initial_params, num_chains, **options)
        self._empty = StatsOfDict(default=CountMeanVarianceStats) if statistics is None else statistics
        self._statistics = copy.deepcopy(self._empty)

    def _make_store(self, chains: int, folder: Path | None) -> Any:
        if world_size() > 1:
            raise ValueError(f"StreamingMCMC does not merge statistics over {world_size()} ranks; use MCMC")
        self._statistics = copy.deepcopy(self._empty)
        return _StatisticsStore(self._statistics)

    def get_statistics(self, group_by_chain: bool = True) -> dict[Any, Any]:
        """What the statistics hold: by ``(chain, site)``, or by site over all chains."""
        if group_by_chain:
            result: dict[Any, Any] = self._statistics.get()
            return result
        merged: dict[str, StreamingStats] = {}
        parts = getattr(self._statistics, "stats", None)
        if parts is None:
            raise RuntimeError("statistics must be a StatsOfDict to be merged over chains")
        for (_, name), statistic in parts.items():
            merged[name] = merged[name].merge(statistic) if name in merged else statistic
        return {name: statistic.get() for name, statistic in merged.items()}

    def get_samples(self, num_samples: int | None = None, group_by_chain: bool = False) -> dict[str, Tensor]:
        """There are none.

        Raises:
            RuntimeError: always.
        """
        raise RuntimeError("StreamingMCMC keeps no draws; call get_statistics(), or use MCMC")

    def diagnostics(self) -> dict[str, Any]:
        """``r_hat`` of each site without splitting, from the chains' means and variances (Gelman and Rubin 1992)."""
        by_site: dict[str, list[dict[str, Any]]] = {}
        for (_, name), values in self._statistics.get().items():
            if not {"count", "mean", "variance"} <= set(values):
                raise RuntimeError("diagnostics need statistics with count, mean and variance")
            by_site.setdefault(name, []).append(values)
        result = {}
        for name, chains in by_site.items():
            means = torch.stack([c["mean"] for c in chains])
            within = torch.stack([c["variance"] for c in chains]).mean(0)
            count = chains[0]["count"]
            between = means.var(0) if len(chains) > 1 else torch.full_like(within, torch.nan)
            result[name] = {"r_hat": (((count - 1) / count * within + between) / within).sqrt()}
        return result


class _StatisticsStore:
    """Takes the place of the draws' store and feeds the statistics."""

    def __init__(self, statistics: StreamingStats) -> None:
        self._statistics = statistics

    def allocate(self, names: Mapping[str, Tensor], *, resume: bool) -> None:
        """Nothing is kept."""

    def write(self, start: int, values: Mapping[str, Tensor]) -> None:
        """Feed each chain's draws in their order."""
        draws = {n.removeprefix("draw/"): v.detach() for n, v in values.items() if n.startswith("draw/")}
        chains, count = next(iter(draws.values())).shape[:2]
        for draw in range(count):
            for chain in range(chains):
                self._statistics.update({(chain, name): v[chain, draw] for name, v in draws.items()})

    def tensors(self, stop: int) -> dict[str, Tensor]:
        """None."""
        return {}
