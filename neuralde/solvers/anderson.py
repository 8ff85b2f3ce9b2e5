"""Anderson acceleration of the fixed-point iteration."""

from __future__ import annotations

import math
import numbers

import torch
from torch import Tensor

from .iteration import Iteration, Memory, Move, count, fraction, put


class Anderson(Iteration):
    """Anderson acceleration, type II: the next z is the combination of the last ones whose residuals cancel best.

        γ = argmin ‖g_k - ΔG γ‖² + regularization·Σ (‖Δg_i‖ γ_i)²,    z_{k+1} = z_k + β g_k - (ΔZ + β ΔG) γ

    Each sample has its own least-squares problem, whose columns are scaled to one length: the regularization is
    relative, and a history in which columns depend on each other does no harm.

    Args:
        memory: m, how many differences are remembered, at least 1.
        beta: β, in (0, 1].
        regularization: as above; None takes 10·memory times the precision of the state.

    Raises:
        TypeError, ValueError: an argument is wrong; the message names it.

    Source: Walker & Ni, "Anderson acceleration for fixed-point iterations", SIAM J. Numer. Anal. 49 (2011).
    """

    def __init__(self, memory: int = 5, beta: float = 1.0, regularization: float | None = None, name: str = "anderson"):
        self.name, self.m, self.beta = name, count("memory", memory), fraction("beta", beta)
        if regularization is not None:
            if not isinstance(regularization, numbers.Real) or isinstance(regularization, bool):
                raise TypeError(f"regularization must be a number or None, got {type(regularization).__name__}")
            if not (regularization > 0.0 and math.isfinite(regularization)):
                raise ValueError(f"regularization must be positive and finite, got {regularization}")
        self.regularization = regularization

    def move(self, f, z: Tensor, slope: Tensor, memory: Memory | None) -> Move:
        """See `Iteration.move`.

        The memory: the last plain step and its residual, [batch, features]; the last m differences of the residuals and
        of the plain steps, [batch, m, features], in no order; the inner products of the former, [batch, m, m].
        Differences that there are not yet are 0, and get the weight 0: batched products of very few rows are the slow
        ones.
        """
        plain = torch.add(z, slope, alpha=self.beta)
        if memory is None:
            batch, features = z.shape
            room = (z.new_zeros(batch, self.m, n) for n in (features, features, self.m))
            return Move(plain, Memory(0, plain, slope, *room))
        before, last, slopes, moves, gram = memory.tensors
        slot = memory.made % self.m
        change = slope - last
        put(slopes, slot, change)
        put(moves, slot, plain - before)
        # One pass over the differences for both products.
        rows = torch.bmm(torch.stack([change, slope], dim=1), slopes.mT)
        put(gram, slot, rows[:, 0])
        put(gram, slot, rows[:, 0], dim=2)
        weights = self._weights(gram, rows[:, 1])
        z = torch.baddbmm(plain[:, None], weights[:, None], moves, alpha=-1.0)[:, 0]
        return Move(z, Memory(memory.made + 1, plain, slope, slopes, moves, gram))

    def _weights(self, gram: Tensor, right: Tensor) -> Tensor:
        """γ from ΔGᵀΔG, [batch, m, m], and ΔGᵀg, [batch, m]."""
        scale = gram.diagonal(dim1=1, dim2=2).clamp(min=torch.finfo(gram.dtype).tiny).rsqrt()
        size = gram * scale[:, :, None] * scale[:, None, :]
        ridge = self.regularization or 10 * self.m * torch.finfo(gram.dtype).eps
        size.diagonal(dim1=1, dim2=2).add_(ridge)
        weights, _ = torch.linalg.solve_ex(size, scale * right)
        # A sample whose history is of no use makes a plain step. The solver's weights lie column by column, with which
        # batched products go through the samples one by one.
        return torch.nan_to_num(weights * scale, nan=0.0, posinf=0.0, neginf=0.0).contiguous()

    def __repr__(self) -> str:
        return f"{self.name} (memory {self.m})"
