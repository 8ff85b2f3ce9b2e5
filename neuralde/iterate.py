"""The loop of the iterations: as `discover`, for solvers without time, whose steps are neither rejected nor resized.

What is left of an attempt is a move, an evaluation of f and a look at the residual: one function of tensors, `Iterate`,
and one question to the device after it. `compiled.equilibrium` makes a program of that function.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from . import termination as _termination
from .errors import Status
from .grid import Grid, Record
from .held import Held
from .problem import Problem
from .solvers import Iteration, Work
from .solvers.iteration import Memory, Move, real, unreal
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
        move = self.move(f, z, slope, memory)
        slope = (f(move.z) if move.slope is None else move.slope).to(z.dtype)
        return Moved(move.z, slope, *self.look(move.z, slope, watched), move.memory, move.work)

    def move(self, f: Callable | None, z: Tensor, slope: Tensor, memory: Memory | None) -> Move:
        """The solver's move; of a complex state as well."""
        kind = z.dtype
        if not kind.is_complex:
            return self.solver.move(lambda x: f(x).to(kind), z, slope, memory)
        move = self.solver.move(lambda x: real(f(unreal(x, kind)).to(kind)), real(z), real(slope), memory)
        slope = None if move.slope is None else unreal(move.slope, kind)
        return Move(unreal(move.z, kind), move.memory, slope, move.work)

    def look(self, z: Tensor, slope: Tensor, watched: Watched) -> tuple[Tensor, Tensor, Tensor]:
        """The figure, ended and flags of `Moved`."""
        started = None if watched.first is None else (watched.first, watched.scale)
        size, figure, _ = _termination.measure(self.termination, self.joint, z, slope, started)
        # Written so that NaN has ended.
        ended = watched.live & ~((figure > self.termination.tolerance) & (size <= watched.limit))
        further = watched.live & (figure >= watched.least)
        return figure, ended, torch.stack([further, ended]).any(dim=1)


class Taken(NamedTuple):
    """A step as it is remembered.

    Attributes:
        number: which one. rows: of these samples, None for all. live: which of them took it, [groups]; None for all.
        z: where it began, None where that is not kept. residual: at its end, [groups].
    """

    number: int
    rows: Tensor | None
    live: Tensor | None
    z: Tensor | None
    residual: Tensor


def applies(problem: Problem) -> bool:
    """Whether the problem is one for `iterate`: without a horizon, and with nobody who looks on."""
    own = problem.solver.discrete and problem.rest is not None and problem.observer is None
    return own and bool(problem.end.isinf().all())


@torch.no_grad()
def iterate(problem: Problem, z0: Tensor, slope: Tensor, step: Callable | None = None) -> Iterated:
    """Solves from z0.

    Args:
        problem: one that `applies`.
        z0: [batch, features], in the working dtype. slope: f(z0) - z0.
        step: makes the steps after the first in place of `Iterate`: called as that, but with the field, and the time as
            it takes it, in place of f. The batch is not compacted then.
    """
    return _Iterating(problem, z0, slope, step).run()


class _Iterating:
    def __init__(self, problem: Problem, z0: Tensor, slope: Tensor, step: Callable | None):
        self.problem, self.z0, self.solver = problem, z0, problem.solver
        self.rest, self.joint = problem.rest, problem.joint
        self.termination = self.rest.termination
        self.iterate = Iterate(self.solver, self.termination, self.joint)
        self.step = step
        # Of the samples that are iterated.
        self.rows: Tensor | None = None
        self.field = problem.field
        self.z, self.slope, self.memory = z0, slope.to(z0.dtype), None
        self.attempts = self.since = 0
        self.recent = _termination.Recent(self.termination)
        self.taken: list[Taken] = []
        # Of all.
        codes = self.rest.begin(z0, self.slope)
        groups = problem.start.shape[0]
        self.final, self.status = z0, torch.zeros(groups, dtype=torch.int64, device=z0.device)
        self.accepted, self.attempted = torch.zeros_like(self.status), torch.zeros_like(self.status)
        self.work = self.status.new_zeros(2, groups)  # evaluations and linear solves of steps that differ in them
        self.everyone = True  # whether nobody has left yet
        self.left = groups
        started = self.rest.started or (None, None)
        live = torch.ones(groups, dtype=torch.bool, device=z0.device)
        self.watched = Watched(live, self.rest.least, self.rest.limit, *started)
        self.best = z0
        self._begin(codes)

    def _begin(self, codes: Tensor | None):
        """Lets those go that are at rest from the start, or where f is not finite."""
        lost = ~self.rest.first.isfinite()
        if codes is None:
            if not bool(lost.any()):
                return
            codes = torch.full_like(self.status, GOING)
        self._leave(torch.where(lost, int(Status.NON_FINITE), codes), self.z)

    def run(self) -> Iterated:
        while self.left and self.attempts < self.problem.max_steps:
            if self._worth_compacting():
                self._compact()
            self._attempt()
        if self.left:
            self._leave(torch.where(self.watched.live, int(Status.MAX_STEPS), GOING), self.z)
        return Iterated(self)

    def _attempt(self):
        start, t = self.z, self._time()
        if self.memory is not None:
            self.memory = self.solver.room(self.memory)
        if self.step is not None and self.memory is not None:
            moved = self.step(self.field, t, self.z, self.slope, self.memory, self.watched)
        else:
            moved = self.iterate(functools.partial(self.field, t), self.z, self.slope, self.memory, self.watched)
        self.z, self.slope, figure, ended, flags, self.memory, work = moved
        self.attempts += 1
        live = None if self.everyone else self.watched.live
        kept = start if self.problem.keep is None else None
        self.taken.append(Taken(self.attempts - 1, self.rows, live, kept, figure))
        if work is not None:
            self._count(work)
        stalled = None
        if self.termination.patience is not None:
            self.recent.append(figure)
            stalled = self._stalled()
        further, any_ended = flags.tolist()
        if not (further and self.termination.best) and not any_ended and stalled is None:
            self.best, self.watched = self.z, self.watched._replace(least=figure)
            return
        codes = self._judged(figure, ended, stalled)
        if codes is not None:
            self._leave(codes, start)

    def _time(self):
        """When f is evaluated at the step's end, as it takes it."""
        if not self.problem.field.takes_time:
            return None
        start = self.problem.start
        t = torch.full_like(start, (self.attempts + 1) * self.solver.step_size) + start
        return self.field.times(t if self.rows is None or self.joint else t.index_select(0, self.rows))[0]

    def _judged(self, figure: Tensor, ended: Tensor, stalled: Tensor | None) -> Tensor | None:
        """Keeps the best states, where not all of the last ones are; the codes of those that have ended, or None."""
        w = self.watched
        better = w.live & (figure < w.least if self.termination.best else figure.isfinite())
        which = better.nonzero().flatten()
        self.best = self._put(self.best, which, self.z)
        self.watched = w._replace(least=torch.where(better, figure, w.least))
        if stalled is not None:
            ended = ended | stalled
        if not bool(ended.any()):
            return None
        codes = torch.where(ended, int(Status.DIVERGED), GOING)
        codes = codes if stalled is None else torch.where(stalled, int(Status.NOT_CONVERGED), codes)
        codes = torch.where(ended & ~figure.isfinite(), int(Status.NON_FINITE), codes)
        return torch.where(ended & (figure <= self.termination.tolerance), int(Status.SUCCESS), codes)

    def _stalled(self) -> Tensor | None:
        """Who has, [groups], at the steps at which it is looked for; None at the others."""
        found = self.recent.stalled(self.attempts)
        return None if found is None else found & self.watched.live

    def _put(self, whole: Tensor, which: Tensor, part: Tensor, rows: Tensor | None = None) -> Tensor:
        """whole [samples, ...] with what part has of these groups. rows: where they are in whole, if elsewhere."""
        if self.joint:
            return part if len(which) else whole
        return whole.index_copy(0, which if rows is None else rows, part.index_select(0, which))

    def _leave(self, codes: Tensor, start: Tensor):
        """Lets groups go that have ended, wherever their code is one of `Status`. start: where their steps began."""
        rest, live = self.rest, self.watched.live
        which = (live & (codes != GOING)).nonzero().flatten()
        if not len(which):
            return
        rows = which if self.rows is None else self.rows.index_select(0, which)
        codes = codes.index_select(0, which)
        fine = codes != Status.NON_FINITE
        self.status = self.status.index_copy(0, rows, codes)
        self.attempted = self.attempted.index_fill(0, rows, self.attempts)
        # A step to where f is not finite is not accepted.
        steps = self.attempts - (~fine).long() if self.attempts else torch.zeros_like(codes)
        self.accepted = self.accepted.index_copy(0, rows, steps)
        self.final = self._put(self.final, which, self.best, rows)
        rest.residual = rest.residual.index_copy(0, rows, self.watched.least.index_select(0, which))
        settled = which[codes == Status.SUCCESS]
        if len(settled):
            rest.before = self._put(rest.before, settled, start, rows[codes == Status.SUCCESS])
        self.everyone = False
        self.left -= len(which)
        self.watched = self.watched._replace(live=live.index_fill(0, which, False))
        if self.left and len(settled) < len(which) and not self.joint:
            self._lend()

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
            and self.step is None
            and self.left <= _COMPACT_FRACTION * len(self.z)
            and self.attempts - self.since > _COMPACT_AFTER
            and self.problem.field.can_shrink()
        )

    def _compact(self):
        staying = self.watched.live.nonzero().flatten()
        self.rows = staying if self.rows is None else self.rows.index_select(0, staying)
        self.field = self.problem.field.on(self.rows)
        self.z, self.slope, self.best = (x.index_select(0, staying) for x in (self.z, self.slope, self.best))
        self.memory = self.memory and self.memory.on(staying)
        self.watched = self.watched.on(staying)
        self.recent = self.recent.on(staying)
        self.since = self.attempts


class Iterated(Trajectory):
    """A trajectory that `iterate` found. Its records are put together when they are asked for."""

    def __init__(self, run: _Iterating):
        problem = self.problem = run.problem
        self.status, self.final, self._z0, self._taken = run.status, run.final, run.z0, run.taken
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
            live = step.residual.isfinite() if step.live is None else step.live & step.residual.isfinite()
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
