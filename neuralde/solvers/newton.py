"""Newton's method, its linear systems solved by GMRES."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..linear import gmres
from .base import Work
from .iteration import Iteration, Move, backtrack, count, fraction
from .linearize import ordinary


class Newton(Iteration):
    """Newton-Krylov: z_{k+1} = z_k + s·p with -J_g(z_k) p = g(z_k), solved by GMRES with Jacobian-vector products.

    f is evaluated once more per step than by the other iterations, and each product costs about as much as an
    evaluation and is counted as one (in `stats.linear_solves` too). f must be twice differentiable by autograd
    (products are derivatives of a backward pass). It finds fixed points also where f expands. Under joint control the
    batch has one linear system and one step length.

    Args:
        forcing: relative tolerance of the linear systems, in (0, 1].
        restart, max_iter: of GMRES, iterations.
        line_search: whether steps that don't make ‖g‖ sufficiently smaller are shortened, each at one more evaluation.

    Raises:
        TypeError, ValueError: an argument is wrong; the message names it.

    Source: Knoll & Keyes, "Jacobian-free Newton-Krylov methods", J. Comput. Phys. 193 (2004).
    """

    calls_per_step = None
    couples = True
    remedy = "Take solver='anderson' or 'broyden', 'fixed_point' where the map contracts, or one for ODEs ('tsit5')"

    def __init__(
        self,
        forcing: float = 1e-2,
        restart: int = 20,
        max_iter: int = 40,
        line_search: bool = True,
        name: str = "newton",
    ):
        if not isinstance(line_search, bool):
            raise TypeError(f"line_search must be True or False, got {line_search!r}")
        self.name, self.forcing, self.line_search = name, fraction("forcing", forcing), line_search
        self.restart, self.max_iter = count("restart", restart), count("max_iter", max_iter)

    def move(self, f, z: Tensor, slope: Tensor, memory: None) -> Move:
        """See `Iteration.move`."""
        product = jacobian_product(f, z)
        found = gmres(lambda x: -product(x), slope, self.forcing, self.restart, self.max_iter)
        if self.line_search:
            z, slope, made = backtrack(f, z, slope, found.x)
        else:
            z, slope, made = z + found.x, None, 1
        return Move(z, None, slope, Work(nfe=1 + found.iterations + made, linear_solves=found.iterations))


def jacobian_product(f: Callable[[Tensor], Tensor], z: Tensor) -> Callable[[Tensor], Tensor]:
    """x -> J x for the Jacobian of f at z, for as long as it is wanted, from one evaluation.

    The backward pass of f is linear in its cotangent, and J x is the derivative of that.

    Raises:
        TypeError: autograd can't follow f twice.
    """
    with ordinary(), torch.inference_mode(False), torch.enable_grad():
        z = z.detach().clone().requires_grad_()
        value = f(z)
        if not value.requires_grad:
            return torch.zeros_like
        cotangent = torch.zeros_like(value).requires_grad_()
        (back,) = torch.autograd.grad(value, z, cotangent, create_graph=True, allow_unused=True)
    if back is None or not back.requires_grad:
        return torch.zeros_like

    def product(x: Tensor) -> Tensor:
        try:
            with torch.inference_mode(False):
                return torch.autograd.grad(back, cotangent, x.clone(), retain_graph=True)[0]
        except RuntimeError as error:
            raise TypeError(
                "solver 'newton' needs an f whose backward pass can be differentiated, and something in f can't "
                f"({error}); use solver='broyden' or 'anderson'"
            ) from error

    return product
