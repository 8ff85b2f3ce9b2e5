"""The accepted steps of a solve: what a replay runs through. Each sample's steps are packed to the left."""

from __future__ import annotations

import copy
import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from .held import Held
from .solvers import Step


@dataclass(slots=True)  # a long solve has millions of them
class Record:
    """One attempt of the discovery in which at least one sample was accepted.

    n samples took part; the control figures have one entry per group: n under per-sample control, 1 under joint.

    Attributes:
        part: which of the solver's parts made it.
        rows: indices of the n samples in the batch, or None for all of them.
        accepted: [n], or None where every sample of the batch was accepted.
        t, dt: [groups].
        t_end: the same, or a number where there is one group.
        z: [n, features], the state at t; slope: f there, where later steps build on it. None where they are not kept.
        figures: of `control.Judge`, [1 to 5, groups], or None where the solver reports nothing.
        lens: on a tape, what error and stiffness can be differentiated from: the step without its stages.
        snapshot: [rows, n, features], the stages, where they are kept.
        residual: of a steady state, at the step's end, [groups].
    """

    part: int
    rows: Tensor | None
    accepted: Tensor | None
    t: Tensor
    dt: Tensor
    t_end: Tensor | float
    z: Tensor | None
    slope: Tensor | None
    figures: Tensor | None
    lens: Step | None = None
    snapshot: Tensor | None = None
    residual: Tensor | None = None


_PARTS = 8  # in which the states are sorted: so much less than all of them is there twice at a time


class Place(NamedTuple):
    """Where on the grid one step of several samples lies, or of each its own.

    Attributes:
        rows: the samples, or None for all.
        t, dt, t_end: [groups].
        still: which samples stand still, [samples], or None.
    """

    rows: Tensor | None
    t: Tensor
    dt: Tensor
    t_end: Tensor
    still: Tensor | None


class Grid:
    """Accepted steps: step j of every sample that has one, for j = 0, 1, ...

    Attributes:
        rows: per step, the samples that take it (ascending), or None for all.
        t, dt, t_end: per step, [groups].
        sizes: per step, the number of groups.
        parts: per step, pairs (part of the solver, positions in the step of the samples that it steps, None for all).
        counts: accepted steps per sample, [batch].
        ended_in: the step in which an event ended each sample while the batch went on without it, [batch], or None.
        held: the few states that were kept; None where all are.
    """

    def __init__(
        self, records: list[Record], batch: int, joint: bool, like: Tensor, times: Tensor, held: Held | None = None
    ):
        self.batch, self.joint, self.held = batch, joint, held
        self.ended_in: Tensor | None = None
        self.groups = 1 if joint else batch
        self._time_dtype, device = times.dtype, like.device
        self._whole = all(r.rows is None and r.accepted is None for r in records)
        if self._whole:
            self._masks = self._order = None
            self.sizes = [self.groups] * len(records)
            self.rows = [None] * len(records)
            self.counts = torch.full((batch,), len(records), device=device)
        else:
            everyone = torch.arange(batch, device=device)
            self._masks = [r.accepted for r in records]
            samples = self._cat([everyone if r.rows is None else r.rows for r in records])
            # The j-th appearance of a sample is its step j.
            order = torch.argsort(samples, stable=True)
            self.counts = torch.bincount(samples, minlength=batch)
            starts = self.counts.cumsum(0) - self.counts
            step = torch.empty_like(samples)
            step[order] = torch.arange(len(samples), device=device) - starts[samples[order]]
            self._order = torch.argsort(step * batch + samples)
            self._step, self._sample = step[self._order], samples[self._order]
            self.sizes = torch.bincount(step).tolist()
            self.rows = [None if len(rows) == batch else rows for rows in self._sample.split(self.sizes)]
        self.t, self.dt = (self.split(self.gather([getattr(r, name) for r in records], times)) for name in ("t", "dt"))
        ends = [r.t_end for r in records]
        if joint and ends:
            self.t_end = self.split(torch.tensor(ends, dtype=times.dtype, device=device))
        else:
            self.t_end = self.split(self.gather(ends, times))
        self.parts = self._parts(records)
        # States are sorted when they are first asked for: "direct" has them on its tape and rarely asks.
        self._unsorted, self._like, self._slopes = [r.z for r in records], like[:0], [r.slope for r in records]

    def _parts(self, records: list[Record]) -> list[list[tuple[int, Tensor | None]]]:
        used = {r.part for r in records}
        self._part = None
        if len(used) < 2:
            return [[(part, None) for part in used]] * len(self)
        if self._whole:
            return [[(r.part, None)] for r in records]
        device = self.counts.device
        part = self.gather([torch.full((len(r.t),), r.part, device=device) for r in records], self.counts)
        self._part = part
        pieces = []
        for here in self.split(part):
            each = [(i, (here == i).nonzero().flatten()) for i in sorted(used)]
            each = [(i, where) for i, where in each if len(where)]
            pieces.append([(each[0][0], None)] if len(each) == 1 else each)
        return pieces

    def __len__(self) -> int:
        return len(self.sizes)

    def _cat(self, parts: list[Tensor]) -> Tensor:
        return torch.cat([x if m is None else x[m] for x, m in zip(parts, self._masks, strict=True)])

    def gather(self, parts: list[Tensor], like: Tensor) -> Tensor:
        """Per-record tensors [n, ...] -> [all accepted, ...], by step and then by sample."""
        if not parts:
            return like.new_empty(0, *like.shape[1:])
        return torch.cat(parts) if self._whole else self._cat(parts).index_select(0, self._order)

    def split(self, flat: Tensor) -> list[Tensor]:
        """[all accepted, ...] -> one view per step."""
        return list(flat.split(self.sizes)) if self.sizes else []

    @functools.cached_property
    def z(self) -> list[Tensor]:
        """Per step, [samples, features]: the state at t."""
        if self.held is not None:
            raise RuntimeError("the states of this solve were not all kept; neuralde.retrace makes them again")
        unsorted, self._unsorted = self._unsorted, None
        return unsorted if self._whole else list(self._sorted(unsorted))

    def _sorted(self, unsorted: list[Tensor]) -> Iterator[Tensor]:
        """The attempts' states by step and then by sample; an attempt is let go of as its last state is taken."""
        device = self.counts.device
        taken = [torch.arange(len(z), device=device) if m is None else m.nonzero().flatten()
                 for z, m in zip(unsorted, self._masks, strict=True)]  # fmt: skip
        sizes = torch.tensor([len(x) for x in taken], device=device)
        attempt = torch.repeat_interleave(torch.arange(len(taken), device=device), sizes)[self._order]
        row = torch.cat(taken)[self._order]
        last = torch.zeros_like(sizes).scatter_reduce(0, attempt, self._step, "amax").tolist()
        many = -(-len(self) // _PARTS)
        for first in range(0, len(self), many):
            here = (self._step >= first) & (self._step < first + many)
            sources = attempt[here]
            order = torch.argsort(sources, stable=True)
            used = sources.unique().tolist()
            rows = row[here][order].split(torch.bincount(sources)[used].tolist())
            z = torch.cat([unsorted[i].index_select(0, x) for i, x in zip(used, rows, strict=True)])
            for i in used:
                if last[i] < first + many:
                    unsorted[i] = None
            yield from z.index_select(0, torch.argsort(order)).split(self.sizes[first : first + many])

    @property
    def flat_z(self) -> Tensor:
        """All states, [all accepted, features] ([steps·batch, features] under joint control); a copy."""
        return torch.cat([self._like, *self.z])

    def states(self, step: Tensor, rows: Tensor) -> Tensor:
        """The states at the starts of steps of samples, both [samples] -> [samples, features]."""
        steps, found = step.unique().tolist(), None
        for j in steps:
            here = None if len(steps) == 1 else (step == j).nonzero().flatten()
            mine, known = rows if here is None else rows[here], self.rows[j]
            place = mine if known is None else torch.searchsorted(known, mine)
            z = self.z[j] if len(place) == len(self.z[j]) else self.z[j].index_select(0, place)
            if here is None:
                return z
            found = z.new_empty(len(rows), z.shape[1]) if found is None else found
            found = found.index_copy(0, here, z)
        return self._like if found is None else found

    def with_states(self, flat: Tensor) -> Grid:
        """The same steps from other states, [all accepted, features]."""
        other = copy.copy(self)
        other.held, other.z = None, list(flat.split([self.samples(j) for j in range(len(self))]))
        return other

    @functools.cached_property
    def slopes(self) -> list[Tensor]:
        """Per step, [samples, features]: f at its start, where later steps build on it."""
        return list(self.gather(self._slopes, self._like).split([self.samples(j) for j in range(len(self))]))

    def still(self, j: int) -> Tensor | None:
        """Which samples stand still in step j, [batch], or None."""
        return None if self.ended_in is None else self.ended_in < j

    def samples(self, j: int) -> int:
        """How many samples take step j."""
        return self.batch if self.rows[j] is None else len(self.rows[j])

    def place(self, j: int, where: Tensor | None = None) -> Place:
        """Step j, or that of the samples at the places `where` in it."""
        rows, times = self.rows[j], (self.t[j], self.dt[j], self.t_end[j])
        if where is not None:
            rows = where if rows is None else rows.index_select(0, where)
            times = (x.index_select(0, where) for x in times)
        return Place(rows, *times, self.still(j))

    def whole_step(self, j: int) -> tuple[Tensor, Tensor]:
        """(step, rows) of step j of all samples that take it, [samples] each, as `places` has them."""
        rows = torch.arange(self.batch, device=self.counts.device) if self.rows[j] is None else self.rows[j]
        return torch.full_like(rows, j), rows

    def places(self, step: Tensor, rows: Tensor) -> Place:
        """A step of each sample's own, both [samples], ascending; under joint control one step of the whole batch."""
        times = self._times[:, step[:1], 0] if self.joint else self._times[:, step, rows]
        still = None if self.ended_in is None else self.still(int(step[0]))
        return Place(None if len(rows) == self.batch else rows, *times, still)

    @functools.cached_property
    def _times(self) -> Tensor:
        return torch.stack([self.padded(name) for name in ("t", "dt", "t_end")])

    def part_of(self, step: Tensor, sample: Tensor) -> Tensor:
        """Which part of the solver made a step of a sample, both [samples]."""
        if self._part is None:
            return self._first_parts[step]
        return self._part[self.flat_index[step, sample]]

    @functools.cached_property
    def _first_parts(self) -> Tensor:
        return torch.tensor([pieces[0][0] for pieces in self.parts], device=self.counts.device)

    def before(self, j: int, back: int) -> Tensor | None:
        """Where the samples of step j lie in the step so many before, [samples]; None for everywhere."""
        rows, earlier = self.rows[j], self.rows[j - back]
        if rows is None or earlier is None:
            return rows
        return torch.searchsorted(earlier, rows)

    @functools.cached_property
    def flat_index(self) -> Tensor:
        """Where step j of sample b lies in the flat states, [steps, batch]; 0 where there is none."""
        if self._whole:
            return torch.arange(len(self) * self.batch, device=self.counts.device).view(len(self), self.batch)
        return self.pad(torch.arange(len(self._step), device=self.counts.device), 0)

    def pick(self, flat: Tensor, step: Tensor, rows: Tensor) -> Tensor:
        """What flat states [all accepted, ...] hold of steps of samples, both [samples] -> [samples, ...]."""
        return flat.index_select(0, self.flat_index[step, rows])

    def pad(self, flat: Tensor, fill: float = 0.0) -> Tensor:
        """[all accepted, ...] -> [steps, batch, ...], `fill` where a sample has no such step. Differentiable."""
        if self._whole:
            groups = self.groups if len(flat) == len(self) * self.groups else self.batch
            return flat.view(len(self), groups, *flat.shape[1:]).expand(len(self), self.batch, *flat.shape[1:])
        out = flat.new_full((len(self), self.batch, *flat.shape[1:]), fill)
        return out.index_put((self._step, self._sample), flat)

    @property
    def mask(self) -> Tensor:
        """Which samples have a step j, [steps, batch]."""
        steps = torch.arange(len(self), device=self.counts.device)
        return steps[:, None] < self.counts

    def padded(self, name: str, fill: float = 0.0) -> Tensor:
        """`t`, `dt` or `t_end` as [steps, groups]; under joint control one column."""
        if not len(self):
            return self.counts.new_zeros(0, self.groups, dtype=self._time_dtype)
        flat = torch.cat(getattr(self, name))
        return flat.view(len(self), self.groups) if self._whole else self.pad(flat, fill)

    def locate(self, times: Tensor, direction: Tensor) -> tuple[Tensor, Tensor]:
        """Where times lie on the grid.

        Args:
            times: [points, groups] (or [points, batch] under joint control).
            direction: +1 or -1, [groups].

        Returns:
            (step, theta), each [points, groups or batch]: the index of the step that contains the time, and the
            fraction of it in [0, 1].
        """
        ends = (self.padded("t_end", fill=float("nan")) * direction).nan_to_num(nan=float("inf"))
        ends = ends.T.expand(times.shape[1], -1).contiguous()
        with torch.no_grad():
            step = torch.searchsorted(ends, (times * direction).T.contiguous(), side="left").T
            step = step.minimum(self.counts[: times.shape[1]] - 1).clamp(min=0)
        t, dt = self.padded("t").expand(-1, times.shape[1]), self.padded("dt").expand(-1, times.shape[1])
        theta = (times - t.gather(0, step)) / dt.gather(0, step)
        return step, theta.clamp(0.0, 1.0)
