"""The adaptive loop: attempt, judge, accept, next step size; for every sample at once.

It decides the grid and, unless `taped`, leaves no trace in autograd: what needs gradients replays the accepted steps.
"""

from __future__ import annotations

import contextlib
import functools
from dataclasses import replace

import torch
from torch import Tensor

from . import algebra
from . import control as _control
from .algebra import Figure
from .errors import Status
from .events import Hits, slope_inside
from .grid import Record
from .held import Held
from .lane import Lane, Tools
from .problem import Problem
from .solvers import Past, Step
from .state import all_finite
from .trajectory import Trajectory

# Finished samples are left out of the batch once at most this fraction of it is unfinished. Re-indexing costs about as
# much as two attempts on a small batch, so it waits for some attempts to have passed since the last time.
_COMPACT_FRACTION, _COMPACT_AFTER = 0.5, 16
# A solution that goes to infinity does so in accepted steps too small to move t. Its hundreds of steps leave time to
# look for them now and then only; rejected steps are looked at always.
_CHECK_EVERY = 16
LEAST = 1e-25  # of the horizon: steps below would take forever


def resolution(s: Tensor) -> float:
    """Below this part of s, a step from s does not move it."""
    return 4 * torch.finfo(s.dtype).eps


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
        self.solver, self.control, self.watch = problem.solver, problem.control, problem.watch
        self.close = problem.keep_stages or any(
            x is not None for x in (problem.interior, problem.watch, problem.tally, problem.rest)
        )
        self.switching = len(self.solver.parts) > 1
        self.bounded = problem.dt_min is not None or problem.dt_max is not None
        self.records: list[Record] = []
        self.parts: list[Lane] = []  # lanes whose samples left the batch
        self.outputs: list[tuple[Tensor, Tensor | None, Tensor]] = []  # (point, sample, value)
        self.held = None if problem.keep is None else Held(problem.keep, self.solver.history, len(z0))
        self.hits: list[tuple[Tensor, ...]] = []  # (event, sample, step, theta, t, z, speed, terminal)
        self.like = problem.start
        self.eps = resolution(self.like)
        self.still: Tensor | None = None  # which samples wait for others under joint control
        self.attempts = 0
        self.lanes = [self._enter(self._lane(slope))]

    def _lane(self, slope: Tensor) -> Lane:
        """All samples at the start."""
        p, m = self.problem, algebra.of(self.problem.joint)
        t, t1 = m.read(p.start), m.read(p.end)
        backward = t1 < t
        direction = m.where(backward, m.full(-1.0, t), m.full(1.0, t)) if m.count(backward) else None
        s, s1 = (t, t1) if direction is None else (t * direction, t1 * direction)
        count = torch.zeros_like(t, dtype=torch.int64) if isinstance(t, Tensor) else 0
        if p.dt0 is not None:
            h = m.read(p.dt0) if isinstance(p.dt0, Tensor) else m.full(p.dt0, t)
        else:
            with torch.no_grad():
                order = self.solver.parts[0].order
                h = _control.initial_step(p.field, p.start, self.z0.detach(), slope.detach(), t1 - t, order, p.norm)
        past = self.z0.new_zeros(self.solver.history, *self.z0.shape) if self.solver.history else None
        lane = Lane(
            m=m,
            part=0,
            rows=None,
            s=s,
            s1=s1,
            stop=s1,
            h=m.clamp(h, p.dt_min, p.dt_max) if self.bounded else h,
            z=self.z0,
            slope=slope,
            previous=self.control.first_memory(t, m),
            live=m.full(True, t),
            accepted=count,
            attempted=count,
            calls=count,
            linear=None,
            status=count,
            failed_at=s,
            last=None,
            start=s,
            least=(s1 - s) * LEAST if p.rest is None else m.full(0.0, s),
            direction=direction,
            interior=p.interior if direction is None or p.interior is None else p.interior * direction,
            stops=None,
            counter=count,
            past_slopes=past,
            past_dt=None if past is None else torch.ones_like(p.start).expand(len(past), -1),
            signs=None,
            ended=None,
            unfinished=self.like.shape[0],
            latest=(None, h),
        )
        if p.stops is not None:
            self._set_stops(lane)
        if self.watch is not None:
            with torch.no_grad():
                lane.signs = self.watch.start(p.start, self.z0, slope)
            lane.ended = torch.zeros(len(self.z0), dtype=torch.bool, device=self.z0.device)
        return lane

    def _enter(self, lane: Lane, memory=None) -> Lane:
        """Makes what depends on the samples in the lane and on their method. memory: what it goes on with, or None."""
        p, solver = self.problem, self.solver.parts[lane.part]
        lane.tools = Tools(
            solver=solver,
            f=p.field.on(lane.rows),
            memory=solver.memory(lane.z, self.taped) if memory is None else memory,
            judge=_control.judge(lane.z.detach(), solver, p.norm.on(lane.rows), self.switching),
            exponents=self.control.exponents(solver.order, solver.exponents),
            since=self.attempts,
        )
        return lane

    def run(self) -> Trajectory:
        if self.problem.rest is not None:
            self._begin_rest(self.lanes[0])
        if not all_finite(self.lanes[0].slope):
            self._fail_at_start(self.lanes[0])
        while self.attempts < self.problem.max_steps:
            busy = [lane for lane in self.lanes if lane.unfinished]
            if not busy:
                break
            self.attempts += 1
            for lane in busy:
                self._attempt(self._compact(lane) if self._worth_compacting(lane) else lane)
            if self.switching:
                self._regroup()
        for lane in self.lanes:
            if lane.unfinished:
                lane.status = lane.m.where(lane.live, self._code(lane, Status.MAX_STEPS), lane.status)
                lane.fail(lane.live, self.attempts, *lane.latest)
        self.parts += self.lanes
        return self._trajectory()

    # -- one attempt -------------------------------------------------------------------------------------------------

    def _attempt(self, lane: Lane):
        """Attempts a step of every sample in the lane."""
        m, adaptive, tools, unfinished = lane.m, self.control.adaptive, lane.tools, lane.unfinished
        h, last = self._next(lane)
        t, dt = lane.moment(h, self.like)
        s_end = m.where(last, lane.stop, lane.s + h if adaptive else self._fixed_end(lane))
        step = self._step(lane, t, dt, s_end)

        # Judge. NaN is no number below 1: such an attempt is rejected, and retried smaller.
        groups = t.shape[0]
        with torch.no_grad():
            figures = tools.judge(step, lane.z)
            if adaptive:
                ratio = m.read(figures[0])
                ok = ratio <= 1.0
                ok = ok if unfinished == groups else lane.live & ok
            else:
                ratio = None
                total = self._total(step.z)
                if self.problem.rest is not None and step.slope_end is not None:
                    total = total + self._total(step.slope_end)  # an end without a slope could not be judged
                ok = lane.live & m.finite(m.read(total))
            accepted = m.count(ok)
        if accepted and (not tools.solver.closes or (self.problem.rest is not None and step.slope_end is None)):
            step, ok, ratio = self._closed(lane, t, dt, s_end, ok, step, ratio)
            accepted = m.count(ok)
            if ratio is not None:
                figures = torch.cat([m.tensor(ratio, figures)[None], figures[1:]])
        everyone = accepted == groups == unfinished
        if self.problem.observer is not None:
            self._tell(lane, t, dt, ok)
        if step.work is not None:
            lane.count(step.work)
        elif self.switching:
            lane.calls = lane.calls + tools.solver.calls_per_step * lane.live

        # Accept.
        finished, lost = last if everyone else ok & last, False
        if accepted:
            if self.taped and not everyone:
                step = self._without_rejected(lane, t, dt, ok, step)
            self._record(lane, t, dt, s_end, ok, everyone, step, figures)
            if lane.interior is not None:
                self._collect(lane, h, s_end, ok, step)
            ended = None if self.watch is None else self._detect(lane, t, dt, s_end, ok, step)
            if self.problem.tally is not None:
                self.problem.tally.add(lane.rows, t, dt, m.tensor(ok, t), tools.solver, step.stages, lane.z)
            start = lane.z
            self._advance(lane, dt, step, s_end, ok, everyone)
            if ended is not None:
                finished = finished | self._end(lane, ended)
            if self.problem.rest is not None:
                settled, lost = self._settle(lane, start, ok, figures, h)
                finished = finished | settled
        tools.judge.advance(everyone)

        # Choose the next step size.
        if adaptive:
            planned = lane.h
            self._resize(lane, h, ratio, None if everyone else ok)
            if lane.stops is not None:  # a step that a stop cut short says little of the next one
                lane.h = m.where(ok & (planned > h), m.maximum(lane.h, planned), lane.h)
        if self.switching:
            lane.counter, lane.leaving = self.solver.route(lane.part, lane.counter, ok, figures, h, m)

        # Who has finished, who has failed?
        arrived = m.count(finished)
        if arrived:
            finished = finished if lane.stops is None else self._pass_stop(lane, finished)
            lane.leave(finished, self.attempts)
        lane.latest = figures, h
        lane.unfinished = unfinished - arrived if lane.stops is None and not lost else m.count(lane.live)
        if accepted < unfinished or lane.stops is not None or self.attempts % _CHECK_EVERY == 0:
            self._fail_hopeless(lane, ok, ratio, figures, h)

    def _total(self, x: Tensor) -> Tensor:
        """The sum over every group, [groups]: finite where x is."""
        return x.sum()[None] if self.problem.joint else x.sum(dim=1)

    def _step(self, lane: Lane, t: Tensor, dt: Tensor, s_end: Figure):
        """The step of the lane's method, unjudged."""
        solver, f = lane.tools.solver, lane.tools.f
        if self.problem.jumps is not None or self.still is not None or self.problem.noisy:
            f = self.problem.f(lane.rows, t, lane.m.tensor(lane.signed(s_end), t), still=self.still)
        past = {"past": Past(lane.past_slopes, lane.past_dt)} if solver.history else {}
        return solver.attempt(f, t, dt, lane.z, lane.slope, lane.tools.memory, close=self.close, **past)

    def _fixed_end(self, lane: Lane) -> Figure:
        """Where a fixed step ends. By multiplication: 10⁶ additions of dt0 would lose digits of t."""
        if lane.stops is None:
            return lane.start + (lane.accepted + 1) * lane.h
        return lane.s + lane.h

    def _resize(self, lane: Lane, h: Figure, ratio: Figure, ok: Figure | None):
        """The next step's size. ok: which attempts were accepted, None for all."""
        m, p = lane.m, self.problem
        ratio = ratio if ok is None else m.known(ratio)
        factor = self.control.factor(ratio, lane.previous, ok, lane.tools.exponents, m)
        if self.control.leaps:
            first = (lane.accepted == 1) if ok is None else ok & (lane.accepted == 1)
            factor = self.control.leap(factor, ratio, first, lane.tools.solver.error_order, m)
        lane.h = h * factor
        if self.bounded:
            lane.h = m.clamp(lane.h, p.dt_min, p.dt_max)
        lane.previous = self.control.remember(ratio, lane.previous, ok, m)

    def _next(self, lane: Lane) -> tuple[Figure, Figure]:
        """The next step's size, and whether it is the last one before a stop: that one ends there exactly."""
        m = lane.m
        left = lane.stop - lane.s
        if not self.control.adaptive:
            # A fixed step may be stretched a little, so that rounding leaves no sliver behind.
            last = lane.h * 1.001 >= left
            return m.where(last, left, lane.h), last
        # The last two steps share what is left: a sliver of a step would have a stiffness estimate of rounding errors.
        last = lane.h >= left
        h = m.minimum(lane.h, 0.5 * left)
        if self.problem.noisy:
            # The way down a Brownian tree to a time is as long as the time has binary digits. (Down: a step that is
            # made again after a rejection must be a shorter one.)
            h = m.rounded(lane.s + h, h) - lane.s
        return m.where(last, left, h), last

    def _closed(self, lane: Lane, t: Tensor, dt: Tensor, s_end: Figure, ok: Figure, step: Step, ratio: Figure):
        """Accepted steps with the slope at their ends, which the method leaves to the loop, or has no use for.

        Returns:
            The step; which are accepted still, and the error ratios: infinite where f is not finite at the end.
        """
        t_end = lane.m.tensor(lane.signed(s_end), t)
        z = step.z if not isinstance(ok, Tensor) else torch.where(ok[:, None], step.z, lane.z)
        f = self.problem.f(lane.rows, t, t_end, still=self.still)
        slope = f(f.times(t_end)[0], z)
        lane.calls = lane.calls + ok
        step = step._replace(slope_end=slope, stages=lane.tools.solver.finish(step.stages, slope))
        finite = torch.isfinite(slope.detach())
        finite = lane.m.read(finite.all()[None] if self.problem.joint else finite.all(dim=1))
        if ratio is not None:
            ratio = lane.m.where(ok & lane.m.invert(finite), lane.m.full(float("inf"), ratio), ratio)
        return step, ok & finite, ratio

    def _advance(self, lane: Lane, dt: Tensor, step: Step, s_end: Figure, ok: Figure, everyone: bool):
        """Moves the accepted samples to the ends of their steps."""
        m, slope = lane.m, step.slope_end
        lane.accepted = lane.accepted + (1 if everyone else ok)
        if lane.past_slopes is not None:
            slopes = torch.cat([lane.slope[None], lane.past_slopes[:-1]])
            sizes = torch.cat([dt[None], lane.past_dt[:-1]])
            if not everyone:
                slopes = torch.where(ok[:, None], slopes, lane.past_slopes)
                sizes = torch.where(ok, sizes, lane.past_dt)
            lane.past_slopes, lane.past_dt = slopes, sizes
        if everyone:
            # The slope is copied: f may return a buffer of its own that its next call overwrites, as a captured
            # graph does.
            lane.z, lane.s, lane.slope = step.z, s_end, None if slope is None else slope.clone()
            return
        column = ok[:, None]
        lane.z, lane.s = torch.where(column, step.z, lane.z), m.where(ok, s_end, lane.s)
        known = slope is not None and lane.slope is not None
        lane.slope = torch.where(column, slope, lane.slope) if known else slope

    # -- steady states -----------------------------------------------------------------------------------------------

    def _begin_rest(self, lane: Lane):
        """Ends the samples that are at rest from the start."""
        codes = self.problem.rest.begin(lane.z, lane.slope)
        if codes is not None:
            lane.leave(self._stop(lane, codes), 0)
            lane.unfinished = lane.m.count(lane.live)

    def _settle(self, lane: Lane, start: Tensor, ok: Figure, figures: Tensor | None, h: Figure) -> tuple[Figure, bool]:
        """Ends the samples that have come to rest, and those that never will.

        Returns:
            The former; and whether there are some of the latter.
        """
        m = lane.m
        accepted = m.tensor(ok, self.like)
        residual, codes = self.problem.rest.look(lane.rows, start, lane.z, lane.slope, accepted, self.attempts)
        if self.problem.recorded:
            self.records[-1].residual = residual
        if codes is None:
            return m.full(False, lane.live), False
        settled = self._stop(lane, codes)
        status = m.read(codes)
        lost = status > 0
        if not m.count(lost):
            return settled, False
        lane.status = m.where(lost, status, lane.status)
        lane.fail(lost, self.attempts, figures, h)
        return settled, True

    @staticmethod
    def _stop(lane: Lane, codes: Tensor) -> Figure:
        """Lets the samples that have come to rest stand where they are. Returns which."""
        m = lane.m
        settled = m.read(codes) == int(Status.SUCCESS)
        lane.s1, lane.stop = (m.where(settled, lane.s, x) for x in (lane.s1, lane.stop))
        return settled

    def _fail_hopeless(self, lane: Lane, ok: Figure, ratio: Figure | None, figures: Tensor | None, h: Figure):
        """Ends the samples whose next step would be too small to move t, and fixed steps that went wrong."""
        m = lane.m
        if self.control.adaptive:
            small = lane.h <= lane.least + abs(lane.s) * self.eps
            if self.problem.dt_min is not None:
                small = small | (m.invert(ok) & (h <= self.problem.dt_min))
            hopeless = lane.live & small
        else:
            hopeless = lane.live & m.invert(ok)
        if not m.count(hopeless):
            return
        infinite = m.invert(m.finite(ratio)) if self.control.adaptive else hopeless
        codes = (self._code(lane, code) for code in (Status.NON_FINITE, Status.STEP_SIZE_UNDERFLOW))
        lane.status = m.where(hopeless, m.where(infinite, *codes), lane.status)
        lane.fail(hopeless, self.attempts, figures, h)
        lane.unfinished = m.count(lane.live)

    @staticmethod
    def _code(lane: Lane, code: Status) -> Figure:
        return lane.m.full(int(code), lane.status)

    def _without_rejected(self, lane: Lane, t: Tensor, dt: Tensor, ok: Tensor, step):
        """On a tape, an attempt that overflowed for some samples, made again with these standing still."""
        with torch.no_grad():
            rest = [x[~ok] for x in (step.z, step.error, step.slope_end) if x is not None]
            if all(map(all_finite, rest)):
                return step
        z, slope = lane.safe(ok)
        dt = torch.where(ok, dt, 0.0)
        return self._step(replace(lane, z=z, slope=slope), t, dt, lane.s + dt.abs())

    def _record(self, lane: Lane, t: Tensor, dt: Tensor, s_end: Figure, ok: Figure, everyone: bool, step, figures):
        if not self.problem.recorded:
            return
        snapshot = None
        if self.problem.keep_stages:
            snapshot = lane.tools.solver.snapshot(step.stages).detach().clone()
        history = self.solver.history and not self.taped and self.held is None
        if self.held is not None:
            self.held.add(lane.accepted, lane.rows, ok, lane.z)
        self.records.append(
            Record(
                part=lane.part,
                rows=lane.rows,
                accepted=None if everyone and lane.rows is None else ok,
                t=t,
                dt=dt,
                t_end=lane.signed(s_end),
                z=lane.z if self.held is None else None,
                slope=lane.slope if history else None,
                figures=figures,
                lens=step._replace(slope_end=None, stages=None) if self.taped else None,
                snapshot=snapshot,
            )
        )

    def _collect(self, lane: Lane, h: Figure, s_end: Figure, ok: Figure, step):
        """Evaluates the interpolant at the output times that the accepted steps pass."""
        inside = (lane.interior > lane.s) & (lane.interior <= s_end) & ok
        point, group = inside.nonzero(as_tuple=True)
        if not len(point):
            return
        s, h = (x[group] if isinstance(x, Tensor) else x for x in (lane.s, h))
        theta = (lane.interior[point, group] - s) / h
        solver = lane.tools.solver
        snapshot = solver.snapshot(step.stages)
        if self.problem.joint and inside.shape[1] == 1:
            self.outputs.append((point, None, solver.interpolate(snapshot, theta, None)))
        else:
            sample = group if lane.rows is None else lane.rows[group]
            self.outputs.append((point, sample, solver.interpolate(snapshot, theta, group)))

    # -- stops and events --------------------------------------------------------------------------------------------

    def _set_stops(self, lane: Lane):
        """Where steps have to end before the horizon does, ascending; s1 where a sample has no more."""
        stops = lane.signed(self.problem.stops)
        inside = (stops > lane.s) & (stops < lane.s1)
        s1 = lane.m.tensor(lane.s1, stops)
        stops = torch.where(inside, stops, s1).sort(dim=0).values
        lane.stops = torch.cat([stops, s1[None]])
        lane.stop = lane.m.read(lane.stops[0])

    def _pass_stop(self, lane: Lane, arrived: Figure) -> Figure:
        """Goes on from a stop. Returns the samples that have nothing before them."""
        m, p = lane.m, self.problem
        done = arrived & (lane.s >= lane.s1)
        s = m.tensor(lane.s, self.like)
        passed = (lane.stops <= s).sum(dim=0, keepdim=True).clamp_(max=len(lane.stops) - 1)
        # Samples that failed or ended at an event have no next stop.
        lane.stop = m.minimum(m.read(lane.stops.gather(0, passed)[0]), lane.s1)
        going = arrived & m.invert(done)
        if (p.jumps is None and p.impulses is None) or not m.count(going):
            return done
        t = m.tensor(lane.signed(lane.s), self.like)
        jumped = m.full(False, going)
        if p.jumps is not None:
            jumps = p.jumps if lane.rows is None or p.joint else p.jumps.index_select(1, lane.rows)
            jumped = m.read((jumps == t).any(dim=0)) & going
        if p.impulses is not None:
            lane.z, struck = p.impulses.apply(lane.z, t, lane.rows, m.tensor(going, t))
            lane.tools.judge.advance(False)  # it remembers |z| before the impulse
            jumped = jumped | m.read(struck)
        if m.count(jumped):
            if lane.slope is not None:
                f = p.f(lane.rows, t, m.tensor(lane.signed(lane.stop), t), still=self.still)
                slope = f(f.times(t)[0], lane.z)
                lane.slope = torch.where(jumped[:, None], slope, lane.slope) if isinstance(jumped, Tensor) else slope
                lane.calls = lane.calls + jumped
            if self.switching:
                lane.counter = m.where(jumped, m.full(0, lane.counter), lane.counter)
                if self.solver.restart(lane.part) != lane.part:
                    lane.leaving = lane.leaving | jumped
                else:
                    lane.leaving = lane.leaving & m.invert(jumped)
        return done

    def _detect(self, lane: Lane, t: Tensor, dt: Tensor, s_end: Figure, ok: Figure, step: Step) -> Tensor | None:
        """Finds the events in the accepted steps. Returns which samples end here, [samples], or None."""
        watch, rows, solver = self.watch, lane.rows, lane.tools.solver
        with torch.no_grad():
            after = watch.values(rows, lane.m.tensor(lane.signed(s_end), t), step.z)
            watch.require_numbers(after, ok & ~lane.ended, lane.m.tensor(lane.signed(s_end), t))
            here = watch.crossed(lane.signs, after) & ok & ~lane.ended
            signs = torch.where(
                torch.as_tensor(ok, device=after.device), watch.sign_after(lane.signs, after), lane.signs
            )
            before, lane.signs = lane.signs, signs
            if not bool(here.any()):
                return None
        snapshot, everyone = solver.snapshot(step.stages), torch.arange(len(step.z), device=t.device)

        def state(theta):
            return solver.interpolate(snapshot, theta, everyone)

        with torch.no_grad():
            thetas = torch.ones_like(here, dtype=t.dtype)
            for i in here.any(dim=1).nonzero().flatten().tolist():
                thetas[i] = watch.locate(i, rows, here[i], before[i], state, t, dt)
            # A sample's first terminal event ends it: what comes after it in the step does not happen.
            ending = here & watch.terminal[:, None]
            bound = torch.where(ending, thetas, 2.0).amin(dim=0)
            here = here & (thetas <= bound)
            event, sample = here.nonzero(as_tuple=True)
            theta = thetas[event, sample]
            group = torch.zeros_like(sample) if self.problem.joint else sample
            still = snapshot.detach()
            speed = slope_inside(functools.partial(solver.interpolate, still, rows=sample), theta) / dt[group][:, None]
        steps = lane.m.tensor(lane.accepted, event) if isinstance(lane.accepted, int) else lane.accepted
        self.hits.append(
            (
                event,
                sample if rows is None else rows[sample],
                steps[group],
                theta,
                t[group] + theta * dt[group],
                solver.interpolate(snapshot, theta, sample),
                speed,
                watch.terminal[event] & (theta == bound[sample]),
            )
        )
        return ending.any(dim=0)

    def _end(self, lane: Lane, ended: Tensor) -> Figure:
        """Ends samples at their events. Returns which groups have finished.

        Under joint control a sample stands still beside the others until all have ended.
        """
        lane.ended = lane.ended | ended
        if self.problem.joint:
            self.still = lane.ended
            gone = ended[:, None]
            lane.slope = None if lane.slope is None else torch.where(gone, 0.0, lane.slope)
            lane.past_slopes = None if lane.past_slopes is None else torch.where(gone, 0.0, lane.past_slopes)
            return bool(lane.ended.all())
        lane.s1, lane.stop = (torch.where(ended, lane.s, x) for x in (lane.s1, lane.stop))
        return ended

    def _tell(self, lane: Lane, t: Tensor, dt: Tensor, ok: Figure):
        """Reports an attempt to the observer."""
        layout, observer = self.problem.field.layout, self.problem.observer
        for name, which in (("attempt", lane.live), ("accept", ok), ("reject", lane.live & lane.m.invert(ok))):
            told = getattr(observer, name, None)
            if told is None or not lane.m.count(which):
                continue
            rows = slice(None) if not isinstance(which, Tensor) else which.nonzero().flatten()
            told(t[rows], layout.unpack(lane.z.detach()[rows]), dt[rows])

    # -- the batch ---------------------------------------------------------------------------------------------------

    def _fail_at_start(self, lane: Lane):
        """Ends the samples whose first slope is not finite."""
        m, finite = lane.m, torch.isfinite(lane.slope.detach())
        bad = m.invert(m.read(finite.all()[None] if self.problem.joint else finite.all(dim=1)))
        lane.status = m.where(bad, self._code(lane, Status.NON_FINITE), lane.status)
        lane.h = m.where(bad, m.full(0.0, lane.h), lane.h)
        lane.fail(bad, 0, None, lane.h)
        lane.unfinished = m.count(lane.live)
        if lane.unfinished:
            # Their slopes must not stay on a tape: f is evaluated again, without them if it can be.
            if self.control.per_sample and self.problem.field.can_shrink():
                lane = self._compact(lane)
            t = lane.signed(lane.s)
            if lane.rows is None:
                self.problem.field.fill(t, lane.z)
            lane.slope = lane.tools.f(lane.tools.f.times(t)[0], lane.z)

    def _worth_compacting(self, lane: Lane) -> bool:
        return (
            self.control.per_sample
            and lane.unfinished <= _COMPACT_FRACTION * lane.s.shape[0]
            and self.attempts - lane.tools.since > _COMPACT_AFTER
            and self.problem.field.can_shrink()
        )

    def _compact(self, lane: Lane) -> Lane:
        self.parts.append(lane.keep((~lane.live).nonzero().flatten()))
        staying = lane.live.nonzero().flatten()
        smaller = self._enter(lane.keep(staying), lane.tools.solver.carried(lane.tools.memory, staying))
        self.lanes[self.lanes.index(lane)] = smaller
        return smaller

    def _regroup(self):
        """Moves the samples that go on with another method to its lane."""
        # All lanes are parted before any is joined: at one attempt, samples may leave in both directions.
        moving = [moved for lane in list(self.lanes) if (moved := self._leaving(lane)) is not None]
        for moved in moving:
            moved.part, moved.counter = 1 - moved.part, moved.m.full(0, moved.counter)
            there = next((x for x in self.lanes if x.part == moved.part), None)
            moved = self._prepared(self._enter(moved))
            if there is not None:
                self.lanes.remove(there)
                unfinished = there.unfinished + moved.unfinished
                moved = self._enter(there.join(moved))
                moved.unfinished = unfinished
            self.lanes.append(moved)

    def _leaving(self, lane: Lane) -> Lane | None:
        """The samples that leave a lane, taken out of it; or None."""
        leaving = None if lane.leaving is None else lane.leaving & lane.live
        lane.leaving = None
        if leaving is None or not (count := lane.m.count(leaving)):
            return None
        self.lanes.remove(lane)
        if count == lane.unfinished and (not isinstance(leaving, Tensor) or bool(leaving.all())):
            return lane
        self.lanes.append(self._enter(lane.keep((~leaving).nonzero().flatten())))
        self.lanes[-1].unfinished = lane.unfinished - count
        moved = lane.keep(leaving.nonzero().flatten())
        moved.unfinished = count
        return moved

    def _prepared(self, lane: Lane) -> Lane:
        """A lane with the slope that its method starts from, or without one."""
        if not lane.tools.solver.fsal:
            lane.slope = None
        elif lane.slope is None:
            f, t = lane.tools.f, lane.m.tensor(lane.signed(lane.s), self.like)
            lane.slope = f(f.times(t)[0], lane.z)
            lane.calls = lane.calls + lane.live
        return lane

    # -- the result --------------------------------------------------------------------------------------------------

    def _trajectory(self) -> Trajectory:
        # The first step's automatic size costs an evaluation, and so does the slope at the start where the first step
        # has no use for it, or has one for the slope at its end as well.
        first = self.solver.parts[0]
        extra = (self.problem.dt0 is None) + (first.fsal or self.close or first.linearizes)
        if self.problem.noisy:  # the diffusion at both points of the first step's size; no step is closed
            extra = 3 * (self.problem.dt0 is None)
        hits = self._hits()
        interior = self._interior(len(self.z0), hits)
        if self.held is not None:
            self.held.finish()
        return Trajectory(self.problem, self.z0, self.parts, self.records, interior, extra, hits, self.held)

    def _hits(self) -> Hits | None:
        """The occurrences of all events, by event and then by time."""
        if not self.hits:
            return None
        event, sample, step, theta, t, z, speed, terminal = (torch.cat(x) for x in zip(*self.hits, strict=True))
        # Found in the order of the steps; a sample has a step, and an event in it, once.
        rows, counts = torch.empty_like(event), []
        for i in range(len(self.watch.events)):
            here = (event == i).nonzero().flatten()
            here = here[torch.argsort(step[here], stable=True)]
            here = here[torch.argsort(sample[here], stable=True)]
            number = torch.bincount(sample[here], minlength=len(self.z0))
            first = (number.cumsum(0) - number)[sample[here]]
            rows[here] = torch.arange(len(here), device=here.device) - first + sum(counts)
            counts.append(int(number.max()))
        self._at_hits = z
        return Hits(rows, sample, step, theta, t, speed, terminal, counts)

    def _interior(self, batch: int, hits: Hits | None) -> Tensor | None:
        """The outputs inside the horizon, and below them a row for every occurrence of an event."""
        times = 0 if self.problem.interior is None else len(self.problem.interior)
        points = times + (sum(hits.rows) if hits is not None else 0)
        if self.problem.interior is None and hits is None:
            return None
        features = self.z0.shape[1]
        out = self.z0.new_full((points, batch, features), float("nan"))
        outputs = self.outputs if hits is None else [*self.outputs, (times + hits.row, hits.sample, self._at_hits)]
        if not outputs:
            return out
        everyone = torch.arange(batch, device=self.z0.device)
        point = torch.cat([p if s is not None else p.repeat_interleave(batch) for p, s, _ in outputs])
        sample = torch.cat([s if s is not None else everyone.repeat(len(p)) for p, s, _ in outputs])
        values = torch.cat([v.reshape(-1, features) for _, _, v in outputs])
        return out.index_put((point, sample), values)
