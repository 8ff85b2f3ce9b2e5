"""States of any structure <-> the [batch, features] tensor that the engine works on."""

from __future__ import annotations

import functools
import math
import numbers
from dataclasses import dataclass
from typing import Any

import einops
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from . import transforms

_LOW_PRECISION = (torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Layout:
    """How a state (a tensor, or a tuple, list or dict of them) lies in one [batch, features] tensor.

    Attributes:
        tree: the structure's specification, or None for a plain tensor.
        shapes: of each leaf, without the batch dimension.
        dtype: of the leaves, as f sees them.
        work_dtype: of the engine's arithmetic: float32 for bfloat16 and float16 states, else `dtype`.
        time_dtype: of t, dt and error ratios: float64 for float64 and complex128 states, else float32.
        batch: number of samples.
        copies: approximations of the state that the solver steps side by side, one after the other among the features:
            the first is the solution, f is evaluated at the last.
    """

    tree: Any
    shapes: tuple[torch.Size, ...]
    dtype: torch.dtype
    work_dtype: torch.dtype
    time_dtype: torch.dtype
    batch: int
    device: torch.device
    copies: int = 1

    @classmethod
    def of(cls, z0) -> Layout:
        """The layout of an initial state.

        Raises:
            TypeError: z0 holds something other than floating-point or complex tensors, or mixed dtypes.
            ValueError: z0 is empty, has no batch dimension, mixed batch sizes or devices.
        """
        leaves, tree = ([z0], None) if isinstance(z0, Tensor) else pytree.tree_flatten(z0)
        for leaf in leaves:
            if not isinstance(leaf, Tensor):
                raise TypeError(
                    f"z0 must be a tensor, or a tuple or dict of tensors, but holds a {type(leaf).__name__}"
                )
        return _layout(tree, tuple([(leaf.dtype, leaf.device, leaf.shape) for leaf in leaves]))

    @property
    def time_rank(self) -> int:
        """Dimensions of the t that f receives under per-sample control: those of the first leaf."""
        return 1 + len(self.shapes[0])

    def pack(self, z) -> Tensor:
        """State -> [batch, features] in the state's own dtype. Differentiable; a view where the memory allows it."""
        if self.tree is None:
            if z.dim() == 2:
                return z
            return z.flatten(1) if z.dim() > 1 else z[:, None]  # not einops: it takes as long as a small f
        return einops.pack(pytree.tree_leaves(z), "b *")[0]

    def pack_start(self, z0) -> Tensor:
        """An initial state as the engine starts from it: packed, in the working dtype.

        Raises:
            ValueError: it holds NaN or infinity; the message names the samples.
        """
        flat = self.pack(z0)
        # A copy: what the caller does to z0 afterwards must not reach the grid.
        flat = flat.clone() if flat.dtype == self.work_dtype else flat.to(self.work_dtype)
        if not all_finite(flat):
            bad = (~transforms.worst(torch.isfinite(flat).all(dim=1))).nonzero().flatten().tolist()
            few = ", ".join(map(str, bad[:5])) + (f" and {len(bad) - 5} more" if len(bad) > 5 else "")
            raise ValueError(f"z0 must be finite, but samples {few} hold NaN or infinity")
        return self.copied(flat)

    @property
    def features(self) -> int:
        """Numbers in one approximation of a sample's state."""
        return sum(shape.numel() for shape in self.shapes)

    def copied(self, x: Tensor) -> Tensor:
        """The same numbers for all approximations of the state, [batch, features, ...]."""
        return x if self.copies == 1 else torch.cat([x] * self.copies, dim=1)

    def solution(self, flat: Tensor) -> Tensor:
        """Of all approximations the solution, [..., features]."""
        return flat if self.copies == 1 else flat[..., : self.features]

    def tip(self, flat: Tensor) -> Tensor:
        """Of all approximations the one that f is evaluated at, [..., features]."""
        return flat if self.copies == 1 else flat[..., -self.features :]

    def pack_figures(self, name: str, value) -> Tensor:
        """Numbers for every component of the state, real, [1 or batch, features].

        Args:
            name: of the argument, for messages.
            value: a tensor that broadcasts to the state or to one sample of it; or the state's structure of these and
                of numbers.
        """
        leaves, tree = [value], None
        if self.tree is None and isinstance(value, list | tuple) and all(isinstance(x, numbers.Real) for x in value):
            leaves = [torch.tensor(value, dtype=self.time_dtype)]
        if self.tree is not None:
            leaves, tree = pytree.tree_flatten(value)
            if tree != self.tree:
                raise ValueError(f"{name} must be a number or follow the structure of z0, {self.tree}, got {tree}")
        rows = []
        for leaf, shape in zip(leaves, self.shapes, strict=True):
            if not isinstance(leaf, Tensor | numbers.Real) or isinstance(leaf, bool):
                raise TypeError(f"{name} must hold numbers or tensors, got {type(leaf).__name__}")
            leaf = torch.as_tensor(leaf, device=self.device).detach()
            transforms.require_shared(name, leaf)
            if leaf.is_complex():
                raise TypeError(f"{name} must be real, got {leaf.dtype}")
            count = len(leaf) if leaf.dim() == len(shape) + 1 else 1
            try:
                rows.append(leaf.to(self.time_dtype).expand(count, *shape).reshape(count, -1))
            except RuntimeError as error:
                raise ValueError(
                    f"{name} must broadcast to z0, {(self.batch, *shape)}, or to a sample of it, got "
                    f"{tuple(leaf.shape)}"
                ) from error
            if count not in (1, self.batch):
                raise ValueError(f"{name} must have 1 or {self.batch} rows, one per sample, got {count}")
        most = max(len(row) for row in rows)
        return self.copied(torch.cat([row.expand(most, -1) for row in rows], dim=1))

    def unpack(self, flat: Tensor):
        """[..., features] -> state, with every leading dimension kept (batch, or times and batch)."""
        flat = self.solution(flat)
        flat = flat if flat.dtype == self.dtype else flat.to(self.dtype)
        lead = flat.shape[:-1]
        if self.tree is None:
            return flat.reshape(*lead, *self.shapes[0])
        leaves = einops.unpack(flat, [tuple(shape) for shape in self.shapes], _lead_pattern(len(lead)))
        return pytree.tree_unflatten(list(leaves), self.tree)

    def pack_derivative(self, dz, batch: int, autocast: bool, f: str = "f") -> Tensor:
        """F's return value, checked, -> [batch, features]; f: what messages call it.

        Raises:
            TypeError: another structure or dtype than the state's.
            ValueError: another shape or device.
        """
        leaves, tree = ([dz], None) if self.tree is None and isinstance(dz, Tensor) else pytree.tree_flatten(dz)
        if (tree != self.tree) if self.tree is not None else not isinstance(dz, Tensor):
            wanted = "a tensor" if self.tree is None else f"the structure of z0, {self.tree}"
            raise TypeError(f"{f} must return {wanted}, got {type(dz).__name__} with structure {tree}")
        for leaf, shape in zip(leaves, self.shapes, strict=True):
            if not isinstance(leaf, Tensor):
                raise TypeError(f"{f} must return tensors like z, got a {type(leaf).__name__}")
            if leaf.shape != (batch, *shape):
                raise ValueError(f"{f} must return dz/dt in the shape of z, {(batch, *shape)}, got {tuple(leaf.shape)}")
            if leaf.dtype != self.dtype and not (autocast and leaf.is_floating_point()):
                raise TypeError(
                    f"{f} must return dz/dt in the dtype of z, {self.dtype}, got {leaf.dtype}; "
                    f"convert z0 or the parameters of {f} so that they agree"
                )
            if leaf.device != self.device:
                raise ValueError(f"{f} must return dz/dt on the device of z, {self.device}, got {leaf.device}")
        return self.pack(dz)


def all_finite(x: Tensor) -> bool:
    """Whether x holds neither NaN nor infinity."""
    x = transforms.physical(x)
    # A finite sum says so in one pass; an infinite one may have overflowed.
    return math.isfinite(abs(x.sum().item())) or bool(torch.isfinite(x).all())


def _lead_pattern(rank: int) -> str:
    return " ".join(f"d{i}" for i in range(rank)) + " *"


@functools.lru_cache(maxsize=256)
def _layout(tree, leaves: tuple[tuple[torch.dtype, torch.device, torch.Size], ...]) -> Layout:
    """See `Layout.of`. Remembered, for a layer's states look the same at every call, and a small solve takes 1 ms."""
    if not leaves:
        raise ValueError("z0 is empty; pass a tensor, or a tuple or dict with at least one tensor")
    for dtype, _, shape in leaves:
        if not (dtype.is_floating_point or dtype.is_complex):
            raise TypeError(f"z0 must be floating-point or complex, got {dtype}; convert it, e.g. z0.float()")
        if len(shape) == 0:
            raise ValueError("z0 needs a batch dimension, got a tensor without dimensions; use z0[None]")
    dtypes, devices, shapes = zip(*leaves, strict=True)
    for what, values in (
        ("dtype", dict.fromkeys(dtypes)),
        ("device", dict.fromkeys(devices)),
        ("batch size (first dimension)", dict.fromkeys(shape[0] for shape in shapes)),
    ):
        if len(values) > 1:
            kind = TypeError if what == "dtype" else ValueError
            raise kind(f"all tensors of z0 must share one {what}, got {', '.join(map(str, values))}")
    batch = shapes[0][0]
    if batch == 0:
        raise ValueError("z0 has batch size 0; pass at least one sample")
    if all(shape.numel() == 0 for shape in shapes):
        raise ValueError(f"z0 must not be empty, got {', '.join(str(tuple(shape)) for shape in shapes)}")
    work = torch.float32 if dtypes[0] in _LOW_PRECISION else dtypes[0]
    return Layout(
        tree=tree,
        shapes=tuple(shape[1:] for shape in shapes),
        dtype=dtypes[0],
        work_dtype=work,
        time_dtype=torch.float64 if work in (torch.float64, torch.complex128) else torch.float32,
        batch=batch,
        device=devices[0],
    )
