"""Solvers across the border: ours in torchdyn, torchdyn's in ours. torchdyn itself is not imported.

Both ways work without this module: `torchdyn.core.NeuralODE(f, solver=nde.solvers.get("tsit5"))`, and
`nde.solve(..., solver=HyperEuler(net))`. What is here gives the crossing a name, and checks it early.
"""

from __future__ import annotations

from .. import solvers
from ..solvers import Foreign, Solver


def as_torchdyn(solver: str | Solver) -> Solver:
    """A solver of ours for `torchdyn.core.NeuralODE(solver=...)`.

    torchdyn's loop chooses the steps then: its controller with the `atol` and `rtol` of its NeuralODE for adaptive
    solvers, the points of `t_span` for fixed-step ones. All of its sensitivities work.

    Args:
        solver: a name (see `neuralde.solvers.SOLVERS`) or a solver object.

    Returns:
        The solver object, which has torchdyn's protocol beside our own.

    Raises:
        ValueError: no such name.
        TypeError: no solver, or one that a step's start does not suffice for.
    """
    found = solvers.get(solver)
    found.require_one_step()
    return found


def from_torchdyn(solver) -> Solver:
    """A solver object of torchdyn's, hypersolvers included, for `nde.solve(solver=...)`. See `Foreign`.

    Args:
        solver: an instance of a class in torchdyn.numerics.solvers.ode or hyper, or of one like them.

    Raises:
        TypeError: it has not got torchdyn's protocol, or is one of ours.
    """
    if not solvers.speaks_torchdyn(solver):
        raise TypeError(
            "solver must be a solver object of torchdyn's, with step, order, stepping_class and sync_device_dtype, "
            f"got {type(solver).__name__}"
        )
    return Foreign(solver)
