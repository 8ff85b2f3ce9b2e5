"""torchdiffeq's functions, which show their solves to penalties: the import is the whole change to them.

    from regularizers.torchdiffeq import odeint

    penalty = reg.LocalError(weight=1e-2)
    y = odeint(func, y0, t)
    loss = loss + penalty(odeint.solution)

torchdiffeq makes the solves, with its own methods: results and gradients are the same to the bit. A time is sampled,
and added to the requested ones where that moves no step and changes no bit; else the accepted steps are watched by
torchdiffeq's callbacks, and the one around that time is made once more, without a tape.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from functools import partial

import torch
import torchdiffeq
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import neuralde as nde
from neuralde import introspection
from neuralde.interop import torchdiffeq as interop
from neuralde.introspection import Probe
from neuralde.seen import looked_at
from neuralde.solve import untraced

from .recomputed import hooked
from .recorded import Keeping, Passing, Place, Recorded, Skipped, able, draws, keep, sampled, shown, unwanted, within
from .rows import Rows

__all__ = ["odeint", "odeint_adjoint", "odeint_event"]

_ADAMS = ("explicit_adams", "implicit_adams", "fixed_adams")
_CALLBACKS = ("callback_step", "callback_accept_step", "callback_reject_step")


class _Recording(Keeping):
    """odeint or odeint_adjoint.

    Args:
        function: of torchdiffeq. adjoint: whether it is odeint_adjoint.
    """

    def __init__(self, function: Callable, adjoint: bool):
        super().__init__(function)
        self._adjoint = adjoint

    def __call__(self, func, y0, t, **kwargs):
        """As torchdiffeq's function of this name."""
        self._last.solution = None  # lets go of the last call's graph before this one's is built
        likes = y0 if isinstance(y0, tuple) else (y0,)
        usable = bool(likes) and all(isinstance(x, Tensor) for x in likes)
        usable = usable and isinstance(t, Tensor) and t.dim() == 1 and t.is_floating_point()
        why = unwanted(func) if usable and len(t) > 1 else "at a single time"
        if not usable or why is not None:
            if usable and looked_at():
                self._show(func, y0, t, kwargs)
            result = self.__wrapped__(func, y0, t, **kwargs)
            self._last.solution = keep(Skipped(f"torchdiffeq.{self.__name__}", likes[0], why)) if usable else None
            return result
        return untraced(_Recording._watched)(self, func, y0, t, kwargs)

    def _show(self, func, y0, t: Tensor, kwargs: dict):
        """Has neuralde make the solve too, for who looks at its solves, where it has the method."""
        known = (kwargs.get("method") or "dopri5") in interop.SOLVERS
        if known and len(t) > 1 and kwargs.get("event_fn") is None:
            how = {name: kwargs[name] for name in ("rtol", "atol", "method", "options") if name in kwargs}
            interop.solution(func, y0, t, **how)

    def _watched(self, func, y0, t, kwargs: dict):
        result, solution = _Solve(self.__wrapped__, self._adjoint, func, y0, t, kwargs).run()
        self._last.solution = keep(solution)
        return result


class _Event(Keeping):
    """odeint_event, whose solve is made by its odeint_interface, by default this module's odeint."""

    def __call__(self, func, y0, t0, *, event_fn, reverse_time=False, odeint_interface=None, **kwargs):
        """As torchdiffeq's."""
        self._last.solution = None
        interface = odeint if odeint_interface is None else odeint_interface
        how = {"event_fn": event_fn, "reverse_time": reverse_time, "odeint_interface": interface, **kwargs}
        result = self.__wrapped__(func, y0, t0, **how)
        self._last.solution = getattr(interface, "solution", None)
        return result


odeint = _Recording(torchdiffeq.odeint, adjoint=False)
odeint_adjoint = _Recording(torchdiffeq.odeint_adjoint, adjoint=True)
odeint_event = _Event(torchdiffeq.odeint_event)


class _Solve:
    """One call, made and watched.

    Args:
        function: of torchdiffeq. adjoint: whether it is odeint_adjoint, whose states have no tape, and whose backward
            pass would be another one with a further output time.
        func, y0, t, kwargs: what it is called with.
    """

    def __init__(self, function: Callable, adjoint: bool, func, y0, t: Tensor, kwargs: dict):
        self.function, self.adjoint, self.func, self.y0, self.t, self.kwargs = function, adjoint, func, y0, t, kwargs
        self.method = kwargs.get("method") or "dopri5"
        self.options = dict(kwargs.get("options") or {})
        self.tolerances = {"rtol": kwargs.get("rtol", 1e-7), "atol": kwargs.get("atol", 1e-9)}
        self.solver = interop.SOLVERS.get(self.method)
        self.adaptive = self.solver is not None and self.solver.adaptive
        self.stepwise = self.solver is not None or self.method in _ADAMS
        self.source = f"torchdiffeq.{function.__name__} (method {self.method!r})"
        ends = t.detach()[[0, -1]]
        self.direction = -1 if bool(ends[1] < ends[0]) else 1

    def run(self) -> tuple[object, Recorded]:
        """(what torchdiffeq returns, what a penalty takes)."""
        drawn = draws(self.func, self.y0)
        if self.kwargs.get("event_fn") is not None:
            result, places = self._until_event(drawn)
        elif self.stepwise or self.method == "scipy_solver":
            result, places = self._through_times(drawn)
        else:
            result = self._call(self.func, self.t, {})
            why = f"method {self.method!r} is not known here"
            places = {"unbiased": why, "biased": why}
        ys = result if self.kwargs.get("event_fn") is None else result[1]
        end = ys[-1] if isinstance(ys, Tensor) else pytree.tree_map(lambda y: y[-1], ys)
        return result, Recorded(self.source, places, self._lens, end)

    def _call(self, func, t: Tensor, changed: dict):
        kwargs = {**self.kwargs, **changed}
        if self.adjoint and func is not self.func and kwargs.get("adjoint_params") is None:
            if not isinstance(self.func, nn.Module):
                func = self.func  # torchdiffeq says what is missing
            else:
                kwargs["adjoint_params"] = _parameters(self.func)
        return self.function(func, self.y0, t, **kwargs)

    # -- to given times --------------------------------------------------------------------------------------------

    def _through_times(self, drawn: random.Random) -> tuple[object, dict]:
        t = self.t.detach()
        at = sampled(drawn, t[0], t[-1])
        passing = Passing(drawn, self.direction, float(at))
        func = self._watched(passing.add) if self.stepwise else self.func
        # Cubic interpolation would evaluate func once more; SciPy's is one product with the other times, which changes
        # their last bits. A checkpoint's second pass must leave on the tape what the first did, wherever the time is.
        if hooked() or self.adjoint or not self.stepwise or self.options.get("interp") == "cubic":
            result = self._call(func, self.t, {})
            if not self.stepwise:
                first = int((self.direction * (t - at) <= 0).sum()) - 1
                passing.around = t[first], pytree.tree_map(lambda y: y[first], result), None
            start = passing.around
            unbiased = partial(self._place, at, start[2], t[-1], lambda through: self._state(start, at, through))
        else:
            result, state = self._with_output(func, at)
            step = passing.around[2]
            unbiased = partial(self._place, at, step, t[-1], lambda through: self._shown(state, through))
        if passing.uniform is None:
            return result, {"unbiased": unbiased, "biased": "its steps are SciPy's, and shown to nobody"}
        return result, {"unbiased": unbiased, "biased": partial(self._start_of, passing.uniform, t[-1])}

    def _with_output(self, func, at: Tensor) -> tuple[object, object]:
        """(the result at the times asked for, the state at one more). That moves no step, and changes no other bit."""
        t = self.t
        before = int((self.direction * (t.detach() - at) <= 0).sum())
        if bool(t.detach()[before - 1] == at):
            result = self._call(func, t, {})
            return result, _row(result, before - 1)
        options = self.options
        if not self.adaptive and options.get("step_size") is None:
            # The steps are those between the times asked for, or made from them.
            build = options.get("grid_constructor")
            options = options | {
                "grid_constructor": lambda f, y, times: t.to(times) if build is None else build(f, y, t.to(times))
            }
        changed = {"options": options} if options is not self.options else {}
        ys = self._call(func, torch.cat([t[:before], at.reshape(1), t[before:]]), changed)
        others = pytree.tree_map(lambda y: torch.cat([y[:before], y[before + 1 :]]), ys)
        return others, _row(ys, before)

    # -- to an event -----------------------------------------------------------------------------------------------

    def _until_event(self, drawn: random.Random) -> tuple[object, dict]:
        passing, changed, func = Passing(drawn, self.direction, None), {}, self.func
        if self.adaptive:
            func = self._watched(passing.add)
        elif self.stepwise:  # no callbacks, but the event function is shown the end of every step
            changed["event_fn"] = _Ends(self.kwargs["event_fn"], self.direction, passing.add)
        result = self._call(func, self.t, changed)
        end = result[0].detach()
        t = passing.ended(float(end))
        if t is None:
            why = "the event takes place at the start" if self.stepwise else f"method {self.method!r} shows no steps"
            return result, {"unbiased": why, "biased": why}
        at, start = self.t.detach().new_tensor(t), passing.around
        unbiased = partial(self._place, at, start[2], end, lambda through: self._state(start, at, through))
        return result, {"unbiased": unbiased, "biased": partial(self._start_of, passing.uniform, end)}

    # -- what was seen ---------------------------------------------------------------------------------------------

    def _watched(self, notice: Callable) -> Callable:
        """func, with a callback that sees the accepted steps; func itself may be shared, and is left alone."""
        func, name = self.func, "callback_accept_step" if self.adaptive else "callback_step"
        theirs = getattr(func, name, None)

        def watched(t, y):
            return func(t, y)

        def callback(t, y, dt):
            notice(t, y, dt)
            if theirs is not None:
                theirs(t, y, dt)

        for one in (*_CALLBACKS, *(f"{x}_adjoint" for x in _CALLBACKS)):
            if hasattr(func, one):
                setattr(watched, one, getattr(func, one))
        setattr(watched, name, callback)
        return watched

    def _signed(self, dt: Tensor | None) -> Tensor | None:
        return None if dt is None else self.direction * torch.as_tensor(dt).detach()

    def _place(self, t: Tensor, dt: Tensor | None, end: Tensor, state: Callable) -> Place:
        return Place(t, None if dt is None else within(t, self._signed(dt), end), state)

    def _start_of(self, step: tuple, end: Tensor) -> Place:
        t, y, dt = step
        return self._place(t.detach(), dt, end, lambda through: self._shown(y, through))

    def _shown(self, y, through: bool):
        return shown(y, through, not self.adjoint, self.source, "odeint")

    def _state(self, start: tuple, at: Tensor, through: bool):
        """The solution inside of a step, which torchdiffeq makes once more: its own interpolant has the state there.

        Of SciPy's solver no step is known, and torchdiffeq solves on from the last output before.
        """
        t, y, dt = start
        y = self._shown(y, through)
        if bool(t == at):
            return y
        options, times = dict(self.options), [t.detach(), at]
        if self.adaptive:
            options["first_step"] = dt
        elif self.stepwise:
            options.pop("step_size", None)
            options["grid_constructor"] = lambda f, y, times: times[[0, -1]]
            end = t.detach() + self._signed(dt)
            times += [end] if bool(self.direction * (end - at) > 0) else []
        times = torch.stack([x.to(at.device, torch.promote_types(t.dtype, at.dtype)) for x in times])
        func = self.func

        with torch.set_grad_enabled(through and torch.is_grad_enabled()):
            # A function, so that the callbacks of func see no step that is none of the solve's.
            ys = torchdiffeq.odeint(
                lambda t, y: func(t, y), y, times, method=self.method, options=options, **self.tolerances
            )
        return pytree.tree_map(lambda y: y[1], ys)

    def _lens(self, place: Place, z, solver, figure: str | None, rows: Rows) -> Probe:
        if solver is None:
            solver = self.solver if self.solver is not None and able(self.solver, figure) else "tsit5"
        solver = nde.solvers.get(solver)
        if place.dt is not None and self._plain(z, solver):
            field = rows.still(lambda t, y: self.func(t, y).to(y.dtype))
            found = introspection.probe_step(field, place.t, z, place.dt, solver, **self.tolerances, figure=figure)
            return rows.averaged(found)
        how = {"method": self.method, "options": self.options, **self.tolerances}
        ends = {"dt": place.dt, "t1": None if place.dt is not None else self.t.detach()[-1]}
        found = interop.probe(rows.still(self.func), place.t, z, solver=solver, **how, **ends)
        return found if "norm" in self.options else rows.averaged(found)

    def _plain(self, z, solver: nde.solvers.Solver) -> bool:
        """Whether the state can be a batch, with one step and one norm, which is quicker than to be one sample."""
        numbers = all(isinstance(x, float | int) for x in self.tolerances.values())
        batch = isinstance(z, Tensor) and z.dim() > 0 and not solver.linearizes  # func may mix its rows
        return numbers and batch and "norm" not in self.options


class _Ends:
    """An event function that notices the steps of a fixed-step solve by where it is evaluated.

    Args:
        event_fn: the user's. direction: of time. notice: called with (t, y, dt).
    """

    def __init__(self, event_fn: Callable, direction: int, notice: Callable):
        self.event_fn, self.direction, self.notice, self.last = event_fn, direction, notice, None

    def __call__(self, t, y):
        """event_fn(t, y)."""
        if self.last is None or bool(self.direction * (t - self.last[0]) > 0):
            if self.last is not None:
                self.notice(*self.last, (t - self.last[0]).abs())
            self.last = t, y
        elif bool(t == self.last[0]):
            self.last = t, y  # the same once more, with its tape
        return self.event_fn(t, y)


def _row(ys, i: int):
    """A state among the outputs, which a view of it would keep all."""
    return pytree.tree_map(lambda y: y[i].clone(), ys)


def _parameters(func: nn.Module) -> tuple[Tensor, ...]:
    """What torchdiffeq takes for adjoint_params of a Module."""
    if not getattr(func, "_is_replica", False):
        return tuple(func.parameters())
    # A replica of DataParallel has them as attributes.
    found = [x for module in func.modules() for x in vars(module).values()]
    return tuple(x for x in found if isinstance(x, Tensor) and x.requires_grad)
