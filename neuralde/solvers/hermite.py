"""Interpolation: the sum that every interpolant is, and the cubic for methods that have none of their own."""

from __future__ import annotations

import torch
from torch import Tensor


def hermite(snapshot: Tensor, theta: Tensor, rows: Tensor | None) -> Tensor:
    """The cubic through the values and the slopes at both ends of a step.

    Args:
        snapshot: the states at both ends, and the increments dt·slope there, [4, batch, features].
        theta, rows: of `Solver.interpolate`.
    """
    rest = 1 - theta
    top = theta * theta * (3 - 2 * theta)
    weights = torch.stack([1 - top, top, theta * rest * rest, -theta * theta * rest], dim=-1)
    return weighted(weights, snapshot, rows)


def weighted(weights: Tensor, snapshot: Tensor, rows: Tensor | None) -> Tensor:
    """Σ_s weights_s·snapshot_s.

    Args:
        weights: [points, stages], or [points, batch, stages] where every sample has its own.
        snapshot, rows: of `Solver.interpolate`.
    """
    weights = weights.to(snapshot.dtype)
    if rows is not None:
        return torch.einsum("ps,spf->pf", weights, snapshot[:, rows])
    return torch.einsum("ps,sbf->pbf" if weights.dim() == 2 else "pbs,sbf->pbf", weights, snapshot)
