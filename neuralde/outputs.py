"""What a solve gives its user, with all gradients: the states at the output times, and the events."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from . import transforms
from .adjoints.base import Outcome
from .errors import NeuralDEError
from .events import Occurrences, gather
from .graph import without_gradient
from .problem import Problem


class Outputs(NamedTuple):
    """The outputs of a solve.

    Attributes:
        zs: [times, batch, features].
        events: one for each event.
        stopped: when terminal events ended the samples, [batch], infinitely late where none did.
        held: the states there, [batch, features]. Both None without events.
    """

    zs: Tensor
    events: list[Occurrences]
    stopped: Tensor | None
    held: Tensor | None


def outputs(problem: Problem, outcome: Outcome, z0: Tensor, times: Tensor) -> Outputs:
    """Puts together what comes back.

    Args:
        z0: [batch, features]. times: [times, groups]; the problem's own where nobody differentiates by them.
    """
    middle, hits = outcome.interior, outcome.trajectory.hits
    points = len(times) - 2
    inside = () if middle is None or not points else (middle[:points],)
    zs = torch.cat([z0[None], *inside, outcome.final[None]])
    events, stopped, held = [], None, None
    if problem.watch is not None:
        events, stopped, held = _events(problem, hits, None if middle is None else middle[points:], outcome.final)
        gone = _beyond(problem, times.detach(), stopped)
        zs = torch.where(gone[..., None], held, zs)
        return Outputs(shift_outputs(problem, zs, times, gone), events, stopped, held)
    return Outputs(shift_outputs(problem, zs, times), events, stopped, held)


def _beyond(problem: Problem, times: Tensor, stopped: Tensor) -> Tensor:
    """Which output times lie at or after the samples' ends, [times, batch]."""
    direction = problem.span.sign()
    return (times * direction).expand(-1, len(stopped)) >= stopped * direction


def _events(problem: Problem, hits, states: Tensor | None, final: Tensor):
    """(the occurrences of every event, when and where terminal ones ended the samples)."""
    batch, layout = len(final), problem.field.layout
    nowhere = problem.start.new_full((0, batch), float("nan"))
    stopped, held = problem.span.sign().expand(batch) * float("inf"), final
    if hits is None:
        none = Occurrences(nowhere, layout.unpack(final.new_zeros(0, *final.shape)), nowhere.bool())
        return [none] * len(problem.watch.events), stopped, held
    t, z = gather(problem.watch, hits, states)
    events = []
    for times, values in zip(t.split(hits.rows), z.split(hits.rows), strict=True):
        events.append(Occurrences(times, layout.unpack(values), ~times.detach().isnan()))
    last = hits.terminal.nonzero().flatten()
    samples = hits.sample[last]
    stopped = stopped.index_copy(0, samples, t.detach()[hits.row[last], samples])
    held = held.index_copy(0, samples, z[hits.row[last], samples])
    return events, stopped, held


def shift_start(problem: Problem, z0: Tensor, times: Tensor) -> Tensor:
    """z0 with the gradient of t0: a later start is the same start moved back along f."""
    if times is problem.times:
        return z0
    with torch.no_grad():
        slope = problem.field(problem.field.times(problem.first_instant)[0], z0)
    return _moved(z0, times[0], -slope)


def shift_outputs(problem: Problem, zs: Tensor, times: Tensor, gone: Tensor | None = None) -> Tensor:
    """The outputs with the gradients of their times: dz(t)/dt = f(t, z), but 0 for those that are `gone`."""
    if times is problem.times:
        return zs
    moved = [zs[0]]
    for i, (z, t) in enumerate(zip(zs[1:], times[1:], strict=True), start=1):
        slope = _slope_at(problem, t.detach(), z.detach(), zs[0].detach())
        if gone is not None:
            slope = torch.where(gone[i][:, None], 0.0, slope)
        moved.append(_moved(z, t, slope))
    return torch.stack(moved)


def _moved(z: Tensor, t: Tensor, slope: Tensor) -> Tensor:
    """States that move along with times: z itself, with the derivative `slope` by t ([groups])."""
    t = t.expand(len(z))
    if not transforms.active():
        return _Moved.apply(z, t, slope)
    if transforms.order() > 1 and transforms.derived(t):
        raise NeuralDEError(_FIRST_ONLY)
    return z + (t - t.detach())[:, None].to(z.dtype) * slope


_FIRST_ONLY = (
    "the gradient of t has first derivatives only: no second derivative goes through the start, the end or an output "
    "time of a solve. Give t as numbers where second derivatives by other things are wanted; for those by the length "
    "of the solve, let it be a factor of f in args, with t fixed"
)


class _Moved(torch.autograd.Function):
    @staticmethod
    def forward(ctx, z: Tensor, t: Tensor, slope: Tensor) -> Tensor:
        ctx.save_for_backward(z, t, slope)
        return z.clone()

    @staticmethod
    def backward(ctx, g: Tensor):
        z, t, slope = ctx.saved_tensors
        rate = (g * slope.conj()).real.sum(dim=1).to(t.dtype)
        if torch.is_grad_enabled():
            # Both depend on z and t by derivatives of f that nobody has taken.
            rate = without_gradient(rate, [g, z, t], _FIRST_ONLY)
            g = g + without_gradient(torch.zeros_like(g), [t], _FIRST_ONLY)
        return g, rate, None


@torch.no_grad()
def _slope_at(problem: Problem, t: Tensor, z: Tensor, start: Tensor) -> Tensor:
    """f at an output, 0 where a sample did not get there (f is called at its start instead)."""
    field, got = problem.field, torch.isfinite(z).all(dim=1)
    t = problem.before(t)
    z = torch.where(got[:, None], z, start)
    if problem.joint and len(t) > 1:  # outputs at different times, but f takes one t for the batch
        slope = torch.zeros_like(z)
        for one in t.unique():
            slope = torch.where((t == one)[:, None], field(field.times(one[None])[0], z), slope)
    else:
        slope = field(field.times(t)[0], z)
    return torch.where(got[:, None], slope, 0.0)
