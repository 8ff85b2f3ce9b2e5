"""torchsde's functions, which show their solves to penalties: the import is the whole change to them.

    from regularizers.torchsde import sdeint

    penalty = reg.LocalError(weight=1e-2)
    ys = sdeint(sde, y0, ts, method="srk", dt=1e-2)
    loss = loss + penalty(sdeint.solution)

torchsde makes the solves, on the Brownian path that it would have had: results and gradients are the same to the bit.
The steps are seen by what they ask of the Brownian motion and of the SDE. A penalty's step is one of the same method,
with fresh noise; its error is torchsde's own estimate, one step against two of half the size.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial

import torch
import torchsde
from torch import Tensor, nn

import neuralde as nde
from neuralde import solvers
from neuralde.control import rms
from neuralde.introspection import Probe
from neuralde.solve import untraced

from .recorded import Keeping, Passing, Place, Recorded, Skipped, able, draws, keep, sampled, shown, unwanted, within
from .rows import Rows

__all__ = ["sdeint", "sdeint_adjoint"]

_METHODS = ("euler", "milstein", "srk", "euler_heun", "heun", "midpoint", "log_ode")
_EVALUATIONS = ("f", "g", "f_and_g", "g_prod", "f_and_g_prod")


class _Recording(Keeping):
    """sdeint or sdeint_adjoint.

    Args:
        function: of torchsde. taped: whether its states are on the tape.
    """

    def __init__(self, function: Callable, taped: bool):
        super().__init__(function)
        self._taped, self._signature = taped, inspect.signature(function)

    def __call__(self, sde, y0, ts, *args, **kwargs):
        """As torchsde's function of this name."""
        self._last.solution = None  # lets go of the last call's graph before this one's is built
        how = self._signature.bind(sde, y0, ts, *args, **kwargs)
        how.apply_defaults()
        how = how.arguments
        usable = isinstance(y0, Tensor) and y0.dim() == 2 and _increasing(ts)
        usable = usable and all(hasattr(sde, x) for x in ("noise_type", "sde_type"))
        source = f"torchsde.{self.__name__} (method {how['method'] or 'of its choice'!r})"
        why = unwanted(sde)
        # The adjoint says what is missing where there are no parameters, of what is shown to it, which is a Module.
        usable = usable and (self._taped or how["adjoint_params"] is not None or isinstance(sde, nn.Module))
        if not usable or why is not None:
            result = self.__wrapped__(sde, y0, ts, *args, **kwargs)
            self._last.solution = keep(Skipped(source, y0, why)) if usable else None
            return result
        return untraced(_Recording._watched)(self, source, how)

    def _watched(self, source: str, how: dict):
        watch = _Watch(source, how, self._taped)
        unknown = how.pop("unused_kwargs", {})
        result = self.__wrapped__(**{**how, **unknown, "sde": watch.sde, "bm": watch.path})
        ys = result if isinstance(result, Tensor) else result[0]
        watch.close(ys)
        self._last.solution = keep(watch.recorded(ys[-1]))
        return result


sdeint = _Recording(torchsde.sdeint, taped=True)
sdeint_adjoint = _Recording(torchsde.sdeint_adjoint, taped=False)


class _Watch:
    """A solve that is watched: what it is called with instead of its SDE and its Brownian motion.

    Args:
        source: who solves. how: the arguments of sdeint. taped: whether its states are on the tape.

    Attributes:
        sde, path: for the call.
    """

    def __init__(self, source: str, how: dict, taped: bool):
        self.source, self.how, self.taped = source, how, taped
        y0, ts = how["y0"], how["ts"]
        self.drawn = draws(how["sde"], y0)
        ts = ts.detach() if isinstance(ts, Tensor) else torch.tensor(ts, dtype=y0.dtype, device=y0.device)
        self.at, self.end = sampled(self.drawn, ts[0], ts[-1]), ts[-1]
        self.passing = Passing(self.drawn, 1, float(self.at))
        self.method = how["method"] or _default_method(how["sde"])
        self.noise, self.entropy = None, self.drawn.randrange(2**31 - 1)
        brownian = how["bm"] if how["bm"] is not None else self._brownian(ts)
        if brownian is not None:
            self.noise = brownian.shape[1] - (how["logqp"] and how["sde"].noise_type == "diagonal")
        self.path = brownian and _Path(brownian, self._step)
        self.sde = _Shown(how["sde"], (*_EVALUATIONS, *(how["names"] or {}).values()), self._evaluated)
        self._start = self._last = None  # of the attempt that begins; (t, y, dt) of the one before
        self._queries, self._open = 0, True

    def _brownian(self, ts: Tensor):
        """The Brownian motion that torchsde would have made, of the same seed."""
        sde, y0 = self.how["sde"], self.how["y0"]
        noise = _noise_size(sde, ts[0], y0, self.how["names"] or {})
        if noise is None:  # torchsde says what is missing
            return None
        noise += self.how["logqp"] and sde.noise_type == "diagonal"
        return torchsde.BrownianInterval(
            t0=ts[0],
            t1=ts[-1],
            size=(len(y0), noise),
            dtype=y0.dtype,
            device=y0.device,
            levy_area_approximation=_levy_area(self.method),
        )

    def _step(self, t0, t1):
        """Every step first asks for its increment; an adaptive attempt is a whole step and two halves."""
        if not self._open:
            return
        if not self.how["adaptive"] or self._queries % 3 == 0:
            self._start = t0, t1 - t0
        self._queries += 1

    def _evaluated(self, t, y: Tensor):
        """And then it evaluates the SDE where it starts."""
        if not self._open or self._start is None:
            return
        (t, dt), self._start = self._start, None
        self._arrived(t, y)
        self._last = t, y, dt

    def _arrived(self, t, y: Tensor):
        if self._last is not None and bool(t > self._last[0]):  # else the last attempt was rejected
            start, z, dt = self._last
            self.passing.add(start, (z, y), dt)

    def close(self, ys: Tensor):
        """The solve is over, with these outputs; what a backward pass asks for is not looked at."""
        self._open = False
        if self._last is not None:
            self._arrived(self._last[0] + self._last[2], ys[-1])

    def recorded(self, end: Tensor) -> Recorded:
        """What a penalty takes of the solve, which ended there."""
        if self.method == "reversible_heun":
            why = "method 'reversible_heun' does not evaluate the SDE at its states; take 'heun' or 'midpoint'"
            places = {"unbiased": why, "biased": why}
        else:
            start, z, dt = self.passing.around
            first, states, whole = self.passing.uniform

            def inside(through):
                # As torchsde has its outputs, by linear interpolation.
                part = ((self.at - start) / dt).to(z[0].dtype)
                a, b = (self._shown(x, through) for x in z)
                return torch.lerp(a, b, part.clamp(0.0, 1.0))

            places = {
                "unbiased": partial(self._place, self.at, dt, inside),
                "biased": partial(self._place, first, whole, lambda through: self._shown(states[0], through)),
            }
        return Recorded(self.source, places, self._lens, end)

    def _place(self, t, dt, state: Callable) -> Place:
        t = torch.as_tensor(t).to(self.end)
        return Place(t, within(t, torch.as_tensor(dt).to(t), self.end), state)

    def _shown(self, y: Tensor, through: bool) -> Tensor:
        return shown(y, through, self.taped, self.source, "sdeint")

    def _lens(self, place: Place, y: Tensor, solver, figure: str | None, rows: Rows) -> Probe:
        if not able(_Estimate, figure) or not (solver is None or solver in _METHODS):
            return self._by_neuralde(place, y, solver, figure, rows)
        method, how = solver or self.method, self.how
        t, dt = place.t, place.dt
        if not bool((t < t + 0.5 * dt) & (t + 0.5 * dt < t + dt)):
            # A last step that rounding left over, which has no halves: the one before is as long as they are.
            start = self.how["ts"][0]
            t = torch.maximum(self.end - torch.as_tensor(how["dt"]).to(t), torch.as_tensor(start).to(t))
            dt = self.end - t
        noise = torchsde.BrownianInterval(
            t0=t,
            t1=t + dt,
            size=(len(y), self.noise),
            dtype=y.dtype,
            device=y.device,
            entropy=self.entropy,
            levy_area_approximation=_levy_area(method),
        )

        def step(start, end, y):
            return torchsde.sdeint(
                how["sde"],
                y,
                torch.stack([start, end]),
                bm=noise,
                method=method,
                dt=end - start,
                options=how["options"],
                names=how["names"],
            )[-1]

        middle = t + 0.5 * dt
        whole, halves = step(t, t + dt, y), step(middle, t + dt, step(t, middle, y))
        error = rows.without(whole - halves)
        scale = how["atol"] + how["rtol"] * torch.maximum(whole.abs(), halves.abs())
        batch = len(y)
        figures = (rms(x, True).expand(batch) for x in (error / scale, error))
        return rows.averaged(Probe(t.expand(batch), dt.expand(batch), halves, *figures, None, method))

    def _by_neuralde(self, place: Place, y: Tensor, solver, figure: str | None, rows: Rows) -> Probe:
        """The step by a solver of ours, where torchsde's method does not report what is asked for."""
        how = self.how
        sde, names = how["sde"], how["names"] or {}
        f, g = (getattr(sde, names.get(name, x), None) for name, x in (("drift", "f"), ("diffusion", "g")))
        if f is None or g is None:
            raise ValueError(f"a step of {self.source} by a solver of neuralde's needs the SDE's own f and g")
        equation = nde.SDE(rows.still(f), rows.still(g), sde.noise_type, sde.sde_type)
        solver = solvers.for_sde(solver, equation)
        if not able(solver, figure):
            raise ValueError(
                f"{self.source} has no stiffness estimate, nor has {solver.name!r}, which solves this SDE here; "
                "LocalError has what it needs"
            )
        tolerances = {"rtol": how["rtol"], "atol": how["atol"]}
        return rows.averaged(
            nde.probe(equation, place.t, y, place.dt, solver=solver, control="joint", seed=self.entropy, **tolerances)
        )


class _Estimate:
    """What torchsde's methods can estimate, as penalties ask for it."""

    error_order, reports_stiffness = 1, False


class _Path:
    """A Brownian motion that shows the steps that it is asked for.

    Args:
        brownian: of torchsde. notice: called with the ends of a step.
    """

    def __init__(self, brownian, notice: Callable):
        self._brownian, self._notice = brownian, notice

    def __getattr__(self, name):
        if "_brownian" not in vars(self):  # not made yet: of a copy, or of one that is being unpickled
            raise AttributeError(name)
        return getattr(self._brownian, name)

    def __call__(self, ta, tb=None, **what):
        """The increment."""
        self._notice(ta, tb)
        return self._brownian(ta, tb, **what)


class _Shown(nn.Module):
    """An SDE that shows where it is evaluated; the one that it was made of may be shared, and is left alone.

    Args:
        sde: of torchsde. names: of the functions that evaluate it. notice: called with (t, y).
    """

    def __init__(self, sde, names: tuple[str, ...], notice: Callable):
        super().__init__()
        self.sde = sde
        self.training = getattr(sde, "training", True)

        def shown(evaluate):
            def evaluated(t, y, *v):
                notice(t, y)
                return evaluate(t, y, *v)

            return evaluated

        for name in names:
            if hasattr(sde, name):
                setattr(self, name, shown(getattr(sde, name)))

    def __getattr__(self, name):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("sde") if "sde" in self._modules else self.__dict__["sde"], name)


def _increasing(ts) -> bool:
    """Whether these are times that torchsde takes."""
    if not isinstance(ts, Tensor):
        if not isinstance(ts, tuple | list) or not all(isinstance(t, float | int) for t in ts):
            return False
        ts = torch.tensor(ts, dtype=torch.float64)
    return ts.dim() == 1 and len(ts) > 1 and bool((ts[1:] > ts[:-1]).all())


def _default_method(sde) -> str:
    """The method that torchsde takes where none is named."""
    if sde.sde_type == "stratonovich":
        return "midpoint"
    return "euler" if sde.noise_type == "general" else "srk"


def _levy_area(method: str) -> str:
    """What a method asks of the Brownian motion, as torchsde makes it."""
    return {"srk": "space-time", "log_ode": "foster"}.get(method, "none")


def _noise_size(sde, t: Tensor, y: Tensor, names: dict) -> int | None:
    """How many components the noise has, None where g does not tell."""
    if sde.noise_type in ("diagonal", "scalar"):
        return y.shape[1] if sde.noise_type == "diagonal" else 1
    g = getattr(sde, names.get("diffusion", "g"), None)
    both = getattr(sde, names.get("drift_and_diffusion", "f_and_g"), None)
    if g is None and both is None:
        return None
    devices = [y.device] if y.is_cuda else []
    with torch.no_grad(), torch.random.fork_rng(devices=devices):  # whoever draws next shall not notice
        return (g(t, y) if g is not None else both(t, y)[1]).shape[-1]
