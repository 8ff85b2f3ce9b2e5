"""solve(): an equation and an initial state -> a Solution."""

from __future__ import annotations

import functools
import itertools
import math
import numbers
import sys
import warnings
from dataclasses import replace

import torch
from torch import Tensor

from . import adjoints, compiled, solvers, steady, transforms
from . import control as _control
from .adjoints import Adjoint
from .control import StepControl
from .equations import ODE, SDE, SteadyState
from .errors import NOISY, NeuralDEError, SolveWarning, failure
from .events import Event, Watch
from .events import parse as parse_events
from .field import Field, full_precision
from .outputs import outputs, shift_start
from .problem import Problem
from .seen import looked_at, show
from .solution import Solution
from .solvers import Solver
from .state import Layout
from .stochastic import NoisyField, check_noisy, source, with_noise
from .termination import Termination


def solve(
    equation: ODE | SDE | SteadyState,
    z0,
    t=None,
    solver: str | Solver | None = None,
    rtol=None,
    atol=None,
    control: str | StepControl = "per_sample",
    adjoint: str | Adjoint | None = None,
    args=None,
    max_steps: int | None = None,
    dt0: float | None = None,
    dense: bool = False,
    on_failure: str | None = None,
    *,
    dt_min: float | None = None,
    dt_max: float | None = None,
    jump_times=None,
    step_times=None,
    events: Event | list[Event] | None = None,
    observer=None,
    compile: bool = False,
    seed: int | None = None,
    brownian=None,
    termination: str | Termination | None = None,
) -> Solution:
    """Solves an equation for a batch of samples: dz/dt = f(t, z), dz = f(t, z) dt + g(t, z) dW, or for a steady state.

    What is None has the equation's own default:

    | | `ODE` | `SDE` | `SteadyState` |
    |---|---|---|---|
    | solver | "tsit5" | the first of "sosri2", "sosra2", "midpoint", "euler_maruyama" that suits | "tsit5" |
    | rtol, atol | 1e-3, 1e-6 | 1e-2, 1e-2 | 1e-3, 1e-6 |
    | adjoint | "checkpointed" | "checkpointed" | "implicit" |
    | max_steps | 4096 | 4096 | 4096, of an iteration 1000 |
    | on_failure | "raise" | "raise" | "warn" |

    Args:
        equation: an `ODE`, an `SDE` or a `SteadyState`: what differs for the latter two is said below.
        z0: initial state: a tensor [batch, ...], or a tuple or dict of them; floating-point or complex. bfloat16 and
            float16 states are stepped in float32 arithmetic, f still sees their own dtype.
        t: (t0, t1), a 1-D tensor of output times, or [batch, times]: strictly increasing or decreasing, at least two.
            The first is where the solve starts, the last where it ends; those between cost no steps. Of a steady state
            it may be left out, or be the time at which a solve that has not come to rest is ended: a number, or (t0,
            t1); the iterations count t in steps.
        solver: a name (see `neuralde.solvers.SOLVERS`, and `SDE_SOLVERS`) or a solver object. Steady states also have
            iterations: "fixed_point", "anderson", "broyden" and "newton".
        rtol, atol: tolerances of the error test |error| ≤ atol + rtol·max(|z|, |z_next|), in RMS. rtol > 0, atol ≥ 0.
            A number; or one per component: a tensor that broadcasts to z0 (or to one sample of it), or a tuple or dict
            of numbers and such tensors in the structure of z0. atol = inf takes a component out of the test.
        control: "per_sample", every sample has its own step size and its answer does not depend on the others; or
            "joint", one step size and one RMS norm for the whole batch. Or a `StepControl`.
        adjoint: how gradients are computed. "checkpointed", exact ones at one state of memory per step; or
            `nde.adjoints.Checkpointed(checkpoints=k)`, at k states. "direct", exact ones with everything on the tape:
            the one that torch.func's transforms (jvp, vmap, ...) and forward-mode AD go through; the copies of a sample
            that vmap solves share their steps, the worst one decides. "backsolve", "interpolating", "quadrature": those
            of an equation solved backwards, to its tolerances; of these "backsolve" is for SDEs too. For a steady
            state: "implicit" and its approximations "neumann", "jfb" and "phantom"; or "direct". See
            `neuralde.adjoints` for their options.
        args: tensors (or a structure of them) handed to f as its last argument. They get gradients.
        max_steps: attempted steps per sample, rejected ones included.
        dt0: first step size, positive; None chooses it automatically. Fixed-step solvers need it: it is their step.
        dense: keep every step's stages, so that `solution(t)` need not evaluate f again (when no gradient is wanted).
        on_failure: "raise" an error that says which samples failed, where and why; "warn", and go on with the other
            samples; or "ignore". In the latter two the failed samples' outputs are NaN and `status` says why; but
            the samples of a steady state that did not converge have their best state.
        dt_min: least step size, positive. A step that fails the error test at that size fails the solve. (Steps that
            share what is left before an end or a stop may be smaller.)
        dt_max: largest step size, positive.
        jump_times: where f jumps, [times] or [batch, times]: steps end there, and f is evaluated on either side only.
            Those outside of the horizon are of no effect: pad with inf.
        step_times: where a step has to end although f is smooth there, likewise.
        events: an `Event`, or a list of them, to find in the solution: see `solution.events`. A sample ends at its
            first terminal one.
        observer: an object with any of the methods attempt, accept and reject (t, z, dt), called for the samples whose
            step is attempted, was accepted, was rejected: t and dt are [samples] ([1] under joint control), z is in the
            structure of z0.
        compile: let torch.compile make programs of the loop and of its backward pass, at the first call and for some
            seconds; they serve all later solves with this f. On the CPU: SDEs and explicit Runge-Kutta methods, with
            gradients by "checkpointed"; and steady states by "tsit5", "bs3", "dopri5" or an iteration ("fixed_point",
            "anderson", "broyden"), with "implicit" too where one of these solves its systems. Else one warning says
            why, and all is as without it.
        seed: of an SDE's noise, an integer: `brownian=BrownianTree(seed)`. None draws one from torch's generator.
        brownian: where an SDE's noise comes from: a `BrownianTree`, or, under joint control, a Brownian object of
            torchsde's.
        termination: of a steady state: when it has been reached, a mode or an `nde.Termination`; None is
            `nde.Termination()`, by rtol and atol.

    Returns:
        A `Solution`.

    Raises:
        ValueError, TypeError: an argument is wrong; the message names it.
        NeuralDEError: a transform is around the solve that the adjoint, the solver or events can't go through.
        StepSizeUnderflow, NonFiniteState, MaxStepsReached: the solve failed for some samples (`on_failure="raise"`).

    Gradients with respect to z0, args, the parameters of f and tensors that f closes over are exact for the discrete
    solution under "checkpointed" and "direct", where step sizes are constants to them; the other adjoints have those of
    the continuous solution, to a tolerance. Gradients with respect to t are those of the continuous solution:
    dz(t1)/dt1 = f(t1, z(t1)), and for t0 those of a start shifted by -f(t0, z0)·dt0; first derivatives only.
    """
    steps = {"dt0": dt0, "dt_min": dt_min, "dt_max": dt_max, "max_steps": max_steps}
    steps = {name: _control.number(name, x) for name, x in steps.items()}
    stops = {"jump_times": jump_times, "step_times": step_times}
    return untraced(_solve)(
        equation,
        z0,
        t,
        solver,
        (rtol, atol),
        control,
        adjoint,
        args,
        steps,
        stops,
        events,
        observer,
        compile,
        dense,
        on_failure,
        (seed, brownian),
        termination,
    )


def _solve(
    equation,
    z0,
    t,
    solver,
    tolerances,
    control,
    adjoint,
    args,
    steps,
    stops,
    events,
    observer,
    compile,
    dense,
    on_failure,
    noise,
    termination,
) -> Solution:
    if not isinstance(equation, ODE | SDE | SteadyState):
        hint = "; wrap it: nde.ODE(f), or nde.SteadyState(f) for a fixed point of f" if callable(equation) else ""
        raise TypeError(
            f"equation must be an nde.ODE, an nde.SDE or an nde.SteadyState, got {type(equation).__name__}{hint}"
        )
    usual, noisy = equation.usual, isinstance(equation, SDE)
    solver = usual.solver if solver is None else solver
    tolerances = [y if x is None else x for x, y in zip(tolerances, (usual.rtol, usual.atol), strict=True)]
    adjoint = usual.adjoint if adjoint is None else adjoint
    on_failure = usual.on_failure if on_failure is None else on_failure
    if on_failure not in ("raise", "warn", "ignore"):
        raise ValueError(f"on_failure must be 'raise', 'warn' or 'ignore', got {on_failure!r}")
    on_failure = "ignore" if looked_at() else on_failure
    if not isinstance(compile, bool):
        raise TypeError(f"compile must be True or False, got {compile!r}")
    if isinstance(equation, SteadyState):
        unknown = stops | {"events": events, "seed": noise[0], "brownian": noise[1]}
        options = adjoint, args, steps, unknown, observer, compile, dense, on_failure, termination
        return show(steady.solve(equation, z0, t, solver, tolerances, control, *options))
    if termination is not None:
        raise ValueError("termination is of steady states; an ODE or SDE is solved to the end of its horizon t")
    steps = steps | {"max_steps": usual.max_steps} if steps["max_steps"] is None else steps
    layout = Layout.of(z0)
    max_steps, *sizes = (steps[name] for name in ("max_steps", "dt0", "dt_min", "dt_max"))
    _control.check_max_steps(max_steps)
    _control.check_sizes(*sizes)
    dt0, *bounds = sizes
    solver, control, adjoint = chosen(solver, control, adjoint, dt0, equation)
    layout = layout if solver.copies == 1 else replace(layout, copies=solver.copies)
    if compile and not adjoint.compiles:
        able = " or ".join(repr(x.name) for x in adjoints.ADJOINTS.values() if x.compiles)
        compiled.warn(equation.f, compiled.Unsupported(f"adjoint={adjoint.name!r} is not compiled, take {able}"))
    events = parse_events(events)
    if transforms.active():
        _require_transformable(adjoint, solver, events)
    joint = not control.per_sample
    ts, times = _times(t, layout, joint)
    jumps, stops = (_stops(name, x, layout, joint) for name, x in stops.items())
    if not control.adaptive:
        _control.refuse_bounds(*bounds)

    flat, constant = layout.pack_start(z0), times.detach()
    if not any(isinstance(x, Tensor) and transforms.derived(x) for x in (t if isinstance(t, tuple | list) else [t])):
        times = constant
    brownian = source(*noise, equation, solver, control)
    if noisy:
        check_noisy(layout, constant, times is not constant, events)
        field = NoisyField(equation, layout, args, joint, constant[0], constant[-1] - constant[0], brownian)
    else:
        field = Field(equation, layout, args, joint, solver.linearizes)
    problem = Problem(
        field=field,
        solver=solver,
        control=control,
        times=constant,
        norm=_control.norm(*tolerances, control, layout),
        dt0=None if dt0 is None else float(dt0),
        max_steps=max_steps,
        keep_stages=dense,
        dt_min=bounds[0],
        dt_max=bounds[1],
        jumps=jumps,
        stops=jumps if stops is None else stops if jumps is None else torch.cat([jumps, stops]),
        watch=Watch(events, field, layout) if events else None,
        observer=observer,
        compile=compile,
    )
    problem = with_noise(problem) if noisy else problem
    with full_precision(layout.device):
        outcome = adjoint.solve(problem, shift_start(problem, flat, times))
        _report(problem, outcome.trajectory, on_failure)
        found = outputs(problem, outcome, flat, times)
    return show(Solution(problem, outcome, ts, found, flat))


def chosen(
    solver: str | Solver | None,
    control: str | StepControl,
    adjoint: str | Adjoint,
    dt0: float | None,
    equation: ODE | SDE | None = None,
) -> tuple[Solver, StepControl, Adjoint]:
    """What these options of a solve name: (the solver, the control as it is with that solver, the adjoint).

    Args:
        equation: an `SDE`, whose solvers are others, and None its default; anything else stands for an ODE.

    Raises:
        TypeError, ValueError: there is no such thing, or they don't go together.
    """
    control, adjoint = _control.get(control), adjoints.get(adjoint)
    if isinstance(equation, SDE):
        solver, control = solvers.for_sde(solver, equation, control.adaptive), _control.for_noise(control)
        adjoint.require_noisy(equation, control)
    else:
        solver = solvers.for_ode(solver)
    if not adjoint.of_horizons:
        able = ", ".join(repr(x.name) for x in adjoints.ADJOINTS.values() if x.of_horizons)
        raise ValueError(
            f"adjoint {adjoint.name!r} differentiates steady states (nde.SteadyState, nde.DeepEquilibrium); on a "
            f"horizon take one of {able}"
        )
    if control.adaptive and not solver.adaptive:
        control = replace(control, adaptive=False)
    if not control.adaptive and dt0 is None:
        raise ValueError(f"dt0 is needed: solver {solver.name!r} takes fixed steps, of size dt0; pass e.g. dt0=0.1")
    if control.adaptive and solver.error_order is None:
        raise ValueError(f"solver {solver.name!r} has no error estimate; use StepControl(adaptive=False) with dt0")
    adjoint.require(solver, control, dt0)
    return solver, control, adjoint


def _require_transformable(adjoint: Adjoint, solver: Solver, events: list[Event]):
    """Raises NeuralDEError if the transforms around this solve can't go through it."""
    if not adjoint.transforms:
        able = " or ".join(repr(x.name) for x in adjoints.ADJOINTS.values() if x.transforms)
        raise NeuralDEError(
            f"torch.func transforms (grad, vmap, jvp, ...) and forward-mode AD around a solve need adjoint={able}, got "
            f"{adjoint.name!r}, whose backward pass is its own; pass adjoint={able} to solve or to the layer"
        )
    if not solver.transforms:
        raise NeuralDEError(
            f"solver {solver.name!r} can't be transformed by torch.func or forward-mode AD; use one of neuralde's own"
        )
    if events:
        raise NeuralDEError(
            "a solve with events can't be transformed by torch.func or forward-mode AD: copies of a sample would have "
            "their events at different times; leave events out, or solve outside of the transform"
        )


def untraced(function):
    """The function, out of torch.compile's sight.

    torch.compile around a layer compiles what stands before and after it: tracing into the data-dependent loop would
    break the graph at every attempt. A compiled f stays compiled. (Asked for at every call, since torch.compiler would
    import the whole compiler at once, which takes a second.)
    """
    return _disabled(function) if "torch._dynamo" in sys.modules else function


@functools.cache
def _disabled(function):
    return torch.compiler.disable(function)


def _stops(name: str, times, layout: Layout, joint: bool) -> Tensor | None:
    """Times at which steps end, as [points, groups], or None."""
    if times is None:
        return None
    try:
        times = torch.as_tensor(times, dtype=layout.time_dtype, device=layout.device).detach()
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"{name} must be numbers or a tensor [times] or [batch, times], got {times!r}") from error
    if times.dim() not in (1, 2) or (times.dim() == 2 and len(times) != layout.batch):
        raise ValueError(f"{name} must be [times] or [batch, times] = [{layout.batch}, ...], got {tuple(times.shape)}")
    transforms.require_shared(name, times)
    if bool(times.isnan().any()):
        raise ValueError(f"{name} must not hold NaN; pad with inf")
    if times.shape[-1] == 0:
        return None
    if joint and times.dim() == 2:
        if not bool((times == times[:1]).all()):
            raise ValueError(f'{name} differs between samples, which control="joint" steps together; pass [times]')
        times = times[0]
    points = times[:, None] if times.dim() == 1 else times.T
    return points if joint else points.expand(-1, layout.batch)


def _times(t, layout: Layout, joint: bool) -> tuple[Tensor, Tensor]:
    """The output times as the user reads them, and as [times, groups]; both may carry a gradient."""
    if isinstance(t, Tensor):
        if t.is_complex() or t.dtype == torch.bool:
            raise TypeError(f"t must hold real times, got {t.dtype}")
        t = t.clone()  # the solution's own
    elif isinstance(t, tuple | list):
        if not all(isinstance(x, numbers.Real | Tensor) for x in t):
            raise TypeError(f"t must hold numbers or tensors, got {', '.join(type(x).__name__ for x in t)}")
        if len(t) > 1 and not any(isinstance(x, Tensor) for x in t):
            known = _constant_times(tuple(map(float, t)), layout.time_dtype, layout.device)
            return _in_rows(known.clone(), layout, joint)  # the solution's own
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
    transforms.require_shared("t", t)
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
    return _in_rows(t, layout, joint)


def _in_rows(t: Tensor, layout: Layout, joint: bool) -> tuple[Tensor, Tensor]:
    """Times [times] or [batch, times], as `_times` gives them back."""
    ts = t if t.dim() == 1 else t.T
    times = t[:, None] if t.dim() == 1 else t.T
    return ts, times if joint else times.expand(-1, layout.batch)


@functools.lru_cache(maxsize=64)
def _constant_times(times: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Times, checked; remembered, for a layer has the same ones at every call."""
    with torch.inference_mode(False):  # what is remembered outlives what is around this solve
        found = torch.tensor(times, dtype=dtype, device=device)
    _check_order(found, dtype)
    return found


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


def _report(problem: Problem, trajectory, on_failure: str):
    if on_failure == "ignore":
        return
    if trajectory.complete:
        return
    batch, figures = problem.field.layout.batch, (trajectory.reached, *trajectory.last_attempt())
    figures = (x if x is None else x.expand(batch) for x in (trajectory.status, *figures))
    stability_size, messages = (None, NOISY) if problem.noisy else (problem.solver.stability_size, None)
    error = failure(*figures, problem.joint, problem.solver.name, stability_size, messages)
    if on_failure == "raise":
        raise error
    warnings.warn(str(error), SolveWarning, stacklevel=4)
