"""What every penalty is: a weight that may change, and a figure of the solutions that a model's layers hold."""

from __future__ import annotations

import abc
import math
import numbers
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from neuralde.solution import Solution

from .recorded import AllFailed, Recorded, Skipped, parts
from .schedules import Schedule, constant


class Regularizer(nn.Module, abc.ABC):
    """A penalty to add to a loss: `loss = task_loss + penalty(model)`.

    A subclass implements `figure`: a differentiable [batch] tensor of one solution. Calling the penalty gives the
    scalar weight · mean over the batch, summed over the layers of a model.

    Args:
        weight: a number, not negative, or a schedule (`constant`, `exponential`, `linear`, `cosine`, or any function of
            the step).

    A layer that is called several times in one forward pass holds its last solution, and only that one is penalized.

    `step()` advances the schedule; `state_dict()` keeps its position. Penalties can be added, multiplied and
    divided by numbers: see `Sum`.

    Attributes:
        local: whether one step at a sampled time is all that it looks at, so that solves of other libraries will do.
        of_steady: whether it is made for steady states, which deep equilibria solve for.
    """

    local = False
    of_steady = False

    def __init__(self, weight: float | Schedule = 1.0):
        super().__init__()
        self._schedule = weight if callable(weight) else constant(self._number(weight))
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))

    def _number(self, weight) -> float:
        name = type(self).__name__
        if not isinstance(weight, numbers.Real) and not (isinstance(weight, Tensor) and weight.numel() == 1):
            raise TypeError(
                f"weight must be a number or a schedule, got {weight!r}: {name}(weight=0.1), and other options "
                f"by their names too (help(regularizers.{name}) has them)"
            )
        if weight < 0:
            raise ValueError(
                f"weight must not be negative, got {weight}: training would make the equation harder to solve; where "
                f"that is meant, say -1.0 * {name}(...)"
            )
        return float(weight)

    @abc.abstractmethod
    def figure(self, solution: Solution) -> Tensor:
        """What is penalized, per sample: [batch]."""

    @property
    def weight(self) -> float:
        """The weight as it is now."""
        return float(self._schedule(int(self.steps)))

    def step(self) -> None:
        """Advances the schedule; call it once per optimizer step (or per epoch, as the schedule was made)."""
        self.steps += 1

    def forward(self, source: Solution | Recorded | nn.Module | list) -> Tensor:
        """Weight · the mean figure of the samples that did not fail, a scalar; 0 where all failed.

        Args:
            source: a `Solution`; what an adapter recorded of another library's solve; a layer that was called, of
                neuralde's or attached; a model with such layers inside, or a list of solutions: their penalties are
                summed.

        Raises:
            TypeError: none of these, or another library's solve where it takes more than one step of it. ValueError: no
                layer in it holds a solution, or the list is empty.
        """
        first, *others = map(self._mean, solutions(source))
        return self.weight * sum(others, start=first)

    def prepare(self, model: nn.Module) -> Regularizer:
        """Lets the penalty act on the solves of a model's layers; only `Steer` does, the others look at solutions.

        Args:
            model: a layer, or a model with layers inside.

        Returns:
            The penalty itself.
        """
        return self

    def __add__(self, other: Regularizer) -> Sum:
        if not isinstance(other, Regularizer):
            return NotImplemented
        return Sum([self, other])

    def __radd__(self, other: int) -> Sum:
        # sum([a, b]) begins with 0 + a.
        return Sum([self]) if isinstance(other, int) and other == 0 else NotImplemented

    def __mul__(self, factor: float) -> Sum:
        return Sum([self], [factor]) if isinstance(factor, numbers.Real) else NotImplemented

    __rmul__ = __mul__

    def __truediv__(self, divisor: float) -> Sum:
        return self * (1.0 / divisor) if isinstance(divisor, numbers.Real) else NotImplemented

    def __sub__(self, other):
        raise TypeError("penalties are added and multiplied by numbers; for a difference say a + (-1.0) * b")

    def _mean(self, solution: Solution | Recorded) -> Tensor:
        if isinstance(solution, Recorded) and not self.local:
            raise TypeError(
                f"{type(self).__name__} needs a solve of neuralde's, all of it: {solution.source} shows one step, "
                "from a sampled time, which LocalError and LocalStiffness can do with, and penalties of one's own that "
                f"say local = True (docs/regularizers.md, One's own). {solution.engine}"
            )
        if isinstance(solution, Skipped):
            return solution.nothing()
        if isinstance(solution, Recorded):
            try:
                return self.figure(solution).mean()
            except AllFailed:
                return solution.zero
        # A penalty that is to bring steady states about is wanted most where they were not reached.
        counted = solution.usable if self.of_steady else solution.converged
        if bool(counted.all()):
            return self.figure(solution).mean()
        if not bool(counted.any()):
            return torch.zeros((), dtype=solution.ts.dtype, device=solution.ts.device)
        return self.figure(solution)[counted].mean()

    def extra_repr(self) -> str:
        """The weight as it is now."""
        return f"weight={self.weight:.6g}"


class Sum(Regularizer):
    """Penalties added: `penalty = a + b`, `0.1 * a + b`, `sum([a, b, c])`.

    Its value is the sum of theirs, each taken as it would be alone. `step()` advances the schedule of every one of
    them, once; they stay the objects that they were, and `state_dict()` has them under `parts`.

    Args:
        parts: the penalties. Those of a sum are taken out of it.
        factors: what each is multiplied by, beside its own weight; None for 1.

    Raises:
        TypeError: a part is no `Regularizer`. ValueError: no parts, or a factor that is not finite.
    """

    def __init__(self, parts: list[Regularizer], factors: list[float] | None = None):
        super().__init__()
        factors = [1.0] * len(parts) if factors is None else [float(x) for x in factors]
        if not parts or len(parts) != len(factors):
            raise ValueError(f"a sum needs parts, and a factor for each, got {len(parts)} and {len(factors)}")
        if not all(isinstance(part, Regularizer) for part in parts):
            raise TypeError(f"parts must be penalties, got {', '.join(type(part).__name__ for part in parts)}")
        if not all(map(math.isfinite, factors)):
            raise ValueError(f"factors of penalties must be finite, got {factors}")
        self.parts, self.factors = nn.ModuleList(), []
        for part, factor in zip(parts, factors, strict=True):
            inner = zip(part.parts, part.factors, strict=True) if isinstance(part, Sum) else [(part, 1.0)]
            for one, its in inner:
                self.parts.append(one)
                self.factors.append(factor * its)

    def figure(self, solution: Solution) -> Tensor:
        """Σ factor · weight · figure of the parts, [batch]."""
        return sum(c * part.weight * part.figure(solution) for c, part in zip(self.factors, self.parts, strict=True))

    def forward(self, source: Solution | Recorded | nn.Module | list) -> Tensor:
        """Σ factor · penalty; see `Regularizer.forward`."""
        return sum(c * part(source) for c, part in zip(self.factors, self.parts, strict=True))

    def step(self) -> None:
        """Advances every part's schedule."""
        super().step()
        for part in {id(part): part for part in self.parts}.values():
            part.step()

    def prepare(self, model: nn.Module) -> Sum:
        """See `Regularizer.prepare`."""
        for part in self.parts:
            part.prepare(model)
        return self

    def extra_repr(self) -> str:
        """The factors; the parts have their own lines."""
        return f"factors={self.factors}"


def solutions(source: Solution | Recorded | nn.Module | list) -> list[Solution | Recorded]:
    """The solutions that a penalty is taken of.

    Raises:
        TypeError, ValueError: as `Regularizer.forward`.
    """
    if isinstance(source, Solution | Recorded):
        return [source]
    if isinstance(source, list) and all(isinstance(x, Solution | Recorded) for x in source):
        if not source:
            raise ValueError("no solve was recorded: call the model inside of `with record() as solutions:`")
        return source
    if not isinstance(source, nn.Module):
        none = "no solve was recorded: is regularizers' odeint (or sdeint) being called, and did it return? "
        raise TypeError(
            f"{none if source is None else ''}a penalty takes a Solution, a neuralde layer, a model with such layers "
            f"or a list of solutions, got {type(source).__name__}"
        )
    held = list(_held(source))
    if not held:
        raise ValueError(
            f"{type(source).__name__} has no neuralde layer inside, nor one that attach() has seen; pass the Solution "
            "that the penalty is for"
        )
    found = [solution for solution in held if solution is not None]
    if not found:
        raise ValueError(f"no layer of {type(source).__name__} holds a solution yet; call the model first")
    return found


def _held(model: nn.Module) -> Iterator[Solution | Recorded | None]:
    # Layers are known by what they hold, so that those of every kind, and users' own, count. What torch.compile makes
    # of a layer holds what the layer does: the same one, which counts once.
    seen = set()
    for module in parts(model):
        # First where most have none, which nn.Module takes its time to say.
        if "solution" not in vars(module) and not hasattr(type(module), "solution"):
            continue
        solution = getattr(module, "solution", model)
        if isinstance(solution, Solution | Recorded | None) and (solution is None or id(solution) not in seen):
            seen.add(id(solution))
            yield solution
