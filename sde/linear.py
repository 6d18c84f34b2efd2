"""Factors of covariances by orthogonal transformations, safe to differentiate where a covariance is singular."""

import torch
from torch import Tensor

__all__ = ["lower_factor"]


def lower_factor(columns: Tensor) -> Tensor:
    """A lower triangular L with L L' = C C' for C = ``columns``, ``(..., S, M)``, by QR of C'.

    The derivative treats the rotation as a constant: L = C Q, so dL = dC Q, which gives d(L L') = d(C C') exactly because
    C Q Q' = C.  Whatever depends on L through L L' alone (a likelihood, an expectation over L times a normal) has its
    exact first derivative, and no inverse of a singular triangle appears.  Second derivatives would be wrong.

    Returns:
        ``(..., S, S)``; narrower input is padded with zeros.
    """
    rows, count = columns.shape[-2:]
    if count < rows:
        columns = torch.cat([columns, columns.new_zeros(*columns.shape[:-1], rows - count)], -1)
    rotation = torch.linalg.qr(columns.detach().mT)[0]
    return columns @ rotation
