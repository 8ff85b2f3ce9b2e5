"""What an adjoint is to the rest of the package: a way from a problem to a differentiable outcome."""

from __future__ import annotations

import abc
import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .. import transforms
from ..control import StepControl
from ..equations import SDE
from ..grid import Grid
from ..problem import Problem
from ..solvers import Solver
from ..trajectory import Counts, Trajectory


@dataclass
class Outcome:
    """A solved problem with its differentiable quantities.

    Attributes:
        trajectory: what the loop found, without gradients but under "direct".
        final: [batch, features]. interior: [points, batch, features] or None.
        error, stiffness: each returns the accepted steps' figures, flat in the grid's order; None where the solver
            reports none. Functions, because "direct" puts them on its tape only when somebody asks.
        states: returns the states at the steps' starts, [all accepted, features]; None where they are not all kept.
        lost: of a differentiable solve whose states have no gradients: takes a value that was made from them, and
            attaches it to the graph in such a way that asking for its gradient is an error. None elsewhere.
        backward: returns what the last backward solve cost, or None where there was none.
        integral: "error" or "stiffness" -> Σ_j figure_j·|Δt_j|, [batch], where there is a shorter way to it than over
            the grid; or None.
    """

    trajectory: Trajectory
    final: Tensor
    interior: Tensor | None
    error: Callable[[], Tensor] | None
    stiffness: Callable[[], Tensor] | None
    states: Callable[[], Tensor] | None
    lost: Callable[[Tensor], Tensor] | None = None
    backward: Callable[[], Counts | None] = lambda: None
    integral: Callable[[str], Tensor] | None = None

    @property
    def differentiable_states(self) -> bool:
        """Whether gradients flow through the states."""
        return self.states is not None and (self.final.requires_grad or transforms.active())

    def from_states(self, make: Callable[[], Tensor]) -> Tensor:
        """What `make` makes from the states, with the gradients that it has or with none and an error."""
        if self.lost is None:
            return make()
        with torch.no_grad():
            value = make()
        return self.lost(value)


class Adjoint(abc.ABC):
    """A sensitivity method: how the gradients of a solve are computed.

    Attributes:
        name: what `solve(adjoint=...)` calls it.
        exact: whether its gradients are those of the discrete solution. Others are solutions themselves, to a
            tolerance.
        transforms: whether torch.func's transforms and forward-mode AD can go through it.
        compiles: whether it solves with compiled programs when asked to.
        of_horizons, of_steady: whether it differentiates the solution on a finite horizon, a steady state.
    """

    name: str
    exact: bool = True
    transforms: bool = False
    compiles: bool = False
    of_horizons: bool = True
    of_steady: bool = False

    @abc.abstractmethod
    def solve(self, problem: Problem, z0: Tensor) -> Outcome:
        """Solves from z0 ([batch, features], in the working dtype), with gradients if grad mode is on."""

    def require_noisy(self, equation: SDE, control: StepControl) -> None:
        """Raises ValueError if it can't differentiate a solve of that SDE."""
        if not self.exact:
            raise ValueError(
                f"adjoint={self.name!r} solves the adjoint equation of an ODE backwards; for SDEs use 'checkpointed' "
                "or 'direct', whose gradients are exact, or, in the sense of Stratonovich, 'backsolve'"
            )

    def require(self, solver: Solver, control: StepControl, dt0: float | None) -> None:  # noqa: B027  (most can)
        """Raises ValueError if it can't differentiate a solve of that kind, known before there is anything to solve.

        Args:
            solver, control: of the solve; the control is not adaptive where the solver isn't. dt0: None for none.
        """

    def __repr__(self) -> str:
        defaults = inspect.signature(type(self)).parameters
        given = {k: x for k, x in vars(self).items() if k in defaults and x != defaults[k].default}
        shown = (f"{k}={x.name!r}" if isinstance(x, Solver) else f"{k}={x!r}" for k, x in given.items())
        return f"{type(self).__name__}({', '.join(shown)})"


def plain(trajectory: Trajectory) -> Outcome:
    """The outcome without any gradient."""
    solver = trajectory.problem.solver
    return Outcome(
        trajectory=trajectory,
        final=trajectory.final,
        interior=trajectory.interior,
        error=None if solver.error_order is None else lambda: trajectory.error,
        stiffness=(lambda: trajectory.stiffness) if solver.reports_stiffness else None,
        states=None if trajectory.problem.keep is not None else lambda: trajectory.grid.flat_z,
    )


def states_of(trajectory: Trajectory) -> Tensor:
    """What stands for the states of the steps among the outputs of an autograd function: their shape without memory.

    Most solves' states are never asked for; `packed` puts them together when they are.
    """
    grid = trajectory.grid
    for record in trajectory.records:
        record.z = None  # the grid has them
    count = sum(grid.samples(j) for j in range(len(grid)))
    return trajectory.final.new_zeros(1, 1).expand(count, trajectory.final.shape[1])


def packed(stand_in: Tensor, trajectory: Trajectory) -> Callable[[], Tensor]:
    """`Outcome.states` of a solve whose function has `states_of` among its outputs."""
    return functools.cache(lambda: _Packed.apply(stand_in, trajectory.grid))


class _Packed(torch.autograd.Function):
    @staticmethod
    def forward(ctx, stand_in: Tensor, grid: Grid) -> Tensor:
        return grid.flat_z

    @staticmethod
    def backward(ctx, cotangent: Tensor):
        return cotangent, None
