"""The implicit Euler method, by Newton's iteration; its gradients are those of the implicit function theorem."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .. import transforms
from .base import Step, VectorField, Work
from .implicit import Implicit, RealField, factorize, stiffness, to_complex, to_real
from .linearize import linearize

_ROUNDS = 10  # Newton's iteration converges in 3 or 4, or the step is too large for it
_POLISH = 2


class ImplicitEuler(Implicit):
    """z₁ = z + dt·f(t + dt, z₁), with the error estimate (I - dt·J)⁻¹ (dt/2)(f(t, z) - f(t + dt, z₁)), J taken at z₁.

    Newton's iteration, without a tape, goes on until a sample's update is below √eps times its state (in the largest
    component; or twice the eps of a half-precision f, whose rounding is more than that). It converges quadratically, so
    that what is left of the error is rounding: far below any tolerance, which solvers do not know. A sample that gets
    there stops; one that does not makes the attempt NaN, and the control tries a smaller step. (A fixed one has nothing
    smaller: the solve fails.)

    Then two steps with the last matrix as a constant are made on the tape. One gives the first derivatives of the
    implicit function theorem, two give the second derivatives as well: each step multiplies the error of z₁ as a
    function of the step's inputs with something that is 0 where the inputs are what they are.

    Source: Hairer & Wanner, Solving ODEs II, IV.8.
    """

    name = "implicit_euler"
    order = 1
    adaptive = True
    error_order = 2
    interpolant_order = 1
    fsal = True
    calls_per_step = None
    exponents = 0.5, 0.0  # 1/q of the estimate and no memory: on Robertson, a third less work than the general rule

    def attempt(
        self,
        f: VectorField,
        t: Tensor,
        dt: Tensor,
        z: Tensor,
        slope: Tensor | None,
        memory: None,
        lens: bool | str = True,
        close: bool = False,
    ) -> Step:
        """See `Solver.attempt`."""
        if z.is_complex():
            slope = None if slope is None else to_real(slope)
            step = self._step(RealField(f), t, dt, to_real(z), slope, bool(lens), as_complex=True)
            start, coefficients = step.stages
            z_end, error, slope_end = (
                None if x is None else to_complex(x) for x in (step.z, step.error, step.slope_end)
            )
            stages = to_complex(start), lambda: [to_complex(x) for x in coefficients()]
            return step._replace(z=z_end, error=error, slope_end=slope_end, stages=stages)
        return self._step(f, t, dt, z, slope, bool(lens), as_complex=False)

    def _step(self, f, t: Tensor, dt: Tensor, z: Tensor, slope: Tensor | None, lens: bool, as_complex: bool) -> Step:
        h, end = dt[:, None], t + dt
        z_end, solve, converged, rounds = _newton(f, end, h, z)
        now = f.times(end)[0]
        for _ in range(_POLISH):
            z_end = z_end - solve(z_end - z - h * f(now, z_end))
        error = size = slope_end = None
        nfe = rounds + _POLISH
        if lens:
            if slope is None:
                slope, nfe = f(f.times(t)[0], z), nfe + 1
            here = linearize(f, end, z_end, rate=False)
            slope_end, size = here.value, stiffness(here, len(t), as_complex)
            error = factorize(here.jacobian, h)(h * (slope - slope_end) / 2)
        # Not before: f is never called with it.
        z_end = torch.where(converged[:, None], z_end, float("nan"))
        work = Work(
            nfe + lens, jacobians=rounds + lens, factorizations=rounds + lens, linear_solves=rounds + _POLISH + lens
        )
        if len(t) < len(z):
            work = Work(*(x.amax(dim=0, keepdim=True) for x in work))
        return Step(z_end, error, None, slope_end, (z, lambda: [z_end - z]), size, work)


@torch.no_grad()
def _newton(f: VectorField, t: Tensor, h: Tensor, start: Tensor) -> tuple[Tensor, Callable, Tensor, Tensor]:
    """Solves x = start + h·f(t, x) for every sample.

    Args:
        t: [batch] or [1]. h: like it, with a second dimension.
        start: [batch, features].

    Returns:
        x; the solver of linear systems with the last matrix; which samples converged, [batch]; the rounds that each of
        them took part in, [batch].
    """
    start = start.detach()
    x, converged = start, torch.zeros(len(start), dtype=torch.bool, device=start.device)
    rounds, going = torch.zeros_like(converged, dtype=torch.int64), ~converged
    for _ in range(_ROUNDS):
        here = linearize(f, t, x, rate=False)
        solve = factorize(here.jacobian.detach(), h)
        update = solve(x - start - h * here.value)
        size, tolerance = update.abs().amax(dim=1), max(torch.finfo(start.dtype).eps ** 0.5, 2 * here.eps)
        small = transforms.worst(size <= tolerance * torch.maximum(x.abs(), start.abs()).amax(dim=1))
        rounds = rounds + going
        # A sample that went out of f's domain stays where it is, and is given up.
        sound = going & transforms.worst(torch.isfinite(size))
        x = torch.where(sound[:, None], x - update, x)
        converged = converged | (sound & small)
        going = sound & ~small
        if not bool(going.any()):
            break
    return x.detach(), solve, converged, rounds
