"""Solvers and Brownian paths across the border to torchsde, which is imported when something here is used.

`sdeint` is torchsde's with our methods beside its own; `solver_class` makes a torchsde solver of one of ours;
`brownian_interval` makes a Brownian object that does not crawl, for `nde.solve(..., brownian=...)` or for torchsde.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import solvers
from ..brownian import Noise
from ..equations import NOISE_TYPES
from ..solvers import SDESolver


def brownian_interval(
    t0: float,
    t1: float,
    size: tuple[int, int],
    dt: float,
    seed: int | None = None,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
):
    """A torchsde `BrownianInterval` with space-time Lévy area, and with the `dt` without which it may take for ever.

    Without it, the interval guesses a resolution from the sizes of its queries; a last step that rounding has made tiny
    then sets it (torchsde issue 109).

    Args:
        t0, t1: the horizon. size: (batch, channels). dt: about how long steps will be.
        seed: None draws one from torch's generator.
    """
    import torchsde

    seed = int(torch.randint(2**31, ())) if seed is None else seed
    return torchsde.BrownianInterval(
        t0, t1, size, dtype=dtype, device=device, entropy=seed, dt=dt, levy_area_approximation="space-time"
    )


@functools.cache
def solver_class(solver: str | SDESolver, sde_type: str, noise_type: str) -> type:
    """One of our methods as a torchsde solver: a subclass of its `BaseSDESolver`.

    torchsde then chooses the steps: of size dt, or by its own step doubling. For torchsde's `noise_type`.

    Args:
        solver: a name of `solvers.SDE_SOLVERS`, or such an object.
        sde_type, noise_type: of the equation.

    Raises:
        ValueError: there is no such solver, or it does not suit such an equation.
    """
    from torchsde._core.base_solver import BaseSDESolver
    from torchsde.settings import LEVY_AREA_APPROXIMATIONS

    from ..equations import SDE

    # Only its types are looked at.
    method = solvers.for_sde(solver, SDE(torch.neg, torch.neg, noise_type, sde_type), adaptive=False)
    every = LEVY_AREA_APPROXIMATIONS.all()

    class Ours(BaseSDESolver):
        strong_order = method.orders[noise_type]
        weak_order = max(1.0, method.orders[noise_type])
        noise_types = tuple(kind for kind in NOISE_TYPES if kind in method.orders)
        levy_area_approximations = tuple(x for x in every if x != "none") if method.uses_area else every

        def init_extra_solver_state(self, t0, y0):
            return (y0,) * (method.copies - 1)

        def step(self, t0, t1, y0, extra0):
            t, t1 = (torch.as_tensor(x, dtype=y0.dtype, device=y0.device).reshape(1) for x in (t0, t1))
            field = _Coefficients(self.sde, self.bm, method.uses_area, t, t1)
            z = torch.cat([y0, *extra0], dim=1)
            y1, *extra1 = method.attempt(field, t, t1 - t, z, None, None, lens=False).z.chunk(method.copies, dim=1)
            return y1, tuple(extra1)

    Ours.sde_type = sde_type
    Ours.__name__ = Ours.__qualname__ = f"{method.name.title().replace('_', '')}Solver"
    return Ours


class _Coefficients:
    """A torchsde SDE and its noise as our methods take them: see `solvers.DrivenField`."""

    def __init__(self, sde, bm, area: bool, t: Tensor, t1: Tensor):
        self.sde, self.diagonal = sde, sde.noise_type == "diagonal"
        self._bm, self._area, self._ends = bm, area, (t, t1)

    @functools.cached_property
    def noise(self) -> Noise:
        t, t1 = self._ends
        if not self._area:
            w = self._bm(t, t1)
            return Noise(w, torch.zeros_like(w))
        w, u = self._bm(t, t1, return_U=True)
        return Noise(w, u / (t1 - t) - 0.5 * w)

    def times(self, t: Tensor, c: Tensor | None = None, dt: Tensor | None = None) -> Sequence[Any]:
        stack = t[None] if c is None else torch.addcmul(t, c, dt)
        return [x[0] for x in stack]

    def __call__(self, t: Any, z: Tensor) -> Tensor:
        return self.sde.f(t, z)

    def diffusion(self, t: Any, z: Tensor) -> Tensor:
        return self.sde.g(t, z)

    def times_noise(self, diffusion: Tensor, noise: Tensor) -> Tensor:
        return self.sde.prod(diffusion, noise)


def sdeint(
    sde,
    y0: Tensor,
    ts,
    bm=None,
    method: str | None = None,
    dt: float = 1e-3,
    adaptive: bool = False,
    rtol: float = 1e-5,
    atol: float = 1e-4,
    dt_min: float = 1e-5,
    **kwargs,
):
    """torchsde's `sdeint`, to which `method` may also be one of `solvers.SDE_SOLVERS`; torchsde's loop makes the steps.

    Args:
        sde, y0, ts, bm, method, dt, adaptive, rtol, atol, dt_min: as torchsde's. A bm of None is `brownian_interval`.
        **kwargs: the others of torchsde's.

    Returns:
        [times, batch, features], as torchsde's.

    Raises:
        ValueError: as torchsde's; or the method does not suit the equation.
    """
    import torchsde
    from torchsde._core.sdeint import check_contract, parse_return

    ours = method in solvers.SDE_SOLVERS and method not in torchsde.settings.METHODS
    given = {"dt": dt, "adaptive": adaptive, "rtol": rtol, "atol": atol, "dt_min": dt_min}
    if bm is None:
        channels = y0.shape[1] if sde.noise_type == "diagonal" else sde.g(_first(ts, y0), y0).shape[-1]
        size = (len(y0), channels)
        bm = brownian_interval(float(ts[0]), float(ts[-1]), size, float(dt), dtype=y0.dtype, device=y0.device)
    if not ours:
        return torchsde.sdeint(sde, y0, ts, bm=bm, method=method, **given, **kwargs)
    names, extra = kwargs.pop("names", None), kwargs.pop("extra", False)
    if kwargs:
        raise ValueError(f"method {method!r} has no option {', '.join(map(repr, kwargs))}; those of torchsde's do")
    forward, y0, ts, bm, _, options = check_contract(sde, y0, ts, bm, None, adaptive, None, names, False)
    kind = solver_class(method, forward.sde_type, forward.noise_type)
    solver = kind(sde=forward, bm=bm, options=options, **given)
    ys, state = solver.integrate(y0, ts, solver.init_extra_solver_state(ts[0], y0))
    return parse_return(y0, ys, state, extra, False)


def _first(ts, y0: Tensor) -> Tensor:
    return torch.as_tensor(ts[0], dtype=y0.dtype, device=y0.device)
