"""Linear systems of a batch of samples, each with its own matrix that is known only by its products."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

Product = Callable[[Tensor], Tensor]
"""x -> A x of every sample, [batch, features] each."""


class LinearSolve(NamedTuple):
    """What a solve of A x = b found.

    Attributes:
        x: [batch, features].
        iterations: products with A that the sample needed, [batch] int64.
        residual: ‖b - A x‖ / ‖b‖ (0 where b is 0), [batch].
        converged: whether that is within the tolerance, [batch].
    """

    x: Tensor
    iterations: Tensor
    residual: Tensor
    converged: Tensor


@torch.no_grad()
def gmres(product: Product, b: Tensor, rtol: float, restart: int = 20, max_iter: int = 100) -> LinearSolve:
    """Solves A x = b by restarted GMRES from x = 0, sample by sample.

    A sample that has converged stays as it is while others go on. The residual never grows, so that a singular A or one
    that needs more iterations gives the best x that they can.

    Args:
        product: A x; samples must be independent.
        b: [batch, features], real. A sample in which it is not finite gets it back as its x.
        rtol: of ‖b - A x‖ / ‖b‖.
        restart: iterations after which the basis (so many vectors like b) begins anew.
        max_iter: iterations of a sample in all.

    Source: Saad & Schultz, "GMRES", SIAM J. Sci. Stat. Comput. 7 (1986); classical Gram-Schmidt, twice.
    """
    size = torch.linalg.vector_norm(b, dim=1)
    known = torch.isfinite(size)
    target, x, residual, rest = rtol * size, torch.zeros_like(b), size, b
    iterations = torch.zeros_like(size, dtype=torch.int64)
    made = 0
    while made + bool(made) < max_iter:
        active = (residual > target) & known
        if not bool(active.any()):
            break
        if made:  # a product for what is left; a converged sample's basis is empty
            rest = torch.where(active[:, None], b - product(x), 0.0)
            iterations = iterations + active
            made += 1
        more, used, estimate = _cycle(product, rest, target, active, min(restart, max_iter - made))
        x = x + more
        made, iterations = made + int(used.max()), iterations + used
        stuck = active & ~(estimate < 0.999 * residual)  # another cycle would do no better
        residual = torch.where(active, estimate, residual)
        if bool((stuck | ~active).all()):
            break
    broken = ~torch.isfinite(residual) & known
    x = torch.where(broken[:, None], 0.0, torch.where(known[:, None], x, b))
    relative = torch.where(size > 0, residual / size, 0.0)
    return LinearSolve(x, iterations, relative, (residual <= target) | ~known)


def _cycle(product: Product, rest: Tensor, target: Tensor, active: Tensor, most: int) -> tuple[Tensor, Tensor, Tensor]:
    """One cycle for A y = rest. Returns y, iterations of each sample, and the norm of what is left."""
    batch, _ = rest.shape
    start = torch.linalg.vector_norm(rest, dim=1)
    basis = _Basis(_unit(rest, start), most + 1)
    # The least-squares problem, kept triangular by the product of the rotations so far.
    triangle = rest.new_zeros(batch, most + 1, most)
    rotation = torch.eye(most + 1, dtype=rest.dtype, device=rest.device).repeat(batch, 1, 1)
    right = rest.new_zeros(batch, most + 1)
    right[:, 0] = start
    used = torch.zeros_like(active, dtype=torch.int64)
    left = start
    for j in range(most):
        column, length = basis.extend(product)
        turned = torch.bmm(column[:, None], rotation[:, : j + 1, : j + 1].mT)[:, 0]
        radius = torch.hypot(turned[:, j], length)
        # The space is exhausted, and A singular on it: this direction takes nothing off what is left.
        noise = 100 * torch.finfo(radius.dtype).eps * torch.linalg.vector_norm(column, dim=1)
        radius = torch.where((length == 0) & (radius <= noise), 0.0, radius)
        safe = torch.where(radius > 0, radius, 1.0)
        cosine, sine = turned[:, j] / safe, torch.where(radius == 0, -1.0, length / safe)
        cosine = torch.where(radius == 0, 0.0, cosine)
        triangle[:, :j, j], triangle[:, j, j] = turned[:, :j], radius
        above = rotation[:, j].clone()
        rotation[:, j] = cosine[:, None] * above + sine[:, None] * rotation[:, j + 1]
        rotation[:, j + 1] = cosine[:, None] * rotation[:, j + 1] - sine[:, None] * above
        used = used + active
        previous = right[:, j].clone()
        right[:, j], right[:, j + 1] = torch.where(active, cosine * previous, 0.0), -sine * previous
        left = torch.where(active, right[:, j + 1].abs(), left)
        active = active & (left > target) & (length > 0)
        if not bool(active.any()):
            break
    n = j + 1
    return basis.combine(_solve_triangle(triangle[:, :n, :n], right[:, :n], used)), used, left


def _solve_triangle(triangle: Tensor, right: Tensor, used: Tensor) -> Tensor:
    """The weights of the basis vectors, [batch, n]: 0 beyond those that a sample used, and where A is singular."""
    n = right.shape[1]
    own = torch.arange(n, device=right.device) < used[:, None]
    diagonal = triangle.diagonal(dim1=1, dim2=2)
    scale = diagonal.abs().amax(dim=1, keepdim=True) * torch.finfo(right.dtype).eps
    own = own & (diagonal.abs() > scale)
    triangle = torch.where(own[:, None], triangle, 0.0)
    triangle = triangle + torch.diag_embed(torch.where(own, 0.0, 1.0).to(right.dtype))
    return torch.linalg.solve_triangular(triangle, torch.where(own, right, 0.0)[..., None], upper=True)[..., 0]


class _Basis:
    """Orthonormal vectors of every sample, [batch, vectors, features]; memory grows with them."""

    def __init__(self, first: Tensor, most: int):
        self.count, self.most = 1, most
        self.vectors = first.new_empty(len(first), min(8, most), first.shape[1])
        self.vectors[:, 0] = first

    def extend(self, product: Product) -> tuple[Tensor, Tensor]:
        """Adds A times the last vector.

        Returns:
            Its parts along the others, [batch, count], and the length of what is left, [batch].
        """
        known = self.vectors[:, : self.count]
        w = product(known[:, -1])
        column = torch.bmm(w[:, None], known.mT)
        size = torch.linalg.vector_norm(w, dim=1)
        w = torch.baddbmm(w[:, None], column, known, alpha=-1.0)
        again = torch.bmm(w, known.mT)
        w = torch.baddbmm(w, again, known, alpha=-1.0)[:, 0]
        length = torch.linalg.vector_norm(w, dim=1)
        # What is left of a vector that lies in the space already is rounding; NaN stays.
        length = torch.where(length <= 10 * torch.finfo(w.dtype).eps * size, 0.0, length)
        if self.count == self.vectors.shape[1] < self.most:
            more = self.vectors.new_empty(len(w), min(self.count, self.most - self.count), w.shape[1])
            self.vectors = torch.cat([self.vectors, more], dim=1)
        self.vectors[:, self.count] = _unit(w, length)
        self.count += 1
        return (column + again)[:, 0], length

    def combine(self, weights: Tensor) -> Tensor:
        """Σ weights·vectors, [batch, features]."""
        return torch.bmm(weights[:, None], self.vectors[:, : weights.shape[1]])[:, 0]


def _unit(x: Tensor, length: Tensor) -> Tensor:
    """x over its length, 0 where that is 0."""
    return x * torch.where(length > 0, 1.0 / length, 0.0)[:, None]
