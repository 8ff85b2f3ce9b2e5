"""The probe of another library's step: that of `probe` under joint control, with less to do."""

from __future__ import annotations

import pytest
import torch
from helpers import SOLVERS, close
from torch import nn

import neuralde as nde
from neuralde import introspection

FIGURES = ("error", "raw_error", "stiffness")
METHODS = [name for name in SOLVERS if not nde.solvers.get(name).history and nde.solvers.get(name).one_step]
# A long step, so that errors are more than rounding.
AT, DT, TOLERANCES = torch.tensor(0.3).double(), torch.tensor(1.5).double(), (1e-3, 1e-5)


class Net(nn.Module):
    """A vector field; with a buffer, what it returns is one that its next call overwrites."""

    def __init__(self, buffer: bool = False):
        super().__init__()
        torch.manual_seed(0)
        self.inside, self.buffer = nn.Sequential(nn.Linear(2, 5), nn.Tanh(), nn.Linear(5, 2)).double(), buffer
        self.out = None

    def forward(self, t, z):
        """f(t, z)."""
        found = torch.cos(t) * self.inside(z)
        if not self.buffer:
            return found
        self.out = torch.zeros_like(found) if self.out is None else self.out
        return self.out.copy_(found)


def start():
    return torch.randn(3, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def gradients(x, f):
    return torch.autograd.grad(x.mean(), list(f.parameters()), materialize_grads=True)


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("figure", FIGURES)
def test_is_a_probe_with_one_figure(name, figure):
    f, solver = Net(), nde.solvers.get(name)
    rtol, atol = TOLERANCES
    whole = introspection.probe(f, AT, start(), DT, solver, rtol, atol, control="joint")
    every = introspection.probe_step(f, AT, start(), DT, solver, rtol, atol)
    alone = introspection.probe_step(f, AT, start(), DT, solver, rtol, atol, figure)
    assert all(getattr(alone, other) is None for other in FIGURES if other != figure)
    wanted = getattr(whole, figure)
    if wanted is None:
        assert getattr(every, figure) is None and getattr(alone, figure) is None
        return
    theirs = gradients(wanted, f)
    for found in (every, alone):
        close(found.z, whole.z, 1e-14)
        close(getattr(found, figure).expand(3), wanted, 1e-9)
        for a, b in zip(gradients(getattr(found, figure), f), theirs, strict=True):
            close(a, b, 1e-9)


@pytest.mark.parametrize("figure", FIGURES)
def test_f_may_return_a_buffer_of_its_own(figure):
    solver = nde.solvers.get("dopri5")
    found = []
    for f in (Net(), Net(buffer=True)):
        probe = introspection.probe_step(f, AT, start(), DT, solver, *TOLERANCES, figure)
        found.append((getattr(probe, figure), gradients(getattr(probe, figure), f)))
    (wanted, theirs), (ours, here) = found
    close(ours, wanted, 1e-12)
    for a, b in zip(here, theirs, strict=True):
        close(a, b, 1e-12)


def test_f_in_low_precision_is_added_up_in_the_precision_of_the_work():
    f, z = Net().to(torch.bfloat16), start().to(torch.bfloat16)
    whole = introspection.probe(f, AT, z, DT, "dopri5", *TOLERANCES, control="joint")
    step = introspection.probe_step(f, AT, z, DT, nde.solvers.get("dopri5"), *TOLERANCES)
    assert step.error.dtype == whole.error.dtype == torch.float32
    close(step.raw_error.expand(3), whole.raw_error, 1e-2)


def test_the_steps_dt_may_be_looked_up_after_it():
    """What a step is kept as, its state and increments, is the same."""
    f, solver, z = Net(), nde.solvers.get("dopri5"), start()
    t, dt = AT.reshape(1), DT.reshape(1)
    field = introspection.Field(nde.ODE(f), introspection.Layout.of(z), None, True)
    kept = []
    for memory in (solver.memory(z, True), solver.memory_of_one(z, True)):
        step = solver.attempt(field, t, dt, z, None, memory, close=True)
        kept.append(solver.snapshot(step.stages))
    close(kept[1], kept[0], 1e-14)
