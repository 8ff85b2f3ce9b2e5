"""When a steady state has been reached, and when it will not be."""

from __future__ import annotations

import collections
import math
import numbers
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .control import check_tolerance, rms
from .errors import Status

_MODES = ("norm", "relative", "absolute")
CLOSE, _FLAT = 3.0, 1.3  # a residual that stalls: within so many tolerances, and within such a factor of its least
FAR = 10  # times the patience: how old the least residual of a sample may be that is anywhere
_LOOK_EVERY = 8  # steps between two looks for a stall
GOING = -1  # the code of a sample that goes on


@dataclass(frozen=True)
class Termination:
    """When a solve for a steady state ends: by the residual f(z) - z after every accepted step.

    | mode | the residual | is compared with |
    |---|---|---|
    | "absolute" | ‖f(z) - z‖ | atol |
    | "relative" | ‖f(z) - z‖ / ‖f(z)‖ | rtol |
    | "norm", either of them | ‖f(z) - z‖ / max(‖f(z)‖, atol/rtol) | rtol |

    A state that runs away to infinity does not come to rest by being large: while ‖f(z) - z‖ has fallen by a factor of
    q since the start, ‖f(z)‖ counts as at most q² times its size there (or that of f(z) - z, if larger).

    Under per-sample control each sample has its own norm and ends by it; under joint control the norm is over the
    batch, as in the papers.

    Args:
        mode: as above.
        rtol, atol: its tolerances, numbers; None takes those of the solve.
        norm: "rms", "l2" (that of the papers' code) or "max"; it matters to "absolute" and to where "norm" changes
            over.
        best: what a sample ends with that did not converge: the iterate with the least residual, or the last one.
        divergence: a sample whose ‖f(z) - z‖ is above so many times that of the start has diverged; None lets it go
            on. (A residual that is not finite always ends it.)
        patience: a sample has stalled whose residual is within 3 tolerances and flat: for so many steps it has stayed
            within a factor of 1.3, and has not fallen by the fraction `fall`. It also has stalled, wherever it is,
            after 10 times as many steps without a new least residual. Both are looked for at every 8th step; None lets
            it go on.
        fall: the fraction by which a flat residual must have fallen in `patience` steps to go on, in [0, 1): what needs
            10,000 steps falls by 2 % in 30. With 0.25 or more nothing that is flat goes on, as in the papers' code.

    Raises:
        TypeError, ValueError: an argument is wrong; the message names it.

    Source: SteadyStateDiffEq.jl and NonlinearSolve.jl's Norm and SafeBest modes. What is flat is the original test of
    the papers' code, max < 1.3·min, which ends slow contractions too (hence `fall`); later versions have turned it into
    one that always holds.
    """

    mode: str = "norm"
    rtol: float | None = None
    atol: float | None = None
    norm: str = "rms"
    best: bool = True
    divergence: float | None = 1e6
    patience: int | None = 30
    fall: float = 1e-3

    def __post_init__(self):
        if self.mode not in _MODES:
            raise ValueError(f"mode must be one of {', '.join(map(repr, _MODES))}, got {self.mode!r}")
        if self.norm not in _NORMS:
            raise ValueError(f"norm must be one of {', '.join(map(repr, _NORMS))}, got {self.norm!r}")
        if not isinstance(self.best, bool):
            raise TypeError(f"best must be True or False, got {self.best!r}")
        for name in ("rtol", "atol"):
            if getattr(self, name) is not None:
                object.__setattr__(self, name, check_tolerance(name, getattr(self, name)))
        if self.divergence is not None:
            if not isinstance(self.divergence, numbers.Real) or isinstance(self.divergence, bool):
                raise TypeError(f"divergence must be a number or None, got {type(self.divergence).__name__}")
            if not self.divergence > 1.0:
                raise ValueError(f"divergence must be above 1, or None, got {self.divergence}")
        if self.patience is not None:
            if not isinstance(self.patience, numbers.Integral) or isinstance(self.patience, bool):
                raise TypeError(f"patience must be an integer or None, got {type(self.patience).__name__}")
            if self.patience < 2:
                raise ValueError(f"patience must be at least 2, or None, got {self.patience}")
        if not isinstance(self.fall, numbers.Real) or isinstance(self.fall, bool):
            raise TypeError(f"fall must be a number, got {type(self.fall).__name__}")
        if not 0.0 <= self.fall < 1.0:
            raise ValueError(f"fall must be in [0, 1), got {self.fall}")

    def within(self, rtol, atol) -> Termination:
        """The same with a solve's tolerances where it has none of its own.

        Raises:
            TypeError: they are needed, but are not numbers.
        """
        own = {}
        for name, value in (("rtol", rtol), ("atol", atol)):
            if getattr(self, name) is None:
                if not isinstance(value, numbers.Real):
                    raise TypeError(
                        f"the termination of a steady state needs one {name} for all components, and the solve has a "
                        f"{type(value).__name__}; give it its own: termination=nde.Termination({name}=...)"
                    )
                own[name] = float(value)
        found = replace(self, **own)
        if found.mode == "absolute" and not found.atol > 0.0:
            raise ValueError('atol must be positive for mode="absolute": it is all that the residual is compared with')
        return found

    @property
    def tolerance(self) -> float:
        """What the residual is compared with."""
        return self.atol if self.mode == "absolute" else self.rtol

    def unwatched(self, attempts: int) -> int | None:
        """After how many further steps a stall is looked for next; None: never."""
        if self.patience is None:
            return None
        return -(-max(self.patience, attempts + 1) // _LOOK_EVERY) * _LOOK_EVERY - attempts


class Unrolled(Termination):
    """Nothing is ever at rest, nor lost: so many steps are made as the horizon has room for."""

    @property
    def tolerance(self) -> float:
        """None is small enough."""
        return -math.inf

    @classmethod
    def of(cls, termination: Termination) -> Unrolled:
        """The one with that mode and norm."""
        given = {name: getattr(termination, name) for name in ("mode", "rtol", "atol", "norm")}
        return cls(**given, best=False, divergence=None, patience=None)


def get(termination: str | Termination | None) -> Termination:
    """The termination of that mode, the termination itself, or the default.

    Raises:
        ValueError: no such mode. TypeError: neither.
    """
    if termination is None or isinstance(termination, str):
        return Termination() if termination is None else Termination(mode=termination)
    if not isinstance(termination, Termination):
        raise TypeError(f"termination must be a mode, an nde.Termination or None, got {type(termination).__name__}")
    return termination


def _maximum(x: Tensor, joint: bool) -> Tensor:
    return x.abs().amax().reshape(1) if joint else x.abs().amax(dim=1)


def _l2(x: Tensor, joint: bool) -> Tensor:
    return torch.linalg.vector_norm(x).reshape(1) if joint else torch.linalg.vector_norm(x, dim=1)


_NORMS = {"rms": rms, "l2": _l2, "max": _maximum}


def measure(
    t: Termination, joint: bool, z: Tensor, slope: Tensor, start: tuple[Tensor, Tensor] | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """(‖f(z) - z‖, the residual of the mode, what the former is divided by for that or None), [groups] each.

    Args:
        t: with its tolerances. joint: whether the batch is one group.
        z, slope: a state and f(z) - z, [samples, features].
        start: ‖f(z) - z‖ at the start, and the larger of it and ‖f(z)‖ there; None at the start itself.
    """
    norm = _NORMS[t.norm]
    size = norm(slope, joint)
    if t.mode == "absolute":
        return size, size, None
    floor = torch.finfo(size.dtype).tiny if t.mode == "relative" else max(t.atol / t.rtol, 1e-30)
    scale = norm(z + slope, joint).clamp(min=floor)
    if start is None:
        return size, size / scale, scale
    first, largest = start
    # No difference is known better than to rounding: far enough away, z + 1 is z.
    known = torch.maximum(size, torch.finfo(size.dtype).eps * scale)
    bound = largest * (first / known).square()
    return size, torch.where(bound < scale, known / bound, size / scale), scale


def outset(t: Termination, joint: bool, z: Tensor, slope: Tensor) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    """What a solve is told of its start, [groups] each.

    Args:
        t, joint, z, slope: of `measure`.

    Returns:
        The residual; ‖f(z) - z‖; the larger of it and ‖f(z)‖, or None where the mode has no use for it; and what
        ‖f(z) - z‖ may not exceed later on.
    """
    size, figure, scale = measure(t, joint, z, slope, None)
    limit = size * (t.divergence or math.inf)
    largest = None if scale is None else torch.maximum(size, scale)
    return figure, size, largest, torch.where(limit > 0, limit, math.inf)


def held_to(t: Termination, size: Tensor, largest: Tensor | None) -> tuple[Tensor, Tensor] | None:
    """What of the `outset` a state that runs away is held to: `measure`'s start."""
    return None if largest is None or isinstance(t, Unrolled) else (size, largest)


class Recent:
    """The last residuals of a solve, and how old the least ones are.

    Args:
        termination: with its tolerances.
    """

    def __init__(self, termination: Termination):
        self.termination = termination
        # Two looks may lie further apart than usual where nobody's step was accepted.
        self._figures: collections.deque[Tensor] = collections.deque(
            maxlen=max(termination.patience or 0, 2 * _LOOK_EVERY)
        )
        self._least: tuple[Tensor, Tensor] | None = None  # residuals, and when they were seen to be new, [groups]

    def append(self, figure: Tensor):
        """Takes in those of a step, [groups]; NaN where a sample has none."""
        self._figures.append(figure)

    def on(self, index: Tensor) -> Recent:
        """The same for some of the groups."""
        part = Recent(self.termination)
        part._figures.extend(x.index_select(0, index) for x in self._figures)
        part._least = self._least and tuple(x.index_select(0, index) for x in self._least)
        return part

    def stalled(self, attempt: int) -> Tensor | None:
        """Whose residuals no longer fall, [groups]; None where it is not the time to look.

        Args:
            attempt: which one of the solve was the last.
        """
        t = self.termination
        if t.patience is None or attempt < t.patience or attempt % _LOOK_EVERY:
            return None
        figures = torch.stack(list(self._figures))
        known = ~figures.isnan()
        lows = torch.where(known, figures, math.inf)
        old = attempt - self._seen(lows.amin(dim=0), attempt) >= FAR * t.patience
        figures, known, lows = (x[-t.patience :] for x in (figures, known, lows))
        high, low = torch.where(known, figures, -math.inf).amax(dim=0), lows.amin(dim=0)
        # Written so that a sample without one of the two goes by the rest.
        falling = figures[-1] <= (1.0 - t.fall) * figures[0]
        full = known.sum(dim=0) >= min(t.patience, len(figures))
        return (full & (figures[-1] <= CLOSE * t.tolerance) & (high < _FLAT * low) & ~falling) | old

    def _seen(self, low: Tensor, attempt: int) -> Tensor:
        """When the least residuals were new, [groups], if those since the last look are these."""
        now = torch.full_like(low, attempt)
        if self._least is not None:
            least, when = self._least
            low, now = torch.minimum(low, least), torch.where(low < least, now, when)
        self._least = low, now
        return now


class Rest:
    """Watches a solve for the samples that come to rest, and for those that will not.

    Args:
        termination: with its tolerances. joint: whether the batch ends as one.

    Attributes:
        first, residual, least: of every group, at the start, last, and the least one of all, [groups].
        limit: of ‖f(z) - z‖, above which a group has diverged, [groups].
        started: what `measure` is given of the start, or None.
        before: the states at the starts of the steps by which the samples came to rest, [batch, features].
    """

    def __init__(self, termination: Termination, joint: bool):
        self.termination, self.joint = termination, joint
        self.started: tuple[Tensor, Tensor] | None = None
        self._recent = Recent(termination)

    def begin(self, z: Tensor, slope: Tensor) -> Tensor | None:
        """Takes in the start. Returns the codes of `look`."""
        with torch.no_grad():
            # Where f is not finite at the start, the loop has ended the sample.
            self.begun(z, *outset(self.termination, self.joint, z, slope.to(z.dtype)))
        settled = self.first <= self.termination.tolerance
        if not bool(settled.any()):
            return None
        self.converged = settled
        return torch.where(settled, int(Status.SUCCESS), GOING)

    def begun(self, z: Tensor, figure: Tensor, size: Tensor, largest: Tensor | None, limit: Tensor) -> None:
        """Takes in the `outset`."""
        self.started, self.limit = held_to(self.termination, size, largest), limit
        self.first = self.residual = self.least = figure
        self.best = self.before = z
        self.converged = torch.zeros_like(figure, dtype=torch.bool)

    def _measure(self, rows: Tensor | None, z: Tensor, slope: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """(‖f(z) - z‖, the residual of the mode, what the former is divided by for that or None), [groups] each."""
        start = self.started and tuple(self._of(x, rows) for x in self.started)
        return measure(self.termination, self.joint, z, slope.to(z.dtype), start)

    def look(
        self, rows: Tensor | None, start: Tensor, z: Tensor, slope: Tensor, ok: Tensor, attempt: int
    ) -> tuple[Tensor, Tensor | None]:
        """Looks at the ends of steps.

        Args:
            rows: the samples, None for all. start, z: where their steps began and ended, [samples, features].
            slope: f(z) - z. ok: whose steps were accepted, [groups]. attempt: which one of the solve it is.

        Returns:
            The residuals, [groups]; and a code for each group, [groups] or None where all of them go on: `GOING`, or
            the `Status` that it ended with.
        """
        t = self.termination
        with torch.no_grad():
            size, figure, _ = self._measure(rows, z, slope)
            least, limit = self._of(self.least, rows), self._of(self.limit, rows)
            better = ok & (figure < least)
            settled = ok & (figure <= t.tolerance)
            ended = ok & ((figure <= t.tolerance) | ~(size <= limit))
            if t.patience is not None:
                self._recent.append(self._put(torch.full_like(self.first, math.nan), rows, figure, ok))
            still = self._recent.stalled(attempt)
            still = None if still is None else ok & self._of(still, rows)
            ended = ended if still is None else ended | still
            # One look at the device for both.
            all_better, any_ended = torch.stack([better.all(), ended.any()]).tolist()
        self.residual = self._put(self.residual, rows, figure, ok)
        if all_better and rows is None:
            self.best, self.least = z, figure
        else:
            best = torch.where(better[:, None], z, self._of(self.best, rows))
            self.best = best if rows is None else self.best.index_copy(0, rows, best)
            self.least = self._put(self.least, rows, figure, better)
        if not any_ended:
            return figure, None
        codes = torch.where(ended, int(Status.DIVERGED), GOING)
        codes = codes if still is None else torch.where(still, int(Status.NOT_CONVERGED), codes)
        codes = torch.where(ended & ~torch.isfinite(figure), int(Status.NON_FINITE), codes)
        codes = torch.where(settled, int(Status.SUCCESS), codes)
        self.converged = self._put(self.converged, rows, settled, ok)
        with torch.no_grad():
            arrived = settled[:, None].expand(len(z), 1)
            before = torch.where(arrived, start, self._of(self.before, rows))
            self.before = before if rows is None else self.before.index_copy(0, rows, before)
        return figure, codes

    @staticmethod
    def _of(x: Tensor, rows: Tensor | None) -> Tensor:
        return x if rows is None else x.index_select(0, rows)

    @staticmethod
    def _put(whole: Tensor, rows: Tensor | None, part: Tensor, which: Tensor) -> Tensor:
        if rows is None:
            return torch.where(which, part, whole)
        return whole.index_copy(0, rows, torch.where(which, part, whole.index_select(0, rows)))

    def conclude(self, status: Tensor) -> bool:
        """Takes in how the groups ended, [groups]. Returns whether all of them came to rest."""
        self.converged = status == Status.SUCCESS
        return bool(self.converged.all())

    def verdict(self, status: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
        """What the samples ended with.

        Args:
            status: of the loop, [groups]. z: where it stands, [batch, features].

        Returns:
            The status, [groups]: NOT_CONVERGED also where the horizon's bound came first; and the states.
        """
        status = torch.where((status == Status.SUCCESS) & ~self.converged, int(Status.NOT_CONVERGED), status)
        last = self.converged
        if not self.termination.best:  # where f was not finite the loop does not know the last state any more
            last = last | (status != Status.NON_FINITE)
        self.residual = torch.where(last, self.residual, self.least)
        z = torch.where(last[:, None], z, self.best)
        # An iteration that got lost hands no gradient on, if it was on a tape.
        return status, torch.where(kept(status)[:, None], z, z.detach())


def kept(status: Tensor) -> Tensor:
    """Which samples end with a state that means something: an iteration that got lost has no steady state at hand."""
    return (status == Status.SUCCESS) | (status == Status.MAX_STEPS) | (status == Status.NOT_CONVERGED)
