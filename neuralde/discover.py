"""The adaptive loop: attempt, judge, accept, next step size; for every sample at once.

It decides the grid and, unless `taped`, leaves no trace in autograd: what needs gradients replays the accepted steps.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass

import torch
from torch import Tensor

from . import control as _control
from .errors import Status
from .grid import Record
from .problem import Problem
from .trajectory import Trajectory

# Finished samples are left out of the batch once at most this fraction of it is unfinished. Re-indexing costs about as
# much as two attempts on a small batch, so it waits for some attempts to have passed since the last time.
_COMPACT_FRACTION, _COMPACT_AFTER = 0.5, 16
# A solution that goes to infinity does so in accepted steps too small to move t. Its hundreds of steps leave time to
# look for them now and then only; rejected steps are looked at always.
_CHECK_EVERY = 16


@dataclass
class _Lane:
    """The samples that are still in the batch, with their control state. Everything is [groups] but z, slope, last.

    Times run forward in here, whatever the direction of the solve: s = direction·t. `last` has what a failed sample's
    last attempt was: its step size and the judge's figures, [4, groups]; None while none has failed.
    """

    rows: Tensor | None
    s: Tensor
    s1: Tensor
    h: Tensor
    z: Tensor
    slope: Tensor | None
    previous: Tensor
    live: Tensor
    accepted: Tensor
    rejected: Tensor
    status: Tensor
    failed_at: Tensor
    last: Tensor | None
    start: Tensor
    direction: Tensor | None
    interior: Tensor | None

    def keep(self, index: Tensor) -> _Lane:
        """The same for some of the samples."""
        kept = {}
        for name, value in vars(self).items():
            wide = name == "last" or (name == "interior" and value is not None and value.shape[1] > 1)
            kept[name] = value if value is None else value.index_select(int(wide), index)
        kept["rows"] = index if self.rows is None else self.rows.index_select(0, index)
        return _Lane(**kept)

    def signed(self, x: Tensor) -> Tensor:
        """Between t and s."""
        return x if self.direction is None else x * self.direction

    def fail(self, which: Tensor, figures: Tensor | None, h: Tensor):
        """Ends samples where they are: they have no horizon left, so that their steps are zero.

        f is called for them as long as they are in the batch.
        """
        attempt = h[None] if figures is None else torch.cat([h[None], figures])
        attempt = torch.cat([attempt, attempt.new_full((4 - len(attempt), len(h)), float("nan"))])
        self.last = attempt if self.last is None else torch.where(which, attempt, self.last)
        self.failed_at = torch.where(which, self.s, self.failed_at)
        self.live = self.live & ~which
        self.s1 = torch.where(which, self.s, self.s1)
        if bool(self.live.any()):
            self.z, self.slope = self.safe(~which)

    def safe(self, ok: Tensor) -> tuple[Tensor, Tensor | None]:
        """z and slope, with those of an ok sample where a sample is not ok and f is not known to be finite.

        Where a call of f is recorded, zero cotangents times what f does at a state that it can't handle would make
        NaN of the parameters' gradients. A state whose slope is finite is safe; others borrow one.
        """
        if self.slope is not None:
            ok = ok | torch.isfinite(self.slope.detach()).all(dim=1)
        row = ok.nonzero().flatten()[:1]
        if len(ok) != len(self.z) or not len(row):  # one group for the batch: it fails as a whole
            return self.z, self.slope
        return tuple(None if x is None else torch.where(ok[:, None], x, x.detach()[row]) for x in (self.z, self.slope))


def discover(problem: Problem, z0: Tensor, slope: Tensor, taped: bool = False) -> Trajectory:
    """Solves from z0.

    Args:
        problem: what and how.
        z0: [batch, features], in the working dtype.
        slope: f(t0, z0).
        taped: whether autograd records the accepted steps as they are made.
    """
    with contextlib.nullcontext() if taped else torch.no_grad():
        return _Discovery(problem, z0, slope, taped).run()


class _Discovery:
    def __init__(self, problem: Problem, z0: Tensor, slope: Tensor, taped: bool):
        self.problem, self.taped, self.z0 = problem, taped, z0
        self.solver, self.control = problem.solver, problem.control
        self.close = problem.interior is not None or problem.keep_stages
        self.records: list[Record] = []
        self.parts: list[_Lane] = []  # lanes whose samples left the batch
        self.outputs: list[tuple[Tensor, Tensor | None, Tensor]] = []  # (point, sample, value)
        t = problem.start
        direction = problem.span.sign()
        s, count = t * direction, torch.zeros_like(t, dtype=torch.int64)
        self.lane = _Lane(
            rows=None,
            s=s,
            s1=problem.end * direction,
            h=self._first_step(t, z0.detach(), slope.detach()),
            z=z0,
            slope=slope,
            previous=self.control.first_memory(t),
            live=torch.ones_like(t, dtype=torch.bool),
            accepted=count,
            rejected=count,
            status=count,
            failed_at=s,
            last=None,
            start=s,
            direction=direction if bool((direction < 0).any()) else None,
            interior=None if problem.interior is None else problem.interior * direction,
        )
        self.exponents = self.control.exponents(self.solver.order, self.solver.exponents)
        # Below this step size s + h is s, or the horizon would take forever.
        self.eps = 4 * torch.finfo(t.dtype).eps
        self.least = 1e-25
        self.attempts = 0
        self._enter(self.lane)

    @torch.no_grad()
    def _first_step(self, t: Tensor, z: Tensor, slope: Tensor) -> Tensor:
        p = self.problem
        if p.dt0 is not None:
            return torch.full_like(t, p.dt0)
        return _control.initial_step(p.field, t, z, slope, p.span, self.solver.order, p.rtol, p.atol, p.joint).abs()

    def _enter(self, lane: _Lane):
        """Makes what depends on the number of samples in the lane."""
        p = self.problem
        self.lane, self.f, self.entered = lane, p.field.on(lane.rows), self.attempts
        self.memory = self.solver.memory(lane.z, self.taped)
        estimates = self.solver.error_order is not None, self.solver.reports_stiffness
        self.judge = _control.Judge(lane.z.detach(), estimates, p.rtol, p.atol, p.joint)

    def run(self) -> Trajectory:
        unfinished = len(self.lane.s)
        if not bool(torch.isfinite(self.lane.slope.detach()).all()):
            unfinished = self._fail_at_start(self.lane)
        self.latest = None, self.lane.h
        while unfinished and self.attempts < self.problem.max_steps:
            if self._worth_compacting(unfinished):
                self._compact(self.lane)
            self.attempts += 1
            unfinished = self._attempt(self.lane, unfinished)
        lane = self.lane
        if unfinished:
            lane.status = torch.where(lane.live, Status.MAX_STEPS, lane.status)
            lane.fail(lane.live, *self.latest)
        self.parts.append(lane)
        return self._trajectory()

    # -- one attempt -------------------------------------------------------------------------------------------------

    def _attempt(self, lane: _Lane, unfinished: int) -> int:
        """Attempts a step of every sample in the lane. Returns how many samples are unfinished after it."""
        control = self.control

        # Attempt. The last step ends on t1 exactly.
        left = lane.s1 - lane.s
        if control.adaptive:
            # The last two steps share what is left: a sliver of a step would have a stiffness estimate of rounding
            # errors. (A quotient that is not a number belongs to a sample that stands still: its step is zero.)
            count = (left / lane.h).ceil_().clamp_(min=1.0)
            last = count <= 1.0
            h = torch.where(count <= 2.0, left / count, lane.h)
        else:
            # A fixed step may be stretched a little, so that rounding leaves no sliver behind.
            last = lane.h * 1.001 >= left
            h = torch.where(last, left, lane.h)
        t, dt = lane.signed(lane.s), lane.signed(h)
        step = self.solver.step(self.f, t, dt, lane.z, lane.slope, self.memory, close=self.close)

        # Judge. NaN is no number below 1: such an attempt is rejected, and retried smaller.
        with torch.no_grad():
            figures = self.judge(step, lane.z)
            ratio = figures[0] if self.judge.has_error else None
            if control.adaptive:
                ok = ratio <= 1.0
                ok = ok if unfinished == h.shape[0] else lane.live & ok
                s_end = torch.where(last, lane.s1, lane.s + h)
            else:
                ok = lane.live & torch.isfinite(step.z.sum() if self.problem.joint else step.z.sum(dim=1))
                # By multiplication: 10⁶ additions of dt0 would lose digits of t.
                s_end = torch.where(last, lane.s1, lane.start + (lane.accepted + 1) * lane.h)
            accepted = int(ok.sum())
        everyone = accepted == h.shape[0] == unfinished

        # Accept.
        if accepted:
            if self.taped and not everyone:
                step = self._without_rejected(lane, t, dt, ok, step)
            self._record(lane, t, dt, s_end, ok, everyone, step, figures)
            if lane.interior is not None:
                self._collect(lane, h, s_end, ok, step)
        if everyone:
            # The slope is copied: f may return a buffer of its own that its next call overwrites, as a captured
            # graph does.
            lane.z, lane.s, lane.slope = step.z, s_end, None if step.slope_end is None else step.slope_end.clone()
        elif accepted:
            column = ok[:, None]
            lane.z, lane.s = torch.where(column, step.z, lane.z), torch.where(ok, s_end, lane.s)
            if step.slope_end is None or lane.slope is None:
                lane.slope = step.slope_end
            else:
                lane.slope = torch.where(column, step.slope_end, lane.slope)
        self.judge.advance(everyone)
        lane.accepted = lane.accepted + (1 if everyone else ok)
        if accepted < unfinished:
            lane.rejected = lane.rejected + (lane.live & ~ok)

        # Choose the next step size.
        if control.adaptive:
            judged = None if everyone else ok
            finite = ratio if everyone else ratio.nan_to_num(nan=float("inf"))
            lane.h = h * control.factor(finite, lane.previous, judged, self.exponents)
            lane.previous = control.remember(finite, lane.previous, judged)

        # Who has finished, who has failed?
        finished = last if everyone else ok & last
        arrived = int(finished.sum())
        if arrived:
            lane.live = lane.live & ~finished
        self.latest = figures, h
        checked = accepted < unfinished or self.attempts % _CHECK_EVERY == 0
        if checked:
            self._fail_hopeless(lane, ok, ratio, figures, h)
        return int(lane.live.sum()) if checked else unfinished - arrived

    def _fail_hopeless(self, lane: _Lane, ok: Tensor, ratio: Tensor | None, figures: Tensor | None, h: Tensor):
        """Ends the samples whose next step would be too small to move t, and fixed steps that went wrong."""
        if self.control.adaptive:
            least = torch.maximum(lane.s.abs() * self.eps, (lane.s1 - lane.start) * self.least)
            hopeless = lane.live & (lane.h <= least)
        else:
            hopeless = lane.live & ~ok
        if not bool(hopeless.any()):
            return
        infinite = ~torch.isfinite(ratio) if self.control.adaptive else hopeless
        code = torch.where(infinite, Status.NON_FINITE, Status.STEP_SIZE_UNDERFLOW)
        lane.status = torch.where(hopeless, code, lane.status)
        lane.fail(hopeless, figures, h)

    def _without_rejected(self, lane: _Lane, t: Tensor, dt: Tensor, ok: Tensor, step):
        """On a tape, an attempt that overflowed for some samples, made again with these standing still."""
        with torch.no_grad():
            rest = [x[~ok] for x in (step.z, step.error, step.slope_end) if x is not None]
            if all(bool(torch.isfinite(x).all()) for x in rest):
                return step
        z, slope = lane.safe(ok)
        dt = torch.where(ok, dt, 0.0)
        return self.solver.step(self.f, t, dt, z, slope, self.memory, close=self.close)

    def _record(self, lane: _Lane, t, dt, s_end, ok, everyone, step, figures):
        snapshot = None
        if self.problem.keep_stages:
            snapshot = self.solver.snapshot(step.stages).detach().clone()
        self.records.append(
            Record(
                rows=lane.rows,
                accepted=None if everyone and lane.rows is None else ok,
                t=t,
                dt=dt,
                t_end=lane.signed(s_end),
                z=lane.z,
                figures=figures,
                lens=(step.error, step.z, step.pair) if self.taped else None,
                snapshot=snapshot,
            )
        )

    def _collect(self, lane: _Lane, h: Tensor, s_end: Tensor, ok: Tensor, step):
        """Evaluates the interpolant at the output times that the accepted steps pass."""
        inside = (lane.interior > lane.s) & (lane.interior <= s_end) & ok
        point, group = inside.nonzero(as_tuple=True)
        if not len(point):
            return
        owner = torch.zeros_like(group) if self.problem.joint else group
        theta = (lane.interior[point, group] - lane.s[owner]) / h[owner]
        snapshot = self.solver.snapshot(step.stages)
        if self.problem.joint and inside.shape[1] == 1:
            self.outputs.append((point, None, self.solver.interpolate(snapshot, theta, None)))
        else:
            sample = group if lane.rows is None else lane.rows[group]
            self.outputs.append((point, sample, self.solver.interpolate(snapshot, theta, group)))

    # -- the batch ---------------------------------------------------------------------------------------------------

    def _fail_at_start(self, lane: _Lane) -> int:
        """Ends the samples whose first slope is not finite."""
        finite = torch.isfinite(lane.slope.detach())
        bad = ~(finite.all().reshape(1) if self.problem.joint else finite.all(dim=1))
        lane.status = torch.where(bad, Status.NON_FINITE, lane.status)
        lane.h = torch.where(bad, 0.0, lane.h)
        lane.fail(bad, None, lane.h)
        unfinished = int(lane.live.sum())
        if unfinished:
            # Their slopes must not stay on a tape: f is evaluated again, without them if it can be.
            if self.control.per_sample and self.problem.field.can_shrink():
                self._compact(lane)
                lane = self.lane
            t = lane.signed(lane.s)
            if lane.rows is None:
                self.problem.field.fill(t, lane.z)
            lane.slope = self.f(self.f.times(t)[0], lane.z)
        return unfinished

    def _worth_compacting(self, unfinished: int) -> bool:
        n = self.lane.s.shape[0]
        return (
            self.control.per_sample
            and 0 < unfinished <= _COMPACT_FRACTION * n
            and self.attempts - self.entered >= _COMPACT_AFTER
            and self.problem.field.can_shrink()
        )

    def _compact(self, lane: _Lane):
        self.parts.append(lane.keep((~lane.live).nonzero().flatten()))
        self._enter(lane.keep(lane.live.nonzero().flatten()))

    # -- the result --------------------------------------------------------------------------------------------------

    def _trajectory(self) -> Trajectory:
        # The first step's automatic size costs an evaluation, and so does the slope at the start where it is kept.
        extra = (self.problem.dt0 is None) + (self.solver.fsal or self.close)
        return Trajectory(self.problem, self.z0, self.parts, self.records, self._interior(len(self.z0)), extra)

    def _interior(self, batch: int) -> Tensor | None:
        if self.problem.interior is None:
            return None
        points, features = len(self.problem.interior), self.z0.shape[1]
        out = self.z0.new_full((points, batch, features), float("nan"))
        if not self.outputs:
            return out
        everyone = torch.arange(batch, device=self.z0.device)
        point = torch.cat([p if s is not None else p.repeat_interleave(batch) for p, s, _ in self.outputs])
        sample = torch.cat([s if s is not None else everyone.repeat(len(p)) for p, s, _ in self.outputs])
        values = torch.cat([v.reshape(-1, features) for _, _, v in self.outputs])
        return out.index_put((point, sample), values)
