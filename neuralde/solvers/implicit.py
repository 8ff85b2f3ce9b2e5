"""What implicit methods share: real systems, batched factors of I - γ·dt·J, polynomial interpolants."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .base import Solver, VectorField
from .linearize import Linearization


class Implicit(Solver):
    """A method that takes f's Jacobian. A subclass's `stages` are (z, coefficients of θ, θ², ... of the interpolant).

    No stability size: these methods are L-stable, dz/dt = λz decays in steps of any size where Re λ < 0.
    """

    linearizes = True
    reports_stiffness = True
    stability_size = None

    def memory(self, z: Tensor, taped: bool) -> None:
        """See `Solver.memory`: nothing is reused, the matrices outweigh the stages."""

    def snapshot(self, stages: tuple[Tensor, Callable[[], list[Tensor]]]) -> Tensor:
        """See `Solver.snapshot`: row 0 the state, then the coefficients of the powers of θ."""
        z, coefficients = stages
        return torch.stack([z, *coefficients()])

    def interpolate(self, snapshot: Tensor, theta: Tensor, rows: Tensor | None) -> Tensor:
        """See `Solver.interpolate`."""
        theta = theta.to(snapshot.dtype)[..., None]
        theta = theta[..., None] if rows is None and theta.dim() == 2 else theta
        terms = snapshot if rows is None else snapshot[:, rows]
        value = terms[-1] * theta
        for term in terms[1:-1].flip(0):
            value = (value + term) * theta
        return terms[0] + value


class RealField:
    """A field on complex states as one on real states of twice the size, real and imaginary parts side by side."""

    def __init__(self, f: VectorField):
        self.f, self.times = f, f.times

    def __call__(self, t: Any, x: Tensor) -> Tensor:
        """dx/dt, [batch, 2·features]."""
        return to_real(self.f(t, to_complex(x)))


def to_real(z: Tensor) -> Tensor:
    """[batch, features] complex -> [batch, 2·features] real."""
    return torch.view_as_real(z.resolve_conj()).flatten(1)


def to_complex(x: Tensor) -> Tensor:
    """The inverse of `to_real`."""
    return torch.view_as_complex(x.unflatten(1, (-1, 2)).contiguous())


def factorize(jacobian: Tensor, dt: Tensor) -> Callable[[Tensor], Tensor]:
    """The solver of (I - dt·J) x = b for every sample; NaN for one whose matrix is singular. Differentiable.

    Args:
        jacobian: [batch, features, features].
        dt: with the method's γ inside, [batch, 1] or [1, 1].
    """
    identity = torch.eye(jacobian.shape[1], dtype=jacobian.dtype, device=jacobian.device)
    factors, pivots, singular = torch.linalg.lu_factor_ex(identity - dt[..., None] * jacobian)
    singular = (singular != 0)[:, None]

    def solve(b: Tensor) -> Tensor:
        x = torch.linalg.lu_solve(factors, pivots, b[..., None])[..., 0]
        return x.masked_fill(singular, float("nan"))

    return solve


def stiffness(here: Linearization, groups: int, complex_state: bool) -> Tensor:
    """‖J‖_∞, the largest row sum of absolute values: a bound on |λ| that a scalar problem attains, [groups].

    A complex state's Jacobian has a 2×2 block for every complex entry a + ib, [[a, -b], [b, a]] where f is
    differentiable in the complex sense; its Frobenius norm over √2 is |a + ib|.

    Args:
        groups: 1 takes the largest of the batch.
    """
    size = here.jacobian
    if complex_state:
        size = size.unflatten(2, (-1, 2)).unflatten(1, (-1, 2))
        size = torch.linalg.vector_norm(size, dim=(2, 4)) / 2**0.5
    largest = size.abs().sum(dim=2).amax(dim=1)
    return largest.amax(dim=0, keepdim=True) if groups < len(largest) else largest


def combine(weights: Sequence[float], vectors: Sequence[Tensor]) -> Tensor | None:
    """Σ_i weights_i·vectors_i, or None where all weights are 0.

    One by one: a matrix product may be allowed to round to TF32.
    """
    total = None
    for weight, vector in zip(weights, vectors, strict=True):
        if weight:
            total = vector * weight if total is None else torch.add(total, vector, alpha=weight)
    return total
