"""The derivatives of f that implicit methods need: of every sample, in one pass."""

from __future__ import annotations

import contextlib
from typing import NamedTuple

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from .. import transforms
from ..graph import behind
from .base import VectorField


class Linearization(NamedTuple):
    """f and its derivatives at one point of every sample.

    Attributes:
        value: f(t, z), [batch, features].
        jacobian: ∂f/∂z, of row i by column j at [:, i, j], [batch, features, features].
        rate: ∂f/∂t, [batch, features], or None where not asked for.
        eps: of the dtype that f returned, which may be a coarser one than the value's.
    """

    value: Tensor
    jacobian: Tensor
    rate: Tensor | None
    eps: float


def linearize(f: VectorField, t: Tensor, z: Tensor, rate: bool = True) -> Linearization:
    """One evaluation of f, and as many backward passes through it as z has features, batched where f allows it.

    Samples must be independent: a backward pass is made for all of them at once. Differentiable if grad mode is on;
    the derivatives are taken also where it is off.

    Args:
        t: [batch], or [1] for the whole batch.
        z: [batch, features], real.
        rate: whether ∂f/∂t is wanted.

    Raises:
        TypeError: f depends on z, but cuts autograd's graph (detach, numpy).
    """
    if transforms.active():
        return _transformed(f, t, z, rate)
    taped = torch.is_grad_enabled()
    inference = torch.is_inference_mode_enabled()
    with ordinary(), torch.inference_mode(False), torch.enable_grad():
        # Ends of their own: f may depend on z in other ways, through tensors that it closes over.
        outside = taped and z.requires_grad
        z = z.view_as(z) if outside else (z.clone() if inference else z.detach()).requires_grad_()
        t = t.detach().clone().requires_grad_(rate)
        if rate and outside:
            t = _Behind.apply(t, z)
        value = f(f.times(t)[0], z)
        eps, value = torch.finfo(value.dtype).eps, value.to(z.dtype)
        taped = taped and (outside or _reaches_others(value, (z, t)))
        own = rate and len(t) == len(z)  # each sample has its own t, and gets ∂f/∂t with ∂f/∂z
        inputs = [z, t] if own else [z]
        products = _products(value, inputs, _directions(value), taped)
        if products[0] is None:
            _require_constant(f, f.times(t)[0], z, value)
        jacobian, *slopes = _filled(products, inputs, len(z[0]))
        slope = None
        if rate:
            slope = slopes[0].T if own else _shared_rate(value, t, taped, eps)
    found = value, jacobian.movedim(0, 1), slope
    return Linearization(*(x if taped or x is None else x.detach() for x in found), eps)


def _transformed(f: VectorField, t: Tensor, z: Tensor, rate: bool) -> Linearization:
    """`linearize` by torch.func's own transforms, which those around this one go through. Always differentiable."""
    value, back = torch.func.vjp(lambda t, z: f(f.times(t)[0], z), t, z)
    eps = torch.finfo(value.dtype).eps
    _, jacobian = torch.func.vmap(back)(_directions(value))
    if not bool(transforms.physical(jacobian).any()):
        _require_constant(f, f.times(t)[0], z, value)
    slope = None
    if rate:
        # Linear in its cotangent, so that the sum over components (and samples, where they share t) comes apart again.
        _, apart = torch.func.vjp(lambda cotangent: back(cotangent)[0].sum(), torch.zeros_like(value))
        (slope,) = apart(torch.ones_like(value[0, 0]))
    return Linearization(*(x if x is None else x.to(z.dtype) for x in (value, jacobian.movedim(0, 1), slope)), eps)


class _Behind(torch.autograd.Function):
    """t, made after z in autograd's order.

    Autograd looks for the inputs of a derivative among all nodes that are as young as the oldest of them: with a leaf
    among them, at every step, through the whole solve before it.
    """

    @staticmethod
    def forward(ctx, t: Tensor, z: Tensor) -> Tensor:
        return t.clone()

    @staticmethod
    def backward(ctx, g: Tensor) -> tuple[Tensor, None]:
        return g, None


def _reaches_others(value: Tensor, own: tuple[Tensor, ...]) -> bool:
    """Whether the graph behind a value has a leaf beside its own ones: without, nobody can want its gradient."""
    leaves = (node.variable for node in behind([value]) if type(node).__name__ == "AccumulateGrad")
    return any(all(leaf is not x for x in own) for leaf in leaves)


def _directions(value: Tensor) -> Tensor:
    """The unit vectors of every sample at once, [features, batch, features]."""
    batch, features = value.shape
    return torch.eye(features, dtype=value.dtype, device=value.device)[:, None].expand(-1, batch, -1)


@torch.no_grad()
def _require_constant(f: VectorField, now, z: Tensor, value: Tensor):
    """Raises TypeError if a value that autograd sees no z in depends on z all the same."""
    moved = f(now, z + 0.01 * (1.0 + z.abs())).to(value.dtype)
    same = torch.isclose(moved, value.detach(), rtol=1e-6, atol=0.0, equal_nan=True)
    if not bool(transforms.physical(same).all()):
        raise TypeError(
            "a solver that takes the Jacobian of f needs an f that autograd can follow, but f depends on z in a way "
            "that it can't (detach, numpy, no_grad inside of f); write f in differentiable operations of torch, or use "
            "an explicit solver (solver='tsit5')"
        )


def _products(value: Tensor, inputs: list[Tensor], cotangents: Tensor, taped: bool) -> list[Tensor | None]:
    """Vector-Jacobian products, each [cotangents, *input.shape]; None where the value does not depend on an input."""
    if not value.requires_grad:
        return [None] * len(inputs)
    how = {"retain_graph": True, "create_graph": taped, "allow_unused": True}
    try:
        found = torch.autograd.grad(value, inputs, cotangents, is_grads_batched=True, **how)
    except RuntimeError:  # something in f's backward pass can't be batched
        single = [torch.autograd.grad(value, inputs, cotangent, **how) for cotangent in cotangents]
        found = [None if parts[0] is None else torch.stack(parts) for parts in zip(*single, strict=True)]
    return list(found)


def _filled(products: list[Tensor | None], inputs: list[Tensor], count: int) -> list[Tensor]:
    """The products, 0 where there are none."""
    return [x.new_zeros(count, *x.shape) if g is None else g for x, g in zip(inputs, products, strict=True)]


def _shared_rate(value: Tensor, t: Tensor, taped: bool, eps: float) -> Tensor:
    """∂f/∂t of every component where all samples share one t, [batch, features].

    The backward pass into t sums over all components, but it is linear in its cotangent: differentiating it with
    respect to that takes the sum apart again. eps: that of f's arithmetic.
    """
    if not value.requires_grad:
        return torch.zeros_like(value)
    cotangent = torch.linspace(0.5, 1.5, value.numel(), dtype=value.dtype, device=value.device).view(value.shape)
    cotangent.requires_grad_()
    try:
        (total,) = torch.autograd.grad(value, t, cotangent, create_graph=True, allow_unused=True)
        if total is None:
            return torch.zeros_like(value)
        slope = None
        if total.requires_grad:
            how = {"retain_graph": True, "create_graph": taped, "allow_unused": True}
            (slope,) = torch.autograd.grad(total, cotangent, torch.ones_like(total), **how)
        slope = torch.zeros_like(value) if slope is None else slope
        # Some backward passes (once_differentiable) don't refuse to be differentiated, they are only left out of it:
        # then the parts don't make up the sum.
        parts = (cotangent * slope).detach()
        if not bool((parts.sum() - total.detach()).abs() > eps**0.5 * parts.abs().sum()):
            return slope
    except RuntimeError:
        pass
    # f's backward pass can't be differentiated: one pass for every component.
    every = torch.eye(value.numel(), dtype=value.dtype, device=value.device).view(-1, *value.shape)
    return _filled(_products(value, [t], every, taped), [t], len(every))[0].view(value.shape)


def ordinary():
    """A context for autograd inside of inference mode; to be made while that is on."""
    return _Ordinary() if torch.is_inference_mode_enabled() else contextlib.nullcontext()


class _Ordinary(TorchFunctionMode):
    """Clones the inference tensors that enter a computation: autograd can't keep them."""

    def __init__(self):
        super().__init__()
        self._clones: dict[int, tuple[Tensor, Tensor]] = {}  # with the originals, so that ids stay unique

    def __torch_function__(self, func, types, args=(), kwargs=None):
        return func(*pytree.tree_map(self._clone, args), **pytree.tree_map(self._clone, kwargs or {}))

    def _clone(self, x):
        if not isinstance(x, Tensor) or not x.is_inference():
            return x
        if id(x) not in self._clones:
            self._clones[id(x)] = x, x.clone()
        return self._clones[id(x)][1]
