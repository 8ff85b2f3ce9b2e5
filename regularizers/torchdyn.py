"""torchdyn's layers, which show their solves to penalties once `regularizers.attach` has seen them.

torchdyn makes the solves; its solver object is watched as it makes the steps. Or neuralde makes them in its place.
torchdyn is not imported: whoever has one of its layers has done so.
"""

from __future__ import annotations

import contextlib
import copy
import random
import sys
from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import neuralde as nde
from neuralde import introspection, solvers
from neuralde.interop import torchdiffeq as interop
from neuralde.introspection import Probe
from neuralde.seen import looked_at
from neuralde.solve import untraced
from neuralde.solvers import Solver

from .recorded import Passing, Place, Recorded, Skipped, able, draws, keep, parts, sampled, shown, unwanted, within
from .rows import Rows

# The same methods; torchdyn's dopri5 has torchdiffeq's error estimate.
_SOLVERS = {
    "Euler": solvers.get("euler"),
    "Midpoint": solvers.get("midpoint"),
    "RungeKutta4": solvers.get("rk4"),
    "DormandPrince45": interop.SOLVERS["dopri5"],
    "Tsitouras45": solvers.get("tsit5"),
}
# What torchdyn leaves on modules for the time of a call: data control, and the noise of trace estimators.
_LEFT = ("_control", "noise")
# What torchdyn looks up in a solver at every step, and never changes.
_CONSTANTS = ("order", "safety", "min_factor", "max_factor")


def attach(model: nn.Module, engine: str | None, solve_options: dict) -> bool:
    """See `regularizers.attach`. Returns whether the model has such a layer."""
    core = sys.modules["torchdyn.core.neuralde"]
    made = []
    for layer in model.modules():
        if isinstance(layer, core.NeuralODE):
            call = _Watched if engine is None else partial(_Swapped, solve_options=solve_options)
        elif isinstance(layer, core.NeuralSDE):
            if engine is not None:
                raise ValueError(f"{type(layer).__name__}: engine={engine!r} can make the solves of a NeuralODE only")
            call = _WatchedSDE
        else:
            continue
        made.append((layer, call(layer, "forward"), call(layer, "trajectory")))
    for layer, forward, trajectory in made:  # all or none
        # Attributes of the object go before those of its class, and are copied and pickled with it.
        layer.forward, layer.trajectory, layer.solution = forward, trajectory, None
        layer._replicate_for_data_parallel = _Replicated(layer, "_replicate_for_data_parallel")
        if not isinstance(forward, _WatchedSDE):
            layer.draw_times = getattr(layer, "draw_times", None)  # see `Steer`
    return bool(made)


def method_of(solver) -> Solver:
    """The solver of ours that makes the steps of a solver object of torchdyn's."""
    if isinstance(solver, Solver):
        return solver
    return _SOLVERS.get(type(solver).__name__) or solvers.get(solver)


class _Call:
    """A method of a layer, in its place.

    Args:
        layer: of torchdyn. name: of the method.
    """

    def __init__(self, layer: nn.Module, name: str):
        self.layer, self.name = layer, name

    def __call__(self, *args, **kwargs):
        """As the layer's method; torch.compile does not look inside, and compiles what stands around it."""
        return untraced(type(self).made)(self, *args, **kwargs)

    def original(self, *args, **kwargs):
        """What the layer's class does."""
        return getattr(type(self.layer), self.name)(self.layer, *args, **kwargs)

    def of(self, layer: nn.Module) -> _Call:
        """The same of another layer."""
        call = copy.copy(self)
        call.layer = layer
        return call

    def times(self, t_span: Tensor | None, save_at) -> Tensor | None:
        """A NeuralODE's t_span, or what `Steer` draws in its place in training mode."""
        layer = self.layer
        if not layer.training or layer.draw_times is None:
            return t_span
        if len(save_at):
            raise ValueError(
                "Steer draws the times of a solve in training mode, and save_at names some of those that it had: leave "
                "save_at out, and take the rows of the result"
            )
        if t_span is None:
            t_span = torch.linspace(0, 1, 2) if layer.t_span is None else layer.t_span  # torchdyn's default
        return layer.draw_times(t_span)


class _Replicated(_Call):
    """How nn.DataParallel copies a layer: the copy's calls are watched as its own, and it holds its own solution."""

    def made(self):
        """The copy."""
        replica = self.original()
        for name, call in list(vars(replica).items()):
            if isinstance(call, _Call):
                vars(replica)[name] = call.of(replica)
        return replica


class _Watched(_Call):
    """forward or trajectory of a NeuralODE, watched."""

    def made(self, x, t_span=None, *args, **kwargs):
        """The call."""
        layer = self.layer
        layer.solution = None  # lets go of the last call's graph before this one's is built
        t_span = self.times(t_span, args[0] if args else kwargs.get("save_at", ()))
        why = unwanted(layer)
        if why is not None:
            if looked_at():  # neuralde makes it too, for who looks at its solves, with torchdyn's controller
                beta1 = 1 / method_of(layer.solver).order
                control = nde.StepControl(per_sample=False, factor_min=0.2, factor_max=10.0, beta1=beta1, beta2=0.0)
                _Swapped(layer, self.name, {"control": control}).made(x, t_span, *args, **kwargs)
            result = self.original(x, t_span, *args, **kwargs)
            layer.solution = keep(Skipped("torchdyn's NeuralODE", pytree.tree_leaves(x)[0], why))
            return result
        eye = _Eye(layer.solver, draws(layer, x))
        own = layer.__dict__.get("solver")
        # Found before the registered Module of that name; another layer that shares the solver does not see it.
        layer.__dict__["solver"] = eye
        try:
            result = self.original(x, t_span, *args, **kwargs)
        finally:
            del layer.__dict__["solver"]
            if own is not None:
                layer.__dict__["solver"] = own
        eye.close()
        taped = self.name == "trajectory" or layer.sensitivity == "autograd"
        zs = result[1] if self.name == "forward" and layer.return_t_eval else result
        layer.solution = keep(_Solve(layer, layer.solver, eye, taped).recorded(zs))
        return result


class _Eye:
    """A solver object of torchdyn's that shows its accepted steps.

    Args:
        solver: what steps. drawn: of `draws`.

    Attributes:
        passing: the steps, in torchdyn's time, which is negated where it solves backwards; None before the solve. The
            state of each is (x, the slope there or None, (t, dt) as they are on the tape), with the slopes of its
            stages where the solver shows them.
        at: a time drawn uniformly on the horizon, [], likewise. end: where that ends.
        f, args: what is stepped.
    """

    def __init__(self, solver, drawn: random.Random):
        self._solver, self._drawn = solver, drawn
        own = vars(solver)
        vars(self).update((name, own[name]) for name in _CONSTANTS if name in own)
        self.passing = self.at = self.end = self.f = self.args = self._attempt = None
        self._open = True

    @property
    def __class__(self):  # torchdyn asks for the class of some solvers
        return type(self._solver)

    def __getattr__(self, name):
        if name == "_solver":  # not made yet: of a copy, or of one that is being unpickled or traced
            raise AttributeError(name)
        return getattr(self._solver, name)

    def sync_device_dtype(self, x, t_span):
        """The solver's, which every solve begins with."""
        x, t_span = self._solver.sync_device_dtype(x, t_span)
        if self._open and self.passing is None:
            self.at, self.end = sampled(self._drawn, t_span[0], t_span[-1]), float(t_span[-1].detach())
            self.passing = Passing(self._drawn, 1, float(self.at))
        return x, t_span

    def step(self, f, x, t, dt, k1=None, args=None):
        """The solver's."""
        made = self._solver.step(f, x, t, dt, k1=k1, args=args)
        if self._open:
            if self._attempt is not None and self._attempt[0] is not t:  # a rejected one is repeated from the same t
                self.passing.add(*self._attempt)
            self._attempt, self.f, self.args = (t, (x, k1, (t, dt), *made[3:]), dt), f, args
        return made

    def close(self):
        """The solve is over: the last attempt was accepted, and what a backward pass makes is not looked at."""
        self._open = False
        if self._attempt is not None:
            self.passing.add(*self._attempt)


class _Solve:
    """A watched solve.

    Args:
        layer: the NeuralODE. solver: its own. eye: what watched it. taped: whether its states are on the tape.
    """

    def __init__(self, layer: nn.Module, solver, eye: _Eye, taped: bool):
        self.layer, self.solver, self.taped = layer, solver, taped
        self.f, self.args, self.passing, self.at, self.end = eye.f, eye.args, eye.passing, eye.at, eye.end
        self.direction = 1 if eye.f is layer.vf else -1
        self.left = [(m, name, vars(m)[name]) for m in parts(layer.vf) for name in _LEFT if name in vars(m)]
        self.rtol, self.atol = float(layer.rtol), float(layer.atol)

    def recorded(self, zs) -> Recorded:
        """What a penalty takes of the solve with those outputs."""
        around, uniform = self.passing.around, self.passing.uniform
        places = {
            "unbiased": partial(self._place, self.at, around[2], lambda through: self._inside(around, through)),
            "biased": partial(self._place, uniform[0], uniform[2], lambda through: self._shown(uniform[1][0], through)),
        }
        return Recorded(
            f"torchdyn's NeuralODE ({type(self.solver).__name__})",
            places,
            self._lens,
            zs[-1] if isinstance(zs, Tensor) else pytree.tree_map(lambda z: z[-1], zs),
        )

    def _place(self, t: Tensor, dt: Tensor, state) -> Place:
        t, dt = t.detach().reshape(()), dt.detach().reshape(())
        dt = within(t, dt, self.end)
        return Place(t, dt, state) if self.direction > 0 else Place(-t, -dt, state)

    def _shown(self, x, through: bool):
        source = f"torchdyn's NeuralODE with sensitivity={self.layer.sensitivity!r}"
        return shown(x, through, self.taped, source, 'sensitivity="autograd"')

    def _inside(self, start: tuple, through: bool):
        """The state inside of a step, by the interpolant of its method, or by a shorter step, torchdyn's own way."""
        t, (x, k1, taped, *stages), dt = start
        # torchdyn's steps are functions of the state: where a step starts moves with it, and the sampled time does not.
        x, (t, dt) = self._shown(x, through), taped if through else (t, dt)
        part = (self.at - t).reshape(t.shape)
        if not bool(part > 0):
            return x
        tableau = getattr(_SOLVERS.get(type(self.solver).__name__), "tableau", None)
        if stages and tableau is not None and tableau.interpolant is not None:
            dt, part = (dt, part) if through else (float(dt), float(part))
            powers = [(part / dt) ** power for power, _ in enumerate(tableau.interpolant[0], start=1)]
            for row, slope in zip(tableau.interpolant, stages[0], strict=True):
                weight = dt * sum(rate * power for rate, power in zip(row, powers, strict=True))
                x = x + weight * slope if through else torch.add(x, slope.detach(), alpha=weight)
            return x
        k1 = k1 if through or k1 is None else k1.detach()
        with torch.set_grad_enabled(through and torch.is_grad_enabled()), _as_left(self.left):
            return self.solver.step(self.f, x, t, part, k1=k1, args=self.args)[1]

    def _lens(self, place: Place, z, solver, figure: str | None, rows: Rows) -> Probe:
        own = method_of(self.solver) if solver is None else solvers.get(solver)
        own = own if solver is not None or able(own, figure) else solvers.get("tsit5")
        f, shape = self.layer.vf, self.passing.around[0].shape
        with _as_left(self.left):
            field = rows.still(lambda t, z: f(t.reshape(shape), z))
            return rows.averaged(
                introspection.probe_step(field, place.t, z, place.dt, own, self.rtol, self.atol, figure)
            )


@contextlib.contextmanager
def _as_left(left: list) -> Iterator[None]:
    """What a call left on the modules, again: the layer may have been called since."""
    now = [(module, name, getattr(module, name)) for module, name, _ in left]
    try:
        for module, name, value in left:
            setattr(module, name, value)
        yield
    finally:
        for module, name, value in now:
            setattr(module, name, value)


# -- neuralde in its place -------------------------------------------------------------------------------------------


class _Last(nde.Solution):
    """A layer's last solution. A copy or pickle of the layer has None: it holds a graph, and belongs to one call."""

    def __deepcopy__(self, memo):
        return None

    def __reduce__(self):
        return type(None), ()


class _Swapped(_Call):
    """forward or trajectory of a NeuralODE, solved by neuralde.

    Args:
        layer, name: of `_Call`. solve_options: of `neuralde.solve`.
    """

    def __init__(self, layer: nn.Module, name: str, solve_options: dict):
        super().__init__(layer, name)
        self.options = dict(solve_options)
        nde.NeuralODE(layer.vf, **self._how(torch.zeros(2)))  # says what is wrong with the options, here and now

    def _how(self, t_span: Tensor) -> dict:
        """The options of `solve` that a layer's arguments mean."""
        layer = self.layer
        how = {
            "solver": method_of(layer.solver),
            "rtol": float(layer.rtol),
            "atol": float(layer.atol),
            "control": "joint",
            "adjoint": "direct" if layer.sensitivity == "autograd" else "checkpointed",
            **self.options,
        }
        if not solvers.get(how["solver"]).adaptive and "dt0" not in how:  # torchdyn's steps lie between its times
            how["dt0"] = float((t_span[-1] - t_span[0]).abs()) or 1.0
            how["step_times"] = t_span[1:-1] if len(t_span) > 2 else None
        return how

    def made(self, x, t_span=None, save_at=(), args=None):
        """The call; neither of torchdyn's and our steps has a use for args."""
        layer = self.layer
        layer.solution = None
        x, t_span = layer._prep_integration(x, self.times(t_span, save_at))
        t_span = t_span.to(pytree.tree_leaves(x)[0].device)
        solution = nde.solve(nde.ODE(layer.vf), x, t_span, **self._how(t_span.detach()))
        solution.__class__ = _Last
        layer.solution, zs = keep(solution), solution.zs
        if len(save_at) and not solution.solver.adaptive:
            save_at = torch.as_tensor(save_at).to(t_span)
            rows = torch.isclose(t_span[:, None], save_at).any(dim=1).nonzero().flatten()
            t_span, zs = save_at, pytree.tree_map(lambda z: z[rows], zs)
        return (t_span, zs) if self.name == "forward" and layer.return_t_eval else zs


# -- SDEs ------------------------------------------------------------------------------------------------------------


class _WatchedSDE(_Call):
    """forward or trajectory of a NeuralSDE, whose calls of torchsde are made here, watched."""

    def made(self, x, s_span=None):
        """The call."""
        from . import torchsde

        layer = self.layer
        layer.solution = None
        x = layer._prep_sdeint(x)
        how = {"rtol": layer.rtol, "atol": layer.atol, "method": layer.solver, "dt": layer.ds}
        function = torchsde.sdeint
        if self.name == "forward":
            s_span, how["adaptive"] = layer.s_span, layer.adaptive
            if layer.sensitivity == "adjoint":
                function = torchsde.sdeint_adjoint
            else:
                layer.defunc.intloss, layer.defunc.sensitivity = layer.intloss, layer.sensitivity
        ys = function(layer.defunc, x, s_span, **how)
        layer.solution = function.solution
        return ys[-1] if self.name == "forward" else ys
