"""Exact inference in linear fractional SDEs: square-root Kalman filter, backward information filter, smoother.

Observations y = X(t) + noise of a ``LinearSDE``.  The filter carries a factor L of the covariance P = L L' (Potter's
update at an observation, QR at a transition), the backward filter a factor R of the information R R', so that neither
loses positivity however rank-deficient the step noise is; the smoother combines them without inverting either.

Both run in about sqrt(T) blocks side by side.  A first pass takes each block from a start of its own that is known, and
keeps what a move of that start does; from this follow the laws with which the blocks begin, one after the other; a
second pass runs all blocks from there.  3 sqrt(T) small batched operations stand for T, and the laws are the same.

G. J. Bierman, *Factorization Methods for Discrete Sequential Estimation*, 1977; D. Q. Mayne, *A solution of the
smoothing problem for linear dynamic systems*, Automatica 1966 (two-filter form); S. Sarkka and A. F. Garcia-Fernandez,
*Temporal parallelization of Bayesian smoothers*, IEEE Transactions on Automatic Control 2021, arXiv 1905.13002 (the law
of a block given its start is theirs).
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from sde._checks import Times, as_positive, as_times
from sde.linear import LinearSDE, Transitions, lower_factor

__all__ = ["Filtered", "Information", "Smoothed", "backward_information", "kalman_filter", "kalman_smoother"]

_MIN_SPLIT = 64  # transitions below which one block is not slower than several


class Filtered(NamedTuple):
    """Laws of the state z = (X, V) given the observations so far.

    Attributes:
        log_likelihood: of each series and dimension, ``(B, D)``; sum over D for the joint one.
        mean: ``(T, B, D, S)``.
        factor: L, ``(T, B or 1, D, S, S)``.
        innovation: observation minus its forecast, ``(T, B, D)``; meaningless where masked.
        innovation_variance: of the forecast with the observation's error, ``(T, B or 1, D)``.
    """

    log_likelihood: Tensor
    mean: Tensor
    factor: Tensor
    innovation: Tensor
    innovation_variance: Tensor


class Information(NamedTuple):
    """log p(later observations | z at t_n) = -1/2 z' R R' z + nu' z + const, an observation at t_n itself excluded.

    Attributes:
        factor: R, ``(T, B or 1, D, S, S)``.
        vector: nu, ``(T, B, D, S)``.
    """

    factor: Tensor
    vector: Tensor


class Smoothed(NamedTuple):
    """Laws of X given all observations.

    Attributes:
        mean: of X, ``(T, B, D)``.
        variance: of X, ``(T, B, D)``.
        state_mean: of z = (X, V), ``(T, B, D, S)``.
        state_factor: L with L L' the covariance of z, ``(T, B or 1, D, S, S)``.
        log_likelihood: ``(B, D)``.
    """

    mean: Tensor
    variance: Tensor
    state_mean: Tensor
    state_factor: Tensor
    log_likelihood: Tensor


class _Data(NamedTuple):
    """Checked input: observations with 0 where masked, the mask as numbers, variances, all ``(T, B or 1, D)``."""

    times: Tensor
    values: Tensor
    mask: Tensor
    std: Tensor


def _data(
    model: LinearSDE, times: Times, observations: Tensor, noise_std: float | Tensor, mask: Tensor | None
) -> _Data:
    t = as_times(times, horizon=model.noise.horizon)
    if not isinstance(observations, Tensor):
        raise TypeError(f"observations must be a tensor (T, B, D), got {type(observations).__name__}")
    if observations.ndim != 3 or len(observations) != len(t) or 0 in observations.shape:
        raise ValueError(
            f"observations must be (T, B, D) with T={len(t)} times and nothing empty, got {tuple(observations.shape)}"
        )
    dims = model.dims
    if dims and dims[0] not in (1, observations.shape[2]):
        raise ValueError(f"observations have {observations.shape[2]} dimensions, the model has {dims[0]}")
    device = model.noise.loadings.device
    values = observations.to(device, torch.float64)
    if mask is None:
        here = torch.ones(len(t), 1, 1, dtype=torch.bool, device=device)
    else:
        here = mask.to(device, torch.bool)
        if here.ndim != 3 or any(m not in (1, n) for m, n in zip(here.shape, values.shape, strict=True)):
            raise ValueError(
                f"mask must broadcast to {tuple(values.shape)} in three dimensions, got {tuple(here.shape)}"
            )
    values = torch.where(here, values, 0.0)
    if not isinstance(noise_std, Tensor) or noise_std.is_complex():  # values of a tensor are not looked at
        as_positive(noise_std, "noise_std", zero=True)
    std = torch.as_tensor(noise_std, dtype=torch.float64, device=device)
    target = (len(t), 1, values.shape[2])
    if std.ndim > 3 or any(m not in (1, n) for m, n in zip(std.shape[::-1], target[::-1], strict=False)):
        raise ValueError(f"noise_std must broadcast to {target}, got {tuple(std.shape)}")
    std = std.broadcast_to(target)
    return _Data(t, values, here.to(torch.float64), std)


def check_observations(observations: Tensor, mask: Tensor | None = None) -> None:
    """Raise where an observation that counts is NaN or infinite, or none counts.

    Apart from the filter, which runs inside loops and graphs and never looks at a value.
    """
    here = torch.ones_like(observations, dtype=torch.bool) if mask is None else mask.expand_as(observations).bool()
    if not bool(here.any()):
        raise ValueError("mask leaves no observation at all")
    if not bool(torch.isfinite(observations[here]).all()):
        raise ValueError("observations must be finite where the mask is True")


def kalman_filter(
    model: LinearSDE,
    times: Times,
    observations: Tensor,
    noise_std: float | Tensor,
    mask: Tensor | None = None,
    *,
    increments: bool = False,
) -> Filtered:
    """Log-likelihood and filtered laws; float64, differentiable (once) in every parameter of the model and the noise.

    Args:
        model: the linear SDE, started at time 0.
        times: strictly increasing, ``(T,)``; a first time 0 is an observation of the start.
        observations: ``(T, B, D)``; values where the mask is False don't matter and may be NaN.
        noise_std: of the observations' errors, 0 or more: a number, ``(D,)``, or ``(T, 1, 1 or D)``.
        mask: True where an observation counts, ``(T, B or 1, D or 1)``; covariances are shared by the batch where it
            is.
        increments: observe X(t_n) - X(t_{n-1}) instead of X(t_n) (for theta = 0): fractional Gaussian noise.

    Raises:
        ValueError: for shapes that don't match, times that are unsorted or beyond the noise's horizon.
    """
    data = _data(model, times, observations, noise_std, mask)
    mean, factor = _start(model)
    mean = mean.expand(*data.values.shape[1:], -1)
    lead = torch.broadcast_shapes(factor.shape[:-2], data.mask.shape[1:], data.std.shape[1:])
    factor = factor.expand(*lead, -1, -1)
    done: list[_Updated] = []
    seen: tuple[Tensor, ...] = data[1:]
    grid = data.times
    if float(grid[0]) == 0:  # an observation of the start
        first = _update(mean, factor, *(part[0] for part in seen))
        done.append(_Updated(*(part.unsqueeze(0) for part in first)))
        mean, factor, seen = first.mean, first.factor, tuple(part[1:] for part in seen)
    else:
        grid = torch.cat([grid.new_zeros(1), grid])
    if len(grid) > 1:
        pieces = _in_blocks(_transitions(model, grid), seen, increments)
        starts, factors = _starts(pieces, mean, factor)
        swept = _sweep(pieces, starts, factors)[0]
        count = len(grid) - 1
        done.append(_Updated(*(part.transpose(0, 1).flatten(0, 1)[:count] for part in swept)))
    means, factors, errors, alphas, _ = (torch.cat(parts) for parts in zip(*done, strict=True))
    safe = torch.where(data.mask > 0, alphas, 1.0)
    total = -0.5 * (data.mask * (torch.log(2 * math.pi * safe) + errors**2 / safe)).sum(0)
    return Filtered(total, means, factors, errors, alphas)


class _Pieces(NamedTuple):
    """Transitions and the observation after each, time within a block first: ``(L, blocks, B or 1, D or 1, ...)``."""

    matrix: Tensor
    offset: Tensor
    noise: Tensor
    values: Tensor
    mask: Tensor
    std: Tensor


class _Updated(NamedTuple):
    mean: Tensor
    factor: Tensor
    error: Tensor
    variance: Tensor
    gain: Tensor


def _update(mean: Tensor, factor: Tensor, value: Tensor, here: Tensor, std: Tensor) -> _Updated:
    """Potter's update with H = (1, 0, ..): v = L' H', P = L (I - gamma v v')^2 L'."""
    v = factor[..., 0, :]
    alpha = v.square().sum(-1) + std**2
    column = (factor @ v.unsqueeze(-1)).squeeze(-1)
    error = value - mean[..., 0]
    safe = torch.where(here > 0, alpha, 1.0)
    gain = (here / safe).unsqueeze(-1) * column
    gamma = here / (safe + std * safe.sqrt())
    factor = factor - (gamma.unsqueeze(-1) * column).unsqueeze(-1) * v.unsqueeze(-2)
    return _Updated(mean + error.unsqueeze(-1) * gain, factor, error, alpha, gain)


def _start(model: LinearSDE) -> tuple[Tensor, Tensor]:
    """Mean ``(1, D or 1, S)`` and factor ``(1, D or 1, S, S)`` of the state at time 0."""
    mean, factor = model.start()
    if not model.dims:
        mean, factor = mean.unsqueeze(0), factor.unsqueeze(0)
    return mean.unsqueeze(0), factor.unsqueeze(0)


def _transitions(model: LinearSDE, grid: Tensor) -> Transitions:
    """With a dimension for D, if of size 1."""
    found = model.transitions(grid)
    if model.dims:
        return found
    return Transitions(found.steps, *(part.unsqueeze(1) for part in found[1:]))


def _in_blocks(steps: Transitions, seen: tuple[Tensor, ...], increments: bool = False) -> _Pieces:
    """Of N transitions and observations; the last block is filled up with steps that do nothing."""
    count, size = len(steps.steps), steps.matrix.shape[-1]
    blocks = 1 if count < _MIN_SPLIT else math.isqrt(2 * count)
    length = -(-count // blocks)
    blocks = -(-count // length)
    spare = blocks * length - count
    matrix = steps.matrix
    if increments:  # X starts anew at 0
        matrix = torch.cat([torch.zeros_like(matrix[..., :1]), matrix[..., 1:]], -1)
    eye = torch.eye(size, dtype=matrix.dtype, device=matrix.device)

    def cut(part: Tensor, fill: Tensor | None = None) -> Tensor:
        if spare:
            more = part.new_zeros(spare, *part.shape[1:]) if fill is None else fill.expand(spare, *part.shape[1:])
            part = torch.cat([part, more])
        return part.unflatten(0, (blocks, length)).transpose(0, 1)

    values, mask, std = seen
    return _Pieces(
        cut(matrix, eye).unsqueeze(2), cut(steps.offset).unsqueeze(2), cut(steps.factor).unsqueeze(2),
        cut(values), cut(mask), cut(std, std.new_ones(())),
    )  # fmt: skip


def _sweep(
    pieces: _Pieces, mean: Tensor, factor: Tensor, response: Tensor | None = None
) -> tuple[_Updated, Tensor | None, Tensor | None]:
    """All blocks from their starts ``(blocks, B, D, S)`` and ``(blocks, B or 1, D, S, S)``.

    ``response`` is what a move of the start does to the mean, ``(blocks, B or 1, D, S, S)``: returned for the end and,
    in its first row, for each forecast ``(L, blocks, B or 1, D, S)``.
    """
    done, rows = [], []
    for matrix, offset, noise, *seen in zip(*(part.unbind() for part in pieces), strict=True):
        mean = (matrix @ mean.unsqueeze(-1)).squeeze(-1) + offset
        moved = matrix @ factor
        factor = lower_factor(torch.cat([moved, noise.expand(*moved.shape[:-1], -1)], -1))
        new = _update(mean, factor, *seen)
        mean, factor = new.mean, new.factor
        done.append(new)
        if response is not None:
            response = matrix @ response
            row = response[..., :1, :]
            rows.append(row.squeeze(-2))
            response = response - new.gain.unsqueeze(-1) * row
    parts = _Updated(*(torch.stack(part) for part in zip(*done, strict=True)))
    return parts, response, torch.stack(rows) if rows else None


class _Elements(NamedTuple):
    """What a block says of its start z0 and of its end: e - A z0 is standard normal, z = M z0 + c + P eps.

    Attributes:
        rows: A, ``(blocks, B or 1, D, L, S)``.
        errors: e, ``(blocks, B, D, L)``.
        matrix: M, ``(blocks, B or 1, D, S, S)``.
        mean: c, ``(blocks, B, D, S)``.
        factor: P, ``(blocks, B or 1, D, S, S)``.
    """

    rows: Tensor
    errors: Tensor
    matrix: Tensor
    mean: Tensor
    factor: Tensor


def _elements(pieces: _Pieces, like_mean: Tensor, like_factor: Tensor) -> _Elements:
    blocks = pieces.matrix.shape[1]
    zero = torch.zeros_like(like_factor).expand(blocks, *like_factor.shape)
    eye = torch.eye(zero.shape[-1], dtype=zero.dtype, device=zero.device).expand_as(zero)
    ends, matrix, rows = _sweep(pieces, torch.zeros_like(like_mean).expand(blocks, *like_mean.shape), zero, eye)
    assert matrix is not None and rows is not None
    unit = pieces.mask / torch.where(pieces.mask > 0, ends.variance, 1.0).sqrt()
    return _Elements(
        (rows * unit.unsqueeze(-1)).movedim(0, -2), (ends.error * unit).movedim(0, -1), matrix, ends.mean[-1],
        ends.factor[-1],
    )  # fmt: skip


def _starts(pieces: _Pieces, mean: Tensor, factor: Tensor) -> tuple[Tensor, Tensor]:
    """Laws with which the blocks start given all observations before them: ``(blocks, ...)``."""
    means, factors = [mean], [factor]
    if pieces.matrix.shape[1] > 1:
        eye = torch.eye(factor.shape[-1], dtype=factor.dtype, device=factor.device)
        parts = (part[:-1].unbind() for part in _elements(pieces, mean, factor))
        for rows, errors, matrix, offset, noise in zip(*parts, strict=True):
            t = rows @ factor
            inner = torch.linalg.cholesky_ex(eye + t.mT @ t)[0]
            rest = errors.unsqueeze(-1) - rows @ mean.unsqueeze(-1)
            mean = mean + (factor @ torch.cholesky_solve(t.mT @ rest, inner)).squeeze(-1)
            factor = torch.linalg.solve_triangular(inner, factor.mT, upper=False).mT
            mean = (matrix @ mean.unsqueeze(-1)).squeeze(-1) + offset
            factor = lower_factor(torch.cat([matrix @ factor, noise], -1))
            means.append(mean)
            factors.append(factor)
    return torch.stack(means), torch.stack(factors)


def backward_information(
    transitions: Transitions,
    index: Tensor,
    observations: Tensor,
    noise_std: float | Tensor,
    mask: Tensor | None = None,
) -> Information:
    """What the later observations say about the state, at every time of a solver grid.

    log beta(z) = -1/2 z' Lambda z + nu' z.  At an observation Lambda += c c' / sig^2, nu += c o / sig^2; one step back,
    with Lambda = R R', T = G' R: Lambda <- F' R (I + T'T)^-1 R' F and nu <- F' (nu - R (I + T'T)^-1 T' G' nu).  G may
    have any rank.

    Args:
        transitions: N steps; their dims ``*D`` must be ``(D,)`` or empty.
        index: positions of the observations in the grid, increasing, ``(M,)``, from 0 to N.
        observations: ``(M, B, D)``; 0 where masked.
        noise_std: positive: a number, ``(D,)``, or ``(M, B or 1, D or 1)``.
        mask: True where an observation counts, ``(M, B or 1, D or 1)``.

    Returns:
        Information at grid times 0..N, each without an observation at that very time.
    """
    if transitions.matrix.ndim == 3:
        transitions = Transitions(transitions.steps, *(part.unsqueeze(1) for part in transitions[1:]))
    like, count = transitions.matrix, len(transitions.steps)
    std = each_std(noise_std, observations, like)
    here = torch.ones_like(observations[:, :1, :1]) if mask is None else mask
    place = index.to(like.device)
    values, there, stds = (
        like.new_full((count + 1, *part.shape[1:]), fill).index_copy(0, place, part.to(like.dtype))[1:]
        for part, fill in ((observations, 0.0), (here, 0.0), (std, 1.0))
    )
    pieces = _in_blocks(transitions, (values, there, stds))
    lead = torch.broadcast_shapes(there.shape[1:], like.shape[1:2], std.shape[1:])
    root = like.new_zeros(lead[0], lead[-1], *like.shape[-2:])
    vector = like.new_zeros(*observations.shape[1:], like.shape[-1])
    ends = [(root, vector)]
    if pieces.matrix.shape[1] > 1:
        parts = [part[1:].flip(0).unbind() for part in _elements(pieces, vector, root)]
        for rows, errors, matrix, offset, noise in zip(*parts, strict=True):
            root, vector = _one_back(matrix, offset, noise, *ends[-1])
            root = lower_factor(torch.cat([root, rows.mT], -1))
            ends.append((root, vector + (rows.mT @ errors.unsqueeze(-1)).squeeze(-1)))
    roots, vectors = (torch.stack(part[::-1]) for part in zip(*ends, strict=True))
    first = torch.zeros(like.shape[-1], dtype=like.dtype, device=like.device)
    first[0] = 1
    out = []
    length = len(pieces.matrix)
    observed = {(n - 1) % length for n in index.tolist() if n}
    # Taken apart once: the gradient of one step's part by an index is a tensor of all steps.
    steps = list(zip(*(part.unbind() for part in pieces), strict=True))
    for n in range(length - 1, -1, -1):
        matrix, offset, noise, value, here, error = steps[n]
        if n in observed:
            row = (here / error).expand(roots.shape[:-2])
            roots = lower_factor(torch.cat([roots, (row.unsqueeze(-1) * first).unsqueeze(-1)], -1))
            vectors = vectors + (here * value / error**2).unsqueeze(-1) * first
        roots, vectors = _one_back(matrix, offset, noise, roots, vectors)
        out.append((roots, vectors))
    joined = (torch.stack(part[::-1]).transpose(0, 1).flatten(0, 1)[:count] for part in zip(*out, strict=True))
    return Information(*(torch.cat([part, last.unsqueeze(0)]) for part, last in zip(joined, ends[0], strict=True)))


def each_std(noise_std: float | Tensor, observations: Tensor, like: Tensor) -> Tensor:
    """``noise_std`` of each observation, ``(M, B or 1, D)``, as ``like``."""
    std = torch.as_tensor(noise_std, dtype=like.dtype, device=like.device)
    return std.expand(len(observations), std.shape[1] if std.ndim == 3 else 1, observations.shape[2])


def _one_back(matrix: Tensor, offset: Tensor, noise: Tensor, root: Tensor, vector: Tensor) -> tuple[Tensor, Tensor]:
    """Information on z from that on F z + o + G eps."""
    # nu of z before the offset: -1/2 (z + o)' Lambda (z + o) + nu' (z + o)
    vector = vector - (root @ (root.mT @ offset.unsqueeze(-1))).squeeze(-1)
    t = noise.mT @ root
    inner = torch.linalg.cholesky(torch.eye(t.shape[-1], dtype=t.dtype, device=t.device) + t.mT @ t)
    correction = root @ torch.cholesky_solve(t.mT @ (noise.mT @ vector.unsqueeze(-1)), inner)
    vector = (matrix.mT @ (vector.unsqueeze(-1) - correction)).squeeze(-1)
    return matrix.mT @ torch.linalg.solve_triangular(inner, root.mT, upper=False).mT, vector


def kalman_smoother(
    model: LinearSDE,
    times: Times,
    observations: Tensor,
    noise_std: float | Tensor,
    mask: Tensor | None = None,
) -> Smoothed:
    """Laws of the state given all observations; arguments as for ``kalman_filter``, with positive ``noise_std``.

    For interpolation and forecasts add the wanted times with a mask of False.
    """
    data = _data(model, times, observations, noise_std, mask)
    if not isinstance(noise_std, Tensor) and not noise_std > 0:
        raise ValueError(f"noise_std must be positive for smoothing, got {noise_std}")
    filtered = kalman_filter(model, times, observations, noise_std, mask)
    if len(data.times) == 1:
        root = filtered.factor
        return Smoothed(
            filtered.mean[..., 0], (root @ root.mT)[..., 0, 0].expand_as(data.values), filtered.mean, root,
            filtered.log_likelihood,
        )  # fmt: skip
    steps = _transitions(model, data.times)
    info = backward_information(steps, torch.arange(len(data.times)), data.values, data.std, data.mask)
    # (P^-1 + Lambda)^-1 = L (I + L' Lambda L)^-1 L'
    factor, root = torch.broadcast_tensors(filtered.factor, info.factor)
    t = root.mT @ factor
    inner = torch.linalg.cholesky(torch.eye(t.shape[-1], dtype=t.dtype, device=t.device) + t.mT @ t)
    smoothed = torch.linalg.solve_triangular(inner, factor.mT, upper=False).mT
    score = info.vector - (root @ (root.mT @ filtered.mean.unsqueeze(-1))).squeeze(-1)
    mean = filtered.mean + (smoothed @ (smoothed.mT @ score.unsqueeze(-1))).squeeze(-1)
    variance = smoothed[..., 0, :].square().sum(-1).expand_as(mean[..., 0])
    return Smoothed(mean[..., 0], variance, mean, smoothed, filtered.log_likelihood)
