"""Adams methods on a fixed grid with a rising order, as torchdiffeq has them."""

from __future__ import annotations

import collections
import functools
import itertools
import warnings
from collections.abc import Callable, Iterator
from fractions import Fraction

import torch
from torch import Tensor

_LEAST, MOST = 4, 12  # below the least order a step is made by the 3/8 rule


@functools.cache
def weights(count: int, first: int) -> tuple[float, ...]:
    """∫₀¹ of the Lagrange polynomials on the nodes first, first - 1, ..., `count` of them.

    first = 0 gives the Adams-Bashforth weights of f(t₀), f(t₋₁), ...; first = 1 the Adams-Moulton weights, that of
    f(t₁) first. Exact rational arithmetic.

    Source: Hairer, Nørsett & Wanner, Solving ODEs I, III.1.
    """
    nodes = range(first, first - count, -1)
    return tuple(float(_integral([x for x in nodes if x != node], node)) for node in nodes)


def _integral(others: list[int], node: int) -> Fraction:
    """∫₀¹ Π (x - other)/(node - other) dx."""
    powers = [Fraction(1)]  # coefficients of 1, x, x², ...
    for other in others:
        shifted = [Fraction(0), *powers]
        powers = [(s - other * p) / (node - other) for s, p in zip(shifted, [*powers, 0], strict=True)]
    return sum(p / (k + 1) for k, p in enumerate(powers))


def steps(
    f: Callable,
    y: Tensor,
    grid: Tensor,
    implicit: bool,
    rtol,
    atol,
    max_order: int,
    max_iters: int,
    before: Callable[[Tensor, Tensor, Tensor], None],
) -> Iterator[tuple[Tensor, Tensor]]:
    """Steps along a grid, everything on the tape if grad mode is on.

    The weights are those of equal steps, also where the grid's are not (as in torchdiffeq; the order is then lost).

    Args:
        f: f(t, y, side), dy/dt in the shape of y; side is +1 just after t, -1 just before, 0 where it does not matter.
        y: the state at grid[0]. grid: [points].
        implicit: Adams-Moulton correction of the Adams-Bashforth prediction, by fixed-point iteration.
        rtol, atol: of that iteration.
        max_order: the highest order of the prediction plus one. max_iters: of the iteration.
        before: called as before(t, y, dt) at every step.

    Yields:
        (f(t), y at the step's end) of every step.
    """
    history: collections.deque[Tensor] = collections.deque(maxlen=max_order - 1)
    for t, end in itertools.pairwise(grid):
        dt = end - t
        before(t, y, dt)
        slope = f(t, y, 1)
        history.appendleft(slope)
        order = len(history)
        if order < _LEAST - 1:
            change = _three_eighths(f, t, dt, end, y, slope)
        else:
            change = dt * _sum(weights(order, 0), history)
            if implicit:
                change, converged = _corrected(f, end, dt, y, change, history, rtol, atol, max_iters)
                if not converged:
                    warnings.warn(
                        "the Adams-Moulton iteration did not converge to rtol and atol; raise max_iters, loosen them, "
                        "or take smaller steps",
                        stacklevel=2,
                    )
                    history.pop()
        y = y + change
        yield slope, y


def _sum(numbers: tuple[float, ...], slopes) -> Tensor:
    # In float64: the weights of a high order are large and alternate.
    dtype = slopes[0].dtype
    wide = torch.promote_types(dtype, torch.float64)
    return sum(w * k.to(wide) for w, k in zip(numbers, slopes, strict=True)).to(dtype)


def _three_eighths(f, t, dt, end, y, k1):
    k2 = f(t + dt / 3, y + dt * k1 / 3, 0)
    k3 = f(t + dt * 2 / 3, y + dt * (k2 - k1 / 3), 0)
    k4 = f(end, y + dt * (k1 - k2 + k3), -1)
    return dt * (k1 + 3 * (k2 + k3) + k4) / 8


def _corrected(f, end, dt, y, change, history, rtol, atol, max_iters):
    now, *past = weights(len(history) + 1, 1)
    known = dt * _sum(past, history)
    for _ in range(max_iters):
        before, change = change, dt * now * f(end, y + change, -1) + known
        with torch.no_grad():
            scale = atol + rtol * torch.maximum(before.abs(), change.abs())
            if bool(((change - before).abs() < scale).all()):
                return change, True
    return change, False
