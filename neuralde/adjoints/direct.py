"""Direct reverse mode: every accepted step is on autograd's tape."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from .. import transforms
from ..discover import discover
from ..grid import Record
from ..problem import Problem
from ..trajectory import Trajectory
from .base import Adjoint, Outcome, plain


class Direct(Adjoint):
    """Discretise, then differentiate, with everything on the tape.

    Exact gradients of the discrete solution. Fast, and supports double backward; its memory grows by the stages
    times the layers of f with every step. It alone follows what f does beside its result: tensors that f remembers
    from one evaluation to the next, or collects on the side. Forward-mode AD and torch.func's transforms (jvp,
    vmap, ...) go through it too; the copies of a sample that vmap makes share its steps: the worst of them decides.
    """

    name = "direct"
    transforms = True
    of_steady = True

    def solve(self, problem: Problem, z0: Tensor) -> Outcome:
        """See `Adjoint.solve`."""
        slope = problem.field.first(problem.first_instant, z0, problem.elsewhere)
        taped = transforms.recording()
        trajectory = discover(problem, z0, slope, taped=taped)
        outcome = plain(trajectory)
        if taped:
            # The figures go on the tape when they are asked for: an unregularized solve does not pay for them.
            if outcome.error is not None:
                outcome.error = functools.cache(functools.partial(_errors, problem, trajectory))
            if outcome.stiffness is not None:
                outcome.stiffness = functools.cache(functools.partial(_stiffnesses, problem, trajectory))
        return outcome


def _errors(problem: Problem, trajectory: Trajectory) -> Tensor:
    parts = []
    for r in trajectory.records:
        (error,) = _moving(r, (r.lens.error, 1.0))
        parts.append(problem.ratio(error, r.z, r.lens.z, r.rows))
    return trajectory.grid.gather(parts, problem.start)


def _stiffnesses(problem: Problem, trajectory: Trajectory) -> Tensor:
    parts = []
    for r in trajectory.records:
        lens = r.lens
        if lens.pair is not None:
            lens = lens._replace(pair=_moving(r, *zip(lens.pair, (1.0, 0.0, 1.0, 0.0), strict=True)))
        parts.append(problem.stiffness(lens, r.dt))
    return trajectory.grid.gather(parts, problem.start)


def _moving(record: Record, *pairs: tuple[Tensor, float]) -> tuple[Tensor, ...]:
    """Quantities of an attempt, with numbers in place of those of the samples that it did not move.

    A finished sample's error is zero, where a norm has no derivative or no second one; zero times that is NaN.
    """
    if record.accepted is None:
        return tuple(x for x, _ in pairs)
    return tuple(torch.where(record.accepted[:, None], x, number) for x, number in pairs)
