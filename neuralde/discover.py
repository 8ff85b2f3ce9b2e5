"""The adaptive loop: attempt, judge, accept, next step size; for every sample at once.

It decides the grid and, unless `taped`, leaves no trace in autograd: what needs gradients replays the accepted steps.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from . import algebra
from . import control as _control
from .algebra import Algebra, Figure
from .errors import Status
from .grid import Record
from .problem import Problem
from .state import all_finite
from .trajectory import Trajectory

# Finished samples are left out of the batch once at most this fraction of it is unfinished. Re-indexing costs about as
# much as two attempts on a small batch, so it waits for some attempts to have passed since the last time.
_COMPACT_FRACTION, _COMPACT_AFTER = 0.5, 16
# A solution that goes to infinity does so in accepted steps too small to move t. Its hundreds of steps leave time to
# look for them now and then only; rejected steps are looked at always.
_CHECK_EVERY = 16
_LEAST = 1e-25  # of the horizon: steps below would take forever


@dataclass
class _Lane:
    """The samples that are still in the batch, with their control state: figures [groups], but z, slope and last.

    Times run forward in here, whatever the direction of the solve: s = direction·t. `last` has what a failed sample's
    last attempt was: its step size and the judge's figures, [4, groups]; None while none has failed.
    """

    m: Algebra
    rows: Tensor | None
    s: Figure
    s1: Figure
    h: Figure
    z: Tensor
    slope: Tensor | None
    previous: Figure
    live: Figure
    accepted: Figure
    rejected: Figure
    status: Figure
    failed_at: Figure
    last: Tensor | None
    start: Figure
    direction: Figure | None
    interior: Tensor | None

    def keep(self, index: Tensor) -> _Lane:
        """The same for some of the samples."""
        kept = {}
        for name, value in vars(self).items():
            wide = name == "last" or (name == "interior" and value is not None and value.shape[1] > 1)
            kept[name] = value.index_select(int(wide), index) if isinstance(value, Tensor) else value
        kept["rows"] = index if self.rows is None else self.rows.index_select(0, index)
        return _Lane(**kept)

    def tensors(self, like: Tensor) -> _Lane:
        """The same with every figure a tensor. like: of the dtype and device of times."""
        if self.m is algebra.TENSORS:
            return self
        count = torch.zeros_like(like, dtype=torch.int64)
        figures = {name: self.m.tensor(getattr(self, name), like) for name in ("s", "s1", "h", "failed_at")}
        counts = {name: self.m.tensor(getattr(self, name), count) for name in ("accepted", "rejected", "status")}
        return replace(self, **figures, **counts)

    def signed(self, x: Figure) -> Figure:
        """Between t and s."""
        return x if self.direction is None else x * self.direction

    def moment(self, h: Figure, like: Tensor) -> tuple[Tensor, Tensor]:
        """The tensors (t, dt) of an attempt."""
        t, dt = self.signed(self.s), self.signed(h)
        if isinstance(t, Tensor):
            return t, dt
        return torch.tensor(((t,), (dt,)), dtype=like.dtype, device=like.device).unbind(0)

    def fail(self, which: Figure, figures: Tensor | None, h: Figure):
        """Ends samples where they are: they have no horizon left, so that their steps are zero.

        f is called for them as long as they are in the batch.
        """
        m = self.m
        attempt = m.tensor(h, self.z.real)[None]
        attempt = attempt if figures is None else torch.cat([attempt, figures])
        attempt = torch.cat([attempt, attempt.new_full((4 - len(attempt), attempt.shape[1]), float("nan"))])
        self.last = attempt if self.last is None else torch.where(m.tensor(which, attempt), attempt, self.last)
        self.failed_at = m.where(which, self.s, self.failed_at)
        self.live = self.live & m.invert(which)
        self.s1 = m.where(which, self.s, self.s1)
        if m.count(self.live):
            self.z, self.slope = self.safe(m.invert(which))

    def safe(self, ok: Figure) -> tuple[Tensor, Tensor | None]:
        """z and slope, with those of an ok sample where a sample is not ok and f is not known to be finite.

        Where a call of f is recorded, zero cotangents times what f does at a state that it can't handle would make
        NaN of the parameters' gradients. A state whose slope is finite is safe; others borrow one.
        """
        if not isinstance(ok, Tensor):  # one group for the batch: it fails as a whole
            return self.z, self.slope
        if self.slope is not None:
            ok = ok | torch.isfinite(self.slope.detach()).all(dim=1)
        row = ok.nonzero().flatten()[:1]
        if not len(row):
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
        self.exponents = self.control.exponents(self.solver.order, self.solver.exponents)
        self.like = problem.start
        self.eps = 4 * torch.finfo(self.like.dtype).eps  # below this step size s + h is s
        self.attempts = 0
        self._enter(self._lane(slope))

    def _lane(self, slope: Tensor) -> _Lane:
        """All samples at the start."""
        p, m = self.problem, algebra.of(self.problem.joint)
        t, t1 = m.read(p.start), m.read(p.end)
        backward = t1 < t
        direction = m.where(backward, m.full(-1.0, t), m.full(1.0, t)) if m.count(backward) else None
        s, s1 = (t, t1) if direction is None else (t * direction, t1 * direction)
        count = m.full(0, t) if m is algebra.NUMBERS else torch.zeros_like(t, dtype=torch.int64)
        if p.dt0 is not None:
            h = m.full(p.dt0, t)
        else:
            with torch.no_grad():
                h = _control.initial_step(
                    p.field, p.start, self.z0.detach(), slope.detach(), t1 - t, self.solver.order, p.norm
                )
        return _Lane(
            m=m,
            rows=None,
            s=s,
            s1=s1,
            h=h,
            z=self.z0,
            slope=slope,
            previous=self.control.first_memory(t, m),
            live=m.full(True, t),
            accepted=count,
            rejected=count,
            status=count,
            failed_at=s,
            last=None,
            start=s,
            direction=direction,
            interior=p.interior if direction is None or p.interior is None else p.interior * direction,
        )

    def _enter(self, lane: _Lane):
        """Makes what depends on the number of samples in the lane."""
        p = self.problem
        self.lane, self.f, self.entered = lane, p.field.on(lane.rows), self.attempts
        self.memory = self.solver.memory(lane.z, self.taped)
        estimates = self.solver.error_order is not None, self.solver.reports_stiffness
        self.judge = _control.Judge(lane.z.detach(), estimates, p.norm.on(lane.rows))

    def run(self) -> Trajectory:
        unfinished = self.like.shape[0]
        if not all_finite(self.lane.slope):
            unfinished = self._fail_at_start(self.lane)
        self.latest = None, self.lane.h
        while unfinished and self.attempts < self.problem.max_steps:
            if self._worth_compacting(unfinished):
                self._compact(self.lane)
            self.attempts += 1
            unfinished = self._attempt(self.lane, unfinished)
        lane = self.lane
        if unfinished:
            lane.status = lane.m.where(lane.live, self._code(lane, Status.MAX_STEPS), lane.status)
            lane.fail(lane.live, *self.latest)
        self.parts.append(lane)
        return self._trajectory()

    # -- one attempt -------------------------------------------------------------------------------------------------

    def _attempt(self, lane: _Lane, unfinished: int) -> int:
        """Attempts a step of every sample in the lane. Returns how many samples are unfinished after it."""
        m, adaptive = lane.m, self.control.adaptive
        h, last = self._next(lane)
        t, dt = lane.moment(h, self.like)
        step = self.solver.step(self.f, t, dt, lane.z, lane.slope, self.memory, close=self.close)

        # Judge. NaN is no number below 1: such an attempt is rejected, and retried smaller.
        groups = t.shape[0]
        with torch.no_grad():
            figures = self.judge(step, lane.z)
            if adaptive:
                ratio = m.read(figures[0])
                ok = ratio <= 1.0
                ok = ok if unfinished == groups else lane.live & ok
                s_end = m.where(last, lane.s1, lane.s + h)
            else:
                ok = lane.live & m.finite(m.read(step.z.sum()[None] if self.problem.joint else step.z.sum(dim=1)))
                # By multiplication: 10⁶ additions of dt0 would lose digits of t.
                s_end = m.where(last, lane.s1, lane.start + (lane.accepted + 1) * lane.h)
            accepted = m.count(ok)
        everyone = accepted == groups == unfinished

        # Accept.
        if accepted:
            if self.taped and not everyone:
                step = self._without_rejected(lane, t, dt, ok, step)
            self._record(lane, t, dt, s_end, ok, everyone, step, figures)
            if lane.interior is not None:
                self._collect(lane, h, s_end, ok, step)
            self._advance(lane, step, s_end, ok, everyone)
        self.judge.advance(everyone)
        if accepted < unfinished:
            lane.rejected = lane.rejected + (lane.live & m.invert(ok))

        # Choose the next step size.
        if adaptive:
            judged = None if everyone else ok
            ratio = ratio if everyone else m.known(ratio)
            lane.h = h * self.control.factor(ratio, lane.previous, judged, self.exponents, m)
            lane.previous = self.control.remember(ratio, lane.previous, judged, m)

        # Who has finished, who has failed?
        finished = last if everyone else ok & last
        arrived = m.count(finished)
        if arrived:
            lane.live = lane.live & m.invert(finished)
        self.latest = figures, h
        if accepted == unfinished and self.attempts % _CHECK_EVERY:
            return unfinished - arrived
        self._fail_hopeless(lane, ok, ratio if adaptive else None, figures, h)
        return m.count(lane.live)

    def _next(self, lane: _Lane) -> tuple[Figure, Figure]:
        """The next step's size, and whether it is the last one: that one ends on s1 exactly."""
        m = lane.m
        left = lane.s1 - lane.s
        if not self.control.adaptive:
            # A fixed step may be stretched a little, so that rounding leaves no sliver behind.
            last = lane.h * 1.001 >= left
            return m.where(last, left, lane.h), last
        # The last two steps share what is left: a sliver of a step would have a stiffness estimate of rounding errors.
        last = lane.h >= left
        return m.where(last, left, m.minimum(lane.h, 0.5 * left)), last

    def _advance(self, lane: _Lane, step, s_end: Figure, ok: Figure, everyone: bool):
        """Moves the accepted samples to the ends of their steps."""
        m, slope = lane.m, step.slope_end
        lane.accepted = lane.accepted + (1 if everyone else ok)
        if everyone:
            # The slope is copied: f may return a buffer of its own that its next call overwrites, as a captured
            # graph does.
            lane.z, lane.s, lane.slope = step.z, s_end, None if slope is None else slope.clone()
            return
        column = ok[:, None]
        lane.z, lane.s = torch.where(column, step.z, lane.z), m.where(ok, s_end, lane.s)
        known = slope is not None and lane.slope is not None
        lane.slope = torch.where(column, slope, lane.slope) if known else slope

    def _fail_hopeless(self, lane: _Lane, ok: Figure, ratio: Figure | None, figures: Tensor | None, h: Figure):
        """Ends the samples whose next step would be too small to move t, and fixed steps that went wrong."""
        m = lane.m
        if self.control.adaptive:
            least = m.maximum(abs(lane.s) * self.eps, (lane.s1 - lane.start) * _LEAST)
            hopeless = lane.live & (lane.h <= least)
        else:
            hopeless = lane.live & m.invert(ok)
        if not m.count(hopeless):
            return
        infinite = m.invert(m.finite(ratio)) if self.control.adaptive else hopeless
        codes = (self._code(lane, code) for code in (Status.NON_FINITE, Status.STEP_SIZE_UNDERFLOW))
        lane.status = m.where(hopeless, m.where(infinite, *codes), lane.status)
        lane.fail(hopeless, figures, h)

    @staticmethod
    def _code(lane: _Lane, code: Status) -> Figure:
        return lane.m.full(int(code), lane.status)

    def _without_rejected(self, lane: _Lane, t: Tensor, dt: Tensor, ok: Tensor, step):
        """On a tape, an attempt that overflowed for some samples, made again with these standing still."""
        with torch.no_grad():
            rest = [x[~ok] for x in (step.z, step.error, step.slope_end) if x is not None]
            if all(map(all_finite, rest)):
                return step
        z, slope = lane.safe(ok)
        dt = torch.where(ok, dt, 0.0)
        return self.solver.step(self.f, t, dt, z, slope, self.memory, close=self.close)

    def _record(self, lane: _Lane, t: Tensor, dt: Tensor, s_end: Figure, ok: Figure, everyone: bool, step, figures):
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

    def _collect(self, lane: _Lane, h: Figure, s_end: Figure, ok: Figure, step):
        """Evaluates the interpolant at the output times that the accepted steps pass."""
        inside = (lane.interior > lane.s) & (lane.interior <= s_end) & ok
        point, group = inside.nonzero(as_tuple=True)
        if not len(point):
            return
        s, h = (x[group] if isinstance(x, Tensor) else x for x in (lane.s, h))
        theta = (lane.interior[point, group] - s) / h
        snapshot = self.solver.snapshot(step.stages)
        if self.problem.joint and inside.shape[1] == 1:
            self.outputs.append((point, None, self.solver.interpolate(snapshot, theta, None)))
        else:
            sample = group if lane.rows is None else lane.rows[group]
            self.outputs.append((point, sample, self.solver.interpolate(snapshot, theta, group)))

    # -- the batch ---------------------------------------------------------------------------------------------------

    def _fail_at_start(self, lane: _Lane) -> int:
        """Ends the samples whose first slope is not finite."""
        m, finite = lane.m, torch.isfinite(lane.slope.detach())
        bad = m.invert(m.read(finite.all()[None] if self.problem.joint else finite.all(dim=1)))
        lane.status = m.where(bad, self._code(lane, Status.NON_FINITE), lane.status)
        lane.h = m.where(bad, m.full(0.0, lane.h), lane.h)
        lane.fail(bad, None, lane.h)
        unfinished = m.count(lane.live)
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
        return (
            self.control.per_sample
            and 0 < unfinished <= _COMPACT_FRACTION * self.lane.s.shape[0]
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
        parts = [part.tensors(self.like) for part in self.parts]
        return Trajectory(self.problem, self.z0, parts, self.records, self._interior(len(self.z0)), extra)

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
