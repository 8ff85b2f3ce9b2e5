"""Weights that are computed (weight and spectral norms), once for many evaluations of f.

Those of torch.nn.utils.parametrize, and of the older torch.nn.utils.weight_norm and spectral_norm, which are hooks.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable

from torch import nn
from torch.nn.utils import parametrize
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

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
    used = modules(f)
    found, hooked = [m for m in used if parametrize.is_parametrized(m)], [m for m in used if _normed(m)]
    if not (found or hooked):
        yield
        return
    parts = [part for m in found for part in m.parametrizations.modules()]
    with parametrize.cached(), _untrained(parts) if still else contextlib.nullcontext():
        for module in found:
            for name in module.parametrizations:
                getattr(module, name)
        with contextlib.ExitStack() as stack:
            for module in hooked:
                stack.enter_context(_hooked_once(module, still))
            yield


def _normed(m: nn.Module) -> list:
    """The hooks of a module that compute its weights."""
    return [hook for hook in m._forward_pre_hooks.values() if isinstance(hook, SpectralNorm | WeightNorm)]


@contextlib.contextmanager
def _hooked_once(module: nn.Module, still: bool):
    """The hooks are called, and rest in here."""
    hooks, norms = dict(module._forward_pre_hooks), _normed(module)
    with _untrained([module]) if still else contextlib.nullcontext():
        for hook in norms:
            hook(module, None)
    for key, hook in hooks.items():
        if any(hook is norm for norm in norms):
            del module._forward_pre_hooks[key]
    try:
        yield
    finally:
        module._forward_pre_hooks.clear()
        module._forward_pre_hooks.update(hooks)


@contextlib.contextmanager
def _untrained(parts: list[nn.Module]):
    """These modules in eval mode."""
    training = [part for part in parts if part.training]
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
