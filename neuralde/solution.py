"""What a solve gives back."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from . import transforms
from .adjoints.base import Outcome
from .dense import Dense, Stages
from .errors import Status
from .field import full_precision
from .outputs import Outputs
from .problem import Problem
from .retrace import every_state, lookup
from .solvers import SDE_SOLVERS, SOLVERS, Solver


@dataclass(frozen=True)
class Statistics:
    """How much work a solve was.

    Attributes:
        nfe: evaluations of f on each sample, [batch] int64: those of the initial step size and of rejected attempts
            included, those of a replay not.
        accepted, rejected: attempted steps that passed and that failed the error test, [batch] int64.
        function_calls: batched calls of f that the forward solve made; a little more than `nfe` where f was also
            checked, more where samples finish at different steps.
        jacobians, factorizations, linear_solves: of an implicit method, for each sample, [batch] int64; 0 for an
            explicit one.
    """

    nfe: Tensor
    accepted: Tensor
    rejected: Tensor
    function_calls: int
    jacobians: Tensor
    factorizations: Tensor
    linear_solves: Tensor

    def __repr__(self) -> str:
        def show(x):
            low, high = int(x.min()), int(x.max())
            return f"{low}" if low == high else f"{x.double().mean().item():.1f} ({low} to {high})"

        linear = ("jacobians", "factorizations", "linear_solves")
        return (
            f"nfe {show(self.nfe)}, accepted {show(self.accepted)}, rejected {show(self.rejected)}, "
            f"function calls {self.function_calls}"
        ) + "".join(f", {name.replace('_', ' ')} {show(x)}" for name in linear if (x := getattr(self, name)).any())


class Steps:
    """The accepted steps: step j of sample b at [j, b], each sample's packed to the left.

    Attributes:
        t, dt: start and (signed) size of each step, [step, batch]; 0 where `mask` is False.
        mask: whether sample b has a step j, [step, batch].
        z: the state at t, in the structure of z0, every tensor [step, batch, ...].
        part: which of `solution.solver.parts` made the step, [step, batch] int64; 0 but for a method of several parts
            ("auto": 0 is tsit5, 1 is rodas5p).
        error: the embedded error estimate over the tolerance, RMS over the sample (over the batch under joint
            control): what the controller compares with 1. [step, batch], or None where the solver has no estimate.
        stiffness: an estimate of |λ|: ‖f(x) - f(y)‖/‖x - y‖ of two stages at one abscissa; for a method that has f's
            Jacobian, the largest row sum of it. [step, batch], or None.

    `error` and `stiffness` are differentiable under adjoint "direct" and "checkpointed"; t and dt are constants. Where
    the solve did not keep all states, z is made again.
    """

    def __init__(self, problem: Problem, outcome: Outcome, z0: Tensor):
        self._problem, self._outcome, self._z0 = problem, outcome, z0
        self._grid = outcome.trajectory.grid

    def __len__(self) -> int:
        return len(self._grid)

    def __repr__(self) -> str:
        return f"Steps({len(self)} steps, {self._grid.batch} samples)"

    @functools.cached_property
    def t(self) -> Tensor:  # noqa: D102  (documented in the class)
        return self._times("t")

    @functools.cached_property
    def dt(self) -> Tensor:  # noqa: D102
        return self._times("dt")

    def _times(self, name: str) -> Tensor:
        return self._grid.padded(name).expand(-1, self._grid.batch)

    @functools.cached_property
    def mask(self) -> Tensor:  # noqa: D102
        return self._grid.mask

    @functools.cached_property
    def part(self) -> Tensor:  # noqa: D102
        grid = self._grid
        everyone = torch.arange(grid.batch, device=grid.counts.device)
        rows = [grid.part_of(torch.full_like(everyone, j), everyone) for j in range(len(grid))]
        rows = torch.stack(rows) if rows else torch.zeros_like(self.mask, dtype=torch.int64)
        return torch.where(self.mask, rows, 0)

    @functools.cached_property
    def z(self):  # noqa: D102
        flat = self._outcome.from_states(lambda: every_state(self._problem, self._outcome, self._z0))
        return self._problem.field.layout.unpack(self._grid.pad(flat))

    @functools.cached_property
    def error(self) -> Tensor | None:  # noqa: D102
        return self._outcome.error and self._grid.pad(self._outcome.error())

    @functools.cached_property
    def stiffness(self) -> Tensor | None:  # noqa: D102
        return self._outcome.stiffness and self._grid.pad(self._outcome.stiffness())


class Solution:
    """The result of `solve`.

    Attributes:
        ts: output times, [times], or [times, batch] where each sample has its own.
        zs: the states there, in the structure of z0, every tensor [times, batch, ...]. NaN from where a sample failed.
        status: how each sample ended, [batch] int64, values of `Status`.
        events: the `Occurrences` of every event that the solve was given, in their order. From a sample's first
            terminal event on, `zs`, `final` and `solution(t)` hold its state there.
        residual: of a steady state; None for a finite horizon.
        solver, rtol, atol, control: what it was solved with.
    """

    residual: Tensor | None = None

    def __init__(self, problem: Problem, outcome: Outcome, ts: Tensor, found: Outputs, z0_flat: Tensor):
        self._solved(problem, outcome, z0_flat)
        self._stopped, self._held = found.stopped, found.held
        self.ts, self.zs, self.events = ts, problem.field.layout.unpack(found.zs), found.events

    def _solved(self, problem: Problem, outcome: Outcome, z0_flat: Tensor):
        self._problem, self._outcome, self._z0 = problem, outcome, z0_flat
        self._calls = problem.field.calls
        self.solver, self.control = problem.solver, problem.control
        self.rtol, self.atol = problem.norm.rtol, problem.norm.atol

    @functools.cached_property
    def status(self) -> Tensor:  # noqa: D102
        return self._outcome.trajectory.status.expand(self._problem.field.layout.batch)

    @functools.cached_property
    def stats(self) -> Statistics:
        """How much work it was."""
        counts = self._outcome.trajectory.counts
        linear = counts.jacobians, counts.factorizations, counts.linear_solves
        return Statistics(counts.nfe, counts.accepted, counts.rejected, self._calls, *linear)

    @property
    def backward_stats(self) -> Statistics | None:
        """How much work the last backward pass was, under an adjoint that solves an equation backwards; else None.

        `nfe` counts evaluations of the adjoint equation, each of them one of f and one vector-Jacobian product; those
        of the parameters' integral are not among them.
        """
        counts = self._outcome.backward()
        if counts is None:
            return None
        linear = counts.jacobians, counts.factorizations, counts.linear_solves
        return Statistics(counts.nfe, counts.accepted, counts.rejected, int(counts.nfe.max()), *linear)

    @property
    def final(self):
        """The state at the end of the horizon, in the structure of z0."""
        layout = self._problem.field.layout
        if layout.tree is None:
            return self.zs[-1]
        return torch.utils._pytree.tree_map(lambda leaf: leaf[-1], self.zs)

    @property
    def seed(self) -> int | None:
        """That of an SDE's noise, drawn where none was given: with it and the same options, the same solution. None for
        an ODE, and where the noise is not a `BrownianTree`'s.
        """
        return getattr(getattr(self._problem.field, "source", None), "seed", None)

    @property
    def initial(self):
        """The state that the solve started from, in the structure of z0."""
        return self._problem.field.layout.unpack(self._z0)

    @property
    def converged(self) -> Tensor:
        """Which samples reached the end, [batch] bool."""
        return self.status == Status.SUCCESS

    @property
    def usable(self) -> Tensor:
        """Which samples ended with a state that means something, [batch] bool: here, those that converged."""
        return self.converged

    @functools.cached_property
    def t_end(self) -> Tensor:
        """Where each sample's solve ended, [batch]: at t1, at its terminal event, or where it failed. A constant."""
        reached = self._outcome.trajectory.reached.expand(len(self.status))
        return reached if self._stopped is None else torch.where(self._stopped.isfinite(), self._stopped, reached)

    @functools.cached_property
    def steps(self) -> Steps:
        """The accepted steps."""
        return Steps(self._problem, self._outcome, self._z0)

    @property
    def error(self) -> Tensor:
        """Σ_j error_j·|Δt_j|, [batch]: the global error estimate that `regularizers.GlobalError` penalizes.

        Raises:
            ValueError: the solver has no error estimate.
        """
        return self._integral("error")

    @property
    def stiffness(self) -> Tensor:
        """Σ_j stiffness_j·|Δt_j|, [batch]: what `regularizers.GlobalStiffness` penalizes.

        Raises:
            ValueError: the solver has no stiffness estimate.
        """
        return self._integral("stiffness")

    def brownian(self, t) -> Tensor:
        """The Brownian paths that drove an SDE: W(t) - W(t0), [points, batch, channels]. A constant.

        Args:
            t: [points] ascending times on the horizon; or one time, and the answer is [batch, channels].

        Raises:
            ValueError: it was no SDE, or the times do not ascend or are not on the horizon.
        """
        p = self._problem
        if not p.noisy:
            raise ValueError("brownian is for SDEs; this solution is of an ODE")
        t = torch.as_tensor(t, dtype=p.times.dtype, device=p.times.device)
        points = t.reshape(-1) if t.dim() == 0 else t
        if points.dim() != 1 or not bool((points.diff() >= 0).all()):
            raise ValueError(f"t must be a time or [points] ascending times, got {tuple(t.shape)}")
        if bool(((points < p.start.max()) | (points > p.end.min())).any()):
            raise ValueError(f"t must lie on the horizon, from {float(p.start.max()):g} to {float(p.end.min()):g}")
        times = torch.cat([p.start[None], points[:, None].expand(-1, len(p.start))])
        paths = torch.stack([noise.w for noise in p.field.paths.between(times)]).cumsum(0)
        return paths[0] if t.dim() == 0 else paths

    def _integral(self, name: str) -> Tensor:
        self.require(name)
        if self._outcome.integral is not None:
            return self._outcome.integral(name)
        return (getattr(self.steps, name) * self.steps.dt.abs()).sum(dim=0)

    def require(self, name: str) -> None:
        """Makes sure that the solver reports a figure.

        Args:
            name: "error" or "stiffness".

        Raises:
            ValueError: it doesn't; the message names the solvers that do.
        """
        if _reports(self.solver, name):
            return
        known = SOLVERS.values()
        if self._problem.noisy:
            equation = self._problem.field.equation
            known = [s.of(equation, True) for s in SDE_SOLVERS.values() if s.suits(equation)]
        able = ", ".join(s.name for s in known if s.kind == self.solver.kind and _reports(s, name)) or "none"
        raise ValueError(f"solver {self.solver.name!r} has no {name} estimate; these have: {able}")

    def __call__(self, t):
        """The solution between the steps, by the solver's interpolant; differentiable, also with respect to t.

        Without `dense=True` the steps that contain t are made again, which costs their evaluations of f, but no step.

        Args:
            t: a time (number or tensor without dimensions), [points] times for every sample, or [batch, points].

        Returns:
            The structure of z0, every tensor [batch, ...] for one time, else [points, batch, ...]. NaN beyond the
            time where a sample failed.

        Raises:
            ValueError: a time lies outside of the horizon.
        """
        p, layout = self._problem, self._problem.field.layout
        t = torch.as_tensor(t, dtype=p.times.dtype, device=p.times.device)
        if t.dim() > 2 or (t.dim() == 2 and len(t) != layout.batch):
            raise ValueError(f"t must be a time, [points] or [batch, points] = [{layout.batch}, ...], got {t.shape}")
        times = t.reshape(-1, 1) if t.dim() < 2 else t.T
        if p.control.per_sample:
            times = times.expand(-1, layout.batch)
        low, high = torch.minimum(p.start, p.end), torch.maximum(p.start, p.end)
        slack = 1e-6 * (high - low)
        if bool(((times < low - slack) | (times > high + slack) | times.isnan()).any()):
            raise ValueError(
                f"t must lie on the horizon, from {low.min().item():.6g} to {high.max().item():.6g}, "
                f"got {times.min().item():.6g} to {times.max().item():.6g}"
            )
        values = self._interpolate(times)
        return layout.unpack(values[0] if t.dim() == 0 else values)

    def _at(self, t: Tensor) -> Tensor:
        """The solution at one time per group ([groups]) as the engine packs it, [batch, features]."""
        return self._interpolate(t[None])[0]

    def _parts_at(self, t: Tensor) -> Tensor:
        """Which part of the solver made the step that contains a time ([groups]), [batch]."""
        grid, everyone = self._outcome.trajectory.grid, torch.arange(len(self.status), device=self.status.device)
        if not len(grid):
            return torch.zeros_like(everyone)
        step, _ = grid.locate(t[None], self._problem.span.sign())
        return grid.part_of(step[0].expand(len(everyone)), everyone)

    def _interpolate(self, times: Tensor) -> Tensor:
        """[points, groups] -> [points, batch, features]."""
        with full_precision(times.device):
            return self._interpolated(times)

    def _interpolated(self, times: Tensor) -> Tensor:
        p, outcome = self._problem, self._outcome
        trajectory = outcome.trajectory
        grid, direction = trajectory.grid, p.span.sign()
        reached = times * direction <= trajectory.reached * direction + 1e-6 * p.span.abs()
        if not len(grid):  # every sample failed at once: all that is known is where they started
            return torch.where(reached[..., None], self._z0, float("nan"))
        step, theta = grid.locate(times, direction)
        states = lookup(p, outcome, self._z0)
        taped = torch.is_grad_enabled() and (outcome.differentiable_states or times.requires_grad)
        kept = self._kept if p.keep_stages and not (taped or transforms.active()) else None
        values = outcome.from_states(lambda: Dense(p, grid, states, kept).at(step, theta))
        # A sample that failed at once has no step; all that is known of it is where it started.
        values = torch.where((grid.counts > 0)[:, None], values, self._z0)
        values = torch.where(reached[..., None], values, float("nan"))
        if self._held is None:
            return values
        gone = (times * direction).expand(-1, grid.batch) > self._stopped * direction
        return torch.where(gone[..., None], self._held, values)

    @functools.cached_property
    def _kept(self) -> Stages:
        return Stages.of(self._outcome.trajectory)

    def plot(self, sample: int = 0, axes=None):
        """Draws step sizes, error ratios and stiffness along t. See `neuralde.plotting.plot_solution`."""
        from .plotting import plot_solution

        return plot_solution(self, sample=sample, axes=axes)

    def __repr__(self) -> str:
        lost = int((~self.converged).sum())
        state = "all samples succeeded" if not lost else f"{lost} of {len(self.status)} samples failed"
        return f"Solution({self.solver.name}, {len(self.ts)} times, {state}; {self.stats!r})"


def _reports(solver: Solver, name: str) -> bool:
    return solver.error_order is not None if name == "error" else solver.reports_stiffness
