"""Solves that go in steps: their loop and its backward pass as compiled programs.

Attempts, the error test and the choice of the next step are one program: a `while_loop` that writes down what it does,
so that Python is asked again only when its log is full. The gradient is that of "checkpointed": a second program goes
through the log, from the last attempt to the first, with the vector-Jacobian product of one step. Inductor compiles
both, with its C++ wrapper.

What may change between solves enters as tensors: states, times, tolerances, parameters, args. What can't be compiled is
solved as ever, with one warning that says why. So is a solve that fails: the loop in Python says what went wrong.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from .. import algebra
from .. import control as _control
from ..control import Norm
from ..discover import LEAST, resolution
from ..problem import Problem
from ..solvers import Solver, Step
from .active import Active
from .engine import Engine, VectorField
from .programs import Lent, Unsupported, constant, first_line, lend, may_overwrite, overwriting_loop, program
from .records import Log, Page, Ran, Stand

_M = algebra.TENSORS
_LONGEST = 64  # attempts in a log
# Bytes of a log: where the loop may write to it, and where it copies it at every attempt.
_WRITTEN, _COPIED = 1 << 27, 1 << 19


def closes(problem: Problem) -> bool:
    """Whether the stages are wanted, for what is between the steps."""
    return problem.interior is not None or problem.keep_stages


class SteppingEngine(Engine):
    """The programs of a solve that goes in steps.

    Args:
        problem, tree: as `Engine`'s.
        solver: the method as programs have it. sloped: whether a step is given its first slope by the one before.
        rows: of the snapshot of a closed step.
    """

    _settles = False  # whether it looks for steady states
    _shrinks = False  # whether samples that have ended are left out
    _fixed = False  # whether nothing of the engine ever changes that its programs have seen

    def __init__(self, problem: Problem, tree: pytree.TreeSpec, solver: Solver, sloped: bool, rows: int):
        super().__init__(problem, tree)
        self._solver, self._sloped = solver, sloped
        self._control, self._joint, self._keeps = problem.control, problem.joint, problem.keep is None
        self._closed = closes(problem)
        self._stages = rows if self._closed else 0  # rows of a snapshot in the log
        self._begin, self._continue = (program(x, fixed=self._fixed) for x in (self._beginning, self._loop))
        self._back: dict[tuple, Callable] = {}

    @staticmethod
    def refusals(problem: Problem) -> list[tuple[bool, str]]:
        """See `Engine.refusals`."""
        return [
            (problem.watch is not None, "it has events"),
            (problem.keep is not None and problem.rest is None, "the adjoint has checkpoints=k"),
        ]

    @staticmethod
    def kinds(problem: Problem) -> tuple:
        """See `Engine.kinds`."""
        return problem.solver, problem.dt0 is None, closes(problem)

    # -- what kinds of steps differ in ---------------------------------------------------------------------------------

    def _given(self, problem: Problem) -> list[Tensor]:
        """What the steps need of a problem beside its horizon, its tolerances and its args."""
        return []

    def _extra(self, problem: Problem) -> int:
        """Evaluations of f beside those of the attempts."""
        return (problem.dt0 is None) + (problem.dt0 is None or self._sloped)

    def _next(self, at: Stand, s0: Tensor, s1: Tensor, given: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Traced: the next steps' sizes, their ends, and which of them reach the end of the horizon, [groups] each.

        Args:
            s0, s1: where the horizon begins and ends, [groups]; times run forward. given: of `_given`.
        """
        adaptive, left = self._control.adaptive, s1 - at.s
        # As in `discover`: steps that are chosen share what is left with the last one, fixed ones are counted.
        last = (at.h if adaptive else at.h * 1.001) >= left
        h = torch.where(last, left, torch.minimum(at.h, 0.5 * left) if adaptive else at.h)
        return h, torch.where(last, s1, at.s + h if adaptive else s0 + (at.accepted + 1) * at.h), last

    def _slope_of(self, f, leaves) -> VectorField:
        """Traced: dz/dt."""
        return self._of(f, leaves)

    def _bounded(self, h: Tensor, given: Sequence[Tensor]) -> Tensor:
        """Traced: a planned size, [groups], within the bounds that there are."""
        return h

    def _resumed(self, planned: Tensor, before: Tensor, h: Tensor, ok: Tensor) -> Tensor:
        """Traced: the size that is planned after a step of size h was made where `before` was planned, [groups]."""
        return planned

    def _stuck(self, ok: Tensor, h: Tensor, given: Sequence[Tensor]) -> Tensor:
        """Traced: which attempts of size h, accepted where ok, could not have been smaller, [groups]."""
        return torch.zeros_like(ok)

    def _driving(self, given: Sequence[Tensor], t: Tensor, t_end: Tensor) -> Tensor | None:
        """Traced: what drives a step from t to t_end, [groups] each, beside the vector field: [numbers, batch, ...]."""
        return None

    def _started(self, stand: Stand) -> tuple[Stand, tuple[Tensor, ...], tuple[Tensor, ...]]:
        """Traced: where the solve stands at its start, what else is carried on from attempt to attempt, and what
        never changes.
        """
        return stand, (), ()

    def _least(self, s: Tensor, s0: Tensor, s1: Tensor) -> Tensor:
        """Traced: steps that are not larger are none, [groups]. s: where they start."""
        return torch.maximum(s.abs() * resolution(s), (s1 - s0) * LEAST)

    def _looked(
        self, at: Stand, step: Step, ok: Tensor, arrived: Tensor, own: tuple[Tensor, ...], fixed: tuple[Tensor, ...]
    ) -> tuple[Tensor, Tensor, Tensor | None, tuple[Tensor, ...]]:
        """Traced: a look at the end of a step.

        Args:
            at: where it started. ok, arrived: who took it, and who is at the end of the horizon with it, [groups].
            own, fixed: of `_started`.

        Returns:
            Who is at an end; who is lost; the residuals, or None; own.
        """
        return arrived, torch.zeros_like(ok), None, own

    def _undriven(self, rows: int, given: Sequence[Tensor]) -> Tensor | None:
        """Room for so many of `_driving`."""
        return None

    def _attempt(
        self, vector_field: VectorField, driving: Tensor | None, t: Tensor, dt: Tensor, z: Tensor, slope: Tensor | None,
        lens: bool = True, close: bool = False,
    ) -> Step:  # fmt: skip
        """Traced: see `Solver.attempt`; driving: of `_driving`."""
        memory = self._solver.memory(z, True)
        return self._solver.attempt(vector_field, t, dt, z, slope, memory, lens=lens, close=close)

    # -- forwards ------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def _discover(self, problem: Problem, z0: Tensor) -> Ran | None:
        field, budget = problem.field, problem.max_steps
        if not self._checked:
            field.first(problem.start, z0, problem.elsewhere)
            if field.random:
                raise Unsupported("f draws random numbers")
            self._checked = True
        elif self._shrinks:
            field.fill(problem.start, z0, problem.elsewhere)
        active, tolerances, given = Active(problem), self._tolerances(problem, z0), self._given(problem)
        driving = self._undriven(1, given)
        row = (1 + self._stages) * z0.numel() + (0 if driving is None else driving.numel())
        most = max(2, min(_LONGEST, (_WRITTEN if may_overwrite() else _COPIED) // (row * z0.element_size())))
        limit = constant("limit", min(most, budget))
        h = None if problem.dt0 is None else torch.full_like(problem.start, problem.dt0)
        f, room = field.given, problem.start.new_empty(most, len(problem.start))
        said, stand, log, own, fixed = self._begin(
            f, active.leaves, given, z0, active.start, active.end, tolerances, h, limit, room
        )
        pages, attempts, whole = [], 0, stand
        while True:
            made, filled, going, failed = said.tolist()
            pages.append(Page(filled, Log(*log), active.rows))
            attempts, budget = attempts + made, budget - made
            if failed or (going and not budget):
                return None
            if not going:
                break
            if self._shrinks and not self._joint and active.worth_shrinking(going):
                whole, here = active.put_all(stand, whole), active.fewer(Stand(*stand).live, going)
                active, stand = active.on(here), [x.index_select(0, here) for x in stand]
                room = room.new_empty(most, len(here))
            limit = constant("limit", min(most, budget))
            said, stand, log, own, fixed = self._continue(
                f, active.leaves, given, active.start, active.end, tolerances, limit, room, fixed, *stand, *own
            )
        extra = self._extra(problem)
        field.calls += attempts * self._solver.calls_per_step + extra
        return self._ran(problem, z0, Stand(*active.put_all(stand, whole)), pages, extra, own, fixed)

    def _ran(self, problem: Problem, z0: Tensor, stand: Stand, pages: list[Page], extra: int, own, fixed) -> Ran | None:
        """What was found; None where it has to be found as ever. own, fixed: of `_started`."""
        return Ran(problem, z0, stand, pages, extra)

    def _empty(self, room: Tensor, z: Tensor, given: Sequence[Tensor]) -> Log:
        """Traced: a log without attempts. room: as long as it is to be, [attempts, groups]."""
        (most, groups), solver = room.shape, self._solver
        figures = max(1, (solver.error_order is not None) + 2 * solver.reports_stiffness)
        s, h, end = (room.new_empty(most, groups) for _ in range(3))
        ok, figures = room.new_empty(most, groups, dtype=torch.bool), room.new_empty(most, figures, groups)
        stages = z.new_empty(most, self._stages, *z.shape) if self._closed else None
        residual = room.new_empty(most, groups) if self._settles else None
        kept = z.new_empty(most, *z.shape) if self._keeps else None
        return Log(s, h, end, ok, figures, kept, self._undriven(most, given), residual, stages)

    def _beginning(self, f, leaves, given, z0, t, t1, tolerances, h, limit, room):
        """Traced: the slope at the start, the first step size, and the first attempts."""
        vector_field, norm = self._slope_of(f, leaves), Norm(*tolerances, self._joint)
        slope = vector_field(vector_field.times(t)[0], z0) if self._sloped or h is None else torch.zeros_like(z0)
        if h is None:
            h = _control.initial_step(vector_field, t, z0, slope, t1 - t, self._solver.order, norm, _M)
        h = self._bounded(h, given)
        s, live = t * _direction(t, t1), torch.ones_like(t, dtype=torch.bool)
        none, memory = torch.zeros_like(t, dtype=torch.int64), self._control.first_memory(t, _M)
        stand = Stand(s, h, z0, slope, memory, live, ~live, none, none)
        stand, own, fixed = self._started(stand)
        carried = (x.clone() for x in (*stand, *own))
        return self._loop(f, leaves, given, t, t1, tolerances, limit, room, fixed, *carried)

    def _loop(self, f, leaves, given, t, t1, tolerances, limit, room, fixed, *carried):
        """Traced: attempts until all samples are at their ends, or as many as the log holds.

        Returns:
            How many attempts were made, rows of the log filled and samples (or groups) not at their ends, and whether
            one failed; the `Stand`; the `Log`; and the latter two of `_started`.
        """
        vector_field, norm = self._slope_of(f, leaves), Norm(*tolerances, self._joint)
        solver, control = self._solver, self._control
        exponents = control.exponents(solver.order, solver.exponents) if control.adaptive else None
        direction = _direction(t, t1)
        s0, s1 = t * direction, t1 * direction

        def more(made, row, *carried):
            return (made < limit) & Stand(*carried[:9]).live.any()

        def attempt(log, made, row, *carried):
            at, own = Stand(*carried[:9]), carried[9:]
            h, end, last = self._next(at, s0, s1, given)
            t, slope = at.s * direction, at.slope if self._sloped else None
            driving = self._driving(given, t, end * direction)
            step = self._attempt(vector_field, driving, t, h * direction, at.z, slope, close=self._closed)
            figures = self._figures(norm, step, at.z)
            if control.adaptive:
                ratio = _M.known(figures[0])
                ok = at.live & (ratio <= 1.0)
                factor = control.factor(ratio, at.previous, ok, exponents, _M)
                factor = control.leap(factor, ratio, ok & (at.accepted == 0), solver.error_order, _M)
                planned = self._bounded(h * factor, given)
                planned = self._resumed(planned, at.h, h, ok)
                previous = control.remember(ratio, at.previous, ok, _M)
            else:
                ok = at.live & (step.z.sum()[None] if self._joint else step.z.sum(dim=1)).isfinite()
                planned, previous = at.h, at.previous
            column, s, hopeless = ok[:, None], torch.where(ok, end, at.s), ~ok
            if control.adaptive:
                hopeless = (planned <= self._least(s, s0, s1)) | self._stuck(ok, h, given)
            arrived, lost, residual, own = self._looked(at, step, ok, ok & last, own, fixed)
            hopeless = lost | (at.live & ~arrived & hopeless)
            stand = Stand(
                s=s,
                h=planned.clone(),
                z=torch.where(column, step.z, at.z),
                slope=torch.where(column, step.slope_end, at.slope) if self._sloped else at.slope.clone(),
                previous=previous.clone(),
                live=at.live & ~arrived & ~hopeless,
                failed=at.failed | hopeless,
                accepted=at.accepted + ok,
                rejected=at.rejected + (at.live & ~ok),
            )
            stages = solver.snapshot(step.stages) if self._closed else None
            now = Log(at.s, h, end, ok, figures, at.z if self._keeps else None, driving, residual, stages)
            for x, new in zip(log, filter(_there, now), strict=True):
                x.index_copy_(0, row, new[None])
            # What the whole batch rejects is written over: the backward pass has no use for it.
            return made + 1, row + (ok if self._joint and not self._settles else 1), *stand, *own

        log, none = self._empty(room, carried[2], given), torch.zeros((), dtype=torch.int64)
        carried = none, torch.zeros(1, dtype=torch.int64), *carried
        made, filled, *found = overwriting_loop(more, attempt, carried, list(filter(_there, log)))
        stand, own = Stand(*found[:9]), tuple(found[9:])
        live, failed = stand.live.sum(), stand.failed.any().to(made.dtype)
        return torch.stack([made, filled.squeeze(0), live, failed]), tuple(stand), tuple(log), own, fixed

    def _figures(self, norm: Norm, step: Step, z: Tensor) -> Tensor:
        """Traced: what a `Judge` says of a step from z, [1 to 3, groups]."""
        figures = [] if step.error is None else [norm.ratio(step.error, z, step.z)]
        if step.pair is not None:
            slope_x, slope_y, x, y = step.pair
            figures += [_control.rms(slope_x - slope_y, self._joint), _control.rms(x - y, self._joint)]
        return torch.stack(figures or [z.new_zeros(1 if self._joint else len(z))])

    # -- backwards -----------------------------------------------------------------------------------------------------

    def backward(
        self,
        ran: Ran,
        tensors: Sequence[Tensor],
        final: Tensor | None,
        interior: Tensor | None,
        figures: Tensor | None,
        states: Tensor | None,
    ) -> tuple[list[Tensor | None], float] | None:
        """The gradients; None where they have to be made as ever (after a warning).

        Args:
            ran: the solve. tensors: what wants a gradient beside z0.
            final, interior: the loss's gradient, [batch, features] and [points, batch, features].
            figures: that of `Ran.figures`. states: that of the steps' starts, [all accepted, features].
                Each may be None.

        Returns:
            Those of z0 and of the tensors; and by how much the last step, made again, was off.

        Raises:
            Unsupported: f is not what it was; one of the tensors is not there any more.
        """
        uses = Lent.of(ran.problem, tensors)
        try:
            (costate, *sums), off = self._gradients(ran, uses, final, figures, ran.marks(interior, states))
        except Exception as error:  # whatever the compiler says of f
            self._give_up(ran.problem, Unsupported(first_line(error)))
        else:
            found = {id(x): gradient for x, gradient in zip(uses.tensors, sums, strict=True)}
            return [costate, *(found[id(x)] for x in tensors)], float(off)
        return None

    @torch.no_grad()
    def _gradients(self, ran: Ran, uses: Lent, final: Tensor | None, figures: Tensor | None, marks: list | None):
        problem = ran.problem
        kind = uses.names, uses.wanted, figures is not None, 0 if marks is None else marks[0].shape[1]
        if kind not in self._back:
            self._back[kind] = program(functools.partial(self._backwards, *kind), fixed=self._fixed)
        costate = torch.zeros_like(ran.final) if final is None else final
        sums, off = [torch.zeros_like(x) for x in uses.tensors], costate.new_zeros(())
        tolerances, tensors = self._tolerances(problem, costate), [x.detach() for x in uses.tensors]
        active, last = Active(problem), len(ran.pages) - 1
        for i in range(last, -1, -1):
            filled, log, rows = ran.pages[i]
            if not filled:
                continue
            if rows is not active.rows:
                active = Active(problem, rows)
            weights = None if figures is None else figures[i * len(log.s) : (i + 1) * len(log.s)]
            weights = weights if weights is None or rows is None else weights.index_select(-1, rows)
            own, checked = active.tensors(tensors, uses.wanted), constant("checked", filled - 1 if i == last else -1)
            leaves, own_sums = [x.detach() for x in active.leaves], active.blank(sums, own)
            found, off = self._back[kind](
                uses.holder, leaves, own, active.start, active.end, tolerances, constant("filled", filled),
                active.of(costate), off, active.of(ran.final), checked, weights, marks and marks[i], log.s, log.h,
                log.ok, log.z, log.driving, *own_sums,
            )  # fmt: skip
            costate = active.put(found, costate)
            active.collect(sums, own_sums)
        return [costate, *sums], off

    def _backwards(
        self, names, wanted, lens, rows, holder, leaves, own, t, t1, tolerances, filled, costate,
        off, final, checked, weights, marks, s_log, h_log, ok_log, z_log, driving_log, *sums,
    ):  # fmt: skip
        """Traced: the logged attempts from the last to the first; adds to sums what the tensors get.

        Args:
            rows: how many of a snapshot have a gradient.
        """
        norm, direction = Norm(*tolerances, self._joint), _direction(t, t1)

        def more(j, *carried):
            return j >= 0

        def step_back(sums, j, costate, off):
            row = j.reshape(1)
            s, h, ok, z = (x.index_select(0, row)[0] for x in (s_log, h_log, ok_log, z_log))
            # Who was rejected makes a step of size zero, which is finite.
            t, dt, column, driving = s * direction, torch.where(ok, h, 0.0) * direction, ok[:, None], None
            if driving_log is not None:
                driving = torch.where(column, driving_log.index_select(0, row)[0], 0.0)

            def step(z, *own):
                lent, args = own[: len(names)], list(leaves)
                for i, x in zip(wanted, own[len(names) :], strict=True):
                    args[i] = x
                call = holder
                if names:
                    call = functools.partial(lend, holder, dict(zip(names, lent, strict=True)))
                made = self._attempt(self._of(call, args), driving, t, dt, z, None, lens=lens, close=rows > 1)
                found = [made.z]
                if lens:
                    found.append(self._figures(norm, made, z))
                if rows:
                    found.append(self._solver.snapshot(made.stages)[:rows])
                return tuple(found)

            (end, *_), pullback = torch.func.vjp(step, z, *own)
            cotangents = [torch.where(column, costate, 0.0)]
            if lens:
                cotangents.append(torch.where(ok, weights.index_select(0, row)[0], 0.0))
            if rows:
                cotangents.append(marks.index_select(0, row)[0])
            back, *parts = pullback(tuple(cotangents))
            now = torch.where(column & (j == checked), end - final, 0.0).abs().amax()
            off = torch.maximum(off, now)
            for x, y in zip(sums, parts, strict=True):
                x.add_(y)
            return j - 1, torch.where(column, back, costate), off.clone()

        _, *found = overwriting_loop(more, step_back, (filled - 1, costate.clone(), off.clone()), sums)
        return found


def _there(x: Tensor | None) -> bool:
    return x is not None


def _direction(t: Tensor, t1: Tensor) -> Tensor:
    return torch.where(t1 < t, -1.0, 1.0).to(t.dtype)
