"""Continuous adjoints: differentiate, then discretise. The adjoint equation is itself solved, backwards in time.

For dz/dt = f(t, z, θ), a loss that looks at z at some times, and a = ∂loss/∂z(t),

    da/dt = -aᵀ ∂f/∂z,    a jumps by the loss's own gradient at every time it looks at,    dloss/dθ = ∫ aᵀ ∂f/∂θ dt.

The backward solve is an ordinary one: the same loop, solvers and step control, with a's jumps as impulses at stops.
What differs between the adjoints is where z comes from: from the backward solve itself ("backsolve"), or from the
forward one's dense output ("interpolating", "quadrature").

Parameters are shared by the samples, so the integral over them is no part of the state, which has a row per sample:
every accepted step adds its part by Gauss quadrature of the solver's own interpolant, summed over the samples by the
one vector-Jacobian product that has it. Nothing of the size [batch, parameters] is ever made.

Source: Pontryagin et al. 1962; Chen et al. 2018, "Neural Ordinary Differential Equations", appendix B; Kidger et al.
2021, "Hey, that's not an ODE", for leaving the parameters out of the error test; Kim et al. 2021, "Stiff Neural
Ordinary Differential Equations", for quadrature adjoints.
"""

from __future__ import annotations

import abc
import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from .. import control as _control
from .. import solvers, transforms
from ..control import Norm, StepControl
from ..discover import discover
from ..errors import NeuralDEError, Status, failure
from ..field import Field, full_precision, instants, reachable
from ..graph import without_gradient
from ..problem import Problem, Tally
from ..solvers import Foreign, Solver
from ..trajectory import Counts, Trajectory
from .base import Adjoint, Outcome, packed, plain, states_of
from .binomial import limited
from .dependencies import Dependencies, added, complain_of_change
from .stochastic import StochasticBackward


class Continuous(Adjoint):
    """What the continuous adjoints have in common.

    Args:
        rtol, atol: tolerances of the backward solve; None takes the solve's own. The adjoint is scaled to the size of
            the loss's gradient before it meets atol, so that gradients don't depend on the loss's unit. A norm of the
            solve's control measures the costate as it measures z.
        solver: of the backward solve; None takes the solve's own.
        dt0: step size of a fixed-step `solver`, first step of an adaptive one; None takes over from the solve.
        max_steps: attempts of the backward solve; None allows 4 times the solve's own `max_steps`.
    """

    exact = False

    def __init__(
        self,
        *,
        rtol: float | None = None,
        atol: float | None = None,
        solver: str | Solver | None = None,
        dt0: float | None = None,
        max_steps: int | None = None,
    ):
        self.rtol = None if rtol is None else _control.check_tolerance("rtol", rtol)
        self.atol = None if atol is None else _control.check_tolerance("atol", atol)
        self.solver = None if solver is None else solvers.for_ode(solver)
        self.dt0, self.max_steps = _control.number("dt0", dt0), _control.number("max_steps", max_steps)
        _control.check_sizes(self.dt0)
        if self.max_steps is not None:
            _control.check_max_steps(self.max_steps)

    def solve(self, problem: Problem, z0: Tensor) -> Outcome:
        """See `Adjoint.solve`."""
        problem = limited(problem, self.keep)
        if not torch.is_grad_enabled():
            return plain(discover(problem, z0, problem.field.first(problem.first_instant, z0, problem.end)))
        uses = Dependencies(problem, z0, self.name)
        if not (z0.requires_grad or uses.tensors):
            return plain(discover(problem, z0, uses.slope))
        run = _Run(self, problem, uses, self._plan(problem, z0, uses))
        final, interior, states = _Solve.apply(run, z0, *uses.tensors)
        outcome = plain(run.trajectory)
        outcome.final, outcome.interior = final, interior
        outcome.backward = lambda: run.backward
        if states is None:
            others = "'checkpointed'" if problem.noisy else "'interpolating' or 'checkpointed'"
            message = _LOST.format(adjoint=self, others=others)
            outcome.lost = functools.partial(without_gradient, like=final, message=message)
        else:
            outcome.states = packed(states, run.trajectory)
        for name in ("error", "stiffness"):
            figure = getattr(outcome, name)
            if figure is not None:
                setattr(outcome, name, functools.partial(_unreachable, figure, final, self.name))
        return outcome

    @property
    def keep(self) -> int | None:
        """How many of the solve's states are kept, None for all: see `Problem.keep`."""
        return None

    @abc.abstractmethod
    def sweep(self, work: Backward) -> Tensor:
        """Solves backwards.

        Returns:
            The costate at the samples' starts, [batch, features]; the parameters' gradients are in `work`.
        """

    def require(self, solver: Solver, control: StepControl, dt0: float | None) -> None:
        """See `Adjoint.require`."""
        self._method(solver, control, dt0)

    def _method(self, solver: Solver, control: StepControl, dt0: float | None) -> tuple[Solver, bool, float | None]:
        """(the solver of the backward solve, whether its steps are adaptive, their size or the first one's).

        Args:
            solver, control, dt0: of the solve.
        """
        # A solver of torchdyn's may be made for states of one size (a hypersolver's network is).
        inherited = solvers.get("tsit5") if isinstance(solver, Foreign) else solver
        chosen = self.solver or inherited
        own = (self.rtol, self.atol, self.solver) != (None, None, None) or chosen is not solver
        adaptive = chosen.adaptive and (control.adaptive or (own and self.dt0 is None))
        if adaptive or self.dt0 is not None:
            return chosen, adaptive, self.dt0
        if dt0 is None or control.adaptive:
            raise ValueError(
                f"dt0 is needed for the backward solve of adjoint {self!r}: its solver {chosen.name!r} takes fixed "
                f"steps; pass {type(self).__name__}(dt0=...), or an adaptive solver"
            )
        return chosen, adaptive, dt0

    def messages(self, plan: Plan) -> dict[Status, str]:
        """What is said of a backward solve that failed: what it usually means and what to try."""
        make, fixed = f"nde.adjoints.{type(self).__name__}", not plan.control.adaptive
        size = "its steps larger (dt0=...)" if fixed else "its tolerances looser (rtol=..., atol=...)"
        way_out = "or use adjoint='checkpointed' or 'direct', which have no backward solve"
        return {
            Status.MAX_STEPS: (
                f"the backward solve's max_steps={plan.max_steps} ran out. It is the adjoint's own, 4 times that of "
                f"the solve by default: raise it, {make}(max_steps=...), make {size}, {way_out}"
            ),
            Status.STEP_SIZE_UNDERFLOW: (
                "the adjoint equation has f's derivative in it, which may jump where f does not (pass jump_times), or "
                f"its tolerances are below the state's precision: make them larger, {make}(rtol=..., atol=...), "
                f"{way_out}"
            ),
            Status.NON_FINITE: (
                "the adjoint equation has f's derivative in it, and that, or the costate, became NaN or infinite. Look "
                "at f's derivative near that t: of a square root or a norm at 0 it is infinite. Or use "
                "adjoint='checkpointed' or 'direct', which need it at the stages of the solve alone"
            ),
        }

    def _plan(self, problem: Problem, z0: Tensor, uses: Dependencies) -> Plan:
        """How the backward solve is made."""
        if reachable(problem.solver):
            raise ValueError(
                f"solver {problem.solver.name!r} has parameters of its own, which can't get gradients under "
                f"adjoint={self.name!r}: the adjoint equation knows the solution, not how it was made; use "
                "adjoint='checkpointed' or 'direct', or, if the solver is not to learn, its networks' "
                "requires_grad_(False)"
            )
        solver, adaptive, dt0 = self._method(problem.solver, problem.control, problem.dt0)
        if solver.linearizes and not problem.solver.linearizes:
            problem.field.linearized(problem.first_instant, z0.detach(), uses.slope)
        norm = problem.norm
        norm = Norm(
            rtol=norm.rtol if self.rtol is None else self.rtol,
            atol=norm.atol if self.atol is None else self.atol,
            joint=norm.joint,
            measure=norm.measure,
        )
        control = replace(problem.control, adaptive=adaptive, norm=None)
        return Plan(solver, control, norm, dt0, self.max_steps or 4 * problem.max_steps)


_LOST = (
    "adjoint {adjoint} does not keep the states of the steps, so what is made from them, solution(t), steps.z or a "
    "figure of introspection.measure, has no gradient; give solve the times that you need in t, or use "
    "adjoint={others} without checkpoints, or 'direct'"
)


class Plan(NamedTuple):
    """How a backward solve is made: with what solver, step control, error norm, step sizes and budget."""

    solver: Solver
    control: StepControl
    norm: Norm
    dt0: float | None
    max_steps: int
    dt_min: float | None = None
    dt_max: float | None = None


class _Run:
    """What the forward and the backward pass share beside tensors."""

    def __init__(self, adjoint: Continuous, problem: Problem, uses: Dependencies, plan: Plan):
        self.adjoint, self.problem, self.uses, self.plan = adjoint, problem, uses, plan
        self.trajectory: Trajectory | None = None
        self.backward: Counts | None = None  # what the last backward pass cost


class _Solve(torch.autograd.Function):
    @staticmethod
    def forward(ctx, run: _Run, z0: Tensor, *tensors: Tensor):
        trajectory = run.trajectory = discover(run.problem, z0, run.uses.slope)
        states = states_of(trajectory) if run.problem.keep is None else None
        # Aliases: an output that is itself kept by the run would tie the run, its graph and the outputs in a cycle.
        out = [None if x is None else x.detach() for x in (trajectory.final, trajectory.interior)]
        # Saved too, so that autograd finds out if somebody changes them in place: the backward solve starts from them.
        ctx.save_for_backward(z0, *out, *tensors)
        ctx.set_materialize_grads(False)
        ctx.run = run
        return *out, states

    @staticmethod
    def backward(ctx, *cotangents):
        z0, *_ = ctx.saved_tensors
        run = ctx.run
        if torch.is_grad_enabled():
            raise NeuralDEError(
                f"gradients under adjoint={run.adjoint.name!r} come from a solve and have no derivatives of their own; "
                "for double backward (create_graph=True) use adjoint='direct' or 'checkpointed'"
            )
        if any(transforms.batched(x) for x in cotangents if x is not None):
            raise NeuralDEError(
                "several gradients at once (is_grads_batched=True, jacobian(vectorize=True)) can't go through the "
                f"backward solve of adjoint={run.adjoint.name!r}; use adjoint='checkpointed' or 'direct' (under "
                "torch.func.vmap 'direct' alone), or take them one after the other"
            )
        run.uses.require_same_f()
        with full_precision(z0.device), run.uses.followed():
            kind = StochasticBackward if run.problem.noisy else Backward
            work = kind(run.adjoint, run.problem, run.uses, run.plan, run.trajectory, z0)
            gradients = work.run(*cotangents)
        run.backward = work.counts
        return None, *gradients


class Looks(NamedTuple):
    """Where the loss looks at the solution.

    Attributes:
        t: the times, [looks]. sample: whose, [looks]. value: the loss's gradient there, [looks, features].
    """

    t: Tensor
    sample: Tensor
    value: Tensor

    def only(self, which: Tensor) -> Looks:
        """Some of them, [looks] bool."""
        return Looks(*(x[which] for x in self))

    def onto(self, costate: Tensor) -> Tensor:
        """A costate [batch, features] with these added."""
        return costate.index_add(0, self.sample, self.value)


class Backward:
    """One backward pass: what the loss's gradients do to the costate, and the sums for the parameters.

    Attributes:
        adjoint, problem, plan, trajectory, grid: of the solve. z0: [batch, features].
        joint: whether all samples step together. direction: of the solve in t, +1 or -1, [groups].
        looks: of the loss, scaled; those at the starts excepted. seen: the states at those inside the horizon, or None.
    """

    def __init__(self, adjoint, problem: Problem, uses: Dependencies, plan: Plan, trajectory: Trajectory, z0: Tensor):
        self.adjoint, self.problem, self.uses, self.plan = adjoint, problem, uses, plan
        # Without its graph: what is behind z0 is the business of the backward pass around this one.
        self.trajectory, self.grid, self.z0 = trajectory, trajectory.grid, z0.detach()
        self.joint, self.direction = problem.joint, problem.span.sign()
        self.field, self.ends, self._substitute = uses.ends()
        self.sums: list[Tensor | None] = [None] * len(self.ends)
        self.seen: Looks | None = None
        zero = torch.zeros(len(z0), dtype=torch.int64, device=z0.device)
        self.counts = Counts(*[zero] * len(Counts._fields))

    def run(self, final: Tensor | None, interior: Tensor | None, states: Tensor | None) -> list[Tensor | None]:
        """The gradients of z0 and of the tensors that f depends on, from the outputs' cotangents."""
        batch = len(self.z0)
        looks = self._looks(final, interior, states)
        # A loss that overflowed (a GradScaler looks out for that) has the gradient it has; there is nothing to solve.
        lost = torch.zeros(batch, dtype=torch.bool, device=self.z0.device)
        lost[looks.sample[~torch.isfinite(looks.value).all(dim=1)]] = True
        looks = looks.only(~lost[looks.sample])
        unit = self._unit(looks)
        looks = looks._replace(value=looks.value / unit[looks.sample][:, None])
        start = self._of(self.problem.start)
        first = looks.t == start[looks.sample]
        self.unit, self.looks = unit, looks.only(~first)
        costate = torch.zeros_like(self.z0)
        if len(self.looks.t):
            with self._substitute():
                self._require_same_slope()
                self._require_no_other()
                costate = self.adjoint.sweep(self)
            self.uses.require_all(self.sums)
        else:  # nothing depends on what f depends on, but in the graph it is: it has a gradient of zero, not none
            self.sums = [torch.zeros_like(x) for x in self.ends]
        costate = looks.only(first).onto(costate) * unit[:, None]
        if bool(lost.any()):
            costate = torch.where(lost[:, None], float("nan"), costate)
            if self.ends:  # and so has whatever f depends on
                time = self.field.times(self.problem.first_instant)[0]
                self.add(None, At(time, self.problem.start, None), self.z0, torch.where(lost[:, None], costate, 0.0))
        return [costate, *self.sums]

    # -- what the loss wants -----------------------------------------------------------------------------------------

    def _looks(self, final: Tensor | None, interior: Tensor | None, states: Tensor | None) -> Looks:
        """The cotangents that are not zero."""
        trajectory, problem, batch = self.trajectory, self.problem, len(self.z0)
        everyone = torch.arange(batch, device=self.z0.device)
        found = []
        if final is not None:
            done = (trajectory.status == Status.SUCCESS) & _nonzero(final)
            found.append(Looks(self._of(problem.end), everyone, final).only(done))
        if interior is not None:
            times = [] if problem.interior is None else [problem.interior.expand(-1, batch)]
            if trajectory.hits is not None:
                hits = trajectory.hits
                rows = problem.start.new_full((sum(hits.rows), batch), float("nan"))
                times.append(rows.index_put((hits.row, hits.sample), hits.t))
            times = torch.cat(times)
            # What was not reached is NaN, whatever the loss makes of it.
            there = (times * self.direction <= trajectory.reached * self.direction) & _nonzero(interior)
            point, sample = there.nonzero(as_tuple=True)
            found.append(Looks(times[point, sample], sample, interior[point, sample]))
            self.seen = found[-1]._replace(value=trajectory.interior[point, sample])
        if states is not None:
            value, t = self.grid.pad(states), self.grid.padded("t").expand(-1, batch)
            step, sample = (_nonzero(value) & self.grid.mask).nonzero(as_tuple=True)
            found.append(Looks(t[step, sample], sample, value[step, sample]))
        if not found:
            return Looks(problem.start[:0], everyone[:0], self.z0[:0])
        return Looks(*(torch.cat(x) for x in zip(*found, strict=True)))

    def _unit(self, looks: Looks) -> Tensor:
        """A power of two of the size of the loss's gradient, [batch]; one for all under joint control."""
        size = looks.value.abs().amax(dim=1)
        largest = size.new_zeros(len(self.z0)).scatter_reduce(0, looks.sample, size, "amax")
        if self.joint:
            largest = largest.max().expand_as(largest)
        return torch.ldexp(torch.ones_like(largest), torch.where(largest > 0, torch.frexp(largest).exponent, 0))

    def _of(self, x: Tensor) -> Tensor:
        """A figure of groups as one of samples, [batch]."""
        return x.expand(len(self.z0))

    def _require_same_slope(self):
        """Makes sure that f still is what it was in the solve, by its value at the start."""
        again = self.field(self.field.times(self.problem.first_instant)[0], self.z0).detach()
        self._require_same(again, self.uses.slope)

    def _require_same(self, again: Tensor, slope: Tensor):
        known = torch.isfinite(slope)
        off = torch.where(known, again - slope, 0.0).abs().max()
        if bool(off > torch.finfo(slope.dtype).eps ** 0.5 * torch.where(known, slope, 0.0).abs().max()):
            complain_of_change(self.uses.adjoint)

    def _require_no_other(self):
        """Makes sure that f is what it was where the solve ended, and that nothing was missed that wants a gradient."""
        z, t = self.trajectory.final.detach().requires_grad_(), self.problem.before(self.problem.end)

        def slope():
            with torch.inference_mode(False), torch.enable_grad():
                return [self.field(self.field.times(t)[0], z)]

        found = slope()
        self.uses.require_no_other(found, [z, *self.ends], slope)
        known = self.trajectory.slope
        if known is not None and self.trajectory.complete and self.trajectory.hits is None:
            self._require_same(found[0].detach(), known)

    # -- the backward solve --------------------------------------------------------------------------------------------

    def integrate(
        self,
        field: AdjointField,
        begin: Tensor,
        end: Tensor,
        costate: Tensor,
        z: Tensor | None = None,
        stops: Tensor | None = None,
        jumps: Tensor | None = None,
        resets: Looks | None = None,
        tally: Callable[[AdjointField], Tally] | None = None,
    ) -> Tensor:
        """Solves the adjoint equation from `begin` to `end`, taking in what the loss looks at on the way.

        Args:
            field: the adjoint equation.
            begin, end: [batch] ([1] under joint control); a sample for which they are equal is left alone.
            costate: at `begin`, [batch, features]. z: the state there, where the equation has it as well.
            stops: times at which steps have to end, [points, groups]; None: those of the solve.
            jumps: likewise, and the equation jumps there.
            resets: what z is known to be at some times.
            tally: makes what computes the parameters' gradients along the way.

        Returns:
            The costate at `end`, [batch, features], with what the loss looks at there.
        """
        rows = None
        if not self.joint:
            moving = begin != end
            rows = None if bool(moving.all()) else moving.nonzero().flatten()
            if rows is not None and not len(rows):
                return costate
        elif bool(begin == end):
            return costate

        def between(looks: Looks) -> Looks:
            side, at = self._of(self.direction)[looks.sample], looks.sample
            t = looks.t * side
            return looks.only((t < self._of(begin)[at] * side) & (t > self._of(end)[at] * side))

        field = field.on(rows)
        impulses = Impulses(field, between(self.looks), resets and between(resets), rows, self.joint)
        p, plan = self.problem, self.plan

        def pick(x, dim=0):
            return x if x is None or rows is None else x.index_select(dim, rows)

        jumps = [pick(x, 1) for x in (p.jumps, jumps) if x is not None]
        stops = p.stops if stops is None else stops
        stops = [pick(x, 1) for x in (stops,) if x is not None] + jumps + impulses.stops()
        problem = Problem(
            field=field,
            solver=plan.solver,
            control=plan.control,
            times=torch.stack([pick(begin), pick(end)]),
            norm=field.norm(plan.norm.on(rows)),
            dt0=pick(self._first_size(begin)) if plan.dt0 is None else plan.dt0,
            max_steps=plan.max_steps + sum(len(x) for x in stops),
            dt_min=plan.dt_min,
            dt_max=plan.dt_max if plan.dt_max is not None or not plan.control.adaptive else p.dt_max,
            keep_stages=False,
            recorded=False,
            jumps=torch.cat(jumps) if jumps else None,
            stops=torch.cat(stops) if stops else None,
            impulses=impulses if len(impulses) else None,
            tally=tally(field) if tally is not None and self.ends else None,
        )
        state = field.join(pick(z), pick(costate))
        with torch.no_grad():
            slope = field(field.times(problem.first_instant)[0], state)
        trajectory = discover(problem, state, slope)
        if not trajectory.complete:
            raise self._failure(trajectory, rows)
        everyone = torch.arange(len(costate), device=costate.device) if rows is None else rows
        pairs = zip(self.counts, trajectory.counts, strict=True)
        self.counts = Counts(*(total.index_add(0, everyone, more.expand(len(everyone))) for total, more in pairs))
        found = field.unpack(trajectory.final)
        costate = found if rows is None else costate.index_copy(0, rows, found)
        ahead, reach = (self._of(x)[self.looks.sample] for x in (begin, end))
        return self.looks.only((self.looks.t == reach) & (reach != ahead)).onto(costate)

    def latest(self) -> Tensor:
        """Where the loss looks at every sample last, [groups]; at its start where it does not."""
        side, first = self._of(self.direction), self._of(self.problem.start * self.direction)
        s = first.scatter_reduce(0, self.looks.sample, self.looks.t * side[self.looks.sample], "amax")
        return (s.amax(dim=0, keepdim=True) if self.joint else s) * self.direction

    def _first_size(self, begin: Tensor) -> Tensor | None:
        """The size of the step that the solve made at the time where the backward solve begins, [groups]."""
        if not len(self.grid):
            return None
        step, _ = self.grid.locate(begin[None], self.direction)
        return self.grid.padded("dt").gather(0, step)[0].abs()

    def _failure(self, trajectory: Trajectory, rows: Tensor | None) -> NeuralDEError:
        problem, batch = trajectory.problem, len(self.z0)
        figures = [trajectory.status, trajectory.reached, *trajectory.last_attempt()]
        if rows is not None:  # samples are known by their places in the whole batch
            figures = [x if x is None else x.new_zeros(batch).index_copy(0, rows, x) for x in figures]
        figures = (x if x is None else x.expand(batch) for x in figures)
        messages = self.adjoint.messages(self.plan)
        error = failure(*figures, self.joint, problem.solver.name, problem.solver.stability_size, messages)
        error.args = (f"the backward solve of adjoint={self.adjoint.name!r} failed: {error}",)
        return error

    # -- the parameters ------------------------------------------------------------------------------------------------

    def add(self, rows: Tensor | None, at: At, z: Tensor, cotangent: Tensor):
        """Adds cotangentᵀ·∂f/∂θ at one instant of every sample, summed over the samples, to the parameters' gradients.

        Args:
            rows: which samples, in the whole batch. z, cotangent: [samples, features].
        """
        cotangent = cotangent * (self.unit if rows is None else self.unit.index_select(0, rows))[:, None]
        with torch.inference_mode(False), torch.enable_grad():
            slope = self.field.on(rows)(at.time, z)
            if not slope.requires_grad:
                return
            found = torch.autograd.grad(slope, self.ends, cotangent, allow_unused=True)
        self.sums = added(self.sums, found)


class Impulses:
    """The loss's gradients, as jumps of the costate; and known states, as those of z.

    Args:
        field: the adjoint equation, which knows where both lie in its state.
        looks: what to add. resets: what z is, or None; samples as in the whole batch.
        rows: the samples of the backward solve, None for all. joint: whether they step together.
    """

    def __init__(self, field: AdjointField, looks: Looks, resets: Looks | None, rows: Tensor | None, joint: bool):
        self.field, self.joint, self.batch = field, joint, field.batch
        self.looks, self.resets = (None if x is None else _renumbered(x, rows) for x in (looks, resets))

    def __len__(self) -> int:
        return len(self.looks.t) + (0 if self.resets is None else len(self.resets.t))

    def stops(self) -> list[Tensor]:
        """The times, as stops of the backward solve, [points, groups] each."""
        both = [x for x in (self.looks, self.resets) if x is not None and len(x.t)]
        return [x.t.unique()[:, None] if self.joint else _padded(x, self.batch) for x in both]

    def apply(self, z: Tensor, t: Tensor, rows: Tensor | None, arrived: Tensor) -> tuple[Tensor, Tensor]:
        """See `problem.Impulses`."""
        now = torch.where(arrived, t, float("nan"))
        if rows is not None:
            now = now.new_full((self.batch,), float("nan")).index_copy(0, rows, now)
        now, struck = now.expand(self.batch), torch.zeros_like(arrived)
        for known, change in ((self.looks, self.field.struck), (self.resets, self.field.known)):
            if known is None:
                continue
            here = known.only(known.t == now[known.sample])
            if len(here.t):
                sample = here.sample if rows is None else torch.searchsorted(rows, here.sample)
                z = change(z, sample, here.value)
                struck = struck.index_fill(0, sample if len(struck) > 1 else sample * 0, True)
        return z, struck


def _renumbered(looks: Looks, rows: Tensor | None) -> Looks:
    return looks if rows is None else looks._replace(sample=torch.searchsorted(rows, looks.sample))


def _padded(looks: Looks, batch: int) -> Tensor:
    """The times of every sample as a column, [points, batch], inf where there are no more."""
    order = torch.argsort(looks.sample, stable=True)
    sample = looks.sample[order]
    counts = torch.bincount(sample, minlength=batch)
    place = torch.arange(len(order), device=order.device) - (counts.cumsum(0) - counts)[sample]
    out = looks.t.new_full((int(counts.max()), batch), float("inf"))
    return out.index_put((place, sample), looks.t[order])


class At(NamedTuple):
    """An instant as the adjoint equation takes it.

    Attributes:
        time: as f takes it. t: the same, [groups].
        z: the forward solution there, [samples, features], or None where the equation's own state has it.
    """

    time: Any
    t: Tensor
    z: Tensor | None


class AdjointField:
    """The adjoint equation, as the loop steps a field: d(z, a)/dt = (f, -aᵀ∂f/∂z), or the latter alone.

    Args:
        field: f, of the whole batch.
        features: of z.
        forward: the forward solution, or None where the state has z itself.
        rows: the samples, in the whole batch; None for all.
        wakes: under joint control, where samples that ended before the others come in: times [batch] and the sign of
            the backward solve's direction, or None.
    """

    def __init__(self, field: Field, features: int, forward=None, rows: Tensor | None = None, wakes=None):
        self.field, self.features, self.forward, self.rows, self.wakes = field, features, forward, rows, wakes
        self.part, self.joint, self.equation, self.layout = field.on(rows), field.joint, field.equation, field.layout
        self.batch = field.layout.batch if rows is None else len(rows)

    @property
    def calls(self) -> int:
        """Batched evaluations of f so far."""
        return self.field.calls

    def on(self, rows: Tensor | None) -> AdjointField:
        """The equation for some of its samples."""
        if rows is None:
            return self
        rows = rows if self.rows is None else self.rows.index_select(0, rows)
        return AdjointField(self.field, self.features, self.forward, rows, self.wakes)

    def can_shrink(self) -> bool:
        """See `Field.can_shrink`."""
        return self.field.can_shrink()

    def fill(self, t: Tensor, z: Tensor) -> None:
        """f keeps the filler of the forward solve: states that it is known to handle."""

    def times(self, t: Tensor, c: Tensor | None = None, dt: Tensor | None = None) -> list[At]:
        """See `Field.times`."""
        return self.shaped(instants(t, c, dt))

    def shaped(self, stack: Tensor) -> list[At]:
        """See `Field.shaped`."""
        times = self.part.shaped(stack) if self.equation.takes_time else [None] * len(stack)
        states = [None] * len(stack) if self.forward is None else self.forward.at(stack, self.rows)
        return [At(*x) for x in zip(times, stack, states, strict=True)]

    def __call__(self, at: At, state: Tensor) -> Tensor:
        """d(z, a)/dt or da/dt, [samples, features of the state]."""
        z, costate = self.parts(at, state)
        slope, (back,) = self.pull(at, z, costate)
        return -back if at.z is not None else torch.cat([slope, -back], dim=1)

    def pull(self, at: At, z: Tensor, costate: Tensor, ends: Sequence[Tensor] = ()) -> tuple[Tensor, list[Tensor]]:
        """f and costateᵀ·∂f/∂(z, *ends); on the tape where grad mode is on, for a solver that takes Jacobians."""
        taped = torch.is_grad_enabled()
        with torch.inference_mode(False), torch.enable_grad():
            z = z if taped and z.requires_grad else z.detach().requires_grad_()
            slope, inputs = self.part(at.time, z), [z, *ends]
            found = [None] * len(inputs)
            if slope.requires_grad:
                found = torch.autograd.grad(slope, inputs, costate, create_graph=taped, allow_unused=True)
        back, *rest = [torch.zeros_like(x) if g is None else g for x, g in zip(inputs, found, strict=True)]
        slope = slope if taped else slope.detach()
        if self.wakes is not None:
            t, sign = self.wakes
            awake = ((at.t - t) * sign > 0)[:, None]
            slope, back = torch.where(awake, slope, 0.0), torch.where(awake, back, 0.0)
        return slope, [back, *rest]

    # -- where things lie in the state ---------------------------------------------------------------------------------

    def parts(self, at: At, state: Tensor) -> tuple[Tensor, Tensor]:
        """(z, costate) at an instant, each [samples, features]."""
        if at.z is not None:
            return at.z, state
        # f may want its input in one piece.
        return state[:, : self.features].contiguous(), state[:, self.features :]

    def join(self, z: Tensor | None, costate: Tensor) -> Tensor:
        """The state of the backward solve."""
        return costate if z is None else torch.cat([z, costate], dim=1)

    def unpack(self, state: Tensor) -> Tensor:
        """The costate in a state at the end of the backward solve, [samples, features]."""
        return state[:, -self.features :]

    def struck(self, state: Tensor, sample: Tensor, value: Tensor) -> Tensor:
        """The state with something added to the costates of some samples."""
        wide = torch.nn.functional.pad(value, (state.shape[1] - self.features, 0))
        return state.index_add(0, sample, wide)

    def known(self, state: Tensor, sample: Tensor, value: Tensor) -> Tensor:
        """The state with another z for some samples."""
        return state.index_copy(0, sample, torch.cat([value, state[sample, self.features :]], dim=1))

    def norm(self, norm: Norm) -> Norm:
        """How errors of its state are measured, given how those of z are."""
        if self.forward is not None:
            return norm
        twice = [torch.cat([x, x], dim=1) if isinstance(x, Tensor) else x for x in (norm.rtol, norm.atol)]
        both = None if norm.measure is None else self._larger(norm.measure)
        return replace(norm, rtol=twice[0], atol=twice[1], measure=both)

    def _larger(self, measure: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        """The larger of a measure of z and of the costate."""

        def both(scaled: Tensor) -> Tensor:
            z, costate = scaled.split(self.features, dim=1)
            return torch.maximum(measure(z.contiguous()), measure(costate.contiguous()))

        return both


class Gauss:
    """The parameters' integral ∫ aᵀ ∂f/∂θ dt, step by step.

    The quadrature is of the order that the solver's steps or its interpolant have, whichever is less.

    Args:
        work: where the sums are. field: the adjoint equation of the backward solve's samples.
        take: what is done with a node: (samples in the whole batch, instant, z, cotangent) -> None.
    """

    def __init__(self, work: Backward, field: AdjointField, take: Callable[[Tensor | None, At, Tensor, Tensor], None]):
        self.field, self.take, solver = field, take, work.plan.solver
        count = max(1, math.ceil(min(solver.order, solver.interpolant_order + 1) / 2))
        like = work.problem.start
        self.theta, self.weights = (torch.tensor(x, dtype=like.dtype, device=like.device) for x in _gauss(count))

    def add(self, rows: Tensor | None, t: Tensor, dt: Tensor, ok: Tensor, solver: Solver, stages, z: Tensor):
        """See `problem.Tally`."""
        states = solver.interpolate(solver.snapshot(stages), self.theta, None)
        field = self.field.on(rows)
        column = ok[:, None]
        for at, state, weight in zip(field.times(t, self.theta[:, None], dt), states, self.weights, strict=True):
            # A rejected attempt may have overflowed, and zero times infinity is no zero.
            z_here, costate = field.parts(at, torch.where(column, state, z))
            cotangent = costate * torch.where(ok, -weight * dt, 0.0)[:, None].to(costate.dtype)
            self.take(field.rows, at, z_here, cotangent)


@functools.cache
def _gauss(count: int) -> tuple[list[float], list[float]]:
    """Nodes and weights of Gauss-Legendre quadrature on [0, 1]."""
    x, w = np.polynomial.legendre.leggauss(count)
    return ((x + 1) / 2).tolist(), (w / 2).tolist()


def _nonzero(x: Tensor) -> Tensor:
    return (x != 0).any(dim=-1)


def _unreachable(figure: Callable[[], Tensor], final: Tensor, adjoint: str) -> Tensor:
    # Of both figures: a loss may use both, and only one of them is met first.
    return without_gradient(
        figure(),
        [final],
        f"solution.error and solution.stiffness have no gradient under adjoint={adjoint!r}, whose backward solve does "
        "not go through the steps of the solve; use adjoint='checkpointed' or 'direct', or penalties that make a step "
        "of their own: regularizers.LocalError, regularizers.LocalStiffness",
    )
