"""The backsolve adjoint: the solution is solved for again, backwards, together with its costate."""

from __future__ import annotations

import functools
from dataclasses import replace

import torch
from torch import Tensor

from .. import control as _control
from ..control import Norm, StepControl, rms
from ..dense import Dense
from ..equations import SDE
from ..errors import Status
from ..grid import Grid
from ..retrace import Cursor
from ..solvers import Solver
from . import stochastic
from .binomial import limit
from .continuous import AdjointField, At, Backward, Continuous, Gauss, Looks, Plan


class Backsolve(Continuous):
    """Differentiate, then discretise; memory that does not grow with the steps.

    The backward solve begins at the solution's end and recovers z along with the costate. The recovered z drifts from
    the solution: where f contracts forwards it expands backwards. At outputs that the loss looks at it is known, and
    the drift begins anew there. Prefer "checkpointed" where its memory fits: it is exact.

    Args:
        rtol, atol: tolerances of the backward solve, numbers; None takes the solve's own.
        solver: of the backward solve, a name or an object; None takes the solve's own.
        dt0: step size of a fixed-step `solver`, first step of an adaptive one; None takes over from the solve.
        max_steps: attempts of the backward solve; None allows 4 times the solve's own `max_steps`.
        checkpoints: at most how many states of the solve are kept, at equal distances, and given back to z on its way
            back, as those of outputs are. None keeps none.
        seminorm: leave the parameters' integral out of the error test. False puts it in, as torchdiffeq does by
            default: the largest RMS of z's error, the costate's, and each tensor's integral counts. That needs
            control="joint" (no sample has an error of its own there), and as many copies of the parameters as the
            solver has stages.
        control: of the backward solve's steps: a `StepControl` without a norm; None takes the solve's own.
        dt_min, dt_max: bounds of its adaptive steps, see `solve`; None are none.
        step_times: where its steps have to end, [times]; None: where the solve's have to.

    Raises:
        TypeError, ValueError: an option is wrong; the message names it.

    Of an SDE in the sense of Stratonovich it is the stochastic adjoint, under joint control and without options: the
    steps of the solve are made again from the last to the first, with torchsde's adjoint equation and its midpoint
    rule, on the same Brownian paths. Its gradients have an error that falls with the steps; those of
    "reversible_heun", whose steps can be undone, are exact to rounding.

    Source: Chen et al. 2018, "Neural Ordinary Differential Equations"; Kidger et al. 2021, "Hey, that's not an ODE";
    Li et al. 2020, "Scalable gradients for stochastic differential equations".
    """

    name = "backsolve"

    def __init__(
        self,
        *,
        rtol: float | None = None,
        atol: float | None = None,
        solver: str | Solver | None = None,
        seminorm: bool = True,
        checkpoints: int | None = None,
        dt0: float | None = None,
        max_steps: int | None = None,
        control: StepControl | None = None,
        dt_min: float | None = None,
        dt_max: float | None = None,
        step_times=None,
    ):
        super().__init__(rtol=rtol, atol=atol, solver=solver, dt0=dt0, max_steps=max_steps)
        self.checkpoints = limit(checkpoints)
        if not isinstance(seminorm, bool):
            raise TypeError(f"seminorm must be True or False, got {seminorm!r}")
        if control is not None and not isinstance(control, StepControl):
            raise TypeError(f"control must be a StepControl or None, got {type(control).__name__}")
        if control is not None and control.norm is not None:
            raise ValueError("control must have no norm of its own here: the norm of the solve's control is used")
        self.dt_min, self.dt_max = _control.number("dt_min", dt_min), _control.number("dt_max", dt_max)
        _control.check_sizes(self.dt0, self.dt_min, self.dt_max)
        if self.solver is not None and not self.solver.adaptive:
            _control.refuse_bounds(self.dt_min, self.dt_max)
        if step_times is not None:
            step_times = torch.as_tensor(step_times).detach()
            if step_times.dim() != 1 or step_times.is_complex():
                raise ValueError(f"step_times must be real times, [times], got {tuple(step_times.shape)}")
        self.seminorm, self.control, self.step_times = seminorm, control, step_times
        if self.solver is not None:
            self._require_explicit(self.solver)

    def require_noisy(self, equation: SDE, control: StepControl) -> None:
        """See `Adjoint.require_noisy`."""
        stochastic.require(self, equation, control.per_sample)

    @property
    def keep(self) -> int:
        """See `Continuous.keep`."""
        return self.checkpoints or 0

    def require(self, solver: Solver, control: StepControl, dt0: float | None) -> None:
        """See `Adjoint.require`."""
        if self.control is not None and self.control.per_sample is not control.per_sample:
            raise ValueError(f"control must have per_sample={control.per_sample}, as the control of the solve has")
        solver, adaptive, _ = self._method(solver, self.control or control, dt0)
        if not adaptive:
            _control.refuse_bounds(self.dt_min, self.dt_max)
        if control.per_sample and not self.seminorm:
            raise ValueError(
                "seminorm=False puts the parameters' integral into the error test, of which no sample has its own "
                'part: that needs control="joint"; or leave seminorm=True'
            )
        self._require_explicit(solver)

    def _require_explicit(self, solver: Solver) -> None:
        if solver.linearizes and not self.seminorm:
            raise ValueError(f"seminorm=False can't be had with an implicit solver, got {solver.name!r}")

    def messages(self, plan: Plan) -> dict[Status, str]:
        """See `Continuous.messages`."""
        drift = (
            "it solves dz/dt = f backwards, which is unstable where f contracts; use adjoint='interpolating', which "
            "does not, 'checkpointed' or 'direct', which are exact, or tighter tolerances of the solve itself"
        )
        return super().messages(plan) | {Status.STEP_SIZE_UNDERFLOW: drift, Status.NON_FINITE: drift}

    def _plan(self, problem, z0, uses):
        plan = super()._plan(replace(problem, control=self.control or problem.control), z0, uses)
        plan = plan._replace(dt_min=self.dt_min, dt_max=self.dt_max)
        if self.seminorm:
            return plan
        if any(isinstance(x, Tensor) for x in (plan.norm.rtol, plan.norm.atol)) or z0.is_complex():
            raise ValueError(
                "seminorm=False needs a real state and tolerances that are numbers: give Backsolve(rtol=..., atol=...)"
            )
        return plan

    def sweep(self, work: Backward) -> Tensor:
        """See `Continuous.sweep`."""
        t, z, ended = self._arrivals(work)
        last = work.looks.t == work._of(t)[work.looks.sample]
        costate = work.looks.only(last).onto(torch.zeros_like(work.z0))
        if not work.joint:  # a sample that the loss does not look at has nothing to solve for
            seen = torch.zeros(len(z), dtype=torch.bool, device=z.device)
            seen[work.looks.sample] = True
            t = torch.where(seen, t, work.problem.start)
        wakes = jumps = None
        if ended is not None:
            wakes, jumps = (ended, -work.direction), ended.unique()[:, None]
        field, tally = AdjointField(work.field, z.shape[1], wakes=wakes), None
        if self.seminorm or not work.ends:
            tally = functools.partial(Gauss, work, take=work.add)
        else:
            field = _WithParameters(field, work)
        stops = self.step_times
        if stops is not None:
            stops = stops.to(t)[:, None].expand(-1, len(t))
        resets = _known(work.grid, work.seen)
        return work.integrate(field, t, work.problem.start, costate, z, stops, jumps, resets, tally)

    def _arrivals(self, work: Backward):
        """Where the solves of the samples ended, [groups], their states there, and when those before the others did."""
        problem, trajectory, grid = work.problem, work.trajectory, work.grid
        t, z, ended = problem.end, trajectory.final, None
        if not trajectory.complete:
            # Where a solve failed there is no going back from, but there is from where the loss looks at it.
            last = work.latest()
            step, theta = grid.locate(last[None], work.direction)
            with torch.no_grad():
                there = Dense(problem, grid, Cursor(problem, grid, work.z0)).at(step, theta)[0]
            failed = trajectory.status != Status.SUCCESS
            t, z = torch.where(failed, last, t), torch.where(failed[:, None], there, z)
        hits = trajectory.hits
        if hits is not None and bool(hits.terminal.any()):
            last = hits.terminal.nonzero().flatten()
            sample = hits.sample[last]
            points = 0 if problem.interior is None else len(problem.interior)
            z = z.index_copy(0, sample, trajectory.interior[points + hits.row[last], sample])
            when = work._of(t).index_copy(0, sample, hits.t[last])
            if problem.joint:  # there is nothing to solve before the last of them
                t, ended = (when * work.direction).amax(dim=0, keepdim=True) * work.direction, when
            else:
                t = when
        return t, z, ended


def _known(grid: Grid, seen: Looks | None) -> Looks | None:
    """The states that the solve kept, and those where the loss looks."""
    times, everyone = grid.padded("t").expand(-1, grid.batch), torch.arange(grid.batch, device=grid.counts.device)
    found = []
    for j in grid.held.starts:
        there, still = grid.counts > j, grid.still(j)
        # One that stands still at the end of the step with its event in it is beyond the event.
        there = there if still is None else there & ~still
        found.append(Looks(times[j], everyone, grid.held.z[j]).only(there))
    found += [] if seen is None else [seen]
    return Looks(*(torch.cat(x) for x in zip(*found, strict=True))) if found else None


class _WithParameters:
    """The adjoint equation with the parameters' integral in its state: one row for all samples, [1, numbers].

    Args:
        field: the adjoint equation without. work: where the integral goes in the end.
    """

    def __init__(self, field: AdjointField, work: Backward):
        self.field, self.work, self.ends = field, work, work.ends
        self.joint, self.equation, self.layout, self.batch = field.joint, field.equation, field.layout, field.batch
        self.times, self.shaped = field.times, field.shaped
        self.size = 2 * field.features * field.batch

    @property
    def calls(self) -> int:
        """Batched evaluations of f so far."""
        return self.field.calls

    def on(self, rows: None) -> _WithParameters:
        """The equation itself: all samples step together."""
        return self

    def __call__(self, at: At, state: Tensor) -> Tensor:
        """The rate of the state, [1, numbers]."""
        slope, (back, *rest) = self.field.pull(at, *self.field.parts(at, self._inner(state)), self.ends)
        return self._outer(torch.cat([slope, -back], dim=1), [-g for g in rest])

    def _inner(self, state: Tensor) -> Tensor:
        return state[0, : self.size].view(self.batch, -1)

    def _outer(self, inner: Tensor, rest: list[Tensor]) -> Tensor:
        return torch.cat([inner.flatten(), *(x.flatten().to(inner.dtype) for x in rest)])[None]

    def join(self, z: Tensor, costate: Tensor) -> Tensor:
        """See `AdjointField.join`."""
        return self._outer(self.field.join(z, costate), [torch.zeros_like(x) for x in self.ends])

    def unpack(self, state: Tensor) -> Tensor:
        """See `AdjointField.unpack`; the integral goes to the sums."""
        parts = (state[0, self.size :] * self.work.unit[0]).split([x.numel() for x in self.ends])
        self.work.sums = [part.view_as(x).to(x.dtype) for part, x in zip(parts, self.ends, strict=True)]
        return self.field.unpack(self._inner(state))

    def struck(self, state: Tensor, sample: Tensor, value: Tensor) -> Tensor:
        """See `AdjointField.struck`."""
        inner = self.field.struck(self._inner(state), sample, value)
        return torch.cat([inner.view(1, -1), state[:, self.size :]], dim=1)

    def known(self, state: Tensor, sample: Tensor, value: Tensor) -> Tensor:
        """See `AdjointField.known`."""
        inner = self.field.known(self._inner(state), sample, value)
        return torch.cat([inner.view(1, -1), state[:, self.size :]], dim=1)

    def norm(self, norm: Norm) -> Norm:
        """See `AdjointField.norm`."""
        of_inner = self.field.norm(replace(norm, measure=norm.measure or functools.partial(rms, joint=True))).measure
        sizes = [x.numel() for x in self.ends]

        def largest(scaled: Tensor) -> Tensor:
            parts = scaled[:, self.size :].split(sizes, dim=1)
            return torch.cat([of_inner(self._inner(scaled)), *(rms(x, joint=True) for x in parts)]).amax(0, True)

        return replace(norm, measure=largest)
