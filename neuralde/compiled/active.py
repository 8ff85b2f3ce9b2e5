"""Which samples a program steps: all of the batch, or a part of it once most of them have ended."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..problem import Problem
from .programs import leaves_of

_FEWEST = 64  # samples that are worth to be made fewer


class Active:
    """The samples that are stepped.

    They are made fewer by halves: every other size of the batch would be one more that no program has seen.

    Args:
        problem: of all samples. rows: which of them, ascending; None for all.

    Attributes:
        start, end: of their horizon, [groups]. leaves: the tensors in their args.
    """

    def __init__(self, problem: Problem, rows: Tensor | None = None):
        self.problem, self.rows = problem, rows
        self.start, self.end = self.of(problem.start), self.of(problem.end)
        self.leaves = leaves_of(problem.field.on(rows).args)

    def of(self, whole: Tensor) -> Tensor:
        """What is theirs of something that all samples have, [batch, ...]."""
        return whole if self.rows is None else whole.index_select(0, self.rows)

    def put(self, own: Tensor, whole: Tensor) -> Tensor:
        """The same with theirs in its place."""
        return own if self.rows is None else whole.index_copy(0, self.rows, own)

    def put_all(self, own: Sequence[Tensor], whole: Sequence[Tensor]) -> list[Tensor]:
        """The same for several."""
        return [self.put(x, y) for x, y in zip(own, whole, strict=True)]

    def worth_shrinking(self, going: int) -> bool:
        """Whether so few go on that f is better evaluated for fewer samples."""
        return _halved(len(self.start), going) < len(self.start) and self.problem.field.can_shrink()

    def fewer(self, live: Tensor, going: int) -> Tensor:
        """Which of them stay, ascending: those who go on, and who has ended to make up the half.

        Args:
            live: who goes on, [samples]. going: how many that are.
        """
        first = torch.argsort(live, descending=True, stable=True)[: _halved(len(live), going)]
        return first.sort().values

    def on(self, here: Tensor) -> Active:
        """These of them."""
        return Active(self.problem, here if self.rows is None else self.rows.index_select(0, here))

    def tensors(self, own: list[Tensor], wanted: tuple[int, ...]) -> list[Tensor]:
        """What is theirs of tensors that want a gradient, the last of which are leaves of args.

        Args:
            wanted: which leaves these are.
        """
        if self.rows is None:
            return own
        return [*own[: len(own) - len(wanted)], *(self.leaves[i].detach() for i in wanted)]

    def blank(self, sums: list[Tensor], own: list[Tensor]) -> list[Tensor]:
        """Where the gradients by `own` are added up: the sums themselves, or zeros where only some rows are theirs."""
        return [x if x.shape == y.shape else torch.zeros_like(y) for x, y in zip(sums, own, strict=True)]

    def collect(self, sums: list[Tensor], found: list[Tensor]):
        """Adds the latter to their rows of the sums. found: of `blank`."""
        for x, y in zip(sums, found, strict=True):
            if x.shape != y.shape:
                x.index_add_(0, self.rows, y)


def _halved(size: int, going: int) -> int:
    """How many of so many samples stay, where so many go on."""
    while size >= _FEWEST and 2 * going <= size:
        size //= 2
    return size
