"""The loop of the iterations: as `discover`, for solvers without time, whose steps are neither rejected nor resized.

What is left of an attempt is a move, an evaluation of f and a look at the residual: one function of tensors, `Iterate`,
and one question to the device after it. `compiled.equilibrium` makes programs of that function and the loop around it,
which make a `Stretch` of steps at a time.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from . import termination as _termination
from .discover import discover
from .errors import Status
from .grid import Grid, Record
from .held import Held
from .problem import Problem
from .solvers import Iteration, Work
from .solvers.iteration import Memory
from .termination import GOING, Termination
from .trajectory import Counts, Trajectory

# As in `discover`; a step of an iteration is one evaluation of f, and finding out whether the batch can be made smaller
# takes a few.
_COMPACT_FRACTION, _COMPACT_AFTER = 0.5, 32


class Watched(NamedTuple):
    """What residuals are compared with, of every group.

    Attributes:
        live: whether it still goes on. least: its least residual. limit: of ‖f(z) - z‖, above which it has diverged.
        first, scale: ‖f(z) - z‖ and the larger of it and ‖f(z)‖ at the start; None for the mode "absolute".
    """

    live: Tensor
    least: Tensor
    limit: Tensor
    first: Tensor | None
    scale: Tensor | None

    def better(self, figure: Tensor, t: Termination) -> Tensor:
        """Whose states are the ones to keep, [groups], at these residuals."""
        return self.live & (figure < self.least if t.best else figure.isfinite())

    def after(self, moved: Moved, t: Termination) -> Watched:
        """The same after a step."""
        least = torch.where(self.better(moved.figure, t), moved.figure, self.least)
        return self._replace(live=self.live & ~moved.ended, least=least)

    def on(self, index: Tensor) -> Watched:
        """The same for some of the groups."""
        return Watched(*(None if x is None else x.index_select(0, index) for x in self))


class Moved(NamedTuple):
    """One step of every sample.

    Attributes:
        z, slope: where they stand then, and f(z) - z there, [samples, features].
        figure: the residuals of the termination's mode, [groups].
        ended: who is at rest or lost, [groups].
        flags: whether there is one who goes on but is not nearer than it was, and one who has ended, [2].
        memory: of the solver. work: what the step cost, where that is not one evaluation.
    """

    z: Tensor
    slope: Tensor
    figure: Tensor
    ended: Tensor
    flags: Tensor
    memory: Memory | None
    work: Work | None


@dataclass(frozen=True)
class Iterate:
    """One step of an iteration, and the look at where it led."""

    solver: Iteration
    termination: Termination
    joint: bool

    def __call__(self, f: Callable, z: Tensor, slope: Tensor, memory: Memory | None, watched: Watched) -> Moved:
        """The step.

        Args:
            f: z -> f(z) - z, [samples, features]. z, slope: the state and f(z) - z there.
            memory: of the step before. watched: see there.
        """
        move = self.solver.moved(f, z, slope, memory, self.joint)
        slope = (f(move.z) if move.slope is None else move.slope).to(z.dtype)
        return Moved(move.z, slope, *self.look(move.z, slope, watched), move.memory, move.work)

    def look(self, z: Tensor, slope: Tensor, watched: Watched) -> tuple[Tensor, Tensor, Tensor]:
        """The figure, ended and flags of `Moved`."""
        started = None if watched.first is None else (watched.first, watched.scale)
        size, figure, _ = _termination.measure(self.termination, self.joint, z, slope, started)
        # Written so that NaN has ended.
        ended = watched.live & ~((figure > self.termination.tolerance) & (size <= watched.limit))
        further = watched.live & (figure >= watched.least)
        return figure, ended, torch.stack([further, ended]).any(dim=1)


class Stretch(NamedTuple):
    """Steps of every sample: so many as were asked for, or until all have ended, or one was lost.

    Attributes:
        made: how many. z, slope, memory: after the last one. watched, ends: then.
        figures: the residuals, [at least made, groups]. starts: where the steps began, [at least made, samples,
            features], or None.
    """

    made: int
    z: Tensor
    slope: Tensor
    memory: Memory
    watched: Watched
    ends: Ends
    figures: Tensor
    starts: Tensor | None


class Opening(NamedTuple):
    """The first steps of every sample, and what was before them.

    Attributes:
        outset: see `termination.outset`. stretch: the steps. rested: whether all samples have come to rest.
    """

    outset: tuple[Tensor, Tensor, Tensor | None, Tensor]
    stretch: Stretch
    rested: bool


class Ends(NamedTuple):
    """What is known of those that have ended, and the best states of all.

    Attributes:
        at: after how many steps they have, [groups]. last: their residual then.
        best: the states of the least residuals. before: where the step began that brought a sample to rest, [samples,
            features] each.
    """

    at: Tensor
    last: Tensor
    best: Tensor
    before: Tensor

    def after(self, w: Watched, moved: Moved, start: Tensor, attempts: int | Tensor, t: Termination) -> Ends:
        """The same after a step.

        Args:
            w: before it. start: where it began. attempts: how many there were with it. t: the termination.
        """
        settled = moved.ended & (moved.figure <= t.tolerance)
        return Ends(
            torch.where(moved.ended, attempts, self.at),
            torch.where(w.live, moved.figure, self.last),
            torch.where(w.better(moved.figure, t)[:, None], moved.z, self.best),
            torch.where(settled[:, None], start, self.before),
        )

    def on(self, index: Tensor) -> Ends:
        """The same for some of the groups."""
        return Ends(*(x.index_select(0, index) for x in self))


class Programs(Protocol):
    """What makes several steps at once."""

    def opening(self, z0: Tensor, most: int) -> Opening:
        """The first ones from z0, [batch, features], but for a few at most."""

    def __call__(
        self, z: Tensor, slope: Tensor, memory: Memory, watched: Watched, ends: Ends, before: int, most: int
    ) -> Stretch:
        """Further ones: before, how many were made; most, how many may be."""


class Taken(NamedTuple):
    """A step as it is remembered.

    Attributes:
        number: which one. rows: of these samples, None for all. z: where it began, None where that is not kept.
        residual: at its end, [groups].
    """

    number: int
    rows: Tensor | None
    z: Tensor | None
    residual: Tensor


def setting_out(figure: Tensor, t: Termination) -> Tensor:
    """Who goes on from the start, [groups], where the residuals are these."""
    return figure.isfinite() & ~(figure <= t.tolerance)


def applies(problem: Problem) -> bool:
    """Whether the problem is one for `iterate`: without a horizon, and with nobody who looks on."""
    own = problem.solver.discrete and problem.rest is not None and problem.observer is None
    return own and bool(problem.end.isinf().all())


def followed(problem: Problem, z0: Tensor) -> Trajectory:
    """Solves by the loop for the problem: this one where it `applies`, or `discover`'s. Arguments as `iterate`'s."""
    slope = problem.field.first(problem.first_instant, z0, problem.elsewhere)
    return iterate(problem, z0, slope) if applies(problem) else discover(problem, z0, slope)


@torch.no_grad()
def iterate(problem: Problem, z0: Tensor, slope: Tensor | None, steps: Programs | None = None) -> Iterated:
    """Solves from z0.

    Args:
        problem: one that `applies`.
        z0: [batch, features], in the working dtype. slope: f(z0) - z0, or None with steps.
        steps: finds the slope, and makes the steps in place of `Iterate`. The batch is not compacted then.
    """
    return _Iterating(problem, z0, slope, steps).run()


class _Iterating:
    def __init__(self, problem: Problem, z0: Tensor, slope: Tensor | None, steps: Programs | None):
        self.problem, self.z0, self.solver = problem, z0, problem.solver
        self.rest, self.joint = problem.rest, problem.joint
        self.termination = self.rest.termination
        self.iterate = Iterate(self.solver, self.termination, self.joint)
        self.steps = steps
        # Of the samples that are iterated.
        self.rows: Tensor | None = None
        self.field = problem.field
        self.attempts = self.since = 0
        self.recent = _termination.Recent(self.termination)
        self.taken: list[Taken] = []
        if slope is not None:
            self.z, self.slope, self.memory = z0, slope.to(z0.dtype), None
            self.rest.begin(z0, self.slope)
        else:
            opening = steps.opening(z0, self._most())
            self.rest.begun(z0, *opening.outset)
        # Of all; groups are put down here when there is no way around it, or at the end.
        groups = problem.start.shape[0]
        self.final, self.status = z0, torch.zeros(groups, dtype=torch.int64, device=z0.device)
        self.accepted, self.attempted = torch.zeros_like(self.status), torch.zeros_like(self.status)
        self.work = self.status.new_zeros(2, groups)  # evaluations and linear solves of steps that differ in them
        # Of those that are iterated: who has ended is not alive any more, and open until it was put down.
        started = self.rest.started or (None, None)
        self.open: Tensor | None = torch.ones(groups, dtype=torch.bool, device=z0.device)  # None: nobody is
        self.watched = Watched(self.open, self.rest.least, self.rest.limit, *started)
        self.ends = Ends(torch.zeros_like(self.status), self.rest.first, z0, z0)
        self.left, self.untouched = groups, True  # whether nobody has been put down yet
        if slope is not None:
            self._begin()
        else:
            self.field.calls += 1
            self._take(opening.stretch)
            if opening.rested:
                self._settle()
            else:
                self._look()

    def _begin(self):
        """Ends those that are at rest from the start, or where f is not finite."""
        live = setting_out(self.rest.first, self.termination)
        if not bool(live.all()):
            self._end(self.watched._replace(live=live), None)

    def run(self) -> Iterated:
        while self.left and self.attempts < self.problem.max_steps:
            if self._worth_compacting():
                self._compact()
            if self.steps is None:
                self._attempt()
            else:
                self._several()
        spent = self.watched.live if self.left else None
        if spent is not None:
            self._end_now(spent)
        if self.open is not None:
            self._put_down(spent, Status.MAX_STEPS)
        return Iterated(self)

    def _attempt(self):
        start, t = self.z, self._time()
        if self.memory is not None:
            self.memory = self.solver.room(self.memory)
        moved = self.iterate(functools.partial(self.field, t), self.z, self.slope, self.memory, self.watched)
        self.z, self.slope, self.memory = moved.z, moved.slope, moved.memory
        self.attempts += 1
        self._remember(self.attempts - 1, start, moved.figure)
        if moved.work is not None:
            self._count(moved.work)
        stalled = self._stalled()
        further, any_ended = moved.flags.tolist()
        whole = self.left == len(self.open)
        if whole and not any_ended and stalled is None and not (further and self.termination.best):
            # All states are the best ones: most steps are like this.
            self.watched, self.ends = self.watched._replace(least=moved.figure), self.ends._replace(best=self.z)
            return
        self.ends = self.ends.after(self.watched, moved, start, self.attempts, self.termination)
        watched = self.watched.after(moved, self.termination)
        if any_ended or stalled is not None:
            self._end(watched, stalled)
        else:
            self.watched = watched

    def _several(self):
        """Steps that are made without a look from here: the next one is where a stall is looked for."""
        self.memory = self.solver.room(self.memory)
        lasts, most = self.solver.lasts(self.memory), self._most()
        most = most if lasts is None else min(most, lasts)
        self._take(self.steps(self.z, self.slope, self.memory, self.watched, self.ends, self.attempts, most))
        self._look()

    def _most(self) -> int:
        """How many steps may be made without a look from here."""
        most, unwatched = self.problem.max_steps - self.attempts, self.termination.unwatched(self.attempts)
        return most if unwatched is None else min(most, unwatched)

    def _take(self, found: Stretch):
        before = self.attempts
        self.z, self.slope, self.memory, self.ends = found.z, found.slope, found.memory, found.ends
        self.attempts += found.made
        self.field.calls += found.made
        for k in range(found.made):
            self._remember(before + k, None if found.starts is None else found.starts[k], found.figures[k])
        self.watched = found.watched

    def _look(self):
        self._end(self.watched, self._stalled())

    def _settle(self):
        """Puts down that everybody has come to rest."""
        self.left, self.open, ends = 0, None, self.ends
        self.attempted = self.accepted = ends.at
        self.final, self.rest.before, self.rest.residual = ends.best, ends.before, self.watched.least

    def _remember(self, number: int, start: Tensor | None, figure: Tensor):
        self.taken.append(Taken(number, self.rows, start if self.problem.keep is None else None, figure))
        if self.termination.patience is not None:
            self.recent.append(figure)

    def _time(self):
        """When f is evaluated at the step's end, as it takes it."""
        if not self.problem.field.takes_time:
            return None
        start = self.problem.start
        t = torch.full_like(start, (self.attempts + 1) * self.solver.step_size) + start
        return self.field.times(t if self.rows is None or self.joint else t.index_select(0, self.rows))[0]

    def _stalled(self) -> Tensor | None:
        """Who has, [groups], at the steps at which it is looked for; None at the others."""
        return self.recent.stalled(self.attempts)

    def _end(self, watched: Watched, stalled: Tensor | None):
        """Takes in who still goes on, and puts down who was lost or has stalled, [groups]."""
        self.watched = watched
        stalled = None if stalled is None else stalled & watched.live
        if stalled is not None:
            self._end_now(stalled)
        lost = self.open & ~self.watched.live & ~(self.ends.last <= self.termination.tolerance)
        # One look at the device for both.
        self.left, lost = torch.stack([self.watched.live.sum(), lost.sum()]).tolist()
        if lost:
            self._put_down(stalled, Status.NOT_CONVERGED)
            if self.left and not self.joint:
                self._lend()

    def _end_now(self, which: Tensor):
        """Ends those groups that go on and could, [groups]."""
        self.ends = self.ends._replace(at=torch.where(which, self.attempts, self.ends.at))
        self.watched = self.watched._replace(live=self.watched.live & ~which)

    def _put_down(self, some: Tensor | None = None, status: Status | None = None):
        """Puts down how the groups have ended that were not put down yet: `some` of them with this status."""
        ended, rest = self.open & ~self.watched.live, self.rest
        codes = torch.where(ended, int(Status.DIVERGED), GOING)
        codes = codes if some is None else torch.where(some, int(status), codes)
        codes = torch.where(ended & ~self.ends.last.isfinite(), int(Status.NON_FINITE), codes)
        codes = torch.where(ended & (self.ends.last <= self.termination.tolerance), int(Status.SUCCESS), codes)
        # A step to where f is not finite is not accepted.
        accepted = (self.ends.at - (codes == Status.NON_FINITE).long()).clamp(min=0)
        found = codes, self.ends.at, accepted, self.watched.least
        if self.untouched and self.rows is None and not bool(self.watched.live.any()):
            self.status, self.attempted, self.accepted, rest.residual = found
            self.final, rest.before = self.ends.best, self.ends.before
        else:
            which = ended.nonzero().flatten()
            rows = which if self.rows is None else self.rows.index_select(0, which)
            whole = (self.status, self.attempted, self.accepted, rest.residual, self.final, rest.before)
            found = (*found, self.ends.best, self.ends.before)
            put = (x.index_copy(0, rows, y.index_select(0, which)) for x, y in zip(whole, found, strict=True))
            self.status, self.attempted, self.accepted, rest.residual, self.final, rest.before = put
        self.open, self.untouched = self.open & ~ended, False

    def _lend(self):
        """Those that have ended go on as the first one that has not: a state to which f is not made is not seen."""
        live = self.watched.live
        source = live.nonzero().flatten()[:1].expand(len(live))
        own = torch.arange(len(live), device=live.device)
        index = torch.where(live, own, source)
        self.z, self.slope = self.z.index_select(0, index), self.slope.index_select(0, index)
        self.memory = self.memory and self.memory.on(index)

    def _count(self, work: Work):
        live = self.watched.live
        work = work.of_groups(len(live))
        each = (torch.as_tensor(x, device=live.device) for x in (work.nfe, work.linear_solves))
        more = torch.stack([(x * live).expand(len(live)) for x in each])
        self.work = self.work + more if self.rows is None else self.work.index_add(1, self.rows, more)

    # -- the batch ---------------------------------------------------------------------------------------------------

    def _worth_compacting(self) -> bool:
        return (
            not self.joint
            and self.steps is None
            and self.left <= _COMPACT_FRACTION * len(self.z)
            and self.attempts - self.since > _COMPACT_AFTER
            and self.problem.field.can_shrink()
        )

    def _compact(self):
        self._put_down()
        staying = self.watched.live.nonzero().flatten()
        self.rows = staying if self.rows is None else self.rows.index_select(0, staying)
        self.field = self.problem.field.on(self.rows)
        self.z, self.slope, self.open = (x.index_select(0, staying) for x in (self.z, self.slope, self.open))
        self.memory = self.memory and self.memory.on(staying)
        self.watched, self.ends = self.watched.on(staying), self.ends.on(staying)
        self.recent = self.recent.on(staying)
        self.since = self.attempts


class Iterated(Trajectory):
    """A trajectory that `iterate` found. Its records are put together when they are asked for."""

    def __init__(self, run: _Iterating):
        problem = self.problem = run.problem
        self.status, self._z0, self._taken = run.status, run.z0, run.taken
        self.final = run.final
        self.interior = self.hits = self.slope = None
        self.complete = run.rest.conclude(run.status)
        self._accepted, self._attempted, self._work = run.accepted, run.attempted, run.work
        self._held = None if problem.keep is None else Held(problem.keep, 0, len(run.z0))

    @functools.cached_property
    def reached(self) -> Tensor:  # noqa: D102
        return self.problem.start + self._accepted * self.problem.solver.step_size

    @functools.cached_property
    def records(self) -> list[Record]:  # noqa: D102
        start, dt, found = self.problem.start, self.problem.solver.step_size, []
        for step in self._taken:
            t = start if step.rows is None else start.index_select(0, step.rows)
            t, end = t + step.number * dt, t + (step.number + 1) * dt
            end = end.item() if self.problem.joint else end
            # The residual of a step to where f is not finite says that it was not accepted.
            made = self._attempted if step.rows is None else self._attempted.index_select(0, step.rows)
            live = (made > step.number) & step.residual.isfinite()
            if self.problem.joint and not bool(live):
                continue
            accepted = None if step.rows is None and bool(live.all()) else live
            size = torch.full_like(t, dt)
            found.append(Record(0, step.rows, accepted, t, size, end, step.z, None, None, residual=step.residual))
        return found

    @functools.cached_property
    def grid(self) -> Grid:
        """The accepted steps."""
        return Grid(self.records, len(self._z0), self.problem.joint, self._z0, self.problem.start, self._held)

    @functools.cached_property
    def counts(self) -> Counts:  # noqa: D102
        calls, linear = self._work
        nfe = 1 + (calls if self.problem.solver.calls_per_step is None else self._attempted)
        none = torch.zeros_like(nfe)
        every = (self._accepted, self._attempted - self._accepted, nfe, none, none, linear)
        return Counts(*(x.expand(len(self._z0)) for x in every))
