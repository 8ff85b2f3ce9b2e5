"""The Neural SDE layer."""

from __future__ import annotations

import inspect
import numbers
from collections.abc import Callable

import einops
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from .. import control as _control
from ..brownian import BrownianTree
from ..equations import SDE
from ..errors import NeuralDEError
from ..field import mixing_message, mixing_module
from ..solution import Solution
from ..solve import chosen, solve

_REFUSED = ("equation", "z0", "t", "args", "events")
_OPTIONS = [name for name in inspect.signature(solve).parameters if name not in _REFUSED]


class NeuralSDE(nn.Module):
    """z(t0) -> z(t1) of dz = drift(t, z) dt + diffusion(t, z) dW, as a layer.

    Every call draws new noise from torch's generator, unless it is given a seed.

    Args:
        drift, diffusion, noise_type, sde_type: of the equation: see `SDE`.
        t: the horizon (t0, t1).
        trajectories: how many solutions every input has, each with noise of its own.
        **solve_options: of `solve`: all but the equation, z0, t, args and events.

    Attributes:
        solution: the `Solution` of the last call, or None. It holds that call's graph until the next one. Trajectory k
            of input b is its sample b·trajectories + k.

    Raises:
        TypeError: an option that `solve` doesn't have.
        ValueError: drift or diffusion mix samples (batch normalization in training mode) under per-sample control; the
            solver does not suit the equation; control, adjoint and dt0 don't go together; or t does not increase.
    """

    def __init__(
        self,
        drift: Callable,
        diffusion: Callable,
        t=(0.0, 1.0),
        noise_type: str = "diagonal",
        sde_type: str = "ito",
        trajectories: int = 1,
        **solve_options,
    ):
        super().__init__()
        for name in solve_options:
            if name not in _OPTIONS:
                raise TypeError(f"NeuralSDE has no option {name!r}; the options of solve are {', '.join(_OPTIONS)}")
        self.drift, self.diffusion = drift, diffusion
        self.noise_type, self.sde_type = noise_type, sde_type
        self._equation = SDE(drift, diffusion, noise_type, sde_type)
        _require_increasing(t)
        self.t, self.trajectories = t, _count(trajectories)
        self.solve_options = solve_options
        self.solution: Solution | None = None
        given = {name: x for name, x in solve_options.items() if x is not None}
        methods = {"solver": None, "control": "per_sample", "adjoint": SDE.usual.adjoint, "dt0": None}
        self._solver, *_ = chosen(**{name: given.get(name, x) for name, x in methods.items()}, equation=self._equation)
        for name in ("rtol", "atol"):
            if isinstance(solve_options.get(name), numbers.Real):
                _control.check_tolerance(name, solve_options[name])
        self._refuse_mixing()

    @property
    def equation(self) -> SDE:
        """dz = drift(t, z) dt + diffusion(t, z) dW."""
        old = self._equation
        if old.drift is not self.drift or old.diffusion is not self.diffusion:  # one of them was exchanged
            self._equation = SDE(self.drift, self.diffusion, self.noise_type, self.sde_type)
        return self._equation

    def _refuse_mixing(self):
        if not _control.get(self.solve_options.get("control", "per_sample")).per_sample:
            return
        for what in ("drift", "diffusion"):
            name = mixing_module(getattr(self, what))
            if name is not None:
                raise ValueError(mixing_message(f"{name} in the {what} computes statistics over the batch"))

    def forward(self, z0, args=None, trajectories: int | None = None):
        """The state at t1, in the shape and structure of z0; with several trajectories, [trajectories, batch, ...].

        Args:
            z0: [batch, ...], or a tuple or dict of such tensors.
            args: for the last argument of drift and diffusion. Tensors whose first size is that of the batch have a row
                for every input, which is repeated for its trajectories; of one that all inputs share that size is 1.
            trajectories: another number than the layer's.
        """
        count = self._trajectories(trajectories)
        final = self.solve(z0, args=args, trajectories=count).final
        return final if count == 1 else _apart(final, "(b k) ... -> k b ...", count)

    def solve(self, z0, t=None, args=None, trajectories: int | None = None) -> Solution:
        """The whole `Solution`, which `.solution` then holds too: of batch · trajectories samples.

        Args:
            z0, args, trajectories: as in `forward`.
            t: output times instead of the layer's horizon.
        """
        self.solution = None  # lets go of the last call's graph before this one's is built
        self._refuse_mixing()
        count, t = self._trajectories(trajectories), self.t if t is None else t
        if count == 1:
            self.solution = solve(self.equation, z0, t, args=args, **self.solve_options)
        else:
            self.solution = self._several(z0, t, args, count)
        return self.solution

    def _several(self, z0, t, args, count: int) -> Solution:
        """The solution with so many samples in a row for every input."""
        batch = len(pytree.tree_leaves(z0)[0])
        repeated, options = _repeated(args, batch, count), _options_of_several(self.solve_options, z0, batch, count)
        t = _repeated(t, batch, count) if isinstance(t, Tensor) and t.dim() == 2 else t
        try:
            return solve(self.equation, _repeated(z0, batch, count), t, args=repeated, **options)
        except (RuntimeError, IndexError) as error:
            shared = all(x is y for x, y in zip(*map(pytree.tree_leaves, (args, repeated)), strict=True))
            if shared or isinstance(error, NeuralDEError):
                raise
            raise ValueError(
                f"drift or diffusion failed ({error}). Tensors in args whose first size is the batch, {batch}, had "
                f"their rows repeated for the {count} trajectories of every input; give one that all inputs share a "
                "leading dimension of size 1, x[None], or make it a parameter of the drift or the diffusion"
            ) from error

    def trajectory(self, z0, ts, args=None, trajectories: int | None = None):
        """The states at the times ts, [times, batch, ...]; of several trajectories [times, trajectories, batch, ...].

        Args:
            z0, args, trajectories: as in `forward`.
            ts: [times] or [batch, times], the first one where z0 is.
        """
        count = self._trajectories(trajectories)
        zs = self.solve(z0, ts, args=args, trajectories=count).zs
        return zs if count == 1 else _apart(zs, "t (b k) ... -> t k b ...", count)

    def _trajectories(self, given: int | None) -> int:
        return self.trajectories if given is None else _count(given)

    def extra_repr(self) -> str:
        """The solver and its tolerances."""
        shown = {"rtol": 1e-2, "atol": 1e-2, **self.solve_options, "solver": self._solver.name}
        if not self._solver.adaptive:
            shown = {k: v for k, v in shown.items() if k not in ("rtol", "atol")}
        if self.trajectories > 1:
            shown["trajectories"] = self.trajectories
        horizon = self.t if isinstance(self.t, tuple) else "given"
        kind = f"t={horizon}, noise_type={self.noise_type}, sde_type={self.sde_type}, "
        return kind + ", ".join(f"{name}={shown[name]}" for name in sorted(shown))

    def __getstate__(self):
        # A solution holds a graph, which can be neither copied nor pickled, and belongs to one call.
        return {**self.__dict__, "solution": None}


def _count(trajectories) -> int:
    if not isinstance(trajectories, numbers.Integral) or isinstance(trajectories, bool):
        raise TypeError(f"trajectories must be an integer, got {type(trajectories).__name__}")
    if trajectories < 1:
        raise ValueError(f"trajectories must be at least 1, got {trajectories}")
    return int(trajectories)


def _repeated(structure, batch: int, count: int):
    """Tensors with a row for every input, with a row for every trajectory."""

    def repeat(x):
        if not isinstance(x, Tensor) or x.dim() == 0 or len(x) != batch:
            return x
        return einops.repeat(x, "b ... -> (b k) ...", k=count)

    return pytree.tree_map(repeat, structure)


def _options_of_several(options: dict, z0, batch: int, count: int) -> dict:
    """The options of a solve with a row for every trajectory, where they have one for every input."""
    options, (leaves, tree) = dict(options), pytree.tree_flatten(z0)
    for name in ("rtol", "atol"):
        given, own = pytree.tree_flatten(options.get(name))
        if own == tree:  # a tensor with fewer dimensions than the state is for one sample of it
            given = [
                _repeated(x, batch, count) if isinstance(x, Tensor) and x.dim() == z.dim() else x
                for x, z in zip(given, leaves, strict=True)
            ]
            options[name] = pytree.tree_unflatten(given, tree)
    for name in ("jump_times", "step_times"):
        if options.get(name) is not None and (times := torch.as_tensor(options[name])).dim() == 2:
            options[name] = _repeated(times, batch, count)
    if isinstance(options.get("brownian"), BrownianTree):
        options["brownian"] = options["brownian"].grouped(count)
    return options


def _require_increasing(t):
    """Raises ValueError for a horizon that runs backwards; whatever else is wrong with it, `solve` says."""
    times = t if isinstance(t, Tensor) else torch.tensor([float(x) for x in t]) if _all_numbers(t) else None
    if times is not None and times.dim() and bool((times[..., -1] < times[..., 0]).any()):
        raise ValueError(f"t must increase: an SDE is solved forward in time, got {t}")


def _all_numbers(t) -> bool:
    return isinstance(t, tuple | list) and len(t) > 0 and all(isinstance(x, numbers.Real) for x in t)


def _apart(structure, pattern: str, count: int):
    return pytree.tree_map_only(torch.Tensor, lambda x: einops.rearrange(x, pattern, k=count), structure)
