"""Weights that are computed (torch.nn.utils.parametrize: weight and spectral norms), once for many evaluations of f."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable

from torch.nn.utils import parametrize

from .field import modules


@contextlib.contextmanager
def once(f, still: bool = False):
    """Weight and spectral norms are computed once in here, at the beginning, with their gradients.

    What torch.nn.utils.parametrize makes at the first use in here it gives again at every other one. The first use is
    made on the tape: those of a solve are not.

    Args:
        f: whose. still: whether they are those of the evaluation before, for a look back at a solve. (A spectral norm
            in training mode makes a step of its power iteration at every use. They are computed again all the same: a
            backward pass may have freed the graph of the solve's.)
    """
    found = [m for m in modules(f) if parametrize.is_parametrized(m)]
    if not found:
        yield
        return
    with parametrize.cached(), _untrained(found) if still else contextlib.nullcontext():
        for module in found:
            for name in module.parametrizations:
                getattr(module, name)
        yield


@contextlib.contextmanager
def _untrained(found: list):
    """The parametrizations of these modules in eval mode."""
    training = [part for m in found for part in m.parametrizations.modules() if part.training]
    for part in training:
        part.training = False
    try:
        yield
    finally:
        for part in training:
            part.training = True


def as_solved(solution):
    """In here f has the weights that a solve for a steady state had."""
    problem = solution._problem
    return contextlib.nullcontext() if problem.rest is None else once(problem.field.given, still=True)


def looking_back(lens: Callable) -> Callable:
    """A function of a solution, `as_solved`."""

    @functools.wraps(lens)
    def look(solution, *args, **given):
        with as_solved(solution):
            return lens(solution, *args, **given)

    return look
