"""Iterations for steady states: one step as a compiled program, which Python calls until the samples are at rest.

The move, the evaluation of f and the look at the residual are one program, so that a step is one call and one question
to the device. (A loop inside of a program would copy what the solver remembers at every step.) The linear systems of
"implicit" that are solved by such an iteration go the same way: there f is a vector-Jacobian product, which autograd
makes, and what lies between two products is one program.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from .. import iterate as _iterate
from ..iterate import Iterate, Iterated, Moved, Watched
from ..problem import Problem
from ..solvers import Iteration
from ..solvers.iteration import Memory
from .engine import Engine
from .programs import Unsupported, first_line, leaves_of, program


class EquilibriumEngine(Engine):
    """The programs of a solve for a steady state by an iteration."""

    def __init__(self, problem: Problem, tree: pytree.TreeSpec):
        super().__init__(problem, tree)
        self._iterate = Iterate(problem.solver, problem.rest.termination, problem.joint)
        self._is_map = problem.field.given is not problem.field.equation.f
        self._step = program(self._stepping)
        self._between: dict[Iterate, Callable] = {}

    @staticmethod
    def refusals(problem: Problem) -> list[tuple[bool, str]]:
        """See `Engine.refusals`."""
        solver = problem.solver
        known = isinstance(solver, Iteration)
        return [
            (not known, f"solver {solver.name!r} follows an ODE to its steady state, and only iterations are compiled"),
            (known and solver.calls_per_step != 1, f"solver {solver!r} evaluates f more than once per step"),
            (not _iterate.applies(problem), "it has a horizon"),
        ]

    @staticmethod
    def kinds(problem: Problem) -> tuple:
        """See `Engine.kinds`."""
        return (problem.rest.termination,)

    @torch.no_grad()
    def _discover(self, problem: Problem, z0: Tensor) -> Iterated:
        slope = problem.field.first(problem.first_instant, z0, problem.elsewhere)
        if problem.field.random:
            raise Unsupported("f draws random numbers")
        return _iterate.iterate(problem, z0, slope, self._stepped)

    def _stepped(self, field, t, z: Tensor, slope: Tensor, memory: Memory, watched: Watched) -> Moved:
        """See `iterate.iterate`."""
        field.calls += 1
        found = self._step(field.given, leaves_of(field.args), t, z, slope, *_given(memory), watched)
        return Moved(*found[:5], _taken(memory, found[5]), None)

    def _stepping(self, f, leaves, t, z, slope, made, states, buffers, watched):
        """Traced: one step."""
        value = self._of(f, leaves)

        def excess(x: Tensor) -> Tensor:
            return value(t, x) - x if self._is_map else value(t, x)

        moved = self._iterate(excess, z, slope, Memory(made, states, buffers), watched)
        return *moved[:5], moved.memory.states

    # -- backwards -----------------------------------------------------------------------------------------------------

    def costate(self, problem: Problem, start: Tensor, slope: Tensor) -> Iterated | None:
        """Solves for the costate; None where that has to be made as ever, after a warning.

        Args:
            problem: of the iteration for it. start: from here. slope: its field there.
        """
        iterate = Iterate(problem.solver, problem.rest.termination, problem.joint)
        if self.broken is not None or problem.solver.calls_per_step != 1:
            return None
        if iterate not in self._between:
            self._between[iterate] = program(_Between(iterate))
        try:
            return _iterate.iterate(problem, start, slope, _Ahead(iterate, self._between[iterate]))
        except Exception as error:  # whatever the compiler says
            self._give_up(problem, Unsupported(first_line(error)))
            return None


class _Between:
    """Traced: what lies between two evaluations of a field: the look at the residual, and the next move."""

    def __init__(self, iterate: Iterate):
        self.iterate = iterate

    def __call__(self, z, slope, made, states, buffers, watched):
        move = self.iterate.move(None, z, slope, Memory(made, states, buffers))
        return *self.iterate.look(z, slope, watched), move.z, move.memory.states


class _Ahead:
    """Steps that make the next one's move beforehand."""

    def __init__(self, iterate: Iterate, between: Callable):
        self.iterate, self.between = iterate, between
        self.next: Tensor | None = None

    def __call__(self, field, t, z: Tensor, slope: Tensor, memory: Memory, watched: Watched) -> Moved:
        """See `iterate.iterate`."""
        if self.next is None:
            move = self.iterate.move(None, z, slope, memory)
            self.next, memory = move.z, self.iterate.solver.room(move.memory)
        z, slope = self.next, field(t, self.next)
        *looked, self.next, states = self.between(z, slope, *_given(memory), watched)
        return Moved(z, slope, *looked, _taken(memory, states), None)


def _given(memory: Memory | None) -> tuple:
    """The memory as a program is given it: the count as a tensor [1], which changes nothing of the program."""
    return torch.tensor([memory.made]), memory.states, memory.buffers


def _taken(memory: Memory, states: tuple[Tensor, ...]) -> Memory:
    return Memory(memory.made + 1, states, memory.buffers)
