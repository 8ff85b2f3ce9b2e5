"""Switching between an explicit and a stiff method, sample by sample, by the stiffness that each step reports."""

from __future__ import annotations

from torch import Tensor

from ..algebra import Algebra, Figure
from .base import Solver
from .switching import Switching

_TO_STIFF, _TO_EXPLICIT = 10, 3  # accepted steps in a row that have to ask for the other method
# Of the explicit method's stability size. OrdinaryDiffEq.jl has 0.9, but two stages often see less than all of |λ|: on
# Robertson's problem at 1e-8, 0.9 stays with tsit5 for 600 steps more.
_STIFF = 0.7


class Auto(Switching):
    """An explicit method while stability does not limit its steps, a stiff one while it would.

    A step asks for the stiff method where |dt|·stiffness exceeds 0.7 of the explicit method's stability size: by the
    two stages at one abscissa, in the norm of the error test, while the explicit method runs; by the Jacobian's largest
    row sum while the stiff one does. More than 10 accepted steps in a row that ask for it switch a sample over, more
    than 3 that don't switch it back: the hysteresis that keeps it from going to and fro.

    Args:
        name: what `solve(solver=...)` calls it.
        explicit: a method with a stiffness estimate and a stability size.
        stiff: a method that takes the Jacobian.

    Source: the thesis, section 5.1; Shampine 1977; Rackauckas & Nie 2019; counts of OrdinaryDiffEq.jl's AutoSwitch.
    """

    def __init__(self, name: str, explicit: Solver, stiff: Solver):
        super().__init__(name, (explicit, stiff))
        # What can be said of every step.
        self.order, self.error_order = (min(getattr(p, x) for p in self.parts) for x in ("order", "error_order"))
        self.exponents, self.stability_size = explicit.exponents, None

    def route(
        self, part: int, counter: Figure, ok: Figure, figures: Tensor, dt: Figure, m: Algebra
    ) -> tuple[Figure, Figure]:
        """See `Switching.route`. The counter is positive for steps in a row that ask for the stiff method."""
        # In the norm of the error test: a stiff component may be small beside the others.
        size = m.divide(m.read(figures[1]), m.read(figures[2])) if part == 0 else m.read(figures[-1]) * dt
        stiff = size > _STIFF * self.parts[0].stability_size
        more = m.where(counter > 0, counter + 1, m.full(1, counter))
        less = m.where(counter < 0, counter - 1, m.full(-1, counter))
        counter = m.where(ok, m.where(stiff, more, less), counter)
        return counter, (counter > _TO_STIFF) if part == 0 else (counter < -_TO_EXPLICIT)

    def restart(self, part: int) -> int:
        """See `Switching.restart`: the same method goes on."""
        return part
