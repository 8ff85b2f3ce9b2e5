"""The user's f as the engine sees it: flat, counted, on any subset of the samples, with its randomness frozen."""

from __future__ import annotations

import collections
import contextlib
import copy
import functools
import inspect
import sys
import types
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from . import transforms
from .equations import ODE, SDE, Coefficients
from .graph import behind
from .state import Layout

# Vector fields whose samples were found independent of each other, and the training modes they were in: checked once.
_INDEPENDENT: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()


class Field:
    """f(t, z) -> dz/dt on [batch, features] tensors.

    Args:
        equation: what is solved.
        layout: of its state.
        args: tensors for f's last argument, or None.
        joint: whether t is one scalar for the batch.
        linearized: whether f's Jacobian is taken sample by sample, so that f must not mix samples in any case.

    Attributes:
        calls: batched evaluations of f so far.
    """

    def __init__(self, equation: ODE | SDE, layout: Layout, args, joint: bool, linearized: bool = False):
        self.equation, self.layout, self.args, self.joint = equation, layout, args, joint
        self._linearized = linearized
        self.calls = 0
        self._frozen = None  # the random generators' states that every evaluation starts from, where f is random
        self._subsets: str | None = None  # how a part of the batch is evaluated: "index" or "pad"
        self._own: set[int] = set()  # the leaves of args that have a row for every sample
        self._filler: tuple[Tensor, Tensor] | None = None
        self._other: Tensor | None = None
        self._autocast = _autocast_state(layout.device)
        # Whether f takes and returns the engine's tensors as they are.
        self._plain = layout.tree is None and layout.dtype == layout.work_dtype and len(layout.shapes[0]) == 1
        self._simple = self._plain and equation.takes_time and args is None and self._autocast is None
        self._time_shape = () if joint else (-1, *(1,) * (layout.time_rank - 1))
        self._time_dtype = layout.dtype if layout.dtype != layout.work_dtype else layout.time_dtype
        if args is not None and not equation.takes_args:
            raise TypeError("args was given, but f takes z alone; give f the signature f(t, z, args)")

    def times(self, t: Tensor, c: Tensor | None = None, dt: Tensor | None = None) -> Sequence[Tensor | None]:
        """The times t + c·dt as f takes them: [batch, 1, ..., 1], or without dimensions when joint.

        Args:
            t, dt: [groups]. c: [evaluations, 1]; None for t alone.
        """
        if not self.equation.takes_time:
            return (None,) * (1 if c is None else c.shape[0])
        if c is None:
            t = t.view(self._time_shape)
            return (t if t.dtype == self._time_dtype else t.to(self._time_dtype),)
        return self.shaped(instants(t, c, dt))

    def shaped(self, stack: Tensor) -> Sequence[Tensor]:
        """Instants [evaluations, groups] as f takes them."""
        stack = stack.view(stack.shape[0], *self._time_shape)
        return (stack if stack.dtype == self._time_dtype else stack.to(self._time_dtype)).unbind(0)

    def __call__(self, t: Tensor | None, z: Tensor) -> Tensor:
        """dz/dt for all samples. t: of `times`; z: [batch, features]."""
        if self._simple:  # the common case, without a detour
            self.calls += 1
            return self.equation.f(t, z)
        return self._evaluate(t, z, self.args)

    def _evaluate(self, t, z: Tensor, args) -> Tensor:
        derivative = self._call(t, z, args)
        return derivative if self._plain else self.layout.pack(derivative)

    def _everything(self, t, z: Tensor, args) -> Tensor:
        """All that is evaluated at (t, z), [batch, numbers]: what the checks compare."""
        return self._evaluate(t, z, args)

    def _checked(self, t, z: Tensor) -> tuple[Tensor, Tensor]:
        """(dz/dt, everything), with the checks of what f returns."""
        derivative = self._call(t, z, self.args)
        slope = self.layout.pack_derivative(derivative, len(z), self._autocast is not None)
        # A copy: f may return a buffer of its own that its next call overwrites, as a captured graph does.
        slope = slope.clone()
        return slope, slope

    def _call(self, t, z: Tensor, args, f=None):
        self.calls += 1
        if self._frozen is not None:
            with _generators(self._frozen, self.layout.device):
                return self._invoke(t, z, args, f)
        return self._invoke(t, z, args, f)

    def _invoke(self, t, z: Tensor, args, f=None):
        if self._autocast is not None:
            with torch.autocast(self.layout.device.type, dtype=self._autocast, cache_enabled=False):
                return self._apply(t, z, args, f)
        return self._apply(t, z, args, f)

    def _apply(self, t, z: Tensor, args, f=None):
        f, z = self.equation.f if f is None else f, z if self._plain else self.layout.unpack(z)
        if not self.equation.takes_time:
            return f(z) if args is None else f(z, args)
        return f(t, z) if args is None else f(t, z, args)

    def pure(self, f, t, z: Tensor, args) -> Tensor:
        """dz/dt by another f with other args, neither counted nor checked: as a program traces it."""
        derivative = self._apply(t, z, args, f)
        return derivative if self._plain else self.layout.pack(derivative)

    def signature(self) -> Field:
        """What a program may keep of the field: how f is called, for `pure`, but neither f nor a tensor."""
        field = copy.copy(self)
        field.equation, field.args = _Called(self.equation.takes_time), None
        field._filler = field._other = None
        return field

    @property
    def takes_time(self) -> bool:
        """Whether f takes t."""
        return self.equation.takes_time

    @property
    def given(self):
        """What the user gave: f, or the map whose fixed point is looked for."""
        return getattr(self.equation, "map", self.equation.f)

    @property
    def autocast(self) -> bool:
        """Whether f runs under autocast."""
        return self._autocast is not None

    @property
    def precision(self) -> torch.dtype:
        """What f computes in."""
        return self.layout.dtype if self._autocast is None else self._autocast

    @property
    def random(self) -> bool:
        """Whether f draws random numbers, known after the first evaluation."""
        return self._frozen is not None

    # -- the first evaluation of a solve ---------------------------------------------------------------------------

    def first(self, t: Tensor, z: Tensor, t_other: Tensor) -> Tensor:
        """The evaluation that starts a solve: checks what f returns, finds its randomness and its batch mixing.

        Args:
            t, z: where the solve starts.
            t_other: other times of the horizon, shaped like t.
        """
        before, version = _generator_states(self.layout.device), _version(z)
        leaves = [x for x in pytree.tree_leaves(self.args) if isinstance(x, Tensor)]
        versions = [_version(x) for x in leaves]
        try:
            slope, everything = self._checked(self.times(t)[0], z)
        except Exception as error:
            self._tell_of_the_signature(error)
            self._tell_of_a_missing_batch(error)
            raise
        if _version(z) != version:
            raise ValueError(
                "f changes its argument z in place, which changes the solution itself; let it work on new tensors "
                "(z.clamp(...) in place of z.clamp_(...), torch.cat or torch.where in place of z[...] = ...)"
            )
        after = _generator_states(self.layout.device)
        random = not all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
        if not random and [_version(x) for x in leaves] != versions:
            self._refuse_drifting(t, z, everything)
        if random:
            self._frozen, self._subsets, self._simple = before, "pad", False
        if self._linearized or not self.joint:
            self._check_independence(t, z.detach(), everything.detach(), t_other)
        self.fill(t, z, t_other)
        return slope

    @torch.no_grad()
    def _refuse_drifting(self, t: Tensor, z: Tensor, once: Tensor):
        """Raises ValueError where f has changed its args in place, to which it then gives something else."""
        if not torch.equal(self._everything(self.times(t)[0], z, self.args), once):
            raise ValueError(
                "f changes its args (a layer's x) in place, which makes another function of it at every evaluation; "
                "let it work on new tensors (x + ... in place of x += ...)"
            )

    def _tell_of_the_signature(self, error: Exception):
        """Says how f is called, where it can't be called like that."""
        if not isinstance(error, TypeError):
            return
        given = (["t"] if self.equation.takes_time else []) + ["z"] + ([] if self.args is None else ["args"])
        f = self.given
        noisy = isinstance(f, Coefficients)
        for name, part in [("drift", f.drift), ("diffusion", f.diffusion)] if noisy else [("f", f)]:
            try:
                signature = inspect.signature(part.forward if isinstance(part, nn.Module) else part)
            except (TypeError, ValueError):  # it has none
                continue
            try:
                signature.bind(*given)
            except TypeError as cause:
                raise TypeError(
                    f"{name} is called as {name}({', '.join(given)}), and its signature is {signature}: {cause}. What "
                    f"args is given (a layer's x) is {name}'s last argument; without args, it gets none"
                ) from error

    def _tell_of_a_missing_batch(self, error: Exception):
        """Adds to an error of f on a z0 of one dimension what that means: each of its numbers is a sample."""
        if self.layout.tree is not None or self.layout.shapes[0]:
            return
        said = (
            f"z0 has one dimension, the batch's: it is {self.layout.batch} samples of one number each. If it is "
            "one sample, pass z0[None]"
        )
        if type(error) is ValueError:
            raise ValueError(f"{error}. But {said}, and args likewise") from error
        if hasattr(error, "add_note"):  # of f's own, or of torch's
            error.add_note(said)

    def fill(self, t: Tensor, z: Tensor, other: Tensor | None = None):
        """Says where the samples stand that are evaluated only because f wants the whole batch.

        Args:
            other: other times of the horizon, shaped like t; None where they are known, or there are none.
        """
        self._filler, self._other = (t.detach(), z.detach()), self._other if other is None else other

    @torch.no_grad()
    def _check_independence(self, t: Tensor, z: Tensor, slope: Tensor, t_other: Tensor):
        """Changes the last sample's state and time, and looks whether another sample's derivative notices."""
        if len(z) < 2 or _known_independent(self.equation.f, self.joint):
            return
        t, z = t.clone(), z.clone()
        if not self.joint:
            t[-1] = t_other[-1]
        z[-1] = 2.0 * z[-1] + 1.0
        try:
            other = self._everything(self.times(t)[0], z, self.args)
        except Exception:  # f refuses states that it would not meet: nothing was found out, and nothing is wrong
            return
        # The same kernels on the same shapes: what a sample gets is the same to the last digits, or it is mixed.
        if _differ(other[:-1], slope[:-1], 64 * torch.finfo(self.layout.dtype).eps):
            found = "f gives a sample another derivative when another sample changes"
            error = ValueError(mixing_message(found, self._linearized))
            self._tell_of_a_missing_batch(error)
            raise error
        unchanged = transforms.physical(other[-1] == slope[-1])
        if not bool(unchanged.all()):  # an f that answers to nothing has not shown its independence
            _remember_independent(self.equation.f, self.joint)

    def linearized(self, t: Tensor, z: Tensor, slope: Tensor) -> Field:
        """The field for a solver that takes f's Jacobian sample by sample.

        Raises:
            ValueError: f mixes samples at (t, z), where it is slope.
        """
        if self._linearized:
            return self
        field = copy.copy(self)
        field._linearized = True
        if self.joint:
            field._check_independence(t.detach(), z.detach(), slope.detach(), t)
        return field

    # -- a part of the batch ---------------------------------------------------------------------------------------

    def can_shrink(self) -> bool:
        """Whether f can be evaluated on some of the samples alone, so that leaving the others out saves work."""
        if self._subsets is None:
            self._subsets = self._find_subsets(*self._filler, self._other)
        return self._subsets != "pad"

    def on(self, rows: Tensor | None) -> Field | Part:
        """The field for the samples `rows` (ascending indices) only."""
        if rows is None:
            return self
        return Part(self, rows, padded=not self.can_shrink())

    def _args_of(self, rows: Tensor):
        """The args for some of the samples."""
        leaves, tree = pytree.tree_flatten(self.args)
        picked = [x.index_select(0, rows) if i in self._own else x for i, x in enumerate(leaves)]
        return pytree.tree_unflatten(picked, tree)

    @torch.no_grad()
    def _find_subsets(self, t: Tensor, z: Tensor, other: Tensor | None) -> str:
        """Finds by trial how f must be called for fewer samples.

        A leaf of args that has as many rows as the batch may be the samples' own or a table for all of them: changing
        every other row tells. What f notices nowhere has told nothing, and is not cut. f itself may hold tensors of the
        whole batch (a control input, as in torchdyn's DataControl): what does not reproduce the full result without the
        first sample is called with all of them.
        """
        trials = [(t, z, self._everything(self.times(t)[0], z, self.args).clone())]
        elsewhere = t if other is None else other.detach(), 2.0 * z + 1.0
        with contextlib.suppress(Exception):  # f may refuse states that it would not meet
            trials.append((*elsewhere, self._everything(self.times(elsewhere[0])[0], elsewhere[1], self.args).clone()))
        self._own = set()
        for i, leaf in enumerate(pytree.tree_leaves(self.args)):
            if isinstance(leaf, Tensor) and leaf.dim() > 0 and len(leaf) == self.layout.batch:
                found = [self._reads(i, parity, *trial) for trial in trials for parity in (0, 1)]
                if any(across for across, _ in found):
                    continue
                if not any(own for _, own in found):
                    return "pad"
                self._own.add(i)
        rows = torch.arange(1, len(z), device=z.device)
        for t, z, full in trials:
            try:
                part = self._everything(self.times(t[1:])[0], z[1:], self._args_of(rows))
            except Exception:  # however f complains about a part of the batch
                return "pad"
            if part.shape != full[1:].shape or _differ(part, full[1:], _rounding(self.layout.dtype)):
                return "pad"
        return "index"

    def _reads(self, i: int, parity: int, t: Tensor, z: Tensor, full: Tensor) -> tuple[bool, bool]:
        """Whether a change in the rows of a leaf of args that belong to the samples of the other parity is noticed: by
        the samples of this parity, and by those.
        """
        leaves, tree = pytree.tree_flatten(self.args)
        leaf = leaves[i].clone()
        others = leaf[1 - parity :: 2]
        leaf[1 - parity :: 2] = 1.1 * others + 0.17 if leaf.is_floating_point() else others.flip(0)
        if bool(transforms.physical(leaf == leaves[i]).all()):  # whole numbers that are all the same
            return False, True
        leaves[i] = leaf
        try:
            out = self._everything(self.times(t)[0], z, pytree.tree_unflatten(leaves, tree))
        except Exception:  # no values for f: what it reads can't be told
            return True, False
        return tuple(
            _differ(out[which::2], full[which::2], 64 * torch.finfo(self.layout.dtype).eps)
            for which in (parity, 1 - parity)
        )


@dataclass(frozen=True)
class _Called:
    """An equation without its f."""

    takes_time: bool


def _version(z: Tensor) -> int:
    """How often a tensor was written to; of one made in inference mode nobody knows."""
    return 0 if z.is_inference() else z._version


def instants(t: Tensor, c: Tensor | None, dt: Tensor | None) -> Tensor:
    """The times t + c·dt, [evaluations, groups]; arguments as `Field.times` has them."""
    return t[None] if c is None else torch.addcmul(t, c, dt)


class Between:
    """A field for one step, evaluated strictly inside of it where f jumps at an end: one-sided limits.

    Args:
        field: f.
        low, high: the first and the last instant at which f may be called, [groups].
    """

    def __init__(self, field: Field | Part, low: Tensor, high: Tensor):
        self.field, self.low, self.high = field, low, high
        self.layout, self.joint = field.layout, field.joint

    def times(self, t: Tensor, c: Tensor | None = None, dt: Tensor | None = None) -> Sequence[Tensor | None]:
        """See `Field.times`."""
        if not self._takes_time():
            return self.field.times(t, c, dt)
        times = instants(t, c, dt)
        # Moved, not clamped: a clamp has half a derivative at its bounds, where the first and the last stage are.
        return self.field.shaped(times + (times.clamp(self.low, self.high) - times).detach())

    def _takes_time(self) -> bool:
        whole = self.field.field if isinstance(self.field, Part) else self.field
        return whole.equation.takes_time

    def __call__(self, t: Tensor | None, z: Tensor) -> Tensor:
        """dz/dt, [samples, features]."""
        return self.field(t, z)

    def diffusion(self, t: Tensor, z: Tensor) -> Tensor:
        """See `NoisyField.diffusion`."""
        return self.field.diffusion(t, z)


class Still:
    """A field in which some samples stand still.

    Args:
        field: f.
        still: which samples, [samples].
    """

    def __init__(self, field: Field | Part | Between, still: Tensor):
        self.field, self.still = field, still[:, None]
        self.layout, self.joint, self.times = field.layout, field.joint, field.times

    def __call__(self, t: Tensor | None, z: Tensor) -> Tensor:
        """dz/dt, [samples, features]."""
        return torch.where(self.still, 0.0, self.field(t, z))


@contextlib.contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """Autocast is for f alone: stage combinations and error estimates in half precision would be noise."""
    if torch.is_autocast_enabled(device.type):
        with torch.autocast(device.type, enabled=False):
            yield
    else:
        yield


class Part:
    """A field on some of the samples.

    Args:
        field: of the whole batch.
        rows: the samples, ascending.
        padded: whether f is evaluated on the whole batch all the same, the other samples standing still.
    """

    def __init__(self, field: Field, rows: Tensor, padded: bool):
        self.field, self.rows, self.padded, self.layout = field, rows, padded, field.layout
        self.joint = field.joint
        self.args = field.args if padded else field._args_of(rows)

    def times(self, t: Tensor, c: Tensor | None = None, dt: Tensor | None = None) -> Sequence[Tensor | None]:
        """See `Field.times`; t and dt have one entry per row."""
        if not self.field.equation.takes_time:
            return self.field.times(t, c, dt)
        return self.shaped(instants(t, c, dt))

    def shaped(self, stack: Tensor) -> Sequence[Tensor]:
        """See `Field.shaped`."""
        if self.padded:
            stack = self.field._filler[0].expand(stack.shape[0], -1).index_copy(1, self.rows, stack)
        return self.field.shaped(stack)

    def __call__(self, t: Tensor | None, z: Tensor) -> Tensor:
        """dz/dt of the rows, [rows, features]."""
        if not self.padded:
            return self.field._evaluate(t, z, self.args)
        everyone = self.field._filler[1].index_copy(0, self.rows, z)
        return self.field(t, everyone).index_select(0, self.rows)


def mixing_message(finding: str, linearized: bool = False) -> str:
    """Why per-sample control, or a solver that takes f's Jacobian sample by sample, can't be used, and what can."""
    what = 'control="per_sample"' if not linearized else "a solver that takes the Jacobian of f"
    instead = "" if not linearized else 'an explicit solver (solver="tsit5") with '
    return (
        f"{what} needs an f that treats every sample alone, but {finding} (batch normalization on batch "
        f'statistics does that). Use {instead}control="joint", which steps the whole batch together, or replace what '
        "mixes: GroupNorm or LayerNorm, or batch normalization in eval mode"
    )


def mixing_module(f) -> str | None:
    """The name of a submodule that is known to mix samples as it is now, or None."""
    if isinstance(f, nn.Module):
        for name, module in f.named_modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm) and (
                module.training or not module.track_running_stats
            ):
                return f"{name or 'f'} ({type(module).__name__})"
    return None


def closed_over(field: Field, t: Tensor, z: Tensor, t_other: Tensor) -> tuple[Tensor, list[Tensor], set[int]]:
    """The first evaluation, and the tensors beside z that f's value depends on and that want a gradient.

    The third result has the ids of those that were seen in use.

    What f uses is watched during the evaluation; what it may use at other times is found by inspection: see `_reach`.
    """
    watch = Entering()
    with torch.enable_grad(), watch:
        slope = field.first(t, z, t_other)
    foreign = watch.outside()
    found = {id(x): x for x in reachable(field.equation.f) if not (watch.made(x) or _spent(x))}
    found |= {id(x): x for x in foreign}
    found.pop(id(z), None)
    return slope.detach(), list(found.values()), {id(x) for x in foreign}


def _spent(x: Tensor) -> bool:
    """Whether a backward pass has freed the graph of x, so that another one can't go through it."""
    for node in behind([x]):
        try:
            for name in _saved(type(node)):
                getattr(node, name)
        except RuntimeError:  # what it had saved is gone
            return True
    return False


@functools.cache
def _saved(kind: type) -> list[str]:
    """Where a kind of node of autograd's graph shows the tensors that it saved."""
    return [name for name in dir(kind) if name.startswith("_saved_") or name == "saved_tensors"]


class Entering(TorchFunctionMode):
    """Collects tensors that enter a computation from outside of it.

    Args:
        constants: those that don't require gradients, too.
    """

    def __init__(self, constants: bool = False):
        super().__init__()
        self._constants = constants
        self.foreign: dict[int, Tensor] = {}
        self._made: dict[int, Tensor] = {}  # keeps the tensors alive, so that ids stay unique
        with torch.enable_grad():  # autograd numbers its nodes as they are made
            self._since = torch.ones((), requires_grad=True).clone().grad_fn._sequence_nr()

    def __torch_function__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for leaf in pytree.tree_leaves((args, kwargs)):
            # Inside of torch.func transforms of f, only what is not wrapped by them comes from outside.
            if (
                isinstance(leaf, Tensor)
                and not transforms.wrapped(leaf)
                and (self._constants or leaf.requires_grad)
                and id(leaf) not in self._made
            ):
                self.foreign[id(leaf)] = leaf
        for leaf in pytree.tree_leaves(out):
            if isinstance(leaf, Tensor) and id(leaf) not in self.foreign:
                self._made[id(leaf)] = leaf
        return out

    def made(self, x: Tensor) -> bool:
        """Whether a tensor was made during the computation."""
        return id(x) in self._made

    def outside(self) -> list[Tensor]:
        """The foreign tensors, without what was made inside unseen: by transforms of torch.func, or a scripted f."""
        return [x for x in self.foreign.values() if x.is_leaf or x.grad_fn._sequence_nr() < self._since]


class Substitute(TorchFunctionMode):
    """Replaces tensors by others in everything that is computed inside of it.

    A replayed f must see a closed-over, non-leaf tensor as the end of its graph: the rest of that graph belongs to the
    outer backward pass, and running through it here would count it twice.
    """

    def __init__(self, pairs):
        super().__init__()
        self._new = {id(old): new for old, new in pairs}
        self._old = [old for old, _ in pairs]

    def __torch_function__(self, func, types, args=(), kwargs=None):
        def swap(leaf):
            return self._new.get(id(leaf), leaf) if isinstance(leaf, Tensor) else leaf

        return func(*pytree.tree_map(swap, args), **pytree.tree_map(swap, kwargs or {}))


class Restricted:
    """An f whose gradients reach only some of the tensors that it uses.

    Args:
        f: the vector field. wanted: the tensors, beside those that it is called with.
    """

    def __init__(self, f, wanted: Sequence[Tensor]):
        self.f, self.wanted = f, list(wanted)

    def __call__(self, *arguments):
        """What f returns."""
        with _Only([*self.wanted, *pytree.tree_leaves(arguments)]):
            return self.f(*arguments)


class _Only(TorchFunctionMode):
    """Cuts the gradient of every tensor that comes from outside, but of those named."""

    def __init__(self, allowed: list[Tensor]):
        super().__init__()
        self._inside = {id(x): x for x in allowed}  # keeps what is made alive, so that ids stay unique

    def __torch_function__(self, func, types, args=(), kwargs=None):
        def cut(leaf):
            inside = not isinstance(leaf, Tensor) or id(leaf) in self._inside
            return leaf if inside or not leaf.requires_grad else leaf.detach()

        with torch._C.DisableTorchFunction():  # whoever watches what f uses must not see this use
            args, kwargs = pytree.tree_map(cut, (args, kwargs or {}))
        out = func(*args, **kwargs)
        self._inside.update((id(x), x) for x in pytree.tree_leaves(out) if isinstance(x, Tensor))
        return out


def reachable(f) -> list[Tensor]:
    """Tensors wanting gradients that f can get at, without running it."""
    return list({id(x): x for x in _reach(f)[0] if x.requires_grad}.values())


def _reach(f) -> tuple[list[Tensor], list[nn.Module]]:
    """The tensors and the Modules that f is, closes over, is bound to, names as globals, or has in attributes.

    Objects are looked through to any depth, but for types, (Python) modules, and what belongs to torch or to the
    standard library. Of what the attributes of a Module lead to, only leaves count: computed ones may be left over from
    an earlier call.
    """
    tensors, modules = [], []
    seen = {}  # what was looked through, and whether computed tensors in it counted; keeps it, so that ids stay unique
    todo = [(f, True)]
    while todo:
        x, computed = todo.pop()
        if type(x) in _PLAIN or (id(x) in seen and seen[id(x)][1] >= computed):
            continue
        if isinstance(x, Restricted):
            todo.extend((y, True) for y in x.wanted)
            continue
        if isinstance(x, Tensor):
            if computed or x.is_leaf:
                tensors.append(x)
        elif isinstance(x, nn.Module):
            if id(x) in seen:
                continue
            computed = True
            modules.append(x)
            # A functional call lends it computed tensors as parameters.
            tensors.extend(p for p in x._parameters.values() if p is not None)
            todo.extend((y, False) for y in _attributes_of_module(x))
            todo.extend((y, True) for y in x._modules.values())
        else:
            todo.extend((y, computed) for y in _contents(x))
        seen[id(x)] = x, computed
    return tensors, modules


_PLAIN = {int, float, complex, bool, str, bytes, type(None), type, types.ModuleType, types.BuiltinFunctionType}
_PLAIN |= {torch.dtype, torch.device, torch.Size, range, slice}

_OF_MODULES = frozenset(vars(nn.Module()))  # the attributes that every Module has
_OPEN = ("types", "argparse", "collections", "functools")  # of the standard library: what configurations are made of


def _attributes_of_module(module: nn.Module) -> list:
    """What a Module has beside parameters and Modules, and what its hooks are."""
    found = [value for name, value in vars(module).items() if name not in _OF_MODULES and type(value) not in _PLAIN]
    for more in (module._buffers, module._forward_hooks, module._forward_pre_hooks):
        if more:
            found.extend(more.values())
    return found


def _contents(x) -> list:
    """What a Python object that is neither a tensor nor a Module leads to."""
    if isinstance(x, types.FunctionType):
        found = [cell.cell_contents for cell in x.__closure__ or () if _filled(cell)]
        found += [*(x.__defaults__ or ()), *(x.__kwdefaults__ or {}).values(), *vars(x).values()]
        if _opaque(x):
            return found
        return found + [x.__globals__[name] for name in _names(x.__code__) if name in x.__globals__]
    if isinstance(x, types.MethodType):
        return [x.__func__, x.__self__]
    found = []
    if isinstance(x, functools.partial):
        found = [x.func, *x.args, *x.keywords.values()]
    elif isinstance(x, list | tuple | set | frozenset | collections.deque):
        found = list(x)
    elif isinstance(x, dict | types.MappingProxyType):
        found = list(x.values())
    kind = type(x)
    if isinstance(x, type) or _opaque(kind):
        return found
    with contextlib.suppress(AttributeError):
        found.extend(object.__getattribute__(x, "__dict__").values())  # whatever __getattr__ its class may have
    for cls in kind.__mro__:
        if "__slots__" in vars(cls):
            for slot in vars(cls).values():
                if isinstance(slot, types.MemberDescriptorType):
                    with contextlib.suppress(AttributeError):
                        found.append(slot.__get__(x, kind))
    return found


def _opaque(x) -> bool:
    """Whether a class or function belongs to torch or to the standard library, whose insides hold nothing of f's."""
    path = getattr(x, "__module__", None)
    if not isinstance(path, str):
        return False
    package = path.partition(".")[0]
    if package == "torch":
        return not path.startswith("torch.distributions")
    return package in sys.stdlib_module_names and package not in _OPEN


def _names(code: types.CodeType) -> list[str]:
    """The names that a function, and the functions made inside of it, may look up as globals."""
    found = [*code.co_names]
    for x in code.co_consts:
        if isinstance(x, types.CodeType):
            found += _names(x)
    return found


def _filled(cell) -> bool:
    try:
        cell.cell_contents  # noqa: B018  (an empty cell raises)
    except ValueError:
        return False
    return True


def _known_independent(f, joint: bool) -> bool:
    try:
        found = _INDEPENDENT.get(f, ())
        return (_modes(f), False) in found or (joint and (_modes(f), True) in found)
    except TypeError:  # not hashable or not weakly referenceable: checked at every solve
        return False


def _remember_independent(f, joint: bool):
    """Under joint control, where all samples have one time, it is not known whether f mixes times."""
    with contextlib.suppress(TypeError):
        _INDEPENDENT.setdefault(f, set()).add((_modes(f), joint))


def modules(f) -> list[nn.Module]:
    """The Modules that f can get at, without running it."""
    return _reach(f)[1]


def _modes(f) -> tuple[tuple[type, bool], ...]:
    """The modules that f can reach, and which are in training mode: batch normalization mixes samples only then."""
    return tuple((type(m), m.training) for m in _reach(f)[1])


def _differ(a: Tensor, b: Tensor, tolerance: float) -> bool:
    """Whether two derivatives differ by more than a part of the sample's largest; NaN in both is no difference.

    Nor is the same infinity.
    """
    change = torch.where((a == b) | (a.isnan() & b.isnan()), torch.zeros_like(a), a - b).abs().amax(dim=1)
    # Sample by sample: beside one with large derivatives, a difference in the others must not look small.
    scale = torch.where(b.isfinite(), b, torch.zeros_like(b)).abs().amax(dim=1)
    return not bool(transforms.physical(change <= tolerance * scale).all())


def _rounding(dtype: torch.dtype) -> float:
    # float32 products may run in TF32, whose rounding is that of float16.
    return {torch.float64: 1e-9, torch.complex128: 1e-9, torch.float32: 5e-3, torch.complex64: 5e-3}.get(dtype, 5e-2)


def _autocast_state(device: torch.device) -> torch.dtype | None:
    if torch.is_autocast_enabled(device.type):
        return torch.get_autocast_dtype(device.type)
    return None


def _generator_states(device: torch.device) -> list[Tensor]:
    states = [torch.get_rng_state()]
    if device.type == "cuda":
        states.append(torch.cuda.get_rng_state(device))
    return states


@contextlib.contextmanager
def _generators(states: list[Tensor], device: torch.device):
    """Runs with the random generators in the given states, and leaves them afterwards as they were."""
    saved = _generator_states(device)
    _set_generators(states, device)
    try:
        yield
    finally:
        _set_generators(saved, device)


def again(device: torch.device):
    """What is drawn in here is drawn once more after it."""
    return _generators(_generator_states(device), device)


def _set_generators(states: list[Tensor], device: torch.device):
    torch.set_rng_state(states[0])
    if device.type == "cuda":
        torch.cuda.set_rng_state(states[1], device)
