"""A torchdiffeq call in our terms: one sample, one step size, a scalar t."""

from __future__ import annotations

import functools
import types
import warnings
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from ..field import Restricted


@dataclass(frozen=True)
class Form:
    """What a state of torchdiffeq's looks like, and how it becomes a batch of one.

    Holds none of its numbers: func's wrapper closes over it, and must not seem to depend on y0.

    Attributes:
        is_tuple: whether it is a tuple of tensors. shapes: theirs, or the one tensor's. dtype: of all of them.
    """

    is_tuple: bool
    shapes: tuple[torch.Size, ...]
    dtype: torch.dtype

    def enclose(self, y):
        """A state as a batch of one."""
        # A plain tensor, the common case, is spared the walk through a structure.
        return y[None] if isinstance(y, Tensor) else pytree.tree_map(lambda x: x[None], y)

    def disclose(self, z):
        """The state of a batch of one."""
        return z[0] if isinstance(z, Tensor) else pytree.tree_map(lambda x: x[0], z)

    def outputs(self, zs):
        """[times, 1, ...] -> [times, ...]."""
        return pytree.tree_map(lambda x: x[:, 0], zs)

    def derivative(self, dy):
        """What func returns, in the structure, shape and dtype of the state."""
        if not self.is_tuple:
            return dy.to(self.dtype) if isinstance(dy, Tensor) else dy
        dy = tuple(dy)
        if len(dy) != len(self.shapes):
            raise ValueError(f"func must return {len(self.shapes)} tensors like y0, got {len(dy)}")
        return tuple(d.to(self.dtype).reshape(shape) for d, shape in zip(dy, self.shapes, strict=True))

    def flatten(self, y) -> Tensor:
        """A state in one dimension."""
        return torch.cat([x.reshape(-1) for x in pytree.tree_leaves(y)])

    def unflatten(self, flat: Tensor):
        """[..., features] -> state, with every leading dimension kept."""
        pieces = flat.split([shape.numel() for shape in self.shapes], dim=-1)
        leaves = tuple(x.reshape((*flat.shape[:-1], *shape)) for x, shape in zip(pieces, self.shapes, strict=True))
        return leaves if self.is_tuple else leaves[0]


class Case:
    """What torchdiffeq's functions are given, checked.

    torchdiffeq's state has no batch dimension: the whole of it is one sample here, which is what its single step size
    and norm make of it.

    Args:
        func: f(t, y).
        y0: a tensor of any shape, or a tuple of them.
        t: [times].
        wanted: where not None, the only tensors beside y0 and t that may get gradients.

    Attributes:
        form: of the state. y0, t: on one device; tensors of a tuple in one dtype.
        time_dtype: of the t that was given.
        z0: y0 as one sample. direction: +1 or -1.
        field: f(t, z) on one sample, for `ODE`.

    Raises:
        TypeError, ValueError: y0 or t is wrong.
    """

    def __init__(self, func: Callable, y0, t: Tensor, wanted: tuple[Tensor, ...] | None = None):
        if not callable(func):
            raise TypeError(f"func must be a callable func(t, y), got {type(func).__name__}")
        self.func, is_tuple = func, not isinstance(y0, Tensor)
        leaves = tuple(y0) if isinstance(y0, tuple | list) else (y0,)
        if not leaves or not all(isinstance(x, Tensor) for x in leaves):
            raise TypeError("y0 must be a tensor or a tuple of tensors")
        dtype = functools.reduce(torch.promote_types, (x.dtype for x in leaves))
        leaves = tuple(x.to(dtype) for x in leaves)
        self.form = Form(is_tuple, tuple(x.shape for x in leaves), dtype)
        self.y0 = leaves if is_tuple else leaves[0]
        self.z0 = self.form.enclose(self.y0)
        given = _times(t, leaves[0].device)
        # As `solve` has its times, so that grids and output times agree to the last digit.
        self.t, self.time_dtype = given.to(_time_dtype(dtype)), given.dtype
        self.direction = -1 if len(t) > 1 and bool(self.t[0] > self.t[1]) else 1
        self.field = self._field(wanted)

    def _field(self, wanted: tuple[Tensor, ...] | None) -> Callable:
        # A function, whose closure shows func to whoever looks for what gets gradients.
        func, form = self.func, self.form

        def field(t, z):
            return form.enclose(form.derivative(func(t, form.disclose(z))))

        return field if wanted is None else Restricted(field, wanted)

    def flat_field(self, t: Tensor, flat: Tensor) -> Tensor:
        """dy/dt of the state in one dimension."""
        form = self.form
        return form.flatten(form.disclose(self.field(t, form.enclose(form.unflatten(flat)))))

    def tolerance(self, name: str, value):
        """A number, or tensors that follow the state, with its batch of one in front."""
        if isinstance(value, Tensor) and value.requires_grad:
            raise ValueError(f"{name} must not require gradients")
        if not isinstance(value, Tensor | tuple | list):
            return value
        if isinstance(value, Tensor) and value.dim() == 0:
            return float(value)
        if not self.form.is_tuple:
            return torch.as_tensor(value).to(self.y0.device).expand(self.y0.shape)[None]
        parts = tuple(value)
        if len(parts) != len(self.form.shapes):
            raise ValueError(f"{name} must have one entry for each of the {len(self.form.shapes)} tensors of y0")
        parts = [torch.as_tensor(x, device=y.device) for x, y in zip(parts, self.y0, strict=True)]
        # torchdiffeq wants a tensor for one of a tuple flat.
        flat = (
            x.expand(shape.numel()).reshape(shape) if x.dim() == 1 else x
            for x, shape in zip(parts, self.form.shapes, strict=True)
        )
        return tuple(x.expand(shape)[None] for x, shape in zip(flat, self.form.shapes, strict=True))

    def observer(self, allowed: tuple[str, ...], method: str):
        """What calls func's callbacks, or None where it has none. Warns of those that the method can't call."""
        names = {"callback_step": "attempt", "callback_accept_step": "accept", "callback_reject_step": "reject"}
        found = {name for name in names if hasattr(self.func, name)}
        if found - set(allowed):
            warnings.warn(
                f"method {method!r} does not support callbacks {sorted(found - set(allowed))}: they are not called",
                stacklevel=4,
            )
        found &= set(allowed)
        if not found:
            return None

        def calling(callback):
            # torchdiffeq's dt is positive in either direction.
            return lambda t, z, dt: callback(t.reshape(()), self.form.disclose(z), dt.reshape(()).abs())

        return types.SimpleNamespace(**{names[name]: calling(getattr(self.func, name)) for name in found})


def _times(t: Tensor, device: torch.device) -> Tensor:
    if not isinstance(t, Tensor):
        raise TypeError(f"t must be a tensor of times, got {type(t).__name__}")
    if not t.is_floating_point():
        raise TypeError(f"t must be a floating-point tensor, got {t.dtype}")
    if t.dim() != 1 or not len(t):
        raise ValueError(f"t must be [times] with at least one, got {tuple(t.shape)}")
    if t.device != device:
        warnings.warn(f"t is on {t.device}, y0 on {device}: t is moved there", stacklevel=5)
    return t.to(device)


def _time_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype in (torch.float64, torch.complex128) else torch.float32
