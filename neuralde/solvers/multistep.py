"""Adams methods with variable coefficients: the slopes of earlier steps take the place of stages."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..algebra import Algebra, Figure
from .base import Past, Solver, Step, VectorField
from .hermite import hermite
from .switching import Switching


class _Ends(NamedTuple):
    """A step for cubic Hermite interpolation: its ends, and the increments dt·slope there."""

    z: Tensor
    z_end: Tensor
    first: Tensor
    last: Tensor | None
    dt: Tensor


class AdamsBashforth3(Solver):
    """The explicit Adams method of order 3 on a non-uniform grid.

    With the slopes f, f₁, f₂ at this step's start and at those of the two before, and the step sizes h, h₁, h₂,

        z + h·f + h/2·φ₂* + g·φ₃*,    error = g·φ₃*,    g = h(1/2 - h / (6(h + h₁)))
        φ₂* = h/h₁ (f - f₁),    φ₃* = h(h + h₁) / (h₁(h₁ + h₂)) · ((f - f₁) - h₁/h₂ (f₁ - f₂)),

    the divided differences of f; exact where f is a polynomial of degree 2 in t. The error is the difference to the
    method of order 2. An attempt costs no evaluation of f, an accepted step one: the slope at its end.

    Source: Hairer, Nørsett & Wanner, Solving ODEs I, III.5 (5.9, 5.10); OrdinaryDiffEq.jl's VCAB3.
    """

    name = "adams_bashforth_3"
    order = error_order = interpolant_order = 3
    adaptive = True
    reports_stiffness = False
    stability_size = 6.0 / 11.0
    fsal = True
    calls_per_step = 0
    history = 2
    closes = False

    def memory(self, z: Tensor, taped: bool) -> None:
        """See `Solver.memory`: none is needed."""

    def attempt(
        self,
        f: VectorField,
        t: Tensor,
        dt: Tensor,
        z: Tensor,
        slope: Tensor | None,
        memory,
        lens: bool | str = True,
        close: bool = False,
        past: Past | None = None,
    ) -> Step:
        """See `Solver.attempt`."""
        slope = f(f.times(t)[0], z) if slope is None else slope
        h, h1, h2 = (x[:, None].to(z.real.dtype) for x in (dt, *past.dt))
        newer, older = slope - past.slopes[0], past.slopes[0] - past.slopes[1]
        second = h / h1 * newer
        third = h * (h + h1) / (h1 * (h1 + h2)) * (newer - h1 / h2 * older)
        error = h * (0.5 - h / (6.0 * (h + h1))) * third
        z_end = z + h * slope + 0.5 * h * second + error
        return Step(z_end, error if lens else None, None, None, _Ends(z, z_end, h * slope, None, h))

    def finish(self, stages: _Ends, slope: Tensor) -> _Ends:
        """See `Solver.finish`."""
        return stages._replace(last=stages.dt * slope)

    def snapshot(self, stages: _Ends) -> Tensor:
        """See `Solver.snapshot`: the ends and the increments there."""
        return torch.stack([stages.z, stages.z_end, stages.first, stages.last])

    def interpolate(self, snapshot: Tensor, theta: Tensor, rows: Tensor | None) -> Tensor:
        """See `Solver.interpolate`: cubic Hermite."""
        return hermite(snapshot, theta, rows)


class VCAB3(Switching):
    """Adams-Bashforth of order 3, started by two steps of bs3, which advance the history only when they are accepted.

    The cheapest method per step: one evaluation of f for an accepted step, none for a rejected one.

    Source: OrdinaryDiffEq.jl's VCAB3, whose start-up counts rejected steps too.
    """

    def __init__(self, start: Solver):
        super().__init__("vcab3", (start, AdamsBashforth3()))

    def route(
        self, part: int, counter: Figure, ok: Figure, figures: Tensor, dt: Figure, m: Algebra
    ) -> tuple[Figure, Figure]:
        """See `Switching.route`: on to Adams-Bashforth after two accepted steps."""
        counter = counter + ok
        return counter, (counter >= 2) if part == 0 else (counter < 0)

    def restart(self, part: int) -> int:
        """See `Switching.restart`: slopes from before a jump are of no use after it."""
        return 0
