"""The few states that a solve keeps, thinned as it goes on, where it does not keep all of them."""

from __future__ import annotations

from torch import Tensor

from .algebra import Figure


class Held:
    """The states at every `stride`-th step of each sample, but the first.

    Nobody knows how many steps a solve will take: when there would be more than `most` of them, every second one goes
    and the stride doubles. A multistep method can't go on from one state: it is kept together with those at the starts
    of the `before` steps before it, and counts once.

    Attributes:
        stride: in steps.
        z: step -> [batch, features]; what it holds of a sample that has no such step means nothing.
    """

    def __init__(self, most: int, before: int, batch: int):
        self.most, self.before, self.batch = most, before, batch
        self.stride, self.z = 1, {}

    @property
    def starts(self) -> list[int]:
        """The steps that a replay can start at beside step 0, ascending."""
        return sorted(j for j in self.z if j % self.stride == 0)

    def add(self, step: Figure, rows: Tensor | None, ok: Figure, z: Tensor):
        """Keeps the states at the starts of some samples' accepted steps, where they are due.

        Args:
            step: which of its steps it is for each sample, [samples]; a number where the batch steps as one.
            rows: the samples, or None for all. ok: which of them took the step, [samples]; or a number. z: [samples,
                features].
        """
        if not self.most:
            return
        if not isinstance(step, Tensor):
            if ok and step and self._room_for(step):
                self.z[step] = z
            return
        due = self._due(step) & (step > 0) & ok
        for j in step[due].unique().tolist():
            if self._room_for(j):
                self._put(j, rows, (due & (step == j)).nonzero().flatten(), z)

    def finish(self):
        """Lets go of what was kept for a state that the solve did not come to."""
        self.z = {j: z for j, z in self.z.items() if -(-j // self.stride) * self.stride in self.z}

    def _due(self, step):
        return (-step) % self.stride <= self.before

    def _room_for(self, j: int) -> bool:
        while -(-j // self.stride) > self.most:
            self.thin()
        return self._due(j)

    def thin(self):
        """Doubles the stride."""
        self.stride *= 2
        self.z = {j: z for j, z in self.z.items() if self._due(j)}

    def _put(self, j: int, rows: Tensor | None, which: Tensor, z: Tensor):
        if len(which) == self.batch:
            self.z[j] = z
            return
        if j not in self.z:
            self.z[j] = z.new_zeros(self.batch, z.shape[1])
        self.z[j].index_copy_(0, which if rows is None else rows[which], z[which])
