"""torchdiffeq's functions on neuralde: `from neuralde.interop.torchdiffeq import odeint` is the whole change.

Signatures, methods and options are torchdiffeq 0.2.5's; docs/interop.md has what becomes of each, and what differs.
torchdiffeq itself is not imported.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable

import torch
from torch import Tensor

import neuralde as nde

from . import _methods
from ._case import Case

__all__ = ["odeint", "odeint_adjoint", "odeint_dense", "odeint_event", "probe", "solution"]

# What makes one step of a method, with torchdiffeq's error estimate. Adams methods and SciPy's need earlier steps.
SOLVERS = {**_methods.ADAPTIVE, **_methods.FIXED}


def odeint(func: Callable, y0, t: Tensor, *, rtol=1e-7, atol=1e-9, method=None, options=None, event_fn=None):
    """Solves dy/dt = func(t, y), y(t[0]) = y0, with everything on autograd's tape.

    One step size and one norm for all of y, as in torchdiffeq; `nde.solve` has one for every sample.

    Args:
        func: func(t, y) with a scalar t; may carry `callback_step`, `callback_accept_step`, `callback_reject_step`,
            called as (t, y, dt).
        y0: a tensor of any shape, or a tuple of them.
        t: [times], strictly increasing or decreasing.
        rtol, atol: tolerances: numbers, tensors like y0, or one for every tensor of a tuple.
        method: "dopri5" (None), "dopri8", "tsit5", "bosh3", "fehlberg2", "adaptive_heun"; "euler", "midpoint", "heun2",
            "heun3", "rk4" (the 3/8 rule), "explicit_adams", "implicit_adams", "fixed_adams"; "scipy_solver".
        options: of the method. Those that it does not know are warned of.
        event_fn: event_fn(t, y): the solve ends at its first zero; t[1] gives the direction only.

    Returns:
        y at the times, [times, ...] (a tuple of such tensors for a tuple); with event_fn, (event_t, [2, ...]): the
        state at t[0] and at the event. Both have exact gradients, those of the moving event time included.

    Raises:
        ValueError, TypeError: an argument is wrong.
        NeuralDEError: the solve failed (a RuntimeError; torchdiffeq raises an AssertionError).

    Source: torchdiffeq 0.2.5, README.md and FURTHER_DOCUMENTATION.md.
    """
    return _solve(Case(func, y0, t), rtol, atol, method, options, event_fn, "direct")


def odeint_adjoint(
    func: Callable,
    y0,
    t: Tensor,
    *,
    rtol=1e-7,
    atol=1e-9,
    method=None,
    options=None,
    event_fn=None,
    adjoint_rtol=None,
    adjoint_atol=None,
    adjoint_method=None,
    adjoint_options=None,
    adjoint_params=None,
):
    """As `odeint`, with a backward pass that needs less memory.

    Without adjoint_rtol, adjoint_atol, adjoint_method and adjoint_options, the backward pass makes every accepted step
    again (adjoint="checkpointed"): the exact gradient of the solution that was returned, faster than a second solve,
    at the memory of one state per step.

    With any of them it is torchdiffeq's: a second equation solved backwards in time (`nde.adjoints.Backsolve`), by that
    method, to those tolerances. Its memory does not grow with the steps, and its gradient has an error of its own.

    Args:
        func: need not be an nn.Module.
        y0, t, rtol, atol, method, options, event_fn: of `odeint`.
        adjoint_rtol, adjoint_atol: numbers; None: rtol and atol. The adjoint is scaled to the size of the loss's
            gradient before it meets adjoint_atol.
        adjoint_method: an adaptive or fixed-grid method; None: method.
        adjoint_options: options of that method; None: those of `options` but for the norm. norm="seminorm" leaves the
            parameters out of the error test; without, the largest RMS of y, its adjoint and each parameter counts.
        adjoint_params: the only tensors that get gradients through func, beside y0 and t; () for none. None: all that
            func uses, where torchdiffeq has func.parameters().

    Adams methods keep their steps on the tape, and "scipy_solver" has no gradients: there the options of the backward
    solve have no effect, and a warning says so.

    Returns:
        As `odeint`.

    Raises:
        ValueError, TypeError, NeuralDEError: as `odeint`. The latter also in the backward pass, if its solve fails.
    """
    given = {"adjoint_rtol": adjoint_rtol, "adjoint_atol": adjoint_atol}
    given |= {"adjoint_method": adjoint_method, "adjoint_options": adjoint_options}
    callbacks = [f"callback_{name}_adjoint" for name in ("step", "accept_step", "reject_step")]
    if found := [name for name in callbacks if hasattr(func, name)]:
        warnings.warn(f"{', '.join(found)}: not called, for the backward pass shows its steps to nobody", stacklevel=2)
    wanted = None if adjoint_params is None else tuple(adjoint_params)
    if wanted is not None and not all(isinstance(x, Tensor) for x in wanted):
        raise TypeError("adjoint_params must hold tensors")
    wanted = wanted and tuple(x for x in wanted if x.requires_grad)
    adjoint = "checkpointed" if all(x is None for x in given.values()) else given
    return _solve(Case(func, y0, t, wanted), rtol, atol, method, options, event_fn, adjoint)


def odeint_event(
    func: Callable,
    y0,
    t0: Tensor,
    *,
    event_fn: Callable,
    reverse_time: bool = False,
    odeint_interface: Callable = odeint,
    **kwargs,
):
    """Solves from t0 to the first zero of event_fn(t, y), with gradients through the event's time and state.

    Args:
        func, y0: of `odeint`.
        t0: where it starts, a tensor with one number.
        event_fn: of `odeint`.
        reverse_time: whether to look for the event before t0.
        odeint_interface: `odeint` or `odeint_adjoint` of this module.
        **kwargs: of that function.

    Returns:
        (event_t, [2, ...]): the event's time, and the states at t0 and there.
    """
    if not isinstance(t0, Tensor):
        raise TypeError(f"t0 must be a tensor with one time, got {type(t0).__name__}")
    start = t0.reshape(-1)
    t = torch.cat([start, start.detach() + (-1.0 if reverse_time else 1.0)])
    return odeint_interface(func, y0, t, event_fn=event_fn, **kwargs)


def odeint_dense(func: Callable, y0, t0, t1, *, rtol=1e-7, atol=1e-9, method=None, options=None) -> Callable:
    """Solves from t0 to t1 by an adaptive method.

    Args:
        func, y0, rtol, atol, options: of `odeint`.
        t0, t1: the ends.
        method: an adaptive one; None is "dopri5".

    Returns:
        A function of a time, or of [points] times, between t0 and t1: the state there, or [points, ...] states.
    """
    leaf = y0 if isinstance(y0, Tensor) else y0[0]
    ends = [torch.as_tensor(x, dtype=leaf.real.dtype, device=leaf.device) for x in (t0, t1)]
    case = Case(func, y0, torch.stack(ends))
    method, options = _methods.check(method, options)
    if method not in _methods.ADAPTIVE:
        raise ValueError(
            f"odeint_dense needs an adaptive method, one of {', '.join(_methods.ADAPTIVE)}, got {method!r}"
        )
    how = _methods.adaptive(case, method, options, event=False)
    how |= {"rtol": case.tolerance("rtol", rtol), "atol": case.tolerance("atol", atol)}
    solution = nde.solve(nde.ODE(case.field), case.z0, case.t, adjoint="direct", dense=True, **how)

    def dense_output(t):
        zs = solution(t)
        return case.form.outputs(zs) if torch.as_tensor(t).dim() else case.form.disclose(zs)

    return dense_output


def solution(func: Callable, y0, t: Tensor, *, rtol=1e-7, atol=1e-9, method=None, options=None) -> nde.Solution:
    """As `odeint`, all of the `Solution`: what `nde.diagnose` and the global penalties take.

    Args:
        func, y0, t, rtol, atol, options: of `odeint`.
        method: an adaptive or fixed-grid method; None is "dopri5".

    Returns:
        The `Solution`, of the rows of y0 where it is a tensor of two and more dimensions: then func is to treat them
        alone, as a batch. Else, and with the option "norm", y0 as a whole is one sample. The outputs of a fixed-grid
        method with a grid of its own are on that grid.

    Raises:
        ValueError, TypeError: an argument is wrong. NeuralDEError: the solve failed.
    """
    case, (method, options) = Case(func, y0, t), _methods.check(method, options)
    if method not in SOLVERS:
        raise ValueError(f"method {method!r} makes no steps of a `Solution`; one of {', '.join(SOLVERS)} does")
    batched, t = isinstance(case.y0, Tensor) and case.y0.dim() > 1 and "norm" not in options, case.t
    if method in _methods.FIXED:
        how, own = _methods.fixed(case, method, options, event=False)
        if own.interp == "linear" and own.grid is not case.t:
            t = torch.cat([t[:1], own.grid[1:].detach()])
    else:
        how = _methods.adaptive(case, method, options, event=False)
    how |= (
        {"rtol": rtol, "atol": atol}
        if batched
        else {"rtol": case.tolerance("rtol", rtol), "atol": case.tolerance("atol", atol)}
    )
    form = case.form

    def field(t, z):
        return form.derivative(func(t, z)) if batched else form.enclose(form.derivative(func(t, form.disclose(z))))

    field.__wrapped__ = func  # by which `diagnose` names it
    return nde.solve(nde.ODE(field), case.y0 if batched else case.z0, t, adjoint="direct", **how)


def probe(
    func: Callable, t, y, dt=None, *, t1=None, rtol=1e-7, atol=1e-9, method=None, options=None, solver=None
) -> nde.introspection.Probe:
    """One step of a torchdiffeq solve under the lens: `nde.probe` with torchdiffeq's error estimate and norm.

    Args:
        func, rtol, atol, method, options: of `odeint`; of the options, the norm counts.
        t, y: where the step starts. t: a number or a tensor with one.
        dt: its (signed) size; None for the one that a solve from here to t1 would begin with.
        t1: where that solve ends. None: forward, without limit.
        solver: another method's step, by neuralde's names; needed for an Adams method and "scipy_solver".

    Returns:
        A `Probe` of y as one sample: its figures are [1].
    """
    leaf = y if isinstance(y, Tensor) else y[0]
    case = Case(func, y, torch.as_tensor(t, device=leaf.device).to(leaf.real.dtype).reshape(1))
    solver, control = _methods.lens(case, *_methods.check(method, options), solver)
    how = {"rtol": case.tolerance("rtol", rtol), "atol": case.tolerance("atol", atol)}
    return nde.probe(case.field, case.t, case.z0, dt, solver=solver, control=control, t1=t1, **how)


def _solve(case: Case, rtol, atol, method, options, event_fn, adjoint: str | dict):
    """adjoint: a name; or the adjoint_* arguments of torchdiffeq's own."""
    method, options = _methods.check(method, options)
    rtol, atol = case.tolerance("rtol", rtol), case.tolerance("atol", atol)
    if isinstance(adjoint, dict):
        adjoint = _backsolve(case, method, options, (rtol, atol), event_fn is not None, adjoint)
    if event_fn is not None and method == "scipy_solver":
        raise ValueError("event_fn needs another method than 'scipy_solver', such as 'dopri5'")
    if event_fn is not None and len(case.t) != 2:
        raise ValueError(f"t must hold two times with event_fn, the start and one in its direction, got {len(case.t)}")
    if len(case.t) == 1:
        return case.form.outputs(case.form.enclose(case.form.enclose(case.y0)))
    if method == "scipy_solver":
        return case.form.unflatten(_methods.scipy(case, options, rtol, atol))
    if method in _methods.ADAMS:
        run = _methods.Adams(case, method, options, rtol, atol, event_fn is not None)
        return run.outputs() if event_fn is None else run.until_event(event_fn)
    own = None
    if method in _methods.FIXED:
        how, own = _methods.fixed(case, method, options, event_fn is not None)
    else:
        how = _methods.adaptive(case, method, options, event_fn is not None)
    how |= {"rtol": rtol, "atol": atol, "adjoint": adjoint}
    if event_fn is not None:
        return _methods.until_event(case, event_fn, how)
    linear = own is not None and own.interp == "linear" and own.grid is not case.t
    if not linear:
        return case.form.outputs(nde.solve(nde.ODE(case.field), case.z0, case.t, **how).zs)
    grid = torch.cat([case.t[:1], own.grid[1:].detach()])
    ys = case.form.outputs(nde.solve(nde.ODE(case.field), case.z0, grid, **how).zs)
    if case.form.is_tuple:
        return tuple(_methods.between(grid, y, case.t, case.direction) for y in ys)
    return _methods.between(grid, ys, case.t, case.direction)


def _backsolve(case: Case, method: str, options: dict, tolerances: tuple, event: bool, given: dict):
    """torchdiffeq's adjoint, where the method of the solve can have it."""
    if method in (*_methods.ADAPTIVE, *_methods.FIXED):
        return _methods.backsolve(case, method, options, tolerances, event, given)
    named = ", ".join(name for name, value in given.items() if value is not None)
    why = "has no gradients" if method == "scipy_solver" else "keeps its steps on the tape, for exact gradients"
    warnings.warn(f"{named} of odeint_adjoint: no effect, for method {method!r} {why}", stacklevel=4)
    return "direct"
