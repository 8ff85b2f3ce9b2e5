"""States between those that a solve kept, made again without gradients, with few of them in memory at a time."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .field import full_precision
from .grid import Grid
from .problem import Problem
from .replay import make_step, past_at

if TYPE_CHECKING:
    from .adjoints.base import Outcome

# The states at the starts of each sample's step and of the steps before it that a multistep method builds on, the last
# one first, [batch, features] each.
Window = tuple[Tensor, ...]


@torch.no_grad()
def advance(problem: Problem, grid: Grid, step: Tensor, rows: Tensor, window: Window) -> Window:
    """Moves samples on by a step of each one's own.

    Args:
        step, rows: as `Grid.places` has them.
        window: at the starts of these steps; the samples that are not in `rows` stay as they are.
    """
    methods, made = problem.solver.parts, window[0]
    parts = grid.part_of(step, rows) if len(methods) > 1 else torch.zeros_like(step)
    with full_precision(made.device):
        for part, method in enumerate(methods):
            where = (parts == part).nonzero().flatten() if len(methods) > 1 else None
            if where is not None and not len(where):
                continue
            own, mine = (step, rows) if where is None else (step[where], rows[where])
            past = past_at(problem, grid, own, mine, [_of(z, mine) for z in window[1 : 1 + method.history]])
            result, _ = make_step(problem, grid.places(own, mine), part, _of(window[0], mine), lens=False, past=past)
            made = _moved(made, mine, result.z)
    return made, *(_moved(old, rows, _of(new, rows)) for new, old in itertools.pairwise(window))


def _of(z: Tensor, rows: Tensor) -> Tensor:
    return z if len(rows) == len(z) else z.index_select(0, rows)


def _moved(z: Tensor, rows: Tensor, new: Tensor) -> Tensor:
    return new if len(rows) == len(z) else z.index_copy(0, rows, new)


class Cursor:
    """The states of a solve that did not keep them: (step, rows), both [samples] -> [samples, features].

    It stands at a step of each sample, and goes on from there by replays. Where it is asked for a step before its
    window, or for one behind a state that the solve kept, it goes on from that one. No gradients, and O(1) states.

    Args:
        problem, grid: of the solve.
        z0: its start, [batch, features].
    """

    def __init__(self, problem: Problem, grid: Grid, z0: Tensor):
        self.problem, self.grid, self.z0 = problem, grid, z0.detach()
        self.window: Window = (self.z0,) * (1 + problem.solver.history)
        self.step = torch.zeros_like(grid.counts)
        self._starts = torch.tensor([0, *grid.held.starts], device=self.step.device)

    @torch.no_grad()
    def __call__(self, step: Tensor, rows: Tensor) -> Tensor:
        """The states at the starts of steps of samples."""
        if not self.problem.joint:
            return self._seek(step, rows)
        everyone = torch.arange(self.grid.batch, device=rows.device)
        found = _of(self.z0, rows)
        for j in step.unique():  # the batch steps as one
            found = torch.where((step == j)[:, None], _of(self._seek(j.expand(len(everyone)), everyone), rows), found)
        return found

    def _seek(self, step: Tensor, rows: Tensor) -> Tensor:
        start = self._starts[torch.searchsorted(self._starts, step.contiguous(), right=True) - 1]
        here = self.step[rows]
        elsewhere = (here >= step + len(self.window)) | (here < start)
        for j in start[elsewhere].unique().tolist():
            self._load(j, rows[elsewhere & (start == j)])
        while len(behind := (self.step[rows] < step).nonzero().flatten()):
            mine = rows[behind]
            here = self.step[mine]
            self.window = advance(self.problem, self.grid, here, mine, self.window)
            self.step = self.step.index_copy(0, mine, here + 1)
        found, past = _of(self.window[0], rows), self.step[rows] - step
        for back, z in enumerate(self.window[1:], start=1):
            found = torch.where((past == back)[:, None], _of(z, rows), found)
        return found

    def _load(self, j: int, rows: Tensor):
        stored = window_at(self.grid, self.z0, j, len(self.window))
        self.window = tuple(_moved(z, rows, _of(x, rows)) for z, x in zip(self.window, stored, strict=True))
        self.step = self.step.index_fill(0, rows, j)


def window_at(grid: Grid, z0: Tensor, j: int, size: int) -> Window:
    """The states that the solve kept at the start of step j and before."""
    # Before step 0 there is nothing; no step builds on it.
    return tuple(z0 if j <= back else grid.held.z[j - back] for back in range(size))


def states_at(problem: Problem, grid: Grid, z0: Tensor, step: Tensor, rows: Tensor | None = None) -> Tensor:
    """The state at the start of every sample's own step, without gradients.

    Args:
        problem, grid: of the solve.
        z0: its start, [batch, features].
        step: indices, [batch], or [samples] with rows.
        rows: the samples that are wanted, ascending; None for all.

    Returns:
        [batch, features], or [samples, features].
    """
    rows = torch.arange(grid.batch, device=step.device) if rows is None else rows
    if grid.held is None:
        return grid.states(step, rows).detach()
    return Cursor(problem, grid, z0)(step, rows)


def lookup(problem: Problem, outcome: Outcome, z0: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
    """The states of a solve as `Dense` asks for them: kept, or made again."""
    grid = outcome.trajectory.grid
    if outcome.states is None:
        return Cursor(problem, grid, z0)
    if torch.is_grad_enabled() and outcome.differentiable_states:
        return functools.partial(grid.pick, outcome.states())
    return grid.states


def every_state(problem: Problem, outcome: Outcome, z0: Tensor) -> Tensor:
    """The states at all starts of steps, [all accepted, features] in the grid's order."""
    if outcome.states is not None:
        return outcome.states()
    grid = outcome.trajectory.grid
    cursor = Cursor(problem, grid, z0)
    return torch.cat([z0[:0], *(cursor(*grid.whole_step(j)) for j in range(len(grid)))])
