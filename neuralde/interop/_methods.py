"""torchdiffeq's methods and their options, as options of `solve` or as loops of their own."""

from __future__ import annotations

import dataclasses
import math
import numbers
import warnings

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

import neuralde as nde

from ..solvers import RungeKutta, Solver, tableaus
from . import _adams
from ._case import Case

# torchdiffeq's dopri5 has 2/3 of the usual error estimate, so that the same tolerance means the same steps.
_DOPRI5 = dataclasses.replace(tableaus.DOPRI5, error=tuple(2 / 3 * e for e in tableaus.DOPRI5.error))

ADAPTIVE: dict[str, Solver] = {
    "dopri8": nde.solvers.get("dopri8"),
    "dopri5": RungeKutta("dopri5", _DOPRI5, adaptive=True),
    "tsit5": nde.solvers.get("tsit5"),
    "bosh3": nde.solvers.get("bs3"),
    "fehlberg2": RungeKutta("fehlberg2", tableaus.FEHLBERG2, adaptive=True),
    "adaptive_heun": RungeKutta("adaptive_heun", tableaus.HEUN, adaptive=True),
}
FIXED: dict[str, Solver] = {
    "euler": nde.solvers.get("euler"),
    "midpoint": nde.solvers.get("midpoint"),
    "heun2": nde.solvers.get("heun"),
    "heun3": nde.solvers.get("heun3"),
    "rk4": nde.solvers.get("rk4_38"),
}
ADAMS = ("explicit_adams", "implicit_adams", "fixed_adams")
METHODS = (*ADAPTIVE, *FIXED, *ADAMS, "scipy_solver")

_FAR = 1e12  # how far an event is looked for
_FIXED_EVENT_STEPS = 20000


def check(method, options) -> tuple[str, dict]:
    """The method's name and a copy of its options."""
    method = "dopri5" if method is None else method
    if method not in METHODS:
        raise ValueError(f"invalid method {method!r}; must be one of {', '.join(METHODS)}")
    if options is not None and not isinstance(options, dict):
        raise TypeError(f"options must be a dict or None, got {type(options).__name__}")
    return method, dict(options or {})


def number(name: str, value, low: float = 0.0) -> float:
    """A number above `low` as a float; tensors without dimensions are numbers here."""
    if isinstance(value, Tensor) and value.numel() == 1:
        value = value.item()
    if not isinstance(value, numbers.Real):
        raise TypeError(f"option {name!r} must be a number, got {type(value).__name__}")
    if not value > low:
        raise ValueError(f"option {name!r} must be larger than {low:g}, got {value}")
    return float(value)


def _no_others(method: str, options: dict):
    if options:
        warnings.warn(f"{method}: Unexpected arguments {options}", stacklevel=6)


# -- adaptive methods ------------------------------------------------------------------------------------------------


def adaptive(case: Case, method: str, options: dict, event: bool) -> dict:
    """The options of `solve` for an adaptive method."""
    solver = ADAPTIVE[method]
    how = {"dt0": None, **_sizes(case, options, event)}
    control = _control(case, solver, options)
    _check_dtype(case, options.pop("dtype", None))
    stops = _stops(case, {name: options.pop(name, None) for name in ("step_t", "jump_t", "grid_points")}, event)
    _no_others(method, options)
    observer = case.observer(("callback_step", "callback_accept_step", "callback_reject_step"), method)
    if observer is not None:
        how["observer"] = observer
    return {"solver": solver, "control": control, **how, **stops}


def _sizes(case: Case, options: dict, event: bool) -> dict:
    """first_step, min_step, max_step and max_num_steps, as `solve` and `Backsolve` have them."""
    first, least, most = options.pop("first_step", None), options.pop("min_step", 0), options.pop("max_step", math.inf)
    steps = number("max_num_steps", options.pop("max_num_steps", 2**31 - 1))
    # torchdiffeq counts from one output time to the next.
    how = {"max_steps": int(steps) * (1 if event else len(case.t) - 1)}
    if first is not None:
        how["dt0"] = number("first_step", first)
    if number("min_step", least, low=-1e-300) > 0:
        how["dt_min"] = number("min_step", least)
    if number("max_step", most) < math.inf:
        how["dt_max"] = number("max_step", most)
    return how


def _control(case: Case, solver: Solver, options: dict) -> nde.StepControl:
    """torchdiffeq's integral controller."""
    safety, grow, shrink = (
        number(name, options.pop(name, default))
        for name, default in (("safety", 0.9), ("ifactor", 10.0), ("dfactor", 0.2))
    )
    if not safety <= 1.0:
        raise ValueError(f"option 'safety' must be at most 1, got {safety}")
    if not shrink < 1.0 < grow:
        raise ValueError(f"options 'dfactor' and 'ifactor' must enclose 1, got {shrink} and {grow}")
    norm, how = options.pop("norm", _mixed_norm if case.form.is_tuple else None), {}
    if norm is not None:
        if not callable(norm):
            raise TypeError(f"option 'norm' must be a function of a state, got {norm!r}")
        how["norm"] = lambda z: torch.as_tensor(norm(case.form.disclose(z)))
    return nde.StepControl(
        per_sample=False, safety=safety, factor_min=shrink, factor_max=grow, beta1=1 / solver.order, beta2=0.0, **how
    )


def lens(case: Case, method: str, options: dict, solver: str | Solver | None) -> tuple[Solver, nde.StepControl]:
    """What one step is looked at with: the method's own solver, or another one, and its norm."""
    if solver is None:
        solver = ({**ADAPTIVE, **FIXED}).get(method)
        if solver is None:
            raise ValueError(f"method {method!r} builds on earlier steps; give the solver that is to make this one")
    solver = nde.solvers.get(solver)
    return solver, _control(case, solver, {name: x for name, x in options.items() if name == "norm"})


def _mixed_norm(y: tuple[Tensor, ...]) -> Tensor:
    """The largest RMS of a tuple's tensors: torchdiffeq's norm for them."""
    return torch.stack([x.abs().square().mean().sqrt() for x in y if x.numel()]).max()


def _check_dtype(case: Case, dtype: torch.dtype | None):
    if dtype not in (None, case.t.dtype):
        warnings.warn(
            f"option 'dtype' has no effect: times are {case.t.dtype} for a {case.form.dtype} state, got {dtype}; "
            "convert y0 instead",
            stacklevel=6,
        )


def _stops(case: Case, given: dict, event: bool) -> dict:
    """step_t, jump_t, and grid_points, which is the jump_t of torchdiffeq 0.1."""
    found = {}
    for name, values in given.items():
        if values is not None:
            values = torch.as_tensor(values).detach().to(case.t).reshape(-1) * case.direction
            low, high = case.t.detach()[0] * case.direction, case.t.detach()[-1] * case.direction
            inside = (values > low) & (values < (math.inf if event else high))
            found[name] = (values[inside].sort().values) * case.direction
    everything = torch.cat([case.t.new_empty(0), *found.values()])
    if len(everything.unique()) < len(everything):
        raise ValueError("options 'step_t' and 'jump_t' must not have any repeated elements between them")
    jumps = torch.cat([case.t.new_empty(0), *(found[x] for x in ("jump_t", "grid_points") if x in found)])
    steps = found.get("step_t", case.t.new_empty(0))
    both = {"step_times": steps, "jump_times": jumps}
    return {
        name: (values * case.direction).sort().values * case.direction for name, values in both.items() if len(values)
    }


# -- fixed-step methods ----------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Fixed:
    """The options that fixed-step methods share."""

    grid: Tensor
    step_size: float | None
    interp: str
    perturb: bool

    @classmethod
    def of(cls, case: Case, options: dict, event: bool) -> Fixed:
        """Takes them out of `options`."""
        size, build = options.pop("step_size", None), options.pop("grid_constructor", None)
        interp, perturb = options.pop("interp", "linear"), options.pop("perturb", False)
        if size is not None and build is not None:
            raise ValueError("step_size and grid_constructor are mutually exclusive arguments.")
        if interp not in ("linear", "cubic"):
            raise ValueError(f"option 'interp' must be 'linear' or 'cubic', got {interp!r}")
        if not isinstance(perturb, bool):
            raise TypeError(f"option 'perturb' must be True or False, got {perturb!r}")
        if event and (size is None or perturb):
            raise ValueError("event_fn with a fixed-step method needs the option 'step_size', and takes no 'perturb'")
        size = None if size is None else number("step_size", size)
        grid = case.t if size is None else _even_grid(case.t, size, case.direction)
        if build is not None:
            grid = _built(build, case, case.t)
        return cls(grid, size, interp, perturb)


def _built(build, case: Case, t: Tensor) -> Tensor:
    """The grid of a grid_constructor, for these output times."""
    grid = build(case.func, case.y0, t)
    if not isinstance(grid, Tensor) or grid.dim() != 1 or bool((grid[[0, -1]].to(t) != t[[0, -1]]).any()):
        raise ValueError("option 'grid_constructor' must return a 1-D tensor from t[0] to t[-1]")
    return grid.to(t)


def _even_grid(t: Tensor, size: float, direction: int) -> Tensor:
    """Steps of one size from t[0]; the last one ends at t[-1]."""
    span = (t[-1] - t[0]).detach().abs()
    # Rounding must not leave a sliver of a step before the end.
    count = math.ceil(float(span) / size * (1 - 4 * torch.finfo(t.dtype).eps))
    inner = t[0] + direction * size * torch.arange(count, dtype=t.dtype, device=t.device)
    return torch.cat([inner, t[-1:]])


def fixed(case: Case, method: str, options: dict, event: bool) -> tuple[dict, Fixed]:
    """The options of `solve` for a fixed-step method, and its own."""
    own = Fixed.of(case, options, event)
    _no_others(method, options)
    span = float((own.grid[-1] - own.grid[0]).detach().abs())
    how = {"solver": FIXED[method], "control": nde.StepControl(per_sample=False), "dt0": span}
    how["max_steps"] = max(1, len(own.grid) - 1)
    if event:
        how["dt0"], how["max_steps"] = own.step_size, _FIXED_EVENT_STEPS
    elif own.perturb:
        # No step looks across its ends, nor does the solve across its own.
        how["jump_times"] = own.grid.detach()
    elif len(own.grid) > 2:
        how["step_times"] = own.grid[1:-1].detach()
    observer = case.observer(("callback_step",), method)
    if observer is not None:
        how["observer"] = observer
    return how, own


def between(grid: Tensor, ys: Tensor, t: Tensor, direction: int) -> Tensor:
    """Linear interpolation of ys ([points, ...]) on the grid, at the times t."""
    grid = grid.detach()
    right = torch.searchsorted(grid * direction, t.detach() * direction).clamp(1, len(grid) - 1)
    dt = grid[right] - grid[right - 1]
    theta = (t - grid[right - 1]) / dt
    # A time on the grid must not depend on a neighbour too, by its rounding: a backward solve would have to stop there.
    near = theta.detach().round()
    on_grid = (theta.detach() - near).abs() * dt.abs() <= 4 * torch.finfo(t.dtype).eps * t.detach().abs()
    theta = theta + torch.where(on_grid, near - theta.detach(), 0.0)
    theta = theta.reshape(-1, *(1,) * (ys.dim() - 1)).to(ys.dtype)
    return ys[right - 1] + theta * (ys[right] - ys[right - 1])


class Adams:
    """A solve by an Adams method, on the tape: it remembers its last steps, which a replay of one step could not.

    Args:
        case: what is solved.
        method, options, rtol, atol: how.
        event: whether an event ends it.
    """

    def __init__(self, case: Case, method: str, options: dict, rtol, atol, event: bool):
        self.case, self.own = case, Fixed.of(case, options, event)
        self.implicit = options.pop("implicit", True) and method != "explicit_adams"
        order, iters = options.pop("max_order", _adams.MOST), options.pop("max_iters", 4)
        if not (isinstance(order, numbers.Integral) and 1 <= order <= _adams.MOST):
            raise ValueError(f"option 'max_order' must be an integer from 1 to {_adams.MOST}, got {order!r}")
        if not (isinstance(iters, numbers.Integral) and iters >= 1):
            raise ValueError(f"option 'max_iters' must be a positive integer, got {iters!r}")
        _no_others(method, options)
        self.order, self.iters, self.observer = int(order), int(iters), case.observer(("callback_step",), method)
        form = case.form
        self.rtol, self.atol = (form.flatten(x) if isinstance(x, Tensor | tuple) else x for x in (rtol, atol))

    def _f(self, t: Tensor, flat: Tensor, side: int) -> Tensor:
        if self.own.perturb and side:
            t = torch.nextafter(t, t + side * self.case.direction)
        return self.case.flat_field(t, flat)

    def _before(self, t: Tensor, flat: Tensor, dt: Tensor):
        if self.observer is not None:
            self.observer.attempt(t, self.case.form.enclose(self.case.form.unflatten(flat)), dt)

    def _steps(self, grid):
        start = self.case.form.flatten(self.case.y0)
        return _adams.steps(
            self._f, start, grid, self.implicit, self.rtol, self.atol, self.order, self.iters, self._before
        )

    def outputs(self):
        """The states at the output times."""
        case, grid = self.case, self.own.grid
        slopes, ys = zip(*self._steps(grid), strict=True)
        ys = torch.stack([case.form.flatten(case.y0), *ys])
        if self.own.interp == "linear":
            return case.form.unflatten(between(grid, ys, case.t, case.direction))
        slopes = torch.stack([*slopes, self._f(grid[-1], ys[-1], -1)])
        return case.form.unflatten(_cubic(grid.detach(), ys, slopes, case.t, case.direction))

    def until_event(self, event_fn):
        """As the function of that name."""
        case, start = self.case, self.case.t[0]
        condition, at_once = event_condition(case, event_fn)
        if at_once:
            return _at_start(case)

        def value(t, flat):
            return condition(t, case.form.enclose(case.form.unflatten(flat)))

        size, previous = self.own.step_size * case.direction, case.form.flatten(case.y0)
        grid = (start + i * size for i in range(_FIXED_EVENT_STEPS))
        for i, (slope, y) in enumerate(self._steps(grid)):  # noqa: B007  (used after the loop)
            ends = torch.stack([start + i * size, start + (i + 1) * size])
            if bool(value(ends[1], y) <= 0):
                break
            previous = y
        else:
            raise nde.MaxStepsReached(f"event_fn has no zero within {_FIXED_EVENT_STEPS - 1} steps of step_size")
        path = ends.detach(), torch.stack([previous, y]), torch.stack([slope, self._f(ends[1], y, -1)])
        theta = _bisect(lambda x: value(*_inside(path, x, case.direction)))
        return _moving_event(case, value, ends, path, theta)


def _inside(path, theta: float, direction: int):
    """(time, state) within one step."""
    t = torch.lerp(path[0][0], path[0][1], theta)
    return t, _cubic(*path, t[None], direction)[0]


@torch.no_grad()
def _bisect(value) -> float:
    """Where in [0, 1] a value, positive at 0, becomes negative."""
    low, high = 0.0, 1.0
    for _ in range(52):
        middle = (low + high) / 2
        low, high = (middle, high) if bool(value(middle) > 0) else (low, middle)
    return high


def _moving_event(case: Case, value, ends: Tensor, path, theta: float):
    """The event's time and states, with the gradients of the implicit function that the time is."""
    t, y = _inside(path, theta, case.direction)
    late = torch.lerp(ends[0], ends[1], theta) - t  # zero, with the gradient of the start
    with torch.no_grad():
        slope = case.flat_field(t, y)
    if torch.is_grad_enabled():
        with torch.enable_grad():
            now = t.clone().requires_grad_()
            here = y.detach() + (now - t).to(y.dtype) * slope
            (rate,) = torch.autograd.grad(value(now, here).sum(), now)
        shifted = value(t, y - late.to(y.dtype) * slope).sum()
        moved = -(shifted - shifted.detach()) / rate
        t, y = t + moved, y + (moved - late).to(y.dtype) * slope
    states = pytree.tree_map(lambda a, b: torch.stack([a, b]), case.y0, case.form.unflatten(y))
    return t.to(case.time_dtype), states


def _cubic(grid: Tensor, ys: Tensor, slopes: Tensor, t: Tensor, direction: int) -> Tensor:
    """Hermite interpolation of ys and their slopes ([points, features]) at the times t."""
    right = torch.searchsorted(grid * direction, t.detach() * direction).clamp(1, len(grid) - 1)
    left, dt = right - 1, grid[right] - grid[right - 1]
    x = (t - grid[left]) / dt
    x, dt = x[:, None], dt[:, None]
    return (
        (1 + 2 * x) * (1 - x) ** 2 * ys[left]
        + x * (1 - x) ** 2 * dt * slopes[left]
        + x**2 * (3 - 2 * x) * ys[right]
        - x**2 * (1 - x) * dt * slopes[right]
    )


def scipy(case: Case, options: dict, rtol, atol) -> Tensor:
    """The outputs of `scipy.integrate.solve_ivp`, [times, features], without gradients."""
    from scipy.integrate import solve_ivp

    name, least, most = options.pop("solver", "LSODA"), options.pop("min_step", 0), options.pop("max_step", math.inf)
    _no_others("scipy_solver", options)
    case.observer((), "scipy_solver")
    how = {"max_step": number("max_step", most)}
    if name == "LSODA":
        how["min_step"] = number("min_step", least, low=-1e-300)
    elif least:
        raise ValueError(f"option 'min_step' of scipy_solver is LSODA's alone, got solver={name!r}")
    y0 = case.form.flatten(case.y0).detach()
    rtol, atol = (case.form.flatten(x).cpu().numpy() if isinstance(x, Tensor | tuple) else x for x in (rtol, atol))

    @torch.no_grad()
    def f(t, y):
        t, y = torch.as_tensor(t).to(y0.device, y0.real.dtype), torch.as_tensor(y).to(y0)
        return case.flat_field(t, y).cpu().numpy()

    t = case.t.detach().cpu().numpy().astype("float64")
    result = solve_ivp(f, (t[0], t[-1]), y0.cpu().numpy(), t_eval=t, method=name, rtol=rtol, atol=atol, **how)
    if not result.success:
        raise nde.NeuralDEError(f"scipy's {name} failed: {result.message}")
    return torch.as_tensor(result.y.T).to(y0)


# -- the backward solve ------------------------------------------------------------------------------------------------


def backsolve(
    case: Case, method: str, options: dict, tolerances: tuple, event: bool, given: dict
) -> nde.adjoints.Backsolve:
    """torchdiffeq's adjoint.

    Args:
        method, options: of the solve, checked. tolerances: of the solve, for the case. event: whether an event ends it.
        given: the adjoint_* arguments, without the parameters.
    """
    own, asked = given["adjoint_options"], given["adjoint_method"]
    if asked not in (None, method) and options and own is None:
        raise ValueError(
            "adjoint_options must be given too where adjoint_method is not method and options are given: they can't be "
            "inferred"
        )
    forward = options
    method, own = check(asked or method, {k: v for k, v in options.items() if k != "norm"} if own is None else own)
    if method not in (*ADAPTIVE, *FIXED):
        raise ValueError(f"adjoint_method {method!r} can't solve backwards here; use {', '.join((*ADAPTIVE, *FIXED))}")
    how = {name: _one_tolerance(f"adjoint_{name}", given[f"adjoint_{name}"]) for name in ("rtol", "atol")}
    inherited = [x for x, one in zip(tolerances, how.values(), strict=True) if one is None]
    how["seminorm"] = "norm" in own
    if how["seminorm"] and own["norm"] != "seminorm":
        raise ValueError(
            f"option 'norm' of the adjoint must be 'seminorm' or absent, got {own['norm']!r}. A function of "
            "(vjp_t, y, adj_y, *params) can't be used: vjp_t is no part of the state here, and params come in no fixed "
            "order. The norm in options measures y and adj_y"
        )
    own.pop("norm", None)
    numbers_alone = not any(isinstance(x, Tensor | tuple) for x in inherited)
    if method in FIXED:  # no error is tested: the parameters' integral by the method's own weights, where it can be had
        how["seminorm"] = case.form.dtype.is_complex or not numbers_alone
    if not how["seminorm"] and case.form.dtype.is_complex:
        raise ValueError("a complex y0 needs adjoint_options={'norm': 'seminorm'}")
    if not how["seminorm"] and not numbers_alone:
        raise ValueError(
            "adjoint_rtol and adjoint_atol must be given, as numbers, where rtol and atol are not numbers; or "
            "adjoint_options={'norm': 'seminorm'}"
        )
    if method in FIXED:
        how |= _fixed_backwards(case, own, event)
    else:
        how |= _adaptive_backwards(case, method, own, forward, event)
    _no_others(f"adjoint_method {method}", own)
    return nde.adjoints.Backsolve(solver=ADAPTIVE.get(method) or FIXED[method], **how)


def _one_tolerance(name: str, value) -> float | None:
    if value is None:
        return None
    if not isinstance(value, numbers.Real) and not (isinstance(value, Tensor) and value.numel() == 1):
        raise TypeError(f"{name} must be a number, for y, its adjoint and the parameters alike, got {value!r}")
    return float(value)


def _adaptive_backwards(case: Case, method: str, options: dict, forward: dict, event: bool) -> dict:
    """The options of `Backsolve` for an adaptive method."""
    control = dataclasses.replace(_control(case, ADAPTIVE[method], options), norm=None)
    sizes = _sizes(case, options, event)
    _check_dtype(case, options.pop("dtype", None))
    stops = _stops(case, {name: options.pop(name, None) for name in ("step_t", "jump_t", "grid_points")}, event)
    known = _stops(case, {name: forward.get(name) for name in ("jump_t", "grid_points")}, event).get("jump_times")
    jumps = stops.get("jump_times", case.t.new_empty(0))
    if len(jumps) and (known is None or not bool(torch.isin(jumps, known).all())):
        raise ValueError(
            "option 'jump_t' of the adjoint must be among those of the solve: give options={'jump_t': ...}"
        )
    return {"control": control, "step_times": stops.get("step_times"), **sizes}


def _fixed_backwards(case: Case, options: dict, event: bool) -> dict:
    """The options of `Backsolve` for a fixed-step method, whose grid goes from every output time to the one before."""
    build = options.get("grid_constructor")
    own = Fixed.of(case, options, event)
    if own.perturb:
        raise ValueError(
            "option 'perturb' can't be had in the backward solve; give adjoint_options without it, or an adaptive "
            "method and its 'jump_t'"
        )
    if event:
        return {"dt0": own.step_size, "max_steps": _FIXED_EVENT_STEPS}
    parts = []
    for i in range(len(case.t) - 1, 0, -1):
        back = case.t.detach()[[i, i - 1]]
        if build is not None:
            parts.append(_built(build, case, back))
        else:
            parts.append(back if own.step_size is None else _even_grid(back, own.step_size, -case.direction))
    grid = torch.cat(parts)
    return {"dt0": float((grid[0] - grid[-1]).abs()), "max_steps": len(grid), "step_times": grid}


# -- events ----------------------------------------------------------------------------------------------------------


def event_condition(case: Case, event_fn):
    """event_fn as a condition of one sample: positive at the start, so that several are one by their least."""
    if len(case.t) != 2:
        raise ValueError(f"with event_fn, t must hold two times, the start and one after it, got {len(case.t)}")
    with torch.no_grad():
        signs = torch.sign(event_fn(case.t[0], case.y0))

    def condition(t, z):
        return (event_fn(t.reshape(()), case.form.disclose(z)) * signs).min().reshape(1)

    return condition, bool((signs == 0).any())


def _at_start(case: Case):
    return case.t[0].to(case.time_dtype), pytree.tree_map(lambda x: torch.stack([x, x]), case.y0)


def until_event(case: Case, event_fn, how: dict):
    """(event_t, [2, ...] states at the start and at the event), differentiable."""
    condition, at_once = event_condition(case, event_fn)
    if at_once:
        return _at_start(case)
    t, z0 = case.t.detach(), case.z0
    if case.t.requires_grad and torch.is_grad_enabled():
        # A later start is the same start moved back along f.
        with torch.no_grad():
            slope = case.field(t[0], z0)
        late = case.t[0] - t[0]
        z0 = pytree.tree_map(lambda z, dz: z - late.to(z.dtype) * dz, z0, slope)
    span = torch.stack([t[0], t[0] + case.direction * _FAR])
    event = nde.Event(condition, terminal=True)
    solution = nde.solve(nde.ODE(case.field), z0, span, events=event, **how)
    (found,) = solution.events
    if not bool(found.mask.any()):
        raise nde.NeuralDEError(f"event_fn has no zero from t = {float(t[0]):.6g} to {float(span[1]):.6g}")
    states = pytree.tree_map(lambda y, z: torch.stack([y, z[0, 0].to(y.dtype)]), case.y0, found.z)
    return found.t[0, 0].to(case.time_dtype), states
