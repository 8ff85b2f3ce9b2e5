"""Programs: traced functions with loops in them that Inductor compiles, and what they may be given."""

from __future__ import annotations

import functools
import inspect
import itertools
import re
import types
import warnings
import weakref
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ..equations import Autonomous, Coefficients
from ..field import modules
from ..problem import Problem
from . import decompositions, hoisting


class Unsupported(Exception):
    """Why a solve is not compiled."""


def warn(f, cause: Exception):
    """Says why a solve of f is not compiled, once for every cause."""
    told = known(_TOLD, f, set)
    if str(cause) not in told:
        told.add(str(cause))
        warnings.warn(f"compile=True has no effect: {cause}; this runs as without it", UserWarning, stacklevel=7)


_TOLD: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()


def known(memory: weakref.WeakKeyDictionary, f, make: Callable):
    """What is remembered of f: of a function's code, so that a lambda made anew for every solve is compiled once.

    Of an SDE, which may be made anew as well, it is remembered for its drift, or for the Module whose method that is.
    """
    try:
        return memory.setdefault(anchor(f.drift if isinstance(f, Coefficients) else f), make())
    except TypeError:  # can't be referred to weakly
        return make()


def whose(f: Callable):
    """What a coefficient of an SDE is, or is a method of."""
    f = f.f if isinstance(f, Autonomous) else f
    return f.__self__ if isinstance(f, types.MethodType) else f


def anchor(f: Callable):
    """What lives as long as f does, and is the same for an f made anew."""
    f = whose(f)
    return f.__code__ if isinstance(f, types.FunctionType) else f


def while_loop(more: Callable, step: Callable, carried: tuple):
    """Traced: torch's, imported where it is used, for it brings Dynamo."""
    from torch._higher_order_ops.while_loop import while_loop

    return while_loop(more, step, carried)


def overwriting_loop(more: Callable, step: Callable, carried: tuple, buffers):
    """Traced: as `while_loop`, of a step that is given the buffers first and may overwrite tensors in them.

    Args:
        buffers: a structure of tensors (and None).
    """
    if _overwrites:
        return while_loop(more, functools.partial(step, buffers), carried)
    # Here the buffers go through the loop, which copies them at every turn.
    leaves, tree = pytree.tree_flatten(buffers)
    count = len(carried)

    def turn(*given):
        own = [x.clone() for x in given[count:]]
        return *step(pytree.tree_unflatten(own, tree), *given[:count]), *own

    found = while_loop(lambda *given: more(*given[:count]), turn, (*carried, *(x.clone() for x in leaves)))
    for x, new in zip(leaves, found[count:], strict=True):
        x.copy_(new)
    return found[:count]


@functools.cache
def may_overwrite() -> bool:
    """Whether a `while_loop` may change other tensors than those that it carries: torch's older ones may not."""
    from torch._higher_order_ops.while_loop import while_loop_op

    return "mutated_arg_indices" in inspect.signature(type(while_loop_op).__call__).parameters


_overwrites: bool | None = None  # as that function says, once a program is made
_NUMBERS = itertools.count()


def program(function: Callable, hoisted: bool = False, fixed: bool = False) -> Callable:
    """The function, compiled at its first call.

    Args:
        function: traced. hoisted: whether what never changes in its loops is computed before them.
        fixed: whether all that it holds beside its arguments stays what it is: Dynamo then need not look at every call.

    Dynamo remembers its work by code objects. Every program has one of its own, so that no two take each other for a
    variant of themselves.
    """
    number = next(_NUMBERS)

    @functools.cache
    def made():
        global _overwrites
        _overwrites = may_overwrite()

        neuralde_own = function  # what `_kept_guards` knows by its name

        def program(*arguments):
            return neuralde_own(*arguments)

        own = program.__code__.replace(co_name=f"neuralde_{number}")
        program = types.FunctionType(own, program.__globals__, own.co_name, None, program.__closure__)
        options = {"guard_filter_fn": _kept_guards} if fixed and _filters() else None
        backend = functools.partial(_inductor, hoisted=hoisted)
        return torch.compile(program, fullgraph=True, backend=backend, options=options)

    special = False

    def call(*arguments):
        nonlocal special
        if not special:
            try:
                return made()(*arguments)
            except Exception as error:
                if not _of_the_compiler(error):
                    raise
                # It may be a number of f's that has changed: Dynamo makes a symbol of its second value, which no loop
                # takes. The program has not begun.
                special = True
        with torch._dynamo.config.patch(specialize_float=True):
            return made()(*arguments)

    return call


def _filters() -> bool:
    """Whether Dynamo lets itself be told which guards to keep: from torch 2.8 on."""
    return hasattr(torch._dynamo.types, "GuardFilterEntry")


# Names in guards: of what `program` closes over; of modules, as Dynamo imports them; of Python's own.
_OURS = re.compile(r"neuralde_own|__import_(neuralde|torch)_dot_|__import__\('torch'\)|__builtins_dict__")

_GLOBAL = re.compile(r"G\['(?!__)(\w+)'\]")  # under names with two underscores Dynamo has what others see


def _kept_guards(guards: Sequence) -> list[bool]:
    """Which of its guards a program keeps: those on what it is given, f among it, and on what f's module holds.

    Those on the engine (a tableau has a hundred numbers) and on what neuralde and torch are made of take longer than
    the rest of a call. Whether f has hooks is looked at before every solve.
    """
    return [not (_OURS.search(x.name) or _of_this_module(x) or "HOOKS_DICT" in x.guard_type) for x in guards]


def _of_this_module(guard) -> bool:
    """Whether it is on a global variable of this module, which `program` sees, and not on one that f does."""
    found = _GLOBAL.match(guard.name)
    return found is not None and found[1] in globals()


def _of_the_compiler(error: Exception) -> bool:
    """Whether it was raised in the making of a program, and not by one."""
    from torch._dynamo.exc import TorchDynamoException

    return isinstance(error, TorchDynamoException)


def _inductor(graph: torch.fx.GraphModule, inputs: Sequence[Tensor], hoisted: bool) -> Callable:
    from torch._inductor.compile_fx import compile_fx

    # What is used twice is a tensor of its own: the slopes are, in every later stage.
    options = {"cpp_wrapper": True, "realize_reads_threshold": 0, **_kept_between_processes()}
    if hoisted:
        options["joint_custom_pre_pass"] = hoisting.as_pass()
    with warnings.catch_warnings():
        # What Inductor itself calls that torch is about to drop.
        warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\._inductor")
        return compile_fx(graph, inputs, config_patches=options, decompositions=decompositions.table())


def _kept_between_processes() -> dict:
    """Options under which Inductor's cache on disk takes programs with a `while_loop` or a `cond` in them.

    It skips them otherwise. Its key has the code of a graph and of the graphs inside of it, the loop's among them, with
    all constants.
    """
    from torch._higher_order_ops.cond import cond_op
    from torch._higher_order_ops.while_loop import while_loop_op

    option = "unsafe_marked_cacheable_functions"
    if option not in torch._inductor.list_options():
        return {}
    made_by = f"{torch.__version__} {decompositions.version()}"  # which is in the key as well
    return {option: {f"{op.__module__}.{op.__name__}": made_by for op in (while_loop_op, cond_op)}}


@functools.lru_cache(maxsize=256)
def constant(name: str, value: float, dtype: torch.dtype = torch.int64) -> Tensor:
    """A number as programs are given it, which make no other program of another number. Nobody may change it.

    Args:
        name: what it is: two arguments of a program that were one tensor would be one to it from then on.
    """
    with torch.inference_mode(False):  # it outlives what is around the solve
        return torch.tensor(value, dtype=dtype, device="cpu")


def first_line(error: Exception) -> str:
    """What the compiler's error comes down to."""
    if "RecompileLimit" in type(error).__name__:
        return (
            "it was compiled for many values of something that f uses; a number that changes, such as an attribute of "
            "a Module, is better a tensor (register_buffer), or given in args"
        )
    text = [line.strip() for line in str(error).splitlines() if line.strip()]
    said = " ".join(text[:2])[:300]
    return f"the compiler failed with {type(error).__name__}" + (f": {said}" if said else "")


def leaves_of(args) -> list:
    """The tensors in args."""
    return [] if args is None else pytree.tree_leaves(args)


def hooked(m: nn.Module) -> bool:
    """Whether something is called around the Module's own calls: Dynamo would not notice a change."""
    return bool(m._forward_hooks or m._forward_pre_hooks or m._backward_hooks or m._backward_pre_hooks)


def any_hooked() -> bool:
    """Whether something is called around those of every Module."""
    m = nn.modules.module
    return bool(
        m._global_forward_hooks
        or m._global_forward_pre_hooks
        or m._global_backward_hooks
        or m._global_backward_pre_hooks
    )


class Holder(nn.Module):
    """A function with the Modules that it uses, whose parameters can be lent to it."""

    def __init__(self, f: Callable, used: Sequence[nn.Module]):
        super().__init__()
        self.f, self.used = f, nn.ModuleList(used)

    def forward(self, *arguments):
        """See `f`."""
        return self.f(*arguments)


def lend(holder: nn.Module, lent: dict[str, Tensor], *arguments):
    """Calls the Module with these tensors in place of its parameters of these names."""
    return torch.func.functional_call(holder, lent, arguments)


class Lent(NamedTuple):
    """What wants a gradient beside z0, and how a program is given it.

    Attributes:
        holder: a Module that calls f. names: of its parameters that want a gradient. wanted: which leaves of args do.
        tensors: these parameters and leaves.
    """

    holder: nn.Module
    names: tuple[str, ...]
    wanted: tuple[int, ...]
    tensors: tuple[Tensor, ...]

    @staticmethod
    def holder_of(f: Callable) -> nn.Module:
        """f itself, or a Module that has those in it that f uses."""
        return f if isinstance(f, nn.Module) else Holder(f, modules(f))

    @classmethod
    def of(cls, problem: Problem, tensors: Sequence[Tensor]) -> Lent:
        """Finds the tensors in f's parameters and in args.

        Raises:
            Unsupported: one of them is elsewhere.
        """
        f = problem.field.equation.f
        holder = cls.holder_of(f)
        own = {id(p): name for name, p in holder.named_parameters()}
        given = {id(x): i for i, x in enumerate(leaves_of(problem.field.args))}
        names = [own[id(x)] for x in tensors if id(x) in own]
        wanted = [given[id(x)] for x in tensors if id(x) in given and id(x) not in own]
        for x in tensors:
            if id(x) not in own and id(x) not in given:
                raise Unsupported(
                    f"f closes over a tensor of shape {tuple(x.shape)} that wants a gradient and is no parameter of a "
                    "Module; pass it through args"
                )
        order = [x for x in tensors if id(x) in own] + [x for x in tensors if id(x) in given and id(x) not in own]
        return cls(holder, tuple(names), tuple(wanted), tuple(order))
