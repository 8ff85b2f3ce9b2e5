"""The samples of the adaptive loop that step with one method, and where each of them stands."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from . import control as _control
from .algebra import Algebra, Figure
from .solvers import Solver, VectorField, Work


@dataclass
class Tools:
    """What the samples of a lane step with."""

    solver: Solver
    f: VectorField
    memory: Any
    judge: _control.Judge | _control.SharedJudge
    exponents: tuple[float, float]
    since: int  # the attempt at which the lane was put together


# Tensors of a lane whose samples don't lie along the first dimension.
_WIDE = ("last", "linear", "interior", "stops", "signs", "past_slopes", "past_dt")
# Those that are None until there is something in them: what they hold then, and for how many rows.
_LATE = {"last": (float("nan"), 3), "linear": (0, 3)}


@dataclass
class Lane:
    """Samples that step with one method, with their control state: figures [groups], but for the tensors.

    Times run forward in here, whatever the direction of the solve: s = direction·t. s1 is the end of the horizon, stop
    the next time at which a step has to end, least a step that is too small for the horizon. `attempted` is what a
    sample that is not live any more has attempted: a live one has taken part in every attempt. `last` has what a
    failed sample's last attempt was: its step size, error ratio and stiffness, [3, groups]; None while none has failed.
    Where steps differ in their work, `calls` counts evaluations of f, and `linear` Jacobians, factorizations and linear
    solves, [3, groups].
    """

    m: Algebra
    part: int
    rows: Tensor | None
    s: Figure
    s1: Figure
    stop: Figure
    h: Figure
    z: Tensor
    slope: Tensor | None
    previous: Figure
    live: Figure
    accepted: Figure
    attempted: Figure
    calls: Figure
    linear: Tensor | None
    status: Figure
    failed_at: Figure
    last: Tensor | None
    start: Figure
    least: Figure
    direction: Figure | None
    interior: Tensor | None
    stops: Tensor | None
    counter: Figure
    past_slopes: Tensor | None
    past_dt: Tensor | None
    signs: Tensor | None
    ended: Tensor | None
    unfinished: int = 0
    leaving: Figure | None = None
    latest: tuple = (None, None)
    tools: Tools | None = None

    def keep(self, index: Tensor) -> Lane:
        """The same for some of the samples."""
        kept = {
            name: value.index_select(int(name in _WIDE), index) if isinstance(value, Tensor) else value
            for name, value in vars(self).items()
        }
        kept["rows"] = index if self.rows is None else self.rows.index_select(0, index)
        figures, h = self.latest
        kept["latest"] = (figures if figures is None else figures.index_select(1, index)), h.index_select(0, index)
        return Lane(**kept)

    def join(self, other: Lane) -> Lane:
        """The samples of both, in ascending order."""
        joined = {}
        for name, value in vars(self).items():
            more = getattr(other, name)
            if name in _LATE and (value is None) != (more is None):
                fill, rows = _LATE[name]
                known = more if value is None else value
                value, more = (
                    lane.s.new_full((rows, len(lane.s)), fill, dtype=known.dtype) if x is None else x
                    for x, lane in ((value, self), (more, other))
                )
            both = isinstance(value, Tensor) and isinstance(more, Tensor)
            joined[name] = torch.cat([value, more], dim=int(name in _WIDE)) if both else value
        joined["latest"] = None, torch.cat([self.latest[1], other.latest[1]])
        whole, order = Lane(**joined), torch.argsort(joined["rows"])
        return whole.keep(order)

    @property
    def groups(self) -> int:
        """How many samples it has that step alone, or 1."""
        return len(self.s) if isinstance(self.s, Tensor) else 1

    def signed(self, x: Figure) -> Figure:
        """Between t and s."""
        return x if self.direction is None else x * self.direction

    def moment(self, h: Figure, like: Tensor) -> tuple[Tensor, Tensor]:
        """The tensors (t, dt) of an attempt."""
        t, dt = self.signed(self.s), self.signed(h)
        if isinstance(t, Tensor):
            return t, dt
        # Filled on the device: a tensor made of a list would be copied there, which the host waits for.
        return torch.full_like(like, t), torch.full_like(like, dt)

    def count(self, work: Work):
        """Adds what an attempt cost to what its samples have cost so far. A group costs what its worst does."""
        nfe, *linear = work.of_groups(self.groups)
        self.calls = self.calls + (self.m.read(nfe) if isinstance(nfe, Tensor) else nfe) * self.live
        live = self.m.tensor(self.live, self.z)
        more = torch.stack([torch.as_tensor(x, device=live.device).expand(live.shape) * live for x in linear])
        self.linear = more if self.linear is None else self.linear + more

    def leave(self, which: Figure, attempts: int):
        """Takes live samples out of what is stepped, after that many attempts."""
        m = self.m
        self.attempted = m.where(which, m.full(attempts, self.attempted), self.attempted)
        self.live = self.live & m.invert(which)

    def fail(self, which: Figure, attempts: int, figures: Tensor | None, h: Figure):
        """Ends samples where they are: they have no horizon left, so that their steps are zero.

        f is called for them as long as they are in the batch.

        Args:
            which: [groups]. attempts: made so far. figures, h: of the last one.
        """
        m = self.m
        dt = m.tensor(h, self.z.real)
        known = (None, None) if figures is None else _control.reported(figures, dt, self.tools.solver)
        attempt = torch.stack([dt, *(torch.full_like(dt, float("nan")) if x is None else x.to(dt) for x in known)])
        self.last = attempt if self.last is None else torch.where(m.tensor(which, attempt), attempt, self.last)
        self.failed_at = m.where(which, self.s, self.failed_at)
        self.leave(which, attempts)
        self.s1 = m.where(which, self.s, self.s1)
        self.stop = m.where(which, self.s, self.stop)
        if m.count(self.live):
            self.z, self.slope = self.safe(m.invert(which))

    def safe(self, ok: Figure) -> tuple[Tensor, Tensor | None]:
        """z and slope, with those of an ok sample where a sample is not ok and f is not known to be finite.

        Where a call of f is recorded, zero cotangents times what f does at a state that it can't handle would make
        NaN of the parameters' gradients. A state whose slope is finite is safe; others borrow one.
        """
        if not isinstance(ok, Tensor):  # one group for the batch: it fails as a whole
            return self.z, self.slope
        if self.slope is not None:
            ok = ok | self.m.read(torch.isfinite(self.slope.detach()).all(dim=1))
        row = ok.nonzero().flatten()[:1]
        if not len(row):
            return self.z, self.slope
        return tuple(None if x is None else torch.where(ok[:, None], x, x.detach()[row]) for x in (self.z, self.slope))
