"""Lists of what is registered, so that a new solver or adjoint is tested by being registered; and small tools."""

from __future__ import annotations

import contextlib

import pytest
import torch

import neuralde as nde

ODES = {name: solver for name, solver in nde.solvers.SOLVERS.items() if not solver.discrete}
SOLVERS = list(ODES)
EQUILIBRIUM = [name for name in nde.solvers.SOLVERS if name not in SOLVERS]
SDE_SOLVERS = list(nde.solvers.SDE_SOLVERS)
ADAPTIVE = [name for name, solver in ODES.items() if solver.adaptive]
FIXED = [name for name in SOLVERS if name not in ADAPTIVE]
WITH_ERROR = [name for name, solver in ODES.items() if solver.error_order is not None]
WITH_STIFFNESS = [name for name, solver in ODES.items() if solver.reports_stiffness]
ADJOINTS = [name for name, adjoint in nde.adjoints.ADJOINTS.items() if adjoint.of_horizons]
STEADY = [name for name, adjoint in nde.adjoints.ADJOINTS.items() if adjoint.of_steady]
EXACT = [name for name, adjoint in nde.adjoints.ADJOINTS.items() if adjoint.exact]
CONTINUOUS = [name for name in ADJOINTS if name not in EXACT]
# Those under which the states of the steps, and what is read between them, have gradients.
DENSE = EXACT + [name for name in CONTINUOUS if nde.adjoints.get(name).keep is None]
CONTROLS = ["per_sample", "joint"]


def options(solver: str, dt0: float = 0.05) -> dict:
    """The solve options that every solver runs with: a fixed-step one needs its step size."""
    return {"solver": solver} if solver in ADAPTIVE else {"solver": solver, "dt0": dt0}


@contextlib.contextmanager
def refused(error: type[Exception], *words: str):
    """The block raises exactly this kind of error, and every word is in its message."""
    with pytest.raises(error) as caught:
        yield caught
    for word in words:
        assert word in str(caught.value), f"{word!r} is not in: {caught.value}"


class Counted:
    """A vector field that counts its evaluations, in calls and in rows."""

    def __init__(self, f):
        self.f, self.calls, self.rows = f, 0, 0

    def __call__(self, t, z, *args):
        self.calls += 1
        self.rows += len(torch.utils._pytree.tree_leaves(z)[0])
        return self.f(t, z, *args)


def close(actual, expected, tolerance: float):
    """Equal up to a tolerance relative to the largest expected number: what rounding in sums leaves."""
    scale = expected.detach().abs().max().item()
    torch.testing.assert_close(actual, expected, rtol=0.0, atol=tolerance * max(scale, 1e-300))
