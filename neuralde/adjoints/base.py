"""What an adjoint is to the rest of the package: a way from a problem to a differentiable outcome."""

from __future__ import annotations

import abc
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from ..problem import Problem
from ..trajectory import Trajectory


@dataclass
class Outcome:
    """A solved problem with its differentiable quantities.

    Attributes:
        trajectory: what the loop found, without gradients but under "direct".
        final: [batch, features]. interior: [points, batch, features] or None.
        error, stiffness: each returns the accepted steps' figures, flat in the grid's order; None where the solver
            reports none. Functions, because "direct" puts them on its tape only when somebody asks.
        states: returns the states at the steps' starts, [all accepted, features].
    """

    trajectory: Trajectory
    final: Tensor
    interior: Tensor | None
    error: Callable[[], Tensor] | None
    stiffness: Callable[[], Tensor] | None
    states: Callable[[], Tensor]


class Adjoint(abc.ABC):
    """A sensitivity method: how the gradients of a solve are computed.

    Attributes:
        name: what `solve(adjoint=...)` calls it.
    """

    name: str

    @abc.abstractmethod
    def solve(self, problem: Problem, z0: Tensor) -> Outcome:
        """Solves from z0 ([batch, features], in the working dtype), with gradients if grad mode is on."""

    def __repr__(self) -> str:
        return f"{type(self).__name__}()"


def plain(trajectory: Trajectory) -> Outcome:
    """The outcome without any gradient."""
    solver = trajectory.problem.solver
    return Outcome(
        trajectory=trajectory,
        final=trajectory.final,
        interior=trajectory.interior,
        error=None if solver.error_order is None else lambda: trajectory.error,
        stiffness=(lambda: trajectory.stiffness) if solver.reports_stiffness else None,
        states=lambda: trajectory.grid.flat_z,
    )
