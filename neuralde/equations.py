"""What is solved. An equation is data: the vector field and how it is called."""

from __future__ import annotations

import functools
import inspect
import types
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor
from torch.utils import _pytree as pytree


class Usual(NamedTuple):
    """The options of `solve` that an equation has where they are not given; None where more than its kind decides."""

    solver: str | None = "tsit5"
    rtol: float = 1e-3
    atol: float = 1e-6
    adjoint: str = "checkpointed"
    max_steps: int | None = 4096
    on_failure: str = "raise"


@dataclass(frozen=True, eq=False)
class ODE:
    """The ordinary differential equation dz/dt = f(t, z) or f(t, z, args).

    Args:
        f: a function or `nn.Module`, called as `f(t, z)`, or `f(t, z, args)` when the solve is given `args`. A callable
            that must be given one positional argument, such as an `nn.Sequential`, is the autonomous f(z).
            z has the structure and shape of the initial state; t has shape [batch, 1, ..., 1] under per-sample
            control and no dimensions under joint control, so that it broadcasts to z either way (of a tuple or dict,
            to its first tensor). f returns dz/dt with the structure, shape, dtype and device of z.

    Raises:
        TypeError: f is not callable.
    """

    f: Callable
    takes_time: bool = field(init=False)
    usual: ClassVar[Usual] = Usual()

    def __post_init__(self):
        if not callable(self.f):
            raise TypeError(
                f"f must be a callable f(t, z) or f(t, z, args), got {type(self.f).__name__}; "
                "pass a function or an nn.Module"
            )
        object.__setattr__(self, "takes_time", required_arguments(self.f) != 1)

    @property
    def takes_args(self) -> bool:
        """Whether f can be given a last argument."""
        return self.takes_time


@dataclass(frozen=True, eq=False)
class SteadyState:
    """The steady state of dz/dt = f(z) - z: the fixed point z* = f(z*) of a map.

    Args:
        f: the map, a function or `nn.Module`, called as `f(z)`, or `f(z, args)` when the solve is given `args`. It
            returns the next z, with the structure, shape, dtype and device of z. See `of` for the steady state of an
            equation that is given as dz/dt.

    Attributes:
        ode: the `ODE` whose steady state it is. Solved on a horizon by "euler" with dt0=1, its n-th step is the n-th
            iterate of f.

    Raises:
        TypeError: f is not callable.
    """

    f: Callable
    ode: ODE = field(init=False)
    usual: ClassVar[Usual] = Usual(adjoint="implicit", max_steps=None, on_failure="warn")

    def __post_init__(self):
        if isinstance(self.f, ODE):
            raise TypeError("f must be a map z -> f(z), got an nde.ODE; use nde.SteadyState.of(ode)")
        if not callable(self.f):
            raise TypeError(
                f"f must be a callable f(z) or f(z, args), got {type(self.f).__name__}; pass a function or an nn.Module"
            )
        object.__setattr__(self, "ode", _Relaxation(_Excess(self.f)))

    @classmethod
    def of(cls, ode: ODE) -> SteadyState:
        """The steady state of an ODE, where its dz/dt is 0: the fixed point of z + f(t, z).

        Args:
            ode: autonomous as a rule. t is where the solve stands; the discrete solvers count it in steps.

        Raises:
            TypeError: not an `ODE`.
        """
        if not isinstance(ode, ODE):
            hint = "; for a map use nde.SteadyState(f)" if callable(ode) else ""
            raise TypeError(f"ode must be an nde.ODE, got {type(ode).__name__}{hint}")
        steady = object.__new__(cls)
        object.__setattr__(steady, "f", ode.f)
        object.__setattr__(steady, "ode", ode)
        return steady


class _Excess:
    """f(z) - z of a map f."""

    def __init__(self, f: Callable):
        self.f = f

    def __call__(self, z, *args):
        value = self.f(z, *args)
        if isinstance(z, Tensor) and isinstance(value, Tensor):
            return _difference(value, z)
        leaves, tree = pytree.tree_flatten(z)
        values, got = pytree.tree_flatten(value)
        if got != tree:
            wanted = "a tensor" if isinstance(z, Tensor) else f"the structure of z, {tree}"
            raise TypeError(f"f must return {wanted}, got {type(value).__name__} with structure {got}")
        return pytree.tree_unflatten([_difference(v, x) for v, x in zip(values, leaves, strict=True)], tree)


def _difference(value, z: Tensor) -> Tensor:
    # Subtraction would broadcast one shape to the other.
    if not isinstance(value, Tensor):
        raise TypeError(f"f must return tensors like z, got a {type(value).__name__}")
    if value.shape != z.shape:
        raise ValueError(f"f must return f(z) in the shape of z, {tuple(z.shape)}, got {tuple(value.shape)}")
    return value - z


@dataclass(frozen=True, eq=False)
class _Relaxation(ODE):
    """dz/dt = f(z) - z, whose f takes no time but may take args."""

    def __post_init__(self):
        object.__setattr__(self, "takes_time", False)

    @property
    def takes_args(self) -> bool:
        return True


NOISE_TYPES = ("diagonal", "scalar", "additive", "general")
SDE_TYPES = ("ito", "stratonovich")


@dataclass(frozen=True, eq=False)
class SDE:
    """The stochastic differential equation dz = drift(t, z) dt + diffusion(t, z) dW.

    Args:
        drift, diffusion: functions or `nn.Module`s, called as the f of an `ODE` is: with (t, z), (t, z, args), or z
            alone. The drift returns dz/dt like an f does. The diffusion returns
            - "diagonal": the shape of z. Every component has a Brownian motion of its own.
            - "scalar": the shape of z and one more dimension of size 1: one Brownian motion for all components.
            - "additive", "general": the shape of z and one more dimension of any size m: m Brownian motions. An
              additive diffusion does not depend on z.
        noise_type: "diagonal", "scalar", "additive" or "general".
        sde_type: "ito" or "stratonovich".

    Raises:
        TypeError: drift or diffusion is not callable.
        ValueError: there is no such noise_type or sde_type.

    The words are torchsde's.
    """

    drift: Callable
    diffusion: Callable
    noise_type: str = "diagonal"
    sde_type: str = "ito"
    f: Coefficients = field(init=False)
    takes_time = True
    takes_args = True
    usual: ClassVar[Usual] = Usual(solver=None, rtol=1e-2, atol=1e-2)

    def __post_init__(self):
        for name in ("drift", "diffusion"):
            if not callable(getattr(self, name)):
                raise TypeError(
                    f"{name} must be a callable {name}(t, z) or {name}(t, z, args), got "
                    f"{type(getattr(self, name)).__name__}; pass a function or an nn.Module"
                )
        for name, known in (("noise_type", NOISE_TYPES), ("sde_type", SDE_TYPES)):
            if getattr(self, name) not in known:
                raise ValueError(f"{name} must be one of {', '.join(map(repr, known))}, got {getattr(self, name)!r}")
        object.__setattr__(self, "f", Coefficients(_timed(self.drift), _timed(self.diffusion)))


@dataclass(frozen=True, eq=False)
class Coefficients:
    """The drift and the diffusion of an `SDE`, both called with t."""

    drift: Callable
    diffusion: Callable

    def __call__(self, which: str, *arguments):
        """The "drift" or the "diffusion" of these arguments: one callable, as compiled programs are given it."""
        return getattr(self, which)(*arguments)


@dataclass(frozen=True, eq=False)
class Autonomous:
    """A function of z alone, called with t."""

    f: Callable

    def __call__(self, t, z, *args):
        """f of z."""
        if args:
            raise TypeError("args was given, but a coefficient takes z alone; give it the signature f(t, z, args)")
        return self.f(z)


def _timed(f: Callable) -> Callable:
    return Autonomous(f) if required_arguments(f) == 1 else f


def required_arguments(f: Callable) -> int | None:
    """How many positional arguments f must be given, or None where its signature does not tell."""
    # A Module's own __call__ is (*args, **kwargs); its forward says what it takes.
    target = f.forward if isinstance(f, torch.nn.Module) else f
    bound = inspect.ismethod(target)
    count = _count(target.__func__ if bound else target)
    return count if count is None else count - bound


def _remembered(function):
    """Caches by a weakly referenced argument: reading a signature takes longer than a small f."""
    known: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()

    @functools.wraps(function)
    def wrapper(target):
        if target not in known:
            known[target] = function(target)
        return known[target]

    return wrapper


def _count(target: Callable) -> int | None:
    if type(target) is types.FunctionType and not target.__dict__:  # nothing there but the code says what it takes
        code = target.__code__
        return None if code.co_flags & inspect.CO_VARARGS else code.co_argcount - len(target.__defaults__ or ())
    try:
        return _read(target)
    except TypeError:  # a callable that can't be weakly referenced
        return _read.__wrapped__(target)


@_remembered
def _read(target: Callable) -> int | None:
    try:
        parameters = inspect.signature(target).parameters.values()
    except (TypeError, ValueError):
        return None
    if any(p.kind is p.VAR_POSITIONAL for p in parameters):
        return None
    return sum(p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD) and p.default is p.empty for p in parameters)
