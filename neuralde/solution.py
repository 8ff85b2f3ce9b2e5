"""What a solve gives back."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from .adjoints.base import Outcome
from .errors import Status
from .field import full_precision
from .problem import Problem
from .solvers import SOLVERS, Solver


@dataclass(frozen=True)
class Statistics:
    """How much work a solve was.

    Attributes:
        nfe: evaluations of f on each sample, [batch] int64: those of the initial step size and of rejected attempts
            included, those of a replay not.
        accepted, rejected: attempted steps that passed and that failed the error test, [batch] int64.
        function_calls: batched calls of f that the forward solve made; a little more than `nfe` where f was also
            checked, more where samples finish at different steps.
    """

    nfe: Tensor
    accepted: Tensor
    rejected: Tensor
    function_calls: int

    def __repr__(self) -> str:
        def show(x):
            low, high = int(x.min()), int(x.max())
            return f"{low}" if low == high else f"{x.double().mean().item():.1f} ({low} to {high})"

        return (
            f"nfe {show(self.nfe)}, accepted {show(self.accepted)}, rejected {show(self.rejected)}, "
            f"function calls {self.function_calls}"
        )


class Steps:
    """The accepted steps: step j of sample b at [j, b], each sample's packed to the left.

    Attributes:
        t, dt: start and (signed) size of each step, [step, batch]; 0 where `mask` is False.
        mask: whether sample b has a step j, [step, batch].
        z: the state at t, in the structure of z0, every tensor [step, batch, ...].
        error: the embedded error estimate over the tolerance, RMS over the sample (over the batch under joint
            control): what the controller compares with 1. [step, batch], or None where the solver has no estimate.
        stiffness: ‖f(x) - f(y)‖/‖x - y‖ of two stages at one abscissa: an estimate of |λ|. [step, batch], or None.

    `error` and `stiffness` are differentiable under adjoint "direct" and "checkpointed"; t and dt are constants.
    """

    def __init__(self, problem: Problem, outcome: Outcome):
        self._problem, self._outcome = problem, outcome
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
    def z(self):  # noqa: D102
        return self._problem.field.layout.unpack(self._grid.pad(self._outcome.states()))

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
        residual: of a steady state; None for a finite horizon.
        solver, rtol, atol, control: what it was solved with.
    """

    residual: Tensor | None = None

    def __init__(self, problem: Problem, outcome: Outcome, ts: Tensor, zs, z0_flat: Tensor):
        trajectory = outcome.trajectory
        self._problem, self._outcome, self._z0 = problem, outcome, z0_flat
        self.ts, self.zs = ts, zs
        batch = problem.field.layout.batch
        self.status = trajectory.status.expand(batch)
        self._calls = problem.field.calls
        self.solver, self.control = problem.solver, problem.control
        self.rtol, self.atol = problem.norm.rtol, problem.norm.atol

    @functools.cached_property
    def stats(self) -> Statistics:
        """How much work it was."""
        counts = self._outcome.trajectory.counts
        return Statistics(counts.nfe, counts.accepted, counts.rejected, self._calls)

    @property
    def final(self):
        """The state at the end of the horizon, in the structure of z0."""
        layout = self._problem.field.layout
        if layout.tree is None:
            return self.zs[-1]
        return torch.utils._pytree.tree_map(lambda leaf: leaf[-1], self.zs)

    @property
    def converged(self) -> Tensor:
        """Which samples reached the end, [batch] bool."""
        return self.status == Status.SUCCESS

    @functools.cached_property
    def steps(self) -> Steps:
        """The accepted steps."""
        return Steps(self._problem, self._outcome)

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

    def _integral(self, name: str) -> Tensor:
        self.require(name)
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
        able = ", ".join(s.name for s in SOLVERS.values() if _reports(s, name))
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

    def _interpolate(self, times: Tensor) -> Tensor:
        """[points, groups] -> [points, batch, features]."""
        with full_precision(times.device):
            return self._interpolated(times)

    def _interpolated(self, times: Tensor) -> Tensor:
        p, trajectory = self._problem, self._outcome.trajectory
        grid, direction = trajectory.grid, p.span.sign()
        everyone = times.shape[1] == 1 and p.joint
        reached = times * direction <= trajectory.reached * direction + 1e-6 * p.span.abs()
        if not len(grid):  # every sample failed at once: all that is known is where they started
            return torch.where(reached[..., None], self._z0, float("nan"))
        step, theta = grid.locate(times, direction)
        states = self._outcome.states()
        kept = p.keep_stages and not (torch.is_grad_enabled() and (states.requires_grad or times.requires_grad))
        pieces, order = [], []
        # Points whose samples all lie in the same steps share one replay.
        combinations, which = torch.unique(step, dim=0, return_inverse=True)
        for i, here in enumerate(combinations):
            points = (which == i).nonzero().flatten()
            order.append(points)
            for_all = theta[points]
            if everyone:
                pieces.append(p.solver.interpolate(self._stages(here[0], states, kept), for_all[:, 0], None))
                continue
            rows = torch.arange(times.shape[1], device=step.device)
            if p.joint:
                value = torch.stack(
                    [
                        torch.cat(
                            [
                                p.solver.interpolate(self._stages(j, states, kept), row[b : b + 1], rows[b : b + 1])
                                for b, j in enumerate(here)
                            ]
                        )
                        for row in for_all
                    ]
                )
            else:
                flat = p.solver.interpolate(
                    self._stages(here, states, kept), for_all.flatten(), rows.repeat(len(points))
                )
                value = flat.view(len(points), len(rows), -1)
            pieces.append(value)
        values = torch.cat(pieces).index_select(0, torch.argsort(torch.cat(order)))
        # A sample that failed at once has no step; all that is known of it is where it started.
        values = torch.where((grid.counts > 0)[:, None], values, self._z0)
        return torch.where(reached[..., None], values, float("nan"))

    def _stages(self, step: Tensor, states: Tensor, kept: bool) -> Tensor:
        """The stages of a step: one for the whole batch, or each sample's own ([batch] indices)."""
        p, grid = self._problem, self._outcome.trajectory.grid
        shared = step.dim() == 0
        rows = torch.arange(grid.batch, device=step.device)
        index = grid.flat_index[step] if shared else grid.flat_index[step, rows]
        if kept:
            return self._kept[:, index]
        group = rows[:1] if shared else rows
        t, dt = (grid.padded(name)[step.expand(len(group)), group] for name in ("t", "dt"))
        z = states.index_select(0, index)
        # A sample that failed at once has no step to be made again, and f may be unable to handle it.
        able = grid.counts > 0
        rows = None if bool(able.all()) else able.nonzero().flatten()
        if rows is not None:
            t, dt, z = t[rows], dt[rows], z[rows]
        memory = p.solver.memory(z, taped=torch.is_grad_enabled())
        made = p.solver.snapshot(p.solver.step(p.field.on(rows), t, dt, z, None, memory, close=True).stages)
        if rows is None:
            return made
        return made.new_zeros(len(made), grid.batch, made.shape[2]).index_copy(1, rows, made)

    @functools.cached_property
    def _kept(self) -> Tensor:
        """All stages that were kept, [rows, all accepted, features]."""
        trajectory = self._outcome.trajectory
        parts = [r.snapshot.movedim(0, 1) for r in trajectory.records]
        return trajectory.grid.gather(parts, parts[0]).movedim(1, 0)

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
