"""torchsde's methods, and the error estimate that step doubling gives them.

The steps are torchsde's to the last digits, which a test holds. They are written here because a step of ours starts at
another time for each sample, is told its size rather than two times, whose difference loses a float32's digits, and
evaluates a stage once: torchsde's `srk` evaluates 20 times for the 8 stages that it has.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .. import transforms
from ..brownian import Noise
from ..equations import NOISE_TYPES, SDE
from .base import Step
from .rossler import column, sra, sri
from .sde import DrivenField, SDESolver
from .sde_tableaus import SRA1, SRID2

# (f, times at the method's abscissae, h [groups, 1], z, the step's noise, (drift, diffusion) at (t, z)) -> z(t + h)
Formula = Callable[[DrivenField, Sequence[Any], Tensor, Tensor, Noise, tuple[Tensor, Tensor]], Tensor]


def euler_maruyama(f: DrivenField, times, h: Tensor, z: Tensor, noise: Noise, first: tuple) -> Tensor:
    """z + h f + g W."""
    drift, diffusion = first
    return z + h * drift + f.times_noise(diffusion, noise.w)


def euler_heun(f: DrivenField, times, h: Tensor, z: Tensor, noise: Noise, first: tuple) -> Tensor:
    """z + h f + (g(t, z) + g(t + h, z + g W)) W / 2."""
    drift, diffusion = first
    kick = f.times_noise(diffusion, noise.w)
    return z + h * drift + 0.5 * (kick + f.times_noise(f.diffusion(times[1], z + kick), noise.w))


def heun(f: DrivenField, times, h: Tensor, z: Tensor, noise: Noise, first: tuple) -> Tensor:
    """The mean of Euler's steps with the slopes at (t, z) and at (t + h, its end)."""
    change = h * first[0] + f.times_noise(first[1], noise.w)
    x = z + change
    return z + 0.5 * (change + h * f(times[1], x) + f.times_noise(f.diffusion(times[1], x), noise.w))


def midpoint(f: DrivenField, times, h: Tensor, z: Tensor, noise: Noise, first: tuple) -> Tensor:
    """Euler's step with the slopes at (t + h/2, the middle of Euler's step)."""
    x = z + 0.5 * (h * first[0] + f.times_noise(first[1], noise.w))
    return z + h * f(times[1], x) + f.times_noise(f.diffusion(times[1], x), noise.w)


def reversible_heun(f: DrivenField, times, h: Tensor, z: Tensor, noise: Noise, first: tuple) -> Tensor:
    """Of the pair z = (y, x), with k and g at (t, x) and k', g' at (t + h, x'):

        x' = 2y - x + h k + g W,    y' = y + h (k + k') / 2 + (g + g') W / 2.

    The step can be undone: (y, x) is what the same formula with -h and -W makes of (y', x').

    Source: Kidger, Foster, Li & Lyons, Efficient and accurate gradients for neural SDEs (2021), algorithm 1.
    """
    (y, x), (drift, diffusion) = z.chunk(2, dim=1), first
    x = 2 * y - x + h * drift + f.times_noise(diffusion, noise.w)
    y = y + 0.5 * (h * (drift + f(times[1], x)) + f.times_noise(diffusion + f.diffusion(times[1], x), noise.w))
    return torch.cat([y, x], dim=1)


def srk(f: DrivenField, times, h: Tensor, z: Tensor, noise: Noise, first: tuple) -> Tensor:
    """Rößler's SRI2, for diagonal or scalar noise."""
    return sri(SRID2, f, times, h, z, noise, first).z


def srk_additive(f: DrivenField, times, h: Tensor, z: Tensor, noise: Noise, first: tuple) -> Tensor:
    """Rößler's SRA1, for additive noise."""
    return sra(SRA1, f, times, h, z, noise, first).z


def milstein_ito(f: DrivenField, times, h: Tensor, z: Tensor, noise: Noise, first: tuple) -> Tensor:
    """Euler's step and g g' (W² - h) / 2."""
    return _milstein(f, times, h, z, noise, first, noise.w**2 - h)


def milstein_stratonovich(f: DrivenField, times, h: Tensor, z: Tensor, noise: Noise, first: tuple) -> Tensor:
    """Euler's step and g g' W² / 2."""
    return _milstein(f, times, h, z, noise, first, noise.w**2)


def _milstein(f: DrivenField, times, h: Tensor, z: Tensor, noise: Noise, first: tuple, square: Tensor) -> Tensor:
    """Euler's step and half the diffusion's derivative along the diffusion, times `square`.

    A single Brownian motion: the derivative along its column, a Jacobian-vector product. (torchsde makes a
    vector-Jacobian product of it, which is another equation's unless the Jacobian is symmetric.) One for every
    component, each with a diffusion of its own: the Jacobian is diagonal, and the cheaper vector-Jacobian product is
    the same.
    """
    own = f.diagonal
    square = square if own else square[:, None]
    if transforms.active() or torch.compiler.is_compiling():
        if own:
            diffusion, back = torch.func.vjp(lambda x: f.diffusion(times[0], x), z)
            (change,) = back(diffusion * square)
        else:
            diffusion = f.diffusion(times[0], z)
            along = (diffusion * square).squeeze(2)
            change = torch.func.jvp(lambda x: f.diffusion(times[0], x), (z,), (along,))[1].squeeze(2)
    else:
        diffusion, change = _with_derivative(f, times[0], z, square)
    return z + h * first[0] + f.times_noise(diffusion, noise.w) + 0.5 * change


def _with_derivative(f: DrivenField, time, z: Tensor, square: Tensor) -> tuple[Tensor, Tensor]:
    """The diffusion, and its derivative along itself times `square`; on the tape if grad mode is on."""
    taped, change = torch.is_grad_enabled(), None
    with torch.inference_mode(False), torch.enable_grad():
        # An end of its own: the diffusion may depend on z in other ways, through tensors that it closes over.
        x = z.view_as(z) if taped and z.requires_grad else z.detach().clone().requires_grad_()
        diffusion = f.diffusion(time, x)
        if diffusion.requires_grad:
            along = (diffusion if taped else diffusion.detach()) * square
            if f.diagonal:
                (change,) = torch.autograd.grad(diffusion, x, along, create_graph=taped, allow_unused=True)
            else:  # the derivative by u of uᵀJ, along v, is Jv
                u = torch.zeros_like(diffusion).requires_grad_()
                (back,) = torch.autograd.grad(diffusion, x, u, create_graph=True, allow_unused=True)
                if back is not None and back.requires_grad:
                    (change,) = torch.autograd.grad(back, u, along.squeeze(2), create_graph=taped, allow_unused=True)
                change = None if change is None else change.squeeze(2)
    return diffusion if taped else diffusion.detach(), torch.zeros_like(z) if change is None else change


class Method:
    """What a method is for some types of noise.

    Args:
        formula: its step. abscissae: where in a step it evaluates, in units of h; the first is 0.
        evaluations: of drift and diffusion in a step. uses_area: see `SDESolver`. copies: see `Solver`.
        separate: whether diagonal noise must be so in the strict sense, each component's diffusion of that component
            alone: terms that are left out otherwise don't have mean zero.
    """

    def __init__(
        self,
        formula: Formula,
        abscissae: tuple[float, ...],
        evaluations: int,
        uses_area: bool = False,
        copies: int = 1,
        separate: bool = False,
    ):
        self.formula, self.abscissae, self.evaluations = formula, abscissae, evaluations
        self.uses_area, self.copies, self.separate = uses_area, copies, separate


class _Formulaic(SDESolver):
    """What a method with a `Formula` does."""

    method: Method

    @property
    def separate(self) -> bool:
        """See `Method`."""
        return self.method.separate

    def _first(self, f: DrivenField, time, z: Tensor, slope: Tensor | None) -> tuple[Tensor, Tensor]:
        """Drift and diffusion at the start of a step."""
        if self.copies > 1:
            z, slope = (None if x is None else x.chunk(self.copies, dim=1)[-1] for x in (z, slope))
        return f(time, z) if slope is None else slope, f.diffusion(time, z)


class OneStep(_Formulaic):
    """A method without an error estimate, for fixed steps.

    Args:
        name: what `solve(solver=...)` calls it.
        method: its formula.
    """

    adaptive = False
    error_order = None

    def __init__(self, name: str, method: Method, orders: Mapping[str, float], sde_types: tuple[str, ...], order):
        self.name, self.method, self.orders, self.sde_types, self.order = name, method, orders, sde_types, order
        self.calls_per_step, self.uses_area, self.copies = method.evaluations, method.uses_area, method.copies

    def of(self, equation: SDE, adaptive: bool) -> OneStep:
        """See `SDESolver.of`."""
        return self

    def attempt(
        self,
        f: DrivenField,
        t: Tensor,
        dt: Tensor,
        z: Tensor,
        slope: Tensor | None,
        memory: None,
        lens: bool | str = True,
        close: bool = False,
    ) -> Step:
        """See `SDESolver.attempt`."""
        times = f.times(t, column(self.method.abscissae, t.dtype, t.device), dt)
        end = self.method.formula(f, times, dt[:, None], z, f.noise, self._first(f, times[0], z, slope))
        return Step(end, None, None, None, (z, end))


class StepDoubling(_Formulaic):
    """A method whose error estimate is the difference between one step and two of half the size.

    The two make the solution. Under fixed steps (`StepControl(adaptive=False)`) there is one step and no estimate.

    Args:
        name: what `solve(solver=...)` calls it.
        methods: by sde_type, and by whether the noise is additive where that makes a difference: the method for it.
        orders: strong order by noise type.
        adapts: the noise types for which it may choose its steps. A method that leaves out terms of order h whose mean
            is zero must not: those that pass an error test have another mean, and the limit is another equation's.
    """

    def __init__(
        self,
        name: str,
        methods: Mapping[str, Method],
        orders: Mapping[str, float],
        adapts: tuple[str, ...] = NOISE_TYPES,
    ):
        self.name, self.methods, self.orders, self.adapts = name, methods, orders, adapts
        self.sde_types = tuple(kind for kind in ("ito", "stratonovich") if kind in methods)
        self._configure(self.methods[self.sde_types[0]], max(orders.values()))

    def _configure(self, method: Method, order: float):
        self.method, self.order, self.error_order = method, order, order + 0.5
        # An error of O(h^(p + 1/2)) on a step: the exponents are those of the general rule for that.
        self.exponents = (0.7 / self.error_order, 0.4 / self.error_order)
        self.uses_area, self.copies = method.uses_area, method.copies
        self.calls_per_step = 3 * method.evaluations - 2  # one step and two halves, two of which begin in one place

    def of(self, equation: SDE, adaptive: bool) -> StepDoubling | OneStep:
        """See `SDESolver.of`."""
        kind, noise = equation.sde_type, equation.noise_type
        method = self.methods.get("additive") if noise == "additive" else None
        method = method or self.methods.get(kind) or self.methods[self.sde_types[0]]
        order = self.orders[noise]
        if not adaptive or noise not in self.adapts:
            return OneStep(self.name, method, self.orders, self.sde_types, order)
        solver = copy.copy(self)
        solver._configure(method, order)
        return solver

    def attempt(
        self,
        f: DrivenField,
        t: Tensor,
        dt: Tensor,
        z: Tensor,
        slope: Tensor | None,
        memory: None,
        lens: bool | str = True,
        close: bool = False,
    ) -> Step:
        """See `SDESolver.attempt`."""
        c, formula, h = self.method.abscissae, self.method.formula, dt[:, None]
        places = (*c, *(x / 2 for x in c), *((1 + x) / 2 for x in c))
        times = f.times(t, column(places, t.dtype, t.device), dt)
        whole, one, two = (times[i * len(c) : (i + 1) * len(c)] for i in range(3))
        first, (early, late) = self._first(f, times[0], z, slope), f.halves
        middle = formula(f, one, h / 2, z, early, first)
        end = formula(f, two, h / 2, middle, late, self._first(f, two[0], middle, None))
        if not lens:
            return Step(end, None, None, None, (z, end))
        both = Noise(early.w + late.w, 0.5 * (early.h + late.h) + 0.25 * (early.w - late.w))
        error = end - formula(f, whole, h, z, both, first)
        if self.copies > 1:  # of the solution: what is beside it may change sides at every step
            error = torch.cat([error.chunk(self.copies, dim=1)[0]] * self.copies, dim=1)
        return Step(end, error, None, None, (z, end))


_EVERY = dict.fromkeys(NOISE_TYPES, 1.0)
_COMMUTATIVE = {kind: 1.0 for kind in NOISE_TYPES if kind != "general"}

METHODS = (
    StepDoubling(
        "euler_maruyama",
        {"ito": Method(euler_maruyama, (0.0,), 2)},
        {kind: 1.0 if kind == "additive" else 0.5 for kind in NOISE_TYPES},
        adapts=("additive",),
    ),
    StepDoubling(
        "milstein",
        {
            "ito": Method(milstein_ito, (0.0,), 3),
            "stratonovich": Method(milstein_stratonovich, (0.0,), 3, separate=True),
            "additive": Method(euler_maruyama, (0.0,), 2),
        },
        _COMMUTATIVE,
    ),
    StepDoubling(
        "srk",
        {"ito": Method(srk, SRID2.abscissae, 8, True), "additive": Method(srk_additive, SRA1.abscissae, 4, True)},
        dict.fromkeys(_COMMUTATIVE, 1.5),
    ),
    StepDoubling("euler_heun", {"stratonovich": Method(euler_heun, (0.0, 1.0), 3)}, _EVERY | {"general": 0.5}),
    StepDoubling("heun", {"stratonovich": Method(heun, (0.0, 1.0), 4)}, _EVERY | {"general": 0.5}),
    StepDoubling(
        "reversible_heun",
        {"stratonovich": Method(reversible_heun, (0.0, 1.0), 4, copies=2)},
        _EVERY | {"general": 0.5},
    ),
    StepDoubling("midpoint", {"stratonovich": Method(midpoint, (0.0, 0.5), 4)}, _EVERY | {"general": 0.5}),
)
