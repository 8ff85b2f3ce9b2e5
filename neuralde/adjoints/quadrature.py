"""The quadrature adjoint: the costate first, then the integral over it that the parameters' gradients are."""

from __future__ import annotations

import torch
from torch import Tensor

from ..solvers import Solver
from .continuous import AdjointField, At, Backward, Continuous, Gauss
from .interpolating import along

_ROWS = 1024  # of f in one evaluation of many nodes: more than that gains nothing


class Quadrature(Continuous):
    """Differentiate, then discretise; the parameters' gradient is an integral over the finished costate.

    As "interpolating", but the costate is kept at the nodes of the quadrature, some states of memory per step more, and
    the integral is taken when all is known: over many steps in one evaluation of f where the batch is small.

    Args:
        rtol, atol: tolerances of the backward solve, numbers; None takes the solve's own.
        solver: of the backward solve, a name or an object; None takes the solve's own.
        dt0: step size of a fixed-step `solver`, first step of an adaptive one; None takes over from the solve.
        max_steps: attempts of the backward solve; None allows 4 times the solve's own `max_steps`.

    Raises:
        TypeError, ValueError: an option is wrong; the message names it.

    Source: Kim et al. 2021, "Stiff Neural Ordinary Differential Equations"; Gauss quadrature on the solver's steps.
    """

    name = "quadrature"

    # Its own, so that Python's message of an option that it doesn't have says whose.
    def __init__(
        self,
        *,
        rtol: float | None = None,
        atol: float | None = None,
        solver: str | Solver | None = None,
        dt0: float | None = None,
        max_steps: int | None = None,
    ):
        super().__init__(rtol=rtol, atol=atol, solver=solver, dt0=dt0, max_steps=max_steps)

    def sweep(self, work: Backward) -> Tensor:
        """See `Continuous.sweep`."""
        kept: list[_Nodes] = []

        def tally(field: AdjointField) -> _Nodes:
            kept.append(_Nodes(work, field))
            return kept[-1]

        costate = along(work, tally)
        for nodes in kept:
            nodes.evaluate()
        return costate


class _Nodes:
    """The nodes of one backward solve.

    Args:
        work: where the sums are. field: the adjoint equation of the backward solve's samples.
    """

    def __init__(self, work: Backward, field: AdjointField):
        self.work = work
        kept: list[tuple[Tensor | None, At, Tensor, Tensor]] = []
        # (No method of this object's: it would tie the solve and its graph in a cycle.)
        self.kept, self.add = kept, Gauss(work, field, lambda *node: kept.append(node)).add

    def evaluate(self):
        """Takes the integral."""
        batch = len(self.work.z0)
        if self.work.joint or not self.work.field.can_shrink():
            for rows, at, z, cotangent in self.kept:
                self.work.add(rows, at, z, cotangent)
            return
        many = max(1, _ROWS // batch)
        everyone = torch.arange(batch, device=self.work.z0.device)
        for i in range(0, len(self.kept), many):
            nodes = [(everyone if rows is None else rows, at.t, z, c) for rows, at, z, c in self.kept[i : i + many]]
            rows, t, z, cotangent = (torch.cat(x) for x in zip(*nodes, strict=True))
            # Those of rejected attempts.
            real = (cotangent != 0).any(dim=1).nonzero().flatten()
            rows, t, z, cotangent = (x.index_select(0, real) for x in (rows, t, z, cotangent))
            field = self.work.field
            time = field.on(rows).shaped(t[None])[0] if field.equation.takes_time else None
            self.work.add(rows, At(time, t, None), z, cotangent)
