"""What the tests of the adapters for other libraries share."""

from __future__ import annotations

import pytest
import torch
from helpers import close
from torch import nn

from neuralde.interop import torchdiffeq as interop

FUNCTIONS = ["odeint", "odeint_adjoint"]
ADAPTIVE = [name for name, solver in interop.SOLVERS.items() if solver.adaptive and name != "tsit5"]
FIXED = [name for name, solver in interop.SOLVERS.items() if not solver.adaptive]
ADAMS = ["explicit_adams", "implicit_adams"]
METHODS = [*ADAPTIVE, *FIXED, *ADAMS, "scipy_solver"]
TIMES = {
    "forwards": torch.tensor([0.0, 0.3, 1.0], dtype=torch.float64),
    "backwards": torch.tensor([1.0, 0.4, 0.0], dtype=torch.float64),
}
LOOSE = {"rtol": 1e-3, "atol": 1e-4}


class Net(nn.Module):
    """A vector field with something to regularize, and a count of its evaluations."""

    def __init__(self, d=3, gain=1.5):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(d, 12), nn.Tanh(), nn.Linear(12, d)).double()
        with torch.no_grad():
            for p in self.net.parameters():
                p *= gain
        self.calls = 0

    def forward(self, t, y):
        self.calls += 1
        return 4 * self.net(y) * torch.cos(3 * t)


def start(d=3):
    return torch.randn(5, d, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def gradients(y, f):
    return torch.autograd.grad(y[-1].square().sum(), list(f.parameters()))


def solved(module, function, f, t=TIMES["forwards"], y0=None, **how):
    """(the result, the calls of f) by a function of torchdiffeq or of the adapter."""
    f.calls = 0
    y = getattr(module, function)(f, start() if y0 is None else y0, t, **LOOSE | how)
    return y, f.calls


def check_gradient(penalty, solution, parameters, step=1e-4):
    """The penalty's gradient along a random direction, against finite differences: its time and its step are fixed."""
    direction = [torch.randn_like(p) for p in parameters]
    found = torch.autograd.grad(penalty(solution), parameters, allow_unused=True)
    slope = sum((g * d).sum() for g, d in zip(found, direction, strict=True) if g is not None)

    def moved(by):
        with torch.no_grad():
            for p, d in zip(parameters, direction, strict=True):
                p += by * d
            value = penalty(solution)
            for p, d in zip(parameters, direction, strict=True):
                p -= by * d
        return value

    expected = (8 * (moved(step) - moved(-step)) - moved(2 * step) + moved(-2 * step)) / (12 * step)
    assert float(slope.abs()) > 0
    close(slope, expected, 1e-6)


def raises_the_same(ours, theirs, *args, **how):
    """The adapter's function says what the library's says, word by word, and no solve is kept."""
    with pytest.raises(Exception) as expected:
        theirs(*args, **how)
    with pytest.raises(type(expected.value)) as found:
        ours(*args, **how)
    assert str(found.value) == str(expected.value)
    assert ours.solution is None
