"""Cubic Hermite interpolation, for methods that have no interpolant of their own."""

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
    weights = torch.stack([1 - top, top, theta * rest * rest, -theta * theta * rest], dim=1).to(snapshot.dtype)
    if rows is None:
        return torch.einsum("ps,sbf->pbf", weights, snapshot)
    return torch.einsum("ps,spf->pf", weights, snapshot[:, rows])
