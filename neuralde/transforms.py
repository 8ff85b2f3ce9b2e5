"""torch.func's transforms and forward-mode AD around a solve, and what its control flow may read of their tensors.

Step sizes are constants and Python decides on them, so figures have to be plain numbers. What forward mode adds to a
number is left out. The copies of a sample that vmap solves side by side share their steps, and the worst of them
decides.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd import forward_ad

try:
    from torch._C._functorch import (
        TransformType,
        get_interpreter_stack,
        get_unwrapped,
        is_batchedtensor,
        is_functorch_wrapped_tensor,
        is_legacy_batchedtensor,
        maybe_get_bdim,
        peek_interpreter_stack,
    )
except ImportError:  # a torch that names them otherwise: solves work as ever, only not inside of its transforms

    def peek_interpreter_stack() -> None:
        """No transform is known of."""

    def is_functorch_wrapped_tensor(x: Tensor) -> bool:
        """No tensor is known to be one."""
        return False

    is_legacy_batchedtensor = is_functorch_wrapped_tensor


def active() -> bool:
    """Whether a transform of torch.func, or a level of forward-mode AD, is around what runs now."""
    return peek_interpreter_stack() is not None or _dual()


def _dual() -> bool:
    return getattr(forward_ad, "_current_level", -1) >= 0


def order() -> int:
    """How many derivatives the transforms around what runs now take of it."""
    kinds = [level.key() for level in get_interpreter_stack() or ()]
    reverse, forward = kinds.count(TransformType.Grad), kinds.count(TransformType.Jvp)
    return reverse + max(forward, _dual())  # jvp is made of forward mode


def recording() -> bool:
    """Whether operations may be recorded or transformed, and must leave their operands as they are: no `out=`."""
    return torch.is_grad_enabled() or active()


def wrapped(x: Tensor) -> bool:
    """Whether a transform of torch.func is following x."""
    return is_functorch_wrapped_tensor(x)


def batched(x: Tensor) -> bool:
    """Whether x stands for several tensors, as the cotangents of `autograd.grad(is_grads_batched=True)` do."""
    return is_legacy_batchedtensor(x) or wrapped(x)


def derived(x: Tensor) -> bool:
    """Whether something may be differentiated by x."""
    if not wrapped(x):
        following = x.requires_grad and torch.is_grad_enabled()
        return following or (_dual() and forward_ad.unpack_dual(x).tangent is not None)
    while wrapped(x):
        if x.requires_grad or _dual():  # what forward mode follows on a lower level can't be seen
            return True
        x = get_unwrapped(x)
    return x.requires_grad


def require_shared(name: str, x: Tensor):
    """Raises ValueError if x, an argument of that name, differs between the copies that vmap makes."""
    while wrapped(x):
        if is_batchedtensor(x):
            raise ValueError(
                f"{name} can't be mapped by vmap, whose copies of a sample share their steps; solve once for each of "
                "its values, or make the copies samples of one batch: t, rtol, atol and stops may be theirs"
            )
        x = get_unwrapped(x)


def physical(x: Tensor) -> Tensor:
    """The numbers in x: without derivatives, those of all copies, with their dimensions among its own."""
    return unwrapped(x.detach())


def unwrapped(x: Tensor) -> Tensor:
    """The tensor that the transforms wrap."""
    while wrapped(x):
        x = get_unwrapped(x)
    return x


def worst(x: Tensor) -> Tensor:
    """A figure that all copies share, without derivatives: the largest of their sizes, NaN if one of them is NaN.

    Of conditions it is whether all hold. Where nothing is mapped it is x.
    """
    x = x.detach()
    while wrapped(x):
        dim = maybe_get_bdim(x)  # -1 where this level doesn't map x
        x = get_unwrapped(x)
        if dim >= 0:
            x = x.all(dim) if x.dtype == torch.bool else x.abs().amax(dim)
    return x
