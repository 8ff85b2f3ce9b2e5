"""What every kind of compiled solve has in common: which there are, and what is remembered of an f."""

from __future__ import annotations

import abc
import types
import weakref
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from .. import transforms
from ..equations import Coefficients
from ..field import Entering, Field, modules, reachable
from ..problem import Problem
from ..trajectory import Trajectory
from .programs import Lent, Unsupported, any_hooked, constant, first_line, hooked, known, leaves_of, warn, whose

_ENGINES: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()
_KNOWN = "and only nn.Modules and functions are known again"


def refusals(problem: Problem) -> list[tuple[bool, str]]:
    """What no engine solves compiled: pairs (whether the problem is so, the cause as the user is told it)."""
    field, layout = problem.field, problem.field.layout
    f = field.given
    return [
        *(
            (not isinstance(x, nn.Module | types.FunctionType), f"f is a {type(x).__name__}, {_KNOWN}")
            for x in ([f] if not isinstance(f, Coefficients) else map(whose, (f.drift, f.diffusion)))
        ),
        (layout.device.type != "cpu", f"on {layout.device.type} nothing is compiled yet"),
        (transforms.active(), "a transform of torch.func or forward mode is around the solve"),
        (layout.dtype not in (torch.float32, torch.float64), f"states of {layout.dtype} are not compiled"),
        (field.autocast, "autocast is on"),
        (problem.observer is not None, "it has an observer"),
        (not problem.norm.plain, "a tolerance per component or a norm of its own is not compiled"),
    ]


def remembered(kind: type[Engine], problem: Problem) -> Engine:
    """The engine of this kind that solves problems like this one, made at the first.

    Raises:
        Unsupported: none can.
    """
    for unsupported, cause in (*refusals(problem), *kind.refusals(problem)):
        if unsupported:
            raise Unsupported(cause)
    field, layout, f = problem.field, problem.field.layout, problem.field.given
    leaves, tree = ([], None) if field.args is None else pytree.tree_flatten(field.args)
    used = list(f.modules()) if isinstance(f, nn.Module) else modules(f)
    if any(map(hooked, used)) or any_hooked():
        raise Unsupported("a Module has hooks")
    if leaves:
        _check(leaves, used)
    key = (
        kind, tuple([m.training for m in used]), field.equation.takes_time, layout.tree, layout.shapes, layout.dtype,
        tree, len(leaves), problem.control, *kind.kinds(problem),
    )  # fmt: skip
    engines = known(_ENGINES, f, weakref.WeakKeyDictionary)
    engines = known(engines, f.diffusion if isinstance(f, Coefficients) else f, dict)
    found = engines.get(key)
    if found is None:
        found = engines[key] = kind(problem, tree)
    if found.broken is not None:
        raise found.broken
    return found


def _check(leaves: list, used: Sequence[nn.Module]):
    """Raises Unsupported where the programs could not tell apart what is in args."""
    if not all(isinstance(x, Tensor) for x in leaves):
        raise Unsupported("args holds something other than tensors")
    own = {id(p) for m in used for p in m.parameters()}
    if len({id(x) for x in leaves}) < len(leaves) or any(id(x) in own for x in leaves):
        raise Unsupported("a tensor is in args twice, or is a parameter of f as well")


class VectorField:
    """f as a traced step calls it: no counting, no checks."""

    def __init__(self, field: Field, f: Callable, args):
        self.field, self.f, self.args = field, f, args

    def times(self, t: Tensor, c: Tensor | None = None, dt: Tensor | None = None) -> Sequence[Tensor | None]:
        """See `Field.times`."""
        return self.field.times(t, c, dt)

    def __call__(self, t: Tensor | None, z: Tensor) -> Tensor:
        """dz/dt, [batch, features]."""
        return self.field.pure(self.f, t, z, self.args)


class Engine(abc.ABC):
    """The programs of one f, solver, control and kind of state, and what they are given.

    Args:
        problem: the first one to be solved. tree: of its args.

    Attributes:
        broken: why the programs can't be made, once that is known.
    """

    def __init__(self, problem: Problem, tree: pytree.TreeSpec):
        self.broken: Unsupported | None = None
        self._field, self._tree = problem.field.signature(), tree
        self._checked = self._known = False

    @staticmethod
    @abc.abstractmethod
    def refusals(problem: Problem) -> list[tuple[bool, str]]:
        """What this kind of engine does not solve; as the function of that name."""

    @staticmethod
    @abc.abstractmethod
    def kinds(problem: Problem) -> tuple:
        """What of a problem makes other programs, beside its f, its solver and its layout."""

    def tensors(self, problem: Problem) -> list[Tensor] | None:
        """What wants a gradient beside z0: f's parameters and args. None if there may be other tensors."""
        f = problem.field.equation.f
        if not self._known:
            return None
        found = reachable(f)
        own = {id(p) for p in Lent.holder_of(f).parameters()}
        if any(id(x) not in own for x in found):
            return None
        return [*(x for x in leaves_of(problem.field.args) if x.requires_grad), *found]

    def learn(self, problem: Problem, z0: Tensor, tensors: list[Tensor]) -> list[Tensor] | None:
        """Takes in what a full look at f found: the same; or None, after a warning, if it can't be compiled."""
        f, field = problem.field.equation.f, problem.field
        try:
            Lent.of(problem, tensors)
        except Unsupported as cause:
            self._give_up(problem, cause)
            return None
        if isinstance(f, nn.Module) or (
            isinstance(f, Coefficients) and all(isinstance(whose(x), nn.Module) for x in (f.drift, f.diffusion))
        ):
            # Another tensor may want a gradient one day, and no inspection may find it: then a full look is needed.
            seen, (t,) = Entering(constants=True), field.times(problem.start)
            with torch.no_grad(), seen:
                field._everything(t, z0, field.args)
            holder = Lent.holder_of(f)
            own = [z0, t, *holder.parameters(), *holder.buffers(), *leaves_of(field.args)]
            self._known = not seen.foreign.keys() - {id(x) for x in own}
        return tensors

    def discover(self, problem: Problem, z0: Tensor) -> Trajectory | None:
        """Solves; None where the solve fails, or where it has to be made as ever (after a warning)."""
        try:
            return self._discover(problem, z0.detach())
        except Unsupported as cause:
            self._give_up(problem, cause)
        except Exception as error:  # whatever the compiler says of f
            self._give_up(problem, Unsupported(first_line(error)))
        return None

    def _give_up(self, problem: Problem, cause: Unsupported):
        self.broken = cause
        warn(problem.field.given, cause)

    @staticmethod
    def _tolerances(problem: Problem, z: Tensor) -> tuple[Tensor, Tensor]:
        norm = problem.norm
        return tuple(constant(name, getattr(norm, name), z.dtype)[None, None] for name in ("rtol", "atol"))

    def _of(self, f, leaves) -> VectorField:
        return VectorField(self._field, f, pytree.tree_unflatten(leaves, self._tree) if leaves else None)
