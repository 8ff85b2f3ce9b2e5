"""SDEs, compiled: the loop with the way down the Brownian tree in it, so that no noise comes from Python."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from ..bisection import Noise
from ..brownian import BrownianTree, Tree
from ..problem import Problem
from ..solvers import Step
from ..solvers.doubling import OneStep, StepDoubling
from ..solvers.rossler import Rossler
from ..stochastic import Driven, NoisyField, spread
from .bridge import Bridge
from .engine import VectorField
from .records import Stand
from .stepping import SteppingEngine, closes


class Drift(VectorField):
    """The coefficients of an SDE as a traced step calls them: called, the drift. f: of which, t, z and args."""

    def __init__(self, field: NoisyField, f: Callable, args):
        super().__init__(field, functools.partial(f, "drift"), args)
        self._diffusion, self.layout, self.joint = functools.partial(f, "diffusion"), field.layout, field.joint

    def diffusion(self, t: Tensor, z: Tensor) -> Tensor:
        """See `NoisyField.diffusion`."""
        return self.field.pure_diffusion(self._diffusion, t, z, self.args)

    def spread(self, t: Tensor, z: Tensor) -> Tensor:
        """See `NoisyField.spread`."""
        return spread(self.diffusion(t, z), self.field.diagonal)


class SDEEngine(SteppingEngine):
    """The programs of a solve of an SDE.

    What a solve is given beside its horizon is `_given`'s: the keys of the paths, their scale and the cells of the
    tree (see `Bridge`), the bounds of the steps, and the times at which they end, where there are any.
    """

    def __init__(self, problem: Problem, tree: pytree.TreeSpec):
        super().__init__(problem, tree, problem.solver, sloped=False, rows=2)
        self._stopped = problem.stops is not None
        self._channels: int | None = None
        self._levels: int | None = None

    @staticmethod
    def refusals(problem: Problem) -> list[tuple[bool, str]]:
        """See `Engine.refusals`."""
        solver = problem.solver
        return [
            (type(solver) not in (Rossler, OneStep, StepDoubling), f"solver {solver.name!r} is not neuralde's own"),
            (not isinstance(problem.field.source, BrownianTree), "its noise is not a BrownianTree's"),
            (problem.jumps is not None, "it has jump_times"),
            *SteppingEngine.refusals(problem),
        ]

    @staticmethod
    def kinds(problem: Problem) -> tuple:
        """See `Engine.kinds`."""
        solver, equation, source = problem.solver, problem.field.equation, problem.field.source
        method = solver.tableau if isinstance(solver, Rossler) else solver.method
        signed = source.paths if isinstance(source.paths, str) else "given"
        # Which methods of a Module drift and diffusion are, which is remembered together with the Module.
        methods = (getattr(x, "__func__", None) for x in (equation.drift, equation.diffusion))
        return (
            type(solver), method, equation.noise_type, equation.sde_type, signed == "antithetic",
            problem.dt0 is None, closes(problem), problem.stops is None, *(x and x.__code__ for x in methods),
        )  # fmt: skip

    # -- outside of the programs ---------------------------------------------------------------------------------------

    def _given(self, problem: Problem) -> list[Tensor]:
        paths: Tree = problem.field.bind(self._channels)
        self._channels, self._levels = paths.channels, paths.levels
        scale = paths.scale if paths.sign is None else paths.scale * paths.sign
        least = 0.0 if problem.dt_min is None else problem.dt_min
        most = math.inf if problem.dt_max is None else problem.dt_max
        bounds = torch.tensor([least, most], dtype=problem.start.dtype)
        return [paths.keys, scale, paths.cell, bounds, *([] if problem.stops is None else [problem.stops])]

    def _extra(self, problem: Problem) -> int:
        # The drift at the point that tells the first step's size, and the diffusion there and at the start.
        return 3 * (problem.dt0 is None)

    # -- in the programs -----------------------------------------------------------------------------------------------

    def _of(self, f, leaves) -> Drift:
        return Drift(self._field, f, pytree.tree_unflatten(leaves, self._tree) if leaves else None)

    def _next(self, at: Stand, s0: Tensor, s1: Tensor, given: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        stop, stops = s1, given[4:]
        if stops:
            stop = torch.minimum(torch.where(stops[0] > at.s, stops[0], s1).amin(dim=0), s1)
        left = stop - at.s
        if self._control.adaptive:
            last = at.h >= left
            h = torch.minimum(at.h, 0.5 * left)
            h = _rounded(at.s + h, h) - at.s
            end = at.s + h
        else:
            last, h = at.h * 1.001 >= left, at.h
            end = at.s + h if stops else s0 + (at.accepted + 1) * h
        return torch.where(last, left, h), torch.where(last, stop, end), last & (stop >= s1)

    def _bounded(self, h: Tensor, given: Sequence[Tensor]) -> Tensor:
        return torch.minimum(torch.maximum(h, given[3][0]), given[3][1]) if self._control.adaptive else h

    def _resumed(self, planned: Tensor, before: Tensor, h: Tensor, ok: Tensor) -> Tensor:
        # A step that a stop cut short says little of the next one.
        return torch.where(ok & (before > h), torch.maximum(planned, before), planned) if self._stopped else planned

    def _stuck(self, ok: Tensor, h: Tensor, given: Sequence[Tensor]) -> Tensor:
        return ok.logical_not() & (h <= given[3][0])

    def _driving(self, given: Sequence[Tensor], t: Tensor, t_end: Tensor) -> Tensor:
        """W and H of the step, or those of its halves."""
        middle = [t + 0.5 * (t_end - t)] if isinstance(self._solver, StepDoubling) else []
        noise = Bridge(*given[:3], self._levels).between(torch.stack([t, *middle, t_end]))
        return torch.stack([x for one in noise for x in one])

    def _undriven(self, rows: int, given: Sequence[Tensor]) -> Tensor:
        pieces = 2 if isinstance(self._solver, StepDoubling) else 1
        return given[1].new_empty(rows, 2 * pieces, *given[0].shape)

    def _attempt(
        self, vector_field: Drift, driving: Tensor, t: Tensor, dt: Tensor, z: Tensor, slope: Tensor | None,
        lens: bool = True, close: bool = False,
    ) -> Step:  # fmt: skip
        noise = [Noise(*pair) for pair in driving.unflatten(0, (-1, 2))]
        driven = Driven(vector_field, self._field.diagonal, Known(noise), t, t + dt)
        return self._solver.attempt(driven, t, dt, z, slope, None, lens=lens, close=close)


class Known:
    """Paths of which nothing but the noise of one step is asked, or that of its halves. noise: this."""

    def __init__(self, noise: list[Noise]):
        self.noise = noise

    def between(self, times: Tensor) -> list[Noise]:
        """See `Paths.between`."""
        return self.noise


def _rounded(x: Tensor, size: Tensor) -> Tensor:
    """Traced: `Algebra.rounded`; without `frexp`, whose integers Inductor can't mix with others."""
    size = size.double().clamp(min=torch.finfo(size.dtype).tiny)
    power = size.log2().floor().exp2()
    # A logarithm may be off in its last digit.
    power = torch.where(power > size, 0.5 * power, torch.where(2.0 * power <= size, 2.0 * power, power))
    unit = (2.0**-5 * power).to(x.dtype)
    return torch.floor(x / unit) * unit
