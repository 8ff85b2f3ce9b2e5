"""Anderson acceleration of the fixed-point iteration."""

from __future__ import annotations

import math
import numbers

import torch
from torch import Tensor

from .iteration import Iteration, Memory, Move, count, fraction

_UNROLLED = 8  # the largest memory whose equations a compiler is given number by number


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

    remedy = (
        "Take solver='broyden', 'fixed_point' where the map contracts, 'newton' (dear, but it depends least on the "
        "map), or one for ODEs ('tsit5')"
    )

    def __init__(self, memory: int = 5, beta: float = 1.0, regularization: float | None = None, name: str = "anderson"):
        self.name, self.m, self.beta = name, count("memory", memory), fraction("beta", beta)
        if regularization is not None:
            if not isinstance(regularization, numbers.Real) or isinstance(regularization, bool):
                raise TypeError(f"regularization must be a number or None, got {type(regularization).__name__}")
            if not (regularization > 0.0 and math.isfinite(regularization)):
                raise ValueError(f"regularization must be positive and finite, got {regularization}")
        self.regularization = regularization

    def blank(self, z: Tensor) -> tuple[Tensor, ...]:
        """See `Iteration.blank`: no difference yet, from which follows a plain step."""
        batch, features = z.shape
        return tuple(z.new_zeros(batch, self.m, n) for n in (features, features, self.m))

    def start(self, z: Tensor, slope: Tensor, buffers: tuple[Tensor, ...]) -> Memory:
        """See `Iteration.start`."""
        return Memory(-1, (torch.add(z, slope, alpha=self.beta), slope), buffers)

    def move(self, f, z: Tensor, slope: Tensor, memory: Memory | None) -> Move:
        """See `Iteration.move`.

        The memory: the last plain step and its residual, [batch, features]; the last m differences of the residuals and
        of the plain steps, [batch, m, features], in no order; the inner products of the former, [batch, m, m].
        Differences that there are not yet are 0, and get the weight 0: batched products of very few rows are the slow
        ones.
        """
        if memory is None:
            memory = self.start(z, slope, self.blank(z))
            return Move(memory.states[0], Memory(0, memory.states, memory.buffers))
        plain = torch.add(z, slope, alpha=self.beta)
        (before, last), (slopes, moves, gram) = memory.states, memory.buffers
        slot = memory.slot(self.m)
        change = slope - last
        memory.put(slopes, slot, change)
        memory.put(moves, slot, plain - before)
        row = memory.products(slopes, change)
        memory.put(gram, slot, row)
        memory.put(gram, slot, row, dim=2)
        weights = self._weights(gram, memory.products(slopes, slope), memory.traced)
        z = plain - memory.combined(weights, moves)
        return Move(z, Memory(memory.made + 1, (plain, slope), memory.buffers))

    def _weights(self, gram: Tensor, right: Tensor, traced: bool) -> Tensor:
        """γ from ΔGᵀΔG, [batch, m, m], and ΔGᵀg, [batch, m]."""
        scale = gram.diagonal(dim1=1, dim2=2).clamp(min=torch.finfo(gram.dtype).tiny).rsqrt()
        ridge = self.regularization or 10 * self.m * torch.finfo(gram.dtype).eps
        size = gram * scale[:, :, None] * scale[:, None, :]
        if traced and self.m <= _UNROLLED:
            weights = _solved(size, scale * right, ridge)
        else:
            size.diagonal(dim1=1, dim2=2).add_(ridge)
            weights, _ = torch.linalg.solve_ex(size, scale * right)
        # A sample whose history is of no use makes a plain step. The solver's weights lie column by column, with which
        # batched products go through the samples one by one.
        return torch.nan_to_num(weights * scale, nan=0.0, posinf=0.0, neginf=0.0).contiguous()

    def __repr__(self) -> str:
        return f"{self.name} (memory {self.m})"


def _solved(a: Tensor, b: Tensor, ridge: float) -> Tensor:
    """(A + ridge·I)⁻¹ b by Cholesky's method for symmetric A [batch, m, m] and b [batch, m], number by number.

    For a compiler, which makes one loop over the samples of it. NaN where A is not positive definite.
    """
    m = b.shape[1]
    factor, inverse, y, x = {}, [], [], [None] * m
    for j in range(m):
        pivot = a[:, j, j] + ridge - sum(factor[j, k].square() for k in range(j))
        inverse.append(pivot.rsqrt())
        for i in range(j + 1, m):
            factor[i, j] = (a[:, i, j] - sum(factor[i, k] * factor[j, k] for k in range(j))) * inverse[j]
        y.append((b[:, j] - sum(factor[j, k] * y[k] for k in range(j))) * inverse[j])
    for j in reversed(range(m)):
        x[j] = (y[j] - sum(factor[k, j] * x[k] for k in range(j + 1, m))) * inverse[j]
    return torch.stack(x, dim=1)
