"""The loop and its backward pass as compiled programs: `solve(compile=True)`.

Attempts, the error test and the choice of the next step are one program: a `while_loop` that writes down what it does,
so that Python is asked again only when its log is full. The gradient is that of "checkpointed": a second program goes
through the log, from the last attempt to the first, with the vector-Jacobian product of one step. Inductor compiles
both, with its C++ wrapper.

What may change between solves enters as tensors: states, times, tolerances, parameters, args. What can't be compiled is
solved as ever, with one warning that says why. So is a solve that fails: the loop in Python says what went wrong.
"""

from __future__ import annotations

import functools
import itertools
import types
import warnings
import weakref
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from . import algebra, transforms
from . import control as _control
from .control import Norm
from .dense import Dense, Stages
from .discover import LEAST, resolution
from .field import Entering, Field, modules, reachable
from .grid import Record
from .problem import Problem
from .solvers import Step
from .solvers.runge_kutta import RungeKutta
from .trajectory import Counts, Trajectory

_M = algebra.TENSORS
_LOG, _LONGEST = 1 << 16, 64  # bytes of states in a log, which is copied at every attempt; attempts in it


class Unsupported(Exception):
    """Why a solve is not compiled."""


def engine(problem: Problem) -> Engine | None:
    """What solves the problem compiled; None, after a warning, where it has to be solved as ever."""
    f = problem.field.equation.f
    try:
        _require_supported(problem)
        found = _engine(f, problem)
        if found.broken is not None:
            raise found.broken
        return found
    except Unsupported as cause:
        warn(f, cause)
        return None


def warn(f, cause: Exception):
    """Says why a solve of f is not compiled, once for every cause."""
    told = _known(_TOLD, f, set)
    if str(cause) not in told:
        told.add(str(cause))
        warnings.warn(f"compile=True has no effect: {cause}; this runs as without it", UserWarning, stacklevel=7)


_TOLD: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()
_ENGINES: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()


def _known(memory: weakref.WeakKeyDictionary, f, make: Callable):
    """What is remembered of f: of a function's code, so that a lambda made anew for every solve is compiled once."""
    try:
        return memory.setdefault(f.__code__ if isinstance(f, types.FunctionType) else f, make())
    except TypeError:  # can't be referred to weakly
        return make()


def _require_supported(problem: Problem):
    """Raises Unsupported."""
    field, solver, layout = problem.field, problem.solver, problem.field.layout
    f = field.equation.f
    for unsupported, cause in (
        (
            not isinstance(f, nn.Module | types.FunctionType),
            f"f is a {type(f).__name__}, and only nn.Modules and functions are known again",
        ),
        (layout.device.type != "cpu", f"on {layout.device.type} nothing is compiled yet"),
        (transforms.active(), "a transform of torch.func or forward mode is around the solve"),
        (not isinstance(solver, RungeKutta), f"solver {solver.name!r} is not an explicit Runge-Kutta method"),
        (layout.dtype not in (torch.float32, torch.float64), f"states of {layout.dtype} are not compiled"),
        (field.autocast, "autocast is on"),
        (problem.watch is not None, "it has events"),
        (problem.stops is not None, "it has jump_times or step_times"),
        (problem.observer is not None, "it has an observer"),
        (problem.keep is not None, "the adjoint has checkpoints=k"),
        ((problem.dt_min, problem.dt_max) != (None, None), "it has dt_min or dt_max"),
        (not problem.norm.plain, "a tolerance per component or a norm of its own is not compiled"),
    ):
        if unsupported:
            raise Unsupported(cause)


def _engine(f, problem: Problem) -> Engine:
    field, layout = problem.field, problem.field.layout
    leaves, tree = _leaves(field.args), pytree.tree_structure(field.args)
    if not all(isinstance(x, Tensor) for x in leaves):
        raise Unsupported("args holds something other than tensors")
    used = list(f.modules()) if isinstance(f, nn.Module) else modules(f)
    if any(hooks for m in used for hooks in _hooks(m)) or any(_hooks(torch.nn.modules.module, "_global")):
        raise Unsupported("a Module has hooks")
    own = {id(p) for m in used for p in m.parameters()} if leaves else set()
    if len({id(x) for x in leaves}) < len(leaves) or any(id(x) in own for x in leaves):
        raise Unsupported("a tensor is in args twice, or is a parameter of f as well")
    training = tuple(m.training for m in used)
    key = (
        training, field.equation.takes_time, layout.tree, layout.shapes, layout.dtype, problem.control, problem.solver,
        problem.dt0 is None, _closes(problem), tree, len(leaves),
    )  # fmt: skip
    engines = _known(_ENGINES, f, dict)
    if key not in engines:
        engines[key] = Engine(problem, tree)
    return engines[key]


def _hooks(where, prefix: str = "") -> list:
    """What is called around Modules: Dynamo would not notice a change."""
    names = ("forward_hooks", "forward_pre_hooks", "backward_hooks", "backward_pre_hooks")
    return [getattr(where, f"{prefix}_{name}", None) for name in names]


def _closes(problem: Problem) -> bool:
    """Whether the stages are wanted, for what is between the steps."""
    return problem.interior is not None or problem.keep_stages


def _leaves(args) -> list:
    return [] if args is None else pytree.tree_leaves(args)


class Log(NamedTuple):
    """What a program writes down of its attempts: [attempts, ...].

    Attributes:
        s, h, end: where they started, their size, where they ended, [groups]; times run forward.
        ok: which were accepted, [groups]. figures: of `control.Judge`, [1 to 3, groups]; 0 where nothing is reported.
        z: where they started, [batch, features].
        stages: a closed step's snapshot, [rows, batch, features]; None where they are not wanted.
    """

    s: Tensor
    h: Tensor
    end: Tensor
    ok: Tensor
    figures: Tensor
    z: Tensor
    stages: Tensor | None = None

    def given(self) -> list[Tensor]:
        """The tensors that are there."""
        return [x for x in self if x is not None]


class _Stand(NamedTuple):
    """Where the samples stand: all [groups], but for z and slope, [batch, features]."""

    s: Tensor
    h: Tensor
    z: Tensor
    slope: Tensor
    previous: Tensor
    live: Tensor
    failed: Tensor
    accepted: Tensor
    rejected: Tensor


class _VectorField:
    """f as a traced step calls it: no counting, no checks."""

    def __init__(self, field: Field, f: Callable, args):
        self.field, self.f, self.args = field, f, args

    def times(self, t: Tensor, c: Tensor | None = None, dt: Tensor | None = None) -> Sequence[Tensor | None]:
        """See `Field.times`."""
        return self.field.times(t, c, dt)

    def __call__(self, t: Tensor | None, z: Tensor) -> Tensor:
        """dz/dt, [batch, features]."""
        return self.field.pure(self.f, t, z, self.args)


class _Holder(nn.Module):
    """A function with the Modules that it uses, whose parameters can be lent to it."""

    def __init__(self, f: Callable, used: Sequence[nn.Module]):
        super().__init__()
        self.f, self.used = f, nn.ModuleList(used)

    def forward(self, *arguments):
        return self.f(*arguments)


class Engine:
    """The programs of one f, solver, control and kind of state, and what they are given.

    Args:
        problem: the first one to be solved. tree: of its args.

    Attributes:
        broken: why the programs can't be made, once that is known.
    """

    def __init__(self, problem: Problem, tree: pytree.TreeSpec):
        self.broken: Unsupported | None = None
        self._field = problem.field.signature()
        like = problem.start.new_zeros(1, dtype=problem.field.layout.work_dtype)
        self._solver = problem.solver.bound(like, problem.start)
        self._control, self._tree, self._joint = problem.control, tree, problem.joint
        self._closed = _closes(problem)
        self._sloped = self._closed or self._solver.fsal  # whether a step gets its first slope from the one before
        self._checked = self._known = False
        self._begin, self._continue = _program(self._beginning), _program(self._loop)
        self._back: dict[tuple, Callable] = {}

    def tensors(self, problem: Problem) -> list[Tensor] | None:
        """What wants a gradient beside z0: f's parameters and args. None if there may be other tensors."""
        f = problem.field.equation.f
        if not self._known:
            return None
        found = reachable(f)
        own = {id(p) for p in Lent.holder_of(f).parameters()}
        if any(id(x) not in own for x in found):
            return None
        return [*(x for x in _leaves(problem.field.args) if x.requires_grad), *found]

    def learn(self, problem: Problem, z0: Tensor, tensors: list[Tensor]) -> list[Tensor] | None:
        """Takes in what a full look at f found: the same; or None, after a warning, if it can't be compiled."""
        f, field = problem.field.equation.f, problem.field
        try:
            Lent.of(problem, tensors)
        except Unsupported as cause:
            self._give_up(problem, cause)
            return None
        if isinstance(f, nn.Module):
            # Another tensor may want a gradient one day, and no inspection may find it: then a full look is needed.
            seen, (t,) = Entering(constants=True), field.times(problem.start)
            with torch.no_grad(), seen:
                field(t, z0)
            own = [z0, t, *f.parameters(), *f.buffers(), *_leaves(field.args)]
            self._known = not seen.foreign.keys() - {id(x) for x in own}
        return tensors

    # -- forwards ------------------------------------------------------------------------------------------------------

    def discover(self, problem: Problem, z0: Tensor) -> Ran | None:
        """Solves; None where the solve fails, or where it has to be made as ever (after a warning)."""
        try:
            return self._discover(problem, z0.detach())
        except Unsupported as cause:
            self._give_up(problem, cause)
        except Exception as error:  # whatever the compiler says of f
            self._give_up(problem, Unsupported(_first_line(error)))
        return None

    def _give_up(self, problem: Problem, cause: Unsupported):
        self.broken = cause
        warn(problem.field.equation.f, cause)

    @torch.no_grad()
    def _discover(self, problem: Problem, z0: Tensor) -> Ran | None:
        field, budget = problem.field, problem.max_steps
        if not self._checked:
            field.first(problem.start, z0, problem.end)
            if field.random:
                raise Unsupported("f draws random numbers")
            self._checked = True
        leaves, tolerances = _leaves(field.args), self._tolerances(problem, z0)
        most = max(2, min(_LONGEST, _LOG // ((1 + self._stages) * z0.numel() * z0.element_size())))
        limit = torch.tensor(min(most, budget))
        h = None if problem.dt0 is None else torch.full_like(problem.start, problem.dt0)
        f = field.equation.f
        log = self._empty(most, z0, problem.start)
        count, *found = self._begin(f, leaves, z0, problem.start, problem.end, *tolerances, h, limit, *log.given())
        logs = []
        while True:
            stand, log = _Stand(*found[:9]), Log(*found[9:])
            made, live, failed = torch.stack([count, stand.live.any(), stand.failed.any()]).tolist()
            logs.append((made, log))
            budget -= made
            if failed or (live and not budget):
                return None
            if not live:
                break
            limit = torch.tensor(min(most, budget))
            count, *found = self._continue(
                f, leaves, problem.start, problem.end, *tolerances, limit, *stand,
                *self._empty(most, z0, problem.start).given(),
            )  # fmt: skip
        extra = (h is None) + (h is None or self._sloped)
        field.calls += sum(made for made, _ in logs) * self._solver.calls_per_step + extra
        return Ran(problem, z0, stand, logs, extra)

    @property
    def _stages(self) -> int:
        """How many rows a step's snapshot has, 0 where it is not wanted."""
        return self._closed and 2 + self._solver.calls_per_step

    @staticmethod
    def _tolerances(problem: Problem, z: Tensor) -> tuple[Tensor, Tensor]:
        return tuple(torch.full((1, 1), x, dtype=z.dtype) for x in (problem.norm.rtol, problem.norm.atol))

    def _empty(self, most: int, z0: Tensor, t: Tensor) -> Log:
        groups, solver = t.shape[0], self._solver
        figures = max(1, (solver.error_order is not None) + 2 * solver.reports_stiffness)
        s, h, end = (t.new_empty(most, groups) for _ in range(3))
        ok, figures = t.new_empty(most, groups, dtype=torch.bool), t.new_empty(most, figures, groups)
        stages = z0.new_empty(most, self._stages, *z0.shape) if self._closed else None
        return Log(s, h, end, ok, figures, z0.new_empty(most, *z0.shape), stages)

    def _beginning(self, f, leaves, z0, t, t1, rtol, atol, h, limit, *log):
        """Traced: the slope at the start, the first step size, and the first attempts."""
        vector_field, norm = self._of(f, leaves), Norm(rtol, atol, self._joint)
        slope = vector_field(vector_field.times(t)[0], z0) if self._sloped or h is None else torch.zeros_like(z0)
        if h is None:
            h = _control.initial_step(vector_field, t, z0, slope, t1 - t, self._solver.order, norm, _M)
        s, live = t * _direction(t, t1), torch.ones_like(t, dtype=torch.bool)
        none, memory = torch.zeros_like(t, dtype=torch.int64), self._control.first_memory(t, _M)
        stand = _Stand(s, h, z0, slope, memory, live, ~live, none, none)
        return self._loop(f, leaves, t, t1, rtol, atol, limit, *(x.clone() for x in stand), *log)

    def _loop(self, f, leaves, t, t1, rtol, atol, limit, *carried):
        """Traced: attempts until all samples are at their ends, or as many as the log holds."""
        vector_field, norm = self._of(f, leaves), Norm(rtol, atol, self._joint)
        solver, control = self._solver, self._control
        exponents = control.exponents(solver.order, solver.exponents) if control.adaptive else None
        direction = _direction(t, t1)
        s0, s1 = t * direction, t1 * direction

        def more(made, *carried):
            return (made < limit) & _Stand(*carried[:9]).live.any()

        def attempt(made, *carried):
            at, log = _Stand(*carried[:9]), Log(*carried[9:])
            left = s1 - at.s
            # As in `discover`: steps that are chosen share what is left with the last one, fixed ones are counted.
            last = (at.h if control.adaptive else at.h * 1.001) >= left
            h = torch.where(last, left, torch.minimum(at.h, 0.5 * left) if control.adaptive else at.h)
            end = torch.where(last, s1, at.s + h if control.adaptive else s0 + (at.accepted + 1) * at.h)
            slope, memory = at.slope if self._sloped else None, solver.memory(at.z, True)
            step = solver.attempt(
                vector_field, at.s * direction, h * direction, at.z, slope, memory, close=self._closed
            )
            figures = self._figures(norm, step, at.z)
            if control.adaptive:
                ratio = _M.known(figures[0])
                ok = at.live & (ratio <= 1.0)
                planned = h * control.factor(ratio, at.previous, ok, exponents, _M)
                previous = control.remember(ratio, at.previous, ok, _M)
            else:
                ok = at.live & (step.z.sum()[None] if self._joint else step.z.sum(dim=1)).isfinite()
                planned, previous = at.h, at.previous
            column, s = ok[:, None], torch.where(ok, end, at.s)
            hopeless = planned <= torch.maximum(s.abs() * resolution(s), (s1 - s0) * LEAST) if control.adaptive else ~ok
            hopeless = at.live & ~(ok & last) & hopeless
            stand = _Stand(
                s=s,
                h=planned.clone(),
                z=torch.where(column, step.z, at.z),
                slope=torch.where(column, step.slope_end, at.slope) if self._sloped else at.slope.clone(),
                previous=previous.clone(),
                live=at.live & ~(ok & last) & ~hopeless,
                failed=at.failed | hopeless,
                accepted=at.accepted + ok,
                rejected=at.rejected + (at.live & ~ok),
            )
            row = made.reshape(1)
            now = Log(at.s, h, end, ok, figures, at.z, solver.snapshot(step.stages) if self._closed else None)
            logged = zip(log.given(), now.given(), strict=True)
            return made + 1, *stand, *(x.index_copy(0, row, new[None]) for x, new in logged)

        return _while_loop(more, attempt, (torch.zeros((), dtype=torch.int64), *carried))

    def _figures(self, norm: Norm, step: Step, z: Tensor) -> Tensor:
        """Traced: what a `Judge` says of a step from z, [1 to 3, groups]."""
        figures = [] if step.error is None else [norm.ratio(step.error, z, step.z)]
        if step.pair is not None:
            slope_x, slope_y, x, y = step.pair
            figures += [_control.rms(slope_x - slope_y, self._joint), _control.rms(x - y, self._joint)]
        return torch.stack(figures or [z.new_zeros(1 if self._joint else len(z))])

    def _of(self, f, leaves) -> _VectorField:
        return _VectorField(self._field, f, pytree.tree_unflatten(leaves, self._tree) if leaves else None)

    # -- backwards -----------------------------------------------------------------------------------------------------

    def backward(
        self,
        ran: Ran,
        tensors: Sequence[Tensor],
        final: Tensor | None,
        interior: Tensor | None,
        figures: Tensor | None,
        states: Tensor | None,
    ) -> tuple[list[Tensor | None], float] | None:
        """The gradients; None where they have to be made as ever (after a warning).

        Args:
            ran: the solve. tensors: what wants a gradient beside z0.
            final, interior: the loss's gradient, [batch, features] and [points, batch, features].
            figures: that of `Ran.figures`. states: that of the steps' starts, [all accepted, features].
                Each may be None.

        Returns:
            Those of z0 and of the tensors; and by how much the last step, made again, was off.

        Raises:
            Unsupported: f is not what it was; one of the tensors is not there any more.
        """
        uses = Lent.of(ran.problem, tensors)
        try:
            (costate, *sums), off = self._gradients(ran, uses, final, figures, ran.marks(interior, states))
        except Exception as error:  # whatever the compiler says of f
            self._give_up(ran.problem, Unsupported(_first_line(error)))
        else:
            found = {id(x): gradient for x, gradient in zip(uses.tensors, sums, strict=True)}
            return [costate, *(found[id(x)] for x in tensors)], float(off)
        return None

    @torch.no_grad()
    def _gradients(self, ran: Ran, uses: Lent, final: Tensor | None, figures: Tensor | None, marks: Tensor | None):
        problem = ran.problem
        kind = uses.names, uses.wanted, figures is not None, 0 if marks is None else marks.shape[1]
        if kind not in self._back:
            self._back[kind] = _program(functools.partial(self._backwards, *kind))
        program = self._back[kind]
        costate = torch.zeros_like(ran.final) if final is None else final
        sums, off = [torch.zeros_like(x) for x in uses.tensors], costate.new_zeros(())
        leaves, tolerances = _leaves(problem.field.args), self._tolerances(problem, costate)
        leaves, own = [x.detach() for x in leaves], [x.detach() for x in uses.tensors]
        end = len(ran.logs) * len(ran.logs[0][1].s)
        for made, log in reversed(ran.logs):
            end -= len(log.s)
            here = slice(end, end + len(log.s))
            weights, marked = (None if x is None else x[here] for x in (figures, marks))
            checked = ran.final if log is ran.logs[-1][1] else None
            costate, off, *sums = program(
                uses.holder, leaves, own, problem.start, problem.end, *tolerances, torch.tensor(made), costate, off,
                checked, weights, marked, log.s, log.h, log.ok, log.z, *sums,
            )  # fmt: skip
        return [costate, *sums], off

    def _backwards(
        self, names, wanted, lens, rows, holder, leaves, own, t, t1, rtol, atol, made, costate, off, final, weights,
        marks, s_log, h_log, ok_log, z_log, *sums,
    ):  # fmt: skip
        """Traced: the logged attempts from the last to the first. rows: how many of a snapshot have a gradient."""
        solver, norm, direction = self._solver, Norm(rtol, atol, self._joint), _direction(t, t1)

        def more(j, *carried):
            return j >= 0

        def step_back(j, costate, off, *sums):
            row = j.reshape(1)
            s, h, ok, z = (x.index_select(0, row)[0] for x in (s_log, h_log, ok_log, z_log))
            # Who was rejected makes a step of size zero, which is finite.
            t, dt, column = s * direction, torch.where(ok, h, 0.0) * direction, ok[:, None]

            def step(z, *own):
                lent, given = own[: len(names)], list(leaves)
                for i, x in zip(wanted, own[len(names) :], strict=True):
                    given[i] = x
                call = holder
                if names:
                    call = functools.partial(_lend, holder, dict(zip(names, lent, strict=True)))
                made = solver.attempt(
                    self._of(call, given), t, dt, z, None, solver.memory(z, True), lens=lens, close=rows > 1
                )
                found = [made.z]
                if lens:
                    found.append(self._figures(norm, made, z))
                if rows:
                    found.append(solver.snapshot(made.stages)[:rows])
                return tuple(found)

            (end, *_), pullback = torch.func.vjp(step, z, *own)
            cotangents = [torch.where(column, costate, 0.0)]
            if lens:
                cotangents.append(torch.where(ok, weights.index_select(0, row)[0], 0.0))
            if rows:
                cotangents.append(marks.index_select(0, row)[0])
            back, *parts = pullback(tuple(cotangents))
            if final is not None:
                now = torch.where(column & (j == made - 1), end - final, 0.0).abs().amax()
                off = torch.maximum(off, now)
            sums = [(x + y).contiguous() for x, y in zip(sums, parts, strict=True)]
            return j - 1, torch.where(column, back, costate), off.clone(), *sums

        _, *found = _while_loop(more, step_back, (made - 1, costate.clone(), off.clone(), *(x.clone() for x in sums)))
        return found


def _lend(holder: nn.Module, lent: dict[str, Tensor], *arguments):
    return torch.func.functional_call(holder, lent, arguments)


def _direction(t: Tensor, t1: Tensor) -> Tensor:
    return torch.where(t1 < t, -1.0, 1.0).to(t.dtype)


def _while_loop(more: Callable, step: Callable, carried: tuple):
    from torch._higher_order_ops.while_loop import while_loop

    return while_loop(more, step, carried)


_NUMBERS = itertools.count()


def _program(function: Callable) -> Callable:
    """The function, compiled at its first call.

    Dynamo remembers its work by code objects. Every program has one of its own, so that no two take each other for a
    variant of themselves.
    """
    number = next(_NUMBERS)

    @functools.cache
    def made():
        def program(*arguments):
            return function(*arguments)

        own = program.__code__.replace(co_name=f"neuralde_{number}")
        program = types.FunctionType(own, program.__globals__, own.co_name, None, program.__closure__)
        return torch.compile(program, fullgraph=True, options={"cpp_wrapper": True, **_kept_between_processes()})

    return lambda *arguments: made()(*arguments)


def _kept_between_processes() -> dict:
    """Options under which Inductor's cache on disk takes programs with a `while_loop` in them.

    It skips them otherwise. Its key has the code of a graph and of the graphs inside of it, the loop's among them, with
    all constants.
    """
    from torch._higher_order_ops.while_loop import while_loop_op

    option = "unsafe_marked_cacheable_functions"
    if option not in torch._inductor.list_options():
        return {}
    return {option: {f"{while_loop_op.__module__}.{while_loop_op.__name__}": torch.__version__}}


def _first_line(error: Exception) -> str:
    text = [line.strip() for line in str(error).splitlines() if line.strip()]
    said = " ".join(text[:2])[:300]
    return f"the compiler failed with {type(error).__name__}" + (f": {said}" if said else "")


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
        return f if isinstance(f, nn.Module) else _Holder(f, modules(f))

    @classmethod
    def of(cls, problem: Problem, tensors: Sequence[Tensor]) -> Lent:
        """Finds the tensors in f's parameters and in args.

        Raises:
            Unsupported: one of them is elsewhere.
        """
        f = problem.field.equation.f
        holder = cls.holder_of(f)
        own = {id(p): name for name, p in holder.named_parameters()}
        given = {id(x): i for i, x in enumerate(_leaves(problem.field.args))}
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


class Ran(Trajectory):
    """A trajectory that a program found: a success, put together from its logs.

    Attributes:
        logs: pairs (attempts made, `Log`). extra: evaluations of f beside those of the attempts.
    """

    def __init__(self, problem: Problem, z0: Tensor, stand: _Stand, logs: list[tuple[int, Log]], extra: int):
        self.problem, self.logs, self._z0, self._stand, self._extra = problem, logs, z0, stand, extra
        self.final, self.hits, self.slope = stand.z, None, None
        self.status, self.complete, self._held = torch.zeros_like(stand.accepted), True, None

    @functools.cached_property
    def reached(self) -> Tensor:  # noqa: D102
        return self.problem.end

    @functools.cached_property
    def records(self) -> list[Record]:  # noqa: D102
        direction, joint, solver = self.problem.span.sign(), self.problem.joint, self.problem.solver
        silent, found = solver.error_order is None and not solver.reports_stiffness, []
        for made, log in self.logs:
            everyone = log.ok[:made].all(dim=1).tolist()
            t, dt, end = (x[:made] * direction for x in (log.s, log.h, log.end))
            ends = end[:, 0].tolist() if joint else end
            for j in range(made):
                if everyone[j] or not joint:
                    accepted = None if everyone[j] else log.ok[j]
                    figures, stages = None if silent else log.figures[j], None if log.stages is None else log.stages[j]
                    place = t[j], dt[j], ends[j]
                    found.append(Record(0, None, accepted, *place, log.z[j], None, figures, snapshot=stages))
        return found

    @functools.cached_property
    def used(self) -> list[int]:
        """Where in the logs the attempts are that have a record."""
        long = len(self.logs[0][1].s)
        rows = [(i * long + j, log.ok[j]) for i, (made, log) in enumerate(self.logs) for j in range(made)]
        return [i for i, ok in rows if not self.problem.joint or bool(ok)]

    @functools.cached_property
    def interior(self) -> Tensor | None:  # noqa: D102
        return None if self.problem.interior is None else self._inside(Stages.of(self).snapshots)

    def _inside(self, snapshots: Tensor) -> Tensor:
        """The interior outputs from the stages of the accepted steps, [rows, all accepted, features]."""
        p = self.problem
        kept = Stages(snapshots, [len(snapshots)])
        return Dense(p, self.grid, self.grid.states, kept).at(*self.grid.locate(p.interior, p.span.sign()))

    def marks(self, interior: Tensor | None, states: Tensor | None) -> Tensor | None:
        """The gradient by the snapshots, [rows of all logs, snapshot's rows, batch, features], from those by what is
        made of them; only their first row, which is the state, from `states` alone. None without any.
        """
        marks = None if states is None else states[:, None]
        if interior is not None:
            with torch.enable_grad():
                snapshots = Stages.of(self).snapshots.requires_grad_()
                (by,) = torch.autograd.grad(self._inside(snapshots), snapshots, interior)
            marks = by.movedim(0, 1)
            if states is not None:
                marks[:, 0] += states
        if marks is None:
            return None
        batch, logged = len(self._z0), sum(len(log.s) for _, log in self.logs)
        everyone = torch.arange(batch)
        where = self.grid.gather([everyone + i * batch for i in self.used], everyone)
        spread = marks.new_zeros(logged * batch, *marks.shape[1:]).index_copy(0, where, marks)
        return spread.view(logged, batch, *marks.shape[1:]).movedim(1, 2).contiguous()

    @property
    def figures(self) -> Tensor:
        """What the programs logged of errors and stiffness, [rows of all logs, 1 to 3, groups]."""
        return self.logs[0][1].figures if len(self.logs) == 1 else torch.cat([log.figures for _, log in self.logs])

    def stand_in(self) -> Tensor:
        """What stands for the states among the outputs of an autograd function: their shape without memory."""
        taken = int(self._stand.accepted.expand(len(self._z0)).sum())
        return self.final.new_zeros(1, 1).expand(taken, self.final.shape[1])

    def reported(self, figures: Tensor, which: int) -> Tensor:
        """The error (0) or the stiffness (1) in `figures`, of accepted steps in the grid's order. Differentiable."""
        return self._of_steps(_control.reported(figures.movedim(1, 0), self._sizes, self.problem.solver)[which])

    def integral(self, figures: Tensor, name: str) -> Tensor:
        """Σ_j figure_j·|Δt_j|, [batch], of the "error" or the "stiffness" in `figures`. Differentiable."""
        value = _control.reported(figures.movedim(1, 0), self._sizes, self.problem.solver)[name == "stiffness"]
        # Rejected attempts, and rows that no attempt has filled, may hold anything.
        taken = torch.cat([(torch.arange(len(log.ok)) < made)[:, None] & log.ok for made, log in self.logs])
        return torch.where(taken, value * self._sizes, 0.0).sum(dim=0).expand(len(self._z0))

    def of_steps(self, cotangent: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        """The gradients by error and stiffness, in the grid's order, from that by `figures`; None without one."""
        if cotangent is None:
            return None, None
        solver = self.problem.solver
        error = None if solver.error_order is None else self._of_steps(cotangent[:, 0])
        if not solver.reports_stiffness:
            return error, None
        # The stiffness is the last figure but one over the last one and the step size.
        return error, self._of_steps(cotangent[:, -2] * self.figures[:, -1] * self._sizes)

    @functools.cached_property
    def _sizes(self) -> Tensor:
        return torch.cat([log.h for _, log in self.logs])

    def _of_steps(self, values: Tensor) -> Tensor:
        return self.grid.gather([values[i] for i in self.used], self.problem.start)

    @functools.cached_property
    def counts(self) -> Counts:  # noqa: D102
        solver, stand = self.problem.solver, self._stand
        nfe = (stand.accepted + stand.rejected) * solver.calls_per_step + self._extra
        none = torch.zeros_like(stand.accepted)
        every = (stand.accepted, stand.rejected, nfe.clamp(min=1), none, none, none)
        return Counts(*(x.expand(len(self._z0)) for x in every))
