"""What every penalty is: a weight that may change, and a figure of the solutions that a model's layers hold."""

from __future__ import annotations

import abc
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from neuralde.solution import Solution

from .recorded import Recorded, Skipped
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
        local: whether one step at a sampled time is all that it looks at, so that solves of other libraries will do.
    """

    local = False

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
        return self.weight * sum(self._mean(solution) for solution in solutions(source))

    def _mean(self, solution: Solution | Recorded) -> Tensor:
        if isinstance(solution, Recorded) and not self.local:
            raise TypeError(
                f"{type(self).__name__} looks at more than one step, and {solution.source} shows no others: LocalError "
                'and LocalStiffness can do with it. attach(model, engine="neuralde") has neuralde make the solves of '
                "torchdyn's layers; elsewhere solve with neuralde.solve or neuralde.NeuralODE, where this penalty works"
            )
        if isinstance(solution, Skipped):
            return solution.zero
        converged = solution.converged
        if bool(converged.all()):
            return self.figure(solution).mean()
        if not bool(converged.any()):
            return torch.zeros((), dtype=solution.ts.dtype, device=solution.ts.device)
        return self.figure(solution)[converged].mean()

    def extra_repr(self) -> str:
        """The weight as it is now."""
        return f"weight={self.weight:.6g}"


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
        raise TypeError(
            f"a penalty takes a Solution, a neuralde layer, a model with such layers or a list of solutions, got "
            f"{type(source).__name__}"
        )
    layers = list(_layers(source))
    if not layers:
        raise ValueError(
            f"{type(source).__name__} has no neuralde layer inside, nor one that attach() has seen; pass the Solution "
            "that the penalty is for"
        )
    found = [layer.solution for layer in layers if layer.solution is not None]
    if not found:
        raise ValueError(f"no layer of {type(source).__name__} holds a solution yet; call the model first")
    return found


def _layers(model: nn.Module) -> Iterator[nn.Module]:
    # Known by what they hold, so that layers of every kind, and users' own, count.
    for module in model.modules():
        if hasattr(module, "solution") and isinstance(module.solution, Solution | Recorded | None):
            yield module
