"""What a solve's value depends on beside its initial state, and how a backward pass gets at it."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from ..errors import NeuralDEError
from ..field import Field, Substitute, closed_over, reachable
from ..graph import behind
from ..problem import Problem


class Dependencies:
    """The tensors that a solve's result depends on and that want a gradient: f's, args', the solver's own.

    Finding them costs nothing beside the evaluation that starts every solve.

    Args:
        problem: to be solved. z0: from where, [batch, features].
        adjoint: its name, for messages.

    Attributes:
        slope: f at the start, [batch, features].
        tensors: what wants a gradient, each once.
    """

    def __init__(self, problem: Problem, z0: Tensor, adjoint: str):
        field = problem.field
        self.problem, self.adjoint = problem, adjoint
        self._start = start = z0.detach()
        if z0.requires_grad:  # marked, so that it can be told where f remembers it
            with torch.enable_grad():
                start = self._start.requires_grad_().clone()
        self.slope, closed, self._seen = closed_over(field, problem.first_instant, start, problem.end)
        field.fill(problem.first_instant, z0)  # not with the copy
        given = [x for x in pytree.tree_leaves(field.args) if isinstance(x, Tensor) and x.requires_grad]
        # A solver may have parameters too: the network of a hypersolver.
        self.tensors = list({id(x): x for x in (*given, *closed, *reachable(problem.solver))}.values())
        self._reached = self._reach() & {id(x) for x in self.tensors}

    def _reach(self) -> set[int]:
        return {id(x) for uses in (self.problem.field.equation.f, self.problem.solver) for x in reachable(uses)}

    def require_same_f(self) -> None:
        """Raises NeuralDEError if there is a tensor that f could reach in the solve, and can't reach now."""
        if not self._reached <= self._reach():
            complain_of_change(self.adjoint)

    @contextlib.contextmanager
    def followed(self) -> Iterator[None]:
        """Says what is wrong where a backward pass inside of it meets what f remembers of an earlier evaluation."""
        try:
            yield
        except RuntimeError as error:
            if "backward through the graph a second time" not in str(error):
                raise
            raise NeuralDEError(
                "f uses a computed tensor that it made at an earlier evaluation and kept (a cache, an lru_cache, an "
                f"attribute), and adjoint={self.adjoint!r} can't follow it; compute it outside of f and pass it "
                "through args, compute it at every evaluation, or use adjoint='direct'"
            ) from error

    def ends(self):
        """The tensors as ends of the graphs that a backward pass makes.

        Returns:
            The field that uses them, the list of ends in the order of `tensors`, and a context in which f sees them.
        """
        # Hooks on a parameter are for its whole gradient, not for every step's part of it.
        ends = [x if x.is_leaf and not x._backward_hooks else x.detach().requires_grad_() for x in self.tensors]
        pairs = [(x, end) for x, end in zip(self.tensors, ends, strict=True) if x is not end]
        if not pairs:
            return self.problem.field, ends, contextlib.nullcontext
        replaced = {id(x): end for x, end in pairs}
        field: Field = copy.copy(self.problem.field)
        field.args = pytree.tree_map(lambda x: replaced.get(id(x), x), field.args)
        return field, ends, lambda: Substitute(pairs)

    def require_all(self, gradients: list[Tensor | None]) -> None:
        """Raises NeuralDEError where a computed tensor that f was seen to use got no gradient.

        Args:
            gradients: of `tensors`, after a backward pass through at least one step.
        """
        for x, gradient in zip(self.tensors, gradients, strict=True):
            if gradient is None and not x.is_leaf and id(x) in self._seen:
                raise NeuralDEError(
                    f"f uses a computed tensor of shape {tuple(x.shape)} in a way that adjoint={self.adjoint!r} can't "
                    "follow in the backward pass (a scripted function or a custom autograd.Function); pass it through "
                    "args, or use adjoint='direct'"
                )

    def require_no_other(
        self, values: Sequence[Tensor], known: Sequence[Tensor], again: Callable[[], Sequence[Tensor]]
    ) -> None:
        """Raises NeuralDEError where a tensor that wants a gradient is used, but was not found.

        Args:
            values: computed from f.
            known: what the values may depend on.
            again: computes them once more. A tensor that f makes itself, to differentiate with respect to it, is
                another one then.
        """
        stops = {x.grad_fn for x in known}
        first = _leaves(values, stops)
        strange = first.keys() - {id(x) for x in known}
        if not strange:
            return
        for key in strange & _leaves(again(), stops).keys():
            if first[key] is self._start:
                raise NeuralDEError(
                    "f uses what it remembers of z at the start of the solve (a cache, an attribute, a list), and "
                    f"adjoint={self.adjoint!r} has no gradient for it; pass it through args, where its gradient is "
                    "added to that of z0, or use adjoint='direct'"
                )
            raise NeuralDEError(
                f"f uses a tensor of shape {tuple(first[key].shape)} that wants a gradient, but it was not used at the "
                f"start of the solve, nor found in what f closes over or holds, so adjoint={self.adjoint!r} has no "
                "gradient for it; pass it through args, or use adjoint='direct'"
            )


def complain_of_change(adjoint: str):
    """Raises NeuralDEError: f is not what it was."""
    raise NeuralDEError(
        "f gives another result in the backward pass than in the solve: a tensor, an input or a mode (train, eval) "
        f"that it uses was changed in between, or was lent to it for the call. adjoint={adjoint!r} evaluates "
        "f again in the backward pass; run the backward pass before changing f, pass what changes through args, or "
        "use adjoint='direct'"
    )


def added(sums: list[Tensor | None], gradients: Sequence[Tensor | None]) -> list[Tensor | None]:
    """The sums with one more part of each gradient; None is nothing."""
    # The first part may share memory with a cotangent; the sum's own memory begins with the second.
    return [x if g is None else g if x is None else x + g for x, g in zip(sums, gradients, strict=True)]


def _leaves(values: Sequence[Tensor], stops: set) -> dict[int, Tensor]:
    """The leaves of the graph between some tensors and some nodes, by their ids."""
    leaves = (node.variable for node in behind(values, stops) if hasattr(node, "variable"))
    return {id(x): x for x in leaves}
