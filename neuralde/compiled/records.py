"""What a program writes down of its attempts, and the trajectory that this makes."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from .. import control as _control
from ..dense import Dense, Stages
from ..grid import Record
from ..problem import Problem
from ..trajectory import Counts, Trajectory


class Log(NamedTuple):
    """What a program writes down of its attempts, but for those that the whole batch makes and that are rejected.

    [rows, ...]; what follows the rows that were filled may be anything.

    Attributes:
        s, h, end: where they started, their size, where they ended, [groups]; times run forward.
        ok: which were accepted, [groups]. figures: of `control.Judge`, [1 to 3, groups]; 0 where nothing is reported.
        z: where they started, [batch, features]; None where that is not kept.
        driving: what drove them beside the vector field; None where nothing does.
        residual: at their ends, [groups], of a solve for a steady state, else None.
        stages: a closed step's snapshot, [rows, batch, features]; None where they are not wanted.
    """

    s: Tensor
    h: Tensor
    end: Tensor
    ok: Tensor
    figures: Tensor
    z: Tensor | None
    driving: Tensor | None
    residual: Tensor | None
    stages: Tensor | None


class Page(NamedTuple):
    """A log and what is to be known of it.

    Attributes:
        filled: how many of its rows were. rows: of which samples it is, ascending; None for all.
    """

    filled: int
    log: Log
    rows: Tensor | None = None


class Stand(NamedTuple):
    """Where the samples stand: all [groups], but for z and slope, [batch, features]."""

    s: Tensor
    h: Tensor
    z: Tensor
    slope: Tensor
    previous: Tensor
    live: Tensor
    failed: Tensor
    accepted: Tensor
    rejected: Tensor


class Ran(Trajectory):
    """A trajectory that a program found: a success, put together from its logs.

    Attributes:
        pages: what was written down. extra: evaluations of f beside those of the attempts.
    """

    def __init__(self, problem: Problem, z0: Tensor, stand: Stand, pages: list[Page], extra: int):
        self.problem, self.pages, self._z0, self._stand, self._extra = problem, pages, z0, stand, extra
        self.final, self.hits, self.slope = stand.z, None, None
        self.status, self.complete, self._held = torch.zeros_like(stand.accepted), True, None

    @functools.cached_property
    def reached(self) -> Tensor:  # noqa: D102
        return self.problem.end

    @functools.cached_property
    def records(self) -> list[Record]:  # noqa: D102
        signs, joint, solver = self.problem.span.sign(), self.problem.joint, self.problem.solver
        silent, found = solver.error_order is None and not solver.reports_stiffness, []
        for filled, log, rows in self.pages:
            everyone = log.ok[:filled].all(dim=1).tolist()
            direction = signs if rows is None else signs.index_select(0, rows)
            t, dt, end = (x[:filled] * direction for x in (log.s, log.h, log.end))
            ends = end[:, 0].tolist() if joint else end
            for j in range(filled):
                if everyone[j] or not joint:
                    accepted, figures = None if everyone[j] else log.ok[j], None if silent else log.figures[j]
                    z, residual, stages = (None if x is None else x[j] for x in (log.z, log.residual, log.stages))
                    what = {"figures": figures, "snapshot": stages, "residual": residual}
                    found.append(Record(0, rows, accepted, t[j], dt[j], ends[j], z, None, **what))
        return found

    @functools.cached_property
    def used(self) -> list[tuple[int, int]]:
        """Which rows of the logs have a record: (number of the page, number of the row)."""
        rows = [(i, j, page.log.ok[j]) for i, page in enumerate(self.pages) for j in range(page.filled)]
        return [(i, j) for i, j, ok in rows if not self.problem.joint or bool(ok)]

    @functools.cached_property
    def interior(self) -> Tensor | None:  # noqa: D102
        return None if self.problem.interior is None else self._inside(Stages.of(self).snapshots)

    def _inside(self, snapshots: Tensor) -> Tensor:
        """The interior outputs from the stages of the accepted steps, [rows, all accepted, features]."""
        p = self.problem
        kept = Stages(snapshots, [len(snapshots)])
        return Dense(p, self.grid, self.grid.states, kept).at(*self.grid.locate(p.interior, p.span.sign()))

    def marks(self, interior: Tensor | None, states: Tensor | None) -> list[Tensor] | None:
        """The gradient by the snapshots, [rows of a log, snapshot's rows, samples, features] for every page, from those
        by what is made of them; only their first row, which is the state, from `states` alone. None without any.
        """
        marks = None if states is None else states[:, None]
        if interior is not None:
            with torch.enable_grad():
                snapshots = Stages.of(self).snapshots.requires_grad_()
                (by,) = torch.autograd.grad(self._inside(snapshots), snapshots, interior)
            marks = by.movedim(0, 1)
            if states is not None:
                marks[:, 0] += states
        if marks is None:
            return None
        # Under joint control, too, every sample has a state of its own.
        wide = [len(self._z0) if page.rows is None else len(page.rows) for page in self.pages]
        sizes = [len(page.log.s) * n for page, n in zip(self.pages, wide, strict=True)]
        begins, everyone = [0, *itertools.accumulate(sizes)], torch.arange(len(self._z0))
        rows = [everyone[: wide[i]] + (begins[i] + j * wide[i]) for i, j in self.used]
        spread = marks.new_zeros(begins[-1], *marks.shape[1:])
        spread.index_copy_(0, self.grid.gather(rows, everyone), marks)
        pages = zip(spread.split(sizes), wide, strict=True)
        return [x.view(-1, n, *marks.shape[1:]).movedim(1, 2).contiguous() for x, n in pages]

    @property
    def figures(self) -> Tensor:
        """What the programs logged of errors and stiffness, [rows of all logs, 1 to 3, groups]."""
        return self._everyones(lambda page: page.log.figures)

    def _everyones(self, of: Callable[[Page], Tensor]) -> Tensor:
        """What the logs have of their samples, [rows of all logs, ..., groups]; 0 where a log is not of a sample."""
        found, groups = [], len(self.problem.start)
        for page in self.pages:
            x = of(page)
            if page.rows is not None:
                x = x.new_zeros(*x.shape[:-1], groups).index_copy_(-1, page.rows, x)
            found.append(x)
        return found[0] if len(found) == 1 else torch.cat(found)

    def stand_in(self) -> Tensor:
        """What stands for the states among the outputs of an autograd function: their shape without memory."""
        taken = int(self._stand.accepted.expand(len(self._z0)).sum())
        return self.final.new_zeros(1, 1).expand(taken, self.final.shape[1])

    def reported(self, figures: Tensor, which: int) -> Tensor:
        """The error (0) or the stiffness (1) in `figures`, of accepted steps in the grid's order. Differentiable."""
        return self._of_steps(_control.reported(figures.movedim(1, 0), self._sizes, self.problem.solver)[which])

    def integrals(self, figures: Tensor) -> dict[str, Tensor]:
        """Σ_j figure_j·|Δt_j|, [batch], of the "error" and of the "stiffness" in `figures`. Differentiable."""
        solver = self.problem.solver
        names = ["error"] * (solver.error_order is not None) + ["stiffness"] * solver.reports_stiffness
        sums = _Integrals.apply(figures, self._sizes, self._taken, *(name in names for name in ("error", "stiffness")))
        return dict(zip(names, sums.expand(-1, len(self._z0)).unbind(), strict=True))

    def of_steps(self, cotangent: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        """The gradients by error and stiffness, in the grid's order, from that by `figures`; None without one."""
        if cotangent is None:
            return None, None
        solver = self.problem.solver
        error = None if solver.error_order is None else self._of_steps(cotangent[:, 0])
        if not solver.reports_stiffness:
            return error, None
        # The stiffness is the last figure but one over the last one and the step size.
        return error, self._of_steps(cotangent[:, -2] * self.figures[:, -1] * self._sizes)

    @functools.cached_property
    def _sizes(self) -> Tensor:
        return self._everyones(lambda page: page.log.h)

    @functools.cached_property
    def _taken(self) -> Tensor:
        # Rejected attempts, and rows that no attempt has filled, may hold anything.
        return self._everyones(lambda page: (torch.arange(len(page.log.ok)) < page.filled)[:, None] & page.log.ok)

    def _of_steps(self, values: Tensor) -> Tensor:
        long, found = len(self.pages[0].log.s), []
        for i, j in self.used:
            row, rows = values[i * long + j], self.pages[i].rows
            found.append(row if rows is None else row.index_select(0, rows))
        return self.grid.gather(found, self.problem.start)

    @functools.cached_property
    def counts(self) -> Counts:  # noqa: D102
        solver, stand = self.problem.solver, self._stand
        nfe = (stand.accepted + stand.rejected) * solver.calls_per_step + self._extra
        none = torch.zeros_like(stand.accepted)
        every = (stand.accepted, stand.rejected, nfe.clamp(min=1), none, none, none)
        return Counts(*(x.expand(len(self._z0)) for x in every))


class _Integrals(torch.autograd.Function):
    """`Ran.integrals`: one node of the graph in place of the dozen that its operations would be.

    A step's stiffness is the last figure but one over the last one and |Δt|, which its integral has no more.
    """

    @staticmethod
    def forward(ctx, figures: Tensor, sizes: Tensor, taken: Tensor, error: bool, stiffness: bool) -> Tensor:
        ctx.save_for_backward(figures, sizes, taken)
        ctx.error, ctx.stiffness = error, stiffness
        sums = []
        if error:
            sums.append(torch.where(taken, figures[:, 0] * sizes, 0.0).sum(dim=0))
        if stiffness:
            moving = taken & (figures[:, -1] != 0)  # NaN stays NaN
            sums.append(torch.where(moving, figures[:, -2] / figures[:, -1], 0.0).sum(dim=0))
        return torch.stack(sums)

    @staticmethod
    def backward(ctx, cotangents: Tensor):
        figures, sizes, taken = ctx.saved_tensors
        back = []
        if ctx.error:
            back.append(torch.where(taken, sizes * cotangents[0], 0.0))
        if ctx.stiffness:
            difference, distance = figures[:, -2], figures[:, -1]
            moving = taken & (distance != 0)
            by = torch.where(moving, cotangents[-1] / torch.where(moving, distance, 1.0), 0.0)
            ratio = torch.where(moving, difference / torch.where(moving, distance, 1.0), 0.0)
            back += [by, -by * ratio]
        return torch.stack(back, dim=1), None, None, None, None
