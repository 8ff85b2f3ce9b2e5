"""What the adaptive loop found."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from . import control as _control
from .algebra import Figure
from .errors import Status
from .events import Hits
from .grid import Grid, Record
from .held import Held
from .problem import Problem

if TYPE_CHECKING:
    from .lane import Lane


class Counts(NamedTuple):
    """How much work a solve was, per sample: [batch], int64.

    Attributes:
        accepted, rejected: attempts judged.
        nfe: evaluations of f on the sample.
        jacobians, factorizations, linear_solves: as `solvers.Work`.
    """

    accepted: Tensor
    rejected: Tensor
    nfe: Tensor
    jacobians: Tensor
    factorizations: Tensor
    linear_solves: Tensor


class Trajectory:
    """What the loop found. What a caller may not need is put together when it is asked for.

    Attributes:
        problem: what was solved.
        final: the state at the end, [batch, features]; NaN for samples that did not get there.
        interior: the interior outputs, [points, batch, features], or None; NaN where not reached.
        hits: the events that took place, or None. Their states are the last rows of `interior`.
        slope: f at the end, [batch, features], or None where the solver has no use for it.
        complete: whether every sample succeeded.
        records: the accepted attempts.
    """

    def __init__(
        self,
        problem: Problem,
        z0: Tensor,
        parts: list[Lane],
        records: list[Record],
        interior: Tensor | None,
        nfe_extra: int,
        hits: Hits | None,
        held: Held | None,
    ):
        self.problem, self.records, self.interior, self.hits = problem, records, interior, hits
        self._z0, self._parts, self._nfe_extra, self._held = z0, parts, nfe_extra, held
        self.final = self._whole(lambda lane: lane.z)
        if problem.rest is not None:
            self.status, self.final = problem.rest.verdict(self.status, self.final)
            self.complete = bool((self.status == Status.SUCCESS).all())
        else:
            self.complete = all(part.last is None for part in parts)
            if not self.complete:
                self.final = torch.where((self.status != Status.SUCCESS)[:, None], float("nan"), self.final)
        known = all(part.slope is not None for part in parts)
        self.slope = self._whole(lambda lane: lane.slope).detach() if known else None
        for part in parts:
            part.z = part.slope = part.past_slopes = part.tools = None

    @functools.cached_property
    def status(self) -> Tensor:
        """How each group's solve ended, [groups]."""
        return self._whole(lambda lane: lane.status)

    def _whole(self, quantity) -> Tensor:
        """A quantity of all samples, put together from the lanes that they finished in."""
        values = [self._tensor(quantity(part)) for part in self._parts]
        if len(values) == 1:
            return values[0]
        order = torch.argsort(torch.cat([part.rows for part in self._parts]))
        return torch.cat(values).index_select(0, order)

    def _tensor(self, x: Figure) -> Tensor:
        """A figure as a tensor, [groups]."""
        if isinstance(x, Tensor):
            return x
        return torch.full_like(self.problem.start, x, dtype=torch.int64 if isinstance(x, int) else None)

    @functools.cached_property
    def grid(self) -> Grid:
        """The accepted steps."""
        grid = Grid(self.records, len(self._z0), self.problem.joint, self._z0, self.problem.start, self._held)
        if self.hits is not None and self.problem.joint:
            last = self.hits.terminal.nonzero().flatten()
            never = torch.full_like(grid.counts, len(grid))
            grid.ended_in = never.index_copy(0, self.hits.sample[last], self.hits.step[last])
        return grid

    @functools.cached_property
    def error(self) -> Tensor | None:
        """The error ratio of every accepted step, flat in the grid's order; None where the solver has none."""
        if self.problem.solver.error_order is None:
            return None
        return self.grid.gather([r.figures[0] for r in self.records], self.problem.start)

    @functools.cached_property
    def stiffness(self) -> Tensor | None:
        """The stiffness of every accepted step, as `error`."""
        if not self.problem.solver.reports_stiffness:
            return None
        solvers = self.problem.solver.parts
        return self.grid.gather(
            [_control.reported(r.figures, r.dt, solvers[r.part])[1] for r in self.records], self.problem.start
        )

    @functools.cached_property
    def residuals(self) -> Tensor:
        """Of a steady state: the residual at the end of every accepted step, as `error`."""
        return self.grid.gather([r.residual for r in self.records], self.problem.start)

    @functools.cached_property
    def counts(self) -> Counts:
        """The work."""
        accepted, attempted = self._whole(lambda lane: lane.accepted), self._whole(lambda lane: lane.attempted)
        nfe = self._whole(lambda lane: lane.calls) + self._nfe_extra
        solver = self.problem.solver
        if len(solver.parts) == 1 and not solver.linearizes and solver.calls_per_step is not None:
            nfe = nfe + attempted * solver.calls_per_step
        linear = self._whole(self._linear).unbind(1)
        return Counts(*(x.expand(len(self._z0)) for x in (accepted, attempted - accepted, nfe.clamp(min=1), *linear)))

    @functools.cached_property
    def reached(self) -> Tensor:
        """The time that every sample got to, [groups]."""
        return self._whole(
            lambda lane: lane.signed(lane.m.where(lane.status == Status.SUCCESS, lane.s, lane.failed_at))
        )

    def last_attempt(self) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """(dt, error ratio, stiffness) of every failed sample's last attempt, [groups] or None if not reported."""
        solver = self.problem.solver
        error, stiffness = (self._whole(lambda lane, i=i: self._last(lane)[i]) for i in (1, 2))
        return (
            self._whole(lambda lane: lane.signed(self._last(lane)[0])),
            error if solver.error_order is not None else None,
            stiffness if solver.reports_stiffness else None,
        )

    def _last(self, lane: Lane) -> Tensor:
        return self.problem.start.new_full((3, lane.groups), float("nan")) if lane.last is None else lane.last

    def _linear(self, lane: Lane) -> Tensor:
        none = self.problem.start.new_zeros(lane.groups, 3, dtype=torch.int64)
        return none if lane.linear is None else lane.linear.T
