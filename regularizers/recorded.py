"""Solves of other libraries, as far as a local penalty needs them: a sampled time, the state there, and a step.

The adapters (`regularizers.torchdiffeq`, `.torchsde`, `.torchdyn`) make them; none of the libraries is imported here.
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
import random
import threading
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from neuralde.errors import NonFiniteState
from neuralde.introspection import Probe

from .recomputed import Last, Seeds, again
from .rows import Rows

# The recordings that are open, outermost first: (the list that fills, where its times come from, `again` as it began).
_OPEN: contextvars.ContextVar[tuple] = contextvars.ContextVar("recordings", default=())


@contextlib.contextmanager
def record(generator: torch.Generator | None = None) -> Iterator[list[Recorded]]:
    """Collects what the adapters solve inside: `with reg.record() as solutions: ...; loss + penalty(solutions)`.

    Every solve by `regularizers.torchdiffeq`, by `regularizers.torchsde` and by the torchdyn layers that `attach` has
    seen is one entry, in order. A penalty of the list is the sum over its entries.

    Args:
        generator: where the sampled times come from. None: from that of a recording around this one, else from a
            stream of their own, which leaves the random numbers of torch, NumPy and Python as they were. It starts anew
            where torch.manual_seed was called with another seed; the same seed again can't be seen, and it goes on:
            times that repeat within a process need a generator here.
    """
    solutions: list[Recorded] = []
    token = _OPEN.set((*_OPEN.get(), (solutions, generator, again())))
    try:
        yield solutions
    finally:
        _OPEN.reset(token)


def keep(solution: Recorded) -> Recorded:
    """Adds a solve to every list that is open; to those of the forward pass no recomputation of a checkpoint."""
    for solutions, _, began in _OPEN.get():
        if began == again():
            solutions.append(solution)
    return solution


class _Stream(threading.local):
    """A thread's own random numbers, and the seed of torch's that they began with."""

    began: int | None = None
    numbers: random.Random


_STREAM = _Stream()


_SEEDS = Seeds()


def draws(f, start) -> random.Random:
    """Random numbers for one solve, which take none away from whoever else draws some.

    Args:
        f, start: its function and its start, by which a checkpoint's recomputation draws the same.
    """
    return random.Random(_SEEDS.of(f, start, _seed))  # one number per solve, however many it draws


def _seed() -> int:
    given = next((one for _, one, _ in reversed(_OPEN.get()) if one is not None), None)
    if given is None:
        return _stream().getrandbits(62)
    return int(torch.randint(2**62, (), generator=given, device=given.device))


def _stream() -> random.Random:
    if _STREAM.began != torch.initial_seed():
        _STREAM.began = torch.initial_seed()
        _STREAM.numbers = random.Random(_STREAM.began)
    return _STREAM.numbers


def unwanted(f) -> str | None:
    """Why nobody could want a penalty of a solve with f, or None: it is made without gradients or in eval mode."""
    if not torch.is_grad_enabled():
        return "without gradients (torch.no_grad, or a checkpoint with use_reentrant=True, which needs False)"
    if isinstance(f, nn.Module) and not f.training:
        return f"with {type(f).__name__} in eval mode (its .training is False)"
    return None


def able(solver, figure: str | None) -> bool:
    """Whether a step of a solver has the figure "error", "raw_error" or "stiffness"."""
    return figure is None or (solver.reports_stiffness if figure == "stiffness" else solver.error_order is not None)


def parts(model: nn.Module) -> Iterator[nn.Module]:
    """A Module and all those inside of it, as `Module.modules` has them, which takes several times as long."""
    waiting, seen = [model], set()
    while waiting:
        module = waiting.pop()
        if module is not None and id(module) not in seen:
            seen.add(id(module))
            yield module
            waiting.extend(reversed(list(module._modules.values())))


@dataclass(frozen=True)
class Place:
    """A sampled point of a solve.

    Attributes:
        t: the time. dt: the (signed) step that the library took there, or what was left to the end of the horizon,
            whichever is shorter; None where nobody knows.
        state: state(through) is the solution at t: on its tape where `through` asks for it, else a constant.
    """

    t: Tensor
    dt: Tensor | None
    state: Callable


def sampled(drawn: random.Random, start: Tensor, end: Tensor) -> Tensor:
    """A time, uniformly drawn between these, before the end."""
    first, last = float(start.detach()), float(end.detach())  # once per solve, and sooner done than with tensors
    t = start.new_tensor(first + drawn.random() * (last - first))
    return torch.nextafter(end, start) if float(t) == last else t


def within(t: Tensor, dt: Tensor, end: Tensor) -> Tensor:
    """A (signed) step from t, at most to the end of the horizon: f may not be known beyond it. One number each."""
    t, end = float(t), float(end)  # once per solve, and sooner done than with tensors
    left = end - t
    dt = dt if abs(float(dt)) < abs(left) else torch.full_like(dt, left)
    beyond = (t + float(dt) - end) * left > 0  # by rounding
    return torch.nextafter(dt, torch.zeros_like(dt)) if beyond else dt


def shown(z, through: bool, taped: bool, source: str, others: str):
    """A state of a solve, on its tape where `through` asks for it, else a constant.

    Args:
        z: the state. taped: whether it is on the tape. source: who made it. others: whose states are on the tape.

    Raises:
        ValueError: it is to be on the tape, and is not.
    """
    if through and not taped:
        raise ValueError(
            f"through_state=True can't be had of {source}: its states are not on the tape; those of {others} are"
        )
    if through:
        return z
    return z.detach() if isinstance(z, Tensor) else pytree.tree_map(torch.detach, z)


class AllFailed(NonFiniteState):
    """No sample of a recorded solve is finite: a penalty of it is 0."""


class Recorded:
    """What a penalty takes of a solve that another library made.

    Args:
        source: who made it, for messages.
        places: the sampled point for each sampling, made when it is asked for, or why there is none.
        lens: lens(place, z, solver, figure, rows) -> the `Probe` of those rows from there, by that solver, or by the
            one that corresponds to the library's method where it has that figure (see `able`).
        end: the last state of the solve, a tensor or several.

    Attributes:
        converged: all True, [1]: another library raises where it fails, or goes on with samples that are not finite,
            which `probe` leaves out.

    The time was sampled as the solve was made, so that a penalty of one solve has one value, whenever it is asked. A
    copy or a pickle of it is None: it holds a graph, and belongs to one call.
    """

    def __init__(self, source: str, places: dict[str, Callable[[], Place] | str], lens: Callable[..., Probe], end):
        self.source, self._places, self._lens = source, places, lens
        # (A view would keep all outputs. A tensor, the common case, is spared the walk through a structure.)
        plain = isinstance(end, Tensor)
        self._end = end.detach().clone() if plain else pytree.tree_map(lambda x: x.detach().clone(), end)
        self._like = self._end if plain else pytree.tree_leaves(self._end)[0]
        self._states = {}  # what a place's state is as a constant: some are made when they are asked for
        self._kind = self._like.device.type
        self._autocast = torch.get_autocast_dtype(self._kind) if torch.is_autocast_enabled(self._kind) else None

    @property
    def converged(self) -> Tensor:  # noqa: D102
        return torch.ones(1, dtype=torch.bool, device=self._like.device)

    @property
    def zero(self) -> Tensor:
        """What a penalty is where there is nothing to look at."""
        return self._like.new_zeros((), dtype=self._like.real.dtype)

    @property
    def engine(self) -> str:
        """How to have neuralde make such a solve, for messages."""
        if self.source.startswith("torchdyn"):
            return 'attach(model, engine="neuralde") has neuralde make the solves of this layer'
        return "Solve with neuralde.solve or neuralde.NeuralODE, where this penalty works (docs/interop.md)"

    def place(self, sampling: str) -> Place:
        """The point that was sampled.

        Args:
            sampling: "unbiased", uniformly on the horizon; "biased", uniformly over the starts of the accepted steps.

        Raises:
            ValueError: it can't be had of this solve.
        """
        place = self._places[sampling]
        if isinstance(place, str):
            raise ValueError(f"sampling={sampling!r} can't be had of {self.source}: {place}")
        if not isinstance(place, Place):
            place = self._places[sampling] = place()
        return place

    def probe(self, sampling: str, through_state: bool = False, solver=None, figure: str | None = None) -> Probe:
        """The step under the lens, from the point that was sampled. See `neuralde.introspection.Probe`.

        Args:
            sampling: of `place`. through_state: whether gradients flow into the state there.
            solver: another method than the one that corresponds to the library's.
            figure: "error", "raw_error" or "stiffness", the only one that is wanted: tsit5 steps in for a method
                without it. None: those that the method has.

        Samples that are not finite there or at the end of the solve have no part in it: the figures, which are one for
        the whole state, are those of the others.

        Raises:
            ValueError: this solve has no such point, or no tape at it.
            NonFiniteState: no sample is finite.
        """
        place = self.place(sampling)
        with self._as_it_was():
            if through_state:
                z = place.state(True)
            else:
                if sampling not in self._states:
                    self._states[sampling] = place.state(False)
                z = self._states[sampling]
            rows = Rows(z, self._end)
            if rows.none:
                raise AllFailed(f"no sample of {self.source} is finite at t = {float(place.t):.6g} and at the end")
            return self._lens(place, rows.state(z), solver, figure, rows)

    def _as_it_was(self) -> contextlib.AbstractContextManager:
        """f is evaluated as it was in the solve, wherever the penalty is taken."""
        if self._autocast is None and not torch.is_autocast_enabled(self._kind):
            return contextlib.nullcontext()
        return torch.autocast(self._kind, self._autocast, self._autocast is not None, cache_enabled=False)

    def __repr__(self) -> str:
        return f"Recorded({self.source})"

    def __deepcopy__(self, memo):
        return None

    def __reduce__(self):
        return type(None), ()


class Skipped(Recorded):
    """A solve that nobody can want a penalty of: without gradients, or in eval mode. Every penalty of it is 0.

    Args:
        source, like: of `Recorded`, like for end. why: of `unwanted`.
    """

    def __init__(self, source: str, like: Tensor, why: str):
        super().__init__(source, {}, None, like)
        self.why = why

    def nothing(self) -> Tensor:
        """0, with one warning per source where a gradient of it may be expected."""
        if torch.is_grad_enabled() and self.source not in _WARNED:
            _WARNED.add(self.source)
            warnings.warn(
                f"the penalty of {self.source} is 0 without a gradient: that solve was made {self.why}; call "
                ".train() and solve outside of torch.no_grad() where a penalty is meant (this is said once)",
                stacklevel=2,
            )
        return self.zero


_WARNED: set[str] = set()


class Keeping:
    """Another library's function that keeps its last solve for penalties.

    Attributes:
        solution: what a penalty takes of the last solve of this thread, or None: before the first, and after one that
            raised. It holds that call's graph until the next one. With several solves in one forward pass,
            `regularizers.record` has all of them.
    """

    def __init__(self, function: Callable):
        functools.update_wrapper(self, function)
        self.__module__ = type(self).__module__  # the adapter's, by which it is pickled
        self._last = Last()

    @property
    def solution(self) -> Recorded | None:  # noqa: D102
        return self._last.solution

    def __reduce__(self):
        return self.__name__


class Passing:
    """The accepted steps as they pass: keeps the one around a time, and one drawn uniformly.

    Args:
        drawn: of `draws`.
        direction: of time, 1 or -1.
        wanted: the time; None where the end is not known yet: then a step is drawn by its length.

    Attributes:
        around, uniform: (t, z, dt), or None before the first.
    """

    def __init__(self, drawn: random.Random, direction: int, wanted: float | None):
        self._drawn, self._direction, self._wanted = drawn, direction, wanted
        self.around = self.uniform = self._last = None
        self._count, self._length, self._beyond = 0, 0.0, False

    def add(self, t, z, dt):
        """Takes in a step.

        Args:
            t, dt: its start and (positive) size, a number each. z: the state at its start.
        """
        if isinstance(t, Tensor) and t.requires_grad:
            t = t.detach()
        if isinstance(dt, Tensor) and dt.requires_grad:
            dt = dt.detach()
        self._count += 1
        if self._drawn.random() * self._count < 1.0:
            self.uniform = t, z, dt
        if self._wanted is None:
            self._by_length()
            self._last = t, z, dt
        elif not self._beyond:
            if self.around is None or self._direction * (self._wanted - float(t)) >= 0.0:
                self.around = t, z, dt
            else:
                self._beyond = True

    def _by_length(self, length: float | None = None):
        """Draws the last step, as likely as its part of the way is long."""
        if self._last is not None:
            length = float(self._last[2]) if length is None else length
            self._length += length
            if self._drawn.random() * self._length < length:
                self.around = self._last

    def ended(self, t: float) -> float | None:
        """A uniformly drawn time between the start and the end t, in the step `around`; None without a step."""
        if self._last is None:
            return None
        start = float(self._last[0])
        self._by_length(abs(t - start))
        start, whole = float(self.around[0]), float(self.around[2])
        length = min(whole, abs(t - start))
        return start + self._direction * length * self._drawn.random()
