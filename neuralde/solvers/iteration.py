"""Iterations for the steady state of dz/dt = g(z), g(z) = f(z) - z: steps in depth instead of time."""

from __future__ import annotations

import abc
import functools
import numbers
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .base import Past, Solver, Step, VectorField, Work


class Iteration(Solver):
    """A discrete solver: each step is one move to a better z, and t counts them.

    It goes through the same loop as every other solver, at steps of `step_size`, where its steps are on a tape or
    observed, and through one of its own else, which has no time to keep: `iterate`. It evaluates f once per step, at
    its end. A subclass implements `move`.

    Attributes:
        step_size: dt, by which t grows with a step.
        couples: whether a move solves a system of equations, which under joint control is one of the whole batch: f may
            mix samples there.
    """

    order = 1
    adaptive = False
    error_order = None
    interpolant_order = 0
    reports_stiffness = False
    stability_size = None
    fsal = True
    calls_per_step: int | None = 1
    transforms = False
    discrete = True
    unrolls = False
    step_size: float = 1.0
    couples: bool = False
    remedy = "Take another solver ('anderson', 'broyden', 'newton' or 'tsit5')"

    @abc.abstractmethod
    def move(self, f: Callable[[Tensor], Tensor], z: Tensor, slope: Tensor, memory: Memory | None) -> Move:
        """The next z.

        Args:
            f: z -> g(z), [batch, features]; real.
            z, slope: the state and g there.
            memory: what the move before remembered, whose tensors may be overwritten; None at the first.
        """

    def moved(
        self, f: Callable[[Tensor], Tensor], z: Tensor, slope: Tensor, memory: Memory | None, joint: bool
    ) -> Move:
        """`move` for states as they are: complex, or under joint control a batch that is one sample to the solver."""
        kind, whole = z.dtype, joint and self.couples
        if not (kind.is_complex or whole):
            return self.move(lambda x: f(x).to(kind), z, slope, memory)
        shape = real(z).shape

        def there(x: Tensor) -> Tensor:
            return real(x.to(kind)).reshape(1, -1) if whole else real(x.to(kind))

        def back(x: Tensor) -> Tensor:
            return unreal(x.reshape(shape), kind)

        move = self.move(lambda x: there(f(back(x))), there(z), there(slope), memory)
        return Move(back(move.z), move.memory, None if move.slope is None else back(move.slope), move.work)

    def blank(self, z: Tensor) -> tuple[Tensor, ...]:
        """The buffers of the memory at the start, for states like z, [batch, features]."""
        return ()

    def start(self, z: Tensor, slope: Tensor, buffers: tuple[Tensor, ...]) -> Memory | None:
        """A memory from which the first move is made as any other; None where only the first move itself makes one.

        Args:
            z, slope: as `move` is given them. buffers: of `blank`.
        """
        return None

    def room(self, memory: Memory) -> Memory:
        """The memory with room for what another move remembers."""
        return memory

    def lasts(self, memory: Memory) -> int | None:
        """How many moves the memory has room for; None for any number."""
        return None

    def memory(self, z: Tensor, taped: bool) -> Remembered:
        """See `Solver.memory`."""
        return Remembered()

    def carried(self, memory: Remembered, index: Tensor) -> Remembered:
        """See `Solver.carried`."""
        return Remembered(memory.held and memory.held.on(index))

    def attempt(
        self,
        f: VectorField,
        t: Tensor,
        dt: Tensor,
        z: Tensor,
        slope: Tensor | None,
        memory: Remembered,
        lens: bool | str = True,
        close: bool = False,
        past: Past | None = None,
    ) -> Step:
        """See `Solver.attempt`."""
        now, later = f.times(t)[0], f.times(t + dt)[0]
        slope = f(now, z) if slope is None else slope
        known = memory.held and self.room(memory.held)
        move = self.moved(functools.partial(f, now), z, slope.to(z.dtype), known, f.joint)
        memory.held = move.memory
        slope_end = f(later, move.z) if move.slope is None else move.slope
        return Step(move.z, None, None, slope_end, None, work=move.work)

    def snapshot(self, stages: Any) -> Tensor:
        """See `Solver.snapshot`.

        Raises:
            TypeError: always; an iteration is nowhere between its steps.
        """
        raise TypeError(f"solver {self.name!r} is nowhere between its steps; ask for states at their ends")

    interpolate = snapshot

    def require_one_step(self) -> None:
        """See `TorchdynProtocol.require_one_step`."""
        raise TypeError(
            f"solver {self.name!r} finds steady states, it has no steps in time for torchdyn to make; use it in "
            "neuralde.solve(neuralde.SteadyState(f), ...) or neuralde.DeepEquilibrium"
        )

    def __repr__(self) -> str:
        return self.name


class Move:
    """What a step of an iteration found.

    Attributes:
        z: the next state. memory: for the next move. slope: g there, where it was computed. work: what it cost, where
            that is not one evaluation.
    """

    def __init__(self, z: Tensor, memory: Memory | None = None, slope: Tensor | None = None, work: Work | None = None):
        self.z, self.memory, self.slope, self.work = z, memory, slope, work


class Memory:
    """What an iteration remembers: tensors [batch, ...].

    Args:
        made: how many moves there were after the first, -1 before it: a number, or a tensor [1] in a traced program.
        states: those that every move makes anew. buffers: those that it overwrites.
    """

    def __init__(self, made: int | Tensor, states: tuple[Tensor, ...], buffers: tuple[Tensor, ...]):
        self.made, self.states, self.buffers = made, states, buffers

    def slot(self, rows: int) -> int | Tensor:
        """Which row of a buffer with so many the next move overwrites."""
        return (self.made.clamp(min=0) if self.traced else max(self.made, 0)) % rows

    @property
    def traced(self) -> bool:
        """Whether a program is being made: a compiler fuses sums of products, where batched products are calls."""
        return isinstance(self.made, Tensor)

    def products(self, rows: Tensor, x: Tensor) -> Tensor:
        """The inner products of rows [batch, n, features] with x [batch, features], [batch, n]."""
        return (rows * x[:, None]).sum(dim=2) if self.traced else torch.bmm(x[:, None], rows.mT)[:, 0]

    def combined(self, weights: Tensor, rows: Tensor) -> Tensor:
        """Σ weights·rows over n, [batch, features], for weights [batch, n]."""
        return (weights[..., None] * rows).sum(dim=1) if self.traced else torch.bmm(weights[:, None], rows)[:, 0]

    def put(self, buffer: Tensor, slot: int | Tensor, row: Tensor, dim: int = 1):
        """Overwrites one row of every sample. slot: as `made`."""
        if self.traced:
            buffer.index_copy_(dim, slot, row.unsqueeze(dim))
        else:
            buffer.select(dim, slot).copy_(row)

    def on(self, index: Tensor) -> Memory:
        """The same for some of the samples."""
        states, buffers = (tuple(x.index_select(0, index) for x in xs) for xs in (self.states, self.buffers))
        return Memory(self.made, states, buffers)


@dataclass
class Remembered:
    """The memory of an iteration between its steps, None before the first."""

    held: Memory | None = None


class FixedPoint(Iteration):
    """z ← z + damping·(f(z) - z): forward Euler with dt = damping, and without damping z ← f(z).

    Converges where f contracts; with damping also where the eigenvalues of its Jacobian lie below 1 but outside of the
    unit circle.

    Args:
        damping: the fraction of the way to f(z), in (0, 1].

    Raises:
        TypeError, ValueError: damping is no such number.
    """

    unrolls = True
    remedy = (
        "Take solver='anderson', 'broyden' or 'newton', a solver for ODEs ('tsit5', or 'rodas5p' for a stiff one), or "
        "damping (nde.solvers.FixedPoint(damping=0.5), or less), which ends oscillations"
    )

    def __init__(self, damping: float = 1.0, name: str = "fixed_point"):
        self.name, self.damping = name, fraction("damping", damping)

    @property
    def step_size(self) -> float:
        """dt."""
        return self.damping

    def start(self, z: Tensor, slope: Tensor, buffers: tuple[Tensor, ...]) -> Memory:
        """See `Iteration.start`."""
        return Memory(-1, (), buffers)

    def move(self, f, z: Tensor, slope: Tensor, memory: Memory | None) -> Move:
        """See `Iteration.move`."""
        return Move(torch.add(z, slope, alpha=self.damping), memory or Memory(0, (), ()))

    def __repr__(self) -> str:
        return self.name if self.damping == 1.0 else f"{self.name} (damping {self.damping:g})"


def fraction(name: str, value) -> float:
    """The value, if it is a number in (0, 1].

    Raises:
        TypeError, ValueError: it is not.
    """
    if not isinstance(value, numbers.Real) or isinstance(value, bool):
        raise TypeError(f"{name} must be a number, got {type(value).__name__}")
    if not 0.0 < value <= 1.0:
        raise ValueError(f"{name} must be in (0, 1], got {value}")
    return float(value)


def count(name: str, value) -> int:
    """The value, if it is a positive integer.

    Raises:
        TypeError, ValueError: it is not.
    """
    if not isinstance(value, numbers.Integral) or isinstance(value, bool):
        raise TypeError(f"{name} must be an integer, got {type(value).__name__}")
    if value < 1:
        raise ValueError(f"{name} must be at least 1, got {value}")
    return int(value)


def real(x: Tensor) -> Tensor:
    """A complex tensor [batch, features] as a real one of twice the features: least squares see real numbers."""
    return torch.view_as_real(x).flatten(1) if x.is_complex() else x


def unreal(x: Tensor, dtype: torch.dtype) -> Tensor:
    """The inverse of `real`, for a state of that dtype."""
    return torch.view_as_complex(x.unflatten(1, (-1, 2))) if dtype.is_complex else x


def dot(x: Tensor, y: Tensor) -> Tensor:
    """The inner product of every sample, [batch]."""
    return torch.linalg.vecdot(x, y)


def backtrack(
    f: Callable[[Tensor], Tensor], z: Tensor, slope: Tensor, direction: Tensor, tries: int = 6
) -> tuple[Tensor, Tensor, Tensor]:
    """z + s·direction with the largest s = 1, then smaller, that makes ‖g‖ sufficiently smaller; sample by sample.

    Returns:
        The state and g there, [batch, features]; and how many evaluations each sample needed, [batch] int64. Where no s
        was small enough, the last one is taken.

    Source: Dennis & Schnabel, Numerical Methods for Unconstrained Optimization and Nonlinear Equations, algorithm
    A6.3.1, for φ(s) = ‖g‖²/2 with φ'(0) = -2φ(0), as a Newton direction has it.
    """
    start = dot(slope, slope)
    s = torch.ones_like(start)
    made = torch.ones_like(start, dtype=torch.int64)
    found = z + direction
    value = f(found)
    for _ in range(tries):
        size = dot(value, value)
        short = ~(size <= (1.0 - 2e-4 * s) * start) & (start > 0)
        if not bool(short.any()):
            break
        # The minimum of the parabola through φ(0), φ'(0) and φ(s); 0.1 where φ(s) is not finite.
        ratio = s * start / (size - (1.0 - 2.0 * s) * start)
        s = torch.where(short, s * torch.nan_to_num(ratio, nan=0.1).clamp(0.1, 0.5), s)
        column = short[:, None]
        found = torch.where(column, z + s[:, None] * direction, found)
        value = torch.where(column, f(found), value)
        made = made + short
    return found, value, made
