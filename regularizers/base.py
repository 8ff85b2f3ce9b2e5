"""What every penalty is: a weight that may change, and a figure of the solutions that a model's layers hold."""

from __future__ import annotations

import abc
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from neuralde.solution import Solution

from .schedules import Schedule, constant


class Regularizer(nn.Module, abc.ABC):
    """A penalty to add to a loss: `loss = task_loss + penalty(model)`.

    A subclass implements `figure`: a differentiable [batch] tensor of one solution. Calling the penalty gives the
    scalar weight · mean over the batch, summed over the layers of a model.

    Args:
        weight: a number, or a schedule (`constant`, `exponential`, `linear`, `cosine`, or any function of the step).

    A layer that is called several times in one forward pass holds its last solution, and only that one is penalized.

    `step()` advances the schedule; `state_dict()` keeps its position.

    Attributes:
        of_steady: whether it is made for steady states, which deep equilibria solve for.
    """

    of_steady = False

    def __init__(self, weight: float | Schedule = 1.0):
        super().__init__()
        if not callable(weight):
            weight = constant(float(weight))
        self._schedule = weight
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))

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

    def forward(self, source: Solution | nn.Module) -> Tensor:
        """Weight · the mean figure of the samples that did not fail, a scalar; 0 where all failed.

        Args:
            source: a `Solution`, a neuralde layer that was called, or a model with such layers inside: their
                penalties are summed.

        Raises:
            TypeError: none of these. ValueError: no layer in it holds a solution.
        """
        return self.weight * sum(self._mean(solution) for solution in solutions(source))

    def _mean(self, solution: Solution) -> Tensor:
        converged = solution.converged
        if bool(converged.all()):
            return self.figure(solution).mean()
        if not bool(converged.any()):
            return torch.zeros((), dtype=solution.ts.dtype, device=solution.ts.device)
        return self.figure(solution)[converged].mean()

    def extra_repr(self) -> str:
        """The weight as it is now."""
        return f"weight={self.weight:.6g}"


def solutions(source: Solution | nn.Module) -> list[Solution]:
    """The solutions that a penalty is taken of.

    Raises:
        TypeError, ValueError: as `Regularizer.forward`.
    """
    if isinstance(source, Solution):
        return [source]
    if not isinstance(source, nn.Module):
        raise TypeError(
            f"a penalty takes a Solution, a neuralde layer or a model with such layers, got {type(source).__name__}"
        )
    layers = list(_layers(source))
    if not layers:
        raise ValueError(
            f"{type(source).__name__} has no neuralde layer inside; pass the Solution that the penalty is for"
        )
    found = [layer.solution for layer in layers if layer.solution is not None]
    if not found:
        raise ValueError(f"no layer of {type(source).__name__} holds a solution yet; call the model first")
    return found


def _layers(model: nn.Module) -> Iterator[nn.Module]:
    # Known by what they hold, so that layers of every kind, and users' own, count.
    for module in model.modules():
        if hasattr(module, "solution") and (module.solution is None or isinstance(module.solution, Solution)):
            yield module
