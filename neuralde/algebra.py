"""Control figures: one number per group of samples that share a step size.

A batch under joint control is one group. Its figures are Python numbers, which cost no kernels; those of many groups
are tensors [groups]. The loop and the controller are written once, in the operations that this file has for both.
Inside of torch.func's transforms, figures are made plain where they are read, and only there.
"""

from __future__ import annotations

import cmath
import math
from typing import Protocol

import torch
from torch import Tensor

from . import transforms

Figure = float | int | bool | Tensor


class Algebra(Protocol):
    """The operations; all of them elementwise over the groups."""

    def read(self, x: Tensor) -> Figure:
        """A tensor [groups] as a figure."""

    def tensor(self, x: Figure, like: Tensor) -> Tensor:
        """A figure as a tensor [groups], of the dtype and device of `like` (or bool)."""

    def full(self, value: float | bool, like: Figure) -> Figure:
        """The same value for every group."""

    def where(self, condition: Figure, x: Figure, y: Figure) -> Figure:
        """x where the condition holds, else y."""

    def minimum(self, x: Figure, y: Figure) -> Figure:
        """The smaller one."""

    def maximum(self, x: Figure, y: Figure) -> Figure:
        """The larger one."""

    def clamp(self, x: Figure, low: float | None = None, high: float | None = None) -> Figure:
        """x between bounds."""

    def power(self, x: Figure, exponent: float) -> Figure:
        """x to a power, inf where 0 is taken to a negative one."""

    def divide(self, x: Figure, y: Figure) -> Figure:
        """x / y as IEEE 754 has it, without exceptions."""

    def invert(self, condition: Figure) -> Figure:
        """Where it does not hold."""

    def finite(self, x: Figure) -> Figure:
        """Where x is finite."""

    def count(self, condition: Figure) -> int:
        """In how many groups it holds. Reads from the device."""

    def known(self, x: Figure) -> Figure:
        """x, infinite where it is not a number."""

    def rounded(self, x: Figure, size: Figure) -> Figure:
        """x with few binary digits: down to a multiple of a power of two, between a 64th and a 32nd of size."""


class _Numbers:
    minimum = staticmethod(min)
    maximum = staticmethod(max)
    count = staticmethod(int)
    finite = staticmethod(cmath.isfinite)

    @staticmethod
    def read(x):
        return x.item()

    @staticmethod
    def tensor(x, like):
        return torch.full((1,), x, dtype=torch.bool if isinstance(x, bool) else like.dtype, device=like.device)

    @staticmethod
    def full(value, like):
        return value

    @staticmethod
    def where(condition, x, y):
        return x if condition else y

    @staticmethod
    def clamp(x, low=None, high=None):
        x = x if low is None or x >= low else low
        return x if high is None or x <= high else high

    @staticmethod
    def power(x, exponent):
        if x == 0.0 and exponent < 0.0:
            return math.inf
        return x**exponent

    @staticmethod
    def divide(x, y):
        if y:
            return x / y
        return math.nan if x == 0.0 or x != x else math.copysign(math.inf, x)

    @staticmethod
    def invert(condition):
        return not condition

    @staticmethod
    def known(x):
        return math.inf if x != x else x

    @staticmethod
    def rounded(x, size):
        unit = math.ldexp(1.0, math.frexp(size)[1] - 6)
        return math.floor(x / unit) * unit


class _Tensors:
    where = staticmethod(torch.where)
    minimum = staticmethod(torch.minimum)
    maximum = staticmethod(torch.maximum)
    power = staticmethod(torch.pow)
    divide = staticmethod(torch.div)
    clamp = staticmethod(torch.clamp)
    finite = staticmethod(torch.isfinite)
    invert = staticmethod(torch.logical_not)

    @staticmethod
    def read(x):
        return x

    @staticmethod
    def tensor(x, like):
        return x

    @staticmethod
    def full(value, like):
        return torch.full_like(like, value, dtype=torch.bool if isinstance(value, bool) else None)

    @staticmethod
    def count(condition):
        return int(condition.count_nonzero())

    @staticmethod
    def known(x):
        return x.nan_to_num(nan=math.inf)

    @staticmethod
    def rounded(x, size):
        unit = torch.ldexp(torch.ones_like(size), torch.frexp(size).exponent - 6)
        return torch.floor(x / unit) * unit


class _SharedNumbers(_Numbers):
    @staticmethod
    def read(x):
        return transforms.worst(x).item()


class _SharedTensors(_Tensors):
    read = staticmethod(transforms.worst)


TENSORS: Algebra = _Tensors()
_PLAIN: tuple[Algebra, Algebra] = TENSORS, _Numbers()
_SHARED: tuple[Algebra, Algebra] = _SharedTensors(), _SharedNumbers()


def of(joint: bool) -> Algebra:
    """The algebra of one group (joint control) or of many, as what is around the solve wants it."""
    return (_SHARED if transforms.active() else _PLAIN)[joint]
