"""Convergence diagnostics of Markov chains: R-hat, effective sample sizes, Monte Carlo standard errors, E-BFMI.

Every function takes draws ``(chain, draw, *event)``, works in float64 on the tensor's own device, and treats all
scalars of the event at once.  With ``z`` the rank-normalised draws (equation 14 of Vehtari et al.), ``n`` the length of
a half chain, ``M`` the number of half chains and ``W``, ``B`` their within- and between-chain variances,

    R-hat = sqrt((B / W + n - 1) / n)              the larger one of ``z`` and of the folded ``|x - median|``
    ESS   = M n / tau,   tau = -1 + 2 sum_t rho_t  summed over Geyer's initial monotone sequence of lag pairs

The values, and what is returned where they are undefined, are those of ArviZ 0.23:

* one chain: R-hat is NaN, everything else is defined (each chain is split in two);
* any NaN among the draws of a scalar: all of that scalar's results are NaN;
* infinite draws: results that rest on ranks stay defined, those that rest on moments are NaN;
* a constant scalar: ESS is the number of draws, the error of its mean 0, its R-hat and the error of its sd NaN;
* chains that are each constant, at different values: R-hat is infinite;
* a range below 1e-15 in absolute terms counts as constant for the ESS of the mean and for the standard errors (that of
  the sd looks at squared deviations, so 3e-8 is the bound there): rescale such parameters;
* an odd number of draws: the middle draw of each chain is left out of the split.

References:
    Vehtari, Gelman, Simpson, Carpenter, Bürkner, Rank-normalization, folding, and localization: an improved R-hat for
    assessing convergence of MCMC, Bayesian Analysis 16(2), 2021 (arXiv:1903.08008).
    Geyer, Practical Markov chain Monte Carlo, Statistical Science 7(4), 1992, section 3.3.
    Betancourt, Diagnosing suboptimal cotangent disintegrations in Hamiltonian Monte Carlo, 2016 (arXiv:1604.00695).
"""

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from inference._checks import fraction

__all__ = [
    "Summary",
    "bfmi",
    "ess_bulk",
    "ess_mean",
    "ess_tail",
    "mcse_mean",
    "mcse_sd",
    "rhat",
    "rhat_nested",
    "summary",
]

_MIN_DRAWS = 4  # a half chain needs two draws to have a variance
_CONSTANT_RANGE = 1e-15  # ArviZ's bound: numpy.finfo(float).resolution
_TAIL_PROBS = (0.05, 0.95)
_COLUMNS = ("mean", "sd", "median", "hpdi_low", "hpdi_high", "mcse_mean", "ess_bulk", "ess_tail", "r_hat")

# Draws handled at a time.  On a CPU the temporaries should stay near the cache; an accelerator wants wide kernels, and
# 2**24 draws keep each of the dozen temporaries at 128 MiB.
_BLOCK_CPU = 2**18
_BLOCK_ACCELERATOR = 2**24


def rhat(x: Tensor) -> Tensor:
    """Rank-normalised split R-hat: the larger one of bulk and folded (Vehtari et al. 2021, section 4.1).

    Args:
        x: draws ``(chain, draw, *event)``, any real dtype.

    Returns:
        Tensor: float64 ``(*event)``; NaN for a single chain or a constant.

    Raises:
        TypeError: ``x`` is not a real tensor.
        ValueError: ``x`` has fewer than two dimensions, no chain, or fewer than four draws.
    """

    def statistic(block: Tensor) -> tuple[Tensor]:
        split = _split(block)
        return (_rhat(split, *_ranks_and_median(split)),)

    return _over_blocks(statistic, x)[0]


def rhat_nested(x: Tensor, superchains: int | Sequence[int] | Tensor) -> Tensor:
    """Nested R-hat, for many chains too short for R-hat itself (Margossian et al. 2024).

    Chains that start at one point form a superchain.  With K superchains of M chains of N draws, B the variance of the
    superchains' means, and W the mean over superchains of the variance of their chains' means plus the mean variance
    within their chains,

        nested R-hat = sqrt(1 + B / W)

    It is at least 1.  Even of chains that have converged it is about ``sqrt(1 + 1 / M)`` for N = 1, so M bounds what it
    can certify.  The draws are used as they are, without ranks or splits.

    Args:
        x: draws ``(chain, draw, *event)``, any real dtype; one draw a chain will do if superchains have two chains.
        superchains: their number, if they are runs of consecutive chains of equal length, or each chain's superchain,
            ``(chain,)`` integers.

    Returns:
        Tensor: float64 ``(*event)``; NaN for a scalar with a draw that is not finite or that is constant, infinite
        where only the superchains differ.

    Raises:
        TypeError: ``x`` is not a real tensor.
        ValueError: fewer than two superchains, of unequal sizes, or of a single draw each.

    References:
        Margossian, Hoffman, Sountsov, Riou-Durand, Vehtari, Gelman, Nested R-hat: assessing the convergence of Markov
        chain Monte Carlo when running many short chains, Bayesian Analysis, 2024 (arXiv:2110.13017).
    """
    if not isinstance(x, Tensor) or x.is_complex():
        raise TypeError(f"x must be a real tensor (chain, draw, ...), got {type(x).__name__}")
    if x.ndim < 2 or not x.shape[0] or not x.shape[1]:
        raise ValueError(f"x must be (chain, draw, ...) with at least one draw, got shape {tuple(x.shape)}")
    chains = len(x)
    if isinstance(superchains, int):
        if isinstance(superchains, bool) or superchains < 1 or chains % superchains:
            raise ValueError(f"superchains must divide the number of chains, {chains}; got {superchains!r}")
        ids = torch.arange(chains) // (chains // superchains)
    else:
        ids = torch.as_tensor(superchains).cpu()
        if ids.shape != (chains,) or ids.is_floating_point():
            raise ValueError(f"superchains must be a number or {chains} integers, one a chain; got {tuple(ids.shape)}")
    _, sizes = ids.unique(return_counts=True)
    if len(sizes) < 2 or (sizes != sizes[0]).any():
        raise ValueError(f"nested R-hat needs two or more superchains of one size; got sizes {sizes.tolist()}")
    members, draws = int(sizes[0]), x.shape[1]
    if members * draws < 2:
        raise ValueError("a superchain needs two draws: of one chain, or one draw each of two chains")
    values = x.detach().to(torch.float64)
    values = values - values[:1, :1]  # makes the variances of a constant exactly 0
    nested = values[ids.argsort(stable=True).to(x.device)].unflatten(0, (-1, members))
    chain_mean = nested.mean(2)
    within = nested.var(2).mean(1) if draws > 1 else torch.zeros_like(chain_mean[:, 0])
    if members > 1:
        within = within + chain_mean.var(1)
    between = chain_mean.mean(1).var(0)
    result = (1 + between / within.mean(0)).sqrt()
    return torch.where(torch.isfinite(x.detach()).all(0).all(0), result, torch.nan)


def ess_bulk(x: Tensor) -> Tensor:
    """Effective sample size of the rank-normalised draws (Vehtari et al. 2021, section 4.2).

    Arguments and errors as in :func:`rhat`.
    """
    return _over_blocks(lambda block: (_ess(_ranks_and_median(_split(block))[0]),), x)[0]


def ess_tail(x: Tensor) -> Tensor:
    """The smaller one of the effective sample sizes of the 5% and 95% quantiles (Vehtari et al. 2021, section 4.3).

    Arguments and errors as in :func:`rhat`.
    """
    return _over_blocks(lambda block: (_ess_tail(block, _sort(block.flatten(1))[0]),), x)[0]


def ess_mean(x: Tensor) -> Tensor:
    """Effective sample size of the mean, from the split draws as they are; arguments and errors as in :func:`rhat`."""
    return _over_blocks(lambda block: (_ess(_split(block)),), x)[0]


def mcse_mean(x: Tensor) -> Tensor:
    """Monte Carlo standard error of the mean, ``sd / sqrt(ess_mean)``; arguments and errors as in :func:`rhat`."""
    return _over_blocks(lambda block: (_mcse_mean(block),), x)[0]


def mcse_sd(x: Tensor) -> Tensor:
    """Monte Carlo standard error of the posterior standard deviation; arguments and errors as in :func:`rhat`.

    With ``v = (x - mean)**2``, the delta method gives ``sqrt(var(v) / ess_mean(v) / (4 mean(v)))``.
    """

    def statistic(block: Tensor) -> tuple[Tensor]:
        squares = _centre(block).square()
        second = squares.mean((-2, -1))
        variance = (squares.square().mean((-2, -1)) - second.square()) / _ess(_split(squares))
        return ((variance / second / 4).sqrt(),)

    return _over_blocks(statistic, x)[0]


def bfmi(energy: Tensor) -> Tensor:
    """Energy Bayesian fraction of missing information of each chain (Betancourt 2016).

    ``E-BFMI = mean_t (E_t - E_{t-1})**2 / var(E)``; below about 0.3 the momentum moves the energy too little.

    Args:
        energy: the Hamiltonian at each draw, ``(chain, draw)``.

    Returns:
        Tensor: float64 ``(chain,)``; NaN for a constant energy.

    Raises:
        TypeError: ``energy`` is not a real tensor.
        ValueError: ``energy`` is not ``(chain, draw)`` with at least four draws.
    """
    _check_draws(energy, "energy")
    if energy.ndim != 2:
        raise ValueError(f"energy must be (chain, draw), got shape {tuple(energy.shape)}")
    energy = energy.detach().to(torch.float64)
    energy = energy - energy[:, :1]  # makes the variance of a constant exactly 0
    return energy.diff(dim=-1).square().mean(-1) / energy.var(-1)


@dataclass(frozen=True)
class Summary:
    """Posterior summary of every scalar.

    Printing it gives an aligned table; ``summary["w"]["r_hat"]`` is a tensor of the site's shape.

    Attributes:
        sites: site name -> column -> float64 ``(*event)``.  The columns are mean, sd, median, hpdi_low, hpdi_high,
            mcse_mean, ess_bulk, ess_tail, r_hat.
        prob: probability mass of the highest-density interval.
        num_chains: number of chains.
        num_draws: number of draws a chain.
    """

    sites: dict[str, dict[str, Tensor]]
    prob: float
    num_chains: int
    num_draws: int

    def __getitem__(self, site: str) -> dict[str, Tensor]:
        return self.sites[site]

    def to_dict(self) -> dict[str, dict[str, float]]:
        """Plain numbers by scalar and column: ``{"w[0,1]": {"mean": ..., "r_hat": ...}, ...}``."""
        names, values = self._rows()
        return {name: dict(zip(_COLUMNS, row, strict=True)) for name, row in zip(names, values.tolist(), strict=True)}

    def table(self, max_rows: int | None = None) -> str:
        """The summary as aligned text.

        Args:
            max_rows: how many scalars to print at most (``None``: all); if some are left out, a line names the worst.
        """
        names, values = self._rows()
        shown = len(names) if max_rows is None else min(max_rows, len(names))
        formats = [_whole if column.startswith("ess") else _format for column in _COLUMNS]
        rows = [["", *_COLUMNS]]
        for name, row in zip(names[:shown], values[:shown].tolist(), strict=True):
            rows.append([name, *(form(value) for form, value in zip(formats, row, strict=True))])
        first, *widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = [
            name.ljust(first) + "".join(f"  {cell:>{width}}" for cell, width in zip(cells, widths, strict=True))
            for name, *cells in rows
        ]
        if shown < len(names):
            lines.append(f"... {len(names) - shown} more of {len(names)} scalars; {_worst(names, values)}")
        lines.append(f"{self.num_chains} chains of {self.num_draws} draws; the interval is the {self.prob:.4g} HPDI")
        return "\n".join(lines)

    def __str__(self) -> str:
        return self.table(max_rows=60)

    def _rows(self) -> tuple[list[str], np.ndarray]:
        """Names of all scalars, and their columns as ``(scalar, column)``."""
        names: list[str] = []
        blocks = [np.empty((0, len(_COLUMNS)))]
        for site, columns in self.sites.items():
            names.extend(f"{site}{suffix}" for suffix in _suffixes(columns["mean"].shape))
            blocks.append(torch.stack([columns[column].flatten() for column in _COLUMNS], dim=-1).cpu().numpy())
        return names, np.concatenate(blocks)


def summary(samples: Mapping[str, Tensor], prob: float = 0.9) -> Summary:
    """Mean, sd, median, highest-density interval and convergence diagnostics of every scalar.

    Args:
        samples: site name -> draws ``(chain, draw, *event)``; all sites share chain and draw.
        prob: mass of the interval, the shortest one that holds it (Chen and Shao 1999), between 0 and 1.

    Returns:
        Summary: per site and column a tensor of the site's shape, on the site's device; prints as a table.

    Raises:
        TypeError: ``samples`` is not a mapping of real tensors.
        ValueError: a site has too few dimensions or draws, or other chains and draws than the rest; or ``prob`` is not
            inside (0, 1).
    """
    if not isinstance(samples, Mapping):
        raise TypeError(f"samples must be a mapping from site names to tensors, got {type(samples).__name__}")
    prob = fraction("prob", prob)
    if not samples:
        raise ValueError("samples holds no site; there is nothing to summarise")
    for site, draws in samples.items():
        _check_draws(draws, f"samples[{site!r}]")
    shapes = {site: tuple(draws.shape[:2]) for site, draws in samples.items()}
    first, (num_chains, num_draws) = next(iter(shapes.items()))
    for site, shape in shapes.items():
        if shape != (num_chains, num_draws):
            raise ValueError(
                f"samples[{site!r}] has (chain, draw) = {shape}, but samples[{first!r}] has {(num_chains, num_draws)}"
            )
    sites = {
        site: dict(zip(_COLUMNS, _over_blocks(lambda block: _summarise(block, prob), draws), strict=True))
        for site, draws in samples.items()
    }
    return Summary(sites, prob, num_chains, num_draws)


def _summarise(x: Tensor, prob: float) -> tuple[Tensor, ...]:
    """The columns of a summary for draws ``(scalar, chain, draw)``; ranks, quantiles and interval share one sort."""
    flat = x.flatten(1)
    size = flat.shape[-1]
    ordered, order = _sort(flat)
    split = _split(x)
    if x.shape[-1] % 2 == 0:  # the split only relabels the chains: no second sort
        z, median = _rank_normalise(split, ordered, order), _median(ordered)
    else:
        z, median = _ranks_and_median(split)
    width = math.floor(prob * size)
    start = (ordered[:, width:] - ordered[:, : size - width]).argmin(-1, keepdim=True)
    return (
        flat.mean(-1),
        _sd(x),
        _median(ordered),
        ordered.gather(-1, start).squeeze(-1),
        ordered.gather(-1, start + width).squeeze(-1),
        _mcse_mean(x),
        _ess(z),
        _ess_tail(x, ordered),
        _rhat(split, z, median),
    )


def _rhat(split: Tensor, z: Tensor, median: Tensor) -> Tensor:
    """R-hat of half chains, given their normal scores and their median."""
    if split.shape[1] < 4:  # a single chain
        return split.new_full(split.shape[:1], torch.nan)
    bulk = _rhat_of_scores(z)
    folded = _rhat_of_scores(_ranks_and_median((split - median[:, None, None]).abs())[0])
    return torch.where(folded > bulk, folded, bulk)  # bulk where folding leaves a constant, whose own R-hat is NaN


def _rhat_of_scores(z: Tensor) -> Tensor:
    """R-hat of ``(scalar, chain, draw)`` without splitting or ranks (Vehtari et al. 2021, equations 1 to 4)."""
    n = z.shape[-1]
    between = n * z.mean(-1).var(-1)
    centred = z - z[..., :1]  # makes the variance of a constant chain exactly 0, also where its mean is rounded
    centred = centred - centred.mean(-1, keepdim=True)
    within = centred.square().sum(-1).mean(-1) / (n - 1)
    return ((between / within + n - 1) / n).sqrt()


def _ess(x: Tensor) -> Tensor:
    """Effective sample size of ``(scalar, chain, draw)`` by Geyer's initial monotone sequence, without splitting."""
    num_chains, n = x.shape[-2:]
    total = num_chains * n
    extent = x.amax((-2, -1)) - x.amin((-2, -1))
    chain_mean = x.mean(-1, keepdim=True)
    # Wiener-Khinchin: zero padding to 2n makes the circular autocovariance the plain one.  Only its mean over chains is
    # needed, so chains are averaged before the way back.
    length = 1 << (2 * n - 1).bit_length()
    padded = x.new_zeros(*x.shape[:-1], length)
    torch.sub(x, chain_mean, out=padded[..., :n])
    spectrum = torch.view_as_real(torch.fft.rfft(padded)).flatten(-2)
    power = (spectrum * spectrum).mean(-2).unflatten(-1, (-1, 2)).sum(-1)
    autocovariance = torch.fft.irfft(power, n=length)[..., :n] / n
    within = autocovariance[:, :1] * (n / (n - 1.0))
    var_plus = within * ((n - 1.0) / n) + chain_mean.squeeze(-1).var(-1, keepdim=True)
    rho = 1.0 - (within - autocovariance) / var_plus
    rho[:, 0] = 1.0

    # Pair k is rho[2k] + rho[2k+1].  The sequence runs while pairs stay positive, at most to ``last``; it is made
    # monotone by a running minimum; and of the pair that ends it only the even lag counts, if the pair or that lag is
    # not negative.
    last = max((n - 3) // 2, 0)
    even = rho[:, : 2 * last + 1 : 2]
    pairs = even + rho[:, 1 : 2 * last + 2 : 2]
    alive = (pairs[:, :last] > 0).cumprod(-1)
    ending = alive.sum(-1, keepdim=True)
    end_even, end_pair = even.gather(-1, ending), pairs.gather(-1, ending)
    remainder = torch.where(end_pair >= 0, end_even, end_even.clamp(min=0.0)).squeeze(-1)
    monotone = pairs[:, :last].cummin(-1).values if last else pairs[:, :0]
    tau = -1.0 + 2.0 * torch.where(alive.bool(), monotone, 0.0).sum(-1) + remainder
    ess = total / tau.clamp(min=1.0 / math.log10(total))  # the cap on antithetic chains: total * log10(total)
    ess = torch.where(rho[:, 1].isnan(), torch.nan, ess)
    return torch.where(extent < _CONSTANT_RANGE, float(total), ess)


def _ess_tail(x: Tensor, ordered: Tensor) -> Tensor:
    """The smaller ESS of the two tail indicators; ``ordered`` holds the sorted draws ``(scalar, chain * draw)``."""
    sizes = [_ess(_split((x <= _quantile(ordered, p)[:, None, None]).to(x.dtype))) for p in _TAIL_PROBS]
    return torch.minimum(*sizes)


def _mcse_mean(x: Tensor) -> Tensor:
    return _sd(x) / _ess(_split(x)).sqrt()


def _sd(x: Tensor) -> Tensor:
    """Standard deviation over chains and draws together; exactly 0 for a constant."""
    return _centre(x).flatten(1).square().sum(-1).div(x.shape[1] * x.shape[2] - 1).sqrt()


def _centre(x: Tensor) -> Tensor:
    """``(scalar, chain, draw)`` minus its mean; exactly 0 for a constant, whose rounded mean may differ from it."""
    x = x - x[:, :1, :1]
    return x - x.mean((-2, -1), keepdim=True)


def _split(x: Tensor) -> Tensor:
    """``(scalar, chain, draw)`` -> ``(scalar, 2 chain, draw // 2)``; an odd number of draws loses the middle one."""
    scalars, chains, draws = x.shape
    half = draws // 2
    if draws % 2:
        x = torch.cat((x[..., :half], x[..., -half:]), dim=-1)
    return x.reshape(scalars, 2 * chains, half)


def _ranks_and_median(x: Tensor) -> tuple[Tensor, Tensor]:
    ordered, order = _sort(x.flatten(1))
    return _rank_normalise(x, ordered, order), _median(ordered)


def _rank_normalise(x: Tensor, ordered: Tensor, order: Tensor) -> Tensor:
    """Normal scores of the ranks among all chains and draws, ties sharing their mean rank (equation 14).

    Args:
        x: ``(scalar, chain, draw)``, read for its shape only.
        ordered: its sorted values, ``(scalar, chain * draw)``.
        order: where each of them stood.
    """
    size = ordered.shape[-1]
    differs = ordered[:, 1:] != ordered[:, :-1]
    edge = differs.new_ones(len(ordered), 1)
    position = torch.arange(size, device=x.device, dtype=torch.int32)
    first = torch.where(torch.cat((edge, differs), -1), position, 0).cummax(-1).values
    final = torch.where(torch.cat((differs, edge), -1), position, size).flip(-1).cummin(-1).values.flip(-1)
    # Mean ranks are multiples of one half, (first + final) / 2 + 1, so there are few scores: one table and a look-up.
    rank = torch.arange(2 * size - 1, device=x.device, dtype=x.dtype) / 2 + 1
    scores = torch.special.ndtri((rank - 3 / 8) / (size + 1 / 4))
    return torch.empty_like(ordered).scatter_(-1, order, scores[first + final]).reshape(x.shape)


def _sort(x: Tensor) -> tuple[Tensor, Tensor]:
    """Sorted rows and where each value stood."""
    if x.device.type == "cpu":  # NumPy's vectorised sort takes a fifth of the time of torch's on a CPU
        order = torch.from_numpy(np.argsort(x.numpy(), axis=-1))
        return x.gather(-1, order), order
    ordered, order = x.sort(dim=-1)
    return ordered, order


def _median(ordered: Tensor) -> Tensor:
    size = ordered.shape[-1]
    return (ordered[:, (size - 1) // 2] + ordered[:, size // 2]) / 2


def _quantile(ordered: Tensor, prob: float) -> Tensor:
    """Quantile of sorted rows, type 7 of Hyndman and Fan.

    Rounded as ArviZ rounds it, since among ties ``x <= quantile`` turns on the last bit.
    """
    size = ordered.shape[-1]
    position = size * prob + (1.0 - prob)
    below = math.floor(min(max(position, 1.0), size - 1.0))
    weight = min(max(position - below, 0.0), 1.0)
    return (1.0 - weight) * ordered[:, below - 1] + weight * ordered[:, below]


def _over_blocks(statistic: Callable[[Tensor], tuple[Tensor, ...]], x: Tensor) -> list[Tensor]:
    """Apply ``statistic``, ``(scalar, chain, draw)`` -> several ``(scalar,)``, block by block to bound the memory.

    Returns:
        list: each result as float64 ``(*event)``, NaN where a scalar has a NaN draw.
    """
    _check_draws(x, "x")
    chains, draws, *event = x.shape
    scalars = math.prod(event)
    # Without any scalar one stand-in goes through and is cut off again: an FFT of nothing is an error.
    flat = x.detach().reshape(chains, draws, scalars) if scalars else x.new_zeros(chains, draws, 1)
    budget = _BLOCK_CPU if x.device.type == "cpu" else _BLOCK_ACCELERATOR
    results = []
    for part in flat.split(max(1, budget // (chains * draws)), dim=-1):
        block = part.permute(2, 0, 1).to(torch.float64).contiguous()
        bad = block.isnan().flatten(1).any(-1)
        results.append([torch.where(bad, torch.nan, values) for values in statistic(block)])
    return [torch.cat(values)[:scalars].reshape(event) for values in zip(*results, strict=True)]


def _check_draws(x: Tensor, name: str) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a tensor (chain, draw, ...), got {type(x).__name__}")
    if x.is_complex():
        raise TypeError(f"{name} must be real, got dtype {x.dtype}; pass its real and imaginary parts")
    shape = tuple(x.shape)
    if x.ndim < 2:
        raise ValueError(f"{name} must be (chain, draw, ...), got shape {shape}; {name}[None] makes one chain of it")
    if x.shape[0] < 1 or x.shape[1] < _MIN_DRAWS:
        raise ValueError(f"{name} needs at least one chain and {_MIN_DRAWS} draws, got (chain, draw, ...) = {shape}")


def _suffixes(shape: torch.Size) -> list[str]:
    """Index texts of all scalars of a shape: ``[""]`` for a scalar, ``["[0,0]", "[0,1]", ...]`` for a matrix."""
    if not shape:
        return [""]
    return [f"[{','.join(map(str, index))}]" for index in itertools.product(*map(range, shape))]


def _format(value: float) -> str:
    return f"{value:.3g}" if 0 < abs(value) < 1e-2 or 1e5 <= abs(value) < math.inf else f"{value:.3f}"


def _whole(value: float) -> str:
    return f"{value:.0f}"


def _worst(names: list[str], values: np.ndarray) -> str:
    """The scalars with the largest R-hat and the smallest bulk ESS, in words; R-hat counts only where it is defined."""
    words = []
    for column, pick, sign in (("r_hat", "largest", 1.0), ("ess_bulk", "smallest", -1.0)):
        score = sign * values[:, _COLUMNS.index(column)]
        if not np.isnan(score).all():
            worst = int(np.nanargmax(score))
            words.append(f"{pick} {column} {_format(sign * score[worst])} at {names[worst]}")
    return ", ".join(words) or "no diagnostic is defined"
