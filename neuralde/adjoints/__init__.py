"""Sensitivity methods, and the registry that gives them names.

Exact, the gradient of the steps that were made: `Checkpointed` (the default) and `Direct`. The adjoint equation's, to a
tolerance: `Backsolve`, `Interpolating` and `Quadrature`. docs/which-adjoint.md says when to take which.

Those of steady states: `Implicit`, and its approximations `Neumann`, `JFB` and `Phantom`. docs/deep-equilibria.md says
when to take which.
"""

from __future__ import annotations

from ..registry import Registry
from .backsolve import Backsolve
from .base import Adjoint
from .checkpointed import Checkpointed
from .direct import Direct
from .implicit import JFB, Implicit, Neumann, Phantom
from .interpolating import Interpolating
from .quadrature import Quadrature

__all__ = [
    "ADJOINTS",
    "JFB",
    "Adjoint",
    "Backsolve",
    "Checkpointed",
    "Direct",
    "Implicit",
    "Interpolating",
    "Neumann",
    "Phantom",
    "Quadrature",
    "get",
    "register",
]

# Words of torchdiffeq and torchdyn whose nearest name here is another thing.
_ELSEWHERE = {"adjoint": "backsolve", "odeint_adjoint": "backsolve", "autograd": "direct"}

ADJOINTS: Registry[Adjoint] = Registry("adjoint", Adjoint, _ELSEWHERE)
register, get = ADJOINTS.register, ADJOINTS.find

for _adjoint in (Direct(), Checkpointed(), Backsolve(), Interpolating(), Quadrature()):
    register(_adjoint)
for _adjoint in (
    Implicit(),
    Implicit(solver="anderson", name="implicit-anderson"),
    Implicit(solver="broyden", name="implicit-broyden"),
    Neumann(),
    JFB(),
    Phantom(),
):
    register(_adjoint)
