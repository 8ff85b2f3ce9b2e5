"""The Neural ODE layer."""

from __future__ import annotations

import inspect
import numbers
from collections.abc import Callable

from torch import nn

from .. import control as _control
from .. import solvers
from ..equations import ODE
from ..events import parse as parse_events
from ..field import mixing_message, mixing_module
from ..solution import Solution
from ..solve import chosen, solve
from .deep_equilibrium import DeepEquilibrium
from .neural_sde import NeuralSDE

_OPTIONS = [name for name in inspect.signature(solve).parameters if name not in ("equation", "z0", "t", "args")]


class NeuralODE(nn.Module):
    """z(t0) -> z(t1) of dz/dt = f(t, z), as a layer.

    Args:
        f: the vector field: `f(t, z)`, `f(t, z, args)`, or a Module of z alone. See `ODE`.
        t: the horizon (t0, t1).
        **solve_options: of `solve`: all but the equation, z0, t and args. Conditions of events that are Modules become
            Modules of the layer.

    Attributes:
        solution: the `Solution` of the last call, or None. It holds that call's graph until the next one.
        draw_times: None; or a function from the times of a solve to those that it is made with while the layer is in
            training mode, as `regularizers.Steer` sets it.

    Raises:
        TypeError: an option that `solve` doesn't have.
        ValueError: f mixes samples (batch normalization in training mode) under per-sample control; or solver,
            control, adjoint and dt0 don't go together.
    """

    def __init__(self, f: Callable, t=(0.0, 1.0), **solve_options):
        super().__init__()
        for name in solve_options:
            if name not in _OPTIONS:
                raise TypeError(f"NeuralODE has no option {name!r}; the options of solve are {', '.join(_OPTIONS)}")
        self.f = f
        self._equation = ODE(f)
        self.t = t
        self.solve_options = solve_options
        self.solution: Solution | None = None
        self.draw_times: Callable | None = None
        given = {name: x for name, x in solve_options.items() if x is not None}
        methods = {"solver": ODE.usual.solver, "control": "per_sample", "adjoint": ODE.usual.adjoint, "dt0": None}
        self._solver, *_ = chosen(**{name: given.get(name, x) for name, x in methods.items()})
        solver = solve_options.get("solver")
        if isinstance(solver, nn.Module):
            self.solver = solver  # a hypersolver of torchdyn's: its parameters are the layer's
        for name in ("rtol", "atol"):
            if isinstance(solve_options.get(name), numbers.Real):
                _control.check_tolerance(name, solve_options[name])
        if solve_options.get("events") is not None:
            conditions = (event.condition for event in parse_events(solve_options["events"]))
            self.conditions = nn.ModuleList(c for c in conditions if isinstance(c, nn.Module))
        self._refuse_mixing()

    @property
    def equation(self) -> ODE:
        """dz/dt = f(t, z)."""
        if self._equation.f is not self.f:  # f was exchanged
            self._equation = ODE(self.f)
        return self._equation

    def _refuse_mixing(self):
        linearized = solvers.get(self.solve_options.get("solver") or ODE.usual.solver).linearizes
        if linearized or _control.get(self.solve_options.get("control", "per_sample")).per_sample:
            name = mixing_module(self.f)
            if name is not None:
                raise ValueError(mixing_message(f"{name} in f computes statistics over the batch", linearized))

    def forward(self, z0, args=None):
        """The state at t1, in the shape and structure of z0.

        Args:
            z0: [batch, ...], or a tuple or dict of such tensors.
            args: for f's last argument.
        """
        return self.solve(z0, args=args).final

    def solve(self, z0, t=None, args=None) -> Solution:
        """The whole `Solution`, which `.solution` then holds too.

        Args:
            z0, args: as in `forward`.
            t: output times instead of the layer's horizon.
        """
        self.solution = None  # lets go of the last call's graph before this one's is built
        self._refuse_mixing()
        t = self.t if t is None else t
        if self.training and self.draw_times is not None:
            t = self.draw_times(t)
        self.solution = solve(self.equation, z0, t, args=args, **self.solve_options)
        return self.solution

    def trajectory(self, z0, ts, args=None):
        """The states at the times ts, [times, batch, ...].

        Args:
            z0, args: as in `forward`.
            ts: [times] or [batch, times], the first one where z0 is.
        """
        return self.solve(z0, ts, args=args).zs

    def extra_repr(self) -> str:
        """The solver and its tolerances."""
        shown = {"rtol": 1e-3, "atol": 1e-6, **self.solve_options, "solver": self._solver.name}
        if not self._solver.adaptive:
            shown = {k: v for k, v in shown.items() if k not in ("rtol", "atol")}
        horizon = self.t if isinstance(self.t, tuple) else "given"
        return f"t={horizon}, " + ", ".join(f"{name}={shown[name]}" for name in sorted(shown))

    def __getstate__(self):
        # A solution holds a graph, which can be neither copied nor pickled, and belongs to one call.
        return {**self.__dict__, "solution": None}


def compile(layer_or_options):
    """Turns on `solve(compile=True)`.

    Args:
        layer_or_options: a `NeuralODE`, `NeuralSDE` or `DeepEquilibrium`; a Module that has some in it; or options of
            `solve` in a dict.

    Returns:
        The Module itself, whose layers of these kinds are compiled from their next call on; or new options.

    Raises:
        ValueError: the Module has no such layer. TypeError: neither a Module nor a dict.
    """
    if isinstance(layer_or_options, dict):
        return {**layer_or_options, "compile": True}
    if not isinstance(layer_or_options, nn.Module):
        raise TypeError(f"compile takes a Module or a dict of options, got {type(layer_or_options).__name__}")
    layers = [m for m in layer_or_options.modules() if isinstance(m, NeuralODE | NeuralSDE | DeepEquilibrium)]
    if not layers:
        kind = type(layer_or_options).__name__
        raise ValueError(f"{kind} has no NeuralODE, NeuralSDE or DeepEquilibrium in it that could be compiled")
    for layer in layers:
        layer.solve_options["compile"] = True
    return layer_or_options
