"""Taylor mode: total time derivatives of a solution, from one call of f whatever their order.

f is called once, with power series in place of t and z. Every operation in it records how the next coefficient of its
result follows from its operands' (`taylor_rules.py`). Since z' = f, coefficient k of f is coefficient k + 1 of z; so
the recorded operations are gone through once per order, and each makes one coefficient more. Linear operations cost
what they cost in f, products a sum over k + 1 terms. All of it is ordinary tensor operations, so reverse mode goes
through it.

The coefficients are those of s^k/k!, the derivatives themselves: then it is products that have factors, of which few
differ from 1 at low orders, and neither the state nor linear operations do.

Source: Griewank & Walther 2008, Evaluating Derivatives, chapter 13; Bettencourt, Johnson & Duvenaud 2019, "Taylor-Mode
Automatic Differentiation for Higher-Order Derivatives in JAX"; Kelly et al. 2020, "Learning Differential Equations that
are Easy to Solve".
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

Coefficient = Tensor | None  # None is zero


class NoTaylorRule(NotImplementedError):
    """f does something that power series can't be sent through."""

    def __init__(self, what: str):
        super().__init__(
            f"f calls {what}, which has no rule in Taylor mode; take TaylorDerivative(..., mode='jvp'), whose cost "
            "doubles with every order, or add a rule to regularizers.taylor_rules.RULES"
        )


class Tape(list):
    """The series that f made, in its order; each knows its next coefficient."""

    def advance(self, k: int, only: set[int] | None = None) -> None:
        """Gives every series its coefficient k; those that f was called with must have theirs.

        Args:
            only: ids of the series that are wanted; None for all.
        """
        for series in self:
            if only is None or id(series) in only:
                series.coefficients.append(series.rule(k))

    def behind(self, out: Series) -> set[int]:
        """The ids of the series whose coefficients of an order out's coefficient of that order is made of."""
        found = {id(out)}
        for series in reversed(self):
            if id(series) in found:
                found.update(map(id, series.operands))
        return found

    def release(self) -> None:
        """Lets go of the coefficients now: series and rules refer to each other, and would wait for the collector."""
        for series in self:
            series.coefficients, series.operands, series.rule, series.rate = [], [], None, None
        self.clear()


class Series(Tensor):
    """A tensor that is a power series in time, and looks like its value: Σ_k coefficients[k]·s^k/k!.

    Attributes:
        coefficients: the first one is the value, None is zero. rule: k -> coefficient k. tape: where it is recorded.
        operands: the series that it is made of. rate: of a function of a series, its derivative by it, of which a
            coefficient needs only the ones before.

    What f asks of a tensor's shape and kind is answered here: as an operation with a rule it would take ten times as
    long, and most of a small f's time.
    """

    coefficients: list[Coefficient]
    rule: Callable[[int], Coefficient]
    tape: Tape
    operands: list[Series]
    rate: Tensor | None

    @staticmethod
    def __new__(
        cls,
        tape: Tape,
        coefficients: list[Coefficient],
        rule: Callable[[int], Coefficient] | None = None,
        operands: Sequence[Series] = (),
    ):
        """A series of f's arguments; one that f made has a rule and is recorded."""
        value = coefficients[0]
        self = Tensor._make_wrapper_subclass(
            cls,
            value.shape,
            strides=value.stride(),
            dtype=value.dtype,
            device=value.device,
            layout=value.layout,
            requires_grad=value.requires_grad,
        )
        self.tape, self.coefficients, self.rule, self.operands, self.rate = tape, coefficients, rule, operands, None
        if rule is not None:
            tape.append(self)
        return self

    @property
    def value(self) -> Tensor:
        """The coefficient of s^0."""
        return self.coefficients[0]

    shape = property(lambda self: self.coefficients[0].shape)
    dtype = property(lambda self: self.coefficients[0].dtype)
    device = property(lambda self: self.coefficients[0].device)
    ndim = property(lambda self: self.coefficients[0].ndim)

    def dim(self) -> int:
        """The value's."""
        return self.coefficients[0].dim()

    def size(self, dim: int | None = None) -> torch.Size | int:
        """The value's."""
        return self.coefficients[0].size(dim)

    def __len__(self) -> int:
        return len(self.coefficients[0])

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        from .taylor_rules import apply

        return apply(func, args, kwargs or {})

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        raise NoTaylorRule(str(func))

    def __repr__(self, **kwargs) -> str:
        return f"Series({len(self.coefficients)} coefficients, {self.value!r})"


def derivatives(f: Callable, t: Tensor | None, z: Tensor, order: int) -> list[Tensor]:
    """z', z'', ... along the solution of z' = f(t, z) through (t, z), by Taylor mode.

    Args:
        f: the vector field, called once as f(t, z) with tensors that are `Series`.
        t: a time that broadcasts to z, or None where f does not look at it.
        z: the state.
        order: how many derivatives, at least 1.

    Returns:
        The derivatives 1 to order, each in the shape of z; differentiable.

    Raises:
        NoTaylorRule: f does something that has no rule.
    """
    if order == 1:
        return [f(t, z)]
    tape = Tape()
    try:
        return _derivatives(tape, f, t, z, order)
    finally:
        tape.release()


def _derivatives(tape: Tape, f: Callable, t: Tensor | None, z: Tensor, order: int) -> list[Tensor]:
    state = Series(tape, [z])
    time = None if t is None else Series(tape, [t, torch.ones_like(t)] + [None] * (order - 2))
    out = f(time, state)
    if not isinstance(out, Series):  # constant
        return [out, *(torch.zeros_like(out) for _ in range(order - 1))]
    made_by_autograd([out])
    state.coefficients.append(out.value)
    for k in range(1, order):
        tape.advance(k, tape.behind(out) if k == order - 1 else None)
        state.coefficients.append(out.coefficients[k])
    return [torch.zeros_like(out.value) if c is None else c for c in state.coefficients[1:]]


def nested_derivatives(f: Callable, t: Tensor | None, z: Tensor, order: int) -> list[Tensor]:
    """As `derivatives`, by nested forward mode: f may be whatever torch.func.jvp takes; the cost doubles per order."""
    from .taylor_rules import Composed

    found = [f]
    if t is None:
        for _ in range(order - 1):
            found.append(lambda t, z, g=found[-1]: torch.func.jvp(lambda z: g(None, z), (z,), (f(None, z),))[1])
    else:
        for _ in range(order - 1):
            found.append(lambda t, z, g=found[-1]: torch.func.jvp(g, (t, z), (torch.ones_like(t), f(t, z)))[1])
    with Composed():
        return [g(t, z) for g in found]


def made_by_autograd(series: Iterable[Series]) -> None:
    """Raises NoTaylorRule if one of them went through an autograd.Function, whose backward pass would not be seen."""
    with torch._C.DisableTorchFunctionSubclass():
        for x in series:
            if x.grad_fn is not None:
                raise NoTaylorRule(f"a custom torch.autograd.Function ({x.grad_fn.name()})")
