"""The interpolating adjoint: the backward solve reads the solution from the forward solve's own interpolant."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from ..dense import Dense, States
from ..grid import Grid
from ..problem import Problem, Tally
from ..solvers import Solver
from .binomial import blocks, limit
from .continuous import AdjointField, Backward, Continuous, Gauss


class Interpolating(Continuous):
    """Differentiate, then discretise, along the solution itself: one state of memory per step.

    The stages of a step are made again when the backward solve comes by, so that z is as accurate as the solver's
    interpolant, and its steps end where those of the solve do, where the interpolant has its kinks. Does not drift as
    "backsolve" does.

    Args:
        rtol, atol: tolerances of the backward solve, numbers; None takes the solve's own.
        solver: of the backward solve, a name or an object; None takes the solve's own.
        dt0: step size of a fixed-step `solver`, first step of an adaptive one; None takes over from the solve.
        max_steps: attempts of the backward solve; None allows 4 times the solve's own `max_steps`.
        checkpoints: at most how many states are kept; those between are made again, as `Checkpointed` does it, and the
            backward solve goes from block to block. None keeps those of all steps.

    Raises:
        TypeError, ValueError: an option is wrong; the message names it.

    Source: Hindmarsh et al. 2005, "SUNDIALS" (CVODES), with the solver's interpolant and Gauss quadrature.
    """

    name = "interpolating"

    def __init__(
        self,
        *,
        rtol: float | None = None,
        atol: float | None = None,
        solver: str | Solver | None = None,
        checkpoints: int | None = None,
        dt0: float | None = None,
        max_steps: int | None = None,
    ):
        super().__init__(rtol=rtol, atol=atol, solver=solver, dt0=dt0, max_steps=max_steps)
        self.checkpoints = limit(checkpoints)

    @property
    def keep(self) -> int | None:
        """See `Continuous.keep`."""
        return self.checkpoints

    def sweep(self, work: Backward) -> Tensor:
        """See `Continuous.sweep`."""
        return along(work, functools.partial(Gauss, work, take=work.add))


def along(work: Backward, tally: Callable[[AdjointField], Tally]) -> Tensor:
    """The costate at the start, solved for along the forward solution."""
    grid, features, begin = work.grid, work.z0.shape[1], work.latest()
    costate = work.looks.only(work.looks.t == work._of(begin)[work.looks.sample]).onto(torch.zeros_like(work.z0))
    for lo, states in _blocks(work):
        t = grid.padded("t", fill=float("inf"))[lo:]
        # A sample that the loss has not looked at yet stays where it is; so does one that has no step here.
        end = torch.where((grid.counts > lo)[: len(begin)], t[0], begin)
        end = torch.where((end - begin) * work.direction > 0, begin, end)
        field = AdjointField(work.field, features, Forward(work.problem, grid, states, begin, lo))
        costate = work.integrate(field, begin, end, costate, stops=t, tally=tally)
        begin = end
    return costate


def _blocks(work: Backward) -> Iterator[tuple[int, States]]:
    """The states of the solve, some steps at a time, the last ones first: (the first step of them, the states)."""
    problem, grid = work.problem, work.grid
    if grid.held is None:
        yield 0, grid.states
        return
    for lo, _, states in blocks(problem, grid, work.z0, problem.keep):
        yield lo, states


class Forward:
    """The forward solution as the backward solve passes it, step by step: one step's stages of every sample at a time.

    Args:
        problem, grid: of the solve. states: what its steps started from.
        begin: where the backward solve begins, [groups]. first: the first step that it comes to.
    """

    def __init__(self, problem: Problem, grid: Grid, states: States, begin: Tensor, first: int):
        self.problem, self.grid, self.first, self.dense = problem, grid, first, Dense(problem, grid, states)
        # Of every group's steps, [steps, groups]; and where every group stands.
        self.t, self.dt = grid.padded("t"), grid.padded("dt")
        self.direction = problem.span.sign()
        step, _ = grid.locate(begin[None], self.direction)
        self.groups = torch.arange(len(begin), device=begin.device)
        # Rounding must not lead to a step whose state is not at hand.
        self.step, self.known = step[0].clamp(min=first), torch.full_like(step[0], -1)
        # The stages of that step, by the method that made it, [rows, batch, features].
        self.stages: dict[Solver, Tensor] = {}
        self.made_by = torch.zeros(grid.batch, dtype=torch.int64, device=begin.device)

    def at(self, stack: Tensor, rows: Tensor | None) -> Tensor:
        """The solution at some instants, [instants, samples, features].

        Args:
            stack: the instants of one step of the backward solve, [instants, groups]. rows: the samples; None for all.
        """
        groups = self.groups if rows is None or self.problem.joint else rows
        with torch.no_grad():
            self._move((stack.amin(dim=0) + stack.amax(dim=0)) / 2, groups)
        step = self.step[groups]
        theta = (stack - self.t[step, groups]) / self.dt[step, groups]
        theta = theta[:, 0] if self.problem.joint else theta
        if len(self.stages) == 1:
            ((method, stages),) = self.stages.items()
            return method.interpolate(stages if rows is None else stages.index_select(1, rows), theta, None)
        made_by = self.made_by if rows is None else self.made_by[rows]
        values, places = [], []
        for i, (method, stages) in enumerate(self.stages.items()):
            here = (made_by == i).nonzero().flatten()
            stages = stages[:, here if rows is None else rows[here]]
            values.append(method.interpolate(stages, theta if self.problem.joint else theta[:, here], None))
            places.append(here)
        return torch.cat(values, dim=1).index_select(1, torch.argsort(torch.cat(places)))

    def _move(self, t: Tensor, groups: Tensor):
        """Goes to the steps that contain t ([groups]), which are never later ones than before."""
        step, now = self.step[groups], t * self.direction[groups]
        behind = now < (self.t[step, groups] * self.direction[groups])
        if not bool((behind | (step != self.known[groups])).any()):
            return
        while bool((behind := behind & (step > self.first)).any()):
            step = step - behind.long()
            behind = now < (self.t[step, groups] * self.direction[groups])
        stale = groups[step != self.known[groups]]
        self.step, self.known = (x.index_copy(0, groups, step) for x in (self.step, self.known))
        self._make(torch.arange(self.grid.batch, device=t.device) if self.problem.joint else stale)

    def _make(self, rows: Tensor):
        """Makes the steps of some samples again, and keeps their stages."""
        step = self.step.expand(self.grid.batch)
        for method, here, snapshot, at in self.dense.pieces(step, rows):
            fresh = snapshot.index_select(1, at)
            if len(here) == self.grid.batch:
                self.stages = {method: fresh}
                self.made_by.zero_()
                continue
            if method not in self.stages:
                self.stages[method] = fresh.new_zeros(len(fresh), self.grid.batch, fresh.shape[2])
            self.stages[method].index_copy_(1, here, fresh)
            self.made_by[here] = list(self.stages).index(method)
