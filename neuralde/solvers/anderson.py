"""Anderson acceleration of the fixed-point iteration."""

from __future__ import annotations

import math
import numbers

import torch
from torch import Tensor

from .iteration import Iteration, Move, count, fraction


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

    def memory(self, z: Tensor, taped: bool) -> _Differences:
        """See `Solver.memory`."""
        return _Differences(self.m)

    def carried(self, memory: _Differences, index: Tensor) -> _Differences:
        """See `Solver.carried`."""
        return memory.on(index)

    def move(self, f, z: Tensor, slope: Tensor, memory: _Differences) -> Move:
        """See `Iteration.move`."""
        plain = torch.add(z, slope, alpha=self.beta)
        if not memory.add(z, slope, self.beta):
            return Move(plain)
        size = memory.gram
        right = torch.bmm(slope[:, None], memory.slopes.mT)[:, 0]
        scale = size.diagonal(dim1=1, dim2=2).clamp(min=torch.finfo(size.dtype).tiny).rsqrt()
        size = size * scale[:, :, None] * scale[:, None, :]
        ridge = self.regularization or 10 * self.m * torch.finfo(size.dtype).eps
        size.diagonal(dim1=1, dim2=2).add_(ridge)
        weights, _ = torch.linalg.solve_ex(size, scale * right)
        # A sample whose history is of no use makes a plain step. The solver's weights lie column by column, with which
        # batched products go through the samples one by one.
        weights = torch.nan_to_num(weights * scale, nan=0.0, posinf=0.0, neginf=0.0).contiguous()
        return Move(torch.baddbmm(plain[:, None], weights[:, None], memory.moves, alpha=-1.0)[:, 0])

    def __repr__(self) -> str:
        return f"{self.name} (memory {self.m})"


class _Differences:
    """The last m differences of the residuals and of the plain steps, [batch, m, features], in no order.

    Those that there are not yet are 0, and get the weight 0: batched products of very few rows are the slow ones.
    """

    def __init__(self, m: int):
        self.m, self.made = m, 0
        self.plain = self.slope = self.slopes = self.moves = self.gram = None

    def add(self, z: Tensor, slope: Tensor, beta: float) -> bool:
        """Takes in a state. Returns whether there is a difference."""
        plain = torch.add(z, slope, alpha=beta)
        if self.slope is None:
            batch, features = z.shape
            self.slopes, self.moves = z.new_zeros(2, batch, self.m, features).unbind(0)
            self.gram = z.new_zeros(batch, self.m, self.m)
        else:
            i = self.made % self.m
            self.made += 1
            difference = torch.sub(slope, self.slope, out=self.slopes[:, i])
            torch.sub(plain, self.plain, out=self.moves[:, i])
            row = torch.bmm(difference[:, None], self.slopes.mT)[:, 0]
            self.gram[:, i] = row
            self.gram[:, :, i] = row
        self.plain, self.slope = plain, slope
        return self.made > 0

    def on(self, index: Tensor) -> _Differences:
        """The same for some of the samples."""
        part = _Differences(self.m)
        part.made = self.made
        for name in ("plain", "slope", "slopes", "moves", "gram"):
            setattr(part, name, getattr(self, name).index_select(0, index))
        return part
