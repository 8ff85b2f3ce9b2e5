"""The lens on a steady state: its Jacobian, how fast a solve contracts to it. Part of `introspection`."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from . import control as _control
from .adjoints.implicit import at_rest
from .parametrized import looking_back
from .solution import Solution
from .solvers.iteration import real, unreal
from .solvers.linearize import ordinary
from .termination import kept


class End(NamedTuple):
    """The samples of a solution that ended at a state which means something, and f there.

    Attributes:
        rows: which they are, [samples], or None for all.
        f: z -> f(z) - z, [samples, features] each: dz/dt.
        z: where they ended, a constant; or, of `before`, where the steps began that led there.
    """

    rows: Tensor | None
    f: Callable[[Tensor], Tensor]
    z: Tensor

    def spread(self, figure: Tensor, batch: int) -> Tensor:
        """A figure of these samples, [samples], as one of all, [batch]: 0 for the others."""
        return figure if self.rows is None else figure.new_zeros(batch).index_copy(0, self.rows, figure)


class Anchored:
    """A field whose value at one point is a constant to gradients: what moves the steady state itself is taken out.

    Near a steady state all of f's derivative by a parameter is about where that lies. A figure of a step there would be
    made smaller by moving the steady state to where the step began, and its gradient is as large as the residual is
    small.

    Args:
        field: f. slope: its value at the point, [samples, features].
    """

    def __init__(self, field, slope: Tensor):
        self.field, self.layout, self.joint, self.times = field, field.layout, field.joint, field.times
        self._moving = slope - slope.detach()

    def __call__(self, t, z: Tensor) -> Tensor:
        """dz/dt, [samples, features]."""
        return self.field(t, z) - self._moving


def end(solution: Solution, z: Tensor | None = None) -> End:
    """Where a solution ended; z: other states of it, [batch, features].

    Raises:
        ValueError: it is one on a horizon, which ends where t does.
    """
    if solution.residual is None:
        raise ValueError(
            "this is of steady states, which a DeepEquilibrium or solve(SteadyState(f), ...) finds, and the solution "
            "is one on a horizon (of a NeuralODE?)"
        )
    fine = kept(solution.status)
    rows = None if bool(fine.all()) else fine.nonzero().flatten()
    trajectory = solution._outcome.trajectory
    return End(rows, *at_rest(solution._problem, trajectory, rows, z))


def jacobian_products(f: Callable[[Tensor], Tensor], z: Tensor, taped: bool) -> Callable[[Tensor], Tensor]:
    """u -> Jᵀu for the Jacobian J of the map z + f(z), [samples, features] each, real.

    Args:
        f: z -> f(z) - z of the map. z: where; with a graph of its own, gradients flow into that too.
        taped: whether the products are differentiated.
    """
    with ordinary(), torch.inference_mode(False), torch.enable_grad():
        z = z.view_as(z) if z.requires_grad else z.detach().clone().requires_grad_()
        value = f(z)

    def product(u: Tensor) -> Tensor:
        v = unreal(u, z.dtype)
        if not value.requires_grad:
            return u
        with torch.enable_grad():
            how = {"retain_graph": True, "create_graph": taped, "allow_unused": True}
            (back,) = torch.autograd.grad(value, z, v.to(value.dtype), **how)
        return u if back is None else real(v + back)

    return product


@looking_back
@torch.no_grad()
def spectral_radius(solution: Solution, iterations: int = 100, generator: torch.Generator | None = None) -> Tensor:
    """The spectral radius of the map's Jacobian at the steady state, by power iteration; a constant.

    Below 1 the fixed-point iteration converges there, by about that factor per step. It is the growth per step over the
    second half of the iterations, so that it also converges for pairs of complex eigenvalues. Under joint control,
    where f may mix samples, it is that of the Jacobian of the whole batch, the same number for all. f is as it is when
    this is asked for, the states are those that were found.

    Args:
        solution: of a steady state.
        iterations: products with the Jacobian, at least 2.
        generator: a torch.Generator for the first vector.

    Returns:
        [batch]; NaN for samples that got lost (see `Equilibrium`).

    Raises:
        ValueError: iterations is less than 2, or the solution is one on a horizon.
    """
    if iterations < 2:
        raise ValueError(f"iterations must be at least 2, got {iterations}")
    at = end(solution)
    batch = len(solution.status)
    product = jacobian_products(at.f, at.z, taped=False)
    like = real(at.z)
    device = like.device if generator is None else generator.device
    u = torch.randn(like.shape, generator=generator, dtype=like.dtype, device=device).to(like.device)
    dims = (0, 1) if solution._problem.joint else (1,)
    growth = torch.zeros_like(u[:, 0])
    half = iterations // 2
    for i in range(iterations):
        size = torch.linalg.vector_norm(u, dim=dims, keepdim=True)
        u = product(u / torch.where(size > 0, size, 1.0))
        if i >= half:
            growth = growth + torch.linalg.vector_norm(u, dim=dims).log()
    radius = (growth / (iterations - half)).exp()
    if at.rows is None:
        return radius
    return radius.new_full((batch,), float("nan")).index_copy(0, at.rows, radius)


@looking_back
def contraction(solution: Solution) -> Tensor:
    """‖g(z + g(z))‖ / ‖g(z)‖ for g(z) = f(z) - z, where the last step began: the ratio of successive residuals.

    Below 1 where the map contracts along its residual. Differentiable with respect to the parameters of f, args and
    whatever else f uses; z and g(z) are constants. Two evaluations of f.

    Args:
        solution: of a steady state.

    Returns:
        [batch]; 0 for samples that got lost, and where a solve began at rest.
    """
    at = end(solution, solution._problem.rest.before.detach())
    value = at.f(at.z).to(at.z.dtype)
    first = value.detach()
    second = at.f(at.z + first) - (value - first)  # see Anchored
    joint = solution._problem.joint and at.rows is None
    sizes = [_control.rms(real(x), joint) for x in (first, second)]
    moving = sizes[0] > 0
    ratio = torch.where(moving, sizes[1] / torch.where(moving, sizes[0], 1.0), 0.0)
    return at.spread(ratio.expand(len(at.z)), len(solution.status))
