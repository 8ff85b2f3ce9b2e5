"""The states of a solve from the last to the first, with few of them in memory: binomial checkpointing.

Source: Griewank & Walther, Algorithm 799: Revolve, ACM TOMS 26 (2000), sections 1 to 3.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import numbers
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..grid import Grid
from ..held import Held
from ..problem import Problem
from ..retrace import Window, advance, states_at, window_at

__all__ = ["Action", "States", "blocks", "limit", "reverse", "states_at"]


def limit(checkpoints: int | None) -> int | None:
    """The option of that name, as the adjoints have it: at most how many states are kept.

    Raises:
        TypeError, ValueError: it is no such number.
    """
    if checkpoints is None:
        return None
    if not isinstance(checkpoints, numbers.Integral) or isinstance(checkpoints, bool):
        raise TypeError(f"checkpoints must be an integer or None, got {type(checkpoints).__name__}")
    if checkpoints < 1:
        raise ValueError(f"checkpoints must be at least 1, or None, got {checkpoints}")
    return int(checkpoints)


def limited(problem: Problem, keep: int | None) -> Problem:
    """The problem with so many states kept: see `Problem.keep`.

    Raises:
        ValueError: it is to keep more.
    """
    if keep and problem.keep_stages:
        raise ValueError(
            f"dense=True keeps the stages of every step, and checkpoints={keep} at most as many states: leave one of "
            "them out"
        )
    return problem if problem.keep == keep else dataclasses.replace(problem, keep=keep)


class Action(NamedTuple):
    """What to do next on the way back through the steps.

    Attributes:
        start, stop: steps; the state at `start` is held.
        block: make the states at start, ..., stop - 1 and use them, the last one first; after that, neither they nor
            the state at `start` are needed. Otherwise make the state at `stop`, and hold it as well.
    """

    start: int
    stop: int
    block: bool


def reverse(steps: int, slots: int) -> Iterator[Action]:
    """A way back through some steps that makes as few of them again as there can be.

    Args:
        steps: how many.
        slots: how many states there may be beside that at step 0, at least 1.

    Yields:
        `Action`s. They make t(n, s) = r·n - β(s + 1, r - 1) steps, with β(s, r) = (s + r)! / (s! r!) and the smallest r
        of β(s, r) ≥ n, for n steps and s slots: the minimum.
    """
    held = [(0, steps)]  # (step of a held state, where the way back stands when it is its turn)
    while held:
        start, stop = held.pop()
        free = slots - len(held)
        while stop - start > free + 1:
            middle = start + _split(stop - start, free)
            yield Action(start, middle, block=False)
            held.append((start, middle))
            start, free = middle, free - 1
        yield Action(start, stop, block=True)


def _split(steps: int, slots: int) -> int:
    """How far from the start the next state is to be held."""
    r = 1
    while math.comb(slots + r, slots) < steps:
        r += 1
    return min(math.comb(slots + r - 1, slots), steps - math.comb(slots + r - 2, slots - 1))


def minimum(steps: int, slots: int) -> int:
    """How many steps `reverse` makes again."""
    if steps < 2:
        return 0
    r = 1
    while math.comb(slots + r, slots) < steps:
        r += 1
    return r * steps - math.comb(slots + r, slots + 1)


def _make_room(held: Held, steps: int, slots: int):
    """Lets go of so many of the kept states that the fewest steps are made again.

    Those kept save the way to them, but stay while the gaps between them are gone through, which then have fewer slots.
    """

    def again(stride: int) -> int:
        kept = (steps - 1) // stride
        return kept * minimum(stride, slots - kept) + minimum(steps - kept * stride, slots - kept)

    if held.stride == 1:
        return
    strides = [held.stride << i for i in range(steps.bit_length() + 1)]
    best = min((s for s in strides if (steps - 1) // s < slots), key=again)
    while held.stride < best:
        held.thin()


class States(Sequence):
    """The states at the starts of some steps in a row: `states[i]` is that of step lo + i, [samples of it, features].

    `states(step, rows)`, both [samples], are those of a step of each sample's own, as `Dense` asks for them. A
    multistep method gets those before lo there as well that its steps build on.
    """

    def __init__(self, grid: Grid, lo: int, window: Window):
        self._grid, self._lo, self._depth = grid, lo, len(window) - 1
        self._z = list(reversed(window))  # [batch, features] each

    def append(self, z: Tensor):
        """The next one, [batch, features]: a sample that does not take the step has any state there."""
        self._z.append(z)

    def clear(self):
        """Lets go of all of them."""
        self._z.clear()

    def __len__(self) -> int:
        return len(self._z) - self._depth

    def __getitem__(self, i: int) -> Tensor:
        i = range(len(self))[i]
        z, rows = self._z[self._depth + i], self._grid.rows[self._lo + i]
        return z if rows is None else z.index_select(0, rows)

    def __call__(self, step: Tensor, rows: Tensor) -> Tensor:
        """[samples, features]."""
        found = None
        for j in step.unique().tolist():
            z = self._z[self._depth + j - self._lo].index_select(0, rows)
            found = z if found is None else torch.where((step == j)[:, None], z, found)
        return found


def blocks(problem: Problem, grid: Grid, z0: Tensor, slots: int) -> Iterator[tuple[int, int, States]]:
    """The states of a solve that kept few of them, from the last to the first, made again without gradients.

    Args:
        problem, grid: of the solve.
        z0: its start, [batch, features].
        slots: how many states there may be beside it, those that the solve kept included: `Problem.keep`, at least 1. A
            state of a multistep method has those with it that its next step builds on.

    Yields:
        (lo, hi, states): the steps lo, ..., hi - 1 and the states at their starts. hi of the first is the number of
        steps, hi of each other the lo of the one before, lo of the last 0. A block's states are gone with the next.
    """
    _make_room(grid.held, len(grid), slots)
    size, kept = 1 + problem.solver.history, grid.held.starts
    # Those that the solve kept stay where they are: a backward pass may come again.
    free = max(1, slots - len(kept))
    for first, last in reversed(list(itertools.pairwise((0, *(j for j in kept if j < len(grid)), len(grid))))):
        held = {first: window_at(grid, z0.detach(), first, size)}
        for start, stop, block in reverse(last - first, free):
            lo, hi = first + start, first + stop
            if not block:
                held[hi] = _run(problem, grid, lo, hi, held[lo])
                continue
            window = held.pop(lo)
            states = States(grid, lo, window)
            _run(problem, grid, lo, hi - 1, window, states)
            del window
            yield lo, hi, states
            states.clear()  # whoever still has it


def _run(problem: Problem, grid: Grid, lo: int, hi: int, window: Window, states: States | None = None) -> Window:
    """Moves on from step lo to step hi, and keeps the states on the way where there are `States` for them."""
    for j in range(lo, hi):
        step, rows = grid.whole_step(j + 1)  # only samples that take the next step are wanted there
        window = advance(problem, grid, step - 1, rows, window)
        if states is not None:
            states.append(window[0])
    return window
