"""Iterations for steady states: stretches of steps as one compiled program.

The move, the evaluation of f, the look at the residual and the loop around them are one program, which Python calls
again where it looks for a stall, where the memory needs more room, or where a sample was lost. What of f depends on
nothing but x is computed once, before the loop. The linear systems of "implicit" that are solved by such an iteration
go the same way: there the map is λ -> Jᵀλ + v, a vector-Jacobian product of f at the steady state.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from .. import iterate as _iterate
from .. import termination as _termination
from ..field import Field
from ..iterate import Ends, Iterate, Iterated, Opening, Stretch, Watched
from ..problem import Problem
from ..solvers import Iteration
from ..solvers.iteration import Memory
from .engine import Engine
from .programs import Unsupported, first_line, leaves_of, overwriting_loop, program

_LONGEST = 32  # steps in a stretch


class SteadyEngine(Engine):
    """What the engines of solves for steady states have in common: the linear systems of their backward pass."""

    def __init__(self, problem: Problem, tree: pytree.TreeSpec):
        super().__init__(problem, tree)
        self._is_map = problem.field.given is not problem.field.equation.f
        self._backward: dict[Iterate, tuple[Callable, Callable]] = {}

    def _image(self, f, leaves) -> Callable[[Tensor, Tensor], Tensor]:
        """Traced: (time, z) -> the map whose fixed point is wanted."""
        value = self._of(f, leaves)
        if self._is_map:
            return lambda t, z: value(value.times(t)[0], z)
        return lambda t, z: value(value.times(t)[0], z) + z

    # -- backwards -----------------------------------------------------------------------------------------------------

    def costate(self, problem: Problem, right: Tensor, field: Field, t: Tensor, z: Tensor) -> Iterated | None:
        """Solves λ = Jᵀλ + v for the costate; None where that has to be made as ever, after a warning.

        Args:
            problem: of the iteration for it. right: v, [batch, features]; [1, all of them] for one system of the batch.
            field, t, z: f, and where J is its map's Jacobian.
        """
        iterate = _iterated(problem)
        if self.broken is not None or problem.solver.calls_per_step != 1:
            return None
        if iterate not in self._backward:
            self._backward[iterate] = _programs(iterate, self._transposing)
        steps = _Steps(problem, *self._backward[iterate], (*_given(field), t, z, right))
        try:
            return _iterate.iterate(problem, torch.zeros_like(right), None, steps)
        except Exception as error:  # whatever the compiler says
            self._give_up(problem, Unsupported(first_line(error)))
            return None

    def _transposing(self, iterate: Iterate, given) -> tuple[Callable, Callable]:
        """Traced: see `_programs`."""
        f, leaves, t, point, right = given
        image = self._image(f, leaves)

        def excess(j: Tensor, u: Tensor) -> Tensor:
            _, product = torch.func.vjp(functools.partial(image, t), point)
            return product(u.reshape(point.shape))[0].reshape(u.shape) + right - u

        return excess, lambda zero: right


class EquilibriumEngine(SteadyEngine):
    """The programs of a solve for a steady state by an iteration."""

    def __init__(self, problem: Problem, tree: pytree.TreeSpec):
        super().__init__(problem, tree)
        self._forward = _programs(_iterated(problem), self._solving)

    @staticmethod
    def refusals(problem: Problem) -> list[tuple[bool, str]]:
        """See `Engine.refusals`."""
        solver = problem.solver
        return [
            (not isinstance(solver, Iteration), f"solver {solver.name!r} is not neuralde's own"),
            (solver.calls_per_step != 1, f"solver {solver!r} evaluates f more than once per step"),
            (not _iterate.applies(problem), "it has a horizon"),
        ]

    @staticmethod
    def kinds(problem: Problem) -> tuple:
        """See `Engine.kinds`."""
        return (problem.solver, problem.rest.termination)

    @torch.no_grad()
    def _discover(self, problem: Problem, z0: Tensor) -> Iterated:
        field, t = problem.field, problem.first_instant
        if self._checked:
            field.fill(t, z0)
        else:
            field.first(t, z0, problem.elsewhere)
            if field.random:
                raise Unsupported("f draws random numbers")
            self._checked, field.calls = True, field.calls - 1  # the program makes the first one again
        return _iterate.iterate(problem, z0, None, _Steps(problem, *self._forward, (*_given(field), problem.start)))

    def _solving(self, iterate: Iterate, given) -> tuple[Callable, Callable]:
        """Traced: see `_programs`."""
        f, leaves, start = given
        image = self._image(f, leaves)

        def excess(j: Tensor | int, z: Tensor) -> Tensor:
            return image(start + (j + 1) * iterate.solver.step_size, z) - z

        return excess, functools.partial(excess, -1)


def _programs(iterate: Iterate, maps: Callable) -> tuple[Callable, Callable]:
    """The programs for the first steps, and for further ones.

    Args:
        maps: traced, (iterate, what a program is given) -> two functions: (which step of all, a state) -> f(z) - z, and
            (the state at the start) -> f(z) - z there.
    """

    def opening(given, z0, *rest):
        excess, first = maps(iterate, given)
        return _opening(iterate, excess, z0, first(z0), *rest)

    def further(given, *rest):
        return _steps(iterate, maps(iterate, given)[0], *rest)

    return program(opening, hoisted=True), program(further, hoisted=True)


class _Steps:
    """The programs with what they are given: see `iterate.Programs`.

    Args:
        problem: that is solved. first, further: its programs. given: what they are given before the loop's own.
    """

    def __init__(self, problem: Problem, first: Callable, further: Callable, given: tuple):
        self.problem, self.first, self.further, self.given = problem, first, further, given

    def opening(self, z0: Tensor, most: int) -> Opening:
        """See `iterate.Programs`."""
        groups, most = 1 if self.problem.joint else len(z0), min(most, _LONGEST)
        figures, starts = self._room(z0, groups)
        given, z = _apart((self.given, z0))
        buffers = self.problem.solver.blank(z0)
        said, outset, *found = self.first(given, z, buffers, torch.tensor([most]), figures, starts)
        made, unsettled = said.tolist()
        return Opening(outset, _stretch(made, -1, buffers, found, figures, starts), not unsettled)

    def __call__(
        self, z: Tensor, slope: Tensor, memory: Memory, watched: Watched, ends: Ends, before: int, most: int
    ) -> Stretch:
        """See `iterate.Programs`."""
        figures, starts = self._room(z, len(watched.live))
        numbers = (torch.tensor([x]) for x in (min(most, _LONGEST), before, memory.made))
        apart = _apart((self.given, z, slope, memory.states, memory.buffers, watched, ends))
        turn, *found = self.further(*apart, *numbers, figures, starts)
        return _stretch(int(turn), memory.made, memory.buffers, found, figures, starts)

    def _room(self, z: Tensor, groups: int) -> tuple[Tensor, Tensor | None]:
        kept = z.new_empty(_LONGEST, *z.shape) if self.problem.keep is None else None
        return z.new_empty(_LONGEST, groups), kept


def _stretch(steps: int, made: int, buffers, found, figures: Tensor, starts: Tensor | None) -> Stretch:
    z, slope, states, watched, ends = found
    memory = Memory(made + steps, states, buffers)
    return Stretch(steps, z, slope, memory, Watched(*watched), Ends(*ends), figures, starts)


def _apart(arguments: tuple) -> list:
    """The arguments without a tensor in them twice, which a program would take for a law."""
    leaves, tree = pytree.tree_flatten(arguments)
    seen = set()
    for i, x in enumerate(leaves):
        if isinstance(x, Tensor):
            leaves[i] = x.clone() if id(x) in seen else x
            seen.add(id(x))
    return pytree.tree_unflatten(leaves, tree)


def _opening(iterate: Iterate, excess: Callable, z, slope, buffers, most, figures, starts):
    """Traced: the start, and the loop."""
    termination, groups = iterate.termination, figures.shape[1]
    outset = first, size, largest, limit = _termination.outset(termination, iterate.joint, z, slope)
    started = _termination.held_to(termination, size, largest) or (None, None)
    watched = Watched(_iterate.setting_out(first, termination), first, limit, *started)
    memory = iterate.solver.start(z, slope, buffers)
    lasts = iterate.solver.lasts(memory)
    most = most if lasts is None else most.clamp(max=lasts)
    ends = Ends(most.new_zeros(groups), first, z, z)
    going = (watched.live.any() & first.isfinite().all())[None]
    # Numbers: a tensor 0 here and the count that the loop begins with would be one tensor to Inductor, which the loop
    # changes.
    loop = most, 0, -1, figures, starts, going
    turn, *found = _steps(iterate, excess, z, slope, memory.states, buffers, watched, ends, *loop)
    *_, watched, ends = found
    unsettled = (watched.live | ~(Ends(*ends).last <= termination.tolerance)).any()[None]
    return torch.cat([turn, unsettled.to(turn.dtype)]), outset, *found


def _steps(
    iterate: Iterate,
    excess: Callable,
    z,
    slope,
    states,
    buffers,
    watched,
    ends,
    most,
    before,
    first,
    figures,
    starts,
    going=None,
):
    """Traced: the loop.

    Args:
        excess: (which step of all, a state) -> f(z) - z.
        most, before, first: how many steps may be made, were made, and `Memory.made`: [1], the latter two also numbers.
        going: whether it is entered, [1].
    """
    termination, count = iterate.termination, len(states)
    going = torch.ones_like(most, dtype=torch.bool) if going is None else going

    def more(turn, going, *carried):
        return ((turn < most) & going).squeeze(0)

    def step(overwritten, turn, going, z, slope, live, least, *carried):
        buffers, figures, *starts = overwritten
        states, ends = carried[:count], Ends(*carried[count:])
        now = watched._replace(live=live, least=least)
        moved = iterate(functools.partial(excess, before + turn), z, slope, Memory(first + turn, states, buffers), now)
        figures.index_copy_(0, turn, moved.figure[None])
        for kept in starts:
            kept.index_copy_(0, turn, z[None])
        after, ends = now.after(moved, termination), ends.after(now, moved, z, before + turn + 1, termination)
        lost = moved.ended & ~(moved.figure <= termination.tolerance)
        found = moved.z, moved.slope, after.live, after.least, *moved.memory.states, *ends
        return turn + 1, (after.live.any() & ~lost.any())[None], *(x.clone() for x in found)

    given = z, slope, watched.live, watched.least, *states, *ends
    carried = torch.zeros_like(most), going.clone(), *(x.clone() for x in given)
    overwritten = buffers, figures, *(() if starts is None else (starts,))
    turn, _, z, slope, live, least, *rest = overwriting_loop(more, step, carried, overwritten)
    return turn, z, slope, tuple(rest[:count]), watched._replace(live=live, least=least), tuple(rest[count:])


def _iterated(problem: Problem) -> Iterate:
    return Iterate(problem.solver, problem.rest.termination, problem.joint)


def _given(field: Field) -> tuple:
    return field.given, leaves_of(field.args)
