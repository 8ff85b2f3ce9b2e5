"""The deep equilibrium layer."""

from __future__ import annotations

import inspect
import numbers
import re
from collections.abc import Callable

import torch
from torch import Tensor, nn

from .. import control as _control
from .. import parametrized, steady
from .. import termination as _termination
from ..adjoints.implicit import beside
from ..equations import SteadyState
from ..errors import NeuralDEError
from ..field import again, mixing_message, mixing_module
from ..solution import Solution
from ..solve import solve
from ..solvers import Solver

_NOT_OF_STEADY = ("equation", "z0", "args", "jump_times", "step_times", "events", "solver")
_OPTIONS = [name for name in inspect.signature(solve).parameters if name not in _NOT_OF_STEADY]
_OF_UNROLLED = ("rtol", "atol", "on_failure", "dense")  # what the steps of pretraining take of a layer's options
_STARTS = ("zeros", "first_step")
_OF_SHAPES = re.compile(r"\b(shape|size|dimension|broadcast)", re.IGNORECASE)  # what torch says then


class DeepEquilibrium(nn.Module):
    """x -> z* with z* = f(z*, x): a network of infinite depth, as a layer.

    Continuous with a solver for ODEs, which follows dz/dt = f(z, x) - z to where it is at rest; discrete with an
    iteration.

    Args:
        f: the map, called as `f(z, x)`; a function or a Module.
        solver: of `solve`: a name or an object. For ODEs ("tsit5", "vcab3", "rodas5p", ...) or an iteration
            ("fixed_point", "anderson", "broyden", "newton").
        initial: where the solve starts. "zeros", of the shape of x; "first_step", f(0, x), which makes a Skip Reg. DEQ
            of it; or a Module (or function) of x, which makes a Skip DEQ of it. Its parameters' gradient by the steady
            state is zero; they have one by `regularizers.Skip` and, while pretraining, by the unrolled steps.
        pretrain_depth: for a warm-up: so many steps z ← f(z, x) from the start are made and differentiated, in place of
            solving for the steady state, until `end_pretraining()` is called, in eval mode too. None: no warm-up.
        **solve_options: of `solve`: rtol, atol, control, adjoint, termination, max_steps, on_failure, ...

    Attributes:
        solution: the `Equilibrium` of the last call, or None. It holds that call's graph until the next one. While
            pretraining it is that of the unrolled steps, NOT_CONVERGED, with the residual that they led to.
        pretraining: whether it is pretraining, a bool buffer: kept in the state_dict.

    Raises:
        TypeError, ValueError: an argument is wrong, or options don't go together; or f mixes samples (batch
            normalization in training mode) under per-sample control.

    Source: Bai, Kolter & Koltun, "Deep equilibrium models", 2019; Pal et al. 2023, "Continuous deep equilibrium
    models".
    """

    def __init__(
        self,
        f: Callable,
        solver: str | Solver = "tsit5",
        initial: str | nn.Module | Callable = "zeros",
        pretrain_depth: int | None = None,
        **solve_options,
    ):
        super().__init__()
        for name in solve_options:
            if name not in _OPTIONS:
                raise TypeError(
                    f"DeepEquilibrium has no option {name!r}; the options of solve are {', '.join(_OPTIONS)}"
                )
        if isinstance(initial, str) and initial not in _STARTS:
            raise ValueError(f"initial must be 'zeros', 'first_step' or a Module of x, got {initial!r}")
        if not isinstance(initial, str) and not callable(initial):
            raise TypeError(f"initial must be 'zeros', 'first_step' or a Module of x, got {type(initial).__name__}")
        if pretrain_depth is not None and (
            not isinstance(pretrain_depth, numbers.Integral) or isinstance(pretrain_depth, bool)
        ):
            raise TypeError(f"pretrain_depth must be an integer or None, got {type(pretrain_depth).__name__}")
        if pretrain_depth is not None and pretrain_depth < 1:
            raise ValueError(f"pretrain_depth must be at least 1, or None, got {pretrain_depth}")
        self.f, self.initial, self.pretrain_depth = f, initial, pretrain_depth
        self.register_buffer("pretraining", torch.tensor(pretrain_depth is not None))
        self._equation = SteadyState(f)
        self.solve_options = {"solver": solver, **solve_options}
        self.solution: Solution | None = None
        options = {"control": "per_sample", "dt0": None} | self.solve_options
        adjoint = options.get("adjoint") or SteadyState.usual.adjoint
        self._solver, self._control, *_ = steady.chosen(solver, options["control"], adjoint, options["dt0"])
        for name in ("rtol", "atol"):
            if isinstance(solve_options.get(name), numbers.Real):
                _control.check_tolerance(name, solve_options[name])
        _termination.get(solve_options.get("termination"))
        self._refuse_mixing()

    @property
    def equation(self) -> SteadyState:
        """z* = f(z*, x)."""
        if self._equation.f is not self.f:  # f was exchanged
            self._equation = SteadyState(self.f)
        return self._equation

    def _refuse_mixing(self):
        if self._solver.linearizes or self._control.per_sample:
            name = mixing_module(self.f)
            if name is not None:
                raise ValueError(
                    mixing_message(f"{name} in f computes statistics over the batch", self._solver.linearizes)
                )

    def end_pretraining(self) -> None:
        """From now on the steady state is solved for."""
        self.pretraining.fill_(False)

    def forward(self, x):
        """The steady state z*, in the shape and structure of the start.

        Args:
            x: what f is given beside z: a tensor [batch, ...], or a structure of them if `initial` is a Module.
        """
        return self.solve(x).copied()

    def solve(self, x) -> Solution:
        """The whole `Equilibrium`, which `.solution` then holds too.

        Args:
            x: as in `forward`.
        """
        self.solution = None  # lets go of the last call's graph before this one's is built
        self._refuse_mixing()
        with parametrized.once(self.f):
            z0 = None
            try:
                z0 = self._start(x)
                if not bool(self.pretraining):
                    self.solution = solve(self.equation, z0, args=x, **self.solve_options)
                else:
                    self.solution = self._unrolled(z0, x)
            except RuntimeError as error:
                self._tell_of_the_start(error, z0)
                raise
        self.solution.before = int(self.initial == "first_step")
        outcome = self.solution._outcome
        if isinstance(self.initial, nn.Module) and outcome.final.requires_grad:
            outcome.final = beside(outcome.final, [p for p in self.initial.parameters() if p.requires_grad])
        return self.solution

    def _start(self, x):
        if not isinstance(self.initial, str):
            return self.initial(x)
        if not isinstance(x, Tensor):
            raise TypeError(
                f"initial={self.initial!r} starts with zeros of the shape of x, which must be a tensor then, got "
                f"{type(x).__name__}; pass a function of x as initial"
            )
        zeros = torch.zeros_like(x.detach(), memory_format=torch.contiguous_format)
        if self.initial == "zeros":
            return zeros
        with again(x.device):  # the solve draws the same mask of a dropout: it is the same network
            return self.f(zeros, x)

    def _tell_of_the_start(self, error: RuntimeError, z0):
        """Adds to what torch says of shapes in f where the state's came from."""
        if isinstance(error, NeuralDEError) or not _OF_SHAPES.search(str(error)) or not hasattr(error, "add_note"):
            return
        made = repr(self.initial) if isinstance(self.initial, str) else type(self.initial).__name__
        shape = f", of shape {tuple(z0.shape)}" if isinstance(z0, Tensor) else ", as large as x"
        error.add_note(
            f"The state started as initial={made} made it{shape}. If f wants another one, pass a function of x as "
            "initial: lambda x: x.new_zeros(len(x), width)"
        )

    def _unrolled(self, z0, x) -> Solution:
        """The first steps of the fixed-point iteration, on the tape."""
        options = {name: self.solve_options[name] for name in _OF_UNROLLED if name in self.solve_options}
        options["control"] = (self._control.per_sample and "per_sample") or "joint"
        options["termination"] = _termination.Unrolled.of(_termination.get(self.solve_options.get("termination")))
        depth = self.pretrain_depth
        return solve(self.equation, z0, depth, "fixed_point", adjoint="direct", args=x, max_steps=depth, **options)

    def extra_repr(self) -> str:
        """The solver, its tolerances and the start."""
        start = self.initial if isinstance(self.initial, str) else type(self.initial).__name__
        shown = {"rtol": 1e-3, "atol": 1e-6, **self.solve_options, "solver": self._solver.name, "initial": start}
        if self.pretrain_depth is not None:
            shown["pretrain_depth"] = self.pretrain_depth
        return ", ".join(f"{name}={shown[name]}" for name in sorted(shown))

    def __getstate__(self):
        # A solution holds a graph, which can be neither copied nor pickled, and belongs to one call.
        return {**self.__dict__, "solution": None}
