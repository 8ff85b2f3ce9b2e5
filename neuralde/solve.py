"""solve(): an equation and an initial state -> a Solution."""

from __future__ import annotations

import functools
import itertools
import math
import numbers
import sys
import warnings

import torch
from torch import Tensor

from . import adjoints, solvers
from . import control as _control
from .adjoints import Adjoint
from .control import StepControl
from .equations import ODE
from .errors import SolveWarning, failure
from .field import Field, full_precision
from .problem import Problem
from .solution import Solution
from .solvers import Solver
from .state import Layout


def solve(
    equation: ODE,
    z0,
    t,
    solver: str | Solver = "tsit5",
    rtol: float = 1e-3,
    atol: float = 1e-6,
    control: str | StepControl = "per_sample",
    adjoint: str | Adjoint = "checkpointed",
    args=None,
    max_steps: int = 4096,
    dt0: float | None = None,
    dense: bool = False,
    on_failure: str = "raise",
) -> Solution:
    """Solves dz/dt = f(t, z) for a batch of samples.

    Args:
        equation: an `ODE`.
        z0: initial state: a tensor [batch, ...], or a tuple or dict of them; floating-point or complex. bfloat16 and
            float16 states are stepped in float32 arithmetic, f still sees their own dtype.
        t: (t0, t1), a 1-D tensor of output times, or [batch, times]: strictly increasing or decreasing, at least two.
            The first is where the solve starts, the last where it ends; those between cost no steps.
        solver: a name (see `neuralde.solvers.SOLVERS`) or a solver object.
        rtol, atol: tolerances of the error test |error| ≤ atol + rtol·max(|z|, |z_next|), in RMS. rtol > 0, atol ≥ 0.
        control: "per_sample", every sample has its own step size and its answer does not depend on the others; or
            "joint", one step size and one RMS norm for the whole batch. Or a `StepControl`.
        adjoint: "checkpointed", exact gradients at one state of memory per step; "direct", everything on the tape.
        args: tensors (or a structure of them) handed to f as its last argument. They get gradients.
        max_steps: attempted steps per sample, rejected ones included.
        dt0: first step size, positive; None chooses it automatically. Fixed-step solvers need it: it is their step.
        dense: keep every step's stages, so that `solution(t)` need not evaluate f again (when no gradient is wanted).
        on_failure: "raise" an error that says which samples failed, where and why; "warn", and go on with the other
            samples; or "ignore". In the latter two the failed samples' outputs are NaN and `status` says why.

    Returns:
        A `Solution`.

    Raises:
        ValueError, TypeError: an argument is wrong; the message names it.
        StepSizeUnderflow, NonFiniteState, MaxStepsReached: the solve failed for some samples (`on_failure="raise"`).

    Gradients with respect to z0, args, the parameters of f and tensors that f closes over are exact for the discrete
    solution; step sizes are constants to them. Gradients with respect to t are those of the continuous solution:
    dz(t1)/dt1 = f(t1, z(t1)), and for t0 those of a start shifted by -f(t0, z0)·dt0; first derivatives only.
    """
    return _untraced(_solve)(
        equation, z0, t, solver, rtol, atol, control, adjoint, args, max_steps, dt0, dense, on_failure
    )


def _solve(equation, z0, t, solver, rtol, atol, control, adjoint, args, max_steps, dt0, dense, on_failure) -> Solution:
    if not isinstance(equation, ODE):
        hint = "; wrap it: nde.ODE(f)" if callable(equation) else ""
        raise TypeError(f"equation must be an nde.ODE, got {type(equation).__name__}{hint}")
    layout = Layout.of(z0)
    solver, control, adjoint = solvers.get(solver), _control.get(control), adjoints.get(adjoint)
    _check_numbers(rtol, atol, max_steps, dt0, on_failure)
    if control.adaptive and not solver.adaptive:
        control = _fixed(control)
    if not control.adaptive and dt0 is None:
        raise ValueError(f"dt0 is needed: solver {solver.name!r} takes fixed steps, of size dt0; pass e.g. dt0=0.1")
    if control.adaptive and solver.error_order is None:
        raise ValueError(f"solver {solver.name!r} has no error estimate; use StepControl(adaptive=False) with dt0")
    ts, times = _times(t, layout, joint=not control.per_sample)

    flat = layout.pack_start(z0)
    problem = Problem(
        field=Field(equation, layout, args, joint=not control.per_sample),
        solver=solver,
        control=control,
        times=times.detach(),
        norm=_control.Norm(float(rtol), float(atol), joint=not control.per_sample),
        dt0=None if dt0 is None else float(dt0),
        max_steps=max_steps,
        keep_stages=dense,
    )
    with full_precision(layout.device):
        outcome = adjoint.solve(problem, _shift_start(problem, flat, times))
        _report(problem, outcome.trajectory, on_failure)
        middle = () if outcome.interior is None else (outcome.interior,)
        zs = _shift_outputs(problem, torch.cat([flat[None], *middle, outcome.final[None]]), times)
    return Solution(problem, outcome, ts, layout.unpack(zs), flat)


def _untraced(function):
    """The function, out of torch.compile's sight.

    torch.compile around a layer compiles what stands before and after it: tracing into the data-dependent loop would
    break the graph at every attempt. A compiled f stays compiled. (Asked for at every call, since torch.compiler would
    import the whole compiler at once, which takes a second.)
    """
    return _disabled(function) if "torch._dynamo" in sys.modules else function


@functools.cache
def _disabled(function):
    return torch.compiler.disable(function)


def _check_numbers(rtol, atol, max_steps, dt0, on_failure):
    _control.check_tolerances(rtol, atol)
    if not isinstance(max_steps, numbers.Integral):
        raise TypeError(f"max_steps must be an integer, got {type(max_steps).__name__}")
    if max_steps < 1:
        raise ValueError(f"max_steps must be at least 1, got {max_steps}")
    if dt0 is not None:
        if not isinstance(dt0, numbers.Real):
            raise TypeError(f"dt0 must be a number or None, got {type(dt0).__name__}")
        if not (dt0 > 0 and math.isfinite(dt0)):
            raise ValueError(f"dt0 must be positive and finite (t gives the direction), got {dt0}")
    if on_failure not in ("raise", "warn", "ignore"):
        raise ValueError(f"on_failure must be 'raise', 'warn' or 'ignore', got {on_failure!r}")


def _fixed(control: StepControl) -> StepControl:
    return StepControl(**{**vars(control), "adaptive": False})


def _times(t, layout: Layout, joint: bool) -> tuple[Tensor, Tensor]:
    """The output times as the user reads them, and as [times, groups]; both may carry a gradient."""
    if isinstance(t, Tensor):
        if t.is_complex() or t.dtype == torch.bool:
            raise TypeError(f"t must hold real times, got {t.dtype}")
        t = t.clone()  # the solution's own
    elif isinstance(t, tuple | list):
        if not all(isinstance(x, numbers.Real | Tensor) for x in t):
            raise TypeError(f"t must hold numbers or tensors, got {', '.join(type(x).__name__ for x in t)}")
        if not any(isinstance(x, Tensor) for x in t):
            t = torch.tensor([float(x) for x in t], dtype=layout.time_dtype, device=layout.device)
    else:
        raise TypeError(f"t must be (t0, t1), a 1-D tensor of times or [batch, times], got {type(t).__name__}")
    if not isinstance(t, Tensor):
        parts = [torch.as_tensor(x, dtype=layout.time_dtype, device=layout.device) for x in t]
        if any(x.dim() > 1 for x in parts):
            raise ValueError("t as a tuple must hold numbers or [batch] tensors; pass [batch, times] as one tensor")
        if len({len(x) for x in parts if x.dim()} | {layout.batch}) > 1:
            raise ValueError(f"t as a tuple of tensors must hold [batch] = [{layout.batch}] times each")
        t = torch.stack(torch.broadcast_tensors(*parts), dim=-1) if parts else torch.empty(0)
    t = t.to(device=layout.device, dtype=layout.time_dtype)
    if t.dim() not in (1, 2) or (t.dim() == 2 and len(t) != layout.batch):
        raise ValueError(f"t must be (t0, t1), [times] or [batch, times] = [{layout.batch}, ...], got {tuple(t.shape)}")
    if t.shape[-1] < 2:
        raise ValueError(f"t needs at least two times, a start and an end, got {t.shape[-1]}")
    _check_order(t.detach(), layout.time_dtype)
    if joint and t.dim() == 2 and not bool((t[:, [0, -1]] == t[:1, [0, -1]]).all()):
        raise ValueError(
            't gives the samples different horizons, which control="joint" can\'t step together; '
            'use control="per_sample"'
        )
    ts = t if t.dim() == 1 else t.T
    times = t[:, None] if t.dim() == 1 else t.T
    return ts, times if joint else times.expand(-1, layout.batch)


def _check_order(values: Tensor, dtype: torch.dtype):
    """One list of times is checked as Python numbers: less work than the kernels of a few tensor operations."""
    if values.dim() == 1:
        times = values.tolist()
        gaps = [b - a for a, b in itertools.pairwise(times)]
        finite = all(map(math.isfinite, times))
        ordered, repeated = all(d > 0 for d in gaps) or all(d < 0 for d in gaps), 0.0 in gaps
    else:
        gaps = values.diff(dim=-1)
        finite = bool(torch.isfinite(values).all())
        ordered = bool(((gaps > 0).all(dim=-1) | (gaps < 0).all(dim=-1)).all())
        repeated = not ordered and bool((gaps == 0).any())
    if not finite:
        raise ValueError("t must be finite, but holds NaN or infinity")
    if not ordered:
        raise ValueError(
            f"t must be strictly increasing or strictly decreasing, but holds {'repeated' if repeated else 'unsorted'} "
            f"times (in {dtype}): {_sample_of(values)}"
        )


def _sample_of(values: Tensor) -> str:
    if values.dim() == 1:
        return str(values[:8].tolist())
    gaps = values.diff(dim=-1)
    bad = ~((gaps > 0).all(dim=1) | (gaps < 0).all(dim=1))
    return f"sample {int(bad.nonzero()[0])}"


def _shift_start(problem: Problem, z0: Tensor, times: Tensor) -> Tensor:
    """z0 with the gradient of t0: a later start is the same start moved back along f."""
    if not (times.requires_grad and torch.is_grad_enabled()):
        return z0
    with torch.no_grad():
        slope = problem.field(problem.field.times(problem.start)[0], z0)
    start = times[0].expand(len(z0))
    return z0 - (start - start.detach())[:, None].to(z0.dtype) * slope


def _shift_outputs(problem: Problem, zs: Tensor, times: Tensor) -> Tensor:
    """The outputs with the gradients of their times: dz(t)/dt = f(t, z)."""
    if not (times.requires_grad and torch.is_grad_enabled()):
        return zs
    moved = [zs[0]]
    for z, t in zip(zs[1:], times[1:], strict=True):
        slope = _slope_at(problem, t.detach(), z.detach(), zs[0].detach())
        t = t.expand(len(z))
        moved.append(z + (t - t.detach())[:, None].to(z.dtype) * slope)
    return torch.stack(moved)


@torch.no_grad()
def _slope_at(problem: Problem, t: Tensor, z: Tensor, start: Tensor) -> Tensor:
    """f at an output, 0 where a sample did not get there (f is called at its start instead)."""
    field, got = problem.field, torch.isfinite(z).all(dim=1)
    z = torch.where(got[:, None], z, start)
    if problem.joint and len(t) > 1:  # outputs at different times, but f takes one t for the batch
        slope = torch.zeros_like(z)
        for one in t.unique():
            slope = torch.where((t == one)[:, None], field(field.times(one[None])[0], z), slope)
    else:
        slope = field(field.times(t)[0], z)
    return torch.where(got[:, None], slope, 0.0)


def _report(problem: Problem, trajectory, on_failure: str):
    if on_failure == "ignore":
        return
    if trajectory.complete:
        return
    batch, figures = problem.field.layout.batch, (trajectory.reached, *trajectory.last_attempt())
    error = failure(*(x if x is None else x.expand(batch) for x in (trajectory.status, *figures)), problem.joint)
    if on_failure == "raise":
        raise error
    warnings.warn(str(error), SolveWarning, stacklevel=4)
